"""The form in which a run takes its records: what a reading task makes of them before they travel to the ranks.

This module imports no torch: a reading task starts quickly and stays small. Ranks make tensors, see `batch`.

Shape letters: H image side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from orchestration.data.sets import turns_of
from tinyemo.chat_templates import TemplateName
from tinyemo.chat_tokenizer import ChatTokenizer
from tinyemo.conversation import encode_conversation
from tinyemo.encoders import Preprocessing
from tinyemo.errors import DataError
from tinyemo.images import decode_image, read_pixels
from tinyemo.tokenizer_files import open_tokenizer


@dataclass(frozen=True)
class FeatureForm:
    """Feature vectors with a label each.

    Attributes:
        words: of the labels, in the order of their indices.
    """

    words: tuple[str, ...]
    has_labels: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("id", "label", "features")

    def row_bytes(self, stored_bytes: float) -> float:
        """Return the bytes of a record on its way to a rank, from its mean bytes in storage."""
        return stored_bytes

    def opened(self) -> FeatureForm:
        return self

    def prepare(self, records: pa.Table) -> pa.Table:
        """Return id, features and label, the index of the record's word.

        Raises:
            DataError: a label is not among the words.
        """
        label = pc.index_in(records["label"], value_set=pa.array(self.words, pa.string()))
        if label.null_count:
            word = records["label"].filter(pc.is_null(label))[0]
            raise DataError(f"label {word} of the data set is not among the words {', '.join(self.words)}")
        return pa.table({"id": records["id"], "features": records["features"], "label": label.cast(pa.int64())})


@dataclass(frozen=True)
class RecordForm:
    """Images with the tokens of their conversation.

    Attributes:
        tokenizer: an asset's name or a path; empty for images alone.
        image_tokens: placeholders of an image among the ids.
        decode: whether reading tasks or ranks turn files into pixels.
        image_size: H where no preprocessing says it.
        preprocessing: of the vision tower; None for a plain centre square, which is several times faster.
        tokenizer_json: the opened tokenizer, so that a reading task need not import transformers; see `opened`.
    """

    tokenizer: str
    end_token: str
    template: TemplateName
    image_tokens: int
    max_length: int
    decode: Literal["reader", "worker"]
    image_size: int
    preprocessing: Preprocessing | None
    tokenizer_json: str = field(default="", repr=False)
    has_labels: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("id", "image", "task", "turns")

    @property
    def side(self) -> int:
        """Side of the square images, H."""
        return self.image_size if self.preprocessing is None else self.preprocessing.crop

    def row_bytes(self, stored_bytes: float) -> float:
        """Return the bytes of a record on its way to a rank, from its mean bytes in storage."""
        return 3 * self.side**2 if self.decode == "reader" else stored_bytes

    def opened(self) -> RecordForm:
        """Return the form with its tokenizer's own JSON, which opens in a fraction of the time."""
        return replace(self, tokenizer_json=_find_tokenizer(self.tokenizer).to_str()) if self.tokenizer else self

    def pixels(self, data: bytes, record_id: str) -> NDArray[np.uint8]:
        """Return (H, H, 3) uint8 RGB, not normalised: the same wherever it is called.

        Raises:
            DataError: these bytes are no whole image.
        """
        try:
            if self.preprocessing is None:
                return decode_image(data, self.image_size)
            return read_pixels(data, self.preprocessing)
        except DataError as error:
            raise DataError(f"record {record_id!r}: {error}") from error

    def prepare(self, records: pa.Table) -> pa.Table:
        """Return id, image (the file, or its pixels), other_image where there is one, input_ids and labels.

        Raises:
            DataError: a record that cannot be decoded or learned from, by its id.
        """
        ids = records["id"].to_pylist()
        columns = {"id": records["id"]}
        for name in {"image", "other_image"} & set(records.column_names):
            columns[name] = self._images(records[name], ids)
        if self.tokenizer:
            tokenizer = open_chat_tokenizer(self.tokenizer, self.end_token, self.tokenizer_json)
            encoded = [
                encode_conversation(
                    turns,
                    tokenizer,
                    template=self.template,
                    image_tokens=self.image_tokens,
                    max_length=self.max_length,
                    task=task,
                    record_id=name,
                )
                for turns, task, name in zip(turns_of(records), records["task"].to_pylist(), ids, strict=True)
            ]
            columns["input_ids"] = pa.array([item.input_ids for item in encoded], pa.list_(pa.int32()))
            columns["labels"] = pa.array([item.labels for item in encoded], pa.list_(pa.int32()))
        return pa.table(columns)

    def _images(self, images: pa.ChunkedArray, ids: Sequence[str]) -> pa.ChunkedArray | pa.Array:
        if self.decode == "worker":
            return images
        pixels = [self.pixels(data.as_buffer(), name).tobytes() for data, name in zip(images, ids, strict=True)]
        return pa.array(pixels, pa.binary(3 * self.side**2))


@cache
def open_chat_tokenizer(name: str, end_token: str, tokenizer_json: str = "") -> ChatTokenizer:
    """Open the tokenizer of an asset, a folder or a file, or the JSON of one, once a process.

    Raises:
        ConfigError: the tokenizer has no such end token.
        AssetError, DataError: it cannot be found or read.
    """
    if not tokenizer_json:
        return ChatTokenizer(_find_tokenizer(name), end_token)
    from tokenizers import Tokenizer

    return ChatTokenizer(Tokenizer.from_str(tokenizer_json), end_token)


def _find_tokenizer(name: str) -> Any:
    from orchestration.assets.catalogue import find_asset, get_asset

    source = Path(name)
    if not source.exists():
        source = get_asset(name) / find_asset(name).files[0]
    return open_tokenizer(source)
