"""Ids, splits, duplicates, shards and digest, decided on columns."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.data.decisions import FACT_SCHEMA, choose_split, decide, digest_of, plan_shards
from orchestration.data.ingest_rules import IngestRules, Layout, Reason
from orchestration.data.manifest import held_out_rank

RULES = IngestRules()
SPLITS = ("train", "validation", "test", "extra")


def sha(image: int) -> bytes:
    return hashlib.sha256(str(image).encode()).digest()


def phash(image: int) -> int:
    """Far from that of any other image."""
    return int.from_bytes(sha(image)[8:16], "big")


def facts(rows: list[dict[str, Any]]) -> pa.Table:
    """A table of facts; a row needs an image number, all else has a default."""
    filled = []
    for number, row in enumerate(rows, start=1):
        image = row.pop("image", number)
        given_facts = {
            "number": number, "id": f"id-{number}", "content": number.to_bytes(16, "big"), "task": "vqa",
            "image_sha256": sha(image), "phash": phash(image), "image_bytes": 100, "text_bytes": 10,
        }  # fmt: skip
        filled.append(given_facts | row)
    return pa.Table.from_pylist(filled, FACT_SCHEMA)


def outcome(table: pa.Table) -> list[tuple[str, str | None]]:
    return list(zip(table["split"].to_pylist(), table["reason"].to_pylist(), strict=True))


def test_the_first_record_of_an_id_stays() -> None:
    rows = [{"id": "a", "reason": "bad_id"}, {"id": "a"}, {"id": "b"}, {"id": "a"}, {"id": "a"}]
    decided = decide(facts(rows), RULES, "train")
    assert decided["reason"].to_pylist() == ["bad_id", None, None, "duplicate_id", "duplicate_id"]
    assert decided["detail"].to_pylist()[3] == "record 2 has this id"


def test_ids_that_name_images_are_numbered() -> None:
    same = b"same".ljust(16)
    rows = [
        {"id": "a"}, {"id": "a"}, {"id": "a#3"}, {"id": "a"}, {"id": "a"},
        {"id": "b", "content": same}, {"id": "b", "content": same}, {"id": "b"},
    ]  # fmt: skip
    decided = decide(facts(rows), IngestRules(repeated_id="number"), "train")
    kept = decided.filter(decided["reason"].is_null())["id"].to_pylist()
    assert kept == ["a", "a#2", "a#3", "a#4", "b", "b#3"]
    assert decided["reason"].to_pylist() == [None, None, None, "duplicate_id", None, None, "duplicate_id", None]


@settings(deadline=None)
@given(
    ids=st.lists(st.sampled_from(["a", "a#2", "a#2#2", "b"]), max_size=12),
    contents=st.lists(st.integers(0, 2), min_size=12, max_size=12),
)
def test_numbered_ids_are_unique_and_nothing_is_lost_but_copies(ids: list[str], contents: list[int]) -> None:
    rows = [{"id": i, "content": bytes([c]) * 16, "image": 1} for i, c in zip(ids, contents, strict=False)]
    decided = decide(facts(rows), IngestRules(repeated_id="number"), "train")
    kept = decided.filter(decided["reason"].is_null())["id"].to_pylist()
    assert len(set(kept)) == len(kept)
    assert set(ids) == {i for i in kept if i in ids} == set(kept) & set(ids)


def test_an_image_stays_in_the_split_that_is_held_out_most() -> None:
    rows: list[dict[str, Any]] = [
        {"image": 1, "split": "train"}, {"image": 1, "split": "validation"}, {"image": 1, "split": "test"},
        {"image": 2, "split": "train"}, {"image": 2, "split": "validation"}, {"image": 2, "split": "validation"},
        {"image": 3, "split": "train"}, {"image": 3, "split": "extra"}, {"image": 4, "split": "train"},
    ]  # fmt: skip
    lost = Reason.DUPLICATE_IMAGE
    decided = decide(facts(rows), RULES, None)
    assert outcome(decided) == [
        ("train", lost), ("validation", lost), ("test", None),
        ("train", lost), ("validation", None), ("validation", None),
        ("train", lost), ("extra", None), ("train", None),
    ]  # fmt: skip
    assert decided["detail"][0].as_py() == "test holds this image in record 3"


def test_a_near_image_goes_from_the_split_that_is_held_out_less() -> None:
    base = phash(1)
    rows: list[dict[str, Any]] = [
        {"image": 1, "split": "train", "phash": base},
        {"image": 2, "split": "train", "phash": base ^ 0b1},
        {"image": 3, "split": "test", "phash": base ^ 0b11},
        {"image": 4, "split": "validation", "phash": base ^ 0b1111100},  # near the second alone
        {"image": 5, "split": "train", "phash": base ^ (0b11 | 0b11111 << 20)},
        {"image": 6, "split": "train", "phash": None},
    ]
    decided = decide(facts(rows), RULES, None)
    near = Reason.DUPLICATE_NEAR_IMAGE
    assert decided["reason"].to_pylist() == [near, near, None, None, None, None]
    assert decided["detail"][0].as_py() == "2 of 64 bits from the image of record 3 of test"
    assert decide(facts(rows), IngestRules(near_duplicate_bits=-1), None)["reason"].null_count == 6


def test_what_is_rejected_itself_takes_nobody_along() -> None:
    """An image of validation that goes because of test must not take a train image near it that test is far from."""
    base = phash(1)
    rows = [
        {"image": 1, "split": "test", "phash": base},
        {"image": 2, "split": "validation", "phash": base ^ 0b1111},
        {"image": 3, "split": "train", "phash": base ^ 0b11111111},
    ]
    assert decide(facts(rows), RULES, None)["reason"].to_pylist() == [None, "duplicate_near_image", None]


def test_records_without_a_split_follow_their_image() -> None:
    rows: list[dict[str, Any]] = [{"image": 1}, {"image": 1, "split": "test"}, {"image": 1}, {"image": 1}]
    assert outcome(decide(facts(rows), RULES, None)) == [("test", None)] * 4
    rows = [{"image": 1}, {"image": 1, "split": "test", "reason": "bad_id"}, {"image": 1}]
    split = choose_split(sha(1), RULES.held_out)
    assert outcome(decide(facts(rows), RULES, None))[::2] == [(split, None)] * 2
    rows = [{"image": 1}, {"image": 2, "split": "test"}]
    assert outcome(decide(facts(rows), RULES, "extra")) == [("extra", None), ("test", None)]


def test_held_out_fractions_are_met() -> None:
    held_out = {"validation": 0.1, "test": 0.2}
    splits = [choose_split(sha(image), held_out) for image in range(20_000)]
    shares = {name: splits.count(name) / len(splits) for name in ("train", *held_out)}
    assert shares == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.01)
    assert {choose_split(sha(image), {}) for image in range(100)} == {"train"}
    # Other fractions never change which images are test.
    others = [choose_split(sha(image), {"validation": 0.3, "test": 0.2, "unseen": 0.1}) for image in range(20_000)]
    assert [split == "test" for split in others] == [split == "test" for split in splits]


rows_of_anything = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.sampled_from("abcdefgh"),
            "image": st.integers(0, 6),
            "split": st.none() | st.sampled_from(SPLITS),
            "reason": st.none() | st.none() | st.just("bad_json"),
            "phash": st.none() | st.integers(0, 40),
        }
    ),
    max_size=25,
)


@settings(deadline=None)
@given(rows=rows_of_anything, bits=st.integers(-1, 3), repeated=st.sampled_from(["reject", "number"]))
def test_whatever_comes_in_what_is_kept_is_sound(rows: list[dict[str, Any]], bits: int, repeated: Any) -> None:
    rules = IngestRules(near_duplicate_bits=bits, repeated_id=repeated, held_out={"test": 0.3})
    # One image has one hash.
    hashes = {row["image"]: row["phash"] for row in rows}
    table = facts([row | {"phash": hashes[row["image"]]} for row in rows])
    decided = decide(table, rules, None)
    assert decided.num_rows == len(rows)
    kept = [row for row in decided.to_pylist() if row["reason"] is None]
    ids = [row["id"] for row in kept]
    assert len(set(ids)) == len(ids)
    where: dict[bytes, set[str]] = {}
    for row in kept:
        where.setdefault(row["image_sha256"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in where.values())
    for first in kept:
        for second in kept:
            if first["split"] != second["split"] and None not in (first["phash"], second["phash"]):
                assert (first["phash"] ^ second["phash"]).bit_count() > bits
    # Nothing is lost without cause: an id, or a place in a split held out more, holds what each duplicate is one of.
    for row in decided.to_pylist():
        if row["reason"] == Reason.DUPLICATE_IMAGE:
            (holder,) = where.get(row["image_sha256"]) or {row["split"]}
            assert held_out_rank(holder) <= held_out_rank(row["split"])


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    splits=st.lists(st.sampled_from(SPLITS), min_size=40, max_size=40),
    shard_bytes=st.integers(1, 500),
)
def test_shards_hold_every_kept_record_once_in_order(sizes: list[int], splits: list[str], shard_bytes: int) -> None:
    rows = [{"image_bytes": n, "text_bytes": 0, "split": s} for n, s in zip(sizes, splits, strict=False)]
    rows.insert(1, {"reason": "bad_json", "split": "train"})
    decided = decide(facts(rows), IngestRules(near_duplicate_bits=-1), None)
    plans = plan_shards(decided, Layout(shard_bytes=shard_bytes))
    held = np.concatenate([plan.rows for plan in plans]).tolist()
    assert sorted(held) == [0, *range(2, len(rows))]
    assert len({plan.path for plan in plans}) == len(plans)
    for plan in plans:
        assert set(decided["split"].take(pa.array(plan.rows)).to_pylist()) == {plan.split}
        assert plan.rows.tolist() == sorted(plan.rows.tolist())
        without_last = decided["image_bytes"].take(pa.array(plan.rows[:-1])).to_pylist()
        assert sum(without_last) < shard_bytes
    names = list(dict.fromkeys(plan.split for plan in plans))
    assert names == sorted(names, key=held_out_rank, reverse=True)
    for split in names:
        paths = [plan.path for plan in plans if plan.split == split]
        assert paths == [f"{split}-{number:05d}.parquet" for number in range(len(paths))]


def test_the_digest_is_over_what_a_reader_sees() -> None:
    def digest(*changes: tuple[int, dict[str, Any]], header: object = "h", order: tuple[int, ...] = (0, 1, 2)) -> str:
        rows: list[dict[str, Any]] = [{"id": "a", "image": 1}, {"id": "b", "image": 2}, {"id": "c", "reason": "no"}]
        for place, change in changes:
            rows[place] = rows[place] | change
        decided = decide(facts([rows[place] for place in order]), RULES, "train")
        return digest_of(decided, plan_shards(decided, Layout()), header)

    plain = digest()
    changed = [
        digest((0, {"id": "z"})),
        digest((0, {"image": 9})),
        digest((0, {"content": b"x" * 16})),
        digest((0, {"split": "test"})),
        digest((2, {"reason": "bad_json"})),
        digest((2, {"id": "z"})),
        digest(header="g"),
        digest(order=(1, 0, 2)),
    ]
    assert len({plain, *changed}) == 9
    # Where in its file a record stood, and how it was decoded, is no part of it.
    assert digest((0, {"number": 77, "detail": "", "width": 5})) == plain
