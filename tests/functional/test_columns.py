"""Figures of a weight change, against the same figures written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

from holdfast.functional.columns import ColumnChange, measure_change


def pair(rows: int = 9, columns: int = 14, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    w_prev = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    return w_prev, w_prev + 0.3 * torch.randn(rows, columns, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_every_figure_is_its_definition(seed: int) -> None:
    w_prev, w_new = pair(seed=seed)
    delta = w_new - w_prev
    kept = torch.rand(14, generator=torch.Generator().manual_seed(seed)) < 0.4
    change = measure_change(w_prev, w_new)
    assert (change.rows, change.columns) == (9, 14)
    wanted = {
        "norm": delta.norm(),
        "relative": delta.norm() / w_prev.norm(),
        "cosine": torch.nn.functional.cosine_similarity(w_new.flatten(), w_prev.flatten(), dim=0),
        "coefficient": (delta * w_prev).sum() / w_prev.square().sum(),
        "reverted": delta[:, kept].square().sum() / delta.square().sum(),
        "distance": delta[:, ~kept].norm(),
        "distance, projected": (delta - 0.2 * w_prev)[:, ~kept].norm(),
    }
    found = {
        "norm": change.norm,
        "relative": change.relative(),
        "cosine": change.cosine(),
        "coefficient": change.coefficient(),
        "reverted": change.reverted(kept),
        "distance": change.distance(kept),
        "distance, projected": change.distance(kept, 0.2),
    }
    assert found == pytest.approx({name: float(value) for name, value in wanted.items()}, rel=1e-9)
    columns = (delta * w_prev).sum(0) / w_prev.square().sum(0)
    torch.testing.assert_close(change.column_coefficients(), columns, rtol=1e-9, atol=0)
    per_column = (delta - columns * w_prev)[:, ~kept].norm()
    assert change.distance(kept, columns) == pytest.approx(float(per_column), rel=1e-9)


@pytest.mark.parametrize(
    ("of_prev", "cosine", "relative"),
    [(1.0, 1.0, 0.0), (2.0, 1.0, 1.0), (-1.0, -1.0, 2.0), (0.5, 1.0, 0.5)],
)
def test_a_multiple_of_a_weight_has_the_direction_of_it(of_prev: float, cosine: float, relative: float) -> None:
    w_prev, _ = pair()
    change = measure_change(w_prev, of_prev * w_prev)
    assert change.cosine() == pytest.approx(cosine) and change.relative() == pytest.approx(relative)


def test_an_orthogonal_weight_has_cosine_zero() -> None:
    assert measure_change(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])).cosine() == pytest.approx(0, abs=1e-7)


def test_figures_without_a_meaning_are_none_or_zero_and_never_nan() -> None:
    w_prev, w_new = pair()
    unread = measure_change(w_prev, w_new, projection=False)
    assert unread.cosine() is None and unread.relative() is None
    from_zero = measure_change(torch.zeros_like(w_prev), w_new)
    assert (from_zero.cosine(), from_zero.relative(), from_zero.coefficient()) == (None, None, 0.0)
    assert from_zero.column_coefficients().tolist() == [0.0] * 14
    to_zero = measure_change(w_prev, torch.zeros_like(w_prev))
    assert to_zero.cosine() is None and to_zero.relative() == pytest.approx(1.0)
    nothing = measure_change(w_prev, w_prev)
    assert nothing.reverted(torch.ones(14, dtype=torch.bool)) == 0.0 and nothing.cosine() == pytest.approx(1.0)
    for figure in ("coefficient", "column_coefficients"):
        with pytest.raises(ValueError, match="the projection needs W_prev"):
            getattr(ColumnChange(energy=torch.ones(4), dot=None, square=None, rows=3), figure)()
    assert not math.isnan(nothing.norm)


@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_a_direction_has_no_size(scale: float) -> None:
    w_prev, w_new = pair()
    cosine = measure_change(w_prev, w_new).cosine()
    assert measure_change(scale * w_prev, scale * w_new).cosine() == pytest.approx(cosine, rel=1e-6)
    assert measure_change(scale * w_prev, scale * w_new).relative() == pytest.approx(
        measure_change(w_prev, w_new).relative(), rel=1e-6
    )
