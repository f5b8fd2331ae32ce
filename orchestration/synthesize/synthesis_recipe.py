"""The recipe of `tinyemo synthesize`: photographs, tasks, teachers, budget and gates, read from TOML and `--set`."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from orchestration.data.ingest_rules import Task
from orchestration.data.tasks import PoolConfig
from orchestration.recipe.recipe import read_recipe
from tinyemo.config import Section
from tinyemo.errors import ConfigError
from tinyemo.taxonomies import TaxonomyChoice

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]
Share = Annotated[float, Field(gt=0, le=1)]
JUDGE = "judge"
"""The task of records that a second model scores."""


class ImagesConfig(Section):
    """The photographs, and what is known of them."""

    source: str
    """S3 address of a data set of kind images or instruct, an S3 prefix or a local folder of image files."""
    splits: tuple[str, ...] = ()
    """Splits of a data set that are read; empty for all."""
    limit: PositiveInt | None = None
    """Number of photographs, chosen by their digest; not set takes all."""
    taxonomy: TaxonomyChoice | None = None
    """Labels to choose from: ekman, mikels, parrott or a file; not set takes those of the data set."""
    tables: tuple[str, ...] = ()
    """CSV, TSV or Parquet files with a column image or id, joined on a photograph's id, file name or stem; their other
    columns are contexts. Rows of the same photograph are joined with "; ". The columns label (or emotion) and split
    fill in what the source does not say."""
    may_be_shown: bool = False
    """Whether a contact sheet of photographs with texts may be made, in S3 and MLflow."""


class TaskConfig(Section):
    """One kind of record, and what the teacher is told."""

    template: str = ""
    """Name of a shipped prompt, or the path of a Jinja2 file; empty takes the newest shipped one of the task."""
    share: Share = 1.0
    """Chance that a photograph gets this task."""
    context: tuple[str, ...] = ()
    """What the prompt tells: label, a column of a table, or answer.TASK for the accepted answer of another task."""
    min_words: NonNegativeInt = 3
    """Fewest words of an answer."""
    max_words: PositiveInt = 120
    """Most words of an answer; the prompt states it too."""
    near_duplicate: float = Field(0.9, ge=0, le=1)
    """Jaccard similarity of word triples from which two answers of this task are the same; 0 compares none."""


class TeacherConfig(Section):
    """A model that writes answers: in process by transformers, or behind an OpenAI-compatible endpoint."""

    kind: Literal["endpoint", "transformers"] = "endpoint"
    """transformers loads the model on a pool of Ray actors."""
    model: str
    """Name that the endpoint knows; for transformers an asset, an absolute folder, s3://... or hub-name@commit."""
    base_url: str = ""
    """Address of the endpoint, for instance http://127.0.0.1:8000/v1."""
    api_key_env: str = ""
    """Environment variable that holds the endpoint's key; empty for an endpoint without one."""
    share: PositiveFloat = 1.0
    """Share of the records that this teacher writes, relative to the other teachers."""
    tasks: tuple[Task, ...] = ("caption", "vqa", "sqa", "reasoning")
    """Tasks that this teacher writes."""
    sees_image: bool = False
    """Whether requests carry the photograph; a text-only teacher gets the context alone."""
    answers: Literal["auto", "schema", "prompted", "text"] = "text"
    """Form of answers: schema asks the endpoint for JSON by response_format, prompted asks for it in words, auto tries
    the first and falls back on the second; text is plain text."""
    max_tokens: PositiveInt = 160
    """Most tokens of an answer."""
    temperature: NonNegativeFloat = 0.0
    """0 decodes greedily."""
    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name under which the endpoint takes max_tokens."""
    accepts_models: tuple[str, ...] = ()
    """Other names that the endpoint may answer with; a name that begins with `model` is always accepted."""
    price_prompt: NonNegativeFloat = 0.0
    """Money for a million prompt tokens."""
    price_completion: NonNegativeFloat = 0.0
    """Money for a million completion tokens."""
    requests_per_minute: PositiveFloat | None = None
    """Most requests in a minute; not set leaves it to the endpoint's answers."""
    max_concurrency: PositiveInt = 64
    """Most requests under way at once; how many really are follows from 429s and latency."""
    timeout_s: PositiveFloat = 120.0
    """Longest wait for one answer."""
    pool: PoolConfig = PoolConfig()
    """Actors of a transformers teacher; batch_size is its number of prompts per batch."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        parts = urlsplit(self.base_url)
        if self.kind == "endpoint":
            if parts.scheme not in ("http", "https") or not parts.netloc:
                problems.append(f"base_url: {self.base_url!r} must look like http://host:port/v1")
            if parts.username or parts.password or parts.query:
                problems.append("base_url: holds a login or a query; name the key's variable in api_key_env")
        elif self.base_url or self.api_key_env:
            problems.append("kind: transformers has neither base_url nor api_key_env")
        elif self.answers in ("schema", "auto"):
            problems.append(f"answers: {self.answers} needs an endpoint; transformers takes prompted or text")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def parameters(self) -> str:
        """Return what an answer depends on, as JSON; part of a work item's key."""
        names = {"kind", "model", "sees_image", "answers", "max_tokens", "temperature"}
        return json.dumps(self.model_dump(mode="json", include=names), sort_keys=True)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the money for a number of tokens."""
        return (prompt_tokens * self.price_prompt + completion_tokens * self.price_completion) / 1e6


class BudgetConfig(Section):
    """Limits over all starts of a name; a run that reaches one stops cleanly and goes on with a larger budget."""

    requests: PositiveInt | None = None
    """Requests, retries included."""
    tokens: PositiveInt | None = None
    """Tokens of prompts and answers."""
    money: PositiveFloat | None = None
    """In the currency of the teachers' prices."""


class RetryConfig(Section):
    """Rules for repeating failed requests and for giving the run up."""

    max_attempts: PositiveInt = 4
    """Requests for one answer, repairs aside."""
    max_wait_s: PositiveFloat = 60.0
    """Longest pause before the next attempt, whatever Retry-After says."""
    patience_s: PositiveFloat = 600.0
    """How long an endpoint may be away; then the run ends, and the same command continues it."""
    max_answer_bytes: PositiveInt = 2**20
    """Largest response that is read."""


class GatesConfig(Section):
    """Conditions under which an answer becomes a record."""

    language: str = "en"
    """ISO 639-1 code that answers are written in; empty checks none."""
    language_min_words: PositiveInt = 8
    """Shorter texts have no language that can be told."""
    copied_share: float = Field(0.6, gt=0, le=1)
    """Share of an answer's word quadruples that stand in the prompt from which it is a copy."""
    held_out: tuple[str, ...] = ()
    """S3 addresses of instruct data sets whose test and validation answers no record may repeat."""
    projector: str = ""
    """File that `tinyemo predict --output` wrote for these photographs. A record whose label the projector disputes is
    kept and flagged for review, with the projector's cosines."""
    judge: Name | None = None
    """Teacher that scores each accepted record from 1 to 5 by the rubric of its prompt."""
    judge_min_score: PositiveInt = Field(1, le=5)
    """Records that the judge gives less are rejected."""


class SynthesisRecipe(Section):
    """One synthetic data set."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    """Name of the ledger, the MLflow run and the data set."""
    seed: NonNegativeInt = 0
    """Of task order, wordings, offered labels and teachers; sent to endpoints too."""
    experiment: str = "tinyemo"
    """MLflow experiment."""
    root: str = Field("s3://tinyemo/synthesis", pattern=r"^s3://[^/]+/.+")
    """S3 folder that holds the ledgers."""
    datasets: str = Field("s3://tinyemo/datasets", pattern=r"^s3://[^/]+/.+")
    """S3 folder that the data set goes to."""
    num_offered: tuple[PositiveInt, PositiveInt] = (3, 5)
    """Fewest and most labels that a reasoning record offers; they always hold the right one."""
    images: ImagesConfig
    tasks: dict[Task, TaskConfig] = Field(min_length=1)
    teachers: dict[Name, TeacherConfig] = Field(min_length=1)
    budget: BudgetConfig = BudgetConfig()
    retries: RetryConfig = RetryConfig()
    gates: GatesConfig = GatesConfig()

    @field_validator("num_offered")
    @classmethod
    def _is_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 2 <= value[0] <= value[1]:
            raise ValueError("must be two numbers from 2 on, the smaller one first")
        return value

    @model_validator(mode="after")
    def _check_sections_against_each_other(self) -> Self:
        problems = []
        for name, task in self.tasks.items():
            if task.min_words > task.max_words:
                problems.append(f"tasks.{name}.min_words: {task.min_words} is above max_words {task.max_words}")
            for other in sources_of(task):
                if other not in self.tasks:
                    problems.append(f"tasks.{name}.context: answer.{other} is no task of this recipe")
            if not self.writers(name):
                problems.append(f"tasks.{name}: no teacher writes it; add it to the tasks of one")
        if self.gates.judge is not None and self.gates.judge not in self.teachers:
            problems.append(f"gates.judge: {self.gates.judge!r} is no teacher; known: {', '.join(self.teachers)}")
        if not problems:
            try:
                self.rounds()
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def writers(self, task: str) -> list[str]:
        """Return the teachers of a task; a judge writes no record."""
        return [name for name, found in self.teachers.items() if task in found.tasks and name != self.gates.judge]

    def rounds(self) -> list[list[Task]]:
        """Return the tasks in the order in which they can be asked: each round needs answers of earlier ones alone."""
        done: list[list[Task]] = []
        left = dict(self.tasks)
        while left:
            known = {task for tasks in done for task in tasks}
            ready = [name for name, task in left.items() if sources_of(task) <= known]
            if not ready:
                raise ConfigError(f"tasks: {', '.join(left)} wait for each other's answers")
            done.append(ready)
            left = {name: task for name, task in left.items() if name not in ready}
        return done

    def digest(self) -> str:
        """Return the sha256 of the whole recipe."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def sources_of(task: TaskConfig) -> set[str]:
    """Return the tasks whose answers a task is told."""
    return {name.removeprefix("answer.") for name in task.context if name.startswith("answer.")}


def load_synthesis(name_or_path: str, overrides: list[str] | None = None) -> SynthesisRecipe:
    """Read a recipe file, apply `--set` overrides and validate the result.

    Raises:
        ConfigError: lists all errors, one line per field.
    """
    required: dict[str, Any] = {
        "name": "unnamed",
        "images": {"source": "images"},
        "tasks": {"caption": {}},
        "teachers": {"stand-in": {"kind": "transformers", "model": "stand-in"}},
    }
    return read_recipe(SynthesisRecipe, name_or_path, overrides, required=required)
