"""HPA's edit of one layer as the editor's rule, dense and in LoRA closed form: mathematics from `functional.hpa`.

Apart from the method of a stream (`holdfast.methods.hpa`), so that an edit on disk starts without a model library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import CalibrationError
from holdfast.functional.columns import ColumnChange, apply_columns, measure_change, measure_lora
from holdfast.functional.hpa import HpaConfig, Outcome, Setting, mask_lora, what_if
from holdfast.rules.base import DenseEdit, Layer, LoraEdit, Needs, Rule

__all__ = ["HpaConfig", "HpaRule", "diagonals", "figures"]


@dataclass(frozen=True)
class HpaRule(Rule):
    """HPA's edit of one layer, dense and as a LoRA closed form, with the paper's depth schedule of p.

    Where the base is read, a row also has relative_change ||D|| / ||W_prev||, and for a dense pair the cosine of W_new
    and W_prev.
    """

    config: HpaConfig = field(default_factory=HpaConfig)
    Config = HpaConfig
    name = "hpa"

    @property
    def needs(self) -> Needs:
        return "curvature"

    @property
    def reads_base(self) -> bool:
        return self.config.orthogonal is not False

    def edit(self, layer: Layer, w_prev: Tensor, w_new: Tensor) -> DenseEdit:
        safety, task = diagonals(layer)
        change = measure_change(w_prev, w_new, projection=self.config.orthogonal is not False)
        (outcome,) = what_if(change, safety, task, [self.setting(layer)], curvature=self.config.curvature)
        kept, coefficient = outcome.selection.kept, outcome.coefficient
        weight = apply_columns(w_prev, w_new, kept, coefficient=coefficient, out=w_new)
        row = {**figures(outcome), "relative_change": change.relative(), "cosine": change.cosine()}
        return DenseEdit(weight=weight, row=row)

    def edit_lora(
        self, layer: Layer, w_prev: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> LoraEdit:
        """Without `w_prev` the projection is left out: its coefficient is small for LoRA updates.

        On the embedded stream it is 2e-4 to 5e-4 in the median, and 2.7e-3 at most.

        With it, the row says by how much W_hat would be off without the coefficient: `coefficient_error`, the norm of
        coef * W_prev on the adjusted columns, relative to ||W_hat - W_prev||.
        """
        projected = w_prev is not None and self.config.orthogonal is not False
        safety, task = diagonals(layer)
        change = measure_lora(lora_a, lora_b, scaling, w_prev if projected else None)
        setting = replace(self.setting(layer), orthogonal=self.config.orthogonal if projected else False)
        (outcome,) = what_if(change, safety, task, [setting], curvature=self.config.curvature)
        done = mask_lora(lora_a, lora_b, scaling, outcome)
        row = figures(outcome)
        if projected:
            row["coefficient_error"] = _coefficient_error(change, outcome)
            row["relative_change"] = change.relative()
        elif self.config.orthogonal is not False:
            row["coefficient"] = None
        return LoraEdit(lora_a=done.lora_a, input_scale=done.input_scale if projected else None, row=row)

    def setting(self, layer: Layer) -> Setting:
        """The options as they apply to one layer: p falls with depth."""
        keep = self.config.keep_percent(layer.block, layer.block_count)
        return Setting(
            keep_percent=keep,
            focus_percent=self.config.focus_percent(keep),
            alpha_bounds=self.config.alpha_bounds,
            saliency=self.config.saliency,
            orthogonal=self.config.orthogonal,
        )


def diagonals(layer: Layer) -> tuple[Tensor, Tensor]:
    """Safety and task diagonal of a layer. Raises CalibrationError: there is none."""
    if layer.safety is None or layer.task is None:
        raise CalibrationError(
            f"HPA needs the safety and the task diagonal of {layer.name}, found none. Pass a calibration made by "
            "`holdfast calibrate`."
        )
    return layer.safety, layer.task


def _coefficient_error(change: ColumnChange, outcome: Outcome) -> float:
    assert change.square is not None  # measured: the projection was asked for
    adjusted = ~outcome.selection.kept
    coefficient = torch.as_tensor(outcome.coefficient, dtype=torch.float64)
    left_out = float((coefficient.square() * change.square)[adjusted].sum().sqrt())
    return left_out / outcome.distance if outcome.distance > 0 else 0.0


def figures(outcome: Outcome) -> dict[str, Any]:
    """A report's row: shares 0..1, norms Frobenius.

    kept_share, overlap |O|/|S|, safety_share |S \\ T|/c, alpha, g, coefficient, share_reverted (of ||D||^2), change
    ||D||, distance ||W_hat - W_prev||.
    """
    plain = outcome.figures()
    columns = plain["columns"]
    return {
        "kept": plain["kept"],
        "kept_share": plain["kept"] / columns,
        "overlap": plain["overlap"],
        "safety_share": plain["p_s"] / 100,
        "g": plain["g"] if math.isfinite(plain["g"]) else None,
        "alpha": plain["alpha"],
        "coefficient": plain["coefficient"],
        "share_reverted": plain["reverted"],
        "change": plain["change"],
        "distance": plain["distance"],
    }
