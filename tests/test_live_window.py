"""Recorded windows against all copies."""

import math

import pytest
import torch
from live_tasks import Task, flat, sgd

from koopt.live.window import BlockMeans, Snapshots, record


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 9, 33, 64, 65, 127, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_means_against_all_copies(steps, dtype):
    copies = torch.randn(steps, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    means = BlockMeans(
        [torch.zeros(2, dtype=dtype), torch.zeros(3, dtype=dtype)], 8, torch.float64, torch.device("cpu")
    )
    for row in copies:
        means.add([row[:2], row[2:]])
    blocks = steps // means.block
    expected = copies[: blocks * means.block].double().view(blocks, means.block, 5).mean(dim=1)
    if means.stride == 1:
        torch.testing.assert_close(means.ordered(), expected, rtol=1e-12, atol=1e-12)
        assert means.age == steps - 1 - (blocks * means.block - (means.block + 1) / 2)
    assert means.block == 1 if steps < 8 else 4 <= blocks < 8
    assert math.log2(means.block) % 1 == 0


def test_long_blocks_are_sampled_evenly():
    """Of a drift a mean tells the time: the last one's age is right, and the others lie a block apart."""
    means = BlockMeans([torch.zeros(1)], 8, torch.float64, torch.device("cpu"))
    for step in range(3_000):
        means.add([torch.tensor([float(step)])])
    assert (means.block, means.stride) == (512, 128)
    rows = means.ordered().flatten()
    assert 2_999 - means.age == pytest.approx(rows[-1].item(), abs=0)
    torch.testing.assert_close(rows.diff(), torch.full((4,), 512.0, dtype=torch.float64), rtol=0.1, atol=0)


def test_snapshots_keep_the_last():
    held = Snapshots([torch.zeros(2)], 3, torch.float32, torch.device("cpu"))
    for value in range(5):
        held.add([torch.full((2,), float(value))])
        assert held.ordered()[:, 0].tolist() == list(range(max(0, value - 2), value + 1))


@pytest.mark.parametrize("block", [2, 3])
def test_snapshots_are_means_of_blocks(block):
    held, values = Snapshots([torch.zeros(2)], 3, torch.float64, torch.device("cpu"), block), []
    for step in range(20):
        values.append(float(step**2))
        held.add([torch.full((2,), values[-1])])
        whole = len(values) // block
        means = [sum(values[i * block : (i + 1) * block]) / block for i in range(whole)]
        kept = 3 - (len(values) > 3 * block and len(values) % block > 0)  # an open block takes the place of the oldest
        assert held.ordered()[:, 0].tolist() == pytest.approx(means[-kept:])
        if whole:
            middle = whole * block - (block + 1) / 2
            assert held.age == step - middle


def test_memory_is_bounded_stated_and_of_the_dtype_asked_for():
    task = Task(sgd)
    size = flat(task.model).numel()
    koop = task.attach(dtype=torch.bfloat16, guard=task.loss, history=5)
    assert koop.nbytes == size * (2 * (8 + 8) + 4 + 2 * 2 * 5 + 4 * 4) + 5 * (8 * 5 + 8 + 2) + 8
    before = koop.nbytes
    task.run(steps=100)
    assert koop.nbytes == before
    koop.detach()
    assert task.attach(guard=task.loss, mode="jump", momentum="combine").nbytes == size * 4 * (8 + 8)
    assert len(koop.forecast()) == 4


@pytest.mark.parametrize("steps", [3, 8, 30, 33, 37, 61, 200])
def test_the_open_block_counts_once_half_of_it_has_passed(steps):
    means = BlockMeans([torch.zeros(1)], 8, torch.float64, torch.device("cpu"))
    for step in range(steps):
        means.add([torch.tensor([float(step)])])
    kept, rows = means.ordered().clone(), means.with_open()
    assert torch.equal(rows[: len(kept)], kept)
    assert len(rows) - len(kept) == (means.block > 1 and 2 * means.open >= means.block)
    if len(rows) > len(kept):
        started = steps - means.open
        assert started <= rows[-1].item() < steps
        if means.stride == 1:
            assert rows[-1].item() == (started + steps - 1) / 2
    for step in range(steps, steps + 100):  # what was looked at leaves no trace
        means.add([torch.tensor([float(step)])])
    plain = BlockMeans([torch.zeros(1)], 8, torch.float64, torch.device("cpu"))
    for step in range(steps + 100):
        plain.add([torch.tensor([float(step)])])
    assert torch.equal(means.ordered(), plain.ordered())


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_recorded_takes_no_gradient_and_leaves_grad_mode_alone(enabled, dtype):
    sources = [torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor([[3.0]]))]
    targets = [torch.zeros(2, dtype=dtype), torch.zeros(1, 1, dtype=dtype)]
    with torch.set_grad_enabled(enabled):
        record(targets, sources)
        record(targets, sources, add=True)
        assert torch.is_grad_enabled() is enabled
        with pytest.raises(RuntimeError):
            record(targets, [torch.zeros(3), torch.zeros(1, 1)])
        assert torch.is_grad_enabled() is enabled
    assert [target.flatten().tolist() for target in targets] == [[2.0, 4.0], [6.0]]
    assert not any(target.requires_grad for target in targets)


@pytest.mark.parametrize("window", [4, 8, 56])
def test_the_age_of_the_last_mean_is_that_of_what_it_is_made_of(window):
    """Each step records its own number, so that a mean tells when it was."""
    means = BlockMeans([torch.zeros(1)], window, torch.float64, torch.device("cpu"))
    for step in range(600):
        means.add([torch.tensor([float(step)], dtype=torch.float64)])
        if means.held:
            assert means.age == step - means.ordered()[-1].item()
