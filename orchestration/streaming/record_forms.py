"""What a reading task makes of records: ids and, where the recipe says so, pixels. It imports no torch of its
own (transformers does, to open a tokenizer): a task is quickly up and small. Ranks make tensors, in `record_batches`.

Shape letters: H image side in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from orchestration.streaming.record_sets import turns_of
from tinyemo.chat_templates import TemplateName
from tinyemo.chat_tokenizer import ChatTokenizer
from tinyemo.conversation import encode_conversation
from tinyemo.encoders import Preprocessing
from tinyemo.errors import DataError
from tinyemo.images import decode_image, read_pixels
from tinyemo.tokenizer_files import open_tokenizer


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
