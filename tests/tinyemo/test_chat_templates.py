"""What is learned is the answers, and a prompt is what was trained, for every template and tokenizer that we have."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.assets.catalogue import get_asset
from tinyemo.chat_templates import PHI_SYSTEM, TEMPLATES, TemplateName
from tinyemo.chat_tokenizer import SPACE_LETTER, ChatTokenizer
from tinyemo.conversation import IGNORED, IMAGE_TEXT, IMAGE_TOKEN_ID, encode_conversation, encode_prompt
from tinyemo.errors import ConfigError, DataError
from tinyemo.tokenizer_files import open_tokenizer

TOKENIZERS = {"smollm2-135m": "<|im_end|>", "tok512": "</s>"}
"""Names, and the end token of each."""


def tokenizer_source(name: str) -> Path:
    if name == "tok512":
        mirror = os.environ.get("TINYEMO_MIRROR")
        if not mirror:
            pytest.skip("tok512 lies in the mirror: set TINYEMO_MIRROR")
        return Path(mirror) / "models" / "stories260k"
    [path] = get_asset(name).glob("*.gguf")
    return path


@cache
def opened(name: str) -> Any:
    return open_tokenizer(tokenizer_source(name))


@cache
def chat(name: str) -> ChatTokenizer:
    return ChatTokenizer(opened(name), TOKENIZERS[name])


WORDS = [
    "Labels: [joy, fear]",
    "the",
    "a  b",
    "é",
    "\U0001d4b3",
    "\n",
    "\t",
    "<|im_end|>",
    "</s>",
    "[/INST]",
    "ASSISTANT:",
    "🙂",
]
# SmolLM2 has no token for some control characters, nor for planes that Unicode leaves empty; SentencePiece takes its
# letter for a space.
characters = st.characters(exclude_categories=("Cs", "Cn", "Cc"), exclude_characters=SPACE_LETTER)
texts = st.lists(st.sampled_from(WORDS) | st.text(characters, max_size=8), min_size=1, max_size=6).map(" ".join)
texts = texts.filter(lambda text: bool(text.strip()) and IMAGE_TEXT not in text)


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[str, str]]:
    """One to three exchanges, the image at either end of the first question, with or without a system text."""
    turns: list[tuple[str, str]] = []
    if draw(st.booleans()):
        turns.append(("system", draw(texts)))
    for place in range(draw(st.integers(1, 3))):
        question = draw(texts)
        if place == 0:
            question = draw(st.sampled_from([f"{IMAGE_TEXT}\n{question}", f"{question}\n{IMAGE_TEXT}", question]))
        turns += [("human", question), ("gpt", draw(texts))]
    return turns


def learned_runs(labels: list[int]) -> list[list[int]]:
    """Unbroken stretches of labels that count."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


@pytest.mark.parametrize("template", get_args(TemplateName))
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=40)
@given(
    turns=conversations(),
    image_tokens=st.integers(0, 5),
    task=st.sampled_from([None, "caption", "vqa", "sqa", "reasoning"]),
)
def test_unmasked_tokens_decode_to_the_answers(
    name: str, template: TemplateName, turns: list[tuple[str, str]], image_tokens: int, task: str | None
) -> None:
    """And nothing else is unmasked; each ends with the end token, and each prompt is where its answer begins."""
    tokenizer = chat(name)
    form: dict[str, Any] = {"template": template, "image_tokens": image_tokens, "task": task}
    encoded = encode_conversation(turns, tokenizer, **form)
    assert all(label in (IGNORED, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    runs = learned_runs(encoded.labels)
    answers = [text.strip() for role, text in turns if role == "gpt"]
    assert [run[-1] for run in runs] == [tokenizer.end_id] * len(answers)
    space = TEMPLATES[template].before_answer
    assert [tokenizer.decode(run[:-1]) for run in runs] == [space + answer for answer in answers]
    # As Hugging Face's own decoder gives them back, which takes one space away before a SentencePiece text.
    assert [opened(name).decode(run).strip() for run in runs] == [answer.strip() for answer in answers]

    has_image = image_tokens > 0 and any(IMAGE_TEXT in text for _, text in turns)
    assert encoded.input_ids.count(IMAGE_TOKEN_ID) == image_tokens * has_image
    if template == "chatml":
        assert encoded.input_ids.count(tokenizer.end_id) == len(turns)
    else:
        assert encoded.input_ids.count(tokenizer.end_id) == len(answers)
    for begin in tokenizer.begin_ids:
        assert encoded.input_ids.count(begin) == (len(answers) if template == "llama" else 1)
    asked = [place for place, (role, _) in enumerate(turns) if role == "gpt"]
    for place, run in zip(asked, runs, strict=True):
        prompt = encode_prompt(turns[:place], tokenizer, **form)
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.labels[len(prompt) : len(prompt) + len(run)] == run
        assert encoded.labels[: len(prompt)][-1:] in ([IGNORED], [])


def shown(name: str, ids: list[int]) -> str:
    """Ids as text, special tokens and placeholders included."""
    parts = [opened(name).decode([i for i in group if i >= 0], skip_special_tokens=False) for group in split(ids)]
    return IMAGE_TEXT.join(parts)


def split(ids: list[int]) -> list[list[int]]:
    """The ids between placeholders."""
    groups: list[list[int]] = [[]]
    for token in ids:
        if token == IMAGE_TOKEN_ID:
            groups.append([])
        else:
            groups[-1].append(token)
    return groups


TWO = [("human", "<image>\nWhat is it?"), ("gpt", "A dog."), ("human", "Is it glad?"), ("gpt", "Yes.\n")]
WRITTEN: dict[TemplateName, str] = {
    "plain": "<image><image>What is it?\nA dog.<|im_end|>Is it glad?\nYes.<|im_end|>",
    "llama": "[INST] <image><image>\nWhat is it? [/INST] A dog.<|im_end|>[INST] Is it glad? [/INST] Yes.<|im_end|>",
    "phi": (
        f"{PHI_SYSTEM} USER: <image><image>\nWhat is it? ASSISTANT: A dog.<|im_end|>"
        "USER: Is it glad? ASSISTANT: Yes.<|im_end|>"
    ),
    "chatml": (
        "<|im_start|>user\n<image><image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"
        "<|im_start|>user\nIs it glad?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"
    ),
}


@pytest.mark.parametrize("template", WRITTEN)
def test_a_form_is_as_it_is_written(template: TemplateName) -> None:
    tokenizer = chat("smollm2-135m")
    encoded = encode_conversation(TWO, tokenizer, template=template, image_tokens=2)
    assert shown("smollm2-135m", encoded.input_ids) == WRITTEN[template]
    prompt = encode_prompt(TWO[:3], tokenizer, template=template, image_tokens=2)
    space = TEMPLATES[template].before_answer
    assert shown("smollm2-135m", prompt) == WRITTEN[template].removesuffix(f"{space}Yes.<|im_end|>")


def test_a_system_text_stands_where_each_form_has_it() -> None:
    turns = [("system", "Be brief."), *TWO[:1]]
    found = {name: shown("smollm2-135m", encode_prompt(turns, chat("smollm2-135m"), template=name)) for name in WRITTEN}
    assert found == {
        "plain": "Be brief.\n<image>What is it?\n",
        "llama": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat is it? [/INST]",
        "phi": "Be brief. USER: <image>\nWhat is it? ASSISTANT:",
        "chatml": (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
            "<|im_start|>assistant\n"
        ),
    }


def test_chatml_is_smollm2s_own_template() -> None:
    """Reference: the template in the model's file, tokenised as one text."""
    from jinja2 import Template
    from transformers.integrations.gguf import get_gguf_tokenizer

    _, _, settings_of_file = get_gguf_tokenizer(str(tokenizer_source("smollm2-135m")))
    turns = [("system", "Be brief."), ("human", "What's 2+2?"), ("gpt", "It is  4 \u00e9."), ("human", "\ttabs?")]
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    text = Template(settings_of_file["chat_template"]).render(
        messages=[{"role": roles[role], "content": content.strip()} for role, content in turns],
        add_generation_prompt=True,
    )
    assert encode_prompt(turns, chat("smollm2-135m"), template="chatml") == opened("smollm2-135m").encode(text).ids


def test_a_sentencepiece_file_gives_sentencepieces_ids() -> None:
    """Golden: sentencepiece 0.2.3 on tok512's tokenizer.model."""
    golden = {
        "Once upon a time, Lily's 3 cats went 12 miles.": (
            [
                403,
                407,
                261,
                378,
                432,
                317,
                439,
                419,
                410,
                472,
                280,
                294,
                419,
                263,
                377,
                410,
                475,
                479,
                284,
                290,
                406,
                426,
            ]
        ),
        "hi\n\nthere \u00e9\u20ac \U0001d4b3 end": (
            [270, 417, 13, 13, 413, 260, 276, 410, 485, 503, 410, 243, 160, 149, 182, 344, 264]
        ),
    }
    for text, ids in golden.items():
        assert opened("tok512").encode(text, add_special_tokens=False).ids == ids
        assert opened("tok512").encode(text).ids == [1, *ids]
        assert chat("tok512").encode(text, is_first=True) == ids
        assert chat("tok512").decode(chat("tok512").encode(text)) == text


def test_llama_on_a_sentencepiece_tokenizer_is_the_whole_text() -> None:
    """Golden: BOS, sentencepiece 0.2.3's ids of `[INST] What is it? [/INST] A dog.`, EOS."""
    question = [410, 508, 442, 458, 437, 434, 509, 410, 448, 415, 294, 410, 293, 312, 450]
    answer = [410, 447, 400, 428, 426]
    prompt = [1, *question, 410, 508, 492, 442, 458, 437, 434, 509]
    turns = [("human", "What is it?"), ("gpt", "A dog.")]
    encoded = encode_conversation(turns, chat("tok512"), template="llama")
    assert encoded.input_ids == [*prompt, *answer, 2]
    assert encoded.labels == [IGNORED] * len(prompt) + [*answer, 2]
    again = encode_conversation(turns + turns, chat("tok512"), template="llama")
    assert again.input_ids == encoded.input_ids * 2


def test_a_tokenizer_of_the_old_layout_is_the_same() -> None:
    """Llama-2's tokenizer.json puts the first space with a normalizer in place of a Metaspace."""
    from tokenizers import Tokenizer

    layout = json.loads(opened("tok512").to_str())
    layout["pre_tokenizer"] = None
    layout["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": SPACE_LETTER},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_LETTER},
        ],
    }
    old = ChatTokenizer(Tokenizer.from_str(json.dumps(layout)), "</s>")
    for template in WRITTEN:
        assert encode_conversation(TWO, old, template=template) == encode_conversation(
            TWO, chat("tok512"), template=template
        )


@pytest.mark.parametrize("name", TOKENIZERS)
def test_plain_leaves_out_a_captions_question_alone(name: str) -> None:
    tokenizer, turns = chat(name), [("human", "<image>\nDescribe the image."), ("gpt", "A dog.")]
    ids = {
        task: encode_prompt(turns[:1], tokenizer, template="plain", image_tokens=3, task=task)
        for task in (None, "caption", "vqa", "sqa", "reasoning")
    }
    assert ids["caption"] == [*tokenizer.begin_ids, *[IMAGE_TOKEN_ID] * 3]
    asked = [*ids["caption"], *tokenizer.encode("Describe the image.\n")]
    assert all(ids[task] == asked for task in (None, "vqa", "sqa", "reasoning"))
    # Without its image a caption would have nothing to go by.
    blind = encode_prompt(turns[:1], tokenizer, template="plain", image_tokens=0, task="caption")
    assert blind == [*tokenizer.begin_ids, *tokenizer.encode("Describe the image.\n", is_first=True)]
    said = encode_prompt(turns[:1], tokenizer, template="chatml", image_tokens=3, task="caption")
    assert said == encode_prompt(turns[:1], tokenizer, template="chatml", image_tokens=3)


def test_a_record_is_cut_and_one_without_an_answer_left_is_an_error() -> None:
    tokenizer = chat("smollm2-135m")
    whole = encode_conversation(TWO, tokenizer, template="chatml", image_tokens=9)
    first = next(place for place, label in enumerate(whole.labels) if label != IGNORED)
    cut = encode_conversation(TWO, tokenizer, template="chatml", image_tokens=9, max_length=first + 1)
    assert (cut.input_ids, cut.labels) == (whole.input_ids[: first + 1], whole.labels[: first + 1])
    with pytest.raises(DataError, match=rf"record 'r7' has no answer left within records\.max_length {first} of its"):
        encode_conversation(TWO, tokenizer, template="chatml", image_tokens=9, max_length=first, record_id="r7")
    late = [("human", "a"), ("gpt", "b"), ("human", "<image>c"), ("gpt", "d")]
    with pytest.raises(DataError, match=r"record 'r8': its image lies beyond records\.max_length 9"):
        encode_conversation(late, tokenizer, template="plain", image_tokens=9, max_length=9, record_id="r8")


def test_a_mask_that_would_not_fit_the_prompt_is_an_error() -> None:
    """BPE dropout splits words anew at each call: what is asked would not be what was trained."""
    from tokenizers import Tokenizer

    layout = json.loads(opened("smollm2-135m").to_str())
    layout["model"]["dropout"] = 0.5
    moody = ChatTokenizer(Tokenizer.from_str(json.dumps(layout)), "<|im_end|>")
    turns = [("human", "Describe the photograph in a few sentences, please. " * 4), ("gpt", "A dog.")]
    with pytest.raises(DataError, match="record 'r7': its prompt encodes to other ids"):
        encode_conversation(turns, moody, template="chatml", record_id="r7")


def test_an_answer_that_the_tokenizer_loses_is_an_error() -> None:
    """SmolLM2 has no token for this control character and leaves it out without a word."""
    turns = [("human", "a"), ("gpt", "b\x13c")]
    with pytest.raises(DataError, match=r"record 'r7': the tokenizer gives back 'bc' for the answer 'b\\x13c'"):
        encode_conversation(turns, chat("smollm2-135m"), template="chatml", record_id="r7")
    # SentencePiece writes a space as this letter: nothing that anyone would miss is lost.
    encode_conversation([("human", "a"), ("gpt", f"b{SPACE_LETTER}c")], chat("tok512"), template="chatml")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "turns of nobody"),
        ([("gpt", "b")], "turns of gpt"),
        ([("human", "a"), ("human", "a")], "turns of human, human"),
        ([("human", "a"), ("system", "b")], "turns of human, system"),
        ([("human", "<image><image>"), ("gpt", "b")], "says <image> 2 times"),
        ([("human", "a")], "ends with a question"),
    ],
)
def test_turns_out_of_order_are_an_error(turns: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(DataError, match=f"record 'r7' .*{message}"):
        encode_conversation(turns, chat("tok512"), template="plain", record_id="r7")


def test_what_cannot_be_asked_is_an_error() -> None:
    with pytest.raises(DataError, match="record 'r7' ends with an answer"):
        encode_prompt(TWO, chat("tok512"), template="plain", record_id="r7")
    with pytest.raises(ConfigError, match=r"records\.end_token: the tokenizer has no token '<\|im_end\|>'"):
        ChatTokenizer(opened("tok512"), "<|im_end|>")


def test_a_file_that_is_no_sentencepiece_model_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"no model at all")
    with pytest.raises(DataError, match="is no SentencePiece model"):
        open_tokenizer(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="holds no byte-pair model"):
        open_tokenizer(tmp_path)
