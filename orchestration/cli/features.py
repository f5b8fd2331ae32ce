"""`tinyemo features`: features of a vision encoder for the images of a data set."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.environment import load_platform_environment
from orchestration.cli.ingest_output import show_json, show_label_counts, show_rejected
from orchestration.cli.options import ForceOption, JsonOption, RootOption, default_root
from orchestration.cli.progress import progress

if TYPE_CHECKING:
    from orchestration.data.features import FeaturesReport

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
    # Ray reports lost workers on stdout, which is for results.
    with progress() as advance, redirect_stdout(sys.stderr):
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
    _show(report, as_json=as_json)


def _show(report: FeaturesReport, *, as_json: bool) -> None:
    manifest = report.manifest
    assert manifest.encoder is not None
    if as_json:
        show_json(manifest, _facts(report))
        return
    if manifest.encoder.weights == "random":
        typer.echo("RANDOM WEIGHTS: this encoder was never trained; figures from its features mean nothing")
    typer.echo(f"encoder {manifest.encoder}: {manifest.feature_width} numbers an image")
    show_label_counts(manifest, "images")
    rejected = manifest.rejected.rows
    typer.echo(f"images in {manifest.rows_in} = kept {manifest.rows_kept} + without a pooled row {rejected}")
    show_rejected(manifest)
    if manifest.patch_grid is not None:
        grid = " x ".join(str(side) for side in (*manifest.patch_grid, manifest.patch_width))
        typer.echo(f"patches: {sum(shard.rows for shard in manifest.patches)} images, {grid} each")
    done = f"{report.num_parts} parts, {report.num_resumed} of them by an earlier run"
    typer.echo(f"{manifest.uri}: {'unchanged' if report.is_unchanged else done} in {report.seconds:.1f} s")


def _facts(report: FeaturesReport) -> dict[str, Any]:
    manifest = report.manifest
    assert manifest.encoder is not None
    return {
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
