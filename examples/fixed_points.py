"""Fixed-point iterations that are not training, with and without koopt: steps to a tolerance.

    python examples/fixed_points.py

prints the table of docs/fixed-points.md; it takes a few seconds.
"""

import math

import torch
from torch.nn.functional import pad

import koopt
from koopt.forecasters import anderson

TOLERANCE, LIMIT = 1e-9, 20_000


def solve(step, state, jump=None, window=10):
    """Iterate to a fixed point; returns it and how often `step` was called (`LIMIT` if it never came close)."""
    recorded, before, last = [state], None, math.inf
    for calls in range(1, LIMIT + 1):
        image = step(state)
        residual = float((image - state).norm() / image.norm())
        if residual <= TOLERANCE:
            return image, calls
        if before is not None and not residual < last:  # the jump was no good: go back
            recorded, state, before = [before], before, None
            continue
        recorded, state, before, last = [*recorded, image], image, None, residual
        if jump is not None and len(recorded) > window:
            guess = jump(torch.stack(recorded))
            before, state = (None, state) if guess is None else (state, guess)
            recorded = [state]
    return state, LIMIT


def koopman(recorded):
    """Where the iteration is heading; None while a direction still grows and there is no limit."""
    try:
        return koopt.fit(recorded, difference=True).forecast(math.inf)
    except ValueError:
        return None


def poisson(n=30):
    """Damped Jacobi sweeps for -u'' = f on an n x n grid with u = 0 around it; `f` belongs to a known u."""
    x, y = torch.meshgrid(*2 * [torch.arange(1, n + 1, dtype=torch.float64) / (n + 1)], indexing="ij")
    u = x * (1 - x) * y**2 * (1 - y) * x.exp()

    def laplacian(v):
        v = pad(v, (1, 1, 1, 1))
        return 4 * v[1:-1, 1:-1] - v[:-2, 1:-1] - v[2:, 1:-1] - v[1:-1, :-2] - v[1:-1, 2:]

    f = laplacian(u)

    def step(state):
        v = state.reshape(n, n)
        return (v + 0.8 / 4 * (f - laplacian(v))).flatten()

    return step, torch.zeros(n * n, dtype=torch.float64)


def conjugate_gradients(step, state):
    """For symmetric linear steps ``state + b - A state`` from zero; returns the state and calls, as `solve`."""
    b = step(state) - state
    residual, direction = b, b
    for calls in range(1, LIMIT + 1):
        image = direction + b - step(direction)
        rate = residual @ residual / (direction @ image)
        state, smaller = state + rate * direction, residual - rate * image
        if float(smaller.norm() / state.norm()) <= TOLERANCE:
            return state, calls + 1
        residual, direction = smaller, smaller + (smaller @ smaller) / (residual @ residual) * direction
    return state, LIMIT


def samples(count=500):
    """One sample in three from a Gaussian two standard deviations off."""
    generator = torch.Generator().manual_seed(0)
    second = torch.rand(count, generator=generator, dtype=torch.float64) < 1 / 3
    return torch.randn(count, generator=generator, dtype=torch.float64) + 2.0 * second


def mixture():
    """Expectation-maximization for a mixture of two Gaussians: log odds, two means, two log standard deviations."""
    data = samples()

    def step(state):
        odds, means, spreads = state[0], state[1:3, None], state[3:5, None]
        shares = torch.stack([-odds, odds]).div(2)[:, None]
        share = (shares - spreads - ((data - means) / spreads.exp()) ** 2 / 2).softmax(dim=0)
        count = share.sum(dim=1)
        means = share @ data / count
        variances = (share * (data - means[:, None]) ** 2).sum(dim=1) / count
        return torch.cat([(count[1] / count[0]).log()[None], means, variances.log() / 2])

    return step, torch.tensor([0.0, -1.0, 1.0, 0.0, 0.0], dtype=torch.float64)


def contraction(n=200):
    """Richardson steps for a matrix close to the identity."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.eye(n, dtype=torch.float64)
    matrix += 0.1 * torch.randn(n, n, generator=generator, dtype=torch.float64) / math.sqrt(n)
    b = torch.randn(n, generator=generator, dtype=torch.float64)
    return lambda state: state + b - matrix @ state, torch.zeros(n, dtype=torch.float64)


def lasso(rows=100, columns=150):
    """Proximal gradient steps (ISTA) for a sparse regression; a weight that reaches zero is a kink of the map."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    sparse = (torch.rand(columns, generator=generator, dtype=torch.float64) < 0.1).to(torch.float64)
    b = matrix @ sparse + 0.1 * torch.randn(rows, generator=generator, dtype=torch.float64)
    rate = 1 / torch.linalg.matrix_norm(matrix, 2) ** 2

    def step(state):
        moved = state + rate * matrix.mT @ (b - matrix @ state)
        return moved.sign() * (moved.abs() - 5.0 * rate).clamp(min=0)

    return step, torch.zeros(columns, dtype=torch.float64)


def mixing(step, state, memory):
    """Anderson acceleration at every step, from the last `memory` differences; returns what `solve` returns."""
    states, images = [], []
    for calls in range(1, LIMIT + 1):
        image = step(state)
        if float((image - state).norm() / image.norm()) <= TOLERANCE:
            return image, calls
        states, images = [*states, state][-memory - 1 :], [*images, image][-memory - 1 :]
        together = torch.stack(images)
        moved = together - torch.stack(states)
        state = image
        if len(images) > 1:
            state = image - torch.linalg.pinv(moved.diff(dim=0).mT) @ moved[-1] @ together.diff(dim=0)
    return state, LIMIT


PROBLEMS = {"Poisson": poisson, "mixture": mixture, "contraction": contraction, "lasso": lasso}
WINDOWS = (5, 10, 20)
METHODS = {
    "koopt": lambda step, state, window: solve(step, state, koopman, window),
    "Anderson, restarted": lambda step, state, window: solve(step, state, lambda w: anderson(w, 0) @ w, window),
    "Anderson, every step": mixing,
}


def table():
    """For each problem: the steps as it is, then (steps, whether it ends at the same point) by method and window."""
    for name, problem in PROBLEMS.items():
        step, start = problem()
        plain, calls = solve(step, start)
        row = []
        for method in METHODS.values():
            for window in WINDOWS:
                found, fewer = method(step, start, window)
                row.append((fewer, bool((found - plain).norm() < 1e-4 * plain.norm())))
        yield name, calls, row


def line(name, calls, row):
    """A row of the table in Markdown; a star where the iteration ends elsewhere."""
    cells = [f"{fewer}{'' if same else '*'}" for fewer, same in row]
    groups = [" / ".join(cells[i : i + len(WINDOWS)]) for i in range(0, len(cells), len(WINDOWS))]
    return f"| {name} | {calls:,} | {' | '.join(groups)} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"| iteration | as it is | {' | '.join(METHODS)} |")
    print("|---|---|" + "---|" * len(METHODS))
    for row in table():
        print(line(*row))
