"""What `koopt bench` compares, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from koopt.bench.method import Observer, Trainer
from koopt.bench.methods import attached, averages, jumping, quasi_newton, training

if TYPE_CHECKING:
    from koopt.bench.task import Task


def _with_cosine(task: Task) -> list[dict[str, Any]]:
    """The search of the baseline, without its other schedules."""
    return [setting for setting in training.searched(task) if setting["schedule"] == "cosine"]


_ALL: tuple[Trainer | Observer, ...] = (
    Trainer("optimizer", training.start_plain, training.searched),
    Trainer("cosine", training.start_plain, _with_cosine, full_batch=True),
    # what is left out for a guard costs data: the same optimizer without them
    Trainer("guarded", training.start_plain, training.searched, guard=True, full_batch=False),
    Observer("ema", averages.start_ema, averages.DECAYS),
    Observer("dema", averages.start_dema, averages.DOUBLES),
    Observer("lawa", averages.start_lawa, averages.LATEST),
    Observer("regression", averages.start_regression, averages.LINES),
    Trainer("lookahead", training.start_lookahead, training.searched, training.LOOKAHEADS),
    Trainer("schedule-free", training.start_schedule_free, training.schedule_free_settings, training.MOMENTA),
    Trainer("soap", training.start_soap, training.soap_settings, training.SOAPS, full_batch=True),
    Trainer("lbfgs", quasi_newton.start, quasi_newton.settings, full_batch=True),
    Trainer("scaled-lbfgs", quasi_newton.start_scaled, quasi_newton.settings, full_batch=True),
    Trainer("line", jumping.start_line, training.searched, jumping.LINES, guard=True, full_batch=True),
    Trainer("anderson", jumping.start_anderson, training.searched, jumping.ANDERSONS, guard=True, full_batch=True),
    # in noisy training jumps do harm: copies for evaluation
    Observer("line-copy", averages.start_line_copy, averages.SHARES, beside="guarded"),
    Observer("anderson-copy", averages.start_anderson_copy, averages.SHARES, beside="guarded"),
    Trainer(
        "koopt", attached.start(training.start_plain), attached.grid(), guard=True, without=("guarded", "optimizer")
    ),
    Trainer(
        "koopt-no-guard",
        attached.start(training.start_plain, False),
        attached.grid(),
        full_batch=False,
        without=("optimizer",),
    ),
    Trainer(
        "koopt-lbfgs",
        attached.start(quasi_newton.start),
        attached.grid(quasi_newton.settings),
        guard=True,
        full_batch=True,
        without=("lbfgs",),
    ),
    Trainer(
        "koopt-soap",
        attached.start(training.start_soap),
        attached.grid(training.soap_settings),
        training.SOAPS,
        guard=True,
        full_batch=True,
        without=("soap",),
    ),
    Trainer(
        "koopt-schedule-free",
        attached.start(training.start_schedule_free),
        attached.grid(training.schedule_free_settings),
        training.MOMENTA,
        guard=True,
        full_batch=False,
    ),
)
METHODS: dict[str, Trainer | Observer] = {method.name: method for method in _ALL}
