"""What forecasts from saved checkpoints are worth: validation loss beside the last checkpoint and their mean.

    python benchmarks/checkpoint_quality.py --seeds 0 1 2

Networks are trained with AdamW at a constant rate and saved at even steps, as they are and as the mean of the weights
since the last save. From each origin the last `WINDOW` checkpoints, in float32 or bfloat16, are forecast by
`koopt.forecast_checkpoints`, as anyone would from files. The table shows the validation loss over that of the last
checkpoint, averaged over origins and seeds (geometric mean; below 1 is better), and the share of origins where it is
below both that and the loss of the window's mean. The validation split is not trained on; the test split is not read.
Checkpoints and losses are kept in the output folder, so that a run that was stopped goes on.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import koopt
from koopt import report
from koopt.bench.tasks import TASKS

SETS = {  # task, steps between checkpoints, how many of them, rate, window, origins apart, checkpoints ahead
    "mnist-mlp, each epoch": ("mnist-mlp", 852, 10, 1e-3, 5, 1, (0.5, 1)),
    "mnist-mlp, each quarter epoch": ("mnist-mlp", 213, 32, 1e-3, 12, 4, (2, 4)),
    "shakespeare, each epoch": ("shakespeare", 980, 10, 2e-3, 5, 1, (0.5, 1)),
    "shakespeare, each 100 steps": ("shakespeare", 100, 14, 2e-3, 5, 1, (0.5, 1)),
}
SAVED = {"weights": "float32", "weights, bfloat16": "bfloat16", "means": "float32"}
RULES = {
    "mean": {"method": "mean"},
    "mean of 2": {"method": "mean", "window": 2},
    "line": {"method": "line"},
    "regression": {"method": "regression"},
    "koopman (default)": {},
    "koopman, layer (default)": {"by": "layer"},
    "koopman, all ranks": {"rank": 100},
    "koopman, rank 1": {"rank": 1},
    "koopman, rank 3": {"rank": 3},
    "koopman, rank 2, projected, moduli <= 1": {"rank": 2, "projected": True, "max_modulus": 1.0},
    "koopman, affine, rank 1": {"rank": 1, "center": True},
    "koopman, steps, rank 1": {"rank": 1, "difference": True},
    "ensemble": {"method": "ensemble"},
}
TIMELESS = ("mean", "mean of 2")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000, 1001, 1002])
    parser.add_argument("--tasks", nargs="+", choices=sorted({task for task, *_ in SETS.values()}))
    parser.add_argument("--output", type=Path, default=Path("results/checkpoint-quality"))
    parser.add_argument("--saved", nargs="+", choices=SAVED, default=list(SAVED))
    parser.add_argument("--train-only", action="store_true", help="save the checkpoints and stop")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, (task, *_) in SETS.items():
        if given.tasks and task not in given.tasks:
            continue
        found = {}
        for seed in given.seeds:
            folder = given.output / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            train(name, seed, folder)
            if given.train_only:
                continue
            for key, ratios in measured(name, seed, folder, given).items():
                found.setdefault(key, []).extend(ratios)
        rows += table(name, found, given) if found else []
    if rows:
        report.write_result(given.output, "checkpoint-quality", {"seeds": given.seeds, "saved": given.saved}, rows, [])


def train(name, seed, folder):
    """Save each checkpoint as `weights_STEP` and the mean of the steps since the one before as `means_STEP`."""
    task, every, count, rate, *_ = SETS[name]
    if (folder / f"means_{every * count}.safetensors").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    problem = TASKS[task].problem(seed, False)
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=rate)
    for i in range(count):
        total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in problem.model.named_parameters()}
        for _ in range(every):
            optimizer.zero_grad()
            problem.loss(problem.batch()).backward()
            optimizer.step()
            with torch.no_grad():
                for n, p in problem.model.named_parameters():
                    total[n] += p
        state = {n: t.detach().contiguous() for n, t in problem.model.state_dict().items()}
        means = state | {n: (t / every).to(state[n].dtype) for n, t in total.items()}
        for kind, held in (("weights", state), ("means", means)):
            path = folder / f"{kind}_{every * (i + 1)}.safetensors"
            save_file(held, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)


def measured(name, seed, folder, given):
    """Lists over origins of (loss over that of the last, whether below both last and mean), by saved, rule, ahead."""
    task, every, count, _, length, apart, aheads = SETS[name]
    kept = folder / "losses.json"
    losses = json.loads(kept.read_text()) if kept.exists() else {}
    problem = TASKS[task].problem(seed, False)
    with tempfile.TemporaryDirectory() as place:
        for saved in given.saved:
            dtype, paths = SAVED[saved], []
            for i in range(count):
                source = folder / f"{saved.partition(',')[0]}_{every * (i + 1)}.safetensors"
                paths.append(Path(place) / f"{source.stem}_{dtype}_step_{every * (i + 1)}.safetensors")
                save_file({n: t.to(getattr(torch, dtype)) for n, t in load_file(source).items()}, paths[-1])
            for origin in range(length, count + 1, apart):
                window = paths[origin - length : origin]
                asked = [("last", None, {"method": "last"})]
                for label, options in RULES.items():
                    asked += [(label, ahead, options) for ahead in ((None,) if label in TIMELESS else aheads)]
                for _, ahead, options in asked:
                    key = json.dumps([saved, origin, ahead, options])
                    if key not in losses or not options or options == {"by": "layer"}:  # defaults may have changed
                        output = Path(place) / "future.safetensors"
                        losses[key] = forecast_loss(problem, window, every * (ahead or 1), dict(options), output)
            kept.write_text(json.dumps(losses))
    found = {}
    for saved in given.saved:
        for origin in range(length, count + 1, apart):
            last, mean = (losses[json.dumps([saved, origin, None, {"method": m}])] for m in ("last", "mean"))
            for label, options in RULES.items():
                for ahead in (None,) if label in TIMELESS else aheads:
                    loss = losses[json.dumps([saved, origin, ahead, options])]
                    found.setdefault((saved, label, ahead), []).append((loss / last, loss < min(last, mean)))
    return found


def forecast_loss(problem, window, ahead, options, output):
    window = window[-options.pop("window", len(window)) :]
    try:
        koopt.forecast_checkpoints(window, ahead, output, overwrite=True, **options)
    except ValueError:  # refused: the last stays
        return loss_at(problem, window[-1])
    return loss_at(problem, output)


def loss_at(problem, path):
    problem.model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    problem.refresh()
    loss = problem.validate()
    return loss if math.isfinite(loss) else 1e300


def table(name, found, given):
    rows, aheads = [], SETS[name][-1]
    print(f"\n{name}: loss over that of the last checkpoint (share of origins below last and mean)")
    for saved in given.saved:
        for label in RULES:
            cells = []
            for ahead in (None,) if label in TIMELESS else aheads:
                ratios = found[saved, label, ahead]
                ratio = math.exp(sum(math.log(min(r, 1e3)) for r, _ in ratios) / len(ratios))
                share = sum(better for _, better in ratios) / len(ratios)
                cells.append(f"{'' if ahead is None else f'+{ahead:g}: '}{ratio:.3f} ({share:.0%})")
                row = {"set": name, "saved": saved, "method": label, "ahead": ahead, "loss_ratio": ratio}
                rows.append(row | {"wins": share, "origins": len(ratios)})
            print(f"  {saved:>17}  {label:<40} {'   '.join(cells)}", flush=True)
    return rows


if __name__ == "__main__":
    main()
