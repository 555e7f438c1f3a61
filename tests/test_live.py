"""A run with koopt against the same run without it, bit for bit; jumps and forecasts against what the guard says."""

import io
import json
import logging
import math
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import koopt
from koopt.live.candidates import FAMILIES, Choice, Proposer, combined, moved, roughness
from koopt.live.evaluating import FORECASTS
from koopt.live.guard import untouched
from koopt.live.jumps import Schedule
from koopt.live.window import BlockMeans, Snapshots

ROOT = Path(__file__).parent.parent
SHORT = {"cycle": 12, "tail": 8, "window": 8, "max_overhead": 0.2}


def network(dtype=torch.float32, extra=()):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), *extra, nn.Linear(8, 1)).to(dtype)


def data(dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 3, generator=generator, dtype=torch.float64)
    return x.to(dtype), (x[:, :1] * x[:, 1:2]).sin().to(dtype)


def flat(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def bits(model, optimizer):
    """Everything that a run leaves behind, as bytes."""
    stream = io.BytesIO()
    tensors = [*model.state_dict().values()]
    for state in optimizer.state_dict()["state"].values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    tensors += [torch.tensor([group["lr"] for group in optimizer.param_groups]), torch.get_rng_state()]
    for tensor in tensors:
        stream.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return stream.getvalue()


class Task:
    """A training run by a user's own loop, in one of its many forms."""

    def __init__(self, make, extra=(), steps=60, compiled=False, **loop):
        self.make, self.steps, self.loop = make, steps, loop
        self.model = network(extra=[part() for part in extra])
        if loop.get("frozen"):
            self.model[0].bias.requires_grad_(False)
        if loop.get("unused"):
            self.model.register_parameter("unused", nn.Parameter(torch.ones(2)))
            self.model.register_parameter("outside", nn.Parameter(torch.ones(2)))
        self.called = torch.compile(self.model, backend="eager") if compiled else self.model
        self.optimizer = make(self.model)
        self.x, self.y = data()
        rate = torch.optim.lr_scheduler
        self.scheduler = rate.OneCycleLR(self.optimizer, 0.05, total_steps=steps + 1) if loop.get("onecycle") else None
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8) if loop.get("scaler") else None

    def loss(self):
        return mse_loss(self.called(self.x), self.y)

    def closure(self):
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def run(self, steps=None):
        torch.manual_seed(5)
        for step in range(steps or self.steps):
            self.step(step)
        return self

    def step(self, step):
        if self.loop.get("closure"):
            self.optimizer.step(self.closure)
            return
        self.optimizer.zero_grad()
        for _ in range(self.loop.get("accumulate", 1)):
            loss = self.loss()
            if self.scaler:
                loss = self.scaler.scale(loss * (math.inf if step == 20 else 1.0))
            loss.backward()
        if self.loop.get("clip"):
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()

    @property
    def bits(self):
        return bits(self.model, self.optimizer)

    def attach(self, **options):
        return koopt.attach(self.optimizer, self.called, **(SHORT | options))


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **({"lr": 0.05, "momentum": 0.9} | options))


def adam(model, **options):
    return torch.optim.Adam(model.parameters(), lr=0.01, **options)


def two_groups(model):
    first, last = model[0].parameters(), model[-1].parameters()
    return torch.optim.AdamW([{"params": first, "lr": 0.002}, {"params": last, "weight_decay": 0.1}], lr=0.01)


LOOPS = {
    "sgd": {"make": sgd},
    "sgd foreach": {"make": lambda m: sgd(m, foreach=True)},
    "sgd fused": {"make": lambda m: sgd(m, fused=True)},
    "adam single": {"make": lambda m: adam(m, foreach=False)},
    "adam foreach": {"make": lambda m: adam(m, foreach=True)},
    "adamw fused": {"make": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True)},
    "onecycle": {"make": adam, "onecycle": True},
    "accumulation": {"make": adam, "accumulate": 3},
    "clipping": {"make": sgd, "clip": True},
    "groups": {"make": two_groups},
    "frozen": {"make": adam, "frozen": True},
    "unused": {"make": lambda m: torch.optim.Adam([*m[0].parameters(), *m[-1].parameters(), m.unused]), "unused": True},
    "closure": {"make": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.02, max_iter=1), "closure": True},
    "scaler": {"make": adam, "scaler": True},
    "scaler fused": {"make": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, fused=True), "scaler": True},
    "compiled": {"make": adam, "compiled": True},
}
STATEFUL = {"make": adam, "extra": (nn.Dropout, lambda: nn.BatchNorm1d(8))}


@pytest.mark.parametrize("name", LOOPS)
def test_recording_changes_no_bit(name):
    plain = Task(**LOOPS[name]).run().bits
    recorded = Task(**LOOPS[name])
    koop = recorded.attach()
    assert recorded.run().bits == plain
    assert koop.steps == 60 - ("scaler" in name)  # the step that found an infinite gradient was skipped
    assert not koop.jumps


@pytest.mark.parametrize("name", [*LOOPS, "dropout and batch norm"])
def test_a_run_whose_jumps_are_all_refused_is_the_run_without_koopt(name):
    loop = STATEFUL | {"steps": 60} if name not in LOOPS else LOOPS[name]
    plain = Task(**loop).run().bits
    refused = Task(**loop)

    def guard():
        loss = refused.loss()  # draws random numbers, moves running statistics
        loss.backward()
        refused.model.eval()
        torch.rand(3)
        return 1.0 + 0.0 * loss.item()

    koop = refused.attach(guard=guard, mode="jump")
    assert refused.run().bits == plain
    assert refused.model.training
    assert len(koop.jumps) >= 2
    assert all(not jump.accepted and jump.evaluations >= 2 for jump in koop.jumps)


@pytest.mark.parametrize("name", LOOPS)
def test_every_kind_of_loop_jumps(name):
    task = Task(**LOOPS[name])
    koop = task.attach(guard=task.loss, mode="jump")
    seen = []
    koop.on_jump(lambda jump: seen.append((jump, task.loss().item())))
    task.run()
    accepted = [jump for jump in koop.jumps if jump.accepted]
    assert accepted
    assert [jump for jump, _ in seen] == koop.jumps
    for jump, now in seen:
        assert now == (jump.after if jump.accepted else jump.before)
        if jump.accepted:
            assert jump.after < jump.before
            assert jump.reason == "better"
    if task.loop.get("frozen"):
        assert torch.equal(task.model[0].bias, network()[0].bias)
    if task.loop.get("unused"):
        assert torch.equal(task.model.outside, torch.ones(2))


def test_a_wrapped_optimizer():
    class Wrapper(torch.optim.Optimizer):  # as Accelerate's: hooks on the wrapper itself are never called
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, closure=None):
            self.optimizer.step(closure)

    task = Task(sgd)
    task.optimizer = Wrapper(task.optimizer)
    koop = task.attach()
    task.optimizer.zero_grad = lambda: None
    task.run(steps=3)
    assert koop.steps == 3


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    def run(guard, attached=True):
        AcceleratorState._reset_state(True)
        task = Task(sgd)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, optimizer = accelerator.prepare(task.model, task.optimizer)
        koop = None
        if attached:
            koop = koopt.attach(optimizer, model, (lambda: 1.0) if guard is None else task.loss, "jump", **SHORT)
        for _ in range(60):
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                accelerator.backward(mse_loss(model(task.x), task.y))
                optimizer.step()
        return task.bits, koop

    plain, _ = run(None, attached=False)
    refused, koop = run(None)
    assert refused == plain
    assert koop.steps == 30
    assert koop.jumps
    assert any(jump.accepted for jump in run("loss")[1].jumps)


def test_the_phantom_step_of_distributed_checkpoints_is_not_recorded():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    task = Task(adam)
    koop = task.attach()
    before = flat(task.model)
    get_optimizer_state_dict(task.model, task.optimizer)
    assert task.optimizer.state
    assert koop.steps == 0
    assert torch.equal(flat(task.model), before)


def test_attach_twice_is_refused_and_detach_leaves_no_trace():
    task = Task(sgd)
    optimizer = task.optimizer
    before = {name: len(value) for name, value in vars(optimizer).items() if "hooks" in name}
    koop = task.attach(with_optimizer=True, guard=task.loss)
    with pytest.raises(ValueError, match=r"attached to it already; use that handle, or detach\(\)"):
        task.attach()
    task.run(steps=3)
    assert koop.steps == 3
    koop.detach()
    koop.detach()
    task.run(steps=3)
    assert koop.steps == 3
    assert {name: len(value) for name, value in vars(optimizer).items() if "hooks" in name} == before
    assert optimizer.state_dict().keys() == {"state", "param_groups"}
    assert task.attach().steps == 0


def test_nothing_is_kept_in_the_optimizer():
    plain, beside = Task(adam).run(), Task(adam)
    beside.attach(guard=beside.loss, mode="jump")
    beside.run()
    assert repr(beside.optimizer.state_dict()["param_groups"]) == repr(plain.optimizer.state_dict()["param_groups"])
    for own, other in zip(beside.optimizer.state.values(), plain.optimizer.state.values(), strict=True):
        assert own.keys() == other.keys()


# the recorded windows


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 9, 33, 64, 65, 127, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_means_against_all_copies(steps, dtype):
    copies = torch.randn(steps, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    means = BlockMeans(
        [torch.zeros(2, dtype=dtype), torch.zeros(3, dtype=dtype)], 8, torch.float64, torch.device("cpu")
    )
    for row in copies:
        means.add([row[:2], row[2:]])
    blocks = steps // means.block
    expected = copies[: blocks * means.block].double().view(blocks, means.block, 5).mean(dim=1)
    if means.block <= 8:
        torch.testing.assert_close(means.ordered(), expected, rtol=1e-12, atol=1e-12)
        assert means.age == steps - 1 - (blocks * means.block - (means.block + 1) / 2)
    assert means.block == 1 if steps < 8 else 4 <= blocks < 8
    assert math.log2(means.block) % 1 == 0


def test_long_blocks_are_sampled_evenly():
    """Of a drift a mean tells the time: the last one's age is right, and the others lie a block apart."""
    means = BlockMeans([torch.zeros(1)], 8, torch.float64, torch.device("cpu"))
    for step in range(3_000):
        means.add([torch.tensor([float(step)])])
    assert (means.block, means.stride) == (512, 64)
    rows = means.ordered().flatten()
    assert 2_999 - means.age == pytest.approx(rows[-1].item(), abs=0)
    torch.testing.assert_close(rows.diff(), torch.full((4,), 512.0, dtype=torch.float64), rtol=0.1, atol=0)


def test_snapshots_keep_the_last():
    held = Snapshots([torch.zeros(2)], 3, torch.float32, torch.device("cpu"))
    for value in range(5):
        held.add([torch.full((2,), float(value))])
        assert held.ordered()[:, 0].tolist() == list(range(max(0, value - 2), value + 1))


def test_memory_is_bounded_stated_and_of_the_dtype_asked_for():
    task = Task(sgd)
    size = flat(task.model).numel()
    koop = task.attach(dtype=torch.bfloat16, guard=task.loss)
    assert koop.nbytes == size * (2 * (8 + 8) + 4)
    before = koop.nbytes
    task.run(steps=100)
    assert koop.nbytes == before
    koop.detach()
    assert task.attach(guard=task.loss, mode="jump", momentum="combine").nbytes == size * 4 * (8 + 8)
    assert len(koop.forecast()) == 4


# forecasts


def test_before_enough_data_the_forecast_is_the_weights_then_the_average():
    task = Task(sgd)
    koop = task.attach(window=56)
    named = dict(task.model.named_parameters())
    assert all(torch.equal(value, named[name]) for name, value in koop.forecast().items())
    copies = []
    for step in range(20):
        task.step(step)
        copies.append(flat(task.model))
    forecast = torch.cat([value.double().flatten() for value in koop.forecast().values()])
    torch.testing.assert_close(forecast, torch.stack(copies[-5:]).mean(dim=0), rtol=1e-6, atol=1e-7)


def test_the_rule_follows_a_decay_better_than_any_average():
    """Weights that decay to a limit, with noise: the operator is nearer to the limit than what was recorded."""
    torch.manual_seed(0)
    model = nn.Linear(40, 1, bias=False)
    limit, away = torch.randn(1, 40), torch.randn(1, 40)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    koop = koopt.attach(optimizer, model)
    model.weight.grad = torch.zeros_like(model.weight)
    for step in range(800):
        with torch.no_grad():
            model.weight.copy_(limit + away * math.exp(-step / 400) + 0.05 * torch.randn(1, 40))
        optimizer.step()
    ahead = (koop.forecast()["weight"] - limit).norm()
    with torch.no_grad():
        held = torch.stack([limit + away * math.exp(-step / 400) for step in range(600, 800)]).mean(dim=0)
    assert ahead < 0.6 * (held - limit).norm()
    now = (limit + away * math.exp(-800 / 400) - limit).norm()
    for steps in (200, 400):
        truth = limit + away * math.exp(-(800 + steps) / 400)
        assert (koop.forecast(steps)["weight"] - truth).norm() < 0.35 * now


@pytest.mark.parametrize("mode", ["auto", "jump", "forecast"])
def test_with_a_guard_the_forecast_is_never_worse_than_the_weights(mode):
    task = Task(lambda m: sgd(m, lr=0.3))
    koop = task.attach(guard=task.loss, mode=mode, window=32, cycle=1000)
    for step in range(45):
        task.step(step)
        if step % 5:
            continue
        before = task.bits
        now = task.loss().item()
        with koop.forecast_weights():
            assert task.loss().item() <= now
        assert task.bits == before
        koop.forecast(7)
    assert koop.steps == 45


def test_forecast_weights_puts_everything_back():
    task = Task(**STATEFUL)
    koop = task.attach()
    task.run(steps=30)
    before, forecast = task.bits, koop.forecast()
    random = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), koop.forecast_weights():  # noqa: PT012
        assert all(torch.equal(p, forecast[name]) for name, p in task.model.named_parameters())
        task.model(task.x)  # moves the statistics of batch norm
        with pytest.raises(RuntimeError, match=r"optimizer.step\(\) within forecast_weights\(\)"):
            task.optimizer.step()
        with pytest.raises(RuntimeError, match=r"held by forecast_weights\(\)"), koop.forecast_weights():
            pass
        with pytest.raises(RuntimeError, match="held by"):
            koop.forecast()
        1 / 0  # noqa: B018
    torch.set_rng_state(random)
    assert task.bits == before
    task.optimizer.step()  # is allowed again


def test_forecasts_of_weights_that_are_not_finite_are_those_weights():
    task = Task(sgd)
    koop = task.attach(guard=lambda: 1.0)
    task.run(steps=40)
    with torch.no_grad():
        task.model[0].weight[0, 0] = math.nan
    for _ in range(3):
        task.optimizer.step()
    found = koop.forecast()
    assert torch.equal(found["0.bias"], task.model[0].bias)
    assert koop.forecast(5).keys() == found.keys()


# jumps


class Bowl:
    """A quadratic, whose gradient descent is a linear system: jumps have known answers."""

    def __init__(self, rates=(1.0, 0.1, 0.02), dtype=torch.float64, **options):
        self.model = nn.Linear(len(rates), 1, bias=False).to(dtype)
        nn.init.ones_(self.model.weight)
        self.rates = torch.tensor(rates, dtype=dtype)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.2, momentum=options.pop("beta", 0.0))
        guard = options.pop("guard", self.loss)
        self.koop = koopt.attach(self.optimizer, self.model, guard, **({"mode": "jump", "max_overhead": 1.0} | options))

    def loss(self):
        return (self.rates * self.model.weight.square()).sum()

    def step(self):
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def run(self, steps):
        for _ in range(steps):
            self.step()


def test_a_jump_lands_where_a_linear_system_would():
    bowl = Bowl(cycle=40, tail=20, max_overhead=1.0)
    for _ in range(40):
        bowl.step()
    (jump,) = bowl.koop.jumps
    assert jump.accepted
    assert (jump.step, jump.evaluations, jump.before) == (
        40,
        16,
        pytest.approx(0.1 * 0.96**80 + 0.02 * 0.992**80, rel=1e-6),
    )
    # of the horizons tried the farthest is the best here, and the operator is exact
    assert jump.after < 0.3 * jump.before
    assert jump.after == bowl.loss().item()


def test_nothing_but_a_strictly_better_loss_is_accepted():
    for change in (0.0, 1.0, math.nan, math.inf):
        calls = []

        def guard(change=change, calls=calls):
            calls.append(1)
            return 1.0 if len(calls) == 1 else 1.0 + change

        bowl = Bowl(cycle=20, tail=10, guard=guard)
        before = None
        for _ in range(20):
            bowl.step()
            before = bowl.model.weight.detach().clone() if bowl.koop.steps == 19 else before
        after = before * (1 - 0.4 * bowl.rates)
        torch.testing.assert_close(bowl.model.weight.detach(), after, rtol=1e-15, atol=0)
        assert not bowl.koop.jumps[0].accepted
        assert bowl.koop.jumps[0].reason == "no candidate was better"


def test_weights_that_overflow_are_never_written():
    seen = []
    bowl = Bowl(rates=(0.1, 0.1), dtype=torch.float16, cycle=12, tail=12, max_overhead=1.0)

    def guard():
        assert bool(bowl.model.weight.isfinite().all())
        seen.append(bowl.model.weight.detach().clone())
        return -bowl.model.weight.abs().sum().item()  # the farther out the better

    bowl.koop.detach()
    koop = koopt.attach(bowl.optimizer, bowl.model, guard, "jump", cycle=12, tail=12, max_overhead=2.0)
    for _ in range(12):
        with torch.no_grad():
            bowl.model.weight.mul_(2.3)  # to the edge of float16
        bowl.model.weight.grad = torch.zeros_like(bowl.model.weight)
        bowl.optimizer.step()
    assert len(seen) > 1
    assert bool(bowl.model.weight.isfinite().all())
    assert koop.jumps[0].evaluations < 16  # some candidates were not even tried


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_the_guard_restores_the_weights_and_passes_on(error):
    task, plain = Task(**STATEFUL), Task(**STATEFUL)
    calls = []

    def guard():
        calls.append(1)
        loss = task.loss()
        if len(calls) == 3:
            raise error
        return loss

    task.attach(guard=guard, mode="jump", cycle=20, tail=10)
    plain.run(steps=20)
    with pytest.raises(error):
        task.run(steps=20)
    assert task.bits == plain.bits
    assert task.model[0].weight.grad is not None


def test_the_guard_may_not_step():
    bowl = Bowl(cycle=10, tail=6)
    bowl.koop.detach()

    def guard():
        bowl.optimizer.step()
        return 1.0

    koopt.attach(bowl.optimizer, bowl.model, guard, "jump", cycle=10, tail=6, max_overhead=1.0)
    with pytest.raises(RuntimeError, match=r"optimizer.step\(\) within a jump's guard"):
        bowl.run(10)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.ones(3), r"guard returned a tensor of shape \(3,\), expected the loss .*reduce it"),
        ("low", "guard returned 'low', expected the loss as a float or a 0-d tensor"),
        (None, "guard returned None"),
        (True, "guard returned True"),
        (math.nan, "guard returned nan at the weights as they are, expected a finite loss"),
    ],
)
def test_a_guard_that_returns_no_loss_is_refused_at_its_first_call(returned, message):
    bowl = Bowl(cycle=10, tail=6, guard=lambda: returned)
    with pytest.raises((TypeError, ValueError), match=message):
        bowl.run(10)
    assert bool(bowl.model.weight.isfinite().all())


def test_a_guard_that_later_turns_nan_is_no_error():
    losses = iter([1.0] * 2 + [math.nan] * 100)
    bowl = Bowl(cycle=10, tail=6, guard=lambda: next(losses), max_overhead=0.07)
    for _ in range(40):
        bowl.step()
    assert bowl.koop.jumps[-1].reason == "the guard is nan at the weights as they are"


def test_attempts_grow_rare_while_they_fail_and_stay_within_the_budget():
    bowl = Bowl(cycle=10, tail=6, guard=lambda: 1.0, max_overhead=0.1)
    for _ in range(1000):
        bowl.step()
        spent = sum(jump.evaluations for jump in bowl.koop.jumps)
        assert spent / 3 <= 0.1 * bowl.koop.steps + 1e-9
    steps = [jump.step for jump in bowl.koop.jumps]
    assert steps == [10, 30, 70, 150, 310, 470, 630, 790, 950]


def test_the_schedule_counts_without_rounding_away():
    schedule = Schedule(cycle=10, max_overhead=0.1)
    assert [schedule.allowed(steps) for steps in (9, 10, 20, 1000)] == [2, 3, 6, 16]
    schedule.evaluations = 3
    assert schedule.allowed(20) == 3


def test_a_budget_of_nothing_never_calls_the_guard():
    bowl = Bowl(cycle=10, tail=6, guard=lambda: 1 / 0, max_overhead=0.0)
    for _ in range(50):
        bowl.step()
    assert {jump.reason for jump in bowl.koop.jumps} == {"budget: max_overhead=0 allows no candidate yet"}


def test_jump_by_hand():
    bowl = Bowl(cycle=1000, tail=20, max_overhead=0.0)
    for _ in range(990):
        bowl.step()
    jump = bowl.koop.jump()
    assert jump.accepted
    assert jump is bowl.koop.jumps[-1]
    assert bowl.koop.jump().reason.startswith("too few snapshots: 0")


@pytest.mark.parametrize("policy", ["keep", "reset", "scale", "combine"])
def test_momentum_after_a_jump(policy):
    bowl = Bowl(cycle=30, tail=10, max_overhead=1.0, beta=0.5, momentum=policy)
    recorded, weights = [], []
    for _ in range(29):
        bowl.step()
        weights.append(bowl.model.weight.detach().clone())
        recorded.append(bowl.optimizer.state[bowl.model.weight]["momentum_buffer"].clone())
    gradient = 2 * bowl.rates * weights[-1]
    kept = 0.5 * recorded[-1] + gradient
    weights.append(weights[-1] - 0.2 * kept)
    bowl.step()
    (jump,) = bowl.koop.jumps
    assert jump.accepted
    momentum = bowl.optimizer.state[bowl.model.weight]["momentum_buffer"]
    if policy == "combine":
        window = torch.cat(weights[-10:])
        far = math.isinf(jump.horizon)
        same = [c for c in FAMILIES if (c.method, c.rank) == (jump.forecaster, jump.rank)]
        (family,) = (c for c in same if math.isinf(c.horizon) == far)
        coefficients = Proposer(window).coefficients(family._replace(horizon=jump.horizon / 9))
        torch.testing.assert_close(coefficients @ window, bowl.model.weight.detach()[0], rtol=1e-9, atol=1e-12)
        expected = coefficients @ torch.cat([*recorded[-9:], kept])
        torch.testing.assert_close(momentum[0], expected, rtol=1e-9, atol=1e-12)
    else:
        factor = {"keep": 1.0, "reset": 0.0, "scale": math.sqrt(jump.after / jump.before)}[policy]
        torch.testing.assert_close(momentum, factor * kept, rtol=1e-14, atol=0)


def test_lbfgs_starts_anew_after_a_jump():
    task = Task(**LOOPS["closure"])
    koop = task.attach(guard=task.loss, mode="jump")
    counts = []
    koop.on_jump(lambda jump: counts.append((jump.accepted, task.optimizer.state[task.model[0].weight]["n_iter"])))
    task.run()
    assert any(accepted for accepted, _ in counts)
    assert all((count == 0) == accepted for accepted, count in counts)


def noisy_run(mode):
    """Mini-batches of four with labels that are noise."""
    task = Task(sgd)
    generator = torch.Generator().manual_seed(3)
    x, y = task.x, task.y
    koop = task.attach(guard=lambda: mse_loss(task.model(x), y), mode=mode, cycle=40, tail=30)
    for step in range(200):
        rows = torch.randint(0, 32, (4,), generator=generator)
        task.x, task.y = x[rows], y[rows] + torch.randn(4, 1, generator=generator)
        task.step(step)
    return koop


def test_auto_tells_noise_from_smooth_motion():
    assert all(jump.reason.startswith("noise: ") and jump.evaluations == 0 for jump in noisy_run("auto").jumps)
    assert any(jump.evaluations for jump in noisy_run("jump").jumps)
    smooth = Task(adam)
    koop = smooth.attach(guard=smooth.loss, cycle=40, tail=30)
    smooth.run(steps=200)
    assert any(jump.accepted for jump in koop.jumps)


def test_roughness_of_what_is_known():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(31, 200, generator=generator, dtype=torch.float64)
    assert roughness(noise.cumsum(dim=0)) > 0.9  # increments that nothing forecasts
    heavy = torch.zeros(31, 200, dtype=torch.float64)
    for i in range(1, 31):
        heavy[i] = 0.9 * heavy[i - 1] + noise[i]
    assert roughness(heavy.cumsum(dim=0)[5:]) > 0.3  # momentum
    turning = torch.stack([0.9 ** torch.arange(30.0) * torch.cos(2.5 * torch.arange(30.0) + a) for a in (0, 1)], dim=1)
    assert roughness(turning) < 1e-6  # oscillation is not noise
    assert roughness(torch.zeros(30, 3)) == 0
    assert math.isnan(roughness(torch.full((30, 3), math.nan)))
    wide = torch.randn(12, 20_000, generator=generator).cumsum(dim=0)
    assert roughness(wide) == pytest.approx(roughness(wide[:, ::5]))


def test_choice_repeats_what_gained_and_tries_all_in_turn():
    choice = Choice()
    tried = set()
    for _ in range(12):
        picked = choice.pick(3)
        assert len(set(picked)) == 3
        tried |= set(picked)
        for index in picked:
            choice.learn(index, 0.5 if index in (2, 4) else -0.1, 1.0)
    assert tried == set(range(len(FAMILIES)))
    assert set(choice.pick(3)[:2]) == {2, 4}


def test_combinations_against_dense_algebra():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    now = [rows[-1, :3].reshape(3, 1).clone(), rows[-1, 3:].float()]
    coefficients = torch.tensor([0.5, -1.0, 0.0, 0.25, 1.25], dtype=torch.float64)
    for found in (moved(now, rows, coefficients), combined(now, rows, coefficients)):
        torch.testing.assert_close(found[0].flatten(), (coefficients @ rows)[:3])
        torch.testing.assert_close(found[1], (coefficients @ rows)[3:].float())
    assert combined([now[0].half()], torch.full((2, 3), 6e4), torch.ones(2, dtype=torch.float64)) is None


def test_the_small_factor_keeps_all_distances():
    generator = torch.Generator().manual_seed(0)
    rows = (100 + torch.randn(9, 40, generator=generator)).cumsum(dim=0).double()
    path = Proposer(rows).path
    assert torch.equal(path[-1], torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(torch.cdist(path, path), torch.cdist(rows, rows), rtol=1e-9, atol=1e-6)


def test_every_candidate_continues_a_line_or_stays():
    """On a straight line all forecasters agree on where it leads."""
    window = torch.arange(30.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, -2.0], dtype=torch.float64)
    proposer = Proposer(window)
    for candidate in FAMILIES:
        coefficients = proposer.coefficients(candidate)
        if candidate.method in ("anderson", "mean") or math.isinf(candidate.horizon):
            continue
        assert coefficients.sum().item() == pytest.approx(1.0)
        torch.testing.assert_close(coefficients @ window, window[-1] * (1 + candidate.horizon), rtol=1e-6, atol=0)
    assert len(FORECASTS) == len({json.dumps(candidate) for candidate in FORECASTS})


# resuming


def resumable(**options):
    task = Task(adam, onecycle=True, steps=200)
    koop = task.attach(guard=task.loss, mode="auto", **options)
    return task, koop


def saved(task, koop):
    stream = io.BytesIO()
    parts = {"model": task.model, "optimizer": task.optimizer, "scheduler": task.scheduler, "koop": koop}
    torch.save({name: part.state_dict() for name, part in parts.items()}, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@pytest.mark.parametrize("at", [0, 5, 12, 31])
@pytest.mark.parametrize("momentum", ["keep", "combine"])
def test_a_resumed_run_is_the_uninterrupted_one(at, momentum):
    whole, koop = resumable(momentum=momentum)
    for step in range(50):
        if step == at:
            state = saved(whole, koop)
        whole.step(step)
    resumed, again = resumable(momentum=momentum)
    for name, part in (("model", resumed.model), ("optimizer", resumed.optimizer), ("scheduler", resumed.scheduler)):
        part.load_state_dict(state[name])
    again.load_state_dict(state["koop"])
    for step in range(at, 50):
        resumed.step(step)
    assert resumed.bits == whole.bits
    assert any(jump.accepted for jump in koop.jumps)
    assert [replace(jump, seconds=0.0) for jump in again.jumps] == [replace(jump, seconds=0.0) for jump in koop.jumps]
    for own, other in zip(koop.forecast().values(), again.forecast().values(), strict=True):
        assert torch.equal(own, other)


def test_the_optimizers_state_dict_carries_koopt_along_where_asked():
    task, koop = resumable(with_optimizer=True)
    task.run(steps=40)
    state = saved(task, koop)["optimizer"]
    assert state["koopt"]["steps"] == 40
    other, again = resumable(with_optimizer=True)
    other.optimizer.load_state_dict(state)
    assert again.steps == 40
    assert [jump.step for jump in again.jumps] == [jump.step for jump in koop.jumps]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_handle_is_stateful_for_distributed_checkpoints(tmp_path):
    import torch.distributed.checkpoint as dcp

    task, koop = resumable()
    task.run(steps=40)
    dcp.save({"koop": koop}, checkpoint_id=str(tmp_path), no_dist=True)
    _, again = resumable()
    dcp.load({"koop": again}, checkpoint_id=str(tmp_path), no_dist=True)
    assert again.jumps == koop.jumps
    assert koop.jumps
    assert repr(again.state_dict()) == repr(koop.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["settings"].update(tail=9), "state: recorded with tail=9, this run has tail=8; make them"),
        (lambda s: s["settings"]["shapes"].update({"0.weight": [1]}), "state: recorded with shapes="),
        (lambda s: s.pop("means"), r"state has \[.*\], expected .*pass what state_dict\(\) returned"),
        (
            lambda s: s["means"].update(rows=torch.zeros(2, 2)),
            r"state\['means'\]\['rows'\] is \(\(2, 2\), torch.float32",
        ),
        (lambda s: s.update(steps=-1), r"state\['steps'\] is -1, expected int >= 0"),
        (lambda s: s["choice"].update(gains=[0.0]), r"state\['choice'\]\['gains'\] does not fit this version"),
        (lambda s: s.update(jumps='[{"step": 3}]'), r"state\['jumps'\] is .*, expected the records of jumps as JSON"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    task, koop = resumable()
    task.run(steps=30)
    own = koop.state_dict()
    state = saved(task, koop)["koop"]
    change(state)
    with pytest.raises(ValueError, match=message):
        koop.load_state_dict(state)
    assert repr(koop.state_dict()) == repr(own)


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    """20 real SIGKILLs at random moments."""
    command = [sys.executable, str(ROOT / "benchmarks" / "killed.py"), "--kills", "20", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "20 of 20 kills: bit-identical"


# around the guard, and in the open


def test_untouched_keeps_gradients_buffers_modes_and_random_numbers():
    task = Task(**STATEFUL)
    task.run(steps=3)
    gradients = [parameter.grad for parameter in task.model.parameters()]
    values = [gradient.clone() for gradient in gradients]
    before = task.bits
    with pytest.raises(ZeroDivisionError), untouched(task.model):  # noqa: PT012
        task.loss().backward()
        task.model[3].running_mean = torch.ones(8)
        task.model.eval()
        torch.set_grad_enabled(False)
        torch.rand(1)
        1 / 0  # noqa: B018
    assert torch.is_grad_enabled()
    assert task.bits == before
    assert task.model[3].training
    for parameter, gradient, value in zip(task.model.parameters(), gradients, values, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, value)


def test_the_guard_sees_gradients_enabled_and_the_same_random_numbers():
    task = Task(**STATEFUL)
    seen = []

    def guard():
        x = task.x.clone().requires_grad_()
        slope = torch.autograd.grad(task.model(x).sum(), x)[0]
        seen.append(torch.rand(1).item())
        return slope.square().mean()

    koop = task.attach(guard=guard, mode="jump", max_overhead=1.0)
    task.run(steps=12)
    assert koop.jumps[0].evaluations == len(seen) == 16
    assert len(set(seen)) == 1


def test_jumps_are_logged_and_drawn(caplog, tmp_path):
    with caplog.at_level(logging.DEBUG, logger="koopt"):
        bowl = Bowl(cycle=20, tail=10)
        for _ in range(100):
            bowl.step()
    assert [record.levelno for record in caplog.records] == [
        logging.INFO if jump.accepted else logging.DEBUG for jump in bowl.koop.jumps
    ]
    assert "accepted=True" in caplog.text
    figure = bowl.koop.report(tmp_path / "jumps.png")
    (axes,) = figure.axes
    assert axes.get_ylabel() == "loss of the guard"
    drawn = {line.get_label(): line.get_xydata() for line in axes.lines}
    accepted = [(jump.step, jump.after) for jump in bowl.koop.jumps if jump.accepted]
    assert drawn["accepted jump"].tolist() == [list(map(float, place)) for place in accepted]
    assert [path.name for path in tmp_path.iterdir()] == ["jumps.png"]
    assert Task(sgd).attach().report().axes  # with nothing to draw


def test_records_are_plain_values():
    bowl = Bowl(cycle=20, tail=10)
    for _ in range(20):
        bowl.step()
    (jump,) = bowl.koop.jumps
    assert json.loads(json.dumps(asdict(jump))) == asdict(jump)
    assert 0 < jump.seconds < time.monotonic()


BAD = {
    "koopt.attach(model, model)": "TypeError: optimizer is Linear, expected a torch.optim.Optimizer, or a wrapper",
    "koopt.attach(optimizer, 3)": "TypeError: model is int, expected the torch.nn.Module",
    "koopt.attach(optimizer, torch.nn.Linear(2, 2))": "ValueError: model: none of its trainable parameters is in the",
    "koopt.attach(optimizer, model, guard=1.0)": "TypeError: guard is float, expected a function without arguments",
    "koopt.attach(optimizer, model, mode='fast')": "ValueError: mode is 'fast', expected one of auto, jump, forecast",
    "koopt.attach(optimizer, model, mode='jump')": 'ValueError: mode is "jump", which needs a guard',
    "koopt.attach(optimizer, model, window=7)": "ValueError: window is 7, expected an even number",
    "koopt.attach(optimizer, model, window=-2)": "ValueError: window is -2, expected a whole number >= 4",
    "koopt.attach(optimizer, model, window=2**40)": "ValueError: window: .* GiB free; take a smaller window",
    "koopt.attach(optimizer, model, tail=2)": "ValueError: tail is 2, expected a whole number >= 6",
    "koopt.attach(optimizer, model, cycle=20)": "ValueError: cycle is 20, expected a whole number >= 30, the tail",
    "koopt.attach(optimizer, model, momentum='more')": "ValueError: momentum is 'more', expected one of keep, reset",
    "koopt.attach(optimizer, model, max_overhead=-0.1)": "ValueError: max_overhead is -0.1, expected a share",
    "koopt.attach(optimizer, model, max_overhead='3%')": "ValueError: max_overhead is '3%', expected a share",
    "koopt.attach(optimizer, model, dtype=torch.int8)": "TypeError: dtype is torch.int8, expected one of",
    "koopt.attach(optimizer, model).forecast(-1)": "ValueError: steps is -1, expected optimizer steps >= 0, finite",
    "koopt.attach(optimizer, model).forecast('1')": "TypeError: steps is '1', expected a number of optimizer steps",
    "koopt.attach(optimizer, model).on_jump(3)": "TypeError: callback is int, expected a function of one Jump",
    "koopt.attach(optimizer, model).jump()": 'ValueError: jump: mode is "forecast"; attach with a guard',
}


@pytest.fixture(scope="module")
def answers():
    """What each bad line says, in an interpreter without the tests' run-time types; then whether a good one works."""
    script = """
import json, torch, koopt
found = {}
for line in json.loads(input()):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        eval(line)
        found[line] = "no error"
    except Exception as error:
        found[line] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", script], input=json.dumps([*BAD]), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_refused_by_name(line, answers):
    assert re.match(BAD[line], answers[line]), answers[line]


def test_a_replaced_parameter_is_refused():
    task = Task(sgd)
    koop = task.attach()
    task.model.load_state_dict(task.model.state_dict(), assign=True)
    task.model[0].weight = nn.Parameter(torch.zeros(8, 3))
    with pytest.raises(ValueError, match=r"model: '0.weight' was replaced after attach\(\)"):
        koop.forecast()
