"""Records become what a run trains on: in a reading task ids and, where the recipe says so, pixels; on a rank tensors.

Shape letters: B records of one rank in a step, H image side in pixels, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestration.streaming.record_sets import turns_of
from tinyemo.chat_templates import TemplateName
from tinyemo.chat_tokenizer import ChatTokenizer
from tinyemo.conversation import IGNORED, encode_conversation
from tinyemo.embedding_tables import open_tokenizer
from tinyemo.encoders import Preprocessing
from tinyemo.errors import DataError
from tinyemo.images import decode_image
from tinyemo.packing import PaddedBatch, TokenRecord, pad
from tinyemo.vision import read_pixels


@dataclass(frozen=True)
class RecordForm:
    """In which form a run takes its records.

    Attributes:
        tokenizer: an asset's name or a path; empty for images alone.
        image_tokens: placeholders of an image among the ids.
        decode: who turns files into pixels.
        image_size: H, where no preprocessing says it.
        preprocessing: of the vision tower; None for a plain centre square, which is several times faster.
    """

    tokenizer: str
    end_token: str
    template: TemplateName
    image_tokens: int
    max_length: int
    decode: Literal["reader", "worker"]
    image_size: int
    preprocessing: Preprocessing | None

    @property
    def side(self) -> int:
        """H."""
        return self.image_size if self.preprocessing is None else self.preprocessing.crop

    def pixels(self, data: bytes, record_id: str) -> NDArray[np.uint8]:
        """(H, H, 3) uint8 RGB, not normalised: the same wherever it is called.

        Raises:
            DataError: these bytes are no whole image.
        """
        try:
            if self.preprocessing is None:
                return decode_image(data, self.image_size)
            return read_pixels(data, self.preprocessing)
        except DataError as error:
            raise DataError(f"record {record_id!r}: {error}") from error


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


def prepare(records: pa.Table, form: RecordForm) -> pa.Table:
    """What travels to the ranks: id, image (the file, or its pixels), input_ids, labels.

    Raises:
        DataError: a record that cannot be decoded or learned from, by its id.
    """
    ids = records["id"].to_pylist()
    columns = {"id": records["id"], "image": records["image"]}
    if form.decode == "reader":
        pixels = [
            form.pixels(data.as_buffer(), name).tobytes() for data, name in zip(records["image"], ids, strict=True)
        ]
        columns["image"] = pa.array(pixels, pa.binary(3 * form.side**2))
    if form.tokenizer:
        tokenizer = open_chat_tokenizer(form.tokenizer, form.end_token)
        encoded = [
            encode_conversation(
                turns,
                tokenizer,
                template=form.template,
                image_tokens=form.image_tokens,
                max_length=form.max_length,
                task=task,
                record_id=name,
            )
            for turns, task, name in zip(turns_of(records), records["task"].to_pylist(), ids, strict=True)
        ]
        columns["input_ids"] = pa.array([item.input_ids for item in encoded], pa.list_(pa.int32()))
        columns["labels"] = pa.array([item.labels for item in encoded], pa.list_(pa.int32()))
    return pa.table(columns)


@cache
def open_chat_tokenizer(name: str, end_token: str) -> ChatTokenizer:
    """The tokenizer of an asset, a folder or a file; opened once a process.

    Raises:
        ConfigError: the tokenizer has no such end token.
        AssetError, DataError: it cannot be had or read.
    """
    from orchestration.assets.catalogue import find_asset, get_asset

    source = Path(name)
    if not source.exists():
        source = get_asset(name) / find_asset(name).files[0]
    return ChatTokenizer(open_tokenizer(source), end_token)


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
