"""Instruct records and their images into S3: stage, check, decide, write, and the manifest last.

    records file -> chunks of text in S3 -> tasks check records and images -> facts on the driver
                 -> ids, splits, duplicates, digest -> tasks write shards -> index, rejected, card -> manifest -> latest

The driver holds facts (under 300 bytes a record), never texts or images; tasks read those themselves. A version is
named by its digest, so the same input makes the same version, and nothing is stored twice.
"""

from __future__ import annotations

import logging
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestration.assets.inputs import sha256_of_file
from orchestration.data.manifest import (
    REJECTED_SCHEMA,
    VERSION_LENGTH,
    Advance,
    FileRef,
    Manifest,
    Rejected,
    Shard,
    check_destination,
    existing_version,
    point_latest_at,
    publish,
    put_file,
    put_index,
)
from orchestration.instruct.data_card import (
    CARD,
    CONTACT_SHEET,
    NUM_SAMPLES,
    contact_sheet,
    count_splits,
    has_mlflow,
    show_in_mlflow,
    write_card,
)
from orchestration.instruct.decisions import FACT_SCHEMA, ShardPlan, decide, digest_of, plan_shards
from orchestration.instruct.images import require_root
from orchestration.instruct.records import Staged, read_chunk, remove_staged, stage_records
from orchestration.instruct.rules import SPLIT_NAME, IngestRules, Layout, Reason
from orchestration.instruct.tasks import ShardWork, Source, check_chunks, places_by_chunk, write_shards
from orchestration.services import storage
from orchestration.services.interruption import sigterm_interrupts
from tinyemo.errors import ConfigError, DataError, StorageError

logger = logging.getLogger(__name__)

Data = Literal["real", "generated"]


@dataclass(frozen=True)
class InstructReport:
    """What an ingest did."""

    manifest: Manifest
    is_unchanged: bool
    """The same records were there already: nothing was uploaded."""
    num_uploaded: int
    """Files stored, without the manifest and latest.json."""
    uploaded_bytes: int
    seconds: float
    run_url: str | None = None
    """Of the MLflow run that holds the card; None where there is no server or nothing changed."""

    @property
    def rows_duplicate(self) -> int:
        """Sound records that are one too many."""
        return sum(rows for reason, rows in self.manifest.rejected.reasons.items() if Reason(reason).is_duplicate)

    @property
    def rows_rejected(self) -> int:
        """Records that break a rule."""
        return self.manifest.rejected.rows - self.rows_duplicate


@dataclass(frozen=True)
class _Job:
    """The arguments of an ingest that what it stores depends on."""

    name: str
    root: str
    layout: Layout
    rules: IngestRules
    extra_rules: dict[str, Any]
    data: Data
    description: dict[str, Any]

    @property
    def all_rules(self) -> dict[str, Any]:
        """What the manifest says under `rules`."""
        return {**self.rules.model_dump(mode="json"), **self.extra_rules}

    def uri(self, folder: str) -> str:
        """Address of a folder of the data set."""
        return f"{self.root.rstrip('/')}/{self.name}/{folder}"


def ingest_instruct(
    records: str | Path,
    images: str | Path,
    *,
    name: str,
    root: str,
    rules: IngestRules = IngestRules(),
    split: str | None = None,
    source: dict[str, Any] | None = None,
    data: Data = "real",
    extra_rules: dict[str, Any] | None = None,
    layout: Layout = Layout(),
    is_forced: bool = False,
    advance: Advance | None = None,
) -> InstructReport:
    """Store LLaVA records and their images under `<root>/<name>/<version>` and point `<root>/<name>/latest.json` at it.

    The work runs in Ray Data tasks on the cluster that RAY_ADDRESS names. Local paths must be there on every node.

    Args:
        records: a JSON array or JSON Lines of any size, a local file or an object in S3.
        images: a local folder or an S3 folder that the records' image paths are relative to.
        name: the data set's name in S3.
        root: `s3://bucket/folder`.
        rules: which records are kept.
        split: of records that name none; None: the image decides, see `IngestRules.held_out`.
        source: what the manifest says about the origin beside the file's name and sha256.
        data: "generated" marks figures from this data as meaningless.
        extra_rules: goes into the manifest beside the rules, for instance how answers were made.
        layout: how shards are cut.
        is_forced: upload again even where the version is there.
        advance: told about progress, for instance to draw a bar.

    Raises:
        ConfigError: arguments or environment do not go together.
        DataError: the input cannot be read, or too many of its records are rejected.
        StorageError, PlatformError: S3, Ray or MLflow fails; the former version stays the latest.
    """
    started = time.monotonic()
    _check_arguments(split, extra_rules or {})
    check_destination(name, root)
    records, images = _absolute(records), _absolute(images)
    require_root(images)
    _require_servers()
    advance = advance or (lambda stage, done, total: None)
    with sigterm_interrupts(), _staging(f"{root.rstrip('/')}/{name}") as staging:
        staged = stage_records(records, staging, records_per_chunk=layout.records_per_chunk, advance=advance)
        file = records if records.startswith("s3://") else Path(records).name
        description = {"kind": "records", "name": file, **(source or {}), "files": {file: staged.sha256}}
        job = _Job(name, root, layout, rules, extra_rules or {}, data, description)
        origin = Source(staged, images, rules)
        decided = decide(_check(origin, advance), rules, split)
        manifest, is_unchanged = _store(job, origin, decided, is_forced, advance)
    if is_unchanged:
        point_latest_at(manifest)
        return InstructReport(manifest, True, 0, 0, time.monotonic() - started)
    publish(manifest)
    url = show_in_mlflow(manifest)
    sizes = [file.num_bytes for file in manifest.files()]
    return InstructReport(manifest, False, len(sizes), sum(sizes), time.monotonic() - started, url)


def _check_arguments(split: str | None, extra_rules: dict[str, Any]) -> None:
    """ConfigError where a split cannot name a file, or where further rules hide the ingest's own."""
    if split is not None and not SPLIT_NAME.fullmatch(split):
        raise ConfigError(f"split is {split!r}: use letters, digits, underscores, dots and dashes")
    taken = extra_rules.keys() & IngestRules.model_fields.keys()
    if taken:
        raise ConfigError(f"extra_rules has {', '.join(sorted(taken))}, which are rules of the ingest themselves")


def _absolute(path: str | Path) -> str:
    """An S3 address as it is, a local path as tasks in other folders need it."""
    return str(path) if str(path).startswith("s3://") else str(Path(path).absolute())


def _require_servers() -> None:
    """Join Ray, and see that MLflow answers where one is named, before the long part."""
    from orchestration.services.ray_cluster import connect
    from orchestration.services.tracking import require_server

    if has_mlflow():
        require_server()
    connect()


@contextmanager
def _staging(uri: str) -> Iterator[str]:
    """A folder in S3 for the length of a block; only SIGKILL leaves it behind."""
    staging = f"{uri}/.staging-{secrets.token_hex(6)}"
    try:
        yield staging
    finally:
        try:
            remove_staged(staging)
        except StorageError as error:  # never hides why the block ended
            logger.warning("%s may be left behind: %s", staging, error)


def _check(source: Source, advance: Advance) -> pa.Table:
    """FACT_SCHEMA: what is known of every staged record, in the order of the input."""
    tables, num_done = [], 0
    for table in check_chunks(source):
        tables.append(table)
        num_done += table.num_rows
        advance("check", num_done, source.staged.num_records)
    facts = pa.concat_tables(tables).select(FACT_SCHEMA.names).sort_by("number").combine_chunks()
    if facts.num_rows != source.staged.num_records:
        raise AssertionError(f"{source.staged.num_records} records staged, {facts.num_rows} checked")
    return facts


def _store(job: _Job, source: Source, decided: pa.Table, is_forced: bool, advance: Advance) -> tuple[Manifest, bool]:
    """The manifest of the version, which lacks nothing but itself, and whether it was there already."""
    plans = plan_shards(decided, job.layout)
    header = [1, "instruct", job.data, job.layout.model_dump(mode="json"), job.all_rules]
    digest = digest_of(decided, plans, header)
    version = digest[:VERSION_LENGTH]
    _require_enough(job, source.staged, decided, f"failed-{version}")
    uri = job.uri(version)
    existing = None if is_forced else existing_version(uri, digest)
    if existing is not None:
        return existing, True
    storage.delete(f"{uri}/manifest.json")  # while its files are written again, the version is not whole
    shards, pictures = _write_shards(job, source, decided, plans, uri, advance)
    rejected = _write_rejected(source.staged, decided, uri)
    num_kept = sum(shard.rows for shard in shards)
    if decided.num_rows != num_kept + rejected.rows:
        raise AssertionError(f"{decided.num_rows} records in, {num_kept} kept, {rejected.rows} not kept")
    kept = decided.take(pa.array(np.concatenate([plan.rows for plan in plans])))
    splits, tasks = count_splits(kept, list(dict.fromkeys(plan.split for plan in plans)))
    card = write_card(job.name, job.data, job.description, job.all_rules, splits, tasks, rejected.reasons, kept)
    index = put_index(uri, kept, [len(plan.rows) for plan in plans])
    card_file = put_file(uri, CARD, card.encode())
    put_file(uri, CONTACT_SHEET, contact_sheet(pictures))
    return Manifest(
        kind="instruct",
        name=job.name,
        version=version,
        digest=digest,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        data=job.data,
        source=job.description,
        taxonomy=job.rules.taxonomy,
        rows_in=decided.num_rows,
        splits=splits,
        shards=shards,
        index=index,
        rejected=rejected,
        rows_per_group=job.layout.rows_per_group,
        tasks=tasks,
        rules=job.all_rules,
        card=card_file,
        uri=uri,
    ), False


def _require_enough(job: _Job, staged: Staged, decided: pa.Table, folder: str) -> None:
    """DataError where too much is rejected or nothing is left; what was rejected is stored in `folder`."""
    reasons = _count_reasons(decided)
    num_rejected = sum(count for reason, count in reasons.items() if not Reason(reason).is_duplicate)
    num_kept = decided.num_rows - sum(reasons.values())
    limit = job.rules.max_rejected_fraction
    if num_kept and num_rejected <= limit * decided.num_rows:
        repeated = reasons.get(Reason.DUPLICATE_ID, 0)
        if job.rules.repeated_id == "reject" and repeated > 0.1 * decided.num_rows:
            logger.warning(
                "%d of %d records repeat an id; where ids name images, keep them with repeated_id=number",
                repeated,
                decided.num_rows,
            )
        return
    file = _write_rejected(staged, decided, job.uri(folder))
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    what = (
        f"{num_rejected} of {decided.num_rows} records are rejected, more than max_rejected_fraction {limit:g}"
        if num_kept
        else f"none of {decided.num_rows} records can be kept"
    )
    raise DataError(f"{what}: {listed}; see {job.uri(folder)}/{file.path}")


def _count_reasons(decided: pa.Table) -> dict[str, int]:
    return dict(sorted(Counter(decided["reason"].drop_null().to_pylist()).items()))


def _write_shards(
    job: _Job, source: Source, decided: pa.Table, plans: list[ShardPlan], uri: str, advance: Advance
) -> tuple[list[Shard], list[dict[str, Any]]]:
    """The shards in the order of the plans, and small pictures of some records."""
    sampled = _sample(decided)
    works = [
        ShardWork(
            uri=f"{uri}/{plan.path}",
            positions=plan.rows,
            ids=decided["id"].take(pa.array(plan.rows)).to_pylist(),
            image_sha256=_sha256_rows(decided, plan),
            sampled=np.flatnonzero(np.isin(plan.rows, sampled)).tolist(),
        )
        for plan in plans
    ]
    written: dict[str, dict[str, Any]] = {}
    for result in write_shards(source, job.layout, works):
        written[result["uri"]] = result
        advance("write", len(written), len(works))
    shards, pictures = [], []
    for plan, work in zip(plans, works, strict=True):
        result = written[work.uri]
        file = {"path": plan.path, "num_bytes": result["num_bytes"], "sha256": result["sha256"]}
        shards.append(Shard(**file, split=plan.split, rows=result["rows"]))
        pictures += result["pictures"]
    return shards, pictures


def _sample(decided: pa.Table) -> list[int]:
    """Places of the kept records with the smallest image sha256, each image once: a choice that repeats itself."""
    kept = np.flatnonzero(decided["reason"].is_null().to_numpy())
    hashes = np.array([value[:8] for value in decided["image_sha256"].take(pa.array(kept)).to_pylist()])
    _, first = np.unique(hashes, return_index=True)
    return [int(row) for row in kept[first[:NUM_SAMPLES]]]


def _sha256_rows(decided: pa.Table, plan: ShardPlan) -> np.ndarray[Any, np.dtype[np.uint8]]:
    values = decided["image_sha256"].take(pa.array(plan.rows)).to_pylist()
    return np.frombuffer(b"".join(values), dtype=np.uint8).reshape(-1, 32)


def _write_rejected(staged: Staged, decided: pa.Table, uri: str) -> Rejected:
    """Store every record that is not kept, with its reason; one chunk is in memory at a time."""
    positions = np.flatnonzero(decided["reason"].is_valid().to_numpy())
    columns = [name for name in REJECTED_SCHEMA.names if name not in ("record", "file")]
    with tempfile.TemporaryDirectory(prefix="tinyemo-rejected-") as folder:
        path = Path(folder) / "rejected.parquet"
        with pq.ParquetWriter(path, REJECTED_SCHEMA, compression="zstd", write_page_checksum=True) as writer:
            for chunk, places in places_by_chunk(staged, positions):
                raws = read_chunk(staged.uri, chunk)
                texts = [raws[place].text.decode(errors="backslashreplace") for place in places.tolist()]
                table = decided.select(columns).take(pa.array(places + staged.starts[chunk]))
                table = table.append_column("record", pa.array(texts))
                table = table.append_column("file", pa.nulls(len(texts), pa.string()))
                writer.write_table(table.select(REJECTED_SCHEMA.names).cast(REJECTED_SCHEMA))
        storage.upload_file(path, f"{uri}/{path.name}")
        file = FileRef(path=path.name, num_bytes=path.stat().st_size, sha256=sha256_of_file(path))
    return Rejected(**file.model_dump(), rows=len(positions), reasons=_count_reasons(decided))
