"""A Markdown card and a sheet of pictures that show people a data set before they train on it."""

from __future__ import annotations

import io
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw

from orchestration.data.manifest import Manifest, SplitCounts
from orchestration.services import storage
from tinyemo.errors import PlatformError

logger = logging.getLogger(__name__)

CARD = "card.md"
CONTACT_SHEET = "samples.png"
EXPERIMENT = "tinyemo"
NUM_SAMPLES = 24
SHEET_COLUMNS = 6
THUMBNAIL_SIDE = 160
"""Pixels."""
CAPTION_HEIGHT = 14
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
MEASURES = {
    "width": "image width, pixels",
    "height": "image height, pixels",
    "image_bytes": "image file, bytes",
    "question_chars": "questions of a record, characters",
    "answer_chars": "answers of a record, characters",
}
"""Column of the facts -> what it is called on the card."""


def thumbnail(image: bytes) -> bytes:
    """Return a small JPEG of an image that was checked, at most THUMBNAIL_SIDE pixels a side."""
    with Image.open(io.BytesIO(image)) as picture:
        small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def contact_sheet(pictures: Sequence[dict[str, Any]]) -> bytes:
    """Return a PNG of thumbnails, each above its task and label; `pictures` have image, task and label."""
    num_rows = -(-len(pictures) // SHEET_COLUMNS)
    height = THUMBNAIL_SIDE + CAPTION_HEIGHT
    sheet = Image.new("RGB", (SHEET_COLUMNS * THUMBNAIL_SIDE, max(num_rows, 1) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, picture in enumerate(pictures):
        left, top = place % SHEET_COLUMNS * THUMBNAIL_SIDE, place // SHEET_COLUMNS * height
        with Image.open(io.BytesIO(picture["image"])) as image:
            sheet.paste(image, (left + (THUMBNAIL_SIDE - image.width) // 2, top + (THUMBNAIL_SIDE - image.height) // 2))
        caption = ": ".join(text for text in (picture["task"], picture["label"]) if text)
        draw.text((left + 2, top + THUMBNAIL_SIDE), caption, fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def write_card(manifest: Manifest, kept: pa.Table) -> str:
    """Return the card as Markdown: counts per split, task, label and reason, sizes, rules; the same for equal data.

    Args:
        manifest: of the version; it needs no card yet.
        kept: the facts of the kept records, with the columns of MEASURES and `image_sha256`.
    """
    reasons = manifest.rejected.reasons
    duplicates = manifest.rejected.num_duplicates
    num_images = pc.count_distinct(kept["image_sha256"]).as_py()
    # The source names files of the user, which must not end the code block or add markup of their own.
    facts = json.dumps({"source": manifest.source, "rules": manifest.rules}, indent=1, sort_keys=True)
    facts = facts.replace("`", "\\u0060").replace("<", "\\u003c")
    lines = [
        f"# {manifest.name}",
        "",
        *(["**Generated data: figures from them mean nothing.**", ""] if manifest.data == "generated" else []),
        f"Records in {manifest.rows_in} = kept {kept.num_rows} + rejected {manifest.rejected.rows - duplicates} "
        f"+ duplicates {duplicates}; {num_images} images.",
        "",
        *(["## Records by split and task", "", *_task_table(manifest), ""] if manifest.tasks else []),
        "## Records by label",
        "",
        *_label_table(manifest.splits),
        "",
        "## Not kept",
        "",
        *_table(["reason", "records"], [[reason, count] for reason, count in reasons.items()]),
        "",
        "The records themselves, each with its reason, are in `rejected.parquet`.",
        "",
        "## Sizes and lengths",
        "",
        *_table(["of kept records", "least", "5 %", "median", "95 %", "most"], _quantiles(kept)),
        "",
        "## Pictures",
        "",
        f"![{NUM_SAMPLES} images chosen by their sha256]({CONTACT_SHEET})",
        "",
        "## Source and rules",
        "",
        f"```json\n{facts}\n```",
        "",
    ]
    return "\n".join(lines)


def _task_table(manifest: Manifest) -> list[str]:
    names = sorted({task for counts in manifest.tasks.values() for task in counts})
    rows = [
        [split, *(manifest.tasks[split].get(task, 0) for task in names), counts.rows]
        for split, counts in manifest.splits.items()
    ]
    return _table(["split", *names, "all"], rows)


def _label_table(splits: dict[str, SplitCounts]) -> list[str]:
    labels = sorted({label for counts in splits.values() for label in counts.labels})
    rows = [[label, *(counts.labels.get(label, 0) for counts in splits.values())] for label in labels]
    rows.append(["(none)", *(counts.rows - sum(counts.labels.values()) for counts in splits.values())])
    return _table(["label", *splits], rows)


def _quantiles(kept: pa.Table) -> list[list[Any]]:
    return [
        [text, *(round(float(value)) for value in np.quantile(kept[column].to_numpy(), QUANTILES))]
        for column, text in MEASURES.items()
        if kept[column].null_count == 0
    ]


def _table(header: list[str], rows: list[list[Any]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in [header, ["---"] * len(header), *rows]]


def has_mlflow() -> bool:
    """Return True where the environment names an MLflow server."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI"))


def show_in_mlflow(manifest: Manifest) -> str | None:
    """Put the card of a version in S3 into an MLflow run of kind ingest; its page, None where no server is named.

    The data set is stored by now, so MLflow's failure is a warning.
    """
    if not has_mlflow():
        return None
    try:
        return _log_card(manifest)
    except PlatformError as error:
        logger.warning("%s is stored, but MLflow does not show it: %s", manifest.uri, error)
        return None


def _log_card(manifest: Manifest) -> str:
    from orchestration.services.tracking import open_run

    duplicates = manifest.rejected.num_duplicates
    tags = {"kind": "ingest", "data": manifest.data, "data.uri": manifest.uri, "data.digest": manifest.digest}
    params = {"name": manifest.name, "rows_per_group": manifest.rows_per_group, "rules": manifest.rules}
    with (
        open_run(EXPERIMENT, f"ingest-{manifest.name}", params=params, tags=tags) as run,
        tempfile.TemporaryDirectory(prefix="tinyemo-card-") as folder,
    ):
        run.log_metrics(
            {
                "data/rows_in": manifest.rows_in,
                "data/rows_kept": manifest.rows_kept,
                "data/rows_rejected": manifest.rejected.rows - duplicates,
                "data/rows_duplicate": duplicates,
                **{f"{split}/rows": counts.rows for split, counts in manifest.splits.items()},
            }
        )
        for file in (CARD, CONTACT_SHEET):
            path = Path(folder) / file
            path.write_bytes(storage.read_bytes(manifest.file_uri(file)))
            run.log_artifact(path)
        return run.url
