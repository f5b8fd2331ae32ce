"""Which images of an instruct data set an encoder reads, and in which parts: decided once, from its text columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from orchestration.data.manifest import held_out_rank
from orchestration.datasets.validation import Rejection


class ImageReason(StrEnum):
    """Why an image has no pooled row. Checks run in this order, and an image carries the first that applies."""

    IMAGE_IN_TWO_SPLITS = "image_in_two_splits"
    """The split that is held out more (test, then validation, then any other, then train) has it too."""
    CONFLICTING_LABELS = "conflicting_labels"
    """Its records name different labels."""
    NO_LABEL = "no_label"
    """None of its records names a label, which a feature data set needs; it has a row of patches all the same."""
    UNREADABLE_IMAGE = "unreadable_image"
    """Pillow on the encoder's node cannot decode it."""
    NOT_FINITE = "not_finite"
    """A feature is NaN or Inf as float16."""


@dataclass(frozen=True)
class Part:
    """N images that one task encodes and stores.

    Attributes:
        rows: (N,) int64, the first record of each image, counted over its split's shards, ascending.
        ids: N sha256 of images.
        labels: N labels; None for an image that gets no pooled row.
    """

    split: str
    number: int
    rows: NDArray[np.int64]
    ids: list[str]
    labels: list[str | None]

    @property
    def name(self) -> str:
        """Of its files, without the ending."""
        return f"{self.split}-{self.number:05d}"

    def pack(self) -> dict[str, Any]:
        """The part as a row of Ray Data."""
        return {**self.__dict__, "rows": self.rows.tobytes()}

    @staticmethod
    def unpack(row: dict[str, Any]) -> Part:
        """The part that `pack` made a row of."""
        return Part(**{**row, "rows": np.frombuffer(row["rows"], dtype=np.int64)})


@dataclass(frozen=True)
class ImagePlan:
    """Every distinct image of every split once."""

    parts: list[Part]
    """By split, then in the order of the records."""
    rejections: list[Rejection]
    """Images without a pooled row, as far as records can tell."""
    num_records: int
    num_images: int
    """Pairs of split and image."""


def plan_images(records: pa.Table, images_per_part: int) -> ImagePlan:
    """The parts of records with the columns of `read_image_columns`."""
    images = _group(records)
    splits = list(dict.fromkeys(records["split"].to_pylist()))
    reasons = _reasons(images)
    rejections, parts = [], []
    for split in splits:
        places = np.flatnonzero(pc.equal(images["split"], split).to_numpy()).tolist()
        rejections += [_rejection(images, place, *reasons[place]) for place in places if place in reasons]
        elsewhere = ImageReason.IMAGE_IN_TWO_SPLITS
        read = [place for place in places if place not in reasons or reasons[place][0] is not elsewhere]
        for number, start in enumerate(range(0, len(read), images_per_part)):
            parts.append(_part(images, split, number, read[start : start + images_per_part], reasons))
    return ImagePlan(parts, rejections, records.num_rows, images.num_rows)


def _group(records: pa.Table) -> pa.Table:
    """One row per split and image, in the order of their first records: split, image_sha256, row, first and last by
    alphabet of the labels that its records name."""
    aggregates = [("row", "min"), ("label", "min"), ("label", "max")]
    grouped = records.group_by(["split", "image_sha256"]).aggregate(aggregates)
    table = pa.table(
        {
            "split": grouped["split"],
            "image_sha256": grouped["image_sha256"],
            "row": grouped["row_min"],
            "lowest": grouped["label_min"],
            "highest": grouped["label_max"],
        }
    )
    return table.sort_by([("split", "ascending"), ("row", "ascending")]).combine_chunks()


def _reasons(images: pa.Table) -> dict[int, tuple[ImageReason, str]]:
    """Place in `images` -> why that image has no pooled row."""
    found: dict[int, tuple[ImageReason, str]] = {}
    for place, split in _also_elsewhere(images):
        found[place] = (ImageReason.IMAGE_IN_TWO_SPLITS, f"{split} holds it too")
    lowest, highest = images["lowest"].to_pylist(), images["highest"].to_pylist()
    for place, (low, high) in enumerate(zip(lowest, highest, strict=True)):
        if low is None:
            found.setdefault(place, (ImageReason.NO_LABEL, "no record of this image names a label"))
        elif low != high:
            detail = f"its records name {low} and {high}"
            found.setdefault(place, (ImageReason.CONFLICTING_LABELS, detail))
    return found


def _also_elsewhere(images: pa.Table) -> Iterator[tuple[int, str]]:
    """Places of images that a split which is held out more has too, and that split."""
    holders: dict[str, str] = {}
    names, hashes = images["split"].to_pylist(), images["image_sha256"].to_pylist()
    for split, sha256 in zip(names, hashes, strict=True):
        holders[sha256] = min(holders.get(sha256, split), split, key=held_out_rank)
    for place, (split, sha256) in enumerate(zip(names, hashes, strict=True)):
        if holders[sha256] != split:
            yield place, holders[sha256]


def _rejection(images: pa.Table, place: int, reason: ImageReason, detail: str) -> Rejection:
    split, sha256, row = (images[name][place].as_py() for name in ("split", "image_sha256", "row"))
    return Rejection(split, sha256, None, row, reason, detail)


def _part(
    images: pa.Table, split: str, number: int, places: list[int], reasons: dict[int, tuple[ImageReason, str]]
) -> Part:
    taken = images.take(pa.array(places))
    labels = taken["lowest"].to_pylist()
    return Part(
        split=split,
        number=number,
        rows=taken["row"].to_numpy().astype(np.int64),
        ids=taken["image_sha256"].to_pylist(),
        labels=[None if place in reasons else label for place, label in zip(places, labels, strict=True)],
    )
