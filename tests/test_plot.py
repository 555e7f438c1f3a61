"""Each figure draws on the Axes it is given, whatever the data; a warning is an error here."""

import io
import math
from itertools import pairwise

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from koopt import plot
from koopt.experiments import figure2, panels
from koopt.live.jumps import Jump

STEPS = np.arange(0, 1001, 50)
RNG = np.random.default_rng(0)
LOSS = 3 * np.exp(-STEPS / 800)[:, None] * RNG.uniform(0.5, 2, size=(1, 5))
NAN, INF = math.nan, math.inf


def broken(values):
    values = np.array(values, dtype=np.float64)
    values[tuple(size // 2 for size in values.shape)] = NAN
    values[tuple(size // 3 for size in values.shape)] = INF
    return values


def losses(loss, *forecasts):
    named = {f"forecast {i}": (800, np.asarray(values)) for i, values in enumerate(forecasts)}
    return {"steps": STEPS, "loss": loss, "window": (200, 400), "forecasts": named}


def shares(*columns):
    named = {f"method {i}\nT=1k": np.array(column, dtype=np.float64) for i, column in enumerate(columns)}
    return {"shares": {label: (values, values > 1.2) for label, values in named.items()}}


def paths(weights, forecast):
    ahead = STEPS[10:] + 500
    return {"steps": STEPS, "weights": weights, "t2": 500, "ahead": ahead, "forecast": forecast[: len(ahead)]}


def motions(moved, error):
    return {"motion": {"one": (np.array(moved), np.array(error)), "other": (np.array(moved), np.array(error) / 9)}}


def spectra(*values, zoom=None):
    return {"spectra": {f"operator {i}": np.array(v, dtype=complex) for i, v in enumerate(values)}, "zoom": zoom}


def growth(*errors):
    return {"ahead": [100, 200, 300], "errors": {f"method {i}": values for i, values in enumerate(errors)}}


def curves(*taken):
    sizes = np.array([16, 32, 64])
    return {"curves": {f"operator {i}": (sizes, np.array(t), 2.5 if i == 0 else None, 3) for i, t in enumerate(taken)}}


def gains(gain, expected):
    gain, expected = np.array(gain), np.array(expected)
    return {"rows": range(16, 16 + len(gain)), "columns": range(gain.shape[1]), "gain": gain, "expected": expected}


def learning(*errors):
    named = {f"curve {i}": (STEPS, error[:, 0], np.full(len(STEPS), 0.02)) for i, error in enumerate(errors)}
    return {"steps": STEPS, "smoothed": LOSS[:, 0] / 10, "window": 300, "curves": named}


def sizes(mean):
    errors = {f"operator {i}": np.array([mean, np.full(len(mean), 0.01)]) for i in range(3)}
    places = [10 * 3**i for i in range(len(mean))]
    return {"sizes": places, "errors": errors, "careful": errors, "baselines": {"training": errors["operator 0"]}}


def offers(offered, achieved=None):
    offered = np.array(offered, dtype=np.float64)
    achieved = offered if achieved is None else np.array(achieved, dtype=np.float64)
    share = np.linspace(1, 0, len(offered))
    return {
        "steps": STEPS[: len(offered)].tolist(),
        "offered": offered,
        "achieved": achieved,
        "failed": share,
        "fixed": 2500,
    }


def expectations(expected, actual):
    both = np.array(expected, dtype=np.float64), np.array(actual, dtype=np.float64)
    return {"pairs": {"one": both, "other": both}, "tolerance": 0.1}


def epochs(values, *found):
    named = {f"forecast {i}": (5.5, np.asarray(f, dtype=np.float64)) for i, f in enumerate(found)}
    return {"epochs": np.arange(1, len(values) + 1), "values": values, "window": (2, 5), "forecasts": named}


def changes(*columns):
    named = {f"way {i}": np.array(column, dtype=np.float64) for i, column in enumerate(columns)}
    return {"changes": named, "bold": "way 0"}


def sweep(*curves):
    named = {f"rank {i}": np.array(curve, dtype=np.float64) for i, curve in enumerate(curves)}
    return {"ahead": np.array([0.1, 0.5, 1.0]), "changes": named, "mark": 0.5}


WEIGHTS = np.sin(STEPS[:, None] / np.array([300, 500, 700]))
MOVED = RNG.lognormal(size=200)

CASES = {
    plot.loss_curves: {
        "many seeds": losses(LOSS, LOSS[-1], 2 * LOSS[-1]),
        "one seed": losses(LOSS[:, :1], [1.0]),
        "constant": losses(np.ones((len(STEPS), 3)), np.ones(3)),
        "constant zero": losses(np.zeros((len(STEPS), 3)), np.zeros(3)),
        "many decades": losses(LOSS**9, LOSS[-1] ** 9),
        "some NaN": losses(broken(LOSS), broken(LOSS[-1])),
        "only NaN": losses(LOSS, np.full(5, NAN), np.full(5, INF)),
        "training broke down": losses(np.full_like(LOSS, NAN), LOSS[-1]),
        "no forecast": losses(LOSS),
    },
    plot.equivalent_steps: {
        "many seeds": shares(RNG.uniform(0, 2, 25), RNG.uniform(0.9, 1.1, 25)),
        "one seed": shares([0.9], [7.0]),
        "constant": shares(np.ones(5)),
        "no success": shares(np.zeros(5), np.zeros(5)),
        "NaN": shares([0.5, NAN, 1.0], [NAN]),
        "more methods than colors": shares(*np.ones((9, 3))),
    },
    plot.weight_paths: {
        "weights": paths(WEIGHTS, WEIGHTS + 0.1),
        "one weight": paths(WEIGHTS[:, :1], WEIGHTS[:, :1]),
        "no motion": paths(np.zeros_like(WEIGHTS), np.zeros_like(WEIGHTS)),
        "forecast runs away": paths(WEIGHTS, WEIGHTS * 1e30),
        "NaN": paths(broken(WEIGHTS), broken(WEIGHTS)),
        "only NaN": paths(WEIGHTS * NAN, WEIGHTS * NAN),
    },
    plot.error_against_motion: {
        "weights": motions(MOVED, MOVED * RNG.lognormal(-3, size=200)),
        "one weight": motions([0.5], [0.1]),
        "constant": motions(np.ones(9), np.ones(9)),
        "no motion": motions(np.zeros(9), np.ones(9)),
        "no error": motions(np.ones(9), np.zeros(9)),
        "nothing at all": motions([], []),
        "NaN": motions(broken(MOVED), broken(MOVED * 0.1)),
        "only NaN": motions(np.full(9, NAN), np.full(9, INF)),
        "no method": {"motion": {}},
    },
    plot.eigenvalues: {
        "spectra": spectra([1.0, 0.9j, -0.3], [0.99, 0.98 + 0.1j]),
        "zoomed": spectra([1 + 1e-4j, 0.9999, 1.0001], [0.5, 0.999], zoom=2e-4),
        "zoomed widely": spectra([0.8, 0.9], zoom=0.25),
        "zeros are padding": spectra([0.0, 0.0, 1.0], [0.0]),
        "NaN": spectra([NAN, 1.0, INF], zoom=0.01),
        "none": spectra([]),
    },
    panels.epoch_curves: {
        "many seeds": epochs(LOSS, LOSS[-1], LOSS[-2]),
        "one seed": epochs(LOSS[:, :1], [0.5]),
        "constant": epochs(np.ones((9, 3)), np.ones(3)),
        "NaN": epochs(broken(LOSS), broken(LOSS[-1])),
        "only NaN": epochs(LOSS * NAN, [NAN, INF]),
        "no forecast": epochs(LOSS),
    },
    panels.paired_changes: {
        "ways": changes([-0.1, 0.2, -0.3], [0.1, 0.0, 0.0]),
        "one": changes([0.0]),
        "NaN": changes([NAN, 0.1], [-0.1, -0.2]),
    },
    panels.horizon_sweep: {
        "ranks": sweep([-0.04, -0.05, -0.03], [0.1, 0.2, 0.3]),
        "no gain": sweep([0.0, 0.0, 0.0]),
        "NaN": sweep([NAN, -0.1, INF]),
    },
    panels.error_curves: {
        "curves": learning(LOSS / 10, LOSS / 20),
        "NaN": learning(np.where(LOSS > 1, NAN, LOSS), np.where(LOSS > 1, INF, LOSS)),
        "only NaN": learning(np.full_like(LOSS, NAN)),
        "more curves than colors": learning(*[LOSS / 10] * 9),
    },
    panels.error_against_size: {
        "sizes": sizes([0.1, 0.2, 0.3]),
        "one size": sizes([0.1]),
        "NaN": sizes([0.1, NAN, INF]),
        "only NaN": sizes([NAN, NAN]),
    },
    panels.offered_horizons: {
        "many seeds": offers([[0, 100], [900, 1300], [4200, 4900]], [[0, 0], [900, 2800], [9400, 9400]]),
        "one seed": offers([[0], [900]]),
        "one time": offers([[0, 900]]),
        "all refused": offers(np.zeros((3, 2))),
        "NaN": offers(np.full((3, 2), NAN), [[INF, 1], [NAN, 2], [3, 4]]),
    },
    panels.calibration: {
        "errors": expectations([1e-3, 1e-2, 0.1], [1e-4, 2e-2, 0.05]),
        "one": expectations([1e-3], [1e-3]),
        "zeros": expectations([0, 0.1], [0, 0]),
        "NaN": expectations([NAN, INF, 0.1], [0.1, 0.1, NAN]),
        "none": expectations([], []),
    },
    plot.error_growth: {
        "methods": growth([1e-6, 1e-5, 1e-4], [0.1, 0.2, 0.4]),
        "constant": growth([1.0, 1.0, 1.0]),
        "no error": growth([0.0, 0.0, 0.0]),
        "NaN": growth([0.1, NAN, INF], [NAN, NAN, NAN]),
    },
    panels.scaling: {
        "operators": curves([1e-6, 1e-5, 1e-4], [2e-6, 2e-6, 2e-6]),
        "one point": curves([1e-6, NAN, NAN]),
        "constant": curves([1e-3, 1e-3, 1e-3]),
        "too large": curves([NAN, NAN, NAN]),
        "too fast for the clock": curves([0.0, 0.0, 1e-9]),
        "none": {"curves": {}},
    },
    panels.gains: {
        "a map": gains([[0.1, 2.0], [30.0, 4e5]], [[0.5, 2.0], [2.0, 2.0]]),
        "one cell": gains([[1.0]], [[1.0]]),
        "too large": gains([[0.5, NAN]], [[0.5, 2.0]]),
        "all too large": gains([[NAN, NAN]], [[2.0, 2.0]]),
    },
}


@pytest.mark.parametrize(
    ("function", "data"),
    [
        pytest.param(function, data, id=f"{function.__name__}: {name}")
        for function, cases in CASES.items()
        for name, data in cases.items()
    ],
)
def test_draws_on_the_axes_given(function, data):
    figure = matplotlib.figure.Figure(figsize=(4, 3), dpi=50)
    ax = figure.subplots()
    assert function(ax, **data) is ax
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert all(math.isfinite(edge) for edge in (*ax.get_xlim(), *ax.get_ylim()))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")  # ticks and layout are made here
    assert drawn.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "function", CASES.keys() - {panels.gains, panels.offered_horizons}, ids=lambda function: function.__name__
)
def test_every_method_stands_in_the_legend(function):
    data = next(iter(CASES[function].values()))
    ax = function(matplotlib.figure.Figure().subplots(), **data)
    names = [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else []
    names += [label.get_text() for label in (*ax.get_xticklabels(), *ax.get_yticklabels())]
    names += [name.partition(":")[0] for name in names]  # what follows is a figure
    given = next(
        (value for value in data.values() if isinstance(value, dict)), {"trained": 0, "forecast": 0, "$t_2$": 0}
    )
    assert set(given) <= set(names)


def points(ax):
    """The centers of all scattered marks."""
    return np.concatenate([marks.get_offsets() for marks in ax.collections if len(marks.get_offsets())])


def test_what_is_larger_than_drawn_is_marked():
    values, censored = np.array([0.5, 1.0, 9.0]), np.array([False, True, False])
    ax = plot.equivalent_steps(matplotlib.figure.Figure().subplots(), {"T": (values, censored)}, top=1.5)
    circles, triangles, _median = (marks for marks in ax.collections)
    assert circles.get_offsets()[:, 1].tolist() == [0.5]
    assert triangles.get_offsets()[:, 1].tolist() == [1.0, 1.5]


def test_median_bar_of_an_even_number_of_seeds():
    ax = plot.equivalent_steps(
        matplotlib.figure.Figure().subplots(), {"T": (np.array([0.0, 1.0]), np.zeros(2, dtype=bool))}
    )
    assert ax.collections[-1].get_segments()[0][:, 1].tolist() == [0.5, 0.5]


def test_padding_zeros_are_no_eigenvalues():
    ax = plot.eigenvalues(matplotlib.figure.Figure().subplots(), {"one": np.array([0, 0.5 + 0.25j, 0])})
    assert points(ax).tolist() == [[0.5, 0.25]]


def test_enlarged_eigenvalues_keep_their_place():
    values = np.array([1 - 2e-4 + 1e-4j, 0.5])
    ax = plot.eigenvalues(matplotlib.figure.Figure().subplots(), {"one": values}, zoom=3e-4)
    (inset,) = ax.child_axes
    assert inset.get_title() == r"$\lambda - 1$ in $10^{-4}$"
    assert points(inset)[0].tolist() == pytest.approx([-2, 1])
    assert inset.get_xlim() == pytest.approx((-3, 3))


def test_only_what_a_logarithm_shows_is_drawn():
    motion, error = np.array([1.0, 0.0, 2.0, NAN, 3.0]), np.array([0.1, 0.1, 0.0, 0.1, 0.3])
    ax = plot.error_against_motion(matplotlib.figure.Figure().subplots(), {"one": (motion, error)})
    assert points(ax).tolist() == [[1.0, 0.1], [3.0, 0.3]]


def test_a_narrow_loss_has_a_linear_axis_and_a_wide_one_a_logarithmic():
    narrow, wide = (
        plot.loss_curves(matplotlib.figure.Figure().subplots(), **losses(loss)) for loss in (1 + 0.01 * LOSS, LOSS**9)
    )
    assert (narrow.get_yscale(), wide.get_yscale()) == ("linear", "log")


def test_dotted_lines_have_the_slope_of_the_theory_and_end_at_the_largest_size():
    ax = panels.scaling(
        matplotlib.figure.Figure().subplots(),
        {"node": (np.array([4, 8, 16]), np.array([3.0, 8.0, NAN]), -0.04, 3)},
        colors=["red"],
    )
    measured, dotted = ax.get_lines()
    assert measured.get_xydata().tolist() == [[4, 3], [8, 8]]
    assert dotted.get_xydata().tolist() == [[4, 1], [8, 8]]
    assert {measured.get_color(), dotted.get_color()} == {"red"}
    assert ax.get_legend().get_texts()[0].get_text() == "node: 0.0 (3)"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["5"]


def test_gains_and_the_edge_of_where_they_are_expected():
    gain = np.array([[12.3, 0.456], [1234.0, NAN]])
    expected = np.array([[0.5, 2.0], [1.0, 2.0]])  # 1 is no gain
    ax = panels.gains(matplotlib.figure.Figure().subplots(), [16, 32], [1, 1024], gain, expected)
    assert {text.get_position(): text.get_text() for text in ax.texts} == {
        (0, 0): "12",
        (1, 0): "0.46",
        (0, 1): "1,234",
        (1, 1): "too large",
    }
    assert [line.get_xydata().tolist() for line in ax.get_lines()] == [
        [[0.5, -0.5], [0.5, 0.5]],
        [[0.5, 0.5], [0.5, 1.5]],
    ]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "1,024"]
    across = panels.gains(matplotlib.figure.Figure().subplots(), [16, 32], [1, 1024], gain, expected.T)
    assert [line.get_xydata().tolist() for line in across.get_lines()] == [
        [[-0.5, 0.5], [0.5, 0.5]],
        [[0.5, 0.5], [1.5, 0.5]],
    ]


def test_changes_are_in_percent_with_the_best_on_top_and_the_chosen_bold():
    ax = panels.paired_changes(
        matplotlib.figure.Figure().subplots(), {"a": np.array([-0.01, 0.03]), "b": np.array([-0.04, -0.02])}, bold="b"
    )
    labels = ax.get_yticklabels()
    assert [label.get_text() for label in labels] == ["a", "b"]
    assert [label.get_fontweight() for label in labels] == ["normal", "bold"]
    shown = [marks.get_offsets()[:, 0].tolist() for marks in ax.collections if len(marks.get_offsets()) == 2]
    assert shown == [pytest.approx([-1, 3]), pytest.approx([-4, -2])]


def test_error_curves_keep_their_values_and_bands():
    steps, mean, spread = np.array([0.0, 10.0]), np.array([0.2, 0.1]), np.array([0.02, 0.03])
    data = {"training": (steps, mean, spread), "operator": (steps, mean / 2, spread)}
    ax = panels.error_curves(matplotlib.figure.Figure().subplots(), steps, mean, 5, data)
    smoothed, first, second = (line.get_ydata().tolist() for line in ax.get_lines())
    assert (smoothed, first, second) == ([0.2, 0.1], [0.2, 0.1], [0.1, 0.05])
    bands = [set(np.round(band.get_paths()[0].vertices[:, 1], 6)) for band in ax.collections]
    assert bands == [{0.18, 0.22, 0.07, 0.13}, {0.08, 0.12, 0.02}]


def test_careful_data_are_drawn_in_the_color_of_their_operator():
    given = sizes([0.1, 0.2])
    given["careful"] = {label: 0.5 * errors for label, errors in given["errors"].items()}
    ax = panels.error_against_size(matplotlib.figure.Figure().subplots(), **given)
    lines = {bars.get_label(): bars.lines[0] for bars in ax.containers}
    for label in given["errors"]:
        plain, careful = lines[label], lines[f"{label}, careful"]
        assert plain.get_color() == careful.get_color()
        assert (plain.get_ydata().tolist(), careful.get_ydata().tolist()) == ([0.1, 0.2], [0.05, 0.1])
        assert plain.get_linestyle() != careful.get_linestyle()


def test_offered_and_achieved_horizons_are_medians_over_seeds():
    data = offers([[0, 0, 900], [100, 300, 400]], [[0, 100, 100], [900, 900, 2800]])
    ax = panels.offered_horizons(matplotlib.figure.Figure().subplots(), **data)
    achieved, offered, fixed = (line.get_ydata() for line in ax.get_lines())
    assert achieved.tolist() == [100, 900]
    assert offered.tolist() == [0, 300]
    assert list(fixed) == [2500, 2500]
    assert "share of seeds where 2,500 steps fail (right)" in ax.get_legend_handles_labels()[1]


def test_the_share_that_fails_has_an_axis_of_its_own():
    figure = matplotlib.figure.Figure()
    axes = figure.subplots(1, 2)
    for ax in axes:
        panels.offered_horizons(ax, **offers([[0], [900], [900]]) | {"failed": np.array([1.0, 0.5, 0.0])})
    figure.canvas.draw()
    left, right = (ax for ax in figure.axes if ax not in axes)
    (shade,) = right.collections
    assert shade.get_paths()[0].vertices[:, 1].max() == 100
    assert shade.get_datalim(right.transData).ymin == 0
    assert right.get_ylim() == (0, 100)
    assert [label.get_text() for label in right.get_yticklabels()] == ["0 %", "25 %", "50 %", "75 %", "100 %"]
    assert not any(label.get_visible() and label.get_text() for label in left.get_yticklabels())


def test_marks_stand_side_by_side_around_a_line_at_the_step_that_they_aim_at():
    ax = plot.loss_curves(matplotlib.figure.Figure().subplots(), **losses(LOSS, LOSS[-1], LOSS[-1]))
    labels = {line.get_label(): line for line in ax.lines}
    assert set(labels["step aimed at, marks side by side"].get_xdata()) == {800}
    places = [bars.lines[0].get_xdata()[0] for bars in ax.containers]
    assert len(set(places)) == 2
    assert np.mean(places) == 800


def test_the_horizon_that_was_chosen_ends_below_the_legend():
    ax = panels.horizon_sweep(matplotlib.figure.Figure().subplots(), **sweep([-0.04, -0.05, -0.03], [-0.01, 0, 0.1]))
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["chosen"].get_ydata()[1] == 0 < ax.get_ylim()[1]
    assert lines["rank 1"].get_color() == plot.COLORS[1]
    assert len({str(line.get_color()) for line in lines.values()}) == len(lines) - 1  # chosen and zero are both ink


@pytest.mark.parametrize(("entries", "columns"), [(3, 3), (5, 5), (7, 4), (11, 4)])
def test_one_legend_in_place_of_those_in_the_panels(entries, columns):
    figure = matplotlib.figure.Figure(layout="constrained")
    axes = figure.subplots(1, 2)
    for ax in axes:
        for i in range(entries):
            ax.plot([0, 1], label=f"line {i}")
        ax.legend()
    figure2.one_legend(figure, list(axes))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"line {i}" for i in range(entries)]
    assert legend._ncols == columns
    assert [ax.get_legend() for ax in axes] == [None, None]


def jump(step, before, after, accepted, moves=1):
    reason, evaluations = "better" if accepted else "no better", 0 if before is None else 3
    return Jump(step, "koopman", 4, 38.7, before, after, accepted, reason, evaluations, 0.01, moves * accepted)


def test_attempts_that_are_not_drawn_are_counted():
    jumps = [jump(10, 3.0, 2.0, True), jump(20, None, None, False), jump(30, 1.5, 1.6, False), jump(40, 1.0, 0.9, True)]
    axes = matplotlib.figure.Figure().subplots(3)
    plot.guarded_jumps(axes[0], jumps)
    assert axes[0].get_title() == "4 attempts: 2 accepted, 1 refused, 1 without a loss, not drawn"
    assert [text.get_text() for text in axes[0].get_legend().get_texts()][1:] == ["accepted jump", "refused"]
    plot.guarded_jumps(axes[1], jumps[:2])
    assert axes[1].get_title() == "2 attempts: 1 accepted, 1 without a loss, not drawn"
    assert [text.get_text() for text in axes[1].get_legend().get_texts()][1:] == ["accepted jump"]
    plot.guarded_jumps(axes[2], [])
    assert axes[2].get_title() == "0 attempts"


def test_moves_that_follow_one_another_end_where_the_last_one_was():
    axes = matplotlib.figure.Figure().subplots()
    plot.guarded_jumps(axes, [jump(20, 3.0, 0.5, True, 101), jump(140, 0.4, 0.3, True)])
    assert axes.get_title() == "2 attempts: 2 accepted (in 102 moves)"
    path, first, *_ = (line.get_xydata().tolist() for line in axes.get_lines())
    assert path == [[20, 3.0], [120, 0.5], [140, 0.4], [140, 0.3]]
    assert first == [[20, 3.0], [120, 0.5]]


def test_calibration_counts_what_came_below_what_was_expected():
    pairs = {"one": (np.array([0.1, 0.2, 0.3, 0.4, 0.0]), np.array([0.1, 0.1, 0.1, 0.5, 0.1]))}
    ax = panels.calibration(matplotlib.figure.Figure().subplots(), pairs, 0.2)
    assert ax.get_legend().get_texts()[0].get_text() == "one: 75% below expected"
    assert points(ax).tolist() == [[0.1, 0.1], [0.2, 0.1], [0.3, 0.1], [0.4, 0.5]]
    diagonal, tolerance = (line.get_xydata().tolist() for line in ax.get_lines())
    assert diagonal == [[0.1, 0.1], [0.5, 0.5]]
    assert {x for x, _ in tolerance} == {0.2}


def mode(group, half_life, real=0.9):
    return {"group": group, "real": real, "imaginary": 0.0, "modulus": real, "half_life": half_life}


def spectrum_figure(rows, by="layer"):
    """The figure as drawn, its panel of half-lives, and the boxes of that panel's texts along the axis."""
    figure = plot.checkpoint_spectra(matplotlib.figure.Figure(figsize=(9.5, 4.4), layout="constrained"), rows, by)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    lives = figure.axes[1]
    low, high = lives.get_xlim()
    shown = [tick for tick in lives.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    return figure, lives, [tick.label1.get_window_extent(canvas.get_renderer()) for tick in shown], canvas


@pytest.mark.parametrize("longest", [100.0, 130.0, 700.0, 3e3, 2e5, 3e9])
@pytest.mark.parametrize("name", ["layer.{}", "base_model.model.encoder.layers.{}.self_attention.query_projection"])
def test_half_lives_have_a_few_labels_that_do_not_overlap(longest, name):
    rows = [mode(name.format(i), float(life)) for i, life in enumerate(np.geomspace(100.0, longest, 12))]
    figure, lives, boxes, canvas = spectrum_figure(rows)
    assert 1 <= len(boxes) <= 8
    assert all(one.x1 < other.x0 for one, other in pairwise(sorted(boxes, key=lambda box: box.x0)))
    label = lives.xaxis.label.get_window_extent(canvas.get_renderer())
    assert 0 <= label.x0 < label.x1 <= figure.bbox.x1
    names = [text.get_text() for text in lives.get_yticklabels()]
    assert len(set(names)) == 12
    assert all(f".{i}" in f".{text.removeprefix('...')}" for i, text in enumerate(names))


def test_a_spectrum_without_decay_says_so():
    _, lives, boxes, _ = spectrum_figure([mode("network", None, 1.0)], by="network")
    assert [text.get_text() for text in lives.texts] == ["no mode decays"]
    assert (boxes, lives.get_xlabel(), lives.get_ylabel()) == ([], "", "network")


def test_names_with_dollars_are_no_mathematics():
    _, lives, _, _ = spectrum_figure([mode(r"a$\foo$", 10.0)])
    assert lives.get_yticklabels()[0].get_text() == r"a$\foo$"
