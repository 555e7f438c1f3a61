"""What else goes on in a user's loop: autocast, shared buffers, wrapped and compiled optimizers, freezing, copies."""

import copy
import math
import pickle

import pytest
import torch
from live_tasks import SHORT, Bowl, Task, adam, bits, data, flat, network, sgd
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.functional import mse_loss

import koopt

BF16 = torch.bfloat16


def test_a_forecast_is_seen_within_an_autocast_region():
    task = Task(sgd)
    koop = task.attach(mode="forecast")
    task.run()
    with torch.no_grad():
        with koop.forecast_weights(), torch.autocast("cpu", BF16):
            expected = mse_loss(task.model(task.x).float(), task.y)
        with torch.autocast("cpu", BF16):
            trained = mse_loss(task.model(task.x).float(), task.y)
            with koop.forecast_weights():
                assert torch.equal(mse_loss(task.model(task.x).float(), task.y), expected)
            assert torch.equal(mse_loss(task.model(task.x).float(), task.y), trained)
    assert not torch.equal(expected, trained)


def test_candidates_are_evaluated_where_the_optimizer_steps_within_autocast():
    task = Task(adam)
    koop = task.attach(guard=lambda: mse_loss(task.model(task.x).float(), task.y), mode="jump")
    for _ in range(60):
        with torch.autocast("cpu", BF16):
            task.step(0)
    assert any(jump.after not in (None, jump.before) for jump in koop.jumps)


@pytest.mark.parametrize("mask", [torch.ones(4, 4).tril().expand(2, 4, 4), torch.eye(4).to_sparse()])
def test_buffers_that_cannot_be_written_to_as_they_are(mask):
    task = Task(adam)
    task.model.register_buffer("mask", mask)
    koop = task.attach(guard=task.loss)
    task.run()
    with koop.forecast_weights():
        pass
    assert task.model.mask is mask
    assert koop.jumps


def test_a_changed_mask_is_put_back():
    task = Task(adam)
    task.model.register_buffer("mask", torch.ones(3, 1).expand(3, 5).clone()[:, :1].expand(3, 5))

    def guard():
        task.model.mask = task.model.mask + 1.0
        task.model.get_buffer("mask")[0] += 1.0
        return task.loss()

    task.attach(guard=guard)
    kept = task.model.mask
    task.run()
    assert task.model.mask is kept
    assert torch.equal(kept, torch.ones(3, 5))


@pytest.mark.parametrize("buffer", [torch.tensor(3), torch.tensor(True), torch.tensor(2j), torch.tensor(0.5)])
def test_what_a_guard_writes_behind_autograds_back_is_put_back(buffer):
    task = Task(adam)
    task.model.register_buffer("count", buffer.clone())

    def guard():
        task.model.count.data.zero_()
        return task.loss()

    koop = task.attach(guard=guard)
    task.run()
    koop.forecast()
    assert torch.equal(task.model.count, buffer)


def test_a_graph_that_waits_for_its_backward_pass_outlives_an_attempt():
    """Two optimizers, two losses, one buffer that both graphs hold."""
    torch.manual_seed(0)
    left, right = nn.Linear(3, 3), nn.Linear(3, 3)
    left.register_buffer("scale", torch.ones(3, requires_grad=False))
    optimizer = torch.optim.SGD(left.parameters(), lr=0.1)
    koop = koopt.attach(optimizer, left, lambda: left(torch.ones(1, 3)).square().sum(), "jump", **SHORT)
    for _ in range(40):
        optimizer.zero_grad()
        first = (left(torch.ones(1, 3)) * left.scale).square().sum()
        second = (right(torch.ones(1, 3)) * left.scale).square().sum()
        first.backward()
        optimizer.step()
        second.backward()
    assert koop.jumps


@pytest.mark.parametrize("wrapper", ["Lookahead", "ScheduleFreeWrapper"])
def test_an_optimizer_that_moves_weights_after_the_one_within_is_judged_as_a_whole(wrapper):
    import pytorch_optimizer

    task = Task(lambda model: getattr(pytorch_optimizer, wrapper)(adam(model)), steps=120)
    getattr(task.optimizer, "train", lambda: None)()
    koop = task.attach(guard=task.loss, mode="jump")
    accepted = 0
    for step in range(120):
        before = len(koop.jumps)
        task.step(step)
        if len(koop.jumps) > before and koop.jumps[-1].accepted:
            accepted += 1
            assert task.loss().item() == koop.jumps[-1].after
    assert accepted
    assert koop.steps == 120
    with pytest.raises(ValueError, match="attached to it already"):
        koopt.attach(task.optimizer.optimizer, task.model)


def stop_gradients(task):
    for parameter in task.model[0].parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def stop_rate(task):
    task.optimizer.param_groups[0]["lr"] = 0.0


def take_out(task):
    del task.optimizer.param_groups[0]


@pytest.mark.parametrize("stop", [stop_gradients, stop_rate, take_out])
@pytest.mark.parametrize("history", [0, 10])
@pytest.mark.parametrize("at", [49, 55, 59])
def test_what_is_frozen_on_the_way_stays(stop, history, at):
    def groups(model):
        return torch.optim.Adam([{"params": list(part.parameters())} for part in (model[0], model[-1])], lr=0.01)

    task = Task(groups)
    koop = task.attach(guard=task.loss, mode="jump", history=history)
    task.run(steps=at)
    stop(task)
    kept = task.model[0].weight.clone()
    task.run(steps=60)
    assert any(jump.accepted and jump.step > at for jump in koop.jumps)
    assert torch.equal(task.model[0].weight, kept)


def test_what_was_frozen_since_the_last_point_stays_in_a_jump_by_hand():
    task = Task(sgd)
    koop = task.attach(guard=task.loss, history=20, mode="jump", cycle=1000, max_overhead=1.0)
    task.run(steps=18)  # the last point is of step 16
    stop_gradients(task)
    kept = task.model[0].weight.clone()
    assert koop.jump().accepted
    assert koop.jumps[-1].forecaster == "secants"
    assert torch.equal(task.model[0].weight, kept)


def test_a_group_at_rate_0_is_no_noise():
    """Its gradients are part of the recorded ones, but the step does not go along them."""

    def groups(model):
        first, last = ({"params": list(part.parameters())} for part in (model[0], model[-1]))
        return torch.optim.SGD([first | {"lr": 0.0}, last], lr=0.02)

    task = Task(groups)
    koop = task.attach(guard=task.loss, history=20, mode="auto", cycle=1000, max_overhead=1.0)
    kept = task.model[0].weight.clone()
    task.run(steps=100)
    assert any(jump.accepted and jump.forecaster == "secants" for jump in koop.jumps)
    assert not any("noise" in jump.reason for jump in koop.jumps)
    assert torch.equal(task.model[0].weight, kept)


@pytest.mark.parametrize("history", [0, 10])
@pytest.mark.parametrize("loss", [-math.inf, math.nan])
def test_a_loss_that_is_none_is_no_gain(history, loss):
    task, calls = Task(adam), 0

    def guard():
        nonlocal calls
        calls += 1
        return 1.0 if torch.equal(flat(task.model), trained) else loss

    koop = task.attach(guard=guard, mode="jump", history=history)
    plain = Task(adam)
    for step in range(60):
        plain.step(step)
        trained = flat(plain.model)
        task.step(step)
    assert calls > len(koop.jumps) > 0
    assert not any(jump.accepted for jump in koop.jumps)
    assert bits(task.model, task.optimizer) == bits(plain.model, plain.optimizer)
    assert torch.equal(torch.cat([v.double().flatten() for v in koop.forecast().values()]), trained)


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("together", [True, False])
def test_a_second_module_of_the_guard_is_put_back_where_it_is_part_of_the_model(together):
    def train(attached):
        torch.manual_seed(0)
        generator, critic = network(), Normalized()
        optimizer, x = adam(generator), data()[0]
        if attached:
            model = nn.ModuleList([generator, critic]) if together else generator
            # worse the farther from where they are, so that no jump is accepted
            here = {"flat": flat(generator)}
            guard = lambda: (  # noqa: E731, it refers to what changes
                (flat(generator) - here["flat"]).abs().sum() + 0 * critic(generator(x)).sum() + 1.0
            )
            koop = koopt.attach(optimizer, model, guard, "jump", **SHORT)
        for _ in range(40):
            optimizer.zero_grad()
            (-critic(generator(x)).mean()).backward()
            if attached:
                hook = optimizer.register_step_post_hook(lambda *_: here.update(flat=flat(generator)))
                optimizer._optimizer_step_post_hooks.move_to_end(hook.id, last=False)
            optimizer.step()
            if attached:
                hook.remove()
        if attached:
            assert koop.jumps
            assert not any(jump.accepted for jump in koop.jumps)
        return [value.clone() for value in (*generator.state_dict().values(), *critic.state_dict().values())]

    same = all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))
    assert same is together


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_step_is_not_traced_anew_for_koopt():
    def frames(attached):
        torch.compiler.reset()
        counters.clear()
        task = Task(sgd)
        koop = task.attach(guard=task.loss) if attached else None
        step = torch.compile(lambda: task.optimizer.step(), backend="eager")
        for _ in range(60):
            task.optimizer.zero_grad()
            task.loss().backward()
            step()
        assert koop is None or (koop.steps == 60 and koop.jumps)
        return counters["frames"]["total"]

    assert frames(attached=True) == frames(attached=False) > 0
    torch.compiler.reset()


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_names_are_those_of_the_module_within(wrap):
    task = Task(sgd)
    wrapped = wrap(task.model)
    koop = koopt.attach(task.optimizer, wrapped)
    trajectory = koopt.Trajectory(wrapped)
    task.run(steps=5)
    trajectory.record()
    names = [name for name, _ in task.model.named_parameters()]
    assert koopt.partition(wrapped).gather(koop.forecast())
    assert list(koop.forecast()) == names == list(trajectory.names)
    for model in (wrapped, task.model):
        koopt.load_into(model, {name: torch.zeros_like(value) for name, value in koop.forecast().items()})
        assert not flat(task.model).any()
        nn.init.ones_(task.model[0].weight)
    koopt.load_into(wrapped, {name: torch.zeros_like(value) for name, value in wrapped.named_parameters()})
    assert not flat(task.model).any()
    again = koopt.attach(adam(task.model), task.model)
    again.load_state_dict(koop.state_dict())
    assert again.steps == 5


def test_a_child_that_is_called_like_torch_compiles_is_but_a_child():
    model = nn.ModuleDict({"_orig_mod": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    assert len(koopt.Trajectory(model).names) == 4


def test_a_handle_is_neither_copied_nor_pickled():
    koop = Bowl().koop
    with pytest.raises(TypeError, match=r"belongs to one optimizer; attach\(\) to the copy"):
        copy.copy(koop)
    with pytest.raises(TypeError, match=r"belongs to one optimizer; attach\(\) to the copy"):
        copy.deepcopy(koop)
    with pytest.raises(TypeError, match=r"belongs to one optimizer; save its state_dict\(\)"):
        pickle.dumps(koop)


def test_a_coarser_record_takes_no_digits_from_the_weights():
    """Weights that do not move keep all their digits through a jump of the others."""
    task = Task(adam)
    task.model.double()
    task.x, task.y = data(torch.float64)
    still = nn.Parameter(torch.rand(5, dtype=torch.float64))
    task.model.register_parameter("still", still)
    task.optimizer = adam(task.model)
    kept = still.clone()
    koop = task.attach(guard=task.loss, mode="jump", dtype=torch.float32)
    task.run()
    assert any(jump.accepted for jump in koop.jumps)
    assert torch.equal(still, kept)


def test_the_default_device_does_not_matter():
    task = Task(adam)
    koop, trajectory = task.attach(guard=task.loss, history=10), koopt.Trajectory(task.model)
    with torch.device("meta"):
        task.run()
        koop.forecast()
        trajectory.record()
        with koop.forecast_weights():
            task.loss().item()
    assert any(jump.accepted for jump in koop.jumps)


def test_one_candidate_of_a_forecast_is_held_at_a_time(monkeypatch):
    from koopt.live import evaluating

    task = Task(adam)
    koop = task.attach(guard=task.loss, mode="jump", tail=8)
    task.run(steps=11)
    alive, most = [], 0

    def combined(*given):
        nonlocal most
        import weakref

        weights = original(*given)
        alive.append(weakref.ref(weights[0]))
        most = max(most, sum(one() is not None for one in alive))
        return weights

    original = evaluating.combined
    monkeypatch.setattr(evaluating, "combined", combined)
    koop.forecast()
    assert len(alive) > 5
    assert most <= 2


def test_secants_are_refused_on_l_bfgs():
    task = Task(lambda model: torch.optim.LBFGS(model.parameters()), closure=True)
    for fine in ({"guard": task.loss, "history": None}, {"history": 5}):  # none is taken
        task.attach(**fine).detach()
    with pytest.raises(ValueError, match="history is 5, but L-BFGS leaves no gradient of where"):
        task.attach(guard=task.loss, history=5)
