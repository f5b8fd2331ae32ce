"""`tinyemo evaluate` and `tinyemo predict`: a trained projector on a Parquet file of features, or on a data set in S3.

Neither imports ray or deepspeed, and a projector in a local folder needs no platform. Heavy imports stand in functions.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestration.cli.options import JsonOption
from tinyemo.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.table import Table

    from tinyemo.classification import ZeroShotScores
    from tinyemo.features import FeatureTable
    from tinyemo.label_embeddings import LabelEmbeddings
    from tinyemo.metrics import Scores
    from tinyemo.projector import MetricProjector

NUM_ROWS_SHOWN = 20
NUM_SCORES_SHOWN = 3

ProjectorOption = Annotated[
    str, typer.Option(help="Folder, s3://bucket/folder, models:/NAME@champion or runs:/RUN/folder.", show_default=False)
]
FeaturesOption = Annotated[
    str,
    typer.Option(
        help="Parquet file with columns id, features and, to evaluate, emotion or label; or a feature data set, s3://...",
        show_default=False,
    ),
]
SplitOption = Annotated[str | None, typer.Option(help="Split of a data set in S3.  [default: test]")]
TaxonomyOption = Annotated[
    str | None, typer.Option(help="ekman, mikels or parrott; default: the one it was trained on.")
]
WordsOption = Annotated[str | None, typer.Option(help="Any words instead, separated by commas: joy,awe,boredom.")]
LeaveOutOption = Annotated[
    str | None,
    typer.Option(help="Labels left out of training, by commas, or `card`: report zero-shot accuracy on them."),
]


def evaluate(
    projector: ProjectorOption,
    features: FeaturesOption,
    split: SplitOption = None,
    taxonomy: TaxonomyOption = None,
    words: WordsOption = None,
    leave_out: LeaveOutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print accuracy, recalls and confusion of a projector on labelled features.

    Example: tinyemo evaluate --projector ./projector --features test.parquet --json
    """
    from tinyemo.classification import evaluate_left_out, evaluate_projector

    with open_projector(projector) as model:
        chosen = choose_words(model, taxonomy, words)
        table = _read_features(model, features, split)
        if leave_out is not None:
            left_out = _left_out_words(model, leave_out)
            zero_shot = evaluate_left_out(model, table, chosen, left_out)
            _show_left_out(zero_shot, {"projector": projector, "features": features, **_provenance(model)}, as_json)
            return
        scores = evaluate_projector(model, table, chosen)
    document = {**asdict(scores), "words": list(scores.per_class_recall), **_provenance(model)}
    if as_json:
        typer.echo(json.dumps({"projector": projector, "features": features, **document}))
        return
    _show([_recall_table(scores)], _cautions(document))


def _left_out_words(model: MetricProjector, leave_out: str) -> list[str]:
    """The labels of `--leave-out`; a caution where the projector was trained on one of them.

    Raises:
        ConfigError: it says `card` and the card names none.
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
    features: FeaturesOption,
    split: SplitOption = None,
    taxonomy: TaxonomyOption = None,
    words: WordsOption = None,
    order_by_score: Annotated[
        bool, typer.Option("--order-by-score", help="Surest rows first; default: as in the file.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Also write every row to this .parquet or .jsonl file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the nearest word of each row, and the cosine of every word, highest first.

    Example: tinyemo predict --projector ./projector --features new.parquet --words "joy,awe,boredom" --json
    """
    from tinyemo.classification import predict_labels

    if out is not None and out.suffix not in (".parquet", ".jsonl"):
        raise ConfigError(f"--out must end in .parquet or .jsonl, got {out.name!r}")
    with open_projector(projector) as model:
        chosen = choose_words(model, taxonomy, words)
        rows = predict_labels(model, _read_features(model, features, split), chosen)
    if order_by_score:
        rows.sort(key=lambda row: -row["scores"][row["label"]])
    document = {"words": list(chosen), **_provenance(model)}
    if out is not None:
        _write_rows(out, rows, document)
    if as_json:
        typer.echo(json.dumps({"projector": projector, "features": features, **document, "rows": rows}))
        return
    _show([_prediction_table(rows)], _cautions(document))


@contextmanager
def open_projector(location: str) -> Iterator[MetricProjector]:
    """The projector at a local folder or a URI.

    Raises:
        TinyEmoError: nothing is there, a service does not answer, or what is there is no projector.
    """
    from tinyemo.projector import MetricProjector

    if ":/" not in location:
        yield MetricProjector.from_pretrained(Path(location))
        return
    from cluster.environment import load_platform_environment

    load_platform_environment()
    if location.startswith("s3://"):
        from orchestration.services.storage import download_folder

        with tempfile.TemporaryDirectory(prefix="tinyemo-") as folder:
            download_folder(location, Path(folder))
            yield MetricProjector.from_pretrained(Path(folder))
        return
    from orchestration.services.tracking import download_artifacts

    yield MetricProjector.from_pretrained(download_artifacts(location))


def _read_features(model: MetricProjector, location: str, split: str | None) -> FeatureTable:
    """The features at a path or S3 address, which must not be of another encoder than the projector's.

    Raises:
        TinyEmoError: they cannot be read, or they are.
    """
    from tinyemo.encoders import encoder_of_card, find_conflict
    from tinyemo.features import read_features

    if location.startswith("s3://"):
        from cluster.environment import load_platform_environment
        from orchestration.vision.stored_features import read_stored_features

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


def choose_words(model: MetricProjector, taxonomy: str | None, words: str | None) -> tuple[str, ...]:
    """The words to tell apart; those that the projector has no embedding for are embedded and added to it.

    Raises:
        ConfigError: both options are given, or neither and the projector does not say what it was trained on.
    """
    from tinyemo.taxonomies import canonical_word, find_taxonomy

    if taxonomy and words:
        raise ConfigError("--taxonomy and --words exclude each other: give one of them")
    if words is None and taxonomy is None and isinstance(model.card.get("labels"), str):
        words = str(model.card["labels"])
    if words is not None:
        chosen = tuple(dict.fromkeys(canonical_word(word) for word in words.split(",") if word.strip()))
        if not chosen:
            raise ConfigError(f"--words must name at least one word, got {words!r}")
    else:
        choice = taxonomy or model.card.get("taxonomy")
        if not isinstance(choice, str):
            raise ConfigError("the projector's card names no taxonomy: choose the labels with --taxonomy or --words")
        chosen = find_taxonomy(choice).words
    assert model.labels is not None
    missing = model.labels.missing(chosen)
    if missing:
        model.labels = _embed_more(model, model.labels, missing)
    return chosen


def _embed_more(model: MetricProjector, labels: LabelEmbeddings, missing: Sequence[str]) -> LabelEmbeddings:
    """`labels` with the missing words, from the table that they came from.

    Raises:
        TinyEmoError: that table cannot be had, or it is another one.
    """
    from orchestration.assets.catalogue import open_embedding_table
    from tinyemo.families import FAMILY
    from tinyemo.label_embeddings import embed_labels

    names = (model.card.get("llm"), labels.llm)
    size = next((size for size in FAMILY.values() if size.name in names or size.llm in names), None)
    if size is None:
        raise DataError(
            f"no embedding for {', '.join(missing)}, and {labels.llm!r} is not in the family: leave these words out"
        )
    table = open_embedding_table(size.name, labels.llm_weights, int(model.card.get("llm_seed", 0)))
    return labels.extended(embed_labels(table, missing, labels.template))


def _provenance(model: MetricProjector) -> dict[str, Any]:
    """What a figure must be read with: the language model, whether its weights are its own, the card."""
    assert model.labels is not None
    return {"llm": model.labels.llm, "llm_weights": model.labels.llm_weights, "card": model.card}


def _cautions(document: dict[str, Any]) -> list[str]:
    """Lines that no table may be shown without."""
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


def _prediction_table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    shown = rows[:NUM_ROWS_SHOWN]
    table = Table(title=f"{len(shown)} of {len(rows)} rows; --json prints and --out writes all of them")
    for column in ("id", "label", "cosines"):
        table.add_column(column, overflow="fold")
    for row in shown:
        best = list(row["scores"].items())[:NUM_SCORES_SHOWN]
        table.add_row(row["id"], row["label"], "  ".join(f"{word} {score:.3f}" for word, score in best))
    return table


def _show(tables: list[Table], cautions: list[str]) -> None:
    from rich.console import Console

    console = Console()
    for caution in cautions:
        console.print(caution, style="bold red")
    for table in tables:
        console.print(table)


def _write_rows(path: Path, rows: list[dict[str, Any]], document: dict[str, Any]) -> None:
    """Every row: columns id, label, and words and scores as lists, highest first; the rest as file metadata."""
    flat = [
        {"id": row["id"], "label": row["label"], "words": list(row["scores"]), "scores": list(row["scores"].values())}
        for row in rows
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in flat), encoding="utf-8")
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist(flat).replace_schema_metadata({"tinyemo": json.dumps(document)})
        pq.write_table(table, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}") from error
