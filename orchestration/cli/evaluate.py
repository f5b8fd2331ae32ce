"""`tinyemo evaluate RECIPE`: run an evaluation and print its tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from orchestration.cli.train import stoppable

if TYPE_CHECKING:
    from rich.table import Table

NUM_FINDINGS_SHOWN = 5
TITLES = {
    "top1_accuracy": "top-1 %",
    "balanced_accuracy": "balanced %",
    "macro_f1": "macro F1 %",
    "expected_calibration_error": "calibration error %",
}


def evaluate_recipe(
    name: str, overrides: list[str] | None, projector: str | None, output: Path | None, as_json: bool
) -> None:
    """Run the evaluation of a recipe and print what came out."""
    from cluster.environment import load_platform_environment
    from orchestration.evaluate.evaluation_recipe import load_evaluation

    load_platform_environment()
    given = [f"models={json.dumps([projector])}"] if projector else []
    recipe = load_evaluation(name, [*(overrides or []), *given])
    from orchestration.evaluate.evaluate_job import evaluate

    with stoppable() as advance:
        documents = evaluate(recipe, output=output, advance=advance)
    if as_json:
        typer.echo(json.dumps(documents, indent=1))
        return
    for document in documents:
        _show(document)


def _show(document: dict[str, Any]) -> None:
    from rich.console import Console

    from orchestration.evaluate.evaluate_job import caution, leakage_mark

    console = Console(width=None if sys.stdout.isatty() else 160)
    if caution(document):
        console.print(f"CAUTION: {caution(document)}", style="bold red")
    console.print(_measured(document))
    for data in document["data"]:
        console.print(_per_class(data))
    if document["comparisons"]:
        console.print(_comparisons(document))
    if document["published"]:
        console.print(_published(document))
    for data in document["data"]:
        mark, found = leakage_mark(data["leakage"]), data["leakage"]["findings"]
        if mark:
            typer.echo(f"{data['name']}: {mark}")
        for finding in found[:NUM_FINDINGS_SHOWN]:
            typer.echo("  {kind}: {test_id} is {train_id} of {data} ({value:.4g})".format(**finding))
    stored = [data["scores"] for data in document["data"] if data["scores"]]
    if stored:
        typer.echo(f"files: {stored[0].rsplit('/', 1)[0]}")
    if "mlflow_run" in document:
        typer.echo(f"run: {document['mlflow_run']}")


def _measured(document: dict[str, Any]) -> Table:
    from rich.table import Table

    from orchestration.evaluate.evaluate_job import leakage_mark

    model = document["model"]
    level = 100 * document["recipe"]["level"]
    table = Table(title=f"{model['run'] or model['location']} ({model['size']}), measured, {level:g} % intervals")
    extra = [name for name in document["data"][0]["metrics"] if name not in TITLES]
    for column in ("data", "labels", "images"):
        table.add_column(column, justify="left" if column == "data" else "right")
    for column in ["top1_accuracy", *extra, *list(TITLES)[1:]]:
        title = TITLES.get(column, column.replace("top", "top-").replace("_accuracy", " %"))
        table.add_column(title, justify="right")
    table.add_column("note")
    for data in document["data"]:
        notes = ["zero-shot"] if data["is_zero_shot"] else []
        if data["cluster_by"]:
            notes.append(f"{data['num_clusters']} clusters by {data['cluster_by']}")
        if data["num_left_out"]:
            notes.append(f"{data['num_left_out']} left out")
        notes += [mark] if (mark := leakage_mark(data["leakage"])) else []
        figures = [_interval(data["metrics"].get(name)) for name in ["top1_accuracy", *extra, *list(TITLES)[1:]]]
        labels = f"{data['taxonomy']} {len(data['labels'])}"
        table.add_row(data["name"], labels, str(data["num_images"]), *figures, "; ".join(notes))
    return table


def _interval(found: dict[str, float] | None) -> str:
    if found is None or found["value"] is None:
        return "-"
    return f"{100 * found['value']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def _per_class(data: dict[str, Any]) -> Table:
    from rich.table import Table

    from orchestration.evaluate.evaluate_job import leakage_mark

    mark = leakage_mark(data["leakage"])
    table = Table(title=f"{data['name']}: {data['num_images']} images{f' ({mark})' if mark else ''}")
    for column in ("label", "images", "recall %", "precision %", "most often taken for"):
        table.add_column(column, justify="left" if column in ("label", "most often taken for") else "right")
    for place, (row, counts) in enumerate(zip(data["per_class"], data["confusion"], strict=True)):
        wrong = [0 if other == place else count for other, count in enumerate(counts)]
        mistake = f"{data['labels'][wrong.index(max(wrong))]} ({max(wrong)})" if any(wrong) else ""
        unseen = " (unseen)" if row["label"] in data["unseen_labels"] else ""
        figures = (_interval(row["recall"]), _interval(row["precision"]))
        table.add_row(f"{row['label']}{unseen}", str(row["count"]), *figures, mistake)
    return table


def _comparisons(document: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"top-1 against {document['comparisons'][0]['baseline']}, image by image")
    for column in ("data", "images", "difference in points", "McNemar p", "smallest that could be seen"):
        table.add_column(column, justify="left" if column == "data" else "right")
    for row in document["comparisons"]:
        smallest = "-" if row["smallest_detectable"] is None else f"{100 * row['smallest_detectable']:.1f}"
        figures = f"{100 * row['difference']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
        table.add_row(row["data"], str(row["num_images"]), figures, f"{row['p_mcnemar']:.2g}", smallest)
    return table


def _published(document: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title="published figures, not measured here")
    for column in ("system", "data", "metric", "%", "source"):
        table.add_column(column, justify="right" if column == "%" else "left", overflow="fold")
    for row in document["published"]:
        table.add_row(row["system"], row["data"], row["metric"], f"{100 * row['value']:.2f}", row["source"])
    return table
