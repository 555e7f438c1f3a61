"""Progress where there is no terminal to draw bars in."""

from koopt import terminal


def test_a_log_file_tells_how_far_it_is_while_it_goes(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "EVERY", 0.0)
    with terminal.progress() as progress:
        for done in range(10):
            progress("training", done, 10)
    lines = capsys.readouterr().err.splitlines()
    shown = [word.split("/")[0] for line in lines for word in line.split() if word.endswith("/10")]
    assert [int(word) for word in shown] == [*range(10), 9]  # and once more at the end
    assert all(line.startswith("training") and "left" in line for line in lines)


def test_a_short_command_says_it_once(capsys):
    with terminal.progress() as progress:
        for done in range(4):
            progress("training", done, 3)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_nothing_is_said_of_bytes_where_no_one_sees_them(capsys):
    with terminal.progress_in_bytes() as progress:
        progress("read", 1, 2)
    assert capsys.readouterr().err == ""
