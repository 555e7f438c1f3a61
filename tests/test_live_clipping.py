"""Gradients that are not the guard's: clipped or scaled ones, and what koopt makes of them."""

import copy
import gc
import io
import itertools
import math

import pytest
import torch
from live_tasks import bits, data, network
from torch import nn
from torch.nn.functional import mse_loss

import koopt
from koopt.live.clipping import Clipping

clip = nn.utils.clip_grad_norm_


def backward(parameters, size):
    for parameter in parameters:
        parameter.grad = None
    sum((size * (place + 1) * parameter).sum() for place, parameter in enumerate(parameters)).backward()


def factors(sizes, change, parameters=None):
    """What is found at points of a loop that changes gradients so."""
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))] if parameters is None else parameters
    clipping = Clipping(parameters)
    clipping.watch(True)
    found = []
    for size in sizes:
        backward(parameters, size)
        change(parameters)
        found.append(clipping.factor())
    return found, clipping


def divided(by):
    return lambda parameters: [parameter.grad.div_(by) for parameter in parameters]


def norm_of(size):
    return size * (2 + 3 * 4) ** 0.5


def test_what_was_clipped_is_multiplied_back_once_it_is_told_from_what_is_scaled():
    found, clipping = factors([3.0, 30.0, 0.1, 5.0], lambda parameters: clip(parameters, 1.0))
    assert found[0] is None  # it might be a loop that divides
    assert found[1:] == pytest.approx([norm_of(30.0), 1.0, norm_of(5.0)], rel=1e-5)
    assert clipping.divisor == 1


def test_a_loop_seen_without_any_change_clips_where_it_has_one():
    found, _ = factors([0.1, 5.0], lambda parameters: clip(parameters, 1.0))
    assert found == pytest.approx([1.0, norm_of(5.0)], rel=1e-5)


def test_a_loop_that_divides_is_left_alone():
    found, clipping = factors([3.0, 30.0, 0.1, 5.0], divided(8))
    assert found == [None, 1.0, 1.0, 1.0]
    assert clipping.divisor == pytest.approx(8)


def divided_and_clipped(by, largest):
    return lambda parameters: (divided(by)(parameters), clip(parameters, largest))


def test_a_loop_that_divides_and_clips_is_told_by_what_it_divides():
    found, _ = factors([0.1, 0.3, 5.0, 50.0], divided_and_clipped(8, 1.0))
    assert found[:2] == [None, 1.0]
    assert found[2:] == pytest.approx([norm_of(5.0 / 8), norm_of(50.0 / 8)], rel=1e-4)  # beyond the division
    found, _ = factors([50.0, 5.0, 0.1, 0.3, 0.2, 5.0], divided_and_clipped(8, 1.0))  # it clips at first
    assert found[:3] == [None, pytest.approx(norm_of(5.0), rel=1e-4), pytest.approx(8, rel=1e-4)]
    assert found[3:] == [None, 1.0, pytest.approx(norm_of(5.0 / 8), rel=1e-4)]  # all before was too long


def test_a_scale_that_grows_is_followed():
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    clipping, found = Clipping(parameters), []
    clipping.watch(True)
    for size, by in ((1.0, 8), (2.0, 8), (3.0, 16), (4.0, 16), (5.0, 16)):
        backward(parameters, size * by)
        divided(by)(parameters)
        found.append(clipping.factor())
    assert found == [None, 1.0, pytest.approx(2.0), None, 1.0]


def test_nothing_is_said_while_gradients_hardly_change():
    for change in (divided(8), lambda parameters: clip(parameters, 1.0)):
        found, clipping = factors([3.0, 3.0, 3.0], change)
        assert found == [None, None, None]
        assert math.isnan(clipping.divisor)


def test_what_changes_slowly_adds_up():
    for change in (divided(8), lambda parameters: clip(parameters, 1.0)):
        found, clipping = factors([3.0 * 0.99997**i for i in range(40)], change)
        assert found[0] is None
        assert not math.isnan(clipping.divisor)


@pytest.mark.parametrize(
    "change",
    [
        lambda parameters: nn.utils.clip_grad_value_(parameters, 0.5),
        lambda parameters: clip(parameters[:1], 0.01),
        lambda parameters: parameters[0].grad.zero_(),
        lambda parameters: parameters[0].grad.fill_(float("nan")),
        lambda parameters: [parameter.grad.zero_() for parameter in parameters],
        lambda parameters: setattr(parameters[1], "grad", None),
    ],
    ids=["values", "one of two", "one is zero", "NaN", "all are zero", "one is none"],
)
def test_what_was_changed_in_another_way_is_taken_as_it_is(change):
    found, clipping = factors([3.0, 30.0, 5.0], change)
    assert found == [1.0, 1.0, 1.0]
    assert math.isnan(clipping.divisor)


def test_values_of_a_single_tensor():
    parameter = nn.Parameter(torch.ones(50))
    clipping = Clipping([parameter])
    clipping.watch(True)
    for size in (1.0, 3.0, 9.0):
        parameter.grad = None
        (size * torch.linspace(0.1, 1, 50) * parameter).sum().backward()
        nn.utils.clip_grad_value_([parameter], 0.5)
        assert clipping.factor() == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    parameters = [nn.Parameter(torch.linspace(0.1, 1, size, dtype=dtype)) for size in (5, 300)]
    clipping, found = Clipping(parameters), []
    clipping.watch(True)
    for size in (0.01, 3.0, 30.0):
        for parameter in parameters:
            parameter.grad = None
        sum((size * parameter.square()).sum() for parameter in parameters).backward()
        clip(parameters, 1.0)
        found.append(clipping.factor())
    norm = 2 * sum(parameter.detach().float().square().sum() for parameter in parameters).sqrt().item()
    assert found == pytest.approx([1.0, 3 * norm, 30 * norm], rel=0.02)


def test_parameters_without_use_whose_gradients_are_zero():
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    clipping, found = Clipping(parameters), []
    clipping.watch(True)
    for size in (3.0, 30.0):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        (size * parameters[0]).sum().backward()
        clip(parameters, 1.0)
        found.append(clipping.factor())
    assert found == [None, pytest.approx(30 * 2**0.5, rel=1e-4)]


def test_gradients_that_another_hook_uses_up():
    parameter = nn.Parameter(torch.ones(2))
    parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    clipping = Clipping([parameter])
    clipping.watch(True)
    parameter.sum().backward()
    assert clipping.factor() == 1.0


def test_gradients_that_backward_did_not_make_are_taken_as_they_are():
    parameter = nn.Parameter(torch.ones(2))
    clipping = Clipping([parameter])
    clipping.watch(True)
    assert clipping.factor() == 1.0
    for size in (3.0, 5.0):
        parameter.grad = torch.full((2,), size)
        clip([parameter], 1.0)
        assert clipping.factor() == 1.0


def test_a_gradient_that_was_zero_before_it_was_changed():
    found, _ = factors([0.0, 0.0], lambda parameters: [parameter.grad.fill_(1.0) for parameter in parameters])
    assert found == [1.0, 1.0]


def test_what_several_calls_of_backward_add_up_to():
    parameters = [nn.Parameter(torch.ones(4, dtype=torch.float64)), nn.Parameter(torch.ones(1), requires_grad=False)]
    clipping = Clipping(parameters)
    clipping.watch(True)
    for size in (1.0, 2.0):
        parameters[0].grad = None
        for _ in range(3):
            (size * parameters[0]).sum().backward()
        clip(parameters[:1], 0.5)
        found = clipping.factor()
    assert found == pytest.approx(3 * 2.0 * 2 / 0.5, rel=1e-5)


def test_sparse_gradients():
    table = nn.Embedding(5, 2, sparse=True)
    clipping = Clipping(list(table.parameters()))
    clipping.watch(True)
    found = []
    for size in (1.0, 3.0):
        table.zero_grad()
        (size * table(torch.tensor([1, 1, 3]))).sum().backward()
        table.weight.grad = table.weight.grad / table.weight.grad.coalesce().values().norm()
        found.append(clipping.factor())
    assert found[1] == pytest.approx(3 * (2 * 4 + 2) ** 0.5)


@pytest.mark.parametrize("sizes", [[], [3.0], [0.1], [3.0, 30.0]])
def test_a_saved_state_goes_on(sizes):
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    _, one = factors(sizes, lambda parameters: clip(parameters, 1.0), parameters)
    other = Clipping(parameters)
    other.load_state_dict(one.state_dict())
    for clipping in (one, other):
        clipping.watch(True)
    backward(parameters, 7.0)
    clip(parameters, 1.0)
    assert one.factor() == other.factor()
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0, equal_nan=True)


def regression(largest=None, divide=1, momentum=0.0, times=1, **options):
    torch.manual_seed(0)
    model, (x, y) = network(torch.float64), data(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02 / times, momentum=momentum)
    koop = koopt.attach(optimizer, model, guard=lambda: mse_loss(model(x), y), **options)

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            (divide * times * mse_loss(model(x), y)).backward()
            if divide != 1:
                divided(divide)(list(model.parameters()))
            if largest is not None:
                clip(model.parameters(), largest)
            optimizer.step()
        return mse_loss(model(x), y).item()

    return steps, koop, model, optimizer


def test_loops_that_clip_are_led_as_far_as_those_that_do_not():
    plain, led = regression()[0](80), regression(largest=1e-3)[0](80)
    alone = regression(largest=1e-3, history=0)[0](80)
    assert led < 5 * plain
    assert plain < 1e-3
    assert alone > 0.3


@pytest.mark.parametrize(("divide", "largest"), [(16, None), (2, 1.0), (16, 1e-3)])
def test_loops_that_divide_are_led_as_far_as_those_that_do_not(divide, largest):
    assert regression(largest, divide)[0](100) < 5 * regression()[0](80)


@pytest.mark.parametrize("times", [32.0, 0.1])
def test_a_sum_beside_a_guard_that_is_a_mean_is_told_from_noise_when_its_ratio_comes_again(times):
    steps, koop, _, _ = regression(times=times)
    led = steps(100)
    assert [(jump.step, jump.accepted) for jump in koop.jumps[:2]] == [(20, False), (40, True)]
    assert koop.jumps[0].reason.startswith("noise: the guard's slope is off")
    assert koop.jumps[1].moves > 30
    assert led < 5 * regression()[0](80)


def test_a_ratio_that_may_be_of_other_examples_is_no_scale():
    _, koop, *_ = run = regression(times=2.0)
    run[0](60)
    assert len(koop.jumps) > 1
    assert not any(jump.accepted for jump in koop.jumps)


def hooks(model):
    return [bool(getattr(parameter, "_post_accumulate_grad_hooks", None)) for parameter in model.parameters()]


def test_parameters_have_hooks_only_where_gradients_are_recorded_next():
    steps, koop, model, _ = regression(max_overhead=0.0)  # the budget allows no step along secants
    seen = []
    for _ in range(40):
        steps(1)
        seen.append(any(hooks(model)))
    assert not koop.jumps or not any(jump.accepted for jump in koop.jumps)
    assert 0 < sum(seen) < 12
    steps, koop, model, _ = regression()
    steps(60)
    assert koop.jumps[-1].moves > 1
    assert all(hooks(model))
    assert not any(hooks(copy.deepcopy(model)))
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    koop.detach()
    assert not any(hooks(model))
    koop.jump()
    koop.load_state_dict(koop.state_dict())
    assert not any(hooks(model))


def test_hooks_go_with_the_handle():
    steps, koop, model, optimizer = regression()
    steps(30)
    assert all(hooks(model))
    del steps, koop, optimizer
    gc.collect()
    assert not any(hooks(model))


def test_a_first_step_that_is_recorded_is_looked_at():
    model = nn.Linear(600_000, 1)
    koop = koopt.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, guard=lambda: 1.0)
    assert koop._attempts._at_point(1) == any(hooks(model))
    assert any(hooks(model))


def test_a_resumed_run_that_clips_or_scales_goes_on_bit_for_bit():
    for at, times in ((2, 1), (8, 1), (11, 1), (15, 32), (30, 32), (50, 32)):
        steps, koop, model, optimizer = regression(largest=1e-2, momentum=0.5, times=times)
        steps(at)
        saved = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, koop)]
        steps(60 - at)
        again, other, *parts = regression(largest=1e-2, momentum=0.5, times=times)
        for part, state in zip((*parts, other), saved, strict=True):
            part.load_state_dict(state)
        again(60 - at)
        assert bits(model, optimizer) == bits(*parts)
        assert [jump.step for jump in koop.jumps] == [jump.step for jump in other.jumps]
        assert any(jump.moves > 1 for jump in koop.jumps)


def test_backward_sees_each_gradient_as_without_koopt():
    """The hooks look and do not touch."""
    found = []
    for watched in (False, True):
        parameters = [nn.Parameter(torch.linspace(1, 2, 3)), nn.Parameter(torch.ones(2))]
        Clipping(parameters).watch(watched)
        backward(parameters, 3.0)
        found.append([parameter.grad for parameter in parameters])
    assert all(itertools.starmap(torch.equal, zip(*found, strict=True)))
