"""A CRAM router without its model: what a process needs that only decides who answers.

The default encoder looks at the base's input embeddings and at what its vision tower hands to the first decoder block;
the blocks and the head take no part in it. An exported router holds exactly the rest, under the names in memory:

holdfast_router.json       format, sha256 of the router's two files, the experts' names and folders
router.json, router.safetensors   as in the CRAM folder, byte for byte
encoder.safetensors        embeddings, tower, projector (absent with a CLIP or SigLIP encoder, which is loaded by name)
config.json, ...           configuration, tokenizer and processor of the base
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from holdfast.checkpoints.merged import locate
from holdfast.checkpoints.reader import read_json
from holdfast.checkpoints.rewrite import copy_side_files
from holdfast.checkpoints.value import Checkpoint
from holdfast.data.types import Sample
from holdfast.errors import AdapterError
from holdfast.files import sha256, write_json
from holdfast.models.families import decoder_blocks, family_of
from holdfast.models.load import load
from holdfast.models.loaded import LoadedModel
from holdfast.models.precision import parse_dtype
from holdfast.models.settings import quiet_transformers, read_config, read_processor
from holdfast.tuners.cram.cram_config import BACKBONE
from holdfast.tuners.cram.folder import check_base, check_encoder
from holdfast.tuners.cram.guard import Guard
from holdfast.tuners.cram.router import Features, Router, Routing, describe
from holdfast.tuners.cram.router_features import Encoder, check_images, make_encoder
from holdfast.tuners.cram.stored_router import ROUTER, TENSORS, StoredRouter, read_router
from holdfast.tuners.folders import new_folder

MARKER_FILE, ENCODER_FILE = "holdfast_router.json", "encoder.safetensors"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Who answers a request.

    weights: expert -> share, all experts; empty shares where the base answers. reason: "routed", "abstained" (no expert
    finds the request like its task's), "guarded" (theta_0 would refuse). abstained: also where it is guarded.
    """

    weights: Mapping[str, float]
    group: str
    similarity: Mapping[str, float]
    reason: str
    guard_score: float | None = None
    abstained: bool = False

    @property
    def expert(self) -> str | None:
        """The expert with the largest share, or None for the base."""
        if self.reason != "routed":
            return None
        return max(self.weights, key=lambda name: self.weights[name])

    @property
    def is_one_hot(self) -> bool:
        """Whether one expert, or the base, answers alone (up to a thousandth)."""
        return self.reason != "routed" or max(self.weights.values()) > 0.999

    def explain(self, id: str) -> dict[str, Any]:
        """As `Cram.explain` gives it for the request `id`."""
        guard = (
            {} if self.guard_score is None else {"guarded": self.reason == "guarded", "guard_score": self.guard_score}
        )
        return {
            "id": id,
            "group": self.group,
            "similarity": dict(self.similarity),
            "abstained": self.abstained,
            **guard,
            "weights": dict(self.weights),
        }

    def to_json(self) -> dict[str, Any]:
        """As plain data, for a reply's extra field."""
        return {
            "answered_by": self.expert or "base",
            "reason": self.reason,
            "group": self.group,
            "similarity": dict(self.similarity),
            "weights": {name: weight for name, weight in self.weights.items() if weight > 0},
            **({} if self.guard_score is None else {"guard_score": self.guard_score}),
        }


def decisions(routing: Routing, router: Router) -> list[Decision]:
    """A routing as values, one for each request."""
    found = []
    for row in describe(routing, router, [str(i) for i in range(len(routing.weights))]):
        reason = "guarded" if row.get("guarded") else "abstained" if row["abstained"] else "routed"
        found.append(
            Decision(
                weights=row["weights"],
                group=row["group"],
                similarity=row["similarity"],
                reason=reason,
                guard_score=row.get("guard_score"),
                abstained=row["abstained"],
            )
        )
    return found


class StandaloneRouter:
    """The router of a CRAM folder and its encoder, without experts and decoder.

    folders: expert name -> PEFT folder, where it was opened on a CRAM folder. loaded: embeddings, tower and processor
    (blocks without memory); asking it for an answer is an error of torch. bytes_held, load_seconds: what it cost.
    """

    def __init__(
        self,
        stored: StoredRouter,
        encoder: Encoder,
        processor: Any,
        *,
        folders: Mapping[str, Path],
        bytes_held: int,
        load_seconds: float,
    ) -> None:
        self.stored, self.encoder, self.processor = stored, encoder, processor
        self.folders = dict(folders)
        self.bytes_held, self.load_seconds = bytes_held, load_seconds

    @property
    def router(self) -> Router:
        """Experts and groups."""
        return self.stored.router

    @property
    def guard(self) -> Guard | None:
        """What says which requests theta_0 would refuse, or None."""
        return self.stored.guard

    @property
    def base(self) -> Checkpoint:
        """What the experts sit on."""
        return Checkpoint.from_json(self.stored.base)

    @torch.inference_mode()
    def decide(self, samples: Sequence[Sample]) -> list[Decision]:
        """Who answers each request; the guard, which asks theta_0 itself, is not heard here (`under_guard`).

        Raises: DataError: no instruction text, an image that cannot be read, or none where the router goes by it.
        """
        check_images(samples, self.router.config)
        text = self.encoder.text(samples)
        image, has_image = self.encoder.images(samples)
        features = Features(text=text, image=image, has_image=has_image).checked()
        return decisions(self.router.route(features), self.router)

    def with_router(self, stored: StoredRouter, folder: Path) -> StandaloneRouter:
        """The same encoder under a newer router (a task was learned).

        Raises: AdapterError: a router that was made with another encoder.
        """
        check_encoder(folder, stored, self.encoder)
        return StandaloneRouter(
            stored,
            self.encoder,
            self.processor,
            folders={card.name: path for card, path in zip(stored.router.experts, stored.folders, strict=True)},
            bytes_held=self.bytes_held,
            load_seconds=self.load_seconds,
        )

    def under_guard(self, decision: Decision, first_token: Mapping[int, float]) -> Decision:
        """The decision, or theta_0's where its first answer token opens a refusal.

        first_token: log-probabilities of theta_0's likeliest first tokens, without experts.
        Raises: AdapterError: as `Guard.refuses`.
        """
        if self.guard is None:
            return decision
        score = self.guard.score_of(first_token)
        if score < self.guard.threshold:
            return Decision(**{**vars(decision), "guard_score": round(score, 4)})
        nobody = dict.fromkeys(decision.weights, 0.0)
        return Decision(**{**vars(decision), "weights": nobody, "reason": "guarded", "guard_score": round(score, 4)})


def outside_blocks(loaded: LoadedModel) -> dict[str, Tensor]:
    """Every parameter and saved buffer that is neither of a decoder block nor of the head, by its name in memory.

    Each of its own shape, (out, in) for a linear; two names of one tensor are listed once.
    """
    prefixes = tuple(f"{prefix}." for prefix, _ in decoder_blocks(loaded.model))
    persistent = set(loaded.model.state_dict())
    named = dict([*loaded.model.named_parameters(), *loaded.model.named_buffers()])
    return {
        name: tensor
        for name, tensor in named.items()
        if name in persistent and not name.startswith((*prefixes, "holdfast_cram.")) and "lm_head" not in name
    }


def export_router(folder: Path, out: Path, *, base: str | None = None) -> dict[str, Any]:
    """Write the router of the CRAM folder `folder`, and what its encoder needs of the base, as the folder `out`.

    The base is loaded once, here, so that no router has to. base: where it lies now.
    Returns: {"bytes", "tensors", "experts"}.
    Raises: AdapterError: no CRAM folder, or another base. StorageError: `out` exists or the disk is full.
    """
    stored = read_router(folder)
    source = Checkpoint.from_json(stored.base) if base is None else Checkpoint(base=base)
    written: dict[str, Tensor] = {}
    with new_folder(out) as temporary:
        for name in (ROUTER, TENSORS):
            shutil.copyfile(folder / name, temporary / name)
        if stored.router.config.encoder == BACKBONE:
            loaded = load(source)
            check_base(folder, stored, loaded)
            check_encoder(folder, stored, make_encoder(stored.router.config, loaded, common=stored.common))
            written = outside_blocks(loaded)
            save_file({k: v.detach().cpu().clone().contiguous() for k, v in written.items()}, temporary / ENCODER_FILE)
        copy_side_files(locate(source.base), temporary, [locate(adapter) for adapter in source.adapters])
        write_json(
            temporary / MARKER_FILE,
            {
                "format": FORMAT,
                "dtype": str(next(iter(written.values())).dtype).removeprefix("torch.") if written else None,
                "sha256": {name: sha256(temporary / name).hexdigest() for name in (ROUTER, TENSORS)},
                "experts": {
                    card.name: str(path.absolute())
                    for card, path in zip(stored.router.experts, stored.folders, strict=True)
                },
            },
        )
    return {
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in written.values()),
        "tensors": len(written),
        "experts": len(stored.router),
    }


def is_router_export(folder: Path) -> bool:
    """Whether a folder was made by `export_router`."""
    return (folder / MARKER_FILE).is_file()


def open_exported(folder: Path) -> StandaloneRouter:
    """The router of an exported folder.

    Raises: AdapterError: no such folder, or parts that do not fit each other.
    """
    started = time.perf_counter()
    if not is_router_export(folder):
        raise AdapterError(
            f"{folder} is no exported router; make one with `holdfast export-router CRAM --out {folder}`."
        )
    marker = read_json(folder / MARKER_FILE, "an exported router")
    if marker.get("format") != FORMAT:
        raise AdapterError(
            f"{folder / MARKER_FILE} has format {marker.get('format')!r}; expected {FORMAT}. Export it again."
        )
    try:
        digests, dtype = {name: marker["sha256"][name] for name in (ROUTER, TENSORS)}, marker["dtype"]
        folders = {name: Path(path) for name, path in marker["experts"].items()}
        changed = [name for name, digest in digests.items() if sha256(folder / name).hexdigest() != digest]
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{folder} is not whole ({error!r}); export the router again.") from error
    if changed:
        raise AdapterError(f"{folder / changed[0]} is not the file that was exported; export the router again.")
    stored = read_router(folder)
    processor = read_processor(str(folder))
    if stored.router.config.encoder != BACKBONE:
        encoder: Encoder = make_encoder(stored.router.config, _Nowhere())  # type: ignore[arg-type]
        held = sum(p.numel() * p.element_size() for p in encoder.probed().values())
    else:
        loaded, held = _without_blocks(folder, processor, dtype)
        encoder = make_encoder(stored.router.config, loaded, common=stored.common)
    check_encoder(folder, stored, encoder)
    return StandaloneRouter(
        stored, encoder, processor, folders=folders, bytes_held=held, load_seconds=time.perf_counter() - started
    )


def open_on_base(folder: Path, *, base: str | None = None) -> StandaloneRouter:
    """The router of a CRAM folder; the base is loaded for it once, and its blocks are given back.

    Raises: as `export_router`.
    """
    started = time.perf_counter()
    stored = read_router(folder)
    source = Checkpoint.from_json(stored.base) if base is None else Checkpoint(base=base)
    if stored.router.config.encoder == BACKBONE:
        loaded = load(source)
        check_base(folder, stored, loaded)
        for _, block in decoder_blocks(loaded.model):
            block.to("meta")
        encoder: Encoder = make_encoder(stored.router.config, loaded, common=stored.common)
        processor = loaded.processor
    else:
        processor = read_processor(source.base, adapters=source.adapters)
        encoder = make_encoder(stored.router.config, _Nowhere())  # type: ignore[arg-type]
    check_encoder(folder, stored, encoder)
    held = sum(p.numel() * p.element_size() for p in encoder.probed().values())
    folders = {card.name: path for card, path in zip(stored.router.experts, stored.folders, strict=True)}
    return StandaloneRouter(
        stored, encoder, processor, folders=folders, bytes_held=held, load_seconds=time.perf_counter() - started
    )


class _Nowhere:
    """Stands for a model where only its device is asked."""

    device = torch.device("cpu")


def _without_blocks(folder: Path, processor: Any, dtype: str) -> tuple[LoadedModel, int]:
    """A model of which only embeddings, tower and projector have memory, and how many bytes they take."""
    config = read_config(str(folder))
    try:
        tensors = load_file(folder / ENCODER_FILE)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder / ENCODER_FILE} cannot be read: {error}. Export the router again.") from error
    with quiet_transformers(), init_empty_weights():
        # Buffers that are computed and not stored (rotary frequencies) are made for real.
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=parse_dtype(dtype))
    for name, tensor in tensors.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[leaf] = tensor
    loaded = LoadedModel(
        model=model.eval(), processor=processor, name=str(folder), family=family_of(config), source=None
    )
    return loaded, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


__all__ = [
    "Decision",
    "StandaloneRouter",
    "decisions",
    "export_router",
    "is_router_export",
    "open_exported",
    "open_on_base",
    "outside_blocks",
]
