"""The layer-wise Hessian: its sums, its normalisations and the diagonal of its damped inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import NumericalError
from holdfast.functional import factorize, inverse
from holdfast.functional.hessian import (
    InputGram,
    inverse_cholesky_diagonal,
    inverse_cholesky_factor,
    inverse_diagonal,
)
from holdfast.functional.inverse import inverse_diagonal_primal


def activations(sequences: int, tokens: int, c: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs with columns of very different scale, as a transformer's are."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(c) + 0.3 * torch.randn(c, c, generator=g) / c**0.5
    scale = torch.logspace(-1, 1, c)[torch.randperm(c, generator=g)]
    return torch.randn(sequences, tokens, c, generator=g) @ mix * scale


def dense_diagonal(h: torch.Tensor, damping: float = 0.01, shrinkage: float = 0.0) -> torch.Tensor:
    """The definition, in float64."""
    h = h.double().clone()
    diagonal = h.diagonal().clone()
    lam = damping * diagonal.mean()
    h.diagonal()[diagonal == 0] = 1
    target = torch.diag(h.diagonal())
    h = (1 - shrinkage) * h + shrinkage * target
    return torch.linalg.inv(h + lam * torch.eye(len(h), dtype=h.dtype)).diagonal()


@pytest.mark.parametrize("sequences, tokens", [(6, 60), (3, 20), (2, 8), (1, 1)])
@pytest.mark.parametrize("dual", [True, False])
def test_diagonal_equals_a_dense_float64_inverse(sequences: int, tokens: int, dual: bool) -> None:
    x = activations(sequences, tokens, 64)
    x[..., 7] = 0  # a dead input
    gram = InputGram(64, dual=dual).update(x)
    h = 2 / sequences * torch.einsum("snc,snd->cd", x.double(), x.double())
    torch.testing.assert_close(gram.inverse_diagonal(0.01).double(), dense_diagonal(h), rtol=1e-5, atol=0)
    assert gram.form == ("dual" if dual and sequences * tokens < 32 else "primal")
    torch.testing.assert_close(gram.hessian().double(), h, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gram.diagonal(), h.diagonal())


def test_diagonal_is_exact_enough_in_float32_at_larger_width() -> None:
    x = activations(8, 200, 768)
    gram = InputGram(768, dtype=torch.float32).update(x)
    h = 2 / 8 * torch.einsum("snc,snd->cd", x.double(), x.double())
    want = dense_diagonal(h)
    for engine in ("lapack", "blocked"):
        result = gram.reduce(0.01, engine=engine)
        torch.testing.assert_close(result.values.double(), want, rtol=2e-4, atol=0)
        assert result.fallbacks == () and result.form == "primal" and result.damping == 0.01


@pytest.mark.parametrize("engine", ["lapack", "blocked"])
def test_reducing_leaves_the_sums_as_they_were(engine: str) -> None:
    gram = InputGram(96, dual=False).update(activations(4, 80, 96))
    before = gram.hessian()
    first = gram.reduce(0.01, engine=engine).values
    assert torch.equal(gram.hessian(), before)
    assert torch.equal(gram.reduce(0.01, engine=engine).values, first)
    gram.update(activations(4, 80, 96, seed=1))  # sums go on after a reduction
    both = InputGram(96, dual=False).update(activations(4, 80, 96)).update(activations(4, 80, 96, seed=1))
    assert torch.equal(gram.hessian(), both.hessian())


def test_padding_never_enters() -> None:
    x = activations(5, 12, 40)
    lengths = [12, 3, 7, 1, 9]
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    padded = x.clone()
    padded[~mask] = float("nan")  # attention over nothing yields NaN in padding; it must not matter
    batch = InputGram(40).update(padded, mask)
    single = InputGram(40)
    for row, length in zip(x, lengths, strict=True):
        single.update(row[None, :length])
    assert (batch.sequences, batch.tokens) == (single.sequences, single.tokens) == (5, 32)
    torch.testing.assert_close(batch.hessian(), single.hessian(), rtol=1e-12, atol=0)
    torch.testing.assert_close(batch.inverse_diagonal(), single.inverse_diagonal())
    as_integers = InputGram(40).update(padded, mask.long())
    assert torch.equal(as_integers.hessian(), batch.hessian())


@pytest.mark.parametrize("normalization, changes", [("sequence", False), ("token", False), ("sum", True)])
def test_duplicating_the_data_changes_only_a_sum(normalization: str, changes: bool) -> None:
    x = activations(4, 30, 24)
    once = InputGram(24, normalization).update(x)
    twice = InputGram(24, normalization).update(x).update(x)
    same = torch.allclose(once.hessian(), twice.hessian(), rtol=1e-6)
    assert same is not changes
    if changes:
        torch.testing.assert_close(2 * once.hessian(), twice.hessian())


def test_normalisations_differ_by_their_counts() -> None:
    x = activations(4, 30, 24)
    h = {n: InputGram(24, n).update(x).hessian() for n in ("sequence", "token", "sum")}
    torch.testing.assert_close(h["sum"], 4 * h["sequence"])
    torch.testing.assert_close(h["sum"], 120 * h["token"])


def test_bf16_inputs_are_summed_exactly() -> None:
    x = activations(4, 300, 600).bfloat16()
    gram = InputGram(600).update(x)
    want = 2 / 4 * torch.einsum("snc,snd->cd", x.double(), x.double())
    assert float((gram.hessian().double() - want).norm() / want.norm()) < 1e-6
    assert gram.hessian().dtype == torch.float32


def test_sums_ignore_a_process_wide_request_for_fewer_bits() -> None:
    x = activations(2, 200, 600)
    want = InputGram(600, dual=False).update(x).inverse_diagonal()
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        got = InputGram(600, dual=False).update(x).reduce(engine="blocked").values
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(previous)
    torch.testing.assert_close(got, want, rtol=2e-4, atol=0)


def test_few_inputs_are_kept_then_summed() -> None:
    gram = InputGram(64)
    for i in range(10):
        gram.update(activations(1, 5, 64, seed=i))
        assert gram.form == ("dual" if 5 * (i + 1) < 32 else "primal")
    plain = InputGram(64, dual=False)
    for i in range(10):
        plain.update(activations(1, 5, 64, seed=i))
    torch.testing.assert_close(gram.hessian(), plain.hessian(), rtol=1e-12, atol=1e-12)
    assert gram.tokens_over_width == 50 / 64


def test_a_kept_input_is_a_copy() -> None:
    x = activations(1, 5, 64)
    gram = InputGram(64).update(x)
    before = gram.inverse_diagonal()
    x.zero_()
    assert torch.equal(gram.inverse_diagonal(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [9, 100])
def test_any_input_dtype_can_be_asked_again_and_again(dtype: torch.dtype, tokens: int) -> None:
    x = activations(1, tokens, 64).to(dtype)
    gram = InputGram(64).update(x)
    before, h = x.clone(), gram.hessian()
    first = gram.inverse_diagonal()
    torch.testing.assert_close(first.double(), dense_diagonal(2 * x[0].double().T @ x[0].double()), rtol=1e-5, atol=0)
    assert torch.equal(gram.inverse_diagonal(), first)
    assert torch.equal(gram.hessian(), h)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shrinkage", [0.1, 0.5])
@pytest.mark.parametrize("dual", [True, False])
def test_shrinkage_pulls_towards_the_own_diagonal(shrinkage: float, dual: bool) -> None:
    x = activations(2, 9, 64)
    x[..., 3] = 0
    h = torch.einsum("snc,snd->cd", x.double(), x.double())
    gram = InputGram(64, dual=dual).update(x)
    got = gram.inverse_diagonal(0.02, shrinkage=shrinkage).double()
    torch.testing.assert_close(got, dense_diagonal(h, 0.02, shrinkage), rtol=1e-5, atol=0)


@given(
    parts=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 12)), min_size=2, max_size=4), seed=st.integers(0, 99)
)
@settings(max_examples=25, deadline=None)
def test_merging_equals_one_pass(parts: list[tuple[int, int]], seed: int) -> None:
    batches = [activations(s, n, 32, seed=seed + i) for i, (s, n) in enumerate(parts)]
    whole, merged = InputGram(32), InputGram(32)
    for b in batches:
        whole.update(b)
        merged.merge(InputGram(32).update(b))
    assert (whole.sequences, whole.tokens, whole.form) == (merged.sequences, merged.tokens, merged.form)
    torch.testing.assert_close(whole.hessian(), merged.hessian(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(whole.inverse_diagonal(), merged.inverse_diagonal(), rtol=1e-5, atol=0)


def test_permuting_columns_permutes_the_diagonal() -> None:
    x = activations(4, 50, 48)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    straight, permuted = InputGram(48).update(x), InputGram(48).update(x[..., order])
    torch.testing.assert_close(permuted.inverse_diagonal(), straight.inverse_diagonal()[order], rtol=1e-6, atol=0)


def test_scaling_the_inputs_scales_the_inverse() -> None:
    x = activations(4, 50, 48)
    torch.testing.assert_close(
        InputGram(48).update(3 * x).inverse_diagonal() * 9,
        InputGram(48).update(x).inverse_diagonal(),
        rtol=1e-5,
        atol=0,
    )


def test_factor_of_the_inverse_is_upper_and_exact() -> None:
    h = InputGram(70).update(activations(4, 90, 70)).hessian()
    before = h.clone()
    u = inverse_cholesky_factor(h, 0.01)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(70, dtype=h.dtype)
    want = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(u, want, rtol=1e-8, atol=1e-12)
    assert torch.equal(h, before)
    torch.testing.assert_close(inverse_cholesky_diagonal(h, 0.01).double(), want.diagonal() ** 2, rtol=1e-6, atol=0)
    full = inverse_diagonal(h, 0.01).double()
    assert not torch.allclose(want.diagonal() ** 2, full, rtol=0.01)  # two different things, hence two names


def indefinite(c: int = 40, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Symmetric, unit diagonal, smallest eigenvalue about -0.05: positive definite from damping 0.1 on."""
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(c, c, generator=g, dtype=torch.float64)).Q
    h = q @ torch.diag(torch.linspace(-0.05, 2.0, c, dtype=torch.float64)) @ q.T
    return ((h + h.T) / 2).to(dtype).contiguous()


@pytest.mark.parametrize("engine", ["lapack", "blocked"])
def test_a_failed_factorisation_is_an_error_by_default(engine: str) -> None:
    h = indefinite()
    before = h.clone()
    with pytest.raises(NumericalError, match=r"not positive definite at damping 0\.01.*on_failure='retry'"):
        inverse_diagonal_primal(h, engine=engine)
    assert torch.equal(h, before)


def test_a_retry_is_taken_on_request_and_counted() -> None:
    h = indefinite()
    result = inverse_diagonal_primal(h, damping=0.01, on_failure="retry")
    assert result.fallbacks == ("float32: not positive definite at damping 0.01",)
    assert (result.requested_damping, result.damping) == (0.01, 0.1)
    torch.testing.assert_close(result.values.double(), dense_diagonal(h, 0.1), rtol=1e-4, atol=0)


def test_retries_end_in_an_error_that_lists_them() -> None:
    h = indefinite() - 3 * torch.eye(40).roll(1, 0) - 3 * torch.eye(40).roll(-1, 0)
    with pytest.raises(NumericalError, match=r"damping 0\.01; .*damping 0\.1; .*damping 1; float64"):
        inverse_diagonal_primal(h, on_failure="retry")


def test_float64_is_tried_last(monkeypatch: pytest.MonkeyPatch) -> None:
    # In exact arithmetic damping 1 always factorises, so a float32 engine that always fails has to be planted.
    def fails_in_float32(matrix: torch.Tensor, *, engine: str) -> None:
        if matrix.dtype == torch.float32:
            raise factorize.NotPositiveDefiniteError
        factorize.invert_factor_(matrix)

    monkeypatch.setattr(inverse, "invert_factor_", fails_in_float32)
    h = InputGram(32, dual=False).update(activations(2, 60, 32)).hessian().float()
    result = inverse_diagonal_primal(h, damping=0.05, on_failure="retry")
    assert [f.split(":")[0] for f in result.fallbacks] == ["float32", "float32"]  # 0.05, then 0.5
    assert result.damping == 0.05
    torch.testing.assert_close(result.values.double(), dense_diagonal(h, 0.05), rtol=1e-6, atol=0)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 5\).*\(sequences, tokens, 4\)"):
        InputGram(4).update(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"mask of shape \(2, 4\); expected \(2, 3\)"):
        InputGram(4).update(torch.zeros(2, 3, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="floating point"):
        InputGram(4).update(torch.zeros(2, 3, 4, dtype=torch.long))
    x = torch.ones(1, 3, 4)
    x[0, 1, 2] = float("nan")
    with pytest.raises(NumericalError, match="input column 2 of 4"):
        InputGram(4).update(x)
    with pytest.raises(NumericalError, match="no real token"):
        InputGram(4).inverse_diagonal()
    with pytest.raises(NumericalError, match="no real token"):
        InputGram(4).update(torch.ones(1, 3, 4), torch.zeros(1, 3)).inverse_diagonal()
    with pytest.raises(ValueError, match="expected one of sequence, token, sum"):
        InputGram(4, "batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be factorised"):
        InputGram(4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="width 5, normalised by sequence"):
        InputGram(4).merge(InputGram(5))
    with pytest.raises(ValueError, match="damping >= 0"):
        InputGram(4).update(torch.ones(1, 9, 4)).inverse_diagonal(-1.0)
    h = torch.eye(4)
    h[2, 2] = float("inf")
    with pytest.raises(NumericalError, match="inf at input column 2"):
        inverse_diagonal(h)
    h = torch.eye(4)
    h[1, 3] = h[3, 1] = float("nan")
    with pytest.raises(NumericalError, match=r"nan at \(1, 3\): an activation"):
        inverse_diagonal_primal(h, on_failure="retry")
    with pytest.raises(NumericalError, match="too small for the dual form"):
        InputGram(64).update(activations(1, 9, 64) * (1 + 1e6 * (torch.arange(64) == 5))).inverse_diagonal(1e-9)
    with pytest.raises(NumericalError, match="not positive definite at damping 0"):
        InputGram(64).update(activations(1, 9, 64)).inverse_diagonal(0.0)
    with pytest.raises(ValueError, match="contiguous square"):
        inverse_diagonal(torch.eye(6)[:, :4])


def test_overflow_in_a_merged_sum_is_found() -> None:
    gram = InputGram(600, dual=False).update(torch.full((1, 3, 600), 1e25))
    with pytest.raises(NumericalError, match="inf at input column 0"):
        gram.inverse_diagonal()


def test_bf16_inputs_are_summed_as_exactly_as_their_float32_copies():
    # Above width 512 sums are float32, and a CPU multiplies bf16 inputs as bf16.
    x = torch.randn(1, 1200, 520, generator=torch.Generator().manual_seed(3)).bfloat16()
    before = torch.backends.mkldnn.matmul.fp32_precision
    narrow, wide = (InputGram(520).update(inputs).hessian() for inputs in (x, x.float()))
    exact = 2 * x[0].double().T @ x[0].double()
    assert narrow.dtype == torch.float32
    for found in (narrow, wide):
        assert torch.linalg.norm(found.double() - exact) < 1e-6 * torch.linalg.norm(exact)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_an_error_is_asked_for_so_nothing_else_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []

    def fails(matrix: torch.Tensor, *, engine: str) -> None:
        asked.append(matrix.dtype)
        raise inverse.NotPositiveDefiniteError("planted")

    monkeypatch.setattr(inverse, "invert_factor_", fails)
    gram = torch.eye(8)
    with pytest.raises(NumericalError, match=r"not positive definite at damping 0\.01"):
        inverse_diagonal_primal(gram, damping=0.01, on_failure="error")
    assert asked == [torch.float32]
    asked.clear()
    with pytest.raises(NumericalError):
        inverse_diagonal_primal(gram, damping=0.01, on_failure="retry")
    # 1 %, 10 %, 100 %, then float64 with what was asked for.
    assert asked == [torch.float32] * 3 + [torch.float64]


@pytest.mark.parametrize("place", [(0, 1), (63, 2), (64, 3), (129, 128)])
def test_a_nan_off_the_diagonal_is_named_wherever_it_is(place: tuple[int, int]) -> None:
    gram = torch.eye(130)
    gram[place] = gram[place[::-1]] = float("nan")
    with pytest.raises(NumericalError, match=rf"holds nan at \({min(place)}, {max(place)}\)"):
        inverse_diagonal_primal(gram, damping=0.01)


def test_sums_that_grow_after_they_were_read_are_read_anew() -> None:
    x = activations(4, 40, 32)
    whole = InputGram(32).update(x).hessian()
    grown = InputGram(32).update(x[:2])
    grown.hessian()
    torch.testing.assert_close(grown.update(x[2:]).hessian(), whole, rtol=1e-6, atol=1e-6)
    merged = InputGram(32).update(x[:2])
    merged.hessian()
    torch.testing.assert_close(merged.merge(InputGram(32).update(x[2:])).hessian(), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (4,), (2, 2, 2)])
def test_only_a_square_matrix_is_factorised(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected a contiguous square matrix"):
        factorize.check_square(torch.zeros(shape))
    with pytest.raises(ValueError, match="expected a contiguous square matrix"):
        factorize.check_square(torch.zeros(8, 4)[::2])
