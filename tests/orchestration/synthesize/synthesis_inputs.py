"""A folder of small photographs with a table of labels and captions, and a recipe over them.

`python synthesis_inputs.py RECIPE.toml` runs the recipe without an ingest and prints its result; tests kill it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

LABELS = ("awe", "amusement", "fear", "sadness")
SUBJECTS = ("a dog", "a river", "an old car", "two children", "a market", "a storm")


def write_photographs(folder: Path, count: int) -> None:
    """Photographs of noise, and table.csv: image, label, subject, split."""
    rows = ["image,label,subject,split"]
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 48)).save(folder / f"p{number:03d}.jpg")
        split = "test" if number % 5 == 0 else "train"
        rows.append(f"p{number:03d}.jpg,{LABELS[number % 4]},{SUBJECTS[number % 6]},{split}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")


def write_recipe(folder: Path, root: str, url: str, *extra: str) -> Path:
    """A recipe with four tasks and two teachers, of which one sees the photographs."""
    path = folder / "made.toml"
    path.write_text(f"""
name = "made"
root = "{root}"
num_offered = [3, 4]
[images]
source = "{folder}"
tables = ["{folder}/table.csv"]
may_be_shown = true
[tasks.caption]
context = ["label", "subject"]
[tasks.vqa]
context = ["answer.caption"]
near_duplicate = 0
[tasks.sqa]
context = ["label"]
share = 0.6
near_duplicate = 0
[tasks.reasoning]
context = ["subject"]
[teachers.abundant]
base_url = "{url}"
model = "teacher"
share = 3
price_prompt = 1.0
price_completion = 2.0
[teachers.better]
base_url = "{url}"
model = "teacher"
sees_image = true
{chr(10).join(extra)}
""")
    return path


def main() -> None:
    from orchestration.synthesize.synthesis import synthesize
    from orchestration.synthesize.synthesis_recipe import load_synthesis

    print(json.dumps(asdict(synthesize(load_synthesis(sys.argv[1]), has_dataset=False))))


if __name__ == "__main__":
    main()
