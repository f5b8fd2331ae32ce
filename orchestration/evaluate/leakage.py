"""Test images that training has seen: by id, by the image itself, by a copy of it, or by features alike.

A figure on such images says nothing about new ones, so every figure of a data set with a finding carries a mark.

Shape letters: N test rows, M train rows, d encoder width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from orchestration.data.image_files import inspect_image
from orchestration.data.ingest_rules import IngestRules, RejectedRecordError
from orchestration.data.manifest import Manifest, Shard, read_file
from orchestration.data.near_duplicates import nearest_within
from orchestration.data.sets import features_array
from orchestration.evaluate.evaluation_recipe import LeakageConfig
from orchestration.evaluate.group_file import source_images
from orchestration.evaluate.scoring import FeatureRows, run_parts

KINDS = ("same_id", "same_image", "near_image", "same_features", "near_features")
SHA256 = re.compile(r"[0-9a-f]{64}")
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Finding:
    """A test row that training has seen.

    Attributes:
        kind: one of KINDS; a row is counted under the first of them that applies for a set of train data.
        data: address of the train data.
        value: differing bits of near images, cosine of features, 1 otherwise.
    """

    kind: str
    test_id: str
    train_id: str
    data: str
    value: float


@dataclass
class Leakage:
    """Findings of one data set.

    Attributes:
        is_checked: False where nothing is known of the train data; then nothing can be said.
        share_checked: share of the test rows whose features were compared with all train rows, in [0, 1].
    """

    has_leakage: bool = False
    is_checked: bool = False
    share_checked: float = 1.0
    has_compared_images: bool = False
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    findings: list[Finding] = field(default_factory=list)

    def add(self, finding: Finding, limit: int) -> None:
        """Count a finding, and list it where there are fewer than `limit`."""
        self.has_leakage = True
        self.counts[finding.kind] += 1
        if len(self.findings) < limit:
            self.findings.append(finding)

    def document(self) -> dict[str, Any]:
        """Return the fields as they stand in evaluation.json."""
        return asdict(self)


def find_leakage(test: FeatureRows, train: Sequence[FeatureRows], config: LeakageConfig) -> Leakage:
    """Compare test rows with all rows that training read, also of other data sets.

    Ids are compared within one data set, for elsewhere they mean other images; an id that is the sha256 of an image is
    compared everywhere.

    Raises:
        TinyEmoError: a shard is corrupt, or S3 or Ray fails.
    """
    found = Leakage(is_checked=bool(train))
    if not train:
        return found
    test_ids = np.asarray(_ids(test))
    hashes = _image_hashes([test, *train]) if config.near_bits >= 0 else {}
    for data in train:
        seen = _seen_by_id(test, test_ids, data)
        near = _near_images(test, data, hashes, config.near_bits)
        found.has_compared_images |= near is not None
        for kind, pairs in (("same", seen), ("near_image", near or {})):
            for test_id, (train_id, value) in pairs.items():
                if kind == "near_image" and test_id in seen:
                    continue
                same = "same_image" if SHA256.fullmatch(test_id) else "same_id"
                found.add(
                    Finding(same if kind == "same" else kind, test_id, train_id, data.uri, value), config.num_findings
                )
        known = {*seen, *(near or ())}
        share = min(1.0, config.max_pairs / max(1, test.num_rows * data.num_rows))
        found.share_checked = min(found.share_checked, share)
        for place, train_id, cosine, is_same in _alike_features(test, data, config.near_cosine, share):
            if test_ids[place] not in known:
                kind = "same_features" if is_same else "near_features"
                found.add(Finding(kind, str(test_ids[place]), train_id, data.uri, cosine), config.num_findings)
    return found


def _ids(rows: FeatureRows) -> list[str]:
    if rows.manifest is None:
        with pq.ParquetFile(rows.uri) as file:
            ids: list[str] = file.read(columns=["id"])["id"].to_pylist()
        return ids
    shards = [part.shard for part in rows.parts if part.shard is not None]
    tables = [pq.read_table(pa.BufferReader(read_file(rows.manifest, shard)), columns=["id"]) for shard in shards]
    return [name for table in tables for name in table["id"].to_pylist()]


def _seen_by_id(test: FeatureRows, test_ids: NDArray[Any], train: FeatureRows) -> dict[str, tuple[str, float]]:
    """Return the test ids that train rows have too: of the same data set, or the sha256 of an image."""
    is_own = test.name == train.name
    shared = np.intersect1d(test_ids, np.asarray(_ids(train))).tolist()
    return {name: (name, 1.0) for name in shared if is_own or SHA256.fullmatch(name)}


# Images


def _image_hashes(sets: Sequence[FeatureRows]) -> dict[str, dict[str, int]]:
    """Return the perceptual hash of every image by its sha256, for the source of each data set that is still there."""
    sources = [source for rows in sets if (source := source_images(rows.manifest)) is not None]
    images = list({source.digest: source for source in sources}.values())
    items = [{"set": place, "shard": number} for place, one in enumerate(images) for number in range(len(one.shards))]
    found: dict[str, dict[str, int]] = {source.digest: {} for source in images}

    def work(batch: pa.Table) -> pa.Table:
        ((place, number),) = [(item["set"], item["shard"]) for item in batch.to_pylist()]
        return _hash_shard(images[place], images[place].shards[number])

    for table in run_parts(items, work, is_local=False):
        for row in table.to_pylist():
            found[row["digest"]][row["sha256"]] = row["phash"]
    return found


def _hash_shard(images: Manifest, shard: Shard) -> pa.Table:
    rules = IngestRules()
    table = pq.read_table(pa.BufferReader(read_file(images, shard)), columns=["image_sha256", "image"])
    hashes: dict[str, int] = {}
    for sha256, image in zip(table["image_sha256"].to_pylist(), table["image"], strict=True):
        if sha256 not in hashes:
            try:
                phash = inspect_image(image.as_py(), rules).phash
            except RejectedRecordError:  # ingested under other rules; what has no hash is near to nothing
                phash = None
            if phash is not None:
                hashes[sha256] = phash
    columns = {
        "digest": pa.repeat(pa.scalar(images.digest), len(hashes)),
        "sha256": pa.array(list(hashes), pa.string()),
        "phash": pa.array(list(hashes.values()), pa.uint64()),
    }
    return pa.table(columns)


def _near_images(
    test: FeatureRows, train: FeatureRows, hashes: dict[str, dict[str, int]], max_bits: int
) -> dict[str, tuple[str, float]] | None:
    """Return by test id the nearest train image and the differing bits; None where images of either are not there."""
    tables = []
    for rows in (test, train):
        source = source_images(rows.manifest)
        if source is None or source.digest not in hashes:
            return None
        known = hashes[source.digest]
        tables.append({name: known[name] for name in _ids(rows) if name in known})
    test_names, train_names = (list(table) for table in tables)
    queries, base = (np.array(list(table.values()), np.uint64) for table in tables)
    if not len(queries) or not len(base):
        return {}
    places, bits = nearest_within(queries, base, max_bits)
    near = np.flatnonzero(places >= 0).tolist()
    return {test_names[row]: (train_names[places[row]], float(bits[row])) for row in near}


# Features


def _alike_features(
    test: FeatureRows, train: FeatureRows, near_cosine: float, share: float
) -> list[tuple[int, str, float, bool]]:
    """Return (place of the test row, id of the train row, cosine, whether all numbers are equal) of rows alike.

    Args:
        near_cosine: cosine from which on two rows are alike.
        share: share of the test rows to compare, evenly spread.
    """
    best: dict[int, tuple[str, float, bool]] = {}
    step = max(1, round(1 / share))
    for train_part in train.parts:
        base_table = train.read(train_part)
        base = np.asarray(features_array(base_table), np.float32)
        units, start = F.normalize(torch.from_numpy(base), dim=-1), 0
        for test_part in test.parts:
            table = test.read(test_part)
            chosen = np.arange((-start) % step, table.num_rows, step)
            features = np.asarray(features_array(table)[chosen], np.float32)
            for place, row, cosine in _best_rows(features, units, near_cosine):
                name = base_table["id"][row].as_py()
                is_same = np.array_equal(features[place], base[row])
                number = start + int(chosen[place])
                if number not in best or (is_same, cosine) > (best[number][2], best[number][1]):
                    best[number] = (name, cosine, is_same)
            start += table.num_rows
    return [(place, *best[place]) for place in sorted(best)]


def _best_rows(features: NDArray[np.float32], base: torch.Tensor, near_cosine: float) -> list[tuple[int, int, float]]:
    """Return (row of features, nearest row of the base, cosine) of the rows that have one at `near_cosine` or above."""
    found = []
    # Rounding may put the cosine of a row with itself a little below 1.
    limit = near_cosine - 1e-6
    for first in range(0, len(features), ROWS_AT_ONCE):
        units = F.normalize(torch.from_numpy(features[first : first + ROWS_AT_ONCE]), dim=-1)
        best = torch.full((len(units),), -2.0)
        places = torch.zeros(len(units), dtype=torch.int64)
        for start in range(0, len(base), ROWS_AT_ONCE):
            cosines, nearest = (units @ base[start : start + ROWS_AT_ONCE].T).max(dim=1)
            is_nearer = cosines > best
            best = torch.where(is_nearer, cosines, best)
            places = torch.where(is_nearer, nearest + start, places)
        for row in torch.nonzero(best >= limit).flatten().tolist():
            found.append((first + row, int(places[row]), min(1.0, float(best[row]))))
    return found
