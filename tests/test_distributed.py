"""Two real processes: they decide together, and do what one process does."""

import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from two_processes import (
    SECONDS,
    Pair,
    Training,
    alone_of_shards,
    bases_of_shards,
    bowed,
    each_alone,
    exchanged,
    exchanged_along_secants,
    fail,
    flat_parameters,
    in_eigenbases,
    interrupted,
    longer_sides,
    nothing,
    other_options,
    other_weights,
    resume,
    resumed,
    survives,
    tensor_parallel,
    trained,
    under_noise,
)

import koopt
from koopt.distributed import INTEGERS, fingerprint

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # a checkpoint saved or read by one process
]
ROOT = Path(__file__).parent.parent
KINDS = ("ddp", "torchrun", "fsdp")
# two processes average gradients in another order than one, and long jumps multiply what float32 makes of that
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def pair():
    pair = Pair()
    yield pair
    pair.close()


def require_like(own, other):
    """The same decisions; numbers to 1e-6, since sums over processes round differently."""
    assert len(own) == len(other)
    for a, b in zip(own, other, strict=True):
        losses = ("before", "after")
        assert {k: v for k, v in a.items() if k not in losses} == {k: v for k, v in b.items() if k not in losses}
        assert all(a[k] == (None if b[k] is None else pytest.approx(b[k], rel=1e-6)) for k in losses)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "auto"},
        {"momentum": "combine"},
        {"width": 1, "mode": "auto"},
        {"history": 8, "cycle": 100, "tail": 30, "mode": "auto"},
    ],
    ids=str,
)
def test_two_processes_jump_as_one_does(pair, kind, options):
    """With `width` 1 the second process has empty shards under FSDP2."""
    alone = trained("one", steps=30, **options)
    first, second = pair.both(trained, kind, steps=30, **options)
    assert first["jumps"] == second["jumps"]
    assert torch.equal(first["weights"], second["weights"])
    require_like(first["jumps"], alone["jumps"])
    assert any(jump["accepted"] for jump in alone["jumps"])
    torch.testing.assert_close(first["weights"], alone["weights"], **CLOSE)
    torch.testing.assert_close(first["forecast"], alone["forecast"], **CLOSE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["ddp", "torchrun"])
def test_two_processes_on_a_cuda_device(pair, kind):
    """Both on one device, so over gloo: NCCL wants a device for each, and FSDP2 over gloo wants the CPU."""
    alone = trained("one", steps=30, device="cuda")
    first, second = pair.both(trained, kind, steps=30, device="cuda")
    assert first["jumps"] == second["jumps"]
    assert torch.equal(first["weights"], second["weights"])
    require_like(first["jumps"], alone["jumps"])
    torch.testing.assert_close(first["weights"], alone["weights"], **CLOSE)
    torch.testing.assert_close(first["forecast"], alone["forecast"], **CLOSE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_process_under_nccl(kind):
    alone, pair = trained("one", steps=30, device="cuda"), Pair(1, "cpu:gloo,cuda:nccl")
    try:
        (only,) = pair.both(trained, kind, steps=30, device="cuda")
    finally:
        pair.close()
    require_like(only["jumps"], alone["jumps"])
    torch.testing.assert_close(only["weights"], alone["weights"], **CLOSE)


@pytest.mark.parametrize("kind", ["ddp", "torchrun"])
def test_moves_in_eigenbases_are_those_of_one_process(pair, kind):
    alone, plain = in_eigenbases("one"), trained("one", steps=30, mode="auto", history=0)
    first, second = pair.both(in_eigenbases, kind)
    assert first["count"] == second["count"] == alone["count"] == 21
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], alone["weights"], **CLOSE)
    assert not torch.allclose(alone["weights"], plain["weights"], rtol=1e-3)


def test_weights_that_rounding_makes_unlike_are_alike_again(pair):
    first, second = pair.both(in_eigenbases, "ddp", unlike=14)
    same = [own == other for own, other in zip(first["prints"], second["prints"], strict=True)]
    assert same == [True] * 14 + [False] * 5 + [True] * 11


@pytest.mark.parametrize("options", [{}, {"history": 0}], ids=str)
def test_noise_is_found_by_all_processes(pair, options):
    first, second = pair.both(under_noise, **options)
    assert first["count"] == second["count"] > 20
    assert first["reason"] == second["reason"]
    assert torch.equal(first["weights"], second["weights"])


@pytest.mark.parametrize(("examples", "found"), [((1200, 1300), ["weight"]), ((1300, 1100), [])])
def test_the_process_with_fewest_examples_decides_on_longer_sides(pair, examples, found):
    assert pair.both(longer_sides, examples) == [found, found]


def test_tensor_parallel_layers(pair):
    alone = trained("one", steps=30)
    first, second = pair.both(tensor_parallel)
    assert first["jumps"] == second["jumps"]
    require_like(first["jumps"], alone["jumps"])
    torch.testing.assert_close(first["weights"], alone["weights"], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_guards_that_differ_do_not_split_the_decision(pair, kind):
    first, second = pair.both(trained, kind, steps=40, own_data=True)
    assert first["jumps"] == second["jumps"]
    assert torch.equal(first["weights"], second["weights"])
    first, second = pair.both(bowed, kind)  # 0 and 1 more than the loss
    assert first["jumps"] == second["jumps"]
    assert 0.5 < first["jumps"][0]["before"] < 1.0
    assert torch.equal(first["weights"], second["weights"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", [1, 3])
def test_a_guard_that_fails_in_one_process_fails_in_all(pair, kind, call):
    first, second = pair.both(bowed, kind, at=call, what=fail)
    assert second["error"] == "LookupError: no such batch"
    assert first["error"] == "RuntimeError: guard failed in process 1 of 2: LookupError: no such batch"
    assert torch.equal(first["weights"], second["weights"])
    assert first["held"] is None


def test_a_loss_that_is_no_number_in_one_process_is_none_in_all(pair):
    first, second = pair.both(bowed, "ddp", at=1, what=nothing)
    assert first["error"] == second["error"]
    assert "guard returned nan" in first["error"]
    first, second = pair.both(bowed, "ddp", at=3, what=nothing)
    assert first["jumps"] == second["jumps"]
    assert torch.equal(first["weights"], second["weights"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_process_that_is_killed_in_a_jump(kind, tmp_path):
    pair = Pair()
    try:
        started = time.monotonic()
        pair.start(survives, kind, tmp_path)
        survivor, killed = pair.answers()
        assert time.monotonic() - started < 3 * SECONDS
    finally:
        pair.close()
    assert killed is None
    assert survivor is not None
    message, restored, calls = survivor[1]
    assert "another process of this run has ended" in message
    assert restored
    assert calls == 4
    again = resume(Training("one", guard=lambda: 1.0), tmp_path)
    assert again.koop.steps == 11
    again.run(12)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *product(("ddp", "fsdp"), [{"mode": "auto", "momentum": "combine"}, {"width": 1}]),
        ("ddp", {"mode": "auto", "precondition": 16}),
    ],
    ids=str,
)
def test_distributed_checkpoints_resume_bit_for_bit_and_on_another_number_of_processes(pair, kind, options, tmp_path):
    whole, _ = pair.both(interrupted, kind, tmp_path / "two", **options)
    assert any(jump["accepted"] for jump in whole["jumps"])
    for again in pair.both(resumed, kind, tmp_path / "two", **options):
        assert torch.equal(again["weights"], whole["weights"])
        assert again["jumps"] == whole["jumps"]
    single = resumed("one", tmp_path / "two", **options)
    require_like(single["jumps"], whole["jumps"])
    torch.testing.assert_close(single["weights"], whole["weights"], **CLOSE)
    single = interrupted("one", tmp_path / "one", **options)
    for again in pair.both(resumed, kind, tmp_path / "one", **options):
        require_like(again["jumps"], single["jumps"])
        torch.testing.assert_close(again["weights"], single["weights"], **CLOSE)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_what_is_exchanged_does_not_grow_with_the_model(pair, kind):
    small, large = (pair.both(exchanged, kind, width)[0] for width in (8, 4096))
    assert large["cycle"] <= 2**20
    assert large["jump"]["evaluations"] == small["jump"]["evaluations"] > 2
    assert abs(large["cycle"] - small["cycle"]) <= 1024  # other candidates may have no answer
    assert 39 * 39 * 8 < large["forecast"] <= 2**20  # a Gram matrix of the block means, and more
    # how many examples go through both matrices, and whether there is memory
    assert small["recorded"] == large["recorded"] == (3 * 8 if kind == "ddp" else 0)
    small, large = (pair.both(exchanged_along_secants, kind, width)[0] for width in (8, 4096))
    assert small["step"]["forecaster"] == large["step"]["forecaster"] == "secants"
    assert 0 < large["bytes"] <= 2**13  # single numbers


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (other_weights, "model: the processes hold different weights; wrap it in DistributedDataParallel"),
        (other_options, "attach: the processes differ in options"),
        (flat_parameters, "model: FullyShardedDataParallel .* shard the model with torch.distributed.fsdp.fully_shard"),
        (alone_of_shards, "group is None, but the parameters are shards"),
        (bases_of_shards, "precondition is 16, but weights are sharded over processes, expected whole ones"),
    ],
)
def test_what_does_not_fit_together_is_refused_everywhere(pair, function, message):
    assert all(re.match(message, said) for said in pair.both(function))


def test_processes_that_train_models_of_their_own(pair):
    first, second = pair.both(each_alone)
    assert first["weight"] == (1, 3)
    assert second["weight"] == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changed", [2, 10, 100])
def test_a_fingerprint_sees_opposite_changes_and_exchanged_places(dtype, changed):
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    own = fingerprint([weights])
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        places = torch.randperm(1000, generator=generator)[:changed]
        other = weights.clone()
        bits = other.view(INTEGERS[dtype.itemsize])
        bits[places] += 1 - 2 * (torch.arange(changed) % 2).to(bits.dtype)  # half of them up, half down
        assert fingerprint([other]) != own
        other = weights.clone()
        other[places] = weights[places.roll(1)]
        assert fingerprint([other]) != own
    assert fingerprint([weights.clone()]) == own
    assert fingerprint([weights[:400], weights[400:].view(6, 100).t().contiguous().t()]) == own


def test_a_run_in_one_process_does_not_import_what_several_need():
    code = (
        "import sys, torch, koopt\n"
        "model = torch.nn.Linear(1, 1)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "before = set(sys.modules)\n"
        "koopt.attach(optimizer, model).forecast()\n"
        "print([name for name in set(sys.modules) - before if name.startswith('torch.distributed')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("group", ["all", "WORLD"])
def test_a_group_that_does_not_exist(group):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"group is .*expected a torch.distributed.ProcessGroup, None or"):
        koopt.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, group=group)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_the_examples_reach_the_plain_loss_sooner(name):
    """By the line that their docstrings give."""
    source = ROOT / "examples" / f"{name}.py"
    assert f"torchrun --nproc-per-node 2 examples/{name}.py" in source.read_text(encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    steps, plain, own = re.findall(r"loss after (\d+) steps: (\S+) plain, (\S+) with koopt", done.stdout)[0]
    reached = int(re.findall(r"is reached at step (\d+);", done.stdout)[0])
    assert float(own) < float(plain)
    assert reached < int(steps)
