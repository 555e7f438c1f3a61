"""Live runs on a CUDA device: what holds on the CPU holds there, and recording does not wait for the device."""

import contextlib
import math
import warnings

import pytest
import torch
from live_tasks import LOOPS, STATEFUL, Task, adam, flat, resumable, resumed, saved, sgd
from torch import nn
from torch.nn.functional import mse_loss

import koopt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CUDA_LOOPS = LOOPS | {
    "capturable": {"make": lambda m: adam(m, capturable=True)},
    "capturable fused": {"make": lambda m: adam(m, capturable=True, fused=True)},
    "rate on the device": {"make": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.01, device="cuda"))},
    "float16": {"make": adam, "half": torch.float16, "scaler": True},
    "bfloat16": {"make": adam, "half": torch.bfloat16},
    "inductor": {"make": adam, "compiled": {}},
    "graphs": {"make": adam, "compiled": {"mode": "reduce-overhead"}},
}
SNAPSHOTS = {"there": {}, "on the cpu": {"device": "cpu"}, "bfloat16": {"dtype": torch.bfloat16}}


@contextlib.contextmanager
def quiet():
    """torch.compile warns of what this device could do better, and of its own deprecated parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def task(name, **more):
    return Task(**(CUDA_LOOPS[name] if name in CUDA_LOOPS else STATEFUL | {"steps": 60}), device="cuda", **more)


@pytest.mark.parametrize("options", SNAPSHOTS.values(), ids=SNAPSHOTS)
@pytest.mark.parametrize("name", [*CUDA_LOOPS, "dropout and batch norm"])
def test_a_run_whose_jumps_are_all_refused_is_the_run_without_koopt(name, options):
    with quiet():
        plain = task(name).run().bits
        refused = task(name)

        def guard():
            loss = refused.loss()  # draws random numbers, moves running statistics
            loss.backward()
            torch.rand(3, device="cuda")
            return 1.0 + 0.0 * loss.item()

        history = 0 if name.startswith("closure") else 8  # L-BFGS takes none
        koop = refused.attach(guard=guard, mode="jump", history=history, **options)
        assert refused.run().bits == plain
    assert len(koop.jumps) >= 2
    assert all(not jump.accepted for jump in koop.jumps)
    assert any(jump.evaluations >= 2 for jump in koop.jumps)


@pytest.mark.parametrize("options", SNAPSHOTS.values(), ids=SNAPSHOTS)
@pytest.mark.parametrize("name", [name for name in CUDA_LOOPS if name != "closure wolfe"])
def test_every_kind_of_loop_jumps(name, options):
    with quiet():
        run = task(name)
        koop = run.attach(guard=run.loss, mode="jump", **options)
        seen = []
        koop.on_jump(lambda jump: seen.append((jump, run.loss().item())))
        run.run()
    assert any(jump.accepted for jump in koop.jumps)
    for jump, now in seen:
        assert now == (jump.after if jump.accepted else jump.before)
        assert not jump.accepted or jump.after < jump.before


def test_jumps_are_those_of_the_cpu():
    """The same forecasters, ranks and horizons in float64, while rounding has not grown."""
    found = []
    for device in ("cpu", "cuda"):
        run = Task(adam, device=device)
        run.model.double()
        run.x, run.y = run.x.double(), run.y.double()
        koop = run.attach(guard=run.loss, mode="jump")
        run.run(40)
        found.append((koop.jumps, flat(run.model).cpu()))
    (own, here), (others, there) = found
    assert any(jump.accepted for jump in own)
    for a, b in zip(own, others, strict=True):
        named = ("step", "forecaster", "rank", "horizon", "accepted")
        assert [getattr(a, name) for name in named] == [getattr(b, name) for name in named]
        assert a.after == pytest.approx(b.after, rel=1e-6)
    torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-8)


def test_steps_along_secants_are_accepted():
    run = Task(adam, device="cuda", steps=120)
    koop = run.attach(guard=run.loss, history=8, cycle=100, tail=30, max_overhead=1.0)
    run.run()
    along = [jump for jump in koop.jumps if jump.forecaster == "secants" and jump.accepted]
    assert along
    assert all(jump.after < jump.before for jump in along)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("mode", ["jump", "forecast", "auto"])
@pytest.mark.parametrize("name", ["adam foreach", "adamw fused", "capturable"])
def test_recording_does_not_wait_for_the_device(name, mode):
    """Between attempts nothing is read from the device, which would stop its queue of kernels at each step."""
    run = task(name)
    run.attach(guard=run.loss, mode=mode, cycle=200, tail=30, history=8 if mode != "forecast" else 0)
    run.step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 19):
            run.step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_that_the_scaler_skipped_inside_is_not_used():
    run = task("scaler fused")
    koop = run.attach(guard=run.loss, mode="jump", cycle=24, tail=24, max_overhead=1.0)
    run.run(24)  # the step at 20 finds an infinite gradient
    (jump,) = koop.jumps
    assert jump.evaluations >= 2


@pytest.mark.parametrize("options", SNAPSHOTS.values(), ids=SNAPSHOTS)
@pytest.mark.parametrize("guarded", [False, True])
def test_forecast_weights_and_back(guarded, options):
    run = Task(**STATEFUL, device="cuda")
    koop = run.attach(guard=run.loss if guarded else None, mode="forecast", refresh=lambda: run.model(run.x), **options)
    run.run(100)
    forecast, before = koop.forecast(), run.bits
    assert all(weights.is_cuda for weights in forecast.values())
    with torch.random.fork_rng(devices=["cuda"]), koop.forecast_weights():
        for name, parameter in run.model.named_parameters():
            assert torch.equal(parameter, forecast[name])
        assert math.isfinite(run.loss().item())
    assert run.bits == before


@pytest.mark.parametrize("momentum", ["keep", "reset", "scale", "combine"])
@pytest.mark.parametrize("at", [5, 31])
def test_a_resumed_run_is_the_uninterrupted_one(at, momentum):
    whole, koop = resumable("cuda", momentum=momentum, history=8)
    for step in range(80):
        if step == at:
            state = saved(whole, koop)
        whole.step(step)
    other, _ = resumed(state, "cuda", momentum=momentum, history=8)
    for step in range(at, 80):
        other.step(step)
    assert other.bits == whole.bits
    assert any(jump.accepted for jump in koop.jumps)


def test_a_run_moves_between_devices():
    """A state of the GPU goes on on the CPU, and the other way, to rounding."""
    ends = {}
    for first, second in (("cuda", "cpu"), ("cpu", "cuda"), ("cpu", "cpu")):
        run, koop = resumable(first)
        run.run(30)
        state = saved(run, koop)
        other, again = resumed(state, second)
        for step in range(30, 40):
            other.step(step)
        ends[first, second] = flat(other.model).cpu()
        assert again.steps == 40
    torch.testing.assert_close(ends["cuda", "cpu"], ends["cpu", "cpu"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ends["cpu", "cuda"], ends["cpu", "cpu"], rtol=1e-3, atol=1e-4)


def test_too_large_a_window_is_refused_by_what_the_device_has_left():
    run = Task(sgd, device="cuda")
    with pytest.raises(ValueError, match=r"window: .* GiB free; take a smaller window"):
        run.attach(window=2**40)


def test_memory_is_what_is_stated():
    """Held between steps: `nbytes`; in an attempt some copies of the weights more, and pieces in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 2048), nn.Tanh(), nn.Linear(2048, 512)).cuda()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    x, y = torch.randn(2, 64, 512, device="cuda")

    def step():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()

    step()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    koop = koopt.attach(optimizer, model, lambda: mse_loss(model(x), y), "jump", cycle=40, max_overhead=9.0)
    slack = 1 << 20
    assert torch.cuda.memory_allocated() - held == pytest.approx(koop.nbytes, abs=slack)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(39):
        step()
    before = torch.cuda.max_memory_allocated()
    step()
    assert koop.jumps[-1].accepted
    more = (torch.cuda.max_memory_allocated() - before) / weights
    assert torch.cuda.memory_allocated() - held <= koop.nbytes + slack
    assert more < 6


@pytest.mark.parametrize("name", ["adam foreach", "adamw fused", "capturable", "rate on the device", "scaler fused"])
def test_moves_in_eigenbases_are_those_of_the_cpu(name):
    moved = {}
    for device in ("cpu", "cuda"):
        own = name if device == "cuda" or name in LOOPS else "adam single"
        run = Task(**CUDA_LOOPS[own], device=device)
        koop = run.attach(precondition=256)
        run.run()
        assert koop.preconditioned == 51 - (name == "scaler fused")
        moved[device] = flat(run.model).cpu()
    assert torch.allclose(moved["cpu"], moved["cuda"], atol=1e-3)
