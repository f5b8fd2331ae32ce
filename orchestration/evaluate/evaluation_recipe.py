"""The recipe of `tinyemo evaluate`: which models, which data with which labels, and what they are compared with."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from orchestration.recipe.recipe import read_recipe
from tinyemo.config import Section
from tinyemo.errors import ConfigError
from tinyemo.taxonomies import TaxonomyChoice, canonical_word, render

NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"


class EvaluatedData(Section):
    """One data set with one set of labels."""

    dataset: str
    """Feature data set in S3, data set of images in S3 (encoded first), or a local Parquet file of features."""
    split: str = "test"
    """Split of a data set in S3; `*` takes all of them."""
    taxonomy: TaxonomyChoice | None = None
    """Labels to tell apart. Labels of the data set are mapped to it; rows whose label has no image are left out.
    Not set: the data set's own."""
    words: tuple[str, ...] = ()
    """Labels of your own in place of a taxonomy; rows with another label are left out."""
    only_left_out: bool = False
    """Whether to tell apart only the labels that were left out of the model's training, on their rows."""
    groups: str | None = None
    """Table (.csv, .tsv or .parquet; local, in S3, or asset:NAME/FILE) with a column `id` or `image` and columns of
    groups, which join the table of scores."""
    cluster_by: str | None = None
    """Column of groups whose rows are not independent, for instance theme or author; intervals are clustered by it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.words and self.taxonomy is not None:
            problems.append("words: go in place of taxonomy, not beside it")
        if self.words and len({canonical_word(word) for word in self.words}) < 2:
            problems.append("words: at least 2")
        if self.cluster_by and not self.groups:
            problems.append("cluster_by: names a column of groups, so groups must name a table")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class TrainData(Section):
    """Data that a model was trained on, to look for in the test data."""

    dataset: str
    """Feature data set in S3, or a local Parquet file of features."""
    splits: tuple[str, ...] = ("train", "validation", "val", "dev")
    """Splits that training or the choice of the best epoch read; those that the data set lacks are passed over."""


class LeakageConfig(Section):
    """When a test image counts as seen in training."""

    near_cosine: float = Field(0.99, gt=0, le=1)
    """Cosine of two feature vectors from which on they are nearly identical."""
    near_bits: int = Field(4, ge=-1, le=11)
    """Bits in which the 64-bit perceptual hashes of two images may differ; -1 compares no images."""
    max_pairs: PositiveFloat = 2e10
    """Most pairs of feature vectors to compare; of more test rows an even share is, and the result says so."""
    num_findings: PositiveInt = 100
    """Findings of a data set that are listed; all are counted."""


class PublishedFigure(Section):
    """A figure that was not measured here."""

    system: str
    data: str
    """Name of the entry in `data` that it belongs to, or of a data set that is not evaluated."""
    metric: str = "top1_accuracy"
    value: float = Field(ge=0, le=1)
    """A share, in [0, 1]."""
    source: str
    """Where it was published, and how its data differs."""


class EvaluationRecipe(Section):
    """One evaluation of one or more projectors."""

    name: str = Field(pattern=NAME)
    """Name of the evaluation: its folder below each model's run."""
    experiment: str = "tinyemo"
    """MLflow experiment."""
    models: tuple[str, ...] = ()
    """Projectors: folder, s3://..., models:/NAME@champion, runs:/RUN/projector, or the name of a run."""
    baseline: str | None = None
    """Projector that every model is compared with, image by image."""
    data: dict[Annotated[str, Field(pattern=NAME)], EvaluatedData]
    """What the models are evaluated on, by name."""
    train: tuple[TrainData, ...] = ()
    """Data that the models were trained on; not set: the data set that a model's card names."""
    templates: tuple[str, ...] = ()
    """Label templates whose texts are averaged: word, emotion, image, scene, spaced, or texts with {emotion}. Not set:
    the template that a model was trained with."""
    has_synonyms: bool = False
    """Whether the synonyms of a label are averaged with it."""
    top_ks: tuple[PositiveInt, ...] = (2,)
    """k of top-k accuracy."""
    temperature: PositiveFloat | None = None
    """Divides cosines before the softmax whose calibration is measured; not set: that of the loss in a model's card."""
    num_resamples: PositiveInt = 1000
    """Resamples of the bootstrap."""
    level: float = Field(0.95, gt=0.5, lt=1)
    """Of the intervals."""
    seed: int = Field(0, ge=0)
    """Of the resamples."""
    leakage: LeakageConfig = LeakageConfig()
    published: tuple[PublishedFigure, ...] = ()
    """Figures of others, shown apart."""

    @field_validator("templates")
    @classmethod
    def _are_templates(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        try:
            for value in values:
                render(value, "joy")
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return values

    @field_validator("data")
    @classmethod
    def _is_not_empty(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not value:
            raise ValueError("names no data: give at least one table [data.NAME]")
        return value


def load_evaluation(name_or_path: str, overrides: list[str] | None = None) -> EvaluationRecipe:
    """Read the recipe of an evaluation, lay `--set` over it and validate the result.

    Raises:
        ConfigError: lists all errors, one line per field.
    """
    required = {"name": "unnamed", "data": {"unnamed": {"dataset": "unnamed"}}}
    return read_recipe(EvaluationRecipe, name_or_path, overrides, required=required)
