"""Checks of one record's text against the rules; its image is checked in `image_files`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NoReturn

from orchestration.data.ingest_rules import SPLIT_NAME, TASKS, IngestRules, Reason, RejectedRecordError
from tinyemo.taxonomies import Taxonomy, canonical_word

IMAGE_TOKEN = "<image>"
MAX_ID_CHARS = 512

_LABELS_LINE = re.compile(r"^[ \t]*Labels:(.*)$", re.IGNORECASE | re.MULTILINE)
_LABELS_LIST = re.compile(r"\[([^\[\]]*)\]\.?")
_PREDICTED_LINE = re.compile(r"^[ \t]*Predicted Label:(.*)$", re.IGNORECASE | re.MULTILINE)
_QUOTES = " \t'\"[]`*."
_ASKS_EMOTION = re.compile(r"\b(emotion\w*|sentiment\w*|feel|feels|feelings?|mood)\b", re.IGNORECASE)
_ASKS_CAPTION = re.compile(r"\b(describe|description|caption|depicts?|summari[sz]e)\b", re.IGNORECASE)

Turns = list[tuple[str, str]]
"""(role, text): human, gpt, human, gpt ..."""


@dataclass(frozen=True)
class Record:
    """A record that keeps the rules, its image aside."""

    id: str
    image: str
    """Path as the record gives it."""
    split: str | None
    task: str
    turns: Turns
    """Texts as they came, `<image>` included."""
    labels_offered: list[str]
    """Canonical, in the order of the question."""
    label_stated: str | None
    label: str | None
    """Given, else predicted by the answer, else the image's folder where the rules say so; canonical."""
    source: str | None

    def content(self) -> bytes:
        """Return the bytes of all that is stored besides image, id and split; equal for equal records."""
        parts = [self.task, self.turns, self.labels_offered, self.label_stated, self.label, self.source]
        return json.dumps(parts, ensure_ascii=False).encode()


def reject(reason: Reason, detail: str) -> NoReturn:
    """Raise RejectedRecordError."""
    raise RejectedRecordError(reason, detail)


def quoted(value: object) -> str:
    """Return a value of the input for a message: one line, at most 80 characters."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} too deep to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def parse_document(text: bytes) -> dict[str, Any]:
    """Return the JSON object in a record's text.

    Raises:
        RejectedRecordError: bad_json, not_a_record.
    """
    try:
        document = json.loads(text.decode(), parse_constant=_no_constant)
        if b"\\ud" in text or b"\\uD" in text:
            json.dumps(document, ensure_ascii=False).encode()  # a lone surrogate is no text that can be stored
    except RecursionError:
        reject(Reason.BAD_JSON, "nested too deep to read")
    except ValueError as error:  # also what is wrong with UTF-8
        reject(Reason.BAD_JSON, str(error).splitlines()[0])
    if not isinstance(document, dict):
        reject(Reason.NOT_A_RECORD, f"a JSON {type(document).__name__} in place of an object")
    return document


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def check_record(document: dict[str, Any], rules: IngestRules) -> Record:
    """Return the LLaVA record in a JSON object.

    Raises:
        RejectedRecordError: with the first rule that it breaks.
    """
    sample_id = _id(document)
    image = _text(document, "image") or reject(Reason.MISSING_FIELD, "image is absent, null or empty")
    split = _split(document)
    given, task = _text(document, "label"), _text(document, "task")
    source = _text(document, "source")
    turns = _turns(document, rules)
    offered = _offered(turns, rules)
    stated = _stated(turns, rules)
    predicted = _predicted(turns, rules, is_needed=bool(offered) and task in (None, "reasoning"))
    if given is None and predicted is None and rules.label_from_folder:
        given = PurePosixPath(image).parent.name
    label = _agreed(offered, stated, predicted, None if given is None else _known(given, "label", rules))
    task = _task(task, turns, offered, rules)
    _check_leak(task, turns, label, stated, rules)
    return Record(sample_id, image, split, task, turns, offered, stated, label, source)


def check_labelled_image(document: dict[str, Any], rules: IngestRules) -> Record:
    """Return the record of a photograph with a label; its id is its path unless it has one.

    Raises:
        RejectedRecordError: with the first rule that it breaks.
    """
    image = _text(document, "image") or reject(Reason.MISSING_FIELD, "image is absent or empty")
    sample_id = _id({"id": document.get("id", image)})
    split = _split(document)
    given = _text(document, "label") or reject(Reason.MISSING_FIELD, "label is absent or empty")
    label = _known(given, "label", rules)
    return Record(sample_id, image, split, "", [], [], None, label, _text(document, "source"))


def _split(document: dict[str, Any]) -> str | None:
    split = _text(document, "split")
    if split is not None and not SPLIT_NAME.fullmatch(split):
        reject(Reason.BAD_SPLIT, f"split is {quoted(split)}: use letters, digits, underscores, dots and dashes")
    return split


def claimed(document: dict[str, Any], field: str) -> str | None:
    """Return the `id`, `split` or `label` that a rejected record names, where it is a text."""
    value = document.get(field)
    return str(value)[:MAX_ID_CHARS] if isinstance(value, str | int) and not isinstance(value, bool) else None


def _text(document: dict[str, Any], field: str) -> str | None:
    value = document.get(field)
    if value is not None and not isinstance(value, str):
        reject(Reason.WRONG_TYPE, f"{field} is {quoted(value)}: it must be a text")
    return value


def _id(document: dict[str, Any]) -> str:
    value = document.get("id")
    if value is None:
        reject(Reason.MISSING_FIELD, "id is absent or null")
    if not isinstance(value, str | int) or isinstance(value, bool):
        reject(Reason.WRONG_TYPE, f"id is {quoted(value)}: it must be a text or an integer")
    sample_id = str(value)
    if not sample_id.strip() or len(sample_id) > MAX_ID_CHARS:
        reject(Reason.BAD_ID, f"id is blank or longer than {MAX_ID_CHARS} characters: {quoted(sample_id)}")
    return sample_id


def _turns(document: dict[str, Any], rules: IngestRules) -> Turns:
    conversation = document.get("conversations")
    if conversation is None:
        reject(Reason.MISSING_FIELD, "conversations is absent or null")
    if not isinstance(conversation, list):
        reject(Reason.WRONG_TYPE, f"conversations is {quoted(conversation)}: it must be a list of turns")
    if not conversation:
        reject(Reason.NO_TURNS, "conversations is empty")
    turns = []
    for place, turn in enumerate(conversation):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
            reject(Reason.WRONG_TYPE, f"turn {place} is {quoted(turn)}: it must have the texts `from` and `value`")
        if turn["from"] not in ("human", "gpt"):
            reject(Reason.UNKNOWN_ROLE, f"turn {place} is from {quoted(turn['from'])}: it must be human or gpt")
        turns.append((turn["from"], turn["value"]))
    roles = [role for role, _ in turns]
    if roles != ["human", "gpt"] * (len(turns) // 2):
        reject(Reason.TURNS_OUT_OF_ORDER, f"turns are {quoted(', '.join(roles))}: they must be human, gpt in turn")
    num_tokens = sum(text.count(IMAGE_TOKEN) for _, text in turns)
    if num_tokens > 1:
        reject(Reason.SEVERAL_IMAGE_TOKENS, f"{num_tokens} times {IMAGE_TOKEN}: one image, one token")
    if IMAGE_TOKEN not in turns[0][1]:
        reject(Reason.NO_IMAGE_TOKEN, f"the first human turn has no {IMAGE_TOKEN}")
    for place, (role, text) in enumerate(turns):
        if not text.replace(IMAGE_TOKEN, "").strip():
            reject(Reason.EMPTY_QUESTION if role == "human" else Reason.EMPTY_ANSWER, f"turn {place} is blank")
    num_chars = sum(len(text) for _, text in turns)
    if num_chars > rules.max_text_chars:
        reject(Reason.TEXT_TOO_LONG, f"{num_chars} characters, max_text_chars is {rules.max_text_chars}")
    return turns


def _questions(turns: Turns) -> list[str]:
    return [text for role, text in turns if role == "human"]


def _known(word: str, what: str, rules: IngestRules) -> str:
    word = word.strip(_QUOTES)
    label = rules.taxonomy.label(word)
    return label or reject(Reason.LABEL_UNKNOWN, f"{what} {quoted(word)} is no label of {rules.taxonomy.name}")


def _offered(turns: Turns, rules: IngestRules) -> list[str]:
    lines = [line for question in _questions(turns) for line in _LABELS_LINE.findall(question)]
    if not lines:
        return []
    if len(lines) > 1:
        reject(Reason.LABELS_MALFORMED, f"{len(lines)} lines of labels to choose from: one at most")
    match = _LABELS_LIST.fullmatch(lines[0].strip())
    words = match[1].split(",") if match else []
    if not all(word.strip(_QUOTES) for word in words) or not words:
        reject(Reason.LABELS_MALFORMED, f"the line of labels is {quoted(lines[0].strip())}: it must be [a, b, c]")
    labels = [_known(word, "offered label", rules) for word in words]
    if len(set(labels)) != len(labels):
        reject(Reason.LABELS_MALFORMED, f"a label is offered twice in {quoted(lines[0].strip())}")
    return labels


def _stated(turns: Turns, rules: IngestRules) -> str | None:
    pattern = re.compile(rules.stated_pattern, re.IGNORECASE | re.MULTILINE)
    words = [match[1] or "" for question in _questions(turns) for match in pattern.finditer(question)]
    labels = {_known(word, "stated label", rules) for word in words}
    if len(labels) > 1:
        reject(Reason.LABEL_CONFLICT, f"several labels are stated as the correct one: {', '.join(sorted(labels))}")
    return labels.pop() if labels else None


def _predicted(turns: Turns, rules: IngestRules, *, is_needed: bool) -> str | None:
    lines = [line for role, text in turns if role == "gpt" for line in _PREDICTED_LINE.findall(text)]
    if len(lines) > 1 or (is_needed and not lines) or (lines and not lines[0].strip(_QUOTES)):
        reject(Reason.LABELS_MALFORMED, f"the answers have {len(lines)} lines `Predicted Label: X`: one, and a label")
    return _known(lines[0], "predicted label", rules) if lines else None


def _agreed(offered: list[str], stated: str | None, predicted: str | None, given: str | None) -> str | None:
    named = {"stated": stated, "predicted": predicted, "given": given}
    for what, label in named.items():
        if offered and label is not None and label not in offered:
            reject(Reason.LABEL_NOT_OFFERED, f"the {what} label {label} is not among {', '.join(offered)}")
    if len({label for label in named.values() if label is not None}) > 1:
        listed = ", ".join(f"{label} is {what}" for what, label in named.items() if label is not None)
        reject(Reason.LABEL_CONFLICT, f"{listed}: they must be the same")
    return given or predicted


def _task(named: str | None, turns: Turns, offered: list[str], rules: IngestRules) -> str:
    question = turns[0][1]
    if named is not None:
        task = named
    elif offered:
        task = "reasoning"
    elif _ASKS_EMOTION.search(question):
        task = "sqa"
    else:
        task = "caption" if _ASKS_CAPTION.search(question) else "vqa"
    if task not in rules.tasks:
        how = "" if named is not None else " (found from the question)"
        choice = ", ".join(name for name in TASKS if name in rules.tasks)
        reject(Reason.TASK_UNKNOWN, f"task {quoted(task)}{how} is not one of {choice}")
    return task


def _check_leak(task: str, turns: Turns, label: str | None, stated: str | None, rules: IngestRules) -> None:
    """Reject a question that holds the label that its answer names, unless an earlier answer told it."""
    if stated is not None and rules.stated_label == "reject":
        reject(Reason.ANSWER_LEAKS, f"the question states the correct label, {stated}")
    if task == "reasoning" or rules.leaks == "keep":
        return
    told: set[str] = set()
    for (_, question), (_, answer) in zip(turns[::2], turns[1::2], strict=True):
        named = _labels_in(answer, rules.taxonomy) | ({label} if label else set())
        leaked = _labels_in(_LABELS_LINE.sub("", question), rules.taxonomy) & named - told
        if leaked:
            reject(Reason.ANSWER_LEAKS, f"the question holds {', '.join(sorted(leaked))}, which the answer names")
        told |= _labels_in(answer, rules.taxonomy)


def _labels_in(text: str, taxonomy: Taxonomy) -> set[str]:
    """Return the taxonomy's labels that stand in a text as words, aliases considered, synonyms not."""
    words = {canonical_word(word) for word in re.findall(r"[^\W\d_]+", text)}
    return {label for label in taxonomy.words if label in words or (" " in label and label in text.lower())}
