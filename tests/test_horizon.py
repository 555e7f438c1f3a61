"""How far a forecast may be trusted: known motions, where the answer is known, and what must never change it."""

import dataclasses
import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import koopt
from koopt import horizon as room

F64 = torch.float64


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def modes(eigenvalues, time, state=40, seed=0):
    """A sum of real modes around a fixed point: what an optimizer does in a quadratic basin."""
    powers = torch.tensor(eigenvalues, dtype=F64) ** torch.arange(time, dtype=F64)[:, None]
    return powers @ noise(len(eigenvalues), state, seed=seed) + noise(state, seed=seed + 1)


def error(plan, whole, ahead=None):
    """The error of a plan that was made from all but the last snapshots of `whole`."""
    window, step = whole[: plan.stop + 1], plan.horizon if ahead is None else ahead
    truth = whole[plan.stop + step]
    return ((plan.forecast(window, step) - truth).norm() / (truth - window[-1]).norm()).item()


@pytest.mark.parametrize("eigenvalues", [[0.9], [0.99, 0.9], [0.99, 0.95, 0.8], [0.98, -0.7]])
def test_a_basin_is_trusted_as_far_as_it_can_be_held_out(eigenvalues):
    whole = modes(eigenvalues, 121)
    found = koopt.plan(whole[:61])
    assert found.reason == "ok"
    assert found.method == "koopman"
    assert found.max_modulus == pytest.approx(max(eigenvalues) ** found.stride, abs=1e-4)
    assert found.horizon >= 15
    assert error(found, whole) < 1e-4
    assert found.expected_error < 1e-4


def test_expected_error_is_that_of_the_worst_forecast_held_out():
    # of x_i = i^2 the last increment predicts too little: after h steps it missed h (h + 1) of the motion (2 x + h) h
    time = 5
    found = koopt.plan(torch.arange(time, dtype=F64)[:, None] ** 2, tolerance=0.9)
    assert (found.method, found.stop) == ("line", 4)
    candidates = []
    for tail in (1, 2):  # lines through the last and the one so many before; held out one step, from x_2 and x_3
        missed = [abs(x**2 + (x**2 - (x - tail) ** 2) / tail - (x + 1) ** 2) / (2 * x + 1) for x in (2, 3) if x >= tail]
        candidates.append(max(missed))
    assert found.horizon == 1
    assert found.expected_error == pytest.approx(min(candidates))


def test_a_straight_line_is_continued_by_the_line():
    whole = torch.arange(90, dtype=F64)[:, None] * noise(1, 30) + noise(30, seed=1)
    found = koopt.plan(whole[:45])
    assert (found.method, found.reason, found.max_modulus) == ("line", "ok", 1.0)
    assert found.horizon >= 15
    assert found.drift_over_noise > 1e6
    assert error(found, whole) < 1e-10


@pytest.mark.parametrize("seed", range(3))
def test_the_line_is_taken_where_it_did_better(seed):
    whole = noise(120, 400, seed=seed).cumsum(dim=0).cumsum(dim=0)  # nothing is known of the next velocity but the last
    found = koopt.plan(whole[:80], tolerance=0.5)
    assert found.method == "line"
    assert found.horizon > 0
    assert error(found, whole) < 1.5 * found.expected_error


@pytest.mark.parametrize("speed", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_noise_about_a_slow_drift_is_called_noise(speed, seed):
    drift = speed * torch.arange(80, dtype=F64)[:, None] * noise(1, 200, seed=seed)
    found = koopt.plan(drift + noise(80, 200, seed=seed + 10))
    assert found.horizon == 0
    assert found.reason.startswith("noise: ")
    assert found.drift_over_noise < 3


@pytest.mark.parametrize("time", [20, 80, 300])
def test_a_random_walk_moves_as_far_as_a_random_walk(time):
    found = koopt.plan(noise(time, 3000).cumsum(dim=0))
    assert found.reason.startswith("noise: ")
    assert found.drift_over_noise == pytest.approx(1, abs=0.1)


def test_noise_with_momentum_is_noise():
    steps, velocity = [], torch.zeros(500, dtype=F64)
    for kick in noise(400, 500):
        velocity = 0.9 * velocity + kick
        steps.append(velocity)
    found = koopt.plan(torch.stack(steps).cumsum(dim=0)[100:])
    assert found.horizon == 0
    assert found.reason.startswith("noise: ")


def minibatch(batch, steps=120, stride=10):
    """The weights of a least-squares problem under mini-batch gradient descent, every `stride` steps, settled."""
    inputs, targets = noise(256, 50), noise(256, seed=1)
    weights, kept, generator = torch.zeros(50, dtype=F64), [], torch.Generator().manual_seed(0)
    for step in range((steps + 100) * stride):
        rows = torch.randperm(256, generator=generator)[:batch]
        weights = weights - 0.01 * inputs[rows].T @ (inputs[rows] @ weights - targets[rows]) / batch
        if step % stride == 0:
            kept.append(weights)
    return torch.stack(kept[100:])


def test_minibatches_make_noise_and_full_batches_a_basin():
    noisy, smooth = koopt.plan(minibatch(16)), koopt.plan(minibatch(256))
    assert noisy.reason.startswith("noise: ")
    assert noisy.drift_over_noise < 3 < smooth.drift_over_noise
    assert (smooth.reason, noisy.horizon) == ("ok", 0)
    assert smooth.horizon >= 30


def test_only_what_follows_a_change_of_law_is_used():
    before = modes([0.9, 0.8], 31, seed=5)
    after = modes([0.97, 0.9], 91, seed=7)
    whole = torch.cat([before, after - after[0] + before[-1]])
    found = koopt.plan(whole[:62])  # 31 snapshots of each law
    assert found.reason == "ok"
    assert found.start >= 31
    assert error(found, whole) < 1e-3


def test_a_law_that_has_just_changed_is_refused():
    before, after = modes([0.99], 60), modes([0.98], 3, seed=8)
    found = koopt.plan(torch.cat([before, after[1:] - after[0] + before[-1]]))
    assert found.horizon == 0
    assert found.reason.startswith("not yet in a basin: ")
    assert "largest |eigenvalue|" in found.reason
    assert found.expected_error > 0.1
    assert found.drift_over_noise > 3


def test_a_refused_plan_forecasts_the_last_snapshot():
    window = noise(40, 30)
    found = koopt.plan(window)
    assert found.horizon == 0
    assert torch.equal(found.forecast(window), window[-1])


def test_a_growing_mode_is_followed_until_it_doubles():
    whole = modes([1.1, 0.9], 90)
    found = koopt.plan(whole[:61], horizon=15)
    assert found.max_modulus ** (found.horizon / found.stride) <= 2
    assert found.reason.startswith("shorter: ")
    assert 5 <= found.horizon <= 7  # 1.1^7.27 = 2
    assert error(found, whole) < 1e-6


def test_a_wanted_horizon_is_offered_if_it_can_be_trusted():
    window = modes([0.99, 0.9], 61)
    found = koopt.plan(window, horizon=7)
    assert (found.horizon, found.reason) == (7, "ok")
    assert koopt.plan(window, horizon=6.5).horizon == 6.5


def test_a_horizon_beyond_the_window_is_shortened_and_says_so():
    found = koopt.plan(modes([0.99, 0.9], 21), horizon=50)
    assert 0 < found.horizon <= 9
    assert found.reason.startswith(f"shorter: {found.horizon} of 50 ")
    assert "verifies up to 9" in found.reason


def test_a_lower_tolerance_never_offers_more():
    bend = torch.stack([torch.arange(60, dtype=F64).sqrt() * (1 + k / 7) ** 0.5 + k for k in range(20)], dim=1)
    bend += 1e-3 * noise(60, 20)
    offered = [koopt.plan(bend, tolerance=tolerance).horizon for tolerance in (0.5, 0.1, 0.02)]
    assert offered == sorted(offered, reverse=True)
    assert offered[0] > offered[-1]
    assert all(
        koopt.plan(bend, tolerance=t).expected_error <= t for t, n in zip((0.5, 0.1), offered, strict=False) if n
    )


def test_without_motion_there_is_nothing_to_forecast():
    still = torch.ones(10, 3)
    found = koopt.plan(still)
    assert (found.horizon, found.expected_error) == (0, 0.0)
    assert found.reason.startswith("no motion: ")
    assert torch.equal(found.forecast(still), still[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_trusted_less_and_not_more(dtype):
    whole = modes([0.97, 0.9], 90)
    window = whole[:61].to(dtype)
    found, exact = koopt.plan(window), koopt.plan(whole[:61])
    assert found.forecast(window).dtype == dtype
    assert found.horizon <= exact.horizon
    assert found.expected_error >= exact.expected_error
    if dtype == torch.float32:
        assert found.reason == "ok"
        assert found.horizon >= 10
        assert error(found, whole.to(dtype)) < 0.02


@pytest.mark.parametrize("tolerance", [0.08, 0.02, 1e-3])
def test_low_precision_never_goes_beyond_the_tolerance(tolerance):
    found = koopt.plan(modes([0.9, 0.6], 61).bfloat16(), tolerance=tolerance)
    assert (found.expected_error <= tolerance) == (found.horizon > 0)


@pytest.mark.parametrize("speed", [1e-6, 1e-4])
def test_motion_within_the_rounding_is_not_trusted(speed):
    window = (1000 + speed * modes([0.99], 60, state=300)).float()
    found = koopt.plan(window)
    assert found.horizon == 0
    assert found.reason.startswith(("no motion: ", "noise: "))


@pytest.mark.parametrize("time", [4, 5, 6, 9, 12])
def test_short_windows(time):
    window = modes([0.9], time)
    found = koopt.plan(window)
    assert found.stop == time - 1
    assert 0 <= found.start < found.stop
    assert found.horizon <= (time - 2) // 2
    assert found.forecast(window).shape == (40,)
    assert len(window[found.start :: found.stride]) >= 2
    assert (found.stop - found.start) % found.stride == 0


BAD = {
    "three snapshots": (torch.rand(3, 5), {}, ValueError, "time >= 4"),
    "a batch": (torch.rand(2, 5, 5), {}, ValueError, "expected (time, state)"),
    "no state": (torch.rand(5, 0), {}, ValueError, "expected (time, state)"),
    "whole numbers": (torch.ones(5, 5, dtype=torch.int64), {}, TypeError, "torch.int64"),
    "complex": (torch.ones(5, 5, dtype=torch.complex64), {}, TypeError, "torch.complex64"),
    "NaN": (torch.tensor([[1.0], [2.0], [math.nan], [4.0], [5.0]]), {}, ValueError, "NaN or Inf in snapshot 2"),
    "Inf": (torch.tensor([[1.0], [2.0], [4.0], [5.0], [math.inf]]), {}, ValueError, "NaN or Inf in snapshot 4"),
    "horizon 0": (torch.rand(5, 5), {"horizon": 0}, ValueError, "horizon is 0"),
    "horizon inf": (torch.rand(5, 5), {"horizon": math.inf}, ValueError, "horizon is inf"),
    "horizon NaN": (torch.rand(5, 5), {"horizon": math.nan}, ValueError, "horizon is nan"),
    "horizon True": (torch.rand(5, 5), {"horizon": True}, TypeError, "horizon is True"),
    "tolerance 0": (torch.rand(5, 5), {"tolerance": 0.0}, ValueError, "tolerance is 0.0"),
    "tolerance 1": (torch.rand(5, 5), {"tolerance": 1.0}, ValueError, "tolerance is 1.0"),
    "tolerance NaN": (torch.rand(5, 5), {"tolerance": math.nan}, ValueError, "tolerance is nan"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name(case):
    snapshots, options, kind, message = case
    with pytest.raises(kind) as refused:
        inspect.unwrap(koopt.plan)(snapshots, **options)  # past the types that the tests check
    assert message in str(refused.value)


def test_a_plan_is_for_as_many_snapshots():
    window = modes([0.9], 20)
    found = koopt.plan(window)
    with pytest.raises(ValueError, match="made from 20, got 19"):
        found.forecast(window[1:])


def test_a_plan_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        koopt.plan(modes([0.9], 20)).horizon = 99


def test_nothing_is_changed_and_nothing_remembered():
    window = modes([0.9, 0.7], 30).requires_grad_()
    before = window.detach().clone()
    found = koopt.plan(window)
    ahead = found.forecast(window)
    assert torch.equal(window, before)
    assert not ahead.requires_grad
    assert koopt.plan(window) == found


WINDOWS = st.builds(
    lambda seed, time, size: modes([0.97, 0.8, 0.3], time, seed=seed) + size * noise(time, 40, seed=seed + 3),
    st.integers(0, 99),
    st.integers(8, 60),
    st.sampled_from([0.0, 1e-3, 0.1]),
)


def same(found, other):
    assert (found.horizon, found.start, found.stop, found.stride) == (
        other.horizon,
        other.start,
        other.stop,
        other.stride,
    )
    assert (found.method, found.options.get("rank")) == (other.method, other.options.get("rank"))
    assert found.expected_error == pytest.approx(other.expected_error, rel=1e-3, abs=1e-7)
    assert found.drift_over_noise == pytest.approx(other.drift_over_noise, rel=1e-6, nan_ok=True)


@settings(max_examples=4)
@given(WINDOWS, st.integers(-30, 30))
def test_scale_does_not_matter(window, power):
    same(koopt.plan(window * 2.0**power), koopt.plan(window))


@settings(max_examples=4)
@given(WINDOWS, st.randoms(use_true_random=False))
def test_the_order_of_the_weights_does_not_matter(window, random):
    order = list(range(window.shape[1]))
    random.shuffle(order)
    found, shuffled = koopt.plan(window), koopt.plan(window[:, order])
    same(found, shuffled)
    assert torch.allclose(found.forecast(window)[order], shuffled.forecast(window[:, order]), atol=1e-6)


@settings(max_examples=4)
@given(WINDOWS, st.floats(0.01, 0.9), st.none() | st.floats(0.5, 40))
def test_what_is_offered_is_within_what_was_asked(window, tolerance, horizon):
    found = koopt.plan(window, horizon, tolerance)
    assert 0 <= found.horizon <= (math.inf if horizon is None else horizon)
    assert (found.horizon > 0) == found.reason.startswith(("ok", "shorter"))
    assert (found.horizon > 0) == (found.expected_error <= tolerance)
    assert found.max_modulus ** (found.horizon / found.stride) <= room.GROWTH
    assert (found.reason == "ok") == (found.horizon > 0 and horizon in (None, found.horizon))
    assert bool(found.forecast(window).isfinite().all())
