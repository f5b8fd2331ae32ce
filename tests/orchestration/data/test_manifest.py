"""A manifest is read whole or not at all, and what it names can be checked byte by byte."""

from __future__ import annotations

import json

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from feature_files import good_rows, write_splits

from orchestration.data.ingest import ingest_features
from orchestration.data.manifest import (
    INDEX_SCHEMA,
    Manifest,
    id_hash,
    load_manifest,
    missing_files,
    parse_manifest,
    read_index,
    verify_manifest,
)
from orchestration.services import storage
from tinyemo.errors import DataError

pytestmark = pytest.mark.usefixtures("tasks_in_process")


@pytest.fixture
def manifest(s3_root: str, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """40 train rows in three shards and 10 test rows in one."""
    folder = write_splits(
        tmp_path_factory.mktemp("rows"), train=good_rows("train", 40, 1), test=good_rows("test", 10, 2)
    )
    return ingest_features(folder, name="small", root=f"{s3_root}/datasets", rows_per_shard=16).manifest


def test_the_id_hash_never_changes() -> None:
    """The split into train and validation hangs on it: another value would move rows."""
    assert id_hash("anger/10") == 0x1A9E41B22F5E07D3
    assert id_hash("") != id_hash("anger/10")


def test_latest_and_version_lead_to_the_same_manifest(manifest: Manifest) -> None:
    root = manifest.uri.rsplit("/", 1)[0]
    assert (
        load_manifest(root, "features")
        == load_manifest(f"{root}/", "features")
        == load_manifest(manifest.uri, "features")
        == manifest
    )
    assert manifest.version == manifest.digest[:12]
    assert [(shard.split, shard.rows) for shard in manifest.shards] == [
        ("train", 16),
        ("train", 16),
        ("train", 8),
        ("test", 10),
    ]
    assert manifest.shard_uris("test") == [f"{manifest.uri}/test-00000.parquet"]
    with pytest.raises(DataError, match="no split 'val': it has test, train"):
        manifest.shard_uris("val")


def test_the_stored_manifest_does_not_know_where_it_lies(manifest: Manifest) -> None:
    document = storage.read_json(f"{manifest.uri}/manifest.json")
    assert "uri" not in document
    assert parse_manifest(document, "s3://elsewhere/copy", "features").shard_uris("test") == [
        "s3://elsewhere/copy/test-00000.parquet"
    ]


def test_nothing_there_says_how_to_put_it_there(s3_root: str) -> None:
    with pytest.raises(DataError, match=r"no data set at s3://.*tinyemo ingest features"):
        load_manifest(f"{s3_root}/datasets/none", "features")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows_in": -1}, "field rows_in"),
        ({"surprise": 1}, "field surprise"),
        ({"format": 1}, "field format"),
        ({"digest": None}, "field digest"),
    ],
)
def test_a_manifest_that_is_not_ours_names_the_field(
    change: dict[str, object], message: str, manifest: Manifest
) -> None:
    uri = f"{manifest.uri}/manifest.json"
    storage.write_json(uri, {**storage.read_json(uri), **change})
    with pytest.raises(DataError, match=message) as caught:
        load_manifest(manifest.uri, "features")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("document", [[], {"version": 3}, "text"])
def test_a_broken_pointer_is_a_data_error(document: object, manifest: Manifest) -> None:
    root = manifest.uri.rsplit("/", 1)[0]
    storage.write_json(f"{root}/latest.json", document)
    with pytest.raises(DataError, match="names no version"):
        load_manifest(root, "features")


def test_the_index_finds_every_row(manifest: Manifest) -> None:
    index = read_index(manifest)
    assert index.schema == INDEX_SCHEMA
    assert index.num_rows == manifest.rows_kept == 50
    with storage.filesystem().open_input_file(manifest.file_uri("train-00001.parquet")[len("s3://") :]) as file:
        shard = pq.read_table(file)
    lines = index.filter(pc.equal(index["shard"], 1)).to_pylist()
    assert [line["row"] for line in lines] == list(range(16))
    assert [line["id_hash"] for line in lines] == [id_hash(sample_id) for sample_id in shard["id"].to_pylist()]
    assert [line["label"] for line in lines] == shard["label"].to_pylist()
    assert lines == sorted(lines, key=lambda line: line["id_hash"])


def test_a_sound_version_verifies(manifest: Manifest) -> None:
    assert verify_manifest(manifest) == sum(file.num_bytes for file in manifest.files())
    assert missing_files(manifest) == []


def test_one_flipped_bit_in_a_shard_is_found(manifest: Manifest) -> None:
    uri = manifest.shard_uris("train")[1]
    data = bytearray(storage.read_bytes(uri))
    data[len(data) // 2] ^= 1
    storage.write_bytes(uri, bytes(data))
    assert missing_files(manifest) == []  # the listing cannot see it
    with pytest.raises(DataError, match=f"{uri} is corrupt") as caught:
        verify_manifest(manifest)
    assert "\n" not in str(caught.value)


def test_a_corrupt_index_is_never_planned_from(manifest: Manifest) -> None:
    storage.write_bytes(manifest.file_uri("index.parquet"), b"PAR1 and more")
    with pytest.raises(DataError, match=r"index\.parquet is corrupt"):
        read_index(manifest)


def test_a_missing_shard_is_named(manifest: Manifest) -> None:
    uri = manifest.shard_uris("test")[0]
    storage.delete(uri)
    assert missing_files(manifest) == ["test-00000.parquet"]
    with pytest.raises(DataError, match=f"{uri} is missing"):
        verify_manifest(manifest)


def test_the_json_keeps_every_field(manifest: Manifest) -> None:
    text = manifest.model_dump_json()
    assert parse_manifest(json.loads(text), manifest.uri, "features") == manifest
