"""Rows in = kept + rejected, and each rejected row has its reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from feature_files import WIDTH, rows, vectors, write_splits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingested_features import ingest, read_split, rejected

pytestmark = pytest.mark.usefixtures("tasks_in_process")

NAN, INF = float("nan"), float("inf")


def test_each_bad_row_is_rejected_with_its_reason(s3_root: str, tmp_path: Path) -> None:
    good = vectors(30)
    bad: list[tuple[str | None, object, str | None, str, str]] = [
        (None, good[0], "joy", "null_field", "id is null or empty"),
        (" ", good[1], "joy", "null_field", "id is null or empty"),
        ("no-label", good[2], None, "null_field", "label is null or empty"),
        ("no-features", None, "joy", "null_field", "features is null"),
        ("hole", [None, *good[3][1:].tolist()], "joy", "null_field", "features holds a null"),
        ("short", good[4][1:], "joy", "wrong_width", "7 numbers instead of 8"),
        ("empty", [], "joy", "wrong_width", "0 numbers instead of 8"),
        ("nan", [NAN, *good[5][1:].tolist()], "joy", "not_finite", "1 NaN or Inf"),
        ("inf", [INF, -INF, *good[6][2:].tolist()], "joy", "not_finite", "2 NaN or Inf"),
        ("word", good[7], "hangry", "unknown_label", "'hangry' is not a label of ekman"),
        ("other-taxonomy", good[8], "awe", "unknown_label", "'awe' is not a label of ekman"),
        ("ok-1", good[9], "joy", "duplicate_id", "row 2 of the same split"),
    ]
    ids = ["ok-0", "ok-1", *(row[0] for row in bad)]
    table = rows(ids, [good[20], good[21], *(row[1] for row in bad)], ["joy", " Fear ", *(row[2] for row in bad)])
    manifest = ingest(write_splits(tmp_path, train=table), s3_root).manifest
    assert {row["id"]: row["label"] for row in read_split(manifest, "train").to_pylist()} == {
        "ok-0": "joy",
        "ok-1": "fear",
    }
    assert (manifest.rows_in, manifest.rows_kept, manifest.rejected.rows) == (14, 2, 12)
    assert manifest.rejected.reasons == Counter(row[3] for row in bad)
    found = {row["number"]: row for row in rejected(manifest)}
    for number, (sample_id, _, label, reason, detail) in enumerate(bad, start=3):
        line = found[number]
        assert (line["split"], line["id"], line["label"], line["reason"]) == ("train", sample_id, label, reason)
        assert detail in line["detail"]


def test_aliases_of_labels_are_accepted(s3_root: str, tmp_path: Path) -> None:
    words = ["cheerfullness", "irritabilty", "Cheerfulness", "zest"]
    table = rows(["a", "b", "c", "d"], vectors(4), words)
    manifest = ingest(write_splits(tmp_path, train=table), s3_root, taxonomy="parrott").manifest
    assert manifest.splits["train"].labels == {"cheerfulness": 2, "irritability": 1, "zest": 1}


def test_a_row_in_two_splits_stays_in_the_one_that_is_held_out_most(s3_root: str, tmp_path: Path) -> None:
    shared, own = vectors(3, seed=1), vectors(9, seed=2)
    train = rows(["t0", "same-id", "same-id-2", "t3", "t4"], [own[0], own[1], own[2], shared[0], shared[1]])
    val = rows(["v0", "same-id", "v2", "v3"], [own[3], own[4], shared[1], shared[2]])
    test = rows(["s0", "same-id", "same-id-2", "s3", "s4"], [own[5], own[6], own[7], shared[0], shared[2]])
    manifest = ingest(write_splits(tmp_path, train=train, val=val, test=test), s3_root).manifest
    assert {split: counts.rows for split, counts in manifest.splits.items()} == {"train": 1, "val": 2, "test": 5}
    assert {(row["split"], row["id"], row["reason"], row["detail"]) for row in rejected(manifest)} == {
        ("train", "same-id", "id_in_two_splits", "test holds it as 'same-id'"),
        ("train", "same-id-2", "id_in_two_splits", "test holds it as 'same-id-2'"),
        ("val", "same-id", "id_in_two_splits", "test holds it as 'same-id'"),
        ("train", "t3", "vector_in_two_splits", "test holds it as 's3'"),
        ("train", "t4", "vector_in_two_splits", "val holds it as 'v2'"),
        ("val", "v3", "vector_in_two_splits", "test holds it as 's4'"),
    }


def test_identical_vectors_of_one_split_stay_and_a_rejected_row_leaks_nothing(s3_root: str, tmp_path: Path) -> None:
    twin = vectors(1)[0]
    train = rows(["a", "b", "c"], [twin, twin, vectors(1, seed=3)[0]])
    test = rows(["d", "e"], [twin, vectors(1, seed=4)[0]], ["hangry", "joy"])
    manifest = ingest(write_splits(tmp_path, train=train, test=test), s3_root).manifest
    assert manifest.splits["train"].rows == 3
    assert manifest.rejected.reasons == {"unknown_label": 1}


def test_minus_zero_is_zero(s3_root: str, tmp_path: Path) -> None:
    zero = vectors(1)[0]
    zero[2] = 0.0
    minus = zero.copy()
    minus[2] = -0.0
    train, test = rows(["a", "b"], [zero, vectors(1, seed=5)[0]]), rows(["c"], [minus])
    manifest = ingest(write_splits(tmp_path, train=train, test=test), s3_root).manifest
    assert manifest.rejected.reasons == {"vector_in_two_splits": 1}


def test_rows_without_a_split_are_rejected(s3_root: str, tmp_path: Path) -> None:
    table = rows(["a", "b", "c"], vectors(3), split=["train", None, "test"])
    pq.write_table(table, tmp_path / "all.parquet")
    manifest = ingest(tmp_path / "all.parquet", s3_root).manifest
    assert {split: counts.rows for split, counts in manifest.splits.items()} == {"train": 1, "test": 1}
    assert [(row["split"], row["id"], row["reason"]) for row in rejected(manifest)] == [(None, "b", "null_field")]


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_row_is_ever_lost(data: st.DataObject, s3_root: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Rows in = kept + rejected; nothing kept is in two splits; test keeps all that is good in itself."""
    pool = vectors(6)
    line = st.tuples(
        st.sampled_from(["a", "b", "c", "d", None]), st.integers(0, 6), st.sampled_from(["joy", "fear", "hangry", None])
    )
    splits = {name: data.draw(st.lists(line, min_size=1, max_size=12)) for name in ("train", "test")}
    splits["train"].append(("sure", 5, "joy"))
    pool[5] += 1
    tables = {
        name: rows(
            [i for i, _, _ in lines],
            [pool[v] if v < 6 else [NAN] * WIDTH for _, v, _ in lines],
            [w for _, _, w in lines],
        )
        for name, lines in splits.items()
    }
    manifest = ingest(write_splits(tmp_path_factory.mktemp("r"), **tables), s3_root).manifest
    assert manifest.rows_in == sum(map(len, splits.values())) == manifest.rows_kept + manifest.rejected.rows
    assert manifest.rejected.rows == sum(manifest.rejected.reasons.values()) == len(rejected(manifest))
    kept = {name: read_split(manifest, name).to_pylist() if name in manifest.splits else [] for name in splits}
    for key in ("id", "features"):
        train, test = ({str(row[key]) for row in kept[name]} for name in ("train", "test"))
        assert not train & test
    good_ids = {i for i, v, w in splits["test"] if i and v < 6 and w in ("joy", "fear")}
    assert {row["id"] for row in kept["test"]} == good_ids
    assert len(kept["test"]) == len(good_ids)
