"""Inputs of a bias report: every image's scores, groups and covariates, and the features of a sample.

Shape letters: N images, n images of the sample, C labels, d encoder width, H width of the language model.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from orchestration.bias.image_covariates import align, image_covariates
from orchestration.data.manifest import Manifest
from orchestration.data.sets import features_array
from orchestration.evaluate.evaluate_job import Advance, Entry, Model, entry_of, outcomes_on, source_rows
from orchestration.evaluate.evaluation_recipe import EvaluatedData, EvaluationRecipe
from orchestration.evaluate.group_file import join_groups, names_of_images, read_groups, source_images
from orchestration.evaluate.scoring import Scoring, require_encoder, score_all, text_vectors
from tinyemo.embedding_tables import EmbeddingTable
from tinyemo.errors import ConfigError, DataError
from tinyemo.label_embeddings import embed_labels
from tinyemo.measures.association import WordGroups, unit
from tinyemo.measures.groups import MIN_IMAGES
from tinyemo.measures.scored import Column, ScoredData
from tinyemo.measures.words import Vocabulary
from tinyemo.projector import MetricProjector
from tinyemo.taxonomies import canonical_word

MAX_SAMPLE = 50_000
"""Images whose features are kept: for slices, words, associations and flips."""
MAX_GROUPS = 50
"""Groups of a column that is taken without being named."""
ROWS_PER_FORWARD = 8192

GENDER = (
    "gender",
    ("women", ("female", "woman", "girl", "sister", "she", "her", "hers", "daughter", "mother", "lady")),
    ("men", ("male", "man", "boy", "brother", "he", "him", "his", "son", "father", "gentleman")),
)
"""Words of Caliskan et al. (2017) and two more of each; used where no words are given."""


@dataclass(frozen=True)
class BiasData:
    """One data set, ready for the parts.

    Attributes:
        scored: N images.
        sample: (n,) places of the images whose features are kept, ascending.
        features: (n, d).
        ids: (N,).
        images: data set that the features were made from; None where it is not known.
        notes: lines about what was left out.
    """

    entry: Entry
    scored: ScoredData
    sample: NDArray[np.int64]
    features: NDArray[Any]
    ids: pa.ChunkedArray
    images: Manifest | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class DataChoice:
    """Part of a data set that a bias report reads; the fields are options of `tinyemo bias`."""

    location: str
    split: str = "test"
    taxonomy: str | None = None
    groups: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    covariates: tuple[str, ...] = ()
    cluster_by: str | None = None


def load_data(model: Model, choice: DataChoice, *, seed: int, advance: Advance | None = None) -> BiasData:
    """Score a data set, and join groups and covariates.

    Raises:
        ConfigError: a column is not in any table of groups.
        DataError: no image of the data set stands in the tables, or its features are of another encoder.
        TinyEmoError: S3 or Ray fails.
    """
    config = EvaluatedData.model_validate(
        {"dataset": choice.location, "split": choice.split, "taxonomy": choice.taxonomy}
    )
    rows = source_rows(config, [model], advance)
    require_encoder(model.projector, rows)
    entry = entry_of(rows.name, config, rows, model)
    recipe = EvaluationRecipe(name="bias", data={"data": config})
    texts = text_vectors(model.projector, entry.words)
    table, scores = score_all([Scoring("data", rows, model.projector, texts)], advance)["data"]
    found = outcomes_on(recipe, model, entry, table, scores)
    images = source_images(rows.manifest)
    groups, numbers, clusters, notes = _joined(found.ids, images, choice)
    if images is not None:
        splits = sorted(images.splits) if choice.split == "*" else [choice.split]
        measured = align(found.ids, image_covariates(images, splits))
        numbers = {name: values for name, values in measured.items() if np.nanstd(values) > 0} | numbers
    scored = ScoredData(
        name=entry.name,
        labels=entry.words,
        label=found.outcomes.targets,
        scores=found.scores,
        confidence=np.asarray(found.outcomes.confidences, np.float64),
        groups=groups,
        covariates=numbers,
        clusters=clusters,
    )
    sample, features = _sample(entry, len(scored), seed)
    return BiasData(entry, scored, sample, features, found.ids, images, tuple(notes))


def _joined(
    ids: pa.ChunkedArray, images: Manifest | None, choice: DataChoice
) -> tuple[dict[str, Column], dict[str, NDArray[np.float64]], NDArray[np.int64] | None, list[str]]:
    """Return columns of groups, covariates and clusters from the tables, and lines about columns left out."""
    tables: dict[str, pa.ChunkedArray] = {}
    names = names_of_images(images) if images is not None and choice.groups else {}
    for location in choice.groups:
        joined = join_groups(ids, names, read_groups(location))
        matched = max((len(joined) - joined[name].null_count for name in joined.column_names), default=0)
        if not matched:
            raise DataError(f"{location} names none of the {len(ids)} images of {choice.location} by id or file name")
        tables |= {name: joined[name] for name in joined.column_names}
    wanted = [*choice.columns, *choice.covariates, *([choice.cluster_by] if choice.cluster_by else [])]
    if missing := [name for name in wanted if name not in tables]:
        held = ", ".join(tables) or "none, --groups names no table"
        raise ConfigError(f"no table of groups has the column {', '.join(missing)}; columns: {held}")
    numbers = {name: _numbers(name, tables[name]) for name in choice.covariates}
    clusters = None
    if choice.cluster_by:
        column = Column.of(tables[choice.cluster_by].to_pandas())
        alone = len(column.names) + np.arange(len(ids))
        clusters = np.unique(np.where(column.codes >= 0, column.codes, alone), return_inverse=True)[1].astype(np.int64)
    groups, notes = {}, []
    for name, values in tables.items():
        is_named = name in choice.columns
        if (choice.columns and not is_named) or name in choice.covariates:
            continue
        column = Column.of(values.to_pandas())
        sizes = np.bincount(column.codes[column.codes >= 0], minlength=1)
        is_fit = 2 <= len(column.names) <= MAX_GROUPS and sizes.max() >= MIN_IMAGES
        if not is_named and not is_fit:
            notes.append(f"column {name} is left out: {len(column.names)} groups, the largest of {sizes.max()} images")
            continue
        groups[name] = column
    return groups, numbers, clusters, notes


def _numbers(name: str, values: pa.ChunkedArray) -> NDArray[np.float64]:
    try:
        return np.asarray(pc.cast(values, pa.float64()).to_pandas(), np.float64)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"--covariates {name}: the column holds no numbers ({error})") from error


def _sample(entry: Entry, num_images: int, seed: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return the places of at most MAX_SAMPLE images, and their features as stored; each part is read once."""
    chosen = np.sort(np.random.default_rng(seed).permutation(num_images)[:MAX_SAMPLE])
    start, parts = 0, []
    for part in entry.rows.parts:
        table = entry.rows.read(part)
        encoded = table["label"].combine_chunks().dictionary_encode()
        known = np.array([canonical_word(word or "") in entry.places for word in encoded.dictionary.to_pylist()], bool)
        kept = np.flatnonzero(known[np.asarray(encoded.indices.fill_null(0))])
        inside = chosen[(chosen >= start) & (chosen < start + len(kept))] - start
        parts.append(features_array(table.take(pa.array(kept[inside]))) if len(inside) else None)
        start += len(kept)
    return chosen, np.concatenate([part for part in parts if part is not None])


def project(projector: MetricProjector, features: NDArray[Any]) -> NDArray[np.float32]:
    """Return the (n, H) float32 unit vectors of projected features."""
    with torch.inference_mode():
        return np.concatenate(
            [
                projector(torch.from_numpy(np.asarray(features[start : start + ROWS_PER_FORWARD], np.float32))).numpy()
                for start in range(0, len(features), ROWS_PER_FORWARD)
            ]
        )


def read_vocabulary(table: EmbeddingTable) -> Vocabulary | None:
    """Return the words that are one token of the language model; None where the table is random."""
    tokens = table.whole_words()
    if not tokens:
        return None
    vectors = unit(table.rows(list(tokens.values())).numpy()).astype(np.float32)
    return Vocabulary(tuple(tokens), vectors)


def read_word_groups(path: Path | None, table: EmbeddingTable, template: str) -> list[WordGroups]:
    """Return pairs of word groups from a TOML file, or the words of GENDER.

    The file has a table for each pair: `[age]`, then `young = ["young", ...]` and `old = ["old", ...]`.

    Raises:
        ConfigError: a table does not hold two lists of at least two words.
        DataError: a word has no token.
    """
    pairs = [GENDER] if path is None else _pairs(path)
    return [
        WordGroups(
            name, first, second,
            *(unit(embed_labels(table, words, template).vectors.numpy()) for words in (first_words, second_words)),
        )
        for name, (first, first_words), (second, second_words) in pairs
    ]  # fmt: skip


def _pairs(path: Path) -> Sequence[Any]:
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML ({error})") from error
    pairs = [(name, *((group, tuple(words)) for group, words in table.items())) for name, table in content.items()]
    wrong = [str(pair[0]) for pair in pairs if len(pair) != 3 or min(len(group[1]) for group in pair[1:]) < 2]
    if wrong or not pairs:
        named = ", ".join(wrong) or "there is none"
        raise ConfigError(f"{path}: needs tables of two groups with at least 2 words each; wrong: {named}")
    return pairs
