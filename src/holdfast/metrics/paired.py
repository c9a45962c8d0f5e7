"""Is method A better than method B? Paired tests over the same samples, or over the same seeds.

Two intervals that touch do not say that two methods are equal: with shared samples or seeds the difference is far
better known than either figure. Every p-value here is two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from holdfast.errors import DataError
from holdfast.metrics.intervals import RESAMPLES, SAME, Interval, _check_options, _paired, _resampled_means, over_seeds

# Up to 2^16 sign patterns are enumerated; above that they are drawn.
_EXACT_PAIRS = 16


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """difference: mean of a - b. wins / losses / ties: pairs with a > b, a < b, a = b. p: two-sided p-value."""

    name: str
    difference: float
    p: float
    n: int
    wins: int
    losses: int
    ties: int
    interval: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data, the interval likewise; null where there is none."""
        plain = {key: getattr(self, key) for key in self.__dataclass_fields__ if key != "interval"}
        return {**plain, "interval": self.interval.to_json() if self.interval else None}


def paired_bootstrap(
    a: npt.ArrayLike, b: npt.ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> PairedTest:
    """Bootstrap of the mean difference over samples that both methods answered.

    p is twice the smaller tail beyond zero of the resampled differences, each tail counted with one extra draw so
    that it is never 0 (its floor is 2 / (resamples + 1)). Raises DataError: other lengths, empty, not finite.
    """
    left, right = _paired(a, b)
    _check_options(level, resamples)
    delta = left - right
    means = _resampled_means(delta[:, None], resamples, np.random.default_rng(seed))[:, 0]
    below, above = int((means <= 0).sum()), int((means >= 0).sum())
    p = min(1.0, 2 * (min(below, above) + 1) / (resamples + 1))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    interval = Interval(
        value=float(delta.mean()), low=float(low), high=float(high), n=len(delta), level=level, kind="paired bootstrap"
    )
    return _result("paired bootstrap", delta, p, interval)


def sign_test(a: npt.ArrayLike, b: npt.ArrayLike) -> PairedTest:
    """Exact sign test: ties are left out (and counted); p = 1 when nothing differs."""
    left, right = _paired(a, b)
    delta = left - right
    return _result("sign test", delta, _binomial_p(int((delta > 0).sum()), int((delta < 0).sum())))


def mcnemar(a: npt.ArrayLike, b: npt.ArrayLike) -> PairedTest:
    """Exact McNemar test on two arrays of 0/1 outcomes of the same samples.

    Raises DataError: a value that is neither 0 nor 1 (use `paired_bootstrap` for graded scores).
    """
    left, right = _paired(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    for array in (left, right):
        odd = array[(array != 0) & (array != 1)]
        if len(odd):
            raise DataError(
                f"McNemar's test takes outcomes that are 0 or 1; found {odd[0]}. For graded scores use "
                "paired_bootstrap."
            )
    delta = left - right
    return _result("McNemar", delta, _binomial_p(int((delta > 0).sum()), int((delta < 0).sum())))


def paired_seeds(
    a: npt.ArrayLike, b: npt.ArrayLike, *, level: float = 0.95, draws: int = 20_000, seed: int = 0
) -> PairedTest:
    """Two methods over the same seeds: t interval of the mean difference, sign-flip permutation p-value.

    Up to 16 seeds every one of the 2^n sign patterns is counted, so p is exact and its floor is 2 / 2^n: five seeds
    can not give less than 0.0625, whatever the effect. Above, `draws` patterns are drawn with `seed`.
    """
    left, right = _paired(a, b)
    delta = left - right
    # Patterns that equal the observed sum up to the order of addition are ties; the tolerance scales with the data.
    n, observed = len(delta), abs(float(delta.sum())) - 1e-12 * float(np.abs(delta).sum())
    if n <= _EXACT_PAIRS:
        patterns = np.arange(2**n, dtype=np.int64)[:, None] >> np.arange(n) & 1
        sums = np.abs((1 - 2 * patterns) @ delta)
        p = float((sums >= observed).mean())
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, n))
        extreme = int((np.abs(signs @ delta) >= observed).sum())
        p = (extreme + 1) / (draws + 1)
    return _result("sign-flip permutation over seeds", delta, p, over_seeds(delta, level=level))


def paired_t(a: npt.ArrayLike, b: npt.ArrayLike) -> PairedTest:
    """Two methods over the same seeds: Student's paired t-test, whose interval is that of `paired_seeds`.

    It assumes differences that are about normal, which few seeds cannot show; what it buys is a p-value below the floor
    that counting sign patterns has with few seeds, so that a correction for many comparisons (`holm`) can be passed.
    Differences that are equal in every seed have no spread to be measured by; p is that of their signs, 2 / 2^n.
    """
    # Inside: importing scipy costs more than everything else here together.
    from scipy.special import stdtr

    left, right = _paired(a, b)
    delta = left - right
    n, spread = len(delta), float(delta.std(ddof=1)) if len(delta) > 1 else math.nan
    if n < 2:
        p = math.nan
    elif spread <= SAME * max(1.0, float(np.abs(delta).max())):
        p = 1.0 if abs(float(delta.mean())) <= SAME else 2.0 ** (1 - n)
    else:
        p = float(2 * stdtr(n - 1, -abs(delta.mean()) / (spread / math.sqrt(n))))
    return _result("paired t over seeds", delta, p, over_seeds(delta))


def holm(p: Sequence[float]) -> list[float]:
    """p-values of one family of comparisons, corrected so that the chance of any false finding stays below the level.

    Holm (1979): the i-th smallest of m is multiplied by m - i + 1, made monotone and cut at 1. NaN (no test) stays and
    counts for nothing.

    Raises: DataError: a p-value outside 0..1.
    """
    found = {place: value for place, value in enumerate(p) if not math.isnan(value)}
    odd = [value for value in found.values() if not 0 <= value <= 1]
    if odd:
        raise DataError(f"{odd[0]} is no p-value; expected 0..1.")
    corrected, largest = list(p), 0.0
    for rank, place in enumerate(sorted(found, key=lambda place: found[place])):
        largest = max(largest, min(1.0, (len(found) - rank) * found[place]))
        corrected[place] = largest
    return corrected


def _result(name: str, delta: npt.NDArray[np.float64], p: float, interval: Interval | None = None) -> PairedTest:
    return PairedTest(
        name=name,
        difference=float(delta.mean()),
        p=p,
        n=len(delta),
        wins=int((delta > 0).sum()),
        losses=int((delta < 0).sum()),
        ties=int((delta == 0).sum()),
        interval=interval,
    )


def _binomial_p(wins: int, losses: int) -> float:
    n = wins + losses
    if n == 0:
        return 1.0
    # Integers: exact for any n, and no statistics library is needed.
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)
