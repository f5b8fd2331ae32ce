"""Emotion words: three taxonomies, one global id per word, maps between them, synonyms and label templates.

Words, the maps from Parrott to the others, and synonyms come from the published work (arXiv 2410.07062;
taxonomies.json). The other maps are derived from those. WEBEmo spells two words in its own way; both spellings are
read, one is used.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from tinyemo.errors import ConfigError, DataError

ALIASES: dict[str, str] = {"cheerfullness": "cheerfulness", "irritabilty": "irritability"}
"""Spellings that are accepted on input, with the one that is used."""

TEMPLATES: dict[str, str] = {
    "word": "{emotion}",
    "emotion": "{emotion} emotion",
    "image": "an image expressing {emotion} emotion",
    "scene": "a scene evoking {emotion} to viewers",
    "spaced": " {emotion}",
}
"""Texts for a label by the name that a recipe gives: the published ones and `spaced`, ours.

With SmolLM2 a bare `sadness` is the tokens s, ad, ness; with a space before it, a single one. Of Parrott's 75 synonyms
27 then lie nearest to their own label, and 9 without it, so `spaced` suits words unseen in training. But the six Ekman
labels draw closer together: trained on Emotion6 the bare word is better with the cosine loss (73.9 against 72.8 % of
306 test images, mean of 20 seeds) and the same within noise with NT-Xent (73.0, 73.2) and InfoNCE (73.7, 73.7).
"""

_FACTS: dict[str, Any] = json.loads(files("tinyemo").joinpath("taxonomies.json").read_text(encoding="utf-8"))


def canonical_word(word: str) -> str:
    """`word` stripped, in lower case, aliases replaced; it need not be a label."""
    word = word.strip().lower()
    return ALIASES.get(word, word)


TAXONOMIES: dict[str, tuple[str, ...]] = {
    name: tuple(sorted(canonical_word(word) for word in _FACTS[name])) for name in ("ekman", "mikels", "parrott")
}
"""Labels of each taxonomy in canonical spelling, sorted."""

LABELS: tuple[str, ...] = tuple(sorted({word for words in TAXONOMIES.values() for word in words}))
"""Every label of every taxonomy once, sorted; a label's place is its global id."""

_LABEL_IDS = {word: index for index, word in enumerate(LABELS)}
_FROM_PARROTT: dict[str, dict[str, str | None]] = {
    "parrott": {word: word for word in TAXONOMIES["parrott"]},
    "ekman": {canonical_word(word): image for word, image in _FACTS["parrott_to_ekman"].items()},
    "mikels": {canonical_word(word): image for word, image in _FACTS["parrott_to_mikels"].items()},
}
_SYNONYMS = {canonical_word(word): tuple(texts) for word, texts in _FACTS["parrott_synonyms"].items()}


def canonical_label(word: str) -> str:
    """The label in the spelling that is used everywhere.

    Raises:
        DataError: no taxonomy has this word.
    """
    label = canonical_word(word)
    if label not in _LABEL_IDS:
        raise DataError(f"unknown label {word!r}: it must be one of {', '.join(LABELS)}")
    return label


def label_id(word: str) -> int:
    """The one global id of a label, in [0, len(LABELS)); aliases are accepted.

    Raises:
        DataError: no taxonomy has this word.
    """
    return _LABEL_IDS[canonical_label(word)]


def taxonomy_labels(name: str) -> tuple[str, ...]:
    """The labels of a taxonomy, sorted.

    Raises:
        ConfigError: there is no taxonomy of that name.
    """
    if name not in TAXONOMIES:
        raise ConfigError(f"unknown taxonomy {name!r}: it must be one of {', '.join(TAXONOMIES)}")
    return TAXONOMIES[name]


def map_label(word: str, source: str, target: str) -> str | None:
    """The label of taxonomy `target` that stands for `word` of taxonomy `source`, None where there is no single one.

    From Parrott as published. Between the others ours, derived: the target label that all Parrott words under `word`
    share, so joy has no Mikels label (amusement, contentment and excitement all lie under it) while awe becomes
    surprise.

    Raises:
        ConfigError: there is no taxonomy of that name.
        DataError: `word` is not a label of `source`.
    """
    label = canonical_word(word)
    if label not in taxonomy_labels(source):
        raise DataError(f"{word!r} is not a label of {source}: it must be one of {', '.join(TAXONOMIES[source])}")
    taxonomy_labels(target)
    if source == target:
        return label
    under = [parrott for parrott, image in _FROM_PARROTT[source].items() if image == label]
    images = {_FROM_PARROTT[target][parrott] for parrott in under}
    return images.pop() if len(images) == 1 else None


def synonyms(word: str) -> tuple[str, ...]:
    """The three published synonyms of a Parrott label; none for any other word."""
    return _SYNONYMS.get(canonical_word(word), ())


def render(template: str, emotion: str) -> str:
    """The text of a label.

    Args:
        template: a name in TEMPLATES, or a text that holds `{emotion}`.
        emotion: the word that takes its place.

    Raises:
        ConfigError: neither a known name nor a text with `{emotion}` in it.
    """
    text = TEMPLATES.get(template, template)
    if "{emotion}" not in text:
        raise ConfigError(
            f"unknown label template {template!r}: it must be one of {', '.join(TEMPLATES)}, or a text with {{emotion}}"
        )
    return text.replace("{emotion}", emotion)
