"""A CRAM folder on disk: a marker, a router, and one ordinary PEFT LoRA folder per expert. No pickle anywhere.

holdfast_tuner.json        which tuner reads this folder
router.json                configuration, encoder, and per expert what is not a tensor and the sha256 of its weights
router.safetensors         group prototypes, centroids, and a few values of the base and of the encoder; a guard's
                           evidence and probe
experts/NN-task/           adapter_config.json, adapter_model.safetensors
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from holdfast.checkpoints.adapter import WEIGHTS_FILE, is_adapter
from holdfast.checkpoints.reader import CheckpointReader
from holdfast.checkpoints.value import Checkpoint
from holdfast.config import encode
from holdfast.data.names import slug
from holdfast.errors import AdapterError
from holdfast.files import write_json
from holdfast.models.families import decoder_blocks
from holdfast.models.load import load
from holdfast.models.loaded import LoadedModel
from holdfast.models.tuner import MARKER
from holdfast.tuners.cram.guard import Guard, check_guard, guard_data, guard_tensors
from holdfast.tuners.cram.model import Cram, find_targets
from holdfast.tuners.cram.router import Router
from holdfast.tuners.cram.router_features import Encoder, check_identity, make_encoder
from holdfast.tuners.cram.stored_router import (
    COMMON,
    FORMAT,
    HOW_TO_RESTORE,
    ROUTER,
    TENSORS,
    StoredRouter,
    read_router,
)
from holdfast.tuners.folders import base_of, new_folder
from holdfast.tuners.lora_folder import load_lora as load_expert
from holdfast.tuners.lora_folder import save_lora as save_expert
from holdfast.tuners.same_weights import PROBED_VALUES, block_weights, compare_probe, head_weights, probe

EXPERTS = "experts"
# In TENSORS, followed by the name of a weight.
BASE_PROBE, ENCODER_PROBE, HEAD_PROBE = "base.probe.", "encoder.probe.", "head.probe."
# Of a safetensors header.
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


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
        if len(encoder.common):
            tensors[COMMON] = encoder.common
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
    encoder = encoder or make_encoder(stored.router.config, loaded, common=stored.common)
    check_encoder(folder, stored, encoder)
    experts = [load_expert(path) for path in stored.folders]
    targets = find_targets(loaded.model, stored.router.config)
    blocks = len(decoder_blocks(loaded.model))  # type: ignore[arg-type]
    cards = []
    for card, factors in zip(stored.router.experts, experts, strict=True):
        if card.image_centroid is not None and card.image_centroid.shape[0] not in (1, blocks):
            raise AdapterError(
                f"{folder}: expert {card.name!r} has {card.image_centroid.shape[0]} image centroids; expected 1, or "
                f"one for each of the {blocks} decoder blocks of {loaded.name}. {HOW_TO_RESTORE}"
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
    compare_probe(
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
        compare_probe(
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
    compare_probe(
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
    for step in range(PROBED_VALUES):
        start = step * (count - 1) // (PROBED_VALUES - 1) * dtype.itemsize
        values.append(files.read_range(key, buffer, start, start + dtype.itemsize).clone())
    return torch.cat(values).view(dtype)


def check_encoder(folder: Path, stored: StoredRouter, encoder: Encoder) -> None:
    """Raises AdapterError unless a router's centroids were made with this encoder."""
    check_identity(stored.encoder, encoder)
    compare_probe(
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
    moved = make_encoder(replace(stored.router.config, encoder=encoder), loaded) if encoder else None
    return from_pretrained(folder, loaded, encoder=moved)


def base_for_peft(loaded: LoadedModel) -> dict[str, Any]:
    """`base` and `base_config` of `save_expert` for experts of this model."""
    config = {"model_type": loaded.model.config.model_type, "architectures": [type(loaded.model).__name__]}
    return {"base": base_of(loaded)["base"], "base_config": config}


def _folder_name(index: int, name: str) -> str:
    return f"{index:02d}-{slug(name)}"
