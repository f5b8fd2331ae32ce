"""Gates: one code for each way in which an answer is no record, and duplicates over all texts."""

from __future__ import annotations

import json

import pytest

from orchestration.synthesize.answer_ledger import Code
from orchestration.synthesize.gates import Text, check_answer, find_duplicates, record_answer
from orchestration.synthesize.prompts import PromptVariables, newest_prompt, open_prompt, read_structured, schema_of
from orchestration.synthesize.synthesis_recipe import GatesConfig, TaskConfig
from orchestration.synthesize.work_items import WorkItem
from tinyemo.errors import ConfigError
from tinyemo.taxonomies import TAXONOMIES

FEAR = "The dark clouds and the empty road leave viewers with a sense of fear and of being alone."


def item(task: str = "reasoning") -> WorkItem:
    told = "Caption: an empty road below dark clouds in the late evening of a cold day. The correct label is fear."
    return WorkItem("k", "0" * 64, task, "t", 0, None, "fear", "Why?", ("awe", "fear"), "", "You explain.", told)


def code(text: str, task: str = "reasoning", *, form: str = "text", finish_reason: str = "stop") -> Code | None:
    config, gates = TaskConfig(max_words=40), GatesConfig()
    return check_answer(item(task), text, finish_reason, form, config, gates, TAXONOMIES["mikels"]).code


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FEAR, None),
        (f"Reasoning: {FEAR}\nPredicted Label: fear", None),
        (f"Reasoning: {FEAR}\nPredicted Label: Fear.", None),
        (f"{FEAR}\nPredicted Label: awe", Code.LABEL_DIFFERENT),
        (FEAR.replace("fear", "awe"), Code.LABEL_DIFFERENT),
        (FEAR.replace("fear", "unease"), Code.LABEL_MISSING),
        (f"{FEAR} Others feel awe.", Code.SEVERAL_LABELS),
        ("", Code.EMPTY),
        ("...", Code.EMPTY),
        ("Fear.", Code.TOO_SHORT),
        (f"{FEAR} {FEAR} {FEAR}", Code.TOO_LONG),
        (f"{FEAR}\u202e", Code.CONTROL_CHARACTERS),
        ("I'm sorry, but as an AI language model I cannot see pictures or say that they evoke fear.", Code.REFUSAL),
        ("An empty road below dark clouds in the late evening of a cold day. The label is fear.", Code.COPIED_PROMPT),
        (f"{FEAR}<|im_end|>", Code.COPIED_PROMPT),
        ("Les nuages sombres et la route vide donnent aux gens une idée de fear et de peur.", Code.WRONG_LANGUAGE),
    ],
)  # fmt: skip
def test_each_gate_of_a_plain_answer(text: str, expected: Code | None) -> None:
    assert code(text) == expected


def test_each_gate_of_a_structured_answer() -> None:
    def answer(**fields: object) -> str:
        return json.dumps(fields)

    assert code(answer(reasoning=FEAR, label="fear"), form="schema") is None
    assert code(f"```json\n{answer(reasoning=FEAR, label='fear')}\n```", form="schema") is None
    assert code(answer(reasoning=FEAR, label="awe"), form="schema") == Code.LABEL_DIFFERENT
    for broken in (answer(reasoning=FEAR), answer(reasoning=FEAR, label=3), "[]", FEAR, "{", "null"):
        assert code(broken, form="schema") == Code.NOT_JSON
    assert code(answer(reasoning=FEAR, label="fear"), form="schema", finish_reason="length") == Code.UNFINISHED
    assert read_structured(answer(score=9, valence=1, arousal=1), schema_of("judge")) == "score breaks the rule maximum"


def test_a_caption_may_name_any_label() -> None:
    assert code(FEAR.replace("fear", "awe and fear"), "caption") is None
    assert record_answer(item("caption"), FEAR) == FEAR
    assert record_answer(item(), FEAR) == f"Reasoning: {FEAR}\nPredicted Label: fear"


def test_near_duplicates_go_and_the_split_that_is_held_out_more_keeps_its_text() -> None:
    long = " ".join(f"word{number}" for number in range(60))
    nearly = f"{long} indeed"
    texts = [
        Text(0, "train", long),
        Text(1, "train", nearly),
        Text(2, "train", "A boat lies on the shore of a quiet lake in the morning."),
        Text(3, "test", "A boat lies on the shore of a quiet lake in the morning."),
        Text(4, "train", "Children run after a kite over a green field in the wind."),
        Text(5, "train", "An old man sells fruit at the corner of a busy street."),
    ]
    held_out = ["children run after a kite over a green field in the wind"]
    found = {place: code for place, (code, _) in find_duplicates(texts, 0.9, held_out).items()}
    assert found == {1: Code.NEAR_DUPLICATE, 2: Code.DUPLICATE_ACROSS_SPLITS, 4: Code.HELD_OUT_TEXT}
    assert find_duplicates(texts, 0.0, held_out) == {}


def test_prompts_are_checked_before_anything_is_rendered(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    shipped = open_prompt(newest_prompt("reasoning"))
    variables = PromptVariables(
        label="fear", labels=("awe", "fear"), context={"caption": "{{ 7 * 7 }} <b>"}, max_words=30
    )
    prompt = shipped.render(variables)
    assert "Labels: [awe, fear]" in prompt.user
    assert "Caption: {{ 7 * 7 }} <b>" in prompt.user  # a context is text, never a template
    assert prompt.digest() != shipped.render(variables.model_copy(update={"label": "awe"})).digest()
    cases = {
        "unknown variables secret": "{% block system %}{% endblock %}{% block user %}{{ secret }}{% endblock %}",
        "must have the blocks": "{% block user %}x{% endblock %}",
        "unexpected": "{% block system %}{% endblock %}{% block user %}{{ }}{% endblock %}",
    }
    for message, text in cases.items():
        (folder / "mine.j2").write_text(text)
        with pytest.raises(ConfigError, match=message if message != "unexpected" else "mine.j2"):
            open_prompt(str(folder / "mine.j2"))
    unsafe = "{% block system %}{% endblock %}{% block user %}{{ label.__class__.__mro__ }}{% endblock %}"
    (folder / "unsafe.j2").write_text(unsafe)
    with pytest.raises(ConfigError, match="cannot be rendered"):
        open_prompt(str(folder / "unsafe.j2")).render(variables)
    with pytest.raises(ConfigError, match="no prompt 'poem-1'"):
        open_prompt("poem-1")
