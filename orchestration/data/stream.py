"""Streams of records from S3 to the ranks of a run by Ray Data, in the order of the plan.

One task lists the windows of the run as they are needed; reading tasks fetch a window each, once, and hand it out in
parts, one block for each rank. A block carries its rows as Arrow IPC bytes, so that nothing splits or merges it, and
with `preserve_order` the streaming split hands the blocks to the ranks in turn. A rank holds each block against the
plan, so a stream out of order is an error and never a silently different run, and makes its batches from the blocks.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from orchestration.data.forms import FeatureForm, RecordForm
from orchestration.data.plan import Ints, Placed, Plan, Tail, Window, rank_slice
from orchestration.data.sets import RecordSet, read_records
from orchestration.recipe.sections import DataConfig, RecordsConfig
from tinyemo.encoders import Preprocessing
from tinyemo.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    import ray.data

    from orchestration.data.batch import Batch

logger = logging.getLogger(__name__)

Row = dict[str, Any]
T = TypeVar("T")

PART_BYTES = 16 * 2**20
"""Most bytes of a window that travel to the ranks together; the first batch need not wait for more."""
WINDOWS_AHEAD = 64
"""Windows that are listed before a task reads them."""
EVALUATION_ROWS = 16_384
"""Feature rows of one evaluation batch over all ranks: 25 MB of 768 float16."""
WAITS_S = 10.0
"""A rank that waits this long for its first batch says for what."""
NO_DATASET = (
    "names no data set; make one with `tinyemo ingest instruct` or `tinyemo ingest oasis` and say "
    "--set 'records.datasets=[\"s3://tinyemo/datasets/oasis\"]'"
)


@dataclass(frozen=True)
class Stream:
    """Everything that a reading task and a rank need to know of a run's records; holds no records.

    Attributes:
        form: in which the run takes its records.
        num_readers: Ray tasks that read at the same time.
        batches_ahead: batches that a rank collates ahead of the step.
        partners: for each record of all sets, one set after another, the record whose image stands in as another's;
            None where no other images are needed. See `jobs.evaluation.with_partners`.
    """

    sets: tuple[RecordSet, ...]
    plan: Plan
    form: FeatureForm | RecordForm
    world_size: int
    num_readers: int = 2
    batches_ahead: int = 2
    partners: Ints | None = None

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run, over all its epochs."""
        return self.plan.num_steps

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    @property
    def num_records(self) -> int:
        """Records of all its sets."""
        return sum(part.num_rows for part in self.sets)

    @property
    def reader_share(self) -> float:
        """Part of a reader that a reading task asks for.

        Tasks of a training hold theirs while its ranks evaluate, so they leave a rest that an evaluation always finds:
        two jobs that evaluate at the same time would wait for each other's readers for ever.
        """
        is_evaluation = self.plan.tail == "pad" and self.plan.num_epochs == 1
        return 0.001 if is_evaluation else 0.97

    def epoch_ends(self) -> list[int]:
        """Return the numbers of steps after which an epoch is done; the end of the run is the last."""
        return self.plan.epoch_ends()

    def held_out(self, split: str, rows_per_rank: int) -> Stream | None:
        """Return one epoch over another split of the same data sets; None where one of them lacks it.

        Args:
            split: name of the split; empty for none.
            rows_per_rank: records that a rank takes in a step.
        """
        if not split or any(split not in part.manifest.splits for part in self.sets):
            return None
        sets = tuple(RecordSet(part.manifest, split) for part in self.sets)
        size = rows_per_rank * self.world_size
        plan = replace(
            self.plan,
            sets=tuple(part.planned() for part in sets),
            global_batch_size=size,
            num_epochs=1,
            tail="pad",
            max_steps=None,
        )
        return replace(self, sets=sets, plan=plan)

    def dataset(self, start_step: int = 0) -> ray.data.Dataset:
        """Return the Ray Data pipeline of the run from `start_step` on; nothing runs until the workers iterate.

        Reading tasks ask for the resource "reader" where the cluster's nodes offer it, which keeps them off the head
        node. They ask for no CPU: two jobs whose workers hold all CPUs would wait for their data for ever.
        """
        import ray.data

        from orchestration.services.ray_cluster import room_for

        has_readers = room_for({"reader": 1}) > 0
        if not has_readers:
            logger.info('no node of the cluster offers the resource "reader": reading tasks may run on any node')
        stream = replace(self, form=self.form.opened())
        pace: Any = None
        if self.plan.num_windows <= WINDOWS_AHEAD:
            items = [asdict(window) for window in self.plan.windows(start_step)]
            listed = ray.data.from_items(items, override_num_blocks=max(1, len(items)))
        else:
            pace = ray.remote(num_cpus=0)(_Pace).remote()
            listed = ray.data.from_items([0]).map_batches(
                _list_windows,
                fn_args=(self.plan, start_step, pace),
                resources={"reader": 0.001} if has_readers else None,
                **_ONE_ROW,
            )

        def read(batch: pa.Table) -> Iterator[dict[str, list[Any]]]:
            for item in batch.to_pylist():
                if pace is not None:
                    pace.take.remote(item.pop("run"))
                for row in stream.read(Window(**item), start_step):
                    yield {name: [value] for name, value in row.items()}

        return listed.map_batches(
            read,
            compute=ray.data.TaskPoolStrategy(size=self.num_readers),
            resources={"reader": self.reader_share} if has_readers else None,
            **_ONE_ROW,
        )

    def read(self, window: Window, start_step: int = 0) -> Iterator[Row]:
        """Fetch a window and yield its parts, one row for each rank in rank order."""
        placed = self.plan.records(window, start_step)
        if not len(placed.row):
            return
        record_set = self.sets[window.source]
        records = read_records(record_set, placed.row, self.form.columns)
        first = sum(part.num_rows for part in self.sets[: window.source])
        start = 0
        for number, part in enumerate(self._parts(window, placed)):
            rows = records.slice(start, len(part.row))
            start += len(part.row)
            if self.partners is not None:
                rows = rows.append_column("other_image", self._other_images(self.partners[first + part.row]))
            table = self.form.prepare(rows).append_column("row", pa.array(part.row))
            labels = np.asarray(table["label"]).tobytes() if self.form.has_labels else b""
            for rank in range(self.world_size):
                mine = pa.array(np.flatnonzero(self._is_of_rank(part, rank)))
                yield {
                    "source": window.source,
                    "epoch": window.epoch,
                    "pool": window.pool,
                    "part": number,
                    "rank": rank,
                    "start_step": start_step,
                    "rows": to_ipc(table.take(mine)),
                    "labels": labels,
                }

    def _parts(self, window: Window, placed: Placed) -> Iterator[Placed]:
        row_bytes = self.form.row_bytes(self.sets[window.source].row_bytes)
        size = max(1, int(PART_BYTES / max(row_bytes, 1)))
        for start in range(0, len(placed.row), size):
            part = slice(start, start + size)
            yield Placed(placed.row[part], placed.step[part], placed.slot[part])

    def _is_of_rank(self, part: Placed, rank: int) -> NDArray[np.bool_]:
        own = rank_slice(self.plan.global_batch_size, rank, self.world_size)
        return np.asarray((part.slot >= own.start) & (part.slot < own.stop))

    def _other_images(self, records: Ints) -> pa.ChunkedArray:
        edges = np.cumsum([0, *(part.num_rows for part in self.sets)])
        parts, places = [], []
        for number, record_set in enumerate(self.sets):
            place = np.flatnonzero((records >= edges[number]) & (records < edges[number + 1]))
            if len(place):
                parts.append(read_records(record_set, records[place] - edges[number], ["image"]))
                places.append(place)
        return pa.concat_tables(parts).take(pa.array(np.argsort(np.concatenate(places))))["image"]

    def batches(self, shard: ray.data.DataIterator, *, rank: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches from `start_step` on in the order of the plan, collated ahead in a thread.

        Raises:
            TrainingError: the stream handed out something else than the plan says.
        """
        from orchestration.data.batch import collate  # imports torch, which a reading task does without

        own = rank_slice(self.plan.global_batch_size, rank, self.world_size)
        size = own.stop - own.start
        waiting: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="collate") as pool:
            for step, rows, labels in self._steps(shard, rank, start_step):
                epoch = self.plan.epoch_of(step)
                waiting.append(pool.submit(collate, rows, self.form, epoch, step, size, labels))
                if len(waiting) > self.batches_ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _steps(
        self, shard: ray.data.DataIterator, rank: int, start_step: int
    ) -> Iterator[tuple[int, pa.Table, NDArray[np.int64]]]:
        """Yield (step, rows of this rank, labels of the whole step) of every step.

        The records of a data set arrive in the order in which steps take them, so a step takes the first ones that are
        held of each, and leaves the rest to the next step.
        """
        blocks = self._blocks(shard, rank, start_step)
        own = rank_slice(self.plan.global_batch_size, rank, self.world_size)
        rows: dict[int, pa.Table] = {}
        labels = [np.empty(0, np.int64) for _ in self.sets]
        for step in range(start_step, self.num_steps):
            sources = self.plan.sources(step)
            num_rows = [int((sources[own] == source).sum()) for source in range(len(self.sets))]
            num_labels = [int((sources == source).sum()) * self.form.has_labels for source in range(len(self.sets))]
            while not rows or any(
                len(rows.get(source, ())) < num_rows[source] or len(labels[source]) < num_labels[source]
                for source in range(len(self.sets))
            ):
                source, table, more = next(blocks)
                rows[source] = pa.concat_tables([rows[source], table]) if source in rows else table
                labels[source] = np.concatenate([labels[source], more])
            table = pa.concat_tables([part[: num_rows[source]] for source, part in sorted(rows.items())])
            whole = np.concatenate([part[:count] for part, count in zip(labels, num_labels, strict=True)])
            rows = {source: part[num_rows[source] :] for source, part in rows.items()}
            labels = [part[count:] for part, count in zip(labels, num_labels, strict=True)]
            if len(self.sets) > 1:
                table = table.take(pa.array(_interleaved(sources[own])))
                whole = whole[_interleaved(sources)] if self.form.has_labels else whole
            yield step, table, whole
        for _ in blocks:
            pass  # what is left holds no record of this rank's steps; the stream's end is held against the plan too

    def _blocks(
        self, shard: ray.data.DataIterator, rank: int, start_step: int
    ) -> Iterator[tuple[int, pa.Table, NDArray[np.int64]]]:
        """Yield (data set, this rank's rows, labels of all ranks) of every part from `start_step` on."""
        expected = None
        for row in _rows_of(shard, rank):
            if expected is None:
                if row["start_step"] > start_step:
                    raise TrainingError(
                        f"the stream starts at step {row['start_step']}, after the checkpoint's step {start_step}"
                    )
                expected = self._expected(row["start_step"])
            window = Window(row["source"], row["epoch"], row["pool"])
            planned, number, part = next(expected, (None, 0, None))
            if part is None or row["rank"] != rank or (window, row["part"]) != (planned, number):
                raise TrainingError(
                    f"rank {rank} was handed part {row['part']} of {window} of rank {row['rank']}, which the plan does "
                    "not have here; Ray Data did not preserve the order, please report it"
                )
            is_mine, table = self._is_of_rank(part, rank), from_ipc(row["rows"])
            if not np.array_equal(table["row"], part.row[is_mine]):
                raise TrainingError(f"rank {rank}: {window} does not hold the records of the plan")
            is_ahead = part.step >= start_step
            labels = np.frombuffer(row["labels"], dtype=np.int64)
            if not is_ahead.all():
                table = table.filter(pa.array(is_ahead[is_mine]))
                labels = labels[is_ahead] if len(labels) else labels
            yield window.source, table, labels
        left = sum(1 for _ in (self._expected(start_step) if expected is None else expected))
        if left:
            raise TrainingError(f"rank {rank}: the stream ended {left} parts before the plan does")

    def _expected(self, start_step: int) -> Iterator[tuple[Window, int, Placed]]:
        for window in self.plan.windows(start_step):
            for number, part in enumerate(self._parts(window, self.plan.records(window, start_step))):
                yield window, number, part


def _interleaved(sources: NDArray[np.int32]) -> Ints:
    """Return the place of each real slot's record where the records stand data set by data set."""
    return np.argsort(np.argsort(sources[sources >= 0], kind="stable"), kind="stable")


_ONE_ROW: Row = {"batch_size": 1, "batch_format": "pyarrow", "num_cpus": 0}


def _list_windows(batch: pa.Table, plan: Plan, start_step: int, pace: Any) -> Iterator[dict[str, list[Any]]]:
    """Yield the windows of a run shortly before reading tasks take them, where Ray Data alone would queue them all."""
    import ray

    run = uuid.uuid4().hex
    for number, window in enumerate(plan.windows(start_step)):
        while number - ray.get(pace.num_taken.remote(run)) > WINDOWS_AHEAD:
            time.sleep(0.1)
        yield {"run": [run], **{name: [value] for name, value in asdict(window).items()}}


class _Pace:
    """An actor that counts the windows that were taken, so that they are listed only shortly before."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}

    def take(self, run: str) -> None:
        self._taken[run] = self._taken.get(run, 0) + 1

    def num_taken(self, run: str) -> int:
        return self._taken.get(run, 0)


def plan_features(
    record_set: RecordSet,
    words: tuple[str, ...],
    config: DataConfig,
    *,
    seed: int,
    global_batch_size: int,
    num_epochs: float,
    world_size: int,
    tail: Tail = "carry",
) -> Stream:
    """Return the stream of a set of features over whole and partial epochs; nothing is dropped between epochs."""
    plan = Plan((record_set.planned(),), seed, global_batch_size, num_epochs, int(config.pool_mib * 2**20), tail)
    return Stream((record_set,), plan, FeatureForm(words), world_size, config.num_readers)


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
) -> Stream:
    """Return the stream of a run over instruct records.

    Args:
        sets: what is read.
        config: how it is read.
        seed: of the order.
        global_batch_size: records of a step, over all ranks.
        num_epochs: > 0.
        world_size: number of ranks.
        preprocessing: of the run's vision tower; None scales to `records.image_size`.
        image_tokens: of the run's vision tower; None takes `records.image_tokens`.

    Raises:
        ConfigError: the batch is larger than an epoch, or weights do not belong to the data sets.
    """
    if config.weights and len(config.weights) != len(sets):
        raise ConfigError(f"records.weights: {len(config.weights)} for {len(sets)} data sets; give one each, or none")
    weights: tuple[float | None, ...] = config.weights or (None,) * len(sets)
    planned = tuple(part.planned(weight) for part, weight in zip(sets, weights, strict=True))
    plan = Plan(planned, seed, global_batch_size, num_epochs, int(config.pool_mib * 2**20), config.tail)
    if not plan.steps_per_epoch:
        raise ConfigError(
            f"train.global_batch_size: {global_batch_size} is more than the {plan.samples_per_epoch} records of an "
            'epoch; lower it, or set records.tail to "pad"'
        )
    form = RecordForm(
        tokenizer=config.tokenizer,
        end_token=config.end_token,
        template=config.template,
        image_tokens=config.image_tokens if image_tokens is None else image_tokens,
        max_length=config.max_length,
        decode=config.decode,
        image_size=config.image_size,
        preprocessing=preprocessing,
    )
    return Stream(sets, plan, form, world_size, config.num_readers, config.batches_ahead)


def quiet_ray_data() -> None:
    """Turn off Ray Data's own bars and log lines in this process: our commands show their progress themselves."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def configure_ray_data() -> Any:
    """Set Ray Data of this process to hand out blocks in order, a row each; return the DataConfig for the trainer."""
    import ray.data
    import ray.train

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    # A block is closed as soon as it holds a row: each carries one rank's part of one window.
    context.target_max_block_size = 1
    quiet_ray_data()
    options = ray.data.ExecutionOptions(preserve_order=True)
    return ray.train.DataConfig(execution_options=options)


def _rows_of(shard: ray.data.DataIterator, rank: int) -> Iterator[Row]:
    timer = threading.Timer(WAITS_S, _say_what_is_missing)
    timer.daemon = True
    if rank == 0:
        timer.start()
    try:
        for block in shard.iter_batches(batch_size=None, prefetch_batches=2, batch_format="pyarrow"):
            timer.cancel()
            yield from block.to_pylist()
    finally:
        timer.cancel()


def _say_what_is_missing() -> None:
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    logger.warning(
        "no batch for %.0f s: reading tasks wait for a free reader, or still start. Of %g readers on %d nodes %g are "
        "free; running jobs hold the others",
        WAITS_S,
        total.get("reader", 0),
        len(ray.nodes()),
        free.get("reader", 0),
    )


@dataclass
class Waits(Generic[T]):
    """A stream that measures how long its consumer waits for it.

    Attributes:
        first_s: seconds to the first item.
        waited_s: seconds spent waiting for the items after it.
    """

    stream: Iterator[T]
    first_s: float = 0.0
    waited_s: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    def __iter__(self) -> Iterator[T]:
        """Yield the items of the stream."""
        asked_at = time.perf_counter()
        is_first = True
        for item in self.stream:
            waited_s = time.perf_counter() - asked_at
            if is_first:
                self.first_s, self._since = waited_s, time.perf_counter()
            else:
                self.waited_s += waited_s
            is_first = False
            yield item
            asked_at = time.perf_counter()

    def take_share(self) -> float:
        """Return the part of the time since the last call, or since the first item, that was spent waiting."""
        now = time.perf_counter()
        share = self.waited_s / (now - self._since) if now > self._since else 0.0
        self.waited_s, self._since = 0.0, now
        return share


def to_ipc(table: pa.Table) -> bytes:
    """Return a table as Arrow IPC bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return bytes(sink.getvalue().to_pybytes())


def from_ipc(data: bytes) -> pa.Table:
    """Return the table in Arrow IPC bytes."""
    return pa.ipc.open_stream(data).read_all()
