"""Conversations to token ids. T tokens.

The plain form: what the human says, a line break, the answer, the end token. Only answers are learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

IGNORED = -100
"""Label of a token that the loss leaves out."""
IMAGE_TEXT = "<image>"


@dataclass(frozen=True)
class Encoded:
    """A conversation as ids.

    Attributes:
        input_ids: T ids; the image stands where `image_token_id` does.
        labels: T ids, IGNORED where nothing is learned.
    """

    input_ids: list[int]
    labels: list[int]


def encode_conversation(
    turns: Sequence[tuple[str, str]],
    tokenize: Callable[[str], list[int]],
    *,
    image_token_id: int,
    end_token_id: int,
    max_length: int,
) -> Encoded:
    """A conversation in the plain form, cut off after `max_length` tokens.

    Args:
        turns: (role, text), human and gpt in turn; `<image>` in a human text is where the image goes.
        tokenize: text to ids, no special tokens.
        image_token_id: stands for the image; the model replaces it with the image's own embeddings.
        end_token_id: closes an answer.
        max_length: tokens kept.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for role, text in turns:
        if role == "gpt":
            ids = [*tokenize(text), end_token_id]
            labels += ids
        else:
            before, image, after = text.partition(IMAGE_TEXT)
            ids = [*tokenize(before.strip()), *([image_token_id] if image else []), *tokenize(after.strip() + "\n")]
            labels += [IGNORED] * len(ids)
        input_ids += ids
    return Encoded(input_ids[:max_length], labels[:max_length])
