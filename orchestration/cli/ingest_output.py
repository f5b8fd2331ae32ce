"""What commands that make data sets show: how far they are, and what came of it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from orchestration.data.manifest import Advance, Manifest
    from orchestration.datasets.ingest import IngestReport
    from orchestration.instruct.ingest import InstructReport

LINE_EVERY_S = 5.0
"""Between two progress lines where there is no terminal."""


@contextmanager
def progress() -> Iterator[Advance]:
    """What draws a bar on a terminal, or prints a line every few seconds and at the end of a stage; on stderr."""
    if not sys.stderr.isatty():
        yield _line_printer()
        return
    from rich.console import Console
    from rich.progress import Progress, TaskID

    with Progress(console=Console(stderr=True), transient=True) as bars:
        stages: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total)
            bars.update(stages[stage], completed=done)

        yield advance


def _line_printer() -> Advance:
    last = time.monotonic()

    def advance(stage: str, done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > LINE_EVERY_S:
            typer.echo(f"{stage}: {done} of {total}", err=True)
            last = time.monotonic()

    return advance


def show_json(manifest: Manifest, document: dict[str, Any]) -> None:
    """Print a command's result for machines: what every data set has, and what this one has beside."""
    shared = {
        "uri": manifest.uri,
        "version": manifest.version,
        "digest": manifest.digest,
        "reasons": manifest.rejected.reasons,
        "splits": {split: counts.model_dump() for split, counts in manifest.splits.items()},
    }
    typer.echo(json.dumps(shared | document, indent=2, sort_keys=True))


def ingest_facts(report: IngestReport | InstructReport) -> dict[str, Any]:
    """What every ingest says for machines of its rows and files."""
    return {
        "data": report.manifest.data,
        "unchanged": report.is_unchanged,
        "rows_in": report.manifest.rows_in,
        "rows_kept": report.manifest.rows_kept,
        "rows_rejected": report.rows_rejected,
        "uploaded_files": report.num_uploaded,
        "uploaded_bytes": report.uploaded_bytes,
        "seconds": round(report.seconds, 3),
    }


def show_label_counts(manifest: Manifest, unit: str) -> None:
    """A line for each split: how many, and how many of each label."""
    for split, counts in manifest.splits.items():
        labels = ", ".join(f"{label} {rows}" for label, rows in counts.labels.items())
        typer.echo(f"{split}: {counts.rows} {unit} ({labels})")


def show_rejected(manifest: Manifest) -> None:
    """A line for each reason, and the file that holds what was turned away."""
    for reason, rows in manifest.rejected.reasons.items():
        typer.echo(f"  {reason}: {rows}")
    if manifest.rejected.rows:
        typer.echo(f"  see {manifest.file_uri(manifest.rejected.path)}")


def show_stored(report: IngestReport | InstructReport) -> None:
    """The last line of an ingest: where it is, and what that took."""
    stored = "unchanged" if report.is_unchanged else f"stored {report.num_uploaded} files, {report.uploaded_bytes:,} B"
    typer.echo(f"{report.manifest.uri}: {stored} in {report.seconds:.1f} s")
