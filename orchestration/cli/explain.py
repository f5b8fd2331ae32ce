"""`tinyemo explain`: the label that a projector chooses for images, and a language model's reasons for it.

Single images in local files need no platform; a folder or an S3 prefix is explained by actors on Ray Data.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestration.cli.options import JsonOption
from tinyemo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from orchestration.reasoning.explain import Explanation
    from tinyemo.projector import MetricProjector

NUM_SCORES_SHOWN = 3
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")

ImagesArgument = Annotated[
    list[str], typer.Argument(metavar="IMAGE...", help="Files, folders, s3:// objects or s3:// prefixes.")
]
ModelOption = Annotated[
    str, typer.Option(help="Exported folder, s3://bucket/folder, runs:/RUN/model, or the name of a run.")
]
LabelsOption = Annotated[
    str | None,
    typer.Option(help="ekman, mikels, parrott, or words by commas.  [default: the projector's taxonomy]"),
]
ProjectorOption = Annotated[
    str | None,
    typer.Option(help="Folder, s3://..., models:/NAME@champion or runs:/RUN/projector of the tower's features."),
]
LabelOption = Annotated[str | None, typer.Option(help="State this label in place of a projector's.")]


def explain(
    images: ImagesArgument,
    model: ModelOption = "reasoning-offline",
    labels: LabelsOption = None,
    projector: ProjectorOption = None,
    label: LabelOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an explanation at most.", min=1)] = 128,
    num_actors: Annotated[int, typer.Option("--actors", help="Actors that explain folders and prefixes.", min=1)] = 1,
    as_json: JsonOption = False,
) -> None:
    """Print label, scores and reasoning of images.

    Example: tinyemo explain photo.jpg --model reasoning-offline --projector runs:/RUN/projector --labels mikels
    """
    from cluster.environment import load_platform_environment

    load_platform_environment()
    if (projector is None) == (label is None):
        raise ConfigError(
            "--projector or --label, one of them: a projector chooses the label that the prompt states "
            "(`tinyemo features`, then `tinyemo train`), --label states yours"
        )
    places, is_batch = _find_images(images)
    with _opened(model, projector) as (folder, chosen), redirect_stdout(sys.stderr):
        words = _words(labels, chosen, label)
        if is_batch:
            from orchestration.reasoning.explain_pool import explain_many

            found = explain_many(folder, chosen, places, words, label, max_new_tokens, num_actors)
        else:
            from orchestration.reasoning.explain import Explainer, read_image

            explainer = Explainer(folder, chosen)
            for caution in explainer.cautions():
                typer.echo(caution, err=True)
            found = [
                explainer.explain(read_image(place), words, source=place, label=label, max_new_tokens=max_new_tokens)
                for place in places
            ]
    if as_json:
        typer.echo(json.dumps({"model": model, "words": list(words), "images": [asdict(item) for item in found]}))
        return
    _show(found)


def _find_images(images: Sequence[str]) -> tuple[list[str], bool]:
    """Every image, and whether any came out of a folder or a prefix.

    Raises:
        DataError: nothing is there.
    """
    from orchestration.services.storage import list_prefix

    places: list[str] = []
    is_batch = False
    for image in images:
        if image.startswith("s3://"):
            inside = [uri for uri in list_prefix(image) if Path(uri).suffix.lower() in IMAGE_SUFFIXES]
        elif Path(image).is_dir():
            inside = sorted(str(path) for path in Path(image).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise DataError(f"{image} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        else:
            inside = []
        is_batch |= bool(inside)
        places += inside or [image]
    return places, is_batch


@contextmanager
def _opened(model: str, projector: str | None) -> Iterator[tuple[Path, MetricProjector | None]]:
    """The model's folder on this machine, and the projector."""
    from contextlib import ExitStack

    from orchestration.cli.use import open_projector

    with ExitStack() as stack:
        folder = stack.enter_context(_model_folder(model))
        yield folder, stack.enter_context(open_projector(projector)) if projector is not None else None


@contextmanager
def _model_folder(location: str) -> Iterator[Path]:
    """A local folder with the model; what S3 or MLflow hold is fetched for the length of the block."""
    from orchestration.services.storage import download_folder

    if Path(location).is_dir():
        yield Path(location)
        return
    if location.startswith(("runs:/", "models:/", "mlflow-artifacts:/")):
        from orchestration.services.tracking import download_artifacts

        yield download_artifacts(location)
        return
    if not location.startswith("s3://"):
        from orchestration.recipe import CheckpointConfig

        if "/" in location:
            raise DataError(f"{location} is no folder: give an exported model, s3://..., or the name of a run")
        location = f"{CheckpointConfig().root}/{location}/model"
    with tempfile.TemporaryDirectory(prefix="tinyemo-") as name:
        download_folder(location, Path(name))
        yield Path(name)


def _words(labels: str | None, projector: MetricProjector | None, label: str | None) -> tuple[str, ...]:
    """The words that the prompt offers.

    Raises:
        ConfigError: none are named, and neither does the projector's card or the label itself.
    """
    from orchestration.cli.use import choose_words
    from tinyemo.taxonomies import TAXONOMIES, canonical_word

    is_taxonomy = labels in TAXONOMIES
    if projector is not None:
        return choose_words(projector, labels if is_taxonomy else None, None if is_taxonomy else labels)
    if labels is not None:
        return TAXONOMIES[labels].words if is_taxonomy else tuple(canonical_word(word) for word in labels.split(","))
    assert label is not None
    found = [taxonomy.words for taxonomy in TAXONOMIES.values() if canonical_word(label) in taxonomy.words]
    if not found:
        raise ConfigError(f"--label {label!r} is in no taxonomy that we know: name the words with --labels")
    return min(found, key=len)


def _show(found: Sequence[Explanation]) -> None:
    for item in found:
        best = list(item.scores.items())[:NUM_SCORES_SHOWN]
        scores = "  ".join(f"{word} {score:.3f}" for word, score in best) or "given"
        typer.echo(f"{item.image}\n  label      {item.label} ({scores})\n  reasoning  {item.reasoning}")
        if item.predicted_label is None:
            typer.echo("  the text is not in the trained form (Reasoning: ... Predicted Label: ...)")
