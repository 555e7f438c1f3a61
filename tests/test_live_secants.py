"""Steps along secants against dense algebra, and when they are taken."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from live_tasks import Bowl, Task, adam, bits, flat, resumable, sgd
from torch.nn.functional import mse_loss

import koopt
from koopt.live.budget import SIDE, Costs, Schedule
from koopt.live.jumps import NEAR, SHORT, STRICTER, TOLERANCE, agreement, follow
from koopt.live.moments import recall
from koopt.live.secants import TEMPERED, Secants, Step, as_trained, gradients, newton

F64 = torch.float64


def recorded(points, length, dtype=F64, expected=()):
    secants = Secants([torch.zeros(len(points[0][0]))], length, dtype, torch.device("cpu"))
    for (weights, gradient), product in itertools.zip_longest(points, [0.0, *expected], fillvalue=0.0):
        secants.begin([weights])
        secants.end([gradient], product)
    return secants


def path(count, size, seed=0, saddle=False):
    """Points of a run on a quadratic, its Hessian, and gradients there."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=F64)
    hessian = root + root.T if saddle else root @ root.T + 0.1 * torch.eye(size, dtype=F64)
    weights = torch.randn(count, size, generator=generator, dtype=F64).cumsum(dim=0)
    return hessian, [(x, hessian @ x) for x in weights]


def dense_bfgs(points, diagonal, expected):
    """The inverse Hessian that self-scaled BFGS has after all pairs, as a matrix; negative curvature turned round."""
    pairs = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(points)]
    pairs = [(step, change if step @ change > 0 else -change) for step, change in pairs]
    step, change = pairs[0]
    inverse = torch.diag(diagonal) * (step @ change) / (change @ (diagonal * change))
    for place, (step, change) in enumerate(pairs):
        share = 1 / (step @ change)
        left = torch.eye(len(step), dtype=F64) - share * torch.outer(step, change)
        grown = inverse * max(1.0, expected[place] * share.item()) if place else inverse
        inverse = left @ grown @ left.T + share * torch.outer(step, step)
    return inverse


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(2, 7),
    size=st.integers(1, 6),
    seed=st.integers(0, 1000),
    expected=st.lists(st.floats(0, 30), min_size=6, max_size=6),
    saddle=st.booleans(),
)
def test_two_loops_are_the_dense_update(count, size, seed, expected, saddle):
    _, points = path(count, size, seed, saddle)
    pairs = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(points)]
    assume(all(abs(step @ change) > 0.05 * step.norm() * change.norm() for step, change in pairs))
    secants = recorded(points, 10, expected=expected[: count - 1])
    steps, changes = secants.steps[: secants.pairs], secants.changes[: secants.pairs]
    own = steps.square().sum(dim=0).sqrt() / changes.square().sum(dim=0).sqrt()
    for diagonal in (None, torch.linspace(1, 2, size, dtype=F64)):
        step = newton(secants, diagonal)
        guess = own if diagonal is None else (own * diagonal).sqrt()
        inverse = dense_bfgs(points, guess**TEMPERED, expected)
        wanted = -inverse @ points[-1][1]
        torch.testing.assert_close(step.direction, wanted, rtol=1e-6, atol=1e-8 * wanted.norm().item())
        torch.testing.assert_close(step.origin, points[-1][0])
        assert step.slope == pytest.approx((wanted @ points[-1][1]).item(), rel=1e-6)
        assert step.slope < 0  # downhill, as the update keeps the inverse positive
        torch.testing.assert_close(inverse @ changes[-1], steps[-1], rtol=1e-6, atol=1e-6)  # the oracle's own check


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 9), length=st.integers(1, 5), seed=st.integers(0, 1000), each=st.integers(1, 4))
def test_products_with_later_changes_are_those_of_all_pairs_however_often_they_are_measured(count, length, seed, each):
    _, points = path(count, 4, seed)
    secants = Secants([torch.zeros(4)], length, F64, torch.device("cpu"))
    for place, (weights, gradient) in enumerate(points):
        secants.begin([weights])
        secants.end([gradient])
        if place % each == 0:
            secants.measure(None)
    secants.measure(None)
    assert secants.told.sum() == secants.pairs
    order = torch.tensor(secants.order())
    every = (secants.products, secants.steps @ secants.changes.T)
    found, wanted = (products[order[:, None], order].triu() for products in every)
    torch.testing.assert_close(found, wanted)


def test_along_one_line_the_step_ends_where_the_gradient_vanishes():
    points = [(torch.tensor([x], dtype=F64), torch.tensor([3 * (x - 2)], dtype=F64)) for x in (7.0, 5.0, 4.5)]
    step = newton(recorded(points, 4))
    torch.testing.assert_close(step.origin + step.direction, torch.tensor([2.0], dtype=F64))


def test_the_oldest_pairs_go_and_order_is_of_time():
    _, points = path(9, 4)
    kept, again = recorded(points, 3), recorded(points[-4:], 3)
    assert kept.pairs == again.pairs == 3
    torch.testing.assert_close(newton(kept).direction, newton(again).direction)
    assert kept.order() == [2, 0, 1]


def test_pairs_that_tell_of_no_curvature_are_left_out():
    _, points = path(4, 3)
    alone = newton(recorded(points, 10)).direction
    straight = [(points[0][0] + torch.ones(3, dtype=F64), points[0][1])]
    mixed = recorded([*straight, *points], 10)
    assert mixed.pairs == 4
    torch.testing.assert_close(newton(mixed).direction, alone)
    broken = recorded([(points[0][0], torch.full((3,), math.nan, dtype=F64)), *points], 10)
    torch.testing.assert_close(newton(broken).direction, alone)
    assert newton(recorded([*straight, points[0]], 10)) is None
    assert newton(recorded(points[:1], 10)) is None


def test_a_saddle_is_left_as_fast_as_a_minimum_is_neared():
    """Of x^2 / 2 - y^2 / 2 the step ends at x = 0, and twice as far from y = 0."""
    places = [torch.tensor(place, dtype=F64) for place in ((2.0, 1.0), (1.0, 1.0), (1.0, 2.0))]
    secants = recorded([(place, place * torch.tensor([1.0, -1.0], dtype=F64)) for place in places], 4)
    step = newton(secants)
    torch.testing.assert_close(step.direction, torch.tensor([-1.0, 2.0], dtype=F64))
    assert step.slope == -5
    again = newton(secants)  # measured, and so turned, once
    torch.testing.assert_close(again.direction, step.direction)


def test_weights_beside_a_saddle_are_led_away_from_it():
    """(x^2 - 1)^2 has its maximum between two minima; descent from a millionth beside it takes 1,400 steps."""
    model = torch.nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1e-6, 1.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=2.5e-3)

    def loss():
        x, y = model.weight[0]
        return (x.square() - 1).square() + y.square()

    koop = koopt.attach(optimizer, model, loss)
    for _ in range(80):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert koop.jumps[0].accepted
    assert loss().item() < 1e-9


def test_no_move_is_longer_than_a_share_of_the_weights_ever_were():
    _, points = path(4, 3)
    for shift in (0.0, 1e3):
        secants = recorded([(x + shift, gradient) for x, gradient in points], 10)
        step = newton(secants)
        largest = (points[-1][0] + shift).norm()
        assert secants.largest == largest
        assert step.longest == pytest.approx(min(1.0, 0.3 * (largest / step.direction.norm()).item()))
        secants.begin([torch.zeros(3, dtype=F64)])
        secants.end([points[0][1]])
        newton(secants)
        assert secants.largest == largest
        secants.clear()
        assert secants.largest == 0


def test_lengths_shrink_to_where_a_parabola_ends_until_the_loss_is_lower():
    step = Step(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64), 3, -1.0)

    def tried(loss, count=4, step=step):
        seen = []

        def evaluate(weights):
            seen.append(weights[0].item())
            return loss(seen[-1])

        return follow(step, [torch.zeros(1, dtype=F64)], loss(0.0), count, evaluate), seen

    found, seen = tried(lambda x: (x - 4) ** 2)
    assert seen == [1]
    assert (found.weights[0].item(), found.after, found.reason, found.candidate.rank) == (1.0, 9.0, "better", 3)
    assert found.expected == 1.0
    _, seen = tried(lambda x: (x - 4) ** 2, step=step._replace(longest=0.25))
    assert seen == [0.25]
    found, seen = tried(lambda x: 2.5 * (x - 0.2) ** 2)  # whose slope is that of the step
    assert seen == pytest.approx([1, 0.2])
    assert found.after == pytest.approx(0)
    assert found.expected == pytest.approx(0.04)  # as the inverse of the pairs has it, not the loss
    found, seen = tried(lambda x: x, count=4)
    assert seen == pytest.approx([1, 0.25, 0.0625, 0.015625])
    assert found.weights is None
    assert found.reason == "no candidate was better"
    found, seen = tried(lambda x: math.nan if x else 1.0, count=3)
    assert seen == pytest.approx([1, 0.05, 0.0025])
    assert found.weights is None
    steep = step._replace(slope=-1e6)  # a fall by less than it promises is kept, but a better one is looked for
    found, seen = tried(lambda x: -x, step=steep, count=3)
    assert (len(seen), found.after) == (3, -1.0)


def test_disagreement_is_small_for_the_same_loss_and_large_for_another():
    hessian, points = path(6, 5)
    step = newton(recorded(points, 10))
    saved = [points[-1][0]]

    def loss(weights):
        return 0.5 * (weights[0] @ hessian @ weights[0]).item()

    found = follow(step, saved, loss(saved), 4, loss)

    def disagreement(*given):
        return abs(agreement(found, *given) - 1)

    curvature = (step.direction @ hessian @ step.direction).item()
    expected = abs(SHORT * found.length * curvature / step.slope) / 2
    assert disagreement(loss(saved), saved, loss) == pytest.approx(expected, rel=1e-3)
    assert disagreement(None, saved, loss) == pytest.approx(expected, rel=1e-3)
    assert expected < TOLERANCE / 2  # also for steps that shrink a loss by all that there is
    assert disagreement(None, saved, lambda weights: -loss(weights)) > 1.9
    assert not disagreement(None, saved, lambda weights: math.nan) <= TOLERANCE

    def bent(weights, at=0.4 * SHORT * found.length):  # beyond a fiftieth of the way it grows
        gone = ((weights[0] - step.origin) @ step.direction / step.direction.square().sum()).item()
        return loss(saved) + step.slope * gone + 3 * abs(step.slope) * max(0.0, gone - at)

    assert disagreement(None, saved, bent) < STRICTER

    def steeper(weights):  # by half, but from nearby by a tenth only
        gone = ((weights[0] - step.origin) @ step.direction / step.direction.square().sum()).item()
        return loss(saved) + (1.1 if gone < 2 * NEAR * found.length else 1.5) * step.slope * gone

    assert disagreement(None, saved, steeper) == pytest.approx(0.5)
    assert disagreement(None, saved, lambda weights: bent(weights, 0.0)) > 1
    assert disagreement(1e9, saved, lambda weights: -loss(weights)) == 0  # not to be told from rounding
    for scale in (0.01, 100.0):
        scaled = agreement(found, None, saved, lambda weights, scale=scale: scale * loss(weights), None, scale)
        assert abs(scaled - 1) == pytest.approx(expected, rel=1e-3)
        assert agreement(found, None, saved, lambda weights, scale=scale: scale * loss(weights)) == pytest.approx(
            scale, rel=0.1
        )


@pytest.mark.parametrize("mode", ["auto", "jump"])
def test_smooth_training_follows_secants_and_is_ahead(mode):
    task, plain = Task(adam), Task(adam)
    koop = task.attach(guard=task.loss, mode=mode, cycle=100, tail=30, max_overhead=0.06, history=None)
    task.run(steps=200)
    plain.run(steps=200)
    taken = [jump for jump in koop.jumps if jump.forecaster == "secants" and jump.accepted]
    assert taken[0].step == 20
    assert sum(jump.moves for jump in taken) > 100  # one after the other
    assert all(jump.after < jump.before and jump.horizon is None and jump.rank > 0 for jump in taken)
    assert task.loss().item() < 0.01 * plain.loss().item()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_move_to_where_the_gradient_is_not_finite_is_taken_back(broken):
    task = Task(adam)
    koop = task.attach(guard=task.loss, mode="auto", cycle=1000, tail=30, history=None)
    task.run(steps=30)
    assert koop.jumps[-1].moves > 5
    begun = flat(task.model)
    task.optimizer.zero_grad()
    task.loss().backward()
    task.optimizer.step()  # after which it is moved again
    assert not torch.equal(flat(task.model), begun)
    step = next(iter(task.optimizer.state.values()))["step"].item()
    next(task.model.parameters()).grad.view(-1)[0] = broken
    task.optimizer.step()
    assert torch.equal(flat(task.model), begun)
    assert next(iter(task.optimizer.state.values()))["step"].item() == step  # the optimizer saw nothing of it
    assert koop.jumps[-1].reason.startswith("the gradient is not finite")
    assert (koop.jumps[-1].accepted, koop.jumps[-1].evaluations, koop.jumps[-2].accepted) == (False, 0, True)
    task.run(steps=200)
    assert flat(task.model).isfinite().all()
    assert koop.jumps[-1].step > 51  # tried again, not at once
    assert task.loss().item() < koop.jumps[0].before


def test_in_auto_mini_batches_are_told_from_their_gradients():
    task = Task(sgd)
    generator = torch.Generator().manual_seed(3)
    x, y = task.x, task.y
    koop = task.attach(guard=lambda: mse_loss(task.model(x), y), mode="auto", cycle=1000, tail=30, history=50)
    for step in range(200):
        rows = torch.randint(0, 32, (4,), generator=generator)
        task.x, task.y = x[rows], y[rows] + torch.randn(4, 1, generator=generator)
        task.step(step)
    assert len(koop.jumps) <= 3  # and then no more
    assert sum(jump.moves for jump in koop.jumps) <= 1  # by chance
    assert any(jump.reason.startswith("noise: the guard's slope is off") for jump in koop.jumps)


def test_no_history_no_secants():
    bowl = Bowl(history=0, cycle=100, tail=30)
    bowl.run(99)
    assert not bowl.koop.jumps


def test_steps_along_secants_grow_rare_while_they_fail():
    schedule = Schedule(cycle=100, max_overhead=0.06)
    schedule.follow(0)
    due = []
    for _ in range(3):
        due.append(schedule.following)
        schedule.in_vain(schedule.following)
    assert due == [20, 80, 0]  # two tries, then none before a jump
    schedule.proven = True
    schedule.follow(1000)
    for _ in range(7):
        due.append(schedule.following)
        schedule.in_vain(schedule.following)
    assert due[3:] == [1020, 1080, 1260, 1800, 3400, 5000, 6600]
    dear = Schedule(cycle=100, max_overhead=0.06, costs=Costs(secants=15.0))
    assert dear.interval == 75  # so that it takes a fifth beside the steps between


def test_a_step_along_secants_needs_no_budget_for_fits():
    """Its own algebra and evaluations have to be within 6 % of the 20 steps until it and of 200 to come."""
    schedule = Schedule(cycle=100, max_overhead=0.06, costs=Costs(fit=100.0, candidate=5.0, secants=8.0))
    assert schedule.allowed(220) < 0
    assert [schedule.allows_secants(20, evaluations) for evaluations in (7, 15, 16)] == [True, True, False]
    schedule.spent = 3.0
    assert not schedule.allows_secants(20, 7)
    assert schedule.allows_secants(40, 7)


@pytest.mark.parametrize("weights", [100, 100_000])
def test_the_cost_of_a_direction_goes_by_the_bytes_of_pairs(weights):
    pairs = 100 * 2 * 4 * weights
    costs = Costs.of(4 * weights, window=0, pairs=pairs)
    assert costs.secants == pytest.approx(2 + pairs / 2 / (4 * 2**20 + 16 * weights))
    assert Costs.of(4 * weights, window=0).secants == 0.0  # none are asked for


@pytest.mark.parametrize(
    ("weights", "pairs"), [(1000, 100), (20_000, 100), (50_000, 41), (200_000, 10), (800_000, 10), (900_000, 0)]
)
def test_by_default_there_are_as_many_pairs_as_memory_is_to_hold(weights, pairs):
    model = torch.nn.Linear(weights, 1, bias=False)
    koop = koopt.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, guard=lambda: 1.0)
    assert koop._settings.history == pairs


@pytest.mark.parametrize("at", [10, 20, 33])
def test_a_resumed_run_follows_the_same_secants(at):
    whole, koop = resumable(history=6, cycle=100, tail=30)
    whole.run(steps=at)
    kept = copy.deepcopy([part.state_dict() for part in (whole.model, whole.optimizer, whole.scheduler, koop)])
    resumed, again = resumable(history=6, cycle=100, tail=30)
    for part, own in zip((resumed.model, resumed.optimizer, resumed.scheduler, again), kept, strict=True):
        part.load_state_dict(own)
    for step in range(at, 60):
        whole.step(step)
        resumed.step(step)
    assert resumed.bits == whole.bits
    assert any(jump.forecaster == "secants" and jump.accepted for jump in koop.jumps)


@pytest.mark.parametrize("interval", [20, 81, 400])
def test_steps_along_secants_and_other_jumps_keep_out_of_each_others_way(interval):
    """No step falls among those that the next jump is made from, and both have their turn, whatever the interval."""
    costs = Costs(secants=SIDE * interval)
    schedule = Schedule(cycle=100, max_overhead=0.06, costs=costs, tail=30)
    assert schedule.interval == interval
    schedule.follow(0)
    steps, jumps = [], []
    for step in range(1, 1601):
        if step == schedule.following:
            assert not schedule.due - 30 < step <= schedule.due
            steps.append(step)
            schedule.in_vain(step)
            schedule.follow(step)
        if step == schedule.due:
            jumps.append(step)
            schedule.start(step)
            schedule.succeed(step, secants=True)
    assert jumps == list(range(100, 1601, 100))
    expected = {20: [20, 40, 60, 70, 120], 81: [70, 151, 232, 313, 370], 400: [370, 770, 1170, 1570]}
    assert steps[:5] == expected[interval]


class Valley:
    """Full-batch least squares, under an optimizer with koopt beside it."""

    def __init__(self, make=adam, dtype=torch.float64, **options):
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
        self.x = torch.randn(40, 3, generator=generator, dtype=dtype)
        self.y = self.x.prod(dim=1, keepdim=True)
        self.optimizer, self.losses = make(self.model), []
        self.koop = koopt.attach(self.optimizer, self.model, self.guard, **options)
        self.guarded = self.loss

    def guard(self):
        return self.guarded()

    def loss(self):
        return mse_loss(self.model(self.x), self.y)

    def step(self):
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.losses.append(loss.item())
        self.optimizer.step()

    def run(self, steps):
        for _ in range(steps):
            self.step()
        return self

    @property
    def bits(self):
        return bits(self.model, self.optimizer)


def test_steps_along_secants_follow_one_another_by_default_and_are_one_record():
    valley, seen = Valley(), []
    valley.koop.on_jump(seen.append)
    valley.run(120)
    (jump,) = valley.koop.jumps
    assert (jump.step, jump.moves, jump.forecaster, jump.accepted) == (20, 101, "secants", True)
    assert [record.moves for record in seen] == list(range(1, 102))
    assert seen[-1] is jump
    assert (jump.before, jump.after) == (seen[0].before, valley.loss().item())
    assert jump.evaluations >= 101 + 2
    along = valley.losses[20:]  # at the points that the moves led to
    assert along == [record.after for record in seen[:-1]]
    assert all(after < before for before, after in itertools.pairwise(along))
    assert valley.loss().item() < 0.01 * Valley(history=0).run(120).loss().item()


def test_moves_of_the_optimizer_are_given_up_on_the_way():
    """A quadratic loss in two weights is at its minimum after ten moves, whatever the optimizer does."""
    curvature = torch.tensor([1.0, 30.0], dtype=F64)
    model = torch.nn.Linear(2, 1, bias=False).double()
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def loss():
        return 0.5 * (curvature * model.weight.square()).sum()

    koopt.attach(optimizer, model, loss, history=10)
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 1e-12


def test_refused_after_steps_along_secants_the_optimizer_goes_on_with_the_caution_of_before():
    wrong = False
    valley = Valley()
    valley.guarded = lambda: valley.loss() + (len(valley.losses) if wrong else 0)
    valley.run(20)
    (weight, *_) = valley.model.parameters()
    state = valley.optimizer.state[weight]
    before = (state["exp_avg_sq"] / (1 - 0.999**20)).clone()
    valley.run(60)
    reached = valley.loss().item()
    wrong = True
    valley.run(1)
    assert [(jump.accepted, jump.moves) for jump in valley.koop.jumps] == [(True, 61), (False, 0)]
    assert not state["exp_avg"].any()
    assert bool((state["exp_avg_sq"] / (1 - 0.999**81) >= 0.999 * before).all())
    wrong = False
    valley.run(18)
    assert valley.loss().item() < 1.5 * reached


@pytest.mark.parametrize(("make", "at"), [(adam, 30), (adam, 47), (sgd, 47)])
def test_a_run_resumed_on_the_way_is_the_same(make, at):
    whole = Valley(make, dtype=torch.float32).run(at)
    assert whole.koop.jumps[-1].moves
    kept = copy.deepcopy([part.state_dict() for part in (whole.koop, whole.model, whole.optimizer)])
    resumed = Valley(make, dtype=torch.float32)
    for part, own in zip((resumed.koop, resumed.model, resumed.optimizer), kept, strict=True):
        part.load_state_dict(own)
    whole.run(40), resumed.run(40)
    assert resumed.bits == whole.bits
    assert [jump.moves for jump in resumed.koop.jumps] == [jump.moves for jump in whole.koop.jumps]


@pytest.mark.parametrize("change", ["data", "in place", "loaded"])
def test_weights_changed_from_outside_are_not_taken_back(change):
    valley = Valley().run(40)
    first = next(valley.model.parameters())
    if change == "data":
        first.data.clamp_(-0.1, 0.1)
    elif change == "in place":
        with torch.no_grad():
            first.mul_(0.5)
    else:
        valley.model.load_state_dict({name: value + 0.1 for name, value in valley.model.state_dict().items()})
    changed = valley.loss().item()
    valley.run(1)
    assert valley.losses[-1] == changed
    assert len(valley.koop.jumps) == 1  # nothing was evaluated against the loss of before
    valley.run(100)
    assert valley.koop.jumps[1].step >= 60
    assert valley.loss().item() < changed


def test_a_jump_by_hand_ends_the_steps_along_secants_and_may_begin_others():
    valley = Valley().run(40)
    before = valley.loss().item()
    jump = valley.koop.jump()
    assert (jump.moves, jump.before) == (int(jump.accepted), before)
    assert valley.loss().item() <= before
    assert [jump.step for jump in valley.koop.jumps] == [20, 40]
    valley.run(60)
    assert valley.loss().item() < before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_on_the_way_leaves_the_optimizers_move_and_the_run_goes_on(error):
    fails = False

    def guard():
        if fails:
            raise error
        return valley.loss()

    valley = Valley()
    valley.guarded = guard
    valley.run(40)
    before = [parameter.detach().clone() for parameter in valley.model.parameters()]
    fails = True
    with pytest.raises(error):
        valley.step()
    moved = [(a - b).abs().max().item() for a, b in zip(before, valley.model.parameters(), strict=True)]
    assert 0 < max(moved) <= 0.02  # by one step of Adam
    fails = False
    valley.run(100)
    assert valley.loss().item() < valley.losses[40]


def test_where_buffers_are_renewed_steps_do_not_follow_one_another():
    renewed = []
    jumps = Valley(refresh=lambda: renewed.append(1)).run(100).koop.jumps
    assert all(jump.moves <= 1 for jump in jumps)
    assert sum(jump.moves for jump in jumps) >= 2
    assert len(renewed) < 10


def test_gradients_are_of_what_the_optimizer_descends():
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    parameter.grad = torch.tensor([1.0])
    for optimizer, expected in (
        (torch.optim.SGD([parameter], lr=0.1), 1.0),
        (torch.optim.SGD([parameter], lr=0.1, maximize=True), -1.0),
        (torch.optim.Adam([parameter], weight_decay=0.25), 1.5),
        (torch.optim.Adam([parameter], weight_decay=0.25, decoupled_weight_decay=True), 1.0),
        (torch.optim.AdamW([parameter], weight_decay=0.25), 1.0),
    ):
        assert gradients(optimizer, [parameter]) == [torch.tensor([expected])]
    assert parameter.grad == 1
    parameter.grad = None
    assert gradients(optimizer, [parameter]) == [torch.zeros(1)]


def test_decay_beside_the_loss_goes_on_along_secants():
    parameter = torch.nn.Parameter(torch.tensor([2.0, 4.0]))
    step = Step(torch.tensor([2.0, 4.0]), torch.tensor([1.0, -1.0]), 1, -3.0)
    gradient = torch.tensor([-1.0, 2.0])
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.5)
    led = as_trained(step, optimizer, gradient, [parameter], [parameter.detach()])
    torch.testing.assert_close(led.direction, torch.tensor([0.9, -1.2]))
    assert led.slope == pytest.approx(-3.3)
    assert as_trained(step, torch.optim.Adam([parameter]), gradient, [parameter], [parameter.detach()]) is step


def test_an_ascent_is_led_as_well():
    model = torch.nn.Linear(2, 1, bias=False).double()
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, maximize=True)
    curvature = torch.tensor([1.0, 30.0], dtype=F64)

    def loss():
        return 0.5 * (curvature * model.weight.square()).sum()

    koop = koopt.attach(optimizer, model, loss)
    for _ in range(30):
        optimizer.zero_grad()
        (-loss()).backward()
        optimizer.step()
    assert koop.jumps[0].accepted
    assert loss().item() < 1e-12


@pytest.mark.parametrize("steps", [1, 50, 5000])
def test_recalled_second_moments_weigh_as_they_did(steps):
    parameter = torch.nn.Parameter(torch.ones(2, dtype=F64))
    for optimizer, name, decay in (
        (torch.optim.Adam([parameter]), "exp_avg_sq", 0.999),
        (torch.optim.RMSprop([parameter], alpha=0.999), "square_avg", 0.999),
    ):
        parameter.grad = torch.tensor([1.0, 2.0], dtype=F64)
        for _ in range(3):
            optimizer.step()
        state = optimizer.state[parameter]
        corrects = 1 - decay**3 if name == "exp_avg_sq" else 1.0
        before = state[name] / corrects
        parameter.grad = torch.zeros(2, dtype=F64)
        for _ in range(steps):
            optimizer.step()
        recall(optimizer, [parameter], steps)
        corrects = 1 - decay ** (3 + steps) if name == "exp_avg_sq" else 1.0
        torch.testing.assert_close(state[name] / corrects, before)


def test_a_guard_that_changes_is_noticed():
    valley, drift = Valley(max_overhead=1.0), 0.0
    valley.guarded = lambda: valley.loss() - drift * len(valley.losses)
    valley.run(40)
    drift = 0.01  # lower from step to step: all seem better than the loss of before
    valley.run(12)
    assert [jump.accepted for jump in valley.koop.jumps] == [True, False]
    assert valley.koop.jumps[1].reason.startswith("the guard is ")
    assert valley.koop.jumps[1].step <= 50


def test_pairs_that_misled_are_dropped():
    bowl = Bowl(history=10, cycle=1000, tail=30, guard=lambda: next(rising))
    rising = iter(range(10_000))  # no step is better
    bowl.run(20)
    assert [(jump.step, jump.reason) for jump in bowl.koop.jumps] == [(20, "no candidate was better")]
    held = bowl.koop._attempts.secants
    assert held.pairs == 0
    assert not held.order()
    bowl.run(60)
    assert held.pairs == 0  # dropped again
    assert [jump.step for jump in bowl.koop.jumps] == [20, 80]
