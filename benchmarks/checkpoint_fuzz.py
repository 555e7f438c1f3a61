"""`koopt forecast` on damaged checkpoints: no traceback, no hang, no partial output, inputs untouched.

    python benchmarks/checkpoint_fuzz.py --files 10000

Each trial damages one file of a small set of checkpoints (a safetensors file, a shard, an index, or a `.pt` state dict)
and runs the command. It passes if that ends with exit code 2, one line on stderr and nothing written, or with 0
and an output that loads; and if it takes less than `SLOWEST` seconds.
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import random
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from koopt import cli

SLOWEST = 20.0  # seconds: what hangs
KINDS = ("safetensors", "shard", "index", "pt")
STEPS = (100, 200, 300, 400)
VALUES = (
    0,
    1,
    -1,
    3,
    7,
    8,
    2**31,
    2**63 - 1,
    2**64,
    10**30,
    0.5,
    "F32",
    "I8",
    "F8_E4M3",
    None,
    [],
    [1, 2],
    {},
    "é",
    True,
)


def weights(step):
    generator = torch.Generator().manual_seed(step)
    noise = 0.01 * torch.randn(4, 3, generator=generator)
    return {
        "a.weight": torch.arange(12.0).view(4, 3) * 0.9 ** (step / 100) + noise,
        "a.bias": torch.full((4,), step / 100),
        "b.weight": (torch.ones(2, 4) + 0.5 ** (step / 100)).to(torch.bfloat16),
        "b.count": torch.tensor(step),
    }


def make(folder):
    """Sound checkpoints of each kind, by kind: paths to forecast from, the file of the third to damage, all bytes."""
    sound = {}
    for kind in ("safetensors", "pt"):
        paths = [folder / kind / f"step_{step}.{kind}" for step in STEPS]
        (folder / kind).mkdir()
        for path, step in zip(paths, STEPS, strict=True):
            (save_file if kind == "safetensors" else torch.save)(weights(step), path)
        sound[kind] = paths, paths[2], contents(folder / kind)
    (folder / "folders").mkdir()
    paths = [folder / "folders" / f"checkpoint-{step}" for step in STEPS]
    for path, step in zip(paths, STEPS, strict=True):
        save_folder(path, weights(step))
    files = contents(folder / "folders")
    sound["shard"] = paths, paths[2] / "model-00001-of-00002.safetensors", files
    sound["index"] = paths, paths[2] / "model.safetensors.index.json", files
    return sound


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save_folder(path, state):
    """Two shards with an index, and a configuration."""
    path.mkdir()
    placed = {name: f"model-0000{1 + (name[0] == 'b')}-of-00002.safetensors" for name in state}
    for file in set(placed.values()):
        save_file({name: state[name] for name in state if placed[name] == file}, path / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": placed}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text('{"model_type": "toy"}')


def damaged(raw, chance):
    """Bytes with one kind of damage."""
    raw = bytearray(raw)
    at = chance.randrange(len(raw) + 1)
    kind = chance.randrange(8)
    if kind == 0:
        return bytes(raw[:at])
    if kind == 1:
        for _ in range(chance.choice((1, 1, 4, 64))):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
    elif kind == 2:
        raw[at : at + chance.randrange(1, 64)] = b""
    elif kind == 3:
        raw[at:at] = chance.randbytes(chance.randrange(1, 64))
    elif kind == 4:
        raw[at : at + 16] = bytes(len(raw[at : at + 16]))
    elif kind == 5:
        raw[:8] = chance.choice((0, 1, 2, len(raw), 2**40, 2**64 - 1, chance.randrange(400))).to_bytes(8, "little")
    elif kind == 6:
        return damaged_json(bytes(raw), chance)
    else:
        raw = bytearray(chance.randbytes(chance.randrange(0, 200)))
    return bytes(raw)


def damaged_json(raw, chance):
    """One value of a header or an index replaced, or one bit of anything else."""
    start = 0 if raw[:1] == b"{" else 8
    end = len(raw) if start == 0 else 8 + int.from_bytes(raw[:8], "little")
    try:
        held = json.loads(raw[start:end])
    except ValueError:
        at = chance.randrange(len(raw))
        return raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :]
    place, key = held, chance.choice(list(held))
    while isinstance(place[key], (dict, list)) and place[key] and chance.random() < 0.8:
        place = place[key]
        key = chance.choice(list(place)) if isinstance(place, dict) else chance.randrange(len(place))
    if chance.random() < 0.2:
        del place[key]
    else:
        place[key] = chance.choice(VALUES)
    text = json.dumps(held).encode()
    return (len(text).to_bytes(8, "little") if start else b"") + text + raw[end:]


def trial(sound, kind, seed, run):
    """Damage, run, compare; returns the exit code.

    Args:
        sound: of :func:`make`.
        kind: one of ``KINDS``.
        seed: of the damage.
        run: gets the arguments of the command; returns its exit code and stderr.

    Raises:
        AssertionError: if the command did anything but succeed or refuse cleanly.
    """
    paths, victim, files = sound[kind]
    worse = damaged(files[victim], random.Random(f"{kind} {seed}"))
    victim.write_bytes(worse)
    home = paths[0].parent
    output = home / f"future{paths[0].suffix}"
    method = ("koopman", "line", "mean")[seed % 3]
    start = time.perf_counter()
    try:
        code, error = run(["forecast", *map(str, paths), "--ahead", "100", "-o", str(output), "--method", method])
        seconds = time.perf_counter() - start
        after = {path: data for path, data in contents(home).items() if output not in (path, path.parent)}
        assert after == files | {victim: worse}, "an input changed or a temporary file stayed"
        assert seconds < SLOWEST, f"took {seconds:.0f} s"
        if code == 0:
            for file in output.rglob("*.safetensors") if output.is_dir() else [output]:
                torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)
        else:
            assert code == 2, f"exit code {code}"
            assert not output.exists(), "partial output"
            assert error.startswith("koopt"), error
            assert error.count("\n") == 1, error
            assert str(victim.parent if kind == "index" else victim) in error or str(home) in error, error
        return code
    finally:
        victim.write_bytes(files[victim])
        if output.is_dir():
            shutil.rmtree(output)
        output.unlink(missing_ok=True)


def run(arguments):
    """The command in this process: exit code and stderr."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = end.code
    return code, error.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first damage")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cli._parser = functools.cache(cli._parser)  # building it would take a third of the time
    start = time.perf_counter()
    ended = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        sound = make(Path(folder))
        for seed in range(given.seed, given.seed + given.files):
            kind = KINDS[seed % len(KINDS)]
            try:
                ended[kind, trial(sound, kind, seed, run)] += 1
            except BaseException:
                print(f"{kind}, seed {seed}:")
                raise
    for (kind, code), count in sorted(ended.items()):
        print(f"{kind:>12}: {count:,} {'refused in one line' if code else 'harmless, forecast made'}")
    print(f"{given.files:,} damaged files, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
