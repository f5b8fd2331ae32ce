"""Ray Data in the order of a plan: what is read together, who gets it, and blocks that nothing splits or merges.

One task reads one item of the plan and yields one row for each rank, in rank order. A row carries the rank's part of
the item as Arrow IPC bytes and is a block of its own. With `preserve_order` the streaming split hands the blocks to the
ranks in turn. Whoever consumes the rows holds each against the plan, so a stream out of order is an error and never a
silently different run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pyarrow as pa

if TYPE_CHECKING:
    import ray.data

Row = dict[str, Any]
T = TypeVar("T")


def ordered_dataset(items: list[Row], read: Callable[[Row], Iterator[Row]], *, num_readers: int) -> ray.data.Dataset:
    """The pipeline over the items; nothing runs until the workers iterate.

    Args:
        items: plain values, a task each.
        read: one row for each rank, in rank order.
        num_readers: tasks at the same time.
    """
    import ray.data

    def run(batch: pa.Table) -> Iterator[dict[str, list[Any]]]:
        for item in batch.to_pylist():
            for row in read(item):
                yield {name: [value] for name, value in row.items()}

    dataset = ray.data.from_items(items, override_num_blocks=max(1, len(items)))
    # Reading asks for no CPU of Ray's: two jobs whose workers hold them all would wait for their data for ever.
    readers = ray.data.TaskPoolStrategy(size=num_readers)
    return dataset.map_batches(run, batch_size=1, batch_format="pyarrow", num_cpus=0, compute=readers)


def quiet_ray_data() -> None:
    """Ray Data's own bars and log lines off in this process: our commands show their progress themselves."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def configure_ray_data() -> Any:
    """Set Ray Data of this process to hand out blocks in order, a row each; the DataConfig for the trainer."""
    import ray.data
    import ray.train

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    # A block is closed as soon as it holds a row: each carries one rank's part of one item.
    context.target_max_block_size = 1
    quiet_ray_data()
    options = ray.data.ExecutionOptions(preserve_order=True)
    return ray.train.DataConfig(execution_options=options)


def ordered_rows(shard: ray.data.DataIterator) -> Iterator[Row]:
    """A rank's rows as they come."""
    for block in shard.iter_batches(batch_size=None, prefetch_batches=2, batch_format="pyarrow"):
        yield from block.to_pylist()


class Waits(Generic[T]):
    """A stream that knows how long its consumer waited for it.

    Attributes:
        first_s: seconds to the first item.
        waited_s: seconds spent waiting for the items after it.
    """

    def __init__(self, stream: Iterator[T]) -> None:
        self.first_s = self.waited_s = 0.0
        self._stream = stream
        self._since = time.perf_counter()

    def __iter__(self) -> Iterator[T]:
        """The stream's items."""
        asked_at = time.perf_counter()
        is_first = True
        for item in self._stream:
            waited_s = time.perf_counter() - asked_at
            if is_first:
                self.first_s, self._since = waited_s, time.perf_counter()
            else:
                self.waited_s += waited_s
            is_first = False
            yield item
            asked_at = time.perf_counter()

    def take_share(self) -> float:
        """Part of the time since the last call, or since the first item, that was spent waiting."""
        now = time.perf_counter()
        share = self.waited_s / (now - self._since) if now > self._since else 0.0
        self.waited_s, self._since = 0.0, now
        return share


def to_ipc(table: pa.Table) -> bytes:
    """A table as Arrow IPC bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return bytes(sink.getvalue().to_pybytes())


def from_ipc(data: bytes) -> pa.Table:
    """The table in Arrow IPC bytes."""
    return pa.ipc.open_stream(data).read_all()
