"""Tokenizers from the files of language models."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from tinyemo.errors import DataError
from tinyemo.sentencepiece_files import SENTENCEPIECE_FILE, open_sentencepiece


def open_tokenizer(source: Path) -> Any:
    """Open the tokenizer of a GGUF file, of `tokenizer.model`, or of a folder with that or Hugging Face's files.

    Raises:
        DataError: `source` holds no tokenizer that transformers can read.
    """
    pieces = source if source.name == SENTENCEPIECE_FILE else source / SENTENCEPIECE_FILE
    if pieces.is_file() and not (source / "tokenizer.json").is_file():
        return open_sentencepiece(pieces)
    try:
        return _gguf_tokenizer(source) if source.is_file() else _folder_tokenizer(source)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, struct.error) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{source} holds no tokenizer that transformers can read: {reason}") from error


def _gguf_tokenizer(path: Path) -> Any:
    """Open a tokenizers.Tokenizer from the vocabulary in a GGUF file."""
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    # AutoTokenizer.from_pretrained(gguf_file=...) gives the same ids in 4.5 s instead of 0.5 s.
    architecture, vocabulary, _ = get_gguf_tokenizer(str(path))
    tokenizer, _ = convert_gguf_tokenizer(architecture, vocabulary)
    return tokenizer


def _folder_tokenizer(folder: Path) -> Any:
    """Open a tokenizers.Tokenizer from a Hugging Face model folder; code in the folder is never run."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).backend_tokenizer
