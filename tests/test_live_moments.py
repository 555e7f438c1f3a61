"""Averages of squared gradients after a jump: their bias is corrected for the steps that it goes ahead."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from live_tasks import STATEFUL, Task, adam, bits, flat, sgd, two_groups
from torch import nn

from koopt.live import moments
from koopt.live.candidates import Candidate, Proposer


@given(decay=st.floats(0.5, 0.9999), taken=st.integers(1, 5000), ahead=st.integers(0, 500))
def test_bias_is_corrected_for_the_steps_ahead(decay, taken, ahead):
    """Steps ahead with squared gradients like the average as it is, uncorrected: the recursion itself."""
    average = later = 0.7
    for _ in range(ahead):
        later = decay * later + (1 - decay) * average
    expected = later / (1 - decay ** (taken + ahead))
    assert average * moments.corrected(decay, taken, ahead) / (1 - decay**taken) == pytest.approx(expected, rel=1e-9)


@given(decay=st.floats(0.9, 0.9999), cycle=st.integers(30, 300))
def test_under_steady_gradients_steps_grow_by_the_root_of_two_at_most(decay, cycle):
    """With a jump at each cycle that goes a cycle ahead, the most there can be."""
    average, least = 0.0, 1.0
    for step in range(1, 20 * cycle):
        average = decay * average + (1 - decay)
        if step % cycle == 0:
            average *= moments.corrected(decay, step, cycle)
        least = min(least, average / (1 - decay**step))
    assert least >= 0.5
    assert average / (1 - decay ** (20 * cycle)) <= 1.0 + 1e-9


def jumped(make, **options):
    """The state of an optimizer after its first jump, without that jump, and how many steps it goes ahead."""
    task, plain = Task(make), Task(make)
    koop = task.attach(guard=task.loss, mode="jump", max_overhead=1.0, **options)
    weights = []
    for step in range(12):
        task.step(step)
        plain.step(step)
        weights.append(flat(plain.model))
    (jump,) = koop.jumps
    assert jump.accepted
    increments = torch.stack(weights[-8:]).diff(dim=0).norm(dim=1)  # of the steps that it is made from
    moved = (flat(task.model) - weights[-1]).norm() / increments.mean()
    ahead = min(jump.horizon, moved.item(), 12)  # a cycle at most
    return task.optimizer.state_dict(), plain.optimizer.state_dict()["state"], ahead


@pytest.mark.parametrize(
    "make",
    [
        adam,
        two_groups,
        lambda model: adam(model, betas=(0.5, 0.9)),
        lambda model: torch.optim.NAdam(model.parameters(), lr=0.01),
        lambda model: torch.optim.RAdam(model.parameters(), lr=0.1),
        lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
    ],
    ids=["adam", "groups", "short memory", "nadam", "radam", "fused"],
)
def test_after_a_jump_second_moments_are_corrected_for_the_steps_ahead(make):
    state, now, ahead = jumped(make)
    assert ahead >= 1
    for group in state["param_groups"]:
        decay = group["betas"][1]
        for index in group["params"]:
            found = state["state"][index]
            factor = (1 - decay**12) / (1 - decay ** (12 + ahead))
            assert factor < 0.95
            torch.testing.assert_close(found["exp_avg_sq"], factor * now[index]["exp_avg_sq"], rtol=1e-4, atol=0)
            assert found["step"] == 12
            assert torch.equal(found["exp_avg"], now[index]["exp_avg"])


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (adam, {"second_moments": "keep"}),
        (lambda model: adam(model, amsgrad=True), {}),
        (lambda model: torch.optim.Adamax(model.parameters(), lr=0.01), {}),
        (lambda model: torch.optim.RMSprop(model.parameters(), lr=0.003), {}),
        (lambda model: torch.optim.Adagrad(model.parameters(), lr=0.05), {}),
        (sgd, {}),
    ],
    ids=["keep", "amsgrad", "adamax", "rmsprop", "adagrad", "sgd"],
)
def test_other_state_is_as_without_the_jump(make, options):
    state, now, _ = jumped(make, **options)
    for index, own in now.items():
        for name, value in own.items():
            assert value is None or torch.equal(torch.as_tensor(state["state"][index][name]), torch.as_tensor(value))


def test_a_refused_jump_ages_nothing():
    task, plain = Task(**STATEFUL), Task(**STATEFUL)
    koop = task.attach(guard=lambda: 1.0, mode="jump", max_overhead=1.0)
    task.run(steps=40)
    plain.run(steps=40)
    assert koop.jumps
    assert bits(task.model, task.optimizer) == bits(plain.model, plain.optimizer)


def test_of_frozen_parameters_nothing_ages():
    task = Task(adam)
    koop = task.attach(guard=task.loss, mode="jump", max_overhead=1.0)
    for step in range(40):
        if step == 5:
            task.model[0].weight.requires_grad_(False)
            task.optimizer.zero_grad()
            before = task.optimizer.state[task.model[0].weight]["exp_avg_sq"].clone()
        task.step(step)
    assert any(jump.accepted for jump in koop.jumps)
    assert torch.equal(task.optimizer.state[task.model[0].weight]["exp_avg_sq"], before)


def test_what_is_not_known_is_left_alone():
    class Quantized(torch.Tensor):
        pass

    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    for held in (
        {},
        {"exp_avg_sq": torch.ones(2).as_subclass(Quantized), "step": one},
        {"exp_avg_sq": torch.ones(2)},
        {"exp_avg_sq": torch.ones(1), "step": one},  # of one for all, as Adam-mini has it
        {"exp_avg_sq": torch.ones(2), "step": zero},
    ):
        optimizer.state[parameter] = held
        moments.age(optimizer, [parameter], 10.0)
        assert bool((held.get("exp_avg_sq", one) == 1).all())
    optimizer.param_groups[0]["bias_correction"] = False
    optimizer.state[parameter] = {"exp_avg_sq": torch.ones(2), "step": one}
    assert moments.second_moments(optimizer, [parameter]) == []


@pytest.mark.parametrize(
    ("candidate", "steps"),
    [
        (Candidate("line", 2.0, {"span": 3}), 20.0),
        (Candidate("mean", 0.0, {}), 0.0),
        (Candidate("regression", 1.5, {}), 15.0),
    ],
)
def test_how_many_steps_a_move_stands_for(candidate, steps):
    """On a straight path of ten even increments, by hand."""
    proposer = Proposer(torch.arange(11.0)[:, None] * torch.tensor([[3.0, 4.0]]))
    coefficients = proposer.coefficients(candidate)
    assert proposer.ahead(candidate, coefficients) == pytest.approx(steps, rel=1e-6)


def test_a_fixed_point_stands_for_as_many_steps_as_its_distance_has_increments():
    path = 0.5 ** torch.arange(7.0, dtype=torch.float64)[:, None]
    proposer = Proposer(path)
    fixed = Candidate("koopman", math.inf, {"rank": 1, "difference": True})
    increment = (1 - 0.5**6) / 6
    coefficients = proposer.coefficients(fixed)
    assert (coefficients @ path).item() == pytest.approx(0.0, abs=1e-9)
    assert proposer.ahead(fixed, coefficients) == pytest.approx(0.5**6 / increment, rel=1e-6)
