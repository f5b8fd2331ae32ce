"""Prompts of teachers: versioned template files, rendered in a sandbox from typed variables.

A template has a block `system` and a block `user`. `caption-1.j2` is version 1 of the prompt of captions; a version
never changes once it was released, and a prompt's digest is that of the text that the teacher reads.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from pydantic import Field

from tinyemo.config import Section
from tinyemo.errors import ConfigError

_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
BLOCKS = ("system", "user")
QUESTIONS = {
    "caption": (
        "Describe the image.",
        "What does this photograph show?",
        "Give this picture a short caption.",
        "What is the subject of this image?",
    ),
    "vqa": (
        "What is the main subject of this photograph?",
        "What can be seen in this picture?",
        "Where could this photograph have been taken?",
        "What stands out in this image?",
    ),
    "sqa": (
        "Which emotion does this photograph evoke?",
        "What would most people feel when they look at this picture?",
        "What is the dominant emotion of this image?",
        "Name the feeling that this photograph brings about.",
    ),
    "reasoning": (
        "Explain which emotion this image evokes and why, then choose one of the labels.",
        "Reason about what in this photograph moves its viewers, and choose the label that fits best.",
        "Give the reasons for the emotion that this picture brings about, then name its label.",
    ),
}
"""Wordings of a record's human turn, by task."""

SCHEMAS: dict[str, dict[str, Any]] = {
    "caption": {"caption": {"type": "string"}},
    "vqa": {"answer": {"type": "string"}},
    "sqa": {"answer": {"type": "string"}},
    "reasoning": {"reasoning": {"type": "string"}, "label": {"type": "string"}},
    "judge": {name: {"type": "integer", "minimum": 1, "maximum": 7} for name in ("score", "valence", "arousal")},
}
"""Properties of a structured answer, by task; all are required and there are no others."""


class PromptVariables(Section):
    """Everything that a template may use; another name in it is an error before anything starts."""

    label: str = ""
    """The photograph's label, where the task is told it."""
    labels: tuple[str, ...] = ()
    """Labels to choose from, shuffled; the right one among them."""
    context: dict[str, str] = Field({})
    """What else is known of the photograph, by name, in the order of the recipe."""
    question: str = ""
    """The record's human turn."""
    answer: str = ""
    """For the judge: the record's answer."""
    max_words: int = 0
    """Most words of an answer."""
    has_image: bool = False
    """Whether the request carries the photograph."""
    wants_json: bool = False
    """Whether the answer has to be JSON."""
    problem: str = ""
    """For a repair: what is wrong with the answer before."""


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        system: text of the system turn; empty for none.
        user: text of the user turn.
    """

    system: str
    user: str

    def digest(self) -> str:
        """Return the sha256 of both texts."""
        return hashlib.sha256(f"{self.system}\0{self.user}".encode()).hexdigest()


@dataclass(frozen=True)
class PromptFile:
    """A template file.

    Attributes:
        name: `caption-1`, or the path of a user's file.
        sha256: of the file.
        text: its content.
    """

    name: str
    sha256: str
    text: str

    def render(self, variables: PromptVariables) -> Prompt:
        """Return the prompt for one photograph.

        Raises:
            ConfigError: the template fails on these variables.
        """
        template = _compile(self.text)
        try:
            values = dict(variables)
            parts = ["".join(template.blocks[block](template.new_context(values))).strip() for block in BLOCKS]
        except TemplateError as error:
            raise ConfigError(f"prompt {self.name} cannot be rendered: {error}") from error
        return Prompt(*parts)


def open_prompt(name: str) -> PromptFile:
    """Open a shipped prompt or a file of the user's, and check it.

    Raises:
        ConfigError: there is no such prompt, or it has other blocks or variables than it may.
    """
    shipped = _shipped()
    path = shipped.get(name) or Path(name)
    try:
        content = path.read_bytes()
        text = content.decode()
    except (OSError, ValueError) as error:
        raise ConfigError(f"no prompt {name!r}: give a file, or one of {', '.join(shipped)}") from error
    try:
        template = _compile(text)
        unknown = meta.find_undeclared_variables(_environment().parse(text)) - PromptVariables.model_fields.keys()
    except TemplateError as error:
        raise ConfigError(f"prompt {name}: {error}") from error
    if set(BLOCKS) - template.blocks.keys():
        raise ConfigError(f"prompt {name}: must have the blocks {' and '.join(BLOCKS)}")
    if unknown:
        known = ", ".join(PromptVariables.model_fields)
        raise ConfigError(f"prompt {name}: unknown variables {', '.join(sorted(unknown))}; known: {known}")
    return PromptFile(name, hashlib.sha256(content).hexdigest(), text)


def newest_prompt(task: str) -> str:
    """Return the name of the newest shipped prompt of a task."""
    versions = (name for name in _shipped() if name.rpartition("-")[0] == task)
    return max(versions, key=lambda name: int(name.rpartition("-")[2]))


def schema_of(task: str) -> dict[str, Any]:
    """Return the JSON schema of a structured answer."""
    found = SCHEMAS[task]
    return {"type": "object", "properties": found, "required": list(found), "additionalProperties": False}


def read_structured(text: str, schema: dict[str, Any]) -> dict[str, Any] | str:
    """Return the JSON object in an answer, code fences aside, or what is wrong with it in a few words."""
    found = _FENCE.fullmatch(text.strip())
    try:
        document = json.loads(found[1] if found else text)
    except (ValueError, RecursionError):
        return "it is no JSON"
    error = best_match(Draft202012Validator(schema).iter_errors(document))
    if error is not None:
        where = ".".join(map(str, error.absolute_path))
        return f"{where or 'the object'} breaks the rule {error.validator}"
    assert isinstance(document, dict)
    return document


def _shipped() -> dict[str, Path]:
    folder = Path(str(resources.files("orchestration"))) / "synthesize" / "prompts"
    return {path.stem: path for path in sorted(folder.glob("*.j2"))}


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    # Prompts are plain text for a model, not HTML.
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)


@cache
def _compile(text: str) -> Template:
    return _environment().from_string(text)
