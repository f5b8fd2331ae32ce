"""What is known of a run over the reasoning model before a worker starts: every stage's records."""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestration.reasoning.sources import Sources, tokenizer_source
from orchestration.recipe import Recipe
from orchestration.recipe.stage_config import StageConfig
from orchestration.streaming.record_sets import RecordSet, open_record_set
from orchestration.streaming.record_stream import RecordPlan, plan_records
from tinyemo.encoders import EncoderSpec
from tinyemo.errors import ConfigError, DataError
from tinyemo.tokenizer_files import open_tokenizer

EVALUATION_BATCH = 16
"""Records that a rank measures together."""


@dataclass(frozen=True)
class ReasoningPlan:
    """A recipe with what it will read.

    Attributes:
        stages: records of each stage, by its name, in order.
        validation: records that each stage is measured on after an epoch; None where the data have no such split.
        test: records of the evaluation, read once; None likewise.
    """

    recipe: Recipe
    stages: dict[str, RecordPlan]
    validation: RecordPlan | None
    test: RecordPlan | None

    def data_digests(self) -> dict[str, str]:
        """Of what every stage reads, by stage, place in its list and data set's name."""
        return {
            f"{stage}/{place}/{part.manifest.name}": part.manifest.digest
            for stage, plan in self.stages.items()
            for place, part in enumerate(plan.sets)
        }


def prepare_reasoning(recipe: Recipe, sources: Sources) -> ReasoningPlan:
    """The plans of a recipe's stages; manifests are read, no shard is and no worker started.

    Raises:
        ConfigError: all that does not fit together, one line a field.
        StorageError: S3 cannot be read.
    """
    problems = _vocabulary_problems(recipe, sources)
    plans: dict[str, RecordPlan] = {}
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
    held_out = [_plan_held_out(plans[last], split) for split in (recipe.evaluation.validation, recipe.evaluation.test)]
    return ReasoningPlan(recipe, plans, held_out[0], held_out[1])


def _vocabulary_problems(recipe: Recipe, sources: Sources) -> list[str]:
    """Of a tokenizer whose ids the language model has no embeddings for."""
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


def _plan_stage(recipe: Recipe, name: str, stage: StageConfig, encoder: EncoderSpec) -> RecordPlan:
    config = recipe.records.model_copy(
        update={
            "datasets": stage.datasets or recipe.records.datasets,
            "template": stage.template or recipe.records.template,
        }
    )
    if not config.datasets:
        raise ConfigError(
            "names no data set; make one with `tinyemo ingest instruct` or `tinyemo ingest oasis` and say "
            "--set 'records.datasets=[\"s3://tinyemo/datasets/oasis\"]'"
        )
    plan = plan_records(
        tuple(open_record_set(uri, config.split) for uri in config.datasets),
        config,
        # Each stage has its own order.
        seed=recipe.train.seed + list(recipe.stages).index(name),
        global_batch_size=stage.global_batch_size,
        num_epochs=stage.num_epochs,
        world_size=recipe.workers.num_workers,
        preprocessing=encoder.preprocessing,
        image_tokens=encoder.patch_grid[0] * encoder.patch_grid[1],
    )
    return replace(plan, num_steps=stage.num_steps or max(1, plan.num_steps))


def _plan_held_out(plan: RecordPlan, split: str) -> RecordPlan | None:
    """One epoch over another split of the same data sets; None where one of them lacks it or `split` is empty."""
    if not split or any(split not in part.manifest.splits for part in plan.sets):
        return None
    sets = tuple(RecordSet(part.manifest, split) for part in plan.sets)
    config = plan.config.model_copy(update={"split": split, "weights": (), "tail": "pad"})
    return plan_records(
        sets,
        config,
        seed=plan.steps.seed,
        global_batch_size=EVALUATION_BATCH * plan.world_size,
        num_epochs=1,
        world_size=plan.world_size,
        preprocessing=plan.preprocessing,
        image_tokens=plan.image_tokens,
    )
