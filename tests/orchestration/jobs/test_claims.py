"""The claim that binds a run name to a recipe and its data, in a real S3 server."""

from __future__ import annotations

import pytest

from orchestration.jobs.lease import read_claim, write_claim
from orchestration.recipe import Recipe, parse_recipe
from orchestration.services import storage
from tinyemo.errors import TrainingError

DATA = {"pretrain/0/moods": "a" * 64, "finetune/0/moods": "b" * 64}


def recipe(**sections: object) -> Recipe:
    return parse_recipe({"name": "held", **sections}, source="test")


def run_of(folder: str, one: Recipe, data: dict[str, str]) -> object:
    claim = read_claim(folder, one, data)
    return None if claim is None else claim["mlflow_run_id"]


def test_a_name_is_held_for_one_recipe_and_its_data(s3_root: str) -> None:
    assert read_claim(s3_root, recipe(), DATA) is None
    write_claim(s3_root, recipe(), DATA, "run-1")
    assert run_of(s3_root, recipe(), DATA) == "run-1"
    with pytest.raises(TrainingError, match="another job started held just now"):
        write_claim(s3_root, recipe(), DATA, "run-2")
    assert run_of(s3_root, recipe(), DATA) == "run-1"


def test_what_differs_is_named_and_nothing_else(s3_root: str) -> None:
    write_claim(s3_root, recipe(), DATA, "run-1")
    other = recipe(train={"seed": 7})
    newer = DATA | {"finetune/0/moods": "c" * 64}
    with pytest.raises(TrainingError) as caught:
        read_claim(s3_root, other, newer)
    said = str(caught.value).partition("(")[2].partition(")")[0]
    assert said.split("; ") == ["train.seed 0 -> 7", f"data version of finetune/0/moods {'b' * 12} -> {'c' * 12}"]


@pytest.mark.parametrize("data", [{}, {"pretrain/0/moods": "a" * 64}, DATA | {"more": "d" * 64}])
def test_data_more_or_less_are_other_data(data: dict[str, str], s3_root: str) -> None:
    write_claim(s3_root, recipe(), DATA, "run-1")
    with pytest.raises(TrainingError, match=r"another recipe \(data version of \S+ \w{4,12} -> \w{4,12}"):
        read_claim(s3_root, recipe(), data)


def test_a_run_goes_on_under_a_version_that_knows_more_fields(s3_root: str) -> None:
    write_claim(s3_root, recipe(), DATA, "run-1")
    claim = storage.read_json(f"{s3_root}/run.json")
    del claim["recipe"]["family"]["overrides"]
    storage.write_json(f"{s3_root}/run.json", claim)
    assert run_of(s3_root, recipe(), DATA) == "run-1"
    with pytest.raises(TrainingError, match=r"family\.overrides\.tinyemo-700m None -> "):
        read_claim(s3_root, recipe(family={"overrides": {"tinyemo-700m": ["train.seed=1"]}}), DATA)
    claim["recipe"]["gone"] = 1
    storage.write_json(f"{s3_root}/run.json", claim)
    with pytest.raises(TrainingError, match="exists with another recipe"):
        read_claim(s3_root, recipe(), DATA)


def test_a_stage_that_is_gone_or_has_moved_is_named(s3_root: str) -> None:
    both = {"pretrain": {}, "finetune": {"trains": "llm"}}
    write_claim(s3_root, recipe(stages=both), DATA, "run-1")
    for stages, said in (
        ({"pretrain": {}}, "stages pretrain, finetune -> pretrain"),
        (dict(reversed(both.items())), "stages pretrain, finetune -> finetune, pretrain"),
    ):
        with pytest.raises(TrainingError) as caught:
            read_claim(s3_root, recipe(stages=stages), DATA)
        assert said in str(caught.value)
    assert run_of(s3_root, recipe(stages=both), DATA) == "run-1"
