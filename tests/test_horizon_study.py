"""The study of plans along a run, small: what stands in its rows follows from the recordings."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import koopt
from koopt.experiments import horizon_study, methods, noisy_windows, oscillator, recording

SOLVER = methods.Settings(
    optimizers=("adagrad",), seeds=2, steps=3_200, t1=1_000, t2=2_400, horizons=(400,), tail=800, stride=100, rank=2
)
SMALL = horizon_study.Settings(solver=SOLVER, every=800, window=2_000, networks=1)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    told = []
    noisy = {"white noise": [torch.randn(30, 50, generator=torch.Generator().manual_seed(0))]}
    rows = horizon_study.reproduce(SMALL, folder, lambda *news: told.append(news), noisy=noisy)
    recorded = recording.opened(SOLVER.run("adagrad"), folder / "recordings")
    return folder, rows, recorded, told


def rows_of(rows, **wanted):
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def test_what_is_written(done):
    folder, rows, _, told = done
    result = json.loads((folder / "result.json").read_text())
    assert result["experiment"] == "horizon"
    assert result["rows"] == json.loads(json.dumps(rows))
    assert result["findings"] == horizon_study.findings(rows)
    assert {kind for row in rows for kind in [row["kind"]]} == set(horizon_study.TABLES)
    for name in result["figures"]:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    for stage in {stage for stage, *_ in told}:
        seen = [(part, total) for name, part, total in told if name == stage]
        assert seen == sorted(seen)
        assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("kind", horizon_study.TABLES)
def test_every_column_has_a_row_that_fills_it(done, kind):
    listed = rows_of(done[1], kind=kind)
    empty = [key for key in horizon_study.TABLES[kind] if all(row.get(key) is None for row in listed)]
    teq = ["teq_over_T", "teq_over_T_mean", "teq_over_T_error"]
    assert empty == {"jump": ["within"], "sweep": teq, "noise": []}[kind]


def test_the_line_at_t2_is_that_of_the_trail(done):
    _, rows, recorded, _ = done
    (row,) = rows_of(rows, kind="jump", what="straight line")
    trail = torch.from_numpy(np.array(recorded.trail))
    ahead = trail[24] + 4 * (trail[24] - trail[23])
    after = torch.from_numpy(np.array(recorded.loss[2_400:]))
    loss = oscillator.batched_loss(ahead, oscillator.time_points())
    steps = [next((i for i, value in enumerate(after[:, s]) if value <= loss[s]), 800) for s in range(2)]
    assert row["teq_over_T_mean"] == pytest.approx(sum(steps) / 2 / 400)
    assert row["teq_over_T_error"] == pytest.approx(abs(steps[0] - steps[1]) / 2 / 400)
    assert row["success"] == sum(bool(loss[s] < after[0, s]) for s in range(2)) / 2


def test_a_case_plans_from_what_came_before_alone(done):
    _, _, recorded, _ = done
    case = horizon_study.case(SMALL, recorded, 1, 1_600)
    before = torch.from_numpy(np.array(recorded.trail[:17, 1]))
    plan = koopt.plan(before)
    assert case.plan == plan
    assert case.wanted == koopt.plan(before, 4)
    steps = int(plan.horizon)
    assert steps > 0
    truth = torch.from_numpy(np.array(recorded.trail[16 + steps, 1]))
    missed = (plan.forecast(before) - truth).norm() / (truth - before[-1]).norm()
    assert case.error == pytest.approx(missed.item())
    assert case.achieved >= (100 if case.error <= 0.1 else 0)


def test_a_window_is_no_longer_than_asked(done):
    case = horizon_study.case(replace(SMALL, window=1_600), done[2], 0, 2_400)
    assert case.plan.stop == 16


def test_stages_cover_every_case_once(done):
    listed = rows_of(done[1], kind="sweep", what=horizon_study.FIXED)
    assert sum(row["cases"] for row in listed) == len(SMALL.sweep) * 2
    parts = [row["cases"] for row in done[1] if row["kind"] == "sweep" and row["what"].startswith("fixed rule, T")]
    assert sum(parts) == len(SMALL.sweep) * 2


def test_noise_is_called_noise_and_full_batches_are_not(done):
    noise = {row["what"]: row for row in rows_of(done[1], kind="noise")}
    assert noise["white noise"]["reason"] == "noise 1"
    for what, row in noise.items():
        refused = not what.startswith("all data")
        assert row["refused"] == refused, what
        assert (row["drift_over_noise"] < 3) == refused, what


def test_findings_without_a_case_do_not_stop_it(done):
    rows = [row | ({"jumps": 0, "success": None} if row["kind"] == "sweep" else {}) for row in done[1]]
    said = horizon_study.findings(rows)
    assert any("0 " in line and "all along" in line for line in said)


BAD = {
    "every": (replace(SMALL, every=150), "every is 150"),
    "window": (replace(SMALL, window=0), "window is 0"),
    "short window": (replace(SMALL, window=800), "at least twice"),
    "networks": (replace(SMALL, networks=0), "networks is 0"),
    "no room": (replace(SMALL, every=3_000), "steps is 3200"),
    "solver": (replace(SMALL, solver=replace(SOLVER, seeds=0)), "--seeds is 0"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_settings_are_refused(case, tmp_path):
    settings, message = case
    with pytest.raises(ValueError, match=message):
        horizon_study.reproduce(settings, tmp_path / "new", lambda *_: None)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("settings", [horizon_study.Settings(), horizon_study.QUICK])
def test_what_is_offered_can_be_run(settings):
    horizon_study.check(settings)
    assert settings.sweep[-1] + settings.nominal <= settings.solver.steps


def test_one_network_has_no_standard_error():
    rows = [{"kind": "noise", "what": "w", "reason": "noise 1", "networks": 1, "drift_over_noise": math.inf}]
    assert horizon_study.findings(rows) == ["w: noise 1 of 1, drift over noise inf"]
    assert noisy_windows.noise_row("w", [torch.rand(9, 3)])["networks"] == 1
