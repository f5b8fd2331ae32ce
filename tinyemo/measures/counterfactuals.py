"""Counterfactuals: how often the label flips when something changes that should not matter.

The change is a word of the label set or template that is exchanged for one with the same meaning, or the same scene
with another brightness, size, compression or colour.

Shape letters: N images.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import stats

from tinyemo.measures.discoveries import Finding
from tinyemo.measures.gaps import Bools, Ints, stratified_gap
from tinyemo.measures.groups import MIN_IMAGES, gap_finding
from tinyemo.measures.intervals import wilson_interval
from tinyemo.measures.scored import UNKNOWN, ScoredData

TOLERANCE = 0.05
"""Share of labels that may flip before a change is reported."""


def find_flips(data: ScoredData, change: str, changed: Ints) -> list[Finding]:
    """Return how often a change flips the label, and whether it flips more often in some groups.

    Args:
        data: N images.
        change: name of the change.
        changed: (N,) label that each image gets after it.
    """
    is_flipped = changed != data.predicted
    rate, num_flipped = float(is_flipped.mean()), int(is_flipped.sum())
    num_images, factor = len(data), 1.0
    if data.clusters is not None:
        sums = np.bincount(data.clusters, is_flipped - rate)
        alone = float(((is_flipped - rate) ** 2).sum())
        factor = max(1.0, float((sums**2).sum()) / alone) if alone else 1.0
    effective = max(num_images / factor, 1.0)
    low, high = wilson_interval(rate * effective, effective)
    p = float(stats.binom.sf(np.ceil(rate * effective) - 1, round(effective), TOLERANCE)) if num_flipped else 1.0
    to = np.bincount(changed[is_flipped], minlength=len(data.labels))
    title = f"{change} flips {100 * rate:.1f} % of {num_images} labels"
    whole = Finding(
        part="counterfactuals", title=title, data=data.name, group="", other="", metric=f"flips:{change}", effect=rate,
        low=float(low), high=float(high), p=p, num_images=num_images,
        details={"flips_to": {word: int(count) for word, count in zip(data.labels, to, strict=True) if count}},
    )  # fmt: skip
    return [whole, *_group_findings(data, change, is_flipped)]


def _group_findings(data: ScoredData, change: str, is_flipped: Bools) -> list[Finding]:
    findings = []
    for name, column in data.groups.items():
        known = column.codes != UNKNOWN
        part = data if known.all() else data.take(known)
        codes, flips = column.codes[known], is_flipped[known]
        places = range(len(column.names)) if len(column.names) != 2 else range(1)
        for place in places:
            inside = codes == place
            if min(inside.sum(), (~inside).sum()) < MIN_IMAGES:
                continue
            gaps = stratified_gap(flips, inside, part.label, len(part.labels), part.clusters)
            other = column.names[1 - place] if len(column.names) == 2 else "the rest"
            group = f"{name}={column.names[place]}"
            found = gap_finding(gaps, -1, "counterfactuals", data.name, group, other, f"flips:{change}")
            findings.append(replace(found, title=f"share of flips by {change}: {found.title}"))
    return findings
