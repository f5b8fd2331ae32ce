"""Preparation of a run before a worker starts: its recipe, checked against the manifests of its data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from orchestration.assets.models import Sources, describe_sources, tokenizer_source
from orchestration.data.manifest import Manifest, load_manifest
from orchestration.data.sets import RecordSet, Selection, SplitRows, open_record_set, select_rows
from orchestration.data.stream import EVALUATION_ROWS, Stream, plan_features, plan_records
from orchestration.recipe import Recipe
from orchestration.recipe.stage_config import StageConfig
from tinyemo.encoders import EncoderSpec
from tinyemo.errors import ConfigError, DataError
from tinyemo.taxonomies import Taxonomy
from tinyemo.tokenizer_files import open_tokenizer

NO_DATASET = (
    "names no data set; make one with `tinyemo ingest instruct` or `tinyemo ingest oasis` and say "
    "--set 'records.datasets=[\"s3://tinyemo/datasets/oasis\"]'"
)
EVALUATION_BATCH = 16
"""Records that a rank measures together."""


@dataclass(frozen=True)
class Preparation:
    """A projector's recipe and the rows that it reads."""

    recipe: Recipe
    manifest: Manifest
    taxonomy: Taxonomy
    selection: Selection

    @property
    def words(self) -> tuple[str, ...]:
        """Labels that the projector tells apart."""
        return self.selection.words

    def data_digests(self) -> dict[str, str]:
        """Return the digest of the data set by its name."""
        return {self.manifest.name: self.manifest.digest}

    def facts(self) -> dict[str, Any]:
        """Return what a dry run shows."""
        rows, train = self.rows(is_refit=False), self.recipe.train
        stream = self.streams(num_epochs=train.num_epochs, is_refit=False, is_tested=False)["train"]
        return {
            "data": self.manifest.uri,
            "data_kind": self.manifest.data,
            **{f"{split}_rows": len(rows[split]) for split in rows},
            "optimizer_steps": stream.num_steps,
            "rows_per_rank_and_step": train.global_batch_size // self.recipe.workers.num_workers,
        }

    def rows(self, *, is_refit: bool) -> dict[str, SplitRows]:
        """Return the rows of each split; a refit trains on those of validation too."""
        selection = self.selection
        train, validation = selection.train, selection.validation
        if is_refit:
            train, validation = selection.whole, validation.take(np.arange(0))
        return {"train": train, "validation": validation, "test": selection.test}

    def record_set(self, rows: SplitRows) -> RecordSet:
        """Return the records of the data set that `rows` are."""
        whole = RecordSet(self.manifest, "")
        return whole.select(whole.row_numbers(rows.shard, rows.row))

    def streams(self, *, num_epochs: float, is_refit: bool, is_tested: bool) -> dict[str, Stream]:
        """Return the streams of a stage by name; "validation" and "test" only where there are such rows."""
        rows = self.rows(is_refit=is_refit)
        found = {"train": self._stream(rows["train"], num_epochs)}
        if len(rows["validation"]):
            found["validation"] = self._stream(rows["validation"])
        if is_tested:
            found["test"] = self._stream(rows["test"])
        return found

    def _stream(self, rows: SplitRows, num_epochs: float | None = None) -> Stream:
        """Return the stream of some rows: over epochs, or once and padded where no number of epochs is given."""
        recipe, world_size = self.recipe, self.recipe.workers.num_workers
        evaluation_size = -(-min(len(rows), EVALUATION_ROWS) // world_size) * world_size
        return plan_features(
            self.record_set(rows),
            self.words,
            recipe.data,
            seed=recipe.train.seed,
            global_batch_size=evaluation_size if num_epochs is None else recipe.train.global_batch_size,
            num_epochs=num_epochs or 1,
            world_size=world_size,
            tail="pad" if num_epochs is None else "carry",
        )


def prepare(recipe: Recipe) -> Preparation:
    """Read manifest and index and check the recipe against them; no shard is read and no worker started.

    The returned recipe names its labels, also where the given one leaves them to the data set.

    Raises:
        ConfigError: everything that does not fit together, one line per field.
        StorageError, DataError: the data set cannot be read.
    """
    manifest = load_manifest(recipe.data.dataset, "features")
    taxonomy = recipe.labels.resolved(manifest.taxonomy)
    labels = recipe.labels.model_copy(update={"taxonomy": taxonomy, "words": ()})
    recipe = recipe.model_copy(update={"labels": labels})
    problems: list[str] = []
    selection = None
    data = recipe.data
    try:
        selection = select_rows(
            manifest,
            taxonomy.words,
            leave_out=data.leave_out,
            validation_split=data.validation_split,
            validation_fraction=data.validation_fraction,
            validation_fold=data.validation_fold,
        )
    except ConfigError as error:
        problems += str(error).splitlines()
    if manifest.feature_width != recipe.projector.encoder_width:
        problems.append(
            f"projector.encoder_width: {recipe.projector.encoder_width} and the features of {manifest.uri} "
            f"are {manifest.feature_width} wide"
        )
    problems += _encoder_problems(recipe, manifest)
    if selection is not None and recipe.train.global_batch_size > len(selection.train):
        problems.append(
            f"train.global_batch_size: {recipe.train.global_batch_size} is more than the {len(selection.train)} train "
            "rows left after validation"
        )
    if problems:
        raise ConfigError(f"{recipe.name}: {len(problems)} error(s)\n" + "\n".join(f"  {p}" for p in problems))
    assert selection is not None
    return Preparation(recipe, manifest, taxonomy, selection)


def _encoder_problems(recipe: Recipe, manifest: Manifest) -> list[str]:
    wanted, found = recipe.projector.encoder, manifest.encoder
    if not wanted or (found is not None and found.matches(wanted)):
        return []
    made_by = "do not say which encoder made them" if found is None else f"are of {found}"
    return [f"projector.encoder: {wanted} and the features of {manifest.uri} {made_by}"]


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
        image_tokens=encoder.patch_grid[0] * encoder.patch_grid[1],
    )
    return replace(plan, plan=replace(plan.plan, max_steps=stage.num_steps or max(1, plan.num_steps)))


def order_only(recipe: Recipe) -> Recipe:
    """Return the recipe of a reading with the fields that its order depends on, and defaults for all others.

    A reading may go on with another number of workers.
    """
    records = recipe.records.model_dump(include={"split", "weights", "pool_mib", "tail"})
    train = recipe.train.model_dump(include={"seed", "global_batch_size", "num_epochs"})
    workers = {"num_workers": 1}
    content = {"name": recipe.name, "records": records, "train": train, "workers": workers}
    return Recipe.model_validate(content)


def prepare_records(recipe: Recipe) -> Stream:
    """Return the plan of a recipe's records; manifests are read, no shard is.

    Raises:
        ConfigError: the recipe names no data set, or one that does not fit it.
        StorageError, DataError: a data set cannot be read.
    """
    if not recipe.records.datasets:
        raise ConfigError(f"records.datasets: {NO_DATASET}")
    return plan_records(
        tuple(open_record_set(uri, recipe.records.split, "instruct") for uri in recipe.records.datasets),
        recipe.records,
        seed=recipe.train.seed,
        global_batch_size=recipe.train.global_batch_size,
        num_epochs=recipe.train.num_epochs,
        world_size=recipe.workers.num_workers,
    )
