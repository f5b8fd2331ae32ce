"""The review of findings: decisions are kept, bad ones refused, and changes named."""

from __future__ import annotations

import tomllib

import pytest

from orchestration.bias.bias_review import changes, merge_review, parse_review, review_text
from tinyemo.errors import DataError


def finding(name: str, effect: float = 0.2, **more):
    row = {"id": name, "title": f'a "gap" of {name}', "effect": effect, "is_significant": True, "explained_by": None}
    return row | more


def test_a_review_is_read_as_it_was_written() -> None:
    rows = merge_review([finding("groups/d/g/recall")], {})
    assert parse_review(review_text(rows), "review.toml")["groups/d/g/recall"] == rows[0]


def test_only_what_is_blamed_is_put_up_for_review() -> None:
    rows = merge_review([finding("a"), finding("b", explained_by="brightness"), finding("c", is_significant=False)], {})
    assert [row["id"] for row in rows] == ["a"]


def test_decisions_are_kept_also_of_findings_that_are_gone() -> None:
    before = {row["id"]: row for row in merge_review([finding("a"), finding("b"), finding("c")], {})}
    before["a"] |= {"decision": "confirmed", "note": "real"}
    before["b"] |= {"decision": "dismissed", "note": "labels are wrong"}
    rows = {row["id"]: row for row in merge_review([finding("a", effect=0.3)], before)}
    assert (rows["a"]["decision"], rows["a"]["note"], rows["a"]["effect_before"]) == ("confirmed", "real", 0.2)
    assert rows["b"]["is_gone"] is True
    assert "c" not in rows


def test_a_decision_that_is_none_is_refused_by_name() -> None:
    text = review_text(merge_review([finding("a")], {})).replace('"open"', '"maybe"')
    with pytest.raises(DataError, match=r"decision must be one of open, confirmed, .*; got a: 'maybe'"):
        parse_review(text, "review.toml")
    with pytest.raises(DataError, match="cannot be read as a review"):
        parse_review("[[finding]\n", "review.toml")


def test_the_text_is_toml_a_person_can_edit() -> None:
    text = review_text(merge_review([finding("a")], {}))
    assert text.startswith("# Findings of a bias report")
    assert tomllib.loads(text)["finding"][0]["title"] == 'a "gap" of a'


def test_what_came_went_and_turned_is_named() -> None:
    lines = changes([finding("a", -0.2), finding("b")], [finding("a", 0.1), finding("c")])
    assert [line.partition(":")[0] for line in lines] == ["new", "gone", "turned"]
