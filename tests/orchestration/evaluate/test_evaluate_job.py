"""`tinyemo evaluate RECIPE` on small made data: known figures, maps, leakage, comparisons, and where files go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingested_features import ingest
from job_runner import RUNS, Jobs
from small_projectors import EKMAN, save_features, save_projector
from typer.testing import CliRunner, Result

from orchestration.cli import app
from orchestration.evaluate.evaluate_job import draw
from orchestration.evaluate.evaluation_recipe import load_evaluation
from orchestration.evaluate.scoring import read_scores
from orchestration.services import storage
from tinyemo.errors import ConfigError, TinyEmoError

TRUE = [place for place in range(6) for _ in range(10)]
"""Ten rows of each of Ekman's labels."""
GIVEN = [place if number % 10 < 8 else (place + 1) % 6 for number, place in enumerate(TRUE)]
"""Two of each ten are features of the next label."""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A projector, rows of which it gets 8 of 10 right, and groups of five rows each."""
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    save_projector(tmp_path / "projector", run="small", labels=",".join(EKMAN), loss="nt_xent")
    save_features(tmp_path / "test.parquet", GIVEN, [EKMAN[place] for place in TRUE])
    lines = [f"image-{number},theme-{number // 5}" for number in range(60)]
    (tmp_path / "groups.csv").write_text("\n".join(["id,theme", *lines]) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "small.toml"
    path.write_text(text)
    return path


RECIPE = """
models = ["projector"]
num_resamples = 200
[data.plain]
dataset = "test.parquet"
[data.mapped]
dataset = "test.parquet"
taxonomy = "mikels"
groups = "groups.csv"
cluster_by = "theme"
"""


def test_a_recipe_measures_what_is_known(project: Path) -> None:
    outcome = run(write_recipe(project, RECIPE), "--output", "out", "--json")
    assert outcome.exit_code == 0, outcome.output
    (document,) = json.loads(outcome.stdout)
    assert document == json.loads((project / "out" / "evaluation.json").read_text())
    assert (document["kind"], document["name"]) == ("evaluation", "small")
    assert document["model"]["is_random_weights"]
    plain, mapped = document["data"]
    assert plain["metrics"]["top1_accuracy"]["value"] == pytest.approx(0.8)
    assert plain["metrics"]["top1_accuracy"]["low"] < 0.8 < plain["metrics"]["top1_accuracy"]["high"]
    assert plain["confusion"] == [
        [8 * (row == column) + 2 * (column == (row + 1) % 6) for column in range(6)] for row in range(6)
    ]
    assert (plain["num_images"], plain["num_clusters"], plain["cluster_by"]) == (60, 60, None)
    assert not plain["leakage"]["is_checked"]
    # Of Ekman's labels joy stands for three of Mikels' and has no image; surprise becomes awe.
    assert (mapped["num_images"], mapped["num_left_out"], mapped["num_clusters"]) == (50, 10, 10)
    assert {row["label"]: row["count"] for row in mapped["per_class"] if row["count"]} == dict.fromkeys(
        ("anger", "awe", "disgust", "fear", "sadness"), 10
    )
    assert mapped["is_zero_shot"]
    assert set(mapped["unseen_labels"]) == {"amusement", "awe", "contentment", "excitement"}
    table, labels, scores = read_scores(mapped["scores"])
    assert labels == tuple(mapped["labels"])
    assert table.column_names == ["id", "label", "predicted", "scores", "theme"]
    assert [labels[place] for place in scores.argmax(axis=1)] == table["predicted"].to_pylist()


def test_tables_say_what_is_not_real_and_not_checked(project: Path) -> None:
    text = RECIPE + '[[published]]\nsystem = "EmoVIT"\ndata = "plain"\nvalue = 0.5781\nsource = "a paper"\n'
    outcome = run(write_recipe(project, text))
    assert outcome.exit_code == 0, outcome.output
    assert "CAUTION: random weights" in outcome.stdout
    assert "leakage not checked" in outcome.stdout
    assert "80.0 (" in outcome.stdout
    measured, published = outcome.stdout.split("published figures, not measured here")
    assert "57.81" in published
    assert "57.81" not in measured


def test_leakage_marks_every_figure(project: Path, tmp_path: Path) -> None:
    save_features(project / "seen.parquet", [0, 1], ["anger", "disgust"])
    recipe = write_recipe(project, RECIPE + '[[train]]\ndataset = "seen.parquet"\n')
    outcome = run(recipe, "--json")
    (document,) = json.loads(outcome.stdout)
    for data in document["data"]:
        assert data["leakage"]["has_leakage"]
        # The rows are one-hot: all of the two labels, and those taken for them, have the very same features.
        assert data["leakage"]["counts"]["same_features"] == 20
    assert run(recipe).stdout.count("LEAKAGE: 20 images seen in training") >= 4
    draw(document, tmp_path / "plots")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        f"{name}-{plot}.png" for name in ("plain", "mapped") for plot in ("confusion", "reliability")
    }


def test_two_models_are_compared_image_by_image(project: Path) -> None:
    """The baseline's features are shifted: it is right only where the model is wrong."""
    other = save_projector(project / "other", run="other", labels=",".join(EKMAN))
    outcome = run(write_recipe(project, RECIPE), "--set", f'baseline="{other}"', "--json")
    (document,) = json.loads(outcome.stdout)
    assert [(row["data"], row["difference"], row["p_mcnemar"]) for row in document["comparisons"]] == [
        ("plain", 0.0, 1.0),
        ("mapped", 0.0, 1.0),
    ]
    assert document["comparisons"][0]["smallest_detectable"] is None


def test_labels_left_out_of_training_are_told_apart_among_themselves(project: Path) -> None:
    save_projector(project / "projector", labels=",".join(EKMAN), leave_out="joy,fear")
    recipe = write_recipe(
        project, 'models = ["projector"]\n[data.unseen]\ndataset = "test.parquet"\nonly_left_out = true\n'
    )
    (document,) = json.loads(run(recipe, "--json").stdout)
    (data,) = document["data"]
    assert (data["labels"], data["num_images"], data["num_left_out"]) == (["joy", "fear"], 20, 40)
    assert set(data["unseen_labels"]) == {"joy", "fear"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('models = ["projector"]\n[data]\n', "data: names no data"),
        ('models = ["nowhere/at/all"]\n[data.a]\ndataset = "test.parquet"\n', "nowhere/at/all holds no projector"),
        ('[data.a]\ndataset = "test.parquet"\n', "models: names none"),
        (
            'models = ["projector"]\n[data.a]\ndataset = "test.parquet"\nwords = ["x", "y"]\n',
            "data.a: no label of ekman stands for one of x, y",
        ),
    ],
)
def test_bad_input_is_one_error(project: Path, text: str, said: str) -> None:
    outcome = run(write_recipe(project, text))
    assert isinstance(outcome.exception, TinyEmoError)
    assert said in str(outcome.exception)


def test_all_errors_of_a_recipe_come_at_once(project: Path) -> None:
    text = 'nam = 1\nlevel = 2\n[data.a]\ndataset = "x"\nsplitt = "y"\ncluster_by = "theme"\n'
    with pytest.raises(ConfigError) as caught:
        load_evaluation(str(write_recipe(project, text)))
    for part in ("nam: unknown key", "level:", "data.a.splitt: unknown key"):
        assert part in str(caught.value)


def test_options_of_both_forms_do_not_mix(project: Path) -> None:
    outcome = run(write_recipe(project, RECIPE), "--features", "test.parquet")
    assert isinstance(outcome.exception, ConfigError)
    assert isinstance(run("--projector", "projector").exception, ConfigError)


def test_results_of_a_run_in_s3_lie_below_its_folder(project: Path, s3_root: str, tasks_in_process: None) -> None:
    """Data sets in S3, train data from the model's card: the train split is where the leak is."""
    names = [EKMAN[place] for place in TRUE]
    table = pq.read_table(save_features(project / "rows.parquet", GIVEN, names))
    (project / "rows").mkdir()
    ids = pa.array([f"test/{number}" for number in range(60)])
    pq.write_table(table.set_column(0, "id", ids), project / "rows" / "test.parquet")
    seen = save_features(project / "seen.parquet", [0, 7], ["anger", "disgust"])
    pq.write_table(pq.read_table(seen), project / "rows" / "train.parquet")
    # The ingest itself would not keep a vector in two splits, so train data is a data set of its own.
    (project / "train").mkdir()
    (project / "rows" / "train.parquet").rename(project / "train" / "train.parquet")
    test = ingest(project / "rows", s3_root, name="rows").manifest
    train = ingest(project / "train", s3_root, name="seen").manifest
    card: dict[str, Any] = {"run": "small", "labels": ",".join(EKMAN), "data_uri": train.uri}
    save_projector(project / "exported", **card)
    storage.upload_folder(project / "exported", f"{s3_root}/runs/small/projector")
    recipe = write_recipe(
        project, f'models = ["{s3_root}/runs/small/projector"]\n[data.rows]\ndataset = "{test.uri}"\n'
    )
    outcome = run(recipe, "--json")
    assert outcome.exit_code == 0, outcome.output
    (document,) = json.loads(outcome.stdout)
    folder = f"{s3_root}/runs/small/evaluations/small"
    assert storage.read_json(f"{folder}/evaluation.json") == document
    (data,) = document["data"]
    assert data["scores"] == f"{folder}/rows.parquet"
    assert (data["digest"], data["split"]) == (test.digest, "test")
    assert data["leakage"]["is_checked"]
    assert data["leakage"]["counts"]["same_features"] == 10
    assert read_scores(data["scores"])[0].num_rows == 60


@pytest.mark.slow
def test_a_recipe_runs_on_the_cluster_and_leaves_an_mlflow_run(jobs: Jobs, tmp_path: Path) -> None:
    save_features(tmp_path / "rows" / "test.parquet", GIVEN, [EKMAN[place] for place in TRUE])
    outcome = jobs.run("ingest", "features", tmp_path / "rows", "--name", "evaluated", "--json")
    digest = outcome.document["digest"]
    save_projector(tmp_path / "exported", run="evaluated-run", labels=",".join(EKMAN))
    with jobs.connected():
        storage.upload_folder(tmp_path / "exported", f"{RUNS}/evaluated-run/projector")
    recipe = tmp_path / "tiny.toml"
    recipe.write_text('models = ["evaluated-run"]\n[data.rows]\ndataset = "s3://tinyemo/datasets/evaluated"\n')
    (document,) = jobs.run("evaluate", recipe, "--json").document
    assert document["data"][0]["metrics"]["top1_accuracy"]["value"] == pytest.approx(0.8)
    (found,) = jobs.mlflow_runs("evaluated-run-tiny")
    assert found.data.metrics["rows/top1_accuracy"] == pytest.approx(0.8)
    assert found.data.tags["caution"] == "random weights"
    assert "not checked" in found.data.tags["leakage"]
    (entry,) = found.inputs.dataset_inputs
    assert digest.startswith(entry.dataset.digest)
