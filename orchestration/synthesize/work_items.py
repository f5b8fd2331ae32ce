"""Work items: which teacher is asked what about which photograph; a function of recipe, photographs and answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from orchestration.synthesize.photographs import Photograph
from orchestration.synthesize.prompts import QUESTIONS, Prompt, PromptFile, PromptVariables, newest_prompt, open_prompt
from orchestration.synthesize.synthesis_recipe import SynthesisRecipe, TaskConfig

T = TypeVar("T")


@dataclass(frozen=True)
class WorkItem:
    """One request in the making; everything that its record needs besides the answer.

    Attributes:
        key: names image, task, prompt, teacher with its parameters, and seed.
        image: sha256 of the photograph.
        question: human turn of the record, without `<image>`.
        offered: labels that the question offers.
        system, user: the rendered prompt.
    """

    key: str
    image: str
    task: str
    teacher: str
    seed: int
    split: str | None
    label: str | None
    question: str
    offered: tuple[str, ...]
    prompt_sha256: str
    system: str
    user: str


@dataclass(frozen=True)
class Planner:
    """Makes the work items of a recipe."""

    recipe: SynthesisRecipe
    prompts: Mapping[str, PromptFile]
    labels: tuple[str, ...]

    def items(
        self, photographs: Sequence[Photograph], tasks: Sequence[str], answers: Mapping[tuple[str, str], str]
    ) -> Iterator[WorkItem | None]:
        """Yield the items of some tasks, photograph by photograph, tasks in seeded random order.

        Args:
            photographs: in the order of the data set.
            tasks: of one round.
            answers: (image, task) -> accepted answer of earlier rounds.

        Yields:
            An item; None for a record that cannot be asked for, because the photograph lacks what the prompt tells.
        """
        for photograph in photographs:
            for task in sorted(tasks, key=lambda task: _hash(self.recipe.seed, "order", photograph.digest, task)):
                config = self.recipe.tasks[task]  # type: ignore[index]
                if _hash(self.recipe.seed, "share", photograph.digest, task) / 2**64 < config.share:
                    yield self._item(photograph, task, config, answers)

    def _item(
        self, photograph: Photograph, task: str, config: TaskConfig, answers: Mapping[tuple[str, str], str]
    ) -> WorkItem | None:
        identity = (photograph.digest, task)
        context: dict[str, str] = {}
        for name in config.context:
            if name == "label":
                continue
            if name.startswith("answer."):
                text = answers.get((photograph.digest, name.removeprefix("answer.")), "")
            else:
                text = photograph.context.get(name, "")
            if not text:
                return None
            context[name.removeprefix("answer.").replace("_", " ")] = text
        is_told = "label" in config.context or task == "reasoning"
        label = photograph.label if is_told else None
        if is_told and label is None:
            return None
        offered = self._offered(identity, label) if task == "reasoning" and label else ()
        teacher = self._teacher(identity)
        question = choose(QUESTIONS[task], self.recipe.seed, "question", *identity)
        prompt = self.prompts[task].render(
            PromptVariables(
                label=label or "",
                labels=offered,
                context=context,
                question=question,
                max_words=config.max_words,
                has_image=self.recipe.teachers[teacher].sees_image,
                wants_json=self.recipe.teachers[teacher].answers != "text",
            )
        )
        if offered:
            question = f"{question}\nLabels: [{', '.join(offered)}]\nThe correct label is {label}."
        return self.make(photograph, task, teacher, prompt, question, offered)

    def make(
        self,
        photograph: Photograph,
        task: str,
        teacher: str,
        prompt: Prompt,
        question: str,
        offered: tuple[str, ...] = (),
    ) -> WorkItem:
        """Return the item of a rendered prompt."""
        digest = prompt.digest()
        parameters = self.recipe.teachers[teacher].parameters()
        parts = (photograph.digest, task, digest, teacher, parameters, str(self.recipe.seed))
        return WorkItem(
            key=hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest(),
            image=photograph.digest,
            task=task,
            teacher=teacher,
            seed=self.recipe.seed,
            split=photograph.split,
            label=photograph.label,
            question=question,
            offered=offered,
            prompt_sha256=digest,
            system=prompt.system,
            user=prompt.user,
        )

    def _teacher(self, identity: tuple[str, str]) -> str:
        """Return the teacher that writes a record, by the teachers' shares."""
        names = self.recipe.writers(identity[1])
        shares = [self.recipe.teachers[name].share for name in names]
        place = _hash(self.recipe.seed, "teacher", *identity) / 2**64 * sum(shares)
        for name, share in zip(names, shares, strict=True):
            place -= share
            if place < 0:
                return name
        return names[-1]

    def _offered(self, identity: tuple[str, str], label: str) -> tuple[str, ...]:
        """Return the label and some others, in an order that gives nothing away."""
        fewest, most = self.recipe.num_offered
        others = [word for word in self.labels if word != label]
        others.sort(key=lambda word: _hash(self.recipe.seed, "other", *identity, word))
        count = fewest + _hash(self.recipe.seed, "count", *identity) % (most - fewest + 1)
        offered = [label, *others[: count - 1]]
        return tuple(sorted(offered, key=lambda word: _hash(self.recipe.seed, "offered", *identity, word)))


def open_prompts(recipe: SynthesisRecipe) -> dict[str, PromptFile]:
    """Open the prompt of each task, and of the judge where there is one."""
    names = {str(task): config.template or newest_prompt(task) for task, config in recipe.tasks.items()}
    if recipe.gates.judge is not None:
        names["judge"] = newest_prompt("judge")
    return {task: open_prompt(name) for task, name in names.items()}


def choose(options: Sequence[T], seed: int, *parts: str) -> T:
    """Return one of `options`, always the same for the same seed and parts."""
    return options[_hash(seed, *parts) % len(options)]


def _hash(seed: int, *parts: str) -> int:
    """Return a 64-bit number that depends on the arguments alone."""
    return int.from_bytes(hashlib.blake2b("\0".join((str(seed), *parts)).encode(), digest_size=8).digest(), "big")
