"""A reading: take every batch of a recipe's records without a model, as `tinyemo stream` does.

It answers before a GPU hour is spent: does the data flow fast enough, and is every record where the plan says? The
functions of the task come first, then the job. Torch and Ray are imported once recipe and records have been checked.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.data.ledger import Ledger, check_ledger, read_ledger
from orchestration.data.plan import shuffle_quality
from orchestration.data.sets import open_record_set
from orchestration.data.stream import NO_DATASET, Stream, plan_records
from orchestration.jobs.checkpoints import StageState, read_curve
from orchestration.jobs.lease import hold_lease, read_claim, run_folder
from orchestration.jobs.results import StreamResult
from orchestration.recipe import Recipe
from orchestration.services import storage
from tinyemo.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    import torch

    from orchestration.jobs.attempts import Progress
    from orchestration.jobs.worker import Point, Stage

logger = logging.getLogger(__name__)


@dataclass
class ReadingState:
    """State of a rank while it reads.

    Attributes:
        ledger: lines of this rank; None without a ledger.
        half: step from which reading is timed: what was read ahead while the workers came up would flatter the rate.
        half_at: time at which that step came.
    """

    ledger: Ledger | None
    half: int
    half_at: float
    engine: None = None
    step: int = 0


def build(stage: Stage, device: torch.device) -> ReadingState:
    """Return the state of a reading; `stage.job` is the run's S3 folder, or None without a ledger."""
    import ray.train

    context = ray.train.get_context()
    attempt, rank = context.get_experiment_name(), context.get_world_rank()
    ledger = Ledger(stage.job, attempt=attempt, rank=rank) if stage.job is not None else None
    return ReadingState(ledger, (stage.start_step + stage.num_steps) // 2, time.perf_counter())


def take_step(state: ReadingState, batch: Any, *, is_logged: bool) -> Point:
    """Note which records this rank got."""
    if batch.step == state.half:
        state.half_at = time.perf_counter()
    if state.ledger is not None:
        state.ledger.add(batch.epoch, batch.step, batch.ids)
    state.step = batch.step + 1
    return {}


def rates(state: ReadingState, elapsed_s: float) -> dict[str, float]:
    """Return no figures."""
    return {}


def measure(state: ReadingState, stage: Stage, epoch: int, step: int) -> dict[str, float]:
    """Return no figures."""
    return {}


def save(state: ReadingState, folder: Path) -> None:
    """Write the ledger's lines to S3."""
    if state.ledger is not None:
        state.ledger.flush()


def load(state: ReadingState, folder: Path) -> None:
    """Read nothing."""


def finish(state: ReadingState, stage: Stage, folder: Path) -> dict[str, Any]:
    """Return the rate of the second half, samples per second, and the number of samples of this attempt."""
    size = stage.streams["train"].plan.global_batch_size
    return {
        "samples_per_s": (state.step - state.half) * size / (time.perf_counter() - state.half_at),
        "num_samples": (state.step - stage.start_step) * size,
    }


def stage(plan: Stream, recipe: Recipe, folder: str, *, has_ledger: bool) -> Stage:
    """Return the only stage of a reading."""
    from orchestration.jobs.worker import Stage

    return Stage(__name__, "read", recipe, {"train": plan}, folder if has_ledger else None, prefix="")


def conclude(plan: Stream, recipe: Recipe, state: StageState, folder: str, *, has_ledger: bool) -> StreamResult:
    """Return the result of a finished reading."""
    first_s = [point["train/first_batch_s"] for _, point in read_curve(state.folder) if "train/first_batch_s" in point]
    return StreamResult(
        name=recipe.name,
        folder=folder,
        num_steps=plan.num_steps,
        num_samples=state.metrics["num_samples"],
        samples_per_s=state.metrics["samples_per_s"],
        first_batch_s=first_s[-1],
        shuffle=shuffle_quality(plan.plan),
        ledger=asdict(check_ledger(read_ledger(folder), plan, plan.num_steps)) if has_ledger else None,
    )


def require_exact(result: StreamResult) -> None:
    """Raise TrainingError where a ledger is not the plan."""
    found = result.ledger or {}
    if any(found.get(key) for key in ("num_wrong_steps", "num_lost", "num_doubled")):
        raise TrainingError(
            f"the ledger of {result.folder} is not the plan: {found['num_wrong_steps']} steps differ, "
            f"{found['num_lost']} records lost, {found['num_doubled']} doubled; please report it"
        )


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


def read_stream(recipe: Recipe, *, has_ledger: bool = False, progress: Progress | None = None) -> StreamResult:
    """Read every step of a recipe, from where an earlier call of the same name left it, at any number of workers.

    Raises:
        TrainingError: the name belongs to other records or another order, or workers were lost too often.
        TinyEmoError: see `prepare_records`, and what the servers say.
    """
    plan = prepare_records(recipe)
    folder, order = run_folder(recipe), order_only(recipe)
    data = _digests(plan)
    if read_claim(folder, order, data) is not None and storage.exists(f"{folder}/result.json"):
        logger.warning("%s is finished already; its result stands in %s", recipe.name, folder)
        return StreamResult(**storage.read_json(f"{folder}/result.json"))
    from orchestration.jobs.job import run_workers
    from orchestration.services.ray_cluster import connect

    connect()
    with hold_lease(folder, order, data, kind="stream") as lease:
        if lease.run_id is None:
            lease.write_claim("")
        state = run_workers(stage(plan, recipe, folder, has_ledger=has_ledger), f"{folder}/read", None, lease, progress)
        result = conclude(plan, recipe, state, folder, has_ledger=has_ledger)
        lease.write_json(f"{folder}/result.json", asdict(result))
    require_exact(result)
    return result


def describe_reading(recipe: Recipe) -> dict[str, Any]:
    """Return what is known of a reading before anything starts; also check that the name is free for it.

    Raises:
        TrainingError: the name belongs to other records or another order.
        TinyEmoError: see `prepare_records`.
    """
    plan = prepare_records(recipe)
    read_claim(run_folder(recipe), order_only(recipe), _digests(plan))
    return {
        "name": recipe.name,
        "records": {part.manifest.uri: part.manifest.splits[part.split].rows for part in plan.sets},
        "records_per_epoch": plan.plan.samples_per_epoch,
        "steps": plan.num_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "global_batch_size": plan.plan.global_batch_size,
        "windows": plan.plan.num_windows,
        "readers": plan.num_readers,
        "workers": plan.world_size,
    }


def _digests(plan: Stream) -> dict[str, str]:
    return {f"{place}/{part.manifest.name}": part.manifest.digest for place, part in enumerate(plan.sets)}
