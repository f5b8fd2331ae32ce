"""Progress of long work on stderr: a bar on a terminal, lines at a bounded rate elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[..., None]
"""Called with (stage, done, total) or (stage, step, num_steps, metrics); metrics by `split/name`."""

SECONDS_PER_LINE = 10.0
FIGURES = {
    "loss": "loss {:.4f}",
    "top1_accuracy": "top-1 {:.4f}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "samples_per_s": "{:,.0f} samples/s",
    "mfu": "MFU {:.1%}",
    "wait_share": "waiting for data {:.0%}",
}
"""Metrics that are shown, in this order."""


@contextmanager
def progress() -> Iterator[Progress]:
    """Yield a callback that draws one bar per stage on a terminal, and prints lines elsewhere.

    Nothing in the block reaches stdout, which is for results: Ray reports lost workers there.
    """
    with redirect_stdout(sys.stderr):
        if not sys.stderr.isatty():
            yield line_printer()
            return
        from rich.console import Console

        with draw_bars(Console(stderr=True)) as advance:
            yield advance


def line_printer(clock: Callable[[], float] = time.monotonic) -> Progress:
    """Return a callback that prints a line per stage at its start, its end, and every SECONDS_PER_LINE between."""
    started: dict[str, tuple[float, int]] = {}
    printed_at: dict[str, float] = {}
    newest: dict[str, dict[str, float]] = {}

    def advance(stage: str, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        now = clock()
        began_at, first = started.setdefault(stage, (now, done))
        newest[stage] = newest.get(stage, {}) | dict(metrics or {})
        if done < total and now - printed_at.get(stage, -SECONDS_PER_LINE) < SECONDS_PER_LINE:
            return
        printed_at[stage] = now
        parts = [f"{stage}: {done:,} of {total:,}", *describe_metrics(newest[stage])]
        if first < done < total:
            parts.append(f"{_duration((now - began_at) * (total - done) / (done - first))} left")
        typer.echo(", ".join(parts), err=True)

    return advance


@contextmanager
def draw_bars(console: Console) -> Iterator[Progress]:
    """Yield a callback that draws a bar per stage with figures and time left; log lines appear above the bars."""
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    text = TextColumn("{task.fields[figures]}")
    left = (TimeRemainingColumn(), TextColumn("left"))
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), text, *left]
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}
        newest: dict[str, dict[str, float]] = {}

        def advance(stage: str, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
            newest[stage] = newest.get(stage, {}) | dict(metrics or {})
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, figures="")
            figures = "  ".join(describe_metrics(newest[stage]))
            bars.update(tasks[stage], completed=done, total=total, figures=figures)

        # Rich replaced sys.stderr; handlers still write to the one before, in the middle of a bar.
        handlers = [item for item in logging.getLogger().handlers if isinstance(item, logging.StreamHandler)]
        before = [handler.setStream(sys.stderr) for handler in handlers]
        try:
            yield advance
        finally:
            for handler, stream in zip(handlers, before, strict=True):
                if stream is not None:
                    handler.setStream(stream)


def describe_metrics(metrics: Mapping[str, float]) -> list[str]:
    """Return the metrics to show as text, those of training first."""
    found = {}
    for key, value in metrics.items():
        split, _, name = key.rpartition("/")
        if name in FIGURES and not (name == "samples_per_s" and any("tokens_per_s" in other for other in metrics)):
            is_validation = split.endswith("val")
            text = FIGURES[name].format(value)
            found[(is_validation, list(FIGURES).index(name))] = f"val {text}" if is_validation else text
    return [found[place] for place in sorted(found)]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
