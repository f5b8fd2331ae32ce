"""From a recipe to records; a driver that is killed loses nothing and doubles nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthesis_inputs import write_photographs, write_recipe
from teacher_server import Teacher, running_teacher

from orchestration.data.ingest_rules import IngestRules
from orchestration.data.record_checks import check_record
from orchestration.services import storage
from orchestration.synthesize.answer_ledger import read_answers
from orchestration.synthesize.synthesis import SynthesisResult, describe_synthesis, synthesize
from orchestration.synthesize.synthesis_recipe import load_synthesis
from tinyemo.errors import ConfigError
from tinyemo.taxonomies import TAXONOMIES

FOLDER = Path(__file__).parent


@pytest.fixture(autouse=True)
def _no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def teacher() -> Iterator[Teacher]:
    with running_teacher() as server:
        yield server


def records(result: SynthesisResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in storage.read_bytes(result.records).decode().splitlines()]


def test_a_recipe_becomes_records_that_the_ingest_takes(teacher: Teacher, s3_root: str, tmp_path: Path) -> None:
    write_photographs(tmp_path, 20)
    recipe = load_synthesis(str(write_recipe(tmp_path, s3_root, teacher.url)))
    planned = describe_synthesis(recipe)
    assert storage.list_prefix(s3_root) == {}  # a dry run writes nothing
    assert sum(teacher.seen.values()) == 0
    result = synthesize(recipe, has_dataset=False)
    # The plan assumed that each caption is accepted, which a question about the picture needs.
    assert result.num_requested + result.num_skipped == sum(planned["items"].values()) + planned["skipped"]
    made = records(result)
    assert result.num_accepted == len(made) > 20
    assert result.num_accepted + sum(result.rejected.values()) == result.num_requested
    assert set(result.rejected) <= {"near_duplicate", "label_missing", "duplicate_across_splits"}
    checked = [check_record(record, IngestRules(taxonomy=TAXONOMIES["mikels"])) for record in made]
    assert {record.task for record in checked} == {"caption", "vqa"}  # the server names no label: see the next test
    assert {record.source for record in checked} == {"synthetic:abundant", "synthetic:better"}
    assert {record["split"] for record in made} == {"train", "test"}
    images = {Path(uri).name: size for uri, size in storage.list_prefix(f"{s3_root}/made/images").items()}
    assert {record["image"] for record in made} == set(images)
    folder = result.records.rpartition("/")[0]
    card = storage.read_bytes(f"{folder}/card.md").decode()
    assert "it never sees the photograph" in card
    assert "photograph and context" in card
    assert storage.read_bytes(f"{folder}/samples.png").startswith(b"\x89PNG")
    assert result.money > 0
    before = sum(teacher.seen.values())
    again = synthesize(recipe, has_dataset=False)
    assert sum(teacher.seen.values()) == before
    assert (again.records_sha256, again.requests) == (result.records_sha256, result.requests)


def test_reasoning_has_the_published_form(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photographs(tmp_path, 12)
    with running_teacher() as server:
        real = server.body

        def body(name: str, number: int, prompt: str, *rest: Any) -> bytes:
            found = prompt.partition("The correct label is ")[2].partition(".")[0]
            return real("named" if found else name, number, found or prompt, *rest)

        monkeypatch.setattr(server, "body", body)
        recipe = load_synthesis(str(write_recipe(tmp_path, s3_root, server.url)))
        result = synthesize(recipe, has_dataset=False)
    made = [record for record in records(result) if record["task"] == "reasoning"]
    assert len(made) >= 10
    for record in made:
        question, answer = (turn["value"] for turn in record["conversations"])
        label = record["label"]
        offered = question.partition("Labels: [")[2].partition("]")[0].split(", ")
        assert label in offered
        assert 3 <= len(offered) <= 4
        assert question.endswith(f"The correct label is {label}.")
        assert answer.startswith("Reasoning: ")
        assert answer.endswith(f"\nPredicted Label: {label}")
    places = Counter(
        record["conversations"][0]["value"].partition("Labels: [")[2].split(", ").index(record["label"])
        for record in made
        if record["label"] in record["conversations"][0]["value"].partition("Labels: [")[2].split(", ")
    )
    assert len(places) > 1  # the place of the right label gives nothing away


def start(recipe: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(FOLDER / "synthesis_inputs.py"), str(recipe)]
    path = os.pathsep.join([str(FOLDER.parents[2]), str(FOLDER)])
    return subprocess.Popen(
        command, env={**environment, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_driver_that_is_killed_twice_makes_the_set_of_one_that_was_not(s3_root: str, tmp_path: Path) -> None:
    write_photographs(tmp_path, 60)
    environment = dict(os.environ)
    (tmp_path / "whole").mkdir()
    with running_teacher(delay_s=0.1) as server:
        whole = start(write_recipe(tmp_path, f"{s3_root}/whole", server.url, "max_concurrency = 8"), environment)
        stdout, stderr = whole.communicate(timeout=250)
        assert whole.returncode == 0, stderr[-3000:]
        expected = json.loads(stdout)
        server.seen.clear()
        recipe = write_recipe(tmp_path, f"{s3_root}/killed", server.url, "max_concurrency = 8")
        folder = f"{s3_root}/killed/made"
        for target in (25, 90):
            driver = start(recipe, environment)
            deadline = time.monotonic() + 250
            while sum(server.seen.values()) < target and time.monotonic() < deadline:
                assert driver.poll() is None, driver.communicate()[1][-3000:]
                time.sleep(0.02)
            driver.send_signal(signal.SIGKILL)
            driver.communicate()
        stored = len(read_answers(folder))
        assert 0 < stored < expected["num_requested"]
        last = start(recipe, environment)
        stdout, stderr = last.communicate(timeout=250)
        assert last.returncode == 0, stderr[-3000:]
        result = json.loads(stdout)
    assert result["records_sha256"] == expected["records_sha256"]
    assert (result["num_accepted"], result["rejected"]) == (expected["num_accepted"], expected["rejected"])
    keys = read_answers(folder)["key"].to_pylist()
    assert len(keys) == len(set(keys)) == result["num_requested"]
    num_sent, num_lost = sum(server.seen.values()), result["num_lost"]
    assert 0 < num_lost <= 2 * (8 + 8 + 16)  # at most what two killed drivers had in flight or not stored yet
    assert num_sent - result["num_requested"] <= num_lost
    assert result["requests"] == result["num_requested"] + num_lost


def test_all_problems_of_a_recipe_come_at_once(tmp_path: Path, s3_root: str) -> None:
    path = write_recipe(tmp_path, s3_root, "http://127.0.0.1:1/v1")
    path.write_text(path.read_text().replace('context = ["label"]', 'context = ["answer.poem"]') + "\nsure = 3\n")
    with pytest.raises(ConfigError) as caught:
        load_synthesis(str(path), ["teachers.abundant.base_url=ftp://x"])
    for problem in ("teachers.better.sure: unknown key", "answer.poem is no task", "must look like http://host:port"):
        assert problem in str(caught.value)
    write_photographs(tmp_path, 2)
    good = write_recipe(tmp_path, s3_root, "http://127.0.0.1:1/v1")
    with pytest.raises(ConfigError, match="no source of the contexts taste"):
        synthesize(load_synthesis(str(good), ['tasks.caption.context=["taste"]']), has_dataset=False)
