"""What stops an ingest says why, and a broken upload is as if it never was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from breaking_proxy import BreakingProxy
from feature_files import good_rows, rows, vectors, write_splits
from ingested_features import assert_is_one_line, ingest

from orchestration.data.manifest import Manifest, load_manifest, verify_manifest
from orchestration.services import storage
from tinyemo.errors import ConfigError, DataError, StorageError

pytestmark = pytest.mark.usefixtures("cluster")


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
        (no_rows, {}, "has no rows"),
        (hangry, {}, "none of 2 records can be kept: 2 unknown_label"),
    ]
    for source, options, message in cases:
        with pytest.raises(DataError) as caught:
            ingest(source, s3_root, **options)
        assert_is_one_line(caught.value, message)
        left = [uri for uri in storage.list_prefix(s3_root) if "/failed-" not in uri]
        assert left == []
    assert ingest(single, s3_root, split="train").manifest.rows_kept == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../up"}, "name is '../up'"),
        ({"taxonomy": "plutchik"}, "unknown taxonomy 'plutchik'"),
        ({"split": "../up"}, "split is '../up'"),
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


def assert_only_the_former_version_is_there(s3_root: str, former: Manifest) -> None:
    """The latest is the former, whole; of the broken one there are shards at most and no manifest."""
    assert load_manifest(f"{s3_root}/small", "features") == former
    assert verify_manifest(former) > 0
    stored = storage.list_prefix(f"{s3_root}/small")
    assert [uri for uri in stored if uri.endswith("manifest.json")] == [f"{former.uri}/manifest.json"]


KILLED_DRIVER = """
import os, signal, sys
from orchestration.data.ingest import ingest_features

def advance(stage, done, total):
    if stage == "write" and done >= 3:
        os.kill(os.getpid(), signal.SIGKILL)

ingest_features(sys.argv[1], name="small", root=sys.argv[2], rows_per_shard=16, advance=advance)
"""


def test_a_killed_ingest_leaves_the_former_version(
    large_source: Path, s3_root: str, tmp_path: Path, cluster: str
) -> None:
    former = ingest(write_splits(tmp_path / "former", train=good_rows("train", 40, 1)), s3_root).manifest
    environment = {**os.environ, "RAY_ADDRESS": cluster, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", KILLED_DRIVER, str(large_source), s3_root]
    killed = subprocess.run(command, env=environment, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert_only_the_former_version_is_there(s3_root, former)
    orphans = [uri for uri in storage.list_prefix(f"{s3_root}/small") if not uri.startswith(former.uri)]
    assert any(uri.endswith("train-00000.parquet") for uri in orphans)
    whole = ingest(large_source, s3_root)
    assert not whole.is_unchanged
    assert verify_manifest(load_manifest(f"{s3_root}/small", "features")) == whole.uploaded_bytes


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
