"""Measure what the bias report finds of planted bias, how often it errs on unbiased data, its power, and its time for
a million rows.

Run: python benchmarks/bias.py                        all parts; about 20 minutes on two cores
     python benchmarks/bias.py rates --seeds 20 --first-seed 100 --effects shift=0.1,0.2 cluster=0.3

Parts: rates, false, power, time. Figures go to benchmarks/results/bias.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from benchmarks.machine import write_results
from benchmarks.planted_bias import DEFAULT_EFFECTS, Kind, plant, report
from tinyemo.measures.gaps import power_of_test

ALPHA = 0.05
EFFECTS: dict[str, tuple[float, ...]] = {
    "shift": (0.1, 0.25, 0.5), "word": (0.3, 0.5, 0.7), "cluster": (0.3, 0.5, 0.7), "brightness": (0.2, 0.4, 0.6),
}  # fmt: skip
POWER_EFFECTS = (0.03, 0.045, 0.06, 0.08)


def judge(kind: Kind, effect: float, images_per_author: int, num_images: int, seed: int) -> dict[str, Any]:
    """Plant one bias and return what became of it."""
    planted = plant(kind, seed=seed, effect=effect, num_images=num_images, images_per_author=images_per_author)
    outcome = report(planted, alpha=ALPHA, seed=seed)
    recall = next(one for one in outcome.findings if one.group.startswith("country=") and one.metric == "recall")
    return {
        "is_found": outcome.is_found,
        "misplaced": [f"{one.part} {one.id} q {one.q:.2g}" for one in outcome.misplaced],
        "num_blamed": sum(one.is_blamed for one in outcome.findings),
        "parts_blamed": sorted({one.family for one in outcome.findings if one.is_blamed}),
        "num_explained": sum(bool(one.is_significant and one.explained_by) for one in outcome.findings),
        "gap": {"effect": recall.effect, "error": recall.error, "is_blamed": recall.is_blamed,
                "level": ALPHA / len({one.family for one in outcome.findings})
                / sum(one.part == "groups" for one in outcome.findings)},
    }  # fmt: skip


def many(
    kind: Kind, effect: float, seeds: Sequence[int], images_per_author: int = 1, num_images: int = 4000
) -> list[Any]:
    """Judge many seeds on all cores."""
    with get_context("fork").Pool(min(os.cpu_count() or 1, 2)) as pool:
        return pool.map(partial(judge, kind, effect, images_per_author, num_images), seeds, chunksize=1)


def measure_rates(seeds: Sequence[int], effects: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    """Return for each kind and effect how often the right part finds it and how often anything else is blamed."""
    rows = {}
    for kind, sizes in effects.items():
        for effect in sizes:
            found = many(kind, effect, seeds)  # type: ignore[arg-type]
            row = {
                "found": float(np.mean([one["is_found"] for one in found])),
                "reports_with_misplaced_blame": float(np.mean([bool(one["misplaced"]) for one in found])),
                "misplaced": [text for one in found for text in one["misplaced"]][:5],
                "share_of_blame_misplaced": float(
                    np.mean([len(one["misplaced"]) / max(one["num_blamed"], 1) for one in found])
                ),
                "explained_per_report": float(np.mean([one["num_explained"] for one in found])),
                "seeds": len(found),
            }
            rows[f"{kind}={effect}"] = row
            print(f"{kind} {effect}: {row}", flush=True)
    return rows


def measure_false(num_resamples: int, first_seed: int) -> dict[str, Any]:
    """Return how often a report on unbiased data blames anything."""
    rows = {}
    for authors in (1, 5):
        found = many("none", 0.0, range(first_seed, first_seed + num_resamples), images_per_author=authors)
        wrong = [one for one in found if one["num_blamed"]]
        rows[f"images_per_author={authors}"] = {
            "resamples": num_resamples,
            "stated_level": ALPHA,
            "reports_with_a_false_discovery": len(wrong) / num_resamples,
            "parts": {name: sum(name in one["parts_blamed"] for one in wrong) for name in
                      sorted({name for one in wrong for name in one["parts_blamed"]})},
        }  # fmt: skip
        print(f"unbiased, {authors} images an author: {rows[f'images_per_author={authors}']}", flush=True)
    return rows


def measure_power(seeds: Sequence[int], effects: Sequence[float]) -> dict[str, Any]:
    """Return the power that findings state for the planted gap in recall, and how often it was found."""
    rows = {}
    for effect in effects:
        gaps = [one["gap"] for one in many("shift", effect, seeds)]
        truth = float(np.mean([gap["effect"] for gap in gaps]))
        rows[f"shift={effect}"] = {
            "mean_gap": truth,
            "power_stated": float(np.mean([power_of_test(truth, gap["error"], gap["level"]) for gap in gaps])),
            "power_reached": float(np.mean([gap["is_blamed"] for gap in gaps])),
            "seeds": len(gaps),
        }
        print(f"power at {effect}: {rows[f'shift={effect}']}", flush=True)
    return rows


def measure_time(num_rows: int) -> dict[str, Any]:
    """Return time and memory of the whole report of a projector on rows of 768 numbers against 25 labels, two columns.

    The report runs in a process of its own, on two threads; making the file is not counted.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, str(Path(__file__).with_name("bias_rows.py")), str(folder), str(num_rows)]
        subprocess.run([*command, "make"], check=True)
        started = time.perf_counter()
        done = subprocess.run([*command, "report"], check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.splitlines()[-1]) | {"wall_s": round(time.perf_counter() - started, 1)}
    print(f"{num_rows} rows: {row}", flush=True)
    return row


def main() -> None:
    """Run the chosen parts and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["rates", "false", "power", "time"])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--effects", nargs="*", help="KIND=SIZE,SIZE")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--no-write", action="store_true", help="only print")
    given = parser.parse_args()
    effects = EFFECTS
    if given.effects:
        pairs = [text.split("=") for text in given.effects]
        effects = {kind: tuple(float(size) for size in sizes.split(",")) for kind, sizes in pairs}
        assert set(effects) <= set(DEFAULT_EFFECTS)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    figures: dict[str, Any] = {}
    if "rates" in given.parts:
        figures["rates"] = measure_rates(seeds, effects)
    if "false" in given.parts:
        figures["false_discoveries"] = measure_false(given.resamples, given.first_seed)
    if "power" in given.parts:
        figures["power"] = measure_power(range(given.first_seed, given.first_seed + 5 * given.seeds), POWER_EFFECTS)
    if "time" in given.parts:
        figures["time"] = measure_time(given.rows)
    if not given.no_write:
        print(write_results("bias", figures))


if __name__ == "__main__":
    main()
