"""Which record was in which step, written by every rank as it trains: the proof that none was lost or doubled.

<run>/ledger/<attempt>-<first step>-rank<r>.parquet: epoch, step, rank, id. A rank writes its steps just before the
checkpoint that makes them count. An attempt that dies in between leaves steps that the next one does again, so of the
lines of a step those of the newest attempt count.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestration.services import storage
from orchestration.streaming.record_sets import RecordSet
from orchestration.streaming.record_stream import RecordPlan
from tinyemo.errors import DataError

SCHEMA = pa.schema([("epoch", pa.int32()), ("step", pa.int64()), ("rank", pa.int32()), ("id", pa.string())])


class Ledger:
    """One rank's lines since its last checkpoint."""

    def __init__(self, folder: str, *, attempt: str, rank: int) -> None:
        self.folder, self.attempt, self.rank = folder, attempt, rank
        self._lines: list[tuple[int, int, list[str]]] = []

    def add(self, epoch: int, step: int, ids: Sequence[str]) -> None:
        """A step's records on this rank; padded ones, whose id is empty, are left out."""
        self._lines.append((epoch, step, [one for one in ids if one]))

    def flush(self) -> None:
        """Write what was added to S3."""
        if not self._lines:
            return
        sizes = [len(ids) for *_, ids in self._lines]
        columns = [
            pa.array(np.repeat([epoch for epoch, *_ in self._lines], sizes), pa.int32()),
            pa.array(np.repeat([step for _, step, _ in self._lines], sizes), pa.int64()),
            pa.array(np.full(sum(sizes), self.rank), pa.int32()),
            pa.array([one for *_, ids in self._lines for one in ids], pa.string()),
        ]
        sink = io.BytesIO()
        pq.write_table(pa.table(columns, schema=SCHEMA), sink, compression="zstd")
        name = f"{self.attempt}-{self._lines[0][1]:09d}-rank{self.rank}.parquet"
        storage.write_bytes(f"{self.folder}/ledger/{name}", sink.getvalue())
        self._lines.clear()


def read_ledger(folder: str) -> pa.Table:
    """The lines that count, in the order of steps and ranks."""
    uris = sorted(storage.list_prefix(f"{folder}/ledger/"))
    if not uris:
        raise DataError(f"{folder} has no ledger: run it with --ledger")

    def read(uri: str) -> pa.Table:
        table = pq.read_table(io.BytesIO(storage.read_bytes(uri)))
        attempt = uri.rsplit("/", 1)[1].rsplit("-", 2)[0]
        return table.append_column("attempt", pa.array([attempt] * len(table), pa.string()))

    with ThreadPoolExecutor(storage.TRANSFER_THREADS) as pool:
        lines = pa.concat_tables(pool.map(read, uris))
    newest = lines.group_by("step").aggregate([("attempt", "max")])
    counts = lines.join(newest, "step")
    counts = counts.filter(pc.equal(counts["attempt"], counts["attempt_max"]))
    return counts.select(SCHEMA.names).sort_by([("step", "ascending"), ("rank", "ascending")])


@dataclass(frozen=True)
class LedgerCheck:
    """What a ledger shows.

    Attributes:
        num_steps: that have lines.
        num_records: lines.
        num_wrong_steps: steps whose records are not the plan's.
        num_lost: records of the plan's steps that no line names.
        num_doubled: lines that name a record again within an epoch beyond what the plan has.
    """

    num_steps: int
    num_records: int
    num_wrong_steps: int
    num_lost: int
    num_doubled: int

    @property
    def is_exact(self) -> bool:
        """Whether every step holds what the plan says and nothing else."""
        return not (self.num_wrong_steps or self.num_lost or self.num_doubled)


def check_ledger(ledger: pa.Table, plan: RecordPlan, num_steps: int) -> LedgerCheck:
    """Hold a ledger against the plan's first `num_steps` steps, by the ids that the shards in S3 hold."""
    ids = [_read_ids(record_set) for record_set in plan.sets]
    steps = np.asarray(ledger["step"])
    edges = np.searchsorted(steps, np.arange(num_steps + 1))
    found = ledger["id"].to_pylist()
    wrong = lost = doubled = 0
    for step in range(num_steps):
        epoch, place = divmod(step, plan.steps.steps_per_epoch)
        refs = plan.steps.global_batch(epoch, place)
        expected = [ids[s][r] for s, r in zip(refs.source, refs.row, strict=True) if r >= 0]
        seen = found[edges[step] : edges[step + 1]]
        wrong += sorted(seen) != sorted(expected)
        lost += len(set(expected) - set(seen))
        doubled += len(seen) - len(set(seen)) - (len(expected) - len(set(expected)))
    wrong += len(np.unique(steps[steps >= num_steps]))
    return LedgerCheck(len(np.unique(steps)), len(ledger), wrong, lost, doubled)


def _read_ids(record_set: RecordSet) -> list[str]:
    """Of every row of a data set, in storage order."""
    found: list[str] = []
    for shard in record_set.shards:
        file = storage.filesystem().open_input_file(record_set.manifest.file_uri(shard.path).removeprefix("s3://"))
        found += pq.read_table(file, columns=["id"])["id"].to_pylist()
    return found
