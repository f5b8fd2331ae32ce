"""Feature files for tests: where the real ones are, and small ones with anything in them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

WIDTH = 8
EKMAN = ("anger", "disgust", "fear", "joy", "sadness", "surprise")
MIRROR = Path(os.environ.get("TINYEMO_MIRROR") or Path(__file__).parents[3] / "shared" / "data")


def vectors(count: int, seed: int = 0, width: int = WIDTH) -> npt.NDArray[np.float16]:
    """(count, width) float16, no two rows alike."""
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float16)


def rows(
    ids: Sequence[str | None],
    features: Sequence[Sequence[float | None] | None] | npt.NDArray[np.floating],
    labels: Sequence[str | None] | None = None,
    *,
    feature_type: pa.DataType | None = None,
    **columns: Sequence[str | None],
) -> pa.Table:
    """A table with id, emotion and features (variable lists of float16 unless said otherwise)."""
    lists = [None if row is None else list(row) for row in features]
    return pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "emotion": pa.array(labels or [EKMAN[i % 6] for i in range(len(ids))], pa.string()),
            "features": pa.array(lists, feature_type or pa.list_(pa.float16())),
            **{name: pa.array(values, pa.string()) for name, values in columns.items()},
        }
    )


def good_rows(split: str, count: int, seed: int) -> pa.Table:
    """Rows that nothing is wrong with."""
    return rows([f"{split}/{number}" for number in range(count)], vectors(count, seed))


def write_splits(folder: Path, **splits: pa.Table) -> Path:
    """<folder>/<split>.parquet for each."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, table in splits.items():
        pq.write_table(table, folder / f"{split}.parquet")
    return folder
