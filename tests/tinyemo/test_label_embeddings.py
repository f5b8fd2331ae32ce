"""Label embeddings: the mean over tokens, files, and what does not fit together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from tinyemo.config import LabelConfig
from tinyemo.embedding_tables import random_table
from tinyemo.errors import DataError
from tinyemo.label_embeddings import LabelEmbeddings, embed_labels, known_words
from tinyemo.taxonomies import TAXONOMIES, find_taxonomy


def test_a_label_is_the_mean_of_its_tokens():
    table = random_table(16, 0)
    labels = embed_labels(table, ["joy", "awe"], "image")
    for word, vector in zip(labels.words, labels.vectors, strict=True):
        ids = table.tokenize(f"an image expressing {word} emotion")
        assert len(ids) == 5
        assert torch.allclose(vector, table.rows(ids).mean(0), atol=1e-7)
    assert (labels.llm, labels.llm_revision, labels.llm_weights, labels.template) == (
        "random",
        "seed-0",
        "random",
        "image",
    )


def test_known_words_are_all_labels_then_all_synonyms_once():
    words = known_words()
    labels = sorted({word for taxonomy in TAXONOMIES.values() for word in taxonomy.words})
    assert list(words[: len(labels)]) == labels
    assert len(set(words)) == len(words)
    assert set(words) == {*labels, *(text for texts in TAXONOMIES["parrott"].synonyms.values() for text in texts)}
    assert known_words(find_taxonomy(["joy", "boredom"])) == (*words, "boredom")


def test_select_keeps_the_order_asked_and_takes_aliases():
    labels = embed_labels(random_table(16, 0), known_words(), "word")
    chosen = labels.select(["joy", "cheerfullness", "Joy "])
    assert torch.equal(chosen, labels.vectors[[labels.words.index(w) for w in ("joy", "cheerfulness", "joy")]])
    with pytest.raises(DataError, match="no label embedding for boredom, ennui"):
        labels.select(["joy", "boredom", "ennui"])
    assert labels.missing(["boredom", "joy", "Boredom"]) == ("boredom",)


def test_they_come_back_to_the_last_bit(tmp_path: Path):
    labels = embed_labels(random_table(16, 0), ["joy", "awe"], "{emotion}: é")
    labels.save(tmp_path / "new" / "l.safetensors")
    again = LabelEmbeddings.load(tmp_path / "new" / "l.safetensors")
    assert torch.equal(again.vectors, labels.vectors)
    assert replace(again, vectors=labels.vectors) == labels
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["l.safetensors"]


@pytest.mark.parametrize("content", [None, b"", b"x" * 100])
def test_a_broken_file_is_one_clear_line(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "l.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="is not a file of label embeddings"):
        LabelEmbeddings.load(tmp_path / "l.safetensors")


def test_words_are_added_from_the_same_table_only():
    labels = embed_labels(random_table(16, 0), ["joy", "awe"], "word")
    more = embed_labels(random_table(16, 0), ["boredom", "joy"], "word")
    extended = labels.extended(more)
    assert extended.words == ("joy", "awe", "boredom")
    assert torch.equal(extended.vectors, torch.cat([labels.vectors, more.vectors[:1]]))
    assert labels.extended(labels) is labels
    with pytest.raises(DataError, match="llm_revision is 'seed-0' here and 'seed-1' there"):
        labels.extended(embed_labels(random_table(16, 1), ["boredom"], "word"))
    with pytest.raises(DataError, match="template is 'word' here and 'image' there"):
        labels.extended(embed_labels(random_table(16, 0), ["boredom"], "image"))


def test_a_word_without_tokens_is_an_error():
    with pytest.raises(DataError, match="label '' has no token"):
        embed_labels(random_table(16, 0), ["joy", " "], "word")


@pytest.mark.parametrize(
    "values",
    [{"llm": "gpt"}, {"template": "photo"}, {"synonyms_probability": 1.5}, {"taxonomy": "plutchik"}, {"colour": 1}],
)
def test_the_config_refuses_what_it_cannot_use(values: dict[str, object]):
    with pytest.raises(ValidationError, match=next(iter(values))):
        LabelConfig.model_validate(values)
