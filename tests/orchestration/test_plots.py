"""Figures: what is written can be read back, and what must be marked is marked."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import torch
from matplotlib.image import imread

from orchestration.plots import SizeRow, plot_confusion, plot_curves, plot_search, plot_sizes

EKMAN = ("anger", "disgust", "fear", "joy", "sadness", "surprise")
NOTES = {
    "smollm2-135m": "", "tinyemo-700m": "random weights", "tinyemo-880m": "random weights",
    "tinyemo-1.5b": "random weights", "tinyemo-3.2b": "random weights",
}  # fmt: skip


def drawn(path: Path) -> tuple[int, int]:
    """Height and width in pixels of a PNG that is not blank."""
    pixels = imread(path)
    assert pixels[..., :3].std() > 0.01
    assert pixels[0, :, :3].min() == pixels[:, 0, :3].min() == 1.0, "something is cut off at the edge"
    return pixels.shape[:2]


@pytest.mark.parametrize("num_classes", [2, 6, 25])
def test_a_confusion_matrix_grows_with_its_classes(tmp_path, num_classes):
    words = [*EKMAN, *(f"long label {n}" for n in range(19))][:num_classes]
    confusion = [[(7 * i + 3 * j) % 11 + 40 * (i == j) for j in range(num_classes)] for i in range(num_classes)]
    confusion[-1] = [0] * num_classes  # a class without a sample
    plot_confusion(confusion, words, tmp_path / "new" / "confusion.png", "Emotion6 test, random weights")
    height, width = drawn(tmp_path / "new" / "confusion.png")
    assert min(height, width) >= max(900, 80 * num_classes)
    plot_confusion(torch.tensor(confusion), words, tmp_path / "tensor.png", "Emotion6 test, random weights")
    assert (imread(tmp_path / "tensor.png") == imread(tmp_path / "new" / "confusion.png")).all()


def test_curves_of_any_length_are_drawn(tmp_path):
    curves = {
        "train/loss": [(step, 4 * math.exp(-step / 60) + 0.2 * math.sin(step)) for step in range(220)],
        "val/loss": [(44 * epoch, 3 / epoch) for epoch in range(1, 6)],
        "val/top1_accuracy": [(44 * epoch, 0.6 + 0.03 * epoch) for epoch in range(1, 6)],
        "val/empty": [],
    }
    plot_curves(curves, tmp_path / "both.png", "smollm2-135m on Emotion6, generated data")
    plot_curves({"train/loss": [(1, 2.0)]}, tmp_path / "one.png", "one point")
    assert drawn(tmp_path / "both.png")[1] == 2 * drawn(tmp_path / "one.png")[1]


def test_a_curve_that_is_not_finite_is_still_drawn(tmp_path):
    plot_curves({"train/loss": [(1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0)]}, tmp_path / "nan.png", "diverged")
    plot_curves({"train/loss": [(1, 2.0), (4, 1.0)]}, tmp_path / "straight.png", "diverged")
    # The points that are not finite break the line: less ink than with a line through them.
    assert drawn(tmp_path / "nan.png") == drawn(tmp_path / "straight.png")
    assert (imread(tmp_path / "nan.png") != imread(tmp_path / "straight.png")).any()


def test_random_weights_look_different_from_real_ones(tmp_path):
    rows = [
        SizeRow(
            name=name, note=note, loss_against_tokens=[], figures={"test top-1": (74.0 - number, "% of 306 images")}
        )
        for number, (name, note) in enumerate(NOTES.items())
    ]
    title = "Projector family on Emotion6 (random weights where marked)"
    plot_sizes(rows, tmp_path / "family.png", title)
    plot_sizes([SizeRow(**(row | {"note": ""})) for row in rows], tmp_path / "real.png", title)
    assert drawn(tmp_path / "family.png") == drawn(tmp_path / "real.png")
    assert abs(imread(tmp_path / "family.png") - imread(tmp_path / "real.png")).mean() > 0.01


@pytest.mark.parametrize("num_objectives", [1, 2])
def test_a_search_shows_its_best_its_knobs_and_its_trials(tmp_path, num_objectives):
    study = optuna.create_study(directions=["maximize"] * num_objectives)
    space = {name: optuna.distributions.FloatDistribution(0, 1) for name in ("dropout", "rate")}

    def add(dropout: float, rate: float) -> None:
        params, values = {"dropout": dropout, "rate": rate}, [dropout] * num_objectives
        study.add_trial(optuna.create_trial(params=params, distributions=space, values=values))

    add(0.5, 0.5)
    plot_search(study, "val/top1_accuracy", tmp_path / "one", "one trial")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"best_so_far.png"}
    for number in range(8):
        add(number / 8, (5 * number % 8) / 8)
    plot_search(study, "val/top1_accuracy", tmp_path, "search-emotion6: 9 trials, generated data")
    for name in ("best_so_far", "importances", "parallel_coordinates"):
        assert min(drawn(tmp_path / f"{name}.png")) > 800


def test_plots_leave_pyplot_alone():
    """A worker without a display draws; nothing is imported before the first figure."""
    code = "import sys, orchestration.plots; assert 'matplotlib' not in sys.modules; from pathlib import Path;"
    code += "orchestration.plots.plot_curves({'a': [(1, 2.0)]}, Path(sys.argv[1]), 't');"
    code += "assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "/dev/null"], check=True, cwd=Path(__file__).parents[2], timeout=60)


@pytest.mark.parametrize("count", [1, 5])
def test_sizes_stand_side_by_side(tmp_path, count):
    rows = [
        SizeRow(
            name=name,
            note=note,
            loss_against_tokens=[(1000.0 * step, 5 / step) for step in range(1, 4 + 40 * (position % 2))],
            figures={"speed": (200.0 / (position + 1), "tokens/s"), "memory": (2.0 * position, "GiB a rank, peak")},
        )
        for position, (name, note) in enumerate(list(NOTES.items())[:count])
    ]
    plot_sizes(rows, tmp_path / "sizes.png", "family, finetune: answers templates")
    assert drawn(tmp_path / "sizes.png") == (840, 2320), "a panel for the loss and one for each figure"
