"""Which findings stand once all tests of a report are counted."""

from __future__ import annotations

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from tinyemo.measures.discoveries import Finding, adjust_p, decide


def finding(part="groups", p=1.0, **more) -> Finding:
    fields = {"title": "t", "data": "d", "group": "g", "other": "the rest", "metric": "recall"} | more
    return Finding(part=part, effect=0.2, low=0.1, high=0.3, p=p, **fields)


@pytest.mark.parametrize("method", ["bh", "holm"])
def test_adjusted_p_is_that_of_statsmodels(method) -> None:
    for seed in range(5):
        p = np.random.default_rng(seed).random(40) ** 3
        reference = multipletests(p, method={"bh": "fdr_bh", "holm": "holm"}[method])[1]
        assert adjust_p(p, method) == pytest.approx(reference, abs=1e-12)
    assert len(adjust_p([], method)) == 0


def test_families_share_alpha() -> None:
    alone = decide([finding(p=0.03)])
    assert alone[0].is_significant
    both = decide([finding(p=0.03), finding("spurious", p=0.5)])
    assert both[0].q == pytest.approx(0.06)
    assert not both[0].is_significant


def test_what_covariates_explain_is_significant_but_nobody_is_blamed() -> None:
    [gap] = decide([finding(p=1e-6, adjusted_effect=0.01, adjusted_p=0.6, explained_by="brightness")])
    assert gap.is_significant
    assert gap.explained_by == "brightness"
    assert not gap.is_blamed


def test_what_covariates_leave_standing_is_blamed() -> None:
    [gap] = decide([finding(p=1e-6, adjusted_effect=0.19, adjusted_p=1e-5)])
    assert gap.is_blamed
    assert gap.q == pytest.approx(1e-5)


def test_a_gap_that_is_neither_explained_nor_left_standing_is_not_significant() -> None:
    [gap] = decide([finding(p=1e-6, adjusted_effect=0.15, adjusted_p=0.2)])
    assert not gap.is_significant


def test_ids_tell_findings_apart_and_stay() -> None:
    names = {finding().id, finding(other="men").id, finding(metric="recall:joy").id, finding(part="sets").id}
    assert len(names) == 4
    assert finding(p=0.1).id == finding(p=0.9).id == "groups/d/g/recall"


def test_the_document_is_json() -> None:
    document = finding().document()
    assert document["q"] is None
    assert document["effect"] == 0.2
