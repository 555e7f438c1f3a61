"""Koopman operators against hand-solved systems, dense pseudo-inverses, PyDMD and SciPy."""

import itertools
import math
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch.testing import assert_close

import koopt
from koopt import least_squares, linalg
from koopt.operator import algorithm_1, fit_in_form

FORMS = pytest.mark.parametrize("snapshot_form", [False, True], ids=["state", "snapshot"])
VARIANTS = [
    dict(zip(("projected", "center", "difference"), flags, strict=True))
    for flags in itertools.product([False, True], repeat=3)
]


def name(variant):
    return "-".join(option for option in variant if variant[option]) or "plain"


EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS, ids=name)


def near(found, expected, tolerance=1e-9):
    """Each patch's difference is small against the whole patch."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    error, size = (found - expected).norm(dim=-1), expected.norm(dim=-1)
    assert bool((error <= tolerance * size + 1e-300).all()), f"differs by {(error / size).max():.1e} of its size"


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(seed, rows, columns=None):
    return torch.linalg.qr(normal(seed, rows, columns or rows)).Q


def window(seed, *batch, time, state, noise=0.3):
    """Noisy turning and slow decay about an offset: well conditioned, nothing in it is exact."""
    turn = 0.97 * orthogonal(seed, state)
    rows = [normal(seed + 1, *batch, state)]
    for i in range(time - 1):
        rows.append(rows[-1] @ turn + noise * normal(seed + 2 + i, *batch, state))
    return torch.stack(rows, dim=-2) + 0.5


def iterate(matrix, start, time):
    rows = [start]
    for _ in range(time - 1):
        rows.append(matrix @ rows[-1])
    return torch.stack(rows)


def cut_at(values, rank, rtol):
    """A relative cut for ``numpy.linalg.pinv`` that keeps what `rank` and `rtol` keep."""
    if rank is None or rank >= len(values) or values[rank] <= rtol * values[0]:
        return rtol
    return math.sqrt(values[rank - 1] * values[rank]) / values[0]


def dense(snapshots, horizon, rtol, rank=None, projected=False, center=False, difference=False):
    """Forecast and residual from dense pseudo-inverses in float64, one patch, one step after the other."""
    states = snapshots.double().numpy().T
    moves = np.diff(states) if difference else states
    earlier, later = moves[:, :-1], moves[:, 1:]
    before = earlier.mean(axis=1, keepdims=True) if center else np.zeros((len(states), 1))
    after = later.mean(axis=1, keepdims=True) if center else before
    values = np.linalg.svd(earlier - before, compute_uv=False)
    inverse = np.linalg.pinv(earlier - before, rcond=cut_at(values, rank, rtol))
    koopman = (later - after) @ inverse
    projector = (earlier - before) @ inverse if projected else np.eye(len(states))

    def step(x):
        return before + projector @ (after - before + koopman @ projector @ (x - before))

    residual = np.linalg.norm(later - step(earlier)) / np.linalg.norm(later - before)
    state, move = states[:, -1:], moves[:, -1:]
    if projected and not difference:
        state = before + projector @ (state - before)
    for _ in range(horizon):
        move = step(move)
        state = state + move if difference else step(state)
    return torch.from_numpy(state[:, 0].copy()), residual


SYSTEMS = {
    "real": [[0.9, 0.0], [0.0, 0.5]],
    "complex pair": [[0.9, -0.3], [0.3, 0.9]],
    "defective": [[0.9, 1.0], [0.0, 0.9]],
    "straight line": [[1.0, 1.0], [0.0, 1.0]],
    "growing": [[1.1, 0.2], [0.0, 1.02]],
    "alternating": [[-0.8, 0.0], [0.0, 0.7]],
    "dying at once": [[0.0, 1.0], [0.0, 0.0]],
}


@FORMS
@pytest.mark.parametrize("kind", SYSTEMS)
def test_linear_system_is_recovered(kind, snapshot_form):
    system = torch.tensor(SYSTEMS[kind], dtype=torch.float64)
    frame = orthogonal(1, 12, 2)
    path = iterate(system, torch.tensor([1.0, 2.0], dtype=torch.float64), 8)
    op = fit_in_form(path @ frame.mT, snapshot_form)
    assert op.snapshot_form is snapshot_form
    assert op.rank == 2
    assert op.residual < 1e-13
    for horizon in (0, 1, 7, 40):
        exact = frame @ torch.linalg.matrix_power(system, horizon) @ path[-1]
        assert_close(op.forecast(horizon), exact, rtol=1e-10, atol=1e-10)
    found, expected = op.eigenvalues.tolist(), torch.linalg.eigvals(system).tolist()
    tolerance = 1e-6 if kind in ("defective", "straight line", "dying at once") else 1e-12
    for value in expected:
        assert min(abs(value - other) for other in found) < tolerance


GRID = [(None, 1e-10), (None, 0.2), (3, 1e-10), (5, 0.5), (1, 0.0)]


@EVERY_VARIANT
@FORMS
@pytest.mark.parametrize(("time", "state"), [(14, 6), (7, 40), (40, 30)])
def test_dense_pseudo_inverse(time, state, snapshot_form, variant):
    snapshots = window(10, time=time, state=state)
    for (rank, rtol), dtype in itertools.product(GRID, [torch.float64, torch.float32]):
        stored = snapshots.to(dtype)
        op = fit_in_form(stored, snapshot_form, rank=rank, rtol=rtol, **variant)
        tight = {"rtol": 1e-8, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
        for horizon in (0, 1, 2, 9):
            expected, residual = dense(stored, horizon, rtol, rank, **variant)
            forecast = op.forecast(horizon)
            assert forecast.dtype == dtype
            assert_close(forecast.double(), expected, **tight)
        assert float(op.residual) == pytest.approx(residual, rel=1e-6, abs=1e-7)


@EVERY_VARIANT
@pytest.mark.parametrize("rank", [None, 3, 8])
@pytest.mark.parametrize(("time", "state"), [(14, 6), (7, 40), (40, 30), (30, 40)])
def test_both_forms_forecast_the_same(time, state, rank, variant):
    snapshots = window(20, 3, time=time, state=state)
    state_form, snapshot_form = (
        fit_in_form(snapshots, form, rank=rank, rtol=1e-6, **variant) for form in (False, True)
    )
    assert_close(state_form.rank, snapshot_form.rank)
    for horizon in (0, 0.5, 1, 2.5, 10):
        near(state_form.forecast(horizon), snapshot_form.forecast(horizon))
    assert_close(state_form.residual, snapshot_form.residual, rtol=1e-9, atol=1e-7)
    assert koopt.fit(snapshots, rank=rank).snapshot_form == (state > time)


@EVERY_VARIANT
@FORMS
@pytest.mark.parametrize("rtol", [None, 1e-6, 0.4])
def test_gram_matrix_gives_what_the_svd_gives(snapshot_form, variant, rtol, monkeypatch):
    snapshots = window(30, 2, time=40, state=50, noise=0.1)
    snapshots[..., :3] *= torch.tensor([80.0, 40.0, 20.0])  # a gap after the third singular value
    options = {"rank": 3, "rtol": rtol, **variant}
    with monkeypatch.context() as patch:
        patch.setattr(linalg, "OVERSAMPLING", 1000)  # never pays
        exact = fit_in_form(snapshots, snapshot_form, **options)
    monkeypatch.setattr(least_squares, "from_svd", None)  # not to be called
    op = fit_in_form(snapshots, snapshot_form, **options)
    assert torch.equal(op.rank, exact.rank)
    assert bool(((op.rank < 3) == (rtol == 0.4)).all())
    for horizon in (0, 1, 6, 30):
        near(op.forecast(horizon), exact.forecast(horizon), 3 * linalg.SUBSPACE_ERROR)
    assert_close(op.eigenvalues.abs()[:, : exact.eigenvalues.shape[-1]], exact.eigenvalues.abs())
    assert_close(op.residual, exact.residual, rtol=1e-6, atol=1e-7)


@FORMS
def test_gram_matrix_that_does_not_resolve_the_rank_gives_way(snapshot_form, monkeypatch):
    time, state, rank = 40, 50, 9
    scales = torch.logspace(0, -8, rank, dtype=torch.float64)
    hard = orthogonal(40, time, rank) * scales @ orthogonal(41, state, rank).mT
    easy = window(42, time=time, state=state)
    easy[:, :rank] *= 30
    calls = []
    exact_fit = least_squares.from_svd
    monkeypatch.setattr(
        least_squares, "from_svd", lambda data, *rest, **width: calls.append(data) or exact_fit(data, *rest, **width)
    )
    op = fit_in_form(torch.stack([easy, hard, easy]), snapshot_form, rank=rank, rtol=1e-10)
    assert [len(data) for data in calls] == [1]
    for i, patch in enumerate((easy, hard, easy)):
        expected, _ = dense(patch, 1, 1e-10, rank)
        assert_close(op.forecast(1)[i], expected, rtol=1e-6, atol=1e-7 * float(patch[-1].norm()))


@EVERY_VARIANT
@FORMS
def test_rank_that_a_patch_does_not_have(snapshot_form, variant):
    """The Gram matrix gives way there, and what the singular values give is narrower."""
    full = window(46, time=40, state=50, noise=0.1)
    frame = orthogonal(47, 50, 2)
    flat = window(48, time=40, state=2) @ frame.mT
    op = fit_in_form(torch.stack([full, flat]), snapshot_form, rank=5, **variant)
    alone = fit_in_form(flat @ frame, False, **variant)
    assert op.rank.tolist() == [5, 2]
    for modulus in (None, 0.7):
        near(op.forecast(7, modulus)[1], frame @ alone.forecast(7, modulus))
    if not variant["difference"]:
        states = torch.stack([full[3], flat[3]])
        near(op.advance(states, 4)[1], frame @ alone.advance(flat[3] @ frame, 4))


@pytest.mark.parametrize("scale", [1e-120, 1e-60, 1e60, 1e100])
def test_gram_matrix_at_any_scale(scale):
    snapshots = window(45, time=40, state=50)
    expected = koopt.fit(snapshots, rank=2).forecast(3)
    for form in (False, True):
        near(fit_in_form(snapshots * scale, form, rank=2).forecast(3) / scale, expected)


def pydmd(snapshots, rank):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*invalid escape sequence")  # in its docstrings
        from pydmd import DMD

    return DMD(svd_rank=rank, exact=True).fit(snapshots.numpy().T)


@FORMS
@pytest.mark.parametrize(("time", "state", "rank"), [(30, 5, 5), (30, 5, 2), (12, 40, 4), (12, 40, 11)])
def test_pydmd(time, state, rank, snapshot_form):
    snapshots = window(50, time=time, state=state)
    op, peer = fit_in_form(snapshots, snapshot_form, rank=rank), pydmd(snapshots, rank)
    found = np.sort_complex(op.eigenvalues.numpy().round(9))
    np.testing.assert_allclose(found, np.sort_complex(peer.eigs.round(9)), atol=1e-8)
    # what its modes make of the last snapshot, along the directions that its rank keeps
    left = np.linalg.svd(snapshots[:-1].numpy().T, full_matrices=False)[0][:, :rank]
    shares = np.linalg.solve(left.T @ peer.modes, left.T @ snapshots[-1].numpy())
    for horizon in (1, 5):
        expected = (peer.modes * peer.eigs**horizon) @ shares
        np.testing.assert_allclose(op.forecast(horizon).numpy(), expected.real, atol=1e-8)


@EVERY_VARIANT
@pytest.mark.filterwarnings("ignore:Input data condition number:UserWarning")  # rank 2 it is
def test_pydmd_forecasts_a_linear_system(variant):
    turn = torch.tensor(SYSTEMS["complex pair"], dtype=torch.float64)
    snapshots = iterate(turn, torch.tensor([1.0, 2.0], dtype=torch.float64), 10) @ orthogonal(55, 30, 2).mT
    peer = pydmd(snapshots, rank=2)
    peer.dmd_time["tend"] = 29
    expected = torch.from_numpy(peer.reconstructed_data.real[:, -1].copy())
    near(koopt.fit(snapshots, rank=2, **variant).forecast(20), expected)


def test_algorithm_1_of_the_paper():
    for time, state, dtype in [(14, 6, torch.float64), (7, 40, torch.float64), (14, 6, torch.float32)]:
        snapshots = window(60, 2, 3, time=time, state=state).to(dtype)
        for rtol, horizon in itertools.product([None, 0.3], [0, 1, 8]):
            near(koopt.fit(snapshots, rtol=rtol).forecast(horizon), algorithm_1(snapshots, horizon, rtol), 1e-6)


@FORMS
def test_default_cut_is_the_rounding_of_what_was_stored(snapshot_form):
    scales = torch.logspace(0, -17, 18, dtype=torch.float64)
    exact = orthogonal(61, 300, 18) * scales @ orthogonal(62, 20, 18).mT
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        stored = exact.to(dtype)
        values = np.linalg.svd(stored[:-1].double().numpy(), compute_uv=False)
        cut = max(torch.finfo(dtype).eps, 300 * torch.finfo(torch.float64).eps)
        assert fit_in_form(stored, snapshot_form).rank == (values > cut * values[0]).sum()


@FORMS
def test_what_storing_in_float32_adds_is_below_the_default_cut(snapshot_form):
    """A law of two numbers stays one, however many snapshots and weights there are."""
    law = iterate(torch.tensor([[0.999, 0.01], [0.0, 0.98]], dtype=torch.float64), torch.ones(2).double(), 400)
    exact = law @ orthogonal(63, 90, 2).mT
    for few in (slice(None), slice(0, 400, 40)):
        op = fit_in_form(exact[few].float(), snapshot_form)
        assert op.rank == 2
        near(op.forecast(10).double(), fit_in_form(exact[few], snapshot_form).forecast(10), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@FORMS
def test_default_cut_never_takes_everything(snapshot_form, dtype):
    halving = torch.logspace(0, -4, 5, base=2, dtype=torch.float64)[:, None] * normal(63, 3000).sign()
    op = fit_in_form(halving.to(dtype), snapshot_form)
    assert op.rank == 1
    assert_close(op.forecast(2), (halving[-1] / 4).to(dtype))


@FORMS
@pytest.mark.parametrize("options", [{"difference": True}, {"center": True, "difference": True}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_of_a_straight_line_is_not_fitted(options, dtype, snapshot_form):
    step = 1e-3 * normal(64, 6)
    steps = torch.arange(15, dtype=torch.float64)[:, None]
    stored = (normal(65, 6) + steps * step).to(dtype)
    op = fit_in_form(stored, snapshot_form, **options)
    assert op.rank == (0 if "center" in options else 1)
    motion = op.forecast(300).double() - stored[-1].double()
    assert (motion - 300 * step).norm() < 1e4 * torch.finfo(dtype).eps * (300 * step).norm()


@FORMS
def test_real_horizon_is_the_principal_power(snapshot_form):
    turn = scipy.linalg.expm(np.array([[-0.1, 0.7, 0.0], [-0.7, -0.1, 0.2], [0.0, 0.1, -0.3]]))
    path = iterate(torch.from_numpy(turn), torch.ones(3, dtype=torch.float64), 12)
    frame = orthogonal(70, 5, 3)
    op = fit_in_form(path @ frame.mT, snapshot_form)
    for horizon in (1.5, 2.25, 10.75):
        power = torch.from_numpy(scipy.linalg.fractional_matrix_power(turn, horizon).real)
        near(op.forecast(horizon), frame @ power @ path[-1])
    difference = fit_in_form(path @ frame.mT, snapshot_form, difference=True)
    near(difference.forecast(7.5), op.forecast(7.5))
    near(fit_in_form(path @ frame.mT + 1, snapshot_form, center=True).forecast(7.5), op.forecast(7.5) + 1)


@pytest.mark.parametrize(
    ("ratio", "horizon", "expected"),
    [(0.25, 1.5, 0.125), (4.0, 2.5, 32.0), (-0.25, 1.5, 0.0), (-1.0, 2.25, math.cos(2.25 * math.pi)), (0.0, 1.5, 0.0)],
)
def test_real_power_of_a_number(ratio, horizon, expected):
    snapshots = torch.tensor([[1 / ratio], [1.0]] if ratio else [[1.0], [0.0]], dtype=torch.float64)
    assert_close(koopt.fit(snapshots).forecast(horizon).item(), expected)


@FORMS
def test_real_horizon_of_a_defective_operator_is_a_straight_line(snapshot_form):
    op = fit_in_form(
        torch.arange(1.0, 9.0, dtype=torch.float64)[:, None] * torch.ones(3) + torch.arange(3), snapshot_form
    )
    assert_close(op.forecast(7.5), torch.tensor([15.5, 16.5, 17.5], dtype=torch.float64))


@EVERY_VARIANT
@FORMS
def test_horizons_within_one_step_are_a_straight_line(snapshot_form, variant):
    op = fit_in_form(window(71, 2, time=9, state=6), snapshot_form, **variant)
    here, there = op.forecast(0), op.forecast(1)
    for horizon in (0.0, 0.25, 0.999, 1.0):
        near(op.forecast(horizon), here + horizon * (there - here))
    assert torch.equal(op.forecast(3.0), op.forecast(3))


@EVERY_VARIANT
@FORMS
def test_infinite_horizon_is_the_fixed_point(snapshot_form, variant):
    shrink = torch.tensor([[0.8, -0.3], [0.3, 0.8]], dtype=torch.float64)
    target = normal(72, 20)
    path = iterate(shrink, torch.ones(2, dtype=torch.float64), 12) @ orthogonal(73, 20, 2).mT
    op = fit_in_form(target + path, snapshot_form, **variant)
    near(op.forecast(4000), target)
    if variant["center"] and not variant["difference"]:  # the constant of the affine map is 1 to the last bit
        near(op.forecast(2**60), target)
    if variant["center"] and variant["difference"]:  # the increments tend to a constant, here zero but for rounding
        with pytest.raises(ValueError, match="drift along a straight line in the only patch"):
            op.forecast(math.inf)
    else:
        near(op.forecast(math.inf), target)


FOREVER = {
    "growth": lambda i: 1.5**i * torch.tensor([1.0, 2.0]),
    "turning": lambda i: torch.tensor([math.cos(0.3 * i), math.sin(0.3 * i)]),
    "drift": lambda i: torch.tensor([1.0, 2.0]) + i * torch.tensor([0.5, -0.25]),
}


@FORMS
@pytest.mark.parametrize("kind", FOREVER)
def test_infinite_horizon_is_refused_where_there_is_none(kind, snapshot_form):
    settling = torch.stack([0.5**i * torch.tensor([1.0, 3.0]) for i in range(9)]).double()
    endless = torch.stack([FOREVER[kind](i) for i in range(9)]).double()
    snapshots = torch.stack([settling, endless, settling, endless, settling, settling]).reshape(2, 3, 9, 2)
    op = fit_in_form(snapshots, snapshot_form, rtol=1e-12)
    with pytest.raises(ValueError, match=rf"horizon is inf, but {kind}.* patches \(0, 1\), \(1, 0\) .*max_modulus"):
        op.forecast(math.inf)
    with pytest.raises(ValueError, match=f"{kind}.* in the only patch"):
        fit_in_form(endless, snapshot_form, rtol=1e-12).forecast(math.inf)
    with pytest.raises(ValueError, match="patch 2 "):
        fit_in_form(torch.stack([settling, settling, endless]), snapshot_form, rtol=1e-12).forecast(math.inf)
    assert op.forecast(math.inf, max_modulus=0.9).abs().max() < 1e-9


@FORMS
@pytest.mark.parametrize("options", [{"difference": True}, {"center": True, "difference": True}])
def test_infinite_sum_of_equal_increments_is_refused(options, snapshot_form):
    with pytest.raises(ValueError, match="horizon is inf, but drift"):
        fit_in_form(torch.arange(8.0)[:, None] * torch.ones(3), snapshot_form, **options).forecast(math.inf)


@pytest.mark.parametrize("horizon", [-1, -0.5, math.nan, -math.inf, 2**62, 1e30])
def test_horizon_out_of_range(horizon):
    op = koopt.fit(window(74, time=5, state=3))
    for call in (op.forecast, lambda n: op.advance(op.forecast(0), n)):
        with pytest.raises(ValueError, match=rf"horizon is {str(horizon).replace('+', '.')}, expected"):
            call(horizon)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v["difference"]], ids=name)
@FORMS
@given(seed=st.integers(0, 100), first=st.integers(0, 6), second=st.integers(0, 6), tall=st.booleans())
def test_advance_goes_on_from_a_forecast(snapshot_form, variant, seed, first, second, tall):
    snapshots = window(seed, 2, time=8 if tall else 12, state=20 if tall else 5)
    op = fit_in_form(snapshots, snapshot_form, rtol=1e-6, **variant)
    near(op.advance(op.forecast(first), second), op.forecast(first + second), 1e-8)


@FORMS
def test_advance_applies_the_operator_to_any_state(snapshot_form):
    snapshots, states = window(75, 4, time=16, state=5), normal(76, 4, 5)
    op = fit_in_form(snapshots, snapshot_form)
    for i, (patch, state) in enumerate(zip(snapshots, states, strict=True)):
        koopman = patch[1:].mT @ torch.linalg.pinv(patch[:-1].mT)
        near(op.advance(states, 3)[i], torch.linalg.matrix_power(koopman, 3) @ state)
    assert op.advance(states.float(), 2).dtype == torch.float32


def test_advance_keeps_directions_that_hardly_move():
    """The last snapshot itself is where coordinates have all their digits, also in snapshot form."""
    scales = torch.tensor([1.0, 1e-6, 1e-12], dtype=torch.float64)
    turn = torch.linalg.qr(normal(77, 3, 3)).Q
    path = iterate(turn, torch.ones(3, dtype=torch.float64), 6) * scales
    op = fit_in_form(path @ orthogonal(78, 50, 3).mT, snapshot_form=True, rtol=1e-14)
    assert op.rank == 3
    near(op.advance(op.forecast(0), 2), op.forecast(2), 1e-15)


@FORMS
def test_advance_refuses(snapshot_form):
    snapshots = window(79, 2, time=6, state=4)
    with pytest.raises(ValueError, match=r"increments \(difference=True\).*fit with difference=False"):
        fit_in_form(snapshots, snapshot_form, difference=True).advance(snapshots[:, -1], 1)
    op = fit_in_form(snapshots, snapshot_form)
    for shape in [(4,), (2, 5), (3, 4), (1, 2, 4)]:
        with pytest.raises(ValueError, match=r"state has shape .*; pass one state a patch"):
            op.advance(torch.zeros(shape), 1)


def clamped_by_eigenvectors(koopman, modulus):
    values, vectors = torch.linalg.eig(koopman)
    values = torch.where(values.abs() > modulus, values / values.abs() * modulus, values)
    return (vectors * values @ torch.linalg.inv(vectors)).real


@FORMS
@pytest.mark.parametrize("modulus", [0.5, 0.9, 1.0])
def test_max_modulus(modulus, snapshot_form):
    system = torch.tensor([[1.2, 0.3, 0.0], [-0.4, 1.1, 0.1], [0.0, 0.2, 0.7]], dtype=torch.float64)
    path = iterate(system, torch.ones(3, dtype=torch.float64), 9)
    held = clamped_by_eigenvectors(system, modulus)
    op = fit_in_form(path, snapshot_form)
    for horizon in (1, 2, 30):
        near(op.forecast(horizon, max_modulus=modulus), torch.linalg.matrix_power(held, horizon) @ path[-1])
    assert torch.equal(op.forecast(0, max_modulus=modulus), path[-1])

    moves = fit_in_form(path, snapshot_form, difference=True)
    move = path[-1] - path[-2]
    held_move = sum(torch.linalg.matrix_power(held, j) @ move for j in range(1, 8))
    near(moves.forecast(7, max_modulus=modulus), path[-1] + held_move)

    offset = normal(80, 3)
    earlier, later = (path + offset)[:-1].mean(0), (path + offset)[1:].mean(0)
    state = path[-1] + offset
    for _ in range(7):
        state = later + held @ (state - earlier)
    near(fit_in_form(path + offset, snapshot_form, center=True).forecast(7, max_modulus=modulus), state)


@EVERY_VARIANT
@FORMS
def test_max_modulus_above_all_changes_no_bit(snapshot_form, variant):
    op = fit_in_form(window(81, 3, time=9, state=5), snapshot_form, **variant)
    above = float(op.eigenvalues.abs().max()) * 1.01
    for horizon in (0, 0.5, 1, 4, 6.5):
        assert torch.equal(op.forecast(horizon, max_modulus=above), op.forecast(horizon))


@pytest.mark.parametrize("modulus", [0, -1.0, math.nan])
def test_max_modulus_out_of_range(modulus):
    with pytest.raises(ValueError, match=f"max_modulus is {modulus}, expected a positive number"):
        koopt.fit(window(82, time=5, state=3)).forecast(1, max_modulus=modulus)


@FORMS
@pytest.mark.parametrize("size", [2, 3])
def test_max_modulus_scales_a_defective_operator_as_a_whole(size, snapshot_form):
    system = 1.5 * torch.eye(size, dtype=torch.float64) + torch.diag(torch.ones(size - 1, dtype=torch.float64), 1)
    path = iterate(system, torch.ones(size, dtype=torch.float64), 7)
    op = fit_in_form(path, snapshot_form)
    for horizon in (1, 20, 100):
        expected = torch.linalg.matrix_power(system / 1.5, horizon) @ path[-1]
        near(op.forecast(horizon, max_modulus=1.0), expected, 1e-4 * horizon)


@EVERY_VARIANT
@FORMS
def test_modes_eigenvalues_and_amplitudes_make_the_forecast(snapshot_form, variant):
    op = fit_in_form(window(90, 2, time=10, state=7), snapshot_form, rank=4, **variant)
    assert_close(op.modes.norm(dim=-2), torch.ones(2, op.eigenvalues.shape[-1], dtype=torch.float64))
    assert bool((op.eigenvalues.abs().diff(dim=-1) <= 1e-12).all())
    for horizon in (1, 2, 9):
        made = ((op.modes * op.eigenvalues[..., None, :] ** horizon) @ op.amplitudes.unsqueeze(-1)).squeeze(-1)
        assert made.imag.abs().max() < 1e-9
        step = op.forecast(horizon)
        near(made.real, step - op.forecast(horizon - 1) if variant["difference"] else step, 1e-8)


def test_spectrum_by_hand():
    halving, swinging = [[8.0, 0.0], [4.0, 0.0], [2.0, 0.0]], [[0.0, 3.0], [0.0, -3.0], [0.0, 3.0]]
    op = koopt.fit(torch.tensor([halving, swinging, [[0.0, 0.0]] * 3]))
    assert op.rank.tolist() == [1, 1, 0]
    assert_close(op.eigenvalues.real.squeeze(-1), torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64))
    modes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert_close(op.modes.abs().squeeze(-1), modes)
    assert_close(op.amplitudes.abs().squeeze(-1), torch.tensor([2.0, 3.0, 0.0], dtype=torch.float64))


def test_spectrum_is_padded_where_a_patch_has_lower_rank():
    full = window(91, time=9, state=4)
    op = koopt.fit(torch.stack([full, full * torch.tensor([1.0, 0.0, 0.0, 0.0])]))
    assert op.rank.tolist() == [4, 1]
    assert op.eigenvalues[1, 0].abs() > 0.1
    assert not op.eigenvalues[1, 1:].any()
    assert not op.modes[1, :, 1:].any()
    assert not op.amplitudes[1, 1:].any()
    alone = koopt.fit(full)
    assert_close(op.eigenvalues[0], alone.eigenvalues)
    assert_close(op.modes[0].abs(), alone.modes.abs())
    assert_close(op.amplitudes[0].abs(), alone.amplitudes.abs())


@EVERY_VARIANT
@pytest.mark.parametrize("rank", [None, 2])
def test_coefficients_over_the_snapshots(variant, rank):
    snapshots = window(92, 2, time=24, state=40)
    op = koopt.fit(snapshots, rank=rank, **variant)
    for horizon in (0, 0.5, 1, 3.5, 8):
        coefficients = op.coefficients(horizon, max_modulus=0.95)
        assert coefficients.dtype == torch.float64
        near((coefficients.unsqueeze(-2) @ snapshots).squeeze(-2), op.forecast(horizon, max_modulus=0.95))
        if variant["center"] or variant["difference"]:  # an affine combination
            assert_close(coefficients.sum(dim=-1), torch.ones(2, dtype=torch.float64))


def test_an_affine_fit_does_not_feel_where_zero_is():
    scales = torch.logspace(0, -6, 4, dtype=torch.float64)
    path = iterate(0.98 * orthogonal(90, 4), torch.ones(4, dtype=torch.float64), 12) * scales @ orthogonal(91, 40, 4).mT
    far = 100.0
    op = koopt.fit(path + far, center=True, rtol=1e-9)
    assert op.rank == 4
    assert_close(op.coefficients(20).sum().item(), 1.0, rtol=1e-13, atol=0)
    expected = koopt.fit(path, center=True, rtol=1e-9).forecast(20) + far
    assert (op.forecast(20) - expected).norm() < 1e-6


def test_larger_patches_than_the_window_is_long_get_the_snapshot_form():
    assert [koopt.fit(window(92, time=5, state=state)).snapshot_form for state in (4, 5, 6)] == [False, False, True]


def test_coefficients_are_refused_in_state_form():
    with pytest.raises(ValueError, match=r"coefficients: .*state form.*use forecast\(\)"):
        koopt.fit(window(93, time=9, state=4)).coefficients(1)


DEGENERATE = {
    "constant": [[0.1, 0.7, -0.3]] * 6,
    "zero": [[0.0, 0.0, 0.0]] * 6,
    "repeated": [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]],
    "one weight moves": [[1.0, 2.0, i / 3] for i in range(6)],
    "starts from zero": [[0.0, 0.0, 0.0]] * 3 + [[1.0, 2.0, 3.0]] * 3,
    "dies": [[1.0, 2.0, 3.0]] * 2 + [[0.0, 0.0, 0.0]] * 4,
    "settles at once": [[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0] * 3],
    "returns": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]] * 2,
}


@EVERY_VARIANT
@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_degenerate_patches_are_finite_alone_and_in_a_batch(dtype, snapshot_form, variant):
    snapshots = torch.stack([torch.tensor(rows, dtype=torch.float64) for rows in DEGENERATE.values()]).to(dtype)
    op = fit_in_form(snapshots, snapshot_form, **variant)
    alone = [fit_in_form(patch, snapshot_form, **variant) for patch in snapshots]
    for horizon in (0, 0.5, 1, 2.5, 6):
        forecast = op.forecast(horizon)
        assert forecast.dtype == dtype
        assert forecast.isfinite().all()
        assert op.forecast(horizon, max_modulus=0.9).isfinite().all()
        expected = torch.stack([each.forecast(horizon) for each in alone])
        assert_close(forecast, expected, rtol=max(1e-6, 2 * torch.finfo(dtype).eps), atol=1e-6)
    assert op.residual.isfinite().all()
    assert op.eigenvalues.isfinite().all()
    assert op.modes.isfinite().all()
    assert op.amplitudes.isfinite().all()


@EVERY_VARIANT
@FORMS
@pytest.mark.parametrize("rtol", [None, 0.0, 1e-6])
def test_constant_snapshots_stay(rtol, snapshot_form, variant):
    horizons = [0, 0.5, 1, 1000]
    if not (variant["center"] and variant["difference"]):
        horizons.append(math.inf)
    for value in (0.1, 0.0):
        op = fit_in_form(torch.full((7, 3), value, dtype=torch.float64), snapshot_form, rtol=rtol, **variant)
        assert op.rank == (0 if variant["center"] or variant["difference"] or not value else 1)
        for horizon in horizons:
            assert_close(op.forecast(horizon), torch.full((3,), value, dtype=torch.float64), rtol=1e-12, atol=0)


@FORMS
def test_infinite_horizon_beside_modes_that_die_at_once(snapshot_form):
    """Eigenvectors of a nilpotent part are not independent; the fixed point does not depend on them."""
    system = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.float64)
    frame = orthogonal(94, 6, 4)
    runs = [iterate(system, start, 5) for start in torch.eye(4, dtype=torch.float64).flip(0) + torch.eye(4)[0]]
    op = fit_in_form(runs[0] @ frame.mT, snapshot_form)
    near(op.forecast(math.inf), frame[:, 0])
    exact = linalg.evolve(system, torch.tensor([2.0, 3.0, 4.0, 5.0], dtype=torch.float64), math.inf)
    assert_close(exact, torch.tensor([2.0, 0, 0, 0], dtype=torch.float64), rtol=0, atol=1e-14)


@EVERY_VARIANT
@FORMS
def test_the_fewest_snapshots(snapshot_form, variant):
    snapshots = window(95, time=2 + variant["difference"], state=5)
    op = fit_in_form(snapshots, snapshot_form, **variant)
    expected, _ = dense(snapshots, 3, 1e-12, **variant)
    near(op.forecast(3), expected)
    with pytest.raises(ValueError, match=r"snapshots has shape .* time >= [23].*record more"):
        fit_in_form(snapshots[1:], snapshot_form, **variant)


@EVERY_VARIANT
@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    time=st.integers(3, 16),
    state=st.integers(1, 20),
    rank=st.none() | st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_batch_is_a_loop(variant, batch, time, state, rank, seed):
    snapshots = window(seed, *batch, time=time, state=state)
    op = koopt.fit(snapshots, rank=rank, **variant)
    forecast = op.forecast(2.5)
    assert forecast.shape == (*batch, state)
    assert op.rank.shape == op.residual.shape == tuple(batch)
    for index in itertools.product(*map(range, batch)):
        alone = koopt.fit(snapshots[index], rank=rank, **variant)
        near(forecast[index], alone.forecast(2.5), 1e-6)
        near(op.forecast(3, max_modulus=0.5)[index], alone.forecast(3, max_modulus=0.5), 1e-6)
        assert op.rank[index] == alone.rank


@FORMS
@pytest.mark.parametrize(("time", "state", "rank"), [(6, 4, None), (40, 50, 2)])
def test_no_patches_no_forecasts(time, state, rank, snapshot_form):
    op = fit_in_form(torch.zeros(2, 0, time, state), snapshot_form, rank=rank)
    for horizon in (0, 0.5, 1, 2.5, 10, math.inf):
        assert op.forecast(horizon, max_modulus=0.9).shape == (2, 0, state)
    assert op.advance(torch.zeros(2, 0, state), 3).shape == (2, 0, state)
    assert op.modes.shape[:3] == (2, 0, state)


@pytest.mark.parametrize(("state", "rank"), [(3, None), (30, None), (30, 2)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(value, state, rank):
    snapshots = window(96, 2, 3, time=26, state=state)
    snapshots[1, 2, 4, 1] = value
    with pytest.raises(ValueError, match=r"NaN or Inf in patch \(1, 2\); drop"):
        koopt.fit(snapshots, rank=rank)
    with pytest.raises(ValueError, match=r"NaN or Inf in patch 2; drop"):
        koopt.fit(snapshots[1], rank=rank, center=True)
    with pytest.raises(ValueError, match=r"NaN or Inf in the only patch; drop"):
        koopt.fit(snapshots[1, 2], rank=rank, difference=True)
    snapshots[:, :, -1] = value
    with pytest.raises(ValueError, match=r"patches \(0, 0\), \(0, 1\), \(0, 2\), \(1, 0\), \(1, 1\) and 1 more; drop"):
        koopt.fit(snapshots, rank=rank)


@EVERY_VARIANT
@FORMS
@pytest.mark.parametrize("rank", [None, 2])
def test_extreme_sizes(rank, snapshot_form, variant):
    snapshots = window(97, time=30, state=26)
    with pytest.raises(ValueError, match="too large to square in float64; divide"):
        fit_in_form(snapshots * 1e200, snapshot_form, rank=rank, **variant)
    for scale in (1e-200, 1e-160, 1e-310, 5e-324):
        op = fit_in_form(snapshots * scale, snapshot_form, rank=rank, **variant)
        assert op.forecast(3).abs().max() <= 10 * scale * snapshots.abs().max() + 1e-300
        assert op.residual.isfinite()
        assert op.modes.isfinite().all()
    expected = fit_in_form(snapshots, snapshot_form, rank=rank, rtol=1e-6, **variant).forecast(3)
    largest = float(max(snapshots.abs().max(), expected.abs().max()))
    for dtype, tolerance in [(torch.float32, 1e-4), (torch.float16, 0.3)]:
        scale = 0.5 * torch.finfo(dtype).max / largest  # squares, sums and differences overflow in this dtype
        op = fit_in_form((snapshots * scale).to(dtype), snapshot_form, rank=rank, rtol=1e-6, **variant)
        near(op.forecast(3).double() / scale, expected, tolerance)


@FORMS
def test_forecast_that_leaves_its_dtype_is_infinite(snapshot_form):
    growing = (2.0 ** torch.arange(8))[:, None] * torch.tensor([1.0, -1.0])
    assert_close(fit_in_form(growing.half(), snapshot_form).forecast(40), torch.tensor([math.inf, -math.inf]).half())


@FORMS
def test_gradients_stop_and_input_stays(snapshot_form):
    snapshots = window(98, 2, time=30, state=26).requires_grad_()
    before, states = snapshots.detach().clone(), snapshots[:, 3]
    for variant, rank in itertools.product(VARIANTS, [None, 2]):
        op = fit_in_form(snapshots, snapshot_form, rank=rank, **variant)
        results = [op.forecast(n, 0.9) for n in (0, 1, 2.5)] + [op.eigenvalues, op.modes, op.residual, op.snapshots]
        if not variant["difference"]:
            results += [op.advance(states, n) for n in (0, 1, 2.5)]
        for result in results:
            assert not result.requires_grad
            if result.shape == before[:, -1].shape:
                result.add_(1.0)  # is the caller's own
    assert torch.equal(snapshots, before)


@FORMS
@given(data=st.data())
def test_coordinates_do_not_matter(snapshot_form, data):
    variant = data.draw(st.sampled_from(VARIANTS))
    time, state = data.draw(st.sampled_from([(12, 5), (6, 12)]))
    snapshots = window(data.draw(st.integers(0, 100)), time=time, state=state)
    horizon = data.draw(st.sampled_from([0, 0.5, 1, 3, 4.5]))

    def forecast(rows):
        return fit_in_form(rows, snapshot_form, rtol=1e-6, **variant).forecast(horizon)

    expected = forecast(snapshots)
    order = torch.tensor(data.draw(st.permutations(range(state))))
    near(forecast(snapshots[:, order]), expected[order], 1e-7)
    scale = data.draw(st.floats(1e-3, 1e3)) * data.draw(st.sampled_from([-1, 1]))
    near(forecast(snapshots * scale), expected * scale, 1e-7)
    frame = orthogonal(data.draw(st.integers(0, 100)), state)
    near(forecast(snapshots @ frame.mT), frame @ expected, 1e-7)
    if variant["center"]:  # and then not where zero is
        near(forecast(snapshots + 7), expected + 7, 1e-7)


def test_options_out_of_range():
    snapshots = window(99, time=6, state=4)
    for rank in (0, -1, True):
        with pytest.raises(ValueError, match=f"rank is {rank}, expected a whole number >= 1"):
            koopt.fit(snapshots, rank=rank)
    for rtol in (-1e-3, 1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"rtol is {rtol}, expected 0 <= rtol < 1"):
            koopt.fit(snapshots, rtol=rtol)
    for shape in [(1, 4), (6, 0), (2, 1, 4)]:
        with pytest.raises(ValueError, match=r"snapshots has shape .*expected \(\*batch, time, state\)"):
            koopt.fit(torch.zeros(shape))
    near(koopt.fit(snapshots, rank=50).forecast(1), koopt.fit(snapshots).forecast(1))


@pytest.mark.parametrize(
    "call",
    [
        lambda: koopt.fit([[1.0], [2.0]]),
        lambda: koopt.fit(torch.zeros(3, 2, dtype=torch.int64)),
        lambda: koopt.fit(torch.zeros(3, 2, dtype=torch.complex64)),
        lambda: koopt.fit(torch.zeros(3, 2), rank="all"),
        lambda: koopt.fit(torch.zeros(3, 2), center="yes"),
        lambda: koopt.fit(torch.zeros(3, 2)).forecast("1"),
        lambda: linalg.combine(torch.zeros(4), torch.zeros(3, 2)),
        lambda: linalg.evolve(torch.zeros(2, 3), torch.zeros(2), 1),
        lambda: koopt.Operator(*[torch.zeros(2, 2)] * 7, True, True, True, True),
    ],
)
def test_annotations_are_checked_in_these_tests(call):
    with pytest.raises(TypeCheckError):
        call()


MESSAGES = {
    "koopt.fit([[1.0], [2.0]])": "TypeError: snapshots: expected a real floating-point tensor .* got list; convert",
    "koopt.fit(torch.ones(3, 2, dtype=torch.int64))": "TypeError: snapshots: .* got torch.int64; convert it first",
    "koopt.fit(torch.ones(3, 2, dtype=torch.complex64))": "TypeError: snapshots: .* got torch.complex64; convert",
    "koopt.fit(torch.ones(4))": r"ValueError: snapshots has shape \(4,\), expected \(\*batch, time, state\)",
    "koopt.fit(x, rank=2.5)": "ValueError: rank is 2.5, expected a whole number",
    "koopt.fit(x, rank='all')": "ValueError: rank is 'all', expected a whole number",
    "koopt.fit(x, rtol='small')": "ValueError: rtol is 'small', expected 0 <= rtol < 1",
    "koopt.fit(x).forecast('1')": "TypeError: horizon is '1', expected a number of snapshot steps, or math.inf",
    "koopt.fit(x).forecast(True)": "TypeError: horizon is True, expected a number",
    "koopt.fit(x).forecast(None)": "TypeError: horizon is None, expected a number",
    "koopt.fit(x).forecast(1, max_modulus='1')": "ValueError: max_modulus is '1', expected a positive number",
    "koopt.fit(x).advance(torch.ones(2, dtype=torch.int64), 1)": "TypeError: state: .* got torch.int64; convert",
    "koopt.fit(x).advance([1.0, 2.0], 1)": "TypeError: state: .* got list; convert",
    "koopt.fit(x, rank=np.int64(1)).forecast(np.int64(2)).dtype": "torch.float32",
    "koopt.fit(x).forecast(np.float32(2.5)).dtype": "torch.float32",
}


def test_messages_without_type_checks():
    """What users see: in these tests the annotations would speak first."""
    script = (
        "import sys, numpy as np, torch, koopt\n"
        "x = torch.rand(5, 2)\n"
        "for call in sys.argv[1:]:\n"
        "    try: print(eval(call))\n"
        "    except Exception as error: print(f'{type(error).__name__}: {error}')\n"
    )
    shown = subprocess.run([sys.executable, "-c", script, *MESSAGES], capture_output=True, text=True, check=True)
    for (call, message), line in zip(MESSAGES.items(), shown.stdout.splitlines(), strict=True):
        assert re.match(message, line), f"{call} says {line}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@EVERY_VARIANT
@pytest.mark.parametrize(("time", "state", "rank"), [(14, 6, None), (7, 40, None), (40, 50, 3)])
def test_cuda(time, state, rank, variant):
    snapshots = window(100, 3, time=time, state=state)
    here, there = (koopt.fit(data, rank=rank, **variant) for data in (snapshots, snapshots.cuda()))
    for horizon in (0, 0.5, 1, 2.5, 9):
        forecast = there.forecast(horizon, max_modulus=0.99)
        assert forecast.is_cuda
        near(forecast.cpu(), here.forecast(horizon, max_modulus=0.99), 1e-7)
    assert_close(there.eigenvalues.abs().cpu(), here.eigenvalues.abs())
    assert_close(there.residual.cpu(), here.residual)
    if not variant["difference"]:
        near(there.advance(snapshots[:, 0].cuda(), 2).cpu(), here.advance(snapshots[:, 0], 2), 1e-7)


# a coarse cut


@FORMS
@EVERY_VARIANT
@pytest.mark.parametrize("rank", [None, 5])
def test_a_coarse_cut_by_the_gram_matrix_is_that_of_the_svd(snapshot_form, variant, rank):
    """Singular values fall to 1e-6 of the largest, with a gap across the cut at 1e-4."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, size, 8, generator=generator, dtype=torch.float64) for size in (18, 12))
    scales = torch.tensor([1.0, 0.5, 0.1, 0.02, 4e-3, 1e-3, 3e-6, 1e-6], dtype=torch.float64)
    data = torch.linalg.qr(left).Q * scales @ torch.linalg.qr(right).Q.mT
    asked = least_squares.Options(rank or 8, 1e-4, snapshot_form, **variant, batch=(3,))
    assert asked.share(data) >= least_squares.GRAM_RTOL
    found, expected = least_squares.fit(data, asked), least_squares.from_svd(data, asked)
    assert torch.equal(found.rank, expected.rank)
    assert int(expected.rank.max()) < 8
    forecasts = [fit.image @ fit.transition @ fit.transition @ fit.start.unsqueeze(-1) for fit in (found, expected)]
    assert_close(*forecasts, atol=1e-7 * expected.image.abs().max().item(), rtol=1e-6)
    assert_close(found.residual, expected.residual, atol=1e-7, rtol=1e-5)
