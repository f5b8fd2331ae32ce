"""Tokenizers from the files of language models."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from tinyemo.errors import DataError, one_line

SENTENCEPIECE_FILE = "tokenizer.model"
_BPE = 2
"""TrainerSpec.ModelType of byte-pair encoding; Unigram, the other common one, is 1."""


def open_sentencepiece(path: Path) -> Any:
    """Open a byte-pair SentencePiece file as a tokenizers.Tokenizer that puts BOS first and falls back to bytes.

    transformers reads such a file only with the sentencepiece package; its parts that need no more than protobuf do the
    same. Runs of spaces are kept, as Llama does, also where the file asks for them to be squeezed.

    Raises:
        DataError: the file is no SentencePiece model, or one of another kind.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    model = import_protobuf().ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise DataError(f"{path} is no SentencePiece model: {error}") from error
    if model.trainer_spec.model_type != _BPE or not model.trainer_spec.byte_fallback:
        raise DataError(f"{path} holds no byte-pair model with bytes as fallback, the only kind that is read")
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    unknown, begin, end = (
        model.pieces[getattr(model.trainer_spec, f"{name}_id")].piece for name in ("unk", "bos", "eos")
    )
    return LlamaTokenizer(
        vocab=vocabulary,
        # Pieces stand in the order in which they were merged.
        merges=generate_merges(vocabulary, None),
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        add_bos_token=True,
    ).backend_tokenizer


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
        raise DataError(f"{source} holds no tokenizer that transformers can read: {one_line(error)}") from error


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
