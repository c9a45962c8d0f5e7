"""Edits that somebody made already: weights in files, one per layer, that the editor puts together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdfast.errors import CheckpointError
from holdfast.files import atomic_path
from holdfast.rules.base import DenseEdit, Layer, Rule, norms

_FIGURES = "figures"


@dataclass(frozen=True, kw_only=True)
class ReadyOptions:
    """folder: where `<layer>.safetensors` lie, each with one tensor `weight` (r, c).

    first_block: layers of earlier decoder blocks (0-based) have no edit and stay as they were tuned.
    made_by, options: what made them and with which options, for the record.
    """

    folder: Path
    made_by: str = "ready_edits"
    options: Mapping[str, Any] = field(default_factory=dict)
    first_block: int = 0


@dataclass(frozen=True)
class ReadyEdits(Rule):
    """The edited weight of each layer, read from its file. Raises CheckpointError: a layer without a file."""

    config: ReadyOptions
    Config = ReadyOptions

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the method that made the edits."""
        return self.config.made_by

    def settings(self) -> Mapping[str, Any]:
        """The options that the edits were made with; where they lie for the moment does not change the result."""
        return self.config.options

    def edit(self, layer: Layer, w_prev: Tensor, w_new: Tensor) -> DenseEdit:
        """The weight (r, c) that was made before; w_prev, w_new (r, c) are not used.

        Raises: CheckpointError: no edit of this layer was made.
        """
        if layer.block < self.config.first_block:
            return DenseEdit(weight=w_new, row={"edited": False})
        path = self.config.folder / f"{layer.name}.safetensors"
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist: no edit of {layer.name} was made.")
        weight = load_file(path)["weight"]
        return DenseEdit(weight=weight, row={**read_figures(path), **norms(w_new - w_prev, weight - w_prev)})


def write_edit(path: Path, weight: Tensor, figures: Mapping[str, Any]) -> None:
    """One layer's edit in its file, weight (r, c); figures: plain numbers for its row."""
    with atomic_path(path) as temporary:
        stored = {"weight": weight.float().cpu().contiguous()}
        save_file(stored, temporary, metadata={_FIGURES: json.dumps(dict(figures))})


def read_figures(path: Path) -> dict[str, Any]:
    """The figures that `write_edit` left; {} in a file that somebody else wrote."""
    with safe_open(path, framework="pt") as file:
        return dict(json.loads((file.metadata() or {}).get(_FIGURES, "{}")))
