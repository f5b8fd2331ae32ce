"""What is learned is the answers, and a prompt is what was trained, for every template and tokenizer that we have."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.assets.catalogue import get_asset
from tinyemo.chat_templates import TEMPLATES, TemplateName
from tinyemo.chat_tokenizer import SPACE_LETTER, ChatTokenizer
from tinyemo.conversation import IGNORED, IMAGE_TEXT, IMAGE_TOKEN_ID, encode_conversation, encode_prompt
from tinyemo.embedding_tables import open_tokenizer

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
    asked = [place for place, (role, _) in enumerate(turns) if role == "gpt"]
    for place, run in zip(asked, runs, strict=True):
        prompt = encode_prompt(turns[:place], tokenizer, **form)
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.labels[len(prompt) : len(prompt) + len(run)] == run
        assert encoded.labels[: len(prompt)][-1:] in ([IGNORED], [])
