"""Label embeddings for a recipe: made once, then a small safetensors file in the asset cache."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from orchestration.assets.catalogue import cache_folder, open_embedding_table
from tinyemo.config import LabelConfig
from tinyemo.errors import DataError
from tinyemo.families import FAMILY
from tinyemo.taxonomies import TAXONOMIES

if TYPE_CHECKING:
    from tinyemo.embedding_tables import EmbeddingTable
    from tinyemo.label_embeddings import LabelEmbeddings
    from tinyemo.projector import MetricProjector


def label_embeddings(config: LabelConfig) -> LabelEmbeddings:
    """Return the embeddings of all words that the labels may need, from the language model's table or a random one.

    Raises:
        AssetError: the real table is out of reach; the message lists what was tried.
    """
    from tinyemo.label_embeddings import LabelEmbeddings, embed_labels, known_words  # imports torch

    words = known_words(config.resolved(TAXONOMIES["ekman"]))
    key = f"{config.llm}\n{config.llm_weights}\n{config.template}\n{config.seed}\n{words}"
    name = f"{config.llm}-{config.llm_weights}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    path = cache_folder() / "label_embeddings" / name
    if path.exists():
        return LabelEmbeddings.load(path)
    table = open_embedding_table(config.llm, config.llm_weights, config.seed)
    labels = embed_labels(table, words, config.template)
    path.parent.mkdir(parents=True, exist_ok=True)
    labels.save(path)
    return labels


def table_of(projector: MetricProjector) -> EmbeddingTable:
    """Return the embedding table that a projector's labels come from.

    Raises:
        DataError: its language model is not in the family.
        AssetError: no source has the table.
    """
    labels = projector.labels
    assert labels is not None
    names = (projector.card.get("llm"), labels.llm)
    size = next((size for size in FAMILY.values() if size.name in names or size.llm in names), None)
    if size is None:
        raise DataError(
            f"{labels.llm!r} is not in the family, so no word can be embedded for it: use words that it has"
        )
    return open_embedding_table(size.name, labels.llm_weights, int(projector.card.get("llm_seed", 0)))
