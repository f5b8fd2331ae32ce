"""A reasoning model's recipe, checked against its parts and the manifests of its data before a worker starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from orchestration.assets.models import Sources, describe_sources, tokenizer_source
from orchestration.data.sets import open_record_set
from orchestration.data.stream import NO_DATASET, Stream, plan_records
from orchestration.recipe import Recipe
from orchestration.recipe.sections import StageConfig
from tinyemo.encoders import EncoderSpec, count_image_tokens
from tinyemo.errors import ConfigError, DataError
from tinyemo.tokenizer_files import open_tokenizer

EVALUATION_BATCH = 16
"""Records that a rank measures together."""


@dataclass(frozen=True)
class ReasoningPlan:
    """A reasoning model's recipe and the records that it reads.

    Attributes:
        sources: of the model's parts.
        stages: records of each stage, by its name, in order.
        validation: records that each stage is measured on after an epoch; None where the data have no such split.
        test: records of the evaluation, read once; None likewise.
    """

    recipe: Recipe
    sources: Sources
    stages: dict[str, Stream]
    validation: Stream | None
    test: Stream | None

    def data_digests(self) -> dict[str, str]:
        """Return the digests of what every stage reads, by stage, place in its list and data set's name."""
        return {
            f"{stage}/{place}/{part.manifest.name}": part.manifest.digest
            for stage, plan in self.stages.items()
            for place, part in enumerate(plan.sets)
        }

    def facts(self) -> dict[str, Any]:
        """Return what a dry run shows."""
        sources = self.sources
        return {
            "llm": f"{sources.llm_name} ({sources.llm_weights} weights)",
            "vision_tower": str(sources.encoder.info),
            "image_tokens": sources.image_tokens,
            "optimizer_steps": {name: stage.num_steps for name, stage in self.stages.items()},
            "records_per_epoch": {name: stage.plan.samples_per_epoch for name, stage in self.stages.items()},
            "validation_records": self.validation.num_records if self.validation else 0,
            "test_records": self.test.num_records if self.test else 0,
        }

    @property
    def template(self) -> str:
        """Chat template of the last stage, which the exported model is asked in."""
        return list(self.recipe.stages.values())[-1].template or self.recipe.records.template

    @property
    def answers(self) -> str:
        """The kind of answers that the model learns: "templates" where a manifest says so."""
        kinds = {
            str(part.manifest.rules.get("answers", part.manifest.data))
            for records in self.stages.values()
            for part in records.sets
        }
        return ",".join(sorted(kinds))


def prepare_reasoning(recipe: Recipe) -> ReasoningPlan:
    """Return the plans of a recipe's stages; manifests are read, no shard is and no worker started.

    Raises:
        ConfigError: everything that does not fit together, one line per field.
        StorageError: S3 cannot be read.
    """
    sources = describe_sources(recipe)
    problems = _vocabulary_problems(recipe, sources)
    plans: dict[str, Stream] = {}
    for name, stage in recipe.stages.items():
        try:
            plans[name] = _plan_stage(recipe, name, stage, sources.encoder)
        except (ConfigError, DataError) as error:
            problems.append(f"stages.{name}: {error}")
    if problems:
        raise ConfigError(
            f"{recipe.name}: {len(problems)} error{'s' * (len(problems) > 1)}\n" + "\n".join(f"  {p}" for p in problems)
        )
    last = list(recipe.stages)[-1]
    validation, test = (
        plans[last].held_out(split, EVALUATION_BATCH)
        for split in (recipe.evaluation.validation, recipe.evaluation.test)
    )
    return ReasoningPlan(recipe, sources, plans, validation, test)


def _vocabulary_problems(recipe: Recipe, sources: Sources) -> list[str]:
    if not recipe.records.tokenizer:
        return ["records.tokenizer: is empty; a language model needs its tokenizer"]
    if sources.vocabulary is None:
        return []
    found = open_tokenizer(tokenizer_source(recipe.records.tokenizer)).get_vocab_size()
    if found <= sources.vocabulary:
        return []
    return [
        f"records.tokenizer: {recipe.records.tokenizer} has {found} tokens and reasoner.llm {recipe.reasoner.llm} "
        f"embeddings for {sources.vocabulary}; name the tokenizer of that language model"
    ]


def _plan_stage(recipe: Recipe, name: str, stage: StageConfig, encoder: EncoderSpec) -> Stream:
    config = recipe.records.model_copy(
        update={
            "datasets": stage.datasets or recipe.records.datasets,
            "template": stage.template or recipe.records.template,
        }
    )
    if not config.datasets:
        raise ConfigError(NO_DATASET)
    plan = plan_records(
        tuple(open_record_set(uri, config.split, "instruct") for uri in config.datasets),
        config,
        # Each stage has its own order.
        seed=recipe.train.seed + list(recipe.stages).index(name),
        global_batch_size=stage.global_batch_size,
        num_epochs=stage.num_epochs,
        world_size=recipe.workers.num_workers,
        preprocessing=encoder.preprocessing,
        image_tokens=count_image_tokens(encoder, recipe.reasoner.image_grid),
    )
    return replace(plan, plan=replace(plan.plan, max_steps=stage.num_steps or max(1, plan.num_steps)))
