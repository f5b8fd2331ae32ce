"""The report as one HTML page: sections, charts and samples put into a template. The page fetches nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from orchestration.recipe import Recipe, to_toml
from orchestration.report import charts
from orchestration.report.charts import Bar
from orchestration.report.documents import OPEN
from orchestration.report.samples import GROUPS, Sample, choose_samples
from orchestration.report.subject import SizeFacts, Subject, is_champion
from orchestration.services import tracking
from tinyemo.errors import TinyEmoError

MAX_BYTES = 5 * 2**20
MAX_FINDINGS_DRAWN = 20
MAX_LEAKS_SHOWN = 10
METRICS = {
    "top1_accuracy": "top-1",
    "top2_accuracy": "top-2",
    "top3_accuracy": "top-3",
    "top5_accuracy": "top-5",
    "balanced_accuracy": "balanced",
    "macro_f1": "macro F1",
    "expected_calibration_error": "calibration error",
}
GAP_PARTS = ("groups", "slices", "counterfactuals", "sets")
"""Parts whose effects are differences of shares; those of the others have scales of their own."""
PART_NAMES = {
    "groups": "Groups",
    "words": "Words",
    "slices": "Slices nobody named",
    "association": "Association",
    "counterfactuals": "Counterfactuals",
    "spurious": "Spurious features",
    "sets": "Sets",
}


@dataclass(frozen=True)
class DataSection:
    """One data set of the evaluations, with its charts.

    Attributes:
        entry: see docs/evaluation.md.
        marks: what must stand beside its figures.
    """

    entry: dict[str, Any]
    title: str
    marks: list[str]
    metrics: list[tuple[str, dict[str, Any]]]
    recalls: Markup
    reliability: Markup
    samples: list[Sample]
    samples_problem: str


def write_report(subject: Subject, path: Path) -> int:
    """Write the page about a subject, and return its size in bytes.

    Raises:
        TinyEmoError: S3 or MLflow does not answer.
    """
    page = render(subject)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return len(page.encode())


def render(subject: Subject) -> str:
    """Return the page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("orchestration.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = (_percent, _interval, _number, _effect, _spelled, _shade)
    environment.filters |= {function.__name__.removeprefix("_"): function for function in shown}
    measured = [_data_section(place, entry, subject) for place, entry in enumerate(subject.documents.measured())]
    bias = _newest_by_name(subject.documents.bias)
    context = {
        "subject": subject,
        "marks": subject.marks,
        "made_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": tracking.git_state()["git_commit"][:12],
        "is_champion": bool(subject.versions) and is_champion(subject),
        "facts": _facts(subject),
        "recipe": _recipe(subject),
        "decisions": _decisions(subject),
        "data": measured,
        "overview": _overview(measured, subject),
        "comparisons": _rows_of(subject, "comparisons"),
        "published": _rows_of(subject, "published"),
        "size_charts": _size_charts(subject),
        "bias": bias,
        "bias_charts": [_bias_chart(place, document, subject) for place, document in enumerate(bias)],
        "parts": PART_NAMES,
        "groups": GROUPS,
        "outdated": _num_outdated(subject),
        "trials": _trials(subject),
        "max_leaks": MAX_LEAKS_SHOWN,
        "location": subject.folder if subject.location.startswith("s3://") else subject.location,
    }
    return environment.get_template("page.html.j2").render(context)


def _facts(subject: Subject) -> list[tuple[str, str, str]]:
    """Return rows (name, value, address of a link or empty) that say how the model was made."""
    result, card, run = subject.result, subject.card, subject.run
    rows = [("files", subject.location, ""), ("digest of the files", subject.digest, "")]
    if run is not None:
        ended = datetime.fromtimestamp(run.ended_at, UTC).strftime("%Y-%m-%d %H:%M UTC") if run.ended_at else run.status
        dirty = {"true": ", with changes that were not committed", "false": ""}.get(run.tags.get("git_dirty", ""), "")
        rows += [
            ("run", run.name, run.url),
            ("finished", ended, ""),
            ("by", run.tags.get("mlflow.user", ""), ""),
            ("code", run.tags.get("git_commit", "unknown") + dirty, ""),
            ("device", run.tags.get("device", ""), ""),
            ("workers", run.params.get("workers.num_workers", ""), ""),
        ]
    rows += [
        ("language model", str(result.get("llm") or card.get("llm") or ""), ""),
        ("its weights", str(result.get("llm_weights") or card.get("llm_weights") or ""), ""),
        ("vision encoder", str(card.get("encoder") or result.get("vision_tower") or ""), ""),
        ("loss", str(card.get("loss") or ""), ""),
        ("label text", str(card.get("template") or ""), ""),
        ("labels", str(card.get("labels") or "").replace(",", ", "), ""),
        ("left out of training", str(card.get("leave_out") or "").replace(",", ", "), ""),
        ("training images", str(result.get("num_train") or card.get("num_train") or ""), ""),
        ("recipe digest", str(card.get("recipe_digest") or ""), ""),
    ]
    for name, digest in (subject.claim.get("data") or {}).items():
        rows.append((f"data {name}", digest, ""))
    if not subject.claim and card.get("data_digest"):
        rows.append(("data", f"{card.get('data_uri', '')} {card['data_digest']}", ""))
    rows += [("parent checkpoint", uri, "") for uri in _parents(subject)]
    return [(name, value, link) for name, value, link in rows if value]


def _parents(subject: Subject) -> list[str]:
    """Return the checkpoints and exports that the model was made from, as its stages and its recipe name them."""
    stages = [f"{name}: {row['checkpoint']}" for name, row in (subject.result.get("stages") or {}).items()]
    own, found = f"{subject.folder}/", []
    pending: list[Any] = [subject.claim.get("recipe", {}).get(name) for name in ("reasoner", "labels", "projector")]
    while pending:
        item = pending.pop()
        pending += item.values() if isinstance(item, dict) else item if isinstance(item, list) else []
        if isinstance(item, str) and item.startswith(("s3://", "models:/", "runs:/")) and not item.startswith(own):
            found.append(item)
    return stages + sorted(found)


def _recipe(subject: Subject) -> str:
    content = subject.claim.get("recipe")
    if not content:
        return ""
    try:
        return to_toml(Recipe.model_validate(content))
    except ValueError:  # a recipe of an earlier version
        return json.dumps(content, indent=1)


def _decisions(subject: Subject) -> list[dict[str, Any]]:
    found = []
    for version in subject.versions:
        for key, text in sorted(version.tags.items()):
            if key.startswith("promotion."):
                kind = "" if key.count(".") == 1 else key.rpartition(".")[2]
                found.append({"about": version, "kind": kind} | json.loads(text))
    return found


def _data_section(place: int, entry: dict[str, Any], subject: Subject) -> DataSection:
    marks = [*subject.marks, *(["zero-shot"] if entry.get("is_zero_shot") else []), *_leak_mark(entry)]
    title = f"{entry['name']}, {entry['num_images']:,} images"
    suffix = f" ({', '.join(marks)})" if marks else ""
    bars = [
        Bar(f"{row['label']} ({row['count']})", row["recall"]["value"], row["recall"]["low"], row["recall"]["high"])
        for row in entry["per_class"]
        if row["recall"]["value"] is not None
    ]
    samples: list[Sample] = []
    problem = ""
    try:
        samples = choose_samples(entry)
    except (TinyEmoError, OSError) as error:
        problem = str(error)
    recalls = charts.intervals(bars, f"Recall by label: {title}{suffix}", "recall", key=f"recall{place}")
    calibration = charts.reliability(entry["reliability"], f"Calibration: {title}{suffix}", key=f"reliability{place}")
    return DataSection(
        entry=entry,
        title=title,
        marks=marks,
        metrics=[(METRICS.get(name, name), value) for name, value in entry["metrics"].items()],
        recalls=Markup(recalls),
        reliability=Markup(calibration),
        samples=samples,
        samples_problem=problem,
    )


def _leak_mark(entry: dict[str, Any]) -> list[str]:
    leakage = entry.get("leakage")
    if leakage is None or leakage.get("is_checked") is False:
        return ["leakage not checked"]
    return ["LEAKED test data"] if leakage["has_leakage"] else []


def _overview(measured: list[DataSection], subject: Subject) -> Markup:
    bars = [_bar(section) for section in measured]
    suffix = f" ({', '.join(subject.marks)})" if subject.marks else ""
    if not bars:
        return Markup("")
    return Markup(charts.intervals(bars, f"Top-1 accuracy, 95 % intervals{suffix}", "top-1 accuracy", key="overview"))


def _bar(section: DataSection) -> Bar:
    top1 = section.entry["metrics"]["top1_accuracy"]
    leaked = _leak_mark(section.entry)
    name = f"{section.entry['name']}, {leaked[0]}" if leaked else section.entry["name"]
    return Bar(name, top1["value"], top1["low"], top1["high"], bool(section.marks))


def _rows_of(subject: Subject, key: str) -> list[dict[str, Any]]:
    newest = _newest_by_name(subject.documents.evaluations)
    return [row for document in newest for row in document.get(key) or []]


def _newest_by_name(documents: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for document in documents:
        found.setdefault(document["name"], document)
    return list(found.values())


def _size_charts(subject: Subject) -> list[Markup]:
    sizes = subject.sizes
    columns: dict[str, tuple[str, list[tuple[SizeFacts, float, float | None, float | None]]]] = {
        "Top-1 accuracy by size": (
            "top-1 accuracy",
            [(s, *s.accuracy) for s in sizes if s.accuracy],
        ),
        "Memory of the weights by size (bf16, computed)": (
            "GiB",
            [(s, s.weights_gib, None, None) for s in sizes if s.weights_gib],
        ),
        "Peak memory of a rank in training by size": (
            "GiB",
            [(s, s.peak_gib, None, None) for s in sizes if s.peak_gib],
        ),
        "Cost of training by size": (
            "worker hours",
            [(s, s.worker_hours, None, None) for s in sizes if s.worker_hours],
        ),
    }
    found = []
    for place, (title, (axis, rows)) in enumerate(columns.items()):
        if not rows:
            continue
        notes = sorted({size.note for size, *_ in rows if size.note})
        bars = [Bar(size.name, value, low, high, bool(size.note)) for size, value, low, high in rows]
        suffix = f" (hatched: {'; '.join(notes)})" if notes else ""
        found.append(Markup(charts.sizes(bars, f"{title}{suffix}", axis, key=f"size{place}")))
    return found


def _bias_chart(place: int, document: dict[str, Any], subject: Subject) -> Markup:
    """Return the gaps in shares with an interval, the largest first; hollow where nobody decided yet."""
    drawn = [item for item in document["findings"]
             if item["is_significant"] and item["part"] in GAP_PARTS and _is_number(item.get("low"))]  # fmt: skip
    drawn.sort(key=lambda item: -abs(item["effect"]))
    bars = [
        Bar(
            f"{item['metric']}, {item['group'] or item['data']}",
            item["effect"],
            item["low"],
            item["high"],
            item["decision"] == OPEN,
        )
        for item in drawn[:MAX_FINDINGS_DRAWN]
    ]
    if not bars:
        return Markup("")
    suffix = f" ({', '.join(subject.marks)})" if subject.marks else ""
    title = f"Significant gaps, hollow where nobody decided{suffix}"
    return Markup(charts.intervals(bars, title, "effect", zero=0.0, key=f"bias{place}"))


def _trials(subject: Subject) -> dict[str, Any] | None:
    if not subject.trials:
        return None
    values = [(trial.number, trial.value(subject.search_metric), trial.ended) for trial in subject.trials]
    suffix = f" ({', '.join(subject.marks)})" if subject.marks else ""
    title = f"Trials of {subject.search}{suffix}"
    chart = charts.history(values, title, subject.search_metric, key="search")
    best = sorted((trial for trial in subject.trials if trial.ended == "finished"),
                  key=lambda trial: -trial.value(subject.search_metric))[:5]  # fmt: skip
    ended = [trial.ended for trial in subject.trials]
    return {
        "chart": Markup(chart),
        "counts": {name: ended.count(name) for name in ("finished", "stopped", "failed")},
        "best": [(trial.number, trial.value(subject.search_metric), trial.params) for trial in best],
    }


def _num_outdated(subject: Subject) -> int:
    documents = [*subject.documents.evaluations, *subject.documents.bias]
    return sum(document["model"].get("digest") not in (None, subject.digest) for document in documents)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _interval(value: dict[str, Any]) -> str:
    if value["value"] is None:
        return "-"
    if value.get("low") is None or value.get("high") is None:
        return _percent(value["value"])
    return f"{100 * value['value']:.1f} % [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None, digits: int = 3) -> str:
    return f"{value:.{digits}g}" if value is not None and math.isfinite(value) else "-"


def _effect(item: dict[str, Any]) -> str:
    """Return an effect with its sign, and its interval where there is one."""
    interval = f" [{item['low']:+.3f}, {item['high']:+.3f}]" if _is_number(item["low"]) else ""
    return f"{item['effect']:+.3f}{interval}"


def _spelled(value: str) -> str:
    return value.replace("_", " ")


def _shade(share: float) -> str:
    """Return the colours of a cell of the confusion matrix, dark blue for a share of 1, with text that can be read."""
    red, green, blue = (round(255 + (dark - 255) * (0.05 + 0.95 * share)) for dark in (8, 48, 107))
    return f"background: rgb({red}, {green}, {blue}); color: {'#fff' if share > 0.64 else '#000'}"
