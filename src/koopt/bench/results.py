"""What a benchmark says: rows of result.json, tables for the terminal, sentences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from koopt.bench import statistics
from koopt.bench.protocol import BASELINE, SHARES, TUNING, overall

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from koopt.bench.protocol import Outcome
    from koopt.bench.run import Record

COSINE = "cosine"  # the tuned optimizer with this schedule
WORSE = 1.02  # times the final loss of the same seed of the plain optimizer
MEASURES = ("steps", "cost", "seconds")  # each as a share of what the baseline spends in all


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    """All rows of a task: "table" tells to which they belong, "targets", "cosine", "ratios" or "search"."""
    return [*_targets(outcome), *_to_cosine(outcome), *_ratios(outcome), *_searched(outcome)]


def measure_of(outcome: Outcome) -> str:
    """What targets are read in: steps where training is noisy, cost where each step sees all data."""
    return "cost" if outcome.task.full_batch else "steps"


def spent(outcome: Outcome, measure: str) -> float:
    """What the baseline spends in all: steps, or the median of its seconds."""
    if measure != "seconds":
        return outcome.task.steps
    return statistics.median([record.curve.seconds[-1] for record in outcome.records[BASELINE].values()])


def shares(outcome: Outcome, method: str, target: float, measure: str) -> dict[int, float]:
    """Of the budget until a target, by seed; inf where it is not reached."""
    whole = spent(outcome, measure)
    return {
        seed: statistics.crossing(getattr(record.curve, measure), record.curve.loss, target) / whole
        for seed, record in outcome.records[method].items()
    }


def tables(found: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, str], list[dict[str, Any]]]]:
    """For the terminal, task by task: title, headings by key, lines."""
    drawn = []
    for task in dict.fromkeys(row["task"] for row in found):
        own = [row for row in found if row["task"] == task]
        targets = [row for row in own if row["table"] == "targets"]
        if not targets:
            continue
        measure = targets[0]["measure"]
        lines = [_line([row for row in targets if row["method"] == m], measure) for m in _methods(targets)]
        title = f"{task}: {measure} to the tuned optimizer's losses, as a share of its own, 95 % interval"
        drawn.append((title, _headings(targets), lines))
        cosine = [row for row in own if row["table"] == "cosine"]
        if cosine:
            title = (
                f"{task}: to {cosine[0]['target_loss']:.3g}, the tuned optimizer's final loss with a cosine schedule"
            )
            drawn.append((title, TO_COSINE, [_to_one(row, measure) for row in cosine]))
        ratios = [row for row in own if row["table"] == "ratios" and row["method"] == "koopt"]
        if ratios:
            compared = [_compared([row for row in ratios if row["against"] == a], measure) for a in _against(ratios)]
            headings = {"against": "koopt against"} | {f"at_{share:g}": f"{share:.0%}" for share in SHARES}
            drawn.append((f"{task}: koopt's {measure} over those of another", headings, compared))
        chosen = [
            {"method": row["method"], "tried": row["tried"], "setting": row["setting"]}
            for row in targets
            if row["target"] == SHARES[0]
        ]
        drawn.append((f"{task}: settings, chosen on other seeds", CHOSEN, chosen))
    return drawn


def markdown(found: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """The rows of one task as a table to publish.

    Args:
        found: rows of result.json.
        titles: what methods are called; those that are not in it by their names.
    """
    targets = [row for row in found if row["table"] == "targets"]
    ends = {row["method"]: row for row in found if row["table"] == "cosine"}
    headings = ["method", *(f"{share:.0%}" for share in SHARES), "reach the last"]
    headings += ["end of a cosine"] if ends else []
    headings += ["CPU to the last", "final loss", "test", "> 2 % worse"]
    lines = [headings, ["---"] * len(headings)]
    for method in _methods(targets):
        own = [row for row in targets if row["method"] == method]
        last, name = own[-1], f"{own[-1]['measure']}_share"
        line = [titles.get(method) or method, *(_published(row, name) for row in own)]
        line += [f"{last['reached']}/{last['seeds']}", *([_published(ends[method], name)] if ends else ())]
        line += [_number(last["seconds_share"]), f"{last['final_loss']:.3g}", f"{last['test_loss']:.3g}"]
        without = "" if last["worse_than_without"] is None else f"; {last['worse_than_without']}"
        lines.append([*line, f"{last['worse']}{without}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TO_COSINE = {"method": "method", "share": "share of its cost", "seconds": "share of its CPU", "reached": "reached"}
CHOSEN = {"method": "method", "tried": "tried", "setting": "setting"}


def findings(outcome: Outcome, seeds: int) -> list[str]:
    """What has to be known beside the rows, where so many seeds were asked for."""
    found = [f"failed and left out: {message}" for message in outcome.failed.values()]
    short = {m: len(outcome.records.get(m, ())) for m in outcome.search if m not in outcome.failed}
    short = {method: there for method, there in short.items() if there < seeds}
    if short:
        counts = ", ".join(f"{method} {there}" for method, there in short.items())
        found.append(f"{outcome.task.name}: not complete, of {seeds} seeds there are: {counts}")
    for method, without in outcome.without.items():
        worse = _worse_than_without(outcome, method)
        if worse is None:  # it was asked for, but has no runs yet
            continue
        both = len(outcome.records[method].keys() & without.keys())
        counts = f"{worse} of {both} seeds of {method}"
        found.append(f"{outcome.task.name}: {counts} end more than 2 % above the same run without it")
    if outcome.outdated:
        found.append(
            f"{outcome.task.name}: some trials were made before {', '.join(sorted(outcome.outdated))} changed; "
            "delete their files in trials/ to make them again"
        )
    return found


def _targets(outcome: Outcome) -> list[dict[str, Any]]:
    plain, found = outcome.records.get(BASELINE, {}), []
    for method, records in outcome.records.items() if outcome.targets else ():
        search = outcome.search[method]
        both = [seed for seed in records if seed in plain]
        relative = [over(records[seed], plain[seed]) for seed in both]
        ends = {
            "final_loss": statistics.median([record.final for record in records.values()]),
            "test_loss": statistics.median([math.inf if r.test is None else r.test for r in records.values()]),
            "final_over_plain": statistics.median(relative) if both else None,
            "worse": sum(one > WORSE for one in relative),
            "worse_than_without": _worse_than_without(outcome, method),
            "guarded": statistics.median([record.curve.guarded[-1] for record in records.values()]),
            "seconds": statistics.median([record.curve.seconds[-1] for record in records.values()]),
            "tried": len(search.tried),
            "setting": "" if search.chosen is None else search.chosen.shown,
        }
        for share, target in zip(SHARES, outcome.targets, strict=True):
            row: dict[str, Any] = {"table": "targets", "task": outcome.task.name, "method": method, "target": share}
            row |= {"target_loss": target, "measure": measure_of(outcome), "seeds": len(records)}
            for measure in MEASURES:
                by_seed = list(shares(outcome, method, target, measure).values())
                row |= _interval(f"{measure}_share", statistics.median_interval(by_seed))
                row["reached"] = sum(math.isfinite(one) for one in by_seed)
            found.append(row | ends)
    return found


def _worse_than_without(outcome: Outcome, method: str) -> int | None:
    """How many seeds end worse than the same run without koopt; None where that was not run."""
    records, without = outcome.records.get(method, {}), outcome.without.get(method, {})
    both = [seed for seed in records if seed in without]
    return sum(over(records[seed], without[seed]) > WORSE for seed in both) if both else None


def _to_cosine(outcome: Outcome) -> list[dict[str, Any]]:
    """Each method's cost to the final loss of the tuned optimizer with a cosine schedule, where that was run."""
    if COSINE not in outcome.records or not outcome.targets:
        return []
    target = statistics.reached_by_half([record.final for record in outcome.records[COSINE].values()])
    found = []
    for method in outcome.records:
        row: dict[str, Any] = {"table": "cosine", "task": outcome.task.name, "method": method, "target_loss": target}
        for measure in MEASURES:
            by_seed = list(shares(outcome, method, target, measure).values())
            row |= _interval(f"{measure}_share", statistics.median_interval(by_seed))
            row["reached"] = sum(math.isfinite(one) for one in by_seed)
        found.append(row | {"seeds": len(outcome.records[method])})
    return found


def _ratios(outcome: Outcome) -> list[dict[str, Any]]:
    """Each method of koopt against each other method, over the seeds that both have."""
    found = []
    pairs = [(a, b) for a in outcome.records if a.startswith("koopt") for b in outcome.records if a != b]
    for (method, against), share in ((pair, share) for pair in pairs for share in SHARES):
        row: dict[str, Any] = {"table": "ratios", "task": outcome.task.name, "method": method, "against": against}
        row |= {"target": share}
        for measure in MEASURES:
            target = outcome.targets[SHARES.index(share)]
            own, other = (shares(outcome, name, target, measure) for name in (method, against))
            seeds = [seed for seed in own if seed in other]
            if seeds:
                last = [getattr(outcome.records[against][seed].curve, measure)[-1] for seed in seeds]
                ends = [end / spent(outcome, measure) for end in last]
                ratio = statistics.ratio_interval([own[s] for s in seeds], [other[s] for s in seeds], ends)
                row |= _interval(f"{measure}_ratio", ratio) | {"seeds": len(seeds)}
        found.append(row)
    return found


def _searched(outcome: Outcome) -> list[dict[str, Any]]:
    """The whole search; scores are final losses for the baseline, and mean shares of the budget for others."""
    found = []
    for method, search in outcome.search.items():
        for way, scores in search.tried:
            row = {"table": "search", "task": outcome.task.name, "method": method, "setting": way.shown}
            row |= {f"score_{seed}": score[0] for seed, score in zip(TUNING, scores, strict=False)}
            chosen = search.chosen is not None and way.shown == search.chosen.shown
            middle = overall(way, scores)
            found.append(row | {"score": middle[0], "final_loss": middle[-1], "chosen": chosen})
    return found


def over(record: Record, plain: Record) -> float:
    """A final loss in units of another."""
    if record.final == plain.final:
        return 1.0
    return record.final / plain.final if plain.final > 0 and math.isfinite(plain.final) else math.inf


def _interval(name: str, found: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))


def _methods(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in found))


def _against(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["against"] for row in found))


def _headings(targets: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    losses = {row["target"]: row["target_loss"] for row in targets}
    aims = {f"at_{share:g}": f"{share:.0%}: {losses[share]:.3g}" for share in SHARES}
    ends = {"reached": "reached", "seconds": "CPU", "final": "final", "test": "test", "worse": ">2 %\nworse"}
    return {"method": "method", **aims, **ends}


def _line(found: Sequence[Mapping[str, Any]], measure: str) -> dict[str, Any]:
    """One method: shares at the targets; how many seeds get to the last, and in seconds of the processor."""
    last = found[-1]
    line = {f"at_{row['target']:g}": _with_interval(row, f"{measure}_share") for row in found}
    line |= {"reached": f"{last['reached']}/{last['seeds']}", "seconds": _number(last["seconds_share"])}
    line |= {"final": f"{last['final_loss']:.3g}", "test": f"{last['test_loss']:.3g}"}
    return line | {"method": last["method"], "worse": f"{last['worse']}/{last['seeds']}"}


def _to_one(row: Mapping[str, Any], measure: str) -> dict[str, Any]:
    ends = {"reached": f"{row['reached']}/{row['seeds']}", "seconds": _with_interval(row, "seconds_share")}
    return {"method": row["method"], "share": _with_interval(row, f"{measure}_share"), **ends}


def _compared(found: Sequence[Mapping[str, Any]], measure: str) -> dict[str, Any]:
    line = {f"at_{row['target']:g}": _with_interval(row, f"{measure}_ratio") for row in found}
    return line | {"against": found[0]["against"]}


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        return "-"
    if not math.isfinite(row[f"{name}_low"]):
        return _number(math.inf)
    low, high = (_number(row[f"{name}_{end}"]).removeprefix("0") for end in ("low", "high"))
    return f"{_number(row[name])} {low}-{high}"


def _published(row: Mapping[str, Any], name: str) -> str:
    low, high = (_number(row[f"{name}_{end}"]) for end in ("low", "high"))
    return _number(row[name]) if low == "∞" else f"{_number(row[name])} ({low} to {high})"


def _number(share: float | None) -> str:
    return "∞" if share is None or not math.isfinite(share) else f"{share:.2f}"
