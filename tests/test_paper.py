"""The DE-solver experiment in small: its results, what it writes, and its forecasts against the public interface."""

import json
import math
import os
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
import torch
from rich.console import Console
from torch.testing import assert_close

import koopt
from koopt import report
from koopt.experiments import de_solver, figure2, methods, oscillator, recording, timing

SMALL = methods.Settings(
    optimizers=("adagrad",),
    seeds=3,
    steps=3500,
    t1=1500,
    t2=2500,
    horizons=(400, 1000),
    tail=500,
    stride=50,
    repeats=2,
)
KEYS = {
    *("optimizer", "method", "by", "setting", "rank", "rtol", "stride", "horizon", "seeds", "success", "teq_over_T"),
    *("teq_over_T_mean", "censored", "error_over_motion", "speedup", "speedup_with_recording"),
}
TIMINGS = {"step_ms", "jump_ms", "recording_ms", "speedup", "speedup_with_recording"}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    rows = de_solver.reproduce(SMALL, folder, lambda *_: None)
    assert rows is not None
    return rows, folder


def select(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def only(rows, **wanted):
    (row,) = select(rows, **wanted)
    return row


def opened(folder, optimizer):
    return recording.opened(SMALL.run(optimizer), folder / "recordings")


def strict(path):
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# results


@pytest.mark.parametrize("T", SMALL.horizons)
@pytest.mark.parametrize("optimizer", SMALL.optimizers)
def test_recommended_setting_is_far_closer_than_a_straight_line(outcome, optimizer, T):
    rows = select(outcome[0], optimizer=optimizer, T=T)
    best, line = only(rows, setting="recommended"), only(rows, setting="baseline")
    assert (best["success"], line["success"]) == (1.0, 1.0)
    assert best["error_over_motion"] < line["error_over_motion"] / 10
    assert best["teq_over_T"] == pytest.approx(1, abs=0.03)
    assert best["speedup"] > best["speedup_with_recording"] > 1


def test_paper_setting_follows_adagrad_closely(outcome):
    for by in ("node", "layer", "network"):
        row = only(outcome[0], optimizer="adagrad", T=400, setting="paper", by=by)
        assert row["success"] == 1
        assert row["teq_over_T"] == pytest.approx(1, abs=0.01)
        assert row["error_over_motion"] < 1e-4


@pytest.mark.parametrize("T", SMALL.horizons)
@pytest.mark.parametrize("optimizer", SMALL.optimizers)
def test_a_row_from_first_principles(outcome, optimizer, T):
    """The straight line, seed by seed, without koopt."""
    rows, folder = outcome
    recorded, t2 = opened(folder, optimizer), SMALL.t2
    won, shares, censored, errors = [], [], [], []
    for seed in range(SMALL.seeds):
        now, before = recorded.window[-1, seed], recorded.window[-101, seed]
        weights = now + T / 100 * (now - before)
        network = oscillator.Oscillator()
        torch.nn.utils.vector_to_parameters(torch.from_numpy(weights), network.parameters())
        loss = oscillator.loss_by_autograd(network, oscillator.time_points()).item()
        after = recorded.loss[t2:, seed]
        reached = [step for step, value in enumerate(after) if value <= loss]
        won.append(loss < after[0])
        censored.append(won[-1] and not reached)
        shares.append((reached[0] if reached else len(after) - 1) / T if won[-1] else 0)
        truth = recorded.trail[(t2 + T) // 100, seed]
        errors += list(np.abs(weights - truth) / np.abs(truth - now))
    row = only(rows, optimizer=optimizer, T=T, setting="baseline")
    assert row["success"] == np.mean(won)
    assert row["censored"] == pytest.approx(np.mean(censored))
    assert row["teq_over_T"] == pytest.approx(np.median(shares), abs=2 / T)
    assert row["teq_over_T_mean"] == pytest.approx(np.mean(shares), abs=2 / T)
    assert row["error_over_motion"] == pytest.approx(np.median(errors), rel=1e-6)
    assert row["speedup"] == pytest.approx(row["teq_over_T"] * T * row["step_ms"] / row["jump_ms"])
    cost = row["jump_ms"] + row["recording_ms"]
    assert row["speedup_with_recording"] == pytest.approx(row["teq_over_T"] * T * row["step_ms"] / cost)


@pytest.mark.parametrize("method", methods.methods(SMALL), ids=lambda method: f"{method.setting} {method.by}")
def test_forecasts_are_those_of_a_trajectory(outcome, method):
    recorded, seed = opened(outcome[1], "adagrad"), 1
    found = methods.forecast(recorded, method, SMALL.horizons)
    network = oscillator.Oscillator()
    trajectory = koopt.Trajectory(network, window=method.tail // method.stride + 1, stride=method.stride)
    for weights in recorded.window[-1 - method.tail :, seed]:
        torch.nn.utils.vector_to_parameters(torch.from_numpy(np.array(weights)), network.parameters())
        trajectory.record()
    start = torch.from_numpy(np.array(recorded.window[-1, seed]))
    for horizon in SMALL.horizons:
        public = trajectory.forecast(horizon, method.method, method.by, **method.options)
        expected = torch.cat([public[name].reshape(-1) for name, _ in network.named_parameters()])
        motion = (expected - start).abs().max().item()
        assert_close(found.weights[horizon][seed], expected, rtol=0, atol=1e-9 * motion)


# what it writes


def test_rows_are_complete(outcome):
    rows, _ = outcome
    assert len(rows) == len(SMALL.optimizers) * len(SMALL.horizons) * 6
    for row in rows:
        assert row.keys() >= KEYS
        assert row["seeds"] == SMALL.seeds
        assert row["horizon"] * row["stride"] == row["T"]
        assert 0 <= row["censored"] <= row["success"] <= 1
        assert (row["rtol"] is None) == (row["setting"] != "paper")
        assert (row["rank"] is None) == (row["setting"] != "recommended")
        assert (row["residual"] is None) == (row["setting"] == "baseline")
    assert {row["setting"] for row in rows} == {"paper", "recommended", "baseline"}
    assert {row["by"] for row in rows} == {"weight", "node", "layer", "network"}


def test_the_papers_own_figures_stand_beside_the_node_operators(outcome):
    rows, _ = outcome
    compared = [row for row in rows if "paper_success" in row]
    assert [(row["optimizer"], row["by"], row["T"]) for row in compared] == [("adagrad", "node", 400)]
    assert (compared[0]["paper_success"], compared[0]["paper_speedup"]) == (0.92, 132.0)
    assert compared[0]["paper_success_low"] <= 0.92 <= compared[0]["paper_success_high"]
    (line,) = report.paper_row(select(rows, T=400))
    assert (line["setting"], line["by"], line["success"], line["teq_over_T"]) == ("the paper", "node", 0.92, 1.0)
    assert report.paper_row(select(rows, T=1000)) == []


def test_result_json_holds_the_rows(outcome):
    rows, folder = outcome
    result = strict(folder / "result.json")
    assert list(result) == ["experiment", "settings", "machine", "rows", "figures", "seconds"]
    assert result["experiment"] == "de-solver"
    assert (
        methods.Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in result["settings"].items()}) == SMALL
    )
    assert result["machine"]["torch"] == torch.__version__
    assert result["rows"] == rows
    assert result["figures"] == ["figure2-adagrad.png", "error-ahead.png"]
    left = {path.name for path in folder.iterdir()}
    assert left == {"result.json", "recordings", *result["figures"]}


def test_figures_are_pictures(outcome):
    for name in strict(outcome[1] / "result.json")["figures"]:
        picture = matplotlib.image.imread(outcome[1] / name)
        height, width, _ = picture.shape
        assert 600 <= width <= 2000
        assert 300 <= height <= 1500
        assert (picture[..., :3] < 0.9).any(axis=-1).mean() > 0.01  # something is drawn
        edges = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (edges == 1).all()  # and nothing is cut off


def test_running_again_gives_the_same_rows_and_trains_nothing(outcome):
    rows, folder = outcome
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("recordings/*/*")}
    told = []
    again = de_solver.reproduce(SMALL, folder, lambda *news: told.append(news))
    assert [{k: v for k, v in row.items() if k not in TIMINGS} for row in again] == [
        {k: v for k, v in row.items() if k not in TIMINGS} for row in rows
    ]
    assert {path: path.stat().st_mtime_ns for path in folder.glob("recordings/*/*")} == kept
    assert told[0] == ("adagrad", 3500, 3500)
    assert told[-1] == ("forecast and time", 7, 7)
    assert strict(folder / "result.json")["rows"] == again


def test_figures_are_drawn_for_one_seed_and_forecasts_that_broke_down(outcome, tmp_path):
    whole = opened(outcome[1], "adagrad")
    one = recording.Recording(replace(whole.run, seeds=1), whole.loss[:, :1], whole.window[:, :1], whole.trail[:, :1])
    settings = replace(SMALL, seeds=1)
    horizons = sorted({*methods.path(settings), *settings.horizons})
    found = {method: methods.forecast(one, method, horizons) for method in methods.drawn(methods.methods(settings))}
    broken = next(method for method in found if method.by == "node")
    for weights in found[broken].weights.values():
        weights[:] = math.nan
    assert figure2.draw(settings, one, found, tmp_path) == "figure2-adagrad.png"
    growth = dict.fromkeys(("adagrad", "adam"), methods.errors_ahead(settings, one, found))
    assert figure2.draw_growth(settings, growth, tmp_path) == "error-ahead.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["error-ahead.png", "figure2-adagrad.png"]


# settings


def test_forecast_horizons_of_the_figures_are_kept_steps():
    for settings in (SMALL, methods.QUICK, methods.Settings(), replace(SMALL, horizons=(100,))):
        steps = methods.path(settings)
        assert steps == sorted(set(steps))
        assert all(step % recording.TRAIL == 0 and 0 < step <= settings.steps - settings.t2 for step in steps)
        de_solver.check(settings)


BAD = {
    "unknown optimizer": (
        {"optimizers": ("adam", "sgd")},
        "--optimizer is 'sgd', expected adam, adagrad, adadelta or all",
    ),
    "no seeds": ({"seeds": 0}, "--seeds is 0, expected at least 1"),
    "negative seeds": ({"seeds": -3}, "--seeds is -3"),
    "negative seed": ({"seed": -1}, "--seed is -1, expected 0 or more"),
    "huge seed": ({"seed": 2**64 - 2}, "expected 0 or more, and the last of 3 seeds below 2\\^64"),
    "past the data": ({"horizons": (1100,)}, "--horizon is 1100, expected a multiple of 100 up to 1000"),
    "between kept steps": ({"horizons": (400, 150)}, "--horizon is 150"),
    "no horizon": ({"horizons": (0,)}, "--horizon is 0"),
    "negative horizon": ({"horizons": (-100,)}, "--horizon is -100"),
    "horizon twice": ({"horizons": (400, 1000, 400)}, "--horizon is given as 400 twice"),
    "window between kept steps": ({"t2": 2450}, "t1 and t2 are 1500 and 2450, expected multiples of 100"),
    "no window": ({"t1": 2500}, "t1 and t2 are 2500 and 2500"),
    "tail longer than the window": ({"tail": 2000}, "tail and stride are 2000 and 50, .* within the window of 1000"),
    "tail not of whole strides": ({"stride": 75}, "tail and stride are 500 and 75, expected a tail of whole strides"),
    "tail of one stride": ({"stride": 500}, "tail and stride are 500 and 500"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_settings_are_refused_before_anything_is_written(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        de_solver.reproduce(replace(SMALL, **change), tmp_path / "new", lambda *_: None)
    assert not list(tmp_path.iterdir())


def test_the_largest_seed_trains():
    de_solver.check(replace(SMALL, seed=2**64 - 3))
    assert oscillator.initial_weights(2**64 - 1).isfinite().all()


# costs


@pytest.mark.parametrize("growth", [1.0, 3.0], ids=["still", "not finite when forecast"])
def test_every_jump_can_be_timed(growth):
    start = oscillator.initial_weights(0) * 1e-200
    window = start * growth ** torch.arange(401, dtype=torch.float64).unsqueeze(1)
    for method in methods.methods(replace(SMALL, t1=0, t2=400, tail=400)):
        arguments = (window[-1 - method.tail :], method.tail // method.stride + 1, method.stride, 1500, 1)
        asked = {"method": method.method, "by": method.by, **method.options}
        jump, recorded = timing.jump_seconds(timing.network_at(start), *arguments, **asked)
        assert 0 < jump < 5
        assert 0 < recorded < 5


def test_step_seconds_is_a_time():
    assert 1e-5 < timing.step_seconds("adam", oscillator.initial_weights(0), steps=8) < 0.5


# result.json and tables


def test_numbers_that_json_lacks_become_null(tmp_path):
    rows = [{"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5, "e": None, "f": "x", "g": 3}]
    path = report.write_result(tmp_path, "name", {"one": 1}, rows, ["x.png"])
    result = strict(path)
    assert result["rows"] == [{"a": None, "b": None, "c": None, "d": 1.5, "e": None, "f": "x", "g": 3}]
    assert (result["experiment"], result["settings"], result["figures"]) == ("name", {"one": 1}, ["x.png"])


def test_a_result_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    report.write_result(tmp_path, "first", {}, [], [])
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write_result(tmp_path, "second", {"bad": math.nan}, [], [])

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        report.write_result(tmp_path, "third", {}, [], [])
    assert (tmp_path / "result.json").read_bytes() == before


SHOWN = {
    0.0: "0.000",
    0.84: "0.840",
    12.34: "12.3",
    1234.5: "1,234",
    4.4e-5: "4e-05",
    2.5e6: "2e+06",
    math.inf: "inf",
    None: "-",
    25: "25",
    "node": "node",
}


@pytest.mark.parametrize(("value", "text"), SHOWN.items(), ids=str)
def test_table_cells(value, text, capsys):
    report.print_table(Console(width=80), "title", {"a": "heading", "b": "missing"}, [{"a": value}])
    printed = capsys.readouterr().out
    assert "title" in printed
    assert printed.split()[-2:] == [text, "-"]
