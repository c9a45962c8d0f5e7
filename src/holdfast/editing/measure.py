"""Column statistics of every layer's change: all that a sweep over options needs of the weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from holdfast.checkpoints.curvature_file import Curvature
from holdfast.checkpoints.merged import MergedCheckpoint
from holdfast.checkpoints.value import Source
from holdfast.editing.pair import open_pair
from holdfast.editing.plan import LoraTarget, check_calibration, find_targets
from holdfast.errors import NumericalError
from holdfast.functional.columns import measure_change, measure_lora
from holdfast.rules.base import MeasuredLayer


def measure_pair(
    before: Source,
    after: Source,
    curvature: Curvature,
    *,
    allow_other_calibration: bool = False,
    progress: Callable[..., None] | None = None,
) -> list[MeasuredLayer]:
    """Every calibrated layer that the tuning changed. An adapter is measured from its factors: no base is read.

    Raises: as `edit_checkpoint`.
    """
    measured = []
    with open_pair(before, after) as pair:
        if not allow_other_calibration:
            check_calibration(curvature, pair)
        targets = find_targets(pair, curvature, seed=0)
        for done, target in enumerate(targets, 1):
            try:
                if isinstance(target, LoraTarget):
                    change = measure_lora(*target.adapter.read_factors(target.lora.module), target.lora.scaling)
                else:
                    old, new = _read(pair.before, target.before_key), _read(pair.after, target.key)
                    change = measure_change(old, new)
            except NumericalError as error:
                raise NumericalError(f"{target.layer.name}: {error}") from error
            measured.append(MeasuredLayer(target.layer, change))
            if progress is not None:
                progress("measure_layer", name=target.layer.name, done=done, total=len(targets))
    return measured


def _read(checkpoint: MergedCheckpoint, key: str) -> Tensor:
    """As stored where nothing is merged into it, else the sum in fp32."""
    return checkpoint.read(key) if checkpoint.is_plain(key) else checkpoint.read_float(key)
