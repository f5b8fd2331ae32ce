"""Progress lines come at a bounded rate and name the run; bars show figures and time left."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from rich.console import Console

from orchestration.cli.progress import SECONDS_PER_LINE, describe_metrics, draw_bars, line_printer

FIGURES = {"train/loss": 1.23456, "train/samples_per_s": 1234.5, "train/wait_share": 0.031, "train/step_s": 1.0}


def test_lines_come_at_a_bounded_rate_and_name_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    advance = line_printer(lambda: now)
    for step in range(0, 1001):
        now = 100 + step / 10
        advance("family-700m select", step, 1000, FIGURES)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 100 / SECONDS_PER_LINE + 1
    assert lines[0] == "family-700m select: 0 of 1,000, loss 1.2346, 1,234 samples/s, waiting for data 3%"
    assert lines[1].startswith("family-700m select: 100 of 1,000, ")
    assert lines[1].endswith("1 min 30 s left")
    assert lines[-1].startswith("family-700m select: 1,000 of 1,000")
    assert "left" not in lines[-1]


def test_a_figure_that_came_between_two_lines_is_in_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    advance = line_printer(lambda: now)
    advance("x", 1, 9)
    advance("x", 2, 9, {"val/top1_accuracy": 0.5})
    now = SECONDS_PER_LINE
    advance("x", 3, 9, {"train/loss": 2.0})
    assert "loss 2.0000, val top-1 0.5000" in capsys.readouterr().err


def test_tokens_stand_in_for_samples_and_mfu_is_shown_where_known() -> None:
    figures = {"train/samples_per_s": 3.0, "train/mfu": 0.4123, "train/tokens_per_s": 2000.0, "val/loss": 1.0}
    assert describe_metrics(figures) == ["2,000 tokens/s", "MFU 41.2%", "val loss 1.0000"]


def test_bars_show_figures_and_log_lines_stay_whole() -> None:
    stream, before = io.StringIO(), sys.stderr
    handler = logging.StreamHandler(before)
    logging.getLogger().addHandler(handler)
    try:
        with draw_bars(Console(file=stream, force_terminal=True, width=150)) as advance:
            advance("emotion6 select", 3, 10, FIGURES)
            logging.getLogger("orchestration").warning("a worker was lost")
            advance("emotion6 select", 10, 10)
        assert handler.stream is before
    finally:
        logging.getLogger().removeHandler(handler)
    drawn = stream.getvalue()
    assert "emotion6 select" in drawn
    assert "10/10" in drawn
    assert "1,234 samples/s" in drawn
    assert "a worker was lost" in drawn
