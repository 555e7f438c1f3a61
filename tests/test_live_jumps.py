"""Jumps: when they are tried, where they land, what is refused."""

import math

import pytest
import torch
from live_tasks import LOOPS, STATEFUL, Bowl, Task, adam, sgd
from torch import nn
from torch.nn.functional import mse_loss

import koopt
from koopt.live.budget import Costs, Schedule
from koopt.live.candidates import FAMILIES, NOISE, Choice, Proposer, smooth
from koopt.live.jumps import search


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


@pytest.mark.parametrize("error", [ZeroDivisionError, ValueError, torch.linalg.LinAlgError])
@pytest.mark.parametrize("defined", [True, False])
def test_where_a_guard_is_not_defined_its_loss_is_infinite_if_it_ever_was(error, defined):
    calls = []

    def guard():
        calls.append(1)
        if len(calls) == 1 and defined:
            return 1.0
        raise error("a covariance is not positive definite")

    bowl = Bowl(cycle=20, tail=10, guard=guard)
    bowl.run(19)
    if defined:
        bowl.step()
        assert (bowl.koop.jumps[0].reason, len(calls)) == ("no candidate was better", 16)
    else:
        with pytest.raises(error, match="not positive definite"):
            bowl.step()


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


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
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
    bowl = Bowl(cycle=10, tail=6, guard=lambda: next(losses), max_overhead=1.0)
    for _ in range(40):
        bowl.step()
    assert bowl.koop.jumps[-1].reason == "the guard is nan at the weights as they are"


def test_attempts_grow_rare_while_they_fail_and_stay_within_the_budget():
    bowl = Bowl(cycle=10, tail=6, guard=lambda: 1.0, max_overhead=0.3)
    for _ in range(1000):
        bowl.step()
        evaluations = sum(jump.evaluations for jump in bowl.koop.jumps)
        assert evaluations / 3 <= 0.3 * bowl.koop.steps
    steps = [jump.step for jump in bowl.koop.jumps]
    assert steps == [10, 40, 130, 400, 720]


def test_the_schedule_counts_without_rounding_away():
    schedule = Schedule(cycle=10, max_overhead=0.1)
    assert [schedule.allowed(steps) for steps in (9, 10, 20, 1000)] == [2, 3, 6, 16]
    schedule.spent = 1.0
    assert schedule.allowed(20) == 3
    assert schedule.allowed(20, ahead=0.5) == 1
    dear = Schedule(cycle=10, max_overhead=0.1, costs=Costs(fit=4.0, candidate=2.0))
    assert [dear.allowed(steps) for steps in (39, 60, 80, 1000)] == [-1, 1, 2, 16]


def test_an_attempt_waits_for_its_budget_and_one_that_fails_for_its_share():
    dear = Schedule(cycle=10, max_overhead=0.5, costs=Costs(fit=8.0, candidate=2.0))
    steps = []
    for _ in range(5):
        while not dear.afford(ahead=0.0):
            pass
        steps.append(dear.due)
        dear.spent += 8.0 + 2.0 * 16
        dear.start(dear.due)
    # 20 of 40 steps are what 6 evaluations and a fit cost; an attempt may take a fifth of the budget, 40 of 400
    assert steps == [40, 160, 520, 920, 1320]
    dear.succeed(1400)
    assert dear.due == 1410
    assert not dear.afford(ahead=500.0)
    assert dear.due == 1420


def test_looks_at_noise_grow_rare_more_slowly():
    schedule, steps = Schedule(cycle=10, max_overhead=0.1), []
    for _ in range(8):
        steps.append(schedule.due)
        schedule.start(schedule.due)
        schedule.look_again(steps[-1])
    assert steps == [10, 20, 40, 80, 120, 160, 200, 240]
    schedule.succeed(700)
    schedule.start(710)
    schedule.look_again(710)
    assert schedule.due == 720


def test_in_noise_nothing_is_evaluated_and_smoothness_is_found_soon():
    """Shaken weights are noise; when they settle, the next look but one cycle later jumps."""
    bowl = Bowl(cycle=20, tail=10, mode="auto", window=8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        bowl.step()
        with torch.no_grad():
            bowl.model.weight += 0.1 * torch.randn(3, generator=generator, dtype=torch.float64)
    bowl.run(20)
    first, second = bowl.koop.jumps
    assert (first.step, first.evaluations) == (20, 0)
    assert first.reason.startswith("noise")
    assert (second.step, second.accepted) == (40, True)


@pytest.mark.parametrize("weights", [100, 10_000, 1_000_000])
def test_the_costs_of_an_attempt_go_by_bytes(weights):
    """A candidate goes through 30 snapshots, a fit six times; a step counts as 4 MiB and four times the weights."""
    costs = Costs.of(parameters=4 * weights, window=30 * 4 * weights)
    step = 4 * 2**20 + 16 * weights
    assert costs.fit == pytest.approx(6 * 120 * weights / step)
    assert costs.candidate == pytest.approx(1 / 3 + 120 * weights / step)


def test_a_larger_network_is_tried_less_often():
    steps = {}
    for width in (4, 20_000):
        model = nn.Linear(width, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        koop = koopt.attach(optimizer, model, lambda: 1.0, "jump", cycle=20, tail=10, max_overhead=0.2, history=0)
        model.weight.grad = torch.ones_like(model.weight)
        for _ in range(400):
            optimizer.step()
        steps[width] = [jump.step for jump in koop.jumps if jump.evaluations]
    assert steps == {4: [20, 80, 260], 20_000: [40, 160]}


def test_a_budget_of_nothing_never_calls_the_guard():
    bowl = Bowl(cycle=10, tail=6, guard=lambda: 1 / 0, max_overhead=0.0)
    for _ in range(50):
        bowl.step()
    (jump,) = bowl.koop.jumps
    assert jump.reason == "budget: max_overhead=0 does not allow 6 evaluations yet"


def test_jump_by_hand():
    bowl = Bowl(cycle=1000, tail=20, max_overhead=0.01)
    bowl.run(996)
    jump = bowl.koop.jump()
    assert jump.accepted
    assert jump is bowl.koop.jumps[-1]
    assert bowl.koop.jump().reason.startswith("too few snapshots: 0")


class Shaking(torch.optim.SGD):
    """Weights that drift, and are shown beside where they are, elsewhere at each step."""

    def __init__(self, parameters, lr, size):
        super().__init__(parameters, lr)
        self.size, self.beside, self.generator = size, 0.0, torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self, closure=None):
        (weight,) = self.param_groups[0]["params"]
        weight.sub_(self.beside).sub_(self.param_groups[0]["lr"])
        self.beside = self.size * torch.randn(weight.shape, generator=self.generator, dtype=weight.dtype)
        weight.add_(self.beside)


@pytest.mark.parametrize(
    ("size", "means"),  # of how many steps those are from which the attempts at steps 100, 200 and 300 are made
    [(0.0, [1, 1, 1]), (0.004, [2, 2, 2]), (0.03, [None, 8, 8]), (0.3, [None, None, None])],
)
def test_what_shakes_beside_its_drift_is_averaged_until_the_drift_is_seen(size, means):
    model, recorded = nn.Linear(64, 1, bias=False).double(), []
    nn.init.ones_(model.weight)
    optimizer = Shaking(model.parameters(), 0.01, size)
    optimizer.register_step_post_hook(lambda *_: recorded.append(model.weight.detach().clone()[0]))  # before a jump
    koop = koopt.attach(optimizer, model, guard=lambda: model.weight.sum(), max_overhead=1.0, history=0)
    block = 1
    for cycle, averaged in enumerate(means):
        while len(koop.jumps) == cycle:
            optimizer.step()
        jump = koop.jumps[-1]
        halvings, rough = smooth(torch.stack(recorded[-30 * block :]).unflatten(0, (30, block)).mean(dim=1))
        if averaged is None:
            assert (halvings, rough > NOISE) == (0, True)
            assert jump.reason == f"noise: one snapshot ahead a forecast misses {rough:.2g} of an increment"
        else:
            assert block * 2**halvings == averaged
            assert jump.accepted
            assert jump.after < jump.before - 1000 * 64 * 0.01  # that is a thousand steps ahead
            assert jump.horizon % averaged == pytest.approx(0)
        block = {None: 3 - block, 1: 1}.get(averaged, 2)  # means of two where single steps were rough, and back


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("policy", ["keep", "reset", "scale", "combine"])
def test_momentum_after_a_jump(policy, block):
    bowl = Bowl(cycle=30, tail=20, max_overhead=2.0, beta=0.5, momentum=policy)
    generator = torch.Generator().manual_seed(0)
    recorded, weights = [], []

    def step():
        """One step, and what it led to before any jump."""
        moved = bowl.model.weight.detach().clone()
        held = bowl.optimizer.state[bowl.model.weight].get("momentum_buffer", torch.zeros_like(moved)).clone()
        recorded.append(0.5 * held + 2 * bowl.rates * moved)
        weights.append(moved - 0.2 * recorded[-1])
        before = len(bowl.koop.jumps)
        bowl.step()
        if len(bowl.koop.jumps) == before:  # to the last digit
            weights[-1] = bowl.model.weight.detach().clone()
            recorded[-1] = bowl.optimizer.state[bowl.model.weight]["momentum_buffer"].clone()

    for _ in range(30 * (block - 1)):  # rough, so that the next jump is made from means of two
        with torch.no_grad():
            bowl.model.weight.add_(torch.randn(bowl.model.weight.shape, generator=generator, dtype=torch.float64))
        step()
    while len(bowl.koop.jumps) < block:
        step()
    kept = recorded[-1]
    jump = bowl.koop.jumps[-1]
    assert jump.accepted
    momentum = bowl.optimizer.state[bowl.model.weight]["momentum_buffer"]
    if policy == "combine":
        window = torch.cat(weights[-10 * block :]).unflatten(0, (10, block)).mean(dim=1)
        far = math.isinf(jump.horizon)
        same = [c for c in FAMILIES if (c.method, c.rank) == (jump.forecaster, jump.rank)]
        families = [c._replace(horizon=jump.horizon / (9 * block)) for c in same if math.isinf(c.horizon) == far]
        offered = [Proposer(window).coefficients(family) for family in families]  # Anderson: by regularization
        now = bowl.model.weight.detach()[0]
        coefficients = min(offered, key=lambda given: (given @ window - now).norm())
        torch.testing.assert_close(coefficients @ window, now, rtol=1e-9, atol=1e-12)
        momenta = torch.cat(recorded[-10 * block :]).unflatten(0, (10, block)).mean(dim=1)
        expected = coefficients @ momenta
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


def test_the_evaluations_left_go_to_horizons():
    """On a straight line whose loss falls all the way, horizons double as long as there are evaluations."""
    window = torch.arange(30.0, dtype=torch.float64)[:, None]
    seen = []

    def evaluate(weights):
        seen.append(weights[0].item())
        return 1.0 / (1.0 + weights[0].item())

    def far(count):
        seen.clear()
        return search(Proposer(window), window - window[-1], Choice(), [window[-1]], 1.0 / 30.0, count, evaluate)

    found = far(16)
    assert len(seen) == 16
    assert found.weights[0].item() == max(seen) > 4 * max(seen[:8])
    assert found.coefficients.sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(found.coefficients @ window, found.weights[0])
    assert far(4).candidate.method in {family.method for family in FAMILIES}
    assert len(seen) == 4


def test_a_horizon_is_never_shorter_than_a_step():
    """Of a short tail a tenth is less: a family that came to 0 could never double it again."""
    snapshots = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
    choice = Choice()
    for _ in range(20):  # the nearer the better, so that horizons are halved as far as that goes
        search(
            Proposer(snapshots),
            snapshots - 1,
            choice,
            [snapshots[-1].clone()],
            1.0,
            16,
            lambda weights: 1 + (weights[0] - 1).abs().item(),
        )
    assert min(horizon for horizon in choice.horizons if horizon > 0) >= 1 / 5
    assert [h > 0 for h in choice.horizons] == [family.horizon > 0 for family in FAMILIES]


@pytest.mark.parametrize(
    ("options", "tail"), [({}, 60), ({"history": 50}, 60), ({"cycle": 40}, 40), ({"tail": 20}, 20)]
)
def test_the_tail_fits_the_cycle(options, tail):
    assert Bowl(**options).koop.state_dict()["settings"]["tail"] == tail
