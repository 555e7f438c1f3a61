"""What forecasts from saved checkpoints are worth: validation loss beside the last checkpoint and their mean.

    python benchmarks/checkpoint_quality.py --seeds 1000 1001

Networks are trained with AdamW at a constant rate and saved at even steps, in float32 and in bfloat16. From each origin
the last `WINDOW` checkpoints are forecast by `koopt.forecast_checkpoints`, as anyone would from files, by rules that
were fixed before the first run. The table shows the validation loss over that of the last checkpoint, averaged over
origins and seeds (geometric mean; below 1 is better), and the share of origins where it is below both that and the loss
of the window's mean. The validation split is not trained on; the test split is not read.
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import koopt
from koopt.bench.tasks import TASKS
from koopt.experiments import report

TASKS_USED = {"mnist-mlp": (852, 8, 1e-3), "shakespeare": (100, 14, 2e-3)}  # steps apart, checkpoints, rate
WINDOW = 5
RULES = {
    "mean": {"method": "mean"},
    "mean of 2": {"method": "mean", "window": 2},
    "line": {"method": "line"},
    "regression": {"method": "regression"},
    "koopman, all ranks (default)": {},
    "koopman, layer, all ranks": {"by": "layer"},
    "koopman, rank 2": {"rank": 2},
    "koopman, rank 2, projected": {"rank": 2, "projected": True},
    "koopman, layer, rank 2, projected": {"rank": 2, "projected": True, "by": "layer"},
    "koopman, node, rank 2, projected": {"rank": 2, "projected": True, "by": "node"},
    "koopman, steps, rank 1": {"rank": 1, "difference": True},
    "koopman, steps, rank 2": {"rank": 2, "difference": True},
    "ensemble": {"method": "ensemble"},
}
AHEAD = (0.5, 1.0, 2.0)  # in checkpoints
TIMELESS = ("mean", "mean of 2")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000, 1001])
    parser.add_argument("--tasks", nargs="+", choices=TASKS_USED, default=list(TASKS_USED))
    parser.add_argument("--output", type=Path, default=Path("results/checkpoint-quality"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in given.tasks:
        found = {}
        for seed in given.seeds:
            with tempfile.TemporaryDirectory() as folder:
                measure(name, seed, Path(folder), found)
        rows += table(name, found)
    given.output.mkdir(parents=True, exist_ok=True)
    report.write_result(given.output, "checkpoint-quality", {"seeds": given.seeds, "window": WINDOW}, rows, [])


def measure(name, seed, folder, found):
    """Train, save, forecast, evaluate; adds (loss / loss of the last, whether it beats last and mean) to `found`."""
    every, count, rate = TASKS_USED[name]
    problem = TASKS[name].problem(seed, False)
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=rate)
    saved = {"float32": [], "bfloat16": []}
    for i in range(count):
        for _ in range(every):
            optimizer.zero_grad()
            problem.loss(problem.batch()).backward()
            optimizer.step()
        for dtype, paths in saved.items():
            state = {
                n: t.detach().to(getattr(torch, dtype)).contiguous() for n, t in problem.model.state_dict().items()
            }
            paths.append(folder / f"{dtype}_step_{every * (i + 1)}.safetensors")
            save_file(state, paths[-1])
    for dtype, paths in saved.items():
        for origin in range(WINDOW, count + 1):
            window = paths[origin - WINDOW : origin]
            last = loss_at(problem, window[-1])
            mean = None
            for label, options in RULES.items():
                for ahead in AHEAD[:1] if label in TIMELESS else AHEAD:
                    loss = forecast_loss(problem, window, every * ahead, dict(options), folder / "future.safetensors")
                    mean = loss if label == "mean" else mean
                    key = dtype, label, None if label in TIMELESS else ahead
                    found.setdefault(key, []).append((loss / last, loss < min(last, mean)))


def forecast_loss(problem, window, ahead, options, output):
    window = window[-options.pop("window", WINDOW) :]
    try:
        koopt.forecast_checkpoints(window, ahead, output, **options)
    except ValueError:  # refused: the last stays
        return loss_at(problem, window[-1])
    return loss_at(problem, output)


def loss_at(problem, path):
    problem.model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    problem.refresh()
    loss = problem.validate()
    return loss if math.isfinite(loss) else math.inf


def table(name, found):
    rows = []
    print(f"\n{name}: loss over that of the last checkpoint (share of origins below last and mean)")
    for dtype in ("float32", "bfloat16"):
        for label in RULES:
            cells = []
            for ahead in (None,) if label in TIMELESS else AHEAD:
                ratios = found[dtype, label, ahead]
                ratio = math.exp(sum(math.log(min(r, 1e3)) for r, _ in ratios) / len(ratios))
                share = sum(better for _, better in ratios) / len(ratios)
                cells.append(f"{'' if ahead is None else f'+{ahead:g}: '}{ratio:.3f} ({share:.0%})")
                row = {
                    "task": name,
                    "dtype": dtype,
                    "method": label,
                    "ahead": ahead,
                    "loss_ratio": ratio,
                    "wins": share,
                }
                rows.append(row | {"origins": len(ratios)})
            print(f"  {dtype:>8}  {label:<34} {'   '.join(cells)}", flush=True)
    return rows


if __name__ == "__main__":
    main()
