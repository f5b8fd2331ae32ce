"""Results of the commands that make data sets, for people and as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from orchestration.data.manifest import Manifest
    from orchestration.datasets.ingest import IngestReport
    from orchestration.instruct.ingest import InstructReport


def show_json(manifest: Manifest, document: dict[str, Any]) -> None:
    """Print a result as JSON: the facts that every data set has, and those of `document`."""
    shared = {
        "uri": manifest.uri,
        "version": manifest.version,
        "digest": manifest.digest,
        "reasons": manifest.rejected.reasons,
        "splits": {split: counts.model_dump() for split, counts in manifest.splits.items()},
    }
    typer.echo(json.dumps(shared | document, indent=2, sort_keys=True))


def ingest_facts(report: IngestReport | InstructReport) -> dict[str, Any]:
    """Return the facts about rows and files that every ingest prints as JSON."""
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
    """Print a line for each split: its number of rows, and that of each label."""
    for split, counts in manifest.splits.items():
        labels = ", ".join(f"{label} {rows}" for label, rows in counts.labels.items())
        typer.echo(f"{split}: {counts.rows} {unit} ({labels})")


def show_rejected(manifest: Manifest) -> None:
    """Print a line for each reason of rejection, and the file that holds the rejected rows."""
    for reason, rows in manifest.rejected.reasons.items():
        typer.echo(f"  {reason}: {rows}")
    if manifest.rejected.rows:
        typer.echo(f"  see {manifest.file_uri(manifest.rejected.path)}")


def show_stored(report: IngestReport | InstructReport) -> None:
    """Print the last line of an ingest: the address of the data set and what was stored."""
    stored = "unchanged" if report.is_unchanged else f"stored {report.num_uploaded} files, {report.uploaded_bytes:,} B"
    typer.echo(f"{report.manifest.uri}: {stored} in {report.seconds:.1f} s")
