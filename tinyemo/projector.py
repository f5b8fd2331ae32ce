"""The metric projector: pooled image features to the input-embedding space of a language model (arXiv 2410.07062).

Shape letters: B batch, d encoder width, H hidden width of the language model, C classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from tinyemo.config import ProjectorConfig
from tinyemo.distributed import GlobalBatchNorm1d, GlobalDropout, at_least_float32
from tinyemo.errors import DataError
from tinyemo.label_embeddings import LabelEmbeddings
from tinyemo.local_files import write_atomically

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "projector.safetensors"
LABELS_FILE = "label_embeddings.safetensors"
FORMAT = 1

CardValue = str | int | float | bool


class MetricProjector(nn.Module):
    """Projector: linear, batch norm, GELU, dropout, linear, L2 normalisation.

    Batch statistics and the dropout mask span all ranks, so training does not depend on their number.
    """

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        self.labels: LabelEmbeddings | None = None
        """Label embeddings that came with the weights; None in a projector that was not loaded."""
        self.card: dict[str, CardValue] = {}
        """Origin of the weights; empty in a projector that was not loaded."""
        hidden_width = config.hidden_width or config.hidden_size
        self.layers = nn.Sequential(
            nn.Linear(config.encoder_width, hidden_width),
            GlobalBatchNorm1d(hidden_width),
            nn.GELU(),
            GlobalDropout(config.dropout),
            nn.Linear(hidden_width, config.hidden_size),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, d) float of any dtype to (B, H) float32 (float64 in a float64 projector), L2-normalised.

        Raises:
            DataError: the features have another width than the projector.
        """
        if features.shape[-1] != self.config.encoder_width:
            raise DataError(
                f"the features are {features.shape[-1]} wide and the projector takes {self.config.encoder_width}: "
                "use the features of the encoder it was trained on"
            )
        if self.config.normalize_features:
            features = F.normalize(at_least_float32(features), dim=-1)
        linear = self.layers[0]
        assert isinstance(linear, nn.Linear)
        # Under autocast or in bf16 the last product is rounded; the norm must not be.
        embeds = self.layers(features.to(linear.weight.dtype))
        return F.normalize(at_least_float32(embeds), dim=-1)

    def classify(self, features: Tensor, words: Sequence[str]) -> Tensor:
        """Return the cosine of each image with each word, with running statistics and without dropout.

        Args:
            features: (B, d) float.
            words: C words that `self.labels` knows; aliases are accepted.

        Returns:
            (B, C) float32.

        Raises:
            DataError: the projector has no label embeddings, lacks some words, or takes features of another width.
        """
        if self.labels is None:
            raise DataError("the projector has no label embeddings: load it with MetricProjector.from_pretrained")
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                embeds = self(features)
                texts = F.normalize(self.labels.select(words).to(embeds), dim=-1)
                scores: Tensor = embeds @ texts.T
        finally:
            self.train(was_training)
        return scores

    def save_pretrained(self, folder: Path, *, labels: LabelEmbeddings, card: Mapping[str, CardValue]) -> None:
        """Write config.json, projector.safetensors and label_embeddings.safetensors.

        Each file is written atomically, config.json last and with the digests of the others, so that a folder that was
        left half written does not load.

        Args:
            folder: made if it does not exist.
            labels: embeddings of the words that it was trained on, and of any others worth keeping.
            card: origin of the weights: llm, llm_weights, template, taxonomy, digest and kind of the data.
        """
        if labels.vectors.shape[1] != self.config.hidden_size:
            raise DataError(
                f"the label embeddings are {labels.vectors.shape[1]} wide and the projector maps into "
                f"{self.config.hidden_size}: both must be of the same language model"
            )
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(folder / WEIGHTS_FILE, save(weights))
        labels.save(folder / LABELS_FILE)
        document = {
            "format": FORMAT,
            "projector": self.config.model_dump(),
            "card": dict(card),
            "sha256": {name: _sha256(folder / name) for name in (WEIGHTS_FILE, LABELS_FILE)},
        }
        write_atomically(folder / CONFIG_FILE, (json.dumps(document, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls, folder: Path) -> MetricProjector:
        """Load what `save_pretrained` wrote, on the CPU, in evaluation mode, with `labels` and `card`.

        Raises:
            DataError: the folder or a file is missing, not ours, or differs from what was saved.
        """
        document = _read_config(folder)
        try:
            config = ProjectorConfig.model_validate(document["projector"])
            digests, card = dict(document["sha256"]), dict(document["card"])
            for name in (WEIGHTS_FILE, LABELS_FILE):
                if _sha256(folder / name) != digests[name]:
                    raise DataError(
                        f"{folder / name} is not the file that {CONFIG_FILE} names: save the projector again"
                    )
            weights = load((folder / WEIGHTS_FILE).read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            raise DataError(f"{folder / CONFIG_FILE}: projector.{first['loc'][0]}: {first['msg']}") from error
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise DataError(f"{folder} does not hold a whole projector: {error!r}") from error
        projector = cls(config)
        try:
            # dtype of the file, bit for bit: a projector that was saved in bfloat16 is one again.
            projector.to(weights["layers.0.weight"].dtype).load_state_dict(weights)
        except (KeyError, RuntimeError) as error:
            summary = " ".join(str(error).split())
            raise DataError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {summary}") from error
        projector.labels, projector.card = LabelEmbeddings.load(folder / LABELS_FILE), card
        return projector.eval()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise DataError(f"{folder} holds no projector: it has no {CONFIG_FILE}")
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(f"{path} is not of a projector of format {FORMAT}")
    return document


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
