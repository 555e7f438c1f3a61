"""A run with koopt against the same run without it, bit for bit; jumps and forecasts against what the guard says."""

import json
import logging
import re
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from live_tasks import LOOPS, SHORT, STATEFUL, Bowl, Task, adam, flat, network, sgd
from torch import nn
from torch.nn.functional import mse_loss

import koopt
from koopt.live import skipping
from koopt.live.guard import untouched


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


# a line search leaves nothing to gain in so few steps
@pytest.mark.parametrize("name", [name for name in LOOPS if name != "closure wolfe"])
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
        for _ in range(120):
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                accelerator.backward(mse_loss(model(task.x), task.y))
                optimizer.step()
        return task.bits, koop

    plain, _ = run(None, attached=False)
    refused, koop = run(None)
    assert refused == plain
    assert koop.steps == 60
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


def test_a_flag_on_an_accelerator_is_not_read_and_repeats_are_left_out():
    rows = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 3.0], [1.0, 3.0], [1.0, 2.0]])
    optimizer = Task(sgd).optimizer
    assert skipping.moving(optimizer, rows) == [0, 1, 2, 3, 4]
    optimizer.found_inf = torch.zeros(1, device="meta")  # reading it raises
    assert not skipping.skipped(optimizer)
    assert skipping.moving(optimizer, rows) == [0, 2, 4]
    optimizer.found_inf = torch.ones(1)
    assert skipping.skipped(optimizer)


def test_jumps_are_made_of_the_steps_that_moved():
    bowl = Bowl(cycle=16, tail=16, momentum="combine", beta=0.5)
    bowl.koop.detach()
    for step in range(16):
        if step not in (5, 11):  # where a fused optimizer skipped
            bowl.step()
        bowl.optimizer.found_inf = torch.zeros(1, device="meta")
        bowl.koop._after(bowl.optimizer, (), {})
        del bowl.optimizer.found_inf
    (jump,) = bowl.koop.jumps
    assert jump.step == 16
    assert jump.accepted
    assert jump.after == bowl.loss().item()


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
    "koopt.attach(optimizer, model, refresh=[])": "TypeError: refresh is list, expected a function without arguments",
    "koopt.attach(optimizer, model, mode='fast')": "ValueError: mode is 'fast', expected one of auto, jump, forecast",
    "koopt.attach(optimizer, model, mode='jump')": 'ValueError: mode is "jump", which needs a guard',
    "koopt.attach(optimizer, model, window=7)": "ValueError: window is 7, expected an even number",
    "koopt.attach(optimizer, model, window=-2)": "ValueError: window is -2, expected a whole number >= 4",
    "koopt.attach(optimizer, model, window=2**40)": "ValueError: window: .* GiB free; take a smaller window",
    "koopt.attach(optimizer, model, tail=2)": "ValueError: tail is 2, expected a whole number >= 6",
    "koopt.attach(optimizer, model, tail=60, cycle=50)": "ValueError: cycle is 50, expected .* number >= 60, the tail",
    "koopt.attach(optimizer, model, history=-1)": "ValueError: history is -1, expected a whole number >= 0, or None",
    "koopt.attach(optimizer, model, momentum='more')": "ValueError: momentum is 'more', expected one of keep, reset",
    "koopt.attach(optimizer, model, second_moments=0)": "ValueError: second_moments is 0, expected one of age, keep",
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
