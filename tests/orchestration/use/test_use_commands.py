"""`tinyemo evaluate` and `tinyemo predict` as a user runs them: a process of its own, exit codes, stdout and stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_projectors import EKMAN, save_features, save_projector
from typer.testing import CliRunner

from orchestration.cli import app
from orchestration.services import storage
from tinyemo.config import ProjectorConfig
from tinyemo.efficientnet import EfficientNetLite0
from tinyemo.embedding_tables import random_table
from tinyemo.encoder_folders import describe_encoder
from tinyemo.encoders import EFFICIENTNET_FILE, card_entries
from tinyemo.errors import TinyEmoError
from tinyemo.families import find_size
from tinyemo.images import read_pixels
from tinyemo.label_embeddings import embed_labels, known_words
from tinyemo.projector import MetricProjector
from tinyemo.vision import load_encoder

REPOSITORY = Path(__file__).resolve().parents[3]
# Runs the command line, then says which of the modules that it must do without were imported.
PROGRAM = """
import sys
from orchestration.cli import main
code = 0
try:
    main()
except SystemExit as end:
    code = end.code or 0
heavy = sorted({"ray", "deepspeed", "mlflow", "boto3", "transformers"} & set(sys.modules))
print("imported:", *heavy, file=sys.stderr)
sys.exit(code)
"""
TIMEOUT_S = 120.0  # a hang, not a timing


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    errors: list[str]
    """Lines of stderr but the last, which is `imported`."""
    imported: list[str]

    @property
    def document(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.stdout)
        return loaded


def tinyemo(*arguments: object) -> Outcome:
    """Run the command line with no service in reach."""
    services = ("AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in services}
    return run(arguments, environment | {"TINYEMO_STATE": "/nonexistent"})


def run(arguments: tuple[object, ...], environment: dict[str, str]) -> Outcome:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=REPOSITORY, env=environment | {"COLUMNS": "120"},
        timeout=TIMEOUT_S,
    )  # fmt: skip
    *errors, imported = result.stderr.strip().splitlines()
    assert imported.startswith("imported:"), result.stderr
    return Outcome(result.returncode, result.stdout, errors, imported.split()[1:])


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a projector, labelled features and features without labels."""
    folder = tmp_path_factory.mktemp("use")
    save_projector(folder / "projector")
    save_features(folder / "test.parquet", [0, 3, 3, 4], ["anger", "joy", "sadness", "sadness"])
    save_features(folder / "new.parquet", [3, 4, 0], None)
    return folder


def test_evaluate_prints_every_figure_without_ray(here: Path):
    outcome = tinyemo("evaluate", "--projector", here / "projector", "--features", here / "test.parquet", "--json")
    assert (outcome.code, outcome.errors) == (0, [])
    document = outcome.document
    assert document["top1_accuracy"] == 0.75
    assert document["num_samples"] == 4
    assert document["words"] == list(EKMAN)
    assert document["per_class_recall"]["sadness"] == 0.5
    assert document["per_class_recall"]["fear"] is None
    assert document["confusion"][EKMAN.index("sadness")] == [0, 0, 0, 1, 1, 0]
    assert (document["llm_weights"], document["card"]["taxonomy"]) == ("random", "ekman")
    assert outcome.imported == []


def test_the_table_says_how_many_samples_and_what_is_not_real(here: Path, tmp_path: Path):
    outcome = tinyemo("evaluate", "--projector", here / "projector", "--features", here / "test.parquet")
    assert outcome.code == 0
    assert "75.00 % of 4 samples" in outcome.stdout
    assert "RANDOM LABEL EMBEDDINGS" in outcome.stdout
    assert "GENERATED DATA" not in outcome.stdout
    assert "joy (1)" in outcome.stdout
    made_up = save_projector(tmp_path / "projector", data="generated")
    assert "GENERATED DATA" in tinyemo("evaluate", "--projector", made_up, "--features", here / "test.parquet").stdout


def test_predict_orders_scores_and_rows(here: Path):
    arguments = ("predict", "--projector", here / "projector", "--features", here / "new.parquet", "--json")
    rows = tinyemo(*arguments).document["rows"]
    assert [(row["id"], row["label"]) for row in rows] == [
        ("image-0", "joy"), ("image-1", "sadness"), ("image-2", "anger"),
    ]  # fmt: skip
    for row in rows:
        assert list(row["scores"].values()) == sorted(row["scores"].values(), reverse=True)
        assert set(row["scores"]) == set(EKMAN)
    ordered = tinyemo(*arguments, "--order-by-score").document["rows"]
    best = [row["scores"][row["label"]] for row in ordered]
    assert best == sorted(best, reverse=True)
    assert sorted(row["id"] for row in ordered) == sorted(row["id"] for row in rows)


def test_predict_takes_another_taxonomy_and_words_never_seen(here: Path):
    """Boredom has no stored embedding: it is made from the table that the others came from."""
    arguments = ("predict", "--projector", here / "projector", "--features", here / "new.parquet", "--json")
    mikels = tinyemo(*arguments, "--taxonomy", "mikels")
    assert len(mikels.document["words"]) == 8
    words = tinyemo(*arguments, "--words", "joy, Boredom,cheerfullness")
    assert words.code == 0, words.errors
    assert words.document["words"] == ["joy", "boredom", "cheerfulness"]
    assert words.document["rows"][0]["label"] == "joy"
    assert "ray" not in words.imported


def test_predict_writes_every_row(here: Path, tmp_path: Path):
    arguments = ("predict", "--projector", here / "projector", "--features", here / "new.parquet")
    shown = tinyemo(*arguments, "--output", tmp_path / "p.parquet")
    assert "3 of 3 rows" in shown.stdout
    tinyemo(*arguments, "--output", tmp_path / "p.jsonl")
    table = pq.read_table(tmp_path / "p.parquet")
    assert table["label"].to_pylist() == ["joy", "sadness", "anger"]
    assert json.loads(table.schema.metadata[b"tinyemo"])["llm_weights"] == "random"
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert lines == table.to_pylist()
    assert lines[0]["words"][0] == "joy"


def test_a_projector_in_s3_is_used_like_a_local_one(here: Path, s3_root: str):
    storage.upload_folder(here / "projector", f"{s3_root}/projector")
    arguments = ("evaluate", "--projector", f"{s3_root}/projector", "--features", here / "test.parquet", "--json")
    environment = os.environ | {"TINYEMO_STATE": "/nonexistent"}
    outcome = run(arguments, environment)
    assert (outcome.code, outcome.errors) == (0, [])
    assert outcome.document["top1_accuracy"] == 0.75
    assert not {"ray", "deepspeed", "mlflow"} & set(outcome.imported)
    gone = run(("evaluate", "--projector", f"{s3_root}/none", *arguments[3:]), environment)
    assert gone.code == 2
    assert len(gone.errors) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--features": "none.parquet"}, "none.parquet is not a file"),
        ({"--features": "projector/config.json"}, "cannot be read as Parquet"),
        ({"--features": "new.parquet"}, "no column 'emotion' or 'label'"),
        ({"--features": "wide.parquet"}, "features are 768 wide and the projector takes 512"),
        ({"--projector": "none"}, "holds no projector"),
        ({"--taxonomy": "plutchik"}, "unknown taxonomy 'plutchik'"),
        ({"--taxonomy": "mikels"}, "1 of 4 rows have labels that are not among the words (joy)"),
        ({"--taxonomy": "ekman", "--words": "joy"}, "exclude each other"),
        ({"--words": " , "}, "--words must name at least one word"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(here: Path, options: dict[str, str], message: str):
    save_features(here / "wide.parquet", [0], ["joy"], width=768)
    paths = {"--projector": "projector", "--features": "test.parquet"} | options
    arguments = [
        str(part)
        for name, value in paths.items()
        for part in (name, here / value if name in ("--projector", "--features") else value)
    ]
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    assert isinstance(result.exception, TinyEmoError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert result.output == ""


def test_an_error_is_one_line_on_stderr_and_exit_code_2(here: Path):
    features = ("--features", here / "test.parquet")
    for location, message in (("none", "holds no projector"), ("models:/tinyemo@champion", "MLFLOW_TRACKING_URI")):
        outcome = tinyemo("evaluate", "--projector", location, *features, "--json")
        assert outcome.code == 2
        assert len(outcome.errors) == 1
        assert outcome.errors[0].startswith("error: ")
        assert message in outcome.errors[0]
        assert outcome.stdout == ""


def test_predict_refuses_an_unknown_kind_of_file(here: Path, tmp_path: Path):
    paths = ["--projector", str(here / "projector"), "--features", str(here / "new.parquet")]
    result = CliRunner().invoke(app, ["predict", *paths, "--output", str(tmp_path / "p.csv")])
    assert isinstance(result.exception, TinyEmoError)
    assert str(result.exception) == "--output must end in .parquet or .jsonl, got 'p.csv'"


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_help_has_an_example(command: str):
    outcome = tinyemo(command, "--help")
    assert outcome.code == 0
    assert f"Example: tinyemo {command} " in " ".join(outcome.stdout.split())
    assert outcome.imported == []


# Pictures in, labels out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a projector of EfficientNet-Lite0's features, its encoder, and photos of which two are broken."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "encoder").mkdir()
    torch.manual_seed(0)
    torch.save(EfficientNetLite0().state_dict(), folder / "encoder" / EFFICIENTNET_FILE)
    info = describe_encoder(folder / "encoder", name="my-lite0").info
    labels = embed_labels(random_table(576, 0, name=find_size("smollm2-135m").llm), known_words(), "word")
    model = MetricProjector(ProjectorConfig(encoder_width=1280, hidden_size=576)).eval()
    card = {"llm": "smollm2-135m", "llm_weights": "random", "llm_seed": 0, "taxonomy": "ekman", **card_entries(info)}
    model.save_pretrained(folder / "projector", labels=labels, card=card)
    (folder / "photos").mkdir()
    for number in range(3):
        generator = np.random.default_rng(number)
        pixels = generator.integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.jpg")
    (folder / "photos" / "empty.png").write_bytes(b"")
    (folder / "photos" / "torn.jpg").write_bytes((folder / "photos" / "0.jpg").read_bytes()[:300])
    return folder


def test_predict_takes_photos_and_names_the_broken_ones(pictures: Path, tmp_path: Path):
    encoder = ("--encoder", pictures / "encoder")
    arguments = ("predict", "--projector", pictures / "projector", "--images", pictures / "photos", *encoder)
    outcome = tinyemo(*arguments, "--output", tmp_path / "rows.parquet", "--json")
    assert outcome.code == 0, outcome.errors
    assert outcome.imported == []
    document = outcome.document
    assert (document["images"], document["unreadable"], document["resumed"]) == (5, 2, 0)
    rows = {Path(row["image"]).name: row for row in document["rows"]}
    assert list(rows) == ["0.jpg", "1.jpg", "2.jpg", "empty.png", "torn.jpg"]
    assert "0 bytes are no image" in rows["empty.png"]["problem"]
    assert outcome.errors[-1] == "5 images = 3 predicted + 2 unreadable"
    assert [line.split(":")[0] for line in outcome.errors if line.startswith("skipped")] == [
        f"skipped {pictures / 'photos' / name}" for name in ("empty.png", "torn.jpg")
    ]
    # The label is the one that features of the same photo get.
    spec = describe_encoder(pictures / "encoder", name="my-lite0")
    pixels = read_pixels((pictures / "photos" / "1.jpg").read_bytes(), spec.preprocessing)
    pooled = load_encoder(pictures / "encoder", spec).encode(torch.from_numpy(pixels.copy())[None]).pooled
    cosines = MetricProjector.from_pretrained(pictures / "projector").classify(pooled, EKMAN)[0].tolist()
    assert rows["1.jpg"]["scores"] == pytest.approx(dict(zip(EKMAN, cosines, strict=True)), abs=1e-5)
    assert pq.read_table(tmp_path / "rows.parquet").num_rows == 5
    again = tinyemo(*arguments, "--output", tmp_path / "rows.parquet", "--json")
    assert again.document["resumed"] == 3
    assert again.document["rows"] == document["rows"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["photos/empty.png"], "none of 1 images can be used"),
        (["photos/none.jpg"], "the file cannot be read"),
        ([], "--images or --features, one of them"),
        (["photos/0.jpg", "--split", "test"], "--split goes with --features"),
        (["photos/0.jpg", "--encoder", "efficientnet-lite0"], "was not trained on features of"),
        (["photos/0.jpg", "--encoder", ""], "say where they are with --encoder FOLDER"),
    ],
)
def test_photos_that_cannot_be_labelled_are_one_line(pictures: Path, options: list[str], message: str):
    arguments = [str(pictures / option) if "/" in option else option for option in options]
    if "--encoder" not in options:
        arguments += ["--encoder", str(pictures / "encoder")]
    arguments = [a for a in arguments if a] if "" not in arguments else arguments[:-2]
    result = CliRunner().invoke(app, ["predict", "--projector", str(pictures / "projector"), *arguments])
    assert isinstance(result.exception, TinyEmoError), result.output
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
