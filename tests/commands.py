"""Commands of koopt, run in this process."""

from koopt import cli


def run(capsys, *arguments):
    """Exit code, stdout and stderr."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(capsys, folder, *arguments):
    """The one line of a refusal that changes no file."""
    before = contents(folder)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("koopt")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert contents(folder) == before
    return err
