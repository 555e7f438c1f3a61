"""The command line: one line for bad input, Ctrl-C without loss, no process left behind."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from commands import refused, run

import koopt
from koopt import cli
from koopt.experiments import methods, recording

DE_SOLVER = ("reproduce", "de-solver")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def earlier(tmp_path):
    """An output folder with earlier results."""
    folder = tmp_path / "results"
    (folder / "recordings").mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    (folder / "figure2-adam.png").write_bytes(b"picture")
    return folder


OPTIONS = {
    "unknown optimizer": (("--optimizer", "sgd"), "--optimizer is 'sgd', expected adam, adagrad, adadelta or all"),
    "no optimizer": (("--optimizer", ""), "--optimizer is '', expected"),
    "optimizer of two lines": (("--optimizer", "a\nb"), "--optimizer is 'a\\nb', expected"),
    "no seeds": (("--seeds", "0"), "--seeds is 0, expected at least 1"),
    "negative seeds": (("--seeds", "-2"), "--seeds is -2, expected at least 1"),
    "seeds not whole": (("--seeds", "2.5"), "argument --seeds: invalid int value: '2.5'"),
    "too many seeds for the disk": (("--seeds", "1000000000"), "MiB are needed on disk"),
    "too many seeds for anything": (("--seeds", "9" * 40), "the last of 999"),
    "negative seed": (("--seed", "-1"), "--seed is -1, expected 0 or more"),
    "huge seed": (
        ("--seed", "18446744073709551612"),
        "--seed is 18446744073709551612, expected 0 or more, and the last",
    ),
    "seed of 5,000 digits": (("--seed", "9" * 5000), "argument --seed: invalid int value"),
    "horizon past the data": (
        ("--horizon", "7600"),
        "--horizon is 7600, expected a multiple of 100 up to 7500: the data",
    ),
    "horizon between kept steps": (("--horizon", "1250"), "--horizon is 1250, expected a multiple of 100"),
    "negative horizon": (("--horizon", "-100"), "--horizon is -100, expected a multiple of 100"),
    "no horizon": (("--horizon", "0"), "--horizon is 0"),
    "one bad horizon": (("--horizon", "500", "--horizon", "50"), "--horizon is 50"),
    "horizon twice": (("--horizon", "500", "--horizon", "500"), "--horizon is given as 500 twice, expected different"),
    "option without a value": (("--horizon",), "argument --horizon: expected one argument"),
    "unknown option": (("--fast",), "koopt: unrecognized arguments: --fast; see koopt --help"),
    "unknown option of two lines": (("--fast\nfaster",), "unrecognized arguments: --fast faster"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS)
def test_bad_options(options, message, earlier, capsys):
    line = refused(capsys, earlier, *DE_SOLVER, "--quick", "--output", earlier, *options)
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "koopt: the following arguments are required: COMMAND; see koopt --help"),
        (
            ("reproduce",),
            "koopt reproduce: the following arguments are required: EXPERIMENT; see koopt reproduce --help",
        ),
        (("predict",), "invalid choice: 'predict'"),
        (("reproduce", "imagenet"), "invalid choice: 'imagenet'"),
    ],
    ids=str,
)
def test_bad_commands(arguments, message, tmp_path, capsys):
    assert message in refused(capsys, tmp_path, *arguments)


def test_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "deeper" / "still"):
        line = refused(capsys, tmp_path, *DE_SOLVER, "--output", output)
        assert f"--output is {output}, but {tmp_path / 'file'} is a file; choose a folder" in line


def test_output_that_cannot_be_written(earlier, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, mode: False)  # root may write anywhere
    line = refused(capsys, earlier, *DE_SOLVER, "--output", earlier)
    assert f"{earlier} cannot be written; choose another folder" in line


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_output_where_no_folder_can_be(tmp_path, capsys):
    refused(capsys, tmp_path, *DE_SOLVER, "--output", "/proc/koopt")


def test_output_with_a_name_too_long(tmp_path, capsys):
    refused(capsys, tmp_path, *DE_SOLVER, "--output", tmp_path / ("long" * 100))


def test_no_space(earlier, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**12, 10**12, 5 * 2**20))
    line = refused(capsys, earlier, *DE_SOLVER, "--output", earlier)
    assert " MiB are needed on disk, 5 MiB are free; choose another disk or fewer seeds" in line


def test_damaged_earlier_recordings(earlier, capsys):
    kept = earlier / "recordings" / methods.QUICK.run("adagrad").name
    kept.mkdir()
    (kept / "restart.pt").write_bytes(b"damaged")
    line = refused(capsys, earlier, *DE_SOLVER, "--quick", "--output", earlier)
    assert f"{kept / 'restart.pt'} is damaged; delete {kept} to train this run again" in line


def test_earlier_recordings_with_other_settings(earlier, capsys):
    asked = methods.QUICK.run("adagrad")
    other = recording.Run(asked.optimizer, asked.seeds, asked.seed, asked.steps, t1=100, t2=200)
    assert not recording.record(other, earlier / "recordings", lambda step: step < 100)
    line = refused(capsys, earlier, *DE_SOLVER, "--quick", "--output", earlier)
    assert "was recorded with t1 = 100, asked for is 17500; delete it or choose another folder" in line


def test_help_and_version(capsys):
    assert run(capsys, "--version") == (0, f"koopt {koopt.__version__}\n", "")
    for arguments, words in (
        (("--help",), ("reproduce", "rerun an experiment of the paper", "--version")),
        (("reproduce", "--help"), ("de-solver", "Table 1 and Figures 2, S5 and S6")),
        (("reproduce", "--help"), ("mnist", "perceptron", "complexity", "horizon", "one report of them")),
        (("reproduce", "mnist", "--help"), ("Section 5", "--output", "--seed", "--seeds", "--quick")),
        ((*DE_SOLVER, "--help"), ("--optimizer", "--output", "--seed", "--seeds", "--horizon", "--quick")),
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, err) == (0, "")
        assert all(word in out for word in words)


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["complexity"], "koopt reproduce complexity"),
        (["mnist", "--quick", "--seed", "7", "--output", "elsewhere"], "koopt reproduce mnist --quick --seed 7"),
        (
            ["de-solver", "--optimizer", "adam", "--horizon", "200", "--horizon", "400", "--seeds", "3"],
            "koopt reproduce de-solver --seeds 3 --optimizer adam --horizon 200 --horizon 400",
        ),
    ],
)
def test_the_command_that_is_noted_asks_for_the_same(arguments, command):
    parser = cli._parser()
    given = parser.parse_args(["reproduce", *arguments])
    assert cli._command(given.name, given) == command
    again = parser.parse_args(command.split()[1:])
    assert cli._settings(given.name, again) == cli._settings(given.name, given)


ALL = """
import sys
from koopt import cli
from koopt.experiments import complexity, de_solver, horizon_study, perceptron

if __name__ == "__main__":
    de_solver.QUICK = de_solver.Settings(
        optimizers=("adagrad",), seeds=2, steps=3200, t1=1000, t2=2400, horizons=(400,), tail=800, stride=100, rank=2,
        repeats=1,
    )
    horizon_study.QUICK = horizon_study.Settings(every=800, window=2000, networks=1)
    complexity.QUICK = complexity.Settings(
        points=3, fitted=3, layers=2, window=5, piece=4, widths=(4, 8), batches=(2, 8), horizon=7, repeats=1
    )
    perceptron.QUICK = perceptron.Settings(
        seeds=4, sizes=(6, 12), size_seeds=3, window=40, steps=90, block=5, dropped=10
    )
    sys.exit(cli.main())
"""


def test_all_goes_on_without_the_data_of_one_and_writes_the_report_of_the_others(tmp_path):
    (tmp_path / "all.py").write_text(ALL)
    (tmp_path / "nothing").mkdir()
    command = [sys.executable, "all.py", "reproduce", "all", "--quick", "--output", "out"]
    environment = os.environ | {"KOOPT_DATA": str(tmp_path / "nothing")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    assert done.stdout == "report: out/report/index.html\n"
    refusal = [line for line in done.stderr.splitlines() if line.startswith("koopt: ")]
    assert len(refusal) == 1
    assert refusal[0].startswith("koopt: mnist: KOOPT_DATA: ")
    assert "Traceback" not in done.stderr
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    for name in ("de-solver", "perceptron", "complexity", "horizon"):
        result = json.loads((tmp_path / "out" / name / "result.json").read_text())
        assert result["command"] == f"koopt reproduce {name} --quick"
        assert result["command"] in page
        assert result["seconds"] > 0
        assert result["figures"]
    assert len(list((tmp_path / "out").glob("*/recordings"))) == 1  # the horizon's are those of the solver


MISSING = """
import sys
from koopt import cli

for name in ("rich", "matplotlib"):
    sys.modules[name] = None  # as if it were not installed
    print(cli.main(["reproduce", "de-solver", "--output", sys.argv[1]]))
    del sys.modules[name]
"""


def test_packages_of_the_extra_are_named_when_missing(tmp_path):
    done = subprocess.run([sys.executable, "-c", MISSING, tmp_path / "new"], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2", "2"]
    assert done.stderr.splitlines() == [
        f"koopt: {name} is not installed; pip install 'koopt[experiments]'" for name in ("rich", "matplotlib")
    ]
    assert not list(tmp_path.iterdir())


# a command of its own, in small

SMALL = """
import sys
from koopt import cli
from koopt.experiments import de_solver

if __name__ == "__main__":
    de_solver.QUICK = de_solver.Settings(
        seeds=2, steps=2500, t1=600, t2=1000, horizons=(200, 600), tail=200, stride=50, repeats=1
    )
    sys.exit(cli.main())
"""


class Command:
    """``koopt reproduce de-solver`` with small settings, as a session of its own with all its workers."""

    def __init__(self, tmp_path, **environment):
        script = tmp_path / "small.py"
        script.write_text(SMALL)
        self.output = tmp_path / "output"
        arguments = [sys.executable, script, *DE_SOLVER, "--quick", "--optimizer", "adagrad", "--output", self.output]
        self.process = subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **environment},
        )

    def alive(self):
        """How many processes of the session live."""
        count = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has just ended
                state, _, _, session, *_ = path.read_text().rpartition(")")[2].split()
                count += int(session) == self.process.pid and state != "Z"
        return count

    def wait_until(self, condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            assert self.process.poll() is None or condition(), self.process.communicate()
            time.sleep(0.01)

    def end(self):
        """Exit code, stdout and stderr; no process of the session is left."""
        out, err = self.process.communicate(timeout=60)
        deadline = time.monotonic() + 10
        while self.alive():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return self.process.returncode, out, err

    def step(self):
        """The step at which the run would go on."""
        run = recording.Run("adagrad", seeds=2, steps=2500, t1=600, t2=1000)
        return recording.restart_point(run, self.output / "recordings")["step"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_ctrl_c_and_kill_and_going_on(tmp_path):
    interrupted = "koopt: interrupted; what is recorded stays, and the same command goes on\n"

    # Ctrl-C in a terminal reaches workers too, here while they still start; and who presses it once presses it again
    first = Command(tmp_path)
    first.wait_until(lambda: first.alive() > 2)  # the command, the tracker of shared memory, a worker
    os.killpg(first.process.pid, signal.SIGINT)
    time.sleep(0.2)
    os.killpg(first.process.pid, signal.SIGINT)
    code, out, err = first.end()
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert err.endswith(interrupted)

    # only the parent, while a worker trains
    second = Command(tmp_path)
    second.wait_until(lambda: list(second.output.glob("recordings/*/loss.npy")))
    second.process.send_signal(signal.SIGINT)
    code, out, err = second.end()
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert err.endswith(interrupted)
    assert err.count("koopt:") == 1
    begun = second.step()
    assert 0 < begun <= 2000
    assert not (second.output / "result.json").exists()

    # a parent that is killed takes its workers along
    third = Command(tmp_path)
    third.wait_until(lambda: third.step() > begun)
    third.process.kill()
    assert third.end()[0] == -signal.SIGKILL

    # and the same command goes on to the end, also in a terminal that lacks some letters
    fourth = Command(tmp_path, PYTHONIOENCODING="ascii")
    code, out, err = fourth.end()
    assert code == 0
    assert "Traceback" not in err
    assert "2500/2500" in err
    assert "Adagrad, T = 200, 2 seeds" in out
    assert "Adagrad, T = 600, 2 seeds" in out
    assert "recommended" in out
    assert out.endswith(f"figures and result.json: {fourth.output}\n")
    assert len(json.loads((fourth.output / "result.json").read_text())["rows"]) == 12


START = """
import sys

import koopt_command


class Telling:
    def find_spec(self, name, *_):
        if name == "koopt":
            sys.meta_path.remove(self)
            print("started", flush=True)


sys.meta_path.insert(0, Telling())
sys.exit(koopt_command.main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signals as on Linux")
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3])
def test_ctrl_c_while_it_starts(delay, tmp_path):
    """Importing torch takes longer than these."""
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # the background may ignore it
    command = [sys.executable, "-c", heard + START, *DE_SOLVER, "--quick", "--output", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "started\n"
        time.sleep(delay)
        child.send_signal(signal.SIGINT)
        _, error = child.communicate(timeout=60)
    assert child.returncode == 130
    assert error.startswith("koopt: interrupted")
    assert "Traceback" not in error


def test_all_refuses_settings_before_anything_is_written(tmp_path, capsys):
    line = refused(capsys, tmp_path, "reproduce", "all", "--seed", -1, "--output", tmp_path / "new")
    assert "--seed is -1, expected 0 or more" in line
