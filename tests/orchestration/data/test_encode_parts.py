"""One part: the encoder's own numbers, and every image that has none is accounted for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from record_files import write_records
from vision_files import EKMAN, job_for, matrix, photograph, photographed, read_table, with_image

from orchestration.assets.model_files import open_choice
from orchestration.data.features import NOTES, Part, encode_part, plan_images, read_notes
from orchestration.data.sets import read_image_columns
from orchestration.services import storage
from tinyemo.errors import DataError
from tinyemo.images import read_pixels


def test_a_part_holds_the_encoders_own_numbers(s3_root: str, tiny_clip: Path, device: str) -> None:
    source = write_records(s3_root, photographed(11))
    job = job_for(source, tiny_clip, f"{s3_root}/out")
    encoder = open_choice(job.choice, job.spec, device)
    (part,) = plan_images(read_image_columns(source), 100).parts
    encode_part(job, encoder, part)

    encoder = open_choice(job.choice, job.spec, "cpu")
    pixels = np.stack([read_pixels(photograph(number), job.spec.preprocessing) for number in range(11)])
    expected = encoder.encode(torch.from_numpy(pixels))
    patches = read_table(f"{job.uri}/patches-train-00000.parquet")
    assert patches["id"].to_pylist() == [hashlib.sha256(photograph(number)).hexdigest() for number in range(11)]
    found = matrix(patches["patches"]).reshape(11, 16, 32)
    np.testing.assert_allclose(found, expected.patches.numpy(), rtol=2e-3, atol=2e-3)

    pooled = read_table(f"{job.uri}/train-00000.parquet")
    labelled = [number for number in range(11) if number % 5 != 4]
    assert pooled["label"].to_pylist() == [EKMAN[number % 6] for number in labelled]
    assert pooled["label"].to_pylist() == [EKMAN[number % 6] for number in labelled]
    assert pooled["id"].to_pylist() == [patches["id"][number].as_py() for number in labelled]
    assert str(pooled.schema.field("features").type) == "fixed_size_list<element: halffloat>[512]"
    np.testing.assert_allclose(matrix(pooled["features"]), expected.pooled.numpy()[labelled], rtol=2e-3, atol=2e-3)
    for table in (pooled, patches):
        assert json.loads(table.schema.metadata[b"tinyemo"])["encoder"] == job.spec.info.model_dump()
    note = read_notes(job.uri)["train-00000"]
    assert (note["pooled"]["rows"], note["patches"]["rows"], note["rejections"]) == (len(labelled), 11, [])


def test_an_image_that_cannot_be_read_is_rejected_and_the_others_stay(s3_root: str, tiny_clip: Path) -> None:
    rows = photographed(6)
    rows.insert(3, with_image(90, b"no image", label="joy"))
    rows.append(with_image(91, photograph(91)[:300], label=None))
    source = write_records(s3_root, rows)
    job = job_for(source, tiny_clip, f"{s3_root}/out")
    (part,) = plan_images(read_image_columns(source), 100).parts
    encode_part(job, open_choice(job.choice, job.spec, "cpu"), part)
    note = read_notes(job.uri)["train-00000"]
    found = {item["id"]: (item["reason"], item["label"]) for item in note["rejections"]}
    assert found == {
        hashlib.sha256(b"no image").hexdigest(): ("unreadable_image", "joy"),
        hashlib.sha256(photograph(91)[:300]).hexdigest(): ("unreadable_image", None),
    }
    ids = read_table(f"{job.uri}/patches-train-00000.parquet")["id"].to_pylist()
    assert ids == [hashlib.sha256(photograph(number)).hexdigest() for number in range(6)]
    assert read_table(f"{job.uri}/train-00000.parquet").num_rows == 5


def test_a_part_may_have_no_labels_or_no_patches(s3_root: str, tiny_clip: Path) -> None:
    source = write_records(s3_root, [with_image(number, photograph(number)) for number in range(3)])
    (part,) = plan_images(read_image_columns(source), 100).parts
    job = job_for(source, tiny_clip, f"{s3_root}/out")
    encoder = open_choice(job.choice, job.spec, "cpu")
    encode_part(job, encoder, part)
    note = read_notes(job.uri)["train-00000"]
    assert (note["pooled"], note["patches"]["rows"]) == (None, 3)
    job = job_for(source, tiny_clip, f"{s3_root}/pooled", has_patches=False)
    encode_part(job, encoder, Part(part.split, part.number, part.rows, part.ids, ["joy"] * 3))
    note = read_notes(job.uri)["train-00000"]
    assert (note["pooled"]["rows"], note["patches"]) == (3, None)
    assert sorted(uri.rsplit("/", 1)[1] for uri in storage.list_prefix(job.uri)) == [
        "train-00000.json", "train-00000.parquet",
    ]  # fmt: skip


def test_features_beyond_float16_are_rejected(s3_root: str, tiny_clip: Path) -> None:
    source = write_records(s3_root, photographed(3))
    job = job_for(source, tiny_clip, f"{s3_root}/out")
    encoder = open_choice(job.choice, job.spec, "cpu")
    with torch.no_grad():
        encoder._network.visual_projection.weight *= 1e9  # type: ignore[union-attr, operator]
    (part,) = plan_images(read_image_columns(source), 100).parts
    encode_part(job, encoder, part)
    note = read_notes(job.uri)["train-00000"]
    assert {item["reason"] for item in note["rejections"]} == {"not_finite"}
    assert (len(note["rejections"]), note["pooled"], note["patches"]) == (3, None, None)


def test_an_image_that_is_not_the_one_that_was_ingested_is_an_error(s3_root: str, tiny_clip: Path) -> None:
    rows = photographed(2)
    rows[1]["image"] = photograph(50)
    source = write_records(s3_root, rows)
    job = job_for(source, tiny_clip, f"{s3_root}/out")
    (part,) = plan_images(read_image_columns(source), 100).parts
    part = Part(part.split, 0, np.array([1, 2]), [rows[1]["image_sha256"], rows[2]["image_sha256"]], [None, None])
    with pytest.raises(DataError, match=rf"image {rows[1]['image_sha256'][:12]} of .* is corrupt"):
        encode_part(job, open_choice(job.choice, job.spec, "cpu"), part)
    assert storage.list_prefix(job.uri) == {}


def test_a_note_counts_only_with_its_files(s3_root: str, tiny_clip: Path) -> None:
    source = write_records(s3_root, photographed(4))
    job = job_for(source, tiny_clip, f"{s3_root}/out")
    encoder = open_choice(job.choice, job.spec, "cpu")
    parts = plan_images(read_image_columns(source), 2).parts
    assert [part.name for part in parts] == ["train-00000", "train-00001"]
    for part in parts:
        encode_part(job, encoder, part)
    assert sorted(read_notes(job.uri)) == ["train-00000", "train-00001"]
    storage.write_bytes(f"{job.uri}/patches-train-00001.parquet", b"half")
    assert sorted(read_notes(job.uri)) == ["train-00000"]
    storage.delete(f"{job.uri}/train-00000.parquet")
    assert read_notes(job.uri) == {}
    storage.delete_prefix(f"{job.uri}/{NOTES}")
    assert not [uri for uri in storage.list_prefix(job.uri) if f"/{NOTES}/" in uri]


def test_a_corrupt_or_missing_shard_stops_the_plan(s3_root: str) -> None:
    source = write_records(s3_root, photographed(4))
    uri = source.file_uri(source.shards[0].path)
    storage.write_bytes(uri, storage.read_bytes(uri)[:-20])
    with pytest.raises(DataError, match=r"train-00000\.parquet is missing or corrupt"):
        read_image_columns(source)
    storage.delete(uri)
    with pytest.raises(DataError, match=r"train-00000\.parquet is missing or corrupt"):
        read_image_columns(source)
