"""Counts, exponents, forms and the complexity experiment in small; no test depends on how long anything takes."""

import csv
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from koopt.experiments import complexity, complexity_rows, scaling
from koopt.experiments.scaling import Case
from koopt.operator import algorithm_1

SMALL = complexity.Settings(
    points=3, fitted=3, layers=2, window=5, piece=4, widths=(4, 8), batches=(2, 8), horizon=7, repeats=1, limit=600.0
)

# counting

COUNTS = {  # operator -> patches, weights of each, in 3 layers of 8 x 8, quasi-nodes of 4
    "weight": (192, 1),
    "node": (24, 8),
    "quasi-node": (48, 4),
    "layer": (3, 64),
    "network": (1, 192),
}


@pytest.mark.parametrize(("operator", "patches", "state"), [(name, *count) for name, count in COUNTS.items()])
def test_operations(operator, patches, state):
    held, spanned = (Case(operator, form, layers=3, width=8, window=10, piece=4) for form in ("state", "snapshot"))
    assert (held.patches, held.state) == (patches, state)
    assert scaling.operations(held, "construction") == patches * state**2 * 10
    assert scaling.operations(held, "iteration") == patches * state**2
    assert scaling.operations(spanned, "construction") == patches * state * 10**2
    assert scaling.operations(spanned, "iteration") == patches * 10**2


# (operator, form) -> exponents of construction, of iteration, against n, k, q, N = n; solved by hand
THEORY = {
    ("weight", "state"): ((2, 1, 0, 3), (2, 0, 0, 3)),
    ("node", "state"): ((3, 1, 0, 5), (3, 0, 0, 4)),
    ("quasi-node", "state"): ((2, 1, 1, 3), (2, 0, 1, 3)),
    ("layer", "state"): ((4, 1, 0, 7), (4, 0, 0, 5)),
    ("network", "state"): ((4, 1, 0, 9), (4, 0, 0, 6)),
    ("node", "snapshot"): ((2, 2, 0, 3), (1, 2, 0, 2)),
    ("quasi-node", "snapshot"): ((2, 2, 0, 3), (2, 2, -1, 3)),
    ("layer", "snapshot"): ((2, 2, 0, 3), (0, 2, 0, 1)),
    ("network", "snapshot"): ((2, 2, 0, 3), (0, 2, 0, 0)),
}


@pytest.mark.parametrize(("operator", "form"), THEORY, ids=" ".join)
def test_theory(operator, form):
    case = Case(operator, form, layers=3, width=32, window=16, piece=8)
    for phase, expected in zip(scaling.PHASES, THEORY[operator, form], strict=True):
        assert tuple(scaling.theory(case, phase, against) for against in ("n", "k", "q", "N = n")) == expected


# fitting


@pytest.mark.parametrize("power", [-1.0, 0.0, 2.0, 9.0])
def test_exact_powers(power):
    sizes = np.array([3, 5, 8, 13])
    assert scaling.exponent(sizes.tolist(), (1e-6 * sizes**power).tolist()) == pytest.approx(
        (power, power, power), abs=1e-9
    )


def test_exponent_and_interval_are_scipys():
    rng = np.random.default_rng(0)
    for count in range(3, 13):
        sizes = rng.uniform(1, 100, count)
        times = sizes**1.7 * rng.lognormal(0, 0.3, count)
        line = stats.linregress(np.log(sizes), np.log(times))
        half = stats.t.ppf(0.975, count - 2) * line.stderr
        expected = line.slope, line.slope - half, line.slope + half
        assert scaling.exponent(sizes.tolist(), times.tolist()) == pytest.approx(expected, abs=1e-4 * half)


def test_interval_covers_nineteen_times_in_twenty():
    rng = np.random.default_rng(1)
    sizes, trials = np.array([16, 24, 32, 48, 64]), 2000
    times = sizes**3 * rng.lognormal(0, 0.2, (trials, len(sizes)))
    ends = [scaling.exponent(sizes.tolist(), row)[1:] for row in times.tolist()]
    covered = np.mean([low <= 3 <= high for low, high in ends])
    low, high = stats.binom.ppf([0.001, 0.999], trials, 0.95) / trials
    assert low <= covered <= high


@pytest.mark.parametrize(("sizes", "times"), [([1, 2], [1, 2]), ([1, 2, 3], [1, 2]), (range(1, 14), range(1, 14))])
def test_too_few_or_too_many_points(sizes, times):
    with pytest.raises(ValueError, match="expected as many of both, 3 to 12"):
        scaling.exponent(list(sizes), list(times))


# what is timed is right

FORMS = [
    Case(operator, form, layers=2, width=8, window=6, piece=8) for operator, form in THEORY if operator != "weight"
]


@pytest.mark.parametrize("case", FORMS, ids=lambda case: f"{case.operator} {case.form}")
@pytest.mark.parametrize("horizon", [1, 5])
def test_both_forms_step_to_the_forecast(case, horizon):
    """One by one and at once, in both forms, against the readable reference."""
    snapshots = scaling.trajectories(case, seed=0)
    built = scaling.build(case, snapshots)
    motion = (snapshots[:, -1] - snapshots[:, 0]).abs().max().item()
    expected = algorithm_1(snapshots, horizon)
    assert_close(scaling.walked(built, horizon), expected, rtol=0, atol=1e-6 * motion)
    assert_close(built.operator.forecast(horizon), expected, rtol=0, atol=1e-6 * motion)


@pytest.mark.parametrize("operator", ["weight", "node", "quasi-node", "layer", "network"])
def test_state_form_is_the_least_squares_matrix(operator):
    case = Case(operator, "state", layers=2, width=4, window=40, piece=2)
    snapshots = scaling.trajectories(case, seed=0)
    matrix = scaling.build(case, snapshots).matrix
    assert matrix.shape == (case.patches, case.state, case.state)
    for patch, found in zip(snapshots.numpy(), matrix, strict=True):
        solved = np.linalg.lstsq(patch[:-1], patch[1:], rcond=1e-15)[0].T
        assert np.abs(found.numpy() - solved).max() < 1e-6 * max(1, np.abs(solved).max())


def test_trajectories_have_full_rank_and_a_seed():
    case = Case("layer", "state", layers=2, width=3, window=20)
    snapshots = scaling.trajectories(case, seed=3)
    assert (snapshots.shape, snapshots.dtype) == ((2, 20, 9), torch.float64)
    assert torch.linalg.matrix_rank(snapshots).tolist() == [9, 9]
    assert torch.equal(snapshots, scaling.trajectories(case, seed=3))
    assert not torch.equal(snapshots, scaling.trajectories(case, seed=4))


@pytest.mark.parametrize("size", [1, 5])
def test_an_iteration_is_a_product(size):
    matrix, states = torch.randn(3, size, size), torch.randn(3, size)
    assert_close(scaling.iterate(matrix, states), torch.stack([u @ x for u, x in zip(matrix, states, strict=True)]))


# the clock


@pytest.fixture
def ticking(monkeypatch):
    """A clock that only the timed action moves."""
    now = [0.0]
    monkeypatch.setattr(scaling.time, "process_time", lambda: now[0])
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: now[0])

    def action_of(*durations):
        calls = []

        def action():
            now[0] += durations[min(len(calls), len(durations) - 1)]
            calls.append(None)

        return action, calls

    return action_of


def test_the_first_call_warms_up(ticking):
    action, calls = ticking(0.9, 0.25)
    assert scaling.seconds(action, repeats=3, limit=2.0) == 0.25
    assert len(calls) == 5


def test_a_median_of_samples(ticking):
    action, _ = ticking(0.0, 0.25, 0.5, 4.0, 0.125)
    assert scaling.seconds(action, repeats=3, limit=100.0) == 0.5


def test_long_calls_are_not_repeated(ticking):
    action, calls = ticking(1.5)
    assert scaling.seconds(action, repeats=9, limit=2.0) == 1.5
    assert len(calls) == 1


def test_samples_stop_at_the_limit(ticking):
    action, calls = ticking(0.75)
    assert scaling.seconds(action, repeats=9, limit=2.0) == 0.75
    assert len(calls) == 2 + 3


def test_short_calls_fill_a_sample(ticking):
    action, calls = ticking(2.0**-12)
    assert scaling.seconds(action, repeats=1, limit=2.0) == 2.0**-12
    assert len(calls) == 2 + math.ceil(scaling.SAMPLE * 2**12)


# rows


def test_sweeps_vary_one_thing():
    changed = {"n": {"width"}, "k": {"window"}, "q": {"piece"}, "N = n": {"width", "layers"}}
    for operator, form, against in complexity_rows.SIZES:
        cases = [case for _, case in complexity_rows.sweep(complexity.Settings(), operator, form, against)]
        for earlier, later in itertools.pairwise(cases):
            found = {key for key in vars(earlier) if vars(earlier)[key] != vars(later)[key]}
            windows = {"window"} if against == "N = n" and form == "state" and operator in GROW else set()
            assert found == changed[against] | windows
        for case in cases:
            assert case.patches * case.state == case.layers * case.width**2
            # the regime that each form is for: the state form needs its operator determined
            assert case.window > case.state if form == "state" else case.window <= case.state


GROW = ("node", "layer", "network")  # the patches that grow with n


def test_exponents_of_made_up_times():
    def made_up(row):
        power = {"construction": 3, "iteration": 1.5}[row["phase"]]
        return 1e-6 * row["size"] ** power

    sizes = {key: complexity_rows.sweep(SMALL, *key) for key in complexity_rows.SIZES}
    timed = [
        {"operator": o, "form": f, "against": a, "size": size, "phase": phase}
        for (o, f, a), cases in sizes.items()
        for size, _ in cases
        for phase in scaling.PHASES
    ]
    timed = [row | {"seconds": made_up(row)} for row in timed]
    rows = complexity_rows.fit_exponents(SMALL, timed)
    assert len(rows) == 2 * len(complexity_rows.SIZES)
    for row in rows:
        expected = 3 if row["phase"] == "construction" else 1.5
        assert [row[key] for key in ("exponent", "low", "high")] == pytest.approx([expected] * 3)
    node = select(rows, operator="node", form="state", phase="construction", against="n")
    assert (node["theory"], node["sizes"], node["too_large"]) == (3, "12 to 24", None)
    for row in timed:
        if row["operator"] == "node" and row["size"] == 24 and row["against"] == "n":
            row["seconds"] = None
    node = select(
        complexity_rows.fit_exponents(SMALL, timed), operator="node", form="state", phase="construction", against="n"
    )
    assert (node["exponent"], node["sizes"], node["too_large"]) == (None, "12 to 16", "24")


def test_only_the_largest_sizes_are_fitted():
    settings = replace(SMALL, points=6, fitted=3)
    cases = complexity_rows.sweep(settings, "node", "state", "n")
    timed = [
        {"operator": "node", "form": "state", "against": "n", "size": size, "phase": "construction"}
        | {"seconds": 1.0 if i < 3 else float(size) ** 3}
        for i, (size, _) in enumerate(cases)
    ]
    row = select(complexity_rows.fit_exponents(settings, timed), operator="node", form="state", against="n", points=3)
    assert row["exponent"] == pytest.approx(3)


def test_what_would_take_too_long_is_left_out(monkeypatch):
    """A clock by which a construction takes a microsecond an operation."""
    case = Case("node", "state", layers=1, width=4, window=8)
    taken = scaling.operations(case, "construction") * 1e-6
    monkeypatch.setattr(scaling, "seconds", lambda action, *_: (action(), taken)[1])
    larger = replace(case, width=8)
    just = scaling.operations(larger, "construction") * 1e-6
    for limit, fits in ((1.01 * just, True), (0.99 * just, False)):
        budget = complexity_rows.Budget(limit)
        assert complexity_rows.measure(SMALL, case, budget)["construction"] == taken
        assert bool(complexity_rows.measure(SMALL, larger, budget)) == fits


def test_matrices_that_memory_cannot_hold_are_not_tried():
    budget = complexity_rows.Budget(math.inf)
    assert not budget.allows(Case("network", "state", layers=3, width=64, window=16))
    assert budget.allows(Case("network", "snapshot", layers=3, width=64, window=16))


def test_gains_by_hand():
    # 2 layers of 4 x 4, nodes: 8 patches of 4 weights; counted: construction 8 * 16 * 10, iteration 8 * 16, step 32 j
    case = Case("node", "state", layers=2, width=4, window=10)
    found = {"construction": 6.0, "iteration": 0.5, "at_once": 4.0}
    gains = complexity_rows._gains(case, batch=8, horizon=100, step=2.0, found=found)
    assert gains == {
        "gain_iteration_theory": 2.0,
        "gain_theory": pytest.approx(8 / (4 * (1 + 10 / 100))),
        "pays_from_T_theory": 10.0,
        "gain_iteration": 4.0,
        "gain": pytest.approx(200 / 56),
        "pays_from_T": 4.0,
        "gain_at_once": 20.0,
    }
    slow = complexity_rows._gains(case, batch=4, horizon=100, step=0.5, found=found)
    assert (slow["gain_iteration_theory"], slow["pays_from_T_theory"], slow["pays_from_T"]) == (1.0, None, None)
    unknown = complexity_rows._gains(case, batch=8, horizon=100, step=2.0, found={})
    assert unknown == gains | dict.fromkeys(("gain_iteration", "gain", "pays_from_T", "gain_at_once"))


def test_savings_by_hand():
    state = {"construction": 10.0, "iteration": 2.0, "at_once": 5.0}
    snapshot = {"construction": 4.0, "iteration": 0.5, "at_once": 1.0}
    assert complexity_rows._saved(state, snapshot, horizon=20) == {
        "saving_construction": 2.5,
        "saving_iteration": 4.0,
        "saving": 10.0,
    }
    assert set(complexity_rows._saved({}, snapshot, horizon=20).values()) == {None}


def test_the_training_step_trains(monkeypatch):
    """What is timed lowers the loss of a network of the size asked for."""
    losses = []

    def called(action, *_):
        for _ in range(3):
            action()
        return 1.0

    mse = torch.nn.functional.mse_loss

    def recorded(output, target):
        losses.append(mse(output, target))
        assert output.shape == target.shape == (8, 4)
        return losses[-1]

    monkeypatch.setattr(scaling, "seconds", called)
    monkeypatch.setattr(torch.nn.functional, "mse_loss", recorded)
    before = torch.get_rng_state()
    assert complexity_rows.step_seconds(SMALL, width=4, batch=8) == 1.0
    assert losses[0] > losses[1] > losses[2]
    assert torch.equal(torch.get_rng_state(), before)


# the experiment


TINY = {  # against, form -> width, window, piece, sizes
    ("n", "state"): (0, 130, 2, (4, 6, 8)),
    ("k", "state"): (4, 0, 2, (40, 60, 80)),
    ("q", "state"): (8, 10, 0, (2, 4, 8)),
    ("N = n", "state"): (0, 0, 2, (2, 4, 6)),
    ("n", "snapshot"): (0, 3, 4, (4, 8, 12)),
    ("k", "snapshot"): (8, 0, 8, (3, 5, 7)),
    ("q", "snapshot"): (24, 4, 0, (6, 12, 24)),
    ("N = n", "snapshot"): (0, 3, 4, (4, 8, 12)),
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("complexity") / "new"
    told = []
    tiny = {(o, form, against): TINY[against, form] for o, form, against in complexity_rows.SIZES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(complexity_rows, "SIZES", tiny)
        rows = complexity.reproduce(SMALL, folder, lambda *stage: told.append(stage))
    return rows, folder, told


def select(rows, **wanted):
    (row,) = complexity.select(rows, **wanted)
    return row


def test_rows_are_complete_and_flat(outcome):
    rows, _, _ = outcome
    assert len(complexity.select(rows, kind="exponent")) == 2 * len(complexity_rows.SIZES)
    assert len(complexity.select(rows, kind="saving")) == 4 * 2
    assert len(complexity.select(rows, kind="pays")) == 7 * 2 * 2
    for row in rows:
        assert row.keys() >= complexity.TABLES[row["kind"]].keys()
        assert all(value is None or isinstance(value, (str, int, float)) for value in row.values())
        assert not any(isinstance(value, float) and not math.isfinite(value) for value in row.values())


def test_memory_saved(outcome):
    row = select(outcome[0], kind="saving", operator="layer", n=8)
    assert (row["m"], row["k"], row["patches"], row["q"]) == (64, 5, 2, None)
    assert row["saving_memory"] == 64**2 / (64 * 5 + 4**2)


def test_windows_compared_with_training(outcome):
    for row in complexity.select(outcome[0], kind="pays"):
        assert row["k"] == (2 * row["m"] if row["form"] == "state" else SMALL.window)
        if row["form"] == "state":
            assert row["gain_iteration_theory"] == row["j"] / row["m"]


def test_files(outcome):
    rows, folder, _ = outcome
    result = json.loads((folder / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert result["experiment"] == "complexity"
    assert result["rows"] == json.loads(json.dumps(rows))
    assert result["settings"]["widths"] == [4, 8]
    assert result["findings"] == complexity.findings(rows)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*result["figures"], "result.json", "times.csv"])
    for name in result["figures"]:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_exponents_can_be_fitted_again_to_the_times(outcome):
    rows, folder, _ = outcome
    with (folder / "times.csv").open(newline="") as file:
        timed = list(csv.DictReader(file))
    assert len(timed) == 2 * 3 * len(complexity_rows.SIZES)
    wanted = {"operator": "node", "form": "snapshot", "against": "k", "phase": "iteration"}
    points = [(int(row["size"]), float(row["seconds"])) for row in complexity.select(timed, **wanted)]
    assert scaling.exponent(*zip(*points, strict=True))[0] == pytest.approx(select(rows, **wanted)["exponent"])


def test_progress_reaches_its_end(outcome):
    for stage in ("operators", "both forms", "training steps"):
        counts = [(done, total) for name, done, total in outcome[2] if name == stage]
        assert [done for done, _ in counts] == list(range(counts[-1][1] + 1))
        assert len({total for _, total in counts}) == 1


def test_the_threads_are_given_back(tmp_path, monkeypatch):
    def stop(*_):
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(complexity_rows, "time_sweeps", stop)
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            complexity.reproduce(SMALL, tmp_path, lambda *_: None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_findings_say_what_the_rows_say(outcome):
    rows = [
        {"kind": "exponent", "operator": "layer", "form": form, "phase": "construction", "against": "N = n"}
        | {"exponent": slope, "low": slope - 0.1, "high": slope + 0.1, "theory": theory}
        for form, slope, theory in (("state", 6.13, 7), ("snapshot", 3.04, 3))
    ]
    first, second = complexity.findings(rows)
    assert first.startswith("1 of 2 exponents are within 0.5 of the theory's, 1 with")
    assert "furthest is 6.1 where theory has 7 (layer, state form, construction against N = n)" in first
    assert "state form take n^6.1 to construct (theory n^7)" in second
    assert "n^3.0 (theory n^3)" in second
    gains = [(1.5, 0.5), (0.5, 2.0), (2.0, 2.0), (None, 2.0)]
    paid = [
        {"kind": "pays", "operator": "node", "form": "state", "T": 10, "gain": gain, "gain_theory": expected}
        | {"gain_iteration": gain, "gain_iteration_theory": expected, "gain_at_once": gain}
        for gain, expected in gains
    ]
    (said,) = complexity.findings(paid)
    assert said == (
        "node operators, state form, 3 pairs of n and j, 1 more were too large: "
        "per iteration: pays in 2 where the inequality says 2 (1 beyond, 1 short of it); "
        "with construction, T = 10: pays in 2 where the inequality says 2 (1 beyond, 1 short of it); "
        "all steps at once: 2"
    )
    assert complexity.findings([]) == []
    assert len(complexity.findings(outcome[0])) > 4


# settings

WRONG = {
    "seed": ({"seed": -1}, "--seed is -1"),
    "large seed": ({"seed": 2**64}, "--seed is"),
    "few points": ({"points": 2, "fitted": 2}, "fitted and points are 2 and 2"),
    "more fitted than timed": ({"points": 3, "fitted": 4}, "fitted and points are 4 and 3"),
    "more points than sizes": ({"points": 99}, "fitted <= points <= 7"),
    "layers": ({"layers": 0}, "layers is 0"),
    "window": ({"window": 2}, "window is 2, expected at least 3"),
    "horizon": ({"horizon": 0}, "horizon is 0"),
    "repeats": ({"repeats": 0}, "repeats is 0"),
    "limit": ({"limit": 0.0}, "limit is 0.0"),
    "limit NaN": ({"limit": math.nan}, "limit is nan"),
    "no width": ({"widths": ()}, "widths are"),
    "widths fall": ({"widths": (32, 16)}, "widths are"),
    "batch": ({"batches": (0, 1)}, "batches are"),
    "twice": ({"batches": (16, 16)}, "batches are"),
    "piece": ({"piece": 5}, "piece is 5, expected a divisor"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_settings_write_nothing(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        complexity.reproduce(replace(complexity.Settings(), **change), tmp_path / "new", lambda *_: None)
    assert list(tmp_path.iterdir()) == []


def test_given_settings_are_accepted():
    complexity.check(complexity.Settings())
    complexity.check(complexity.QUICK)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="--output"):
        complexity.reproduce(SMALL, tmp_path / "file", lambda *_: None)
