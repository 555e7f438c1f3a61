"""The recorded window against a plain list of copies, forecasts against motions that are known, weights put back."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import koopt
from koopt import trajectory as module
from koopt.forecasters import METHODS

SCHEDULES = [
    {"window": 3},
    {"window": 1},
    {"window": 4, "stride": 3},
    {"window": 100, "stride": 7},
    {"window": 3, "stride": 1, "average": True},
    {"window": 3, "stride": 4, "average": True},
    {"window": 100, "stride": 5, "average": True},
]
METHOD_OPTIONS = [
    ("koopman", {}),
    ("koopman", {"rank": 2, "difference": True}),
    ("koopman", {"center": True, "max_modulus": 1.0}),
    ("koopman", {"projected": True, "rtol": 1e-3}),
    ("last", {}),
    ("mean", {}),
    ("line", {"span": 2}),
    ("regression", {}),
    ("ema", {"decay": 0.5}),
    ("dema", {}),
    ("anderson", {"regularization": 1e-3}),
]


def network(dtype=torch.float32, sizes=(2, 4, 3)):
    torch.manual_seed(0)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def flat(model, dtype=torch.float64):
    return torch.cat([p.detach().to(dtype).flatten() for p in model.parameters() if p.requires_grad])


@torch.no_grad()
def put(model, values):
    """Write one flat vector into the model's parameters, without koopt."""
    parameters = list(model.parameters())
    for parameter, piece in zip(parameters, values.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(piece.view(parameter.shape))


@torch.no_grad()
def wander(model, generator):
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.1)


def oracle(copies, window, stride=1, average=False):
    """The snapshots of a trajectory from a copy of the weights after every step."""
    if average:
        blocks = [copies[i : i + stride] for i in range(0, len(copies) - stride + 1, stride)]
        taken = [torch.stack(block).mean(dim=0) for block in blocks]
    else:
        taken = copies[::stride]
    return taken[-window:]


def wandered(steps, model=None, **settings):
    """A trajectory of a random walk."""
    model = network() if model is None else model
    generator = torch.Generator().manual_seed(1)
    traj = koopt.Trajectory(model, **settings)
    for _ in range(steps):
        wander(model, generator)
        traj.record()
    return model, traj


# recording


@pytest.mark.parametrize("settings", SCHEDULES, ids=str)
def test_records_what_a_list_of_copies_holds(settings):
    model, generator = network(torch.float64), torch.Generator().manual_seed(1)
    traj, copies = koopt.Trajectory(model, **settings), []
    for step in range(1, 42):
        wander(model, generator)
        traj.record()
        copies.append(flat(model))
        expected = oracle(copies, **settings)
        assert len(traj) == len(expected)
        assert traj.steps == step
        if expected:
            exact = 1e-15 if traj.average else 0.0
            torch.testing.assert_close(traj.snapshots(), torch.stack(expected), rtol=exact, atol=exact)


@pytest.mark.parametrize("settings", SCHEDULES, ids=str)
def test_age_is_the_time_since_the_last_snapshot(settings):
    model, stride = network(torch.float64), settings.get("stride", 1)
    traj, copies = koopt.Trajectory(model, **settings), []
    for step in range(1, 30):
        put(model, torch.full((traj.snapshots().shape[1],), float(step), dtype=torch.float64))
        traj.record()
        copies.append(flat(model))
        if len(traj):  # the weights are the time, so the last snapshot tells when it was taken
            assert traj.age == step - traj.snapshots()[-1, 0].item()
    if not traj.average:
        assert (traj.steps - traj.age) % stride == 1 % stride, "taken at the first step and each stride-th after it"


def test_names_are_the_columns():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    model[1].weight = model[0].weight  # tied
    model[2].bias.requires_grad_(False)
    traj = koopt.Trajectory(model)
    traj.record()
    assert traj.names == ("0.weight", "0.bias", "1.bias", "2.weight")
    named = dict(model.named_parameters())
    expected = torch.cat([named[name].detach().flatten() for name in traj.names])
    assert torch.equal(traj.snapshots()[0], expected)


def test_scalars_and_other_memory_formats():
    model = nn.Module()
    model.scalar = nn.Parameter(torch.tensor(3.0))
    model.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    model.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
    for average in (False, True):
        traj = koopt.Trajectory(model, average=average)
        traj.record()
        assert torch.equal(traj.snapshots()[0].double(), flat(model))
        forecast = traj.forecast(0, method="last")
        assert all(torch.equal(forecast[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_records_in_any_grad_mode(mode, average):
    model = network()
    traj = koopt.Trajectory(model, average=average)
    for _ in range(3):
        with mode():
            traj.record()
    assert not traj.snapshots().requires_grad
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in model.parameters())
    assert not any(w.requires_grad for w in traj.forecast(1, method="last").values())


@pytest.mark.parametrize("average", [False, True])
def test_autocast_does_not_touch_what_is_recorded(average):
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3).bfloat16())
    plain = koopt.Trajectory(model, stride=2, average=average)
    traj = koopt.Trajectory(model, stride=2, average=average)
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        wander(model, generator)
        plain.record()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            traj.record()
    assert torch.equal(traj.snapshots(), plain.snapshots())
    expected = plain.forecast(3, rank=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = traj.forecast(3, rank=2)
    assert all(torch.equal(found[name], w) for name, w in expected.items())


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("kept", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("trained", DTYPES, ids=str)
def test_dtypes(trained, kept, average):
    model, generator = network(trained), torch.Generator().manual_seed(1)
    traj, copies = koopt.Trajectory(model, window=4, stride=3, average=average, dtype=kept), []
    for _ in range(14):
        wander(model, generator)
        traj.record()
        copies.append(flat(model))
    expected = torch.promote_types(trained, torch.float32) if kept is None else kept
    snapshots = traj.snapshots()
    assert snapshots.dtype == expected
    tolerance = {"rtol": torch.finfo(expected).eps, "atol": 1e-6} if average else {"rtol": 0, "atol": 0}
    target = torch.stack(oracle(copies, 4, 3, average)).to(expected)
    torch.testing.assert_close(snapshots, target, **tolerance)
    for weights in (traj.forecast(2), traj.forecast(2, by="node", method="regression")):
        assert {w.dtype for w in weights.values()} == {trained}


def test_parameters_of_several_dtypes():
    model = nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).double(), nn.Linear(2, 2))
    traj = koopt.Trajectory(model)
    for _ in range(3):
        traj.record()
    assert traj.snapshots().dtype == torch.float64
    assert torch.equal(traj.snapshots()[0], flat(model))
    forecast = traj.forecast(4)
    assert {name: w.dtype for name, w in forecast.items()} == {name: p.dtype for name, p in model.named_parameters()}
    assert [w.shape for w in forecast.values()] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_block_means_in_half_precision_are_summed_in_float32(dtype):
    model = nn.Linear(1, 1, bias=False).to(dtype)
    traj = koopt.Trajectory(model, stride=1000, average=True, dtype=dtype)
    nn.init.constant_(model.weight, 257.0 if dtype == torch.float16 else 258.0)
    for _ in range(1000):
        traj.record()
    assert traj.snapshots().item() == model.weight.item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(("trained", "kept"), [("cuda", None), ("cuda", "cpu"), ("cpu", "cuda")])
def test_devices(trained, kept, average):
    settings = {"window": 4, "stride": 2, "average": average}
    model = network().to(trained)
    traj = koopt.Trajectory(model, device=kept, **settings)
    reference_model = network()
    reference = koopt.Trajectory(reference_model, **settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(13):
        wander(reference_model, generator)
        koopt.load_into(model, dict(reference_model.named_parameters()))
        traj.record()
        reference.record()
    assert traj.snapshots().device.type == (kept or trained)
    torch.testing.assert_close(traj.snapshots().cpu(), reference.snapshots())
    for by in ("network", "node"):
        expected = reference.forecast(3, method="line", by=by)
        for name, weights in traj.forecast(3, method="line", by=by).items():
            assert weights.device.type == trained
            torch.testing.assert_close(weights.cpu(), expected[name])


# memory


def tensors_of(traj):
    """Every tensor that a trajectory holds, but for the parameters."""
    held = [value for value in vars(traj).values() if isinstance(value, torch.Tensor)]
    lists = [value for value in vars(traj).values() if isinstance(value, list)]
    held += [x for values in lists for x in values if isinstance(x, torch.Tensor) and not isinstance(x, nn.Parameter)]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_is_taken_at_the_start_and_as_said(dtype, average):
    traj = koopt.Trajectory(network(), window=5, stride=2, average=average, dtype=dtype)
    weights = 2 * 4 + 4 + 4 * 3 + 3
    assert traj.nbytes == weights * (5 * dtype.itemsize + average * max(4, dtype.itemsize))
    taken = tensors_of(traj)
    assert sum(taken.values()) == traj.nbytes
    for _ in range(15):
        traj.record()
    traj.forecast(1, method="last", by="node")
    assert tensors_of(traj) == taken


def test_more_memory_than_is_free_is_refused_with_the_numbers(monkeypatch):
    model = nn.Linear(1023, 1024)  # 2^20 weights
    monkeypatch.setattr(module, "free_memory", lambda device: 2**31)
    assert koopt.Trajectory(model, window=512).nbytes == 2**31
    message = (
        r"window: 513 snapshots of 1,048,576 weights in torch.float32 need 2 GiB, cpu has 2 GiB free; take a smaller"
    )
    with pytest.raises(ValueError, match=message):
        koopt.Trajectory(model, window=513)
    with pytest.raises(ValueError, match=r"need 20 GiB, cpu has 2 GiB free"):
        koopt.Trajectory(model, window=2559, dtype=torch.float64, average=True)


def test_free_memory_is_probed():
    free = module.free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert module.free_memory(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window is 0, expected a whole number >= 1"),
        ({"window": True}, "window is True"),
        ({"stride": -2}, "stride is -2, expected a whole number >= 1"),
        ({"dtype": torch.int32}, "dtype is torch.int32, expected one of torch.float16"),
        ({"dtype": torch.complex64}, "dtype is torch.complex64"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        koopt.Trajectory(network(), **settings)


@pytest.mark.parametrize("settings", [{"window": 2.0}, {"stride": "2"}, {"average": 1}, {"dtype": "float32"}], ids=str)
def test_settings_of_wrong_types_are_refused(settings):
    with pytest.raises((TypeError, ValueError)):
        koopt.Trajectory(network(), **settings)


def test_models_that_cannot_be_recorded_are_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        koopt.Trajectory(network().requires_grad_(False))
    with pytest.raises(TypeError, match=r"'0\.weight' is torch.complex64, only real weights"):
        koopt.Trajectory(nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64)))


# forecasts of known motion

EXACT_ON_LINES = [
    ("line", {}),
    ("line", {"span": 3}),
    ("regression", {}),
    ("dema", {}),
    ("dema", {"decay": 0.3}),
    ("koopman", {"difference": True}),
    ("koopman", {"center": True}),
    ("koopman", {}),
]


@pytest.mark.parametrize(("method", "options"), EXACT_ON_LINES, ids=str)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3, 8])
def test_a_straight_line_is_continued_exactly(method, options, stride, average):
    model = network(torch.float64)
    start, slope = flat(model), torch.linspace(-1, 1, flat(model).numel(), dtype=torch.float64)
    traj = koopt.Trajectory(model, window=6, stride=stride, average=average)
    for step in range(1, 10 * stride + 1):
        put(model, start + step * slope)
        traj.record()
        if step < 7 * stride or step % 3:  # a full window, at different places in a block
            continue
        for steps in (0, 1, 2.5, 7 * stride):
            forecast = traj.forecast(steps, method=method, **options)
            found = torch.cat([w.flatten() for w in forecast.values()])
            torch.testing.assert_close(found, start + (step + steps) * slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("by", ["node", "layer", "network"])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_linear_dynamics_are_continued_exactly(stride, average, by):
    model = network(torch.float64)
    generator = torch.Generator().manual_seed(0)
    rates = torch.tensor([0.99, 0.95, 0.9], dtype=torch.float64)
    modes = torch.randn(3, flat(model).numel(), generator=generator, dtype=torch.float64)
    traj = koopt.Trajectory(model, window=7, stride=stride, average=average)
    # a block mean of a decaying mode is the mode at the middle of the block, times this:
    around = torch.arange(stride, dtype=torch.float64) - (stride - 1) / 2
    share = (rates.unsqueeze(-1) ** around).mean(dim=-1) if average else torch.ones_like(rates)
    for step in range(1, 10 * stride):
        put(model, rates**step @ modes)
        traj.record()
    for steps in (0, 1, 3, 4.5, 20):
        if traj.age + steps < stride and (traj.age + steps) % stride:
            continue  # within a step of the operator it interpolates
        found = torch.cat([w.flatten() for w in traj.forecast(steps, by=by, rtol=1e-8).values()])
        expected = (share * rates ** (step + steps)) @ modes
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_steps_to_infinity_reach_the_fixed_point():
    model = network(torch.float64)
    goal, away = flat(model), torch.linspace(1, 2, flat(model).numel(), dtype=torch.float64)
    traj = koopt.Trajectory(model, stride=2)
    for step in range(20):
        put(model, goal + 0.8**step * away)
        traj.record()
    found = torch.cat([w.flatten() for w in traj.forecast(math.inf, rank=2).values()])
    torch.testing.assert_close(found, goal, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("by", "max_size"), [("weight", None), ("node", None), ("node", 3), ("layer", None), ("network", None)]
)
@pytest.mark.parametrize(("method", "options"), METHOD_OPTIONS, ids=str)
@pytest.mark.parametrize("slab", [1, 60, module.SLAB])
def test_forecasts_are_the_rules_applied_to_each_patch(method, options, by, max_size, slab, monkeypatch):
    monkeypatch.setattr(module, "SLAB", slab)
    model, traj = wandered(17, window=5, stride=3)
    snapshots, columns = traj.snapshots(), [p.numel() for p in model.parameters()]
    named = dict(model.named_parameters())
    window = {
        name: piece.reshape(-1, *named[name].shape)
        for name, piece in zip(traj.names, snapshots.split(columns, dim=1), strict=True)
    }
    horizon = (4 + traj.age) / 3
    parts = koopt.partition(model, by, max_size)
    forecasts = []
    for patches in parts.gather(window):
        done = []
        for i in range(patches.shape[1]):
            patch = patches[:, i]
            if method == "koopman":
                fit_options = {name: value for name, value in options.items() if name != "max_modulus"}
                done.append(koopt.fit(patch, **fit_options).forecast(horizon, options.get("max_modulus")))
            else:
                done.append((METHODS[method](patch, horizon, **options) @ patch.double()).float())
        forecasts.append(torch.stack(done))
    expected = parts.scatter(forecasts)
    found = traj.forecast(4, method, by, max_size, **options)
    assert list(found) == list(named)
    for name, weights in found.items():
        torch.testing.assert_close(weights, expected[name], rtol=1e-4, atol=1e-4)


def test_forecast_by_labels():
    _, traj = wandered(9, window=6)
    by_function = traj.forecast(2, by=lambda name, p: name.split(".")[0], rank=2)
    expected = traj.forecast(2, by="layer", rank=2)
    assert all(torch.equal(by_function[name], w) for name, w in expected.items())


def test_forecasts_change_neither_model_nor_window():
    for settings in ({"window": 5}, {"window": 40}, {"window": 5, "stride": 2, "average": True}):
        model, traj = wandered(15, **settings)
        before = flat(model), traj.snapshots(), traj.steps
        for method, options in METHOD_OPTIONS:
            for by in ("network", "node"):
                for steps in (0, 3):
                    first = traj.forecast(steps, method, by, **options)
                    kept = {name: w.clone() for name, w in first.items()}
                    for weights in first.values():
                        weights.fill_(math.nan)
                    again = traj.forecast(steps, method, by, **options)
                    assert all(torch.equal(again[name], w) for name, w in kept.items())
        assert torch.equal(flat(model), before[0])
        assert torch.equal(traj.snapshots(), before[1])
        assert traj.steps == before[2]


def test_what_was_recorded_stays_when_parameters_are_frozen_later():
    model, traj = wandered(9, window=6)
    expected = {by: traj.forecast(2, by=by, rank=2) for by in ("network", "layer")}
    model[0].requires_grad_(False)
    traj.record()
    assert set(traj.forecast(0, by="node")) == set(traj.names)  # cut only now
    model, traj = wandered(9, window=6)
    model[0].requires_grad_(False)
    for by, weights in expected.items():
        found = traj.forecast(2, by=by, rank=2)
        assert all(torch.equal(found[name], w) for name, w in weights.items())


def test_a_replaced_parameter_is_noticed():
    model, traj = wandered(9, window=6)
    model.load_state_dict({name: w.clone() for name, w in model.state_dict().items()})
    traj.forecast(1)
    model.double().float()
    traj.forecast(1)
    model.load_state_dict({name: w.clone() for name, w in model.state_dict().items()}, assign=True)
    with pytest.raises(
        ValueError, match=r"'0\.weight' was replaced after this trajectory was made, as load_state_dict"
    ):
        traj.forecast(1)


FORECAST_REFUSED = [
    ({"steps": 1, "method": "koopmann"}, ValueError, "method is 'koopmann', expected one of koopman, last, mean"),
    (
        {"steps": 1, "ranks": 3},
        TypeError,
        'ranks is not an option of method "koopman", which takes rank, rtol, projected, center, difference, max',
    ),
    ({"steps": 1, "method": "line", "rank": 3}, TypeError, 'rank is not an option of method "line", which takes span'),
    (
        {"steps": 1, "method": "last", "rank": 3},
        TypeError,
        'rank is not an option of method "last", which takes no opt',
    ),
    ({"steps": 1, "method": "line", "times": None}, TypeError, "times is not an option"),
    ({"steps": 1, "horizon": 3}, TypeError, "horizon is not an option"),
    ({"steps": -1}, ValueError, "steps is -1, expected optimizer steps >= 0"),
    ({"steps": math.nan}, ValueError, "steps is nan"),
    ({"steps": True}, TypeError, "steps is bool"),
    ({"steps": 1, "by": "neuron"}, ValueError, "by is 'neuron', expected \"weight\""),
    ({"steps": 1, "max_size": 0}, ValueError, "max_size is 0"),
    ({"steps": 1, "rank": 0}, ValueError, "rank is 0"),
    ({"steps": 1, "rtol": 2.0}, ValueError, "rtol is 2.0"),
    ({"steps": 1, "max_modulus": -1.0}, ValueError, "max_modulus is -1.0"),
    ({"steps": 1, "method": "line", "span": 99}, ValueError, "span is 99"),
    ({"steps": 1, "method": "ema", "decay": 1.5}, ValueError, "decay is 1.5"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), FORECAST_REFUSED, ids=str)
def test_wrong_forecasts_are_refused(arguments, error, message):
    model, traj = wandered(9, window=6)
    before = flat(model), traj.snapshots()
    with pytest.raises(error, match=message):
        traj.forecast(**arguments)
    assert torch.equal(flat(model), before[0])
    assert torch.equal(traj.snapshots(), before[1])


@pytest.mark.parametrize("arguments", [{"steps": "3"}, {"steps": 1, "by": ["node"]}, {"steps": 1, "max_size": [2]}])
def test_forecasts_with_arguments_of_wrong_types_are_refused(arguments):
    _, traj = wandered(9, window=6)
    with pytest.raises((TypeError, ValueError)):
        traj.forecast(**arguments)


def test_a_cached_partition_does_not_let_wrong_arguments_through():
    _, traj = wandered(9, window=6)
    traj.forecast(1, by="node", max_size=1)
    with pytest.raises(ValueError, match="max_size is True"):
        traj.forecast(1, by="node", max_size=True)


@pytest.mark.parametrize("steps", [np.float64(3), 3.0, 3])
def test_steps_of_any_real_type(steps):
    _, traj = wandered(9, window=6)
    expected = traj.forecast(3, rank=2)
    assert all(torch.equal(w, expected[name]) for name, w in traj.forecast(steps, rank=2).items())


def test_too_few_snapshots():
    traj = koopt.Trajectory(network(), stride=5, average=True)
    for _ in range(4):
        traj.record()
        with pytest.raises(ValueError, match="no snapshot has been taken yet; call record"):
            traj.forecast(1)
    traj.record()
    traj.forecast(1, method="last")
    with pytest.raises(ValueError, match="record more"):
        traj.forecast(1)
    for _ in range(5):
        traj.record()
    traj.forecast(1)
    with pytest.raises(ValueError, match="time >= 3 for difference=True"):
        traj.forecast(1, difference=True)


# values that are not finite


@pytest.mark.parametrize("by", ["weight", "node", "layer", "network"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_snapshot_that_is_not_finite_is_named(method, bad, by):
    model, traj = wandered(8, window=5)
    with torch.no_grad():
        model[2].weight[1, 2] = bad
    traj.record()
    with torch.no_grad():
        model[2].weight[1, 2] = 0.0
    traj.record()
    with pytest.raises(ValueError, match=r"snapshots of '2\.weight' hold NaN or Inf"):
        traj.forecast(1, method=method, by=by)
    for _ in range(4):
        traj.record()
    traj.forecast(1, method=method, by=by)  # it has left the window


@pytest.mark.parametrize("by", ["weight", "node", "layer", "network"])
def test_a_forecast_that_is_not_finite_is_refused_by_name(by):
    model = network()
    traj = koopt.Trajectory(model, window=5)
    still = flat(model)
    growing = torch.zeros_like(still)
    growing[8:12] = 1.0  # the first bias
    for step in range(5):
        put(model, still * (growing == 0) + growing * 10.0**step)
        traj.record()
    before = flat(model)
    with pytest.raises(
        ValueError, match=r"forecast of '0\.(bias|weight)' is not finite in torch.float32; take a shorter"
    ):
        traj.forecast(1000, by=by, rtol=1e-4)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("others", [torch.float16, torch.float32], ids=str)
def test_a_forecast_that_overflows_in_the_dtype_of_a_parameter_is_refused(others):
    model = nn.Sequential(nn.Linear(1, 1, bias=False).to(others), nn.Linear(1, 1, bias=False).half())
    traj = koopt.Trajectory(model)
    for value in (20480.0, 40960.0):
        nn.init.constant_(model[1].weight, value)
        traj.record()
    assert traj.forecast(1, method="line")["1.weight"].item() == 61440.0
    with pytest.raises(ValueError, match=r"forecast of '1\.weight' is not finite in torch.float16"):
        traj.forecast(2, method="line")


def test_finite_weights_whose_sum_overflows_are_forecast():
    model = nn.Linear(8, 8).half()
    traj = koopt.Trajectory(model)
    nn.init.constant_(model.weight, 60000.0)
    for _ in range(2):
        traj.record()
    forecast = traj.forecast(3, method="line")
    koopt.load_into(model, forecast)
    assert forecast["weight"].eq(60000.0).all()


# saving and resuming


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("settings", SCHEDULES, ids=str)
@pytest.mark.parametrize("stop", [0, 1, 2, 5, 11, 24])
def test_a_resumed_trajectory_is_the_uninterrupted_one(settings, stop):
    model, generator = network(), torch.Generator().manual_seed(1)
    whole = koopt.Trajectory(model, **settings)
    resumed = None
    for step in range(30):
        if step == stop:
            resumed = koopt.Trajectory(model, **settings)
            resumed.load_state_dict(saved(whole.state_dict()))
        wander(model, generator)
        whole.record()
        if resumed is not None:
            resumed.record()
            assert resumed.steps == whole.steps
            assert resumed.age == whole.age
            assert torch.equal(resumed.snapshots(), whole.snapshots())
            if len(whole):
                expected = whole.forecast(2, method="ema", by="node")
                assert all(torch.equal(w, expected[n]) for n, w in resumed.forecast(2, method="ema", by="node").items())


def test_a_state_is_a_copy_and_replaces_what_was_there():
    model, traj = wandered(9, window=4, stride=2)
    state = traj.state_dict()
    kept = saved(state)
    traj.record()
    traj.record()
    assert torch.equal(state["snapshots"], kept["snapshots"])
    _, other = wandered(14, window=4, stride=2)
    other.load_state_dict(state)
    assert other.steps == 9
    assert torch.equal(other.snapshots(), kept["snapshots"])
    other.load_state_dict(koopt.Trajectory(model, window=4, stride=2).state_dict())
    assert len(other) == 0


def renamed(state):
    shapes = dict(state["shapes"])
    shapes["0.gain"] = shapes.pop("0.weight")
    return {"shapes": shapes}


STATES_REFUSED = {
    "window": (lambda s: {"window": 5}, "recorded with window=5, this trajectory has window=4; make them the same"),
    "stride": (lambda s: {"stride": 3}, "recorded with stride=3, this trajectory has stride=2"),
    "average": (lambda s: {"average": False}, "recorded with average=False, this trajectory has average=True"),
    "other names": (renamed, "recorded with shapes="),
    "other shapes": (lambda s: {"shapes": s["shapes"] | {"0.weight": [2, 4]}}, "recorded with shapes="),
    "other order": (lambda s: {"shapes": dict(reversed(s["shapes"].items()))}, "recorded with shapes="),
    "no shapes": (lambda s: {"shapes": None}, "recorded with shapes=None"),
    "steps missing": ("steps", "steps missing; pass what state_dict"),
    "snapshots missing": ("snapshots", "snapshots missing"),
    "negative steps": (lambda s: {"steps": -1}, "steps is -1, expected a whole number >= 0"),
    "fractional steps": (lambda s: {"steps": 4.5}, "steps is 4.5"),
    "steps of another window": (
        lambda s: {"steps": 3},
        r"snapshots is \(\(4, 27\), torch.float32\) after 3 steps, expect",
    ),
    "fewer snapshots": (lambda s: {"snapshots": s["snapshots"][:3]}, r"snapshots is \(\(3, 27\)"),
    "fewer weights": (lambda s: {"snapshots": s["snapshots"][:, 1:]}, r"snapshots is \(\(4, 26\)"),
    "another dtype": (
        lambda s: {"snapshots": s["snapshots"].double()},
        "torch.float64.* expected .* make dtype the same",
    ),
    "no snapshots": (lambda s: {"snapshots": None}, "snapshots is NoneType"),
    "no sum": (lambda s: {"sum": None}, "sum is NoneType"),
    "another sum": (lambda s: {"sum": s["sum"][1:]}, r"sum is \(\(26,\)"),
}


@pytest.mark.parametrize("case", STATES_REFUSED)
def test_a_state_that_does_not_fit_changes_nothing(case):
    change, message = STATES_REFUSED[case]
    _, traj = wandered(9, window=4, stride=2, average=True)
    model, other = wandered(11, window=4, stride=2, average=True)
    wander(model, torch.Generator().manual_seed(2))
    other.record()
    state = traj.state_dict()
    if isinstance(change, str):
        del state[change]
    else:
        state |= change(state)
    before = other.state_dict()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    after = other.state_dict()
    assert all(
        torch.equal(after[name], value) if isinstance(value, torch.Tensor) else after[name] == value
        for name, value in before.items()
    )


# training


def trained(recorded):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 8), nn.Linear(8, 1)
    )
    model[4].requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    trajectories = []
    if recorded:
        trajectories = [koopt.Trajectory(model, window=6, stride=2), koopt.Trajectory(model, 6, 3, average=True)]
    inputs = torch.randn(32, 2)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = (model(inputs).squeeze(-1) - inputs.prod(dim=1)).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        for traj in trajectories:
            traj.record()
            if step > 20:
                traj.forecast(5, rank=2)
                traj.forecast(5, by="node", method="line")
    return model, losses, trajectories


def test_recording_has_no_effect_on_training():
    model, losses, trajectories = trained(recorded=True)
    plain, plain_losses, _ = trained(recorded=False)
    assert losses == plain_losses
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model[4].parameters())
    assert all(not name.startswith("4.") for name in trajectories[0].names)
    weights = trajectories[0].forecast(3, rank=2)
    koopt.load_into(model, weights)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    model(torch.randn(4, 2)).sum().backward()


# load_into


def weights_of(model):
    return {name: torch.randn(p.shape).to(p.dtype) for name, p in model.named_parameters()}


def test_load_into_writes_in_place():
    model = network()
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    weights = weights_of(model)
    koopt.load_into(model, weights)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert parameter is before[name][0]
        assert parameter.data_ptr() == before[name][1]
        assert parameter.requires_grad
        assert parameter.is_leaf


def test_load_into_takes_any_subset_and_casts():
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    values = torch.randn(4, dtype=torch.float64)
    koopt.load_into(model, {"0.bias": values})
    assert torch.equal(model[0].bias, values.float())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name != "0.bias")
    koopt.load_into(model, {})
    koopt.load_into(model, {"0.bias": torch.ones(4, dtype=torch.int64)})
    assert torch.equal(model[0].bias, torch.ones(4))
    koopt.load_into(model, dict(network().named_parameters()))  # values that require gradients
    assert model[0].bias.grad_fn is None
    frozen = network().requires_grad_(False)
    koopt.load_into(frozen, {"0.bias": values})
    assert torch.equal(frozen[0].bias, values.float())


LOADS_REFUSED = {
    "unknown name": ({"2.biass": torch.zeros(3)}, KeyError, r"no parameter '2\.biass'"),
    "a buffer": ({"running_mean": torch.zeros(3)}, KeyError, "no parameter 'running_mean'"),
    "wrong shape": ({"2.bias": torch.zeros(4)}, ValueError, r"\['2.bias'\] has shape \(4,\), expected .* \(3,\)"),
    "broadcasts": ({"2.bias": torch.zeros(1)}, ValueError, r"\['2.bias'\] has shape \(1,\)"),
    "nan": (
        {"2.bias": torch.tensor([0, math.nan, 0])},
        ValueError,
        r"\['2.bias'\] holds NaN or Inf \(in torch.float16",
    ),
    "inf": ({"2.bias": torch.tensor([math.inf, -math.inf, 0])}, ValueError, r"\['2.bias'\] holds NaN or Inf"),
    "overflow": (
        {"2.bias": torch.tensor([0.0, 0.0, 7e4])},
        ValueError,
        r"\['2.bias'\] holds NaN or Inf \(in torch.float16",
    ),
    "complex": ({"2.bias": torch.zeros(3, dtype=torch.complex64)}, TypeError, r"\['2.bias'\] is torch.complex64"),
}


@pytest.mark.parametrize("case", LOADS_REFUSED)
def test_load_into_writes_all_or_none(case):
    bad, error, message = LOADS_REFUSED[case]
    model = network(torch.float16)
    before = flat(model)
    good = {name: w for name, w in weights_of(model).items() if name != "2.bias"}
    with pytest.raises(error, match=message):
        koopt.load_into(model, good | bad)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("bad", [[0.0, 0.0, 0.0], np.zeros(3), 1.0, None], ids=lambda bad: type(bad).__name__)
def test_load_into_refuses_what_is_no_tensor(bad):
    model = network()
    before = flat(model)
    with pytest.raises((TypeError, ValueError)):
        koopt.load_into(model, weights_of(model) | {"2.bias": bad})
    assert torch.equal(flat(model), before)


def test_load_into_a_complex_model():
    model = nn.Linear(2, 1, dtype=torch.complex64)
    koopt.load_into(model, {"bias": torch.tensor([1 + 2j])})
    assert model.bias.item() == 1 + 2j
    with pytest.raises(ValueError, match=r"\['bias'\] holds NaN or Inf \(in torch.complex64"):
        koopt.load_into(model, {"bias": torch.tensor([complex(0.0, math.inf)])})


def test_load_into_tied_names():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    koopt.load_into(model, {"1.weight": values})
    assert torch.equal(model[0].weight, values)
    koopt.load_into(model, {"0.weight": values + 1, "1.weight": values + 1})
    assert torch.equal(model[1].weight, values + 1)
    with pytest.raises(ValueError, match=r"weights\['1.weight'\] is tied to another name with other values"):
        koopt.load_into(model, {"0.weight": values, "1.weight": values + 1})
    assert torch.equal(model[0].weight, values + 1)


def test_load_into_from_the_parameters_themselves():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, second = model[0].weight.detach().clone(), model[1].weight.detach().clone()
    koopt.load_into(model, {"0.weight": model[1].weight, "1.weight": model[0].weight})
    assert torch.equal(model[0].weight, second)
    assert torch.equal(model[1].weight, first)
    koopt.load_into(model, {"0.weight": model[0].weight.t()})
    assert torch.equal(model[0].weight, second.t())


def test_load_into_tells_autograd():
    model = network()
    loss = model(torch.ones(1, 2)).sum()
    koopt.load_into(model, weights_of(model))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# plans


def recorded(path, **options):
    """A trajectory of a two-weight model that went along `path` `(steps, 2)`."""
    model = nn.Linear(2, 1, bias=False).double()
    traj = koopt.Trajectory(model, window=len(path), **options)
    for weights in path:
        koopt.load_into(model, {"weight": weights[None]})
        traj.record()
    return model, traj


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"stride": 3, "average": True}], ids=str)
def test_a_plan_counts_optimizer_steps_from_the_last_recorded_one(options):
    steps = torch.arange(60, dtype=torch.float64)[:, None]
    path = steps * torch.tensor([1.0, -2.0], dtype=torch.float64)
    _, traj = recorded(path, **options)
    found = traj.plan(6)
    assert found.reason == "ok"
    assert found.horizon == (6 + traj.age) / traj.stride
    torch.testing.assert_close(traj.follow(found)["weight"][0], path[-1] * 65 / 59)


def test_a_plan_that_refuses_leads_nowhere_and_an_old_one_is_refused():
    path = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, traj = recorded(path)
    found = traj.plan()
    assert (found.horizon, found.reason[:5]) == (0, "noise")
    assert torch.equal(traj.follow(found)["weight"][0], path[-1])
    shorter = recorded(path[:30])[1].plan()
    with pytest.raises(ValueError, match="the plan was made from 30, got 40"):
        traj.follow(shorter)


def test_a_plan_needs_snapshots():
    with pytest.raises(ValueError, match="record more"):
        recorded(torch.zeros(3, 2, dtype=torch.float64))[1].plan()
