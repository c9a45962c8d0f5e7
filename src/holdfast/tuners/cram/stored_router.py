"""The router's two files of a CRAM folder, read and checked without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from holdfast.config import current_names, decode, with_defaults
from holdfast.errors import AdapterError, ConfigError
from holdfast.files import read_json
from holdfast.models.tuner import is_tuner_folder, tuner_name
from holdfast.tuners.cram.cram_config import CramConfig
from holdfast.tuners.cram.guard import Guard, read_guard
from holdfast.tuners.cram.router import ExpertCard, Router

# 4: a guard may lie in the router's two files. A folder of format 3 has none and is read as such.
# 5: what is left out of instruction vectors lies there; in earlier ones nothing is.
FORMAT = 5
READ_FORMATS = (3, 4, 5)
COMMON = "instruction.common_directions"  # (k, text_width); absent where k is 0
ROUTER, TENSORS = "router.json", "router.safetensors"
HOW_TO_RESTORE = f"Restore {ROUTER} and {TENSORS} from where the folder is intact, or learn the tasks again."


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

    @property
    def common(self) -> Tensor:
        """(k, text_width): directions that are left out of instruction vectors, k may be 0."""
        return self.tensors.get(COMMON, torch.zeros(0, self.encoder["text_width"]))

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
    if is_tuner_folder(folder) and (name := tuner_name(folder)) != "cram":
        raise AdapterError(
            f"{folder} is a folder of {name}, which has no router that decides per request and no experts that load "
            "alone: it is asked as an adapter of its base (`holdfast evaluate BASE --adapter FOLDER`), by transformers."
        )
    if not path.is_file() or not (folder / TENSORS).is_file():
        raise AdapterError(f"{folder} is no CRAM folder; expected {ROUTER} and {TENSORS} in it.")
    try:
        data = read_json(path, "the router of a CRAM folder", error=AdapterError, unique=True)
    except AdapterError as error:
        raise AdapterError(
            f"{folder}: the router is damaged or of another version: {error} {HOW_TO_RESTORE}"
        ) from error
    try:
        if data.get("format") not in READ_FORMATS:
            raise AdapterError(
                f"{path} has format {data.get('format')!r}; this version of holdfast reads formats 3 to 5. Read it "
                "with the version that wrote it, or learn its tasks again. Each of its experts is an ordinary LoRA and "
                "loads alone."
            )
        with safe_open(folder / TENSORS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        data["encoder"].setdefault("common_directions", 0)
        if problem := _problem(data, tensors):
            raise AdapterError(f"{folder}: the router is damaged: {problem}. {HOW_TO_RESTORE}")
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
            router=Router(decode(CramConfig, _as_meant(data["config"]), "config"), cards),
            folders=tuple(folder / row["folder"] for row in rows),
            digests=tuple(row["sha256"] for row in rows),
            tensors=tensors,
            encoder=data["encoder"],
            base=data["base"],
            guard=_stored_guard(data, tensors),
        )
    except (KeyError, TypeError, AttributeError, ValueError, SafetensorError, ConfigError) as error:
        raise AdapterError(
            f"{folder}: the router is damaged or of another version: {error!r}. {HOW_TO_RESTORE}"
        ) from error


def _as_meant(recorded: Mapping[str, Any]) -> Any:
    """The recorded options by their names of today, with what was done before there were those that are new."""
    return with_defaults(CramConfig, current_names(CramConfig, recorded, "config"))


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
    if problem := _problem_of_common(encoder["common_directions"], tensors.get(COMMON), widths[0]):
        return problem
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


def _problem_of_common(count: Any, directions: Tensor | None, width: int) -> str | None:
    if not _is_count(count, 0):
        return f"common_directions of its encoder is {count!r}; expected a whole number, 0 or more"
    shape = None if directions is None else tuple(directions.shape)
    if shape != ((count, width) if count else None):
        expected = f"({count}, {width})" if count else "none"
        return f"{COMMON} has shape {shape}; expected {expected}, as its encoder says"
    if directions is not None and not bool(torch.isfinite(directions).all()):
        return f"{COMMON} holds NaN or inf"
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
