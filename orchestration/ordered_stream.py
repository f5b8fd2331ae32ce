"""Ray Data in the order of a plan: what is read together, who gets it, and blocks that nothing splits or merges.

One task reads one item of the plan and yields one row for each rank, in rank order. A row carries the rank's part of
the item as Arrow IPC bytes and is a block of its own. With `preserve_order` the streaming split hands the blocks to the
ranks in turn. Whoever consumes the rows holds each against the plan, so a stream out of order is an error and never a
silently different run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    import ray.data

Row = dict[str, Any]


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

    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    # Reading asks for no CPU of Ray's: two jobs whose workers hold them all would wait for their data for ever.
    readers = ray.data.TaskPoolStrategy(size=num_readers)
    return dataset.map_batches(run, batch_size=1, batch_format="pyarrow", num_cpus=0, compute=readers)


def configure_ray_data() -> Any:
    """Set Ray Data of this process to hand out blocks in order, a row each; the DataConfig for the trainer."""
    import ray.data
    import ray.train

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    # A block is closed as soon as it holds a row: each carries one rank's part of one item.
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    options = ray.data.ExecutionOptions(preserve_order=True)
    return ray.train.DataConfig(execution_options=options)


def ordered_rows(shard: ray.data.DataIterator) -> Iterator[Row]:
    """A rank's rows as they come."""
    for block in shard.iter_batches(batch_size=None, prefetch_batches=2, batch_format="pyarrow"):
        yield from block.to_pylist()


def to_ipc(table: pa.Table) -> bytes:
    """A table as Arrow IPC bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return bytes(sink.getvalue().to_pybytes())


def from_ipc(data: bytes) -> pa.Table:
    """The table in Arrow IPC bytes."""
    return pa.ipc.open_stream(data).read_all()
