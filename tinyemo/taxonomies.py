"""Emotion words: taxonomies with their synonyms and maps to each other, and the texts that stand for a label.

Three taxonomies are built in: ekman, mikels and parrott. Their words, the maps from Parrott to the other two, and the
synonyms come from the published work (arXiv 2410.07062; taxonomies.json); the other maps are derived from those. A
taxonomy of one's own is a list of words, or a TOML or JSON file with the fields of `Taxonomy`.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from tinyemo.errors import ConfigError

ALIASES: dict[str, str] = {"cheerfullness": "cheerfulness", "irritabilty": "irritability"}
"""WEBEmo's spellings of two words, and the spellings that are used here."""

TEMPLATES: dict[str, str] = {
    "word": "{emotion}",
    "emotion": "{emotion} emotion",
    "image": "an image expressing {emotion} emotion",
    "scene": "a scene evoking {emotion} to viewers",
    "spaced": " {emotion}",
}
"""Texts for a label by the name that a recipe gives: the published ones and `spaced`, which this project adds.

With SmolLM2 a bare `sadness` is the tokens s, ad, ness; with a space before it, a single one. Of Parrott's 75 synonyms
27 then lie nearest to their own label, and 9 without it, so `spaced` suits words unseen in training. But the six Ekman
labels draw closer together: trained on Emotion6 the bare word is better with the cosine loss (73.9 against 72.8 % of
306 test images, mean of 20 seeds) and the same within noise with NT-Xent (73.0, 73.2) and InfoNCE (73.7, 73.7).
"""

OWN_WORDS = "own words"
"""Name of a taxonomy that was given as a list of words."""
_WORD = re.compile(r"[^\s,\[\]\"'`][^,\[\]\"`\n\r\t]*")


def canonical_word(word: str) -> str:
    """Return `word` stripped, in lower case and with aliases replaced; it need not be a label."""
    word = word.strip().lower()
    return ALIASES.get(word, word)


Word = Annotated[str, AfterValidator(canonical_word)]


class Taxonomy(BaseModel):
    """The labels that are told apart, with what is known of each. Words are brought into canonical spelling."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = OWN_WORDS
    words: tuple[Word, ...]
    """Labels; a label's place here is its number."""
    synonyms: dict[Word, tuple[Word, ...]] = {}
    """Label -> other words for it."""
    maps: dict[str, dict[Word, Word]] = {}
    """Name of another taxonomy -> label -> the other taxonomy's label that stands for it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = [
            f"word {word!r}: use letters, digits, spaces and dashes" for word in self.words if not _WORD.fullmatch(word)
        ]
        if len(set(self.words)) < len(self.words) or len(self.words) < 2:
            problems.append("words: at least 2, and none twice")
        fields = {"synonyms": set(self.synonyms), **{f"maps.{name}": set(table) for name, table in self.maps.items()}}
        problems += [
            f"{field}: {', '.join(sorted(labels - set(self.words)))} not among words"
            for field, labels in fields.items()
            if labels - set(self.words)
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def label(self, word: str) -> str | None:
        """Return the label that a word stands for: itself, or the one label that it is a synonym of; else None."""
        word = canonical_word(word)
        if word in self.words:
            return word
        holders = [label for label, texts in self.synonyms.items() if word in texts]
        return holders[0] if len(holders) == 1 else None

    def all_words(self) -> tuple[str, ...]:
        """Return the labels, their synonyms and the labels that they map to, each once."""
        texts = [text for label in self.words for text in self.synonyms.get(label, ())]
        mapped = [label for mapping in self.maps.values() for label in mapping.values()]
        return tuple(dict.fromkeys((*self.words, *texts, *mapped)))


def _built_in() -> dict[str, Taxonomy]:
    facts: dict[str, Any] = json.loads(files("tinyemo").joinpath("taxonomies.json").read_text(encoding="utf-8"))
    words = {name: sorted(canonical_word(word) for word in facts[name]) for name in ("ekman", "mikels", "parrott")}
    synonyms = {canonical_word(word): texts for word, texts in facts["parrott_synonyms"].items()}
    # From each Parrott label to its label in every taxonomy, as published.
    images: dict[str, dict[str, str | None]] = {"parrott": {word: word for word in words["parrott"]}}
    for name in ("ekman", "mikels"):
        images[name] = {canonical_word(word): image for word, image in facts[f"parrott_to_{name}"].items()}

    def mapped(source: str, target: str) -> dict[str, str]:
        """Map a label to the one target label that all Parrott labels under it share.

        So joy has no Mikels label (amusement, contentment and excitement all lie under it) while awe becomes surprise.
        """
        shared = {
            word: {images[target][label] for label, image in images[source].items() if image == word}
            for word in words[source]
        }
        return {word: str(found.pop()) for word, found in shared.items() if len(found) == 1 and None not in found}

    return {
        name: Taxonomy(
            name=name,
            words=tuple(words[name]),
            synonyms={word: tuple(synonyms[word]) for word in words[name] if word in synonyms},
            maps={target: mapped(name, target) for target in words if target != name},
        )
        for name in words
    }


TAXONOMIES: dict[str, Taxonomy] = _built_in()
"""The built-in taxonomies, words sorted."""


def find_taxonomy(choice: Taxonomy | str | Path | dict[str, Any] | Iterable[str]) -> Taxonomy:
    """Return a taxonomy by its name, from a TOML or JSON file, from the fields of one, or from a list of words.

    Raises:
        ConfigError: there is no such taxonomy or file, or something in it is wrong.
    """
    if isinstance(choice, Taxonomy):
        return choice
    source = "taxonomy"
    if isinstance(choice, str | Path):
        if str(choice) in TAXONOMIES:
            return TAXONOMIES[str(choice)]
        source, choice = str(choice), _read_file(Path(choice))
    try:
        return Taxonomy.model_validate(choice if isinstance(choice, dict) else {"words": list(choice)})
    except ValidationError as error:
        found = [
            " ".join(f"{'.'.join(map(str, item['loc']))} {item['msg'].removeprefix('Value error, ')}".split())
            for item in error.errors()
        ]
        raise ConfigError(f"{source}: {'; '.join(found)}") from error


def _read_file(path: Path) -> dict[str, Any]:
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(
            f"unknown taxonomy {str(path)!r}: it must be one of {', '.join(TAXONOMIES)}, or a .toml or .json file"
        )
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the taxonomy cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a taxonomy is a table with `words`, not a {type(content).__name__}")
    return {"name": path.stem, **content}


def describe_taxonomy(taxonomy: Taxonomy) -> str | dict[str, Any]:
    """Return the name of a built-in taxonomy, or the fields of another one; `find_taxonomy` reads both."""
    return taxonomy.name if TAXONOMIES.get(taxonomy.name) == taxonomy else taxonomy.model_dump(mode="json")


def _validated(choice: Any) -> Any:
    try:
        return None if choice is None else find_taxonomy(choice)
    except ConfigError as error:
        raise ValueError(str(error)) from error


TaxonomyChoice = Annotated[Taxonomy, BeforeValidator(_validated), PlainSerializer(describe_taxonomy)]
"""Field of a pydantic model that takes what `find_taxonomy` takes."""


def render(template: str, emotion: str) -> str:
    """Return the text of a label.

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
