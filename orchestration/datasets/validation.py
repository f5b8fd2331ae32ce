"""Row by row: what is kept of a data set, and why the rest is not.

Checks run in this order, and a row carries the first reason that applies:

1. `null_field`: a null or empty id, split, label or feature (or a null inside the feature).
2. `wrong_width`: the feature has not the data set's width.
3. `not_finite`: NaN or Inf, after the cast to the data set's dtype.
4. `unknown_label`: not in the taxonomy, its aliases considered.
5. `duplicate_id`: an id that an earlier row of the same split has; the earlier row stays.
6. `id_in_two_splits`, 7. `vector_in_two_splits`: the row stays in the split that is held out most (test, then
   validation, then any other, then train) and is rejected from the others, so that test stays whole.

Reasons 5 to 7 compare only rows that passed what comes before. Two rows of one split may hold the same vector.

N rows of a batch, D feature width, R rows of the data set.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orchestration.assets.inputs import FeatureDtype, RowBatch
from orchestration.data.manifest import held_out_rank
from tinyemo.taxonomies import Taxonomy

VECTOR_HASH_BYTES = 16
"""Vectors are compared and digested by their blake2b of this length."""


class Reason(StrEnum):
    """Why a row is rejected."""

    NULL_FIELD = "null_field"
    WRONG_WIDTH = "wrong_width"
    NOT_FINITE = "not_finite"
    UNKNOWN_LABEL = "unknown_label"
    DUPLICATE_ID = "duplicate_id"
    ID_IN_TWO_SPLITS = "id_in_two_splits"
    VECTOR_IN_TWO_SPLITS = "vector_in_two_splits"


@dataclass(frozen=True)
class Rejection:
    """One row that is not kept; `row` is its position in its file."""

    split: str | None
    id: str | None
    label: str | None
    row: int
    reason: StrEnum
    detail: str


@dataclass(frozen=True)
class Kept:
    """The kept rows (K of them) in the order in which they were read."""

    splits: pa.Array
    """(K,) string."""
    ids: pa.Array
    """(K,) string."""
    labels: pa.Array
    """(K,) string, canonical."""
    vector_hashes: pa.Array
    """(K,) fixed-size binary."""
    positions: npt.NDArray[np.int64]
    """(K,) which of the features that `check` returned, counted over all batches, is the row's."""


def hash_vectors(features: npt.NDArray[np.floating]) -> pa.Array:
    """(N,) binary: blake2b of each row of (N, D), with -0 taken for 0."""
    positive = np.ascontiguousarray(features + features.dtype.type(0))
    hashes = [hashlib.blake2b(row.data, digest_size=VECTOR_HASH_BYTES).digest() for row in positive]
    return pa.array(hashes, pa.binary(VECTOR_HASH_BYTES))


class RowValidator:
    """Takes batches through `check`, then says in `finish` which rows stay.

    Features are never held: ids, labels and hashes are, about 250 bytes a row (measured with 10,000 to 80,000 rows).
    """

    def __init__(self, *, feature_width: int, feature_dtype: FeatureDtype, taxonomy: Taxonomy) -> None:
        self.feature_width = feature_width
        self.dtype = np.dtype(feature_dtype)
        self.taxonomy = taxonomy
        self._canonical: dict[str, str | None] = {}
        self._passed: list[pa.RecordBatch] = []
        self.num_rows = 0
        self.rejections: list[Rejection] = []

    def check(self, batch: RowBatch) -> npt.NDArray[np.floating]:
        """(M, D): the features of the M <= N rows of the batch that pass the checks a row can fail alone."""
        self.num_rows += len(batch.ids)
        reasons: dict[int, tuple[Reason, str]] = {}
        for name, column in (("split", batch.splits), ("id", batch.ids), ("label", batch.labels)):
            is_empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True)
            _note(reasons, np.flatnonzero(is_empty), Reason.NULL_FIELD, f"{name} is null or empty")
        _note(reasons, np.flatnonzero(batch.features.is_null()), Reason.NULL_FIELD, "features is null")
        features, rows = self._check_features(batch.features, reasons)

        canonical = self._check_labels(batch.labels, reasons)
        is_good = np.array([row not in reasons for row in rows.tolist()], dtype=bool)
        good: npt.NDArray[np.floating] = features[is_good]
        rows = rows[is_good]
        taken = pa.array(rows)
        self._passed.append(
            pa.record_batch(
                {
                    "split": batch.splits.take(taken),
                    "id": batch.ids.take(taken),
                    "original": batch.labels.take(taken),
                    "label": canonical.take(taken),
                    "vector_hash": hash_vectors(good),
                    "row": pa.array(rows + batch.start, pa.int64()),
                }
            )
        )
        for row, (reason, detail) in sorted(reasons.items()):
            split, sample_id, label = (column[row].as_py() for column in (batch.splits, batch.ids, batch.labels))
            self.rejections.append(Rejection(split, sample_id, label, batch.start + row, reason, detail))
        return good

    def _check_features(
        self, column: pa.Array, reasons: dict[int, tuple[Reason, str]]
    ) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.int64]]:
        """(M, D) features of the right width and the rows (M,) that hold them; notes the reasons of all others."""
        lengths = pc.fill_null(pc.list_value_length(column), self.feature_width).to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(lengths != self.feature_width).tolist():
            detail = f"features has {lengths[row]} numbers instead of {self.feature_width}"
            _note(reasons, [row], Reason.WRONG_WIDTH, detail)
        is_right = (lengths == self.feature_width) & ~column.is_null().to_numpy(zero_copy_only=False)
        rows = np.flatnonzero(is_right)
        values = column.take(pa.array(rows)).flatten()
        has_null = values.is_null().to_numpy(zero_copy_only=False).reshape(-1, self.feature_width).any(axis=1)
        _note(reasons, rows[has_null], Reason.NULL_FIELD, "features holds a null")
        with np.errstate(over="ignore", invalid="ignore"):
            features = values.to_numpy(zero_copy_only=False).reshape(-1, self.feature_width).astype(self.dtype)
        num_bad = (~np.isfinite(features)).sum(axis=1)
        for row, count in zip(rows[num_bad > 0].tolist(), num_bad[num_bad > 0], strict=True):
            _note(reasons, [row], Reason.NOT_FINITE, f"features holds {count} NaN or Inf as {self.dtype.name}")
        return features, rows

    def _check_labels(self, column: pa.Array, reasons: dict[int, tuple[Reason, str]]) -> pa.Array:
        """(N,) canonical labels, null where the label is unknown."""
        words = column.to_pylist()
        for word in set(words) - self._canonical.keys() - {None}:
            self._canonical[word] = self.taxonomy.label(word)
        canonical = [self._canonical[word] if word is not None else None for word in words]
        for row, (word, label) in enumerate(zip(words, canonical, strict=True)):
            if label is None:
                _note(reasons, [row], Reason.UNKNOWN_LABEL, f"{word!r} is not a label of {self.taxonomy.name}")
        return pa.array(canonical, pa.string())

    def finish(self) -> Kept:
        """The rows that also pass the checks over the whole data set; the others join `rejections`."""
        table = pa.Table.from_batches(self._passed).combine_chunks() if self._passed else None
        if table is None or table.num_rows == 0:
            return Kept(
                pa.array([], pa.string()),
                pa.array([], pa.string()),
                pa.array([], pa.string()),
                pa.array([], pa.binary(VECTOR_HASH_BYTES)),
                np.empty(0, np.int64),
            )
        names = sorted(table["split"].unique().to_pylist(), key=held_out_rank)
        ranks = pc.index_in(table["split"], pa.array(names)).to_numpy().astype(np.int64)
        is_kept = np.ones(table.num_rows, dtype=bool)

        id_codes, vector_codes = _codes(table["id"]), _codes(table["vector_hash"])
        self._reject_duplicates(table, id_codes * len(names) + ranks, is_kept)
        self._reject_leaks(table, id_codes, ranks, is_kept, Reason.ID_IN_TWO_SPLITS)
        self._reject_leaks(table, vector_codes, ranks, is_kept, Reason.VECTOR_IN_TWO_SPLITS)

        positions = np.flatnonzero(is_kept)
        kept = table.take(pa.array(positions)).combine_chunks()
        splits, ids, labels, hashes = (
            pa.concat_arrays(kept[name].chunks) if kept.num_rows else pa.array([], kept[name].type)
            for name in ("split", "id", "label", "vector_hash")
        )
        return Kept(splits, ids, labels, hashes, positions)

    def _reject_duplicates(self, table: pa.Table, keys: npt.NDArray[np.int64], is_kept: npt.NDArray[np.bool_]) -> None:
        """Keep the first row of each key (id and split)."""
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        holders = first[inverse]
        for row in np.flatnonzero(holders != np.arange(len(keys))):
            detail = f"row {table['row'][int(holders[row])].as_py()} of the same split has this id"
            self._reject(table, int(row), is_kept, Reason.DUPLICATE_ID, detail)

    def _reject_leaks(
        self,
        table: pa.Table,
        codes: npt.NDArray[np.int64],
        ranks: npt.NDArray[np.int64],
        is_kept: npt.NDArray[np.bool_],
        reason: Reason,
    ) -> None:
        """Of the kept rows with the same code, keep those in the split that is held out most."""
        rows = np.flatnonzero(is_kept)
        order = rows[np.lexsort((rows, ranks[rows], codes[rows]))]
        if not len(order):
            return
        is_start = np.r_[True, codes[order][1:] != codes[order][:-1]]
        holders = order[is_start][np.cumsum(is_start) - 1]
        is_leak = ranks[order] > ranks[holders]
        for row, holder in zip(order[is_leak], holders[is_leak], strict=True):
            split, sample_id = (table[name][int(holder)].as_py() for name in ("split", "id"))
            self._reject(table, int(row), is_kept, reason, f"{split} holds it as {sample_id!r}")

    def _reject(self, table: pa.Table, row: int, is_kept: npt.NDArray[np.bool_], reason: Reason, detail: str) -> None:
        is_kept[row] = False
        split, sample_id, label, number = (table[name][row].as_py() for name in ("split", "id", "original", "row"))
        self.rejections.append(Rejection(split, sample_id, label, number, reason, detail))


def _codes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """(R,) equal numbers for equal values."""
    combined = pa.concat_arrays(column.chunks)
    codes: npt.NDArray[np.int64] = combined.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return codes


def _note(
    reasons: dict[int, tuple[Reason, str]], rows: npt.NDArray[np.int64] | list[int], reason: Reason, detail: str
) -> None:
    """Give each of the rows this reason unless it has one already."""
    for row in rows:
        reasons.setdefault(int(row), (reason, detail))
