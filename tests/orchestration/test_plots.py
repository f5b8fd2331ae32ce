"""Figures: what is written can be read back, and what must be marked is marked."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from orchestration.plots import FamilyRow, SizeRow, plot_confusion, plot_curves, plot_family, plot_sizes

EKMAN = ("anger", "disgust", "fear", "joy", "sadness", "surprise")
FAMILY = [
    FamilyRow(name="smollm2-135m", top1_accuracy=0.742, num_samples=306, note=""),
    FamilyRow(name="tinyemo-700m", top1_accuracy=0.731, num_samples=306, note="random weights"),
    FamilyRow(name="tinyemo-880m", top1_accuracy=0.735, num_samples=306, note="random weights"),
    FamilyRow(name="tinyemo-1.5b", top1_accuracy=0.728, num_samples=306, note="random weights"),
    FamilyRow(name="tinyemo-3.2b", top1_accuracy=0.737, num_samples=306, note="random weights"),
]


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
    plot_family(FAMILY, tmp_path / "family.png", "Projector family on Emotion6 (random weights where marked)")
    plot_family(
        [FamilyRow(**(row | {"note": ""})) for row in FAMILY],
        tmp_path / "real.png",
        "Projector family on Emotion6 (random weights where marked)",
    )
    assert drawn(tmp_path / "family.png") == drawn(tmp_path / "real.png")
    assert abs(imread(tmp_path / "family.png") - imread(tmp_path / "real.png")).mean() > 0.01


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
            name=row["name"],
            note=row["note"],
            loss_against_tokens=[(1000.0 * step, 5 / step) for step in range(1, 4 + 40 * (position % 2))],
            figures={"speed": (200.0 / (position + 1), "tokens/s"), "memory": (2.0 * position, "GiB a rank, peak")},
        )
        for position, row in enumerate(FAMILY[:count])
    ]
    plot_sizes(rows, tmp_path / "sizes.png", "family, finetune: answers templates")
    assert drawn(tmp_path / "sizes.png") == (840, 2320), "a panel for the loss and one for each figure"
