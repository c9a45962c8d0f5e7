"""Which strength? A budget, points of a trade-off curve, and the least edit that meets the one on the other. No torch.

A strength is a number: 0 is the tuned model, larger ones hold on to the model before more firmly. A point says what was
measured at a strength, on a probe set that is the same for all points.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from holdfast.errors import ConfigError
from holdfast.metrics.intervals import wilson

# mu_s of the anchored edit: from barely anything to nearly the model before.
STRENGTHS = (0.03, 0.1, 0.2, 0.35, 0.6, 1.0, 2.0, 4.0, 10.0, 30.0)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a restored model may cost; rates in 0..1, None for no bound.

    max_asr: share of forbidden requests that are not refused. max_over_refusal: share of harmless requests that are.
    max_drop: of the task's score, against the tuned model.
    """

    max_asr: float | None = None
    max_over_refusal: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}; expected a rate in 0..1 (3 % is 0.03).")

    @property
    def given(self) -> bool:
        """Whether there is any bound."""
        return any(value is not None for value in asdict(self).values())


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was measured at one strength; rates in 0..1, None where there was nothing to measure it on.

    asr: forbidden requests not refused, of those that were scored. complied: of them answered. over_refusal: harmless
    requests refused. task: the task's score, or the agreement with the tuned model where there are no task samples.
    """

    strength: float
    asr: float
    complied: float
    over_refusal: float | None = None
    task: float | None = None
    figures: dict[str, Any] | None = None

    def meets(self, budget: Budget, tuned: Point) -> bool:
        """Whether every bound holds; one on what was not measured does not."""
        return not self.excesses(budget, tuned)

    def excesses(self, budget: Budget, tuned: Point) -> dict[str, float]:
        """By how much each broken bound is broken, rates; inf where a bounded figure was not measured."""
        drop = None if self.task is None or tuned.task is None else tuned.task - self.task
        found = {}
        for name, value, bound in (
            ("asr", self.asr, budget.max_asr),
            ("over_refusal", self.over_refusal, budget.max_over_refusal),
            ("task", drop, budget.max_drop),
        ):
            # Rates are counts over counts: 3 of 100 must not miss a bound of 0.03 by rounding.
            if bound is not None and (value is None or value > bound + 1e-9):
                found[name] = math.inf if value is None else value - bound
        return found

    def unsure(self, budget: Budget) -> list[str]:
        """A sentence for each bound that holds on so few requests that the rate may well be above it (95 %, Wilson)."""
        found = []
        for name, what, bound in (
            ("asr", "forbidden requests are not refused", budget.max_asr),
            ("over_refusal", "harmless requests are refused", budget.max_over_refusal),
        ):
            counted = (self.figures or {}).get(name)
            if bound is None or counted is None or not 0 < bound < counted["high"] or counted["low"] > bound:
                continue
            one = wilson(0, 1).high  # z^2 / (n + z^2) at none of n = 1
            needed = math.ceil(one / (1 - one) * (1 - bound) / bound)
            found.append(
                f"{counted['hits']} of {counted['scored']} {what}: that holds {100 * bound:g} %, but says only "
                f"that the rate is below {100 * counted['high']:.1f} % (95 %). Probe with more of them: {needed} would "
                "do where not one fails."
            )
        return found

    def dominates(self, other: Point) -> bool:
        """Nowhere worse and somewhere better: on the forbidden, the harmless, and the task."""
        pairs = [(self.asr, other.asr)]
        if self.over_refusal is not None and other.over_refusal is not None:
            pairs.append((self.over_refusal, other.over_refusal))
        if self.task is not None and other.task is not None:
            pairs.append((-self.task, -other.task))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    def regret(self) -> float:
        """What goes wrong, added up: forbidden requests answered, harmless ones refused, task questions missed."""
        missed = 1 - self.task if self.task is not None else 0.0
        return self.asr + (self.over_refusal or 0.0) + missed


def undominated(points: Iterable[Point]) -> list[Point]:
    """Those that no other point dominates, by strength."""
    found = sorted(points, key=lambda point: point.strength)
    return [p for p in found if not any(q.dominates(p) for q in found)]


def choose(points: Sequence[Point], budget: Budget, tuned: Point) -> Point | None:
    """The least edit that meets the budget and that no other point dominates; None where no point meets it.

    Without a bound, the knee: the undominated point of least regret, the weaker edit where two are level.
    """
    if not points:
        return None
    if not budget.given:
        return min(undominated(points), key=lambda p: (round(p.regret(), 9), p.strength))
    # What dominates a point that meets the budget meets it too, so there is one of these where any point meets it.
    meeting = [p for p in undominated(points) if p.meets(budget, tuned)]
    return meeting[0] if meeting else None


def nearest_miss(points: Sequence[Point], budget: Budget, tuned: Point) -> Point:
    """The point that breaks the budget least: by the sum of its excesses, the safer one where two are level."""
    return min(points, key=lambda p: (sum(p.excesses(budget, tuned).values()), p.asr, p.strength))


def search(
    measure: Callable[[float], Point],
    exceeds: Callable[[float, float], bool],
    tuned: Point,
    budget: Budget,
    *,
    strengths: Sequence[float] = STRENGTHS,
    refine: int = 2,
    whole_curve: bool = False,
) -> list[Point]:
    """Measure as few strengths as the answer needs; returns the points, by strength, `tuned` (strength 0) among them.

    With a bound on ASR the least strength that holds it is bracketed by bisection on the grid (ASR falls with the
    strength, near enough), then the bracket is halved `refine` times, and the point found is measured with the next
    stronger one. Where that does not meet the other bounds, or nothing does, the whole grid is measured: no budget is
    called unattainable before. Without a bound on ASR, or with `whole_curve`, the whole grid is measured.

    Args:
        measure: all figures at a strength.
        exceeds: (strength, bound) -> whether ASR there is above the bound; may stop early, and agrees with `measure`.
        strengths: increasing, above 0.
    """
    grid = check_strengths(strengths)
    points = {0.0: tuned}

    def at(strength: float) -> Point:
        if strength not in points:
            points[strength] = measure(strength)
        return points[strength]

    def all_points() -> list[Point]:
        return [points[s] for s in sorted(points)]

    bound = budget.max_asr
    if bound is not None and not whole_curve and not tuned.meets(budget, tuned):
        steps = [0.0, *grid]
        low, high = 0, len(steps)  # steps[low] is too weak, steps[high] strong enough
        if tuned.asr <= bound + 1e-9:
            low, high = -1, 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if exceeds(steps[middle], bound) else (low, middle)
        if high < len(steps):
            least = steps[high]
            below = steps[low] if low >= 0 else 0.0
            for _ in range(refine if 0 < below < least else 0):
                between = round(math.sqrt(below * least), 6)
                below, least = (between, least) if exceeds(between, bound) else (below, between)
            at(least)
            stronger = next((s for s in grid if s > least), None)
            if stronger is not None:
                at(stronger)
            if choose(all_points(), budget, tuned) is not None:
                return all_points()
    elif bound is not None and not whole_curve:
        return all_points()
    for strength in grid:
        at(strength)
    return all_points()


def check_strengths(strengths: Sequence[float]) -> list[float]:
    """The strengths as floats. Raises ConfigError: none, not increasing, or one that is not a number above 0."""
    grid = [float(s) for s in strengths]
    if not grid or any(not (0 < s < math.inf) for s in grid) or any(a >= b for a, b in itertools.pairwise(grid)):
        raise ConfigError(f"strengths are {list(strengths)}; expected increasing numbers above 0, such as 0.1, 0.3, 1.")
    return grid


def curtailed(outcomes: Iterable[Sequence[bool]], total: int, bound: float) -> tuple[bool, int]:
    """Whether more than `bound` of `total` outcomes are True, read batch by batch and no further than needed.

    A curtailed test: it stops once the rest cannot change the answer, so its error against reading all is zero.
    Returns (exceeds, outcomes read). outcomes: batches; fewer than `total` in all (unscored ones) lower the total.
    """
    allowed = math.floor(bound * total + 1e-9)
    seen = bad = 0
    for batch in outcomes:
        seen += len(batch)
        bad += sum(batch)
        if bad > allowed:
            return True, seen
        if bad + (total - seen) <= allowed:
            return False, seen
    return bad > bound * seen + 1e-9, seen
