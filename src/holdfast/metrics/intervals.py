"""How sure a figure is: bootstrap over samples, Wilson for rates, mean and spread over seeds.

Two sources of chance are kept apart. Resampling test samples answers "would another draw of test items change this
figure of this model?"; the spread over seeds answers "would training again?". A table says which one it shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from holdfast.errors import DataError

Array = npt.NDArray[np.float64]

# 2,000 resamples put the Monte-Carlo error of a 95 % bound far below its own width.
RESAMPLES = 2000
_CHUNK_CELLS = 8_000_000
# Values of seeds that are this near are equal: what lies between them is rounding.
SAME = 1e-9


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A point estimate with a confidence interval. n: samples, or seeds; std: over seeds (ddof 1), else None."""

    value: float
    low: float
    high: float
    n: int
    level: float
    kind: str
    std: float | None = None

    @property
    def leaves_out_zero(self) -> bool:
        """Whether 0 is outside. One over seeds that has no width says nothing: they agree to the digit, by chance."""
        if self.kind == "seeds" and not self.high - self.low > SAME:
            return False
        return self.low > 0.0 or self.high < 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data; nan becomes None."""
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in ((k, getattr(self, k)) for k in self.__dataclass_fields__)
        }


def bootstrap(
    groups: Sequence[npt.ArrayLike],
    combine: Callable[[list[Array]], Array],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of a figure made of group means, resampling inside each group.

    Args:
        groups: one array per group (task, safety set), (n_g,) or (n_g, k_g). A row is one sample with k_g values that
            belong together (its score when just learned and its score at the end), so that pairing is kept.
        combine: from a list of group means, each (b, k_g) for b resamples at once, to the figure, (b,).
        level: confidence, in (0, 1).   resamples: draws.   seed: of the draws; same seed, same interval.

    Raises: DataError: an empty group, a value that is not finite, or a wrong option.
    """
    arrays = [_group(group, index) for index, group in enumerate(groups)]
    if not arrays:
        raise DataError("A bootstrap needs at least one group of samples; none was given.")
    _check_options(level, resamples)
    value = float(combine([a.mean(axis=0, keepdims=True) for a in arrays])[0])
    rng = np.random.default_rng(seed)
    figures = combine([_resampled_means(a, resamples, rng) for a in arrays])
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    total = sum(len(a) for a in arrays)
    return Interval(value=value, low=float(low), high=float(high), n=total, level=level, kind="bootstrap")


def bootstrap_mean(
    values: npt.ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Bootstrap interval of the mean of per-sample values, (n,)."""
    return bootstrap([values], lambda means: means[0][:, 0], level=level, resamples=resamples, seed=seed)


def bootstrap_ap(final: Sequence[npt.ArrayLike], *, level: float = 0.95, seed: int = 0) -> Interval:
    """Bootstrap interval of AP from each task's per-sample scores after the last step."""
    return bootstrap(final, lambda means: np.mean([m[:, 0] for m in means], axis=0), level=level, seed=seed)


def bootstrap_bwt(
    just_learned: Sequence[npt.ArrayLike], final: Sequence[npt.ArrayLike], *, level: float = 0.95, seed: int = 0
) -> Interval:
    """Bootstrap interval of BWT (denominator T - 1): the same samples are drawn just learned and at the end.

    Args: per-sample scores of every task but the last, in the same order in both; `just_learned[j]` and `final[j]` are
        answers to the same samples. Raises DataError: other lengths, or no task.
    """
    pairs = []
    for index, (before, after) in enumerate(_zip(just_learned, final)):
        pairs.append(np.stack([*_paired(before, after, f"task {index}")], axis=1))
    return bootstrap(pairs, lambda means: np.mean([m[:, 1] - m[:, 0] for m in means], axis=0), level=level, seed=seed)


def wilson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Wilson score interval of a rate; unlike the bootstrap it is not empty at 0 of n. Raises DataError: n < 1."""
    if not 0 <= successes <= n or n < 1:
        raise DataError(f"{successes} of {n} is no rate; expected 0 <= successes <= n and n >= 1.")
    _check_options(level, 1)
    z = -_normal_quantile((1 - level) / 2)
    rate, spread = successes / n, z * z / n
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / n + spread / (4 * n))
    # Rounding must not push the bound past the estimate itself at 0 and n.
    low, high = (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)
    return Interval(value=rate, low=low, high=high, n=n, level=level, kind="wilson")


def over_seeds(values: npt.ArrayLike, *, level: float = 0.95) -> Interval:
    """Mean over seeds with its sample standard deviation (ddof 1) and Student's t interval of the mean.

    With one seed there is a mean and nothing else: std, low and high are nan. Raises DataError: none, or not finite.
    """
    array = _group(values, 0)[:, 0]
    _check_options(level, 1)
    n, mean = len(array), float(array.mean())
    if n == 1:
        return Interval(value=mean, low=math.nan, high=math.nan, n=1, level=level, kind="seeds", std=math.nan)
    std = float(array.std(ddof=1))
    half = t_quantile((1 + level) / 2, n - 1) * std / math.sqrt(n)
    return Interval(value=mean, low=mean - half, high=mean + half, n=n, level=level, kind="seeds", std=std)


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution with `degrees` >= 1 degrees of freedom."""
    # Inside: importing scipy costs more than everything else here together.
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


def _normal_quantile(probability: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(probability))


def _group(values: npt.ArrayLike, index: int) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or array.size == 0:
        raise DataError(f"Group {index} has shape {np.shape(values)}; expected (n,) or (n, k) with n >= 1.")
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise DataError(
            f"Group {index}: sample {int(bad[0])} has the value {array[bad[0]].tolist()} ({len(bad)} such). "
            "Leave unscored samples out before and report their number."
        )
    return array


def _paired(a: npt.ArrayLike, b: npt.ArrayLike, what: str = "the pair") -> tuple[Array, Array]:
    left, right = _group(a, 0), _group(b, 1)
    if left.shape != right.shape or left.shape[1] != 1:
        raise DataError(
            f"{what}: {np.shape(a)} values against {np.shape(b)}; expected two (n,) arrays over the same samples."
        )
    return left[:, 0], right[:, 0]


def _zip(a: Sequence[Any], b: Sequence[Any]) -> list[tuple[Any, Any]]:
    if len(a) != len(b) or not len(a):
        raise DataError(f"{len(a)} groups against {len(b)}; expected the same tasks, at least one, in the same order.")
    return list(zip(a, b, strict=True))


def _resampled_means(array: Array, resamples: int, rng: np.random.Generator) -> Array:
    n, k = array.shape
    means = np.empty((resamples, k))
    step = max(1, _CHUNK_CELLS // (n * k))
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        means[start:stop] = array[rng.integers(0, n, size=(stop - start, n))].mean(axis=1)
    return means


def _check_options(level: float, resamples: int) -> None:
    if not 0.0 < level < 1.0:
        raise DataError(f"level is {level}; expected a confidence between 0 and 1, such as 0.95.")
    if resamples < 1:
        raise DataError(f"resamples is {resamples}; expected at least 1.")
