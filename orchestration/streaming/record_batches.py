"""Records as a rank trains on them: tensors, made of what a reading task handed over; see `record_forms`.

Shape letters: B records of one rank in a step, H image side in pixels, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from orchestration.streaming.record_forms import RecordForm
from tinyemo.conversation import IGNORED
from tinyemo.packing import PaddedBatch, TokenRecord, pad


@dataclass(frozen=True)
class RecordBatch:
    """What one rank gets of a step.

    Attributes:
        step: counted over epochs.
        ids: B of this rank's records; empty text where padded.
        is_real: (B,) bool; false rows fill up an epoch's last batch and must not count.
        pixel_values: (B, H, H, 3) uint8 RGB.
        tokens: B pairs of input_ids and labels, (T,) int64 each, without padding: IMAGE_TOKEN_ID where the image goes,
            -100 where nothing is learned and in all of a row that is not real. None without a tokenizer.
    """

    epoch: int
    step: int
    ids: list[str]
    is_real: Tensor
    pixel_values: Tensor
    tokens: list[TokenRecord] | None

    @cached_property
    def padded(self) -> PaddedBatch | None:
        """The tokens as (B, T) tensors."""
        return None if self.tokens is None else pad(self.tokens)

    @property
    def input_ids(self) -> Tensor | None:
        """(B, T) int64."""
        return None if self.padded is None else self.padded.input_ids

    @property
    def labels(self) -> Tensor | None:
        """(B, T) int64."""
        return None if self.padded is None else self.padded.labels

    @property
    def attention_mask(self) -> Tensor | None:
        """(B, T) bool."""
        return None if self.padded is None else self.padded.attention_mask

    def part(self, rows: slice) -> RecordBatch:
        """Some of its records, in their order; see `tinyemo.packing.micro_batches`."""
        tokens = None if self.tokens is None else self.tokens[rows]
        return RecordBatch(self.epoch, self.step, self.ids[rows], self.is_real[rows], self.pixel_values[rows], tokens)


def collate(rows: pa.Table, epoch: int, step: int, form: RecordForm) -> RecordBatch:
    """One rank's rows of a step as tensors."""
    side, names = form.side, rows["id"].to_pylist()
    pixels = np.empty((len(rows), side, side, 3), dtype=np.uint8)
    for place, data in enumerate(rows["image"]):
        buffer = data.as_buffer()
        is_pixels = form.decode == "reader"
        pixels[place] = (
            np.frombuffer(buffer, np.uint8).reshape(side, side, 3) if is_pixels else form.pixels(buffer, names[place])
        )
    is_real = torch.from_numpy(np.asarray(rows["row"]) >= 0)
    tokens = None
    if form.tokenizer:
        lists = zip(rows["input_ids"].to_pylist(), rows["labels"].to_pylist(), is_real.tolist(), strict=True)
        tokens = [
            (torch.tensor(ids), torch.tensor(labels if counts else [IGNORED] * len(ids)))
            for ids, labels, counts in lists
        ]
    return RecordBatch(epoch, step, names, is_real, torch.from_numpy(pixels), tokens)
