"""Token records of different lengths as one row: packed one after another.

Shape letters: T tokens of all records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyemo.conversation import IGNORED

TokenRecord = tuple[Tensor, Tensor]
"""input_ids and labels of a record, (T,) int64 each."""


@dataclass(frozen=True)
class PackedBatch:
    """Records one after another in a single row.

    Attributes:
        input_ids: (1, T) int64.
        labels: (1, T) int64; a record's first token is IGNORED, for the token before it is another record's.
        position_ids: (1, T) int64, from 0 again at each record. Where it gets these, no attention mask and no cache
            (`use_cache=False`, which is not its default), transformers lets no token see another record's.
        num_answer_tokens: labels that count.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    num_answer_tokens: int


def pack(records: Sequence[TokenRecord]) -> PackedBatch:
    """Pack the records into one row, in their order, without padding."""
    # No token precedes a record's first one, so its label is ignored.
    labels = [torch.cat([labels.new_full((min(1, len(labels)),), IGNORED), labels[1:]]) for _, labels in records]
    positions = [torch.arange(len(input_ids)) for input_ids, _ in records]
    row = torch.cat(labels)[None]
    return PackedBatch(
        input_ids=torch.cat([input_ids for input_ids, _ in records])[None],
        labels=row,
        position_ids=torch.cat(positions)[None],
        num_answer_tokens=int((row != IGNORED).sum()),
    )


def micro_batches(num_records: int, micro_batch_size: int) -> Iterator[slice]:
    """Divide one rank's records of a step into forward passes; all but the last have the same size.

    The number of parts follows from the number of records alone, which all ranks share: under ZeRO every rank must take
    part in every pass. Order stays, and what belongs to the step stays in it.

    Args:
        num_records: number of records of one rank in a step.
        micro_batch_size: > 0.
    """
    for start in range(0, num_records, micro_batch_size):
        yield slice(start, min(start + micro_batch_size, num_records))
