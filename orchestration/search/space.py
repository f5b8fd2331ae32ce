"""The section [search] of a recipe: the knobs that `tinyemo tune` searches, each with its distribution."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from tinyemo.config import Section

Kind = Literal["number", "integer", "choice"]

KNOBS: dict[str, Kind] = {
    "loss.name": "choice",
    "loss.temperature": "number",
    "loss.margin": "number",
    "loss.label_smoothing": "number",
    "loss.mixup_alpha": "number",
    "labels.template": "choice",
    "labels.synonyms_probability": "number",
    "labels.taxonomy_augmentation": "number",
    "projector.dropout": "number",
    "projector.hidden_width": "integer",
    "projector.normalize_features": "choice",
    "optimizer.max_lr": "number",
    "optimizer.pct_start": "number",
    "optimizer.weight_decay": "number",
    "train.global_batch_size": "integer",
}
"""Fields of a recipe that a search may set, with the kind of their values; all others are equal in every trial."""


class Distribution(Section):
    """Distribution of one knob's values: a list of choices, or a range that includes both ends."""

    choices: tuple[bool | int | float | str, ...] | None = Field(None, min_length=1)
    """Values, each as likely as the others at first."""
    low: int | float | None = None
    """Lowest value of a range."""
    high: int | float | None = None
    """Highest value of a range."""
    log: bool = False
    """True draws from a range on a logarithmic scale."""
    step: PositiveFloat | None = None
    """Distance between neighbouring values of a range; without it any value, and 1 between integers."""

    @model_validator(mode="after")
    def _is_choices_or_range(self) -> Self:
        problem = self.problem()
        if problem:
            raise ValueError(problem)
        return self

    def problem(self) -> str | None:
        """Return why this is not a distribution, in one line, or None."""
        low, high = self.low, self.high
        if self.choices is not None:
            problems = {
                "has choices, so low, high, log and step must be left out": (low, high, self.log, self.step)
                != (None, None, False, None),
                f"lists a value twice in {list(self.choices)}": len(set(self.choices)) != len(self.choices),
            }
        elif low is None or high is None:
            problems = {"needs choices = [...], or low and high": True}
        else:
            problems = {
                f"needs low below high, got {low} and {high}": low >= high,
                f"needs low above 0 on a log scale, got {low}": self.log and low <= 0,
                "takes log or step, not both": self.log and self.step is not None,
            }
        return next((problem for problem, is_there in problems.items() if is_there), None)

    def examples(self) -> list[Any]:
        """Return the values to check: each choice, or both ends of the range."""
        return list(self.choices) if self.choices is not None else [self.low, self.high]

    def holds(self, value: Any) -> bool:
        """Return True if a trial can have this value."""
        if self.choices is not None:
            return value in self.choices
        assert self.low is not None
        assert self.high is not None
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return bool(self.low <= value <= self.high and abs(steps - round(steps)) < 1e-9)

    def to_optuna(self, kind: Kind) -> Any:
        """Return the distribution as an `optuna.distributions.BaseDistribution`."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices is not None:
            return CategoricalDistribution(self.choices)
        assert self.low is not None
        assert self.high is not None
        if kind == "integer":
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(float(self.low), float(self.high), log=self.log, step=self.step)


Space = dict[str, dict[str, Distribution]]
"""Distributions by section and field of the recipe."""


class SearchConfig(Section):
    """The trials of `tinyemo tune` and how the winner is chosen."""

    space: Space = Field(default_factory=dict)
    """The knobs, as section.field = { choices = [...] } or { low, high, log, step }."""
    num_trials: PositiveInt = 100
    """Trials of the search, failed ones too. Each trains for train.num_epochs epochs at most."""
    seed: NonNegativeInt = 0
    """Seed of the sampler. Each trial trains with train.seed."""
    num_startup_trials: PositiveInt = 20
    """Trials drawn at random before TPE has enough to learn from."""
    num_folds: PositiveInt = 1
    """Validation folds of a trial, which is judged by the mean over them: data.validation_fold and the next ones."""
    grace_epochs: PositiveInt = 1
    """Epochs before ASHA may stop a trial."""
    reduction_factor: float = Field(3, gt=1)
    """At each rung ASHA lets the best 1 / reduction_factor of the trials continue."""
    cpus_per_trial: PositiveFloat = 0.5
    """CPUs that Ray reserves for a trial; below 1 several trials share one."""
    gpus_per_trial: NonNegativeFloat = 0
    """GPUs that Ray reserves for a trial; below 1 several trials share one, 0 trains on CPUs."""
    max_concurrent: NonNegativeInt = 0
    """Largest number of trials at a time; 0 for as many as the cluster could have room for."""
    objective: Literal["seen", "seen_and_zero_shot"] = "seen"
    """seen: validation accuracy. seen_and_zero_shot: also the accuracy on the labels of data.leave_out."""
    num_finalists: NonNegativeInt = 5
    """Number of finished trials that train again with other seeds before one is chosen; 0 takes the best trial."""
    finalist_seeds: PositiveInt = 3
    """Seeds of each finalist."""
    winner_seeds: PositiveInt = 5
    """Runs of `tinyemo train` with the winner, from seed train.seed on; only these runs read the test split."""
    registered_name: str = "tinyemo-projector-tuned"
    """Registered model in MLflow that the winner becomes a version of, the first one with the alias champion."""

    def knobs(self) -> dict[str, Distribution]:
        """Return the distributions by dotted name, in the order of KNOBS."""
        return {
            knob: self.space[section][field]
            for knob in KNOBS
            for section, field in [knob.split(".")]
            if field in self.space.get(section, {})
        }

    def to_optuna(self) -> dict[str, Any]:
        """Return Optuna's distributions by dotted name."""
        return {knob: distribution.to_optuna(KNOBS[knob]) for knob, distribution in self.knobs().items()}


def space_problems(space: Space) -> list[str]:
    """Return the problems of the space itself, one line for each knob; a recipe's own checks come later."""
    problems = []
    for section, fields in space.items():
        for field, distribution in fields.items():
            knob = f"{section}.{field}"
            kind = KNOBS.get(knob)
            if kind is None:
                problems.append(f"search.space.{knob}: is no knob of a search; these are: {', '.join(KNOBS)}")
            elif distribution.choices is None:
                ends = (distribution.low, distribution.high, distribution.step)
                if kind == "choice":
                    problems.append(f"search.space.{knob}: needs choices = [...], it has no range")
                elif kind == "integer" and any(end is not None and end != int(end) for end in ends):
                    problems.append(
                        f"search.space.{knob}: needs whole numbers, got {distribution.low} and {distribution.high}"
                    )
    return problems
