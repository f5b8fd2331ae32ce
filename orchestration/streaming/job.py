"""Read a recipe's instruct records to the end, as training would, and say how fast they come.

It answers what a GPU hour should not have to: does the data flow fast enough, and is every record where the plan says?
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from orchestration.recipe import Recipe
from orchestration.services import storage
from orchestration.streaming.epoch_plan import shuffle_quality
from orchestration.streaming.ledger import LedgerCheck, check_ledger, read_ledger
from orchestration.streaming.prepare import prepare_records
from orchestration.streaming.record_stream import RecordPlan
from tinyemo.errors import TrainingError

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all) at each new checkpoint."""


@dataclass(frozen=True)
class StreamResult:
    """What a finished reading says of itself.

    Attributes:
        num_steps: over all epochs.
        num_samples: records that the last attempt handed out.
        samples_per_s: over all ranks and the second half of the last attempt's steps.
        first_batch_s: seconds from opening the stream to the first batch.
        shuffle: see `orchestration.streaming.epoch_plan.ShuffleQuality`.
        ledger: what the ledger shows, None without one.
    """

    name: str
    folder: str
    num_steps: int
    num_samples: int
    samples_per_s: float
    first_batch_s: float
    shuffle: dict[str, float]
    ledger: dict[str, int] | None


def read_stream(recipe: Recipe, *, has_ledger: bool = False, on_step: OnStep | None = None) -> StreamResult:
    """Read every step of a recipe, from where an earlier call of the same name left it, at any number of workers.

    Raises:
        TrainingError: the name belongs to other records or another order, or workers were lost too often.
        TinyEmoError: see `prepare_records`, and what the servers say.
    """
    plan = prepare_records(recipe)
    folder = f"{recipe.checkpoint.root}/{recipe.name}"
    _claim(folder, recipe, plan)
    if storage.exists(f"{folder}/result.json"):
        logger.warning("%s is finished already; its result stands in %s", recipe.name, folder)
        return StreamResult(**storage.read_json(f"{folder}/result.json"))
    # Torch and Ray take seconds to import: what is wrong with a recipe or its records has been said by now.
    from orchestration.jobs.attempts import ReportCallback, run_phase
    from orchestration.services.ray_cluster import connect
    from orchestration.streaming.loop import StreamJob, stream_loop_per_worker

    connect()
    job = StreamJob(recipe, plan, folder, has_ledger)
    watch = (lambda state: on_step(state.step, plan.num_steps)) if on_step else None
    final = run_phase(job, stream_loop_per_worker, ReportCallback(f"{folder}/read", None), on_report=watch)
    check = check_ledger(read_ledger(folder), plan, plan.num_steps) if has_ledger else None
    result = StreamResult(
        name=recipe.name,
        folder=folder,
        num_steps=plan.num_steps,
        num_samples=final.metrics["num_samples"],
        samples_per_s=final.metrics["samples_per_s"],
        first_batch_s=final.metrics["first_batch_s"],
        shuffle=asdict(shuffle_quality(plan.steps)),
        ledger=None if check is None else asdict(check),
    )
    storage.write_json(f"{folder}/result.json", asdict(result))
    if check is not None:
        _require_exact(check, folder)
    return result


def _claim(folder: str, recipe: Recipe, plan: RecordPlan) -> None:
    """Take the name for this order of these records, which the number of workers does not change."""
    order: dict[str, Any] = {
        "records": [part.manifest.digest for part in plan.sets],
        "split": recipe.records.split,
        "weights": list(recipe.records.weights),
        "shuffle_pool_rows": recipe.records.shuffle_pool_rows,
        "tail": recipe.records.tail,
        "seed": recipe.train.seed,
        "global_batch_size": recipe.train.global_batch_size,
        "num_epochs": recipe.train.num_epochs,
    }
    uri = f"{folder}/run.json"
    if not storage.exists(uri):
        storage.write_json(uri, {"kind": "stream", "order": order})
        return
    claim = storage.read_json(uri)
    theirs = claim.get("order", {})
    changed = [f"{key} {theirs.get(key)} -> {value}" for key, value in order.items() if theirs.get(key) != value]
    if claim.get("kind") != "stream" or changed:
        raise TrainingError(
            f"a run named {recipe.name} exists with another order ({'; '.join(changed)}): choose another name with "
            "--set name=..., or undo the change to go on with it"
        )


def _require_exact(check: LedgerCheck, folder: str) -> None:
    if not check.is_exact:
        raise TrainingError(
            f"the ledger of {folder} is not the plan: {check.num_wrong_steps} steps differ, {check.num_lost} records "
            f"lost, {check.num_doubled} doubled; please report it"
        )
