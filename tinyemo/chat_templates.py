"""Chat templates: each turns a conversation into the pieces of a language model's prompt.

A prompt ends where the answer begins; a template's `before_answer` is the first thing that the model writes, because a
tokenizer that merges a space with the word behind it would otherwise see another prompt than it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Literal

TemplateName = Literal["plain", "llama", "phi", "chatml"]

CAPTION_TASK = "caption"
"""The task whose question the plain form leaves out."""
PHI_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""LLaVA's and TinyLLaVA's system line for the USER / ASSISTANT form."""


class Mark(Enum):
    """A piece of a prompt that is not text."""

    BEGIN = "begin"
    """The tokenizer's BOS, where it has one."""
    IMAGE = "image"
    """The placeholders of one image."""
    TURN = "turn"
    """`<|im_start|>`."""
    END = "end"
    """The end token."""


Piece = str | Mark


@dataclass(frozen=True)
class Exchange:
    """A question and its answer; the answer is None where the model is to give it.

    Attributes:
        system: text before the first question; None for the template's own.
        task: task of the record: caption, vqa, sqa, reasoning; None if it is unknown.
    """

    system: str | None
    has_image: bool
    question: str
    answer: str | None
    task: str | None
    is_first: bool


@dataclass(frozen=True)
class Template:
    """One chat template.

    Attributes:
        prompt: the pieces between the answer before and this exchange's own.
        before_answer: stands between the prompt and the answer; learned with it.
    """

    prompt: Callable[[Exchange], list[Piece]]
    before_answer: str


def _image_line(exchange: Exchange) -> list[Piece]:
    """Return LLaVA's `<image>` and a line break, which stand before the question."""
    return [Mark.IMAGE, "\n"] if exchange.has_image else []


def _plain(exchange: Exchange) -> list[Piece]:
    r"""`{image}{question}\n`; for a caption `{image}` alone.

    LLaVA's pretraining (arXiv 2304.08485, `plain`; TinyLLaVA Factory's `pretrain`) has `{image}{answer}\n` and drops
    every question. TinyEmo's pretraining has two question tasks, whose answers mean nothing without it: only a
    caption's is dropped, and only where an image stands in its place. We close an answer with the end token in place of
    a line break, so that generation knows where to stop.
    """
    pieces: list[Piece] = [Mark.BEGIN] if exchange.is_first else []
    if exchange.system is not None:
        pieces.append(f"{exchange.system}\n")
    if exchange.has_image:
        pieces.append(Mark.IMAGE)
        if exchange.task == CAPTION_TASK:
            return pieces
    return [*pieces, f"{exchange.question}\n"]


def _llama(exchange: Exchange) -> list[Piece]:
    r"""`{BOS}[INST] {image}\n{question} [/INST]`, and `{answer}{end}` behind a space.

    Llama 2's chat form (arXiv 2307.09288; `<<SYS>>\n{system}\n<</SYS>>\n\n` before the first question), with LLaVA's
    image line. Every exchange begins with BOS, as there. Left out: the space between an answer and its end token.
    """
    system = "" if exchange.system is None else f"<<SYS>>\n{exchange.system}\n<</SYS>>\n\n"
    return [Mark.BEGIN, f"[INST] {system}", *_image_line(exchange), f"{exchange.question} [/INST]"]


def _phi(exchange: Exchange) -> list[Piece]:
    r"""`{system} USER: {image}\n{question} ASSISTANT:`, and `{answer}{end}` behind a space.

    TinyLLaVA Factory's `phi` (arXiv 2405.11788), which is LLaVA's Vicuna form with `<|endoftext|>` as the end.
    """
    system = PHI_SYSTEM if exchange.system is None else exchange.system
    first: list[Piece] = [Mark.BEGIN, f"{system} "] if exchange.is_first else []
    return [*first, "USER: ", *_image_line(exchange), f"{exchange.question} ASSISTANT:"]


def _chatml(exchange: Exchange) -> list[Piece]:
    r"""`<|im_start|>user\n{image}\n{question}{end}\n<|im_start|>assistant\n`, turn for turn; the end is `<|im_end|>`.

    OpenAI's ChatML, as SmolLM2's and Qwen2's own templates have it. No system turn unless the record has one, where
    theirs put one of their own. The line break behind an answer belongs to the prompt that follows. A tokenizer
    without these tokens spells `<|im_start|>` and closes every turn with its own end token.
    """
    pieces: list[Piece] = [Mark.BEGIN] if exchange.is_first else ["\n"]
    if exchange.system is not None:
        pieces += [Mark.TURN, f"system\n{exchange.system}", Mark.END, "\n"]
    return [
        *pieces,
        Mark.TURN,
        "user\n",
        *_image_line(exchange),
        exchange.question,
        Mark.END,
        "\n",
        Mark.TURN,
        "assistant\n",
    ]


TEMPLATES: dict[TemplateName, Template] = {
    "plain": Template(_plain, before_answer=""),
    "llama": Template(_llama, before_answer=" "),
    "phi": Template(_phi, before_answer=" "),
    "chatml": Template(_chatml, before_answer=""),
}
