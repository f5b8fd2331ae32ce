"""Partners for the evaluation of a reasoning model: for each held-out record another record with another image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from orchestration.data.manifest import read_index
from orchestration.data.plan import Ints
from orchestration.data.sets import RecordSet
from orchestration.data.stream import Stream
from tinyemo.errors import DataError


def with_partners(stream: Stream) -> Stream:
    """Return the stream with a partner for each record, chosen over all records and so independent of ranks.

    A partner stands in the same pool where the pool has enough images, so that its image is fetched with the pool.

    Raises:
        DataError: one image has more than half of the records.
        StorageError: S3 cannot be read.
    """
    images = np.concatenate([_image_names(part) for part in stream.sets])
    first = np.cumsum([0, *(part.num_rows for part in stream.sets)])
    partners = np.empty(len(images), dtype=np.int64)
    one_epoch = replace(stream.plan, num_epochs=1, max_steps=None, tail="pad")
    try:
        for window in one_epoch.windows():
            rows = first[window.source] + one_epoch.records(window).row
            partners[rows] = rows[other_images(images[rows])]
    except ValueError:
        try:
            partners = other_images(images)
        except ValueError as error:
            raise DataError(f"images cannot be shuffled for the evaluation: {error}; give it more records") from error
    return replace(stream, partners=partners)


def _image_names(record_set: RecordSet) -> NDArray[np.uint64]:
    index = read_index(record_set.manifest)
    index = index.filter(pc.equal(index["split"], record_set.split))
    rows = record_set.row_numbers(np.asarray(index["shard"]), np.asarray(index["row"]))
    return np.asarray(index["image_hash"])[np.argsort(rows)][record_set.stored_rows(np.arange(record_set.num_rows))]


def other_images(images: Sequence[str] | NDArray[Any]) -> Ints:
    """Return for each record the place of a record with another image; each record's image is handed out once.

    Records are put in the order of their images and that order is turned by the size of the largest group.

    Args:
        images: N names of images; no more than half of them may be the same.

    Raises:
        ValueError: one image has more than half of the records, so that no such assignment exists.
    """
    order = np.argsort(np.asarray(images), kind="stable")
    largest = int(np.unique(np.asarray(images), return_counts=True)[1].max())
    if 2 * largest > len(images):
        raise ValueError(f"{largest} of {len(images)} records have one image: there are not enough others to swap with")
    found = np.empty(len(images), dtype=np.int64)
    found[order] = np.roll(order, -largest)
    return found
