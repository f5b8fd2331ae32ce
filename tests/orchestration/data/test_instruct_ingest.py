"""Broken records end in the dead letter and sound ones in S3, byte by byte: real S3, real Ray tasks, one ingest."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from broken_records import RULES, Corpus, asked, encode, picture, record
from ingested_records import LAYOUT, ingest, left_in, read_parquet, rejected, stored
from PIL import Image

from orchestration.data.ingest import ingest_instruct
from orchestration.data.ingest_rules import IngestRules, Reason
from orchestration.data.manifest import (
    RECORD_SCHEMA,
    id_hash,
    load_manifest,
    read_index,
    verify_manifest,
)
from orchestration.data.staging import MAX_RECORD_BYTES
from orchestration.services import storage
from tinyemo.errors import DataError


def test_every_kind_of_broken_record_ends_in_the_dead_letter(corpus: Corpus, s3_folder: str) -> None:
    report = ingest(corpus, s3_folder)
    manifest = report.manifest
    assert len(corpus.reasons) > 100
    of_other_kinds = {
        Reason.BAD_ROW,
        Reason.CONFLICTING_LABELS,
        Reason.NULL_FIELD,
        Reason.WRONG_WIDTH,
        Reason.NOT_FINITE,
        Reason.UNKNOWN_LABEL,
        Reason.ID_IN_TWO_SPLITS,
        Reason.VECTOR_IN_TWO_SPLITS,
    }
    expected = {str(reason) for reason in set(Reason) - of_other_kinds}
    assert set(corpus.reasons.values()) == expected, "a reason that no record shows"
    found = rejected(manifest)
    wrong = {
        corpus.names[number]: (reason, found[number]["reason"] if number in found else "kept")
        for number, reason in corpus.reasons.items()
        if number not in found or found[number]["reason"] != reason
    }
    assert wrong == {}
    assert found.keys() == corpus.reasons.keys()
    for number, row in found.items():
        assert row["detail"]
        assert "\n" not in row["detail"]
        line = corpus.lines[number - 1].decode(errors="backslashreplace")
        assert row["record"] == line.strip()[:MAX_RECORD_BYTES]

    # Exactly as many out as in, however it is counted.
    num_lines = sum(bool(line.strip()) for line in corpus.lines)
    assert manifest.rows_in == num_lines == len(corpus.kept) + len(corpus.reasons)
    assert (manifest.rows_kept, manifest.rejected.rows, manifest.rejected.num_duplicates) == (
        len(corpus.kept),
        len(corpus.reasons),
        3,
    )
    assert manifest.rejected.reasons == Counter(corpus.reasons.values())
    assert manifest.rejected.rows == len(found)

    # And what was sound came through as it was.
    rows = stored(manifest)
    assert {row["id"] for row in rows} == corpus.kept.keys()
    given = {str(line["id"]): line for line in _sound_lines(corpus)}
    for row in rows:
        data = corpus.kept[row["id"]].read_bytes()
        assert row["image"] == data
        assert row["image_sha256"] == hashlib.sha256(data).hexdigest()
        assert (row["width"], row["height"]) == Image.open(io.BytesIO(data)).size
        turns = given[row["id"]]["conversations"]
        assert row["turns"] == [{"role": turn["from"], "text": turn["value"]} for turn in turns]
    reasoning = next(row for row in rows if row["id"] == "reasoning")
    assert (reasoning["labels_offered"], reasoning["label_stated"], reasoning["label"]) == (
        ["joy", "fear"],
        "joy",
        "joy",
    )
    assert left_in(s3_folder, "broken") == sorted(
        [f"broken/{manifest.version}/{file.path}" for file in manifest.files()]
        + [f"broken/{manifest.version}/{name}" for name in ("manifest.json", "samples.png")]
        + ["broken/latest.json"]
    )


def _sound_lines(corpus: Corpus) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for number, line in enumerate(corpus.lines, start=1)
        if line.strip() and number not in corpus.reasons
    ]


def test_the_layout_is_the_one_that_readers_plan_from(corpus: Corpus, s3_folder: str) -> None:
    manifest = ingest(corpus, s3_folder).manifest
    assert load_manifest(f"{s3_folder}/broken", "instruct") == manifest
    assert verify_manifest(manifest) == sum(file.num_bytes for file in manifest.files())
    assert len([shard for shard in manifest.shards if shard.split == "train"]) > 1
    lines = [json.loads(line)["id"] if line.startswith(b'{"id"') else None for line in corpus.lines[:1]]
    assert lines == ["sound-0"]
    for shard in manifest.shards:
        file = pq.ParquetFile(io.BytesIO(storage.read_bytes(manifest.file_uri(shard.path))))
        assert file.schema_arrow == RECORD_SCHEMA
        groups = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
        assert sum(groups) == shard.rows
        assert groups == [4] * (shard.rows // 4) + [shard.rows % 4] * (shard.rows % 4 > 0)
        image = next(c for c in _columns(file) if c.path_in_schema == "image")
        assert image.compression == "UNCOMPRESSED"

    # Row by row, the index says where each record is; records of a split keep the order of the input.
    rows = [
        (number, row, record)
        for number, shard in enumerate(manifest.shards)
        for row, record in enumerate(read_parquet(manifest.file_uri(shard.path)))
    ]
    for line, (shard_number, row, stored_record) in zip(read_index(manifest).to_pylist(), rows, strict=True):
        label = stored_record["label"]
        assert line == {
            "split": manifest.shards[shard_number].split,
            "label": label,
            "image_hash": int(stored_record["image_sha256"][:16], 16),
            "id_hash": id_hash(stored_record["id"]),
            "shard": shard_number,
            "row": row,
        }
    order = list(corpus.kept)
    for split, counts in manifest.splits.items():
        ids = [r["id"] for n, _, r in rows if manifest.shards[n].split == split]
        assert len(ids) == counts.rows == sum(manifest.tasks[split].values())
        assert ids == sorted(ids, key=order.index)


def _columns(file: pq.ParquetFile) -> Iterator[Any]:
    group = file.metadata.row_group(0)
    yield from (group.column(place) for place in range(group.num_columns))


def test_a_flipped_byte_in_a_page_is_found_by_its_checksum(corpus: Corpus, s3_folder: str) -> None:
    manifest = ingest(corpus, s3_folder).manifest
    data = bytearray(storage.read_bytes(manifest.file_uri(manifest.shards[0].path)))
    file = pq.ParquetFile(io.BytesIO(bytes(data)))
    image = next(c for c in _columns(file) if c.path_in_schema == "image")
    data[image.data_page_offset + image.total_compressed_size // 2] ^= 1
    with pytest.raises(OSError, match=r"(?i)checksum|crc"):
        pq.read_table(io.BytesIO(bytes(data)), page_checksum_verification=True)


def test_the_same_input_twice_stores_nothing_and_any_change_is_another_version(
    corpus: Corpus, s3_folder: str, tmp_path: Path
) -> None:
    first = ingest(corpus, s3_folder)
    before = storage.list_prefix(f"{s3_folder}/broken")
    again = ingest(corpus, s3_folder, layout=LAYOUT.model_copy(update={"records_per_chunk": 7}))
    assert not first.is_unchanged
    assert (again.is_unchanged, again.num_uploaded, again.uploaded_bytes) == (True, 0, 0)
    assert again.manifest == first.manifest
    assert storage.list_prefix(f"{s3_folder}/broken") == before

    forced = ingest(corpus, s3_folder, is_forced=True)
    assert not forced.is_unchanged
    assert forced.manifest.digest == first.manifest.digest
    assert [s.sha256 for s in forced.manifest.shards] == [s.sha256 for s in first.manifest.shards]

    others = [
        ingest(corpus, s3_folder, rules=RULES.model_copy(update={"min_side": 17})),
        ingest(corpus, s3_folder, layout=LAYOUT.model_copy(update={"rows_per_group": 5})),
        ingest(corpus, s3_folder, extra_rules={"answers": "templates"}),
        ingest(corpus, s3_folder, data="generated"),
    ]
    assert others[2].manifest.rules["answers"] == "templates"
    assert len({report.manifest.digest for report in [first, *others]}) == 5
    assert ingest(corpus, s3_folder).is_unchanged  # and latest goes back to it
    assert load_manifest(f"{s3_folder}/broken", "instruct") == forced.manifest


def test_records_and_images_may_lie_in_s3(s3_folder: str, tmp_path: Path) -> None:
    images, source = f"{s3_folder}/raw/images", Corpus(tmp_path)
    good = {f"deep/er/{n}.jpg": encode(picture(n)) for n in range(3)}
    for path, data in (good | {"empty.jpg": b"", "heavy.jpg": encode(picture(9, (900, 700)), "BMP")}).items():
        storage.write_bytes(f"{images}/{path}", data)
    for path in good:
        source.keep(record(path, path, split="train"), path)
    source.keep(record("with its address", f"{images}/deep/er/0.jpg", split="train"), "deep/er/0.jpg")
    source.reject("image_unreadable", "an empty object", record("empty", "empty.jpg"))
    source.reject("image_too_large", "too many bytes", record("heavy", "heavy.jpg"))
    source.reject("image_missing", "no such object", record("no", "nowhere.jpg"))
    source.reject("image_missing", "what no address can hold", record("no", "deep/er/0.jpg?versionId=1"))
    source.reject("image_missing", "a line break in a key", record("no", "deep/er/\n0.jpg"))
    source.reject("image_missing", "a key that is too long", record("no", "x" * 1_000))
    source.reject("image_outside_root", "up and out", record("no", "../../secret.jpg"))
    source.reject("image_outside_root", "another bucket", record("no", "s3://elsewhere/a.jpg"))
    document = [json.loads(line) for line in source.lines]
    storage.write_bytes(f"{s3_folder}/raw/records.json", b"\xef\xbb\xbf\n" + json.dumps(document, indent=2).encode())
    manifest = ingest_instruct(
        f"{s3_folder}/raw/records.json", images, name="far", root=s3_folder, rules=RULES, layout=LAYOUT
    ).manifest
    assert {number: row["reason"] for number, row in rejected(manifest).items()} == source.reasons
    assert {row["id"]: row["image"] for row in stored(manifest)} == {
        **good,
        "with its address": good["deep/er/0.jpg"],
    }
    assert manifest.source["name"] == f"{s3_folder}/raw/records.json"


def test_a_broken_array_is_kept_up_to_where_it_breaks(s3_folder: str, tmp_path: Path) -> None:
    source = Corpus(tmp_path)
    lines = [record(str(n), source.image(f"{n}.jpg", encode(picture(n)))) for n in range(25)]
    text = json.dumps(lines)
    source.records.write_text(text[: text.rindex("{") - 40])  # in the middle of the last record
    report = ingest(source, s3_folder, split="train", rules=IngestRules())
    assert report.manifest.rejected.reasons == {"bad_json": 1}
    (row,) = rejected(report.manifest).values()
    assert row["number"] == 25
    assert "broken after element 24" in row["detail"]
    assert [r["id"] for r in stored(report.manifest)] == [str(n) for n in range(24)]


def test_too_much_rejected_fails_before_any_shard_and_keeps_the_dead_letter(s3_folder: str, tmp_path: Path) -> None:
    source = Corpus(tmp_path)
    for number in range(8):
        source.keep(record(str(number), source.image(f"{number}.jpg", encode(picture(number)))), f"{number}.jpg")
    source.reject("image_missing", "nowhere", record("8", "nowhere.jpg"))
    source.reject("duplicate_id", "again", record("1", "2.jpg"))
    source.write()
    with pytest.raises(DataError) as caught:
        ingest(source, s3_folder, rules=IngestRules(max_rejected_fraction=0.09))
    message = str(caught.value)
    assert "1 of 10 records are rejected, more than max_rejected_fraction 0.09" in message
    assert "\n" not in message
    address = message.rsplit("see ", 1)[1]
    assert [(row["number"], row["reason"]) for row in read_parquet(address)] == [
        (9, "image_missing"),
        (10, "duplicate_id"),
    ]
    assert storage.list_prefix(f"{s3_folder}/broken").keys() == {address}
    # A duplicate is not bad: at one of ten this is allowed.
    report = ingest(source, s3_folder, rules=IngestRules(max_rejected_fraction=0.1))
    assert (report.manifest.rows_kept, report.manifest.rejected.rows, report.manifest.rejected.num_duplicates) == (
        8,
        2,
        1,
    )


def test_nothing_to_keep_is_a_clear_line(s3_folder: str, tmp_path: Path) -> None:
    source = Corpus(tmp_path)
    source.images.mkdir()
    source.reject("image_missing", "nowhere", record("8", "nowhere.jpg"))
    source.write()
    with pytest.raises(DataError, match=r"none of 1 records can be kept: 1 image_missing \(.*\); see s3://"):
        ingest(source, s3_folder)


def test_images_that_are_converted_are_stored_as_png(s3_folder: str, tmp_path: Path) -> None:
    source = Corpus(tmp_path)
    clear = picture(1).convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 0))
    files = {
        "clear.png": encode(clear, "PNG"),
        "ink.jpg": encode(picture(2).convert("CMYK")),
        "palette.gif": encode(picture(3).convert("P"), "GIF"),
        "bits.tiff": encode(picture(4).convert("1"), "TIFF"),
        "plain.bmp": encode(picture(5), "BMP"),
    }
    for name, data in files.items():
        source.keep(record(name, source.image(name, data)), name)
    source.write()
    rows = {r["id"]: Image.open(io.BytesIO(r["image"])) for r in stored(ingest(source, s3_folder).manifest)}
    assert {name: (image.format, image.mode) for name, image in rows.items()} == {
        name: ("PNG", "L" if name == "bits.tiff" else "RGB") for name in files
    }
    assert rows["clear.png"].getextrema() == ((255, 255),) * 3
    assert np.array_equal(np.asarray(rows["plain.bmp"]), np.asarray(picture(5)))


def test_records_of_one_image_never_straddle_splits(s3_folder: str, tmp_path: Path) -> None:
    source = Corpus(tmp_path)
    for number in range(60):
        file = source.image(f"{number}.jpg", encode(picture(number)))
        for kind, question in (("a", "Describe the image."), ("b", "What is it?")):
            source.keep(record(f"{number}{kind}", file, **asked(question)), file)
    source.write()
    rules = IngestRules(held_out={"validation": 0.3, "test": 0.3})
    manifest = ingest(source, s3_folder, rules=rules).manifest
    splits = {
        shard.split: [r["id"][:-1] for r in read_parquet(manifest.file_uri(shard.path))] for shard in manifest.shards
    }
    assert splits.keys() == {"train", "validation", "test"}
    seen: dict[str, set[str]] = {}
    for shard in manifest.shards:
        for row in read_parquet(manifest.file_uri(shard.path)):
            seen.setdefault(row["id"][:-1], set()).add(shard.split)
    assert all(len(where) == 1 for where in seen.values())
    assert manifest.rejected.rows == 0
