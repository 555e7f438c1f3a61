"""Progress where there is no terminal to draw bars in."""

from rich.console import Console

from koopt import report, terminal


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


LONG = "base_model.model.transformer.{}.layers.{}.self_attention.query_key_value_projection"


def printed(rows, width, capsys):
    columns = {"group": "group", "method": "method", **{f"number{i}": f"a number\nof {i}" for i in range(8)}}
    report.print_table(Console(width=width), "", columns, rows)
    return [line.split() for line in capsys.readouterr().out.splitlines() if "koopman" in line]


def test_long_names_are_shortened_and_numbers_never_cut(capsys):
    """Even where names have no room left."""
    names = [LONG.format(part, i) for part in ("encoder", "decoder") for i in range(12)]
    numbers = {f"number{i}": 0.123 + i for i in range(8)}
    for width in (60, 130):
        lines = printed([{"group": name, "method": "koopman", **numbers} for name in names], width, capsys)
        assert [line[2:] for line in lines] == [[f"{value:.3f}" for value in numbers.values()]] * len(names)
        assert len({line[0] for line in lines}) == len(names)
        assert all(report.LEAST_OF_A_NAME <= len(line[0]) < len(names[0]) for line in lines)
    assert sum(map(len, lines[0])) + 2 * len(lines[0]) <= 130


def test_names_that_look_like_markup_are_printed_as_they_are(capsys):
    assert printed([{"group": "blk[/red][bold]", "method": "koopman"}], 100, capsys)[0][0] == "blk[/red][bold]"


def test_a_pipe_has_room_for_more_than_a_window(capsys):
    assert terminal.wide_console().width >= terminal.PIPED
