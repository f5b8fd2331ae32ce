"""The report on models in a real S3 and a real MLflow: where its facts come from, and where the page is stored."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import pytest
from broken_records import encode, picture
from ingested_records import LAYOUT
from made_models import LABELS, bias, evaluation, finding, make_run
from typer.testing import CliRunner

from orchestration.cli import app
from orchestration.data.ingest import ingest_images
from orchestration.data.ingest_rules import IngestRules
from orchestration.report.page import render
from orchestration.report.promotion import promote_first
from orchestration.report.samples import choose_samples
from orchestration.report.subject import find_subject
from orchestration.services import storage, tracking
from tinyemo.errors import DataError


def test_a_run_has_a_page_in_mlflow_with_its_origin_and_its_promotion(
    server: str, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYEMO_STATE", str(tmp_path / "no-platform"))
    runs, model = f"{s3_root}/runs", f"made-{secrets.token_hex(4)}"
    made = make_run(runs, "family-smollm2-135m", model=model)
    data = {"recipe": {"labels": {"table": f"{runs}/parent/stage/checkpoint"}}, "data": {"emotion6": "d" * 64}}
    storage.write_json(f"{made.folder}/run.json", data | {"mlflow_run_id": made.run_id})
    evaluation(made, 0.8)
    bias(made, [finding(1, -0.2)], {"groups-1": "explained"})
    promote_first(model, made.version.version, runs=runs)
    page, output = f"models:/{model}@champion", tmp_path / "page.html"
    outcome = CliRunner().invoke(app, ["report", page, "--root", runs, "--output", str(output), "--json"])
    assert outcome.exit_code == 0, outcome.output
    document = json.loads(outcome.stdout)
    assert (document["bytes"], document["data"]) == (output.stat().st_size, ["emotion6"])
    assert tracking.download_artifacts(f"runs:/{made.run_id}/report/page.html").read_bytes() == output.read_bytes()
    text = output.read_text()
    for expected in (
        ", champion", f"{model} version 1: promoted", "with no champion before it", "d" * 64, made.version.url,
        f"{runs}/parent/stage/checkpoint", "generated data", "80.0 %", "explained",
    ):  # fmt: skip
        assert expected in text, expected
    assert render(find_subject("family-smollm2-135m", runs)).count("<h1>") == 1
    with pytest.raises(DataError, match="no finished run or family"):
        find_subject("nobody", runs)


@pytest.mark.usefixtures("tasks_in_process")
@pytest.mark.parametrize("is_allowed", [True, False])
def test_pictures_are_shown_only_where_the_data_say_so(s3_root: str, tmp_path: Path, is_allowed: bool) -> None:
    images = tmp_path / "images"
    images.mkdir()
    table = ["image,label,split"]
    for number in range(12):
        (images / f"{number}.jpg").write_bytes(encode(picture(number)))
        table.append(f"{number}.jpg,{LABELS[number % len(LABELS)]},test")
    (tmp_path / "labels.csv").write_text("\n".join(table))
    rules = IngestRules(pictures_may_be_shown=is_allowed, near_duplicate_bits=-1)
    assert ("pictures_may_be_shown" in rules.model_dump()) == is_allowed  # digests of data without it stay as they were
    options: dict[str, Any] = {"name": "pictures", "root": s3_root, "rules": rules, "layout": LAYOUT}
    manifest = ingest_images(tmp_path / "labels.csv", images, **options).manifest
    scores = tmp_path / "scores.parquet"
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"id": f"{number}.jpg", "label": LABELS[number % 6], "predicted": LABELS[number % 5],
             "scores": [0.1 * place + 0.01 * number for place in range(6)]} for number in range(12)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), scores)
    found = choose_samples({"name": "pictures", "uri": manifest.uri, "labels": list(LABELS), "scores": str(scores)})
    assert [bool(sample.picture) for sample in found] == [is_allowed] * len(found)
    assert len({sample.picture for sample in found}) == (len({sample.id for sample in found}) if is_allowed else 1)
    assert all(sample.predicted == sample.label for sample in found if sample.group == "confident and right")
    assert all(sample.predicted != sample.label for sample in found if sample.group == "confident and wrong")
