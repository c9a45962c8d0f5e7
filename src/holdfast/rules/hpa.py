"""HPA's edit of one layer as the editor's rule: `functional.hpa.edit_weight` and `edit_lora` with p falling with depth.

Apart from the method of a stream (`holdfast.methods.hpa`), so that an edit on disk starts without a model library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from holdfast.errors import CalibrationError
from holdfast.functional.columns import ColumnChange
from holdfast.functional.hpa import HpaConfig, Outcome, Setting, edit_lora, edit_weight, what_if
from holdfast.rules.base import DenseEdit, Layer, LoraEdit, Needs, Rule

__all__ = ["HpaConfig", "HpaRule", "diagonals", "foresee"]


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
        """What the rule must be given of a layer."""
        return "curvature"

    @property
    def reads_base(self) -> bool:
        """Whether an adapter's edit reads the base: for the projection's coefficient."""
        return self.config.projection != "none"

    def edit(self, layer: Layer, w_prev: Tensor, w_new: Tensor) -> DenseEdit:
        """HPA's edit of one layer. w_prev, w_new: (r, c); `w_new` is overwritten.

        Raises: CalibrationError: the layer has no diagonals. NumericalError: NaN or inf in a weight.
        """
        edited = edit_weight(w_prev, w_new, *diagonals(layer), **self._options(layer), out=w_new)
        of_base = {"relative_change": edited.outcome.relative_change, "cosine": edited.outcome.cosine}
        return DenseEdit(weight=edited.weight, row={**edited.figures(), **of_base})

    def edit_lora(
        self, layer: Layer, w_prev: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> LoraEdit:
        """Without `w_prev` the projection is left out: its coefficient is small for LoRA updates.

        On the embedded stream it is 2e-4 to 5e-4 in the median, and 2.7e-3 at most.

        With it, the row says by how much W_hat would be off without the coefficient: `coefficient_error`, the norm of
        coef * W_prev on the adjusted columns, relative to ||W_hat - W_prev||.

        w_prev: (r, c) or None. lora_a: (rank, c). lora_b: (r, rank).
        """
        rule = self if w_prev is not None else self.without_projection()
        options = rule._options(layer)
        edited = edit_lora(w_prev, lora_a, lora_b, scaling, *diagonals(layer), **options)
        row = edited.figures()
        if rule.reads_base:
            row["coefficient_error"] = edited.outcome.coefficient_error
            row["relative_change"] = edited.outcome.relative_change
        elif self.reads_base:
            row["coefficient"] = None
        return LoraEdit(lora_a=edited.lora_a, input_scale=edited.input_scale if rule.reads_base else None, row=row)

    def without_projection(self) -> HpaRule:
        """The same edit where the base is not read."""
        return HpaRule(replace(self.config, projection="none"))

    def setting(self, layer: Layer) -> Setting:
        """The options as they apply to one layer: p falls with depth."""
        keep = self.config.keep_percent(layer.block, layer.block_count)
        return Setting(
            keep_percent=keep,
            focus_percent=self.config.focus_percent(keep),
            alpha_bounds=self.config.alpha_bounds,
            ranking=self.config.ranking,
            projection=self.config.projection,
        )

    def _options(self, layer: Layer) -> Mapping[str, Any]:
        return {**asdict(self.setting(layer)), "curvature_form": self.config.curvature_form}


def diagonals(layer: Layer) -> tuple[Tensor, Tensor]:
    """Safety and task diagonal of a layer. Raises CalibrationError: there is none.

    Each is (c,).
    """
    if layer.safety is None or layer.task is None:
        raise CalibrationError(
            f"HPA needs the safety and the task diagonal of {layer.name}, found none. Pass a calibration made by "
            "`holdfast calibrate`."
        )
    return layer.safety, layer.task


def foresee(layer: Layer, change: ColumnChange, configs: Sequence[HpaConfig]) -> list[Outcome]:
    """What `HpaRule(config).edit` does to a layer, for each of `configs`, from the statistics of its change alone.

    configs: one form of the curvature. Where the base was not read, the projection is left out.

    Raises: CalibrationError: the layer has no diagonals.
    """
    (form,) = {config.curvature_form for config in configs}
    rules = [HpaRule(config) for config in configs]
    if change.dot is None:
        rules = [rule.without_projection() for rule in rules]
    return what_if(change, *diagonals(layer), [rule.setting(layer) for rule in rules], curvature_form=form)
