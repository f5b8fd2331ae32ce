"""The Recipe: the whole configuration of a run, read from TOML and `--set section.key=value`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from orchestration.recipe.sections import (
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    OptimizerConfig,
    ReasonerSource,
    RecordsConfig,
    StageConfig,
    stage_problems,
)
from orchestration.recipe.toml_sections import lay_over, parse_section, read_toml, toml_lines
from orchestration.search.space import SearchConfig, space_problems
from tinyemo.config import LabelConfig, LossConfig, ProjectorConfig, Section
from tinyemo.errors import AssetError, ConfigError
from tinyemo.families import FAMILY

AnyRecipe = TypeVar("AnyRecipe", bound=Section)

NOT_IN_DIGEST: Any = {
    "experiment": True,
    "checkpoint": True,
    "train": {"log_every_steps"},
    "workers": {"max_failures", "start_timeout_s", "timeout_s"},
}
SHARED_SECTIONS = {"name", "experiment", "train", "engine", "workers", "checkpoint"}
PROJECTOR_SECTIONS = SHARED_SECTIONS | {"data", "labels", "projector", "loss", "optimizer"}
REASONER_SECTIONS = SHARED_SECTIONS | {"records", "reasoner", "stages", "evaluation"}
READING_SECTIONS = {"name", "records", "train", "workers", "checkpoint"}


class TrainConfig(Section):
    """Length of the training and size of its steps."""

    global_batch_size: PositiveInt = 32
    """Samples per optimizer step, over all ranks. A contrastive loss compares all samples of a step, so a step is one
    forward pass of global_batch_size / num_workers samples on each rank. Stages have a batch of their own."""
    num_epochs: PositiveFloat = 5
    """Passes over the train split; the learning-rate schedule spans all of them. Stages have a number of their own."""
    refit: bool = False
    """Whether to train the final projector on train and validation together, up to the epoch that validated best."""
    seed: NonNegativeInt = 0
    """Seed of initial weights, sample order and dropout."""
    log_every_steps: PositiveInt | None = None
    """Optimizer steps between two points of a curve in MLflow; not set logs about every ten seconds."""


class WorkersConfig(Section):
    """The workers that Ray Train starts, one for each rank."""

    num_workers: PositiveInt = 2
    """Number of ranks."""
    device: Literal["auto", "gpu", "cpu"] = "auto"
    """Device of a rank; auto takes a GPU if the cluster has, or can start, one for each rank. Decided once per run."""
    cpus_per_worker: PositiveFloat = 0.5
    """CPUs that Ray sets aside for each rank; reading tasks ask for none."""
    max_failures: NonNegativeInt = 2
    """Restarts from the newest checkpoint after a worker, a node or the network was lost."""
    start_timeout_s: PositiveFloat = 1800
    """Seconds to wait until the cluster has started the workers' nodes."""
    timeout_s: PositiveFloat = 1800
    """Seconds until a collective operation fails because a rank does not answer."""


class CheckpointConfig(Section):
    """When the state of a run is saved to S3."""

    every_steps: NonNegativeInt = 0
    """Optimizer steps between two checkpoints; 0 for none but those by time and at the end of an epoch."""
    every_minutes: NonNegativeFloat = 15
    """Minutes of training between two checkpoints at most; 0 for no limit."""
    keep: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    root: str = Field("s3://tinyemo/runs", pattern=r"^s3://[^/]+/.+")
    """S3 folder that holds the runs."""


class FamilyConfig(Section):
    """The sizes that `tinyemo family` trains."""

    sizes: tuple[str, ...] = tuple(FAMILY)
    """Names of the sizes."""
    random_weights: bool = False
    """Whether a size whose weights cannot be fetched trains with seeded random ones; its results are tagged so."""
    overrides: dict[str, tuple[str, ...]] = Field({})
    """Changes to the recipe by size, each as `--set` takes it: section.field=value."""
    registered_name: str = "tinyemo-projector"
    """Registered model in MLflow that the best size becomes a version of, the first one with the alias champion."""


class Recipe(Section):
    """One run."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    """Name of the run in S3 and MLflow: lower-case letters, digits, dot, dash, underscore."""
    experiment: str = "tinyemo"
    """MLflow experiment."""
    data: DataConfig = DataConfig()
    records: RecordsConfig = RecordsConfig()
    labels: LabelConfig = LabelConfig()
    projector: ProjectorConfig = ProjectorConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    workers: WorkersConfig = WorkersConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    family: FamilyConfig = FamilyConfig()
    search: SearchConfig = SearchConfig()
    reasoner: ReasonerSource = ReasonerSource()
    stages: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")], StageConfig] = Field({})
    """Stages that train a reasoning model, in this order; a recipe without stages trains a projector."""
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _check_sections_against_each_other(self) -> Self:
        conflicts = self.conflicts()
        if conflicts:
            raise ValueError("\n".join(conflicts))
        return self

    def conflicts(self) -> list[str]:
        """Return one line for each conflict between fields, which each on its own is valid."""
        found = stage_problems(self.stages, self.reasoner, self.workers.num_workers)
        batch, workers = self.train.global_batch_size, self.workers.num_workers
        if batch % workers and not self.stages:
            found.append(
                f"train.global_batch_size: {batch} does not divide by workers.num_workers {workers}; "
                f"{batch - batch % workers or workers} or {batch - batch % workers + workers} would"
            )
        if batch < 2:
            found.append("train.global_batch_size: 1 leaves batch normalisation nothing to normalise over; at least 2")
        size = FAMILY.get(self.labels.llm)
        if size is None:
            found.append(f"labels.llm: {self.labels.llm!r} is not one of {', '.join(FAMILY)}")
        elif size.hidden_size != self.projector.hidden_size:
            found.append(
                f"projector.hidden_size: {self.projector.hidden_size} is not the width of labels.llm "
                f"{self.labels.llm}, {size.hidden_size}"
            )
        found += [
            f"family.sizes: {name!r} is not one of {', '.join(FAMILY)}"
            for name in self.family.sizes
            if name not in FAMILY
        ]
        found += [
            f"family.overrides: {name!r} is not one of {', '.join(FAMILY)}"
            for name in self.family.overrides
            if name not in FAMILY
        ]
        if self.data.validation_fraction * (self.data.validation_fold + 1) > 1:
            found.append(
                f"data.validation_fold: {self.data.validation_fold} lies beyond the data at "
                f"data.validation_fraction {self.data.validation_fraction}"
            )
        found += space_problems(self.search.space)
        if self.train.refit and not self.has_validation():
            found.append("train.refit: needs data.validation_fraction above 0 to find the best epoch")
        if self.data.validation_split is not None and self.search.num_folds > 1:
            found.append("search.num_folds: folds are parts of train, so data.validation_split allows only 1")
        return found

    def has_validation(self) -> bool:
        """Return whether a projector trained by this recipe is measured on validation rows."""
        return self.data.validation_split is not None or self.data.validation_fraction > 0

    def used_sections(self, command: str = "train") -> set[str]:
        """Return the fields that `tinyemo COMMAND` reads, and all others that the recipe sets."""
        used = REASONER_SECTIONS if self.stages else PROJECTOR_SECTIONS
        used = {"stream": READING_SECTIONS, "family": used | {"family"}, "tune": used | {"search"}}.get(command, used)
        return used | {name for name, field in Recipe.model_fields.items() if getattr(self, name) != field.default}

    def digest(self) -> str:
        """Return the sha256 of all fields except those that may change on resume without changing the result."""
        content = self.model_dump(mode="json", exclude=NOT_IN_DIGEST)
        # Tables have no order of their own in JSON, and stages do.
        content["stages"] = list(content["stages"].items())
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def shipped_recipes() -> dict[str, Path]:
    """Return the file of each recipe that comes with this package, by name."""
    folder = Path(str(resources.files("orchestration"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


OTHER_COMMANDS = ("synthesize", "evaluate")
"""Commands whose recipes have sections of their own; such a file's name starts with the command and a dash."""


def command_of(name: str) -> str:
    """Return the command that a shipped recipe is for; "train" for all that share the sections of `Recipe`."""
    return next((command for command in OTHER_COMMANDS if name.startswith(f"{command}-")), "train")


def recipe_path(name_or_path: str) -> Path:
    """Return the file of a recipe: the path itself, or that of a shipped recipe.

    Raises:
        ConfigError: if neither exists.
    """
    path, shipped = Path(name_or_path), shipped_recipes()
    if path.is_file():
        return path
    if path.parent == Path() and path.stem in shipped:
        return shipped[path.stem]
    raise ConfigError(f"no recipe at {name_or_path}; give a TOML file, or a shipped recipe: {', '.join(shipped)}")


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, apply `--set` overrides and validate the result.

    Raises:
        ConfigError: lists all errors, one line per field.
    """
    return read_recipe(Recipe, name_or_path, overrides, required={"name": "unnamed"})


def read_recipe(
    kind: type[AnyRecipe], name_or_path: str, overrides: Sequence[str] | None, *, required: dict[str, Any]
) -> AnyRecipe:
    """Read a file of one kind of recipe; a recipe without a name takes that of its file.

    Args:
        kind: section that describes the whole file.
        name_or_path: a TOML file, or the name of a shipped recipe.
        overrides: `--set` arguments.
        required: values that stand in for required fields while the rest of the file is checked.

    Raises:
        ConfigError: lists all errors, one line per field.
    """
    path = recipe_path(name_or_path)
    content = read_toml(path)
    content.setdefault("name", path.stem)
    problems = lay_over(content, list(overrides or ()), kind)
    return parse_section(kind, content, source=str(path), problems=problems, required=required)


def parse_recipe(content: dict[str, Any], *, source: str, problems: Sequence[str] = ()) -> Recipe:
    """Validate nested tables as a recipe; the error lists all problems, including those between sections."""
    return parse_section(Recipe, content, source=source, problems=problems, required={"name": "unnamed"})


def parse_size(recipe: Recipe, size: str, content: dict[str, Any]) -> Recipe:
    """Validate the recipe of one size of a family, after applying `family.overrides` of that size.

    Raises:
        ConfigError: lists all errors, one line per field.
    """
    found = lay_over(content, recipe.family.overrides.get(size, ()), Recipe)
    problems = [f"family.overrides.{size}: {problem.removeprefix('--set ')}" for problem in found]
    return parse_recipe(content, source=f"{recipe.name}, size {size}", problems=problems)


def recipes_of_sizes(recipe: Recipe, of_size: Callable[[Recipe, str], Recipe]) -> list[Recipe]:
    """Make the recipe of every size of a family with `of_size`; one error reports all sizes that cannot run.

    Raises:
        AssetError, ConfigError: raised by `of_size`; a single ConfigError if several sizes failed.
    """
    children, errors = [], []
    for size in recipe.family.sizes:
        try:
            children.append(of_size(recipe, size))
        except (AssetError, ConfigError) as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        said = "\n".join(f"  {line}" for error in errors for line in str(error).splitlines())
        raise ConfigError(f"{recipe.name}: {len(errors)} of {len(recipe.family.sizes)} sizes cannot run:\n{said}")
    return children


def to_toml(recipe: Recipe, command: str = "train") -> str:
    """Return every field of the sections that `tinyemo COMMAND` reads as TOML; `load_recipe` gives the same recipe."""
    return "\n".join(toml_lines(recipe, only=recipe.used_sections(command))) + "\n"
