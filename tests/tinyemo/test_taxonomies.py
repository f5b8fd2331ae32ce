"""Words, ids, maps and templates."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyemo.errors import ConfigError, DataError
from tinyemo.taxonomies import (
    ALIASES,
    LABELS,
    TAXONOMIES,
    TEMPLATES,
    canonical_label,
    label_id,
    map_label,
    render,
    synonyms,
    taxonomy_labels,
)


def test_the_taxonomies_have_the_published_sizes_and_are_sorted():
    assert {name: len(words) for name, words in TAXONOMIES.items()} == {"ekman": 6, "mikels": 8, "parrott": 25}
    for words in TAXONOMIES.values():
        assert list(words) == sorted(set(words))


def test_every_word_has_one_global_id():
    assert len(LABELS) == 31
    assert [label_id(word) for word in LABELS] == list(range(31))
    for words in TAXONOMIES.values():
        assert set(words) <= set(LABELS)


@pytest.mark.parametrize(("alias", "word"), ALIASES.items())
def test_the_misspellings_of_webemo_are_read_and_never_used(alias: str, word: str):
    assert canonical_label(alias) == word
    assert label_id(alias) == label_id(word)
    assert alias not in LABELS
    assert len(synonyms(alias)) == 3
    assert map_label(alias, "parrott", "ekman") == map_label(word, "parrott", "ekman")


@given(st.sampled_from(LABELS), st.sampled_from(["", " ", "\t"]), st.booleans())
@settings(deadline=None)
def test_case_and_blanks_do_not_matter(word: str, blank: str, is_upper: bool):
    assert canonical_label(blank + (word.upper() if is_upper else word) + blank) == word


@given(st.text())
@settings(deadline=None)
def test_any_text_is_a_label_or_a_data_error(text: str):
    if text.strip().lower() in {*LABELS, *ALIASES}:
        assert LABELS[label_id(text)] == canonical_label(text)
    else:
        with pytest.raises(DataError, match="unknown label"):
            label_id(text)


@pytest.mark.parametrize(("source", "target"), itertools.product(TAXONOMIES, TAXONOMIES))
def test_maps_are_total_and_land_in_the_target(source: str, target: str):
    for word in taxonomy_labels(source):
        image = map_label(word, source, target)
        assert image is None or image in taxonomy_labels(target)
        if source == target:
            assert image == word


@pytest.mark.parametrize("target", ["ekman", "mikels"])
def test_only_confusion_and_lust_have_no_coarser_label(target: str):
    without = {word for word in TAXONOMIES["parrott"] if map_label(word, "parrott", target) is None}
    assert without == {"confusion", "lust"}


def test_from_parrott_over_mikels_to_ekman_is_the_direct_way():
    for word in TAXONOMIES["parrott"]:
        between = map_label(word, "parrott", "mikels")
        if between is not None:
            assert map_label(between, "mikels", "ekman") == map_label(word, "parrott", "ekman")


@pytest.mark.parametrize(
    ("word", "source", "target", "expected"),
    [
        ("enthrallment", "parrott", "mikels", "awe"),
        ("surprise", "parrott", "mikels", "awe"),
        ("pride", "parrott", "ekman", "joy"),
        ("awe", "mikels", "ekman", "surprise"),
        ("excitement", "mikels", "ekman", "joy"),
        ("joy", "ekman", "mikels", None),
        ("surprise", "ekman", "mikels", "awe"),
        ("sadness", "ekman", "parrott", None),
        ("amusement", "mikels", "parrott", "cheerfulness"),
    ],
)
def test_maps_by_table(word: str, source: str, target: str, expected: str | None):
    assert map_label(word, source, target) == expected


def test_each_parrott_label_has_three_synonyms_and_no_other_word_has_any():
    for word in LABELS:
        assert len(set(synonyms(word))) == (3 if word in TAXONOMIES["parrott"] else 0)


def test_unknown_names_are_errors_of_ours():
    with pytest.raises(ConfigError, match="unknown taxonomy 'plutchik'"):
        taxonomy_labels("plutchik")
    with pytest.raises(ConfigError, match="unknown taxonomy"):
        map_label("joy", "ekman", "plutchik")
    with pytest.raises(DataError, match="'awe' is not a label of ekman"):
        map_label("awe", "ekman", "mikels")
    with pytest.raises(ConfigError, match="unknown label template 'photo'"):
        render("photo", "joy")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("word", "joy"),
        ("emotion", "joy emotion"),
        ("image", "an image expressing joy emotion"),
        ("scene", "a scene evoking joy to viewers"),
        ("spaced", " joy"),
        ("{emotion}, {other}", "joy, {other}"),
    ],
)
def test_templates_render(template: str, text: str):
    assert render(template, "joy") == text


def test_every_template_holds_the_word():
    assert all("{emotion}" in text for text in TEMPLATES.values())
