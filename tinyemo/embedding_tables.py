"""Input-embedding tables of language models, read row by row: the model itself is never built.

Shape letters: D width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tinyemo.errors import DataError
from tinyemo.tokenizer_files import open_tokenizer

TABLE_TENSORS = (
    "model.embed_tokens.weight",
    "transformer.token_embeddings.weight",
    "transformer.wte.weight",
    "transformer.embd.wte.weight",
)
"""Names of the input embeddings in safetensors: Llama and Phi, OpenELM, GPT-2, early Phi."""
GGUF_TABLE_TENSOR = "token_embd.weight"
DIGEST_ROWS = 4096
WORD_STARTS = ("\u0120", "\u2581")
"""What stands before the first piece of a word: the space of byte-level BPE, and of SentencePiece."""


class EmbeddingTable(Protocol):
    """A language model's tokenizer and input embeddings, read by rows."""

    @property
    def name(self) -> str:
        """Name of the language model."""

    @property
    def revision(self) -> str:
        """Version of the weights: a digest, a commit or a seed."""

    @property
    def width(self) -> int:
        """D."""

    @property
    def is_random(self) -> bool:
        """True where the rows are drawn at random."""

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of `text`, without special tokens."""

    def whole_words(self) -> dict[str, int]:
        """Return the lower-case words of at least three letters that are one token, and their ids; none if random."""

    def rows(self, ids: list[int]) -> Tensor:
        """Return the embeddings of token ids, (len(ids), D) float32."""


class _RandomTable:
    """Rows drawn from each token id alone: the table is never allocated, and the vocabulary is unbounded."""

    is_random = True

    def __init__(self, width: int, seed: int, name: str) -> None:
        self.name = name
        self.revision = f"seed-{seed}"
        self.width = width
        self._seed = seed

    def tokenize(self, text: str) -> list[int]:
        # A digest of each word between spaces is its id.
        digests = [hashlib.blake2b(word.encode(), digest_size=4).digest() for word in text.split()]
        return [int.from_bytes(digest, "big") for digest in digests]

    def whole_words(self) -> dict[str, int]:
        return {}

    def rows(self, ids: list[int]) -> Tensor:
        drawn = np.empty((len(ids), self.width), dtype=np.float32)
        for row, token in zip(drawn, ids, strict=True):
            # A counter-based generator keyed by (seed, token): any row is drawn without drawing those before it.
            generator = np.random.Generator(np.random.Philox(key=np.array([self._seed, token], dtype=np.uint64)))
            row[:] = generator.standard_normal(self.width, dtype=np.float32)
        # The deviation that language models are commonly initialised with; cosines do not depend on it.
        return torch.from_numpy(drawn) * 0.02


class _StoredTable:
    """A table in a file; `read` dequantises the requested rows."""

    is_random = False

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        read: Callable[[list[int]], Tensor],
        tokenizer: Any,
        revision: str | None,
    ) -> None:
        self.name = name
        self.num_rows, self.width = shape
        self._read = read
        self._tokenizer = tokenizer
        self._revision = revision

    @cached_property
    def revision(self) -> str:
        """Given revision, or the first 12 hex digits of the SHA-256 of all rows in float32."""
        if self._revision is not None:
            return self._revision
        digest = hashlib.sha256()
        for start in range(0, self.num_rows, DIGEST_ROWS):
            rows = self._read(list(range(start, min(start + DIGEST_ROWS, self.num_rows))))
            digest.update(rows.contiguous().numpy().tobytes())
        return f"sha256-{digest.hexdigest()[:12]}"

    def tokenize(self, text: str) -> list[int]:
        # Without special tokens, and without a space put before the text.
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def whole_words(self) -> dict[str, int]:
        found = {}
        for piece, token in self._tokenizer.get_vocab().items():
            word = piece[1:]
            if piece[0] in WORD_STARTS and len(word) >= 3 and word.isascii() and word.isalpha() and word.islower():
                found[word] = token
        return dict(sorted(found.items()))

    def rows(self, ids: list[int]) -> Tensor:
        outside = [token for token in ids if not 0 <= token < self.num_rows]
        if outside:
            raise DataError(f"token {outside[0]} lies outside the table of {self.name}, which has {self.num_rows} rows")
        return self._read(ids) if ids else torch.empty((0, self.width))


def random_table(width: int, seed: int, *, name: str = "random") -> EmbeddingTable:
    """Return a seeded table of any width, in place of one that cannot be reached.

    Args:
        width: D.
        seed: in [0, 2**64); row i depends on (seed, i) alone.
        name: language model whose place the table takes.
    """
    return _RandomTable(width, seed, name)


def open_gguf_table(path: Path, *, name: str | None = None, revision: str | None = None) -> EmbeddingTable:
    """Open the table and tokenizer of a GGUF file; only requested rows are read and dequantised.

    Args:
        path: the file.
        name: public name of the language model; None takes the file's own.
        revision: revision of the weights; None takes a digest of the table.

    Raises:
        DataError: no such file, or not such a file.
    """
    from gguf import GGMLQuantizationType, dequantize
    from transformers.integrations.gguf import GgufHeader, load_gguf_state_dict, read_gguf_metadata

    try:
        # transformers walks the header in 0.01 s, where gguf's own reader takes 2 s for the vocabulary.
        header = GgufHeader.from_file(str(path))
        metadata, _ = read_gguf_metadata(str(path))
        table = load_gguf_state_dict(header)[GGUF_TABLE_TENSOR]
        [info] = [info for info in header.tensors if info.name == GGUF_TABLE_TENSOR]
        num_rows, width = info.shape
        blocks = table.data.reshape(num_rows, -1)
    except KeyError as error:
        raise DataError(f"{path} holds no tensor {GGUF_TABLE_TENSOR}: it is no language model's GGUF file") from error
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise DataError(f"{path} cannot be read as GGUF: {error}") from error

    def read(ids: list[int]) -> Tensor:
        rows = dequantize(np.asarray(blocks[ids]), GGMLQuantizationType(info.ggml_type))
        return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32)).reshape(len(ids), width)

    return _StoredTable(
        name or metadata.get("general.name", path.stem), (num_rows, width), read, open_tokenizer(path), revision
    )


def open_safetensors_table(folder: Path, *, name: str | None = None) -> EmbeddingTable:
    """Open the table and tokenizer of a Hugging Face model folder; only requested rows are read.

    Args:
        folder: holds model.safetensors, or shards with model.safetensors.index.json.
        name: public name of the language model; None takes the folder's.

    Raises:
        DataError: no weights, no known name of an embedding table, or no tokenizer.
    """
    from safetensors import SafetensorError, safe_open

    try:
        path, tensor_name = _find_table(folder)
        with safe_open(path, framework="pt") as file:
            num_rows, width = file.get_slice(tensor_name).get_shape()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DataError(f"{folder} holds no readable safetensors weights: {error}") from error

    def read(ids: list[int]) -> Tensor:
        with safe_open(path, framework="pt") as file:
            table = file.get_slice(tensor_name)
            if ids == list(range(ids[0], ids[-1] + 1)):
                rows = table[ids[0] : ids[-1] + 1]
            else:
                rows = torch.cat([table[token : token + 1] for token in ids])
        return torch.as_tensor(rows, dtype=torch.float32)

    return _StoredTable(name or folder.name, (num_rows, width), read, open_tokenizer(folder), None)


def _find_table(folder: Path) -> tuple[Path, str]:
    """Return the file that holds the input embeddings, and the tensor's name in it."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
    else:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            weight_map = dict.fromkeys(file.keys(), "model.safetensors")
    for tensor_name in TABLE_TENSORS:
        if tensor_name in weight_map:
            return folder / weight_map[tensor_name], tensor_name
    raise DataError(f"{folder} holds no input embeddings: it needs one of {', '.join(TABLE_TENSORS)}")
