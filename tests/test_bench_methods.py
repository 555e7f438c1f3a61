"""Each way to train or to average against direct formulas, on problems that are solved by hand, or another way."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from koopt import forecasters
from koopt.bench.method import Observer, Trainer
from koopt.bench.methods import METHODS, averages, jumping, quasi_newton, training
from koopt.bench.task import Problem, Task

NOISE = 0.1


def problem(seed=0, noisy=False):
    """Regression by a small network with BatchNorm where noisy, else on all data in float64."""
    torch.manual_seed(seed)
    dtype = torch.float32 if noisy else torch.float64
    norm = [nn.BatchNorm1d(8)] if noisy else []
    model = nn.Sequential(nn.Linear(3, 8), *norm, nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    x = torch.randn(96, 3, dtype=dtype)
    y = (x[:, :1] * x[:, 1:2]).sin() + (NOISE * torch.randn(96, 1, dtype=dtype) if noisy else 0.0)
    choice = random.Random(seed)

    def batch():
        if not noisy:
            return slice(None)
        start = choice.randrange(64)
        return slice(start, start + 16)

    def loss(rows):
        return nn.functional.mse_loss(model(x[rows]), y[rows])

    def guard():
        model.eval()
        with torch.no_grad():
            return loss(slice(80, 96) if noisy else slice(None))

    def validate():
        found = guard()
        model.train()
        return found.item()

    return Problem(model, batch, loss, guard, validate, validate, lambda: None)


def task(full_batch):
    schedules = ("cosine", "constant")
    optimizers = ("adam",) if full_batch else ("adamw", "sgd")
    make = lambda seed, guarded: problem(seed, not full_batch)  # noqa: E731
    return Task("small", "small", 120, 10, full_batch, optimizers, (0.01, 0.03), schedules, make)


def closure_of(made, counter=None):
    rows = made.batch()

    def closure():
        made.model.zero_grad()
        loss = made.loss(rows)
        loss.backward()
        if counter is not None:
            counter.append(loss.item())
        return loss

    return closure


def state_of(model):
    return [tensor.clone() for tensor in model.state_dict().values()]


def line_problem(slope=1.0, target=1000.0):
    """One weight that plain gradient descent moves by `slope` a step; the guard is its distance from the target."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    guard = lambda: (model.weight - target).abs().sum()  # noqa: E731
    loss = lambda batch: -slope * model.weight.sum()  # noqa: E731
    validate = lambda: guard().item()  # noqa: E731
    return Problem(model, lambda: None, loss, guard, validate, validate, lambda: None)


PLAIN = {"optimizer": "sgd", "rate": 1.0, "schedule": "constant"}
TRAINERS = [name for name, method in METHODS.items() if isinstance(method, Trainer)]
OBSERVERS = [name for name, method in METHODS.items() if isinstance(method, Observer)]


@pytest.mark.parametrize(
    ("name", "full_batch"),
    # with a cosine nothing moves at the end
    [(n, f) for n in TRAINERS if n != "cosine" for f in (True, False) if METHODS[n].full_batch in (None, f)],
)
def test_trainers_reduce_the_loss_and_put_everything_back(name, full_batch):
    method, on = METHODS[name], task(full_batch)
    made = on.problem(1000, method.guard)
    first = made.validate()
    setting = next(s for s in reversed(method.grid(on)) if s.get("schedule", "constant") == "constant")
    running = method.start(made, setting, on.steps)
    calls = []
    while len(calls) < on.steps:
        running.step(closure_of(made, calls))
    before, guarded = state_of(made.model), running.guarded
    with running.evaluating():
        assert made.validate() < 0.9 * first
        for buffer in made.model.buffers():
            buffer.add_(1)
    assert all(map(torch.equal, before, state_of(made.model)))
    assert (running.guarded > guarded) == (name.startswith("koopt") and method.guard and not full_batch)
    running.step(closure_of(made))  # and training goes on
    assert not all(map(torch.equal, before, state_of(made.model)))


@pytest.mark.parametrize("name", TRAINERS)
def test_settings_are_plain_and_few_and_options_change_what_is_read(name):
    method = METHODS[name]
    for full_batch in (True, False):
        if method.full_batch in (None, full_batch):
            settings = method.grid(task(full_batch))
            assert settings == json.loads(json.dumps(settings))
            assert len({str(setting) for setting in settings}) == len(settings) <= 8
            finals = []
            for change in ({}, *method.options):
                made = problem(noisy=not full_batch)
                running = method.start(made, settings[0] | change, 120)
                for _ in range(110 if name in ("line", "anderson") else 30):
                    running.step(closure_of(made))
                with running.evaluating():
                    finals.append(made.validate())
            assert len(set(finals)) == len(finals)
    assert len(method.options) <= 4


@pytest.mark.parametrize("beside", ["optimizer", "guarded"])
def test_observers_are_beside_trainers_on_noisy_tasks(beside):
    found = [METHODS[name] for name in OBSERVERS if METHODS[name].beside == beside]
    assert found
    assert METHODS[beside].full_batch in (None, False)
    assert METHODS[beside].guard == (beside == "guarded")


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_change_nothing_and_count_the_guard(name):
    made = problem(noisy=True)
    observers = [METHODS[name].start(made.model, made, setting, 60) for setting in METHODS[name].grid]
    plain = training.start_plain(made, {**PLAIN, "rate": 0.01}, 60)
    for _ in range(60):
        plain.step(closure_of(made))
        before = state_of(made.model)
        for observer in observers:
            observer.record()
        assert all(map(torch.equal, before, state_of(made.model)))
    random_state = torch.get_rng_state()
    found = [observer.weights() for observer in observers]
    assert all(map(torch.equal, before, state_of(made.model)))
    assert torch.equal(random_state, torch.get_rng_state())
    for weights, observer in zip(found, observers, strict=True):
        assert {key: value.shape for key, value in weights.items()} == {
            key: value.shape for key, value in made.model.named_parameters()
        }
        most = {"line-copy": 1 + len(averages.HORIZONS), "anderson-copy": 1 + len(averages.REGULARIZATIONS)}.get(
            name, 0
        )
        assert observer.guarded == most
    assert len({weights["0.weight"].sum().item() for weights in found}) > 1  # the settings differ


def watched(name, setting, path):
    """What an observer makes of a path of one weight."""
    made = line_problem()
    observer = METHODS[name].start(made.model, made, setting, len(path))
    for value in path:
        nn.init.constant_(made.model.weight, value)
        observer.record()
    return observer.weights()["weight"].item()


PATH = [math.sin(0.1 * i) + 0.05 * i for i in range(50)]


def column(path):
    return torch.tensor(path, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("count", [1, 2, 50])
@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_ema_is_the_weighted_mean(decay, count):
    weights = [decay ** (count - 1 - i) for i in range(count)]
    expected = sum(w * x for w, x in zip(weights, PATH, strict=False)) / sum(weights)
    assert watched("ema", {"decay": decay}, PATH[:count]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_double_ema_goes_beyond_the_average_by_its_distance_from_its_own_average(count):
    decay, path = 0.9, PATH[:count]
    once = [decay ** (count - 1 - i) for i in range(count)]
    twice = [w * (count - i) for i, w in enumerate(once)]
    average = sum(w * x for w, x in zip(once, path, strict=True)) / sum(once)
    again = sum(w * x for w, x in zip(twice, path, strict=True)) / sum(twice)
    found = watched("dema", {"decay": decay, "ahead": 0.5}, path)
    assert found == pytest.approx(average + 0.5 * (average - again), rel=1e-12)


def test_double_ema_is_the_recursion_in_the_long_run():
    once = twice = 0.0
    path = PATH * 20
    for value in path:
        once += 0.1 * (value - once)
        twice += 0.1 * (once - twice)
    assert watched("dema", {"decay": 0.9, "ahead": 1.0}, path) == pytest.approx(2 * once - twice, rel=1e-9)


def test_lawa_is_the_mean_of_ten_snapshots_of_the_span():
    found = watched("lawa", {"span": 0.4}, PATH)  # 20 of 50 steps: every other one
    assert found == pytest.approx(sum(PATH[31::2]) / 10, rel=1e-12)
    assert len(PATH[31::2]) == 10


def test_lawa_of_a_share_is_the_mean_of_that_share_of_the_run():
    assert watched("lawa", {"share": 0.25}, PATH[:48]) == pytest.approx(sum(PATH[36:48]) / 12, rel=1e-12)


@pytest.mark.parametrize("horizon", [0.0, 0.3])
def test_regression_is_the_least_squares_line(horizon):
    path = PATH[24:48]  # the newer half
    times = torch.arange(24, dtype=torch.float64)
    design = torch.stack([torch.ones(24, dtype=torch.float64), times], 1)
    level, slope = torch.linalg.lstsq(design, column(path)).solution.flatten().tolist()
    found = watched("regression", {"share": 0.5, "horizon": horizon}, PATH[:48])
    assert found == pytest.approx(level + slope * 23 * (1 + horizon), rel=1e-9)


def test_copies_take_the_weights_that_the_guard_prefers():
    path = [float(i) for i in range(40)]  # the line through the last 20 of them reaches 20 + 39 = 58 at most
    assert watched("line-copy", {"share": 0.5}, path) == pytest.approx(58)
    assert watched("line-copy", {"share": 0.5}, path[::-1]) == 0  # ahead is worse, and so the weights stay
    decay = [1000 - 1000 * 0.9**i for i in range(40)]
    assert watched("anderson-copy", {"share": 0.5}, decay) > decay[-1]


def test_line_jumps_along_linear_motion_as_far_as_it_helps():
    made = line_problem(target=500.0)
    running = jumping.start_line(made, PLAIN | {"cycle": 50, "span": 10}, 200)
    path = [0.0]
    for _ in range(50):
        assert running.guarded == 0
        path.append(made.model.weight.item())
        running.step(closure_of(made))
    # momentum 0.9: about 10 a step, so from some 410 on; a span goes 99 further, and of 4, 8, 2, 1, ... 1 is the best
    now = path[-1] + sum(0.9**i for i in range(50))
    assert made.model.weight.item() == pytest.approx(now + (now - path[-10]))
    assert running.guarded == 6  # now, 4, 8, 2, 1 and a half, which is worse


def test_line_is_exact_on_exactly_linear_motion():
    made = line_problem(target=10_000.0)
    run = training.Run(made.model, torch.optim.SGD(made.model.parameters(), lr=1.0))
    guard = training.Counted(made.guard)
    tried = []

    def search(snapshots, lower):
        assert snapshots.flatten().tolist() == [40.0, 50.0]
        tried.append(lower(forecasters.line(snapshots, 4.0)))
        tried.append(lower(forecasters.line(snapshots, 2.0)))

    run.after = jumping.Jumping(made.model, guard, 50, (10, 0), search).after_step
    for _ in range(50):
        run.step(closure_of(made))
    assert made.model.weight.item() == 90.0
    assert tried == [True, False]
    assert guard.calls == 3


@pytest.mark.parametrize("name", ["line", "anderson"])
def test_refused_jumps_leave_the_run_bit_for_bit_as_it_was(name):
    made, plain = problem(), problem()
    made = Problem(made.model, made.batch, made.loss, Falling(), made.validate, made.test, made.refresh)
    setting = {"optimizer": "adam", "rate": 0.01, "schedule": "cosine"}
    first = METHODS[name].start(made, setting, 120)
    second = METHODS["optimizer"].start(plain, setting, 120)
    for _ in range(120):
        first.step(closure_of(made))
        second.step(closure_of(plain))
    assert first.guarded >= 4
    assert all(map(torch.equal, state_of(made.model), state_of(plain.model)))


class Falling:
    """A guard by which everything is worse than what it saw before."""

    calls = 0

    def __call__(self):
        self.calls += 1
        return float(self.calls)


@pytest.mark.parametrize("name", ["line", "anderson"])
def test_jumps_are_kept_only_where_the_loss_falls_and_training_gets_ahead(name):
    made, plain = problem(), problem()
    setting = {"optimizer": "adam", "rate": 0.003, "schedule": "constant"}
    first, second = METHODS[name].start(made, setting, 400), METHODS["optimizer"].start(plain, setting, 400)
    for _ in range(400):
        first.step(closure_of(made))
        second.step(closure_of(plain))
    assert made.validate() < plain.validate()
    assert first.guarded > second.guarded == 0


@pytest.mark.parametrize("history", [3, 20])
def test_lbfgs_step_by_step_is_one_long_step_at_the_same_cost(history):
    made, whole = problem(), problem()
    running = quasi_newton.start(made, {"history": history}, 100)
    calls, expected = [], []
    for _ in range(15):
        running.step(closure_of(made, calls))
    optimizer = torch.optim.LBFGS(
        whole.model.parameters(),
        max_iter=15,
        max_eval=1000,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=history,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure_of(whole, expected))
    assert calls == expected
    assert all(map(torch.equal, state_of(made.model), state_of(whole.model)))


def test_lbfgs_starts_anew_where_a_step_moves_nothing():
    made = line_problem(slope=0.0)
    running = quasi_newton.start(made, {"history": 5}, 100)
    calls = []
    for _ in range(3):
        running.step(closure_of(made, calls))
    assert not running.optimizer.state
    assert calls  # so that a budget of calls is spent


def test_lookahead_evaluates_its_slow_weights():
    made = line_problem()
    running = training.start_lookahead(made, {**PLAIN, "k": 4, "alpha": 0.5}, 100)
    speeds = torch.tensor([sum(0.9**i for i in range(j + 1)) for j in range(6)])
    path = speeds.cumsum(0)
    for _ in range(6):
        running.step(closure_of(made))
    slow = path[3].item() / 2
    with running.evaluating():
        assert made.model.weight.item() == pytest.approx(slow)
    assert made.model.weight.item() == pytest.approx(slow + path[5].item() - path[3].item())


def test_schedule_free_evaluates_the_mean_of_its_sequence():
    made = line_problem()
    running = training.start_schedule_free(made, {"rate": 0.1, "warmup": 0.0, "decay": 0.0}, 100)
    for _ in range(10):
        running.step(closure_of(made))
    # the gradient is constant, so that Adam's steps are the rate: z goes 0.1, 0.2, ..., 1.0, and x is their mean
    with running.evaluating():
        assert made.model.weight.item() == pytest.approx(0.55, rel=1e-5)
    assert made.model.weight.item() == pytest.approx(0.9 * 0.55 + 0.1 * 1.0, rel=1e-5)


def test_schedule_free_warms_up_over_a_share_of_the_run():
    made = line_problem()
    running = training.start_schedule_free(made, {"rate": 0.1, "warmup": 0.05, "decay": 0.0}, 100)
    for _ in range(2):
        running.step(closure_of(made))
    z = running.optimizer.state[made.model.weight]["z"].item()
    assert z == pytest.approx(0.1 * (1 + 2) / 5, rel=1e-5)


@pytest.mark.parametrize(("schedule", "factors"), [("constant", (1, 1, 1)), ("cosine", (1, 0.5, 0))])
def test_schedules(schedule, factors):
    made = line_problem()
    running = training.start_plain(made, {"optimizer": "adam", "rate": 0.2, "schedule": schedule}, 10)
    found = []
    for _ in range(12):
        found.append(running.optimizer.param_groups[0]["lr"])
        running.step(closure_of(made))
    assert [found[0], found[5], found[10]] == pytest.approx([0.2 * factor for factor in factors])
    assert found[11] == pytest.approx(found[10])


def test_beta2_is_searched_and_torchs_own_is_not_named():
    searched = training.searched(replace(task(True), decays=(0.999, 0.5)))
    assert len(searched) == 8
    assert [setting for setting in searched if "beta2" not in setting] == training.searched(task(True))
    assert {setting["beta2"] for setting in searched if "beta2" in setting} == {0.5}
    made = problem(noisy=False)
    for setting, betas in ((searched[0], (0.9, 0.999)), (searched[1], (0.9, 0.5))):
        assert training.start_plain(made, setting, 10).optimizer.defaults["betas"] == betas
    for setting in training.schedule_free_settings(replace(task(True), decays=(0.5,))):
        assert training.start_schedule_free(made, setting, 10).optimizer.defaults["betas"] == (0.9, 0.5)


def test_unknown_names_are_refused():
    for key, remedy in (("optimizer", "adam, adamw, rmsprop, sgd"), ("schedule", "constant, cosine")):
        with pytest.raises(ValueError, match=f"{key} is 'none', expected one of {remedy}"):
            training.start_plain(line_problem(), {**PLAIN, key: "none"}, 10)


def test_koopt_is_the_optimizer_with_a_handle_and_nothing_else():
    made, plain = problem(noisy=True), problem(noisy=True)
    setting = {"optimizer": "adamw", "rate": 0.01, "schedule": "constant"}
    first = METHODS["koopt-no-guard"].start(made, setting | {"evaluated": "forecast"}, 100)
    second = METHODS["optimizer"].start(plain, setting, 100)
    for _ in range(100):
        first.step(closure_of(made))
        second.step(closure_of(plain))
    assert all(map(torch.equal, state_of(made.model), state_of(plain.model)))
    with first.evaluating():
        assert not torch.equal(made.model[0].weight, plain.model[0].weight)
    assert first.guarded == 0
