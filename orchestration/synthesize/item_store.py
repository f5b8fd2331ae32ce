"""Work items in S3, in parts: rendered once, read part by part, so that the driver holds few of them at a time."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from orchestration.data.manifest import parquet_bytes
from orchestration.jobs.lease import Lease
from orchestration.services import storage
from orchestration.synthesize.work_items import WorkItem

ITEMS_PER_PART = 2000

ITEM_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "image", "task", "teacher")),
        ("seed", pa.int64()),
        *((name, pa.string()) for name in ("split", "label", "question")),
        ("offered", pa.list_(pa.string())),
        *((name, pa.string()) for name in ("prompt_sha256", "system", "user")),
    ]
)


@dataclass(frozen=True)
class StoredItems:
    """The items of one round.

    Attributes:
        uris: parts in S3, in order.
        num_items: by task.
        num_skipped: records that cannot be asked for, because the photograph lacks what the prompt tells.
    """

    uris: tuple[str, ...]
    num_items: dict[str, int]
    num_skipped: int

    def __iter__(self) -> Iterator[WorkItem]:
        """Yield the items in order."""
        for uri in self.uris:
            for row in pq.read_table(io.BytesIO(storage.read_bytes(uri))).to_pylist():
                yield WorkItem(**{**row, "offered": tuple(row["offered"])})

    @property
    def total(self) -> int:
        """Number of items."""
        return sum(self.num_items.values())


def store_items(lease: Lease, plan: str, number: int, items: Iterable[WorkItem | None]) -> StoredItems:
    """Store the items of a round, or return those that an earlier driver stored whole.

    Args:
        lease: of the synthesis.
        plan: digest of everything that the items follow from.
        number: of the round.
        items: in order; None for a record that cannot be asked for. Not touched where the round is stored.
    """
    folder = f"{lease.folder}/items/{hashlib.sha256(plan.encode()).hexdigest()[:16]}-{number}"
    try:
        found = storage.read_json(f"{folder}/whole.json")
        return StoredItems(tuple(f"{folder}/{name}" for name in found["parts"]), found["items"], found["skipped"])
    except storage.MissingObjectError:
        lease.check()
    names: list[str] = []
    counts: Counter[str] = Counter()
    part: list[WorkItem] = []
    skipped = 0

    def put() -> None:
        names.append(f"{len(names):05d}.parquet")
        table = pa.Table.from_pylist([asdict(item) for item in part], schema=ITEM_SCHEMA)
        storage.write_bytes(f"{folder}/{names[-1]}", parquet_bytes(table))
        part.clear()

    for item in items:
        if item is None:
            skipped += 1
            continue
        counts[item.task] += 1
        part.append(item)
        if len(part) == ITEMS_PER_PART:
            put()
    if part:
        put()
    lease.write_json(f"{folder}/whole.json", {"parts": names, "items": counts, "skipped": skipped})
    return StoredItems(tuple(f"{folder}/{name}" for name in names), dict(counts), skipped)
