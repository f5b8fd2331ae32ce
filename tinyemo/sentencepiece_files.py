"""Reader of SentencePiece's `tokenizer.model` (Llama-2 and others) without the sentencepiece package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinyemo.errors import DataError

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
