"""`koopt forecast` and `koopt spectrum`: bad input is one line and exit code 2, nothing is written, inputs stay."""

import errno
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import contents, refused, run
from safetensors.torch import load_file, save_file

import koopt
from koopt import cli
from koopt.checkpoint import command, writing
from koopt.checkpoint.spectrum import spectrum_of
from koopt.forecasters import METHODS

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import checkpoint_fuzz as fuzz

SCRIPT = "import sys; from koopt.cli import main; sys.exit(main())"


def state(t, **more):
    return {
        "a.weight": torch.full((2, 3), 1.0 + 0.5**t),
        "a.bias": torch.arange(2.0) * t,
        "count": torch.tensor(t),
    } | more


@pytest.fixture
def paths(tmp_path):
    """Four sound checkpoints in a folder of their own."""
    (tmp_path / "in").mkdir()
    made = [tmp_path / "in" / f"step_{10 * t}.safetensors" for t in range(1, 5)]
    for t, path in enumerate(made):
        save_file(state(t), path)
    return made


def rewrite(path, **changed):
    """The same checkpoint with other tensors; None leaves one out."""
    held = load_file(path) | changed
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


BAD = {
    "missing": (lambda p: p[1].unlink(), "{1}: no such file or folder"),
    "empty": (lambda p: p[1].write_bytes(b""), "{1}: not a safetensors file, or truncated: 0 bytes"),
    "truncated": (lambda p: p[1].write_bytes(p[1].read_bytes()[:-5]), "{1}: truncated, tensor 'a.weight' ends 5 bytes"),
    "too long": (lambda p: p[1].write_bytes(p[1].read_bytes() + b"x"), "{1}: damaged, 1 bytes after the last tensor"),
    "lacks a tensor": (lambda p: rewrite(p[1], **{"a.bias": None}), "{1}: tensor 'a.bias' of {3} is missing"),
    "another tensor": (lambda p: rewrite(p[1], extra=torch.ones(1)), "{1}: tensor 'extra' is not in {3}"),
    "another shape": (
        lambda p: rewrite(p[1], **{"a.bias": torch.ones(3)}),
        "{1}: tensor 'a.bias' has shape (3,), in {3} (2,)",
    ),
    "another dtype": (
        lambda p: rewrite(p[1], **{"a.bias": torch.ones(2, dtype=torch.float16)}),
        "{1}: tensor 'a.bias' has dtype float16, in {3} float32",
    ),
    "NaN": (
        lambda p: rewrite(p[1], **{"a.bias": torch.tensor([1.0, torch.nan])}),
        "{1}: tensor 'a.bias' holds NaN or Inf",
    ),
    "Inf in the last": (
        lambda p: rewrite(p[3], **{"a.bias": torch.tensor([1.0, torch.inf])}),
        "{3}: tensor 'a.bias' holds",
    ),
    "float8": (
        lambda p: [rewrite(q, x=torch.ones(2).to(torch.float8_e4m3fn)) for q in p],
        "{0}: tensor 'x' is float8_e4m3fn, only float16",
    ),
    "complex": (lambda p: [rewrite(q, x=torch.ones(2) + 1j) for q in p], "tensor 'x' is complex64"),
    "nothing moves": (lambda p: [q.write_bytes(p[0].read_bytes()) for q in p], "no tensor differs"),
    "overflow": (
        lambda p: [rewrite(q, x=torch.tensor([6e4 * 0.5 ** (3 - i)]).half()) for i, q in enumerate(p)],
        "the forecast of tensor 'x' is not finite in float16",
    ),
    "too large to square": (
        lambda p: [rewrite(q, x=torch.tensor([10.0 ** (200 + i)], dtype=torch.float64)) for i, q in enumerate(p)],
        "tensor 'x' has numbers too large to square",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD)
def test_bad_checkpoints(damage, message, paths, tmp_path, capsys):
    damage(paths)
    line = refused(
        capsys, tmp_path, "forecast", *paths, "--ahead", 20, "-o", tmp_path / "out.safetensors", "--difference"
    )
    assert message.format(*paths) in line


OPTIONS = {
    "ahead": (("--ahead", "-1"), "ahead is -1.0, expected optimizer steps >= 0"),
    "ahead is nan": (("--ahead", "nan"), "ahead is nan"),
    "no limit": (("--ahead", "inf", "--method", "line"), "ahead is inf, but line has no limit"),
    "method": (("--method", "magic"), "method is 'magic', expected one of koopman"),
    "of another method": (
        ("--method", "line", "--rank", "2"),
        'rank is not an option of method "line", which takes span',
    ),
    "rank": (("--rank", "0"), "rank is 0, expected a whole number >= 1"),
    "rtol": (("--rtol", "2"), "rtol is 2.0, expected 0 <= rtol < 1"),
    "by": (("--by", "weight"), "by is 'weight', expected network, layer, node"),
    "steps": (("--steps", "1,2"), "--steps: 2 for 4 checkpoints"),
    "steps no numbers": (("--steps", "1,b"), "--steps is '1,b', expected numbers with commas"),
    "same steps": (("--steps", "1,2,2,3"), "step 2 is that of"),
    "infinite step": (("--steps", "1,2,3,inf"), "inf is not a step"),
    "uneven": (("--steps", "1,2,3,100"), "run from 1 to 97, too uneven for an operator"),
    "nothing let in": (("--include", "z*"), "no floating-point tensor of 3 is let in"),
    "no such place": (("-o", "nowhere/out.safetensors"), "nowhere: no such folder to write out.safetensors to"),
    "other kind": (("-o", "out.pt"), "end its name with .safetensors"),
}


@pytest.mark.parametrize("command", [(), ("--dry-run",)], ids=["forecast", "dry run"])
@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS)
def test_bad_options(options, message, command, paths, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ("forecast", *paths, "--ahead", "5", "-o", tmp_path / "out.safetensors", *options, *command)
    assert message in refused(capsys, tmp_path, *given)


def test_an_output_that_is_an_input(paths, tmp_path, capsys):
    (tmp_path / "link.safetensors").symlink_to(paths[2])
    for output in (paths[0], paths[3].parent / "../in/step_20.safetensors", tmp_path / "link.safetensors"):
        line = refused(capsys, tmp_path, "forecast", *paths, "--ahead", 5, "-o", output)
        assert "this output is an input" in line


@pytest.mark.parametrize("command", [(), ("--dry-run",)], ids=["forecast", "dry run"])
def test_a_file_that_exists_is_replaced_only_by_force(command, paths, tmp_path, capsys):
    output, broken = tmp_path / "out.safetensors", tmp_path / "broken.safetensors"
    output.write_bytes(b"mine")
    broken.symlink_to("nowhere")
    for place in (output, broken):
        given = ("forecast", *paths, "--ahead", 5, "-o", place)
        assert f"{place}: exists already; choose another name" in refused(capsys, tmp_path, *given, *command)
        assert run(capsys, *given, *command, "--force")[0] == 0
    if command:
        assert (output.read_bytes(), broken.is_symlink()) == (b"mine", True)
    else:
        assert load_file(output).keys() == load_file(broken).keys() == state(0).keys()
    assert "is an input" in refused(capsys, tmp_path, "forecast", *paths, "--ahead", 5, "-o", paths[0], "--force")


@pytest.mark.parametrize("force", [(), ("--force",)], ids=str)
def test_an_output_that_is_a_link_to_itself(force, paths, tmp_path, capsys):
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    line = refused(capsys, tmp_path, "forecast", *paths, "--ahead", 5, "-o", loop, *force)
    assert f"{loop}: " in line
    assert "choose another name" in line


@pytest.mark.parametrize("place", ["", "/inner", "/..", "/../other"])
def test_folders_in_the_way(place, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    folders = [tmp_path / "runs" / f"checkpoint-{t}" for t in range(3)]
    for t, folder in enumerate(folders):
        fuzz.save_folder(folder, state(t))
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / "notes").touch()
    line = refused(capsys, tmp_path, "forecast", *folders, "--ahead", 1, "-o", f"{folders[2]}{place}")
    assert "this output" in line or "exists already" in line


def test_a_pickle_that_would_run_code(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for t in range(3):
        torch.save(state(t) | ({"evil": Evil()} if t == 1 else {}), tmp_path / f"step_{t}.pt")
    line = refused(capsys, tmp_path, "forecast", *sorted(tmp_path.glob("*.pt")), "--ahead", 5, "-o", "out.pt")
    assert "step_1.pt: not loaded, since it holds more than plain tensors (GLOBAL posix.mkdir)" in line
    assert not (tmp_path / "pwned").exists()


OTHER_PICKLES = {
    "a list": ([torch.ones(2)], "holds a list, expected a state dict"),
    "no tensors": ({"lr": 0.1}, "no tensors by name"),
    "numbered": ({1: torch.ones(2)}, "named by something other than strings"),
    "two state dicts": (
        {"model": {"w": torch.ones(2)}, "state_dict": {"w": torch.ones(2)}},
        "tensors under 'state_dict' and under 'model'; save one state dict",
    ),
    "weights under another key": (
        {"net": {"w": torch.ones(2)}, "loss": torch.ones(())},
        "tensors at the top and a dict under 'net'; save the state dict alone or under 'model'",
    ),
    "weights deeper": (
        {"model": {"encoder": {"w": torch.ones(2)}}, "loss": torch.ones(())},
        "tensors at the top and a dict under 'model'",
    ),
    "part of a tensor": ({"w": torch.arange(9.0).view(3, 3)[:, 1:]}, "tensor 'w' is not a whole strided tensor"),
    "sparse": ({"w": torch.eye(3).to_sparse()}, "tensor 'w' is not a whole strided tensor"),
}


@pytest.mark.parametrize(("held", "message"), OTHER_PICKLES.values(), ids=OTHER_PICKLES)
def test_other_pickles(held, message, tmp_path, capsys):
    for t in range(3):
        torch.save(held, tmp_path / f"step_{t}.pt")
    given = sorted(tmp_path.glob("*.pt"))
    assert message in refused(capsys, tmp_path, "forecast", *given, "--ahead", 5, "-o", tmp_path / "out.pt")


def tied(t, ties=True):
    """Weights of which two are one tensor, or not."""
    weight = torch.full((2, 3), 1.0 + 0.5**t)
    return {"fc1.weight": weight, "fc2.weight": weight * 2, "head.weight": weight if ties else weight.clone()}


@pytest.mark.parametrize(
    "options", [("--exclude", "head.weight"), ("--exclude", "fc1.*"), ("--include", "fc*")], ids=str
)
def test_one_of_tied_tensors_is_not_left_out(options, tmp_path, capsys):
    for t in range(4):
        torch.save(tied(t), tmp_path / f"step_{t}.pt")
    given = ("forecast", *sorted(tmp_path.glob("*.pt")), "--ahead", 5, "-o", tmp_path / "out.pt")
    line = refused(capsys, tmp_path, *given, *options)
    assert "is left out, but tied to" in line
    assert "they are one; let in or leave out both" in line
    assert run(capsys, *given, "--exclude", "head.weight", "--exclude", "fc1.*")[0] == 0
    assert torch.equal(torch.load(tmp_path / "out.pt")["head.weight"], tied(3)["head.weight"])


def test_tensors_that_were_tied_later(tmp_path, capsys):
    for t in range(4):
        torch.save(tied(t, ties=t > 1), tmp_path / f"step_{t}.pt")
    given = ("forecast", *sorted(tmp_path.glob("*.pt")), "--ahead", 5, "-o", tmp_path / "out.pt")
    line = refused(capsys, tmp_path, *given)
    assert f"step_0.pt: tensor 'head.weight' is one of its own, in {tmp_path / 'step_3.pt'} it is tied to" in line


def test_tensors_that_were_tied_earlier(tmp_path, capsys):
    for t in range(4):
        torch.save(tied(t, ties=t < 2), tmp_path / f"step_{t}.pt")
    given = ("forecast", *sorted(tmp_path.glob("*.pt")), "--ahead", 1, "-o", tmp_path / "out.pt", "--difference")
    assert run(capsys, *given)[0] == 0
    for name, tensor in torch.load(tmp_path / "out.pt").items():
        torch.testing.assert_close(tensor, tied(4)[name], rtol=1e-5, atol=1e-5)


def test_the_format_before_zip(tmp_path, capsys):
    for t in range(3):
        torch.save(state(t), tmp_path / f"step_{t}.pt", _use_new_zipfile_serialization=False)
    given = sorted(tmp_path.glob("*.pt"))
    line = refused(capsys, tmp_path, "forecast", *given, "--ahead", 5, "-o", tmp_path / "out.pt")
    assert "not what torch.save writes since 1.6" in line


def test_one_checkpoint_is_not_enough(paths, tmp_path, capsys):
    line = refused(capsys, tmp_path, "forecast", paths[0], "--ahead", 5, "-o", tmp_path / "out.safetensors")
    assert "koopman needs at least 2 checkpoints, got 1" in line
    for method in METHODS:
        line = refused(capsys, tmp_path, "forecast", *paths[:2], "--ahead", 5, "--holdout", "--method", method)
        assert f"{method} needs at least {4 if method == 'ensemble' else 2} checkpoints and one held out, got 2" in line


def test_where_to_is_asked_for(paths, tmp_path, capsys):
    assert "--output is missing" in refused(capsys, tmp_path, "forecast", *paths, "--ahead", 5)


@pytest.mark.parametrize("method", ["koopman", "line"])
def test_a_full_disk(method, paths, tmp_path, capsys, monkeypatch):
    """Found by the free space, at reserving it, or by a write."""
    given = ("forecast", *paths, "--ahead", 5, "-o", tmp_path / "out.safetensors", "--method", method)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(writing.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 3})())
        assert "0 MiB are free" in refused(capsys, tmp_path, *given)
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        assert "No space left on device" in refused(capsys, tmp_path, *given)
    with monkeypatch.context() as patched:
        patched.setattr(writing, "write_fully", full)
        assert "No space left on device" in refused(capsys, tmp_path, *given)
    assert run(capsys, *given)[0] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="signals as on Linux")
@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM"), (signal.SIGHUP, "ended by SIGHUP")],
)
def test_an_early_end_leaves_nothing(number, said, tmp_path):
    """In the middle of a pass that waits for a pipe's worth of work."""
    (tmp_path / "in").mkdir()
    given = [str(tmp_path / "in" / f"step_{t}.safetensors") for t in range(4)]
    for t, path in enumerate(given):
        save_file(state(t), path)
    slow = (
        "import time; from koopt.checkpoint import writing; old = writing.write\n"
        "def write(*a): print('writing', flush=True); time.sleep(5); old(*a)\n"
        "writing.write = write\n"
    )
    heard = (  # background jobs may ignore the one, and what nohup starts the other
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    )
    command = [sys.executable, "-c", heard + slow + SCRIPT, "forecast", *given, "--ahead", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "-o", str(tmp_path / "out.safetensors")], **pipes) as child:
        assert child.stdout.readline().startswith("writing")  # two threads may print at once
        child.send_signal(number)
        _, error = child.communicate(timeout=60)
    assert (child.returncode, error) == (128 + number, f"koopt: {said}; nothing was written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_nohup_ignores_stays_ignored(paths, tmp_path, capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        told = []

        def tell(*_):
            told.append(os.kill(os.getpid(), signal.SIGHUP))

        with command._one_line():
            koopt.forecast_checkpoints(paths, 5, tmp_path / "out.safetensors", progress=tell)
        assert told
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.skipif(sys.platform != "linux", reason="closes what a shell does")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed, paths, tmp_path):
    """Nothing of what is printed gets into a file that takes the place of a stream."""
    given = [*map(str, paths), "--ahead", "5", "-o", str(tmp_path / "out.safetensors"), "--holdout"]
    line = shlex.join([sys.executable, "-c", SCRIPT, "forecast", *given])
    done = subprocess.run(["sh", "-c", f"{line} {closed}"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_file(tmp_path / "out.safetensors").keys() == state(0).keys()
    for path, t in zip(paths, range(4), strict=True):
        assert load_file(path)["count"] == t


def test_a_tensor_whose_name_looks_like_markup(tmp_path, capsys):
    for t in range(4):
        save_file({"blk[/red].weight": torch.full((2, 3), 1.0 + 0.5**t)}, tmp_path / f"step_{t}.safetensors")
    given = sorted(tmp_path.glob("*.safetensors"))
    for words in (("forecast", *given, "--ahead", 1, "--holdout", "--by", "layer"), ("spectrum", *given)):
        code, out, err = run(capsys, *words, *(("--output", tmp_path / "out") if words[0] == "spectrum" else ()))
        assert (code, err) == (0, "")
        assert "blk[/red]" in out


def test_forecast_prints_what_it_did(paths, tmp_path, capsys):
    report = tmp_path / "report"
    output = tmp_path / "out.safetensors"
    given = ("forecast", *paths, "--ahead", 10, "-o", output, "--holdout", "--by", "layer", "--report", report)
    code, out, err = run(capsys, *given)
    assert (code, err) == (0, "")
    assert "last one held out" in out
    assert f"forecast of step 50: {output}" in out
    result = json.loads((report / "result.json").read_text())
    assert result["experiment"] == "forecast"
    assert [row["group"] for row in result["rows"]] == ["a"]
    assert 0 < result["rows"][0]["error"] < result["rows"][0]["error_mean"]
    assert load_file(output)["count"] == 3


@pytest.mark.parametrize(("method", "worse"), [("mean", True), ("line", False)])
def test_a_held_out_error_above_one_is_said(method, worse, tmp_path, capsys):
    """On a straight line the mean lags behind; of two layers one stands nearly still."""
    for t in range(5):
        weights = {"a.weight": torch.full((3,), 1.0 + t), "b.weight": torch.full((3,), 1.0 + 1e-3 * t)}
        save_file(weights, tmp_path / f"step_{t}.safetensors")
    given = ("forecast", *sorted(tmp_path.iterdir()), "--ahead", 1, "--holdout", "--by", "layer", "--method", method)
    code, out, _ = run(capsys, *given)
    assert code == 0
    line = "koopt above 1: worse than the last checkpoint as it is; try --difference or --method line\n"
    assert (line in out) is worse


def test_dry_run_writes_nothing(paths, tmp_path, capsys):
    before = contents(tmp_path)
    code, out, _ = run(capsys, "forecast", *paths, "--ahead", 10, "-o", tmp_path / "out.safetensors", "--dry-run")
    assert code == 0
    assert "forecast 8 numbers in 2 tensors, 1 operator by network, koopman, to step 50" in out
    assert "copy 1 other tensors from the last" in out
    assert contents(tmp_path) == before


def test_a_reader_that_has_seen_enough_is_no_error(paths, tmp_path):
    """As head is: the pipe is closed before anything is printed."""
    reading, writing_end = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "import sys; from koopt.cli import main; sys.exit(main())", "spectrum"]
    with os.fdopen(writing_end, "w") as closed:
        done = subprocess.run(
            [*command, *map(str, paths), "--output", str(tmp_path / "out")],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert (done.returncode, done.stderr) == (1, "")


def test_spectrum_prints_and_draws(paths, tmp_path, capsys):
    code, out, err = run(capsys, "spectrum", *paths, "--output", tmp_path / "spectrum", "--difference", "--rank", 1)
    assert (code, err) == (0, "")
    assert "half-life" in out
    assert (tmp_path / "spectrum" / "spectrum.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "spectrum" / "result.json").read_text())
    assert (result["experiment"], result["figures"]) == ("spectrum", ["spectrum.png"])
    assert {"group", "real", "imaginary", "half_life", "residual"} <= result["rows"][0].keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--by", "node"), "by is 'node', expected layer or network"), (("--rank", "0"), "rank is 0")],
)
def test_spectrum_refuses(options, message, paths, tmp_path, capsys):
    assert message in refused(capsys, tmp_path, "spectrum", *paths, "--output", tmp_path / "out", *options)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_two_thousand_damaged_files(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_parser", functools.cache(cli._parser))  # building it would take a third of the time
    sound = fuzz.make(tmp_path)
    codes = [fuzz.trial(sound, kind, seed, fuzz.run) for seed in range(500)]
    assert 0 < codes.count(0) < 250


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("command", [functools.partial(koopt.forecast_checkpoints, ahead=5), spectrum_of])
def test_patterns_must_be_several(command, option, paths):
    with pytest.raises(TypeError, match=rf"{option} is 'a.\*', expected several patterns; pass \['a.\*'\]"):
        command(paths, **{option: "a.*"})


def test_paths_must_be_several(tmp_path):
    with pytest.raises(ValueError, match="expected at least two checkpoints, got"):
        koopt.forecast_checkpoints(str(tmp_path), 5, method="mean")
