"""Ended trials of a search, one small JSON in S3 each: what a search that starts again goes on from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from orchestration.services import storage

Ended = Literal["finished", "stopped", "failed"]


SEEN, ZERO_SHOT = "val/top1_accuracy", "zero_shot/top1_accuracy"
"""What trials are judged by."""


@dataclass(frozen=True)
class TrialRecord:
    """A trial that ended.

    Attributes:
        number: from 0, in the order of their ends.
        params: value by knob.
        curve: by epoch, the metrics of each.
        ended: finished all epochs, stopped by ASHA, or failed.
        error: why it failed, one line; empty otherwise.
        started_at, ended_at: seconds since 1970.
    """

    number: int
    params: dict[str, Any]
    curve: list[dict[str, float]]
    ended: Ended
    error: str
    started_at: float
    ended_at: float

    def value(self, metric: str) -> float:
        """The last value of a metric; 0, the worst accuracy, of a trial that failed or reported nothing."""
        return 0.0 if self.ended == "failed" or not self.curve else self.curve[-1].get(metric, 0.0)


def write_record(folder: str, record: TrialRecord) -> None:
    """Keep a trial under the search's S3 folder."""
    storage.write_json(f"{folder}/trials/{record.number:06d}.json", asdict(record))


def read_records(folder: str) -> list[TrialRecord]:
    """The ended trials of a search, by number."""
    return [TrialRecord(**storage.read_json(uri)) for uri in sorted(storage.list_prefix(f"{folder}/trials/"))]


def rank_trials(records: list[TrialRecord], metric: str) -> list[TrialRecord]:
    """The finished trials, best first: by the metric, then by cross-entropy, then by number."""
    finished = [record for record in records if record.ended == "finished"]
    return sorted(
        finished, key=lambda r: (-r.value(metric), r.curve[-1].get("val/cross_entropy", float("inf")), r.number)
    )


def pareto_front(records: list[TrialRecord], metrics: list[str]) -> list[TrialRecord]:
    """The finished trials that no other beats in one metric without losing in another, by the first metric."""
    ranked = rank_trials(records, metrics[0])

    def is_beaten(record: TrialRecord) -> bool:
        mine = [record.value(metric) for metric in metrics]
        others = ([other.value(metric) for metric in metrics] for other in ranked if other is not record)
        return any(all(o >= m for o, m in zip(theirs, mine, strict=True)) and theirs != mine for theirs in others)

    return [record for record in ranked if not is_beaten(record)]
