"""`tinyemo explain`: labels that a projector chooses for images, and a language model's reasons for them."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestration.cli.options import JsonOption
from orchestration.cli.progress import progress
from orchestration.cli.use import NUM_SCORES_SHOWN, ActorsOption, OutputOption, show_problems
from tinyemo.errors import ConfigError

if TYPE_CHECKING:
    from orchestration.use.bulk import Row
    from tinyemo.projector import MetricProjector

ImagesArgument = Annotated[
    list[str], typer.Argument(metavar="IMAGE...", help="Files, folders, s3:// objects or s3:// prefixes.")
]
ModelOption = Annotated[
    str, typer.Option(help="Folder, s3://..., models:/NAME@ALIAS, runs:/RUN/model, or the name of a run.")
]
LabelsOption = Annotated[
    str | None,
    typer.Option(
        help="ekman, mikels, parrott, a TOML or JSON file, or words by commas.  [default: the projector's taxonomy]"
    ),
]
ProjectorOption = Annotated[
    str | None,
    typer.Option(help="Projector of the tower's features, named like --model; it chooses the labels."),
]
LabelOption = Annotated[str | None, typer.Option(help="State this label in place of a projector's choice.")]
BatchSizeOption = Annotated[
    int | None, typer.Option(help="Images explained together.  [default: 16 on a CPU, 64 on a GPU]", min=1)
]


def explain(
    images: ImagesArgument,
    model: ModelOption = "reasoning-offline",
    labels: LabelsOption = None,
    projector: ProjectorOption = None,
    label: LabelOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an explanation at most.", min=1)] = 128,
    batch_size: BatchSizeOption = None,
    num_actors: ActorsOption = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print label, scores and reasons for images, or write them for a whole folder or S3 prefix.

    With --output, a command that was stopped goes on where it was when it is given again.

    Example: tinyemo explain photo.jpg --model reasoning-offline --projector runs:/RUN/projector --labels mikels
    """
    from cluster.environment import load_platform_environment
    from orchestration.use import bulk
    from orchestration.use.locations import digest_of_export, fetch_export, find_export, find_images, weight_cautions

    load_platform_environment()
    if (projector is None) == (label is None):
        raise ConfigError(
            "--projector or --label, one of them: a projector chooses the label that the prompt states "
            "(`tinyemo features`, then `tinyemo train`), --label states yours"
        )
    bulk.check_output(output)
    found, is_many = find_images(images)
    place = find_export(model, "model")
    with progress() as advance:
        from tinyemo.projector import MetricProjector

        chooser = None if projector is None else MetricProjector.from_pretrained(fetch_export(projector, "projector"))
        words = _words(labels, chooser, label)
        from orchestration.use.explain import CPU_BATCH_SIZE, ExplainWorker

        chosen_by = label or find_export(str(projector), "projector")
        content = [digest_of_export(place), chosen_by if label else digest_of_export(chosen_by), words, max_new_tokens]
        job = bulk.Job(
            build=partial(ExplainWorker, place, chooser, words, label, max_new_tokens, batch_size),
            settings=hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12],
            chunk_size=4 * (batch_size or CPU_BATCH_SIZE),
            output=output,
            num_actors=num_actors,
        )
        result = bulk.run(job, found, on_cluster=is_many and bulk.has_cluster(found), progress=advance)
    show_problems(result, "explained")
    cautions = weight_cautions(place)
    for caution in cautions:
        typer.echo(caution, err=True)
    if as_json:
        typer.echo(json.dumps({"model": model, "words": list(words), "cautions": cautions, "images": result.rows}))
    elif output is None:
        _show([row for row in result.rows if row["problem"] is None])


def _words(labels: str | None, projector: MetricProjector | None, label: str | None) -> tuple[str, ...]:
    """Return the words that the prompt offers.

    Raises:
        ConfigError: none are named, and neither does the projector's card or the label itself.
    """
    from orchestration.use.predict import choose_words
    from tinyemo.taxonomies import TAXONOMIES, canonical_word, find_taxonomy

    is_taxonomy = labels in TAXONOMIES or Path(labels or "").suffix in (".toml", ".json")
    if projector is not None:
        return choose_words(projector, labels if is_taxonomy else None, None if is_taxonomy else labels)
    if labels is not None:
        return find_taxonomy(labels).words if is_taxonomy else tuple(map(canonical_word, labels.split(",")))
    assert label is not None
    found = [taxonomy.words for taxonomy in TAXONOMIES.values() if canonical_word(label) in taxonomy.words]
    if not found:
        raise ConfigError(f"--label {label!r} is in no taxonomy that is built in: name the words with --labels")
    return min(found, key=len)


def _show(rows: list[Row]) -> None:
    for row in rows:
        best = list(row["scores"].items())[:NUM_SCORES_SHOWN]
        scores = "  ".join(f"{word} {score:.3f}" for word, score in best) or "given"
        typer.echo(f"{row['image']}\n  label      {row['label']} ({scores})\n  reasoning  {row['reasoning']}")
        if row["predicted_label"] is None:
            typer.echo("  the text is not in the trained form (Reasoning: ... Predicted Label: ...)")
