"""The evaluation's task: held-out records with their own image, with another record's (its partner), and with none."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import ray.train
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestration.data.batch import Batch
from orchestration.data.manifest import read_index
from orchestration.data.plan import Ints
from orchestration.data.sets import RecordSet
from orchestration.data.stream import Stream
from orchestration.jobs.checkpoints import fetched
from orchestration.jobs.paired import PairedTest, mean_by_group, paired_test
from orchestration.jobs.steps import Inputs, losses_by_record
from orchestration.jobs.worker import Point, Stage
from orchestration.services.engine import compute_dtype
from tinyemo.errors import DataError
from tinyemo.packing import micro_batches
from tinyemo.reasoner.model import Reasoner

logger = logging.getLogger(__name__)

CONDITIONS = ("right", "shuffled", "text_only")
"""The record's own image; another record's; neither image nor image tokens, the rest of the prompt as it was."""
ROWS = "rows.json"


@dataclass(frozen=True)
class EvaluationJob:
    """Inputs of the evaluation beside its stream: the S3 folder of the exported model, and how it is measured."""

    model: str
    conditions: tuple[str, ...]
    micro_batch_size: int


@dataclass
class EvaluationState:
    """State of a rank: the model and the rows of its records; after a restart rank 0 has the rows of all ranks."""

    model: Reasoner
    job: EvaluationJob
    rows: list[dict[str, Any]] = field(default_factory=list)
    engine: None = None


def build(stage: Stage, device: torch.device) -> EvaluationState:
    """Return the exported model on the device; each node fetches it once."""
    local_rank = ray.train.get_context().get_local_rank()
    with fetched(stage.job.model, lambda name: local_rank == 0, local_rank=local_rank) as folder:
        model = Reasoner.from_pretrained(folder, dtype=compute_dtype(stage.recipe.engine))
        assert isinstance(model, Reasoner)
        model.to(device).eval()
    return EvaluationState(model, stage.job)


def take_step(state: EvaluationState, batch: Any, *, is_logged: bool) -> Point:
    """Measure this rank's records of a batch."""
    conditions, size = state.job.conditions, state.job.micro_batch_size
    state.rows += measure_records(state.model, [batch], conditions, micro_batch_size=size)
    return {}


def rates(state: EvaluationState, elapsed_s: float) -> dict[str, float]:
    """Return no figures."""
    return {}


def measure(state: EvaluationState, stage: Stage, epoch: int, step: int) -> dict[str, float]:
    """Return no figures."""
    return {}


def save(state: EvaluationState, folder: Path) -> None:
    """Write the rows of all ranks so far on rank 0."""
    gathered: list[list[dict[str, Any]]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, state.rows)
    if torch.distributed.get_rank() == 0:
        (folder / ROWS).write_text(json.dumps([row for part in gathered for row in part]))


def load(state: EvaluationState, folder: Path) -> None:
    """Read the rows of all ranks on rank 0."""
    if torch.distributed.get_rank() == 0:
        state.rows = json.loads((folder / ROWS).read_text())


def finish(state: EvaluationState, stage: Stage, folder: Path) -> dict[str, Any]:
    """Return no figures: `save` writes the rows."""
    return {}


@torch.no_grad()
def measure_records(
    model: Reasoner,
    stream: Iterable[Batch],
    conditions: Sequence[str] = CONDITIONS,
    *,
    micro_batch_size: int,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each record: id, image, num_answer_tokens, and the answer's mean nats under each condition.

    `image` is a digest of the record's pixels.

    The stream says which other record's image stands in, see `with_partners`.
    """
    device = next(model.parameters()).device
    inputs = Inputs(model.config.encoder_spec.preprocessing, device, model.config.image_token_id)
    model.eval()
    for whole in stream:
        batch = whole.part(slice(0, int(whole.is_real.sum())))  # what fills up the last batch stands at its end
        if not batch.ids:
            continue
        assert batch.pixel_values is not None
        names = [_digest(pixels) for pixels in batch.pixel_values]
        for rows in micro_batches(len(names), micro_batch_size):
            part = batch.part(rows)
            options: dict[str, dict[str, Any]] = {
                "right": {}, "shuffled": {"images": part.other_pixel_values}, "text_only": {"has_images": False},
            }  # fmt: skip
            micro = {name: inputs.micro_batch(part, **options[name]) for name in conditions}
            found = {name: losses_by_record(one, one.forward(model)) for name, one in micro.items()}
            for place, record_id in enumerate(part.ids):
                num_tokens = found[conditions[0]][place][0]
                means = {name: found[name][place][1] / num_tokens for name in conditions}
                image = names[rows.start + place]
                yield {"id": record_id, "image": image, "num_answer_tokens": num_tokens, **means}


def _digest(pixels: Tensor) -> str:
    return hashlib.blake2b(pixels.numpy().tobytes(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Evaluation:
    """Figures of an evaluation.

    Attributes:
        num_records: measured.
        num_images: different images among them.
        loss: mean over records of the nats a token of an answer, by condition.
        tests: right image against "shuffled" and "text_only", over records; none of a model of text alone.
        tests_by_image: the same over images, each the mean of its records, which are no independent draws.
        by_task: mean loss by condition, for each task that ids name (the part after the last slash).
    """

    num_records: int
    num_images: int
    loss: dict[str, float]
    tests: dict[str, PairedTest]
    tests_by_image: dict[str, PairedTest]
    by_task: dict[str, dict[str, float]]


def summarise(rows: list[dict[str, Any]]) -> Evaluation:
    """Return means and paired tests of the rows of `measure_records`, of which there is at least one."""
    measured = [name for name in CONDITIONS if name in rows[0]]
    losses = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in measured}
    images = [row["image"] for row in rows]
    by_image = {name: mean_by_group(values, images) for name, values in losses.items()}
    tasks = np.array([row["id"].rsplit("/", 1)[-1] if "/" in row["id"] else "all" for row in rows])
    return Evaluation(
        num_records=len(rows),
        num_images=len(set(images)),
        loss={name: float(values.mean()) for name, values in losses.items()},
        tests={name: paired_test(losses["right"], losses[name]) for name in measured[1:]},
        tests_by_image={name: paired_test(by_image["right"], by_image[name]) for name in measured[1:]},
        by_task={
            str(task): {name: float(values[tasks == task].mean()) for name, values in losses.items()}
            for task in np.unique(tasks)
        },
    )


def with_partners(stream: Stream) -> Stream:
    """Return the stream with a partner for each record, chosen over all records and so independent of ranks.

    A partner stands in the same pool where the pool has enough images, so that its image is fetched with the pool.

    Raises:
        DataError: one image has more than half of the records.
        StorageError: S3 cannot be read.
    """
    images = np.concatenate([_image_names(part) for part in stream.sets])
    first = np.cumsum([0, *(part.num_rows for part in stream.sets)])
    partners = np.empty(len(images), dtype=np.int64)
    one_epoch = replace(stream.plan, num_epochs=1, max_steps=None, tail="pad")
    try:
        for window in one_epoch.windows():
            rows = first[window.source] + one_epoch.records(window).row
            partners[rows] = rows[other_images(images[rows])]
    except ValueError:
        try:
            partners = other_images(images)
        except ValueError as error:
            raise DataError(f"images cannot be shuffled for the evaluation: {error}; give it more records") from error
    return replace(stream, partners=partners)


def _image_names(record_set: RecordSet) -> NDArray[np.uint64]:
    index = read_index(record_set.manifest)
    index = index.filter(pc.equal(index["split"], record_set.split))
    rows = record_set.row_numbers(np.asarray(index["shard"]), np.asarray(index["row"]))
    return np.asarray(index["image_hash"])[np.argsort(rows)][record_set.stored_rows(np.arange(record_set.num_rows))]


def other_images(images: Sequence[str] | NDArray[Any]) -> Ints:
    """Return for each record the place of a record with another image; each record's image is handed out once.

    Records are put in the order of their images and that order is turned by the size of the largest group.

    Args:
        images: N names of images; no more than half of them may be the same.

    Raises:
        ValueError: one image has more than half of the records, so that no such assignment exists.
    """
    order = np.argsort(np.asarray(images), kind="stable")
    largest = int(np.unique(np.asarray(images), return_counts=True)[1].max())
    if 2 * largest > len(images):
        raise ValueError(f"{largest} of {len(images)} records have one image: there are not enough others to swap with")
    found = np.empty(len(images), dtype=np.int64)
    found[order] = np.roll(order, -largest)
    return found
