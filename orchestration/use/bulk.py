"""One row of results per image, computed here or by actors on Ray; a killed run goes on where it stopped.

Rows are collected in `<output>.partial` (JSON Lines) as they are computed; the output itself appears whole, in the
order of the images. A row whose settings (model, words, ...) are those of the present call is never computed again.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tinyemo.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Row = dict[str, Any]
"""At least `image`, its location, and `problem`, why there is no result; None where there is one."""
Worker = Callable[[Sequence[str]], list[Row]]
"""Computes the rows of some images."""
Progress = Callable[[str, int, int], None]

SUFFIXES = (".parquet", ".jsonl")


@dataclass(frozen=True)
class Job:
    """The work of a bulk run.

    Attributes:
        build: makes a worker, on this machine or in an actor.
        settings: everything but the image that decides a row; a row is used again under equal settings only.
        chunk_size: images that a worker gets at once.
        output: .parquet or .jsonl file; None keeps rows in memory only.
        num_actors: None: as many as the cluster has room for.
    """

    build: Callable[[], Worker]
    settings: str
    chunk_size: int
    output: Path | None = None
    num_actors: int | None = None


@dataclass(frozen=True)
class Result:
    """Rows in the order of the images, and how many of them an earlier run had computed."""

    rows: list[Row]
    num_resumed: int

    @property
    def problems(self) -> dict[str, str]:
        """Image -> why it has no result."""
        return {row["image"]: row["problem"] for row in self.rows if row["problem"] is not None}

    def summary(self, done: str) -> str:
        """Return one line with counts that add up, for instance "5 images = 4 predicted + 1 unreadable"."""
        resumed = f"; {self.num_resumed} of them by an earlier run" if self.num_resumed else ""
        num_failed = len(self.problems)
        return f"{len(self.rows)} images = {len(self.rows) - num_failed} {done} + {num_failed} unreadable{resumed}"


def check_output(output: Path | None) -> None:
    """Raise ConfigError where the ending names no format that can be written."""
    if output is not None and output.suffix not in SUFFIXES:
        raise ConfigError(f"--output must end in {' or '.join(SUFFIXES)}, got {output.name!r}")


def run(job: Job, images: Sequence[str], *, on_cluster: bool, progress: Progress) -> Result:
    """Compute the row of every image, store them all in `job.output`, and return them.

    Args:
        job: the work.
        images: locations for `read_image`.
        on_cluster: use actors on the cluster that RAY_ADDRESS names.
        progress: told ("images", done, total).

    Raises:
        DataError: no image at all has a result; the message names the first reasons.
        TinyEmoError: the work cannot be done.
    """
    known = _read_stored(job) if job.output is not None else {}
    rows = {image: known[image] for image in images if image in known}
    num_resumed = len(rows)
    missing = [image for image in images if image not in rows]
    chunks = [missing[start : start + job.chunk_size] for start in range(0, len(missing), job.chunk_size)]
    progress("images", num_resumed, len(images))
    for done in _run_actors(job, chunks) if on_cluster and chunks else _run_here(job, chunks):
        rows.update({row["image"]: row for row in done})
        if job.output is not None:
            _append(_partial(job.output), [{**row, "settings": job.settings} for row in done])
        progress("images", len(rows), len(images))
    result = Result([rows[image] for image in images], num_resumed)
    if len(result.problems) == len(images):
        reasons = "; ".join(f"{image}: {problem}" for image, problem in list(result.problems.items())[:3])
        raise DataError(f"none of {len(images)} images can be used: {reasons}")
    if job.output is not None:
        write_rows(job.output, [{**row, "settings": job.settings} for row in result.rows])
        _partial(job.output).unlink(missing_ok=True)
    return result


def has_cluster(images: Sequence[str]) -> bool:
    """Return whether a Ray cluster is named whose nodes can all read the images.

    Files of this machine can be read by actors only where the cluster is this machine alone.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address or all(image.startswith("s3://") for image in images):
        return bool(address)
    import ray

    from orchestration.services.ray_cluster import connect

    connect()
    hosts = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    if hosts == {socket.gethostname()}:
        return True
    logger.warning("the images are files of this machine, so the Ray cluster of %d nodes is not used", len(hosts))
    return False


def _run_here(job: Job, chunks: Sequence[Sequence[str]]) -> Iterator[list[Row]]:
    worker = job.build() if chunks else None
    for chunk in chunks:
        assert worker is not None
        yield worker(chunk)


class BulkActor:
    """Ray Data actor that builds its worker with its first images and keeps it."""

    def __init__(self, build: Callable[[], Worker]) -> None:
        self.build = build
        self.worker: Worker | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the rows of the batch's images as JSON."""
        from orchestration.data.tasks import guarded

        return guarded(self._compute, batch)

    def _compute(self, batch: pa.Table) -> pa.Table:
        if self.worker is None:
            self.worker = self.build()
        rows = [row for images in batch["images"].to_pylist() for row in self.worker(images)]
        return pa.table({"row": [json.dumps(row) for row in rows]})


def _run_actors(job: Job, chunks: Sequence[Sequence[str]]) -> Iterator[list[Row]]:
    """Yield the rows of each chunk as its actor is done with it."""
    from orchestration.data.tasks import PoolConfig, run_on_actors
    from orchestration.services.ray_cluster import connect

    connect()
    done = run_on_actors(
        [{"images": list(chunk)} for chunk in chunks],
        BulkActor,
        (job.build,),
        PoolConfig(num_actors=job.num_actors),
        advice="run the same command again, which goes on from the rows that are done",
    )
    for table in done:
        yield [json.loads(text) for text in table["row"].to_pylist()]


def write_rows(path: Path, rows: list[Row], metadata: dict[str, Any] | None = None) -> None:
    """Write rows to a .parquet or .jsonl file, whole or not at all; scores become lists `words` and `scores`.

    Raises:
        DataError: the file cannot be written.
    """
    names = list(dict.fromkeys(name for row in rows for name in _flatten(row)))
    flat = [{name: _flatten(row).get(name) for name in names} for row in rows]
    whole = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            whole.write_text("".join(json.dumps(row) + "\n" for row in flat), encoding="utf-8")
        else:
            table = pa.Table.from_pylist(flat)
            kinds = [field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in table.schema]
            schema = pa.schema(kinds, metadata={"tinyemo": json.dumps(metadata or {})})
            pq.write_table(table.cast(schema), whole)
        whole.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}") from error


def _flatten(row: Row) -> Row:
    scores = row.get("scores")
    if not isinstance(scores, dict):
        return row
    return {**row, "words": list(scores), "scores": list(scores.values())}


def _partial(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def _append(path: Path, rows: list[Row]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            # A killed run may have left half a line, which must not join the first of these.
            file.write("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}") from error


def _read_stored(job: Job) -> dict[str, Row]:
    """Return the results that earlier calls with the same settings stored, by image; failed images are tried again."""
    assert job.output is not None
    found = {}
    for row in [*_read_rows(job.output), *_read_rows(_partial(job.output))]:
        if row.pop("settings", None) == job.settings and row.get("problem") is None and "image" in row:
            if "words" in row:
                row["scores"] = dict(zip(row.pop("words"), row["scores"], strict=True))
            found[row["image"]] = row
    return found


def _read_rows(path: Path) -> list[Row]:
    """Return the rows of a file that `write_rows` or a killed run wrote; lines that are not whole are left out."""
    if not path.exists():
        return []
    try:
        if path.suffix == ".parquet":
            rows: list[Row] = pq.read_table(path).to_pylist()
            return rows
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read to go on from it ({error}): remove it") from error
    rows = []
    for line in lines:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]
