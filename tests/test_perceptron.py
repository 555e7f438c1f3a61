"""The perceptron experiment: exact errors, the batched training against a plain loop, forecasts, verdicts, output."""

import json
import math
from dataclasses import asdict, replace

import matplotlib.image
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from koopt.experiments import figure_s4, online, perceptron, perceptron_claims
from koopt.operator import algorithm_1

SMALL = perceptron.Settings(seeds=4, sizes=(6, 12), size_seeds=3, window=40, steps=90, block=5, dropped=10)
RUN = SMALL.run("uneven", 6, 4, stride=2)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick") / "new"
    told = []
    threads = torch.get_num_threads()
    rows = perceptron.reproduce(perceptron.QUICK, folder, lambda *news: told.append(news))
    assert torch.get_num_threads() == threads
    return rows, folder, told


@pytest.fixture(scope="module")
def simulated():
    return online.simulate(RUN)


def only(rows, **wanted):
    (row,) = (row for row in rows if all(row.get(key) == value for key, value in wanted.items()))
    return row


def strict(path):
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# the exact error


def test_expected_error_is_the_share_of_wrong_signs():
    generator = torch.Generator().manual_seed(1)
    weights, teacher = torch.randn(2, 3, 2, 5, generator=generator, dtype=torch.float64)
    inputs = torch.randn(100_000, 5, generator=generator, dtype=torch.float64)
    wrong = (inputs @ weights.mT).sign() != (inputs @ teacher.mT).sign()
    counted = wrong.double().mean(dim=(1, 2))
    assert_close(online.expected_error(weights.flatten(1), teacher), counted, atol=0.006, rtol=0)


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        ((1.0, 0.0), 0.0),
        ((0.0, -3.0), 0.5),
        ((-1.0, 0.0), 1.0),
        ((1.0, 1.0), 0.25),
        ((1.0, 1e-9), 1e-9 / math.pi),
        ((1e200, 1e200), 0.25),
        ((1e-200, 1e-200), 0.25),
        ((0.0, 0.0), 0.5),
        ((math.nan, 1.0), 0.5),
        ((math.inf, 0.0), 0.5),
    ],
    ids=str,
)
def test_expected_error_of_one_unit(weights, error):
    found = online.expected_error(torch.tensor(weights, dtype=torch.float64), torch.tensor([[7.0, 0.0]]).double())
    assert found.item() == pytest.approx(error, rel=1e-9, abs=1e-16)


# training


def test_batched_training_is_a_loop_over_simulations_units_and_steps(simulated):
    generator = torch.Generator().manual_seed(RUN.seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).numpy()

    teacher, first = normal(4, 3, 6) ** 3, 0.1 * normal(4, 3, 6)
    inputs = np.stack([normal(4, 6, 1)[..., 0] for _ in range(180)])
    path, wrong = np.empty((181, 4, 3, 6)), np.empty((180, 4, 3))
    for s in range(4):
        for unit in range(3):
            w = first[s, unit]
            path[0, s, unit] = w
            for t in range(180):
                x = inputs[t, s]
                label = 1.0 if teacher[s, unit] @ x >= 0 else -1.0
                output = w @ x
                wrong[t, s, unit] = (output >= 0) != (label > 0)
                w = w + 1.0 / 6 * (label - output) * x
                path[t + 1, s, unit] = w
    assert_close(simulated.teacher.numpy(), teacher)
    assert_close(simulated.window.numpy(), path[:81:2].reshape(41, 4, 18))
    blocks = [path[21 + 10 * i : 31 + 10 * i].mean(axis=0).reshape(4, 18) for i in range(6)]
    assert_close(simulated.means.numpy(), np.stack(blocks))
    assert_close(simulated.final.numpy(), path[-1].reshape(4, 18))
    assert_close(simulated.trail.numpy(), path[::2, 0].reshape(91, 18))
    assert_close(simulated.mistakes.numpy(), wrong.mean(axis=(1, 2)))
    lengths = np.linalg.norm(path, axis=-1) * np.linalg.norm(teacher, axis=-1)
    angles = np.arccos((path * teacher).sum(axis=-1) / lengths)
    assert_close(simulated.error.numpy(), (angles / math.pi).mean(axis=-1)[::2])


def test_teachers_differ_by_a_cube_alone(simulated):
    even = online.simulate(replace(RUN, teacher="even"))
    assert_close(even.teacher**3, simulated.teacher)
    assert torch.equal(even.window[0], simulated.window[0])


def test_smoothed_training_error_is_a_moving_mean():
    mistakes = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = np.convolve(mistakes.numpy(), np.full(7, 1 / 7), mode="valid")
    assert_close(perceptron.smoothed(mistakes, 7).numpy(), expected)


# forecasts


@pytest.mark.parametrize(("by", "patches"), [("weight", 18), ("node", 3), ("network", 1)])
def test_operators_are_those_of_algorithm_1(simulated, by, patches):
    op = perceptron.fit(RUN, simulated, by, perceptron.PAPER)
    assert op.residual.shape == (4, patches)
    found = perceptron.forecast(RUN, op, by, "all snapshots", 7)
    for s in range(4):
        units = simulated.window[:, s].reshape(41, patches, -1).transpose(0, 1)
        assert_close(found[s], algorithm_1(units, 7).flatten(), rtol=1e-6, atol=1e-9)


def decaying(run, decay):
    """Weights that follow ``start * decay**step``, as if they had been simulated."""
    weights = run.seeds, run.outputs * run.n_1
    start = 1 + torch.rand(weights, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = torch.arange(run.strides * run.stride + 1, dtype=torch.float64)
    path = start * decay ** steps[:, None, None]
    length = run.block * run.stride
    used = path[run.dropped * run.stride + 1 : run.window * run.stride + 1]
    strided = path[:: run.stride]
    teacher = torch.ones(run.seeds, run.outputs, run.n_1, dtype=torch.float64)
    means = used.unflatten(0, (-1, length)).mean(dim=1)
    error = online.expected_error(strided, teacher)
    window = strided[: run.window + 1]
    return online.Simulation(teacher, window, means, error, torch.zeros(len(steps) - 1), path[-1], strided[:, 0])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("variant", perceptron.VARIANTS, ids=lambda v: f"{v.data}, {v.fit}")
def test_every_kind_of_data_aims_at_the_same_step(variant, stride):
    """Of a purely exponential decay the forecast is the last step but for the window within a block mean."""
    run = replace(RUN, stride=stride)
    data = decaying(run, 0.99)
    last = data.means[-1] if variant.data == "block means" else data.window[-1]
    op = perceptron.fit(run, data, "network", variant)
    found = perceptron.forecast(run, op, "network", variant.data, run.ahead)
    # the mean over a block of b steps stands (b - 1) / 2 steps before the window's end
    age = (run.block * stride - 1) / 2 if variant.data == "block means" else 0
    assert_close(found, last * 0.99 ** (run.ahead * stride + age), rtol=1e-5, atol=0)


def test_a_row_from_first_principles(simulated):
    found = perceptron.evaluate(RUN, simulated, (perceptron.PAPER,), "operators")
    row = only([line.row for line in found], method="mean")
    errors = []
    for s in range(4):
        angles = []
        for unit in range(3):
            mean = simulated.window[:, s].reshape(41, 3, 6)[:, unit].mean(dim=0).numpy()
            teacher = simulated.teacher[s, unit].numpy()
            angles.append(math.acos(mean @ teacher / np.linalg.norm(mean) / np.linalg.norm(teacher)))
        errors.append(np.mean(angles) / math.pi)
    assert row["error"] == pytest.approx(np.mean(errors))
    assert row["error_se"] == pytest.approx(np.std(errors, ddof=1) / 2)
    assert row["success"] == np.mean(np.array(errors) < simulated.error[40].numpy())
    assert row["beats_training"] == np.mean(np.array(errors) < simulated.error[-1].numpy())
    assert row["error_start"] == pytest.approx(simulated.error[40].mean().item())
    assert row["error_trained"] == pytest.approx(simulated.error[90].mean().item())
    assert row["cosine_to_mean"] == pytest.approx(1)
    assert (row["window"], row["stride"], row["horizon"], row["snapshots"]) == (80, 2, 50, 41)


def test_no_change_has_the_error_of_the_windows_end(simulated):
    found = perceptron.evaluate(RUN, simulated, (perceptron.PAPER,), "operators")
    row = only([line.row for line in found], method="last")
    assert row["error"] == row["error_start"]
    assert row["success"] == 0


def test_operators_that_turn_are_told_from_steady_ones():
    run = replace(RUN, n_1=2, outputs=1, stride=1)
    data = decaying(run, 1.0)
    angles = 0.3 * torch.arange(41, dtype=torch.float64)[:, None]
    turning = torch.stack([angles.cos(), angles.sin()], dim=-1).expand(41, 2, 2)
    window = torch.cat([turning, data.window[:, :2]], dim=1)  # two simulations turn, two stand still
    found = perceptron.evaluate(run, replace(data, window=window), (perceptron.PAPER,), "operators")
    row = only([line.row for line in found], by="node")
    assert row["turning"] == 0.5
    assert row["cosine_steady"] == pytest.approx(1)
    mean, end = turning[:, 0].mean(dim=0), torch.tensor([math.cos(0.3 * 90), math.sin(0.3 * 90)]).double()
    assert row["cosine_turning"] == pytest.approx((mean @ end / mean.norm()).item(), abs=1e-6)
    assert row["max_modulus"] == pytest.approx(1)
    single = only([line.row for line in found], by="weight")
    assert (single["turning"], single["cosine_turning"]) == (None, None)


def test_largest_share():
    teacher = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    assert perceptron.largest_share(teacher.flatten(1), teacher.shape) == pytest.approx((0.64 + 1) / 2)


@pytest.mark.parametrize(("strides", "broken"), [(90, 0.0), (140, 1.0)])
def test_forecasts_that_are_not_finite_are_guesses(strides, broken):
    run = replace(RUN, n_1=2, outputs=1, stride=1, strides=strides)
    data = decaying(run, 1.0)
    growing = data.window * 1e-100 * 1e4 ** torch.arange(41, dtype=torch.float64)[:, None, None]  # to 1e60
    found = perceptron.evaluate(run, replace(data, window=growing), (perceptron.PAPER,), "operators")
    for by in perceptron.PARTITIONS:
        row = only([line.row for line in found], by=by)
        assert row["broken"] == broken
        assert row["error"] == (0.5 if broken else pytest.approx(row["error_start"], abs=1e-6))


# verdicts


def evaluated(error, **changes):
    row = {"teacher": "even", "n_1": 6, "window": 40, "stride": 1, "seeds": 4, "error": 0.1, "error_se": 0.0} | changes
    return perceptron_claims.Evaluated(row, error, error, error)


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        ((-0.1, -0.2, -0.1, -0.2), "holds"),
        ((0.1, 0.2, 0.1, 0.2), "fails"),
        ((-0.1, 0.2, 0.1, -0.2), "undecided"),
        ((0.0, 0.0, 0.0, 0.0), "undecided"),
        ((-0.30, 0.05, 0.05, -0.15), "undecided"),  # negative by 1.04 standard errors
    ],
    ids=str,
)
def test_verdicts_need_two_standard_errors(difference, verdict):
    values = torch.tensor(difference, dtype=torch.float64)
    found = perceptron_claims._claim(evaluated(values), "node", "a is lower than b", values, "for a reason")
    assert found["verdict"] == verdict
    assert found["difference"] == pytest.approx(np.mean(difference))
    assert found["difference_se"] == pytest.approx(np.std(difference, ddof=1) / 2)
    assert found["finding"] == f"a is lower than b: {verdict} (even teacher, n_1 = 6, window 40): for a reason"


def test_findings_compare_what_the_rows_hold(outcome):
    rows = outcome[0]
    findings = [row for row in rows if row["study"] == "finding"]
    assert len(findings) == 2 * (1 + 3 * 3 + 2 * (1 + 2 + 2)) + 3 * 2 * 3
    for found in findings:
        batch = [row for row in rows if row["study"] == ("operators" if found["n_1"] == 10 else "size")]
        batch = [row for row in batch if all(row[key] == found[key] for key in ("teacher", "n_1", "window", "stride"))]
        mean, claim, by = only(batch, method="mean"), found["claim"], found["by"]
        if by is None:
            expected = mean["error_trained"] - mean["error_start"]
        elif claim.startswith("careful"):
            expected = only(batch, by=by, setting="careful", data="block means")["error"]
            expected -= only(batch, by=by, setting="paper")["error"]
        else:
            fit = next((fit for fit in ("affine", "rank 1") if fit in claim), "full rank")
            row = only(batch, by=by, fit=fit, data="all snapshots")
            ends = {
                "lower the error of the window's end": row["error_start"],
                "end below training": row["error_trained"],
                "end below the mean of the window": mean["error"],
            }
            (other,) = (value for words, value in ends.items() if claim.endswith(words))
            expected = row["error"] - other
        assert found["difference"] == pytest.approx(expected, abs=1e-12), claim


# the whole


GOLD = {  # teacher, operator, fit: error at step 600
    ("even", "weight", "full rank"): 0.29,
    ("even", "node", "full rank"): 0.18,
    ("even", "weight", "affine"): 0.11,
    ("even", "node", "rank 1"): 0.11,
    ("even", "network", "rank 1"): 0.11,
    ("even", None, "mean"): 0.11,
    ("uneven", "weight", "full rank"): 0.18,
    ("uneven", "node", "full rank"): 0.18,
    ("uneven", "network", "rank 1"): 0.105,
    ("uneven", None, "mean"): 0.105,
}


@pytest.mark.parametrize(("key", "error"), GOLD.items(), ids=str)
def test_results_in_small(outcome, key, error):
    teacher, by, fit = key
    row = only(outcome[0], study="operators", teacher=teacher, by=by, fit=fit, data="all snapshots")
    assert row["error"] == pytest.approx(error, abs=0.02)
    assert row["error_trained"] == pytest.approx(0.217, abs=0.01)
    assert row["training_error_trained"] == pytest.approx(row["error_trained"], abs=0.015)  # another 7,500 mistakes
    assert row["training_error_start"] == pytest.approx(row["error_start"], abs=0.015)


def test_fitting_all_of_the_noise_fails_and_less_of_it_does_not(outcome):
    rows = [row for row in outcome[0] if row["study"] == "operators"]
    for teacher in online.TEACHERS:
        network = only(rows, teacher=teacher, by="network", setting="paper")
        mended = only(rows, teacher=teacher, by="network", fit="rank 1", data="all snapshots")
        assert network["error"] > 0.2 > 1.8 * mended["error"]
        assert network["turning"] > 0.1
        assert network["cosine_turning"] < 0.5 < 0.9 < network["cosine_steady"]


def test_result_json_and_figures(outcome):
    rows, folder, told = outcome
    result = strict(folder / "result.json")
    assert {"experiment", "settings", "machine", "rows", "figures"} <= set(result)
    assert result["experiment"] == "perceptron"
    assert result["settings"] == asdict(perceptron.QUICK) | {"sizes": list(perceptron.QUICK.sizes)}
    assert result["rows"] == rows
    assert result["figures"] == ["figure-s4b.png", "figure-s4d.png", "perceptron-size.png"]
    assert {path.name for path in folder.iterdir()} == {"result.json", *result["figures"]}
    for name in result["figures"]:
        picture = matplotlib.image.imread(folder / name)
        height, width, _ = picture.shape
        assert 600 <= width <= 2000
        assert 300 <= height <= 1500
        assert (picture[..., :3] < 0.9).any(axis=-1).mean() > 0.01  # something is drawn
        edges = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (edges == 1).all()  # and nothing is cut off
    assert told[0][1] == 0
    assert told[-1][1] == told[-1][2]
    assert [news[1] for news in told] == sorted(news[1] for news in told)
    shown = set(perceptron.COLUMNS)
    assert all(shown <= set(row) for row in rows if row["study"] != "finding")


def test_rows_cover_every_combination(outcome):
    rows = outcome[0]
    keys = [
        tuple(row[k] for k in ("study", "teacher", "n_1", "window", "stride", "by", "data", "fit"))
        for row in rows
        if row["study"] != "finding"
    ]
    assert len(set(keys)) == len(keys) == 2 * (7 * 3 - 3 + 4) + 2 * 4 * (3 * 3 - 1 + 4)


def test_the_same_seed_gives_the_same_training_and_another_does_not(simulated):
    assert torch.equal(online.simulate(RUN).window, simulated.window)
    assert not torch.isclose(online.simulate(replace(RUN, seed=1)).window, simulated.window).any()


def test_samplings_are_fixed_scaled_and_scaled_with_a_stride():
    assert [perceptron.samplings(perceptron.Settings(), size) for size in (10, 30, 300)] == [
        [(1, 1)],
        [(1, 1), (1, 3), (3, 1)],
        [(1, 1), (30, 1)],
    ]
    run = perceptron.Settings().run("even", 30, 2, longer=3)
    assert (run.window, run.strides, run.block, run.dropped, run.ahead) == (300, 1800, 30, 90, 1500)


def test_horizons_of_the_figures_end_with_training():
    for settings in (SMALL, perceptron.QUICK, perceptron.Settings(window=595, dropped=5)):
        run = settings.run("even", 10, 2)
        ahead = figure_s4.horizons(run)
        assert ahead == sorted(set(ahead))
        assert ahead[0] >= 1
        assert ahead[-1] == run.ahead


BAD = {
    "one simulation": ({"seeds": 1}, "--seeds is 1, expected at least 2"),
    "negative seed": ({"seed": -1}, "--seed is -1, expected 0 or more"),
    "huge seed": ({"seed": 2**64}, "--seed is .*, and below 2\\^64"),
    "one at each size": ({"size_seeds": 1}, "size_seeds is 1, expected at least 2"),
    "no output": ({"outputs": 0}, "outputs is 0, expected at least 1"),
    "no size": ({"sizes": ()}, "sizes is \\(\\), expected at least one"),
    "tiny": ({"sizes": (1, 2)}, "the first 2 or more"),
    "no multiple": ({"sizes": (6, 15)}, "all multiples of it"),
    "falling": ({"sizes": (6, 18, 12)}, "expected rising numbers"),
    "window to the end": ({"window": 90}, "window and steps are 90 and 90"),
    "short window": ({"window": 9}, "window and steps are 9 and 90, expected a window of at least 10"),
    "no smoothing": ({"smoothing": 0}, "smoothing is 0, expected 1 to 40"),
    "long smoothing": ({"smoothing": 41}, "smoothing is 41"),
    "no block": ({"block": 0}, "block and dropped are 0 and 10"),
    "one block": ({"block": 30}, "expected at least two blocks"),
    "broken block": ({"block": 7}, "and whole ones"),
    "negative dropped": ({"dropped": -10}, "block and dropped are 5 and -10"),
    "no rate": ({"rate": 0.0}, "rate is 0.0, expected above 0 and below 1.5"),
    "diverging": ({"rate": 1.5}, "rate is 1.5"),
    "rate NaN": ({"rate": math.nan}, "rate is nan"),
    "zero start": ({"start": 0.0}, "start is 0.0, expected a positive"),
    "infinite start": ({"start": math.inf}, "start is inf"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_settings_are_refused_before_anything_is_written(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        perceptron.reproduce(replace(SMALL, **change), tmp_path / "new", lambda *_: None)
    assert not list(tmp_path.iterdir())
