"""Ray Data streams instruct records from S3 to the ranks of a run, in the order of the epoch plan, ready to train on.

A task reads a window of steps: the row groups that it touches, once each. It tokenises, decodes images where the recipe
says so, and hands each rank its part; the rank holds that against the plan and collates one batch a step.

What becomes of a record stands in `record_forms`, and on a rank in `record_batches`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from orchestration.recipe.data_config import RecordsConfig
from orchestration.streaming.epoch_plan import EpochPlan, MixedSet, Refs, Window
from orchestration.streaming.ordered_stream import Row, from_ipc, ordered_dataset, ordered_rows, to_ipc
from orchestration.streaming.record_forms import RecordForm, prepare
from orchestration.streaming.record_sets import RecordSet, read_records
from orchestration.streaming.sampling import rank_slice
from tinyemo.encoders import Preprocessing
from tinyemo.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    import ray.data

    from orchestration.streaming.record_batches import RecordBatch

WINDOW_BYTES = 96 * 2**20
"""A window at most: a few of them, one a reader and those on their way, lie in the object store at the same time."""


@dataclass(frozen=True)
class RecordPlan:
    """Everything that a reading task and a rank need to know of a run; holds no records."""

    sets: tuple[RecordSet, ...]
    steps: EpochPlan
    config: RecordsConfig
    world_size: int
    num_steps: int
    """Of the run, over all its epochs."""
    preprocessing: Preprocessing | None = None
    """Of the run's vision tower, which then decides the pixels in place of `records.image_size`."""
    image_tokens: int | None = None
    """Placeholders of an image where the vision tower says so; None for `records.image_tokens`."""

    @cached_property
    def form(self) -> RecordForm:
        """What becomes of each record."""
        config = self.config
        return RecordForm(
            tokenizer=config.tokenizer,
            end_token=config.end_token,
            template=config.template,
            image_tokens=config.image_tokens if self.image_tokens is None else self.image_tokens,
            max_length=config.max_length,
            decode=config.decode,
            image_size=config.image_size,
            preprocessing=self.preprocessing,
        )

    def windows(self, start_step: int) -> list[Window]:
        """What is read from a step on."""
        return self.steps.windows(start_step, self.num_steps, self.window_rows)

    @cached_property
    def window_rows(self) -> int:
        """As many records as WINDOW_BYTES hold in the form in which they travel; more would fill the object store."""
        if self.config.decode == "reader":
            return max(1, WINDOW_BYTES // (3 * self.form.side**2))
        shards = [shard for part in self.sets for shard in part.shards]
        mean_bytes = sum(shard.num_bytes for shard in shards) / sum(shard.rows for shard in shards)
        return max(1, int(WINDOW_BYTES / mean_bytes))

    def refs(self, window: Window, rank: int) -> Refs:
        """The records that `rank` gets of a window, step after step."""
        whole, size = self.steps.steps(window), self.steps.global_batch_size
        part = rank_slice(size, rank, self.world_size)
        places = [np.arange(i * size + part.start, i * size + part.stop) for i in range(window.last - window.first)]
        return whole.take(np.concatenate(places))

    def read(self, window: Window, start_step: int) -> Iterator[Row]:
        """One row for each rank, in rank order."""
        parts = [self.refs(window, rank) for rank in range(self.world_size)]
        source = np.concatenate([part.source for part in parts])
        row = np.concatenate([part.row for part in parts])
        table = prepare(_read(self.sets, source, row), self.form)
        start = 0
        for rank, part in enumerate(parts):
            rows = table.slice(start, len(part))
            rows = rows.append_column("source", pa.array(part.source)).append_column("row", pa.array(part.row))
            start += len(part)
            yield {
                "epoch": window.epoch,
                "first": window.first,
                "last": window.last,
                "rank": rank,
                "start_step": start_step,
                "rows": to_ipc(rows),
            }


def plan_records(
    sets: tuple[RecordSet, ...],
    config: RecordsConfig,
    *,
    seed: int,
    global_batch_size: int,
    num_epochs: float,
    world_size: int,
    preprocessing: Preprocessing | None = None,
    image_tokens: int | None = None,
) -> RecordPlan:
    """The plan of a run.

    Args:
        sets: what is read.
        config: how.
        seed: of the order.
        global_batch_size: records of a step, over all ranks.
        num_epochs: > 0.
        world_size: ranks.
        preprocessing: of the run's vision tower; None scales to `records.image_size`.
        image_tokens: of the run's vision tower; None takes `records.image_tokens`.

    Raises:
        ConfigError: the batch is larger than an epoch, or weights do not belong to the data sets.
    """
    if config.weights and len(config.weights) != len(sets):
        raise ConfigError(f"records.weights: {len(config.weights)} for {len(sets)} data sets; give one each, or none")
    weights: tuple[float | None, ...] = config.weights or (None,) * len(sets)
    mixed = tuple(
        MixedSet(part.manifest.digest, part.group_rows, weight) for part, weight in zip(sets, weights, strict=True)
    )
    steps = EpochPlan(mixed, seed, global_batch_size, config.shuffle_pool_rows, config.tail)
    if not steps.steps_per_epoch:
        raise ConfigError(
            f"train.global_batch_size: {global_batch_size} is more than the {steps.samples_per_epoch} records of an "
            'epoch; lower it, or set records.tail to "pad"'
        )
    num_steps = int(steps.steps_per_epoch * num_epochs)
    return RecordPlan(sets, steps, config, world_size, num_steps, preprocessing, image_tokens)


def build_record_dataset(plan: RecordPlan, start_step: int) -> ray.data.Dataset:
    """The Ray Data pipeline of a run from `start_step` on; nothing runs until the workers iterate."""

    def read(row: Row) -> Iterator[Row]:
        yield from plan.read(Window(row["epoch"], row["first"], row["last"]), start_step)

    windows = [{"epoch": w.epoch, "first": w.first, "last": w.last} for w in plan.windows(start_step)]
    return ordered_dataset(windows, read, num_readers=plan.config.num_readers)


def open_record_stream(
    shard: ray.data.DataIterator, plan: RecordPlan, *, rank: int, start_step: int
) -> Iterator[RecordBatch]:
    """This rank's batches in the order of the plan, collated ahead in a thread.

    Raises:
        TrainingError: the stream handed out something else than the plan says.
    """
    from orchestration.streaming.record_batches import collate  # torch: a rank's affair, not a reading task's

    waiting: deque[Future[RecordBatch]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="collate") as pool:
        for epoch, step, rows in _steps(shard, plan, rank, start_step):
            waiting.append(pool.submit(collate, rows, epoch, step, plan.form))
            if len(waiting) > plan.config.batches_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _steps(
    shard: ray.data.DataIterator, plan: RecordPlan, rank: int, start_step: int
) -> Iterator[tuple[int, int, pa.Table]]:
    """(epoch, step, rows) of every step from `start_step` on."""
    expected: list[Window] | None = None
    per_epoch = plan.steps.steps_per_epoch
    for row in ordered_rows(shard):
        window = Window(row["epoch"], row["first"], row["last"])
        if expected is None:
            if row["start_step"] > start_step:
                raise TrainingError(f"the stream starts at step {row['start_step']}, after step {start_step}")
            expected = plan.windows(row["start_step"])
        if row["rank"] != rank or not expected or window != expected.pop(0):
            raise TrainingError(
                f"rank {rank} was handed {window} of rank {row['rank']}, which the plan does not have here; "
                "Ray Data did not preserve the order, please report it"
            )
        table, refs = from_ipc(row["rows"]), plan.refs(window, rank)
        if not (np.array_equal(table["row"], refs.row) and np.array_equal(table["source"], refs.source)):
            raise TrainingError(f"rank {rank}: {window} does not hold the records of the plan")
        num_local = len(table) // (window.last - window.first)
        for place, step in enumerate(range(window.first, window.last)):
            if window.epoch * per_epoch + step >= start_step:
                yield window.epoch, window.epoch * per_epoch + step, table.slice(place * num_local, num_local)
    if expected:
        raise TrainingError(f"rank {rank}: the stream ended {len(expected)} windows before the plan does")


def _read(sets: tuple[RecordSet, ...], source: NDArray[np.int32], row: NDArray[np.int64]) -> pa.Table:
    """The records in this order; where padded, an empty id on another record's image and text."""
    parts, places = [], []
    real = row >= 0
    for number, record_set in enumerate(sets):
        place = np.flatnonzero(real & (source == number))
        if len(place):
            parts.append(read_records(record_set, row[place]))
            places.append(place)
    order = np.zeros(len(row), dtype=np.int64)
    order[np.concatenate(places)] = np.arange(int(real.sum()))
    table = pa.concat_tables(parts).take(pa.array(order))
    if real.all():
        return table
    ids = pa.array(np.where(real, table["id"].to_pylist(), ""), pa.string())
    return table.set_column(table.column_names.index("id"), "id", ids)
