"""Words, ids, maps and templates."""

from __future__ import annotations

import itertools
import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tinyemo.config import LabelConfig
from tinyemo.errors import ConfigError
from tinyemo.taxonomies import ALIASES, TAXONOMIES, TEMPLATES, describe_taxonomy, find_taxonomy, render

LABELS = sorted({word for taxonomy in TAXONOMIES.values() for word in taxonomy.words})


def test_the_taxonomies_have_the_published_sizes_and_are_sorted():
    sizes = {name: len(taxonomy.words) for name, taxonomy in TAXONOMIES.items()}
    assert sizes == {"ekman": 6, "mikels": 8, "parrott": 25}
    for taxonomy in TAXONOMIES.values():
        assert list(taxonomy.words) == sorted(set(taxonomy.words))
    assert len(LABELS) == 31


@pytest.mark.parametrize(("alias", "word"), ALIASES.items())
def test_the_misspellings_of_webemo_are_read_and_never_used(alias: str, word: str):
    assert TAXONOMIES["parrott"].label(alias) == word
    assert alias not in LABELS
    assert len(TAXONOMIES["parrott"].synonyms[word]) == 3


@given(st.sampled_from(list(TAXONOMIES)), st.data(), st.sampled_from(["", " ", "\t"]), st.booleans())
@settings(deadline=None)
def test_case_and_blanks_do_not_matter(name: str, data: st.DataObject, blank: str, is_upper: bool):
    word = data.draw(st.sampled_from(TAXONOMIES[name].words))
    assert TAXONOMIES[name].label(blank + (word.upper() if is_upper else word) + blank) == word


@given(st.text())
@settings(deadline=None)
def test_any_text_is_a_label_a_synonym_of_one_or_none(text: str):
    for taxonomy in TAXONOMIES.values():
        label = taxonomy.label(text)
        assert label is None or label in taxonomy.words
        assert (label is not None) >= (text.strip().lower() in taxonomy.words)


def test_a_synonym_of_two_labels_stands_for_none():
    parrott = TAXONOMIES["parrott"]
    assert parrott.label("serenity") == "contentment"
    assert parrott.label("love") is None  # of affection and of lust
    assert parrott.label("joy") == "cheerfulness"
    assert TAXONOMIES["ekman"].label("joy") == "joy"


@pytest.mark.parametrize(("source", "target"), itertools.permutations(TAXONOMIES, 2))
def test_maps_land_in_the_target(source: str, target: str):
    mapping = TAXONOMIES[source].maps[target]
    assert set(mapping) <= set(TAXONOMIES[source].words)
    assert set(mapping.values()) <= set(TAXONOMIES[target].words)


@pytest.mark.parametrize("target", ["ekman", "mikels"])
def test_only_confusion_and_lust_have_no_coarser_label(target: str):
    parrott = TAXONOMIES["parrott"]
    assert set(parrott.words) - parrott.maps[target].keys() == {"confusion", "lust"}


def test_from_parrott_over_mikels_to_ekman_is_the_direct_way():
    parrott, mikels = TAXONOMIES["parrott"], TAXONOMIES["mikels"]
    for word, between in parrott.maps["mikels"].items():
        assert mikels.maps["ekman"][between] == parrott.maps["ekman"][word]


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
    assert TAXONOMIES[source].maps[target].get(word) == expected


def test_each_parrott_label_has_three_synonyms_and_no_other_word_has_any():
    for taxonomy in TAXONOMIES.values():
        for word in taxonomy.words:
            assert len(set(taxonomy.synonyms.get(word, ()))) == (3 if word in TAXONOMIES["parrott"].words else 0)


# Labels of one's own

OWN_TOML = """
words = ["Calm", "stressed out"]
[synonyms]
calm = ["relaxed"]
[maps.ekman]
"stressed out" = "Fear"
"""


def test_words_of_ones_own_are_a_taxonomy():
    taxonomy = find_taxonomy(["Happy ", "sad"])
    assert (taxonomy.words, taxonomy.label("HAPPY")) == (("happy", "sad"), "happy")
    assert find_taxonomy(describe_taxonomy(taxonomy)) == taxonomy
    assert describe_taxonomy(TAXONOMIES["ekman"]) == "ekman"


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_a_taxonomy_comes_from_a_file(kind: str, tmp_path: Path):
    path = tmp_path / f"mood.{kind}"
    path.write_text(OWN_TOML if kind == "toml" else json.dumps(tomllib.loads(OWN_TOML)))
    taxonomy = find_taxonomy(path)
    assert taxonomy == find_taxonomy(str(path)) == find_taxonomy(describe_taxonomy(taxonomy))
    assert (taxonomy.name, taxonomy.words) == ("mood", ("calm", "stressed out"))
    assert taxonomy.label("Relaxed") == "calm"
    assert taxonomy.maps == {"ekman": {"stressed out": "fear"}}
    assert taxonomy.all_words() == ("calm", "stressed out", "relaxed", "fear")
    assert LabelConfig(taxonomy=path).resolved(TAXONOMIES["ekman"]) == taxonomy
    assert LabelConfig.model_validate(LabelConfig(taxonomy=path).model_dump(mode="json")).taxonomy == taxonomy


def test_a_recipe_names_words_or_a_taxonomy_or_leaves_both_to_the_data_set():
    mikels = TAXONOMIES["mikels"]
    assert LabelConfig().resolved(mikels) == mikels
    assert LabelConfig(taxonomy="ekman").resolved(mikels) == TAXONOMIES["ekman"]
    assert LabelConfig(words=("happy", "sad")).resolved(mikels).words == ("happy", "sad")
    with pytest.raises(ValidationError, match=r"goes in place of labels\.taxonomy"):
        LabelConfig(words=("happy", "sad"), taxonomy="ekman")
    with pytest.raises(ValidationError, match=r"labels\.words: taxonomy: words: at least 2"):
        LabelConfig(words=("happy", "Happy"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"words": ["joy"]}, "at least 2"),
        ({"words": ["joy", "a, b"]}, r"word 'a, b'"),
        ({"words": ["joy", " "]}, "word ''"),
        ({"words": ["joy", "awe"], "synonyms": {"fear": ["fright"]}}, "synonyms: fear not among words"),
        ({"words": ["joy", "awe"], "maps": {"ekman": {"fear": "fear"}}}, r"maps\.ekman: fear not among words"),
        ({"words": "joy"}, "words"),
        ({"labels": ["joy"]}, "labels"),
        ([], "is a table with `words`"),
    ],
)
def test_a_broken_taxonomy_file_is_one_line_that_names_the_place(content: object, message: str, tmp_path: Path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message) as caught:
        find_taxonomy(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_unknown_names_are_errors_of_ours(tmp_path: Path):
    with pytest.raises(ConfigError, match="unknown taxonomy 'plutchik'"):
        find_taxonomy("plutchik")
    with pytest.raises(ConfigError, match="cannot be read"):
        find_taxonomy(tmp_path / "none.toml")
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
