"""Rows in = kept + rejected, the same rows are the same version, and a broken upload is as if it never was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from breaking_proxy import BreakingProxy
from feature_files import EKMAN, MIRROR, WIDTH, good_rows, rows, vectors, write_splits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestration import storage
from orchestration.datasets.ingest import IngestReport, ingest_features
from orchestration.datasets.manifest import FeatureManifest, load_manifest, read_index, verify_manifest
from tinyemo.errors import ConfigError, DataError, StorageError, TinyEmoError
from tinyemo.taxonomies import label_id

NAN, INF = float("nan"), float("inf")


def ingest(source: Path | str | None, root: str, **options: object) -> IngestReport:
    return ingest_features(source, **{"name": "small", "root": root, "rows_per_shard": 16, **options})  # type: ignore[arg-type]


def read_file(manifest: FeatureManifest, path: str) -> pa.Table:
    with storage.filesystem().open_input_file(manifest.file_uri(path).removeprefix("s3://")) as file:
        return pq.read_table(file)


def read_split(manifest: FeatureManifest, split: str) -> pa.Table:
    return pa.concat_tables([read_file(manifest, shard.path) for shard in manifest.shards if shard.split == split])


def rejected(manifest: FeatureManifest) -> list[dict[str, object]]:
    return read_file(manifest, manifest.rejected.path).to_pylist()


def assert_is_one_line(error: TinyEmoError, *parts: str) -> None:
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)


# What is stored


def test_every_row_comes_back_in_hash_order_with_its_label_id(s3_root: str, tmp_path: Path) -> None:
    given = {"train": good_rows("train", 40, 1), "test": good_rows("test", 10, 2)}
    manifest = ingest(write_splits(tmp_path, **given), s3_root).manifest
    for split, table in given.items():
        stored = read_split(manifest, split)
        assert sorted(stored["id"].to_pylist()) == sorted(table["id"].to_pylist())
        by_id = {row["id"]: row for row in table.to_pylist()}
        for row in stored.to_pylist():
            assert row["label"] == by_id[row["id"]]["emotion"]
            assert row["label_id"] == label_id(row["label"])
            assert row["features"] == by_id[row["id"]]["features"]
        assert manifest.splits[split].labels == Counter(table["emotion"].to_pylist())
    assert stored.schema.field("features").type == pa.list_(pa.float16(), WIDTH)
    assert read_index(manifest)["id_hash"].to_pylist()[:40] == sorted(read_index(manifest)["id_hash"].to_pylist()[:40])
    assert (manifest.rows_in, manifest.rows_kept, manifest.rejected.rows) == (50, 50, 0)
    assert (manifest.feature_width, manifest.feature_dtype, manifest.data) == (WIDTH, "float16", "real")


@pytest.mark.skipif(not (MIRROR / "emotion6").is_dir(), reason=f"no real features at {MIRROR}")
def test_emotion6_goes_in_whole(s3_root: str) -> None:
    report = ingest(MIRROR / "emotion6", s3_root, name="emotion6", rows_per_shard=512)
    manifest = report.manifest
    assert {split: counts.rows for split, counts in manifest.splits.items()} == {"train": 1386, "test": 306}
    assert manifest.splits["test"].labels == dict(zip(EKMAN, (56, 49, 47, 50, 51, 53), strict=True))
    assert manifest.rejected.rows == 0
    assert manifest.digest == "f2758380ff44cdf5f455609d83bbc734abdd3391a69971d094e4016097f30803"
    assert verify_manifest(manifest) == report.uploaded_bytes


@pytest.mark.parametrize(
    ("feature_type", "dtype"),
    [
        (pa.list_(pa.float32(), WIDTH), "float32"),
        (pa.list_(pa.float64()), "float32"),
        (pa.large_list(pa.float16()), "float16"),
    ],
)
def test_features_may_be_any_list_of_floats(
    feature_type: pa.DataType, dtype: str, s3_root: str, tmp_path: Path
) -> None:
    values = vectors(12).astype(np.float64)
    table = rows([str(i) for i in range(12)], values, feature_type=feature_type)
    manifest = ingest(write_splits(tmp_path, train=table), s3_root).manifest
    assert manifest.feature_dtype == dtype
    stored = {row["id"]: row["features"] for row in read_split(manifest, "train").to_pylist()}
    assert all(stored[str(i)] == values[i].tolist() for i in range(12))


def test_a_half_and_a_single_split_meet_in_single_precision(s3_root: str, tmp_path: Path) -> None:
    leaked = vectors(1, seed=9)
    train = rows(["a", "b"], np.concatenate([vectors(1), leaked]))
    test = rows(["c"], leaked.astype(np.float32), feature_type=pa.list_(pa.float32()))
    manifest = ingest(write_splits(tmp_path, train=train, test=test), s3_root).manifest
    assert manifest.feature_dtype == "float32"
    assert manifest.rejected.reasons == {"vector_in_two_splits": 1}


# The same rows


def test_the_same_input_twice_uploads_nothing(s3_root: str, tmp_path: Path) -> None:
    source = write_splits(tmp_path, train=good_rows("train", 40, 1), test=good_rows("test", 10, 2))
    first = ingest(source, s3_root)
    before = storage_times(first.manifest)
    second = ingest(source, s3_root)
    assert not first.is_unchanged
    assert first.num_uploaded == 6
    assert (second.is_unchanged, second.num_uploaded, second.uploaded_bytes) == (True, 0, 0)
    assert second.manifest == first.manifest == load_manifest(f"{s3_root}/small", FeatureManifest)
    assert storage_times(first.manifest) == before


def storage_times(manifest: FeatureManifest) -> dict[str, object]:
    """When each object of the data set was written last."""
    bucket, key = storage.parse_s3_uri(manifest.uri.rsplit("/", 1)[0])
    answer = storage.client().list_objects_v2(Bucket=bucket, Prefix=f"{key}/")
    return {item["Key"]: (item["LastModified"], item["ETag"]) for item in answer["Contents"]}


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(20)), is_one_file=st.booleans(), is_chunked=st.booleans())
def test_order_files_and_row_groups_are_not_part_of_the_digest(
    order: list[int], is_one_file: bool, is_chunked: bool, s3_root: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    train, test = good_rows("train", 20, 1), good_rows("test", 5, 2)
    expected = ingest(write_splits(tmp_path_factory.mktemp("a"), train=train, test=test), s3_root).manifest.digest
    folder = tmp_path_factory.mktemp("b")
    train = train.take(order)
    if is_one_file:
        parts = [
            part.append_column("split", pa.array([name] * part.num_rows))
            for name, part in (("test", test), ("train", train))
        ]
        source = folder / "all.parquet"
        pq.write_table(pa.concat_tables(parts), source, row_group_size=3 if is_chunked else 100)
    else:
        source = write_splits(folder, train=train, test=test)
    assert ingest(source, s3_root).manifest.digest == expected


def test_any_change_is_another_version_and_the_former_one_stays(s3_root: str, tmp_path: Path) -> None:
    table = good_rows("train", 20, 1)
    first = ingest(write_splits(tmp_path / "a", train=table), s3_root).manifest
    changed = vectors(20, 1)
    changed[7, 3] += 1
    others = {
        "value": rows([f"train/{i}" for i in range(20)], changed),
        "label": rows([f"train/{i}" for i in range(20)], vectors(20, 1), ["joy"] * 20),
        "id": rows([f"train/x{i}" for i in range(20)], vectors(20, 1)),
        "fewer": table.slice(0, 19),
    }
    versions = [ingest(write_splits(tmp_path / name, train=other), s3_root).manifest for name, other in others.items()]
    digests = {first.digest, *(version.digest for version in versions)}
    digests.add(ingest(tmp_path / "a", s3_root, rows_per_shard=7).manifest.digest)
    assert len(digests) == 6
    assert verify_manifest(load_manifest(first.uri, FeatureManifest)) > 0
    again = ingest(tmp_path / "a", s3_root)
    assert again.is_unchanged
    assert load_manifest(f"{s3_root}/small", FeatureManifest) == first  # latest goes back to it


def test_a_version_that_lost_a_file_is_stored_again(s3_root: str, tmp_path: Path) -> None:
    source = write_splits(tmp_path, train=good_rows("train", 40, 1))
    first = ingest(source, s3_root).manifest
    storage.delete(first.shard_uris("train")[1])
    assert not ingest(source, s3_root).is_unchanged
    assert verify_manifest(load_manifest(f"{s3_root}/small", FeatureManifest)) > 0


def test_force_repairs_what_a_listing_cannot_see(s3_root: str, tmp_path: Path) -> None:
    source = write_splits(tmp_path, train=good_rows("train", 40, 1))
    uri = ingest(source, s3_root).manifest.shard_uris("train")[0]
    storage.write_bytes(uri, bytes(len(storage.read_bytes(uri))))
    assert ingest(source, s3_root).is_unchanged
    assert not ingest(source, s3_root, is_forced=True).is_unchanged
    assert verify_manifest(load_manifest(f"{s3_root}/small", FeatureManifest)) > 0


# What is rejected


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
        ("ok-1", good[9], "joy", "duplicate_id", "row 1 of the same split"),
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
    found = {row["row"]: row for row in rejected(manifest)}
    for number, (sample_id, _, label, reason, detail) in enumerate(bad, start=2):
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


# What stops an ingest


def test_a_truncated_file_is_named(s3_root: str, tmp_path: Path) -> None:
    write_splits(tmp_path, train=good_rows("train", 40, 1), test=good_rows("test", 10, 2))
    path = tmp_path / "test.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError) as caught:
        ingest(tmp_path, s3_root)
    assert_is_one_line(caught.value, str(path), "not a readable Parquet file")
    assert storage.list_prefix(s3_root) == {}


def test_a_file_that_is_corrupt_in_the_middle_is_named(s3_root: str, tmp_path: Path) -> None:
    table = good_rows("train", 4000, 1)
    pq.write_table(table, tmp_path / "train.parquet", compression="zstd", row_group_size=1000)
    path = tmp_path / "train.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        ingest(tmp_path, s3_root)
    assert_is_one_line(caught.value, str(path), "corrupt after row")
    assert storage.list_prefix(s3_root) == {}


def test_bad_sources_say_what_is_wrong(s3_root: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    single = tmp_path / "single.parquet"
    pq.write_table(good_rows("x", 3, 1), single)
    no_id = write_splits(tmp_path / "no-id", train=good_rows("x", 3, 1).drop_columns(["id"]))
    words = write_splits(
        tmp_path / "words", train=pa.table({"id": ["a"], "emotion": ["joy"], "features": [["not a number"]]})
    )
    no_rows = write_splits(tmp_path / "no-rows", train=good_rows("x", 0, 1))
    hangry = write_splits(tmp_path / "hangry", train=rows(["a", "b"], vectors(2), ["hangry", "hangry"]))
    cases: list[tuple[Path | str, dict[str, object], str]] = [
        (tmp_path / "empty", {}, "holds no <split>.parquet"),
        (tmp_path / "nothing", {}, "neither a file, a folder nor an asset"),
        (single, {}, "lacks the column(s) split"),
        (no_id, {}, "lacks the column(s) id"),
        (no_id, {"split": "train"}, "is a folder of <split>.parquet files"),
        (words, {}, "must be a list of float16"),
        (single, {"split": "../up"}, "split is '../up'"),
        (no_rows, {}, "has no rows"),
        (hangry, {}, "none of 2 rows can be kept: 2 unknown_label"),
    ]
    for source, options, message in cases:
        with pytest.raises(DataError) as caught:
            ingest(source, s3_root, **options)
        assert_is_one_line(caught.value, message)
        assert storage.list_prefix(s3_root) == {}
    assert ingest(single, s3_root, split="train").manifest.rows_kept == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../up"}, "name is '../up'"),
        ({"taxonomy": "plutchik"}, "taxonomy is 'plutchik'"),
        ({"rows_per_shard": 0}, "rows_per_shard is 0"),
        ({"is_generated": True}, "either a source or --generated"),
    ],
)
def test_bad_options_name_the_option(options: dict[str, object], message: str, s3_root: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        ingest(tmp_path, s3_root, **options)


def test_storage_problems_come_before_the_long_part(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "never-read"
    with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
        ingest(source, "s3://no-such-bucket/datasets")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(StorageError, match="refuses the credentials"):
            ingest(source, s3_root)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match="does not answer"):
        ingest(source, s3_root)


# What a broken upload leaves


@pytest.fixture
def large_source(tmp_path: Path) -> Path:
    """1,200 rows of 1.5 kB: 1.8 MB in 75 shards."""
    ids = [f"train/{number}" for number in range(1200)]
    return write_splits(
        tmp_path / "large", train=rows(ids, vectors(1200, width=768), feature_type=pa.list_(pa.float16(), 768))
    )


def assert_only_the_former_version_is_there(s3_root: str, former: FeatureManifest) -> None:
    """The latest is the former, whole; of the broken one there are shards and no manifest."""
    assert load_manifest(f"{s3_root}/small", FeatureManifest) == former
    assert verify_manifest(former) > 0
    stored = storage.list_prefix(f"{s3_root}/small")
    assert [uri for uri in stored if uri.endswith("manifest.json")] == [f"{former.uri}/manifest.json"]
    orphans = [uri for uri in stored if not uri.startswith(former.uri) and uri.endswith(".parquet")]
    assert 0 < len(orphans) < 75


def test_a_killed_ingest_leaves_the_former_version(
    large_source: Path, s3_root: str, s3_environment: dict[str, str], tmp_path: Path
) -> None:
    former = ingest(write_splits(tmp_path / "former", train=good_rows("train", 40, 1)), s3_root).manifest
    code = (
        "import sys; from orchestration.datasets.ingest import ingest_features as f; "
        "f(sys.argv[1], name='small', root=sys.argv[2], rows_per_shard=16)"
    )
    with BreakingProxy(s3_environment["AWS_ENDPOINT_URL"], limit_bytes=600_000, way="silence") as proxy:
        environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint, "PYTHONPATH": str(Path(__file__).parents[3])}
        process = subprocess.Popen([sys.executable, "-c", code, str(large_source), s3_root], env=environment)
        try:
            assert proxy.is_broken.wait(60), "the upload never came so far"
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(30)
    assert_only_the_former_version_is_there(s3_root, former)
    whole = ingest(large_source, s3_root)
    assert not whole.is_unchanged
    assert verify_manifest(load_manifest(f"{s3_root}/small", FeatureManifest)) == whole.uploaded_bytes


def test_a_lost_connection_is_one_line_and_leaves_the_former_version(
    large_source: Path,
    s3_root: str,
    s3_environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    former = ingest(write_splits(tmp_path / "former", train=good_rows("train", 40, 1)), s3_root).manifest
    with BreakingProxy(s3_environment["AWS_ENDPOINT_URL"], limit_bytes=600_000, way="hang up") as proxy:
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            with pytest.raises(StorageError) as caught:
                ingest(large_source, s3_root)
        assert proxy.is_broken.is_set()
    assert_is_one_line(caught.value, "does not answer", "tinyemo platform up")
    assert_only_the_former_version_is_there(s3_root, former)


# Memory, generated rows, assets, command line


def ingest_peak_bytes(folder: Path, s3_root: str, count: int) -> int:
    """Peak of Python's, numpy's and Arrow's allocations while `count` rows in one row group go in."""
    values = pa.array(np.random.default_rng(0).standard_normal(count * 768).astype(np.float16))
    columns = {
        "id": pa.array([f"train/{number}" for number in range(count)]),
        "emotion": pa.array(["joy"] * count),
        "features": pa.FixedSizeListArray.from_arrays(values, 768),
    }
    pq.write_table(pa.table(columns), folder / "train.parquet", row_group_size=count)
    code = (
        "import sys, tracemalloc, pyarrow; from orchestration.datasets.ingest import ingest_features as f; "
        "tracemalloc.start(); "
        "f(sys.argv[1], name='small', root=sys.argv[2], rows_per_shard=128); "
        "print(tracemalloc.get_traced_memory()[1] + pyarrow.default_memory_pool().max_memory())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", code, str(folder), s3_root]
    return int(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout)


def test_memory_does_not_grow_with_the_features(s3_root: str, tmp_path: Path) -> None:
    """Ids and hashes may be kept, features may not: 12.3 MB more of them cost less than a third of that."""
    small, large = (ingest_peak_bytes(tmp_path, s3_root, count) for count in (4_000, 12_000))
    assert large - small < 8_000 * 768 * 2 / 3


def test_generated_rows_say_so_and_are_the_same_everywhere(s3_root: str) -> None:
    first = ingest(None, s3_root, is_generated=True, feature_width=32)
    again = ingest(None, s3_root, is_generated=True, feature_width=32)
    other = ingest(None, s3_root, is_generated=True, feature_width=32, seed=1)
    assert first.manifest.data == "generated"
    assert again.is_unchanged
    assert other.manifest.digest != first.manifest.digest
    assert set(first.manifest.splits["train"].labels) == set(EKMAN)
    assert first.manifest.rejected.rows == 0


@pytest.mark.skipif(not (MIRROR / "emotion6").is_dir(), reason=f"no real features at {MIRROR}")
def test_an_asset_is_a_source_and_the_manifest_says_which_one_answered(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYEMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TINYEMO_MIRROR", str(MIRROR))
    monkeypatch.chdir(tmp_path)
    source = ingest("emotion6", s3_root).manifest.source
    assert (source["kind"], source["name"], source["source"]) == ("asset", "emotion6", "local mirror")
    assert source["rows"]["test"] == 306
    assert source["public_rows"]["test"] == 594


def run_cli(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    code = "from orchestration.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), **variables}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_the_command_prints_the_balance_and_json(s3_root: str, tmp_path: Path) -> None:
    source = write_splits(tmp_path, train=rows(["a", "b", "c"], vectors(3), ["joy", "fear", "hangry"]))
    arguments = ("ingest", "features", str(source), "--name", "small", "--root", s3_root)
    state = {"TINYEMO_STATE": str(tmp_path / "state")}
    first = run_cli(*arguments, **state)
    assert first.returncode == 0, first.stderr
    assert "rows in 3 = kept 2 + rejected 1" in first.stdout
    assert "unknown_label: 1" in first.stdout
    second = run_cli(*arguments, "--json", **state)
    document = json.loads(second.stdout)
    assert document["unchanged"] is True
    assert (document["rows_in"], document["rows_kept"], document["rows_rejected"]) == (3, 2, 1)


def test_the_command_fails_in_one_line_with_status_2(s3_root: str, tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    arguments = ("ingest", "features", str(tmp_path), "--root", s3_root)
    failed = run_cli(*arguments, TINYEMO_STATE=str(tmp_path / "state"))
    assert failed.returncode == 2
    assert len(failed.stderr.strip().splitlines()) == 1
    assert "train.parquet" in failed.stderr
    assert failed.stdout == ""
