"""The last reading: held-out records with their own image, with another's, and with none."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from orchestration.reasoning.loop import use_threads
from orchestration.reasoning.paired import PairedTest, mean_by_group, other_images, paired_test
from orchestration.reasoning.steps import Inputs, losses_by_record
from orchestration.reasoning.weights import build_trained
from orchestration.recipe import Recipe
from orchestration.recipe.stage_config import StageConfig
from orchestration.services.engine import compute_dtype
from orchestration.streaming.record_batches import RecordBatch
from orchestration.streaming.record_stream import RecordPlan, build_record_dataset, open_record_stream
from tinyemo.errors import DataError
from tinyemo.packing import micro_batches
from tinyemo.reasoner.model import Reasoner

if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)

CONDITIONS = ("right", "shuffled", "text_only")
"""The record's own image; another record's; neither image nor image tokens, the rest of the prompt as it was."""


@dataclass(frozen=True)
class EvaluateJob:
    """What every rank gets to know of the evaluation.

    Attributes:
        plan: of the records, one epoch.
        weights: S3 folder of each stage's trained weights, by its name.
        resume_from: unused; an evaluation that lost a worker starts anew.
        start_step: likewise.
    """

    recipe: Recipe
    plan: RecordPlan
    weights: dict[str, str]
    resume_from: str | None = None
    start_step: int = 0

    def datasets(self) -> dict[str, ray.data.Dataset]:
        """The records."""
        return {"samples": build_record_dataset(self.plan, 0)}


def evaluate_loop_per_worker(config: dict[str, Any]) -> None:
    """Measure every record of the plan on this rank; the final report holds a row for each, of all ranks."""
    import ray.train
    from ray.train.torch import get_device

    job: EvaluateJob = config["job"]
    rank, device = ray.train.get_context().get_world_rank(), get_device()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING)
    use_threads(job.recipe)
    model = build_trained(job.recipe, job.weights).to(device=device, dtype=compute_dtype(job.recipe.engine))
    records = open_record_stream(ray.train.get_dataset_shard("samples"), job.plan, rank=rank, start_step=0)
    last = _last(job.recipe)
    conditions = CONDITIONS if last.images else ("text_only",)
    rows = list(measure_records(model, records, conditions, micro_batch_size=last.micro_batch_size))
    gathered: list[list[dict[str, Any]]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, rows)
    report_rows([row for part in gathered for row in part], job.plan.num_steps, rank)


def _last(recipe: Recipe) -> StageConfig:
    return list(recipe.stages.values())[-1]


def report_rows(rows: list[dict[str, Any]], step: int, rank: int) -> None:
    """The rows of all ranks as the final report; a barrier."""
    import json
    import tempfile
    from pathlib import Path

    import ray.train

    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "rows.json").write_text(json.dumps(rows))
        checkpoint = ray.train.Checkpoint.from_directory(name) if rank == 0 else None
        ray.train.report({"step": step, "is_final": True}, checkpoint=checkpoint)


@torch.no_grad()
def measure_records(
    model: Reasoner, stream: Iterator[RecordBatch], conditions: Sequence[str] = CONDITIONS, *, micro_batch_size: int
) -> Iterator[dict[str, Any]]:
    """A row for each record: id, image (a digest of its pixels), num_answer_tokens, and the mean nats of its answer's
    tokens under each of the conditions.

    Another record's image is handed out within the batch, each once; a batch that is too much of one image takes from
    the batch before.

    Raises:
        DataError: there are not enough images to swap.
    """
    device = next(model.parameters()).device
    inputs = Inputs(model.config.encoder_spec.preprocessing, device, model.config.image_token_id)
    spare: tuple[list[str], Tensor] | None = None
    model.eval()
    for whole in stream:
        batch = whole.part(slice(0, int(whole.is_real.sum())))  # what fills up the last batch stands at its end
        if not batch.ids:
            continue
        names = [_digest(pixels) for pixels in batch.pixel_values]
        others = _shuffled(names, batch.pixel_values, spare) if "shuffled" in conditions else batch.pixel_values
        spare = (names, batch.pixel_values)
        for rows in micro_batches(len(names), micro_batch_size):
            part = batch.part(rows)
            options: dict[str, dict[str, Any]] = {
                "right": {}, "shuffled": {"images": others[rows]}, "text_only": {"has_images": False},
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


def _shuffled(names: list[str], pixels: Tensor, spare: tuple[list[str], Tensor] | None) -> Tensor:
    """Another record's pixels for each record."""
    if spare is not None and 2 * max(names.count(name) for name in names) > len(names):
        names, pixels = names + spare[0], torch.cat([pixels, spare[1]])
    try:
        return pixels[torch.from_numpy(other_images(names))]
    except ValueError as error:
        raise DataError(f"images cannot be shuffled for the evaluation: {error}; give it more records") from error


@dataclass(frozen=True)
class Evaluation:
    """What the rows say.

    Attributes:
        num_records: measured.
        num_images: different images among them.
        loss: mean over records of the nats a token of an answer, by condition.
        tests: right image against "shuffled" and "text_only", over records; none of a model of text alone.
        tests_by_image: the same over images, each the mean of its records, which are no independent draws.
        by_task: mean loss by condition, for each task that ids name (the part behind the last slash).
    """

    num_records: int
    num_images: int
    loss: dict[str, float]
    tests: dict[str, PairedTest]
    tests_by_image: dict[str, PairedTest]
    by_task: dict[str, dict[str, float]]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def summarise(rows: list[dict[str, Any]]) -> Evaluation:
    """Means and paired tests of the rows of `measure_records`, one at least."""
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
