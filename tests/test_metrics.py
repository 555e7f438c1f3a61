"""Success, equivalent steps, error and speed-up against tables solved by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from koopt import metrics

NAN, INF = math.nan, math.inf
FALLING = [5.0, 4.0, 3.0, 2.0, 1.0]

# training loss from t2 on, loss of the forecast -> success, T_eq, censored
CASES = {
    "exactly a training loss": (FALLING, 3.0, True, 2, False),
    "between two": (FALLING, 2.5, True, 3, False),
    "just below t2": (FALLING, 4.999, True, 1, False),
    "the last training loss": (FALLING, 1.0, True, 4, False),
    "below all training": (FALLING, 0.5, True, 4, True),
    "equal to t2": (FALLING, 5.0, False, 0, False),
    "worse than t2": (FALLING, 6.0, False, 0, False),
    "NaN": (FALLING, NAN, False, 0, False),
    "Inf": (FALLING, INF, False, 0, False),
    "the first crossing counts": ([5.0, 2.0, 4.0, 1.0], 3.0, True, 1, False),
    "training rises first": ([5.0, 9.0, 8.0, 4.0], 4.5, True, 3, False),
    "training gets worse only": ([5.0, 6.0, 7.0], 4.0, True, 2, True),
    "training breaks down": ([5.0, NAN, NAN, INF], 4.0, True, 3, True),
    "training recovers": ([5.0, NAN, INF, 3.0], 4.0, True, 3, False),
    "t2 is NaN": ([NAN, 1.0], 0.5, False, 0, False),
    "t2 is Inf": ([INF, 3.0, 2.0], 2.0, True, 2, False),
    "no data after t2": ([5.0], 4.0, True, 0, True),
    "no data after t2, worse": ([5.0], 6.0, False, 0, False),
    "a flat loss": ([1.0, 1.0, 1.0], 1.0, False, 0, False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_success_and_equivalent_steps(case):
    loss, forecast, success, steps, censored = case
    forecast, loss = torch.tensor([forecast]), torch.tensor(loss).unsqueeze(1)
    assert metrics.success(forecast, loss).tolist() == [success]
    found, marked = metrics.equivalent_steps(forecast, loss)
    assert found.tolist() == [steps]
    assert marked.tolist() == [censored]


@pytest.mark.parametrize(("forecast", "steps"), [(4.5, 50), (4.0, 100), (3.25, 175), (3.0, 200), (2.9, 200), (5.0, 0)])
def test_between_the_ends_of_epochs_the_loss_is_straight(forecast, steps):
    loss = torch.tensor([[5.0], [4.0], [3.0]])
    found, censored = metrics.equivalent_steps(torch.tensor([forecast]), loss, every=100)
    assert (found.tolist(), censored.tolist()) == ([steps], [forecast < 3.0])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_steps_between_rows_never_pass_the_row_that_reaches_the_loss(case):
    loss, forecast, *_ = case
    forecast, loss = torch.tensor([forecast]), torch.tensor(loss).unsqueeze(1)
    (rows, marked), (steps, censored) = (metrics.equivalent_steps(forecast, loss, every) for every in (1, 1000))
    assert marked == censored
    assert 1000 * (rows - 1).clamp(min=0) <= steps <= 1000 * rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seeds_do_not_mix(dtype):
    columns = [case for case in CASES.values() if len(case[0]) == len(FALLING)]
    loss = torch.tensor([case[0] for case in columns], dtype=dtype).T
    forecast = torch.tensor([case[1] for case in columns], dtype=dtype)
    assert metrics.success(forecast, loss).tolist() == [case[2] for case in columns]
    steps, censored = metrics.equivalent_steps(forecast, loss)
    assert steps.tolist() == [case[3] for case in columns]
    assert censored.tolist() == [case[4] for case in columns]


LOSSES = st.floats(0, 10) | st.just(NAN) | st.just(INF)


@given(st.lists(LOSSES, min_size=1, max_size=12), LOSSES)
def test_equivalent_steps_as_defined(loss, forecast):
    steps, censored = (
        found.item() for found in metrics.equivalent_steps(torch.tensor([forecast]), torch.tensor(loss)[:, None])
    )
    loss, forecast = torch.tensor(loss).tolist(), torch.tensor(forecast).item()  # in float32, as compared
    if not forecast < loss[0]:
        assert (steps, censored) == (0, False)
    elif censored:
        assert steps == len(loss) - 1
        assert not any(value <= forecast for value in loss)
    else:
        assert loss[steps] <= forecast
        assert not any(value <= forecast for value in loss[:steps])


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=12, unique=True), st.data())
def test_a_forecast_onto_training_is_worth_its_steps(loss, data):
    loss = torch.tensor(sorted(loss, reverse=True), dtype=torch.float64).unsqueeze(1)
    step = data.draw(st.integers(1, len(loss) - 1))
    steps, censored = metrics.equivalent_steps(loss[step], loss)
    assert (steps.item(), censored.item()) == (step, False)


@given(st.lists(st.floats(0, 10), min_size=2, max_size=12), st.floats(0, 10), st.floats(0, 10))
def test_a_lower_loss_is_never_worth_fewer_steps(loss, one, other):
    low, high = sorted((one, other))
    steps, _ = metrics.equivalent_steps(torch.tensor([low, high]), torch.tensor([loss, loss]).T)
    assert steps[0] >= steps[1]


# forecast, start, truth -> median |error| / |motion|
ERRORS = {
    "perfect": ([1.0, 2.0], [0.0, 0.0], [1.0, 2.0], 0.0),
    "no motion forecast": ([0.0, 0.0], [0.0, 0.0], [1.0, -2.0], 1.0),
    "half way": ([0.5, -1.0], [0.0, 0.0], [1.0, -2.0], 0.5),
    "too far": ([2.0], [0.0], [1.0], 1.0),
    "signs do not cancel": ([0.5, 1.5], [0.0, 0.0], [1.0, 1.0], 0.5),
    "median of three": ([1.1, 1.2, 1.9], [0.0] * 3, [1.0] * 3, 0.2),
    "median of four": ([1.1, 1.2, 1.4, 1.9], [0.0] * 4, [1.0] * 4, 0.3),
    "still, and forecast so": ([3.0], [3.0], [3.0], 0.0),
    "still, forecast moving": ([4.0], [3.0], [3.0], INF),
    "half of them still": ([3.0, 0.5], [3.0, 0.0], [3.0, 1.0], 0.25),
    "NaN is the worst": ([NAN, 1.1, 1.2], [0.0] * 3, [1.0] * 3, 0.2),
    "NaN": ([NAN], [0.0], [1.0], INF),
    "Inf": ([INF], [0.0], [1.0], INF),
    "two infinities in the middle": ([INF, -INF], [0.0] * 2, [1.0] * 2, INF),
    "training broke down": ([1.0], [0.0], [NAN], INF),
}


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS)
def test_error_over_motion(case):
    forecast, start, truth = (torch.tensor(weights, dtype=torch.float64) for weights in case[:3])
    assert metrics.error_over_motion(forecast, start, truth) == pytest.approx(case[3], abs=1e-15)
    stacked = [torch.stack([weights, weights]) for weights in (forecast, start, truth)]
    assert metrics.error_over_motion(*stacked) == pytest.approx(case[3], abs=1e-15)


@given(st.integers(0, 99), st.floats(-100, 100).filter(bool), st.floats(-100, 100))
def test_error_over_motion_has_no_unit(seed, scale, shift):
    weights = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = metrics.error_over_motion(*weights)
    scale = math.copysign(max(abs(scale), 1e-3), scale)
    assert metrics.error_over_motion(*(scale * weights + shift)) == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.floats(-10, 10) | st.just(INF), min_size=1, max_size=9))
def test_median_is_the_middle(values):
    found, values = metrics.median(torch.tensor(values, dtype=torch.float64)), sorted(values)
    assert found == (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def test_median_needs_a_value():
    with pytest.raises(ValueError, match="empty, expected at least one"):
        metrics.median(torch.tensor([]))


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("trials", [1, 2, 5, 8, 25, 100, 5000])
@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.31, 0.5, 0.84, 0.92, 1.0])
def test_binomial_interval_against_scipy(rate, trials, level):
    expected = stats.binom.ppf([(1 - level) / 2, (1 + level) / 2], trials, rate) / trials
    assert metrics.binomial_interval(rate, trials, level) == pytest.approx(tuple(expected), abs=1e-12)


@given(st.floats(0, 1), st.integers(1, 60), st.floats(0.05, 0.99))
def test_binomial_interval_holds_its_share(rate, trials, level):
    low, high = metrics.binomial_interval(rate, trials, level)
    assert 0 <= low <= high <= 1
    counts = stats.binom(trials, rate)
    assert counts.cdf(round(high * trials)) - counts.cdf(round(low * trials) - 1) >= level - 1e-9
    mirrored = metrics.binomial_interval(1 - rate, trials, level)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1.01 / trials)  # ties round to either side


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.5, 10), "rate is 1.5, expected a share from 0 to 1"),
        ((-0.1, 10), "rate is -0.1"),
        ((NAN, 10), "rate is nan"),
        ((0.5, 0), "trials is 0, expected at least 1"),
        ((0.5, 10, 1.0), "level is 1.0, expected a probability between 0 and 1"),
        ((0.5, 10, 0.0), "level is 0.0"),
    ],
)
def test_binomial_interval_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        metrics.binomial_interval(*arguments)


def test_speedup():
    assert metrics.speedup(2500, 1e-3, 0.025) == pytest.approx(100)
    assert metrics.speedup(2500, 1e-3, 0.025, 0.1) == pytest.approx(20)
    assert metrics.speedup(0, 1e-3, 0.025) == 0
