"""An edit that is one factor per input column, W_hat = W_prev + D diag(factors): what the controls of HPA share.

Asked to (`match: hpa`), a control is as strong as HPA's edit of the same change, layer by layer, so that two edits are
compared at equal ||W_hat - W_prev|| and not at an equal number of columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from holdfast.functional.columns import ColumnChange, measure_change, measure_lora
from holdfast.functional.controls import distance_of, revert_factors, reverted_by, scale_change
from holdfast.functional.hpa import HpaConfig, column_count
from holdfast.rules.base import DenseEdit, Layer, LoraEdit, Needs, Rule
from holdfast.rules.hpa import foresee


@dataclass(frozen=True, kw_only=True)
class ColumnFactorOptions:
    """Options that every control has.

    match: "hpa" makes the edit of each layer as strong as HPA's would be on the same change (equal ||W_hat - W_prev||);
        it needs HPA's calibration, of which it uses the strength only. null: the control's own strength.
    edit: HPA's options: its p falls with depth, and a control without `match` takes the same p.
    """

    match: Literal["hpa"] | None = None
    edit: HpaConfig = field(default_factory=HpaConfig)


@dataclass(frozen=True)
class ColumnFactorRule(Rule):
    """W_hat = W_prev + D diag(factors). A control says what the factors of a layer are."""

    config: ColumnFactorOptions = field(default_factory=ColumnFactorOptions)
    Config = ColumnFactorOptions
    name = "column_factors"
    reads_base = False

    @property
    def needs(self) -> Needs:
        """What the rule must be given of a layer."""
        return "nothing" if self.config.match is None else "curvature"

    def factors(self, layer: Layer, change: ColumnChange, distance: float | None) -> Tensor:
        """(c,) in 0..1 for this layer; `distance`: the strength to match, or None.

        Raises: NotImplementedError: a rule says which.
        """
        raise NotImplementedError

    def edit(self, layer: Layer, w_prev: Tensor, w_new: Tensor) -> DenseEdit:
        """W_prev + D diag(factors) of one layer. w_prev, w_new: (r, c); `w_new` is overwritten."""
        change = measure_change(w_prev, w_new, projection=False)
        factors, row = self._decide(layer, change)
        return DenseEdit(weight=scale_change(w_prev, w_new, factors, out=w_new), row=row)

    def edit_lora(
        self, layer: Layer, w_prev: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> LoraEdit:
        """A diag(factors) of one layer; the base is not read. lora_a: (rank, c). lora_b: (r, rank). w_prev: (r, c) or
        None.
        """
        factors, row = self._decide(layer, measure_lora(lora_a, lora_b, scaling))
        return LoraEdit(lora_a=lora_a * factors.to(lora_a), row=row)

    def take_back(self, layer: Layer, change: ColumnChange, order: Tensor, distance: float | None) -> Tensor:
        """(c,) factors that take columns back in `order` (c,): as many as HPA's p of this layer says, or to a distance.

        distance: ||W_hat - W_prev||_F to reach, or None.
        """
        if distance is not None:
            return revert_factors(change, order, distance=distance)
        percent = self.config.edit.keep_percent(layer.block, layer.block_count)
        return revert_factors(change, order, count=column_count(percent, change.columns))

    def _decide(self, layer: Layer, change: ColumnChange) -> tuple[Tensor, dict[str, Any]]:
        distance = hpa_distance(layer, change, self.config.edit) if self.config.match else None
        factors = self.factors(layer, change, distance)
        return factors, {
            "kept_share": float((factors == 0).double().mean()),
            "share_reverted": reverted_by(change, factors),
            "change": change.norm,
            "distance": distance_of(change, factors),
        }


def hpa_distance(layer: Layer, change: ColumnChange, config: HpaConfig) -> float:
    """||W_hat - W_prev||_F of HPA's edit of the same change, without its projection.

    Its coefficient is small for LoRA updates: on the embedded stream 2e-4 to 5e-4 in the median, 2.7e-3 at most.

    Raises: CalibrationError: the layer has no diagonals.
    """
    (outcome,) = foresee(layer, change, [replace(config, projection="none")])
    return outcome.distance
