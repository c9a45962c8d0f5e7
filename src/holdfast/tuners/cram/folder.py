"""A CRAM folder on disk: a marker, a router, and one ordinary PEFT LoRA folder per expert. No pickle anywhere.

holdfast_tuner.json        which tuner reads this folder
router.json                configuration, encoder, and per expert what is not a tensor and the sha256 of its weights
router.safetensors         group prototypes, centroids, and a few values of the base and of the encoder; a guard's
                           evidence and probe
experts/NN-task/           adapter_config.json, adapter_model.safetensors
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from holdfast.checkpoints.adapter import WEIGHTS_FILE, LoraAdapter, is_adapter
from holdfast.checkpoints.adapter_config import settle_adapter_config
from holdfast.checkpoints.reader import CheckpointReader
from holdfast.checkpoints.value import Checkpoint
from holdfast.config import decode, encode
from holdfast.data.names import slug
from holdfast.errors import AdapterError, ConfigError, StorageError
from holdfast.files import fsync, fsync_folder, read_json, storage_error, write_json
from holdfast.models.families import decoder_blocks
from holdfast.models.load import load
from holdfast.models.loaded import LoadedModel
from holdfast.models.tuner import MARKER, is_tuner_folder
from holdfast.tuners.cram.cram_config import CramConfig
from holdfast.tuners.cram.guard import Guard, check_guard, guard_data, guard_tensors, read_guard
from holdfast.tuners.cram.model import Cram, Factors, find_targets
from holdfast.tuners.cram.router import ExpertCard, Router
from holdfast.tuners.cram.router_features import Encoder, check_identity, make_encoder

# 4: a guard may lie in the router's two files. A folder of format 3 has none and is read as such.
FORMAT = 4
READ_FORMATS = (3, 4)
ROUTER, TENSORS, EXPERTS = "router.json", "router.safetensors", "experts"
# In TENSORS, followed by the name of a weight.
BASE_PROBE, ENCODER_PROBE, HEAD_PROBE = "base.probe.", "encoder.probe.", "head.probe."
_PROBED_VALUES = 16
# Of a safetensors header.
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_RESTORE = f"Restore {ROUTER} and {TENSORS} from where the folder is intact, or learn the tasks again."


def save_expert(
    folder: Path,
    factors: Factors,
    *,
    base: str,
    base_config: Mapping[str, Any] | None = None,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """An expert as a stock PEFT LoRA folder: `alpha = r`, so its scale is 1 whatever the rank of a linear.

    base: hub id or folder. base_config: of the base, so that `AutoPeftModel` finds its class. beside: JSON files to
    write next to it, name -> plain data.

    factors: linear name -> A (rank, in), B (out, rank).

    Raises: AdapterError: no linear. StorageError: the disk is full or the folder cannot be written.
    """
    if not factors:
        raise AdapterError(f"{folder}: an expert without any linear cannot be saved.")
    ranks = {name: a.shape[0] for name, (a, _) in factors.items()}
    rank = max(ranks.values())
    # Full names, escaped: PEFT reads these keys as regular expressions.
    pattern = {re.escape(name): r for name, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=sorted(ranks),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        base_model_name_or_path=base,
        inference_mode=True,
        bias="none",
    )
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.detach().cpu().contiguous()
    with new_folder(folder) as temporary:
        config.save_pretrained(str(temporary))
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        settle_adapter_config(temporary, base=base, base_config=base_config)
        for name, value in (beside or {}).items():
            write_json(temporary / name, value)


def load_expert(folder: Path) -> Factors:
    """Factors of a LoRA folder, fp32 on the CPU; any scale is folded into B.

    Raises: AdapterError: no LoRA folder, or one that also replaces tensors or scales the base's input columns.
    """
    adapter = LoraAdapter(folder)
    try:
        if more := [*adapter.saved, *adapter.dense, *adapter.input_scale]:
            raise AdapterError(
                f"{folder} holds more than LoRA factors ({more[0]}): an expert only adds to the base's linear layers. "
                "Train it without modules_to_save, or edit it with the coefficient dropped."
            )
        factors = {}
        for name, entry in adapter.modules.items():
            a, b = adapter.read_factors(name)
            factors[name] = (a, b if entry.scaling == 1 else b * entry.scaling)
        return factors
    finally:
        adapter.close()


def save_cram(
    folder: Path,
    router: Router,
    experts: Sequence[Path],
    *,
    loaded: LoadedModel,
    encoder: Encoder,
    guard: Guard | None = None,
) -> None:
    """Publish a CRAM folder from expert folders (copied byte for byte), in one rename.

    Raises: StorageError: `folder` exists. AdapterError: an expert folder that is no LoRA adapter.
    """
    with new_folder(folder) as temporary:
        names = [_folder_name(i, card.name) for i, card in enumerate(router.experts)]
        for name, source in zip(names, experts, strict=True):
            if not _is_expert(source):
                raise AdapterError(
                    f"{source} is no PEFT adapter with safetensors weights; expected the folder of an expert."
                )
            shutil.copytree(source, temporary / EXPERTS / name)
        tensors = {BASE_PROBE + name: values for name, values in probe(block_weights(loaded)).items()}
        tensors |= {ENCODER_PROBE + name: values for name, values in probe(encoder.probed()).items()}
        if guard is not None:
            tensors |= {HEAD_PROBE + name: values for name, values in probe(head_weights(loaded)).items()}
            tensors |= guard_tensors(guard)
        if router.experts:
            tensors["group.prototypes"] = router.prototypes()
        rows = []
        for i, (card, name) in enumerate(zip(router.experts, names, strict=True)):
            tensors[f"expert.{i}.text_centroid"] = card.text_centroid
            if card.image_centroid is not None:
                tensors[f"expert.{i}.image_centroid"] = card.image_centroid
            rows.append(
                {
                    "name": card.name,
                    "folder": f"{EXPERTS}/{name}",
                    "sha256": _digest(temporary / EXPERTS / name),
                    "group": card.group,
                    "samples": card.samples,
                    "images": card.images,
                    "text_scatter": card.text_scatter,
                    "image_scatter": card.image_scatter,
                    "text_floor": card.text_floor,
                    "image_radius": card.image_radius,
                }
            )
        # Copies: two names of one tensor cannot be saved.
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, temporary / TENSORS)
        write_json(
            temporary / ROUTER,
            {
                "format": FORMAT,
                "base": base_of(loaded),
                "encoder": encoder.identity,
                "config": encode(router.config),
                "experts": rows,
                **({} if guard is None else {"guard": guard_data(guard)}),
            },
        )
        write_json(temporary / MARKER, {"tuner": "cram", "format": FORMAT})


def save_pretrained(cram: Cram, folder: Path) -> None:
    """Publish the CRAM that a model carries, in one rename."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        sources = [Path(scratch) / str(i) for i in range(len(cram.experts))]
        for source, factors in zip(sources, cram.experts, strict=True):
            save_expert(source, factors, **base_for_peft(cram.loaded))
        save_cram(folder, cram.router, sources, loaded=cram.loaded, encoder=cram.encoder, guard=cram.guard)


def from_pretrained(folder: Path, loaded: LoadedModel, *, encoder: Encoder | None = None) -> Cram:
    """Attach the CRAM of a folder to its base model.

    encoder: instead of the one that the router names (a CLIP that moved to another folder).
    Raises: AdapterError: no CRAM folder, a router without its experts or with other ones, another base, another
        encoder.
    """
    stored = read_router(folder)
    check_experts(folder, stored)
    check_base(folder, stored, loaded)
    encoder = encoder or make_encoder(stored.router.config.encoder, loaded)
    check_encoder(folder, stored, encoder)
    experts = [load_expert(path) for path in stored.folders]
    targets = find_targets(loaded.model, stored.router.config)
    blocks = len(decoder_blocks(loaded.model))  # type: ignore[arg-type]
    cards = []
    for card, factors in zip(stored.router.experts, experts, strict=True):
        if card.image_centroid is not None and card.image_centroid.shape[0] not in (1, blocks):
            raise AdapterError(
                f"{folder}: expert {card.name!r} has {card.image_centroid.shape[0]} image centroids; expected 1, or "
                f"one for each of the {blocks} decoder blocks of {loaded.name}. {_RESTORE}"
            )
        unknown = sorted(set(factors) - set(targets))
        if unknown:
            raise AdapterError(
                f"{folder}: expert {card.name!r} adapts {unknown[0]}, which {loaded.name} does not have; it belongs to "
                "another base."
            )
        cards.append(replace(card, ranks={name: a.shape[0] for name, (a, _) in factors.items()}))
    return Cram(loaded, Router(stored.router.config, cards), experts, encoder=encoder, guard=stored.guard)


def check_base(folder: Path, stored: StoredRouter, loaded: LoadedModel) -> None:
    """Raises AdapterError unless a router's experts were trained, and its guard was fitted, on this model."""
    _compare_probe(
        stored.probe(BASE_PROBE),
        block_weights(loaded),
        f"{folder} was trained on another base ({stored.base['base']}) than {loaded.name}",
        "Its experts are corrections to those weights; load the base they were trained on.",
        places={name for name, _ in loaded.model.named_modules()},
    )
    if stored.guard is None:
        return
    check_guard(stored.guard, loaded, str(folder))
    if heads := head_weights(loaded):
        _compare_probe(
            stored.probe(HEAD_PROBE),
            heads,
            f"{folder}: the guard was fitted on another base ({stored.base['base']}) than {loaded.name}",
            "It asks theta_0 itself; load the base that it was fitted on.",
        )


def check_base_files(folder: Path, stored: StoredRouter, base: Path) -> None:
    """`check_base` from a checkpoint's files, a few bytes of each weight; no model is built.

    Weights that are stored under other names than in memory, or quantised, are not compared.

    Raises: AdapterError: its experts were trained on another base. CheckpointError: no readable checkpoint.
    """
    known, found = stored.probe(BASE_PROBE), {}
    with CheckpointReader(base) as files:
        for name in known:
            key = files.names.find(name)
            if key is not None and (dtype := _FLOATS.get(files.entry(key).dtype)) is not None:
                found[name] = _probe_of_file(files, key, dtype)
    if not found:
        raise AdapterError(
            f"{folder} was trained on another base ({stored.base['base']}) than {base}, which holds none of its "
            f"weights ({next(iter(known), 'none')}). Load the base that the experts were trained on."
        )
    _compare_probe(
        {name: values for name, values in known.items() if name in found},
        found,
        f"{folder} was trained on another base ({stored.base['base']}) than {base}",
        "Its experts are corrections to those weights; load the base they were trained on.",
    )


def _probe_of_file(files: CheckpointReader, key: str, dtype: torch.dtype) -> Tensor:
    """(n,) the values of `probe`, of a weight in a file; probed again they are the same."""
    count = files.entry(key).nbytes // dtype.itemsize
    buffer = torch.empty(dtype.itemsize, dtype=torch.uint8)
    values = []
    for step in range(_PROBED_VALUES):
        start = step * (count - 1) // (_PROBED_VALUES - 1) * dtype.itemsize
        values.append(files.read_range(key, buffer, start, start + dtype.itemsize).clone())
    return torch.cat(values).view(dtype)


def check_encoder(folder: Path, stored: StoredRouter, encoder: Encoder) -> None:
    """Raises AdapterError unless a router's centroids were made with this encoder."""
    check_identity(stored.encoder, encoder)
    _compare_probe(
        stored.probe(ENCODER_PROBE),
        encoder.probed(),
        f"{folder}: the weights of encoder {stored.encoder.get('id')!r} are not those that the router was made with",
        "Its centroids mean nothing now; restore the encoder.",
    )


Stamp = tuple[tuple[int, int], ...]


def folder_stamp(folder: Path) -> Stamp | None:
    """Changes whenever a CRAM folder's router is written anew (times and inodes of its files), None where it is not
    whole.
    """
    try:
        found = [(folder / name).stat() for name in (ROUTER, TENSORS)]
    except OSError:
        return None
    return tuple((state.st_mtime_ns, state.st_ino) for state in found)


def check_experts(folder: Path, stored: StoredRouter) -> None:
    """Raises AdapterError unless every expert's weights are the ones that the router was written with."""
    missing = [path for path in stored.folders if not _is_expert(path)]
    if missing:
        raise AdapterError(
            f"{folder}: the router names {len(stored.folders)} experts, but {missing[0]} is no PEFT adapter. Copy the "
            "whole folder; a router without its experts answers nothing."
        )
    for card, path, written in zip(stored.router.experts, stored.folders, stored.digests, strict=True):
        if (found := _digest(path)) != written:
            raise AdapterError(
                f"{folder}: the weights of expert {card.name!r} in {path.relative_to(folder)} are not those that its "
                f"router was written with (sha256 {found[:12]}..., expected {written[:12]}...): they were changed, or "
                "are another expert's. Copy the whole folder again from where it is intact, or learn the tasks again."
            )


def _is_expert(folder: Path) -> bool:
    return is_adapter(folder) and (folder / WEIGHTS_FILE).is_file()


def _digest(expert: Path) -> str:
    """sha256 of an expert's weights file."""
    with (expert / WEIGHTS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_folder(folder: Path, *, base: str | None = None, encoder: str | None = None) -> Cram:
    """A CRAM folder on the base that it names, or on `base`; `encoder` replaces the stored CLIP's or SigLIP's place.

    Raises: as `from_pretrained` and `holdfast.models.load.load`.
    """
    stored = read_router(folder)
    source = Checkpoint(base=base) if base else Checkpoint.from_json(stored.base)
    loaded = load(source)
    moved = make_encoder(encoder, loaded) if encoder else None
    return from_pretrained(folder, loaded, encoder=moved)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredRouter:
    """A router as read from disk; its experts' ranks are unknown until their folders are."""

    router: Router
    folders: tuple[Path, ...]
    digests: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    encoder: dict[str, Any]
    base: dict[str, Any]
    guard: Guard | None = None

    def probe(self, prefix: str) -> dict[str, Tensor]:
        """The probed values under `prefix`, by the name of their weight.

        Each is (n,), n values in the weight's own dtype.
        """
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def read_router(folder: Path) -> StoredRouter:
    """The router of a CRAM folder, without a model.

    Raises: AdapterError: no such folder, another format, damaged files or parts that do not fit each other.
    """
    path = folder / ROUTER
    if not path.is_file() or not (folder / TENSORS).is_file():
        raise AdapterError(f"{folder} is no CRAM folder; expected {ROUTER} and {TENSORS} in it.")
    try:
        data = read_json(path, "the router of a CRAM folder", error=AdapterError, unique=True)
    except AdapterError as error:
        raise AdapterError(f"{folder}: the router is damaged or of another version: {error} {_RESTORE}") from error
    try:
        if data.get("format") not in READ_FORMATS:
            raise AdapterError(
                f"{path} has format {data.get('format')!r}; this version of holdfast reads formats 3 and 4. Read it "
                "with the version that wrote it, or learn its tasks again. Each of its experts is an ordinary LoRA and "
                "loads alone."
            )
        with safe_open(folder / TENSORS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        if problem := _problem(data, tensors):
            raise AdapterError(f"{folder}: the router is damaged: {problem}. {_RESTORE}")
        rows = data["experts"]
        cards = [
            ExpertCard(
                **{k: v for k, v in row.items() if k not in ("folder", "sha256")},
                text_centroid=tensors[f"expert.{i}.text_centroid"],
                image_centroid=tensors.get(f"expert.{i}.image_centroid"),
            )
            for i, row in enumerate(rows)
        ]
        return StoredRouter(
            router=Router(decode(CramConfig, data["config"], "config"), cards),
            folders=tuple(folder / row["folder"] for row in rows),
            digests=tuple(row["sha256"] for row in rows),
            tensors=tensors,
            encoder=data["encoder"],
            base=data["base"],
            guard=_stored_guard(data, tensors),
        )
    except (KeyError, TypeError, AttributeError, ValueError, SafetensorError, ConfigError) as error:
        raise AdapterError(f"{folder}: the router is damaged or of another version: {error!r}. {_RESTORE}") from error


def _stored_guard(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Guard | None:
    """Raises ValueError, KeyError, TypeError: a guard of which a part is missing, damaged or left over."""
    if "guard" in data:
        return read_guard(data["guard"], tensors)
    if left := sorted(key for key in tensors if key.startswith("guard.")):
        raise ValueError(f"{TENSORS} holds {left[0]}, but {ROUTER} has no guard")
    return None


def _problem(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    """What in a router does not fit together, with what was expected, or None."""
    base, encoder, rows = data["base"], data["encoder"], data["experts"]
    if not isinstance(base["base"], str) or not _are_strings(base["adapters"]):
        return f'base is {base!r}; expected {{"base": folder or hub id, "adapters": [folders]}}'
    widths = [encoder[key] for key in ("text_width", "image_width")]
    if not (_are_strings([encoder["kind"], encoder["id"]]) and all(_is_count(w, 1) for w in widths)):
        return f"encoder is {encoder!r}; expected its kind, id, text_width and image_width"
    for i, row in enumerate(rows):
        if problem := _problem_of_expert(row, tensors, f"expert.{i}.", *widths):
            return f"expert {row['name']!r}: {problem}"
    groups = sorted({row["group"] for row in rows})
    if groups != list(range(len(groups))):
        return f"its experts are in groups {groups}; expected 0 to {len(groups) - 1} without a gap"
    known = {f"expert.{i}.{kind}_centroid" for i in range(len(rows)) for kind in ("text", "image")}
    if extra := sorted(key for key in tensors if key.startswith("expert.") and key not in known):
        return f"{TENSORS} holds {extra[0]}, but {ROUTER} names {len(rows)} expert(s)"
    return None


def _problem_of_expert(
    row: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str, text_width: int, image_width: int
) -> str | None:
    if not _are_strings([row["name"], row["folder"], row["sha256"]]):
        return f"name, folder and sha256 are {row['name']!r}, {row['folder']!r} and {row['sha256']!r}; expected texts"
    for key, least in (("group", 0), ("samples", 1), ("images", 0)):
        if not _is_count(row[key], least):
            return f"{key} is {row[key]!r}; expected a whole number, {least} or more"
    text, image = tensors[f"{prefix}text_centroid"], tensors.get(f"{prefix}image_centroid")
    if text.shape != (text_width,):
        return f"its text centroid has shape {tuple(text.shape)}; expected ({text_width},), the encoder's width"
    if (image is not None) != (row["images"] > 0) or (row["image_scatter"] is not None) != (row["images"] > 0):
        return (
            f"images is {row['images']}, image_scatter is {row['image_scatter']}, and there is "
            f"{'no' if image is None else 'an'} image centroid; expected both exactly when a task has images"
        )
    if image is not None and (image.dim() != 2 or not image.shape[0] or image.shape[1] != image_width):
        return (
            f"its image centroid has shape {tuple(image.shape)}; expected (1 or the number of blocks, {image_width}), "
            "the encoder's width"
        )
    for key in ("text_scatter", "image_scatter", "text_floor", "image_radius"):
        number = isinstance(row[key], int | float) and not isinstance(row[key], bool)
        if not number and (row[key] is not None or key == "text_scatter"):
            return f"{key} is {row[key]!r}; expected a number"
    return None


def _are_strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def probe(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A few values of each weight, in its own dtype, on the CPU.

    weights: of any shape. Each result is (n,), n values spread evenly over the flattened weight.
    """
    found = {}
    for name, weight in weights.items():
        flat = weight.detach().reshape(-1)
        # Integers: in float32 the places of a weight of more than 2^24 values would be off, even out of bounds.
        steps = torch.arange(_PROBED_VALUES, device=flat.device)
        index = steps * (flat.numel() - 1) // (_PROBED_VALUES - 1)
        found[name] = flat[index].cpu()
    return found


def _compare_probe(
    stored: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    what: str,
    remedy: str,
    *,
    places: Collection[str] = (),
) -> None:
    """Raises AdapterError unless every weight that both sides hold as numbers is the same weight.

    Judged weight by weight: one tuned matrix among hundreds is another base.

    stored: name -> (n,) values, as `probe` takes them. weights: name -> weight of any shape.
    places: modules that may hold their weights quantised now, without values to compare.
    """
    found = probe(weights)
    if lost := sorted(name for name in stored if name not in found and name.rpartition(".")[0] not in places):
        raise AdapterError(f"{what}: there is no {lost[0]} here. {remedy}")
    common = sorted(set(stored) & set(found))
    if not common:
        raise AdapterError(f"{what}, or both hold all weights quantised, so nothing says that they are one. {remedy}")
    if other := [name for name in common if not _same_values(stored[name], found[name])]:
        raise AdapterError(
            f"{what}: {len(other)} of {len(common)} weights have other values, {other[0]} first. {remedy}"
        )


def _same_values(stored: Tensor, found: Tensor) -> bool:
    """Whether probed values are those of one weight: bit for bit in one dtype; in two, each rounds from one number."""
    if stored.dtype == found.dtype:
        return bool((stored == found).all())
    # Not a cast to the coarser dtype: neither of bf16 and fp16 is that everywhere, and fp32 -> fp16 -> bf16 may round
    # twice.
    allowed = _half_step(stored) + _half_step(found)
    return bool(((stored.double() - found.double()).abs() <= allowed).all())


def _half_step(values: Tensor) -> Tensor:
    """Half the distance between neighbours at each value: how far what was rounded to it can have been, float64."""
    kind = torch.finfo(values.dtype)
    size = values.double().abs().clamp_min(kind.smallest_normal)
    # size / mantissa is the next power of two above, exactly; from half of it on, neighbours are eps / 2 of it apart.
    return size / torch.frexp(size).mantissa * (kind.eps / 4)


def block_weights(loaded: LoadedModel) -> dict[str, Tensor]:
    """Every weight of the decoder blocks that is held as numbers: what experts were corrections to.

    Names as in the model; shapes as there, (out, in) for a linear.
    """
    return {
        f"{prefix}.{name}": parameter
        for prefix, block in decoder_blocks(loaded.model)  # type: ignore[arg-type]
        for name, parameter in block.named_parameters()
        if parameter.is_floating_point() and parameter.element_size() >= 2
    }


def head_weights(loaded: LoadedModel) -> dict[str, Tensor]:
    """The output embeddings (vocabulary, hidden), where they are held as numbers: a guard reads through them."""
    weight = loaded.model.get_output_embeddings().weight  # type: ignore[operator, union-attr]
    return {"output": weight} if weight.is_floating_point() and weight.element_size() >= 2 else {}


def base_of(loaded: LoadedModel) -> dict[str, Any]:
    """The checkpoint that experts sit on, as plain data: {"base": folder or hub id, "adapters": [folders]}."""
    source = loaded.source
    if source is None:
        return Checkpoint(base=loaded.name).to_json()
    # A tuner's folder on top is what is being saved, not what it sits on.
    return {"base": source.base, "adapters": [a for a in source.adapters if not is_tuner_folder(a)]}


def base_for_peft(loaded: LoadedModel) -> dict[str, Any]:
    """`base` and `base_config` of `save_expert` for experts of this model."""
    config = {"model_type": loaded.model.config.model_type, "architectures": [type(loaded.model).__name__]}
    return {"base": base_of(loaded)["base"], "base_config": config}


def _folder_name(index: int, name: str) -> str:
    return f"{index:02d}-{slug(name)}"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`; renamed onto it when the block ends well, removed when it does not.

    Raises: StorageError: `folder` exists, or cannot be written.
    """
    if folder.exists():
        raise StorageError(f"{folder} exists; choose another folder, or remove it.")
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in sorted(temporary.rglob("*"), reverse=True):
            if path.is_dir():
                fsync_folder(path)
            else:
                with path.open("rb") as written:
                    fsync(written.fileno())
        temporary.replace(folder)
        fsync_folder(folder.parent)
    except OSError as error:
        raise storage_error(error, folder) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
