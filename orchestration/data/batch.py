"""Records as a rank trains on them: tensors, made of what a reading task handed over; see `forms`.

Shape letters: B records of one rank in a step, G records of the whole step, d feature width, H image side, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestration.data.forms import FeatureForm, RecordForm
from orchestration.data.sets import features_array
from tinyemo.conversation import IGNORED, IMAGE_TOKEN_ID
from tinyemo.packing import TokenRecord


@dataclass(frozen=True)
class Batch:
    """The records of one rank in one step.

    Attributes:
        step: counted over epochs.
        ids: B ids of this rank's records; empty text where padded.
        is_real: (B,) bool; false rows fill up an epoch's last batch and must not count.
        features: (B, d) float16 or float32; None for images.
        labels: (B,) int64, index into the recipe's words; -1 where padded.
        global_labels: (G,) int64, labels of the whole step, rank after rank, which contrastive losses need.
        pixel_values: (B, H, H, 3) uint8 RGB.
        other_pixel_values: likewise, of the record whose image stands in as another's; None outside evaluation.
        tokens: B pairs of input_ids and labels, (T,) int64 each, without padding: IMAGE_TOKEN_ID where the image goes,
            -100 where nothing is learned and in all of a row that is not real. None without a tokenizer.
    """

    epoch: int
    step: int
    ids: list[str]
    is_real: Tensor
    features: Tensor | None = None
    labels: Tensor | None = None
    global_labels: Tensor | None = None
    pixel_values: Tensor | None = None
    other_pixel_values: Tensor | None = None
    tokens: list[TokenRecord] | None = None

    def part(self, rows: slice) -> Batch:
        """Return some of the records in their order; see `tinyemo.packing.micro_batches`."""
        names = ("ids", "is_real", "features", "labels", "pixel_values", "other_pixel_values", "tokens")
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        chosen: dict[str, Any] = {name: value[rows] for name, value in found.items() if value is not None}
        return replace(self, **chosen)


def collate(
    rows: pa.Table, form: FeatureForm | RecordForm, epoch: int, step: int, size: int, global_labels: NDArray[np.int64]
) -> Batch:
    """Return one rank's rows of a step as tensors, filled up to `size` records."""
    missing = size - len(rows)
    is_real = torch.arange(size) < len(rows)
    batch = Batch(epoch, step, rows["id"].to_pylist() + [""] * missing, is_real)
    if isinstance(form, FeatureForm):
        return replace(
            batch,
            features=torch.from_numpy(_filled(features_array(rows), missing)),
            labels=torch.from_numpy(_filled(np.asarray(rows["label"]), missing, -1)),
            global_labels=torch.from_numpy(global_labels),
        )
    values: dict[str, Any] = {"pixel_values": _pixels(rows, "image", form, missing)}
    if "other_image" in rows.column_names:
        values["other_pixel_values"] = _pixels(rows, "other_image", form, missing)
    if form.tokenizer:
        lists = zip(rows["input_ids"].to_pylist(), rows["labels"].to_pylist(), strict=True)
        empty = [IMAGE_TOKEN_ID] * form.image_tokens + [0, 0]
        values["tokens"] = [(torch.tensor(ids), torch.tensor(labels)) for ids, labels in lists] + [
            (torch.tensor(empty), torch.full((len(empty),), IGNORED)) for _ in range(missing)
        ]
    return replace(batch, **values)


def _filled(values: NDArray[Any], missing: int, value: int = 0) -> NDArray[Any]:
    return np.concatenate([values, np.full((missing, *values.shape[1:]), value, values.dtype)])


def _pixels(rows: pa.Table, column: str, form: RecordForm, missing: int) -> Tensor:
    shape = (form.side, form.side, 3)
    pixels = np.zeros((len(rows) + missing, *shape), dtype=np.uint8)
    names = rows["id"].to_pylist()
    for place, data in enumerate(rows[column]):
        buffer = data.as_buffer()
        is_decoded = form.decode == "reader"
        pixels[place] = (
            np.frombuffer(buffer, np.uint8).reshape(shape) if is_decoded else form.pixels(buffer, names[place])
        )
    return torch.from_numpy(pixels)
