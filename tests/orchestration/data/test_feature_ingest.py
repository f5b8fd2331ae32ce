"""What is stored: every row comes back, and the same rows are the same version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feature_files import EKMAN, MIRROR, WIDTH, good_rows, rows, vectors, write_splits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingested_features import ingest, read_split

from orchestration.data.manifest import Manifest, load_manifest, read_index, verify_manifest
from orchestration.services import storage

pytestmark = pytest.mark.usefixtures("cluster")

# What is stored


def test_every_row_comes_back_in_hash_order_with_its_label(s3_root: str, tmp_path: Path) -> None:
    given = {"train": good_rows("train", 40, 1), "test": good_rows("test", 10, 2)}
    manifest = ingest(write_splits(tmp_path, **given), s3_root).manifest
    for split, table in given.items():
        stored = read_split(manifest, split)
        assert sorted(stored["id"].to_pylist()) == sorted(table["id"].to_pylist())
        by_id = {row["id"]: row for row in table.to_pylist()}
        for row in stored.to_pylist():
            assert row["label"] == by_id[row["id"]]["emotion"]
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
    assert manifest.digest == "36a71989debb4f1ba167ca903db7c9da13f23b861ff1083cce7e0bcd861fa868"
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
    assert second.manifest == first.manifest == load_manifest(f"{s3_root}/small", "features")
    assert storage_times(first.manifest) == before


def storage_times(manifest: Manifest) -> dict[str, object]:
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
    assert verify_manifest(load_manifest(first.uri, "features")) > 0
    again = ingest(tmp_path / "a", s3_root)
    assert again.is_unchanged
    assert load_manifest(f"{s3_root}/small", "features") == first  # latest goes back to it


def test_a_version_that_lost_a_file_is_stored_again(s3_root: str, tmp_path: Path) -> None:
    source = write_splits(tmp_path, train=good_rows("train", 40, 1))
    first = ingest(source, s3_root).manifest
    storage.delete(first.shard_uris("train")[1])
    assert not ingest(source, s3_root).is_unchanged
    assert verify_manifest(load_manifest(f"{s3_root}/small", "features")) > 0


def test_force_repairs_what_a_listing_cannot_see(s3_root: str, tmp_path: Path) -> None:
    source = write_splits(tmp_path, train=good_rows("train", 40, 1))
    uri = ingest(source, s3_root).manifest.shard_uris("train")[0]
    storage.write_bytes(uri, bytes(len(storage.read_bytes(uri))))
    assert ingest(source, s3_root).is_unchanged
    assert not ingest(source, s3_root, is_forced=True).is_unchanged
    assert verify_manifest(load_manifest(f"{s3_root}/small", "features")) > 0


# Memory, generated rows, assets, command line


def ingest_peak_bytes(folder: Path, s3_root: str, count: int, address: str) -> int:
    """Peak of Python's, numpy's and Arrow's allocations while `count` rows in one row group go in."""
    values = pa.array(np.random.default_rng(0).standard_normal(count * 768).astype(np.float16))
    columns = {
        "id": pa.array([f"train/{number}" for number in range(count)]),
        "emotion": pa.array(["joy"] * count),
        "features": pa.FixedSizeListArray.from_arrays(values, 768),
    }
    pq.write_table(pa.table(columns), folder / "train.parquet", row_group_size=count)
    code = (
        "import sys, tracemalloc, pyarrow; from orchestration.data.ingest import ingest_features as f; "
        "tracemalloc.start(); "
        "f(sys.argv[1], name='small', root=sys.argv[2], rows_per_shard=4096); "
        "print(tracemalloc.get_traced_memory()[1] + pyarrow.default_memory_pool().max_memory())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "RAY_ADDRESS": address}
    command = [sys.executable, "-c", code, str(folder), s3_root]
    return int(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_features(s3_root: str, tmp_path: Path, cluster: str) -> None:
    """The driver keeps ids and hashes, not features: 74 MB more of them cost less than a third of that."""
    small, large = (ingest_peak_bytes(tmp_path, s3_root, count, cluster) for count in (24_000, 72_000))
    assert large - small < 48_000 * 768 * 2 / 3


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


def test_the_command_prints_the_balance_and_json(s3_root: str, tmp_path: Path, cluster: str) -> None:
    source = write_splits(tmp_path, train=rows(["a", "b", "c"], vectors(3), ["joy", "fear", "hangry"]))
    arguments = ("ingest", "features", str(source), "--name", "small", "--root", s3_root)
    state = {"TINYEMO_STATE": str(tmp_path / "state"), "RAY_ADDRESS": cluster}
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
