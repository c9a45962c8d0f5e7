"""Does a model keep to a budget? The question of `holdfast gate`, for CI: nothing is edited."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from holdfast.errors import ConfigError, DataError
from holdfast.restore.measure import Probe
from holdfast.restore.search import Budget, Point
from holdfast.stream.protocol import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """passed: every bound holds. broken: figure -> by how much its bound is broken. record: all that was measured."""

    passed: bool
    broken: Mapping[str, float]
    record: Mapping[str, Any]


def gate(
    model: Checkpoint,
    probe: Probe,
    budget: Budget,
    *,
    reference: Checkpoint | None = None,
    reference_task: float | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Verdict:
    """Ask `model` the probe requests and hold its figures against `budget`.

    reference: the model that `max_drop` is counted from; or `reference_task`, its score where it is known.

    Raises: ConfigError: no bound, or one without what it bounds. DataError: no forbidden request.
    """
    from holdfast.models.load import load

    if not budget.given:
        raise ConfigError("No bound to hold the model against; give --max-asr, --max-over-refusal or --max-drop.")
    if budget.max_asr is not None and not probe.safety:
        raise DataError("--max-asr bounds what cannot be measured without --safety; give --safety.")
    if budget.max_over_refusal is not None and not probe.benign:
        raise ConfigError("--max-over-refusal bounds what cannot be measured without --benign; give --benign.")
    if budget.max_drop is not None:
        if not probe.task:
            raise ConfigError("--max-drop bounds what cannot be measured without --task; give --task.")
        if reference is None and reference_task is None:
            raise ConfigError(
                "--max-drop counts from another model's score; give that model (--reference MODEL) or its score "
                "(--reference-task 87%)."
            )
    wanted = None
    if budget.max_drop is not None and reference_task is None and reference is not None:
        wanted = probe.point(load(reference, dtype=dtype, device=device), 0.0)
        reference_task = wanted.task
    found = probe.point(load(model, dtype=dtype, device=device), 0.0)
    standard = Point(strength=math.inf, asr=0.0, complied=0.0, task=reference_task)
    broken = found.excesses(budget, standard)
    return Verdict(
        passed=not broken,
        broken=broken,
        record={
            "passed": not broken,
            "broken": {name: (None if math.isinf(by) else by) for name, by in broken.items()},
            "model": _plain(found),
            "reference": None if wanted is None else _plain(wanted),
            "reference_task": reference_task,
            "budget": asdict(budget),
            "warnings": [] if broken else found.unsure(budget),
            "probe": {"safety": len(probe.safety), "benign": len(probe.benign), "task": len(probe.task)},
        },
    )


def _plain(point: Point) -> dict[str, Any]:
    figures = {key: value for key, value in (point.figures or {}).items() if key != "replies"}
    found = asdict(point) | {"figures": figures}
    found.pop("strength")
    return found
