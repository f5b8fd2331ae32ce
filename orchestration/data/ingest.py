"""Images and instruct records into S3: stage, check, decide, write, and the manifest last.

    table, folder or file of records -> chunks of text in S3 -> tasks check records and images -> facts on the driver
    -> ids, splits, duplicates, digest -> tasks write shards -> index, rejected, card -> manifest -> latest

The driver holds facts (under 300 bytes a record), never texts or images; tasks read those themselves. A version is
named by its digest, so the same input makes the same version, and nothing is stored twice.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestration.data.data_card import (
    CARD,
    CONTACT_SHEET,
    NUM_SAMPLES,
    contact_sheet,
    has_mlflow,
    show_in_mlflow,
    write_card,
)
from orchestration.data.decisions import FACT_SCHEMA, ShardPlan, decide, digest_of, plan_shards
from orchestration.data.feature_rows import (
    FeatureInput,
    FeatureSource,
    generated_features,
    open_features,
    stage_features,
)
from orchestration.data.image_files import require_root
from orchestration.data.ingest_rules import SPLIT_NAME, IngestRules, Layout, Reason
from orchestration.data.ingest_tasks import RecordSource, ShardWork, Source, check_chunks, write_shards
from orchestration.data.manifest import (
    REJECTED_SCHEMA,
    VERSION_LENGTH,
    Advance,
    Kind,
    Manifest,
    Rejected,
    Shard,
    check_destination,
    count_splits,
    count_values,
    existing_version,
    point_latest_at,
    publish,
    put_file,
    put_index,
    put_rejected,
)
from orchestration.data.staging import stage_labels, stage_records
from orchestration.services import storage
from tinyemo.errors import ConfigError, DataError, StorageError
from tinyemo.taxonomies import TAXONOMIES, Taxonomy, describe_taxonomy, find_taxonomy

logger = logging.getLogger(__name__)

Data = Literal["real", "generated"]


@dataclass(frozen=True)
class IngestReport:
    """Result of an ingest."""

    manifest: Manifest
    is_unchanged: bool
    """The same records were there already: nothing was uploaded."""
    num_uploaded: int
    """Files stored, without the manifest and latest.json."""
    uploaded_bytes: int
    seconds: float
    run_url: str | None = None
    """Page of the MLflow run that holds the card; None where there is no server or nothing changed."""


@dataclass(frozen=True)
class _Job:
    kind: Kind
    name: str
    root: str
    layout: Layout
    rules: IngestRules
    extra_rules: dict[str, Any]
    data: Data
    description: dict[str, Any]
    features: FeatureInput | None = None

    @property
    def all_rules(self) -> dict[str, Any]:
        """The manifest's `rules`."""
        if self.kind == "features":
            return {"taxonomy": describe_taxonomy(self.rules.taxonomy)}
        return {**self.rules.model_dump(mode="json"), **self.extra_rules}

    def uri(self, folder: str) -> str:
        """Return the address of a folder of the data set."""
        return f"{self.root.rstrip('/')}/{self.name}/{folder}"


def ingest_features(
    source: Path | str | None,
    *,
    name: str,
    root: str,
    taxonomy: Taxonomy | str = "ekman",
    split: str | None = None,
    is_generated: bool = False,
    seed: int = 0,
    feature_width: int | None = None,
    rows_per_shard: int | None = None,
    is_forced: bool = False,
    advance: Advance | None = None,
) -> IngestReport:
    """Store rows of features with a label each under `<root>/<name>/<version>`; see `ingest_instruct` for the rest.

    Args:
        source: a folder of <split>.parquet files, a Parquet file, or the name of an asset; None with `is_generated`.
        name: the data set's name in S3.
        root: `s3://bucket/folder`.
        taxonomy: labels that are allowed; other rows are rejected.
        split: split of a single Parquet file that has no column `split`.
        is_generated: store seeded noise in place of `source`; the manifest says so in `data`.
        seed: seed of the generated rows.
        feature_width: D; None takes it from the train split.
        rows_per_shard: rows of a shard and of its one row group; None: shards of 64 MiB in groups of 512 rows.
        is_forced: upload again even where the version is there.
        advance: progress callback.

    Raises:
        TinyEmoError: see `ingest_instruct`; DataError also where a file cannot be read or no row is left.
    """
    chosen = find_taxonomy(taxonomy)
    if rows_per_shard is not None and rows_per_shard < 1:
        raise ConfigError(f"rows_per_shard is {rows_per_shard}: it must be at least 1")
    _check_arguments(split, {})
    check_destination(name, root)
    if is_generated == (source is not None):
        raise ConfigError("name either a source or --generated, not both")
    if source is None:
        rows = generated_features(chosen.words, feature_width=feature_width or 768, seed=seed)
    else:
        rows = open_features(str(source), split=split, feature_width=feature_width)
    layout = Layout(rows_per_group=512)
    if rows_per_shard is not None:
        row_bytes = rows.feature_width * np.dtype(rows.feature_dtype).itemsize
        layout = Layout(rows_per_group=rows_per_shard, shard_bytes=rows_per_shard * row_bytes)
    job = _Job("features", name, root, layout, IngestRules(taxonomy=chosen), {}, rows.data, rows.description, rows)

    def stage(uri: str, advance: Advance) -> Source:
        staged = stage_features(rows, uri, advance)
        return FeatureSource(staged, chosen, rows.feature_width, rows.feature_dtype)

    return _ingest(job, stage, None, is_forced, advance)


def ingest_images(
    labels: str | Path | None,
    images: str | Path,
    *,
    name: str,
    root: str,
    rules: IngestRules = IngestRules(),
    split: str | None = None,
    layout: Layout = Layout(),
    is_forced: bool = False,
    advance: Advance | None = None,
) -> IngestReport:
    """Store photographs with a label each under `<root>/<name>/<version>`; see `ingest_instruct` for the rest.

    Args:
        labels: table (.csv or .tsv, local or in S3) with the columns image, label or emotion, and optionally split and
            id; None: the folder of an image names its label, and a folder train, test, val, validation or dev above
            that its split.
        images: local folder or S3 folder that the table's paths are relative to.
        name: the data set's name in S3.
        root: `s3://bucket/folder`.
        rules: which records are kept.
        split: of images that name none; None: the image decides, see `IngestRules.held_out`.
        layout: how shards are cut.
        is_forced: upload again even where the version is there.
        advance: progress callback.

    Raises:
        TinyEmoError: see `ingest_instruct`; DataError only where no image is left.
    """
    table, folder = (None if labels is None else _absolute(labels)), _absolute(images)
    file = _file_name(table or folder)
    job = _Job("images", name, root, layout, rules, {}, "real", {"kind": "images", "name": file})

    def stage(uri: str, advance: Advance) -> Source:
        staged = stage_labels(table, folder, uri, records_per_chunk=layout.records_per_chunk, advance=advance)
        return RecordSource("images", staged, file, folder, rules)

    _check_arguments(split, {})
    check_destination(name, root)
    require_root(folder)
    return _ingest(job, stage, split, is_forced, advance)


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
) -> IngestReport:
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
    path, folder = _absolute(records), _absolute(images)
    description = {"kind": "records", "name": _file_name(path), **(source or {})}
    job = _Job("instruct", name, root, layout, rules, extra_rules or {}, data, description)

    def stage(uri: str, advance: Advance) -> Source:
        staged = stage_records(path, uri, records_per_chunk=layout.records_per_chunk, advance=advance)
        return RecordSource("instruct", staged, _file_name(path), folder, rules)

    _check_arguments(split, extra_rules or {})
    check_destination(name, root)
    require_root(folder)
    return _ingest(job, stage, split, is_forced, advance)


def _ingest(
    job: _Job, stage: Callable[[str, Advance], Source], split: str | None, is_forced: bool, advance: Advance | None
) -> IngestReport:
    started = time.monotonic()
    _require_servers()
    advance = advance or (lambda stage, done, total: None)
    with _staging(f"{job.root.rstrip('/')}/{job.name}") as staging:
        source = stage(staging, advance)
        if source.staged.sha256:
            job.description["files"] = {job.description["name"]: source.staged.sha256}
        decided = decide(_check(source, advance), job.rules, split, job.kind)
        manifest, is_unchanged = _store(job, source, decided, is_forced, advance)
    if is_unchanged:
        point_latest_at(manifest)
        return IngestReport(manifest, True, 0, 0, time.monotonic() - started)
    publish(manifest)
    url = show_in_mlflow(manifest) if manifest.card else None
    sizes = [file.num_bytes for file in manifest.files()]
    return IngestReport(manifest, False, len(sizes), sum(sizes), time.monotonic() - started, url)


def _check_arguments(split: str | None, extra_rules: dict[str, Any]) -> None:
    if split is not None and not SPLIT_NAME.fullmatch(split):
        raise ConfigError(f"split is {split!r}: use letters, digits, underscores, dots and dashes")
    taken = extra_rules.keys() & IngestRules.model_fields.keys()
    if taken:
        raise ConfigError(f"extra_rules has {', '.join(sorted(taken))}, which are rules of the ingest themselves")


def _absolute(path: str | Path) -> str:
    return str(path) if str(path).startswith("s3://") else str(Path(path).absolute())


def _file_name(path: str) -> str:
    return path if path.startswith("s3://") else Path(path).name


def _require_servers() -> None:
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
            storage.delete_prefix(staging)
        except StorageError as error:  # never hides why the block ended
            logger.warning("%s may be left behind: %s", staging, error)


def _check(source: Source, advance: Advance) -> pa.Table:
    tables, num_done = [], 0
    for table in check_chunks(source):
        tables.append(table)
        num_done += table.num_rows
        advance("check", num_done, source.staged.num_records)
    facts = pa.concat_tables(tables).sort_by("position").select(FACT_SCHEMA.names).combine_chunks()
    if facts.num_rows != source.staged.num_records:
        raise AssertionError(f"{source.staged.num_records} records staged, {facts.num_rows} checked")
    return facts


def _store(job: _Job, source: Source, decided: pa.Table, is_forced: bool, advance: Advance) -> tuple[Manifest, bool]:
    plans = plan_shards(decided, job.layout, job.kind)
    rows = job.features
    fields = {"feature_width": rows.feature_width, "feature_dtype": rows.feature_dtype} if rows else {}
    header = [2, job.kind, job.data, job.layout.model_dump(mode="json"), job.all_rules, fields]
    digest = digest_of(decided, plans, header, job.kind)
    version = digest[:VERSION_LENGTH]
    _require_enough(job, source, decided, f"failed-{version}")
    uri = job.uri(version)
    existing = None if is_forced else existing_version(uri, digest)
    if existing is not None:
        if rows is not None and existing.encoder != rows.encoder:  # the same rows, and now their encoder is known
            existing = existing.model_copy(update={"encoder": rows.encoder})
            publish(existing)
        return existing, True
    storage.delete(f"{uri}/manifest.json")  # while its files are written again, the version is not whole
    shards, pictures = _write_shards(job, source, decided, plans, uri, advance)
    rejected = _write_rejected(source, decided, uri)
    num_kept = sum(shard.rows for shard in shards)
    if decided.num_rows != num_kept + rejected.rows:
        raise AssertionError(f"{decided.num_rows} records in, {num_kept} kept, {rejected.rows} not kept")
    kept = decided.take(pa.array(np.concatenate([plan.rows for plan in plans])))
    splits = count_splits(kept)
    tasks = {split: count_values(kept.filter(pc.equal(kept["split"], split))["task"]) for split in splits}
    manifest = Manifest(
        kind=job.kind,
        name=job.name,
        version=version,
        digest=digest,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        data=job.data,
        source=job.description,
        taxonomy=job.rules.taxonomy,
        rules=job.all_rules,
        rows_in=decided.num_rows,
        rows_per_group=job.layout.rows_per_group,
        splits=splits,
        shards=shards,
        index=put_index(uri, kept, [shard.rows for shard in shards]),
        rejected=rejected,
        tasks=tasks if job.kind == "instruct" else {},
        encoder=rows.encoder if rows else None,
        uri=uri,
        **fields,
    )
    if rows is not None:
        return manifest, False
    put_file(uri, CONTACT_SHEET, contact_sheet(pictures))
    card = put_file(uri, CARD, write_card(manifest, kept).encode())
    return manifest.model_copy(update={"card": card}), False


def _require_enough(job: _Job, source: Source, decided: pa.Table, folder: str) -> None:
    """Raise DataError where nothing is left or, of instruct records, too much is rejected; the rejected are stored."""
    reasons = count_values(decided["reason"])
    num_rejected = sum(count for reason, count in reasons.items() if not Reason(reason).is_duplicate)
    num_kept = decided.num_rows - sum(reasons.values())
    limit = job.rules.max_rejected_fraction if job.kind == "instruct" else 1.0
    if num_kept and num_rejected <= limit * decided.num_rows:
        repeated = reasons.get(Reason.DUPLICATE_ID, 0)
        if job.rules.repeated_id == "reject" and repeated > 0.1 * decided.num_rows:
            logger.warning(
                "%d of %d records repeat an id; where ids name images, keep them with repeated_id=number",
                repeated,
                decided.num_rows,
            )
        return
    file = _write_rejected(source, decided, job.uri(folder))
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    what = (
        f"{num_rejected} of {decided.num_rows} records are rejected, more than max_rejected_fraction {limit:g}"
        if num_kept
        else f"none of {decided.num_rows} records can be kept"
    )
    raise DataError(f"{what}: {listed}{_advice(job, decided)}; see {job.uri(folder)}/{file.path}")


def _advice(job: _Job, decided: pa.Table) -> str:
    (reason, _count), *_ = Counter(decided["reason"].drop_null().to_pylist()).most_common(1)
    lost = decided.filter(pc.equal(decided["reason"], reason))
    if reason == Reason.IMAGE_MISSING:
        return f" ({lost['detail'][0].as_py()} under the images' folder; paths are relative to it)"
    if reason not in (Reason.LABEL_UNKNOWN, Reason.UNKNOWN_LABEL):
        return ""
    seen = [word for word, _ in Counter(lost["label"].drop_null().to_pylist()).most_common(8)]
    if not seen:
        return f" ({lost['detail'][0].as_py()})"
    fits = [
        describe_taxonomy(taxonomy)
        for taxonomy in TAXONOMIES.values()
        if taxonomy != job.rules.taxonomy and all(taxonomy.label(word) for word in seen)
    ]
    hint = (
        f"taxonomies that have them: {', '.join(map(str, fits))}"
        if fits
        else "name your own words with a taxonomy file"
    )
    return f" (taxonomy {job.rules.taxonomy.name}, labels seen: {', '.join(seen)}; {hint})"


def _write_shards(
    job: _Job, source: Source, decided: pa.Table, plans: list[ShardPlan], uri: str, advance: Advance
) -> tuple[list[Shard], list[dict[str, Any]]]:
    sampled = [] if job.features else _sample(decided)
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
    values = decided["image_sha256"].take(pa.array(plan.rows)).drop_null().to_pylist()
    return np.frombuffer(b"".join(values), dtype=np.uint8).reshape(-1, 32)


def _write_rejected(source: Source, decided: pa.Table, uri: str) -> Rejected:
    positions = np.flatnonzero(decided["reason"].is_valid().to_numpy())
    files, texts = source.originals(positions)
    table = decided.select([name for name in REJECTED_SCHEMA.names if name not in ("record", "file")])
    table = table.take(pa.array(positions)).append_column("record", pa.array(texts, pa.string()))
    return put_rejected(uri, table.append_column("file", pa.array(files, pa.string())).select(REJECTED_SCHEMA.names))
