"""PNG figures of a search: how its best grew, and which values its trials had."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestration.plots import DOTS_PER_INCH
from orchestration.search.records import TrialRecord
from orchestration.search.space import Distribution

COLOURS = {"finished": "#2b6cb0", "stopped": "#c9a227", "failed": "#c53030"}


def plot_best_so_far(records: Sequence[TrialRecord], metric: str, path: Path, title: str) -> None:
    """Write each trial's last value by number, and the best finished one until then."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for ended, colour in COLOURS.items():
        points = [(r.number, r.value(metric)) for r in records if r.ended == ended and r.curve]
        if points:
            numbers, values = zip(*points, strict=True)
            axes.scatter(numbers, values, s=14, color=colour, alpha=0.8, label=ended)
    best, line = float("nan"), []
    for record in records:
        if record.ended == "finished" and not best >= record.value(metric):
            best = record.value(metric)
        line.append(best)
    axes.step([record.number for record in records], line, where="post", color="black", label="best finished")
    axes.set_xlabel("trial")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _write(figure, path, title)


def plot_parallel_coordinates(
    records: Sequence[TrialRecord], knobs: dict[str, Distribution], metric: str, path: Path, title: str
) -> None:
    """Write a line for each finished or stopped trial through its values, dark where the metric is high."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    drawn = sorted((r for r in records if r.curve), key=lambda r: r.value(metric))
    figure = Figure(figsize=(max(6.0, 1.25 * len(knobs) + 2), 4.6), layout="constrained")
    axes = figure.add_subplot()
    for place, record in enumerate(drawn):
        heights = [_height(distribution, record.params[knob]) for knob, distribution in knobs.items()]
        share = (place + 1) / len(drawn)  # by rank: one bad trial would leave no colours for the others
        axes.plot(range(len(knobs)), heights, color=colormaps["viridis_r"](share), alpha=0.15 + 0.75 * share**4)
    for place, distribution in enumerate(knobs.values()):
        for height, text in _marks(distribution):
            axes.annotate(text, (place, height), xytext=(4, 0), textcoords="offset points", fontsize=7, va="center")
    axes.set_xticks(range(len(knobs)), [knob.replace(".", "\n") for knob in knobs], fontsize=8)
    axes.set_yticks([])
    axes.grid(axis="x")
    axes.spines[:].set_visible(False)
    _write(figure, path, f"{title}\nlines by rank in {metric}: dark is best")


def _height(distribution: Distribution, value: Any) -> float:
    """Place of a value between the ends of its distribution, 0 to 1."""
    import math

    if distribution.choices is not None:
        return distribution.choices.index(value) / max(len(distribution.choices) - 1, 1)
    assert distribution.low is not None
    assert distribution.high is not None
    low, high, value = (math.log(x) if distribution.log else x for x in (distribution.low, distribution.high, value))
    return float((value - low) / (high - low))


def _marks(distribution: Distribution) -> list[tuple[float, str]]:
    """(height, text) of what stands beside an axis."""
    return [(_height(distribution, value), str(value)[:24]) for value in distribution.examples()]


def _write(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=11, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DOTS_PER_INCH)
