"""A resumed run is the uninterrupted one."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from live_tasks import resumable, resumed, saved

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("at", [0, 5, 12, 31])
@pytest.mark.parametrize("momentum", ["keep", "combine"])
def test_a_resumed_run_is_the_uninterrupted_one(at, momentum):
    whole, koop = resumable(momentum=momentum)
    for step in range(50):
        if step == at:
            state = saved(whole, koop)
        whole.step(step)
    task, again = resumed(state, momentum=momentum)
    for step in range(at, 50):
        task.step(step)
    assert task.bits == whole.bits
    assert any(jump.accepted for jump in koop.jumps)
    assert [replace(jump, seconds=0.0) for jump in again.jumps] == [replace(jump, seconds=0.0) for jump in koop.jumps]
    for own, other in zip(koop.forecast().values(), again.forecast().values(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("momentum", ["keep", "combine"])
def test_a_rough_run_resumes_with_means_of_as_many_steps(momentum):
    def step(task, i):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for parameter in task.model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        task.step(i)

    options = {"momentum": momentum, "cycle": 14, "tail": 12, "max_overhead": 1.0}
    whole, koop = resumable(**options)
    states = []
    for i in range(60):
        states.append(saved(whole, koop))
        step(whole, i)
    blocks = [state["koop"]["snapshots"]["block"] for state in states]
    assert {1, 2} == set(blocks)
    for at in (10, blocks.index(2), blocks.index(2) + 11):
        task, again = resumed(states[at], **options)
        for i in range(at, 60):
            step(task, i)
        assert task.bits == whole.bits
        assert repr(again.state_dict() | {"jumps": ""}) == repr(koop.state_dict() | {"jumps": ""})


def test_the_optimizers_state_dict_carries_koopt_along_where_asked():
    task, koop = resumable(with_optimizer=True)
    task.run(steps=40)
    state = saved(task, koop)["optimizer"]
    assert state["koopt"]["steps"] == 40
    other, again = resumable(with_optimizer=True)
    other.optimizer.load_state_dict(state)
    assert again.steps == 40
    assert [jump.step for jump in again.jumps] == [jump.step for jump in koop.jumps]


def test_koopts_part_is_not_taken_over_where_the_optimizer_refuses_its_own():
    task, koop = resumable(with_optimizer=True)
    task.run(steps=40)
    state = saved(task, koop)["optimizer"]
    other, again = resumable(with_optimizer=True)
    own = repr(again.state_dict())
    groups = state["param_groups"]
    with pytest.raises(ValueError, match="parameter group"):
        other.optimizer.load_state_dict(state | {"param_groups": groups * 2})
    assert repr(again.state_dict()) == own
    other.optimizer.load_state_dict({name: value for name, value in state.items() if name != "koopt"})
    assert again.steps == 0
    state["koopt"]["steps"] = -1
    with pytest.raises(ValueError, match="steps"):
        other.optimizer.load_state_dict(state)
    assert repr(again.state_dict()) == own


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_handle_is_stateful_for_distributed_checkpoints(tmp_path):
    import torch.distributed.checkpoint as dcp

    task, koop = resumable()
    task.run(steps=40)
    dcp.save({"koop": koop}, checkpoint_id=str(tmp_path), no_dist=True)
    _, again = resumable()
    dcp.load({"koop": again}, checkpoint_id=str(tmp_path), no_dist=True)
    assert again.jumps == koop.jumps
    assert koop.jumps
    saved = {name: value for name, value in koop.state_dict().items() if name != "bases"}  # examples are counted anew
    assert repr(again.state_dict()) == repr(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["settings"].update(tail=9), "state: recorded with tail=9, this run has tail=8; make them"),
        (lambda s: s["settings"]["shapes"].update({"0.weight": [1]}), r"with '0.weight' of shape \[1\] where this"),
        (lambda s: s["settings"]["shapes"].popitem(), "recorded with no parameter more where this run has '"),
        (lambda s: s.pop("means"), r"state has \[.*\], expected .*pass what state_dict\(\) returned"),
        (
            lambda s: s["means"]["rows"].update({"0.weight": torch.zeros(2, 2)}),
            r"state\['means'\]\['rows'\]\['0.weight'\] is \(\(2, 2\), torch.float32",
        ),
        (lambda s: s.update(steps=-1), r"state\['steps'\] is -1, expected int >= 0"),
        (lambda s: s["means"].update(block=0), r"state\['means'\]\['block'\] is 0, expected int >= 1"),
        (lambda s: s["attempts"]["choice"].update(gains=[0.0]), r"\['choice'\]\['gains'\] does not fit this version"),
        (lambda s: s.update(jumps='[{"step": 3}]'), r"state\['jumps'\] is .*, expected the records of jumps as JSON"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    task, koop = resumable()
    task.run(steps=30)
    own = koop.state_dict()
    state = saved(task, koop)["koop"]
    change(state)
    with pytest.raises(ValueError, match=message):
        koop.load_state_dict(state)
    assert repr(koop.state_dict()) == repr(own)


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    """20 real SIGKILLs at random moments."""
    command = [sys.executable, str(ROOT / "benchmarks" / "killed.py"), "--kills", "20", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "20 of 20 kills: bit-identical"
