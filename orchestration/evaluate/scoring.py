"""Scores of projectors on feature rows, of any number and with any label words: one pass reads every row once.

A part is a shard of a feature data set in S3, or a row group of a local Parquet file. Parts of data sets in S3 are
scored by Ray Data tasks where a cluster is named; local files, and everything without a cluster, in this process.

Shape letters: N rows, C labels, d encoder width, H width of the language model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from orchestration.assets.labels import table_of
from orchestration.data.manifest import Manifest, Shard, load_manifest, read_file
from orchestration.data.sets import features_array
from orchestration.data.stream import from_ipc, to_ipc
from orchestration.services import storage
from tinyemo.encoders import EncoderInfo, encoder_in_metadata, encoder_of_card, find_conflict
from tinyemo.errors import DataError
from tinyemo.features import LABEL_COLUMNS
from tinyemo.label_embeddings import embed_labels
from tinyemo.projector import MetricProjector
from tinyemo.taxonomies import Taxonomy, canonical_word

ROWS_PER_FORWARD = 8192
COLUMNS = ("id", "label", "predicted", "scores")
"""Columns of a table of scores; columns of groups follow."""


def score_rows(projector: MetricProjector, features: NDArray[Any], *texts: Tensor) -> list[NDArray[np.float32]]:
    """Return for each set of label vectors the (N, C) float32 cosine of every row with every label.

    Args:
        projector: in evaluation mode.
        features: (N, d) float16 or float32; a few thousand rows at a time are in float32.
        texts: for each set of labels (C, H) float32, L2-normalised; see `text_vectors`.

    Raises:
        DataError: the features have another width than the projector.
    """
    scores = [np.empty((len(features), len(vectors)), np.float32) for vectors in texts]
    with torch.inference_mode():
        for start in range(0, len(features), ROWS_PER_FORWARD):
            part = slice(start, start + ROWS_PER_FORWARD)
            embeds = projector(torch.from_numpy(np.asarray(features[part], np.float32)))
            for found, vectors in zip(scores, texts, strict=True):
                found[part] = (embeds @ vectors.T.to(embeds)).numpy()
    return scores


def text_vectors(
    projector: MetricProjector, words: Sequence[str], templates: Sequence[str] = (), synonyms: Taxonomy | None = None
) -> Tensor:
    """Return (C, H) float32, L2-normalised: the vector of each label, or the mean of the vectors of its texts.

    Args:
        projector: with its label embeddings; what they lack is embedded by the table of their language model.
        words: C labels.
        templates: label templates to average over; none for the one that the projector was trained with.
        synonyms: taxonomy whose synonyms of a label are averaged with it; None for none.

    Raises:
        DataError: the projector's language model is not in the family, or a word has no token.
        AssetError: no source has its table.
    """
    labels = projector.labels
    assert labels is not None
    texts = [(word, *(synonyms.synonyms.get(word, ()) if synonyms else ())) for word in map(canonical_word, words)]
    flat = list(dict.fromkeys(text for group in texts for text in group))
    missing = labels.missing(flat)
    if templates:
        table = table_of(projector)
        sources = [embed_labels(table, flat, template) for template in templates]
    elif missing:
        sources = [labels.extended(embed_labels(table_of(projector), missing, labels.template))]
    else:
        sources = [labels]
    vectors = [
        torch.cat([F.normalize(source.select(group), dim=-1) for source in sources]).mean(dim=0) for group in texts
    ]
    return F.normalize(torch.stack(vectors), dim=-1)


@dataclass(frozen=True)
class Part:
    """One shard of a split in S3, or one row group of a local Parquet file."""

    split: str
    num_rows: int
    shard: Shard | None = None
    row_group: int = 0


@dataclass(frozen=True)
class FeatureRows:
    """Labelled feature rows in parts.

    Attributes:
        uri: address of the version in S3, or the path of the file.
        digest: of the data set's manifest, or the sha256 of the file.
        manifest: None of a local file.
        encoder: which network made the features; None where that is not known.
    """

    name: str
    uri: str
    digest: str
    parts: tuple[Part, ...]
    manifest: Manifest | None = None
    encoder: EncoderInfo | None = None

    @property
    def num_rows(self) -> int:
        """N."""
        return sum(part.num_rows for part in self.parts)

    def read(self, part: Part) -> pa.Table:
        """Return the columns id, label and features of a part, checked against the manifest."""
        columns = ["id", "label", "features"]
        if self.manifest is not None:
            assert part.shard is not None
            return pq.read_table(pa.BufferReader(read_file(self.manifest, part.shard)), columns=columns)
        with pq.ParquetFile(self.uri) as file:
            column = next(name for name in LABEL_COLUMNS if name in file.schema_arrow.names)
            table = file.read_row_group(part.row_group, columns=["id", column, "features"])
        return table.select(["id", column, "features"]).rename_columns(columns)


def open_rows(location: str, splits: Sequence[str] = ("test",)) -> FeatureRows:
    """Return the rows of some splits of a feature data set in S3, or of a local Parquet file.

    Args:
        location: `s3://...`, or a path.
        splits: names of splits; `*` for all. A local file has none, and all of its rows are taken.

    Raises:
        DataError: there is no such data set, split or file, or the file has no labels.
        StorageError: S3 cannot be read.
    """
    if not location.startswith("s3://"):
        return _open_file(Path(location))
    manifest = load_manifest(location, "features")
    chosen = sorted(manifest.splits) if "*" in splits else list(splits)
    parts = tuple(Part(split, shard.rows, shard) for split in chosen for shard in manifest.shards_of(split))
    return FeatureRows(manifest.name, manifest.uri, manifest.digest, parts, manifest, manifest.encoder)


def _open_file(path: Path) -> FeatureRows:
    from tinyemo.local_files import sha256_of_file

    if not path.is_file():
        raise DataError(f"{path} is not a file: give a Parquet file with columns id, features and label, or s3://...")
    try:
        with pq.ParquetFile(path) as file:
            names, metadata = file.schema_arrow.names, file.schema_arrow.metadata
            counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from error
    missing = [name for name in ("id", "features") if name not in names]
    if missing or not set(LABEL_COLUMNS) & set(names):
        raise DataError(f"{path} needs the columns id, features and label (or emotion); it has {', '.join(names)}")
    parts = tuple(Part("", count, row_group=group) for group, count in enumerate(counts) if count)
    if not parts:
        raise DataError(f"{path} holds no rows")
    encoder = encoder_in_metadata(metadata, str(path))
    return FeatureRows(path.stem, str(path), sha256_of_file(path), parts, encoder=encoder)


def require_encoder(projector: MetricProjector, rows: FeatureRows) -> None:
    """DataError where another encoder than the projector's made the rows."""
    wanted, given = projector.config.encoder, rows.encoder
    conflict = find_conflict(encoder_of_card(projector.card), given)
    if conflict is None and wanted and given is not None and not given.matches(wanted):
        conflict = f"{given} is not {wanted}"
    if conflict is not None:
        raise DataError(f"{rows.uri} holds features of another encoder than the projector was trained on: {conflict}")


@dataclass(frozen=True)
class Scoring:
    """One table to make: a projector on some rows with some labels.

    Attributes:
        key: name of the table.
        rows: the rows.
        projector: in evaluation mode.
        texts: (C, H) float32, see `text_vectors`.
    """

    key: str
    rows: FeatureRows
    projector: MetricProjector = field(repr=False)
    texts: Tensor = field(repr=False)


def score_all(
    wanted: Sequence[Scoring], advance: Callable[[str, int, int], None] | None = None
) -> dict[str, tuple[pa.Table, NDArray[np.float32]]]:
    """Score every row of every table in one pass, and return by key (id and label as stored, (N, C) cosines).

    Rows that several tables share are read and, for one projector, embedded once.

    Raises:
        TinyEmoError: a shard is corrupt, widths differ, or S3 or Ray fails.
    """
    rows = list({scoring.rows.uri + repr(scoring.rows.parts): scoring.rows for scoring in wanted}.values())
    items = [{"set": place, "part": number} for place, found in enumerate(rows) for number in range(len(found.parts))]
    sizes = [found.num_rows for found in rows]
    done, parts = 0, {}

    def work(batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([_score_part(rows, wanted, **item) for item in batch.to_pylist()])

    for table in run_parts(items, work, is_local=any(found.manifest is None for found in rows)):
        for row in table.to_pylist():
            scored = from_ipc(row["scored"])
            parts[row["set"], row["part"]] = scored
            done += scored.num_rows
            if advance is not None:
                advance("score", done, sum(sizes))
    found = {}
    for scoring in wanted:
        place = next(place for place, one in enumerate(rows) if one == scoring.rows)
        tables = [parts[place, number] for number in range(len(scoring.rows.parts))]
        table = pa.concat_tables([table.select(["id", "label"]) for table in tables])
        scores = np.concatenate([_matrix(table[scoring.key]) for table in tables])
        found[scoring.key] = (table, scores)
    return found


def run_parts(
    items: list[dict[str, int]], work: Callable[[pa.Table], pa.Table], *, is_local: bool
) -> Iterator[pa.Table]:
    """Yield the result of the work for each item, from Ray Data tasks in any order, or in this process in order."""
    if is_local or not items or not os.environ.get("RAY_ADDRESS"):
        for item in items:
            yield work(pa.Table.from_pylist([item]))
        return
    from orchestration.data.tasks import MAX_RETRIES, guarded, run_unordered
    from orchestration.services.ray_cluster import connect

    connect()
    options = {"num_cpus": 1, "max_retries": MAX_RETRIES}
    advice = "run the same command again"
    yield from run_unordered(items, lambda batch: guarded(work, batch), worker="a task", advice=advice, **options)


def _score_part(rows: Sequence[FeatureRows], wanted: Sequence[Scoring], set: int, part: int) -> dict[str, Any]:
    """Return a part's id, label and the cosines of every table that wants it, as Arrow IPC."""
    source = rows[set]
    table = source.read(source.parts[part])
    features = features_array(table)
    columns = {"id": table["id"], "label": table["label"]}
    if not np.isfinite(features).all():
        raise DataError(f"{source.uri} holds NaN or Inf: take them out (`tinyemo ingest features` does)")
    asking = [scoring for scoring in wanted if scoring.rows == source]
    for projector in {id(scoring.projector): scoring.projector for scoring in asking}.values():
        mine = [scoring for scoring in asking if scoring.projector is projector]
        for scoring, scores in zip(mine, score_rows(projector, features, *(one.texts for one in mine)), strict=True):
            columns[scoring.key] = pa.FixedSizeListArray.from_arrays(pa.array(scores.ravel()), scores.shape[1])
    return {"set": set, "part": part, "scored": to_ipc(pa.table(columns))}


def _matrix(column: pa.ChunkedArray) -> NDArray[np.float32]:
    lists = column.combine_chunks()
    matrix: NDArray[np.float32] = np.asarray(lists.flatten()).reshape(len(lists), -1)
    return matrix


def scores_table(
    ids: pa.ChunkedArray,
    targets: NDArray[np.int64],
    words: Sequence[str],
    scores: NDArray[np.float32],
    groups: pa.Table | None = None,
) -> pa.Table:
    """Return the table of scores: id, label, predicted, scores (in the order of the words), then columns of groups.

    Args:
        ids: (N,) ids.
        targets: (N,) place of the true label among the words.
        words: C labels.
        scores: (N, C) cosines.
        groups: N rows of further columns.
    """
    names = pa.array(list(words), pa.string())
    lists = pa.ListArray.from_arrays(
        pa.array(np.arange(0, scores.size + 1, scores.shape[1], dtype=np.int32)), pa.array(scores.ravel())
    )
    columns = {
        "id": ids,
        "label": names.take(pa.array(targets)),
        "predicted": names.take(pa.array(scores.argmax(axis=1))),
        "scores": lists,
    }
    table = pa.table(columns).replace_schema_metadata({"labels": ",".join(words)})
    if groups is not None:
        for name in groups.column_names:
            table = table.append_column(name, groups[name])
    return table


def read_scores(location: str) -> tuple[pa.Table, tuple[str, ...], NDArray[np.float32]]:
    """Return a stored table of scores, its labels in the order of the scores, and the scores as (N, C) float32."""
    data = storage.read_bytes(location) if location.startswith("s3://") else Path(location).read_bytes()
    table = pq.read_table(pa.BufferReader(data))
    metadata: dict[bytes, bytes] = table.schema.metadata or {}
    labels = tuple(metadata[b"labels"].decode().split(","))
    return table, labels, _matrix(table["scores"])
