"""Label embeddings: where each emotion word lies in the input-embedding space of a language model.

A label's embedding is the mean of its tokens' input embeddings (arXiv 2410.07062), without a forward pass, so the
embedding table is all that is read. Not normalised here; the losses and the classifier do that.

Shape letters: T texts, D width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tinyemo.embedding_tables import EmbeddingTable
from tinyemo.errors import DataError
from tinyemo.local_files import write_atomically
from tinyemo.taxonomies import TAXONOMIES, Taxonomy, canonical_word, render

METADATA_KEY = "label_embeddings"


@dataclass(frozen=True)
class LabelEmbeddings:
    """Words and their vectors, with what they were made from."""

    words: tuple[str, ...]
    """T words in canonical spelling."""
    vectors: Tensor
    """(T, D) float32, not normalised."""
    llm: str
    """Name of the language model."""
    llm_revision: str
    """Which weights of it."""
    llm_weights: Literal["real", "random"]
    """Whether the table was the model's own."""
    template: str
    """Name or text of the label template."""

    def select(self, words: Sequence[str]) -> Tensor:
        """Return (len(words), D) float32, in the order of `words`; aliases are accepted.

        Raises:
            DataError: some words have no embedding here; the message names them.
        """
        missing = self.missing(words)
        if missing:
            raise DataError(
                f"no label embedding for {', '.join(missing)}: embed these words with the table of {self.llm} first"
            )
        place = {word: index for index, word in enumerate(self.words)}
        return self.vectors[[place[canonical_word(word)] for word in words]]

    def missing(self, words: Sequence[str]) -> tuple[str, ...]:
        """Return the words that have no embedding here, in canonical spelling."""
        known = set(self.words)
        return tuple(dict.fromkeys(w for w in map(canonical_word, words) if w not in known))

    def extended(self, other: LabelEmbeddings) -> LabelEmbeddings:
        """Return these embeddings and the other's new words, which must come from the same table and template.

        Raises:
            DataError: language model, revision, weights, template or width differ.
        """
        for field in ("llm", "llm_revision", "llm_weights", "template"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise DataError(f"label embeddings do not fit together: {field} is {mine!r} here and {theirs!r} there")
        new = self.missing(other.words)
        if not new:
            return self
        return replace(self, words=(*self.words, *new), vectors=torch.cat([self.vectors, other.select(new)]))

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically; everything but the vectors is in its metadata."""
        document = {
            "words": self.words,
            "llm": self.llm,
            "llm_revision": self.llm_revision,
            "llm_weights": self.llm_weights,
            "template": self.template,
        }
        # One entry: safetensors writes several in an order that changes, so the same labels would give other bytes.
        metadata = {METADATA_KEY: json.dumps(document)}
        write_atomically(path, save({"vectors": self.vectors.contiguous()}, metadata=metadata))

    @classmethod
    def load(cls, path: Path) -> LabelEmbeddings:
        """Read what `save` wrote.

        Raises:
            DataError: no such file, or not such a file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                document, vectors = json.loads((file.metadata() or {})[METADATA_KEY]), file.get_tensor("vectors")
            words = tuple(document.pop("words"))
            loaded = cls(words=words, vectors=vectors, **document)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not a file of label embeddings: {error}") from error
        if loaded.vectors.shape[0] != len(words):
            raise DataError(f"{path} names {len(words)} words and holds {loaded.vectors.shape[0]} vectors")
        return loaded


def known_words(taxonomy: Taxonomy | None = None) -> tuple[str, ...]:
    """Return the labels and synonyms of all built-in taxonomies, then the words of `taxonomy` that are not among them.

    Each word occurs once, in a fixed order.
    """
    labels = sorted({word for built_in in TAXONOMIES.values() for word in built_in.words})
    synonyms = [text for label in labels for text in TAXONOMIES["parrott"].synonyms.get(label, ())]
    return tuple(dict.fromkeys((*labels, *synonyms, *(taxonomy.all_words() if taxonomy else ()))))


def embed_labels(table: EmbeddingTable, words: Sequence[str], template: str) -> LabelEmbeddings:
    """Embed labels: the mean of the input embeddings of each label text's tokens, without special tokens.

    The text is tokenised just as the template renders it. SentencePiece (Llama-2) marks the start of a word by itself;
    a byte-level BPE (SmolLM2, Phi-2) takes a leading space for it, which the template `spaced` puts there.

    Raises:
        DataError: a word has no token.
    """
    spelled = tuple(dict.fromkeys(canonical_word(word) for word in words))
    ids_by_word = [table.tokenize(render(template, word)) for word in spelled]
    for word, ids in zip(spelled, ids_by_word, strict=True):
        if not ids:
            raise DataError(f"label {word!r} has no token in the vocabulary of {table.name}: choose another word")
    lengths = [len(ids) for ids in ids_by_word]
    rows = table.rows([token for ids in ids_by_word for token in ids])
    vectors = torch.stack([part.mean(0) for part in torch.split(rows, lengths)])
    return LabelEmbeddings(
        words=spelled,
        vectors=vectors,
        llm=table.name,
        llm_revision=table.revision,
        llm_weights="random" if table.is_random else "real",
        template=template,
    )
