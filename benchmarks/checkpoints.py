"""Wall-clock time and memory of `koopt forecast` against `cp` of the same bytes.

    python benchmarks/checkpoints.py --mebibytes 64 256 1024 --folder SCRATCH

Each checkpoint is one file of random weights that drift along a linear law, in layers of 16 MiB. `cp` copies the inputs
and one file of the size of the output. Both run in processes of their own, in turn, with the files in the page cache
("warm") or not ("cold": every file is written to disk and let go by posix_fadvise). Processor time is shown beside the
wall clock, since it depends less on what else the machine does. Memory is the peak resident set of the process, beside
that of an idle interpreter that has imported koopt.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import koopt
from koopt.checkpoint.factors import measure, rows_of
from koopt.report import machine

MIB = 2**20
LAYER = 16 * MIB
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, nargs="+", default=[64], help="sizes of one checkpoint (%(default)s)")
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--by", default="network")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", choices=("warm", "cold"), nargs="+", default=["warm"])
    parser.add_argument("--folder", type=Path, default=Path("results/checkpoints"))
    parser.add_argument("--sparse", action="store_true", help="files of holes, and no cp: for memory, not for time")
    parser.add_argument("--json", type=Path, help="append one line a size to this file")
    parser.add_argument("--factors", action="store_true", help="only the Gram matrix against the orthogonal factor")
    given = parser.parse_args()
    print(machine())
    if given.factors:
        return compare_factors()
    print("size    cache   cp (s)  koopt (s)  ratio   cp cpu  koopt cpu   peak MiB  idle MiB")
    for size in given.mebibytes:
        folder = given.folder / str(size)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            paths = [folder / f"step_{100 * (i + 1)}.safetensors" for i in range(given.checkpoints)]
            # in a process of its own: a child's peak memory starts at that of the parent it is forked from
            make = write_sparse if given.sparse else write
            writing = multiprocessing.get_context("spawn").Process(target=make, args=(paths, size * MIB, given.dtype))
            writing.start()
            writing.join()
            for cache in given.cache:
                found = compared(paths, folder, given, cache)
                print(
                    f"{size:>5} M {cache:>6} {found['cp']:>8.2f} {found['koopt']:>9.2f} {found['ratio']:>7.2f} "
                    f"{found['cp_cpu']:>8.2f} {found['koopt_cpu']:>10.2f} "
                    f"{found['peak']:>9.0f} {found['idle']:>9.0f}",
                    flush=True,
                )
                if given.json:
                    with given.json.open("a") as file:
                        settings = {"mebibytes": size, "cache": cache, "dtype": given.dtype, "by": given.by}
                        file.write(json.dumps(settings | found | {"machine": machine()}) + "\n")
        finally:
            shutil.rmtree(folder)


def compare_factors():
    """Processor seconds of both ways to the small matrix, without reading, and the eigenvalues that each finds."""
    torch.set_num_threads(1)
    count, numbers = 8, 2**21
    generator = torch.Generator().manual_seed(0)
    stay, *ways = (torch.randn(numbers, generator=generator, dtype=torch.float64) for _ in range(4))
    for motion in (1e-1, 1e-3, 1e-5):
        law = [stay + motion * sum(d**i * w for d, w in zip((0.9, 0.7, 0.4), ways, strict=True)) for i in range(count)]
        for name in ("float64", "float32", "bfloat16"):
            rows = torch.stack(law).to(DTYPES[name])[None]
            for qr in (False, True):
                start = time.process_time()
                small = measure(rows, qr).small
                seconds = (time.process_time() - start) * 2**28 / numbers
                factor = small if qr else rows_of(small)
                found = koopt.fit(factor[0], difference=True, rank=3, rtol=1e-15).eigenvalues.abs().tolist()
                print(
                    f"motion {motion:g}, {name:>8}, {'QR  ' if qr else 'Gram'}: {seconds:5.1f} s for {count} x 2^28 "
                    f"numbers, |eigenvalues| {', '.join(f'{value:.6f}' for value in found)} (0.9, 0.7, 0.4)"
                )


def write(paths, nbytes, name):
    """Checkpoints of `nbytes` bytes each: x_i = c + 0.9^i a + i b, a layer at a time."""
    torch.set_num_threads(1)
    dtype = DTYPES[name]
    numbers = min(LAYER, nbytes) // dtype.itemsize
    for i, path in enumerate(paths):
        weights = {}
        for layer in range(nbytes // (numbers * dtype.itemsize)):
            generator = torch.Generator().manual_seed(layer)
            stay, decay, drift = (torch.randn(numbers // 1024, 1024, generator=generator) for _ in range(3))
            weights[f"layers.{layer}.weight"] = (stay + 0.1 * 0.9**i * decay + 0.01 * i * drift).to(dtype)
        save_file(weights, path)


def write_sparse(paths, nbytes, name):
    """The same tensors with one number in each that moves; the rest are zeros that take no space on disk."""
    dtype = DTYPES[name]
    numbers = min(LAYER, nbytes) // dtype.itemsize
    held = numbers * dtype.itemsize
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
    header = {
        f"layers.{i}.weight": {
            "dtype": names[name],
            "shape": [numbers // 1024, 1024],
            "data_offsets": [i * held, (i + 1) * held],
        }
        for i in range(nbytes // held)
    }
    raw = json.dumps(header).encode()
    for i, path in enumerate(paths):
        with path.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + nbytes)
            for layer in range(nbytes // held):
                file.seek(8 + len(raw) + layer * held)
                file.write(torch.tensor([1 + 0.9**i], dtype=dtype).view(torch.uint8).numpy().tobytes())


def compared(paths, folder, given, cache):
    copies = folder / "copies"
    output = folder / "future.safetensors"
    command = [sys.executable, "-c", "import sys; from koopt.cli import main; sys.exit(main())", "forecast"]
    command += [*map(str, paths), "--ahead", "300", "-o", str(output), "--by", given.by, "--difference", "--rank", "2"]
    seconds, processor, peak = {"cp": [], "koopt": []}, {"cp_cpu": [], "koopt_cpu": []}, 0
    for _ in range(given.rounds):
        copies.mkdir()
        prepare(paths, cache)
        copied = [["cp", *map(str, paths), str(copies)], ["cp", str(paths[-1]), str(copies / "future")]]
        copied = [(math.nan, math.nan)] if given.sparse else [timed(copy) for copy in copied]
        seconds["cp"].append(sum(found[0] for found in copied))
        processor["cp_cpu"].append(sum(found[1] for found in copied))
        shutil.rmtree(copies)
        os.sync()
        prepare(paths, cache)
        took, worked, resident = timed(command)
        seconds["koopt"].append(took)
        processor["koopt_cpu"].append(worked)
        peak = max(peak, resident)
        output.unlink()
        os.sync()
    idle = timed([sys.executable, "-c", "import koopt, koopt.cli, rich.progress, rich.table"])[2]
    found = {name: statistics.median(values) for name, values in (seconds | processor).items()}
    return found | {"ratio": found["koopt"] / found["cp"], "peak": peak, "idle": idle, "all": seconds | processor}


def prepare(paths, cache):
    """Every file in the page cache, or none of it."""
    for path in paths:
        with path.open("rb") as file:
            if cache == "cold":
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(16 * MIB):
                    pass


def timed(command):
    """Seconds, processor seconds, and the peak resident set in MiB."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{command[0]} failed: {child.stderr.read().decode()}")
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / MIB


if __name__ == "__main__":
    main()
