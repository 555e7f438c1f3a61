"""What benchmarks/choosing.py compares: inverses against dense oracles, groups by motion, windows and horizons."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import koopt

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import choosing
import choosing_forecasts as forecasts
from choosing_tasks import Task


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", forecasts.INVERSES)
@pytest.mark.parametrize("shape", [(3, 4, 9), (3, 9, 4)])
def test_an_inverse_of_full_rank_is_the_pseudo_inverse(name, shape):
    matrix = random(*shape)
    gain, directions = forecasts.INVERSES[name](matrix, None, None)
    assert_close(gain @ directions, torch.from_numpy(np.linalg.pinv(matrix.numpy())))


@pytest.mark.parametrize("name", ["SVD", "pivoted QR", "Gram, cut"])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
@pytest.mark.parametrize("options", [(3, None), (None, 1e-6)])
def test_an_inverse_that_cuts_copes_with_a_lower_rank(name, shape, options):
    matrix = random(2, shape[0], 3) @ random(2, 3, shape[1], seed=1)
    gain, directions = forecasts.INVERSES[name](matrix, *options)
    assert_close(gain @ directions, torch.from_numpy(np.linalg.pinv(matrix.numpy(), rcond=1e-9)))


def test_the_svd_is_cut_to_the_rank():
    left, values, right = np.linalg.svd(random(5, 7).numpy(), full_matrices=False)
    gain, directions = forecasts.by_svd(torch.from_numpy(left * values @ right)[None], 2, None)
    assert_close((gain @ directions)[0], torch.from_numpy(right[:2].T / values[:2] @ left[:, :2].T))


def test_cholesky_refuses_singular_normal_equations_unless_there_is_a_ridge():
    matrix = torch.ones(1, 3, 5, dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError):
        forecasts.by_cholesky(matrix, None, None)
    gain, directions = forecasts.by_cholesky(matrix, None, 1e-3)
    ridge = 1e-3 * 15 * torch.eye(3, dtype=torch.float64)
    assert_close((gain @ directions)[0], matrix[0].mT @ torch.linalg.inv(matrix[0] @ matrix[0].mT + ridge))


@pytest.mark.parametrize("name", forecasts.INVERSES)
@pytest.mark.parametrize("difference", [False, True])
@pytest.mark.parametrize("state", [3, 20])
def test_by_inverse_forecasts_as_koopt_does(name, difference, state):
    snapshots = random(2, 7, state).cumsum(dim=1)
    setting = forecasts.Setting(tail=6, stride=1, inverse=name, difference=difference)
    found, values = forecasts.by_inverse(snapshots, 4, setting)
    op = koopt.fit(snapshots, difference=difference)
    assert_close(found, op.forecast(4), rtol=1e-6, atol=1e-6)
    assert_close(values.abs().amax(dim=-1), op.eigenvalues.abs().amax(dim=-1), rtol=1e-6, atol=1e-6)


def test_weights_that_move_alike_up_to_sign_and_scale_share_a_group():
    families = random(2, 30)
    increments = torch.stack([families[0], families[1], -3 * families[0], 0.1 * families[1], 9 * families[1]], dim=1)
    labels = forecasts.groups_by_motion(increments, [2, 3])
    assert labels[0] == labels[2] != labels[1] == labels[3] == labels[4]
    unlike = forecasts.groups_by_motion(increments, [2, 3], unlike=True)
    assert unlike[4] == unlike[0] == unlike[2] != unlike[1] == unlike[3]  # the furthest leads, and takes the others


@pytest.mark.parametrize("by", ["random", "similar motion", "unlike motion"])
def test_groups_have_the_sizes_of_the_nodes(by):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    setting = forecasts.Setting(tail=5, stride=1, by=by)
    found = forecasts.partition(model, setting, random(6, 26), seed=1)
    assert found.groups == koopt.partition(model, "node").groups
    assert torch.cat([index.flatten() for index in found.indices]).sort().values.tolist() == list(range(26))


def test_a_random_partition_depends_on_the_seed_alone():
    model, setting = nn.Linear(5, 6), forecasts.Setting(tail=5, stride=1, by="random")
    one, same, other = (forecasts.partition(model, setting, random(6, 36), seed).indices[0] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_stacked_snapshots_hold_those_before_the_newest_first():
    rows = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    assert forecasts.stacked(rows, 2).tolist() == [[2.0, 20.0, 1.0, 10.0], [3.0, 30.0, 2.0, 20.0]]


def test_the_optimal_threshold_finds_the_rank_under_noise():
    matrix = 3 * random(60, 4) @ random(4, 300, seed=1) + random(60, 300, seed=2)
    assert forecasts.optimal_threshold(torch.linalg.svdvals(matrix), (60, 300)) == 4
    assert forecasts.optimal_threshold(torch.ones(3, dtype=torch.float64), (3, 9)) == 1


def straight(average_of=1):
    """Weights that move along a line, one seed; T = 10."""
    slope = torch.tensor([1.0, -2.0], dtype=torch.float64)
    window = torch.arange(-20, 1, dtype=torch.float64)[:, None, None] * slope
    loss = torch.arange(100, 60, -1, dtype=torch.float64)[:, None]

    def loss_of(weights):
        return 100.5 - weights[:, 0]  # between two steps, so that rounding does not matter

    start, truth = window[-1], 10 * slope[None]
    return Task("line", False, nn.Linear(1, 1), 10, 10, 1, window, window, loss_of, loss_of, loss, 1, start, truth)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("method", ["line", "regression", "koopman"])
def test_a_straight_line_is_continued_exactly_from_any_window(average, stride, method):
    setting = forecasts.Setting(tail=12, stride=stride, average=average, method=method, difference=True)
    found = choosing.row(straight(), choosing.Case("part", "label", setting), repeats=1)
    assert found["error_over_motion"] < 1e-9
    assert (found["success"], found["teq_over_T"]) == (1.0, 1.0)


@pytest.mark.parametrize("rank", ["held out", "lowest loss", "threshold"])
def test_rules_choose_a_rank_that_forecasts(rank):
    setting = forecasts.Setting(tail=12, stride=1, rank=rank, difference=True)
    assert choosing.row(straight(), choosing.Case("part", "label", setting), 0)["error_over_motion"] < 1e-9


def test_a_forecast_that_fails_counts_as_a_failure():
    setting = forecasts.Setting(tail=12, stride=1, inverse="Cholesky")  # two weights on one line
    found = choosing.row(straight(), choosing.Case("part", "label", setting), 0)
    assert (found["success"], found["teq_over_T"], found["ms"]) == (0.0, 0.0, None)
    assert found["error_over_motion"] == float("inf")
