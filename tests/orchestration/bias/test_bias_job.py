"""A bias report from a projector's folder, a Parquet file and a table of groups to files, and bad input in one line."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from small_projectors import EKMAN, save_features, save_projector

from orchestration.bias.bias_inputs import DataChoice
from orchestration.bias.bias_job import BiasOptions, decide_on_report, family_curves, report_bias
from tinyemo.errors import ConfigError, DataError

NUM_IMAGES = 600


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A projector that is always right about country north, and wrong about a third of country south."""
    save_projector(tmp_path / "projector")
    rng = np.random.default_rng(0)
    label = rng.integers(6, size=NUM_IMAGES)
    south = rng.random(NUM_IMAGES) < 0.5
    is_wrong = south & (rng.random(NUM_IMAGES) < 0.34)
    shown = np.where(is_wrong, (label + rng.integers(1, 6, size=NUM_IMAGES)) % 6, label)
    save_features(tmp_path / "test.parquet", shown.tolist(), [EKMAN[place] for place in label])
    with (tmp_path / "groups.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "country", "camera", "author", "light"])
        for row in range(NUM_IMAGES):
            country = "south" if south[row] else "north"
            writer.writerow([f"image-{row}.jpg", country, "ab"[row % 2], f"author{row // 2}", round(rng.random(), 3)])
    return tmp_path


def choice(folder: Path, **more) -> DataChoice:
    fields = {"groups": (str(folder / "groups.csv"),)} | more
    return DataChoice(str(folder / "test.parquet"), **fields)


def report(folder: Path, **more):
    return report_bias(str(folder / "projector"), [choice(folder, **more)], BiasOptions(), output=folder / "out")


def test_a_planted_gap_is_reported_stored_and_put_up_for_review(folder) -> None:
    document = report(folder, cluster_by="author", covariates=("light",))
    blamed = {row["group"] for row in document["findings"] if row["is_significant"] and row["part"] == "groups"}
    assert blamed == {"country=north"}
    recall = next(row for row in document["findings"] if row["id"].endswith("country=north vs south/recall"))
    assert recall["effect"] == pytest.approx(0.34, abs=0.08)
    assert recall["low"] < recall["effect"] < recall["high"]
    assert "column author is left out: 300 groups, the largest of 2 images" in document["notes"]
    stored = json.loads((folder / "out" / "bias.json").read_text())
    assert stored["findings"] == document["findings"]
    assert stored["model"]["is_random_weights"] is True
    review = tomllib.loads((folder / "out" / "review.toml").read_text())["finding"]
    assert {row["decision"] for row in review} == {"open"}
    assert recall["id"] in {row["id"] for row in review}


def test_figures_of_groups_add_up(folder) -> None:
    [table] = [one for one in report(folder)["groups"] if one["column"] == "country"]
    assert sum(row["count"] for row in table["rows"]) == NUM_IMAGES
    assert {row["group"]: row["accuracy"] for row in table["rows"]}["north"] == 1.0


def test_decisions_survive_the_next_report(folder) -> None:
    first = report(folder)
    name = first["review"][0]["id"]
    decided = decide_on_report(str(folder / "projector"), "bias", folder / "out", [f"{name}=confirmed"], "seen by hand")
    assert decided["review"][0]["decision"] == "confirmed"
    second = report(folder)
    [row] = [row for row in second["review"] if row["id"] == name]
    assert (row["decision"], row["note"]) == ("confirmed", "seen by hand")
    assert second["changes"] == []


def test_a_decision_on_an_unknown_finding_lists_all_that_is_wrong(folder) -> None:
    report(folder)
    with pytest.raises(ConfigError, match=r"(?s)no finding 'nothing'.*must be one of open, confirmed"):
        decide_on_report(str(folder / "projector"), "bias", folder / "out", ["nothing=confirmed", "nothing=yes"], "")


def test_without_a_report_there_is_nothing_to_decide_on(folder) -> None:
    with pytest.raises(DataError, match="there is no bias report 'bias'"):
        decide_on_report(str(folder / "projector"), "bias", folder / "out", [], "")


def test_a_missing_column_names_the_columns_that_are_there(folder) -> None:
    with pytest.raises(ConfigError, match="has the column age; columns: country, camera, author, light"):
        report(folder, columns=("age",))


def test_a_named_column_of_small_groups_is_refused(folder) -> None:
    with pytest.raises(DataError, match="no group of 'author' has 20 images"):
        report(folder, columns=("author",))


def test_groups_of_other_images_are_refused(folder) -> None:
    (folder / "others.csv").write_text("image,country\nx.jpg,north\ny.jpg,south\n")
    with pytest.raises(DataError, match="names none of the 600 images"):
        report(folder, groups=(str(folder / "others.csv"),))


def test_covariates_must_be_numbers(folder) -> None:
    with pytest.raises(ConfigError, match="--covariates country: the column holds no numbers"):
        report(folder, covariates=("country",))


def test_the_curve_of_a_family_has_a_point_for_each_size(folder) -> None:
    document = report(folder)
    other = document | {"model": document["model"] | {"size": "tinyllama-1.1b"}}
    curves = family_curves([document, other])
    assert {len(curve["sizes"]) for curve in curves} == {2}
    assert {curve["id"] for curve in curves} == {row["id"] for row in document["findings"] if row["is_significant"]}


def test_the_command_prints_a_table_json_and_one_line_errors(folder) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        code = "from orchestration.cli import main; main()"
        command = [sys.executable, "-c", code, "bias", str(folder / "projector"), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)

    made = run("--data", str(folder / "test.parquet"), "--groups", str(folder / "groups.csv"), "--output", str(folder / "out"), "--json")  # noqa: E501  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["num_tests"] > 10
    shown = run("--output", str(folder / "out"))
    assert shown.returncode == 0, shown.stderr
    assert "are open" in shown.stdout
    wrong = run("--data", str(folder / "test.parquet"), "--columns", "age")
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines()[-1].startswith("error: no table of groups has the column age")
