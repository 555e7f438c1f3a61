"""How the cost of Koopman operators scales: the operations counted, the time taken, the exponent fitted."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from koopt.operator import fit_in_form

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Float
    from torch import Tensor

    from koopt.operator import Operator

OPERATORS = ("weight", "node", "quasi-node", "layer", "network")
FORMS = ("state", "snapshot")
PHASES = ("construction", "iteration")
SAMPLE = 2e-3  # seconds of one sample: short calls are repeated until they fill it, so that the clock resolves them
WALKS, NOISE = 1e-3, 1e-5  # of weights of order 1: the window has full rank, as a recorded one has
T_QUANTILES = (  # 0.975 of Student's t, degrees of freedom 1 to 10
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
)


@dataclass(frozen=True)
class Case:
    """Operators over a fully connected network of `layers` weight matrices, `width` x `width`, without biases.

    Attributes:
        operator: one of ``OPERATORS``; a node is a row of a matrix, a quasi-node `piece` consecutive weights of it.
        form: "state" or "snapshot".
        layers, width, window, piece: the paper's N, n, k and q.
    """

    operator: str
    form: str
    layers: int
    width: int
    window: int
    piece: int = 1

    @property
    def state(self) -> int:
        """Weights of a patch."""
        n = self.width
        return {"weight": 1, "node": n, "quasi-node": self.piece, "layer": n**2, "network": self.layers * n**2}[
            self.operator
        ]

    @property
    def patches(self) -> int:
        return self.layers * self.width**2 // self.state


def operations(case: Case, phase: str) -> int:
    """Multiplications, to leading order: what S7 counts in state form, and the same for the snapshot form.

    A patch of m weights in state form is an m x m matrix: ``U = B A^+`` from k >= m snapshots takes m^2 k, and ``U x``
    takes m^2. In snapshot form it is k x k, from a factor of the m x k window: m k^2, and k^2 for a step. Both times
    the number of patches, N n^2 / m. With m = 1, n, q, n^2 and N n^2 the state form takes

    =============  ==============  ===========
    operator       construction    iteration
    =============  ==============  ===========
    single weight  N n^2 k         N n^2
    node           N n^3 k         N n^3
    quasi-node     N n^2 q k       N n^2 q
    layer          N n^4 k         N n^4
    network        N^2 n^4 k       N^2 n^4
    =============  ==============  ===========

    Source: Dogra & Redman (2020), S7, for the state form.

    >>> operations(Case("node", "state", layers=3, width=10, window=20), "construction") == 3 * 10**3 * 20
    True
    """
    m, k = case.state, case.window
    if case.form == "state":
        return case.patches * (m**2 * k if phase == "construction" else m**2)
    return case.patches * (m * k**2 if phase == "construction" else k**2)


def theory(case: Case, phase: str, against: str) -> int:
    """The exponent of :func:`operations` against "n", "k", "q", or "N = n": as many layers as nodes in one.

    With "N = n" the window of the state form grows with the patch (k = m), as it must to determine the operator.

    >>> theory(Case("layer", "state", layers=1, width=4, window=16), "construction", "N = n")
    7
    """
    if against == "N = n":
        counts = [operations(_square(case, n), phase) for n in (2**8, 2**9)]
    else:
        name = {"n": "width", "k": "window", "q": "piece"}[against]
        at_first = replace(case, width=2**8, piece=2**4, window=2**8)
        counts = [operations(replace(at_first, **{name: size}), phase) for size in (2**5, 2**6)]
    return round(math.log2(counts[1] / counts[0]))


def _square(case: Case, n: int) -> Case:
    case = replace(case, width=n, layers=n)
    return replace(case, window=case.state) if case.form == "state" else case


def trajectories(case: Case, seed: int) -> Float[Tensor, "patch time state"]:
    """Weights that decay smoothly along four directions, walk at random a little, and are noisy.

    Returns:
        `(patches, time, state)` float64, every weight of the network in one patch.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    times = torch.linspace(0, 1, case.window, dtype=torch.float64)
    decays = torch.exp(-times.unsqueeze(1) * torch.tensor([0.0, 0.3, 1.0, 3.0], dtype=torch.float64))
    weights = case.patches * case.state
    walk = WALKS * normal(case.window, 4).cumsum(dim=0) / case.window**0.5
    window = (decays + walk) @ normal(4, weights) + NOISE * normal(case.window, weights)
    return window.reshape(case.window, case.patches, case.state).transpose(0, 1).contiguous()


@dataclass(frozen=True, eq=False)
class Built:
    """An operator ready to be iterated.

    Attributes:
        operator: as koopt fits it.
        matrix: `(patches, m, m)` in state form, the paper's U; `(patches, r, r)` with r < k in snapshot form.
        start: `(patches, m or r)`, the last snapshot or its coordinates.
    """

    operator: Operator
    matrix: Tensor
    start: Tensor


def build(case: Case, snapshots: Float[Tensor, "patch time state"]) -> Built:
    """Construct the operators of a case, in state form down to the matrix U itself."""
    operator = fit_in_form(snapshots, snapshot_form=case.form == "snapshot")
    if case.form == "snapshot":
        return Built(operator, operator.transition, operator.start)
    return Built(operator, operator.image @ operator.basis.mT, snapshots[:, -1])


def iterate(matrix: Float[Tensor, "patch r r"], states: Float[Tensor, "patch r"]) -> Float[Tensor, "patch r"]:
    """One step of every patch."""
    if matrix.shape[-1] == 1:
        return matrix[:, :, 0] * states
    return (states.unsqueeze(-2) @ matrix.mT).squeeze(-2)  # x^T U^T: torch takes a batch of U x several times slower


def walked(built: Built, horizon: int) -> Float[Tensor, "patch state"]:
    """The state after `horizon` >= 1 steps taken one by one, in either form."""
    states = built.start
    if not built.operator.snapshot_form:
        for _ in range(horizon):
            states = iterate(built.matrix, states)
        return states
    for _ in range(horizon - 1):
        states = iterate(built.matrix, states)
    coefficients = built.operator.image @ states.unsqueeze(-1)  # over the snapshots: the last step, and the way back
    return (coefficients.mT @ built.operator.snapshots).squeeze(-2)


def seconds(action: Callable[[], object], repeats: int, limit: float) -> float:
    """Processor seconds of one call, median of `repeats` samples after a first call that warms up.

    Args:
        action: called with no argument.
        repeats: samples.
        limit: a call that takes longer than half of it is not repeated, and all samples together stop at it.

    Processor time, not the wall's, so that other programs on the machine count less; the caller sees to one thread.
    """
    first = _clocked(action, 1)
    if first > limit / 2:
        return first
    calls = max(1, math.ceil(SAMPLE / max(_clocked(action, 1), 1e-9)))
    samples, end = [], time.perf_counter() + limit
    while len(samples) < repeats and (not samples or time.perf_counter() < end):
        samples.append(_clocked(action, calls))
    return statistics.median(samples)


def _clocked(action: Callable[[], object], calls: int) -> float:
    begin = time.process_time()
    for _ in range(calls):
        action()
    return (time.process_time() - begin) / calls


def exponent(sizes: Sequence[float], times: Sequence[float]) -> tuple[float, float, float]:
    """The exponent p of ``time = c size^p`` by least squares on logarithms, with its 95 % interval.

    Args:
        sizes: at least three, at most twelve, positive and not all alike.
        times: as many, positive.

    Returns:
        Exponent, and the lower and upper end of Student's t interval for independent errors of equal relative size;
        that the cost is no pure power is not in it.

    >>> [round(end, 6) for end in exponent([1, 2, 4, 8], [3, 12, 48, 192])]
    [2.0, 2.0, 2.0]
    """
    if not 3 <= len(sizes) == len(times) <= len(T_QUANTILES) + 2:
        raise ValueError(
            f"sizes and times have {len(sizes)} and {len(times)} entries, expected as many of both, "
            f"3 to {len(T_QUANTILES) + 2}"
        )
    x, y = np.log(np.asarray(sizes, dtype=float)), np.log(np.asarray(times, dtype=float))
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    freedom = len(x) - 2
    half = T_QUANTILES[freedom - 1] * np.sqrt(((y - slope * x) ** 2).sum() / freedom / (x @ x))
    return float(slope), float(slope - half), float(slope + half)
