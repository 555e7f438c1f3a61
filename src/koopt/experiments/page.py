"""One page for all experiments: the paper's numbers beside ours, with a verdict on each and every figure inlined."""

from __future__ import annotations

import base64
import json
import os
import struct
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import markupsafe

import koopt
from koopt.experiments import verdicts
from koopt.experiments.sections import SECTIONS, Section
from koopt.experiments.wording import GROUPS, cell, duration, group, is_number, label, number, words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SETTINGS = {"paper": "the paper's", "recommended": "recommended", "baseline": "baseline"}
MOST_ROWS, MOST_FINDINGS = 40, 15  # longer tables and lists are folded up
MARKS = {verdicts.AGREES: "✓", verdicts.BETTER: "▲", verdicts.MISSED: "✕", verdicts.OPEN: "?"}


def write(folders: Mapping[str, Path], output: Path) -> Path:
    """Write the report: one HTML file that needs nothing beside it.

    Args:
        folders: experiment -> the folder of its ``result.json`` and figures; a result that is not there is said to be
            missing on the page.
        output: the file to write, through a temporary one; its folder is made.

    Returns:
        `output`.

    Raises:
        ValueError: if a ``result.json`` is damaged or a figure is no PNG, with the file's name; nothing is written.
        OSError: if a file cannot be read or written.
    """
    names = [*SECTIONS, *(name for name in folders if name not in SECTIONS)]
    sections = [_section(name, read(folders[name]) if name in folders else None) for name in names]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["typeset"] = _typeset
    claims = [claim for section in sections for claim in section["claims"]]
    page = environment.get_template("page.html").render(
        sections=sections,
        counts=Counter(claim.verdict for claim in claims),
        best_counts=Counter(claim.best_verdict for claim in claims if claim.best_verdict),
        marks=MARKS,
        most_findings=MOST_FINDINGS,
        band=f"{100 * verdicts.BAND:.0f} %",
        version=koopt.__version__,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, output)
    return output


def read(folder: Path) -> dict[str, Any] | None:
    """A checked ``result.json``, its "figures" as (name, width, height, data URI); None where there is none.

    Args:
        folder: of one experiment.

    Raises:
        ValueError: if the file is damaged or a figure is no PNG, with the file's name.
    """
    path = folder / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as damage:
        raise ValueError(f"{path} is damaged ({damage}); delete it and run the experiment again") from None
    if complaint := _complaint(result):
        raise ValueError(f"{path} is damaged ({complaint}); delete it and run the experiment again")
    return result | {"figures": [_picture(folder / name) for name in result["figures"]]}


def _section(name: str, result: dict[str, Any] | None) -> dict[str, Any]:
    """All that the template shows of one experiment."""
    known = SECTIONS.get(name, Section(words(name).capitalize(), "not in the paper", ""))
    command = f"koopt reproduce {name}"
    section = {"name": name, "known": known, "found": result is not None, "claims": [], "command": command}
    if result is None:
        return section | {"tally": ""}
    command = result.get("command") or command
    rows = result["rows"]
    stated = [(text, "") for text in result.get("findings") or []]
    stated += [(row["finding"], str(row.get("verdict") or "")) for row in rows if isinstance(row.get("finding"), str)]
    tally = Counter(said for _, said in stated if said)
    seconds = result.get("seconds")
    return section | {
        "command": command,
        "quick": "--quick" in command.split(),
        "claims": verdicts.claims(rows),
        "findings": [
            (text, {"holds": verdicts.AGREES, "fails": verdicts.MISSED}.get(said, "")) for text, said in stated
        ],
        "tally": ", ".join(f"{count} {_plural(said)}" for said, count in sorted(tally.items())),
        "tables": _tables(known, [row for row in rows if "finding" not in row]),
        "figures": [(_caption(known, title), *rest) for title, *rest in result["figures"]],
        "machine": _machine(result["machine"]),
        "seconds": None if seconds is None else duration(seconds),
        "settings": {words(key): _setting(value) for key, value in result["settings"].items()},
    }


def _tables(known: Section, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Title, headings, and groups of rows that follow each other and were measured on the same."""
    kinds = [str(row.get("kind") or row.get("study") or "") for row in rows]
    tables = []
    for kind in dict.fromkeys(kinds):
        listed = [row for row, other in zip(rows, kinds, strict=True) if other == kind]
        if known.tables and kind not in known.tables:
            continue
        title, chosen = known.tables.get(kind, (words(kind).capitalize(), {}))
        labelled = any(row.get("method") for row in listed)
        columns = _columns(listed, chosen, labelled)
        if not columns:
            continue
        groups: list[tuple[str, list[dict[str, Any]]]] = []
        for row in listed:
            about = ", ".join(group(row))
            if not groups or groups[-1][0] != about:
                groups.append((about, []))
            cells = [_cell(row, key) for key in columns]
            setting = row.get("setting")
            shown = {
                "label": label(row) if labelled else None,
                "tag": SETTINGS.get(str(setting), setting),
                "cells": cells,
            }
            groups[-1][1].append(shown | {"best": setting == "recommended"})
        headings = [(heading, any(is_number(row.get(key)) for row in listed)) for key, heading in columns.items()]
        long = len(listed) if len(listed) > MOST_ROWS else 0
        tables.append({"title": title, "labelled": labelled, "headings": headings, "groups": groups, "long": long})
    return tables


def _columns(rows: Sequence[dict[str, Any]], chosen: Mapping[str, str], labelled: bool) -> dict[str, str]:
    """The chosen columns that rows have; whatever they have if that is none."""
    there = {key.removeprefix("paper_"): None for row in rows for key, value in row.items() if value is not None}
    if columns := {key: heading for key, heading in chosen.items() if key in there}:
        return columns
    elsewhere = {"kind", "study", *GROUPS, *(("method", "by", "setting") if labelled else ())}
    ranges = {f"{key}{end}" for key in there for end in ("_low", "_high")}
    return {key: words(key) for key in there if key not in elsewhere | ranges}


def _cell(row: dict[str, Any], key: str) -> dict[str, Any]:
    value, paper = row.get(key), row.get(f"paper_{key}")
    bound = verdicts.is_bound(row, key)
    judged = key in verdicts.claimed(row)
    return {
        "text": cell(key, value, bound),
        "paper": "" if paper is None else cell(key, paper),
        "verdict": verdicts.verdict(key, value, *verdicts.paper_value(row, key), bound) if judged else "",
    }


def _caption(known: Section, name: str) -> str:
    stem = Path(name).stem
    starts = sorted((start for start in known.captions if stem.startswith(start)), key=len)
    return known.captions[starts[-1]] if starts else words(stem)[:1].upper() + words(stem)[1:] + "."


def _machine(machine: Mapping[str, Any]) -> str:
    forms = {"cores": "{} cores", "python": "Python {}", "torch": "torch {}"}
    return ", ".join(forms.get(key, "{}").format(value) for key, value in machine.items())


def _plural(verdict: str) -> str:
    return {"holds": "hold", "fails": "fail"}.get(verdict, verdict)


def _setting(value: Any) -> str:
    return ", ".join(_setting(v) for v in value) if isinstance(value, list) else number(value)


def _typeset(text: str) -> markupsafe.Markup:
    """The paper's symbol with its subscript, everything else escaped."""
    return markupsafe.Markup("<i>T</i><sub>eq</sub>").join(markupsafe.escape(part) for part in text.split("T_eq"))


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _complaint(result: Any) -> str:
    """What is wrong with a parsed result, or nothing."""
    if not isinstance(result, dict):
        return f"it holds a {type(result).__name__}, expected an object"
    for key, kind in {"settings": dict, "machine": dict, "rows": list, "figures": list}.items():
        if not isinstance(result.get(key), kind):
            return f"{key!r} is missing or no {kind.__name__}"
    if not all(isinstance(row, dict) for row in result["rows"]):
        return "'rows' holds something that is no object"
    if not all(isinstance(name, str) and name and Path(name).name == name for name in result["figures"]):
        return "'figures' holds something that is no file name"
    findings = result.get("findings") or []
    if not (isinstance(findings, list) and all(isinstance(text, str) for text in findings)):
        return "'findings' is no list of sentences"
    seconds = result.get("seconds")
    if not (seconds is None or (is_number(seconds) and seconds >= 0)):
        return "'seconds' is no number >= 0"
    return "" if isinstance(result.get("command") or "", str) else "'command' is no text"


def _picture(path: Path) -> tuple[str, int, int, str]:
    """A figure as its name, width, height and data URI, which is empty where the file is missing."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return path.name, 0, 0, ""
    if len(data) < 24 or not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"{path} is damaged (no PNG); delete it and run the experiment again")
    width, height = struct.unpack(">II", data[16:24])
    return path.name, width, height, "data:image/png;base64," + base64.b64encode(data).decode()
