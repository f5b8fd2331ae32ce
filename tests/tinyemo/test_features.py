"""Feature files: what is read and what is refused, in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tinyemo.errors import DataError
from tinyemo.features import read_features

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


def fixed(kind: pa.DataType) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(ROWS.ravel().astype(kind.to_pandas_dtype())), 4)


def write(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table({"id": ["a", "b", "c"], **columns}), path)
    return path


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("is_fixed", [True, False])
@pytest.mark.parametrize("label_column", ["emotion", "label", None])
def test_lists_of_any_float_become_float32(tmp_path: Path, kind: pa.DataType, is_fixed: bool, label_column: str | None):
    features = fixed(kind) if is_fixed else fixed(kind).cast(pa.list_(kind))
    labels = {label_column: ["joy", "awe", "joy"]} if label_column else {}
    table = read_features(write(tmp_path / "f.parquet", features=features, **labels))
    assert table.ids == ["a", "b", "c"]
    assert table.labels == (["joy", "awe", "joy"] if label_column else None)
    assert table.features.dtype == torch.float32
    assert np.array_equal(table.features.numpy(), ROWS)


def test_many_row_groups_are_one_table(tmp_path: Path):
    pq.write_table(
        pa.table({"id": list("abc"), "features": fixed(pa.float16())}), tmp_path / "f.parquet", row_group_size=1
    )
    assert np.array_equal(read_features(tmp_path / "f.parquet").features.numpy(), ROWS)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": [1, 2, 3]}, "has no column 'features'"),
        ({"features": [1.0, 2.0, 3.0]}, "must hold lists of float16"),
        ({"features": [["a"], ["b"], ["c"]]}, "must hold lists of float16"),
        ({"features": [[1.0], [1.0, 2.0], [1.0]]}, "one width in every row, found 1, 2"),
        ({"features": [[1.0], None, [1.0]]}, "one width in every row, found 1, None"),
        ({"features": [[1.0], [float("nan")], [float("inf")]]}, "2 of 3 rows hold NaN or Inf, the first is row 1"),
        ({"features": [[1.0], [None], [2.0]]}, "1 of 3 rows hold NaN"),
        ({"features": [[1.0]] * 3, "emotion": [1, 2, 3]}, "label column must hold text"),
        ({"features": [[1.0]] * 3, "emotion": ["joy", None, "awe"]}, "label column must hold text"),
    ],
)
def test_wrong_columns_are_one_clear_line(tmp_path: Path, columns: dict[str, object], message: str):
    with pytest.raises(DataError, match=message) as caught:
        read_features(write(tmp_path / "f.parquet", **columns))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"x" * 100 + b"PAR1", "cut"])
def test_a_corrupt_file_is_one_clear_line(tmp_path: Path, content: bytes | str):
    path = write(tmp_path / "f.parquet", features=fixed(pa.float32()))
    path.write_bytes(path.read_bytes()[:-50] if isinstance(content, str) else content)
    with pytest.raises(DataError, match="cannot be read as Parquet") as caught:
        read_features(path)
    assert "\n" not in str(caught.value)


def test_damaged_pages_are_one_clear_line(tmp_path: Path):
    path = tmp_path / "f.parquet"
    big = pa.FixedSizeListArray.from_arrays(pa.array(np.random.default_rng(0).random(4000)), 4)
    pq.write_table(pa.table({"id": [str(i) for i in range(1000)], "features": big}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : len(content) // 2] = b"\0" * (len(content) // 2 - len(content) // 4)
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_features(path)


def test_no_file_and_no_rows(tmp_path: Path):
    for path in (tmp_path / "none.parquet", tmp_path):
        with pytest.raises(DataError, match="is not a file"):
            read_features(path)
    pq.write_table(
        pa.table({"id": pa.array([], pa.string()), "features": pa.array([], pa.list_(pa.float32()))}), tmp_path / "f"
    )
    with pytest.raises(DataError, match="holds no rows"):
        read_features(tmp_path / "f")
