"""A few images of an evaluation with label, scores and, where the data may be shown, a picture."""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestration.data.data_card import thumbnail
from orchestration.data.manifest import Manifest, id_hash, load_manifest, read_index
from orchestration.data.sets import RecordSet, read_records
from orchestration.report.policy import read_scores
from tinyemo.errors import DataError, TinyEmoError

logger = logging.getLogger(__name__)

PER_GROUP = 4
NUM_SCORES = 3
GROUPS = {
    "confident and right": "largest lead of the right label",
    "confident and wrong": "largest lead of a wrong label",
    "undecided": "smallest lead",
}
SHA256_CHARACTERS = 64


@dataclass(frozen=True)
class Sample:
    """One image of an evaluation.

    Attributes:
        scores: the best labels with their cosines.
        reasoning: text of a reasoning model; empty where there is none.
        picture: a `data:` address of a small JPEG; empty where the data may not be shown or hold no pictures.
    """

    group: str
    id: str
    label: str
    predicted: str
    scores: list[tuple[str, float]]
    reasoning: str
    picture: str


def choose_samples(entry: dict[str, Any]) -> list[Sample]:
    """Return a few samples of each group of GROUPS, of a data entry of an evaluation.

    Raises:
        DataError: the evaluation stored no scores.
        StorageError: the scores cannot be read.
    """
    if not entry.get("scores"):
        raise DataError("the evaluation stored none: give `tinyemo evaluate RECIPE` an --output folder")
    table = read_scores(entry["scores"])
    labels = list(entry["labels"])
    scores = np.array(table["scores"].to_pylist(), dtype=np.float64)
    top = np.sort(scores, axis=1)
    lead = top[:, -1] - top[:, -2] if len(labels) > 1 else top[:, -1]
    is_right = np.asarray(pc.equal(table["label"], table["predicted"]))
    orders = (
        np.argsort(-np.where(is_right, lead, -np.inf), kind="stable")[: min(PER_GROUP, int(is_right.sum()))],
        np.argsort(-np.where(is_right, -np.inf, lead), kind="stable")[: min(PER_GROUP, int((~is_right).sum()))],
        np.argsort(lead, kind="stable")[:PER_GROUP],
    )
    chosen = [(group, int(row)) for group, rows in zip(GROUPS, orders, strict=True) for row in rows]
    ids = table["id"].to_pylist()
    pictures = _pictures(entry, [ids[row] for _, row in chosen])
    texts = table["reasoning"].to_pylist() if "reasoning" in table.column_names else [""] * len(ids)
    return [
        Sample(
            group=group,
            id=ids[row],
            label=table["label"][row].as_py(),
            predicted=table["predicted"][row].as_py(),
            scores=[(labels[place], float(scores[row, place])) for place in np.argsort(-scores[row])[:NUM_SCORES]],
            reasoning=texts[row] or "",
            picture=pictures.get(ids[row], ""),
        )
        for group, row in chosen
    ]


def may_be_shown(manifest: Manifest) -> bool:
    """Return True if whoever ingested the images said that its pictures may be shown."""
    return manifest.rules.get("pictures_may_be_shown") is True


def _pictures(entry: dict[str, Any], ids: Sequence[str]) -> dict[str, str]:
    """Return small pictures by id; none where the data may not be shown or their images are out of reach."""
    try:
        return _read_pictures(entry["uri"], ids) if str(entry["uri"]).startswith("s3://") else {}
    except TinyEmoError as error:
        logger.warning("the samples of %s have no pictures: %s", entry["name"], error)
        return {}


def _read_pictures(uri: str, ids: Sequence[str]) -> dict[str, str]:
    manifest = load_manifest(uri, "features", "images", "instruct")
    if manifest.kind == "features":
        name, digest = manifest.source.get("name"), str(manifest.source.get("digest", ""))
        if manifest.source.get("kind") not in ("images", "instruct") or not digest:
            return {}
        root = manifest.uri.rsplit("/", 2)[0]
        manifest = load_manifest(f"{root}/{name}/{digest[:12]}", "images", "instruct")
    if not may_be_shown(manifest):
        return {}
    index = read_index(manifest)
    found: dict[str, int] = {}
    records = RecordSet(manifest, "")
    for sample in ids:
        # Features of images are named by the image's sha256, images by their own id.
        is_sha = len(sample) == SHA256_CHARACTERS
        column, value = ("image_hash", int(sample[:16], 16)) if is_sha else ("id_hash", id_hash(sample))
        place = pc.index(index[column], pa.scalar(value, pa.uint64())).as_py()
        if place >= 0:
            shard, row = (np.array([index[name][place].as_py()], np.int32) for name in ("shard", "row"))
            found[sample] = int(records.row_numbers(shard, row)[0])
    if not found:
        return {}
    rows = np.array(sorted(set(found.values())))
    images = dict(zip(rows.tolist(), read_records(records, rows, ("image",))["image"].to_pylist(), strict=True))
    return {
        sample: "data:image/jpeg;base64," + base64.b64encode(thumbnail(images[row])).decode()
        for sample, row in found.items()
    }
