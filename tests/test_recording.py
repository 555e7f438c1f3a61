"""The oscillator against independent mathematics; recordings against interruption, damage and full disks."""

import errno
import functools
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn
from torch.testing import assert_close

from koopt import system
from koopt.experiments import oscillator, recording, workers
from koopt.experiments.recording import Run

RUN = Run("adagrad", seeds=2, seed=3, steps=500, t1=120, t2=330)
ARRAYS = ("loss", "window", "trail")
OPTIMIZERS = {
    "adam": lambda weights: torch.optim.Adam(weights, betas=(0.999, 0.9999)),
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
}


def network_of(weights):
    network = oscillator.Oscillator()
    torch.nn.utils.vector_to_parameters(weights, network.parameters())
    return network


def some_weights(networks=4):
    """From small to far in the saturated part of the sigmoids."""
    weights = torch.stack([oscillator.initial_weights(seed) for seed in range(networks)])
    return weights * torch.logspace(0, 1.3, networks, dtype=torch.float64).unsqueeze(1)


def always(step):
    return True


# the oscillator


@pytest.mark.parametrize("loss_of_network", [oscillator.loss_by_autograd, oscillator.loss_by_forward])
def test_batched_loss_is_that_of_single_networks(loss_of_network):
    times = oscillator.time_points()
    weights = some_weights().requires_grad_()
    batched = oscillator.batched_loss(weights, times)
    batched.sum().backward()
    for row, loss, gradient in zip(weights.detach(), batched, weights.grad, strict=True):
        network = network_of(row)
        single = loss_of_network(network, times)
        single.backward()
        assert_close(loss, single, rtol=1e-12, atol=0)
        flat = torch.cat([parameter.grad.reshape(-1) for parameter in network.parameters()])
        assert_close(gradient, flat, rtol=1e-12, atol=1e-12 * flat.abs().max().item())


def test_loss_by_differences_in_time():
    times, step = oscillator.time_points(), 1e-3
    network = network_of(some_weights()[1])
    with torch.no_grad():
        near, far = (network(times + n * step) - network(times - n * step) for n in (1, 2))
        slope = (8 * near - far) / (12 * step)
        expected = oscillator.residual_loss(network(times), slope)
    assert_close(oscillator.loss_by_autograd(network, times), expected, rtol=1e-9, atol=0)


def test_the_true_solution_has_no_residual():
    def motion(_, state):
        return [state[1], -state[0] - state[0] ** 3]

    times, step = oscillator.time_points().squeeze(1).numpy(), 1e-3
    span = (-3 * step, oscillator.END + 3 * step)
    # backwards first, so that the state given holds at time 0
    begin = solve_ivp(motion, (0, span[0]), [oscillator.X0, oscillator.P0], "DOP853", rtol=1e-13, atol=1e-13).y[:, -1]
    solution = solve_ivp(motion, span, begin, "DOP853", rtol=1e-13, atol=1e-13, dense_output=True).sol
    near, far = (solution(times + n * step) - solution(times - n * step) for n in (1, 2))
    slope = torch.from_numpy((8 * near - far).T / (12 * step))
    state = torch.from_numpy(solution(times).T)
    assert oscillator.residual_loss(state, slope) < 1e-15
    assert oscillator.residual_loss(1.01 * state, 1.01 * slope) > 1e-4


def test_solution_starts_where_it_has_to():
    start = network_of(some_weights()[2])(torch.zeros(1, 1, dtype=torch.float64))
    assert start.tolist() == [[oscillator.X0, oscillator.P0]]


def test_time_points_cover_two_periods_of_the_linear_oscillator():
    times = oscillator.time_points()
    assert times.shape == (200, 1)
    assert (times[0].item(), times[-1].item()) == (0, pytest.approx(4 * np.pi))
    assert_close(times.diff(dim=0), torch.full((199, 1), 4 * np.pi / 199, dtype=torch.float64))


def test_initial_weights_are_those_of_pytorch_and_leave_the_generator_alone():
    torch.manual_seed(11)
    layers = [nn.Linear(1, 10), nn.Linear(10, 10), nn.Linear(10, 2)]
    expected = torch.cat([p.detach().reshape(-1) for layer in layers for p in layer.parameters()]).double()
    before = torch.get_rng_state()
    found = oscillator.initial_weights(11)
    assert found.equal(expected)
    assert torch.get_rng_state().equal(before)
    assert not found.equal(oscillator.initial_weights(12))


# one run


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """RUN, trained in one go."""
    folder = tmp_path_factory.mktemp("reference")
    assert recording.record(RUN, folder, always)
    return folder


def contents(folder, run=RUN):
    return {name: (folder / run.name / f"{name}.npy").read_bytes() for name in ARRAYS}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_batched_run_is_so_many_runs_of_torch_optim(optimizer, tmp_path):
    run = Run(optimizer, seeds=3, seed=5, steps=300, t1=100, t2=200)
    assert recording.record(run, tmp_path, always)
    recorded = recording.opened(run, tmp_path)
    assert (recorded.loss.shape, recorded.window.shape, recorded.trail.shape) == ((301, 3), (101, 3, 152), (4, 3, 152))
    for i in range(run.seeds):
        network = network_of(oscillator.initial_weights(run.seed + i))
        stepper = OPTIMIZERS[optimizer](network.parameters())
        losses, weights = [], []
        for step in range(run.steps + 1):
            stepper.zero_grad()
            loss = oscillator.loss_by_autograd(network, oscillator.time_points())
            losses.append(loss.item())
            weights.append(torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()]).numpy())
            loss.backward()
            stepper.param_groups[0]["lr"] = 8 / (1000 + step)
            stepper.step()
        np.testing.assert_allclose(recorded.loss[:, i], losses, rtol=1e-10)
        np.testing.assert_allclose(recorded.window[:, i], weights[run.t1 : run.t2 + 1], rtol=0, atol=1e-10)
        np.testing.assert_allclose(recorded.trail[:, i], weights[::100], rtol=0, atol=1e-10)


def test_losses_are_those_of_the_weights_kept(reference):
    recorded = recording.opened(RUN, reference)
    times = oscillator.time_points()
    for row in (0, 17, -1):
        loss = oscillator.batched_loss(torch.from_numpy(np.array(recorded.window[row])), times)
        np.testing.assert_allclose(recorded.loss[RUN.t1 : RUN.t2 + 1][row], loss, rtol=1e-12)
    assert np.array_equal(recorded.trail[2], recorded.window[200 - RUN.t1])
    assert not recorded.loss.flags.writeable


def test_seeds_are_independent_of_each_other(reference, tmp_path):
    alone = replace(RUN, seeds=1, seed=RUN.seed + 1)
    recording.record(alone, tmp_path, always)
    expected = recording.opened(RUN, reference).window[:, 1:]
    np.testing.assert_allclose(recording.opened(alone, tmp_path).window, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stops", [[0], [100], [300], [100, 200, 300, 400], [0, 0, 500]], ids=str)
def test_an_interrupted_run_is_the_same_run(reference, tmp_path, stops):
    for stop in stops:
        complete = recording.record(RUN, tmp_path, lambda step, stop=stop: step < stop)
        assert complete == (stop == RUN.steps)
        if not complete:
            with pytest.raises(ValueError, match="of 500 steps; call record"):
                recording.opened(RUN, tmp_path)
    seen = []
    assert recording.record(RUN, tmp_path, lambda step: seen.append(step) or True)
    assert seen == sorted(seen)
    assert contents(tmp_path) == contents(reference)


def test_a_complete_run_is_not_touched_again(reference):
    before = {path: path.stat().st_mtime_ns for path in (reference / RUN.name).iterdir()}
    assert recording.record(RUN, reference, lambda step: False)
    assert {path: path.stat().st_mtime_ns for path in (reference / RUN.name).iterdir()} == before


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from koopt.experiments import recording

    torch.set_num_threads(1)
    torch.optim.Adagrad([torch.zeros(1, requires_grad=True)]).zero_grad()  # what it imports, once for all children
    recording.SAVE = 70
    run, folder = recording.Run(**{settings}), Path(sys.argv[1])
    replace = os.replace

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def train(killed_at):
        if killed_at == "while saving":
            os.replace = die
        elif killed_at == "after saving":
            os.replace = lambda *names: (replace(*names), die())
        recording.record(run, folder, lambda step: step != killed_at or die())

    for killed_at in ("while saving", 100, 200, "while saving", "after saving", 400, 500):
        child = os.fork()
        if child == 0:
            train(killed_at)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert recording.record(run, folder, lambda step: True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_is_the_same_run(reference, tmp_path):
    script = textwrap.dedent(KILLED).replace("{settings}", repr(asdict(RUN)))
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(tmp_path)], check=True, timeout=60)
    assert contents(tmp_path) == contents(reference)


def test_files_without_a_restart_point_are_written_anew(reference, tmp_path):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / RUN.name
    (folder / "restart.pt").unlink()
    (folder / "restart.tmp").write_bytes(b"half of it")
    (folder / "loss.npy").write_bytes(b"short")
    (folder / "window.npy").unlink()
    assert recording.record(RUN, tmp_path, always)
    assert contents(tmp_path) == contents(reference)


# damage


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def shaped(path, shape, dtype=np.float64):
    np.save(path, np.zeros(shape, dtype))


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not an array"),
    "one byte short": cut,
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "magic": lambda path: flip(path, 0),
    "version": lambda path: flip(path, 6),
    "length of the header": lambda path: flip(path, 8),
    "header": lambda path: flip(path, 11),
    "header's shape": lambda path: flip(path, path.read_bytes().index(b"(") + 1),
    "first number": lambda path: flip(path, 130),
    "shape": lambda path: shaped(path, (3, 2)),
    "dtype": lambda path: shaped(path, RUN.shapes[path.stem], np.int64),
    "zeros": lambda path: shaped(path, RUN.shapes[path.stem]),
    "pickle": lambda path: np.save(path, np.array([{}]), allow_pickle=True),
    "archive": lambda path: torch.save(torch.zeros(3), path),
}


@pytest.fixture(scope="module")
def partial(tmp_path_factory):
    """RUN, stopped within the window."""
    folder = tmp_path_factory.mktemp("partial")
    assert not recording.record(RUN, folder, lambda step: step < 300)
    return folder


def refused(folder, path, message, action=lambda folder: recording.record(RUN, folder, always)):
    """One line that names the file and a remedy; nothing is changed."""
    before = {file.name: file.read_bytes() for file in (folder / RUN.name).iterdir()}
    with pytest.raises(ValueError, match=message) as error:
        action(folder)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert {file.name: file.read_bytes() for file in (folder / RUN.name).iterdir()} == before


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_arrays_are_refused(reference, partial, tmp_path, damage, name):
    for source, action in (
        (partial, lambda folder: recording.record(RUN, folder, always)),
        (reference, lambda folder: recording.opened(RUN, folder)),
        (reference, lambda folder: recording.record_all([RUN], folder, lambda *_: None)),
    ):
        folder = tmp_path / "copy"
        shutil.copytree(source, folder)
        path = folder / RUN.name / f"{name}.npy"
        damage(path)
        refused(folder, path, "is missing or damaged; delete .* to train this run again", action)
        shutil.rmtree(folder)


def test_a_byte_flipped_anywhere_in_the_last_row_is_seen(reference, tmp_path):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    path = tmp_path / RUN.name / "window.npy"
    flip(path, -1)
    refused(tmp_path, path, "damaged", lambda folder: recording.opened(RUN, folder))


RESTART_DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a restart point"),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one byte short": cut,
    "another tensor file": lambda path: torch.save(torch.zeros(3), path),
    "another dictionary": lambda path: torch.save({"step": 3}, path),
    "another run's entry": lambda path: torch.save({**torch.load(path), "run": 7}, path),
    "code": lambda path: path.write_bytes(pickle.dumps(print)),
    "code in an archive": lambda path: torch.save({"step": print}, path),
}


@pytest.mark.parametrize("damage", RESTART_DAMAGE.values(), ids=RESTART_DAMAGE)
def test_a_damaged_restart_point_is_refused(partial, tmp_path, damage):
    shutil.copytree(partial, tmp_path, dirs_exist_ok=True)
    path = tmp_path / RUN.name / "restart.pt"
    damage(path)
    refused(tmp_path, path, "restart.pt is damaged; delete .* to train this run again")


def test_a_flipped_byte_in_a_restart_point_is_refused_or_without_effect(partial, reference, tmp_path):
    size = (partial / RUN.name / "restart.pt").stat().st_size
    refusals = 0
    for place in range(0, size, size // 60):
        folder = tmp_path / str(place)
        shutil.copytree(partial, folder)
        flip(folder / RUN.name / "restart.pt", place)
        try:
            assert recording.record(RUN, folder, always)
        except ValueError as error:
            assert "restart.pt is damaged" in str(error)  # noqa: PT017
            refusals += 1
        else:  # padding, names of no meaning
            assert contents(folder) == contents(reference)
    assert refusals > 20


@pytest.mark.parametrize("change", [{"t1": 150}, {"t2": 300}], ids=str)
def test_a_recording_with_other_settings_is_refused(reference, change):
    ((name, value),) = change.items()
    other = replace(RUN, **change)
    assert other.name == RUN.name
    message = rf"was recorded with {name} = {getattr(RUN, name)}, asked for is {value}; delete it or choose"
    refused(reference, reference / RUN.name, message, lambda folder: recording.record(other, folder, always))
    refused(reference, reference / RUN.name, message, lambda folder: recording.opened(other, folder))


def test_a_missing_recording_cannot_be_opened(tmp_path):
    with pytest.raises(ValueError, match="holds 0 of 500 steps"):
        recording.opened(RUN, tmp_path)


# disk and locks

Usage = namedtuple("Usage", "total used free")


def test_no_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**9, 0, 2**20 // 4))
    needed = sum(8 * np.prod(shape) for shape in RUN.shapes.values()) / 2**20
    assert needed > 0.25
    for start in (recording.record, lambda run, folder, _: recording.record_all([run], folder, lambda *_: None)):
        with pytest.raises(OSError, match=f"{needed:.0f} MiB are needed on disk, 0 MiB are free"):
            start(RUN, tmp_path / "new" / "folder", always)
    assert not list(tmp_path.iterdir())


def test_space_that_a_killed_start_has_taken_is_not_asked_for_twice(tmp_path, reference, monkeypatch):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    whole = sum(8 * int(np.prod(shape)) for shape in RUN.shapes.values())
    assert recording.missing_bytes(RUN, tmp_path / "elsewhere") == whole
    assert recording.missing_bytes(RUN, tmp_path) == 0
    (tmp_path / RUN.name / "window.npy").unlink()
    (tmp_path / RUN.name / "restart.pt").unlink()
    window = 8 * int(np.prod(RUN.shapes["window"]))
    assert window - 3 * 4096 <= recording.missing_bytes(RUN, tmp_path) <= window
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**9, 0, window))
    assert recording.record(RUN, tmp_path, always)


def test_a_run_that_has_begun_needs_no_more_space(tmp_path, partial, reference, monkeypatch):
    shutil.copytree(partial, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**9, 0, 0))
    assert recording.record(RUN, tmp_path, always)
    assert contents(tmp_path) == contents(reference)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_disk_that_fills_up_meanwhile_is_named_and_the_run_can_start_again(tmp_path, reference, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=r"No space left on device: .*loss\.npy"):
            recording.record(RUN, tmp_path, always)
    assert recording.record(RUN, tmp_path, always)
    assert contents(tmp_path) == contents(reference)


@pytest.mark.skipif(system.fcntl is None, reason="needs file locks")
def test_two_processes_do_not_write_the_same_run(tmp_path, partial, reference):
    shutil.copytree(partial, tmp_path, dirs_exist_ok=True)
    with system.alone(tmp_path / RUN.name), pytest.raises(OSError, match="another process writes here; wait for it"):
        recording.record(RUN, tmp_path, always)
    assert recording.record(RUN, tmp_path, always)
    assert contents(tmp_path) == contents(reference)


# many runs, in worker processes

LONG = replace(RUN, steps=1_000_000, t1=0, t2=1000)
OTHER = replace(RUN, optimizer="adadelta")


def test_runs_in_workers_are_the_same_runs(reference, tmp_path):
    other = replace(RUN, optimizer="adadelta")
    told = []
    assert recording.record_all([RUN, other], tmp_path, lambda *news: told.append(news))
    assert contents(tmp_path) == contents(reference)
    assert recording.opened(other, tmp_path).loss.shape == (501, 2)
    for run in (RUN, other):
        steps = [done for name, done, total in told if name == run.optimizer]
        assert steps == sorted(steps)
        assert (steps[0], steps[-1]) == (0, run.steps)
    told.clear()
    assert recording.record_all([RUN, other], tmp_path, lambda *news: told.append(news))
    assert told == [("adagrad", 500, 500), ("adadelta", 500, 500)]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_the_workers_and_keeps_what_they_have(tmp_path, times):
    left = [signal.SIGINT] * times

    def interrupt(_, done, __):
        while done >= 200 and left:
            os.kill(os.getpid(), left.pop())

    handler = signal.getsignal(signal.SIGINT)
    assert recording.record_all([LONG], tmp_path, interrupt) is False
    assert signal.getsignal(signal.SIGINT) is handler
    assert multiprocessing.active_children() == []
    step = recording.restart_point(LONG, tmp_path)["step"]
    assert step > 200 or times == 2
    assert recording.record(LONG, tmp_path, lambda now: now < step + 100) is False


def test_a_killed_worker_is_an_error_and_the_run_goes_on_afterwards(tmp_path):
    def kill(_, done, __):
        for worker in multiprocessing.active_children() if done >= 200 else []:
            worker.kill()

    with pytest.raises(OSError, match=r"a training process was killed, .*; the same command goes on"):
        recording.record_all([LONG], tmp_path, kill)
    assert multiprocessing.active_children() == []
    assert recording.record(LONG, tmp_path, lambda step: step < 100) is False


def test_the_error_of_one_run_stops_the_others_and_is_told(tmp_path, partial):
    shutil.copytree(partial, tmp_path, dirs_exist_ok=True)
    flip(tmp_path / RUN.name / "loss.npy", 200)
    with pytest.raises(ValueError, match=r"loss\.npy is missing or damaged"):
        recording.record_all([replace(LONG, optimizer="adadelta"), RUN], tmp_path, lambda *_: None)
    assert multiprocessing.active_children() == []


def test_tasks_that_need_more_memory_than_there_is_run_one_at_a_time(tmp_path):
    told = []
    tasks = [(run.optimizer, run.steps, functools.partial(recording.record, run, tmp_path)) for run in (RUN, OTHER)]
    assert workers.run_all(tasks, lambda *news: told.append(news), nbytes=2**60)
    assert [name for name, done, total in told if done == total] == [RUN.optimizer, OTHER.optimizer]
    names = [name for name, *_ in told]
    assert names == sorted(names, key=[RUN.optimizer, OTHER.optimizer].index)
