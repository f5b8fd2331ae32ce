"""`tinyemo evaluate` and `tinyemo predict`: a trained projector on features or images.

Neither imports ray or deepspeed before there is work for a cluster, and a projector in a local folder needs no
platform. Heavy imports stand in functions.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestration.cli.options import JsonOption, SetOption
from orchestration.cli.progress import progress
from tinyemo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.table import Table

    from orchestration.use.bulk import Result, Row
    from tinyemo.classification import ZeroShotScores
    from tinyemo.features import FeatureTable
    from tinyemo.metrics import Scores
    from tinyemo.projector import MetricProjector

NUM_ROWS_SHOWN = 20
NUM_SCORES_SHOWN = 3
NUM_PROBLEMS_SHOWN = 10

ProjectorOption = Annotated[
    str,
    typer.Option(
        help="Folder, s3://..., models:/NAME@champion, runs:/RUN/projector, or the name of a run.", show_default=False
    ),
]
SplitOption = Annotated[str | None, typer.Option(help="Split of a data set in S3.  [default: test]")]
TaxonomyOption = Annotated[
    str | None, typer.Option(help="ekman, mikels, parrott, or a TOML or JSON file.  [default: its own]")
]
WordsOption = Annotated[str | None, typer.Option(help="Any words instead, separated by commas: joy,awe,boredom.")]
ImagesOption = Annotated[
    list[str] | None, typer.Option(metavar="FILE|FOLDER|S3_URI", help="Photographs; more may follow as arguments.")
]
EncoderOption = Annotated[
    str | None,
    typer.Option(help="Where the projector's encoder is, if its card does not say: a folder, or owner/name."),
]
RevisionOption = Annotated[str | None, typer.Option(metavar="COMMIT", help="Commit of --encoder owner/name.")]
OutputOption = Annotated[
    Path | None, typer.Option(help="Write every row to this .parquet or .jsonl file; rows that it has are kept.")
]
ActorsOption = Annotated[
    int | None,
    typer.Option("--actors", help="Actors for a folder or prefix.  [default: all that fit]", min=1),
]
LeaveOutOption = Annotated[
    str | None,
    typer.Option(help="Labels left out of training, by commas, or `card`: report zero-shot accuracy on them."),
]


def evaluate(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]", help="TOML file or shipped evaluation; without it: --projector, --features."
        ),
    ] = None,
    projector: Annotated[
        str | None,
        typer.Option(
            help="Folder, s3://..., models:/NAME@champion, runs:/RUN/projector, or the name of a run; of a recipe, "
            "in place of its models."
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Parquet file with columns id, features and emotion or label; or a feature data set, s3://..."
        ),
    ] = None,
    split: SplitOption = None,
    taxonomy: TaxonomyOption = None,
    words: WordsOption = None,
    leave_out: LeaveOutOption = None,
    overrides: SetOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for a recipe's files.  [default: below the model's run in S3]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure projectors: by a recipe with intervals, comparisons and leakage; or one on one file, without a platform.

    Example: tinyemo evaluate evaluate-measured --projector projector-fi
    """
    if recipe is not None:
        if features or split or taxonomy or words or leave_out:
            raise ConfigError("a recipe names its data and labels: leave out --features, --split, --taxonomy, --words")
        from orchestration.cli.evaluate import evaluate_recipe

        evaluate_recipe(recipe, overrides, projector, output, as_json)
        return
    if projector is None or features is None or overrides or output:
        raise ConfigError("give a RECIPE, or --projector and --features without --set and --output")
    from orchestration.use.predict import choose_words
    from tinyemo.classification import evaluate_left_out, evaluate_projector

    model = _open_projector(projector)
    chosen = choose_words(model, taxonomy, words)
    table = _read_features(model, features, split)
    if leave_out is not None:
        zero_shot = evaluate_left_out(model, table, chosen, _left_out_words(model, leave_out))
        _show_left_out(zero_shot, {"projector": projector, "features": features, **_provenance(model)}, as_json)
        return
    scores = evaluate_projector(model, table, chosen)
    document = {**asdict(scores), "words": list(scores.per_class_recall), **_provenance(model)}
    if as_json:
        typer.echo(json.dumps({"projector": projector, "features": features, **document}))
        return
    _show([_recall_table(scores)], _cautions(document))


def _left_out_words(model: MetricProjector, leave_out: str) -> list[str]:
    """Return the labels of `--leave-out`, and print a caution where the projector was trained on one of them.

    Raises:
        ConfigError: the option is `card` and the card names none.
    """
    trained_without = [word for word in str(model.card.get("leave_out", "")).split(",") if word]
    if leave_out != "card":
        named = [word.strip() for word in leave_out.split(",") if word.strip()]
        if not set(named) <= set(trained_without):
            typer.echo("CAUTION: the card does not say that these labels were left out of training.", err=True)
        return named
    if not trained_without:
        raise ConfigError("the projector's card names no labels left out of training: give them to --leave-out")
    return trained_without


def _show_left_out(scores: ZeroShotScores, document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(document | asdict(scores)))
        return
    found = scores.zero_shot
    lines = [
        f"zero-shot top-1 {100 * found.top1_accuracy:.2f} % of {found.num_samples} samples of "
        f"{', '.join(found.per_class_recall)}, told apart among these; chance is {100 * scores.chance:.2f} %",
        f"the same samples among all words: {100 * scores.among_all:.2f} %",
    ]
    if scores.seen is not None:
        lines.append(f"seen labels: {100 * scores.seen.top1_accuracy:.2f} % of {scores.seen.num_samples} samples")
    _show([_recall_table(found)], _cautions(document))
    for line in lines:
        typer.echo(line)


def predict(
    projector: ProjectorOption,
    more_images: Annotated[
        list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Photographs, like --images.", show_default=False)
    ] = None,
    images: ImagesOption = None,
    features: Annotated[str | None, typer.Option(help="Features in place of images; see `tinyemo evaluate`.")] = None,
    split: SplitOption = None,
    taxonomy: TaxonomyOption = None,
    words: WordsOption = None,
    encoder: EncoderOption = None,
    revision: RevisionOption = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images per forward pass.  [default: measured on the device]", min=1)
    ] = None,
    num_actors: ActorsOption = None,
    order_by_score: Annotated[bool, typer.Option("--order-by-score", help="Print the surest rows first.")] = False,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the nearest word of each image, and the cosine of every word, highest first.

    Images are encoded by the encoder whose features the projector was trained on. A folder or an S3 prefix goes through
    the Ray cluster where there is one; with --output, a command that was stopped goes on when it is given again.

    Example: tinyemo predict --projector ./projector --images photos/ --words "joy,awe,boredom" --json
    """
    from orchestration.use import bulk

    bulk.check_output(output)
    locations = [*(images or []), *(more_images or [])]
    if bool(locations) == (features is not None):
        raise ConfigError("--images or --features, one of them: photographs, or features that an encoder made of them")
    if features is not None and encoder is not None:
        raise ConfigError("--encoder goes with --images: features name their own encoder")
    if locations and split is not None:
        raise ConfigError("--split goes with --features")
    from orchestration.use.predict import choose_words

    model = _open_projector(projector)
    chosen = choose_words(model, taxonomy, words)
    document: dict[str, Any] = {"words": list(chosen), **_provenance(model)}
    if features is not None:
        from tinyemo.classification import predict_labels

        rows = predict_labels(model, _read_features(model, features, split), chosen)
        if output is not None:
            bulk.write_rows(output, rows, document)
        shown: dict[str, Any] = {"features": features}
    else:
        result = _predict_images(model, chosen, locations, encoder, revision, output, num_actors, batch_size)
        rows = result.rows if as_json else [row for row in result.rows if row["problem"] is None]
        shown = {"images": len(result.rows), "unreadable": len(result.problems), "resumed": result.num_resumed}
    if order_by_score:
        rows.sort(key=lambda row: -row["scores"][row["label"]] if "scores" in row else 2.0)
    if as_json:
        typer.echo(json.dumps({"projector": projector, **shown, **document, "rows": rows}))
        return
    _show([_prediction_table(rows)], _cautions(document))


def _predict_images(
    model: MetricProjector,
    words: tuple[str, ...],
    locations: list[str],
    encoder: str | None,
    revision: str | None,
    output: Path | None,
    num_actors: int | None,
    batch_size: int | None,
) -> Result:
    from cluster.environment import load_platform_environment
    from orchestration.use import bulk
    from orchestration.use.locations import find_images
    from orchestration.use.predict import choose_own_encoder, prediction_job

    load_platform_environment()
    found, is_many = find_images(locations)
    choice, spec = choose_own_encoder(model, encoder, revision)
    job = prediction_job(model, words, choice, spec, output=output, num_actors=num_actors, batch_size=batch_size)
    with progress() as advance:
        result = bulk.run(job, found, on_cluster=is_many and bulk.has_cluster(found), progress=advance)
    show_problems(result, "predicted")
    return result


def show_problems(result: Result, done: str) -> None:
    """Print on stderr which images have no result and why, and counts that add up."""
    problems = list(result.problems.items())
    for image, problem in problems[:NUM_PROBLEMS_SHOWN]:
        typer.echo(f"skipped {image}: {problem}", err=True)
    if len(problems) > NUM_PROBLEMS_SHOWN:
        typer.echo(f"... and {len(problems) - NUM_PROBLEMS_SHOWN} more", err=True)
    if problems or result.num_resumed or len(result.rows) > 1:
        typer.echo(result.summary(done), err=True)


def _open_projector(location: str) -> MetricProjector:
    from orchestration.use.locations import fetch_export
    from tinyemo.projector import MetricProjector

    return MetricProjector.from_pretrained(fetch_export(location, "projector"))


def _read_features(model: MetricProjector, location: str, split: str | None) -> FeatureTable:
    """Read the features at a path or S3 address.

    Raises:
        TinyEmoError: they cannot be read, or another encoder than the projector's made them.
    """
    from tinyemo.encoders import encoder_of_card, find_conflict
    from tinyemo.features import read_features

    if location.startswith("s3://"):
        from cluster.environment import load_platform_environment
        from orchestration.data.features import read_stored_features

        load_platform_environment()
        table = read_stored_features(location, split or "test")
    elif split is not None:
        raise ConfigError("--split goes with a data set in S3, not with a Parquet file")
    else:
        table = read_features(Path(location))
    wanted, given = model.config.encoder, table.encoder
    conflict = find_conflict(encoder_of_card(model.card), given)
    if conflict is None and wanted and given is not None and not given.matches(wanted):
        conflict = f"{given} is not {wanted}"
    if conflict is not None:
        raise DataError(f"{location} holds features of another encoder than the projector was trained on: {conflict}")
    return table


def _provenance(model: MetricProjector) -> dict[str, Any]:
    """Return what must stand beside every figure: the language model, whether its weights are real, and the card."""
    assert model.labels is not None
    return {"llm": model.labels.llm, "llm_weights": model.labels.llm_weights, "card": model.card}


def _cautions(document: dict[str, Any]) -> list[str]:
    cautions = []
    if document["llm_weights"] == "random":
        cautions.append("RANDOM LABEL EMBEDDINGS: llm_weights = random, the language model's own table was not used.")
    if document["card"].get("encoder_weights") == "random":
        cautions.append("RANDOM ENCODER: the features are of a network that was never trained.")
    if document["card"].get("data") == "generated" or document["card"].get("generated") is True:
        cautions.append("GENERATED DATA: the projector was not trained on real images.")
    return cautions


def _recall_table(scores: Scores) -> Table:
    from rich.table import Table

    percent = f"{100 * scores.top1_accuracy:.2f} %"
    table = Table(title=f"top-1 accuracy {percent} of {scores.num_samples} samples")
    for column in ("label", "samples", "recall %", "most often taken for"):
        table.add_column(column, justify="left" if column in ("label", "most often taken for") else "right")
    words = list(scores.per_class_recall)
    for index, (word, row) in enumerate(zip(words, scores.confusion, strict=True)):
        recall = scores.per_class_recall[word]
        wrong = [0 if other == index else count for other, count in enumerate(row)]
        mistake = f"{words[wrong.index(max(wrong))]} ({max(wrong)})" if any(wrong) else ""
        table.add_row(word, str(sum(row)), "-" if recall is None else f"{100 * recall:.1f}", mistake)
    return table


def _prediction_table(rows: list[Row]) -> Table:
    from rich.table import Table

    shown = rows[:NUM_ROWS_SHOWN]
    table = Table(title=f"{len(shown)} of {len(rows)} rows; --json prints and --output writes all of them")
    key = "image" if "image" in rows[0] else "id"
    for column in (key, "label", "cosines"):
        table.add_column(column, overflow="fold")
    for row in shown:
        best = list(row["scores"].items())[:NUM_SCORES_SHOWN]
        table.add_row(row[key], row["label"], "  ".join(f"{word} {score:.3f}" for word, score in best))
    return table


def _show(tables: list[Table], cautions: list[str]) -> None:
    from rich.console import Console

    console = Console()
    for caution in cautions:
        console.print(caution, style="bold red")
    for table in tables:
        console.print(table)
