"""Ray Data streams instruct records from S3 to the ranks of a run, in the order of the epoch plan, ready to train on.

A task reads a window of steps: the row groups that it touches, once each. It tokenises, decodes images where the recipe
says so, and hands each rank its part; the rank holds that against the plan and collates one batch a step.

Shape letters: B batch of one rank, H image side in pixels, T tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from orchestration.streaming.epoch_plan import EpochPlan, MixedSet, Refs, Tail, Window
from orchestration.streaming.ordered_stream import Row, from_ipc, ordered_dataset, ordered_rows, to_ipc
from orchestration.streaming.record_sets import RecordSet, read_records, turns_of
from orchestration.streaming.sampling import rank_slice
from tinyemo.config import Section
from tinyemo.conversation import IGNORED, encode_conversation
from tinyemo.embedding_tables import open_tokenizer
from tinyemo.errors import ConfigError, TrainingError
from tinyemo.images import decode_image

if TYPE_CHECKING:
    import ray.data

IMAGE_TOKEN_ID = -200
"""Stands for the image among the token ids, as in LLaVA; no tokenizer has it."""
PAD_TOKEN_ID = 0
"""Behind the end of a shorter sequence; masked."""
BATCHES_AHEAD = 2
WINDOW_BYTES = 96 * 2**20
"""A window at most: a few of them, one a reader and those on their way, lie in the object store at the same time."""


class RecordsConfig(Section):
    """Which instruct records a run reads, in which order, and what becomes of them."""

    datasets: tuple[str, ...] = ()
    """S3 addresses of instruct data sets, or of one version each with `/<version>` at the end."""
    weights: tuple[PositiveFloat, ...] = ()
    """Share of each data set in an epoch, relative to the others; empty for every record once an epoch."""
    split: str = "train"
    """The split that is read."""
    shuffle_pool_rows: PositiveInt = 4096
    """Records shuffled together, out of as many row groups as hold them. A multiple of the global batch reads least."""
    tail: Tail = "drop"
    """Of an epoch's last short batch: drop it, or pad it with masked records, on every rank alike."""
    decode: Literal["reader", "worker"] = "worker"
    """Who decodes images: Ray Data's reading tasks (pixels travel) or the training worker (files travel)."""
    image_size: PositiveInt = 224
    """Side of the square images, pixels."""
    tokenizer: str = "smollm2-135m"
    """An asset's name, or a folder with a Hugging Face tokenizer; empty for images alone."""
    end_token: str = "<|im_end|>"
    """Closes an answer."""
    max_length: PositiveInt = 2048
    """Tokens of a conversation that are kept."""
    num_readers: PositiveInt = 2
    """Ray Data tasks that read at the same time."""
    batches_ahead: int = Field(BATCHES_AHEAD, ge=1)
    """Batches that a worker collates ahead of the step."""


@dataclass(frozen=True)
class RecordPlan:
    """Everything that a reading task and a rank need to know of a run; holds no records."""

    sets: tuple[RecordSet, ...]
    steps: EpochPlan
    config: RecordsConfig
    world_size: int
    num_steps: int
    """Of the run, over all its epochs."""

    def windows(self, start_step: int) -> list[Window]:
        """What is read from a step on."""
        return self.steps.windows(start_step, self.num_steps, self.window_rows)

    @cached_property
    def window_rows(self) -> int:
        """As many records as WINDOW_BYTES hold in the form in which they travel; more would fill the object store."""
        if self.config.decode == "reader":
            return max(1, WINDOW_BYTES // (3 * self.config.image_size**2))
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
        table = self._prepare(_read(self.sets, source, row))
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

    def _prepare(self, records: pa.Table) -> pa.Table:
        """id, image (the file or its pixels), input_ids, labels."""
        columns = {"id": records["id"], "image": records["image"]}
        if self.config.decode == "reader":
            columns["image"] = _decode(records["image"], self.config.image_size)
        if self.config.tokenizer:
            tokenize, end_token_id = tokenizer(self.config.tokenizer, self.config.end_token)
            encoded = [
                encode_conversation(
                    turns,
                    tokenize,
                    image_token_id=IMAGE_TOKEN_ID,
                    end_token_id=end_token_id,
                    max_length=self.config.max_length,
                )
                for turns in turns_of(records)
            ]
            columns["input_ids"] = pa.array([item.input_ids for item in encoded], pa.list_(pa.int32()))
            columns["labels"] = pa.array([item.labels for item in encoded], pa.list_(pa.int32()))
        return pa.table(columns)


@dataclass(frozen=True)
class RecordBatch:
    """What one rank gets of a step.

    Attributes:
        step: counted over epochs.
        ids: B of this rank's records; empty text where padded.
        is_real: (B,) bool; false rows fill up an epoch's last batch and must not count.
        pixel_values: (B, H, H, 3) uint8 RGB.
        input_ids: (B, T) int64, IMAGE_TOKEN_ID where the image goes; None without a tokenizer.
        labels: (B, T) int64, -100 where nothing is learned; all of it in padded rows.
        attention_mask: (B, T) bool.
    """

    epoch: int
    step: int
    ids: list[str]
    is_real: Tensor
    pixel_values: Tensor
    input_ids: Tensor | None
    labels: Tensor | None
    attention_mask: Tensor | None


def plan_records(
    sets: tuple[RecordSet, ...],
    config: RecordsConfig,
    *,
    seed: int,
    global_batch_size: int,
    num_epochs: float,
    world_size: int,
) -> RecordPlan:
    """The plan of a run.

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
    return RecordPlan(sets, steps, config, world_size, int(steps.steps_per_epoch * num_epochs))


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
    waiting: deque[Future[RecordBatch]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="collate") as pool:
        for epoch, step, rows in _steps(shard, plan, rank, start_step):
            waiting.append(pool.submit(_collate, rows, epoch, step, plan.config))
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


def _decode(images: pa.ChunkedArray, size: int) -> pa.Array:
    return pa.array([decode_image(data.as_buffer(), size).tobytes() for data in images], pa.binary(3 * size * size))


@cache
def tokenizer(name: str, end_token: str) -> tuple[Any, int]:
    """(text to ids without special tokens, id of the end token); opened once a process.

    Raises:
        ConfigError: the tokenizer has no such end token.
        AssetError, DataError: it cannot be had or read.
    """
    from orchestration.assets.catalogue import find_asset, get_asset

    source = Path(name)
    if not source.exists():
        source = get_asset(name) / find_asset(name).files[0]
    opened = open_tokenizer(source)
    end_token_id = opened.token_to_id(end_token)
    if end_token_id is None:
        raise ConfigError(f"records.end_token: the tokenizer {name} has no token {end_token!r}")
    return (lambda text: opened.encode(text, add_special_tokens=False).ids), end_token_id


def _collate(rows: pa.Table, epoch: int, step: int, config: RecordsConfig) -> RecordBatch:
    """One rank's rows of a step as tensors, sequences padded to the longest."""
    size = config.image_size
    images = rows["image"]
    pixels = np.empty((len(rows), size, size, 3), dtype=np.uint8)
    for place, data in enumerate(images):
        buffer = data.as_buffer()
        is_pixels = config.decode == "reader"
        pixels[place] = (
            np.frombuffer(buffer, np.uint8).reshape(size, size, 3) if is_pixels else decode_image(buffer, size)
        )
    is_real = torch.from_numpy(np.asarray(rows["row"]) >= 0)
    input_ids = labels = attention_mask = None
    if config.tokenizer:
        input_ids = _padded(rows["input_ids"], PAD_TOKEN_ID)
        labels = _padded(rows["labels"], IGNORED)
        lengths = torch.tensor([len(ids) for ids in rows["input_ids"]])
        attention_mask = torch.arange(input_ids.shape[1])[None, :] < lengths[:, None]
        labels[~is_real] = IGNORED
    return RecordBatch(
        epoch, step, rows["id"].to_pylist(), is_real, torch.from_numpy(pixels), input_ids, labels, attention_mask
    )


def _padded(column: pa.ChunkedArray, value: int) -> Tensor:
    """(B, T) int64 of lists of any length."""
    lists = column.to_pylist()
    out = torch.full((len(lists), max(map(len, lists), default=0)), value, dtype=torch.int64)
    for place, ids in enumerate(lists):
        out[place, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return out
