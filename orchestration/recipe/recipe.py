"""A run is one Recipe: read from TOML and `--set section.key=value`, and nothing else configures it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from orchestration.recipe.engine_config import EngineConfig, OptimizerConfig
from orchestration.recipe.stage_config import EvaluationConfig, ReasonerSource, StageConfig, stage_problems
from orchestration.recipe.toml_sections import lay_over, parse_section, read_toml
from orchestration.search.space import SearchConfig, space_problems
from orchestration.streaming.feature_stream import DataConfig
from orchestration.streaming.record_stream import RecordsConfig
from tinyemo.config import LabelConfig, LossConfig, ProjectorConfig, Section
from tinyemo.errors import AssetError, ConfigError
from tinyemo.families import FAMILY


class TrainConfig(Section):
    """How long and in what steps."""

    global_batch_size: PositiveInt = 32
    """Samples per optimizer step, over all ranks. Contrastive losses need a step's samples at once, so a step is one
    forward pass: each rank takes global_batch_size / num_workers."""
    num_epochs: PositiveFloat = 5
    """Passes over the train split that the learning-rate schedule spans."""
    refit: bool = False
    """Train the final model on train and validation, for as many epochs as the best one by validation."""
    seed: NonNegativeInt = 0
    """Of initial weights, sample order and dropout."""


class WorkersConfig(Section):
    """The workers of Ray Train."""

    num_workers: PositiveInt = 2
    """Ranks; each takes a GPU where the cluster has as many, else CPU threads."""
    cpus_per_worker: PositiveFloat = 0.5
    """CPUs Ray sets aside for one rank; reading asks for none."""
    max_failures: NonNegativeInt = 2
    """Times a run goes on from its last checkpoint after it lost a worker."""


class CheckpointConfig(Section):
    """When a run's state goes to S3."""

    every_steps: NonNegativeInt = 0
    """Optimizer steps between checkpoints inside an epoch; 0 for one at each epoch's end only."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""
    root: str = Field("s3://tinyemo/runs", pattern=r"^s3://[^/]+/.+")
    """S3 folder of the runs."""


class FamilyConfig(Section):
    """The sizes of `tinyemo family`."""

    sizes: tuple[str, ...] = tuple(FAMILY)
    """Names of the family table."""
    random_weights: bool = False
    """Whether sizes whose embedding table is out of reach run with seeded random vectors, tagged so."""
    overrides: dict[str, tuple[str, ...]] = Field({})
    """By size, what its run has in place of the recipe's own, each as `--set` takes it: section.field=value."""
    registered_name: str = "tinyemo-projector"
    """Registered model in MLflow whose alias champion points to the best."""


class Recipe(Section):
    """One run."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    """Of the run, in S3 and MLflow: lower-case letters, digits, dot, dash, underscore."""
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
    """Stages of the reasoning model's training, in this order; a recipe without any trains a projector."""
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _check_sections_against_each_other(self) -> Self:
        conflicts = self.conflicts()
        if conflicts:
            raise ValueError("\n".join(conflicts))
        return self

    def conflicts(self) -> list[str]:
        """What two fields say that cannot both be, one line each."""
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
        if self.train.refit and not self.data.validation_fraction:
            found.append("train.refit: needs data.validation_fraction above 0 to find the best epoch")
        return found

    def digest(self) -> str:
        """sha256 over every field but those that may change on resume without changing the result."""
        content = self.model_dump(
            mode="json", exclude={"experiment": True, "checkpoint": True, "workers": {"max_failures"}}
        )
        # Tables have no order of their own in JSON, and stages do.
        content["stages"] = list(content["stages"].items())
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def recipe_path(name_or_path: str) -> Path:
    """A recipe file: the path itself, or a shipped recipe by its name.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = Path(str(resources.files("orchestration"))) / "recipes"
    candidate = shipped / f"{path.stem}.toml"
    if candidate.is_file() and path.parent == Path():
        return candidate
    names = ", ".join(sorted(p.stem for p in shipped.glob("*.toml")))
    raise ConfigError(f"no recipe at {name_or_path}; give a TOML file, or one of the shipped: {names}")


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """The validated recipe with `--set` overrides laid over the file.

    Raises:
        ConfigError: all that is wrong with it, one line a field.
    """
    path = recipe_path(name_or_path)
    content = read_toml(path)
    content.setdefault("name", path.stem)
    problems = lay_over(content, overrides or [], Recipe)
    return parse_recipe(content, source=str(path), problems=problems)


def parse_recipe(content: dict[str, Any], *, source: str, problems: Sequence[str] = ()) -> Recipe:
    """The validated recipe of nested tables; every error at once, also those between sections."""
    return parse_section(Recipe, content, source=source, problems=problems, required={"name": "unnamed"})


def parse_size(recipe: Recipe, size: str, content: dict[str, Any]) -> Recipe:
    """The recipe of one size of a family, with family.overrides of that size laid over its tables.

    Raises:
        ConfigError: all that is wrong with it, one line a field.
    """
    found = lay_over(content, recipe.family.overrides.get(size, ()), Recipe)
    problems = [f"family.overrides.{size}: {problem.removeprefix('--set ')}" for problem in found]
    return parse_recipe(content, source=f"{recipe.name}, size {size}", problems=problems)


def recipes_of_sizes(recipe: Recipe, of_size: Callable[[Recipe, str], Recipe]) -> list[Recipe]:
    """A recipe for each size of a family; what is wrong with any of them comes at once.

    Args:
        of_size: makes the recipe of one size.

    Raises:
        AssetError, ConfigError: what `of_size` raised; a ConfigError with all of it where several sizes cannot run.
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


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML that `load_recipe` takes as it is."""
    lines, tables = [], []
    for key, value in recipe.model_dump(mode="json").items():
        if isinstance(value, dict):
            tables += ["", f"[{key}]", *(f"{k} = {_inline(v)}" for k, v in value.items() if v is not None)]
        else:
            lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _inline(value: Any) -> str:
    """One value as TOML; a table goes in one line, and none is left out."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_inline(v)}" for k, v in value.items() if v is not None) + "}"
    return json.dumps(value)
