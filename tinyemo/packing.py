"""Token records of different lengths as one tensor: packed one after another, or padded to the longest.

Shape letters: B records, T tokens: of all records where packed, of the longest where padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tinyemo.conversation import IGNORED

PAD_TOKEN_ID = 0
"""Behind the end of a shorter record; masked."""

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


@dataclass(frozen=True)
class PaddedBatch:
    """One record per row, padded at its end.

    Attributes:
        input_ids: (B, T) int64.
        labels: (B, T) int64; the first column is IGNORED, for nothing stands before it.
        attention_mask: (B, T) bool.
        num_answer_tokens: labels that count.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    num_answer_tokens: int


def pack(records: Sequence[TokenRecord]) -> PackedBatch:
    """Pack the records into one row, in their order, without padding."""
    labels = _without_first(records)
    positions = [torch.arange(len(input_ids)) for input_ids, _ in records]
    row = torch.cat(labels)[None]
    return PackedBatch(
        input_ids=torch.cat([input_ids for input_ids, _ in records])[None],
        labels=row,
        position_ids=torch.cat(positions)[None],
        num_answer_tokens=_count(row),
    )


def pad(records: Sequence[TokenRecord]) -> PaddedBatch:
    """Pad the records to one row each, in their order."""
    labels = pad_sequence(_without_first(records), batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor([len(input_ids) for input_ids, _ in records])
    return PaddedBatch(
        input_ids=pad_sequence([input_ids for input_ids, _ in records], batch_first=True, padding_value=PAD_TOKEN_ID),
        labels=labels,
        attention_mask=torch.arange(labels.shape[1])[None, :] < lengths[:, None],
        num_answer_tokens=_count(labels),
    )


def micro_batches(num_records: int, micro_batch_size: int) -> Iterator[slice]:
    """Divide one rank's records of a step into forward passes; all but the last have the same size.

    The number of parts follows from the number of records alone, which all ranks share: under ZeRO every rank must take
    part in every pass. Order stays, and what belongs to the step stays in it.

    Args:
        num_records: of one rank in a step.
        micro_batch_size: > 0.
    """
    for start in range(0, num_records, micro_batch_size):
        yield slice(start, min(start + micro_batch_size, num_records))


def _without_first(records: Sequence[TokenRecord]) -> list[Tensor]:
    """Ignore the label of each record's first token, which no token precedes."""
    return [torch.cat([labels.new_full((min(1, len(labels)),), IGNORED), labels[1:]]) for _, labels in records]


def _count(labels: Tensor) -> int:
    return int((labels != IGNORED).sum())
