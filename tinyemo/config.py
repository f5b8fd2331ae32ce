"""The base of every configuration section, and the sections of the projector. Without torch, so that a recipe is read,
and what is wrong in it said, at once."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from tinyemo.errors import ConfigError
from tinyemo.families import FAMILY
from tinyemo.taxonomies import Taxonomy, TaxonomyChoice, find_taxonomy, render


class Section(BaseModel):
    """A frozen pydantic model that forbids unknown keys; one TOML table of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class ProjectorConfig(Section):
    """Shape of the projector."""

    encoder_width: Literal[512, 768, 1024, 1152, 1280] = 768
    """Width of the pooled image features: CLIP B/16, CLIP L/14, DINOv2-L, SigLIP so400m, EfficientNet-Lite0."""
    encoder: str = ""
    """Name, or name@revision, of the encoder whose features it takes; others are refused. Empty: any of that width."""
    hidden_size: PositiveInt = 576
    """Width of the language model's input embeddings."""
    hidden_width: PositiveInt | None = None
    """Width of the hidden layer; none takes hidden_size, as published."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Probability that a hidden unit is dropped in training."""
    normalize_features: bool = False
    """Whether image features are L2-normalised on the way in; the published projector takes them as they come."""


class LabelConfig(Section):
    """Words that are the labels, and the text and the language model that represent them."""

    llm: str = "smollm2-135m"
    """Name in the family whose input embeddings are the labels' space."""
    llm_weights: Literal["real", "random"] = "real"
    """real: the language model's own table; random: a seeded one of the same width, and every result says so."""
    template: str = "word"
    """word, emotion, image, scene, or a text with {emotion} in it."""
    taxonomy: TaxonomyChoice | None = None
    """Labels that are told apart: ekman, mikels, parrott, or a TOML or JSON file with words, synonyms and maps to other
    taxonomies. Left out: those of the data set."""
    words: tuple[str, ...] = ()
    """Labels of your own, at least two, in place of a taxonomy."""
    synonyms_probability: float = Field(0.0, ge=0, le=1)
    """Chance that a training sample's label text is swapped for one of its synonyms (published: 0.5 or none)."""
    taxonomy_augmentation: float = Field(0.0, ge=0, le=1)
    """Chance that a training sample's label text is swapped for its label in another taxonomy, where there is one."""
    seed: int = Field(0, ge=0)
    """Seed of the random table."""

    @field_validator("llm")
    @classmethod
    def _is_in_family(cls, value: str) -> str:
        if value not in FAMILY:
            raise ValueError(f"must be one of {', '.join(FAMILY)}")
        return value

    @model_validator(mode="after")
    def _check_words(self) -> Self:
        if self.words and self.taxonomy is not None:
            raise ValueError("labels.words: goes in place of labels.taxonomy, not beside it")
        if self.words:
            try:
                find_taxonomy(self.words)
            except ConfigError as error:
                raise ValueError(f"labels.words: {error}") from error
        return self

    def resolved(self, default: Taxonomy) -> Taxonomy:
        """Return the taxonomy that these fields choose, or `default` where they choose none."""
        return find_taxonomy(self.words) if self.words else self.taxonomy or default

    @field_validator("template")
    @classmethod
    def _is_template(cls, value: str) -> str:
        try:
            render(value, "joy")
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return value


PUBLISHED_TEMPERATURES = {"nt_xent": 0.07, "info_nce": 0.1, "prototype": 0.07}
"""By loss; prototype's is ours."""


class LossConfig(Section):
    """Loss that trains the projector, and its parameters."""

    name: Literal["cosine", "nt_xent", "info_nce", "prototype"] = "nt_xent"
    """cosine, nt_xent and info_nce are published; prototype is a softmax over all labels of the taxonomy."""
    temperature: PositiveFloat | None = None
    """Divides cosines; none takes the published value of the loss. The cosine loss has no temperature."""
    margin: float = Field(0.5, ge=-1, le=1)
    """Margin of the cosine loss, in cosines; it acts on negative pairs alone, and the published loss has none."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that the prototype loss spreads over all labels."""
    mixup_alpha: float = Field(0.0, ge=0)
    """Both parameters of the Beta distribution that mixes each sample's features with another's (arXiv 1710.09412);
    0 mixes none. One weight for a step."""
