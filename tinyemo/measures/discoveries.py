"""Findings of a bias report, and which of them stand when all tests of the report are counted.

Each family of tests gets an equal share of the report's alpha, and Holm's or Benjamini and Hochberg's procedure is
applied within it. The chances of a false finding add up over the families, and so do the false shares, so both stay
at or under alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tinyemo.measures.comparison import smallest_detectable
from tinyemo.measures.gaps import power_of_test

Part = Literal["groups", "words", "slices", "association", "counterfactuals", "spurious", "sets"]
GAP_OF_INTEREST = 0.1
"""Gap in recall, precision or calibration that a finding's power is stated for."""


@dataclass(frozen=True)
class Finding:
    """One tested statement of a bias report.

    Attributes:
        part: of the report that tested it.
        title: one sentence with the figures.
        data: name of the data set.
        group: what it is about, for instance "category=Animal"; empty where it is about all images.
        other: what the group is compared with, for instance "the rest".
        metric: for instance "recall:joy"; with part, data, group and other it names the finding in every report.
        effect, low, high: size, with its 95 % interval.
        p: of the test that nothing is there.
        error: standard error of the effect; NaN where there is none.
        num_images: images behind it.
        adjusted_effect: what is left of the effect once covariates are accounted for; None where that was not needed.
        adjusted_p: of the test that nothing is left.
        explained_by: covariates or groups that account for the effect; None if none do.
        q: p adjusted for all tests of the report; NaN before `decide`.
        power: chance of this test to find a gap of GAP_OF_INTEREST if it is the only one in its family; NaN if not
            stated.
        smallest_detectable: gap that it finds with a chance of 80 %, likewise.
        is_significant: whether q is at most the report's alpha.
        details: further figures.
    """

    part: Part
    title: str
    data: str
    group: str
    other: str
    metric: str
    effect: float
    low: float
    high: float
    p: float
    error: float = float("nan")
    num_images: int = 0
    adjusted_effect: float | None = None
    adjusted_p: float | None = None
    explained_by: str | None = None
    q: float = float("nan")
    power: float = float("nan")
    smallest_detectable: float | None = None
    is_significant: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Name that stays the same from report to report."""
        against = "" if self.other in ("", "the rest") else f" vs {self.other}"
        return "/".join(part for part in (self.part, self.data, f"{self.group}{against}", self.metric) if part)

    @property
    def family(self) -> str:
        """Name of the tests that are counted together: the part, and of an association its kind."""
        return f"{self.part}/{self.metric.partition(':')[0]}" if self.part == "association" else self.part

    @property
    def is_blamed(self) -> bool:
        """Whether the report blames the group itself: significant, and explained by nothing else."""
        return self.is_significant and self.explained_by is None

    def document(self) -> dict[str, Any]:
        """Return a JSON document; what is not a finite number is null."""
        fields = {"id": self.id} | {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in fields.items()
        }


def adjust_p(p: Sequence[float] | NDArray[Any], method: Literal["bh", "holm"] = "bh") -> NDArray[np.float64]:
    """Return p adjusted for the number of tests: Benjamini and Hochberg's false discovery rate, or Holm's family-wise
    one.

    Args:
        p: of M tests.
        method: "bh" or "holm".
    """
    p = np.asarray(p, np.float64)
    if method == "bh":
        return np.asarray(stats.false_discovery_control(p)) if len(p) else p
    # statsmodels' multipletests gives the same and collects garbage in every call, which takes a tenth of a second.
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def decide(
    findings: Sequence[Finding], *, alpha: float = 0.05, method: Literal["holm", "bh"] = "holm"
) -> list[Finding]:
    """Return the findings with q, power and is_significant, over all tests of the report.

    A finding is significant if the raw effect is and either something explains it or the adjusted effect is significant
    too. An effect that its covariates neither explain nor leave standing is reported as not significant.

    Args:
        findings: every test of the report, also those that found nothing.
        alpha: chance of any false finding in the report ("holm"), or its false discovery rate ("bh").
        method: holm blames nothing wrongly in at least 1 - alpha of the reports, also in those that find much; bh finds
            more and lets a share alpha of the findings be false.
    """
    families = sorted({finding.family for finding in findings})
    decided: dict[int, Finding] = {}
    for family in families:
        places = [place for place, finding in enumerate(findings) if finding.family == family]
        members = [findings[place] for place in places]
        raw = adjust_p([finding.p for finding in members], method) * len(families)
        left = adjust_p([max(one.p, one.adjusted_p or 0.0) for one in members], method) * len(families)
        level = alpha / len(families) / len(members)
        for place, one, q_raw, q_left in zip(places, members, raw, left, strict=True):
            explained_by = one.explained_by if q_left > alpha or _is_mostly_gone(one) else None
            q = float(min(q_raw if explained_by else q_left, 1.0))
            decided[place] = replace(
                one,
                q=q,
                power=power_of_test(GAP_OF_INTEREST, one.error, level),
                smallest_detectable=smallest_detectable(one.error, level),
                is_significant=q <= alpha,
                explained_by=explained_by,
            )
    return [decided[place] for place in range(len(findings))]


def _is_mostly_gone(finding: Finding) -> bool:
    return finding.adjusted_effect is not None and abs(finding.adjusted_effect) <= 0.2 * abs(finding.effect)
