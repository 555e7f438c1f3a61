"""What `koopt bench` compares, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from koopt.bench.method import Observer, Trainer
from koopt.bench.methods import attached, averages, jumping, quasi_newton, training
from koopt.live import eigenbases

if TYPE_CHECKING:
    from koopt.bench.task import Task


def _with_cosine(task: Task) -> list[dict[str, Any]]:
    """The search of the baseline, without its other schedules."""
    return [setting for setting in training.searched(task) if setting["schedule"] == "cosine"]


def _with_adam(task: Task) -> list[dict[str, Any]]:
    """The search of the baseline, without other optimizers."""
    return [setting for setting in training.searched(task) if setting["optimizer"] in ("adam", "adamw")]


_ALL: tuple[Trainer | Observer, ...] = (
    Trainer("optimizer", training.start_plain, training.searched, title="tuned optimizer"),
    Trainer("cosine", training.start_plain, _with_cosine, full_batch=True, title="the same with a cosine"),
    # what is left out for a guard costs data: the same optimizer without them
    Trainer(
        "guarded",
        training.start_plain,
        training.searched,
        guard=True,
        full_batch=False,
        title="tuned optimizer without the guard's examples",
    ),
    Observer("ema", averages.start_ema, averages.DECAYS, title="EMA"),
    Observer("dema", averages.start_dema, averages.DOUBLES, title="double EMA"),
    Observer("lawa", averages.start_lawa, averages.LATEST, title="mean of the last weights (LAWA)"),
    Observer("regression", averages.start_regression, averages.LINES, title="regression line"),
    Trainer("lookahead", training.start_lookahead, training.searched, training.LOOKAHEADS, title="Lookahead"),
    Trainer(
        "schedule-free",
        training.start_schedule_free,
        training.schedule_free_settings,
        training.MOMENTA,
        title="Schedule-Free",
    ),
    Trainer("soap", training.start_soap, training.soap_settings, training.SOAPS, title="SOAP"),
    Trainer("lbfgs", quasi_newton.start, quasi_newton.settings, full_batch=True, title="L-BFGS"),
    Trainer(
        "scaled-lbfgs", quasi_newton.start_scaled, quasi_newton.settings, full_batch=True, title="self-scaled L-BFGS"
    ),
    Trainer(
        "line",
        jumping.start_line,
        training.searched,
        jumping.LINES,
        guard=True,
        full_batch=True,
        title="guarded straight line",
    ),
    Trainer(
        "anderson",
        jumping.start_anderson,
        training.searched,
        jumping.ANDERSONS,
        guard=True,
        full_batch=True,
        title="guarded Anderson",
    ),
    # in noisy training jumps do harm: copies for evaluation
    Observer(
        "line-copy",
        averages.start_line_copy,
        averages.SHARES,
        beside="guarded",
        title="straight line, horizon by the guard",
    ),
    Observer(
        "anderson-copy", averages.start_anderson_copy, averages.SHARES, beside="guarded", title="Anderson, by the guard"
    ),
    Trainer(
        "koopt",
        attached.start(training.start_plain),
        attached.grid(),
        guard=True,
        without=("guarded", "optimizer"),
        title="**koopt**",
    ),
    Trainer(
        "koopt-jumps",
        attached.start(training.start_plain, history=0, precondition=0),
        attached.grid(),
        guard=True,
        full_batch=True,
        without=("optimizer",),
        title="koopt, history=0",
    ),
    Trainer(
        "koopt-no-guard",
        attached.start(training.start_plain, False),
        attached.grid(),
        full_batch=False,
        without=("optimizer",),
        title="koopt without a guard",
    ),
    Trainer(
        "koopt-preconditioned",
        attached.start(training.start_plain, False, precondition=eigenbases.LARGEST),
        attached.grid(_with_adam),
        full_batch=False,
        without=("optimizer",),
        title="koopt without a guard, precondition=256",
    ),
    Trainer(
        "koopt-lbfgs",
        attached.start(quasi_newton.start),
        attached.grid(quasi_newton.settings),
        guard=True,
        full_batch=True,
        without=("lbfgs",),
        title="koopt on L-BFGS",
    ),
    Trainer(
        "koopt-soap",
        attached.start(training.start_soap),
        attached.grid(training.soap_settings),
        training.SOAPS,
        guard=True,
        full_batch=True,
        without=("soap",),
        title="koopt on SOAP",
    ),
    Trainer(
        "koopt-schedule-free",
        attached.start(training.start_schedule_free),
        attached.grid(training.schedule_free_settings),
        training.MOMENTA,
        guard=True,
        full_batch=False,
        title="koopt on Schedule-Free",
    ),
)
METHODS: dict[str, Trainer | Observer] = {method.name: method for method in _ALL}
