"""`tinyemo runs` and `tinyemo datasets` over a real S3 server: states, sizes, and what may not be deleted."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from orchestration.cli import app
from orchestration.inventory import find_run
from orchestration.jobs.lease import OLD_AFTER_S, Holder, LeaseDocument
from orchestration.recipe import load_recipe
from orchestration.services import storage, tracking
from tinyemo.errors import DataError, TinyEmoError, TrainingError

DIGEST = "a" * 64


class Mlflow:
    """Stands in for the functions that ask MLflow; tests/orchestration/test_tracking.py tests those."""

    def __init__(self) -> None:
        self.deleted: list[str] = []
        self.models: dict[str, list[str]] = {}
        self.children: dict[str, list[str]] = {}

    def delete_run(self, run_id: str) -> None:
        self.deleted.append(run_id)

    def find_runs(self, *, parent_run_id: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(run_id=child) for child in self.children.get(parent_run_id, [])]

    def registered_versions(self, run_id: str) -> list[str]:
        return self.models.get(run_id, [])


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Mlflow:
    stand_in = Mlflow()
    monkeypatch.setattr(tracking, "find_runs", stand_in.find_runs)
    monkeypatch.setattr(tracking, "delete_run", stand_in.delete_run)
    monkeypatch.setattr(tracking, "registered_versions", stand_in.registered_versions)
    return stand_in


def invoke(*arguments: str, answer: str | None = None) -> Result:
    result = CliRunner().invoke(app, list(arguments), input=answer)
    if isinstance(result.exception, TinyEmoError):
        raise result.exception
    return result


def put_run(root: str, name: str, *overrides: str, states: dict[str, dict[str, Any]] | None = None) -> None:
    recipe = load_recipe("reasoning-offline", [f"name={name}", *overrides])
    claim = {"recipe": recipe.model_dump(mode="json"), "data": {"moods": DIGEST}, "mlflow_run_id": f"id-{name}"}
    storage.write_json(f"{root}/{name}/run.json", claim)
    for stage, state in (states or {}).items():
        storage.write_json(f"{root}/{name}/{stage}/latest.json", state)


def put_lease(root: str, name: str, holder: Holder | None) -> None:
    document = LeaseDocument(token=1, lease_id="a", nonce="b", holder=holder)
    storage.write_bytes(f"{root}/{name}/lease.json", document.model_dump_json().encode())


def listed(root: str) -> dict[str, dict[str, Any]]:
    rows = json.loads(invoke("runs", "list", "--runs-root", root, "--json").stdout)
    return {row["name"]: row for row in rows}


def test_a_run_is_running_stopped_or_finished(s3_root: str) -> None:
    stages = {"pretrain": {"step": 8, "is_final": True}, "finetune": {"step": 5, "num_steps": 9}}
    put_run(s3_root, "held", states=stages)
    put_lease(s3_root, "held", Holder.this_process())
    put_run(s3_root, "stopped", states={"pretrain": {"step": 7, "is_final": False}})
    put_lease(s3_root, "stopped", None)
    put_run(s3_root, "torn")
    storage.write_bytes(f"{s3_root}/torn/lease.json", b'{"hold')
    put_run(s3_root, "done")
    storage.write_json(f"{s3_root}/done/result.json", {})
    runs = listed(s3_root)
    states = {name: run["state"] for name, run in runs.items()}
    assert states == {"done": "finished", "held": "running", "stopped": "stopped", "torn": "stopped"}
    assert (runs["held"]["stage"], runs["held"]["step"], runs["held"]["num_steps"]) == ("finetune", 5, 9)
    assert (runs["stopped"]["stage"], runs["stopped"]["step"], runs["stopped"]["num_steps"]) == ("pretrain", 7, None)
    assert 0 <= runs["held"]["heartbeat_age_s"] < OLD_AFTER_S
    assert runs["done"]["heartbeat_age_s"] is None
    assert runs["done"]["num_bytes"] == sum(storage.list_prefix(f"{s3_root}/done").values())
    text = invoke("runs", "list", "--runs-root", s3_root).stdout
    assert "finetune: 5 of 9" in text
    shown = invoke("runs", "show", "stopped", "--runs-root", s3_root).stdout
    assert "id-stopped" in shown
    assert "pretrain" in shown


def test_an_old_heartbeat_is_that_of_a_dead_driver(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_run(s3_root, "dead")
    put_lease(s3_root, "dead", Holder.this_process())
    monkeypatch.setattr(storage, "age_s", lambda uri: OLD_AFTER_S + 1)
    assert find_run(s3_root, "dead").state == "stopped"


def test_rm_deletes_s3_and_mlflow_after_asking(s3_root: str, mlflow: Mlflow) -> None:
    put_run(s3_root, "one")
    put_run(s3_root, "one-more")
    mlflow.children["id-one"] = ["id-pretrain", "id-finetune"]
    result = invoke("runs", "rm", "one", "--runs-root", s3_root, answer="n\n")
    assert (result.exit_code, set(listed(s3_root)), mlflow.deleted) == (1, {"one", "one-more"}, [])
    assert invoke("runs", "rm", "one", "--runs-root", s3_root, answer="y\n").exit_code == 0
    assert (set(listed(s3_root)), mlflow.deleted) == ({"one-more"}, ["id-pretrain", "id-finetune", "id-one"])
    deleted = invoke("runs", "rm", "one-more", "--runs-root", s3_root, "--yes", "--json")
    assert json.loads(deleted.stdout) == {"deleted": ["one-more"]}
    assert storage.list_prefix(s3_root) == {}
    with pytest.raises(DataError, match="no run one at"):
        invoke("runs", "rm", "one", "--runs-root", s3_root, "--yes")


def test_rm_refuses_what_something_was_made_from(s3_root: str, mlflow: Mlflow) -> None:
    put_run(s3_root, "base")
    put_run(s3_root, "child", f'reasoner.llm="{s3_root}/base/model"')
    put_run(s3_root, "busy")
    put_lease(s3_root, "busy", Holder.this_process())
    mlflow.models["id-child"] = ["tinyemo-projector version 3"]
    for name, reason in (
        ("base", "child was made from it"),
        ("child", "tinyemo-projector version 3 was made from it"),
        ("busy", "busy is in progress"),
    ):
        with pytest.raises(TrainingError, match=reason):
            invoke("runs", "rm", name, "--runs-root", s3_root, "--yes")
    assert set(listed(s3_root)) == {"base", "child", "busy"}
    assert mlflow.deleted == []


def test_a_family_goes_with_its_sizes_and_no_size_goes_alone(s3_root: str, mlflow: Mlflow) -> None:
    for size in ("small", "large"):
        put_run(s3_root, f"family-{size}")
    storage.write_json(f"{s3_root}/family/run.json", {"kind": "family"})
    storage.write_json(f"{s3_root}/family/family.json", {"recipe": {}})
    put_run(s3_root, "familiar")
    assert listed(s3_root)["family"]["kind"] == "family"
    with pytest.raises(TrainingError, match="family was made from it"):
        invoke("runs", "rm", "family-small", "--runs-root", s3_root, "--yes")
    invoke("runs", "rm", "family", "--runs-root", s3_root, "--yes")
    assert set(listed(s3_root)) == {"familiar"}
    assert mlflow.deleted == ["id-family-large", "id-family-small"]


def test_data_sets_are_listed_and_deleted_unless_a_run_reads_them(s3_root: str) -> None:
    root, runs = f"{s3_root}/datasets", f"{s3_root}/runs"
    put_run(runs, "reader")
    for name, digest in (("moods", DIGEST), ("scratch", "b" * 64)):
        manifest = {"kind": "instruct", "digest": digest, "splits": {"train": {"rows": 3}}}
        storage.write_json(f"{root}/{name}/{digest[:12]}/manifest.json", manifest)
        storage.write_json(f"{root}/{name}/latest.json", {"version": digest[:12], "digest": digest})
    storage.write_json(f"{root}/half/v1/train-00000.parquet", 1)
    arguments = ("--root", root, "--runs-root", runs)
    found = {row["name"]: row for row in json.loads(invoke("datasets", "list", *arguments, "--json").stdout)}
    assert {name: (row["kind"], row["rows"], row["used_by"]) for name, row in found.items()} == {
        "half": ("incomplete", {}, []),
        "moods": ("instruct", {"train": 3}, ["reader"]),
        "scratch": ("instruct", {"train": 3}, []),
    }
    assert "reader" in invoke("datasets", "show", "moods", *arguments).stdout
    with pytest.raises(DataError, match="reader was made from it"):
        invoke("datasets", "rm", "moods", *arguments, "--yes")
    assert invoke("datasets", "rm", "scratch", *arguments, "--yes").exit_code == 0
    assert storage.list_prefix(f"{root}/scratch") == {}
    assert storage.list_prefix(f"{root}/moods")


def test_clean_deletes_what_nothing_reads_and_nothing_else(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, data = f"{s3_root}/runs", f"{s3_root}/data"
    for name in ("stopped", "alive", "torn"):
        kept = f"{runs}/{name}/pretrain/attempt-2/checkpoint_1"
        put_run(runs, name, states={"pretrain": {"checkpoint": kept, "step": 3}})
        for folder in ("attempt-1/checkpoint_1", "attempt-2/checkpoint_0", "attempt-2/checkpoint_1"):
            storage.write_bytes(f"{runs}/{name}/pretrain/{folder}/engine", b"12345")
    put_lease(runs, "alive", Holder.this_process())
    storage.write_bytes(f"{runs}/torn/pretrain/latest.json", b"{")
    for folder in ("moods/.staging-0a", "moods/failed-1b", "moods/v1"):
        storage.write_bytes(f"{data}/{folder}/part", b"123")
    before = set(storage.list_prefix(s3_root))

    def clean() -> int:
        arguments = ("--root", data, "--runs-root", runs, "--json")
        freed: int = json.loads(invoke("runs", "clean", *arguments).stdout)["freed_bytes"]
        return freed

    assert clean() == 10
    gone = {
        f"{runs}/stopped/pretrain/{folder}/engine" for folder in ("attempt-1/checkpoint_1", "attempt-2/checkpoint_0")
    }
    assert before - set(storage.list_prefix(s3_root)) == gone
    monkeypatch.setattr("orchestration.inventory.KEEP_LEFTOVERS_S", -1.0)
    assert clean() == 6
    gone |= {f"{data}/moods/{folder}/part" for folder in (".staging-0a", "failed-1b")}
    assert before - set(storage.list_prefix(s3_root)) == gone
