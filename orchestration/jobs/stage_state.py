"""How far a phase of a run is, as its folder in S3 says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestration.services import storage


@dataclass(frozen=True)
class PhaseState:
    """What `latest.json` says.

    Attributes:
        folder: S3 folder of the phase.
        checkpoint: S3 folder.
        step: optimizer steps done in it.
        metrics: of the newest report; the final one holds the test confusion.
    """

    folder: str
    checkpoint: str
    step: int
    is_final: bool
    metrics: dict[str, Any]


def read_state(folder: str) -> PhaseState | None:
    """The newest complete checkpoint of the phase in an S3 folder, or None."""
    uri = f"{folder}/latest.json"
    return PhaseState(**storage.read_json(uri)) if storage.exists(uri) else None


Curve = list[tuple[int, dict[str, float]]]


def read_curve(folder: str) -> Curve:
    """(step, metrics) of every report of a phase, in the order of steps, each step once."""
    points: dict[int, dict[str, float]] = {}
    for uri in sorted(storage.list_prefix(f"{folder}/curve/")):
        for step, metrics in storage.read_json(uri):
            points.setdefault(step, {}).update(metrics)
    return sorted(points.items())
