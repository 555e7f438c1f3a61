"""Each rule against doing the same to the weights themselves, one snapshot after the other."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import koopt
from koopt import linalg
from koopt.forecasters import METHODS, anderson, dema, ema, koopman, last, line, mean, regression


def window(seed, *shape, dtype=torch.float64):
    """A random walk that slows down."""
    steps = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (steps * 0.8 ** torch.arange(shape[-2]).unsqueeze(-1)).cumsum(dim=-2).to(dtype) + 1.0


def forecast(coefficients, snapshots):
    assert coefficients.dtype == torch.float64
    assert coefficients.shape == snapshots.shape[:-1]
    return (coefficients.unsqueeze(-2) @ snapshots.double()).squeeze(-2)


def moving_average(rows, decay):
    """As a training loop would keep it, with the correction for the start."""
    average, weight = torch.zeros_like(rows[0]), 0.0
    for row in rows:
        average, weight = decay * average + (1 - decay) * row, decay * weight + (1 - decay)
    return average / weight


def straight(times, rows, ahead):
    slope, offset = np.polyfit(times, rows.numpy(), 1)
    return torch.from_numpy(offset + slope * (times[-1] + ahead))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("horizon", [0, 1, 2.5, 100])
def test_rules_on_the_weights(horizon, dtype):
    batch = window(0, 2, 9, 4, dtype=dtype)
    for i, rows in enumerate(batch.double()):
        times = np.arange(9.0)
        direct = [
            (last, {}, rows[-1]),
            (mean, {}, sum(rows) / 9),
            (line, {}, rows[-1] + horizon * (rows[-1] - rows[-2])),
            (line, {"span": 3}, rows[-1] + horizon * (rows[-1] - rows[-4]) / 3),
            (line, {"span": 8}, rows[-1] + horizon * (rows[-1] - rows[0]) / 8),
            (regression, {}, straight(times, rows, horizon)),
            (ema, {}, moving_average(rows, 0.9)),
            (ema, {"decay": 0.3}, moving_average(rows, 0.3)),
        ]
        for rule, options, expected in direct:
            assert_close(forecast(rule(batch, horizon, **options), batch)[i], expected)


@given(
    gaps=st.lists(st.floats(0.01, 10), min_size=1, max_size=10),
    horizon=st.floats(0, 50),
    start=st.floats(-100, 100),
)
def test_uneven_times(gaps, horizon, start):
    times = start + torch.tensor([0.0, *gaps], dtype=torch.float64).cumsum(dim=0)
    rows = window(1, len(times), 3)
    expected = straight(times.numpy() - start, rows, horizon)
    assert_close(forecast(regression(rows, horizon, times=times), rows), expected, rtol=1e-5, atol=1e-5)
    span = len(gaps)
    slope = (rows[-1] - rows[0]) / (times[-1] - times[0])
    assert_close(forecast(line(rows, horizon, span=span, times=times), rows), rows[-1] + horizon * slope)


@given(time=st.integers(2, 30), horizon=st.floats(0, 100), decay=st.floats(0.01, 0.99), span=st.integers(1, 29))
def test_a_straight_line_goes_on(time, horizon, decay, span):
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    rows = torch.arange(time, dtype=torch.float64)[:, None] * slope + 3.0
    for coefficients in (
        dema(rows, horizon, decay=decay),
        regression(rows, horizon),
        line(rows, horizon, span=min(span, time - 1)),
    ):
        assert_close(forecast(coefficients, rows), rows[-1] + horizon * slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("decay", [0.3, 0.5, 0.9])
def test_dema_in_a_long_window_is_browns_formula(decay):
    rows = window(2, 400, 3)
    once, history = rows[0], []
    for row in rows:
        once = decay * once + (1 - decay) * row
        history.append(once)
    twice = history[0]
    for row in history:
        twice = decay * twice + (1 - decay) * row
    for horizon in (0, 1, 7.5):
        expected = 2 * once - twice + horizon * (1 - decay) / decay * (once - twice)
        assert_close(forecast(dema(rows, horizon, decay=decay), rows), expected)


def constrained(rows, regularization):
    """Least squares under the condition that the weights sum to one, from its optimality conditions."""
    steps = np.diff(rows.numpy(), axis=0)
    count = len(steps)
    squared = steps @ steps.T
    system = np.ones((count + 1, count + 1))
    system[:count, :count] = 2 * (squared + regularization * np.trace(squared) * np.eye(count))
    system[count, count] = 0.0
    weights = np.linalg.solve(system, np.eye(count + 1)[count])[:count]
    return torch.from_numpy(weights @ rows.numpy()[1:])


@pytest.mark.parametrize("regularization", [1e-2, 1e-8])
def test_anderson_is_constrained_least_squares(regularization):
    batch = window(3, 2, 6, 20)
    found = forecast(anderson(batch, 5, regularization=regularization), batch)
    for i, rows in enumerate(batch):
        assert_close(found[i], constrained(rows, regularization))


def test_anderson_finds_the_fixed_point_of_a_linear_map():
    shrink = torch.tensor([[0.9, 0.2], [-0.1, 0.5]], dtype=torch.float64)
    target = torch.tensor([3.0, -1.0], dtype=torch.float64)
    rows = torch.stack([target + torch.linalg.matrix_power(shrink, i).sum(dim=-1) for i in range(4)])
    assert_close(forecast(anderson(rows, 1, regularization=1e-14), rows), target, rtol=1e-6, atol=1e-6)
    still = torch.ones(4, 2)
    assert_close(forecast(anderson(still, 1), still), torch.ones(2, dtype=torch.float64))


KOOPMAN = [
    {},
    {"rank": 2},
    {"rtol": 1e-3},
    {"projected": True, "rank": 3},
    {"center": True},
    {"difference": True, "rank": 2},
    {"center": True, "difference": True, "projected": True},
]


@pytest.mark.parametrize("options", KOOPMAN, ids=str)
@pytest.mark.parametrize(("time", "state"), [(12, 4), (7, 30), (40, 50)])
def test_koopman_is_the_operator(time, state, options):
    batch = window(4, 2, time, state)
    for horizon in (0, 0.5, 1, 3):
        expected = koopt.fit(batch, **options).forecast(horizon, max_modulus=0.99)
        assert_close(forecast(koopman(batch, horizon, max_modulus=0.99, **options), batch), expected)


CASES = [
    (koopman, {"rtol": 1e-6}),
    (koopman, {"rank": 3, "rtol": 1e-6, "center": True}),
    (koopman, {"rank": 2, "rtol": 1e-6, "difference": True, "projected": True}),
    (last, {}),
    (mean, {}),
    (line, {"span": 4}),
    (regression, {}),
    (ema, {"decay": 0.7}),
    (dema, {"decay": 0.7}),
    (anderson, {}),
]
AFFINE = [(rule, options) for rule, options in CASES if rule is not koopman or set(options) & {"center", "difference"}]


@pytest.mark.parametrize(("rule", "options"), CASES, ids=lambda case: getattr(case, "__name__", str(case)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_factor_serves_as_well_as_the_snapshots(rule, options, dtype):
    batch = window(5, 3, 8, 50, dtype=dtype)
    for horizon in (0, 1, 4.5):
        direct = rule(batch, horizon, **options)
        assert_close(rule(linalg.triangular_factor(batch), horizon, **options), direct, rtol=1e-7, atol=1e-7)
        for i, rows in enumerate(batch):
            assert_close(rule(rows, horizon, **options), direct[i], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("rule", "options"), AFFINE, ids=lambda case: getattr(case, "__name__", str(case)))
@given(seed=st.integers(0, 1000), time=st.integers(5, 20), state=st.integers(1, 30), horizon=st.floats(0, 20))
def test_affine_rules_sum_to_one(rule, options, seed, time, state, horizon):
    coefficients = rule(window(seed, 2, time, state), horizon, **options)
    size = coefficients.abs().sum(dim=-1)
    assert bool(((coefficients.sum(dim=-1) - 1).abs() <= 1e-9 * size).all())


def test_every_rule_is_named_and_leaves_its_input_alone():
    assert list(METHODS) == ["koopman", "last", "mean", "line", "regression", "ema", "dema", "anderson", "ensemble"]
    for name, rule in METHODS.items():
        assert rule.__name__ == name
        assert list(inspect.signature(rule).parameters)[:2] == ["snapshots", "horizon"]
        batch = window(6, 2, 6, 3).requires_grad_()
        before = batch.detach().clone()
        rule(batch, 2)
        assert torch.equal(batch, before)
        assert rule(batch[:0].detach(), 2).shape == (0, 6)


def test_one_snapshot():
    alone = window(7, 1, 3)
    for rule in (last, mean, regression, ema, dema):
        assert rule(alone, 5).tolist() == [1.0]


ROWS = window(8, 5, 3)
REFUSED = [
    (lambda: line(ROWS, 1, span=0), r"span is 0, expected a whole number >= 1 and below 5"),
    (lambda: line(ROWS, 1, span=5), r"span is 5, expected a whole number >= 1 and below 5"),
    (lambda: line(ROWS, 1, span=True), r"span is True, expected a whole number"),
    (lambda: line(ROWS[:1], 1), r"span is 1, expected a whole number >= 1 and below 1"),
    (lambda: line(ROWS, 1, times=torch.tensor([0.0, 1, 2, 2, 3])), r"times is \[.*\], expected strictly rising"),
    (lambda: regression(ROWS, 1, times=torch.arange(5.0, 0, -1)), r"times is \[.*\], expected strictly rising"),
    (lambda: regression(ROWS, 1, times=torch.full((5,), math.nan)), r"times is \[.*\], expected strictly rising"),
    (lambda: line(ROWS, math.inf), r"horizon is inf, but a line has no limit"),
    (lambda: regression(ROWS, math.inf), r"horizon is inf, but a line has no limit"),
    (lambda: dema(ROWS, math.nan), r"horizon is nan, but a line has no limit"),
    (lambda: ema(ROWS, 1, decay=0.0), r"decay is 0.0, expected 0 < decay < 1"),
    (lambda: ema(ROWS, 1, decay=1.0), r"decay is 1.0, expected 0 < decay < 1"),
    (lambda: dema(ROWS, 1, decay=math.nan), r"decay is nan, expected 0 < decay < 1"),
    (lambda: anderson(ROWS, 1, regularization=0.0), r"regularization is 0.0, expected a positive share"),
    (lambda: anderson(ROWS, 1, regularization=math.inf), r"regularization is inf, expected a positive share"),
    (lambda: anderson(ROWS[:1], 1), r"anderson needs at least 2, got 1; record more"),
    (lambda: koopman(ROWS, -1), r"horizon is -1, expected"),
    (lambda: koopman(ROWS, 1, rank=0), r"rank is 0, expected a whole number >= 1"),
    (lambda: koopman(ROWS, 1, max_modulus=0.0), r"max_modulus is 0.0, expected a positive number"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_options_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_option():
    with pytest.raises(TypeError, match="ranks"):
        koopman(ROWS, 1, ranks=3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("rule", "options"), CASES, ids=lambda case: getattr(case, "__name__", str(case)))
def test_cuda(rule, options):
    batch = window(9, 3, 8, 50)
    there = rule(batch.cuda(), 4.5, **options)
    assert there.is_cuda
    assert_close(there.cpu(), rule(batch, 4.5, **options), rtol=1e-7, atol=1e-7)


# several ranks


@pytest.mark.parametrize("state", [5, 400])
@pytest.mark.parametrize(("ranks", "max_modulus"), [((2, 3), 1.0), ((1, 2, 4), None), ((3,), 0.9)])
def test_an_ensemble_is_the_mean_of_the_forecasts_of_its_ranks(state, ranks, max_modulus):
    generator = torch.Generator().manual_seed(state)
    noise = torch.randn(2, 30, state, generator=generator, dtype=torch.float64)
    snapshots = 1 + torch.linspace(0, 1, 30, dtype=torch.float64)[:, None] ** 2 + 0.05 * noise
    one_by_one = [koopt.fit(snapshots, rank=rank, projected=True).forecast(7, max_modulus) for rank in ranks]
    found = linalg.combine(METHODS["ensemble"](snapshots, 7, ranks, max_modulus), snapshots)
    assert_close(found, torch.stack(one_by_one).mean(dim=0), rtol=1e-6, atol=1e-6)


def test_an_ensemble_of_no_ranks_is_refused():
    with pytest.raises(ValueError, match="ranks is empty"):
        METHODS["ensemble"](torch.zeros(4, 2), 1, ranks=())
