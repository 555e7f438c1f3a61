"""Kernels against NumPy, SciPy and matrices solved by hand."""

import contextlib
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from koopt import linalg

SHAPES = pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 3, 4, 6), (4, 1), (1, 4), (0, 3, 4)], ids=str)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture(params=[1, 2, 1000], ids=lambda width: f"chunk{width}")
def _chunked(request, monkeypatch):
    monkeypatch.setattr(linalg, "CHUNK", request.param)
    monkeypatch.setattr(linalg, "WIDE_CHUNK", request.param)
    monkeypatch.setattr(linalg, "CACHED", request.param)


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("_chunked")
def test_tall_kernels_whatever_the_chunks(shape, dtype):
    rows, *batch = normal(0, *shape, dtype=dtype), *shape[:-2]
    dense = rows.double()
    factor = linalg.triangular_factor(rows)
    assert factor.dtype == torch.float64
    assert factor.shape == (*batch, shape[-2], min(shape[-2:]))
    assert_close(factor @ factor.mT, dense @ dense.mT)
    assert_close(linalg.gram(rows), dense @ dense.mT)
    weights, vector = normal(1, *batch, shape[-2]), normal(2, *batch, shape[-1], dtype=dtype)
    made = (weights.unsqueeze(-2) @ dense).squeeze(-2)
    assert_close(linalg.combine(weights, rows), made.to(dtype))
    assert_close(linalg.combine(weights, rows, torch.float64), made)
    assert_close(linalg.inner(rows, vector), (dense @ vector.double().unsqueeze(-1)).squeeze(-1))
    columns = torch.complex(normal(3, *batch, shape[-2], 2), normal(4, *batch, shape[-2], 2))
    assert_close(linalg.combine_columns(columns, rows), dense.mT.to(columns.dtype) @ columns)

    def halved(piece):
        return piece.diff(dim=-2) / 2

    if shape[-2] > 1:
        prepared = linalg.triangular_factor(rows, halved)
        assert_close(prepared @ prepared.mT, halved(dense) @ halved(dense).mT)
        assert_close(linalg.gram(rows, halved), halved(dense) @ halved(dense).mT)


def test_factor_keeps_what_a_gram_matrix_loses():
    rows = torch.linalg.qr(normal(5, 9, 4)).Q * torch.logspace(0, -9, 4, dtype=torch.float64)
    rows = rows @ torch.linalg.qr(normal(6, 30, 4)).Q.mT
    values = torch.linalg.svdvals(linalg.triangular_factor(rows))
    assert_close(values[:4], torch.logspace(0, -9, 4, dtype=torch.float64), rtol=1e-6, atol=0)


@SHAPES
def test_svd(shape):
    rows = normal(7, *shape)
    left, values, right = linalg.svd(rows)
    assert_close(left * values.unsqueeze(-2) @ right.mT, rows)
    for basis in (left, right):
        assert_close(basis.mT @ basis, torch.eye(min(shape[-2:]), dtype=torch.float64).expand(*shape[:-2], -1, -1))


def test_threads_are_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for matrices, threads in ((torch.zeros(3, 2, 2), 1), (torch.zeros(2, 2), 2), (torch.zeros(1, 2, 2), 2)):
            with linalg.one_thread_each(matrices):
                assert torch.get_num_threads() == threads
            assert torch.get_num_threads() == 2
        with contextlib.suppress(KeyError), linalg.one_thread_each(torch.zeros(3, 2, 2)):
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def symmetric(values, seed=8):
    basis = torch.linalg.qr(normal(seed, len(values), len(values))).Q
    return basis * torch.tensor(values, dtype=torch.float64) @ basis.mT, basis


@pytest.mark.parametrize("scale", [1.0, 1e-140, 1e140])
def test_leading_eigenvectors(scale):
    falling = [0.3**i for i in range(20)]
    close = [1.0, 0.9] + [0.9 - 1e-9] * 18
    flat = [1.0, *([1e-3] * 19)]
    slow = [0.97**i for i in range(20)]
    lower = [1.0] + [0.0] * 19
    cases = [(falling, 3, True), (falling, 20, False), (close, 2, False), (flat, 1, True), (slow, 3, True)]
    cases += [(lower, 1, True), (lower, 2, False)]
    for spectrum, count, resolved in cases:
        matrix, basis = symmetric(spectrum)
        values, vectors, settled = linalg.leading_eigenvectors(matrix[None] * scale, count)
        assert settled.tolist() == [resolved]
        assert_close(vectors.mT @ vectors, torch.eye(count, dtype=torch.float64)[None])
        if resolved:
            assert_close(values[0] / scale, exact(*spectrum[:count]))
            overlap = torch.linalg.svdvals(vectors[0].mT @ basis[:, :count])
            assert_close(overlap, torch.ones(count, dtype=torch.float64), rtol=0, atol=linalg.SUBSPACE_ERROR**2 + 1e-14)


def test_leading_eigenvectors_count_the_rounding_of_the_matrix_itself():
    for second, resolved in [(1e-8, False), (1e-7, True)]:
        matrix = torch.diag(exact(1.0, second, *[0.0] * 18))  # so plain that the iteration itself is exact
        assert linalg.leading_eigenvectors(matrix[None], 2)[2].tolist() == [resolved]


def test_leading_eigenvectors_each_for_itself():
    matrices = torch.stack(
        [symmetric([1.0, 0.5] + [1e-4] * 8)[0], torch.zeros(10, 10).double(), torch.eye(10).double()]
    )
    values, vectors, settled = linalg.leading_eigenvectors(matrices, 2)
    assert settled.tolist() == [True, False, False]
    assert_close(values, exact([1.0, 0.5], [0.0, 0.0], [1.0, 1.0]))
    assert vectors.isfinite().all()


@given(seed=st.integers(0, 1000), size=st.integers(1, 5), horizon=st.integers(0, 40))
def test_whole_powers(seed, size, horizon):
    matrix, start = normal(seed, size, size) / math.sqrt(size), normal(seed + 1, size)
    expected = np.linalg.matrix_power(matrix.numpy(), horizon) @ start.numpy()
    np.testing.assert_allclose(linalg.evolve(matrix, start, horizon), expected, rtol=1e-9, atol=1e-12)


@given(seed=st.integers(0, 1000), size=st.integers(1, 5), horizon=st.floats(0, 10))
def test_real_powers(seed, size, horizon):
    generator = normal(seed, size, size).numpy() / size
    matrix, start = torch.from_numpy(scipy.linalg.expm(generator)), normal(seed + 1, size)
    expected = scipy.linalg.expm(generator * horizon) @ start.numpy()  # |Im| < pi: the principal branch
    np.testing.assert_allclose(linalg.evolve(matrix, start, horizon), expected, rtol=1e-6, atol=1e-6)


def test_real_power_of_a_singular_matrix():
    nilpotent = exact([0.0, 1.0], [0.0, 0.0])
    assert_close(linalg.evolve(nilpotent, exact(3.0, 4.0), 0.25), exact(0.75 * 3 + 0.25 * 4, 0.75 * 4))
    assert_close(linalg.evolve(nilpotent, exact(3.0, 4.0), 1.25), exact(0.0, 0.0))
    assert_close(linalg.evolve(exact([4.0, 0.0], [0.0, 0.0]), exact(3.0, 0.0), 0.5), exact(6.0, 0.0))


@given(seed=st.integers(0, 1000), stay=st.integers(0, 3), fade=st.integers(0, 3))
def test_limit(seed, stay, fade):
    assume(stay + fade > 0)
    basis = normal(seed, stay + fade, stay + fade)
    kept = torch.diag(torch.tensor([1.0] * stay + [0.0] * fade).double())
    fading = torch.zeros(stay + fade, stay + fade, dtype=torch.float64)
    fading[stay:, stay:] = 0.9 * torch.linalg.qr(normal(seed + 1, fade, fade)).Q
    inverse, start = torch.linalg.inv(basis), normal(seed + 2, stay + fade)
    expected = basis @ kept @ inverse @ start
    limit = linalg.evolve(basis @ (kept + fading) @ inverse, start, math.inf)
    assert_close(limit, expected, rtol=0, atol=1e-10 * float(basis.norm() * inverse.norm()) * float(start.norm()))


@pytest.mark.parametrize(
    ("matrix", "start", "expected"),
    [
        ([[1.0, 0.0], [0.0, 0.5]], [3.0, 4.0], [3.0, 0.0]),
        ([[1.0, 0.0], [0.0, 1.0]], [3.0, 4.0], [3.0, 4.0]),
        ([[0.0, 1.0], [0.0, 0.0]], [3.0, 4.0], [0.0, 0.0]),
        ([[0.5, 1e6], [0.0, 1.0]], [0.0, 1.0], [2e6, 1.0]),  # x' = x/2 + 1e6
        ([[0.5, 1e-6], [0.0, 1.0]], [0.0, 1.0], [2e-6, 1.0]),
        ([[0.5, 1.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 1.0]], [3.0, 4.0, 5.0], [0.0, 0.0, 5.0]),
        ([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], [3.0, 4.0, 5.0], [12.0, 0.0, 0.0]),
    ],
)
def test_limit_by_hand(matrix, start, expected):
    assert_close(linalg.evolve(exact(*matrix), exact(*start), math.inf), exact(*expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("matrix", "reason"),
    [
        ([[1.1, 0.0], [0.0, 0.5]], r"growth \(\|lambda\| > 1\)"),
        ([[-1.0, 0.0], [0.0, 0.5]], r"turning for ever \(\|lambda\| = 1, lambda != 1\)"),
        ([[0.6, -0.8], [0.8, 0.6]], r"turning for ever \(\|lambda\| = 1, lambda != 1\)"),
        ([[1.0, 1.0], [0.0, 1.0]], "drift along a straight line"),
        ([[1.0, 1e-6], [0.0, 1.0]], "drift along a straight line"),
        ([[1.0, 1e6], [0.0, 1.0]], "drift along a straight line"),
    ],
)
def test_no_limit(matrix, reason):
    with pytest.raises(
        ValueError,
        match=f"horizon is inf, but {reason} in the only patch has no limit; .*with center or difference and",
    ):
        linalg.evolve(exact(*matrix), exact(1.0, 1.0), math.inf)


@pytest.mark.parametrize(
    ("matrix", "modulus", "factor"),
    [
        ([[2.0, 0.0], [0.0, 0.5]], 1.0, [[0.5, 0.0], [0.0, 1.0]]),
        ([[-2.0, 0.0], [0.0, 0.5]], 0.25, [[0.125, 0.0], [0.0, 0.5]]),
        ([[0.0, -2.0], [2.0, 0.0]], 1.0, [[0.5, 0.0], [0.0, 0.5]]),
        ([[2.0, 1.0], [0.0, 2.0]], 1.0, [[0.5, 0.0], [0.0, 0.5]]),  # defective: as a whole
        ([[0.0, 1.0], [0.0, 0.0]], 1.0, [[1.0, 0.0], [0.0, 1.0]]),
        ([[1.0, 1.0], [0.0, 1.0]], 1.0, [[1.0, 0.0], [0.0, 1.0]]),  # drift is not growth
        ([[1 + 1e-9, 1.0], [0.0, 1 - 1e-9]], 1.0, [[1.0, 0.0], [0.0, 1.0]]),
    ],
)
def test_clamping_factor(matrix, modulus, factor):
    assert_close(linalg.clamping_factor(exact(*matrix), modulus), exact(*factor), rtol=1e-12, atol=1e-15)


@given(seed=st.integers(0, 1000), size=st.integers(1, 6), modulus=st.floats(0.05, 3))
def test_clamping_factor_by_its_properties(seed, size, modulus):
    matrix = normal(seed, 3, size, size)
    factor = linalg.clamping_factor(matrix, modulus)
    assert_close(factor @ matrix, matrix @ factor, rtol=1e-6, atol=1e-6)
    before, after = torch.linalg.eigvals(matrix).abs(), torch.linalg.eigvals(factor @ matrix).abs()
    assert_close(after.sort().values, before.clamp_max(modulus).sort().values, rtol=1e-5, atol=1e-5)
    for i in range(3):
        if before[i].max() <= modulus:
            assert torch.equal(factor[i], torch.eye(size, dtype=torch.float64))


def test_solve_a_singular_system_by_least_squares():
    vectors = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 4.0]]]).to(torch.complex128)
    vector = torch.ones(2, 2, dtype=torch.complex128)
    assert_close(linalg.solve(vectors, vector), torch.tensor([[0.5, 0.5], [0.5, 0.25]]).to(torch.complex128))


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (torch.tensor(True), "the only patch"),
        (torch.tensor([False, True]), "patch 1"),
        (torch.tensor([[False, True], [True, False]]), "patches (0, 1), (1, 0)"),
        (torch.ones(8, dtype=torch.bool), "patches 0, 1, 2, 3, 4 and 3 more"),
    ],
)
def test_name_patches(bad, named):
    assert linalg.name_patches(bad) == named


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda():
    rows = normal(9, 3, 6, 9)
    assert_close(linalg.gram(rows.cuda()).cpu(), linalg.gram(rows))
    factor = linalg.triangular_factor(rows.cuda()).cpu()
    assert_close(factor @ factor.mT, linalg.gram(rows))
    matrix, start = normal(10, 3, 4, 4), normal(11, 3, 4)
    for horizon in (0, 3, 2.5):
        assert_close(linalg.evolve(matrix.cuda(), start.cuda(), horizon).cpu(), linalg.evolve(matrix, start, horizon))
    assert_close(linalg.clamping_factor(matrix.cuda(), 0.5).cpu(), linalg.clamping_factor(matrix, 0.5))
    found = linalg.leading_eigenvectors(symmetric([0.3**i for i in range(20)])[0][None].cuda(), 3)
    assert_close(found[0].cpu(), exact([1.0, 0.3, 0.09]))
    assert found[2].all()


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [30, 700])
def test_products_of_rows(size, dtype):
    left, right = (300 * normal(seed, count, size, dtype=dtype) for seed, count in ((0, 3), (1, 4)))
    expected = left.double() @ right.double().T
    norms = left.double().norm(dim=1)[:, None] * right.double().norm(dim=1)
    within = 1e-14 if dtype == torch.float64 else 3e-7  # of the product of the norms, as float32 has digits
    assert ((linalg.products(left, right) - expected).abs() <= within * norms).all()


def test_what_is_finite_though_its_sum_is_not():
    for values in (torch.full((4,), 6e4, dtype=torch.float16), torch.tensor([3e38, 3e38]), torch.zeros(0)):
        assert linalg.all_finite(values)
    for bad in (math.nan, math.inf, -math.inf):
        assert not linalg.all_finite(torch.tensor([1.0, bad]))
    assert not linalg.all_finite(torch.tensor([math.inf, -math.inf]))
    assert linalg.all_finite(torch.tensor([1j]))
    assert not linalg.all_finite(torch.tensor([complex(0.0, math.nan)]))
