"""Results of the commands that make data sets, for people and as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from orchestration.data.manifest import Manifest


def show_json(manifest: Manifest, document: dict[str, Any]) -> None:
    """Print a command's result for machines: facts that every data set has, and those of this command."""
    shared = {
        "uri": manifest.uri,
        "version": manifest.version,
        "digest": manifest.digest,
        "reasons": manifest.rejected.reasons,
        "splits": {split: counts.model_dump() for split, counts in manifest.splits.items()},
    }
    typer.echo(json.dumps(shared | document, indent=2, sort_keys=True))


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
