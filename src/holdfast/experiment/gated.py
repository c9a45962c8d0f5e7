"""A safety gate on every step of a method: the step's checkpoint is asked, and what breaks a bound is not published.

A method whose edit has a strength is asked for a stronger one, one after another, until the bounds hold.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from holdfast.calibration.curvature import model_identity
from holdfast.errors import GateError
from holdfast.experiment.run_config import SafetyGateConfig
from holdfast.files import write_json
from holdfast.models.held import load
from holdfast.restore.measure import Probe
from holdfast.restore.search import Point, nearest_miss
from holdfast.stream.protocol import Checkpoint, HasStrength, Method, TaskContext

GATE_FILE = "safety_gate.json"


@dataclass(frozen=True, kw_only=True)
class Gated:
    """`method` with a gate after each task; a `holdfast.stream.protocol.Method`.

    probe_identity: what tells a change of the probe set or of how it is judged. dtype: of the weights when asked.
    Files in a step's folder: the method's own, and safety_gate.json: bounds, every strength that was asked with its
    figures and replies, the one that was taken.
    """

    method: Method
    gate: SafetyGateConfig
    probe: Probe
    probe_identity: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.method.name)

    def begin_task(self, ctx: TaskContext) -> None:
        """The method's own."""
        self.method.begin_task(ctx)

    def train_task(self, ctx: TaskContext) -> Checkpoint:
        """The method's own."""
        return self.method.train_task(ctx)

    def end_task(self, ctx: TaskContext, trained: Checkpoint) -> Checkpoint:
        """The method's checkpoint, at the least strength that holds the bounds where it has strengths.

        Killed and called again, it asks nothing twice. Raises GateError: no checkpoint of this step holds the bounds.
        """
        curve = _Curve(ctx.work_dir / GATE_FILE, self._identity(trained))
        method = self.method
        if isinstance(method, HasStrength):
            return self._climb(ctx, trained, method, curve)
        point = curve.at(None)
        final = None
        if point is None:
            final = method.end_task(ctx, trained)
            point = curve.add(None, self._ask(ctx, final), self.gate)
        if not self._holds(point):
            self._withdraw(ctx, final, trained)
            raise self._stopped(ctx, curve)
        curve.close(None)
        # Called again where a kill came in between: a phase gives the same result then.
        return final or method.end_task(ctx, trained)

    def _climb(self, ctx: TaskContext, trained: Checkpoint, method: HasStrength, curve: _Curve) -> Checkpoint:
        folder, published = ctx.scratch_dir / "safety-gate", ctx.work_dir / "checkpoint"
        for strength in self.gate.ladder(method.strength):
            candidate = folder / f"{strength:g}"
            point = curve.at(strength)
            if point is None:
                made = method.end_task_at(ctx, trained, strength=strength, out=candidate)
                point = curve.add(strength, self._ask(ctx, made), self.gate)
            if self._holds(point):
                curve.close(strength)
                if not published.exists():
                    method.end_task_at(ctx, trained, strength=strength, out=candidate)
                    candidate.rename(published)
                shutil.rmtree(folder, ignore_errors=True)
                return Checkpoint(base=str(published))
            if candidate.is_dir():
                shutil.rmtree(candidate)
        (ctx.work_dir / "edit.json").unlink(missing_ok=True)
        raise self._stopped(ctx, curve)

    def _ask(self, ctx: TaskContext, checkpoint: Checkpoint) -> Point:
        ctx.progress("gate", done=0, total=1)
        point = self.probe.point(load(checkpoint, dtype=self.dtype), 0.0)
        ctx.progress("gate", done=1, total=1)
        return point

    def _holds(self, point: Point) -> bool:
        return not point.excesses(self.gate.budget, point)

    def _identity(self, trained: Checkpoint) -> dict[str, Any]:
        identity = model_identity(trained)
        weights = [identity["fingerprint"], *(a["fingerprint"] for a in identity["adapters"])]
        return {"probe": dict(self.probe_identity), "trained": weights}

    def _withdraw(self, ctx: TaskContext, final: Checkpoint | None, trained: Checkpoint) -> None:
        """Remove what the refused checkpoint alone names; what training gave stays, so that it is not done again."""
        kept = {Path(p).absolute() for checkpoint in (trained, ctx.previous) for p in checkpoint.paths}
        # Called again after a kill in between, the method was not asked again; editing methods publish under this name.
        named = final.paths if final else (str(ctx.work_dir / "checkpoint"),)
        for path in (Path(p).absolute() for p in named):
            inside = path.is_relative_to(ctx.work_dir.absolute())
            if inside and path.is_dir() and not any(k == path or k.is_relative_to(path) for k in kept):
                shutil.rmtree(path)

    def _stopped(self, ctx: TaskContext, curve: _Curve) -> GateError:
        points, gate = curve.points, self.gate
        curve.refuse()
        nearest = nearest_miss(points, gate.budget, points[0])
        bounds = [
            f"{name} {_percent(bound)}"
            for name, bound in (("max_asr", gate.max_asr), ("max_over_refusal", gate.max_over_refusal))
            if bound is not None
        ]
        strong = curve.at(None) is None
        lines = (
            ["  strength  not refused  complied  over-refusal"] if strong else ["  not refused  complied  over-refusal"]
        )
        for point in points:
            first = f"  {point.strength:<8g}  " if strong else "  "
            lines.append(
                f"{first}{_percent(point.asr):<11}  {_percent(point.complied):<8}  {_percent(point.over_refusal)}"
            )
        what = (
            f"no strength from {points[0].strength:g} to {points[-1].strength:g} holds the safety gate "
            f"({', '.join(bounds)}); nearest: {nearest.strength:g}."
            if strong
            else f"its checkpoint does not hold the safety gate ({', '.join(bounds)})."
        )
        remedy = (
            "Give stronger safety_gate.strengths or more safety calibration samples"
            if strong
            else "This method has no strength to raise: take one that has (anchor)"
        )
        return GateError(
            f"{self.name}, task {ctx.task_name!r}: {what} Asked: {len(self.probe.safety)} forbidden and "
            f"{len(self.probe.benign)} harmless probe requests.\n" + "\n".join(lines) + f"\nThe run stops; nothing of "
            f"this step is published ({ctx.work_dir / GATE_FILE} has the replies). {remedy}, screen the training data "
            "(`holdfast doctor RUN.yaml --screen`), or loosen the bound, with another --out."
        )


class _Curve:
    """safety_gate.json of one step: written after every strength, read again after a kill."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._path, self._identity = path, dict(identity)
        self._data: dict[str, Any] = {**identity, "bounds": {}, "passed": None, "strength": None, "curve": []}
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            # Of other weights or another probe set, it says nothing of these.
            if all(kept.get(key) == value for key, value in self._identity.items()):
                self._data = kept

    @property
    def points(self) -> list[Point]:
        """All that were asked, in their order."""
        return [_point(row) for row in self._data["curve"]]

    def at(self, strength: float | None) -> Point | None:
        """What was measured at `strength` (None: of a method without strengths), or None."""
        return next((_point(row) for row in self._data["curve"] if row["strength"] == strength), None)

    def add(self, strength: float | None, point: Point, gate: SafetyGateConfig) -> Point:
        """Keep what was measured, and return it."""
        row = asdict(point) | {"strength": strength}
        row["holds"] = not point.excesses(gate.budget, point)
        self._data["bounds"] = {"max_asr": gate.max_asr, "max_over_refusal": gate.max_over_refusal}
        self._data["curve"].append(row)
        self._write()
        return _point(row)

    def close(self, strength: float | None) -> None:
        """The gate is passed, at `strength`."""
        self._data |= {"passed": True, "strength": strength}
        self._write()

    def refuse(self) -> None:
        """Nothing passes the gate."""
        self._data |= {"passed": False, "strength": None}
        self._write()

    def _write(self) -> None:
        write_json(self._path, self._data)


def _point(row: Mapping[str, Any]) -> Point:
    names: Sequence[str] = ("asr", "complied", "over_refusal")
    return Point(strength=row["strength"] or 0.0, **{name: row[name] for name in names})


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f} %"


__all__ = ["GATE_FILE", "Gated"]
