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
    public = {key: member for key, member in vars(value).items() if not key.startswith("_")}
    members = [key for key, member in public.items() if callable(member) or isinstance(member, property)]
    assert example_of(value) or (inspect.isclass(value) and members), f"koopt.{name} has no example"
    for key in members if inspect.isclass(value) else []:
        assert example_of(public[key]), f"koopt.{name}.{key} has no example"


def test_no_module_shares_a_public_name():
    root = Path(koopt.__file__).parent
    modules = {path.stem for path in root.rglob("*.py")} | {path.name for path in root.rglob("*") if path.is_dir()}
    assert {"operator", "partitions", "trajectory"} <= modules
    assert not modules & set(koopt.__all__)


class Training:
    """A loader whose iteration trains: the README leaves the training step to its reader."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        self.x = torch.linspace(-1, 1, 24).reshape(8, 3)
        self.y = self.x.sin().sum(dim=1, keepdim=True)

    def loss(self, model):
        return torch.nn.functional.mse_loss(model(self.x), self.y)

    def __iter__(self):
        for _ in range(1001):
            self.optimizer.zero_grad()
            self.loss(self.model).backward()
            self.optimizer.step()
            yield self.x, self.y


def test_the_readme_runs_and_its_jump_by_hand_is_put_back():
    """Its Python examples, as they stand, on a small model, where the jump by hand would raise the loss."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
    optimizer = torch.optim.Adam(model.parameters())
    training = Training(model, optimizer)
    state, snapshots = torch.rand(4, 5), torch.rand(4, 8, 5)
    names = {"model": model, "optimizer": optimizer, "loader": training, "snapshots": snapshots, "state": state}
    names |= {"loss_fn": torch.nn.functional.mse_loss, "x_guard": training.x, "y_guard": training.y}
    names["validate"] = lambda model: training.loss(model).item()
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 4
    started = {name: value.clone() for name, value in model.state_dict().items()}
    exec(blocks[0], names)
    assert names["koop"].steps == 1001
    assert any(jump.accepted for jump in names["koop"].jumps)
    names["koop"].detach()  # it has brought the model to its minimum, from where no jump leads
    model.load_state_dict(started)
    training.optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    exec(blocks[1], names)
    assert training.loss(model).item() == names["before"]
    assert all(torch.equal(p, names["kept"][name]) for name, p in model.named_parameters())
    koopt.load_into(model, names["traj"].forecast(2_500, difference=True, rank=6))
    assert training.loss(model).item() > names["before"]
    for block in blocks[2:]:
        exec(block, names)
    assert len(names["traj"]) == 11
