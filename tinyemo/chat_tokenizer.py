"""A tokenizer as conversations need it: pieces of a text that continue another, and marks that no text can forge."""

from __future__ import annotations

import json
from typing import Any

from tinyemo.errors import ConfigError

TURN_TEXT = "<|im_start|>"
"""Opens a turn in chatml; a token of its own where the tokenizer has it."""
SPACE_LETTER = "\u2581"
"""SentencePiece's, which it cannot tell from a space."""
_PROBE = "a"


class ChatTokenizer:
    """Encodes the pieces of a conversation one after another.

    A SentencePiece tokenizer puts a space before any text; here only before the first one, so that the pieces'
    ids are those of the whole. A special token's name within a text is encoded as the letters that it is: no record
    can end its own turn.

    Attributes:
        begin_ids: ids that the tokenizer puts before a text: its BOS, or none.
        end_id: closes an answer, and stops generation.
        turn_id: id of `<|im_start|>`; None if the tokenizer has no such token.
    """

    def __init__(self, tokenizer: Any, end_token: str) -> None:
        """Wrap a tokenizers.Tokenizer, which is left as it is.

        Raises:
            ConfigError: it has no such end token.
        """
        from tokenizers import Tokenizer

        end_id = tokenizer.token_to_id(end_token)
        if end_id is None:
            raise ConfigError(f"records.end_token: the tokenizer has no token {end_token!r}")
        self.end_id: int = end_id
        self.turn_id: int | None = tokenizer.token_to_id(TURN_TEXT)
        plain = tokenizer.encode(_PROBE, add_special_tokens=False).ids
        whole = tokenizer.encode(_PROBE).ids
        self.begin_ids: list[int] = whole[: whole.index(plain[0])]
        stored = tokenizer.to_str()
        layout = json.loads(stored)
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            layout[part] = _without_first_space(layout[part])
        self._tokenizer = Tokenizer.from_str(json.dumps(layout))
        self._tokenizer.encode_special_tokens = True
        self._has_first_space = plain != self.encode(_PROBE)

    def encode(self, text: str, *, is_first: bool = False) -> list[int]:
        """Return the ids of a text that continues a sequence or begins it, without special tokens."""
        if is_first and self._has_first_space and text and not text.startswith(" "):
            text = f" {text}"
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, including a first space and without special tokens."""
        text: str = self._tokenizer.decode(ids)
        return text

    def normalize(self, text: str) -> str:
        """Normalise text as the tokenizer does: Qwen2 composes accents, SentencePiece writes a space as its letter."""
        if self._has_first_space:
            text = text.replace(SPACE_LETTER, " ")
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))


def _without_first_space(part: Any) -> Any:
    """A part of tokenizer.json that neither puts a space before a text nor takes it away again.

    Llama's has it as a Metaspace that prepends, or, of old, as a normalizer Prepend; both go with a decoder Strip.
    """
    if not isinstance(part, dict):
        return part
    kept = dict(part)
    if kept["type"] == "Sequence":
        [name] = [name for name in ("normalizers", "pretokenizers", "decoders") if name in kept]
        kept[name] = [inner for inner in map(_without_first_space, kept[name]) if inner is not None]
    elif kept["type"] == "Prepend" or (kept["type"] == "Strip" and kept.get("content") == " "):
        return None
    elif kept["type"] == "Metaspace":
        kept["prepend_scheme"] = "never"
    elif kept["type"] == "ByteLevel":
        kept["add_prefix_space"] = False
    return kept
