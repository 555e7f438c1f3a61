"""Optimizers that precondition with matrices: told from others, and left alone in mode "auto"."""

import pytest
import torch
from live_tasks import Task
from pytorch_optimizer import SOAP, Shampoo
from torch import nn

from koopt.live.preconditioning import by_matrices

FIRST_ORDER = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, max_iter=2),
}
MATRICES = {
    "soap": lambda parameters: SOAP(parameters, lr=0.01, weight_decay=0.0),
    "shampoo": lambda parameters: Shampoo(parameters, lr=0.01),
}


def stepped(make, *shapes):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = make(parameters)

    def closure():
        optimizer.zero_grad()
        loss = sum(parameter.square().sum() for parameter in parameters)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return optimizer


@pytest.mark.parametrize("shapes", [[(3, 8), (3,)], [(4, 4), (4,)], [(2, 3, 3, 3)], [(5,)]], ids=str)
@pytest.mark.parametrize("name", FIRST_ORDER)
def test_optimizers_of_first_order_hold_no_matrices(name, shapes):
    assert not by_matrices(stepped(FIRST_ORDER[name], *shapes))


@pytest.mark.parametrize("shapes", [[(3, 8), (3,)], [(2, 3, 3, 3), (2,)]], ids=str)
@pytest.mark.parametrize("name", MATRICES)
def test_matrices_are_seen_once_there_are_steps(name, shapes):
    assert not by_matrices(MATRICES[name]([nn.Parameter(torch.ones(2, 2))]))
    assert by_matrices(stepped(MATRICES[name], *shapes))


def test_square_weights_do_not_hide_those_of_soap():
    assert by_matrices(stepped(MATRICES["soap"], (4, 4)))


@pytest.mark.parametrize("history", [0, 8])
def test_mode_auto_leaves_their_runs_alone(history):
    def make(model):
        return SOAP(model.parameters(), lr=0.01, weight_decay=0.0)

    plain = Task(make, steps=200).run().bits
    task = Task(make, steps=200)
    koop = task.attach(guard=task.loss, mode="auto", history=history, max_overhead=1.0)
    assert task.run().bits == plain
    assert koop.jumps
    assert all(not jump.accepted and not jump.evaluations for jump in koop.jumps)
    assert {jump.reason.split(":")[0] for jump in koop.jumps} == {"preconditioner"}


def test_mode_jump_jumps_all_the_same():
    task = Task(lambda model: SOAP(model.parameters(), lr=0.01, weight_decay=0.0), steps=200)
    koop = task.attach(guard=task.loss, mode="jump", max_overhead=1.0)
    task.run()
    assert any(jump.accepted for jump in koop.jumps)
