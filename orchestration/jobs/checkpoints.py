"""Checkpoints, progress and curves of a stage in S3, and how a rank reads a checkpoint back.

<stage>/latest.json                     the newest complete checkpoint, as a `StageState`
<stage>/progress.json                   the newest figures
<stage>/curve/<first step>.json         [(step, metrics), ...] of one report
<stage>/attempt-<ms>/checkpoint_<time>/ engine/ (one part per rank, DeepSpeed's own files) and the task's files
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.services import storage

if TYPE_CHECKING:
    from orchestration.services.engine import Engine

PROGRESS = "progress.json"
Curve = list[tuple[int, dict[str, float]]]
"""(step, metrics) in the order of steps."""


@dataclass(frozen=True)
class StageState:
    """Content of a stage's latest.json.

    Attributes:
        folder: S3 folder of the stage.
        checkpoint: S3 folder of the newest complete checkpoint.
        step: optimizer steps done in it.
        is_final: whether the stage has ended.
        metrics: figures of the newest report with a checkpoint.
    """

    folder: str
    checkpoint: str
    step: int
    is_final: bool
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Done:
    """A finished stage: its newest state, its MLflow run, and the wall clock of this call, 0 where it was finished."""

    state: StageState
    run_id: str
    duration_s: float


def read_state(folder: str) -> StageState | None:
    """Return the newest complete checkpoint of the stage in an S3 folder, or None."""
    uri = f"{folder}/latest.json"
    return StageState(**storage.read_json(uri)) if storage.exists(uri) else None


def read_curve(folder: str) -> Curve:
    """Return (step, metrics) of every report of a stage, in the order of steps, each step once."""
    points: dict[int, dict[str, float]] = {}
    with ThreadPoolExecutor(storage.TRANSFER_THREADS) as pool:
        for part in pool.map(storage.read_json, sorted(storage.list_prefix(f"{folder}/curve/"))):
            for step, metrics in part:
                points.setdefault(step, {}).update(metrics)
    return sorted(points.items())


def delete_old_attempts(folder: str, state: StageState | None) -> None:
    """Delete every checkpoint of a stage but its newest complete one, and what unfinished attempts left."""
    kept = f"{state.checkpoint}/" if state is not None else None
    for uri in storage.list_prefix(folder):
        is_attempt = uri.removeprefix(f"{folder}/").startswith("attempt-")
        if is_attempt and (kept is None or not uri.startswith(kept)):
            storage.delete(uri)


@contextmanager
def restored(uri: str, engine: Engine | None, *, rank: int, local_rank: int, world_size: int) -> Iterator[Path]:
    """Restore the engine from a checkpoint in S3 and yield the local folder with the task's own files.

    Each rank fetches its own part, and the first rank of each node fetches what all ranks share.

    Raises:
        TrainingError: the checkpoint was written by another number of workers.
    """
    from orchestration.services.engine import is_part_of, load_engine, require_parts

    if engine is not None:
        require_parts(engine, storage.list_prefix(uri), world_size)

    def is_wanted(name: str) -> bool:
        owner = is_part_of(name)
        return owner == rank or (owner is None and local_rank == 0)

    with fetched(uri, is_wanted, local_rank=local_rank) as folder:
        if engine is not None:
            load_engine(engine, folder)
        yield folder


@contextmanager
def fetched(uri: str, is_wanted: Callable[[str], bool], *, local_rank: int) -> Iterator[Path]:
    """Yield a local folder with an S3 folder's files, shared by the ranks of a node; every rank calls it.

    Args:
        uri: of the folder in S3.
        is_wanted: whether this rank fetches a file, by its path in the folder.
        local_rank: of this rank on its node.
    """
    import torch

    token = [uuid.uuid4().hex]
    torch.distributed.broadcast_object_list(token)
    folder = Path(tempfile.gettempdir()) / f"tinyemo-{token[0]}"
    try:
        for address in storage.list_prefix(uri):
            name = address.removeprefix(f"{uri}/")
            if is_wanted(name):
                storage.download_file(address, folder / name)
        torch.distributed.barrier()
        yield folder
        torch.distributed.barrier()
    finally:
        if local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
