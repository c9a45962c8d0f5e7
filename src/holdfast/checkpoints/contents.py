"""What a folder holds, asked once for every verb: a full model, an adapter, or both, which is refused.

The order is that of transformers 5 and PEFT: of one model, `model.safetensors` comes before an index of shards (which
may be left over from an earlier save), and safetensors before pickles, which are never loaded here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from holdfast.errors import AdapterError, CheckpointError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
INPUT_SCALE_FILE = "holdfast_input_scale.safetensors"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# In a folder of experts that a tuner of holdfast puts on a base: which tuner.
TUNER_FILE = "holdfast_tuner.json"
PICKLED_MODELS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PICKLED_ADAPTER = "adapter_model.bin"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# What a trainer keeps beside an adapter to go on with: no part of the model. By the beginning of the name.
_TRAINER_STATE = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states", "global_step")
# The head of a reward or value model, which answers no question.
_VALUE_HEADS = ("value_head", "v_head", "score_head")
# What the CRAM tuner keeps beside an expert for its router.
_CENTROID = "centroid.safetensors"

Kind = Literal["model", "adapter", "none"]


def kind_of(folder: Path | str) -> Kind:
    """Whether a folder holds a full model or an adapter.

    Raises: CheckpointError: full weights and an adapter's configuration in one folder. Which of the two is meant cannot
        be seen: transformers would run the sum, and a merged model saved there is the sum already.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "none"
    weights = _full_weights(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        return "model" if weights is not None else "none"
    if weights is not None:
        beside = ADAPTER_WEIGHTS if (folder / ADAPTER_WEIGHTS).exists() else ADAPTER_CONFIG
        raise CheckpointError(
            f"{folder} describes two models: {weights} (a full model) and {beside} (an adapter). To use the full "
            f"model, move adapter_config.json and the adapter's weights to another folder; to use the adapter, move "
            f"{weights} away."
        )
    return "adapter"


def require_model_folder(folder: Path | str) -> None:
    """Raise CheckpointError where a folder that must hold a full model holds an adapter, or both."""
    if kind_of(folder) == "adapter":
        raise CheckpointError(
            f"{folder} is an adapter ({ADAPTER_CONFIG}); expected a full model. Pass its base as the model and this "
            "folder as the adapter on top of it."
        )


def require_safe_adapter(folder: Path | str) -> tuple[Path, ...]:
    """The files with trained weights beside an adapter that are to be read with it; refuses what cannot be.

    LLaVA, ms-swift and others train a projector, a tower or new embeddings whole and save them beside the LoRA. Without
    them the adapter is another model, so every file with weights counts that is not known for a trainer's state.

    Raises: AdapterError: a pickle, by name: it could run code, and is never loaded.
    """
    folder = Path(folder)
    if (folder / PICKLED_ADAPTER).exists() and not (folder / ADAPTER_WEIGHTS).is_file():
        raise AdapterError(
            f"{folder} has no {ADAPTER_WEIGHTS}; {PICKLED_ADAPTER} is pickled and never loaded: save it again as "
            "safetensors."
        )
    names = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    own = {ADAPTER_WEIGHTS, PICKLED_ADAPTER, INPUT_SCALE_FILE, _CENTROID, SINGLE_FILE, *PICKLED_MODELS}
    extra = sorted(name for name in names - own if not name.startswith((*_TRAINER_STATE, *_VALUE_HEADS, ".")))
    found = [name for name in extra if name.endswith(".safetensors") and not _is_shard(name)]
    for name in extra:
        # One that was saved again as safetensors is read from there.
        if name.endswith(PICKLE_SUFFIXES) and f"{name.rpartition('.')[0]}.safetensors" not in found:
            raise AdapterError(
                f"{folder / name} holds trained weights beside the adapter, and is pickled, so it is never loaded: "
                "without it the model would not be the tuned one. Save it again as safetensors under the same name, "
                "or merge all into the base with the tool that trained it. If it is no part of the model, move it away."
            )
    return tuple(folder / name for name in found)


def _full_weights(folder: Path) -> str | None:
    """The file that says that a full model is here, or None."""
    for name in (SINGLE_FILE, INDEX_FILE, *PICKLED_MODELS):
        if (folder / name).is_file():
            return name
    shards = sorted(path.name for path in folder.glob("*-of-*.safetensors") if _is_shard(path.name))
    return shards[0] if shards else None


def _is_shard(name: str) -> bool:
    return name.startswith("model-") and "-of-" in name
