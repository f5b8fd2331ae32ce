"""What a record says is found in its texts, and rules are read from files."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from broken_records import asked, conversation, reasoned, record
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.data.ingest_rules import IngestRules, Reason, RejectedRecordError, load_rules
from orchestration.data.record_checks import Record, check_record, parse_document
from tinyemo.errors import ConfigError
from tinyemo.taxonomies import TAXONOMIES

T = TypeVar("T")

PUBLISHED = {
    "image": "/home/author/webemo/train/nervousness/220_F_1.jpg",
    "id": "220_F_1",
    "conversations": conversation(
        [
            (
                "human",
                "<image>\nProvide emotional reasoning about the image, on what you feel and how is the depicted "
                "emotion. Also choose the emotion that best corresponds to the image from the following options:\n\n"
                "Labels: [nervousness, optimism, sympathy]\n\nImportant: note that the correct label is nervousness.",
            ),
            ("gpt", "Reasoning: The image makes me feel uneasy.\n\nPredicted Label: nervousness"),
        ]
    ),
}
"""The form of the published reasoning records."""


def check(document: dict[str, Any], **rules: Any) -> Record:
    return check_record(document, IngestRules(**rules))


def outcome_of(call: Callable[[], T]) -> T | RejectedRecordError:
    """What a call returns, or why it rejects; nothing else may come out."""
    try:
        return call()
    except RejectedRecordError as error:
        return error


def reason_of(document: dict[str, Any], **rules: Any) -> Reason:
    with pytest.raises(RejectedRecordError) as caught:
        check(document, **rules)
    return caught.value.reason


def test_the_published_form_is_understood() -> None:
    found = check(PUBLISHED, taxonomy="parrott")
    assert (found.task, found.label, found.label_stated) == ("reasoning", "nervousness", "nervousness")
    assert found.labels_offered == ["nervousness", "optimism", "sympathy"]
    assert [(turn["from"], turn["value"]) for turn in PUBLISHED["conversations"]] == found.turns  # type: ignore[index]
    assert reason_of(PUBLISHED, taxonomy="parrott", stated_label="reject") == Reason.ANSWER_LEAKS
    assert reason_of(PUBLISHED, taxonomy="ekman") == Reason.LABEL_UNKNOWN


@pytest.mark.parametrize(
    ("question", "task"),
    [
        ("Describe the image.", "caption"),
        ("Write a caption for this picture", "caption"),
        ("What does the picture depict?", "caption"),
        ("What is the purpose of the small black dots?", "vqa"),
        ("How many people are there?", "vqa"),
        ("Is the peel on the table?", "vqa"),  # no `feel`
        ("What is the sentiment of this image?", "sqa"),
        ("How does it make you feel?", "sqa"),
        ("Describe the emotions of the image.", "sqa"),
        ("Choose one.\nLabels: [joy, fear]", "reasoning"),
    ],
)
def test_a_task_is_found_from_the_question(question: str, task: str) -> None:
    answer = "It is so.\nPredicted Label: joy" if task == "reasoning" else "It is so."
    assert check(record("x", "a.jpg", **asked(question, answer))).task == task


def test_a_named_task_comes_before_a_found_one() -> None:
    assert check(record("x", "a.jpg", task="vqa")).task == "vqa"
    assert reason_of(record("x", "a.jpg", task="vqa"), tasks=("caption",)) == Reason.TASK_UNKNOWN
    assert reason_of(record("x", "a.jpg"), tasks=("vqa",)) == Reason.TASK_UNKNOWN


@pytest.mark.parametrize(
    ("ending", "label"),
    [
        ("Important: note that the correct label is joy.", "joy"),
        ("The correct emotion is: 'Joy'", "joy"),
        ("True label: [joy]\nWhy?", "joy"),
        ("Choose the correct emotion from the list.", None),
        ("Is the correct label is in the list?", None),
    ],
)
def test_a_stated_label_is_found_where_a_line_ends_with_it(ending: str, label: str | None) -> None:
    document = record("x", "a.jpg", **reasoned(f"[joy, fear]\n{ending}"))
    assert check(document).label_stated == label


@pytest.mark.parametrize("taxonomy", TAXONOMIES)
@settings(deadline=None)
@given(data=st.data())
def test_every_label_of_a_taxonomy_is_accepted_however_it_is_written(taxonomy: str, data: st.DataObject) -> None:
    words = data.draw(st.lists(st.sampled_from(TAXONOMIES[taxonomy].words), min_size=1, unique=True))
    write = data.draw(st.sampled_from([str, str.title, str.upper, "'{}'".format, ' "{}" '.format]))
    document = record("x", "a.jpg", **reasoned(f"[{', '.join(map(write, words))}]", predicted=write(words[-1])))
    found = check(document, taxonomy=taxonomy)
    assert (found.labels_offered, found.label) == (words, words[-1])


@pytest.mark.parametrize(
    ("word", "taxonomy", "label"),
    [
        ("cheerfullness", "parrott", "cheerfulness"),  # as WEBEmo spells it
        ("gladness", "parrott", "cheerfulness"),
        ("joy", "parrott", "cheerfulness"),
        ("joy", "ekman", "joy"),  # a label before a synonym
        ("revulsion", "ekman", "disgust"),
        ("love", "parrott", None),  # of affection and of lust
        ("gladness", "ekman", None),
    ],
)
def test_aliases_and_synonyms_of_one_label_are_accepted(word: str, taxonomy: str, label: str | None) -> None:
    document = record("x", "a.jpg", label=word)
    if label is None:
        assert reason_of(document, taxonomy=taxonomy) == Reason.LABEL_UNKNOWN
    else:
        assert check(document, taxonomy=taxonomy).label == label


def test_the_folder_gives_a_label_only_where_there_is_no_other() -> None:
    document = record("x", "train/joy/a.jpg")
    assert check(document).label is None
    assert check(document, label_from_folder=True).label == "joy"
    assert check(document | {"label": "fear"}, label_from_folder=True).label == "fear"
    assert check(document | reasoned("[fear, joy]", predicted="fear"), label_from_folder=True).label == "fear"
    assert reason_of(record("x", "train/a.jpg"), label_from_folder=True) == Reason.LABEL_UNKNOWN


def test_a_leak_is_the_answers_label_in_its_question() -> None:
    leak = record("x", "a.jpg", **asked("What joy is this?", "Great joy."))
    assert reason_of(leak) == Reason.ANSWER_LEAKS
    assert check(leak, leaks="keep").task == "vqa"
    for question, answer in (
        ("Is it joyful?", "Yes, joy."),  # another word
        ("Is it fear?", "No, it is joy."),
        ("What is it?\nLabels: [joy, fear]", "Joy"),  # a list to choose from tells nothing
    ):
        assert check(record("x", "a.jpg", task="sqa", **asked(question, answer))).task == "sqa"
    # The label given leaks even where the answer does not say it.
    assert reason_of(record("x", "a.jpg", label="joy", **asked("What joy is this?", "A child."))) == Reason.ANSWER_LEAKS


def test_equal_content_is_equal_bytes_and_any_change_shows() -> None:
    base = record("x", "a.jpg", label="joy", source="s")
    changes: list[dict[str, Any]] = [
        {"label": "fear"}, {"source": "t"}, {"task": "vqa"}, asked("Describe it."), asked("Describe the image.", "No."),
    ]  # fmt: skip
    contents = {check(base | change).content() for change in [{}, *changes]}
    assert len(contents) == 6
    assert check(base).content() == check(base | {"id": "y", "image": "b.jpg", "split": "test"}).content()


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_an_object_or_are_rejected(text: bytes) -> None:
    found = outcome_of(lambda: parse_document(text))
    assert isinstance(found, dict) or "\n" not in found.detail


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
turns = st.lists(
    st.fixed_dictionaries(
        {"from": st.sampled_from(["human", "gpt", "user"]), "value": st.text(max_size=40) | st.just("<image> Why?")}
    ),
    max_size=4,
)


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {"id": json_values, "image": json_values, "conversations": turns | json_values},
        optional={name: json_values for name in ("split", "task", "label", "source")},
    )
)
def test_any_document_is_a_record_or_is_rejected(document: dict[str, Any]) -> None:
    found = outcome_of(lambda: check(document))
    if isinstance(found, Record):
        assert found.turns
        assert found.id
    else:
        assert "\n" not in found.detail


def test_a_rejection_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RejectedRecordError(Reason.BAD_ID, "why")))
    assert (error.reason, error.detail) == (Reason.BAD_ID, "why")


# Rules


def test_rules_come_from_a_file_with_options_laid_over_it(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text('taxonomy = "parrott"\nmin_side = 32\n[held_out]\ntest = 0.2\n')
    rules = load_rules(path, ["min_side=64", "animated=first_frame", 'tasks=["vqa"]', "held_out.dev=0.1"])
    assert (rules.taxonomy.name, rules.min_side, rules.animated, rules.tasks) == (
        "parrott",
        64,
        "first_frame",
        ("vqa",),
    )
    assert rules.held_out == {"test": 0.2, "dev": 0.1}
    assert load_rules(None, ["held_out.test=0"]).held_out == {"validation": 0.05, "test": 0}
    assert load_rules(None) == IngestRules()
    assert json.loads(json.dumps(rules.model_dump(mode="json")))["tasks"] == ["vqa"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_pixel=5", "max_pixel: unknown key; known keys: taxonomy, tasks"),
        ("max_pixels=0", "max_pixels: input should be greater than 0, got 0"),
        ("max_pixels=200000000", "max_pixels: input should be less than or equal to 178956970"),
        (
            "taxonomy=plutchik",
            "taxonomy: unknown taxonomy 'plutchik': it must be one of ekman, mikels, parrott, or a .toml",
        ),
        ("held_out.train=0.5", "held_out.train: 0.5 is no fraction of a split that is held out"),
        ("held_out.test=0.95", "held_out: the fractions sum to 1 or more"),
        ("held_out=0.1", "held_out: input should be a valid dictionary"),
        ("taxonomy.x=1", "--set taxonomy.x=1: taxonomy is a value, not a table"),
        ("stated_pattern=(", "stated_pattern: no regular expression"),
        ("stated_pattern=joy", "stated_pattern: it must have one group"),
        ("foreign_root=images", "foreign_root: 'images' must be an absolute path"),
        ("near_duplicate_bits=12", "near_duplicate_bits: input should be less than or equal to 11"),
        ("min_side", "--set min_side: needs the form key=value"),
    ],
)
def test_a_wrong_rule_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_rules(None, [override])
    assert message in str(caught.value)


def test_all_wrong_rules_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 errors(.|\n)*leaks(.|\n)*min_side(.|\n)*nothing"):
        load_rules(None, ["min_side=0", "leaks=perhaps", "nothing=1"])
    broken = tmp_path / "rules.toml"
    broken.write_text("taxonomy = ")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        load_rules(broken)
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        load_rules(tmp_path / "nowhere.toml")
