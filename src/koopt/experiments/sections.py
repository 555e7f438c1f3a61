"""What the report says about each experiment, and which columns of its rows it shows."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Section:
    """One experiment.

    Attributes:
        title, covers: its heading, and where it stands in the paper.
        about: what is done, in a sentence or two.
        tables: kind of row ("" where rows have none) -> title, and row key -> heading; keys that no row has are left
            out. Kinds that are not named are not shown; a section without tables shows whatever its rows hold.
        captions: what a figure's file name starts with -> its caption.
    """

    title: str
    covers: str
    about: str
    tables: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)


RESULTS = {
    "what": "how",
    "success": "success",
    "teq_over_T": "T_eq/T",
    "teq_over_T_mean": "its mean",
    "censored": "censored",
    "error_over_motion": "error / motion",
    "accuracy": "accuracy",
    "loss": "loss",
    "speedup": "speed-up",
    "speedup_with_recording": "with recording",
    "window": "window",
    "stride": "stride",
    "rank": "rank",
}
MNIST = {
    "what": "how",
    "success": "success",
    "teq_over_T": "T_eq/T",
    "teq_over_T_mean": "its mean",
    "teq_over_T_error": "±",
    "censored": "censored",
    "teq_over_T_dip": "by first dip",
    "loss": "loss",
    "accuracy": "accuracy",
    "error_over_motion": "error / motion",
    "speedup": "speed-up",
    "speedup_with_recording": "with recording",
    "recording_share": "recording / step",
}
HORIZON = {
    "t2": "t₂",
    "what": "forecast by",
    "accepted": "offers all of T",
    "horizon": "steps offered",
    "success": "success",
    "worst_loss": "worst loss",
    "teq_over_T": "T_eq/T",
    "teq_over_T_mean": "its mean",
    "teq_over_T_error": "±",
    "error_over_motion": "error / motion",
    "expected_error": "expected",
    "within": "within expected",
}
NOISE = {
    "what": "window",
    "networks": "networks",
    "refused": "refused",
    "reason": "reason",
    "drift_over_noise": "drift / noise",
}
PERCEPTRON = {
    "data": "fitted to",
    "fit": "fit",
    "window": "window",
    "success": "success",
    "error_start": "error, window's end",
    "error_trained": "error, trained on",
    "error": "error, forecast",
    "error_se": "±",
    "max_modulus": "max |λ|",
}
EXPONENTS = {
    "operator": "operator",
    "form": "form",
    "phase": "phase",
    "against": "against",
    "theory": "theory",
    "exponent": "measured",
    "low": "95 % from",
    "high": "to",
    "sizes": "fitted to",
}
SAVINGS = {
    "operator": "operator",
    "n": "n",
    "m": "weights",
    "k": "k",
    "state_construction_ms": "construction, ms",
    "snapshot_construction_ms": "snapshot form",
    "saving_construction": "saved",
    "state_iteration_us": "iteration, µs",
    "snapshot_iteration_us": "snapshot form",
    "saving_iteration": "saved",
    "saving": "saved in all",
    "saving_memory": "memory saved",
}
PAYS = {
    "operator": "operator",
    "form": "form",
    "n": "n",
    "j": "batch j",
    "step_us": "training step, µs",
    "iteration_us": "iteration, µs",
    "gain_iteration_theory": "gain, theory",
    "gain_iteration": "gain",
    "gain_theory": "with construction, theory",
    "gain": "with construction",
    "gain_at_once": "T steps at once",
}

SECTIONS = {
    "de-solver": Section(
        "Differential-equation solver",
        "Section 4, Table 1, Figures 2, S5 and S6",
        "A small network solves a nonlinear oscillator. Operators are fitted to its weights between steps t₁ and t₂ "
        "and move them T steps on; the jump is compared with the training that it replaces.",
        {"": ("", RESULTS)},
        {
            "figure2-adam": "After Figure 2 of the paper, with Adam.",
            "figure2-adagrad": "The same with Adagrad (Figures S5 and S6 of the supplement show other optimizers).",
            "figure2-adadelta": "The same with Adadelta.",
            "error-ahead": "Not in the paper: the error of the weights against how far ahead the jump goes.",
        },
    ),
    "mnist": Section(
        "Handwritten digits",
        "Section 5, Table 2, Figures 3 and S10",
        "A classifier trained on mini-batches of MNIST. Settings are chosen on validation data of other seeds; test "
        "data are seen once, at the end. T_eq is read from the loss at the end of each epoch, straight between them; "
        "“by first dip” takes the first of twenty evaluations an epoch that is as low, which noise brings early.",
        {"": ("", MNIST)},
        {"figure3": "After Figure 3 of the paper, with two baselines and how far ahead to aim."},
    ),
    "perceptron": Section(
        "Perceptron",
        "S8, Table S3, Figure S4",
        "A perceptron that sees every example once: noisy training, with operators from single weights to the whole "
        "network.",
        {"operators": ("Operators", PERCEPTRON), "size": ("Larger perceptrons", PERCEPTRON)},
        {
            "figure-s4b": "As in Figure S4: the error in training and of the forecasts.",
            "figure-s4d": "As in Figure S4: weights as trained and as forecast.",
            "perceptron-size": "Not in the paper: larger perceptrons, and what careful data change.",
        },
    ),
    "complexity": Section(
        "Complexity",
        "S7",
        "What an operator costs as networks grow. The paper counts powers of the width n, the number of layers N and "
        "the window k; held in the span of the recorded snapshots, the same operator costs time in proportion to the "
        "number of weights.",
        {
            "exponent": ("Exponents, as counted and as measured", EXPONENTS),
            "saving": ("What the snapshot form saves", SAVINGS),
            "pays": ("Where a jump costs less than training", PAYS),
        },
        {
            "complexity-scaling": "Time against the width, in theory and as measured.",
            "complexity-pays": "Where a jump costs less than the training steps that it replaces.",
        },
    ),
    "horizon": Section(
        "How far ahead",
        "the paper's open question",
        "When to start and when to stop: koopt.plan looks at the window alone, holds its newer part out, and offers a "
        "horizon or refuses. Compared with what came, all along the runs of the DE solver and under mini-batches.",
        {
            "jump": ("One jump from t₂", HORIZON),
            "sweep": ("All along the run", HORIZON),
            "noise": ("Under mini-batches", NOISE),
        },
        {
            "horizon-offered": "Not in the paper: the horizon offered and the one achieved, by the jump's first step.",
            "horizon-calibration": "Not in the paper: the error that came against the one expected from the window.",
        },
    ),
}
