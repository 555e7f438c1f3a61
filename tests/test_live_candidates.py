"""What jumps are chosen from."""

import math

import pytest
import torch

from koopt.live.candidates import (
    FAMILIES,
    Choice,
    Proposer,
    combined,
    displaced,
    moved,
    paired,
    roughness,
    smooth,
    unpaired,
)
from koopt.operator import fit_in_form, leading


def test_roughness_of_what_is_known():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(31, 200, generator=generator, dtype=torch.float64)
    assert roughness(noise.cumsum(dim=0)) > 0.9  # increments that nothing forecasts
    heavy = torch.zeros(31, 200, dtype=torch.float64)
    for i in range(1, 31):
        heavy[i] = 0.9 * heavy[i - 1] + noise[i]
    assert roughness(heavy.cumsum(dim=0)[5:]) > 0.3  # momentum
    turning = torch.stack([0.9 ** torch.arange(30.0) * torch.cos(2.5 * torch.arange(30.0) + a) for a in (0, 1)], dim=1)
    assert roughness(turning) < 1e-6  # oscillation is not noise
    assert roughness(torch.zeros(30, 3)) == 0
    assert math.isnan(roughness(torch.full((30, 3), math.nan)))


def test_pairs_cancel_what_turns_and_not_what_drifts():
    generator = torch.Generator().manual_seed(0)
    drift = torch.arange(30.0)[:, None] * torch.randn(1, 20_000, generator=generator)
    beside = torch.randn(30, 20_000, generator=generator)
    assert smooth(drift) == (0, pytest.approx(0, abs=1e-6))
    halvings, rough = smooth(drift + 0.5 * beside)  # what is added each step is taken away at the next
    assert halvings == 1
    assert rough == pytest.approx(roughness(paired((drift + 0.5 * beside)[:, ::5].double())))
    noise = beside.cumsum(dim=0)  # what is added each step stays
    assert smooth(noise) == (0, pytest.approx(roughness(noise[:, ::5].double())))
    assert smooth(noise)[1] > 0.9
    kept = noise.double()[:, :100]
    assert smooth(kept)[0] == 0
    assert torch.equal(kept, noise.double()[:, :100])


@pytest.mark.parametrize("time", [12, 13, 30])
def test_coefficients_of_pairs_are_those_of_what_is_in_them(time):
    rows = torch.randn(time, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = paired(paired(rows.clone()))
    coefficients = torch.arange(len(pairs), dtype=torch.float64)
    torch.testing.assert_close(unpaired(coefficients, 4, time) @ rows, coefficients @ pairs)
    torch.testing.assert_close(pairs[-1], rows[-4:].mean(dim=0))


def test_choice_repeats_what_gained_and_tries_all_in_turn():
    choice = Choice()
    tried = set()
    for _ in range(12):
        picked = choice.pick(3)
        assert len(set(picked)) == 3
        tried |= set(picked)
        for index in picked:
            choice.learn(index, 0.5 if index in (2, 4) else -0.1, 1.0)
    assert tried == set(range(len(FAMILIES)))
    assert set(choice.pick(3)[:2]) == {2, 4}


def test_combinations_against_dense_algebra():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    now = [rows[-1, :3].reshape(3, 1).clone(), rows[-1, 3:].float()]
    coefficients = torch.tensor([0.5, -1.0, 0.0, 0.25, 1.25], dtype=torch.float64)
    for found in (moved(now, rows - rows[-1], coefficients), combined(now, rows, coefficients)):
        torch.testing.assert_close(found[0].flatten(), (coefficients @ rows)[:3])
        torch.testing.assert_close(found[1], (coefficients @ rows)[3:].float())
    assert combined([now[0].half()], torch.full((2, 3), 6e4), torch.ones(2, dtype=torch.float64)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_long_jump_in_few_digits_against_float64(dtype):
    """Motion a thousandth of the weights, far ahead: the error is in the motion's digits, not in the weights'."""
    generator = torch.Generator().manual_seed(0)
    exact = 1 + 1e-3 * torch.randn(30, 50, generator=generator, dtype=torch.float64).cumsum(dim=0)
    rows = exact.float()
    now = [rows[-1].clone()]
    recorded = (rows - rows[-1]).to(dtype)
    coefficients = torch.zeros(30, dtype=torch.float64)
    coefficients[0], coefficients[-1] = -200.0, 201.0
    expected = now[0].double() + coefficients @ (rows - rows[-1]).double()
    found = moved(now, recorded, coefficients)[0]
    motion = (expected - now[0]).abs().max().item()
    assert (found - expected).abs().max().item() < 4 * torch.finfo(dtype).eps * motion


def test_displacements_take_the_place_of_the_snapshots():
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    now = torch.ones(7)
    expected = rows - 1
    assert displaced(rows, now) is rows
    assert torch.equal(rows, expected)


def test_the_small_factor_keeps_all_distances():
    generator = torch.Generator().manual_seed(0)
    rows = (100 + torch.randn(9, 40, generator=generator)).cumsum(dim=0).double()
    path = Proposer(rows).path
    assert torch.equal(path[-1], torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(torch.cdist(path, path), torch.cdist(rows, rows), rtol=1e-9, atol=1e-6)


def test_every_candidate_continues_a_line_or_stays():
    """On a straight line all forecasters agree on where it leads."""
    window = torch.arange(30.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, -2.0], dtype=torch.float64)
    proposer = Proposer(window)
    for candidate in FAMILIES:
        coefficients = proposer.coefficients(candidate)
        if candidate.method in ("anderson", "mean") or math.isinf(candidate.horizon):
            continue
        assert coefficients.sum().item() == pytest.approx(1.0)
        torch.testing.assert_close(coefficients @ window, window[-1] * (1 + candidate.horizon), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_what_is_finite_in_one_dtype_may_overflow_in_another(dtypes):
    now = [torch.ones(2, dtype=dtype) for dtype in dtypes]
    rows = torch.tensor([[0.0] * 4, [1.0] * 4], dtype=torch.float64)
    assert moved(now, rows - 1, torch.tensor([-1e300, 1e300], dtype=torch.float64)) is None
    exact = moved(now, rows - 1, torch.tensor([-1.0, 2.0], dtype=torch.float64))
    assert [(v.dtype, v.tolist()) for v in exact] == [(dtype, [2.0, 2.0]) for dtype in dtypes]


def test_lower_ranks_are_blocks_of_one_fit():
    """As a fit of that rank has it, projected or not."""
    times = torch.arange(30.0, dtype=torch.float64)[:, None]
    path = torch.cat([rate**times for rate in (0.98, 0.9, 0.7, 0.4)], dim=1)
    for options in ({"difference": True}, {"difference": True, "projected": True}, {}):
        whole = fit_in_form(path, snapshot_form=True, rank=4, **options)
        for rank in (1, 2, 3, 4):
            own = fit_in_form(path, snapshot_form=True, rank=rank, **options)
            for horizon in (3, 2.5):
                torch.testing.assert_close(
                    leading(whole, rank).forecast(horizon), own.forecast(horizon), rtol=1e-7, atol=1e-9
                )
