"""What a command leaves behind: result.json, a table in the terminal, the machine it ran on."""

from __future__ import annotations

import json
import math
import os
import platform
from typing import TYPE_CHECKING, Any

import torch

from koopt.names import shortened

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

LEAST_OF_A_NAME = 20  # letters of a name that tell it from others


def machine() -> dict[str, Any]:
    """The machine and the versions that figures depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_result(
    folder: Path,
    experiment: str,
    settings: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    figures: Sequence[str],
    seconds: float | None = None,
    findings: Sequence[str] = (),
) -> Path:
    """Write ``folder/result.json`` through a temporary file; numbers that are not finite become null.

    Args:
        folder: where to; it exists.
        experiment, settings, rows, figures: as they stand in the file; figures are file names in `folder`.
        seconds: how long it ran.
        findings: what the rows say, a sentence each.

    The last two are left out of the file where they are not given.
    """
    result = {
        "experiment": experiment,
        "settings": settings,
        "machine": machine(),
        "rows": [{name: _plain(value) for name, value in row.items()} for row in rows],
        "figures": list(figures),
    }
    optional = {"seconds": seconds, "findings": list(findings)}
    result |= {name: value for name, value in optional.items() if value}
    return _write(folder, result)


def add_command(folder: Path, command: str) -> Path:
    """Say in ``folder/result.json`` what repeats the experiment."""
    return _write(folder, json.loads((folder / "result.json").read_text()) | {"command": command})


def findings(folder: Path) -> list[str]:
    """What ``folder/result.json`` says in sentences."""
    result = json.loads((folder / "result.json").read_text())
    return result.get("findings", []) + [row["finding"] for row in result["rows"] if row.get("finding")]


def _write(folder: Path, result: dict[str, Any]) -> Path:
    path = folder / "result.json"
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file through a temporary one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def print_table(console: Console, title: str, columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> None:
    """Print a table; names in the first column are shortened for the console, as far as that tells them apart.

    Nothing else is cut: a line that is too long stays so.

    Args:
        console: where to.
        title: above it.
        columns: a row's key to its heading.
        rows: values by key; other keys are left out.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    cells = [[_shown(row.get(key)) for key in columns] for row in rows]
    widths = [
        max(map(len, [*heading.split("\n"), *(line[i] for line in cells)]))
        for i, heading in enumerate(columns.values())
    ]
    most = max(LEAST_OF_A_NAME, console.width - sum(widths[1:]) - 2 * len(widths))  # and two spaces a column
    names = shortened([line[0] for line in cells], most)
    cells = [[name, *others] for name, (_, *others) in zip(names, cells, strict=True)]
    widths[0] = max(map(len, [*next(iter(columns.values())).split("\n"), *names]))
    for (key, heading), least in zip(columns.items(), widths, strict=True):
        numeric = any(isinstance(row.get(key), (int, float)) for row in rows)
        drawn.add_column(
            heading,
            justify="right" if numeric else "left",
            no_wrap=True,
            vertical="bottom",
            min_width=least,
        )
    for row, line in zip(rows, cells, strict=True):
        shown = map(Text, line)  # as they stand: brackets in names are no markup
        drawn.add_row(*shown, style="bold" if row.get("setting") == "recommended" else "")
    console.print(drawn, crop=False)


def paper_row(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The paper's own figures as a line of the same table, where one of the rows has them."""
    prefix = "paper_"
    return [
        {
            "setting": "the paper",
            "by": row["by"],
            **{k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)},
        }
        for row in rows
        if any(key.startswith(prefix) for key in row)
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "inf"
        if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
            return f"{value:.0e}"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"
    return str(value)


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
