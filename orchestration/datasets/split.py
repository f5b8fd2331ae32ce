"""Which row belongs to which split: read from the manifest's index, validation carved out of train by id hash.

The driver plans a run from the index alone (16 bytes a row) and never reads a shard of features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestration.datasets.manifest import Manifest, read_index
from tinyemo.errors import DataError
from tinyemo.taxonomies import label_id


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split in their stored order.

    Attributes:
        shard: (N,) int32, position in `manifest.shards`.
        row: (N,) int32, row in that shard.
        label: (N,) int64, index into the words of the taxonomy.
        id_hash: (N,) uint64.
    """

    shard: NDArray[np.int32]
    row: NDArray[np.int32]
    label: NDArray[np.int64]
    id_hash: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.shard)

    def take(self, positions: NDArray[np.int64]) -> SplitRows:
        """The rows at `positions`, in that order."""
        return SplitRows(self.shard[positions], self.row[positions], self.label[positions], self.id_hash[positions])


def load_splits(manifest: Manifest, words: tuple[str, ...]) -> dict[str, SplitRows]:
    """Rows by split name, labels as indices into `words`.

    Raises:
        DataError: the index is not the one that the manifest names, or holds a label outside `words`.
    """
    table = read_index(manifest)
    label_ids = np.asarray(table["label_id"])
    lookup = {label_id(word): position for position, word in enumerate(words)}
    foreign = sorted(set(np.unique(label_ids).tolist()) - lookup.keys())
    if foreign:
        raise DataError(
            f"{manifest.uri}: {len(foreign)} labels of the data set ({manifest.taxonomy}) are not among the words "
            f"{', '.join(words)}; set labels.taxonomy to the data set's own"
        )
    labels = np.array([lookup[i] for i in label_ids.tolist()], dtype=np.int64)
    names = np.asarray(table["split"].to_pylist())
    rows = SplitRows(
        np.asarray(table["shard"]), np.asarray(table["row"]), labels, np.asarray(table["id_hash"]).astype(np.uint64)
    )
    return {name: rows.take(np.flatnonzero(names == name)) for name in sorted(set(names.tolist()))}


def carve_validation(rows: SplitRows, *, fraction: float, fold: int = 0) -> tuple[SplitRows, SplitRows]:
    """(rest, validation): of each label the `fold`-th `fraction` of its rows in the order of their id hash.

    The hash belongs to the id, so a row keeps its side when others come or go nearby, and folds never overlap.
    """
    is_validation = np.zeros(len(rows), dtype=bool)
    for label in np.unique(rows.label):
        members = np.flatnonzero(rows.label == label)
        members = members[np.argsort(rows.id_hash[members], kind="stable")]
        first, last = (round(len(members) * fraction * (fold + k)) for k in (0, 1))
        is_validation[members[first:last]] = True
    return rows.take(np.flatnonzero(~is_validation)), rows.take(np.flatnonzero(is_validation))
