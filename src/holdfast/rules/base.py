"""What a weight edit is, to the editor: a function of one layer. The rules live beside this file, one per file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from holdfast.config import encode
from holdfast.functional.columns import ColumnChange

# What a rule must be given of a layer beside its weights: nothing, the diagonals `Layer.safety` and `Layer.task`, or
# whole Gram matrices (c, c).
Needs = Literal["nothing", "curvature", "grams"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """All that a rule may know of a layer beside its weights.

    name: module name as in memory. block: 0-based decoder block; block_count: how many there are.
    safety, task: diag((H + lam I)^-1) over the input columns, fp32 (c,), or None where no calibration was given.
    seed: of this layer; follows from the edit's seed and the name only, so neither order nor a resume changes it.
    """

    name: str
    block: int
    block_count: int
    safety: Float[Tensor, " c"] | None = None
    task: Float[Tensor, " c"] | None = None
    seed: int = 0

    def generator(self) -> torch.Generator:
        """A generator for this layer's random choices, on the CPU."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class MeasuredLayer:
    """A layer with its diagonals, and the column statistics of its change."""

    layer: Layer
    change: ColumnChange


def layer_seed(seed: int, name: str) -> int:
    """A layer's own seed (63 bits)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class DenseEdit:
    """A new weight (r, c), in any floating type (it is cast once when it is written), and figures for the report."""

    weight: Float[Tensor, "r c"]
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoraEdit:
    """A new A; W_hat = W_prev * input_scale + scaling * B A, with input_scale None for ones.

    B stays: an edit of input columns is an edit of A's columns, and copying B costs a read and a write only.
    """

    lora_a: Float[Tensor, "rank c"]
    input_scale: Float[Tensor, " c"] | None = None
    row: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class EditRule(Protocol):
    """One layer in, one layer out. A rule keeps no state between layers.

    name: recorded with the result. needs_curvature: whether `Layer.safety` and `Layer.task` must be there. A rule that
    needs more says so in `needs` (see `Needs` and `needs_of`); `Rule` has all of it but the edit.
    """

    @property
    def name(self) -> str:
        """Recorded with the result."""
        ...

    @property
    def needs_curvature(self) -> bool:
        """Whether `Layer.safety` and `Layer.task` must be there."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """Every option that changes the result, as plain data; part of the plan's hash."""
        ...

    def edit(self, layer: Layer, w_prev: Float[Tensor, "r c"], w_new: Float[Tensor, "r c"]) -> DenseEdit:
        """The edited weight. Both inputs may be overwritten, and `w_new` may be returned."""
        ...


@runtime_checkable
class LoraEditRule(EditRule, Protocol):
    """A rule that has a closed form for W_new = W_prev + scaling * B A: the r x c change is never formed.

    reads_base: whether `edit_lora` has a use for `w_prev`; where it has none, the base is not read.
    """

    @property
    def reads_base(self) -> bool:
        """Whether `edit_lora` has a use for `w_prev`; where it has none, the base is not read."""
        ...

    def edit_lora(
        self,
        layer: Layer,
        w_prev: Float[Tensor, "r c"] | None,
        lora_a: Float[Tensor, "rank c"],
        lora_b: Float[Tensor, "r rank"],
        scaling: float,
    ) -> LoraEdit:
        """The edited factor A. `w_prev` None: what depends on the base weight (HPA's coefficient) is left out."""
        ...


@runtime_checkable
class GramRule(EditRule, Protocol):
    """A rule that brings Gram matrices of its own: it knows their layers, and of which models they are."""

    def layers(self) -> tuple[Mapping[str, int], int]:
        """Module name -> 0-based block of every layer that it can edit, and the number of blocks."""
        ...

    def check_models(self, fingerprints: Mapping[str, Sequence[str]]) -> None:
        """Raises CalibrationError: the Grams are of other models than `before` and `after`."""
        ...


@dataclass(frozen=True)
class Rule:
    """Base of the rules here: made of its options alone, `Rule(config)`, so that a name and plain data make one.

    Config: frozen dataclass of the options, with defaults. name: recorded with the result. inputs: arguments of the
    constructor beside `config` that are no plain data (open checkpoints, tensors); a rule that has any is made by the
    method that hands them over, and cannot be made from a name.
    """

    config: Any

    Config: ClassVar[type]
    name: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]] = ()

    @property
    def needs(self) -> Needs:
        """What a layer must bring; may follow from the options."""
        return "nothing"

    @property
    def needs_curvature(self) -> bool:
        """Whether `Layer.safety` and `Layer.task` must be there."""
        return self.needs == "curvature"

    def settings(self) -> Mapping[str, Any]:
        """Every option, as plain data."""
        settings: Mapping[str, Any] = encode(self.config)
        return settings


def needs_of(rule: EditRule) -> Needs:
    """What a rule needs of a layer; of a rule that has no `needs`, what its `needs_curvature` says."""
    default: Needs = "curvature" if rule.needs_curvature else "nothing"
    found: Needs = getattr(rule, "needs", default)
    return found


def norms(change: Float[Tensor, "r c"], moved: Float[Tensor, "r c"]) -> dict[str, float]:
    """Figures of an edit: change ||W_new - W_prev||_F and distance ||W_hat - W_prev||_F, from those differences."""
    return {
        "change": float(torch.linalg.vector_norm(change, dtype=torch.float64)),
        "distance": float(torch.linalg.vector_norm(moved, dtype=torch.float64)),
    }
