"""Charts of the report as SVG inside the page: text stays text, nothing is fetched, and an identifier occurs once.

A chart is drawn for the width of a phone and never says what the table beside it does not say. What is not real (random
weights, generated data) or leaked stands in the chart's own title or labels.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, BLUE, ORANGE, GREY, GREEN = "#1b1f24", "#1f5fa8", "#b3500b", "#8a929c", "#1d7a46"
WIDTH_INCHES = 4.6
FONT_POINTS = 9.5
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tinyemo",
    "font.family": ["sans-serif"],
    "font.size": FONT_POINTS,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Bar:
    """A value with its interval on a line of its own.

    Attributes:
        low, high: limits of the interval; None where there is none.
        is_marked: drawn hollow, because what it stands for is not real, leaked or not decided on.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    is_marked: bool = False


@rc_context(SETTINGS)
def intervals(bars: Sequence[Bar], title: str, axis: str, *, zero: float | None = None, key: str) -> str:
    """Return a chart with one line for each bar: a dot at the value, a stroke over the interval.

    Args:
        bars: from top to bottom.
        title: says which data and weights the chart shows.
        axis: quantity and unit.
        zero: place of a vertical line, for instance no difference.
        key: of the chart in the page, letters and digits.
    """
    figure = _figure(0.9 + 0.27 * len(bars))
    axes = figure.add_subplot()
    for place, bar in enumerate(bars):
        if bar.low is not None and bar.high is not None:
            axes.plot([bar.low, bar.high], [place, place], color=BLUE, linewidth=2, solid_capstyle="butt")
        face = "white" if bar.is_marked else BLUE
        axes.plot([bar.value], [place], "o", markersize=6, color=BLUE, markerfacecolor=face)
    if zero is not None:
        axes.axvline(zero, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(bars)), [_cut(bar.name) for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlabel(axis)
    said = ", ".join(f"{bar.name} {bar.value:.3g}" for bar in bars)
    return _svg(figure, axes, title, said, key)


@rc_context(SETTINGS)
def sizes(bars: Sequence[Bar], title: str, axis: str, *, key: str) -> str:
    """Return bars from left to right, one for each size; those that are marked are hatched."""
    figure = _figure(2.7)
    axes = figure.add_subplot()
    for place, bar in enumerate(bars):
        hatch = "////" if bar.is_marked else None
        axes.bar(place, bar.value, 0.62, color="white" if hatch else BLUE, edgecolor=BLUE, hatch=hatch)
        top = bar.value
        if bar.low is not None and bar.high is not None:
            axes.plot([place, place], [bar.low, bar.high], color=INK, linewidth=1.5)
            top = bar.high
        axes.annotate(f"{bar.value:,.3g}", (place, top), (0, 3), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(bars)), [_cut(bar.name) for bar in bars], rotation=20, ha="right")
    axes.set_ylabel(axis)
    axes.set_ylim(0, 1.15 * max(bar.high or bar.value for bar in bars) or 1.0)
    said = ", ".join(f"{bar.name} {bar.value:.3g}" for bar in bars)
    return _svg(figure, axes, title, said, key, grid="y")


@rc_context(SETTINGS)
def reliability(bins: Sequence[dict[str, Any]], title: str, *, key: str) -> str:
    """Return accuracy against confidence: a dot for each bin, as large as its share of the samples."""
    figure = _figure(3.4)
    axes = figure.add_subplot()
    filled = [item for item in bins if item["count"]]
    most = max((item["count"] for item in filled), default=1)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    axes.plot([b["confidence"] for b in filled], [b["accuracy"] for b in filled], color=BLUE, linewidth=1, alpha=0.5)
    for item in filled:
        size = 4 + 8 * item["count"] / most
        axes.plot(item["confidence"], item["accuracy"], "o", color=BLUE, markersize=size, clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    said = ", ".join(f"{b['confidence']:.2f} confident, {b['accuracy']:.2f} right" for b in filled)
    return _svg(figure, axes, title, said, key, grid="both")


@rc_context(SETTINGS)
def history(values: Sequence[tuple[int, float, str]], title: str, axis: str, *, key: str) -> str:
    """Return the value of each trial (number, value, how it ended) and the best of the finished ones so far."""
    figure = _figure(2.9)
    axes = figure.add_subplot()
    for ended, colour in (("finished", BLUE), ("stopped", GREY)):
        found = [(number, value) for number, value, how in values if how == ended]
        if found:
            axes.plot(*zip(*found, strict=True), "o", markersize=4, color=colour, label=ended)
    best, line = 0.0, []
    for number, value, how in values:
        best = max(best, value) if how == "finished" else best
        line.append((number, best))
    start = next((place for place, (_, value) in enumerate(line) if value), len(line))
    if line[start:]:
        axes.step(*zip(*line[start:], strict=True), where="post", color=ORANGE, linewidth=1.5, label="best so far")
    axes.set(xlabel="trial", ylabel=axis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=FONT_POINTS - 1)
    said = f"{len(values)} trials, best {best:.4f}"
    return _svg(figure, axes, title, said, key, grid="y")


def _figure(height_inches: float) -> Figure:
    return Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")


def _cut(text: str, length: int = 26) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _svg(figure: Any, axes: Any, title: str, said: str, key: str, grid: str = "x") -> str:
    """Return the figure as an SVG element with a title and a description that a screen reader reads."""
    figure.suptitle(textwrap.fill(title, 54), x=0.01, ha="left", fontsize=FONT_POINTS + 0.5)
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    # Two charts of one page may not share an identifier.
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'(xlink:href|href)="#', rf'\1="#{key}-', text).replace("url(#", f"url(#{key}-")
    head = (
        f'<svg role="img" aria-labelledby="{key}-title {key}-said" '
        f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{_view_box(text)}">'
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-said">{escape(said)}</desc>'
    )
    return head + text[text.index(">") + 1 :]


def _view_box(text: str) -> str:
    found = re.search(r'viewBox="([^"]+)"', text)
    assert found is not None
    return found[1]
