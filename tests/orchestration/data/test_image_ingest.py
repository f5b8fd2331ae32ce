"""Photographs with labels: tables, folders, every broken row, and what the error says where nothing is left."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from broken_records import encode, picture
from ingested_records import LAYOUT, read_parquet, rejected, stored

from orchestration.data.ingest import IngestReport, ingest_images, ingest_instruct
from orchestration.data.ingest_rules import IngestRules
from orchestration.data.manifest import IMAGE_SCHEMA, load_manifest, read_index, verify_manifest
from orchestration.data.sets import load_splits, read_image_columns
from orchestration.services import storage
from tinyemo.errors import DataError
from tinyemo.taxonomies import TAXONOMIES, find_taxonomy

MIKELS = IngestRules(taxonomy=TAXONOMIES["mikels"])


def write_images(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(picture(number)))


def ingest(labels: Path | None, images: Path, root: str, **options: Any) -> IngestReport:
    return ingest_images(
        labels, images, **{"name": "pictures", "root": root, "rules": MIKELS, "layout": LAYOUT} | options
    )


def test_every_row_is_kept_or_rejected_with_its_reason(s3_folder: str, tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_images(images, [f"{number}.jpg" for number in range(10)])
    (images / "empty.jpg").write_bytes(b"")
    (images / "torn.jpg").write_bytes(encode(picture(90))[:900])
    (images / "copy.jpg").write_bytes((images / "3.jpg").read_bytes())
    (images / "twin.jpg").write_bytes((images / "4.jpg").read_bytes())
    lines: list[tuple[str, str | None]] = [
        ("0.jpg,fear,train", None),
        ("1.jpg, Awe ,train", None),
        ("2.jpg,sadness,test", None),
        ("3.jpg,anger,train", "conflicting_labels"),
        ("copy.jpg,disgust,test", "conflicting_labels"),
        ("4.jpg,anger,train", "duplicate_image"),
        ("twin.jpg,anger,test", None),
        ("5.jpg,anger,train", None),
        ("./5.jpg,anger,train", "duplicate_image"),
        ("6.jpg,anger,train", None),
        ("6.jpg,anger,train", "duplicate_id"),
        ("7.jpg,hangry,train", "label_unknown"),
        ("8.jpg,,train", "missing_field"),
        (",fear,train", "missing_field"),
        ("9.jpg,fear,../up", "bad_split"),
        ("9.jpg,fear,train,more", "bad_row"),
        ("nowhere.jpg,fear,train", "image_missing"),
        ("empty.jpg,fear,train", "image_unreadable"),
        ("torn.jpg,fear,train", "image_truncated"),
        ("../secret.jpg,fear,train", "image_outside_root"),
    ]
    table = tmp_path / "labels.csv"
    table.write_text("\ufeffImage,emotion,split\n" + "\n".join(line for line, _ in lines) + "\n", encoding="utf-8")
    report = ingest(table, images, s3_folder)
    manifest = report.manifest
    found = {row["number"]: row["reason"] for row in rejected(manifest).values()}
    assert found == {number: reason for number, (_, reason) in enumerate(lines, start=2) if reason}
    assert manifest.rows_in == len(lines) == manifest.rows_kept + manifest.rejected.rows
    assert {row["file"] for row in rejected(manifest).values()} == {"labels.csv"}
    assert {(row["id"], row["label"]) for row in stored(manifest)} == {
        ("0.jpg", "fear"), ("1.jpg", "awe"), ("2.jpg", "sadness"), ("twin.jpg", "anger"), ("5.jpg", "anger"),
        ("6.jpg", "anger"),
    }  # fmt: skip
    for row in stored(manifest):
        assert row["image"] == (images / row["id"]).read_bytes()
    assert (manifest.kind, manifest.labels) == ("images", TAXONOMIES["mikels"].words)
    assert load_manifest(f"{s3_folder}/pictures", "images") == manifest
    assert verify_manifest(manifest) > 0
    assert list(read_parquet(manifest.file_uri(manifest.shards[0].path))[0]) == IMAGE_SCHEMA.names

    # What the encoder and a run read of it.
    columns = read_image_columns(manifest)
    assert set(columns["label"].to_pylist()) == {"fear", "awe", "sadness", "anger"}
    hashes = [int(hashlib.sha256(row["image"]).hexdigest()[:16], 16) for row in stored(manifest)]
    assert read_index(manifest)["image_hash"].to_pylist() == hashes
    assert {name: len(rows) for name, rows in load_splits(manifest, manifest.labels).items()} == {"test": 2, "train": 4}
    assert ingest(table, images, s3_folder).is_unchanged


def test_a_folder_for_each_label_needs_no_table(s3_folder: str, tmp_path: Path) -> None:
    write_images(tmp_path, ["train/fear/a.jpg", "train/awe/b.PNG", "test/fear/c.jpg", "hangry/d.jpg", "e.jpg"])
    (tmp_path / "train/fear/notes.txt").write_text("no image")
    manifest = ingest(None, tmp_path, s3_folder, split="train").manifest
    assert {split: counts.labels for split, counts in manifest.splits.items()} == {
        "train": {"awe": 1, "fear": 1},
        "test": {"fear": 1},
    }
    assert manifest.rejected.reasons == {"label_unknown": 1}
    for path in ("train/fear/a.jpg", "test/fear/c.jpg"):
        storage.write_bytes(f"{s3_folder}/raw/{path}", (tmp_path / path).read_bytes())
    far = ingest_images(None, f"{s3_folder}/raw", name="far", root=s3_folder, rules=MIKELS).manifest
    assert sorted(row["id"] for row in stored(far)) == ["test/fear/c.jpg", "train/fear/a.jpg"]


def test_words_of_ones_own_are_labels_and_the_data_set_carries_them(s3_folder: str, tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    table = tmp_path / "moods.tsv"
    table.write_text("id\timage\tlabel\n1\ta.jpg\tRelaxed\n2\tb.jpg\tstressed out\n3\tc.jpg\tcalm\n")
    own = find_taxonomy({"name": "mood", "words": ["calm", "stressed out"], "synonyms": {"calm": ["relaxed"]}})
    manifest = ingest(table, tmp_path, s3_folder, rules=IngestRules(taxonomy=own), split="train").manifest
    assert manifest.splits["train"].labels == {"calm": 2, "stressed out": 1}
    again = load_manifest(f"{s3_folder}/pictures")
    assert (again.taxonomy, again.labels) == (own, ("calm", "stressed out"))
    assert sorted(row["id"] for row in stored(manifest)) == ["1", "2", "3"]


def test_what_would_help_is_said_where_nothing_is_left(s3_folder: str, tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a.jpg", "b.jpg"])
    table, odd = tmp_path / "labels.csv", tmp_path / "odd.csv"
    table.write_text("image,label\na.jpg,awe\nb.jpg,amusement\n")
    odd.write_text("file,feeling\na.jpg,awe\n")
    (tmp_path / "records.jsonl").write_text('{"id": "a"}\n')
    (tmp_path / "empty.csv").write_text("image,label\n")
    cases: list[tuple[Any, str]] = [
        (lambda: ingest(table, tmp_path / "images", s3_folder, rules=IngestRules()),
         r"none of 2 records can be kept: 2 label_unknown \(taxonomy ekman, labels seen: awe, amusement; "
         r"taxonomies that have them: mikels\)"),
        (lambda: ingest(table, tmp_path, s3_folder), r"2 image_missing \('a.jpg' does not exist under the images"),
        (lambda: ingest(odd, tmp_path / "images", s3_folder), r"lacks the column\(s\) image, label \(or emotion\)"),
        (lambda: ingest(tmp_path / "records.jsonl", tmp_path, s3_folder), "use `tinyemo ingest instruct`"),
        (lambda: ingest(tmp_path / "empty.csv", tmp_path, s3_folder), "has no row"),
        (lambda: ingest(tmp_path / "none.csv", tmp_path, s3_folder), "is no file"),
        (lambda: ingest(None, tmp_path / "images", s3_folder), "holds no image in a folder"),
        (lambda: ingest_instruct(table, tmp_path, name="x", root=s3_folder), "use `tinyemo ingest images --labels`"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
