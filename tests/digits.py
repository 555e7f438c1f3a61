"""Made-up handwritten digits in the form of MNIST, for tests that must not wait for the real ones."""

import gzip
import hashlib
import struct

import numpy as np


def write(folder, monkeypatch, train=600, test=200, seed=0):
    """Four IDX files under `folder`/mnist whose checksums the code is told to expect."""
    from koopt.experiments import data

    rng = np.random.default_rng(seed)
    prototypes = rng.integers(0, 256, (10, 784))
    (folder / "mnist").mkdir(parents=True)
    sums = {}
    for name, count in (("train", train), ("t10k", test)):
        labels = rng.integers(0, 10, count).astype(np.uint8)
        images = np.clip(prototypes[labels] + rng.normal(0, 90, (count, 784)), 0, 255).astype(np.uint8)
        sums[f"{name}-images-idx3-ubyte"] = struct.pack(">IIII", 0x803, count, 28, 28) + images.tobytes()
        sums[f"{name}-labels-idx1-ubyte"] = struct.pack(">II", 0x801, count) + labels.tobytes()
    for name, content in sums.items():
        (folder / "mnist" / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(data, "FILES", {name: hashlib.md5(content).hexdigest() for name, content in sums.items()})
    monkeypatch.setenv("KOOPT_DATA", str(folder))
