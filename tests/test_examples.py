"""The documented examples: they run as they stand, their answers are right, and their figures are those measured."""

import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "fixed-points.md").read_text(encoding="utf-8")
SOURCE = ROOT / "examples" / "fixed_points.py"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(SOURCE))


@pytest.fixture(scope="module")
def rows(example):
    """The table, by problem: steps as it is; (steps, whether at the same point) by method and window."""
    return {name: (calls, row) for name, calls, row in example["table"]()}


@pytest.fixture(scope="module")
def likeliest(example):
    """The cost of a mixture, minus its log likelihood by scipy's densities, and where a general optimizer ends."""
    data = example["samples"]().numpy()

    def cost(p):
        share = 1 / (1 + math.exp(-p[0]))
        first, second = (scipy.stats.norm.pdf(data, p[1 + i], math.exp(p[3 + i])) for i in (0, 1))
        return -np.log((1 - share) * first + share * second).mean()

    return cost, scipy.optimize.minimize(cost, example["mixture"]()[1].numpy(), method="BFGS", options={"gtol": 1e-7})


def dense_poisson(n):
    """The matrix of -u'' on the grid, by Kronecker products."""
    line = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    return np.kron(line, np.eye(n)) + np.kron(np.eye(n), line)


def known_u(n):
    x = np.arange(1, n + 1)[:, None] / (n + 1)
    y = x.T
    return (x * (1 - x) * y**2 * (1 - y) * np.exp(x)).ravel()


def test_the_document_runs_and_finds_the_exact_answer():
    names = {}
    for block in BLOCKS:
        exec(block, names)
    right = dense_poisson(30) @ known_u(30)
    exact = np.linalg.solve(dense_poisson(30), right)
    assert np.linalg.norm(names["u"].numpy() - exact) < 1e-6 * np.linalg.norm(exact)
    assert names["calls"] < 1_000


def test_the_document_shows_the_example_as_it_is():
    source = SOURCE.read_text(encoding="utf-8")
    shown = [block for block in BLOCKS if "def " in block]
    assert len(shown) == 2
    assert all(block in source for block in shown)


def test_the_figures_of_the_document_are_those_measured(example, rows):
    stated = {}
    for line in DOCUMENT.splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if name in rows:
            stated[name] = [number.strip().replace(",", "") for cell in cells for number in cell.split("/")]
    assert stated.keys() == rows.keys()
    for name, (plain, *cells) in stated.items():
        calls, measured = rows[name]
        assert int(plain) == calls
        assert [not cell.endswith("*") for cell in cells] == [same for _, same in measured]
        counts = [int(cell.rstrip("*")) for cell in cells]
        assert counts == pytest.approx([fewer for fewer, _ in measured], rel=0.1, abs=10)  # rounding may shift a jump
    plain, few = rows["Poisson"][0], rows["Poisson"][1][:3]
    assert f"# {stated['Poisson'][2]} sweeps; without the jumps {plain:,}" in DOCUMENT
    gains = [plain / calls for calls, _ in few]
    assert f"{min(gains):.0f} to {max(gains):.0f} times fewer" in DOCUMENT


def test_a_solver_made_for_the_problem_is_better(example, rows):
    found, calls = example["conjugate_gradients"](*example["poisson"]())
    assert f"conjugate gradients need {calls} sweeps" in DOCUMENT
    assert np.linalg.norm(found.numpy() - known_u(30)) < 1e-6 * np.linalg.norm(known_u(30))
    assert calls < min(fewer for fewer, _ in rows["Poisson"][1])


def test_koopt_finds_the_likeliest_mixture(example, likeliest):
    cost, best = likeliest
    step, start = example["mixture"]()
    for window in example["WINDOWS"]:
        found, _ = example["solve"](step, start, example["koopman"], window)
        assert cost(found.numpy()) <= best.fun + 1e-10
        np.testing.assert_allclose(found.numpy(), best.x, atol=1e-3)


def test_koopt_waits_while_the_mixture_passes_the_saddle(example):
    step, state = example["mixture"]()
    states = [state]
    for _ in range(300):
        states.append(step(states[-1]))
    path = torch.stack(states)
    waits = [example["koopman"](path[end - 5 : end + 1]) is None for end in range(50, 301, 10)]
    assert all(waits[:14])  # to step 180
    assert sum(waits[-7:]) <= 2  # from step 240


def test_a_star_is_a_saddle(example, likeliest):
    """Mixing at every step ends at a fixed point that is not the likeliest and from which one direction grows."""
    cost, best = likeliest
    step, start = example["mixture"]()
    found, _ = example["mixing"](step, start, 5)
    torch.testing.assert_close(step(found), found, rtol=0, atol=1e-7)
    assert cost(found.numpy()) > best.fun + 1e-3
    moduli = torch.linalg.eigvals(torch.func.jacrev(step)(found)).abs()
    assert (moduli > 1.001).sum() == 1


def test_the_other_answers_are_right(example):
    step, start = example["contraction"]()
    eye = torch.eye(len(start), dtype=torch.float64)
    b = step(start)
    matrix = eye - torch.stack([step(row) - b for row in eye], dim=1)
    found, _ = example["solve"](step, start, example["koopman"], 5)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, b), rtol=1e-7, atol=1e-8)
    step, start = example["lasso"]()
    found, _ = example["solve"](step, start, example["koopman"], 10)
    plain, _ = example["solve"](step, start)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    assert ((found == 0) == (plain == 0)).all()
    assert 0 < (found == 0).sum() < len(found)


@pytest.mark.parametrize("guess", [lambda w: 1e6 + w[-1], lambda w: w[-1] * math.nan])
def test_a_bad_jump_is_taken_back(example, guess):
    """Halving from 1: 30 steps to 1e-9 of the state 1 + 2^-k; each of the seven jumps costs one step."""

    def halve(state):
        return 1 + (state - 1) / 2

    start = torch.tensor([2.0], dtype=torch.float64)
    plain, calls = example["solve"](halve, start)
    assert calls == 30
    assert example["solve"](halve, start, guess, 4) == (plain, calls + 7)
    assert example["solve"](halve, start, lambda w: None, 4) == (plain, calls)


def test_no_jump_while_a_direction_grows(example):
    growing = 2.0 ** torch.arange(5, dtype=torch.float64)[:, None]
    assert example["koopman"](growing) is None
    torch.testing.assert_close(example["koopman"](3 + 1 / growing), torch.tensor([3.0], dtype=torch.float64))
