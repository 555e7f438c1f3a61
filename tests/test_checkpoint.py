"""Forecasts from checkpoints on disk: equal to those in memory, whatever the format, the grouping and the spacing."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import koopt
from koopt import checkpoint, forecasters
from koopt.checkpoint import factors, groups, rules, steps, streaming
from koopt.checkpoint.opening import open_checkpoint
from koopt.checkpoint.spectrum import by_group, half_life, spectrum_of

DECAYS = torch.tensor([1.0, 0.9, 0.7], dtype=torch.float64)  # of the law x_t = c + 0.9^t a + 0.7^t b
SHAPES = {"first.weight": (6, 5), "first.bias": (6,), "second.weight": (3, 6), "second.bias": (3,), "scale": ()}


def law(time, dtype=torch.float32, seed=0):
    """Weights at a time, under a linear law that all of them share."""
    generator = torch.Generator().manual_seed(seed)
    modes = {name: torch.randn(3, *shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    return {name: torch.tensordot(DECAYS**time, mode, 1).to(dtype) for name, mode in modes.items()}


def flat(weights):
    return torch.cat([weights[name].reshape(-1).double() for name in SHAPES])


def save(folder, states, kind="safetensors", step=100):
    """One checkpoint for each state; their paths."""
    paths = []
    for i, state in enumerate(states):
        paths.append(folder / f"step_{step * (i + 1)}.{kind}")
        (save_file if kind == "safetensors" else torch.save)(state, paths[-1])
    return paths


def load(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def miss(found, expected, start):
    """|error| / |motion|."""
    return ((flat(found) - flat(expected)).norm() / (flat(expected) - flat(start)).norm()).item()


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"difference": True}, {"center": True}, {"projected": True, "rank": 2}], ids=str
)
def test_equal_to_a_fit_in_memory(kind, dtype, options, tmp_path):
    states = [law(t, dtype) for t in range(8)]
    found = koopt.forecast_checkpoints(
        save(tmp_path, states, kind), ahead=500, output=tmp_path / f"out.{kind}", **options
    )
    window = torch.stack([torch.cat([state[name].reshape(-1) for name in SHAPES]) for state in states])
    expected = koopt.fit(window, **options).forecast(5).double()
    motion = (flat(law(12, torch.float64)) - flat(law(7, torch.float64))).norm()
    written = load(found.output)
    assert (flat(written) - expected).norm() <= 1e-6 * motion
    assert {name: (t.dtype, t.shape) for name, t in written.items()} == {
        n: (t.dtype, t.shape) for n, t in states[0].items()
    }
    if "rank" not in options:
        assert miss(written, law(12, dtype), states[-1]) < (1e-5 if dtype == torch.float32 else 1e-10)
    assert found.step == 1300


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"rank": 2}, "take --center, --difference or, where a mode grows, --max-modulus 1, or a number of steps"),
        ({"rank": 1}, "take --center"),
        ({"max_modulus": 0.9}, "take --center"),
        ({"by": "layer", "rank": 2}, "take --center"),
        ({"method": "ensemble"}, "take koopman with --center or --difference, or a number of steps"),
    ],
    ids=str,
)
def test_a_limit_of_zeros_is_refused(options, remedy, tmp_path):
    paths = save(tmp_path, [law(t) for t in range(8)])
    with pytest.raises(ValueError, match=f"ahead is inf, but an operator without eigenvalue 1 .*{remedy}"):
        koopt.forecast_checkpoints(paths, math.inf, tmp_path / "out.safetensors", **options)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "options", [{"rank": 3}, {"max_modulus": 1.0}, {"center": True}, {"difference": True, "max_modulus": 0.99}], ids=str
)
def test_the_limit_of_a_law(options, tmp_path):
    """The part of the law that stays."""
    states = [law(t) for t in range(8)]
    found = koopt.forecast_checkpoints(save(tmp_path, states), math.inf, tmp_path / "out.safetensors", **options)
    assert miss(load_file(found.output), law(10_000), states[-1]) < 1e-4


@pytest.mark.parametrize("kind", ["state", "difference", "center"])
def test_noise_gets_a_modest_rank_and_a_law_all_of_its_own(kind, tmp_path):
    """As many visible directions as pairs of checkpoints say nothing; fewer are a law."""
    options = {} if kind == "state" else {kind: True}
    generator = torch.Generator().manual_seed(0)
    for name in ("law", "noise"):
        (tmp_path / name).mkdir()
    states = [law(t, torch.float64) for t in range(8)]
    noisy = [{n: w + 0.01 * torch.randn(w.shape, generator=generator) for n, w in state.items()} for state in states]
    found = koopt.forecast_checkpoints(save(tmp_path / "law", states), 100, **options)
    assert found.rows[0]["rank"] == (3 if kind == "state" else 2)
    paths = save(tmp_path / "noise", noisy)
    found = koopt.forecast_checkpoints(paths, 100, **options)
    assert found.rows[0]["rank"] == rules.MODEST
    most = 7 - bool(options)
    assert koopt.forecast_checkpoints(paths, 100, rank=100, **options).rows[0]["rank"] == most
    assert spectrum_of(paths, by="network", **options)[1][0]["rank"] == rules.MODEST
    output = [tmp_path / f"{i}.safetensors" for i in range(2)]
    koopt.forecast_checkpoints(paths, 100, output[0], **options)
    koopt.forecast_checkpoints(paths, 100, output[1], rank=rules.MODEST, **options)
    assert output[0].read_bytes() == output[1].read_bytes()


@pytest.mark.parametrize("by", ["network", "layer", "node"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_equal_a_trajectory_of_the_same_partition(by, dtype, tmp_path):
    model = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 11), nn.LayerNorm(11)).to(dtype)
    traj = koopt.Trajectory(model)
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]
    drift = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]
    states = []
    for t in range(6):
        with torch.no_grad():
            for p, a, b in zip(model.parameters(), start, drift, strict=True):
                p.copy_(a + 0.8**t * b)
        traj.record()
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    found = koopt.forecast_checkpoints(save(tmp_path, states), 300, tmp_path / "out.safetensors", by=by)
    written = load_file(found.output)
    expected = traj.forecast(3, by=by)
    moved = sum((expected[n] - states[-1][n]).norm() ** 2 for n in expected) ** 0.5
    assert sum((expected[n] - written[n]).norm() ** 2 for n in expected) ** 0.5 <= 1e-6 * moved
    assert sum(row["patches"] for row in found.rows) == {"network": 1, "layer": 3, "node": 34}[by]


@pytest.mark.parametrize("method", ["last", "mean", "line", "regression", "ema", "dema", "anderson", "ensemble"])
def test_every_method_is_its_rule_in_memory(method, tmp_path):
    states = [law(t, torch.float64) for t in range(6)]
    output = tmp_path / "out.safetensors"
    koopt.forecast_checkpoints(save(tmp_path, states), 200, output, method=method)
    window = torch.stack([flat(state) for state in states])
    expected = forecasters.METHODS[method](window, 2) @ window
    torch.testing.assert_close(flat(load_file(output)), expected, rtol=1e-9, atol=1e-9)


def test_blocks_and_slabs_do_not_change_the_forecast(tmp_path, monkeypatch):
    paths = save(tmp_path, [law(t) for t in range(5)])
    found = []
    for by in groups.BY:
        koopt.forecast_checkpoints(paths, 100, tmp_path / "one.safetensors", by=by, rank=3, overwrite=True)
        with monkeypatch.context() as patched:
            patched.setattr(streaming, "LARGEST", 16)  # four numbers
            patched.setattr(groups, "SLAB", 50)  # two patches
            koopt.forecast_checkpoints(paths, 100, tmp_path / "two.safetensors", by=by, rank=3, overwrite=True)
        one, two = (flat(load_file(tmp_path / f"{name}.safetensors")) for name in ("one", "two"))
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
        found.append(one)
    assert not torch.equal(found[0], found[1])


def folder_of(path, state, shards=2):
    """A folder like those of Hugging Face."""
    path.mkdir()
    placed = {name: f"model-0000{i % shards + 1}-of-0000{shards}.safetensors" for i, name in enumerate(state)}
    for file in set(placed.values()):
        save_file({n: t for n, t in state.items() if placed[n] == file}, path / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": placed}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text("{}")
    (path / "tokenizer.model").write_bytes(b"tokens")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": int(path.name.rpartition("-")[2])}))
    (path / "optimizer.pt").write_bytes(b"large")
    return path


def test_a_folder_of_shards(tmp_path):
    states = [law(t) for t in range(5)]
    paths = [folder_of(tmp_path / f"checkpoint-{10 * t}", state) for t, state in enumerate(states)]
    found = koopt.forecast_checkpoints(paths, 20, tmp_path / "future")
    assert found.plan.times == (0, 10, 20, 30, 40)
    assert sorted(path.name for path in found.output.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
    ]
    placed = json.loads((found.output / "model.safetensors.index.json").read_text())["weight_map"]
    written = {name: load_file(found.output / file)[name] for name, file in placed.items()}
    assert miss(written, law(6), states[-1]) < 1e-5
    with safe_open(found.output / "model-00001-of-00002.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "koopt_step": "60"}
    again = koopt.forecast_checkpoints([*paths, found.output], 10, method="line", steps=[0, 10, 20, 30, 40, 60])
    assert again.step == 70


def test_a_folder_with_one_file(tmp_path):
    for t in range(3):
        (tmp_path / f"epoch-{t}").mkdir()
        save_file(law(t), tmp_path / f"epoch-{t}" / "model.safetensors")
    paths = sorted(tmp_path.iterdir())
    found = koopt.forecast_checkpoints(paths, 1, tmp_path / "future", method="line")
    torch.testing.assert_close(
        load_file(found.output / "model.safetensors")["scale"], 2 * law(2)["scale"] - law(1)["scale"]
    )


def test_what_is_not_a_weight_is_copied_from_the_last(tmp_path):
    states = [
        law(t)
        | {
            "norm.running_var": torch.full((4,), float(t)),
            "norm.num_batches_tracked": torch.tensor(t),
            "mask": torch.tensor([0.0, -math.inf]),
            "frozen.weight": torch.ones(3),
            "empty": torch.zeros(0),
            "head.weight": torch.full((2,), float(t)),
            "quantized": torch.tensor([t], dtype=torch.int8),
        }
        for t in range(5)
    ]
    found = koopt.forecast_checkpoints(save(tmp_path, states), 100, tmp_path / "out.safetensors", exclude=["head.*"])
    written = load_file(found.output)
    assert written.keys() == states[-1].keys()
    for name in states[-1].keys() - SHAPES.keys():
        assert torch.equal(written[name], states[-1][name]), name
    assert miss(written, law(5), states[-1]) < 1e-5
    assert found.rows[0]["still"] == 2
    assert set(found.plan.copied) == {
        "norm.running_var", "norm.num_batches_tracked", "empty", "head.weight", "quantized"
    }  # fmt: skip


def test_include_forecasts_only_what_matches(tmp_path):
    states = [law(t) for t in range(5)]
    found = koopt.forecast_checkpoints(
        save(tmp_path, states), 100, tmp_path / "out.safetensors", include=["first.*"], exclude=["*.bias"]
    )
    written = load_file(found.output)
    changed = {name for name in SHAPES if not torch.equal(written[name], states[-1][name])}
    assert changed == {"first.weight"}


def test_a_pt_file_keeps_everything_else(tmp_path):
    """Tied and channels-last weights, the optimizer's state and other values stay what they are."""
    conv = [torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    states = []
    for t in range(4):
        weights = {name: tensor.clone() for name, tensor in law(t).items()}
        weights["tied"] = weights["first.weight"]
        weights["conv"] = (conv[0] + 0.9**t * conv[1]).to(memory_format=torch.channels_last)
        states.append({"model": weights, "optimizer": {"m": torch.full((5,), float(t))}, "epoch": t, "name": "x"})
    paths = save(tmp_path, states, "pt")
    found = koopt.forecast_checkpoints(paths, 200, tmp_path / "out.pt", rank=3)
    written = torch.load(found.output, weights_only=True)
    assert (written["epoch"], written["name"], written["optimizer"]["m"].tolist()) == (3, "x", [3.0] * 5)
    assert written["model"]["tied"].data_ptr() == written["model"]["first.weight"].data_ptr()
    assert written["model"]["conv"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(written["model"]["conv"], conv[0] + 0.9**5 * conv[1], rtol=1e-4, atol=1e-5)
    assert miss(written["model"], law(5), law(3)) < 1e-4
    import zipfile

    with zipfile.ZipFile(found.output) as archive:
        assert archive.testzip() is None  # checksums are those of the new bytes


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_a_tensor_beside_the_model_is_not_the_model(key, tmp_path):
    states = [{"loss": torch.tensor(0.5**t), key: law(t), "ema.weight": torch.ones(2) * t} for t in range(5)]
    found = koopt.forecast_checkpoints(save(tmp_path, states, "pt"), 100, tmp_path / "out.pt")
    written = torch.load(found.output, weights_only=True)
    assert miss(written[key], law(5), law(4)) < 1e-4
    assert (written["loss"], written["ema.weight"].tolist()) == (0.5**4, [4.0, 4.0])


def test_metadata_stay_and_the_step_moves_on(tmp_path):
    paths = []
    for t in range(3):
        paths.append(tmp_path / f"{'abc'[t]}.safetensors")
        save_file(law(t), paths[-1], metadata={"step": str(10 * t), "note": "é\n"})
    found = koopt.forecast_checkpoints(paths[::-1], 20, tmp_path / "out.safetensors", method="regression")
    assert found.plan.times == (0, 10, 20)
    with safe_open(found.output, "pt") as file:
        assert file.metadata() == {"step": "40", "note": "é\n", "koopt_step": "40"}


NAMES = {
    "steps": (["step_100.pt", "step_20.pt"], [100, 20]),
    "among other numbers": (["gpt2/v1/step100.pt", "gpt2/v1/step20.pt"], [100, 20]),
    "only one differs": (["run7/a3/model.pt", "run7/a12/model.pt"], [3, 12]),
    "two differ": (["2024-01/step_5.pt", "2024-02/step_7.pt"], [5, 7]),
    "epochs": (["a_epoch=3.ckpt", "epoch=4_b.ckpt"], [3, 4]),
    "folders": (["out/checkpoint-500", "out/checkpoint-1000"], [500, 1000]),
    "steps and epochs": (["step_390_epoch_1.pt", "step_780_epoch_2.pt"], [390, 780]),
    "epochs and steps": (["epoch=1-step=390.ckpt", "epoch=2-step=780.ckpt"], [390, 780]),
    "steps that do not differ": (["epoch=1-step=390.ckpt", "epoch=2-step=390.ckpt"], [1, 2]),
    "the last of them": (["checkpoint_1/iter_20.pt", "checkpoint_1/iteration-30.pt"], [20, 30]),
    "one step of two runs": (["seed_1/step_100.pt", "seed_2/step_100.pt"], [100, 100]),
    "a word on the way": (["timesteps1000/model-10.pt", "timesteps1000/model-20.pt"], [10, 20]),
    "a word of the disk": (["ckpt2/a_10.pt", "ckpt2/a_30.pt"], [10, 30]),
    "epochs in all": (["run_epochs100/w_10.pt", "run_epochs100/w_20.pt"], [10, 20]),
    "steps of folders": (["step_10/loss_1_2.pt", "step_30/loss_0_9.pt"], [10, 30]),
}


@pytest.mark.parametrize("case", NAMES.values(), ids=NAMES)
def test_steps_from_names(case):
    names, expected = case
    assert steps._from_names(names) == expected


@pytest.mark.parametrize("names", [["a.pt", "b.pt"], ["a.pt", "step_5.pt"], ["1_2.pt", "3_4.pt"]])
def test_names_that_do_not_tell(names):
    assert steps._from_names(names) is None


def test_the_same_step_of_two_runs_is_refused(tmp_path):
    paths = []
    for seed in (1, 2):
        (tmp_path / f"seed_{seed}").mkdir()
        paths += save(tmp_path / f"seed_{seed}", [law(0, seed=seed)])
    with pytest.raises(ValueError, match=r"seed_2/step_100.safetensors: step 100 is that of .*seed_1/step_100"):
        koopt.forecast_checkpoints(paths, 100, method="mean")


def test_the_checkpoint_without_a_step_is_named(tmp_path):
    paths = save(tmp_path, [law(t) for t in range(4)])
    paths[2] = paths[2].rename(tmp_path / "best.safetensors")
    with pytest.raises(ValueError, match=r"best.safetensors: no step in its name or metadata"):
        koopt.forecast_checkpoints(paths, 100)


def test_a_forecast_in_pt_beside_what_it_was_made_from(tmp_path):
    """Its own step stays that of the last checkpoint: nothing but tensors can be written without unpickling."""
    paths = save(tmp_path, [{"model": law(t), "step": 10 * t} for t in range(4)], "pt")
    found = koopt.forecast_checkpoints(paths, 20, tmp_path / "out.pt")
    assert torch.load(found.output, weights_only=True)["step"] == 30
    message = r"out.pt: step 30 is that of .*400.pt too; a .pt forecast keeps the step of the checkpoint it was made"
    with pytest.raises(ValueError, match=message):
        koopt.forecast_checkpoints([*paths, found.output], 10)
    assert koopt.forecast_checkpoints([*paths, found.output], 10, method="line", steps=[0, 10, 20, 30, 50]).step == 60


def test_line_and_regression_take_time_as_it_is(tmp_path):
    times = [0, 10, 15, 70]
    states = [{"w": torch.tensor([3.0, -2.0]) + t * torch.tensor([0.5, 1.0])} for t in times]
    paths = save(tmp_path, states)
    for method in ("line", "regression"):
        koopt.forecast_checkpoints(paths, 30, tmp_path / f"{method}.safetensors", method=method, steps=times)
        torch.testing.assert_close(load_file(tmp_path / f"{method}.safetensors")["w"], torch.tensor([53.0, 98.0]))


def test_an_operator_resamples_uneven_steps(tmp_path):
    times = [0, 10, 22, 30, 41, 50, 60, 72]
    states = [law(t / 30, torch.float64) for t in times]
    found = koopt.forecast_checkpoints(save(tmp_path, states), 36, tmp_path / "out.safetensors", steps=times, rank=3)
    assert miss(load_file(found.output), law(108 / 30, torch.float64), states[-1]) < 0.01


def test_an_even_tail_is_taken_as_it_is():
    weights, spacing = steps.even_grid(torch.tensor([3.0, 10.0, 20.0, 30.0, 40.0]).double())
    assert spacing == 10
    assert torch.equal(weights, torch.eye(5, dtype=torch.float64)[1:])


@given(st.lists(st.floats(1.0, 2.9), min_size=4, max_size=12))
def test_resampling_is_exact_for_cubics_and_keeps_the_last(gaps):
    times = torch.tensor([0.0, *np.cumsum(gaps)], dtype=torch.float64)
    weights, spacing = steps.even_grid(times)
    grid = times[-1] - spacing * torch.arange(len(weights) - 1, -1, -1, dtype=torch.float64)
    for power in range(4):
        torch.testing.assert_close(weights @ times**power, grid**power, rtol=1e-9, atol=1e-8)
    assert weights[-1, -1] == pytest.approx(1)


def test_very_uneven_steps_are_refused_before_reading(tmp_path):
    paths = save(tmp_path, [law(t) for t in range(5)])
    with pytest.raises(ValueError, match="run from 10 to 1000, too uneven for an operator"):
        koopt.forecast_checkpoints(paths, 10, steps=[0, 10, 20, 1020, 1040])


def test_motion_below_the_resolution_is_not_fitted(tmp_path):
    """bf16 weights: one layer moves visibly at each step, one over the window only, one hardly at all."""
    generator = torch.Generator().manual_seed(0)
    base, way = (torch.randn(40, 50, generator=generator) for _ in range(2))
    speed = {"fast": 0.1, "slow": 0.004, "lost": 0.0002}
    states = [{f"{n}.w": (base + s * t * way).to(torch.bfloat16) for n, s in speed.items()} for t in range(6)]
    paths = save(tmp_path, states)
    found = koopt.forecast_checkpoints(paths, 100, tmp_path / "out.safetensors", by="layer", rank=2)
    assert {row["group"]: row["method"] for row in found.rows} == {
        "fast": "koopman", "slow": "regression", "lost": "mean"
    }  # fmt: skip
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(found.output).values())
    with pytest.raises(ValueError, match="all motion is below the resolution of the stored numbers"):
        koopt.forecast_checkpoints(paths, 100, tmp_path / "none.safetensors", include=["lost.*"])
    assert not (tmp_path / "none.safetensors").exists()
    koopt.forecast_checkpoints(paths, 100, tmp_path / "mean.safetensors", include=["lost.*"], method="mean")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_known_from_the_dtype(dtype):
    weights = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = (weights.to(dtype).double() - weights).norm() / weights.norm()
    assert error == pytest.approx(factors.ROUNDING * torch.finfo(dtype).eps, rel=0.01)


def test_the_held_out_checkpoint_is_forecast_from_the_earlier_ones(tmp_path):
    states = [law(t, torch.float64) for t in range(6)]
    found = koopt.forecast_checkpoints(save(tmp_path, states), 100, holdout=True, method="line")
    window = torch.stack([flat(state) for state in states])
    motion = (window[-1] - window[-2]).norm()
    row = found.rows[0]
    assert row["error"] == row["error_line"] == found.error
    assert row["error_line"] == pytest.approx(((2 * window[-2] - window[-3] - window[-1]).norm() / motion).item())
    assert row["error_mean"] == pytest.approx(((window[:-1].mean(dim=0) - window[-1]).norm() / motion).item())
    paths = [one.path for one in found.plan.checkpoints]
    assert koopt.forecast_checkpoints(paths, 100, holdout=True).rows[0]["error"] < 1e-9
    assert koopt.forecast_checkpoints(paths, 100).error is None
    by_layer = koopt.forecast_checkpoints(paths, 100, holdout=True, method="line", by="layer")
    assert by_layer.error == pytest.approx(row["error"])


def test_small_motion_beside_large_weights_keeps_its_digits():
    """The Gram matrix of increments against an orthogonal factor of the same weights, stored in float32."""
    generator = torch.Generator().manual_seed(0)
    base, way, turn = (torch.randn(5000, generator=generator, dtype=torch.float64) for _ in range(3))
    time = torch.arange(7, dtype=torch.float64).unsqueeze(1)
    window = (100 * base + 0.1 * (0.9**time * way + 0.6**time * turn)).float()[None]
    rows = factors.rows_of(factors.moments(window))
    exact = koopt.fit(window[0].double(), difference=True, rank=2).eigenvalues
    found = koopt.fit(rows[0], difference=True, rank=2, rtol=1e-12).eigenvalues
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(rows @ rows.mT, (window.double() @ window.double().mT), rtol=1e-12, atol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(2, 6), st.integers(1, 9), st.integers(0, 99))
def test_rows_have_the_inner_products_of_the_snapshots(patches, time, width, seed):
    window = torch.randn(patches, time, width, generator=torch.Generator().manual_seed(seed))
    rows = factors.rows_of(factors.moments(window))
    expected = window.double() @ window.double().mT
    torch.testing.assert_close(rows @ rows.mT, expected, rtol=1e-6, atol=1e-6)


def test_spectrum_of_a_known_law(tmp_path):
    paths = save(tmp_path, [law(t, torch.float64) for t in range(8)])
    plan, rows = spectrum_of(paths, by="network", rank=3)
    assert [row["real"] for row in rows] == pytest.approx([1.0, 0.9, 0.7], abs=1e-9)
    assert [row["half_life"] for row in rows] == [None, *(pytest.approx(half_life(x, 100, 1e-8)) for x in (0.9, 0.7))]
    assert half_life(0.9, 100, 1e-8) == pytest.approx(100 * math.log(0.5) / math.log(0.9))
    assert rows[0]["residual"] < 1e-9
    assert len(plan.times) == 8
    assert {line["group"] for line in by_group(spectrum_of(paths, rank=2)[1])} == {"first", "second", "(top)"}


@pytest.mark.parametrize("options", [{"rank": 3}, {"difference": True, "rank": 2}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_rounding_around_one_is_neither_growth_nor_decay(options, seed, tmp_path):
    """The same law in three dtypes says the same."""
    lines = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        (tmp_path / str(dtype)).mkdir()
        paths = save(tmp_path / str(dtype), [law(t, dtype, seed) for t in range(8)])
        lines += by_group(spectrum_of(paths, by="network", **options)[1])
    assert [line["growing"] for line in lines] == [0, 0, 0]
    assert [line["half_life"] for line in lines] == [pytest.approx(half_life(0.9, 100, 0.0), rel=0.2)] * 3


def test_growth_beyond_rounding_is_growth(tmp_path):
    states = [{name: 1.1**t * w for name, w in law(t, torch.bfloat16).items()} for t in range(8)]
    [line] = by_group(spectrum_of(save(tmp_path, states), by="network", rank=3)[1])
    assert line["growing"] == 1


def test_a_spectrum_is_that_of_the_operator_in_memory(tmp_path):
    states = [law(t) for t in range(6)]
    window = torch.stack([torch.cat([state[name].reshape(-1) for name in SHAPES]) for state in states])
    _, rows = spectrum_of(save(tmp_path, states), by="network", difference=True, rank=2)
    expected = koopt.fit(window, difference=True, rank=2)
    assert [row["modulus"] for row in rows] == pytest.approx(expected.eigenvalues.abs().tolist(), rel=1e-5)


def test_the_plan_counts_what_is_read(tmp_path):
    paths = save(tmp_path, [law(t) for t in range(4)])
    seen = []
    found = koopt.forecast_checkpoints(
        paths, 100, tmp_path / "out.safetensors", progress=lambda *given: seen.append(given)
    )
    bytes_moved = 4 * sum(math.prod(shape) for shape in SHAPES.values())
    assert found.plan.read == 2 * 4 * bytes_moved
    assert found.plan.weights * 4 == bytes_moved
    assert [s for s in seen if s[0] == "reading"][-1] == ("reading", 4 * bytes_moved, 4 * bytes_moved)
    stage, done, total = seen[-1]
    assert (stage, done) == ("writing", total)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_hundreds_of_checkpoints_need_few_open_files(kind, tmp_path):
    """With no more handles than a shell gives on some systems."""
    (tmp_path / "in").mkdir()
    states = [{"w": torch.full((3, 2), 1 + 0.99**t)} for t in range(600)]
    paths = [str(path) for path in save(tmp_path / "in", states, kind)]
    code = (
        "import resource, sys, koopt; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); "
        "koopt.forecast_checkpoints(sys.argv[2:], 100, sys.argv[1], method='mean')"
    )
    output = tmp_path / f"out.{kind}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(output), *paths], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    expected = torch.stack([state["w"] for state in states]).double().mean(dim=0).float()
    torch.testing.assert_close(load(output)["w"], expected)


@pytest.mark.parametrize("kind", ["folders", "files"])
def test_files_that_are_not_kept_open_are_read_alike(kind, tmp_path, monkeypatch):
    states = [law(t) for t in range(5)]
    if kind == "folders":
        paths = [folder_of(tmp_path / f"checkpoint-{t}", state, shards=3) for t, state in enumerate(states)]
    else:
        paths = save(tmp_path, states)
    expected = koopt.forecast_checkpoints(paths, 10, by="layer", holdout=True).rows
    monkeypatch.setattr(streaming, "OPEN", 2)
    assert koopt.forecast_checkpoints(paths, 10, by="layer", holdout=True).rows == expected


def test_a_sharded_index_is_its_folder(tmp_path):
    path = folder_of(tmp_path / "checkpoint-1", law(0))
    assert open_checkpoint(path / "model.safetensors.index.json").entries == open_checkpoint(path).entries


def test_rules_of_the_plan():
    assert set(rules.TIMED) | set(rules.TIMELESS) < set(forecasters.METHODS)
    assert checkpoint.streaming.block_bytes(8) % 8 == 0


@pytest.mark.parametrize(
    ("kind", "order"),
    [("safetensors", ["0", "1", "2", "10", "11", "head"]), ("pt", ["head", "10", "2", "0", "1", "11"])],
)
def test_layers_come_in_the_order_of_the_model(kind, order, tmp_path):
    """A .pt file keeps it, a safetensors file does not: there it is that of the numbers in the names."""
    names = [f"{part}.weight" for part in ("head", "10", "2", "0", "1", "11")]
    paths = save(tmp_path, [{name: torch.ones(3) * 0.5**t + i for i, name in enumerate(names)} for t in range(4)], kind)
    _, rows = spectrum_of(paths)
    assert list(dict.fromkeys(row["group"] for row in rows)) == order
    assert [row["group"] for row in koopt.forecast_checkpoints(paths, 10, by="layer").rows] == order


def test_a_unit_that_dies_out_is_no_reason_to_refuse_a_limit(tmp_path):
    """Its limit is zero, and the others' is not."""
    alive, dead = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = [{"w": torch.stack([alive + 0.5**t * alive.flip(0), 0.5**t * dead])} for t in range(5)]
    found = koopt.forecast_checkpoints(save(tmp_path, states), math.inf, tmp_path / "out.safetensors", by="node")
    torch.testing.assert_close(load(found.output)["w"], torch.stack([alive, torch.zeros(4).double()]))


def test_a_pickled_state_dict_with_the_state_of_a_module(tmp_path):
    """``get_extra_state`` puts a dict beside the tensors; an empty one says nothing either."""
    states = [{"w": torch.ones(3) * 0.5**t, "fc._extra_state": {"scale": torch.ones(1)}, "model": {}} for t in range(3)]
    found = koopt.forecast_checkpoints(save(tmp_path, states, "pt"), 100, tmp_path / "out.pt")
    assert torch.equal(load(found.output)["w"], torch.full((3,), 0.125))
