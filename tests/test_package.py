"""What importing koopt costs, and what it promises by name."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import koopt

README = Path(__file__).parent.parent / "README.md"
OPTIONAL = [
    "beartype",
    "hypothesis",
    "jaxtyping",
    "jinja2",
    "matplotlib",
    "pandas",
    "playwright",
    "pooch",
    "pydmd",
    "pytest",
    "rich",
    "scipy",
]


def imported_by(code):
    """The modules that a line of code adds to those of koopt's dependencies, in a fresh interpreter."""
    script = (
        "import json, sys, torch, numpy, safetensors, safetensors.torch; before = set(sys.modules); "
        f"{code}; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_needs_only_the_dependencies():
    added = imported_by("import koopt")
    packages = {name.partition(".")[0] for name in added}
    assert "koopt" in packages
    assert not packages & set(OPTIONAL)
    foreign = packages - {"koopt", "torch", "numpy", "safetensors"} - set(sys.stdlib_module_names)
    assert not foreign, f"import koopt brings in {sorted(foreign)}"


def test_the_command_starts_before_torch_is_imported():
    """Ctrl-C is minded from the first moment."""
    script = re.search(r'^koopt = "(\w+):main"$', (README.parent / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert script
    code = f"import sys, {script[1]}; assert not {{'torch', 'numpy', 'koopt'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def example_of(documented):
    doc = inspect.getdoc(documented) or ""
    return ">>>" in doc


def test_every_public_name_exists():
    assert len(set(koopt.__all__)) == len(koopt.__all__)
    assert all(hasattr(koopt, name) for name in koopt.__all__)
    assert koopt.__version__


@pytest.mark.parametrize("name", koopt.__all__)
def test_every_public_name_is_documented_with_an_example(name):
    value = getattr(koopt, name)
    assert inspect.getdoc(value), f"koopt.{name} has no docstring"
    methods = (
        [member for key, member in vars(value).items() if not key.startswith("_")] if inspect.isclass(value) else []
    )
    assert example_of(value) or any(example_of(method) for method in methods), f"koopt.{name} has no example"


def test_no_module_shares_a_public_name():
    root = Path(koopt.__file__).parent
    modules = {path.stem for path in root.rglob("*.py")} | {path.name for path in root.rglob("*") if path.is_dir()}
    assert {"operator", "partitions", "trajectory"} <= modules
    assert not modules & set(koopt.__all__)


def test_the_readme_runs():
    """Its Python examples, as they stand, on a small model."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
    optimizer = torch.optim.Adam(model.parameters())
    state, snapshots = torch.rand(4, 5), torch.rand(4, 8, 5)
    names = {"koopt": koopt, "model": model, "optimizer": optimizer, "snapshots": snapshots, "state": state}
    names["loader"] = [(None, None)] * 1001
    names |= {"loss_fn": torch.nn.functional.mse_loss, "x_guard": torch.rand(4, 3), "y_guard": torch.rand(4, 1)}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(block, names)
    assert len(names["traj"]) == 5
