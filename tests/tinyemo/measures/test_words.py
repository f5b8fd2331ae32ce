"""Nearest words and the words that separate groups."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.planted_bias import plant
from tinyemo.measures.association import unit
from tinyemo.measures.words import (
    Vocabulary,
    find_separating_words,
    log_odds,
    matched_rows,
    nearest_words,
    words_of_labels,
)


def vocabulary(seed: int = 0, size: int = 300) -> Vocabulary:
    vectors = unit(np.random.default_rng(seed).normal(size=(size, 16))).astype(np.float32)
    return Vocabulary(tuple(f"w{n}" for n in range(size)), vectors)


def test_nearest_words_are_those_of_a_full_sort() -> None:
    words = vocabulary()
    embeds = np.random.default_rng(1).normal(size=(700, 16)).astype(np.float32)
    reference = np.argsort(-(embeds @ words.vectors.T), axis=1)[:, :5]
    assert (nearest_words(embeds, words, 5) == reference).all()


def test_log_odds_are_those_of_monroe() -> None:
    """Their equations 15, 19, 20 and 22, word by word."""
    first, second, prior = np.array([30, 5, 2, 63]), np.array([10, 25, 1, 64]), np.array([2.0, 1.5, 0.5, 6.0])
    found = log_odds(first, second, prior, min_uses=4)
    assert found.words.tolist() == [0, 1, 3]
    for row, word in enumerate(found.words):
        odds = [(uses[word] + prior[word]) / (uses.sum() + 10 - uses[word] - prior[word]) for uses in (first, second)]
        delta = np.log(odds[0]) - np.log(odds[1])
        variance = 1 / (first[word] + prior[word]) + 1 / (second[word] + prior[word])
        assert found.log_odds[row] == pytest.approx(delta, abs=1e-12)
        assert found.z[row] == pytest.approx(delta / np.sqrt(variance), abs=1e-12)


def test_the_words_of_a_label_lead_with_the_label_word() -> None:
    planted = plant("none", seed=0, num_images=800)
    near = nearest_words(unit(planted.data.embeds), planted.vocabulary)
    found = words_of_labels(near, planted.data.label, planted.data.labels, planted.vocabulary)
    assert all(rows[0]["word"] == label for label, rows in found.items())


def test_matched_images_have_the_same_labels_and_one_of_each_author() -> None:
    data = plant("none", seed=0, images_per_author=4).data
    south = data.groups["country"].codes == 1
    first, second = matched_rows(data, south, ~south, data.label, 0)
    assert (np.bincount(data.label[first]) == np.bincount(data.label[second])).all()
    assert len(np.unique(data.clusters[first])) == len(first)


def test_a_word_that_only_one_group_is_near_is_named() -> None:
    planted = plant("none", seed=3)
    south = planted.data.groups["country"].codes == 1
    moved = planted.data.embeds + 2.0 * south[:, None] * planted.vocabulary.vectors[100]
    near = nearest_words(unit(moved), planted.vocabulary)
    [found] = find_separating_words(planted.data, "country", near, planted.vocabulary)
    assert found.p < 1e-20
    assert found.details["words"][0]["word"] == planted.vocabulary.words[100]
    assert found.details["words"][0]["log_odds"] < 0  # north is the first group
