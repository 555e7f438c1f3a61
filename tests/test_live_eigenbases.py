"""Moves in the eigenbases of gradients: what they are, where they are made, and what they leave alone."""

import copy
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_tasks import Task, adam, bits, sgd
from torch import nn
from torch.nn.functional import mse_loss

import koopt
from koopt.live import eigenbases
from koopt.live.eigenbases import FIRST, MEMORY, Eigenbases, Matrix
from koopt.live.examples import Examples

NOTHING = 1e-30  # a rate at which no weight is moved, and yet a step taken


def stepped(weight, optimizer, held, gradients):
    """A move for each gradient; returns the last."""
    before = weight.detach().clone()
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        held.replace()
    return weight.detach() - before


def made(shape, rate=NOTHING, largest=256, dtype=torch.float64, make=torch.optim.Adam, **options):
    weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = make([weight], lr=rate, **options)
    return weight, optimizer, Eigenbases(optimizer, {"weight": weight}, largest)


def randoms(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(count, rows, columns, seed=0):
    """Of very different sizes in other coordinates than the weights' own."""
    turn = torch.linalg.qr(randoms(1, rows, rows, seed=seed + 1)[0])[0]
    sizes = torch.logspace(0, -3, rows, dtype=torch.float64)[:, None]
    return turn @ (sizes * randoms(count, rows, columns, seed=seed))


def test_a_gradient_of_rank_one_is_followed_as_adam_follows_a_single_weight():
    left, right = (torch.tensor(one, dtype=torch.float64) for one in ([0.6, 0.8], [0.36, 0.48, 0.8]))
    gradient = 3 * torch.outer(left, right)
    weight, optimizer, held = made((2, 3), rate=0.1)
    move = stepped(weight, optimizer, held, [gradient] * (FIRST + 5))
    assert held.steps == 6
    assert torch.allclose(move, -0.1 * gradient / 3, atol=1e-6)  # Adam's own would be -0.1 for each weight


def reference(gradients, rate, betas=(0.9, 0.999), epsilon=1e-8):
    """The move after the first bases, from all gradients, in dense algebra on the weights as one vector."""
    rows = sum(g @ g.T for g in gradients)
    columns = sum(g.T @ g for g in gradients)
    (_, left), (_, right) = torch.linalg.eigh(rows), torch.linalg.eigh(columns)
    basis = torch.kron(left, right)
    momentum = sum((1 - betas[0]) * betas[0] ** k * g for k, g in enumerate(reversed(gradients))).flatten() @ basis
    squares = sum((1 - betas[1]) * betas[1] ** k * g**2 for k, g in enumerate(reversed(gradients)))
    squares = squares.sum() / (1 - betas[1] ** len(gradients))
    shares = [torch.linalg.eigvalsh(one) / one.trace() for one in (rows, columns)]
    start = torch.kron(*shares) * squares
    squares = MEMORY * start + (1 - MEMORY) * (gradients[-1].flatten() @ basis) ** 2
    squares = torch.maximum(squares, momentum**2)
    step = momentum / (squares.sqrt() + epsilon) / (1 - betas[0] ** len(gradients))
    return -rate * (basis @ step).view_as(gradients[0])


def test_the_first_move_is_that_of_a_dense_reference():
    gradients = randoms(FIRST, 4, 3)
    weight, optimizer, held = made((4, 3))
    stepped(weight, optimizer, held, gradients[:-1])
    optimizer.param_groups[0]["lr"] = 0.1
    move = stepped(weight, optimizer, held, gradients[-1:])
    assert torch.allclose(move, reference(list(gradients), 0.1), rtol=1e-4)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), shape=st.tuples(st.integers(2, 5), st.integers(2, 5)), steps=st.integers(0, 25))
def test_moves_turn_with_the_coordinates(seed, shape, steps):
    gradients = randoms(FIRST + steps, *shape, seed=seed)
    turns = [torch.linalg.qr(randoms(1, side, side, seed=seed + 1)[0])[0] for side in shape]
    moves = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eigenbases, "WORTH", math.inf)  # in some coordinates bases are of less use
        for given_ in (gradients, turns[0] @ gradients @ turns[1]):
            weight, optimizer, held = made(shape)
            stepped(weight, optimizer, held, given_[:-1])
            optimizer.param_groups[0]["lr"] = 0.1
            moves.append(stepped(weight, optimizer, held, given_[-1:]))
    assert torch.allclose(turns[0] @ moves[0] @ turns[1], moves[1], atol=1e-5)
    assert moves[0].abs().max() > 1e-3


def test_weight_decay_that_is_a_part_of_the_loss_is_a_part_of_the_gradient():
    moves = []
    for decay in (0.0, 0.1):
        weight, optimizer, held = made((3, 3), weight_decay=decay)
        weight.data.fill_(2.0)
        gradients = correlated(30, 3, 3) + (0.0 if decay else 0.2)
        stepped(weight, optimizer, held, gradients[:-1])
        optimizer.param_groups[0]["lr"] = 0.1
        moves.append(stepped(weight, optimizer, held, gradients[-1:]))
    assert torch.allclose(*moves, atol=2e-3)
    assert moves[0].abs().max() > 0.01


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{"maximize": True}, {"foreach": False}, {"fused": True}])
def test_one_basis_that_is_the_identity_leaves_moves_nearly_alone(make, options):
    """Gradients of one entry each: products are diagonal, and what differs from Adam is the memory of squares."""
    entry = torch.zeros(2, 2, dtype=torch.float64)
    entry[0, 1] = 2.0
    runs = [made((2, 2), rate=0.01, make=make, **options) for _ in range(2)]
    for weight, optimizer, held in runs:
        weight.data.fill_(1.0)
        if held is runs[0][2]:
            stepped(weight, optimizer, held, [entry] * 30)
        else:
            for _ in range(30):
                weight.grad = entry.clone()
                optimizer.step()
    assert runs[0][2].steps == 10  # then it is seen that nothing is correlated
    ours, own = (weight.detach() for weight, _, _ in runs)
    assert torch.allclose(ours, own, atol=2e-3)
    assert (own - 1).abs().max() > 0.2


def test_what_the_optimizer_holds_is_its_own():
    gradients = correlated(30, 4, 3)
    states = []
    for replaced in (True, False):
        weight, optimizer, held = made((4, 3), rate=0.01)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
            if replaced:
                held.replace()
        states.append(optimizer.state[weight])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_side_that_is_too_long_keeps_its_coordinates():
    weight, optimizer, held = made((3, 2, 5), rate=0.1, largest=6)
    assert [one is None for one in held.matrices["weight"].products] == [False, True]
    gradient = torch.zeros(3, 2, 5, dtype=torch.float64)
    gradient[:, 1, 2] = torch.tensor([1.0, 2.0, 2.0])
    move = stepped(weight, optimizer, held, [gradient] * (FIRST + 1))
    assert torch.allclose(move, -0.1 * gradient / 3, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (), (1, 1), (300, 300), (1, 1025), (0, 3)], ids=str)
def test_what_is_no_matrix_of_a_short_side_is_left_to_the_optimizer(shape):
    assert not made(shape)[2].matrices


@pytest.mark.parametrize(
    ("shape", "found"), [((10, 784), (10, 784)), ((128, 784), (128, None)), ((20, 1024), (20, None))]
)
def test_a_longer_side_has_a_basis_where_that_costs_no_more_than_a_square_matrix(shape, found):
    products = made(shape)[2].matrices["weight"].products
    assert [None if one is None else len(one) for one in products] == list(found)


def test_the_basis_of_a_longer_side_is_renewed_more_rarely(monkeypatch):
    """What it holds is an eigenbasis still, after many more steps."""
    monkeypatch.setattr(eigenbases, "LARGEST", 4)  # what rareness goes by
    weight, optimizer, held = made((1, 8), largest=4)
    matrix, changes = held.matrices["weight"], []
    columns = matrix.bases[1]
    stretched = torch.arange(1.0, 9.0, dtype=torch.float64)
    for gradient in randoms(200, 1, 8):
        before = columns.clone()
        stepped(weight, optimizer, held, [gradient * stretched])
        if not torch.equal(before, columns):
            changes.append(matrix.taken // 10)
    assert changes == [1, 2, 4, 8, 12, 16, 20]
    assert torch.allclose(columns.mT @ columns, torch.eye(8, dtype=torch.float64))


def test_momentum_of_gradients_that_the_bases_have_not_seen_is_not_scaled_up():
    """Bases found long after the start are of the last gradients; momentum is of older ones, too."""
    weight, optimizer, held = made((4, 4), rate=0.1)
    old = randoms(30, 4, 4)
    for gradient in old:
        weight.grad = gradient.clone()
        optimizer.step()
    seen = torch.zeros(4, 4, dtype=torch.float64)
    seen[0, 0] = 1e-3
    before = weight.detach().clone()
    stepped(weight, optimizer, held, [seen] * FIRST)
    assert held.steps == 1
    assert (weight.detach() - before).norm() < 0.1 * 16 * FIRST / 2
    move = stepped(weight, optimizer, held, [seen])
    assert move.abs().max() <= 0.1 * math.sqrt(16)


def test_gradients_that_are_zero_or_not_there_move_nothing():
    weight, optimizer, held = made((3, 3), rate=0.1)
    stepped(weight, optimizer, held, [torch.zeros(3, 3, dtype=torch.float64)] * 40)
    assert held.steps == 31
    assert torch.equal(weight, torch.zeros_like(weight))
    weight.grad = None
    optimizer.step()
    held.replace()
    assert held.steps == 31


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_a_gradient_that_cannot_be_multiplied_hands_back_to_the_optimizer(bad):
    """Squares of 1e200 are infinite: Adam makes no move on them, and nor do we."""
    gradients = correlated(40, 3, 3)
    gradients[FIRST + 3, 0, 0] = bad
    weight, optimizer, held = made((3, 3), rate=0.1)
    stepped(weight, optimizer, held, gradients)
    if bad == 1e200:
        assert bool(weight.isfinite().all())
    assert 4 <= held.steps < 31


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised(dtype):
    weight, optimizer, held = made((3, 3), rate=0.1, dtype=dtype)
    stepped(weight, optimizer, held, correlated(20, 3, 3).to(dtype))
    assert held.matrices["weight"].squares.dtype == torch.float32
    assert held.steps == 11
    assert bool(weight.isfinite().all())


def test_amsgrad_keeps_its_own_moves():
    weight, optimizer, held = made((3, 3), rate=0.1, amsgrad=True)
    stepped(weight, optimizer, held, randoms(20, 3, 3))
    assert held.steps == 0


def test_a_step_that_a_scaler_skips_is_no_move():
    weight, optimizer, held = made((3, 3), rate=0.1)
    stepped(weight, optimizer, held, correlated(20, 3, 3))
    optimizer.found_inf = torch.tensor(1.0)
    before = weight.detach().clone()
    held.replace()
    assert torch.equal(weight, before)
    assert held.steps == 11


def noisy(make, steps=400, seed=0, size=8, **options):
    """Regression in correlated coordinates from few examples at a time; the loss at the end, without their noise."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    scales = torch.logspace(0, -2, 12)
    target = torch.randn(4, 12, generator=generator)

    def batch(count, noise):
        x = (torch.randn(count, 12, generator=generator) * scales) @ turn
        return x, x @ target.T + noise * torch.randn(count, 4, generator=generator)

    torch.manual_seed(seed)
    model = nn.Linear(12, 4, bias=False)
    optimizer = make(model.parameters())
    held_out = batch(500, noise=0.0)
    koop = None
    if options:
        koop = koopt.attach(optimizer, model, guard=lambda: mse_loss(model(held_out[0]), held_out[1]), **options)
    for _ in range(steps):
        x, y = batch(size, noise=0.3)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    return model, optimizer, koop, mse_loss(model(held_out[0]), held_out[1]).item()


def adamw(parameters, rate=0.02):
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


def test_correlated_coordinates_are_no_hindrance():
    def loss(side):
        make = functools.partial(adamw, rate=0.01)
        return sum(noisy(make, seed=seed, precondition=side, mode="auto")[-1] for seed in (0, 1))

    assert loss(64) < 0.4 * loss(0)


def test_by_default_moves_are_replaced_where_noise_is_found():
    _, _, koop, loss = noisy(adamw, mode="auto")
    first = next(jump.step for jump in koop.jumps if jump.reason.startswith("noise"))
    assert not any(jump.accepted for jump in koop.jumps)
    assert koop.preconditioned == 400 - first - FIRST + 1
    assert loss < noisy(adamw, mode="auto", precondition=0)[-1]


@pytest.mark.parametrize("seed", [5, 7])
def test_one_lucky_move_does_not_hide_noise(seed):
    koop = noisy(adamw, steps=60, seed=seed, mode="auto")[2]
    assert [jump.accepted for jump in koop.jumps] == [True, False]
    assert koop.jumps[1].reason.startswith("noise")
    assert koop.preconditioned == 60 - koop.jumps[1].step - FIRST + 1


@pytest.mark.parametrize(("size", "seed", "moves"), [(32, 0, 2), (128, 1, 7), (64, 2, 15)])
def test_a_lucky_streak_does_not_hide_noise(size, seed, moves):
    koop = noisy(adamw, steps=100, seed=seed, size=size, mode="auto")[2]
    assert [jump.moves for jump in koop.jumps[:2]] == [moves, 0]
    assert koop.jumps[1].reason.startswith("noise")
    assert koop.preconditioned == 100 - koop.jumps[1].step - FIRST + 1


def test_a_streak_that_ends_in_rounding_is_not_taken_for_noise():
    torch.manual_seed(0)
    x, model = torch.randn(64, 6), nn.Linear(6, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def loss():
        return mse_loss(model(x), x[:, :2])

    koop = koopt.attach(optimizer, model, guard=loss)
    for _ in range(200):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert koop.jumps[0].moves < 32
    assert any(jump.reason.startswith("noise") for jump in koop.jumps)
    assert koop.preconditioned == 0


def test_noise_is_found_without_steps_along_secants():
    koop = noisy(adamw, steps=60, mode="auto", history=0)[2]
    (look,) = koop.jumps
    assert (look.step, look.accepted, look.evaluations) == (20, False, 4)
    assert look.reason.startswith("noise: the guard's slope is off")
    assert koop.preconditioned == 60 - 20 - FIRST + 1


def test_noise_is_not_looked_for_where_nothing_follows_from_it():
    for options in ({"precondition": 0}, {"precondition": 64}, {"max_overhead": 0.0}, {"mode": "jump"}):
        assert not noisy(adamw, steps=25, **({"mode": "auto", "history": 0} | options))[2].jumps


@pytest.mark.parametrize("decay", [0.0, 3.0])
@pytest.mark.parametrize("clip", [math.inf, 0.01])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_smooth_loss_is_not_taken_for_noise_without_secants(decay, clip, sign):
    """Nor is decay that is a part of gradients, nor are these where they are clipped, or of what is maximized."""

    def trained(attached):
        torch.manual_seed(0)
        x, model = torch.randn(64, 6), nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.003, weight_decay=decay, maximize=sign < 0)

        def loss():
            return mse_loss(model(x), x[:, :1] * x[:, 1:2])

        koop = None
        if attached:
            options = {"cycle": 1000, "history": 0, "mode": "auto", "max_overhead": 1.0}
            koop = koopt.attach(optimizer, model, guard=loss, **options)
        for _ in range(170):
            optimizer.zero_grad()
            (sign * loss()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        return koop, bits(model, optimizer)

    koop, own = trained(True)
    assert koop.jumps == []
    assert koop._attempts.schedule.spent > 3  # looks at 20, 40, 80 and 160
    assert own == trained(False)[1]


def test_what_is_known_of_noise_goes_on_in_a_resumed_run():
    koop, again = (noisy(adamw, steps=steps, mode="auto")[2]._attempts for steps in (400, 5))
    assert koop.noisy
    assert koop.schedule.noisy > 1
    again.load_state_dict(koop.state_dict(), koop.jumps, 400)
    assert again.noisy
    assert again.schedule.noisy == koop.schedule.noisy


@pytest.mark.parametrize("options", [{"mode": "forecast"}, {"mode": "jump"}, {"precondition": 0}], ids=str)
def test_elsewhere_they_are_the_optimizers_bit_for_bit(options):
    options = {"mode": "auto"} | options
    if options["mode"] == "jump":
        options |= {"max_overhead": 0.0}
    model, optimizer, koop, _ = noisy(adamw, **options)
    plain = noisy(adamw)
    assert koop.preconditioned == 0
    assert bits(model, optimizer) == bits(*plain[:2])


def test_smooth_motion_keeps_the_optimizers_moves():
    task = Task(adam, steps=200)
    koop = task.attach(guard=task.loss, mode="auto", history=20)
    task.run()
    assert koop.jumps
    assert koop.preconditioned == 0


def test_other_optimizers_are_left_alone_and_refused_where_it_was_asked_for():
    task = Task(sgd)
    with pytest.raises(
        ValueError, match="precondition is 256, but the optimizer is SGD, expected torch's Adam or AdamW"
    ):
        task.attach(precondition=256)
    assert task.attach(guard=task.loss, mode="auto").preconditioned == 0


@pytest.mark.parametrize("value", [-1, True])
def test_what_is_no_length_is_refused(value):
    with pytest.raises(ValueError, match=r"precondition is .* expected a whole number >= 0, or None"):
        Task(adam).attach(precondition=value)


@pytest.mark.parametrize("loop", [{"accumulate": 3}, {"clip": True}, {"scaler": True}, {"onecycle": True}], ids=str)
def test_loops_of_all_kinds_have_them(loop):
    task = Task(adam, **loop)
    koop = task.attach(precondition=256)
    before = task.loss().item()
    task.run()
    assert koop.preconditioned == 51 - bool(loop.get("scaler"))  # one step is skipped
    assert task.loss().item() < before


def test_a_closure_is_called_as_often_as_without():
    task = Task(adam)
    koop = task.attach(precondition=256)
    calls = []

    def closure():
        calls.append(1)
        return task.closure()

    for _ in range(30):
        task.optimizer.step(closure)
    assert len(calls) == 30
    assert koop.preconditioned == 21


@pytest.mark.parametrize("at", [5, 19, 25])
@pytest.mark.parametrize("options", [{"precondition": 256}, {"mode": "auto", "history": 0, "cycle": 1000}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(at, options):
    def attached():
        task = Task(adam)
        guard = None if "precondition" in options else lambda: -task.loss()  # whose slope is off
        return task, task.attach(guard=guard, **options)

    task, koop = attached()
    task.run(at)
    state = copy.deepcopy((task.model.state_dict(), task.optimizer.state_dict(), koop.state_dict()))
    task.run(30)
    again, other = attached()
    again.run(3)
    again.model.load_state_dict(state[0])
    again.optimizer.load_state_dict(state[1])
    other.load_state_dict(state[2])
    again.run(30)
    assert again.bits == task.bits
    assert other.preconditioned == koop.preconditioned > 0


def test_a_state_of_other_sides_is_refused():
    state = Task(adam).attach(precondition=256).state_dict()
    with pytest.raises(ValueError, match="recorded with precondition=256, this run has precondition=4"):
        Task(adam).attach(precondition=4).load_state_dict(state)


def test_the_memory_held_is_counted():
    without, held = (Task(adam).attach(precondition=side).nbytes for side in (0, 256))
    weights = {(8, 3): (8, 3), (1, 8): (8,)}
    assert held - without == 4 * sum(3 * a * b + 2 * sum(s * s for s in sides) for (a, b), sides in weights.items())


def test_after_a_pause_what_was_seen_is_seen_anew():
    weight, optimizer, held = made((3, 3), rate=0.1)
    stepped(weight, optimizer, held, correlated(20, 3, 3))
    held.clear()
    stepped(weight, optimizer, held, 1e-3 * correlated(FIRST, 3, 3, seed=1))
    assert held.steps == 12
    assert held.matrices["weight"].products[0].max() < 1e-3


def test_the_first_gradients_weigh_alike():
    matrix = Matrix.of(torch.zeros(1, 2, dtype=torch.float64), largest=2)
    for value in (1.0, 2.0, 3.0):
        matrix.see(torch.tensor([[value, 0.0]], dtype=torch.float64), decay=0.98)
    assert matrix.products[1].tolist() == [[pytest.approx(14 / 3), 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("failing", [(torch.float32,), (torch.float32, torch.float64)])
def test_eigenvectors_that_are_not_found_stop_no_run(failing, monkeypatch, caplog):
    """LAPACK does not always find them in float32 where many rows are zero, as of units that are dead."""
    found = torch.linalg.eigh

    def eigh(product):
        if product.dtype in failing:
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return found(product)

    gradients = correlated(20, 6, 4).float()
    weight, optimizer, held = made((6, 4), rate=0.1, dtype=torch.float32)
    expected = stepped(weight, optimizer, held, gradients)
    own = made((6, 4), rate=0.1, dtype=torch.float32, largest=1)
    plain = stepped(*own, gradients)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    weight, optimizer, held = made((6, 4), rate=0.1, dtype=torch.float32)
    move = stepped(weight, optimizer, held, gradients)
    if len(failing) == 1:
        torch.testing.assert_close(move, expected, rtol=0.0, atol=1e-3)  # a hundredth of the rate
        assert held.steps == 11
    else:
        assert torch.equal(move, plain)
        assert held.steps == 0
        assert "the optimizer's moves are kept for a weight: linalg.eigh" in caplog.text


def test_coordinates_that_are_uncorrelated_are_kept():
    """Entries of very different sizes, each for itself: what the first few gradients seem to say is not so."""
    sizes = torch.logspace(0, -3, 36, dtype=torch.float64).view(6, 6)
    weight, optimizer, held = made((6, 6), rate=0.01)
    own, other, _ = made((6, 6), rate=0.01)
    gradients = randoms(300, 6, 6) * sizes
    stepped(weight, optimizer, held, gradients[:299])
    assert not held.matrices["weight"].used
    for gradient in gradients[:299]:
        own.grad = gradient.clone()
        other.step()
    start, own.grad = own.detach().clone(), gradients[299].clone()
    other.step()
    assert torch.allclose(stepped(weight, optimizer, held, gradients[299:]), own.detach() - start, atol=1e-12)
    assert 0 < held.steps < 100


def test_correlated_ones_are_left():
    weight, optimizer, held = made((6, 6), rate=0.01)
    stepped(weight, optimizer, held, correlated(300, 6, 6))
    assert held.matrices["weight"].used
    assert held.steps == 300 - FIRST + 1


def test_momentum_that_a_jump_has_changed_is_read_anew():
    task = Task(adam)
    koop = task.attach(guard=task.loss, mode="jump", momentum="reset", precondition=256, max_overhead=1.0)
    after = 0
    for step in range(60):
        task.step(step)
        if koop.jumps and koop.jumps[-1].accepted and koop.jumps[-1].step < koop.steps:
            after += 1
            for name, held in koop._bases.matrices.items():
                momentum = task.optimizer.state[task.model.get_parameter(name)]["exp_avg"]
                assert torch.allclose(held.momentum, held.turned(momentum), atol=1e-6)
    assert after > 5


def test_gradients_that_have_become_zero_move_nothing_by_bases():
    """Products of zeros say nothing, though Adam's average is still of what came before."""
    weight, optimizer, held = made((16, 16), rate=0.01, dtype=torch.float32)
    for gradient in 10 * randoms(100, 16, 16).float():
        weight.grad = gradient.clone()
        optimizer.step()
    move = stepped(weight, optimizer, held, torch.zeros(25, 16, 16))
    assert held.steps > 0
    assert bool(weight.isfinite().all())
    assert move.abs().max() <= 0.01 * 16


def test_a_run_that_is_rolled_back_after_nan_is_sound_again():
    weight, optimizer, held = made((3, 3), rate=0.01)
    gradients = correlated(40, 3, 3)
    stepped(weight, optimizer, held, gradients[:20])
    kept = weight.detach().clone(), copy.deepcopy(optimizer.state_dict())
    stepped(weight, optimizer, held, [torch.full((3, 3), math.nan, dtype=torch.float64)])
    with torch.no_grad():
        weight.copy_(kept[0])
    optimizer.load_state_dict(kept[1])
    stepped(weight, optimizer, held, gradients[20:])
    assert bool(weight.isfinite().all())


def test_an_optimizer_that_steps_within_autocast_moves_as_without():
    found = []
    for on in (False, True):
        weight, optimizer, held = made((3, 3), rate=0.01, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            stepped(weight, optimizer, held, correlated(40, 3, 3).float())
        found.append(weight.detach())
    assert torch.equal(*found)


def test_a_parameter_with_a_gradient_every_other_step_has_its_own_count():
    weights = [nn.Parameter(torch.zeros(3, 3, dtype=torch.float64)) for _ in range(2)]
    optimizer = torch.optim.Adam(weights, lr=0.01)
    held = Eigenbases(optimizer, dict(zip("ab", weights, strict=True)), 256)
    for step, gradient in enumerate(correlated(80, 3, 3)):
        optimizer.zero_grad()
        weights[step % 2].grad = gradient.clone()
        optimizer.step()
        held.replace()
    assert [(one.seen, one.taken) for one in held.matrices.values()] == [(10 + 15, 40)] * 2


def test_bases_follow_gradients_that_turn():
    first, second = (torch.tensor(one, dtype=torch.float64) for one in ([0.6, 0.8], [-0.8, 0.6]))
    weight, optimizer, held = made((2, 1), rate=0.01)
    signs = randoms(400, 1, 1)
    stepped(weight, optimizer, held, signs[:50] * first[:, None])
    assert held.matrices["weight"].bases[0][:, 0].abs().tolist() == pytest.approx([0.6, 0.8], abs=1e-6)
    stepped(weight, optimizer, held, signs[50:] * second[:, None])
    assert held.matrices["weight"].bases[0][:, 0].abs().tolist() == pytest.approx([0.8, 0.6], abs=1e-3)


def test_bases_on_another_device_are_found_anew():
    weight, optimizer, held = made((3, 3), rate=0.01)
    stepped(weight, optimizer, held, correlated(20, 3, 3))
    held.matrices["weight"] = Matrix.of(torch.zeros(3, 3, device="meta"), 256)
    stepped(weight, optimizer, held, correlated(20, 3, 3))
    assert held.matrices["weight"].products[0].device.type == "cpu"
    assert held.steps == 2 * 11


def test_what_is_not_used_is_not_used_in_a_resumed_run():
    gradients = randoms(33, 3, 3)
    weight, optimizer, held = made((3, 3), rate=0.01)
    stepped(weight, optimizer, held, gradients[:25])
    assert not held.matrices["weight"].used
    other, again, resumed = made((3, 3), rate=0.01)
    with torch.no_grad():
        other.copy_(weight)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(held.state_dict())
    stepped(weight, optimizer, held, gradients[25:])
    stepped(other, again, resumed, gradients[25:])
    assert torch.equal(weight, other)


def test_a_state_without_bases_is_taken_over_where_they_were_not_asked_for():
    """As of sharded weights; and so is one of bases of other weights."""
    koop = noisy(adamw, steps=100, mode="auto")[2]
    assert koop.preconditioned
    state = koop.state_dict()
    without = {name: value for name, value in state.items() if name != "bases"}
    again = noisy(adamw, steps=50, mode="auto")[2]
    again.load_state_dict(without)
    assert again.steps == 100
    assert all(held.seen == 0 for held in again._bases.matrices.values())
    again.load_state_dict(state)
    assert again.preconditioned == koop.preconditioned
    parts = {name: {"another": part["weight"]} for name, part in state["bases"].items() if name != "steps"}
    again.load_state_dict(state | {"bases": parts | {"steps": 3}})
    assert all(held.seen == 0 for held in again._bases.matrices.values())
    with pytest.raises(ValueError, match="recorded with precondition=None, this run has precondition=64"):
        noisy(adamw, steps=5, mode="auto", precondition=64)[2].load_state_dict(state)


def wide(examples=1200, side=300, **options):
    """A network whose sides are longer than 256, in noise; `examples` go through it in a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, side), nn.Tanh(), nn.Linear(side, side), nn.Tanh(), nn.Linear(side, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    koop = koopt.attach(optimizer, model, **({"guard": lambda: 1.0, "mode": "auto", "cycle": 1000} | options))
    generator = torch.Generator().manual_seed(0)

    def step():
        optimizer.zero_grad()
        x = torch.randn(examples, 8, generator=generator)
        mse_loss(model(x), x[:, :1]).backward()
        optimizer.step()

    return model, optimizer, koop, step


def longest(koop):
    return max(len(basis) for held in koop._bases.matrices.values() for basis in held.bases if basis is not None)


def test_longer_sides_have_bases_where_many_examples_go_through_them():
    for examples, options in ((1200, {}), (1199, {}), (1200, {"precondition": 256})):
        model, _, koop, step = wide(examples, **options)
        model(torch.ones(10_000, 8))  # as to look at it
        step()
        step()
        assert ("2.weight" in koop._bases.matrices) == (examples == 1200 and not options)


def test_steps_that_a_scaler_skips_are_not_counted():
    model = nn.Linear(300, 300)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)  # others are not even called then
    koop = koopt.attach(optimizer, model, guard=lambda: 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * model(torch.ones(700, 300)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert koop.steps == 2
    assert koop._bases.examples == {"weight": 700}


def test_what_takes_more_memory_than_is_free_has_no_longer_bases(monkeypatch, caplog):
    for free, kept in ((10**3, False), (10**9, True)):
        _, _, koop, step = wide()
        before = koop.nbytes
        monkeypatch.setattr("koopt.live.handle.free_memory", lambda device, free=free: free)
        step()
        step()
        assert ("2.weight" in koop._bases.matrices) == kept
        assert koop.nbytes - before == (4 * (3 * 300**2 + 4 * 300**2) if kept else 0)
    assert "bases of longer sides need 0.00235 GiB more, which are not free" in caplog.text


@pytest.mark.parametrize("at", [0, 1, 2, 40])
def test_a_resumed_run_has_the_longer_sides_of_the_first_one(at):
    model, optimizer, koop, step = wide()
    for _ in range(at):
        step()
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), koop.state_dict()))
    rest = torch.randn(45, 1200, 8)

    def go_on(model, optimizer):
        for x in rest:
            optimizer.zero_grad()
            mse_loss(model(x), x[:, :1]).backward()
            optimizer.step()
        return bits(model, optimizer)

    other = wide()
    other[0].load_state_dict(state[0])
    other[1].load_state_dict(state[1])
    other[2].load_state_dict(state[2])
    assert go_on(*other[:2]) == go_on(model, optimizer)
    assert koop.preconditioned == other[2].preconditioned > 0
    assert longest(koop) == longest(other[2]) == 300


@pytest.mark.parametrize("examples", [7, {"0.weight": -1, "2.weight": 0, "4.weight": 0}], ids=str)
def test_numbers_of_examples_that_cannot_be_are_refused(examples):
    _, _, koop, step = wide()
    step()
    step()
    state = koop.state_dict()
    with pytest.raises(ValueError, match="state"):
        wide()[2].load_state_dict(state | {"bases": state["bases"] | {"examples": examples}})


def test_examples_are_counted_in_one_step_and_not_in_looks():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 5), nn.LayerNorm(5))
    named = dict(model.named_parameters())
    examples = Examples(model, {name: one for name, one in named.items() if name != "2.bias"})
    for count in (3, 4):
        model(torch.zeros(count, 1, 8, 8))
    with torch.no_grad():
        model(torch.zeros(100, 1, 8, 8))
    examples.end()
    model(torch.zeros(100, 1, 8, 8))
    counts = {name: count for name, count in examples.counts.items() if count}
    assert counts == {"0.weight": 7 * 36, "2.weight": 7}


def test_no_hook_is_left_and_none_is_compiled():
    model, _, koop, step = wide()
    assert sum(len(module._forward_hooks) for module in model.modules()) == 3
    step()
    step()
    assert not any(module._forward_hooks for module in model.modules())
    model, _, koop, _ = wide()
    koop.detach()
    assert not any(module._forward_hooks for module in model.modules())
    model = nn.Linear(3, 3)
    for compiled in (torch.compile(model, backend="eager"), nn.Sequential(torch.compile(model, backend="eager"))):
        Examples(compiled, dict(model.named_parameters()))
        assert not model._forward_hooks
    model.compile(backend="eager")
    Examples(model, dict(model.named_parameters()))
    assert not model._forward_hooks


def test_a_model_that_is_compiled_afterwards_is_left_uncounted():
    model = nn.Linear(3, 3)
    examples = Examples(model, dict(model.named_parameters()))
    torch.compile(model, backend="eager")(torch.ones(4, 3)).sum().backward()
    assert set(examples.counts.values()) == {0}


def test_reparametrized_weights_are_not_computed_to_be_counted():
    model = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Examples(model, dict(model.named_parameters()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
