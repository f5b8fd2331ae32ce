"""`tinyemo ingest` and `tinyemo features`: put data sets into S3, and features of an encoder for their images."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cluster.environment import load_platform_environment
from orchestration.cli.options import DatasetNameOption, ForceOption, JsonOption, RootOption, default_root
from orchestration.cli.progress import progress
from tinyemo.errors import ConfigError

if TYPE_CHECKING:
    from orchestration.data.features import FeaturesReport
    from orchestration.data.ingest import IngestReport
    from orchestration.data.manifest import Manifest


ingest_app = typer.Typer(help="Put data sets into S3, checked, sharded and versioned.", no_args_is_help=True)

TaxonomyOption = Annotated[
    str, typer.Option(metavar="NAME|FILE", help="Labels: ekman, mikels, parrott, or a TOML or JSON file of your own.")
]
ImagesOption = Annotated[
    str, typer.Option(metavar="ROOT", help="Folder that image paths are relative to, or s3://...", show_default=False)
]
SplitOption = Annotated[str | None, typer.Option(help="Split of records that name none.")]
RulesOption = Annotated[
    Path | None, typer.Option(metavar="FILE.toml", help="Which records are kept; see docs/instruct_data.md.")
]
RuleOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Lay a rule over the file or the defaults.")
]
GroupOption = Annotated[int, typer.Option(help="Records of a Parquet row group.", min=1)]
ShardOption = Annotated[int, typer.Option(help="A shard ends where it reaches this.", min=1)]


@ingest_app.command("features")
def features_command(
    source: Annotated[
        str | None,
        typer.Argument(metavar="[SOURCE]", help="Folder of <split>.parquet files, a Parquet file, or an asset's name."),
    ] = None,
    name: DatasetNameOption = "emotion6",
    taxonomy: TaxonomyOption = "ekman",
    root: RootOption = None,
    split: Annotated[str | None, typer.Option(help="Split of a single file that has no column `split`.")] = None,
    is_generated: Annotated[
        bool, typer.Option("--generated", help="Seeded noise instead of SOURCE; its runs are tagged data=generated.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the generated rows.", min=0)] = 0,
    feature_width: Annotated[
        int | None, typer.Option("--width", help="Numbers in a feature. Default: those of train.", min=1)
    ] = None,
    rows_per_shard: Annotated[
        int | None, typer.Option(help="Rows of one Parquet file in S3. Default: as many as make 64 MiB.", min=1)
    ] = None,
    is_forced: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Store rows of features with a label each.

    Example: tinyemo ingest features emotion6 --name emotion6 --taxonomy ekman
    """
    from orchestration.data.ingest import ingest_features

    load_platform_environment()
    with progress() as advance:
        report = ingest_features(
            source,
            name=name,
            root=root or default_root(),
            taxonomy=taxonomy,
            split=split,
            is_generated=is_generated,
            seed=seed,
            feature_width=feature_width,
            rows_per_shard=rows_per_shard,
            is_forced=is_forced,
            advance=advance,
        )
    _show(report, as_json=as_json)


@ingest_app.command("images")
def images_command(
    images: ImagesOption,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="TABLE",
            help=".csv or .tsv with the columns image, label (or emotion), optionally split and id. "
            "Without it, the folder of an image names its label.",
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="Released layout of --images, in place of --labels: emotion6, emotionroi, emoset, webemo, fi, "
            "artphoto, abstract or unbiasedemo."
        ),
    ] = None,
    name: DatasetNameOption = "images",
    taxonomy: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Labels: ekman, mikels, parrott, or a TOML or JSON file of your own."),
    ] = None,
    root: RootOption = None,
    rules: RulesOption = None,
    overrides: RuleOption = None,
    split: SplitOption = None,
    rows_per_group: GroupOption = 256,
    shard_bytes: ShardOption = 64 * 2**20,
    is_forced: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Store photographs with a label each.

    Example: tinyemo ingest images --labels labels.csv --images photos --taxonomy mikels --name fi
    """
    from orchestration.data.ingest import ingest_images
    from orchestration.data.layouts import find_layout, write_labels

    released = None if layout is None else find_layout(layout)
    if released is not None and (labels or images.startswith("s3://")):
        raise ConfigError("--layout goes with a local folder as --images, and in place of --labels")
    chosen = taxonomy or (released.taxonomy if released else None)
    given = [f"taxonomy={json.dumps(chosen)}"] if chosen else []
    options = _record_options(rules, [*given, *(overrides or [])], rows_per_group, shard_bytes)
    with progress() as advance, tempfile.TemporaryDirectory(prefix="tinyemo-labels-") as scratch:
        if released is not None:
            labels = f"{scratch}/labels.csv"
            write_labels(released, Path(images), Path(labels))
        report = ingest_images(
            labels,
            images,
            name=name,
            root=root or default_root(),
            split=split,
            is_forced=is_forced,
            advance=advance,
            **options,
        )
    _show(report, as_json=as_json)


@ingest_app.command("instruct")
def instruct_command(
    records: Annotated[
        str, typer.Option(help="JSON array or JSON Lines of LLaVA records: a file, or s3://...", show_default=False)
    ],
    images: ImagesOption,
    name: DatasetNameOption = "instruct",
    root: RootOption = None,
    rules: RulesOption = None,
    overrides: RuleOption = None,
    split: SplitOption = None,
    rows_per_group: GroupOption = 256,
    shard_bytes: ShardOption = 64 * 2**20,
    is_forced: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Store LLaVA records with their images.

    Records that are not kept go to rejected.parquet, each as it came and with its reason.

    Example: tinyemo ingest instruct --records finetune.json --images images --name emoreason --set taxonomy=parrott
    --set foreign_root=/home/author/images
    """
    from orchestration.data.ingest import ingest_instruct

    options = _record_options(rules, overrides or [], rows_per_group, shard_bytes)
    with progress() as advance:
        report = ingest_instruct(
            records,
            images,
            name=name,
            root=root or default_root(),
            split=split,
            is_forced=is_forced,
            advance=advance,
            **options,
        )
    _show(report, as_json=as_json)


def _record_options(rules: Path | None, overrides: list[str], rows_per_group: int, shard_bytes: int) -> dict[str, Any]:
    from orchestration.data.ingest_rules import Layout, load_rules

    load_platform_environment()
    layout = Layout(rows_per_group=rows_per_group, shard_bytes=shard_bytes)
    return {"rules": load_rules(rules, overrides), "layout": layout}


@ingest_app.command("oasis")
def oasis_command(
    name: DatasetNameOption = "oasis",
    root: RootOption = None,
    negative_below: Annotated[float, typer.Option(help="Mean valence (1 to 7) of a negative photograph.")] = 3.5,
    positive_above: Annotated[float, typer.Option(help="Mean valence of a positive one; none between.")] = 4.5,
    calm_below: Annotated[float, typer.Option(help="Mean arousal (1 to 7) of a calm photograph.")] = 3.6,
    aroused_above: Annotated[float, typer.Option(help="Mean arousal of a stirring one; none between.")] = 3.8,
    state_label: Annotated[
        Literal["always", "train", "never"], typer.Option(help="Where a reasoning question states the right label.")
    ] = "always",
    validation_fraction: Annotated[float, typer.Option(help="Chance of a theme to be in validation.")] = 0.1,
    test_fraction: Annotated[float, typer.Option(help="Chance of a theme to be in test.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed of splits, wordings and offered labels.", min=0)] = 0,
    is_forced: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write captions, questions and reasoning for OASIS by templates from its norms, and store them with its images.

    Example: tinyemo ingest oasis --name oasis
    """
    from orchestration.data.oasis import OasisRules, ingest_oasis
    from orchestration.recipe.toml_sections import parse_section

    chosen = {
        "negative_below": negative_below,
        "positive_above": positive_above,
        "calm_below": calm_below,
        "aroused_above": aroused_above,
        "state_label": state_label,
        "validation_fraction": validation_fraction,
        "test_fraction": test_fraction,
        "seed": seed,
    }
    load_platform_environment()
    rules = parse_section(OasisRules, chosen, source="the rules of OASIS cannot be used")
    with progress() as advance:
        report = ingest_oasis(name=name, root=root or default_root(), rules=rules, is_forced=is_forced, advance=advance)
    if not as_json:
        typer.echo("answers are TEMPLATES filled from the norms; emotions are a rule over mean valence and arousal")
    _show(report, as_json=as_json)


def _show(report: IngestReport, *, as_json: bool) -> None:
    manifest = report.manifest
    card = manifest.file_uri(manifest.card.path) if manifest.card else None
    if as_json:
        document: dict[str, Any] = {
            "kind": manifest.kind,
            "data": manifest.data,
            "unchanged": report.is_unchanged,
            "rows_in": manifest.rows_in,
            "rows_kept": manifest.rows_kept,
            "rows_rejected": manifest.rejected.rows - manifest.rejected.num_duplicates,
            "rows_duplicate": manifest.rejected.num_duplicates,
            "tasks": manifest.tasks,
            "shards": len(manifest.shards),
            "card": card,
            "mlflow_run": report.run_url,
            "uploaded_files": report.num_uploaded,
            "uploaded_bytes": report.uploaded_bytes,
            "seconds": round(report.seconds, 3),
        }
        _show_json(manifest, document)
        return
    if manifest.data == "generated":
        typer.echo("GENERATED data: noise or templates, not people's labels; figures from it mean nothing")
    if manifest.tasks:
        for split, tasks in manifest.tasks.items():
            counts = ", ".join(f"{task} {rows}" for task, rows in tasks.items())
            typer.echo(f"{split}: {manifest.splits[split].rows} records ({counts})")
    else:
        _show_label_counts(manifest, "images" if manifest.kind == "images" else "rows")
    duplicates = "" if manifest.kind == "features" else f" + duplicates {manifest.rejected.num_duplicates}"
    rejected = (
        manifest.rejected.rows
        if manifest.kind == "features"
        else manifest.rejected.rows - manifest.rejected.num_duplicates
    )
    typer.echo(f"rows in {manifest.rows_in} = kept {manifest.rows_kept} + rejected {rejected}{duplicates}")
    _show_rejected(manifest)
    if card:
        typer.echo(f"card: {report.run_url or card}")
    stored = "unchanged" if report.is_unchanged else f"stored {report.num_uploaded} files, {report.uploaded_bytes:,} B"
    typer.echo(f"{manifest.uri}: {stored} in {report.seconds:.1f} s")


# Options of the pool of actors.
ActorsOption = Annotated[
    int | None, typer.Option("--actors", help="Actors that encode.  [default: all that the cluster has room for]")
]
CpusOption = Annotated[float, typer.Option(help="CPUs of one actor; also its threads.")]
GpusOption = Annotated[
    float | None, typer.Option(help="GPUs, or a fraction.  [default: 1 where the cluster has one, else 0]")
]
BatchSizeOption = Annotated[
    int | None, typer.Option(help="Images per forward pass.  [default: measured on the device]", min=1)
]


def features(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="Data set with images: its name under the root, or s3://...")
    ],
    name: Annotated[str, typer.Option(help="Name of the feature data set in S3.", show_default=False)],
    encoder: Annotated[
        str, typer.Option(help="efficientnet-lite0, a folder, or owner/name of CLIP, SigLIP or DINOv2 on the hub.")
    ] = "efficientnet-lite0",
    revision: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="Pins a name on the hub: 40 hexadecimal digits.")
    ] = None,
    root: RootOption = None,
    has_patches: Annotated[
        bool, typer.Option("--patches/--no-patches", help="Store patch features beside the pooled ones.")
    ] = True,
    images_per_part: Annotated[
        int, typer.Option(help="Images of one shard, the unit that a killed run goes on from.", min=1)
    ] = 256,
    num_actors: ActorsOption = None,
    cpus_per_actor: CpusOption = 1.0,
    gpus_per_actor: GpusOption = None,
    batch_size: BatchSizeOption = None,
    is_forced: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Encode every image once on a pool of actors; the result is a feature data set that `tinyemo train` reads.

    The same command again computes only what an interrupted run left out.

    Example: tinyemo features oasis --encoder efficientnet-lite0 --name oasis-lite0
    """
    from orchestration.assets.model_files import choose_encoder
    from orchestration.data.features import make_features
    from orchestration.data.tasks import PoolConfig
    from orchestration.recipe.toml_sections import parse_section

    load_platform_environment()
    choice = choose_encoder(encoder, revision)
    wanted = {
        "num_actors": num_actors,
        "cpus_per_actor": cpus_per_actor,
        "gpus_per_actor": gpus_per_actor,
        "batch_size": batch_size,
    }
    pool = parse_section(PoolConfig, wanted, source="the pool cannot be used")
    folder = root or default_root()
    with progress() as advance:
        report = make_features(
            dataset if dataset.startswith("s3://") else f"{folder}/{dataset}",
            choice,
            name=name,
            root=folder,
            pool=pool,
            images_per_part=images_per_part,
            has_patches=has_patches,
            is_forced=is_forced,
            advance=advance,
        )
    _show_features(report, as_json=as_json)


def _show_features(report: FeaturesReport, *, as_json: bool) -> None:
    manifest = report.manifest
    assert manifest.encoder is not None
    if as_json:
        document = {
            "unchanged": report.is_unchanged,
            "encoder": manifest.encoder.model_dump(),
            "feature_width": manifest.feature_width,
            "patch_grid": manifest.patch_grid,
            "patch_width": manifest.patch_width,
            "images_in": manifest.rows_in,
            "images_kept": manifest.rows_kept,
            "images_rejected": manifest.rejected.rows,
            "patch_rows": sum(shard.rows for shard in manifest.patches),
            "parts": report.num_parts,
            "parts_resumed": report.num_resumed,
            "actors": report.num_actors,
            "seconds": round(report.seconds, 3),
        }
        _show_json(manifest, document)
        return
    if manifest.encoder.weights == "random":
        typer.echo("RANDOM WEIGHTS: this encoder was never trained; figures from its features mean nothing")
    typer.echo(f"encoder {manifest.encoder}: {manifest.feature_width} numbers an image")
    _show_label_counts(manifest, "images")
    rejected = manifest.rejected.rows
    typer.echo(f"images in {manifest.rows_in} = kept {manifest.rows_kept} + without a pooled row {rejected}")
    _show_rejected(manifest)
    if manifest.patch_grid is not None:
        grid = " x ".join(str(side) for side in (*manifest.patch_grid, manifest.patch_width))
        typer.echo(f"patches: {sum(shard.rows for shard in manifest.patches)} images, {grid} each")
    done = f"{report.num_parts} parts, {report.num_resumed} of them by an earlier run"
    typer.echo(f"{manifest.uri}: {'unchanged' if report.is_unchanged else done} in {report.seconds:.1f} s")


def _show_json(manifest: Manifest, document: dict[str, Any]) -> None:
    shared = {
        "uri": manifest.uri,
        "version": manifest.version,
        "digest": manifest.digest,
        "reasons": manifest.rejected.reasons,
        "splits": {split: counts.model_dump() for split, counts in manifest.splits.items()},
    }
    typer.echo(json.dumps(shared | document, indent=2, sort_keys=True))


def _show_label_counts(manifest: Manifest, unit: str) -> None:
    for split, counts in manifest.splits.items():
        labels = ", ".join(f"{label} {rows}" for label, rows in counts.labels.items())
        typer.echo(f"{split}: {counts.rows} {unit} ({labels})")


def _show_rejected(manifest: Manifest) -> None:
    for reason, rows in manifest.rejected.reasons.items():
        typer.echo(f"  {reason}: {rows}")
    if manifest.rejected.rows:
        typer.echo(f"  see {manifest.file_uri(manifest.rejected.path)}")
