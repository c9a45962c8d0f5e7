"""Options of HPA's edit, one word per idea in files, flags and functions. Knows no tensor, so a command line is quick.

Old names (until version 0.2): `saliency` is `ranking`, `curvature` is `curvature_form`, `orthogonal` True, "column" or
False is `projection` "layer", "column" or "none". They are still read, in run files and as arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from holdfast.config import accepts_old_names
from holdfast.errors import ConfigError

Ranking = Literal["eps+phi", "eps", "phi"]
CurvatureForm = Literal["divide", "multiply"]
Projection = Literal["layer", "column", "none"]
# By the name that the mathematics has for it: True is "layer", False is "none".
Orthogonal = bool | Projection

# The paper's.
KEEP_BOUNDS = (5.0, 15.0)
ALPHA_BOUNDS = (0.4, 0.8)
FOCUS_RATIO = 2.0


def projection_of(orthogonal: Any) -> Any:
    """The projection that an `orthogonal` names: True "layer", False "none". Anything else is left as it is."""
    if isinstance(orthogonal, bool):
        return "layer" if orthogonal else "none"
    return orthogonal


@accepts_old_names(saliency="ranking", curvature="curvature_form", orthogonal=("projection", projection_of))
@dataclass(frozen=True, kw_only=True)
class HpaConfig:
    """Options of an HPA edit; the defaults are the paper's.

    keep_bounds: (p_min, p_max), percent of the input columns kept in the last and (nearly) in the first block.
    focus_ratio: k = focus_ratio * p, at least 1; k is cut off at 100 %.
    alpha_bounds: (a0, a1).
    ranking: "eps+phi" (the method), or the ablations "eps" (top p% by eps) and "phi" (top p% by phi).
    curvature_form: "divide" n_j by [H^-1]_jj (optimal brain surgeon), or "multiply".
    projection: "layer": one Frobenius projection per layer; "column": one per column; "none".

    Raises: ConfigError: a value outside of these.
    """

    keep_bounds: tuple[float, float] = KEEP_BOUNDS
    focus_ratio: float = FOCUS_RATIO
    alpha_bounds: tuple[float, float] = ALPHA_BOUNDS
    ranking: Ranking = "eps+phi"
    curvature_form: CurvatureForm = "divide"
    projection: Projection = "layer"

    def __post_init__(self) -> None:
        if not all(0 <= p <= 100 for p in self.keep_bounds):
            raise ConfigError(f"keep_bounds={self.keep_bounds}; expected two percentages in 0..100.")
        if not 1 <= self.focus_ratio < math.inf:
            raise ConfigError(f"focus_ratio={self.focus_ratio}; expected at least 1: the kept columns are among S.")
        if not all(math.isfinite(a) for a in self.alpha_bounds):
            raise ConfigError(f"alpha_bounds={self.alpha_bounds}; expected two finite numbers.")
        for name, kind in (("ranking", Ranking), ("curvature_form", CurvatureForm), ("projection", Projection)):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise ConfigError(f"{name}={value!r}; expected one of {', '.join(get_args(kind))}.")

    def keep_percent(self, block: int, block_count: int) -> float:
        """p of a block; see `keep_schedule`."""
        return keep_schedule(block, block_count, keep_bounds=self.keep_bounds)

    def focus_percent(self, keep_percent: float) -> float:
        """k that goes with p."""
        return min(100.0, self.focus_ratio * keep_percent)


def keep_schedule(block: int, block_count: int, *, keep_bounds: tuple[float, float] = KEEP_BOUNDS) -> float:
    """p_l = p_max - (l / L)(p_max - p_min) percent for the block with 0-based index `block`, l = block + 1.

    p falls linearly with depth and ends at p_min exactly. keep_bounds is (p_min, p_max).

    Raises: ValueError: a block outside 0..L - 1.
    """
    if not 0 <= block < block_count:
        raise ValueError(f"block {block} of {block_count}; expected 0..{block_count - 1}.")
    p_min, p_max = keep_bounds
    if block + 1 == block_count:
        return float(p_min)
    return p_max - (block + 1) / block_count * (p_max - p_min)
