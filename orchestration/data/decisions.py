"""Decisions over a whole data set: ids, splits, duplicates, shards, and the digest. Pure functions on columns.

R records, K of them kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from orchestration.data.ingest_rules import IngestRules, Layout, Reason
from orchestration.data.manifest import Kind, held_out_rank, id_hash
from orchestration.data.near_duplicates import nearest_within

FACT_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),  # line or element of the input, from 1
        ("id", pa.string()),  # null where a rejected record has none
        ("split", pa.string()),  # as the record names it; after `decide` the one it is in
        ("reason", pa.string()),  # null where it is kept
        ("detail", pa.string()),
        ("content", pa.binary(16)),  # hash of task, turns, labels and source; of the text where those are not known
        ("task", pa.string()),
        ("label", pa.string()),
        ("question_chars", pa.int32()),
        ("answer_chars", pa.int32()),
        ("text_bytes", pa.int64()),
        ("image_sha256", pa.binary(32)),
        ("phash", pa.uint64()),
        ("image_bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
"""Facts that a task finds out about a record; the driver holds these (under 300 bytes a record), no text or image."""


class _Verdicts:
    def __init__(self, facts: pa.Table) -> None:
        self.reasons: list[str | None] = facts["reason"].to_pylist()
        self.details: list[str | None] = facts["detail"].to_pylist()
        self.is_kept: NDArray[np.bool_] = facts["reason"].is_null().to_numpy().astype(bool)

    def reject(self, row: int, reason: Reason, detail: str) -> None:
        self.reasons[row] = reason
        self.details[row] = detail
        self.is_kept[row] = False


def decide(facts: pa.Table, rules: IngestRules, split: str | None, kind: Kind = "instruct") -> pa.Table:
    """Return the facts (R rows in the order of the input) with final ids, splits and reasons.

    Args:
        facts: FACT_SCHEMA.
        rules: of the ingest.
        split: of records that name none; None: their image decides.
        kind: of images, each is kept once, and only where all of its records name one label.
    """
    facts = facts.combine_chunks()
    verdicts = _Verdicts(facts)
    numbers = facts["number"].to_numpy()
    if kind == "features":
        return _decide_rows(facts, numbers, verdicts)
    ids = _settle_ids(facts, numbers, rules, verdicts)
    images = _codes(facts["image_sha256"])
    splits = _settle_splits(facts, images, rules, split, verdicts)
    names, ranks = _rank_splits(splits, verdicts)
    if kind == "images":
        _reject_conflicts(images, facts["label"], verdicts)
    _reject_leaks(
        images,
        ranks,
        verdicts,
        Reason.DUPLICATE_IMAGE,
        lambda holder: f"{names[ranks[holder]]} holds this image in record {numbers[holder]}",
    )
    if kind == "images":
        _reject_repeated_images(images, numbers, verdicts)
    if rules.near_duplicate_bits >= 0:
        _reject_near_images(facts, images, ranks, names, numbers, rules.near_duplicate_bits, verdicts)
    return _with_verdicts(facts, verdicts, ids, splits.tolist())


def _decide_rows(facts: pa.Table, numbers: NDArray[np.int64], verdicts: _Verdicts) -> pa.Table:
    """Decide rows of features: no id twice in a split, and neither an id nor a vector in two splits."""
    ids, splits = facts["id"].to_pylist(), np.array(facts["split"].to_pylist(), dtype=object)
    first: dict[tuple[str, str], int] = {}
    for row in np.flatnonzero(verdicts.is_kept).tolist():
        holder = first.setdefault((splits[row], ids[row]), row)
        if holder != row:
            verdicts.reject(row, Reason.DUPLICATE_ID, f"row {numbers[holder]} of the same split has this id")
    names, ranks = _rank_splits(splits, verdicts)
    for column, reason in (("id", Reason.ID_IN_TWO_SPLITS), ("content", Reason.VECTOR_IN_TWO_SPLITS)):
        _reject_leaks(
            _codes(facts[column]),
            ranks,
            verdicts,
            reason,
            lambda holder: f"{names[ranks[holder]]} holds it as {ids[holder]!r}",
        )
    return _with_verdicts(facts, verdicts, ids, splits.tolist())


def _rank_splits(splits: NDArray[np.object_], verdicts: _Verdicts) -> tuple[list[str], NDArray[np.int64]]:
    """Return the splits that hold kept rows, the one held out most first, and (R,) the place of each row's split."""
    names = sorted(set(splits[verdicts.is_kept].tolist()), key=held_out_rank)
    ranks = np.zeros(len(splits), dtype=np.int64)
    for rank, name in enumerate(names):
        ranks[splits == name] = rank
    return names, ranks


def _with_verdicts(facts: pa.Table, verdicts: _Verdicts, ids: list[str | None], splits: list[str | None]) -> pa.Table:
    changed = {
        "id": pa.array(ids, pa.string()),
        "split": pa.array(splits, pa.string()),
        "reason": pa.array(verdicts.reasons, pa.string()),
        "detail": pa.array(verdicts.details, pa.string()),
    }
    return pa.table([changed.get(name, facts[name]) for name in FACT_SCHEMA.names], schema=FACT_SCHEMA)


def _codes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return (R,) equal numbers for equal values, -1 for null."""
    codes: NDArray[np.int64] = (
        pc.fill_null(column.combine_chunks().dictionary_encode().indices, -1).to_numpy().astype(np.int64)
    )
    return codes


def _settle_ids(
    facts: pa.Table, numbers: NDArray[np.int64], rules: IngestRules, verdicts: _Verdicts
) -> list[str | None]:
    ids: list[str | None] = facts["id"].to_pylist()
    first: dict[str | None, int] = {}
    repeated = [row for row in np.flatnonzero(verdicts.is_kept).tolist() if first.setdefault(ids[row], row) != row]
    if not repeated:
        return ids
    times: dict[str | None, int] = {}
    contents = facts["content"]
    seen = {(ids[row], contents[row].as_py()) for row in {first[ids[row]] for row in repeated}}
    for row in repeated:
        sample_id, content = ids[row], contents[row].as_py()
        detail = f"record {numbers[first[sample_id]]} has this id"
        times[sample_id] = times.get(sample_id, 1) + 1
        numbered = f"{sample_id}#{times[sample_id]}"
        if rules.repeated_id == "reject":
            verdicts.reject(row, Reason.DUPLICATE_ID, detail)
        elif (sample_id, content) in seen or numbered in first:
            verdicts.reject(row, Reason.DUPLICATE_ID, f"{detail} and the same conversation, or {numbered} is taken")
        else:
            seen.add((sample_id, content))
            first[numbered] = row
            ids[row] = numbered
    return ids


def _settle_splits(
    facts: pa.Table, images: NDArray[np.int64], rules: IngestRules, split: str | None, verdicts: _Verdicts
) -> NDArray[np.object_]:
    """Return (R,) the split that the record names, else `split`, else the one that its image has or is given."""
    splits = np.array(facts["split"].to_pylist(), dtype=object)
    is_open = verdicts.is_kept & facts["split"].is_null().to_numpy().astype(bool)
    if split is not None:
        splits[is_open] = split
        return splits
    named: dict[int, str] = {}
    for row in np.flatnonzero(verdicts.is_kept & ~is_open).tolist():
        image = int(images[row])
        named[image] = min(named.get(image, splits[row]), splits[row], key=held_out_rank)
    hashes = facts["image_sha256"]
    for row in np.flatnonzero(is_open).tolist():
        splits[row] = named.get(int(images[row])) or choose_split(hashes[row].as_py(), rules.held_out)
    return splits


def choose_split(image_sha256: bytes, held_out: dict[str, float]) -> str:
    """Return the split of an image: its sha256, as a number in [0, 1), falls into a held-out fraction or into train.

    Test comes first, so that its images stay the same whatever the other fractions are.
    """
    place = int.from_bytes(image_sha256[:8], "big") / 2**64
    for name in sorted(held_out, key=held_out_rank):
        place -= held_out[name]
        if place < 0:
            return name
    return "train"


def _reject_conflicts(images: NDArray[np.int64], labels: pa.ChunkedArray, verdicts: _Verdicts) -> None:
    words = labels.to_pylist()
    named: dict[int, set[str]] = {}
    rows = np.flatnonzero(verdicts.is_kept).tolist()
    for row in rows:
        named.setdefault(int(images[row]), set()).add(words[row])
    for row in rows:
        if len(found := named[int(images[row])]) > 1:
            verdicts.reject(row, Reason.CONFLICTING_LABELS, f"records of this image name {', '.join(sorted(found))}")


def _reject_repeated_images(images: NDArray[np.int64], numbers: NDArray[np.int64], verdicts: _Verdicts) -> None:
    first: dict[int, int] = {}
    for row in np.flatnonzero(verdicts.is_kept).tolist():
        holder = first.setdefault(int(images[row]), row)
        if holder != row:
            verdicts.reject(row, Reason.DUPLICATE_IMAGE, f"record {numbers[holder]} of the same split is this image")


def _reject_leaks(
    codes: NDArray[np.int64],
    ranks: NDArray[np.int64],
    verdicts: _Verdicts,
    reason: Reason,
    describe: Callable[[int], str],
) -> None:
    """Keep the rows of a code in the split that is held out most, and reject those in others."""
    rows = np.flatnonzero(verdicts.is_kept)
    order = rows[np.lexsort((rows, ranks[rows], codes[rows]))]
    if not len(order):
        return
    is_start = np.r_[True, codes[order][1:] != codes[order][:-1]]
    holders = order[is_start][np.cumsum(is_start) - 1]
    is_leak = ranks[order] > ranks[holders]
    for row, holder in zip(order[is_leak].tolist(), holders[is_leak].tolist(), strict=True):
        verdicts.reject(row, reason, describe(holder))


def _reject_near_images(
    facts: pa.Table,
    images: NDArray[np.int64],
    ranks: NDArray[np.int64],
    names: list[str],
    numbers: NDArray[np.int64],
    max_bits: int,
    verdicts: _Verdicts,
) -> None:
    """Go from the split held out most to train, and reject images near one of a split before."""
    hashes = pc.fill_null(facts["phash"].combine_chunks(), 0).to_numpy()
    has_hash = facts["phash"].is_valid().to_numpy().astype(bool)
    former = np.array([], dtype=np.int64)  # rows that stand for the images, and hashes, of the splits before
    for rank in range(len(names)):
        rows = np.flatnonzero(verdicts.is_kept & has_hash & (ranks == rank))
        distinct, inverse = np.unique(hashes[rows], return_inverse=True)
        places, bits = nearest_within(distinct, hashes[former], max_bits)
        for row, which in zip(rows.tolist(), inverse.tolist(), strict=True):
            if places[which] >= 0:
                holder = former[places[which]]
                where = f"record {numbers[holder]} of {names[ranks[holder]]}"
                verdicts.reject(row, Reason.DUPLICATE_NEAR_IMAGE, f"{bits[which]} of 64 bits from the image of {where}")
        kept = rows[verdicts.is_kept[rows]]
        _, first = np.unique(hashes[kept], return_index=True)
        former = np.concatenate([former, kept[first]])


@dataclass(frozen=True)
class ShardPlan:
    """The records that one shard holds."""

    split: str
    path: str
    """Relative to the version's folder."""
    rows: NDArray[np.int64]
    """Places in the facts, in the order in which they are stored."""


def plan_shards(decided: pa.Table, layout: Layout, kind: Kind = "instruct") -> list[ShardPlan]:
    """Return the shards of all splits, train first; each ends with the record that reaches `layout.shard_bytes`.

    Features come in the order of their id hashes, all else in that of the input.
    """
    ids = decided["id"].to_pylist() if kind == "features" else []
    is_kept = decided["reason"].is_null().to_numpy().astype(bool)
    splits = np.array(decided["split"].to_pylist(), dtype=object)
    sizes = pc.add(decided["image_bytes"], decided["text_bytes"]).fill_null(0).to_numpy()
    plans = []
    for split in sorted(set(splits[is_kept].tolist()), key=held_out_rank, reverse=True):
        rows = np.flatnonzero(is_kept & (splits == split))
        if kind == "features":
            rows = np.array(sorted(rows.tolist(), key=lambda row: (id_hash(ids[row]), ids[row])), dtype=np.int64)
        # The shard in whose bytes a record begins; one huge record may leave numbers out.
        window = (np.cumsum(sizes[rows]) - sizes[rows]) // layout.shard_bytes
        starts = np.flatnonzero(np.r_[True, window[1:] != window[:-1]])
        for number, part in enumerate(np.split(rows, starts[1:])):
            plans.append(ShardPlan(split, f"{split}-{number:05d}.parquet", part))
    return plans


def digest_of(decided: pa.Table, plans: list[ShardPlan], header: object, kind: Kind = "instruct") -> str:
    """Return the sha256 over everything that a reader of the version can see, and over nothing else.

    The order of the kept records counts, since the order of samples in training is a function of digest and place.

    Args:
        decided: what `decide` returned.
        plans: of all shards.
        header: layout, rules and kind of data, as JSON can hold them.
    """
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    columns = ["split", "id", "label", "reason", "image_sha256", "content"]
    kept = np.concatenate([plan.rows for plan in plans]) if plans else np.array([], dtype=np.int64)
    rejected = np.flatnonzero(decided["reason"].is_valid().to_numpy())
    for rows in (kept, rejected):
        lines = (
            json.dumps([split, sample_id, label, reason, image.hex() if image else None, content and content.hex()])
            for batch in _batches(decided.select(columns), rows)
            for split, sample_id, label, reason, image, content in zip(
                *(column.to_pylist() for column in batch), strict=True
            )
        )
        # Rejected features have no order of their own.
        for line in sorted(lines) if kind == "features" and rows is rejected else lines:
            digest.update(line.encode())
    return digest.hexdigest()


def _batches(table: pa.Table, rows: NDArray[np.int64], size: int = 4096) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(rows), size):
        yield from table.take(pa.array(rows[start : start + size])).combine_chunks().to_batches()
