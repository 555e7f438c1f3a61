from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import koopt
from koopt.bench.scaled_lbfgs import ScaledLBFGS, add, direction


def rosenbrock(weights):
    return (100 * (weights[1:] - weights[:-1].square()).square() + (1 - weights[:-1]).square()).sum()


class Watched:
    """Rosenbrock's function of a few weights; keeps the points and losses of all evaluations."""

    def __init__(self, size=6, function=rosenbrock):
        self.model = nn.Linear(size, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(self.model.weight, -1.0)
        self.function, self.points, self.losses = function, [], []

    def loss(self):
        return self.function(self.model.weight[0])

    def closure(self):
        self.model.zero_grad()
        loss = self.loss()
        loss.backward()
        self.points.append(tuple(self.model.weight[0].tolist()))
        self.losses.append(loss.item())
        return loss


def random_pairs(count, size):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    hessian = root @ root.T + torch.eye(size, dtype=torch.float64)
    pairs = []
    for step in torch.randn(count, size, generator=generator, dtype=torch.float64):
        add(pairs, step, hessian @ step, 10 * float(step.dot(hessian @ step) * step[0]))
    return pairs


def test_direction_is_that_of_the_scaled_updates_of_a_dense_matrix():
    size = 7
    pairs = random_pairs(5, size)
    estimate = torch.eye(size, dtype=torch.float64)  # of the Hessian, not of its inverse
    for index, (step, change, scale) in enumerate(pairs):
        if index == 0:
            estimate *= change.dot(change) / step.dot(change)
        estimate /= scale
        image = estimate @ step
        estimate += torch.outer(change, change) / step.dot(change) - torch.outer(image, image) / step.dot(image)
    gradient = torch.arange(1.0, size + 1, dtype=torch.float64)
    assert len({scale for _, _, scale in pairs}) > 2
    torch.testing.assert_close(direction(gradient, pairs), -torch.linalg.solve(estimate, gradient))


def test_a_pair_shrinks_only_what_was_too_large():
    pairs: list = []
    step, change = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0])
    add(pairs, step, change, predicted=6.0)  # nothing came before
    add(pairs, step, change, predicted=6.0)
    add(pairs, step, change, predicted=1.0)
    assert [scale for _, _, scale in pairs] == [1.0, 3.0, 1.0]


@pytest.mark.parametrize("change", [[-1.0, 0.0], [0.0, 1.0], [math.nan, 0.0]])
def test_a_pair_without_positive_curvature_is_left_out(change):
    pairs: list = []
    add(pairs, torch.tensor([1.0, 0.0]), torch.tensor(change), predicted=1.0)
    assert pairs == []


def test_rosenbrock_is_solved_and_no_point_is_evaluated_twice():
    watched = Watched()
    optimizer = ScaledLBFGS(watched.model.parameters())
    before = [optimizer.step(watched.closure) for _ in range(80)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(before))
    assert before[-1] < 1e-18
    moving = [point for point, loss in zip(watched.points, watched.losses, strict=True) if loss > 1e-12]
    assert len(set(moving)) == len(moving)


def test_weights_moved_between_steps_are_evaluated_and_curvature_is_kept():
    watched = Watched()
    optimizer = ScaledLBFGS(watched.model.parameters())
    for _ in range(10):
        optimizer.step(watched.closure)
    with torch.no_grad():
        watched.model.weight.fill_(0.5)
    evaluated = len(watched.points)
    loss = optimizer.step(watched.closure)
    assert watched.points[evaluated] == (0.5,) * 6
    assert loss == watched.losses[evaluated]
    assert len(optimizer.state[watched.model.weight]["pairs"]) > 5


def test_history_bounds_the_memory():
    watched = Watched()
    optimizer = ScaledLBFGS(watched.model.parameters(), history=3)
    for _ in range(9):
        optimizer.step(watched.closure)
    assert len(optimizer.state[watched.model.weight]["pairs"]) == 3


def test_a_resumed_run_is_bitwise_the_same():
    runs = [Watched(), Watched()]
    first = ScaledLBFGS(runs[0].model.parameters())
    for _ in range(7):
        first.step(runs[0].closure)
    runs[1].model.load_state_dict(runs[0].model.state_dict())
    second = ScaledLBFGS(runs[1].model.parameters())
    second.load_state_dict(first.state_dict())
    for _ in range(7):
        assert first.step(runs[0].closure) == second.step(runs[1].closure)
    assert torch.equal(runs[0].model.weight, runs[1].model.weight)


@pytest.mark.parametrize("function", [lambda weights: weights.sum() * math.nan, lambda weights: weights.sum() * 0.0])
def test_without_a_way_down_weights_stay_as_they_are(function):
    watched = Watched(function=function)
    ScaledLBFGS(watched.model.parameters()).step(watched.closure)
    assert torch.equal(watched.model.weight, torch.full((1, 6), -1.0, dtype=torch.float64))


def test_koopt_attached_to_it_never_raises_the_loss():
    watched = Watched(size=12)
    optimizer = ScaledLBFGS(watched.model.parameters())
    koop = koopt.attach(optimizer, watched.model, guard=watched.loss, mode="jump", cycle=10, tail=8, max_overhead=1.0)
    before = [optimizer.step(watched.closure) for _ in range(60)]
    assert koop.jumps
    assert all(later <= earlier for earlier, later in itertools.pairwise(before))


@pytest.mark.parametrize("history", [0, -1, True])
def test_bad_history_is_refused(history):
    with pytest.raises(ValueError, match="history is"):
        ScaledLBFGS(nn.Linear(1, 1).parameters(), history=history)


def test_several_groups_are_refused():
    groups = [{"params": nn.Linear(1, 1).parameters()} for _ in range(2)]
    with pytest.raises(ValueError, match="2 groups"):
        ScaledLBFGS(groups)
