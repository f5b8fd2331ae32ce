"""Ray Data streams the rows of a run from S3 to its workers, each in the order of the plan.

A stream is a list of items: the validation rows first, then the training steps in windows, then the test rows, once,
at the end. `ordered_stream` says how an item reaches its ranks; `open_stream` holds what arrives against the plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from orchestration.data.dataset import SplitRows
from orchestration.data.manifest import Manifest, Shard, read_file
from orchestration.streaming.ordered_stream import Row, from_ipc, ordered_dataset, ordered_rows, to_ipc
from orchestration.streaming.sampling import TrainPlan, rank_slice
from orchestration.streaming.table_cache import remember
from tinyemo.errors import DataError, TrainingError

if TYPE_CHECKING:
    import ray.data

Split = Literal["validation", "train", "test"]
MAX_SHARD_BYTES = 256 * 2**20  # of a process's cache of shards
EVALUATION_ROWS = 16_384  # rows of one validation or test item: 25 MB of 768 float16


@dataclass(frozen=True)
class StreamItem:
    """One task's reading: optimizer steps [first, last) of train, or rows [first, last) of another split."""

    split: Split
    first: int
    last: int


@dataclass(frozen=True)
class StreamPlan:
    """Everything a task needs to read any item; travels to the tasks, so it holds indices and no features."""

    manifest: Manifest
    train: TrainPlan
    splits: dict[Split, SplitRows]
    world_size: int
    steps_per_window: int
    num_readers: int = 2
    is_tested: bool = True
    """Whether the test rows are handed out at the end."""

    def items(self, start_step: int) -> list[StreamItem]:
        """The items of a run that starts at `start_step`."""
        windows = self.train.windows(start_step, self.steps_per_window)
        return [
            *self._whole("validation"),
            *(StreamItem("train", first, last) for first, last in windows),
            *(self._whole("test") if self.is_tested else []),
        ]

    def _whole(self, split: Split) -> list[StreamItem]:
        num_rows = len(self.splits[split])
        return [StreamItem(split, i, min(i + EVALUATION_ROWS, num_rows)) for i in range(0, num_rows, EVALUATION_ROWS)]

    def positions(self, item: StreamItem, rank: int) -> NDArray[np.int64]:
        """Row positions in the item's split that `rank` gets, step after step."""
        if item.split != "train":
            part = rank_slice(item.last - item.first, rank, self.world_size)
            return np.arange(item.first + part.start, item.first + part.stop)
        part = rank_slice(self.train.global_batch_size, rank, self.world_size)
        return np.concatenate([self.train.global_batch(step)[part] for step in range(item.first, item.last)])

    def read(self, item: StreamItem, start_step: int) -> Iterator[dict[str, Any]]:
        """One row for each rank, in rank order; `start_step` is where the stream begins."""
        rows = self.splits[item.split]
        for rank in range(self.world_size):
            positions = self.positions(item, rank)
            table = read_rows(self.manifest, rows.take(positions))
            if item.split == "train":
                steps = range(item.first, item.last)
                labels = np.concatenate([rows.label[self.train.global_batch(step)] for step in steps])
            else:
                labels = rows.label[positions]
            yield {
                "split": item.split,
                "first": item.first,
                "last": item.last,
                "rank": rank,
                "start_step": start_step,
                "rows": to_ipc(table.append_column("position", pa.array(positions))),
                "labels": labels.astype(np.int64).tobytes(),
            }


@dataclass(frozen=True)
class Batch:
    """What one rank gets of an optimizer step, or of an evaluation split.

    Attributes:
        step: of the first row's step; for evaluation the first row of the item.
        ids: of this rank's rows.
        features: (B_local, d) float16 or float32.
        labels: int64 index into the taxonomy's words; in train of the whole global batch (B,), rank after rank, since
            contrastive losses need them all, in evaluation of this rank's rows (B_local,).
    """

    split: Split
    step: int
    ids: list[str]
    features: NDArray[Any]
    labels: NDArray[np.int64]


def _shard_key(manifest: Manifest, shard: Shard) -> tuple[str, str]:
    return manifest.file_uri(shard.path), shard.sha256


@remember(MAX_SHARD_BYTES, key=_shard_key, num_bytes=lambda table: int(table.nbytes))
def _read_shard(manifest: Manifest, shard: Shard) -> pa.Table:
    """Columns id and features of one shard, checked against the manifest."""
    data = read_file(manifest, shard)
    try:
        table = pq.read_table(pa.BufferReader(data), columns=["id", "features"])
    except (pa.ArrowInvalid, OSError) as error:
        uri = manifest.file_uri(shard.path)
        raise DataError(f"{uri} is no Parquet file ({error}): ingest the data set again") from error
    return table.combine_chunks()


def read_rows(manifest: Manifest, rows: SplitRows) -> pa.Table:
    """Columns id and features of `rows`, in their order."""
    tables, places = [], []
    for shard in np.unique(rows.shard):
        place = np.flatnonzero(rows.shard == shard)
        tables.append(_read_shard(manifest, manifest.shards[int(shard)]).take(pa.array(rows.row[place])))
        places.append(place)
    if not tables:
        width, kind = manifest.feature_width, pa.type_for_alias(manifest.feature_dtype)
        return pa.table({"id": pa.array([], pa.string()), "features": pa.array([], pa.list_(kind, width))})
    return pa.concat_tables(tables).take(pa.array(np.argsort(np.concatenate(places))))


def features_array(table: pa.Table) -> NDArray[Any]:
    """The features of a table, (N, d) in their stored type, without a copy where the column is one chunk."""
    column = table["features"].combine_chunks()
    return np.asarray(column.flatten()).reshape(len(table), -1 if len(table) else column.type.list_size)


def build_dataset(plan: StreamPlan, start_step: int) -> ray.data.Dataset:
    """The Ray Data pipeline of a run from `start_step` on; nothing runs until the workers iterate."""

    def read(row: Row) -> Iterator[Row]:
        yield from plan.read(StreamItem(row["split"], row["first"], row["last"]), start_step)

    items = [{"split": item.split, "first": item.first, "last": item.last} for item in plan.items(start_step)]
    return ordered_dataset(items, read, num_readers=plan.num_readers)


def open_stream(shard: ray.data.DataIterator, plan: StreamPlan, *, rank: int, start_step: int) -> Iterator[Batch]:
    """This rank's batches in the order of the plan; train rows before `start_step` are passed over.

    Raises:
        TrainingError: the stream handed out something else than the plan says.
    """
    expected: list[StreamItem] | None = None
    for row in ordered_rows(shard):
        item = StreamItem(row["split"], row["first"], row["last"])
        if expected is None:
            expected = _expected_items(plan, row["start_step"], start_step)
        if row["rank"] != rank or not expected or item != expected.pop(0):
            raise TrainingError(
                f"rank {rank} was handed {item} of rank {row['rank']}, which the plan does not have here; "
                "Ray Data did not preserve the order, please report it"
            )
        yield from _batches(plan, item, row, rank, start_step)
    if expected:
        raise TrainingError(f"rank {rank}: the stream ended {len(expected)} items before the plan does")


def _expected_items(plan: StreamPlan, stream_start: int, start_step: int) -> list[StreamItem]:
    """The plan's items; a stream may begin at an earlier step than this rank's checkpoint, never at a later one."""
    if stream_start > start_step:
        raise TrainingError(f"the stream starts at step {stream_start}, after the checkpoint's step {start_step}")
    return plan.items(stream_start)


def _batches(plan: StreamPlan, item: StreamItem, row: dict[str, Any], rank: int, start_step: int) -> Iterator[Batch]:
    table = from_ipc(row["rows"])
    positions = np.asarray(table["position"])
    if not np.array_equal(positions, plan.positions(item, rank)):
        raise TrainingError(f"rank {rank}: {item} does not hold the rows of the plan")
    ids, features = table["id"].to_pylist(), features_array(table)
    labels = np.frombuffer(row["labels"], dtype=np.int64)
    if item.split != "train":
        yield Batch(item.split, item.first, ids, features, labels)
        return
    num_local = len(ids) // (item.last - item.first)
    num_global = plan.train.global_batch_size
    for i, step in enumerate(range(item.first, item.last)):
        if step >= start_step:
            local, whole = slice(i * num_local, (i + 1) * num_local), slice(i * num_global, (i + 1) * num_global)
            yield Batch("train", step, ids[local], features[local], labels[whole])
