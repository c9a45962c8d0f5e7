"""Rates as people would give them, from a judge's verdict on every reply and people's labels on a few.

The judge's verdicts are strata: in each, some replies are drawn at random and labelled by people. Then the rate is the
weighted sum of the strata's labelled shares, whatever the judge's error is and whether or not it is the same for two
models; a judge that is often wrong makes the interval wide, never the estimate wrong.

Intervals: half-count (Jeffreys) for a finite population. Of a stratum of N replies, n labelled, x of them hits, the
N - n others hold K hits with K ~ BetaBinomial(N - n, x + 1/2, n - x + 1/2); the strata are independent, so the sum's
distribution is their convolution, and the interval is its central part. Nothing is left open where every reply was
labelled (finite population correction), bounds stay in 0..1, and no hit among few labels is not "no hits at all".
Sources: Brown, Cai and DasGupta 2001 (half counts against normal intervals); Cochran 1977, chapter 5 (stratification).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from holdfast.errors import DataError

Array = npt.NDArray[np.float64]

# Below so many labels a rate is within some 30 points at best: it is called too few, and its interval is shown alone.
MIN_LABELS = 10
# A stratum nobody labelled may hold so much of the weight before the estimate of the rest stops being the figure.
_UNSEEN = 0.05
# Steps of the convolution where the replies do not weigh the same; 0.01 points each.
_GRID = 8192
# Shares this near to 0 or 1 are 0 or 1: weighted sums of labels round.
_NOTHING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Stratum:
    """Replies that the judge treated alike, and what people said of those drawn from them.

    size: replies. weight: what it weighs in the figure, any unit (by default its size). labelled: drawn at random and
    labelled, of which `hits` were decided as a hit and `undecided` could not be told. design_effect: >= 1, Kish's,
    where the replies inside do not weigh the same; `hits` and `undecided` are then weighted shares times `labelled`.
    """

    size: int
    labelled: int
    hits: float
    undecided: float = 0.0
    weight: float | None = None
    design_effect: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.labelled <= self.size:
            raise DataError(
                f"A stratum of {self.size} replies with {self.labelled} labelled; expected at least one reply and "
                "0 <= labelled <= size."
            )
        over = 1e-9 * self.labelled
        if self.hits < 0 or self.undecided < 0 or self.hits + self.undecided > self.labelled + over:
            raise DataError(
                f"{self.hits} hits and {self.undecided} undecided of {self.labelled} labelled replies; expected "
                "hits + undecided <= labelled, none below 0."
            )
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise DataError(f"weight is {self.weight}; expected a positive number.")
        if not self.design_effect >= 1:
            raise DataError(f"design_effect is {self.design_effect}; expected at least 1.")


@dataclass(frozen=True, kw_only=True)
class CorrectedRate:
    """A rate as people would give it, 0..1, with its interval.

    value: None where no label was decided. low, high: design-based interval at `level`; what people could not tell and
    what nobody labelled is counted both ways (`worst_low`, `worst_high`: the same, without chance). n: labels;
    undecided: of them; population: replies; unlabelled: share of the figure in strata without a label. enough: whether
    the point can stand alone; `reason` says why not.
    """

    value: float | None
    low: float
    high: float
    worst_low: float
    worst_high: float
    n: int
    undecided: float
    population: int
    unlabelled: float
    level: float
    enough: bool
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {key: getattr(self, key) for key in self.__dataclass_fields__}


def corrected_rate(strata: Sequence[Stratum], *, level: float = 0.95) -> CorrectedRate:
    """Stratified estimate of a rate, with the half-count interval of a finite population.

    Args: strata: those that make up the figure, disjoint and together everything it is about.   level: in (0, 1).
    Raises: DataError: no stratum, or a wrong level.
    """
    if not strata:
        raise DataError("A corrected rate needs at least one stratum of replies; none was given.")
    if not 0.0 < level < 1.0:
        raise DataError(f"level is {level}; expected a confidence between 0 and 1, such as 0.95.")
    raw = np.array([s.size if s.weight is None else s.weight for s in strata], dtype=np.float64)
    weights = raw / raw.sum()
    known = [(w, s) for w, s in zip(weights, strata, strict=True) if s.labelled]
    unlabelled = float(sum(w for w, s in zip(weights, strata, strict=True) if not s.labelled))
    decided = [(w, s.hits / (s.labelled - s.undecided)) for w, s in known if s.labelled - s.undecided > 1e-9]
    value = None
    if decided:
        value = _clip(sum(w * share for w, share in decided) / sum(w for w, _ in decided))
    worst_low = _clip(sum(w * s.hits / s.labelled for w, s in known))
    worst_high = _clip(sum(w * (s.hits + s.undecided) / s.labelled for w, s in known) + unlabelled)
    low = min(_bounds(known, level, undecided_hit=False)[0], worst_low)
    high = max(_bounds(known, level, undecided_hit=True)[1] + unlabelled, worst_high)
    n, population = sum(s.labelled for s in strata), sum(s.size for s in strata)
    reason = ""
    if value is None:
        reason = "no label was decided" if n else "no label yet"
    elif n < min(MIN_LABELS, population):
        reason = f"{n} labels; at least {min(MIN_LABELS, population)} are needed"
    elif unlabelled > _UNSEEN:
        reason = f"no label where {100 * unlabelled:.0f} % of the replies are"
    return CorrectedRate(
        value=value,
        low=_clip(low),
        high=_clip(high),
        worst_low=worst_low,
        worst_high=worst_high,
        n=n,
        undecided=sum(s.undecided for s in strata),
        population=population,
        unlabelled=unlabelled,
        level=level,
        enough=not reason,
        reason=reason,
    )


def allocate(sizes: Sequence[int], number: int, *, power: float = 0.75) -> list[int]:
    """How many of `number` labels each stratum gets: in proportion to size ** power, and two at least where they reach.

    0.75 leans to the judge's rarer verdicts, where one wrong reply says most; against plain proportion it has the
    smaller error on XSTest (`benchmarks/label_coverage.py`). Two at least, because a stratum nobody looked into can
    hold anything; where `number` does not give two to each, one. What a small stratum cannot use goes to the others.

    Raises: DataError: a stratum without replies, or fewer labels than strata.
    """
    if any(size < 1 for size in sizes):
        raise DataError(f"Strata of {list(sizes)} replies; expected at least one reply in each.")
    if number < len(sizes):
        raise DataError(f"{number} labels for {len(sizes)} strata; expected at least one for each.")
    total = min(number, sum(sizes))
    least = [min(2, size) for size in sizes]
    if sum(least) > total:
        least = [1] * len(sizes)
    return _fill(sizes, least, [size**power for size in sizes], total)


def share_equally(sizes: Sequence[int], number: int) -> list[int]:
    """`number` labels split evenly over groups of so many replies; what a small group cannot use goes to the others."""
    return _fill(sizes, [0] * len(sizes), [1.0] * len(sizes), min(number, sum(sizes)))


def _fill(sizes: Sequence[int], least: Sequence[int], wish: Sequence[float], total: int) -> list[int]:
    """Integers between `least` and `sizes` that sum to `total` and are as near to multiples of `wish` as they can."""
    # One by one to whoever is furthest behind (Sainte-Lague); at most some hundred labels.
    counts = list(least)
    while sum(counts) < total:
        open_ = [i for i, count in enumerate(counts) if count < sizes[i]]
        counts[max(open_, key=lambda i: (wish[i] / (2 * counts[i] + 1), -i))] += 1
    return counts


def _bounds(known: Sequence[tuple[float, Stratum]], level: float, *, undecided_hit: bool) -> tuple[float, float]:
    """Interval of the labelled strata's part of the rate, with every undecided label taken one way."""
    parts = [_Part.of(w, s, s.hits + (s.undecided if undecided_hit else 0.0)) for w, s in known]
    fixed = sum(part.fixed for part in parts)
    # Brown, Cai and DasGupta: without a hit the lower bound is 0 itself, without a miss the upper one is 1; here
    # stratum by stratum, or the half counts of several large strata without a hit would add up to a rate.
    lower = [part for part in parts if part.unknown and part.share > _NOTHING]
    upper = [part for part in parts if part.unknown and part.share < 1 - _NOTHING]
    surely = sum(part.unit * part.unknown for part in parts if part.share >= 1 - _NOTHING)
    tail = (1.0 - level) / 2
    return fixed + _quantile(lower, tail), fixed + surely + _quantile(upper, 1.0 - tail)


def _quantile(parts: Sequence[_Part], probability: float) -> float:
    """Quantile of the weight of all unknown hits: the parts' distributions, convolved."""
    if not parts:
        return 0.0
    units = [part.unit for part in parts]
    same = max(units) - min(units) <= 1e-9 * max(units) and sum(part.unknown for part in parts) <= _GRID
    # Where every reply weighs the same the grid is the replies themselves, and nothing is rounded.
    step = units[0] if same else sum(part.unit * part.unknown for part in parts) / _GRID
    length = round(sum(part.unit * part.unknown for part in parts) / step) + len(parts) + 2
    transform = np.ones(length // 2 + 1, dtype=np.complex128)
    for part in parts:
        transform = transform * np.fft.rfft(part.on_grid(step, length), length)
    below = np.cumsum(np.clip(np.fft.irfft(transform, length), 0.0, None))
    return step * int(np.searchsorted(below, probability * below[-1]))


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A stratum's part of the rate: `fixed` from labels, and `unknown` replies of `unit` weight, K of them hits."""

    fixed: float
    unit: float
    unknown: int
    alpha: float
    beta: float
    share: float

    @classmethod
    def of(cls, weight: float, stratum: Stratum, hits: float) -> _Part:
        labelled = stratum.labelled
        share = min(hits / labelled, 1.0)
        # Kish: with unequal weights inside, n labels say as much as n / deff; the share that was drawn stays.
        n = labelled / stratum.design_effect
        seen = labelled / stratum.size
        unknown = round((stratum.size - labelled) / stratum.design_effect)
        if stratum.size > labelled:
            unknown = max(unknown, 1)
        return cls(
            fixed=weight * seen * share,
            unit=weight * (1 - seen) / unknown if unknown else 0.0,
            unknown=unknown,
            alpha=n * share + 0.5,
            beta=n * (1 - share) + 0.5,
            share=share,
        )

    def on_grid(self, step: float, length: int) -> Array:
        """Probability of unit * K on multiples of `step`; a value between two goes to both, its mean kept."""
        places = self.unit / step * np.arange(self.unknown + 1)
        nearest = np.rint(places)
        places = np.where(np.abs(places - nearest) < 1e-6, nearest, places)
        lower = np.floor(places).astype(np.int64)
        above = places - lower
        chance = _beta_binomial(self.unknown, self.alpha, self.beta)
        grid = np.zeros(length)
        np.add.at(grid, lower, chance * (1 - above))
        np.add.at(grid, np.minimum(lower + 1, length - 1), chance * above)
        return grid


def _beta_binomial(n: int, alpha: float, beta: float) -> Array:
    """P(K = 0..n) of a beta-binomial distribution."""
    # Inside: importing scipy costs more than everything else here together.
    from scipy.special import betaln

    k = np.arange(n + 1)
    log = betaln(k + alpha, n - k + beta) - betaln(alpha, beta) - betaln(k + 1, n - k + 1) - math.log(n + 1)
    return np.asarray(np.exp(log), dtype=np.float64)


def _clip(value: float) -> float:
    return float(min(max(value, 0.0), 1.0))
