"""Groups find their rows by id, by file name, and by the name without its ending."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestration.evaluate.group_file import clusters_of, join_groups, read_groups
from tinyemo.errors import ConfigError, DataError


def column(*ids: str) -> pa.ChunkedArray:
    return pa.chunked_array([list(ids)])


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_a_table_in_every_form(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"groups.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"image": ["a.jpg"], "theme": ["dogs"], "year": [1999]}), path)
    else:
        mark = "\t" if suffix == "tsv" else ","
        path.write_text(f"image{mark}theme{mark}year\na.jpg{mark}dogs{mark}1999\n")
    assert read_groups(str(path)).to_pylist() == [{"image": "a.jpg", "theme": "dogs", "year": "1999"}]


def test_rows_are_found_by_id_file_name_and_stem() -> None:
    groups = pa.table({"image": ["cat_1.jpg", "dog.png", "owl.jpg", "elk.jpg"], "theme": ["cat", "dog", "owl", "elk"]})
    ids = column("cat_1.jpg", "train/dog.png", "oasis/owl/caption", "ab" * 32, "nobody", "cat_1.jpg")
    joined = join_groups(ids, {"ab" * 32: ["photos/elk.jpg"]}, groups)
    assert joined.to_pydict() == {"theme": ["cat", "dog", "owl", "elk", None, "cat"]}


def test_an_id_goes_before_names_alike() -> None:
    groups = pa.table({"id": ["a/1.jpg", "b/1.jpg"], "theme": ["a", "b"]})
    assert join_groups(column("b/1.jpg", "a/1.jpg"), {}, groups)["theme"].to_pylist() == ["b", "a"]


def test_a_row_without_a_group_is_a_cluster_of_its_own() -> None:
    clusters = clusters_of(pa.table({"theme": ["a", None, "a", None]}), "theme", "groups.csv")
    assert len(set(clusters)) == 3
    assert clusters[0] == clusters[2] == "a"


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "groups.csv"
    path.write_text("name,theme\nx,y\n")
    with pytest.raises(DataError, match="needs a column id or image, it has name, theme"):
        read_groups(str(path))
    with pytest.raises(DataError, match="cannot be read"):
        read_groups(str(tmp_path / "none.csv"))
    with pytest.raises(ConfigError, match="no column 'author', it has theme"):
        clusters_of(pa.table({"theme": ["a"]}), "author", "groups.csv")
    with pytest.raises(DataError, match="names none of the rows"):
        clusters_of(pa.table({"theme": pa.array([None], pa.string())}), "theme", "groups.csv")
