"""Train one trial of a search in memory: `tinyemo train` without DeepSpeed, Ray Data and checkpoints.

A trial takes the same samples in the same order, with the same objective, projector, optimizer and schedule, so its
losses are those of a run of the same recipe; a test compares the two curves. N rows, d encoder width, T texts, D width.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from orchestration.data.plan import Plan, PlannedSet, RowGroups
from orchestration.data.sets import RecordSet, SplitRows, carve_validation, features_array, read_records
from orchestration.jobs.prepare import Preparation
from orchestration.jobs.projector import build_projector, objective_of
from orchestration.recipe import Recipe
from orchestration.search.trials import SEEN, ZERO_SHOT, trial_recipe
from orchestration.services.engine import build_optimizer, build_schedule
from tinyemo.errors import TrainingError
from tinyemo.label_embeddings import LabelEmbeddings

REPORTED_TEMPERATURE = 0.07
"""Temperature of `val/cross_entropy`, as in `tinyemo train`."""


@dataclass(frozen=True)
class SharedRows:
    """Rows in the object store; the arrays are read-only views of it in every process.

    Attributes:
        features: (N, d) float16 or float32.
        labels: (N,) index into the words.
        id_hash: (N,) hashes of the rows' ids.
        group: (N,) int64, row group that holds each row in storage; the order of a run depends on it.
    """

    features: NDArray[Any]
    labels: NDArray[np.int64]
    id_hash: NDArray[np.uint64]
    group: NDArray[np.int64]

    def split_rows(self) -> SplitRows:
        """Return the rows as `carve_validation` takes them; `row` is the place in `features`."""
        places = np.arange(len(self.labels), dtype=np.int32)
        return SplitRows(np.zeros_like(places), places, self.labels, self.id_hash)


@dataclass(frozen=True)
class SearchData:
    """Everything that the trials of a search read, put into the object store once.

    Attributes:
        train: rows of the train split; the test split is not here.
        planned: the record set of those rows, as a plan takes it.
        left_out: train rows of the labels that data.leave_out names.
        label_vectors: for each template, (T, D) float32, not normalised.
        label_names: the other fields of the label embeddings: words, llm, llm_revision, llm_weights.
    """

    words: tuple[str, ...]
    train: SharedRows
    planned: PlannedSet
    left_out_words: tuple[str, ...]
    left_out: SharedRows | None
    label_vectors: dict[str, NDArray[np.float32]]
    label_names: dict[str, Any]

    def labels(self, template: str) -> LabelEmbeddings:
        """Return the label embeddings of a template."""
        with warnings.catch_warnings():
            # Arrays in the object store are read-only, which a tensor cannot be; nothing writes to these vectors.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            vectors = torch.from_numpy(self.label_vectors[template])
        return LabelEmbeddings(vectors=vectors, template=template, **self.label_names)


def shared_rows(record_set: RecordSet, rows: SplitRows) -> SharedRows:
    """Read the features of a record set from S3; `rows` holds its labels and ids."""
    numbers = np.arange(record_set.num_rows)
    features = features_array(read_records(record_set, numbers, ["features"]))
    group = record_set.stored_groups.groups_of(record_set.stored_rows(numbers))
    return SharedRows(features, rows.label, rows.id_hash, group)


def read_search_data(preparation: Preparation, labels: list[LabelEmbeddings]) -> SearchData:
    """Read the train rows from S3, once for the whole search."""
    first = labels[0]
    names = {name: getattr(first, name) for name in ("words", "llm", "llm_revision", "llm_weights")}
    selection = preparation.selection
    left_out = selection.left_out
    record_set = preparation.record_set(selection.whole)
    return SearchData(
        words=preparation.words,
        train=shared_rows(record_set, selection.whole),
        planned=record_set.planned(),
        left_out_words=selection.left_out_words,
        left_out=None if left_out is None else shared_rows(preparation.record_set(left_out), left_out),
        label_vectors={item.template: item.vectors.numpy() for item in labels},
        label_names=names,
    )


class FoldTraining:
    """A projector that is trained on all rows but one validation fold.

    Attributes:
        curve: step and loss of every optimizer step so far.
    """

    def __init__(self, recipe: Recipe, data: SearchData, device: torch.device) -> None:
        self.recipe, self.data, self.device = recipe, data, device
        self.rows, self.validation = carve_validation(
            data.train.split_rows(), fraction=recipe.data.validation_fraction, fold=recipe.data.validation_fold
        )
        counts = np.bincount(data.train.group[self.rows.row])
        planned = replace(data.planned, groups=RowGroups.of(counts[counts > 0]))
        train, pool_bytes = recipe.train, int(recipe.data.pool_mib * 2**20)
        self.plan = Plan((planned,), train.seed, train.global_batch_size, train.num_epochs, pool_bytes, "carry")
        self.order = self.plan.refs(0, self.plan.num_steps).row.reshape(-1, train.global_batch_size)
        self.labels = data.labels(recipe.labels.template)
        self.objective = objective_of(recipe, self.labels, data.words).to(device)
        self.model = build_projector(recipe).to(device)
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.schedule = build_schedule(recipe.optimizer, self.plan.num_steps)(self.optimizer)
        self.step = 0
        self.curve: list[tuple[int, float]] = []

    def train_to(self, stop: int) -> None:
        """Take optimizer steps until `stop` are done.

        Raises:
            TrainingError: a loss is not finite.
        """
        self.model.train()
        for step in range(self.step, stop):
            places = self.order[step]
            loss = self.objective.step_loss(self.model, self._features(places), self.rows.label[places], step)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise TrainingError(f"train/loss is {value} at step {step}")
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.schedule.step()
            self.curve.append((step, value))
        self.step = stop

    def _features(self, places: NDArray[np.int64]) -> Tensor:
        rows = self.data.train.features[self.rows.row[places]]
        return torch.from_numpy(rows.astype(np.float32)).to(self.device)

    def validate(self) -> dict[str, float]:
        """Return accuracy and cross-entropy (nats) on the fold, and zero-shot accuracy where labels are left out."""
        place = self.validation.row
        metrics = {}
        if len(place):
            labels = torch.from_numpy(self.validation.label)
            scores = self._scores(self.data.train.features[place], self.data.words)
            metrics = {
                SEEN: _accuracy(scores, labels),
                "val/cross_entropy": float(F.cross_entropy(scores / REPORTED_TEMPERATURE, labels)),
            }
        left_out = self.data.left_out
        if left_out is not None and len(self.data.left_out_words) > 1:
            metrics[ZERO_SHOT] = self.accuracy(left_out, self.data.left_out_words)
        return metrics

    def accuracy(self, rows: SharedRows, words: tuple[str, ...]) -> float:
        """Return the share of the rows whose nearest word is their label."""
        return _accuracy(self._scores(rows.features, words), torch.tensor(rows.labels))

    @torch.no_grad()
    def _scores(self, features: NDArray[Any], words: tuple[str, ...]) -> Tensor:
        self.model.eval()
        embeds = self.model(torch.from_numpy(features.astype(np.float32)).to(self.device))
        texts = F.normalize(self.labels.select(words), dim=-1).to(self.device)
        scores: Tensor = embeds @ texts.T
        return scores.cpu()


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(dim=1) == labels).double().mean())


class PackedTrial:
    """One trial: its folds side by side, an epoch at a time."""

    def __init__(self, recipe: Recipe, data: SearchData, *, num_folds: int, device: Literal["cpu", "cuda"]) -> None:
        self.folds = [FoldTraining(_at_fold(recipe, fold), data, torch.device(device)) for fold in range(num_folds)]
        self.num_epochs = min(len(fold.plan.epoch_ends()) for fold in self.folds)
        self.epoch = 0

    @property
    def is_finished(self) -> bool:
        """True once every epoch is done."""
        return self.epoch >= self.num_epochs

    def train_epoch(self) -> dict[str, float]:
        """Train every fold for one epoch and return the means of their metrics.

        Raises:
            TrainingError: a loss is not finite.
        """
        by_fold = []
        for fold in self.folds:
            first = fold.step
            fold.train_to(fold.plan.epoch_ends()[self.epoch])
            loss = float(np.mean([value for _, value in fold.curve[first:]]))
            by_fold.append({"train/loss": loss, **fold.validate()})
        self.epoch += 1
        return {key: float(np.mean([metrics[key] for metrics in by_fold])) for key in by_fold[0]}


def _at_fold(recipe: Recipe, fold: int) -> Recipe:
    data = recipe.data.model_copy(update={"validation_fold": recipe.data.validation_fold + fold})
    return recipe.model_copy(update={"data": data})


def final_accuracy(recipe: Recipe, params: dict[str, Any], seed: int, data: SearchData) -> float:
    """Return the validation accuracy after the last epoch, as a mean over all folds, the search's and the others."""
    torch.set_num_threads(max(1, int(recipe.search.cpus_per_trial)))
    trial = PackedTrial(
        trial_recipe(recipe, {**params, "data.validation_fold": 0}, seed=seed),
        data,
        num_folds=int(1 / recipe.data.validation_fraction + 1e-9),
        device="cuda" if recipe.search.gpus_per_trial else "cpu",
    )
    metrics: dict[str, float] = {}
    while not trial.is_finished:
        metrics = trial.train_epoch()
    return metrics[SEEN]
