"""Draw the PNG figures of a run. C classes.

A title says which data and weights a figure shows, for instance "random weights". Matplotlib is imported in functions;
a bare Figure draws with Agg and leaves pyplot's global state alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

DOTS_PER_INCH = 200
SMOOTHED_POINTS = 50
SHOWN_KNOBS = 8


class SizeRow(TypedDict):
    """One model size of a family."""

    name: str
    note: str
    """What is not real about it, for instance "random weights"; empty otherwise."""
    loss_against_tokens: list[tuple[float, float]]
    """Tokens seen and loss (nats a token), in the order of steps; without any point there is no panel for it."""
    figures: dict[str, tuple[float, str]]
    """A value and its unit for each quantity, for instance "tokens/s"; the same quantities in every row."""


def plot_confusion(confusion: ArrayLike, words: Sequence[str], path: Path, title: str) -> None:
    """Write the confusion matrix: colour is the share of the true class, the number counts samples.

    Args:
        confusion: (C, C) counts, rows the true class; nested lists, an array or a tensor.
        words: C labels.
        path: of the PNG.
        title: says which data and weights the figure shows.
    """
    import numpy as np
    from matplotlib.figure import Figure

    num_classes = len(words)
    counts = np.asarray(confusion)
    num_samples = counts.sum(axis=1)
    shares = counts / np.maximum(num_samples, 1)[:, None]
    side_inches = max(4.5, 0.42 * num_classes + 2.2)
    figure = Figure(figsize=(side_inches + 0.8, side_inches), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = [f"{word} ({number})" for word, number in zip(words, num_samples, strict=True)]
    axes.set_xticks(range(num_classes), words, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(num_classes), labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true (number of samples)")
    for true, predicted in np.argwhere(counts):
        colour = "white" if shares[true, predicted] > 0.55 else "black"
        size = 9 if num_classes <= 10 else 7
        text = str(counts[true, predicted])
        axes.text(predicted, true, text, ha="center", va="center", color=colour, fontsize=size)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    _write(figure, path, title)


def plot_reliability(bins: Sequence[Mapping[str, Any]], error: float, path: Path, title: str) -> None:
    """Write a reliability plot: accuracy against confidence, and how many images have which confidence.

    Args:
        bins: with low, high, count, confidence and accuracy; the last two are None where count is 0.
        error: expected calibration error, in [0, 1].
        path: of the PNG.
        title: says which data and weights the figure shows.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    filled = [row for row in bins if row["count"]]
    lows, widths = [row["low"] for row in filled], [row["high"] - row["low"] for row in filled]
    above.bar(lows, [row["accuracy"] for row in filled], widths, align="edge", edgecolor="white", label="accuracy")
    means = [row["confidence"] for row in filled]
    above.plot([0, 1], [0, 1], color="grey", linestyle="--", label="calibrated")
    above.plot(means, [row["accuracy"] for row in filled], "o", color="C1", markersize=4, label="mean confidence")
    above.set_ylabel(f"accuracy (calibration error {error:.3f})")
    above.set_ylim(0, 1)
    above.legend(frameon=False, loc="upper left")
    below.bar(lows, [row["count"] for row in filled], widths, align="edge", edgecolor="white", color="grey")
    below.set_xlabel("confidence")
    below.set_ylabel("images")
    below.set_xlim(0, 1)
    _write(figure, path, title)


def plot_curves(curves: dict[str, list[tuple[int, float]]], path: Path, title: str) -> None:
    """Write curves over steps, accuracies in a panel of their own.

    A long curve is drawn pale, with its running mean over a fiftieth of its points on top.

    Args:
        curves: steps and values of each metric; one without points is left out.
        path: of the PNG.
        title: says which data and weights the figure shows.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    drawn = {name: sorted(points) for name, points in curves.items() if points}
    accuracies = [name for name in drawn if name.endswith(("accuracy", "recall"))]
    others = [name for name in drawn if name not in accuracies]
    panels = [(label, names) for label, names in (("loss", others), ("accuracy", accuracies)) if names]
    figure = Figure(figsize=(5.2 * max(len(panels), 1), 3.8), layout="constrained")
    for position, (label, names) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), position + 1)
        for number, name in enumerate(names):
            _draw_curve(axes, drawn[name], name, f"C{number + 3 * position}")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        if label == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _write(figure, path, title)


def plot_sizes(rows: Sequence[SizeRow], path: Path, title: str) -> None:
    """Write loss against tokens with one curve for each size, and a panel of bars for each figure.

    Bars of a size with a note are hatched.

    Args:
        rows: in the order to draw them.
        path: of the PNG.
        title: says which data the figure shows.
    """
    from matplotlib.figure import Figure

    names = list(rows[0]["figures"])
    has_curves = any(row["loss_against_tokens"] for row in rows)
    widths = [2.2] * has_curves + [1.0] * len(names)
    width_inches = 6.4 + 2.6 * len(names) if has_curves else max(6.4, 2.6 * len(names))
    figure = Figure(figsize=(width_inches, 4.2), layout="constrained")
    panels = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
    if has_curves:
        curves = panels.pop(0)
        for position, row in enumerate(rows):
            tokens, losses = zip(*row["loss_against_tokens"], strict=True)
            label = f"{row['name']}, {row['note']}" if row["note"] else row["name"]
            marker = "o" if len(losses) <= 20 else None
            curves.plot(tokens, losses, color=f"C{position}", label=label, marker=marker, markersize=4)
        curves.set_xlabel("tokens seen")
        curves.set_ylabel("training loss (nats a token)")
        curves.legend(frameon=False, fontsize=8)
    marks = [row["name"] if has_curves else f"{row['name']}\n{row['note']}".strip() for row in rows]
    for axes, name in zip(panels, names, strict=True):
        values = [row["figures"][name][0] for row in rows]
        bars = axes.bar(range(len(rows)), values, 0.62, color=[f"C{position}" for position in range(len(rows))])
        for bar, row in zip(bars, rows, strict=True):
            bar.set(hatch="///" if row["note"] else None, alpha=0.6 if row["note"] else 1.0)
        axes.bar_label(bars, [f"{value:,.3g}" for value in values], padding=2, fontsize=8)
        axes.set_xticks(range(len(rows)), marks, rotation=35, ha="right", fontsize=8)
        axes.set_title(f"{name} ({rows[0]['figures'][name][1]})", fontsize=9)
        axes.set_ylim(0, 1.15 * max(values) or 1.0)
    for axes in figure.axes:
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    _write(figure, path, title)


def plot_search(study: Any, metric: str, folder: Path, title: str) -> None:
    """Write Optuna's figures of a search: its best value so far, what each knob matters, and the values of its trials.

    Args:
        study: an `optuna.Study` with finished trials; of several objectives the first one is drawn.
        metric: name of that objective.
        folder: for best_so_far.png, importances.png and parallel_coordinates.png.
        title: says which data and weights the figures show.
    """
    import warnings

    import matplotlib.pyplot as plt
    from optuna.importance import get_param_importances
    from optuna.visualization import matplotlib as drawing

    plt.switch_backend("agg")
    what: dict[str, Any] = {"target_name": metric}
    if len(study.directions) > 1:
        what["target"] = lambda trial: trial.values[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls its figures experimental
        drawn = {"best_so_far": drawing.plot_optimization_history(study, **what)}
        if len({trial.values[0] for trial in study.trials}) > 1:
            knobs = list(get_param_importances(study, target=what.get("target")))[:SHOWN_KNOBS]
            drawn["importances"] = drawing.plot_param_importances(study, **what)
            drawn["parallel_coordinates"] = drawing.plot_parallel_coordinate(study, knobs, **what)
    for name, axes in drawn.items():
        axes.figure.set_size_inches(11, 5)
        axes.set_title(name.replace("_", " "))
        _write(axes.figure, folder / f"{name}.png", title, bbox_inches="tight")
        plt.close(axes.figure)


def _draw_curve(axes: Any, points: list[tuple[int, float]], name: str, colour: str) -> None:
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    window = len(points) // SMOOTHED_POINTS
    if window < 2:
        axes.plot(steps, values, color=colour, label=name, marker="o" if len(points) <= 20 else None, markersize=4)
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    smooth = [sum(values[end - window : end]) / window for end in range(window, len(values) + 1)]
    axes.plot(steps[window - 1 :], smooth, color=colour, label=f"{name} (mean of {window})")


def _write(figure: Any, path: Path, title: str, **options: Any) -> None:
    figure.suptitle(title, fontsize=11, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DOTS_PER_INCH, **options)
