"""The benchmark's harness on a bowl with a known descent, and its statistics against hand-solved cases."""

import contextlib
import itertools
import json
import math
import multiprocessing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from joblib.externals import loky
from scipy import stats
from torch import nn

from koopt import cli
from koopt.bench import command, figures, protocol, results, statistics, trials
from koopt.bench.method import Observer, Trainer
from koopt.bench.run import run
from koopt.bench.task import Problem, Task
from koopt.bench.tasks import TASKS
from koopt.bench.trials import Trials, Way

CURVATURES = torch.tensor([1.0, 0.25], dtype=torch.float64)
NOTHING = lambda *_: None  # noqa: E731


def bowl(seed, guarded):
    """``sum h w^2 / 2`` from weights of the seed."""
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0 + seed % 7]]))

    def loss(batch):
        return (batch * model.weight.square()).sum() / 2

    value = lambda: loss(CURVATURES).item()  # noqa: E731
    return Problem(
        model, lambda: CURVATURES, loss, lambda: loss(CURVATURES).detach(), value, lambda: 2 * value(), lambda: None
    )


def regression(seed, guarded):
    """Noisy linear regression on batches of 8, with dropout, so that torch's own random numbers matter."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(5, 1, generator=generator)
    inputs = torch.randn(200, 5, generator=generator)
    outputs = inputs @ truth + 0.3 * torch.randn(200, 1, generator=generator)
    model = nn.Sequential(nn.Dropout(0.1), nn.Linear(5, 1))
    nn.init.zeros_(model[1].weight)

    def batch():
        rows = torch.randint(100, (8,), generator=generator)
        return inputs[rows], outputs[rows]

    def loss(pair):
        return (model(pair[0]) - pair[1]).square().mean()

    def held_out(rows):
        model.eval()
        with torch.no_grad():
            return loss((inputs[rows], outputs[rows])).item()

    rows = slice(100, 150), slice(150, 200)
    return Problem(
        model,
        batch,
        loss,
        lambda: loss((inputs[:20], outputs[:20])).detach(),
        lambda: held_out(rows[0]),
        lambda: held_out(rows[1]),
        NOTHING,
    )


class Descent:
    """Plain gradient descent; with `checks` guard evaluations each step."""

    def __init__(self, problem, rate, checks=0):
        self.optimizer = torch.optim.SGD(problem.model.parameters(), lr=rate)
        self.guarded, self.checks = 0, checks

    def step(self, closure):
        self.optimizer.step(closure)
        self.guarded += self.checks

    def evaluating(self):
        return contextlib.nullcontext()


class Mean:
    """The mean of all weights so far; `factor` times it."""

    guarded = 0

    def __init__(self, model, factor):
        self.model, self.factor, self.total, self.steps = model, factor, None, 0

    def record(self):
        now = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.total = now if self.total is None else {name: p + now[name] for name, p in self.total.items()}
        self.steps += 1

    def weights(self):
        if self.total is None:
            return {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return {name: self.factor * total / self.steps for name, total in self.total.items()}


def searched(task):
    return [{"rate": rate} for rate in task.rates]


METHODS = {
    "optimizer": Trainer("optimizer", lambda problem, setting, steps: Descent(problem, setting["rate"]), searched),
    "mean": Observer("mean", lambda model, problem, setting, steps: Mean(model, setting["factor"]), ({"factor": 1.0},)),
    "scaled": Observer(
        "scaled",
        lambda model, problem, setting, steps: Mean(model, setting["factor"]),
        ({"factor": 0.0}, {"factor": 3.0}),
    ),
    "koopt": Trainer(
        "koopt",
        lambda problem, setting, steps: Descent(problem, setting.get("times", 1.5) * setting["rate"], 1),
        searched,
        ({"times": 2.0}, {"times": 0.1}),
        guard=True,
    ),
    "noisy": Trainer("noisy", lambda problem, setting, steps: Descent(problem, 0.1), searched, full_batch=False),
}
BOWL = Task("bowl", "a bowl", 40, 4, True, ("sgd",), (0.01, 0.1, 0.5, 5.0), ("constant",), bowl)
NOISY = Task("regression", "noisy", 60, 6, False, ("sgd",), (0.01, 0.03, 0.1), ("constant",), regression)


def without_seconds(record):
    curve = {name: list(getattr(record.curve, name)) for name in ("steps", "calls", "guarded", "loss")}
    return curve, record.test, record.diverged


# one run


def test_full_batch_curve_is_the_closed_form():
    """w_t = (1 - rate h)^t w_0, and the loss at w_t costs t calls."""
    [record] = run(BOWL, METHODS["optimizer"], {"rate": 0.5}, 3, test=True)
    shrink = (1 - 0.5 * CURVATURES.numpy()) ** record.curve.calls[:, None]
    expected = (CURVATURES.numpy() * (shrink * [1.0, 5.0]) ** 2).sum(axis=1) / 2
    assert record.curve.calls[0] == 0
    assert record.curve.calls[-1] == record.curve.steps[-1] == 40
    np.testing.assert_allclose(record.curve.loss, expected, rtol=1e-8)
    np.testing.assert_allclose(record.test, 2 * expected[-1], rtol=1e-8)
    assert (np.diff(record.curve.seconds) >= 0).all()


def test_guard_evaluations_cost_a_third():
    [record] = run(BOWL, METHODS["koopt"], {"rate": 0.1}, 0)
    np.testing.assert_allclose(record.curve.cost, record.curve.calls * 4 / 3)


def test_best_so_far_where_each_step_sees_all_data():
    """With rate 2.1/h the loss grows; best so far stays, and the final loss is that of the best."""
    [record] = run(BOWL, METHODS["optimizer"], {"rate": 2.1}, 0)
    assert (np.diff(record.curve.loss) <= 0).all()
    assert record.final < 2.6


def test_divergence_ends_the_run():
    [record] = run(replace(BOWL, steps=4000), METHODS["optimizer"], {"rate": 50.0}, 0, test=True)
    assert record.diverged
    assert record.test is None
    assert record.final == math.inf
    assert record.curve.calls[-1] < 400


def test_line_search_counts_calls_and_may_fail_within_a_step():
    class Searching(Descent):
        def step(self, closure):
            kept = [p.detach().clone() for p in self.optimizer.param_groups[0]["params"]]
            for times in (1e200, 1.0):  # the first trial is lost
                with torch.no_grad():
                    for parameter, value in zip(self.optimizer.param_groups[0]["params"], kept, strict=True):
                        parameter.copy_(times * value)
                closure()
            self.optimizer.step()

    trainer = Trainer("search", lambda problem, setting, steps: Searching(problem, 0.5), searched)
    [record] = run(BOWL, trainer, {}, 0)
    assert not record.diverged
    assert (record.curve.calls[-1], record.curve.steps[-1]) == (40, 20)


def test_observers_change_nothing_and_have_their_own_curve():
    beside = [(METHODS["mean"], {"factor": 1.0}), (METHODS["scaled"], {"factor": 0.0})]
    alone, observed = (run(NOISY, METHODS["optimizer"], {"rate": 0.1}, 5, some, test=True) for some in ([], beside))
    assert without_seconds(alone[0]) == without_seconds(observed[0])
    problem = regression(5, False)
    koopt_free = nn.utils.parameters_to_vector(problem.model.parameters()).zero_()
    nn.utils.vector_to_parameters(koopt_free, problem.model.parameters())
    assert observed[2].final == pytest.approx(problem.validate(), rel=1e-6)
    assert observed[2].test == pytest.approx(problem.test(), rel=1e-6)
    assert observed[1].final != observed[0].final
    assert list(observed[1].curve.steps) == [0, 10, 20, 30, 40, 50, 60]


def test_runs_are_determined_by_their_seed():
    once, again, other = (run(NOISY, METHODS["optimizer"], {"rate": 0.1}, seed)[0] for seed in (5, 5, 6))
    assert without_seconds(once) == without_seconds(again)
    assert without_seconds(once) != without_seconds(other)


def test_what_is_timed(monkeypatch):
    """A loss takes 1 s, a validation 1,000 s, an observer's step 10 s and its weights 100 s."""
    clock = SimpleNamespace(now=0.0, process_time=lambda: clock.now)
    monkeypatch.setattr("koopt.bench.run.time", clock)

    def taking(seconds, call):
        def slow(*arguments):
            clock.now += seconds
            return call(*arguments)

        return slow

    def problem(seed, guarded):
        made = regression(seed, guarded)
        return replace(made, loss=taking(1, made.loss), validate=taking(1000, made.validate))

    def start(model, *_):
        mean = Mean(model, 1.0)
        mean.record, mean.weights = taking(10, mean.record), taking(100, mean.weights)
        return mean

    trained, observed = run(
        replace(NOISY, problem=problem), METHODS["optimizer"], {"rate": 0.1}, 0, [(Observer("slow", start), {})]
    )
    assert trained.curve.seconds.tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert observed.curve.seconds.tolist() == [10 * look + 100 * look + 100 * (look + 1) for look in range(7)]


def test_long_curves_are_thinned():
    [record] = run(replace(BOWL, steps=5000), METHODS["optimizer"], {"rate": 1e-4}, 0)
    calls = record.curve.calls
    assert len(calls) <= 1500
    assert (calls[0], calls[-1]) == (0, 5000)
    assert np.diff(calls).max() <= 6


# statistics


def test_crossing():
    along, loss = np.array([0.0, 1.0, 2.0, 4.0]), np.array([math.inf, 3.0, 5.0, 1.0])
    assert statistics.crossing(along, loss, 4.0) == 1.0  # from inf there is no line
    assert statistics.crossing(along, loss, 3.0) == 1.0
    assert statistics.crossing(along, loss, 2.0) == 3.5
    assert statistics.crossing(along, loss, 0.5) == math.inf
    assert statistics.crossing(along, np.array([1.0, 1.0, 1.0, 1.0]), 2.0) == 0.0


def test_baseline_reaches_its_own_target():
    assert [statistics.reached_by_half(range(count)) for count in (1, 2, 3, 10)] == [0, 1, 1, 5]


def test_interval_is_exact_for_few_values():
    """All 27 resamples of three values: the median is the lowest in 7, so its share 0.26 is above 0.025."""
    values = [1.0, 2.0, 10.0]
    every = [sorted(some)[1] for some in itertools.product(values, repeat=3)]
    assert every.count(1.0) / 27 > 0.025
    assert statistics.median_interval(values) == (2.0, 1.0, 10.0)
    assert statistics.median_interval([4.0]) == (4.0, 4.0, 4.0)


def test_interval_agrees_with_scipy():
    values = np.random.default_rng(3).lognormal(size=25)
    found = stats.bootstrap((values,), np.median, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    middle, low, high = statistics.median_interval(values.tolist())
    assert middle == np.median(values)
    np.testing.assert_allclose([low, high], found, rtol=0.05)


def test_censored_seeds_open_the_interval():
    inf = math.inf
    assert statistics.median_interval([1.0, inf, inf]) == (inf, 1.0, inf)
    middle, low, high = statistics.median_interval([1.0] * 9 + [inf])
    assert (middle, low, high) == (1.0, 1.0, 1.0)  # six of ten resampled censored: 1 in 7,000
    assert statistics.median_interval([1.0] * 7 + [inf] * 3) == (1.0, 1.0, inf)


def test_ratio_pairs_seeds():
    """Costs that differ by 100 between seeds, but always by half between methods."""
    other = [1.0, 3.0, 10.0, 100.0, 30.0]
    assert statistics.ratio_interval([one / 2 for one in other], other, other) == (0.5, 0.5, 0.5)
    assert statistics.ratio_interval([math.inf], [2.0], [4.0]) == (math.inf, math.inf, math.inf)
    assert statistics.ratio_interval([1.0], [math.inf], [4.0]) == (0.25, 0.25, 0.25)


def test_profile():
    found = statistics.profile({"a": [1.0, 6.0, math.inf], "b": [2.0, 2.0, math.inf]})
    assert found["a"].tolist() == [1.0, 3.0, math.inf]
    assert found["b"].tolist() == [1.0, 2.0, math.inf]


# protocol


@pytest.fixture(scope="module")
def bowls(tmp_path_factory):
    """A whole comparison on the bowl."""
    folder = tmp_path_factory.mktemp("bowl")
    settings = protocol.Settings(seeds=3)
    rows, failures = command.bench(settings, BOWL, METHODS, folder)
    return folder, settings, rows, failures


def of(rows, table, **wanted):
    return [row for row in rows if row["table"] == table and all(row.get(k) == v for k, v in wanted.items())]


def test_baseline_is_the_best_of_the_grid(bowls):
    _, _, rows, failures = bowls
    assert failures == []
    assert {row["setting"] for row in of(rows, "targets", method="optimizer")} == {"rate 0.5"}
    tried = of(rows, "search", method="optimizer")
    assert [row["setting"] for row in tried] == ["rate 0.01", "rate 0.1", "rate 0.5", "rate 5"]
    assert ["score_1001" in row for row in tried] == [False, True, True, False]  # the best third, rounded up
    assert ["score_1005" in row for row in tried] == [False, True, True, False]
    assert [row["chosen"] for row in tried] == [False, False, True, False]


def test_the_baseline_is_chosen_by_the_middle_loss_and_others_by_the_mean_share():
    often, always = [(1e-6,), (1e-6,), (9.0,)], [(1e-2,), (1e-2,), (1e-2,)]
    for name, first in (("optimizer", often), ("other", always)):
        way = Way(name, METHODS["optimizer"], {})
        assert min((often, always), key=lambda scores: protocol.overall(way, scores)) is first


def test_settings_are_chosen_on_more_seeds_than_they_are_narrowed_down_on(tmp_path):
    def start(problem, setting, steps):
        lucky = problem.model.weight[0, 1].item() in (8.0, 2.0)  # seeds 1000 and 1001
        return Descent(problem, 0.5 if lucky else setting["elsewhere"])

    grid = [{"elsewhere": rate} for rate in (0.01, 0.02, 0.03, 0.4, *[0.001] * 8)]
    for place, setting in enumerate(grid):
        setting["place"] = place
    few = METHODS | {"lucky": Trainer("lucky", start, lambda _: grid)}
    settings = protocol.Settings(("lucky",), seeds=2)
    rows, failures = command.bench(settings, BOWL, few, tmp_path)
    assert not failures
    tried = of(rows, "search", method="lucky")
    assert [sum(key.startswith("score_") for key in row) for row in tried] == [6, 6, 6, 2, *[1] * 8]  # ties: in order
    assert [row["chosen"] for row in tried] == [False, False, True, *[False] * 9]
    scores = [tried[2][f"score_{seed}"] for seed in range(1000, 1006)]
    assert tried[2]["score"] == pytest.approx(sum(scores) / 6)
    assert scores[2] > scores[0] == pytest.approx(tried[0]["score_1000"])


def test_baseline_spends_its_own_budget(bowls):
    _, _, rows, _ = bowls
    own = of(rows, "targets", method="optimizer")
    assert [row["target"] for row in own] == [0.5, 0.75, 1.0]
    for row in own:
        assert row["cost_share"] == row["steps_share"] == pytest.approx(row["target"])
        assert row["worse"] == 0
    assert [row["reached"] for row in own] == [3, 3, 2]  # the highest start is late for its time


def test_shares_follow_from_the_rates(bowls):
    """The slow direction shrinks by 1 - rate/4 a step: twice the rate needs log(0.875)/log(0.75) of the steps."""
    _, _, rows, _ = bowls
    own = of(rows, "targets", method="koopt")
    assert {row["setting"] for row in own} == {"rate 0.5, times 2"}
    for row in own:
        steps = row["target"] * math.log(0.875) / math.log(0.75)
        assert row["steps_share"] == pytest.approx(steps, abs=0.01)
        assert row["cost_share"] == pytest.approx(4 / 3 * steps, abs=0.01)
        assert row["cost_share_low"] <= row["cost_share"]
    ratio = of(rows, "ratios", method="koopt", against="optimizer", target=1.0)[0]
    assert ratio["cost_ratio"] == pytest.approx(4 / 3 * math.log(0.875) / math.log(0.75), abs=0.02)


def test_options_are_tried_at_the_two_best(bowls):
    _, _, rows, _ = bowls
    tried = [row["setting"] for row in of(rows, "search", method="koopt")]
    assert [one for one in tried if "times" in one] == [
        f"rate {rate}, times {times}" for rate in (0.5, 0.1) for times in (2, 0.1)
    ]


def test_the_task_says_which_beta2_are_searched_unless_the_command_does(tmp_path):
    searched = lambda task: [{"rate": 0.1, "beta2": decay} for decay in task.decays]  # noqa: E731
    start = lambda problem, setting, steps: Descent(problem, setting["rate"])  # noqa: E731
    methods = {"optimizer": Trainer("optimizer", start, searched)}
    task = replace(BOWL, decays=(0.5, 0.25))
    for decays, expected in ((None, [0.5, 0.25]), ((0.75,), [0.75])):
        settings = protocol.Settings(seeds=1, decays=decays)
        outcome = protocol.conduct(settings, task, methods, Trials(task, tmp_path), lambda *_: None)
        assert [way.setting["beta2"] for way, _ in outcome.search["optimizer"].tried] == expected


def test_observers_choose_their_own_setting(bowls):
    _, _, rows, _ = bowls
    assert of(rows, "targets", method="scaled")[0]["setting"].endswith("factor 0")  # weights of zero: no loss at all
    late = of(rows, "targets", method="mean", target=1.0)[0]
    assert late["reached"] == 0
    assert not math.isfinite(late["cost_share"])


def test_other_kinds_of_task_are_left_out(bowls):
    assert not of(bowls[2], "targets", method="noisy")


def test_result_file(bowls):
    folder, _, rows, _ = bowls
    result = json.loads((folder / "result.json").read_text())
    assert result["experiment"] == "bench bowl"
    assert len(result["rows"]) == len(rows)
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(result["figures"])
    assert result["settings"]["tuning_seeds"] == [1000, 1001, 1002, 1003, 1004, 1005]
    for title, headings, lines in results.tables(rows):
        assert len(title) <= 100
        widths = [max(len(str(line.get(key, ""))) for line in [*lines, headings]) for key in headings]
        assert sum(widths) + len(widths) <= 100


def test_nothing_runs_twice(bowls, monkeypatch):
    folder, settings, rows, _ = bowls
    monkeypatch.setattr(trials, "run", None)
    again, failures = command.bench(settings, BOWL, METHODS, folder)
    assert (again, failures) == (rows, [])
    few, _ = command.bench(replace(settings, methods=("koopt",)), BOWL, METHODS, folder)
    assert {row["method"] for row in of(few, "targets")} == {"optimizer", "koopt"}


def test_against_the_same_run_without_koopt_and_to_the_end_of_a_cosine(tmp_path):
    def trainer(name, times, without=()):
        return Trainer(name, lambda p, s, _: Descent(p, times * s["rate"]), lambda _: [{"rate": 0.5}], without=without)

    few = {"optimizer": trainer("optimizer", 1.0), "cosine": trainer("cosine", 0.5)}
    few |= {"noisy": METHODS["noisy"], "better": trainer("better", 2.0, ("noisy", "optimizer"))}
    few |= {"worse": trainer("worse", 0.5, ("noisy", "optimizer")), "alone": trainer("alone", 0.5, ("noisy",))}
    rows, failures = command.bench(protocol.Settings(seeds=3), BOWL, few, tmp_path)
    assert failures == []
    found = {row["method"]: row["worse_than_without"] for row in of(rows, "targets", target=1.0)}
    assert found == {"optimizer": None, "cosine": None, "better": 0, "worse": 3, "alone": None}
    [own], [twice] = (of(rows, "cosine", method=name) for name in ("cosine", "optimizer"))
    assert (own["cost_share"], own["reached"]) == (1.0, 2)
    # the slow direction shrinks by 1 - rate/4 a step
    assert twice["cost_share"] == pytest.approx(math.log(1 - 0.25 / 4) / math.log(1 - 0.5 / 4), abs=0.01)


def test_interrupted_and_resumed(bowls, tmp_path, monkeypatch):
    _, settings, rows, _ = bowls
    made, real = [], run

    def counted(*arguments):
        if len(made) == 20:
            raise KeyboardInterrupt
        made.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(trials, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        command.bench(settings, BOWL, METHODS, tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    frozen, _ = command.bench(replace(settings, frozen=True), BOWL, METHODS, tmp_path)
    assert of(frozen, "search")
    assert "not complete, of 3 seeds there are: optimizer" in (tmp_path / "result.json").read_text()
    made.insert(0, None)  # the limit is behind
    again, failures = command.bench(settings, BOWL, METHODS, tmp_path)
    assert failures == []
    timed = ("seconds", "seconds_share", "seconds_share_low", "seconds_share_high", "seconds_ratio")
    timed = (*timed, "seconds_ratio_low", "seconds_ratio_high")
    strip = lambda some: [{k: v for k, v in row.items() if k not in timed} for row in some]  # noqa: E731
    assert strip(again) == strip(rows)
    identities = [(a[1].name, json.dumps(a[2]), a[3], str(a[4])) for a in made[1:]]
    assert len(set(identities)) == len(identities)


def test_the_test_split_is_read_on_reported_seeds_only(tmp_path):
    read = []

    def problem(seed, guarded):
        made = regression(seed, guarded)
        return replace(made, test=lambda: read.append(seed) or made.test())

    command.bench(
        protocol.Settings(("optimizer", "koopt"), seeds=2), replace(NOISY, problem=problem), METHODS, tmp_path
    )
    assert sorted(read) == [0, 0, 1, 1]


def test_a_method_that_fails_is_left_out(tmp_path):
    def broken(problem, setting, steps):
        raise RuntimeError("no such thing")

    methods = METHODS | {"broken": Trainer("broken", broken, searched)}
    rows, failures = command.bench(protocol.Settings(("optimizer", "broken"), seeds=2), BOWL, methods, tmp_path)
    assert {row["method"] for row in of(rows, "targets")} == {"optimizer"}
    assert failures == [f"broken: RuntimeError: no such thing; see {tmp_path / 'failed-broken.txt'}"]


def test_koopts_trials_depend_on_its_settings_and_source(monkeypatch):
    ways = [trials.Way(name, METHODS[name], {"rate": 0.1}) for name in ("koopt", "optimizer")]
    before = [way.identity(BOWL, 0) for way in ways]
    assert before[0]["koopt"]["attach"]["cycle"] == "100"
    monkeypatch.setattr(trials, "_source_of_engine", lambda: "other")
    after = [way.identity(BOWL, 0) for way in ways]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True]


def test_damaged_trials_are_refused(bowls, tmp_path):
    (tmp_path / "trials").mkdir()
    way = trials.Way("optimizer", METHODS["optimizer"], {"rate": 0.1})
    kept = trials.Trials(BOWL, tmp_path)
    path, _ = kept.path(way, 0)
    for content in ("", "{}", json.dumps(json.loads(next((bowls[0] / "trials").glob("koopt-*")).read_text()))):
        path.write_text(content)
        with pytest.raises(ValueError, match="is damaged; delete it"):
            kept.get(way, 0)


def test_what_a_method_takes_from_koopt_counts_as_its_source():
    from koopt.bench.methods import jumping

    taken = {path.name for path in trials._taken_from_koopt(Path(jumping.__file__))}
    assert taken == {"forecasters.py", "budget.py", "candidates.py", "guard.py", "window.py"}


def test_changed_sources_are_told(bowls, monkeypatch):
    folder, settings, rows, _ = bowls
    assert json.loads((folder / "result.json").read_text()).get("findings", []) == []
    real = trials._sources
    monkeypatch.setattr(trials, "_sources", lambda *given: real(*given) | {"bench/run.py": "other"})
    again, _ = command.bench(replace(settings, frozen=True), BOWL, METHODS, folder)
    assert again == rows
    assert "some trials were made before bench/run.py changed" in (folder / "result.json").read_text()


def test_digest_of_what_the_code_does(tmp_path):
    texts = [
        "def f():\n    return 1\n",
        '"""Doc."""\ndef f() -> int:\n    """More."""\n    return  1  # one\n',
        "def f():\n    return 2\n",
    ]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.py").write_text(text)
    one, same, other = (trials._digest(tmp_path / f"{i}.py") for i in range(3))
    assert one == same != other


@pytest.fixture
def no_workers_afterwards():
    """joblib keeps its processes for some minutes, and other tests look whether any are left."""
    yield
    loky.get_reusable_executor().shutdown(wait=True)
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("no_workers_afterwards")
def test_processes_agree_with_one_process(bowls, tmp_path):
    _, _, rows, _ = bowls
    settings = protocol.Settings(("optimizer", "mean"), seeds=3, jobs=2)
    found, failures = command.bench(settings, BOWL, METHODS, tmp_path)
    assert failures == []
    shown = [(row["method"], row["target"], row["cost_share"], row["setting"]) for row in of(found, "targets")]
    assert shown == [
        (row["method"], row["target"], row["cost_share"], row["setting"])
        for row in of(rows, "targets")
        if row["method"] in ("optimizer", "mean")
    ]


# figures and the command line


def test_figures(bowls):
    from matplotlib.figure import Figure

    axes = Figure().subplots(3)
    inf, along = math.inf, np.arange(4.0)
    figures.loss_curves(axes[0], along, {"koopt": np.array([[4, 3, 2, 1.0], [4, 3, 2, inf]])}, [2.0], "steps")
    np.testing.assert_array_equal(axes[0].lines[0].get_ydata(), [4, 3, 2, 1])
    figures.target_shares(axes[1], {"a": [(0.5, 0.4, inf)], "b": [(inf, 0.9, inf)]}, ["all"], "share")
    assert axes[1].lines[0].get_xdata() == [0.5]
    figures.performance_profile(axes[2], statistics.profile({"a": [1.0, 2.0], "b": [2.0, inf]}))
    ends = {line.get_label(): line.get_ydata()[-1] for line in axes[2].lines}
    assert ends == {"a": 1.0, "b": 0.5}


def test_figures_call_methods_as_the_tables_do():
    from matplotlib.figure import Figure

    names = ["koopt", "dema", "line-copy", "guarded", "koopt-jumps", "mine"]
    ax = figures.target_shares(Figure().subplots(), {name: [(0.5, 0.4, 0.6)] for name in names}, ["all"], "share")
    shown = [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()]
    assert shown == [
        "koopt",
        "double EMA",
        "straight line, horizon by the guard",
        "tuned optimizer without the guard's examples",
        "koopt, history=0",
        "mine",
    ]
    assert [label.get_fontweight() for label in ax.get_yticklabels()] == ["bold", *["normal"] * 5]


def profiles():
    """Nine methods, each the better the earlier, with koopt and the baseline last."""
    names = [*"abcdefg", "optimizer", "koopt"]
    return {name: np.array([1.0 + 0.3 * i, 2.0 + 0.3 * i, math.inf]) for i, name in enumerate(names)}


def curves():
    """The same as loss curves."""
    return {name: np.geomspace(1, row[0] / 10, 50)[None] for name, row in profiles().items()}


@pytest.mark.parametrize("kind", ["profile", "curves"])
def test_many_methods_are_told_apart(kind):
    from matplotlib.figure import Figure

    figure = Figure()
    if kind == "profile":
        ax = figures.performance_profile(figure.subplots(), profiles())
    else:
        ax = figures.loss_curves(figure.subplots(), np.arange(50.0), curves(), [0.3], "steps")
    figure.canvas.draw()
    handles, labels = ax.get_legend_handles_labels()
    assert labels == ["a", "b", "c", "d", "tuned optimizer", "koopt", "e", "f", "g"]
    looks = [(line.get_color(), str(line.get_linestyle()), line.get_marker()) for line in handles]
    assert len(set(looks)) == len(looks)
    letters = [line.get_marker() for line in handles[-3:]]
    assert [text.get_text() for text in ax.texts] == letters == [rf"$\mathrm{{{letter}}}$" for letter in "ABC"]
    grey = [line for line in ax.lines if line.get_color() == figures.GREY and len(line.get_xdata())]
    for line, text in zip(grey, ax.texts, strict=True):  # each letter stands on its line
        places = (ax.transScale + ax.transLimits).transform(line.get_xydata())
        assert figures._distance(np.array([text.get_position()]), densely(places)) < 0.01


def densely(corners):
    """Places on the straight lines between these."""
    at = np.linspace(0, len(corners) - 1, 200 * len(corners))
    return np.stack([np.interp(at, np.arange(len(corners)), side) for side in corners.T], axis=1)


@pytest.fixture
def own(monkeypatch):
    """The command knows this file's tasks and methods."""
    for name in ("TASKS", "QUICK"):
        monkeypatch.setattr(f"koopt.bench.tasks.{name}", {"bowl": BOWL, "regression": NOISY})
    monkeypatch.setattr("koopt.bench.methods.METHODS", METHODS)


def test_command(own, tmp_path, capsys):
    arguments = ["bench", "all", "--quick", "--jobs", "1", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["command"] == "koopt bench all --quick"
    assert {row["task"] for row in result["rows"]} == {"bowl", "regression"}
    assert result["figures"] == [f"profile-{kind}-tasks.png" for kind in ("all", "full-batch", "noisy")]
    assert (tmp_path / "bowl" / "result.json").exists()
    assert max(map(len, shown.splitlines())) <= 100 + len(str(tmp_path))
    again = ["bench", "bowl", "--quick", "--report", "--output", str(tmp_path / "bowl")]
    assert cli.main(again) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing"], "TASK is 'nothing', expected bowl, regression or all"),
        (["bowl", "--methods", "koopt,magic"], "--methods names 'magic', expected some of optimizer, mean"),
        (["bowl", "--methods", "noisy"], "--methods names 'noisy', which is for noisy tasks, and bowl is not one"),
        (["bowl", "--seeds", "0"], "--seeds is 0, expected at least 1"),
        (["bowl", "--seed", "995"], "--seed is 995: seed 1000 is for tuning, and never reported"),
        (["bowl", "--jobs", "0"], "--jobs is 0, expected at least 1, or -1 for all cores"),
        (["bowl", "--beta2", "0.9,few"], "--beta2 is '0.9,few', expected numbers between 0 and 1, separated by commas"),
        (["bowl", "--beta2", "0.9,1"], "--beta2 is '0.9,1', expected numbers between 0 and 1, separated by commas"),
        (["bowl", "--report"], "holds no trials of the baseline"),
    ],
)
def test_bad_commands(own, options, message, tmp_path, capsys):
    assert cli.main(["bench", *options, "--output", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_published_table():
    row = {"table": "targets", "method": "koopt", "measure": "cost", "reached": 9, "seeds": 10, "seconds_share": 0.5}
    row |= {"cost_share": 0.25, "cost_share_low": 0.2, "cost_share_high": math.inf, "final_loss": 1.0, "test_loss": 2.0}
    rows = [{**row, "target": at, "worse": 2, "worse_than_without": 0} for at in protocol.SHARES]
    missed = {
        "cost_share": math.inf,
        "cost_share_low": math.inf,
        "cost_share_high": math.inf,
        "seconds_share": math.inf,
    }
    rows += [{**one, **missed, "method": "ema", "worse_than_without": None} for one in rows]
    head, _, koopt, other = results.markdown(rows, {"koopt": "**koopt**", "ema": ""}).splitlines()
    assert head == "| method | 50% | 75% | 100% | reach the last | CPU to the last | final loss | test | > 2 % worse |"
    assert koopt == "| **koopt** | " + "0.25 (0.20 to ∞) | " * 3 + "9/10 | 0.50 | 1 | 2 | 2; 0 |"
    assert other == "| ema | " + "∞ | " * 3 + "9/10 | ∞ | 1 | 2 | 2 |"


def test_a_method_of_koopt_without_runs_is_said_to_be_missing():
    search, task = {"koopt": protocol.Search(None, [])}, TASKS["de-solver"]
    outcome = protocol.Outcome(task, [], search, {}, without={"koopt": {}}, failed={}, outdated=set())
    assert results.findings(outcome, 2) == ["de-solver: not complete, of 2 seeds there are: koopt 0"]
