"""Conversion of conversations to token ids and labels, by the templates of `tinyemo.chat_templates`. T tokens.

The mask follows from how the ids are made: a prompt is encoded alone, as it is when the model is asked, and an answer
is encoded alone and put behind it. Where the tokenizer would merge over that seam, what is trained is what is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinyemo.chat_templates import TEMPLATES, Exchange, Mark, Piece, TemplateName
from tinyemo.chat_tokenizer import TURN_TEXT, ChatTokenizer
from tinyemo.errors import DataError

IGNORED = -100
"""Label of a token that the loss leaves out."""
IMAGE_TOKEN_ID = -200
"""Stands for a patch of an image among the token ids, as in LLaVA; no tokenizer has it."""
IMAGE_TEXT = "<image>"

Turns = Sequence[tuple[str, str]]
"""(role, text): system where there is one, then human and gpt in turn."""


@dataclass(frozen=True)
class Encoded:
    """A conversation as token ids.

    Attributes:
        input_ids: T ids; IMAGE_TOKEN_ID where the image goes.
        labels: T ids, IGNORED where nothing is learned: label t is what the model says after token t - 1.
    """

    input_ids: list[int]
    labels: list[int]


def encode_conversation(
    turns: Turns,
    tokenizer: ChatTokenizer,
    *,
    template: TemplateName,
    image_tokens: int = 1,
    max_length: int | None = None,
    task: str | None = None,
    record_id: str = "",
) -> Encoded:
    """Encode a conversation; its answers, each with an end token, are the labels. At most `max_length` tokens are kept.

    Args:
        turns: `<image>` once at most, in a human text; the template says where the image goes.
        tokenizer: see there.
        template: name of the form.
        image_tokens: placeholders of the image; 0 for the text alone.
        max_length: tokens kept; None for all.
        task: task of the record; the plain form leaves out a caption's question.
        record_id: id of the record, for error messages.

    Raises:
        DataError: turns out of order, no answer or no whole image within `max_length`, or a tokenizer that does not
            give back what it was given: the mask would not fit the prompt.
    """
    exchanges = _exchanges(turns, image_tokens > 0, task, record_id)
    if exchanges[-1].answer is None:
        raise DataError(f"record {record_id!r} ends with a question: there is nothing to learn after it")
    form = TEMPLATES[template]
    input_ids: list[int] = []
    labels: list[int] = []
    for place, exchange in enumerate(exchanges):
        said = f"{form.before_answer}{exchange.answer}"
        answer = tokenizer.encode(said)
        prompt = _encode(form.prompt(exchange), tokenizer, image_tokens, is_first=not input_ids)
        input_ids += prompt
        labels += [IGNORED] * len(prompt)
        if input_ids != _prompt(exchanges[: place + 1], tokenizer, template, image_tokens):
            raise DataError(
                f"record {record_id!r}: its prompt encodes to other ids when it is asked than when it is trained; "
                "the tokenizer must give the same ids for the same text (BPE dropout off)"
            )
        _require_given_back(said, answer, tokenizer, record_id)
        input_ids += [*answer, tokenizer.end_id]
        labels += [*answer, tokenizer.end_id]
    kept = Encoded(input_ids[:max_length], labels[:max_length])
    if kept.input_ids.count(IMAGE_TOKEN_ID) != input_ids.count(IMAGE_TOKEN_ID):
        raise DataError(f"record {record_id!r}: its image lies beyond records.max_length {max_length}; raise that")
    if all(label == IGNORED for label in kept.labels[1:]):
        raise DataError(
            f"record {record_id!r} has no answer left within records.max_length {max_length} of its {len(input_ids)} "
            "tokens, so nothing would be learned; raise records.max_length, or leave the record out"
        )
    return kept


def encode_prompt(
    turns: Turns,
    tokenizer: ChatTokenizer,
    *,
    template: TemplateName,
    image_tokens: int = 1,
    task: str | None = None,
    record_id: str = "",
) -> list[int]:
    """Encode a prompt, after which the model writes its answer to the last human turn; arguments as above.

    The ids of any conversation that goes on from here begin with these.

    Raises:
        DataError: turns out of order, or the last of them is an answer.
    """
    exchanges = _exchanges(turns, image_tokens > 0, task, record_id)
    if exchanges[-1].answer is not None:
        raise DataError(f"record {record_id!r} ends with an answer: a prompt ends with a question")
    return _prompt(exchanges, tokenizer, template, image_tokens)


def _prompt(
    exchanges: list[Exchange], tokenizer: ChatTokenizer, template: TemplateName, image_tokens: int
) -> list[int]:
    """Return the ids of everything before the last exchange's answer."""
    form = TEMPLATES[template]
    ids: list[int] = []
    for place, exchange in enumerate(exchanges):
        ids += _encode(form.prompt(exchange), tokenizer, image_tokens, is_first=not ids)
        if place < len(exchanges) - 1:
            ids += [*tokenizer.encode(f"{form.before_answer}{exchange.answer}"), tokenizer.end_id]
    return ids


def _exchanges(turns: Turns, has_image: bool, task: str | None, record_id: str) -> list[Exchange]:
    """Pair questions with their answers, and strip their texts."""
    system = None
    if turns and turns[0][0] == "system":
        system, turns = turns[0][1].strip(), turns[1:]
    roles = [role for role, _ in turns]
    if not roles or any(role != ("human", "gpt")[place % 2] for place, role in enumerate(roles)):
        raise DataError(
            f"record {record_id!r} has turns of {', '.join(roles) or 'nobody'}: human and gpt must alternate"
        )
    num_images = sum(text.count(IMAGE_TEXT) for role, text in turns if role == "human")
    if num_images > 1:
        raise DataError(f"record {record_id!r} says {IMAGE_TEXT} {num_images} times: one record has one image")
    return [
        Exchange(
            system=system if place == 0 else None,
            has_image=has_image and IMAGE_TEXT in turns[place][1],
            question=turns[place][1].replace(IMAGE_TEXT, "").strip(),
            answer=turns[place + 1][1].strip() if place + 1 < len(turns) else None,
            task=task,
            is_first=place == 0,
        )
        for place in range(0, len(turns), 2)
    ]


def _encode(pieces: list[Piece], tokenizer: ChatTokenizer, image_tokens: int, *, is_first: bool) -> list[int]:
    """Return the ids of pieces; adjacent texts are encoded as one.

    Args:
        is_first: whether they begin the sequence.
    """
    ids: list[int] = []
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        if piece is Mark.TURN and tokenizer.turn_id is None:
            text += TURN_TEXT
            continue
        ids += tokenizer.encode(text, is_first=is_first)
        is_first &= not text
        text = ""
        if piece is Mark.BEGIN:
            ids += tokenizer.begin_ids
            is_first = True
        else:
            ids += _mark_ids(piece, tokenizer, image_tokens)
            is_first = False
    return ids + tokenizer.encode(text, is_first=is_first)


def _mark_ids(mark: Mark, tokenizer: ChatTokenizer, image_tokens: int) -> list[int]:
    if mark is Mark.IMAGE:
        return [IMAGE_TOKEN_ID] * image_tokens
    if mark is Mark.END:
        return [tokenizer.end_id]
    assert tokenizer.turn_id is not None
    return [tokenizer.turn_id]


def _require_given_back(said: str, answer: list[int], tokenizer: ChatTokenizer, record_id: str) -> None:
    """Raise DataError unless the ids decode to the answer: no character may be lost."""
    back = tokenizer.decode(answer)
    if back != said and tokenizer.normalize(back) != tokenizer.normalize(said):
        raise DataError(
            f"record {record_id!r}: the tokenizer gives back {back[:60]!r} for the answer {said[:60]!r}; "
            "mend the record, or take a tokenizer that knows all of its characters"
        )
