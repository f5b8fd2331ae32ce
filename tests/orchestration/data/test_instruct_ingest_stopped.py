"""An ingest that cannot be finished leaves no version: images that change, kills, lost workers, wrong arguments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from broken_records import Corpus, encode, picture, record
from ingested_records import ingest, left_in

from orchestration.data import ingest_tasks as instruct_tasks
from orchestration.data.ingest import ingest_instruct
from orchestration.data.manifest import load_manifest, verify_manifest
from tinyemo.errors import ConfigError, DataError, PlatformError


def test_an_image_that_changes_between_the_phases_fails_the_ingest(s3_folder: str, tmp_path: Path) -> None:
    source = Corpus(tmp_path)
    for number in range(3):
        source.keep(record(str(number), source.image(f"{number}.jpg", encode(picture(number)))), f"{number}.jpg")
    source.write()

    def change(stage: str, done: int, total: int) -> None:
        if stage == "check" and done == total:
            source.image("1.jpg", encode(picture(77)))

    with pytest.raises(DataError, match=r"1\.jpg changed after it was checked"):
        ingest(source, s3_folder, advance=change)
    assert not [uri for uri in left_in(s3_folder, "broken") if "manifest" in uri or "latest" in uri or "staging" in uri]


class StopError(Exception):
    """Ends an ingest where a test wants it to."""


@pytest.mark.parametrize("stage", ["read", "check", "write"])
def test_an_ingest_that_ends_between_the_phases_leaves_no_version_and_no_staging(
    stage: str, corpus: Corpus, s3_folder: str
) -> None:
    def stop(at: str, done: int, total: int) -> None:
        if at == stage:
            raise StopError

    with pytest.raises(StopError):
        ingest(corpus, s3_folder, advance=stop)
    left = left_in(s3_folder, "broken")
    assert not [uri for uri in left if "manifest" in uri or "latest" in uri or "staging" in uri]
    assert not ingest(corpus, s3_folder).is_unchanged
    assert verify_manifest(load_manifest(f"{s3_folder}/broken", "instruct")) > 0


KILLED_DRIVER = """
import os, signal, sys
from broken_records import RULES
from orchestration.data.ingest import ingest_instruct
from orchestration.data.ingest_rules import Layout

def die(stage, done, total):
    if (stage, done) == ("check", total):
        os.kill(os.getpid(), getattr(signal, sys.argv[4]))

layout = Layout(rows_per_group=4, shard_bytes=12_000, records_per_chunk=10)
ingest_instruct(sys.argv[1], sys.argv[2], name="broken", root=sys.argv[3], rules=RULES, layout=layout, advance=die)
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_driver_that_is_killed_leaves_no_version(how: str, corpus: Corpus, cluster: str, s3_folder: str) -> None:
    environment = os.environ | {"RAY_ADDRESS": cluster, "PYTHONPATH": str(Path(__file__).parents[1])}
    arguments = [str(corpus.records), str(corpus.images), s3_folder, how]
    ended = subprocess.run(
        [sys.executable, "-c", KILLED_DRIVER, *arguments],
        env=environment,
        capture_output=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode != 0
    left = left_in(s3_folder, "broken")
    assert not [uri for uri in left if "manifest" in uri or "latest" in uri or ".parquet" in uri]
    if how == "SIGKILL":
        assert ended.returncode == -signal.SIGKILL
    else:
        assert left == [], ended.stderr.decode()[-2000:]
    manifest = ingest(corpus, s3_folder).manifest
    assert manifest.rows_kept == len(corpus.kept)


def test_a_task_that_kills_its_worker_is_given_up(cluster: str) -> None:
    def die(batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(PlatformError, match="Ray lost a task for good"):
        list(instruct_tasks._run([{"number": 1}], die))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"split": "../train"}, ConfigError, "split is '../train'"),
        ({"name": "Upper"}, ConfigError, "name is 'Upper'"),
        ({"extra_rules": {"taxonomy": "mine"}}, ConfigError, "extra_rules has taxonomy"),
    ],
)
def test_wrong_arguments_are_named(
    options: dict[str, Any], error: type[Exception], message: str, corpus: Corpus, s3_folder: str
) -> None:
    with pytest.raises(error, match=message):
        ingest(corpus, s3_folder, **options)


def test_a_missing_input_is_named(s3_folder: str, tmp_path: Path) -> None:
    source = Corpus(tmp_path)
    with pytest.raises(DataError, match="images is no folder on"):
        ingest(source, s3_folder)
    source.images.mkdir()
    with pytest.raises(DataError, match=r"records\.jsonl is no file"):
        ingest(source, s3_folder)
    source.records.write_text(" \n\n")
    with pytest.raises(DataError, match="holds no record"):
        ingest(source, s3_folder)
    with pytest.raises(DataError, match=r"nowhere\.json does not exist"):
        ingest_instruct(f"{s3_folder}/nowhere.json", source.images, name="x", root=s3_folder)
