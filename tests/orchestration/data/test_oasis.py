"""OASIS as instruct data: the rule is the documented one, no theme is in two splits, and every record keeps the form
that the ingest and the published work know."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from feature_files import MIRROR
from hypothesis import given, settings
from hypothesis import strategies as st
from job_runner import Jobs
from pydantic import ValidationError

from orchestration.data.ingest_rules import IngestRules
from orchestration.data.manifest import load_manifest
from orchestration.data.oasis import (
    CAPTION_ANSWERS,
    EMOTION_ANSWERS,
    QUADRANTS,
    REASONING_REQUESTS,
    SENTIMENT_ANSWERS,
    OasisRules,
    Photograph,
    build_records,
    describe_rules,
    offered_labels,
    quadrant_of,
    read_photographs,
    sentiment_of,
    split_of,
)
from orchestration.data.record_checks import check_record
from tinyemo.errors import DataError
from tinyemo.taxonomies import TAXONOMIES

needs_mirror = pytest.mark.skipif(not (MIRROR / "oasis").is_dir(), reason=f"no photographs at {MIRROR}")
RULES = OasisRules()
RATINGS = st.floats(1, 7)


def photograph(valence: float, arousal: float, number: int = 0) -> Photograph:
    return Photograph(f"dog_{number}.jpg", "Dog", "Animal", valence, arousal)


def made_up_photographs(count: int) -> list[Photograph]:
    """All over the plane, many themes."""
    categories = ("Person", "Animal", "Object", "Scenery")
    return [
        Photograph(f"t{i}.jpg", f"theme {i % 40}", categories[i % 4], 1 + i * 37 % 60 / 10, 1 + i * 53 % 60 / 10)
        for i in range(count)
    ]


# The rule


@pytest.mark.parametrize(
    ("valence", "arousal", "sentiment", "emotion"),
    [
        (6.0, 5.0, "positive", "excitement"),
        (6.0, 2.0, "positive", "contentment"),
        (2.0, 5.0, "negative", "fear"),
        (2.0, 2.0, "negative", "sadness"),
        (4.0, 5.0, "neutral", None),
        (6.0, 3.7, "positive", None),
        (3.5, 5.0, "neutral", None),
        (4.5, 5.0, "neutral", None),
        (6.0, 3.6, "positive", None),
        (6.0, 3.8, "positive", None),
        (3.49, 3.59, "negative", "sadness"),
        (4.51, 3.81, "positive", "excitement"),
    ],
)
def test_emotions_are_the_documented_regions(
    valence: float, arousal: float, sentiment: str, emotion: str | None
) -> None:
    found = photograph(valence, arousal)
    quadrant = quadrant_of(found, RULES)
    assert sentiment_of(found, RULES) == sentiment
    assert (QUADRANTS[quadrant][0] if quadrant else None) == emotion


def test_the_quadrants_hold_each_word_of_mikels_once() -> None:
    words = [word for found in QUADRANTS.values() for word in found]
    assert sorted(words) == sorted(TAXONOMIES["mikels"].words)


@given(valence=RATINGS, arousal=RATINGS, width=st.floats(0, 2))
@settings(deadline=None)
def test_a_wider_middle_only_takes_emotions_away(valence: float, arousal: float, width: float) -> None:
    wide = OasisRules(
        negative_below=max(1, RULES.negative_below - width), positive_above=min(7, RULES.positive_above + width),
        calm_below=max(1, RULES.calm_below - width), aroused_above=min(7, RULES.aroused_above + width),
    )  # fmt: skip
    found = quadrant_of(photograph(valence, arousal), wide)
    assert found in (None, quadrant_of(photograph(valence, arousal), RULES))


@pytest.mark.parametrize(
    "values",
    [
        {"negative_below": 5.0, "positive_above": 4.0},
        {"calm_below": 4.0, "aroused_above": 3.9},
        {"num_offered": (1, 3)},
        {"num_offered": (4, 3)},
        {"num_offered": (3, 7)},
        {"test_fraction": 0.6, "validation_fraction": 0.4},
        {"positive_above": 8.0},
        {"unknown": 1},
    ],
)
def test_rules_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        OasisRules(**values)


# Splits


@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_no_theme_is_in_two_splits(seed: int) -> None:
    photographs = {shot.image: shot for shot in made_up_photographs(200)}
    splits: dict[str, set[str]] = {}
    for record in build_records(photographs.values(), OasisRules(seed=seed)):
        splits.setdefault(photographs[record["image"]].theme, set()).add(record["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert set().union(*splits.values()) <= {"train", "validation", "test"}


def test_splits_have_about_the_fractions_that_were_asked_for() -> None:
    rules = OasisRules(validation_fraction=0.1, test_fraction=0.3)
    counts = Counter(split_of(f"theme {number}", rules) for number in range(10_000))
    assert counts["test"] == pytest.approx(3000, abs=200)
    assert counts["validation"] == pytest.approx(1000, abs=150)
    assert split_of("Dog", OasisRules(test_fraction=0, validation_fraction=0)) == "train"


# Records


def records_of(rules: OasisRules, count: int = 400) -> list[dict[str, Any]]:
    return list(build_records(made_up_photographs(count), rules))


def test_records_are_a_function_of_norms_and_rules() -> None:
    assert records_of(RULES) == records_of(OasisRules())
    assert records_of(RULES) != records_of(OasisRules(seed=1))
    shuffled = list(build_records(reversed(made_up_photographs(400)), RULES))
    assert sorted(shuffled, key=lambda r: r["id"]) == sorted(records_of(RULES), key=lambda r: r["id"])


def test_every_record_keeps_the_rules_of_the_ingest() -> None:
    """The ingest finds in the text what the record says of itself."""
    rules = IngestRules(taxonomy="mikels")
    for record in records_of(RULES):
        found = check_record({k: v for k, v in record.items() if k not in ("task", "label")}, rules)
        if record["task"] != "caption":  # a caption may be asked for in words that do not say so
            assert found.task == record["task"], record
        complete = check_record(record, rules)
        assert complete.label == record["label"]
        if record["task"] == "reasoning":
            assert found.label == found.label_stated == record["label"]
            assert record["label"] in found.labels_offered


def test_a_photograph_without_emotion_gets_none() -> None:
    records = list(build_records([photograph(4, 5), photograph(6, 3.7, number=1)], RULES))
    assert [(record["task"], record["label"]) for record in records] == [("caption", None), ("sqa", None)] * 2
    text = json.dumps(records)
    assert not re.search("|".join(TAXONOMIES["mikels"].words), text)
    assert "neutral" in records[1]["conversations"][1]["value"]
    assert "positive" in records[3]["conversations"][1]["value"]


def test_the_reasoning_form_is_the_published_one() -> None:
    reasoning = [record for record in records_of(RULES) if record["task"] == "reasoning"]
    assert reasoning
    for record in reasoning:
        human, gpt = (turn["value"] for turn in record["conversations"])
        token, request, labels, stated = human.split("\n")
        assert token == "<image>"
        assert request in REASONING_REQUESTS
        assert re.fullmatch(r"Labels: \[\w+(, \w+){2,4}\]", labels)
        assert stated == f"The correct label is {record['label']}."
        assert re.fullmatch(rf"Reasoning: [A-Z].+\.\nPredicted Label: {record['label']}", gpt)


@pytest.mark.parametrize(("state_label", "splits"), [("never", set()), ("train", {"train"})])
def test_the_right_label_is_stated_where_the_rule_says_so(state_label: Any, splits: set[str]) -> None:
    records = records_of(OasisRules(state_label=state_label))
    stated = [record for record in records if "The correct label is" in record["conversations"][0]["value"]]
    assert {record["split"] for record in stated} == splits


@given(name=st.text(min_size=1, max_size=20), quadrant=st.sampled_from(list(QUADRANTS)), seed=st.integers(0, 999))
@settings(deadline=None)
def test_offered_labels_hold_the_right_one_and_none_like_it(name: str, quadrant: Any, seed: int) -> None:
    rules = OasisRules(seed=seed)
    offered = offered_labels(name, quadrant, rules)
    assert len(set(offered)) == len(offered)
    assert rules.num_offered[0] <= len(offered) <= rules.num_offered[1]
    assert set(offered) & set(QUADRANTS[quadrant]) == {QUADRANTS[quadrant][0]}
    assert set(offered) <= set(TAXONOMIES["mikels"].words)


def test_the_right_label_is_anywhere_in_the_list() -> None:
    quadrant = ("positive", "calm")
    places = Counter(offered_labels(str(i), quadrant, RULES).index("contentment") for i in range(1500))
    assert set(places) == {0, 1, 2, 3, 4}
    assert max(places[place] for place in (0, 1, 2)) < 1.3 * min(places[place] for place in (0, 1, 2))


def test_every_wording_is_used() -> None:
    answers = {record["conversations"][1]["value"] for record in records_of(RULES)}
    for template in (*CAPTION_ANSWERS, *EMOTION_ANSWERS, *SENTIMENT_ANSWERS):
        pattern = re.sub(r"\\\{\w+\\\}", "[^.]+", re.escape(template))
        assert any(re.fullmatch(pattern, answer) for answer in answers), template


# The table


def write_table(folder: Path, *lines: str) -> Path:
    header = "image,theme,category,source,valence_mean,valence_sd,arousal_mean,arousal_sd"
    (folder / "norms.csv").write_text("\r\n".join([header, *lines]))
    return folder


def test_a_table_is_read_in_order(tmp_path: Path) -> None:
    write_table(tmp_path, "b_1.jpg,B,Object,Pixabay,4.6,0.9,2.3,1.6", "a_1.jpg,A,Person,Pixabay,1,0.9,7,1.6")
    assert read_photographs(tmp_path) == [
        Photograph("b_1.jpg", "B", "Object", 4.6, 2.3),
        Photograph("a_1.jpg", "A", "Person", 1.0, 7.0),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "a_1.jpg,A,Object,Pixabay,7.5,0.9,2.3,1.6",
        "a_1.jpg,A,Object,Pixabay,nan,0.9,2.3,1.6",
        "a_1.jpg,A,Plant,Pixabay,4.6,0.9,2.3,1.6",
        "a_1.jpg,A,Object,Pixabay,,0.9,2.3,1.6",
        "a_1.jpg,A",
    ],
)
def test_another_table_is_one_line(line: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"norms\.csv is not a table of image, theme") as caught:
        read_photographs(write_table(tmp_path, line))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"norms\.csv is not a table"):
        read_photographs(tmp_path / "none")


@needs_mirror
def test_the_real_photographs() -> None:
    photographs = {shot.image: shot for shot in read_photographs(MIRROR / "oasis")}
    assert len(photographs) == 653
    records = list(build_records(photographs.values(), RULES))
    tasks = Counter(record["task"] for record in records)
    with_emotion = sum(1 for shot in photographs.values() if quadrant_of(shot, RULES))
    assert tasks == {"caption": 653, "sqa": 653, "reasoning": with_emotion}
    assert with_emotion == 449
    assert len({record["id"] for record in records}) == len(records)
    themes: dict[str, set[str]] = {}
    for record in records:
        themes.setdefault(record["split"], set()).add(photographs[record["image"]].theme)
    assert sum(len(found) for found in themes.values()) == len(set().union(*themes.values())) == 188
    assert all((MIRROR / "oasis" / "images" / record["image"]).is_file() for record in records)


# The command, on the session's platform


@pytest.mark.slow
@pytest.mark.timeout(1200)
@needs_mirror
def test_the_command_stores_every_photograph_with_the_rule_beside_it(jobs: Jobs) -> None:
    first = jobs.run("ingest", "oasis", "--name", "oasis-rule", "--json", TINYEMO_MIRROR=str(MIRROR)).document
    with jobs.connected():
        manifest = load_manifest("s3://tinyemo/datasets/oasis-rule", "instruct")
    assert manifest.uri == first["uri"]
    assert manifest.rows_in == manifest.rows_kept + manifest.rejected.rows == 1755
    assert all(reason.startswith("duplicate_") for reason in manifest.rejected.reasons)
    assert set(manifest.splits) == {"train", "validation", "test"}
    assert (manifest.taxonomy.name, manifest.data) == ("mikels", "real")
    assert manifest.source["asset"] == "oasis"
    for key, value in describe_rules(RULES).items():
        assert manifest.rules[key] == json.loads(json.dumps(value))
    assert manifest.rules["answers"] == "templates"
    again = jobs.run("ingest", "oasis", "--name", "oasis-rule", "--json", TINYEMO_MIRROR=str(MIRROR)).document
    assert (again["digest"], again["unchanged"]) == (manifest.digest, True)
    refused = jobs.run("ingest", "oasis", "--test-fraction", "0.95", TINYEMO_MIRROR=str(MIRROR))
    assert "leave nothing for train" in refused.error
