"""`tinyemo ingest instruct` on the platform: what it prints, where its card goes, and that its page says all."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from broken_records import Corpus, encode, picture, record
from job_runner import Jobs
from PIL import Image

from orchestration.data.ingest_rules import IngestRules, Reason
from orchestration.data.manifest import REJECTED_SCHEMA, load_manifest
from orchestration.services import storage


@pytest.fixture
def small(tmp_path: Path) -> Corpus:
    source = Corpus(tmp_path)
    for number in range(9):
        source.keep(record(str(number), source.image(f"{number}.jpg", encode(picture(number)))), f"{number}.jpg")
    source.reject("image_missing", "nowhere", record("9", "nowhere.jpg"))
    source.write()
    return source


@pytest.mark.slow
def test_the_command_ingests_and_shows_the_card_in_mlflow(small: Corpus, jobs: Jobs, tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text("max_rejected_fraction = 0.05\n")
    arguments = ["ingest", "instruct", "--records", small.records, "--images", small.images, "--name", "small"]
    arguments += ["--rules", rules, "--split", "train"]
    refused = jobs.run(*arguments)
    assert "1 of 10 records are rejected, more than max_rejected_fraction 0.05" in refused.error
    document = jobs.run(*arguments, "--set", "max_rejected_fraction=0.1", "--json").document
    assert (document["rows_in"], document["rows_kept"], document["rows_rejected"]) == (10, 9, 1)
    assert document["splits"]["train"]["rows"] == 9
    (run,) = jobs.mlflow_runs("ingest-small")
    assert run.info.status == "FINISHED"
    assert run.data.tags["kind"] == "ingest"
    assert run.data.metrics["data/rows_kept"] == 9
    with jobs.connected():
        manifest = load_manifest("s3://tinyemo/datasets/small", "instruct")
        assert manifest.digest == document["digest"] == run.data.tags["data.digest"]
        card = storage.read_bytes(manifest.file_uri("card.md"))
        sheet = Image.open(io.BytesIO(storage.read_bytes(manifest.file_uri("samples.png"))))
        from mlflow.tracking import MlflowClient

        client = MlflowClient()
        assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"card.md", "samples.png"}
    assert b"| train | 9 | 9 |" in card
    assert b"| image_missing | 1 |" in card
    assert sheet.size[0] > sheet.size[1]
    again = jobs.run(*arguments, "--set", "max_rejected_fraction=0.1")
    assert again.code == 0
    assert "rows in 10 = kept 9 + rejected 1 + duplicates 0" in again.stdout
    assert "unchanged" in again.stdout
    assert len(jobs.mlflow_runs("ingest-small")) == 1


def test_the_dead_letter_has_the_schema_that_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "instruct_data.md").read_text()
    assert [name for name in REJECTED_SCHEMA.names if f"`{name}`" not in text] == []
    assert [str(reason) for reason in Reason if f"`{reason}`" not in text] == []
    assert [name for name in IngestRules.model_fields if f"`{name}`" not in text] == []
