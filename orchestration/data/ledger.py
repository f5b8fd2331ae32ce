"""The ledger of a run says which record was in which step, and so proves that none was lost or doubled.

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

from orchestration.data.sets import RecordSet, read_records
from orchestration.data.stream import Stream
from orchestration.services import storage
from tinyemo.errors import DataError

SCHEMA = pa.schema([("epoch", pa.int32()), ("step", pa.int64()), ("rank", pa.int32()), ("id", pa.string())])


class Ledger:
    """The lines of one rank since its last checkpoint."""

    def __init__(self, folder: str, *, attempt: str, rank: int) -> None:
        self.folder, self.attempt, self.rank = folder, attempt, rank
        self._lines: list[tuple[int, int, list[str]]] = []

    def add(self, epoch: int, step: int, ids: Sequence[str]) -> None:
        """Add the records of a step on this rank; padded ones, whose id is empty, are left out."""
        self._lines.append((epoch, step, [one for one in ids if one]))

    def flush(self) -> None:
        """Write the added lines to S3."""
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
    """Return the lines that count, in the order of steps and ranks."""
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
    """The difference between a ledger and the plan.

    Attributes:
        num_steps: steps that have lines.
        num_records: lines.
        num_wrong_steps: steps whose records are not the plan's.
        num_lost: records of the plan's steps that no line names.
        num_doubled: lines that name a record again within a step beyond what the plan has.
    """

    num_steps: int
    num_records: int
    num_wrong_steps: int
    num_lost: int
    num_doubled: int

    @property
    def is_exact(self) -> bool:
        """Return whether every step holds exactly the records of the plan."""
        return not (self.num_wrong_steps or self.num_lost or self.num_doubled)


def check_ledger(ledger: pa.Table, stream: Stream, num_steps: int) -> LedgerCheck:
    """Compare a ledger with the plan's first `num_steps` steps, by the ids that the shards in S3 hold."""
    ids = [_read_ids(record_set) for record_set in stream.sets]
    steps = np.asarray(ledger["step"])
    edges = np.searchsorted(steps, np.arange(num_steps + 1))
    found = ledger["id"].to_pylist()
    refs, size = stream.plan.refs(0, num_steps), stream.plan.global_batch_size
    wrong = lost = doubled = 0
    for step in range(num_steps):
        place = slice(step * size, (step + 1) * size)
        expected = [ids[s][r] for s, r in zip(refs.source[place], refs.row[place], strict=True) if r >= 0]
        seen = found[edges[step] : edges[step + 1]]
        wrong += sorted(seen) != sorted(expected)
        lost += len(set(expected) - set(seen))
        doubled += len(seen) - len(set(seen)) - (len(expected) - len(set(expected)))
    wrong += len(np.unique(steps[steps >= num_steps]))
    return LedgerCheck(len(np.unique(steps)), len(ledger), wrong, lost, doubled)


def _read_ids(record_set: RecordSet) -> list[str]:
    ids: list[str] = read_records(record_set, np.arange(record_set.num_rows), ["id"])["id"].to_pylist()
    return ids
