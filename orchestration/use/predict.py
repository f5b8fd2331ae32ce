"""Labels of images by a projector: each image is encoded by the encoder whose features the projector was trained on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from orchestration.assets.labels import table_of
from orchestration.assets.model_files import COMMIT, EncoderChoice, choose_encoder, describe_choice, open_choice
from orchestration.use.bulk import Job, Row
from orchestration.use.locations import read_image
from tinyemo.classification import predict_labels
from tinyemo.encoders import UNKNOWN, EncoderSpec, encoder_of_card, find_conflict
from tinyemo.errors import ConfigError, DataError
from tinyemo.features import FeatureTable
from tinyemo.images import read_pixels
from tinyemo.label_embeddings import embed_labels
from tinyemo.projector import MetricProjector
from tinyemo.taxonomies import canonical_word, find_taxonomy

CHUNK_IMAGES = 64
"""Images that are read and encoded together."""


def choose_words(model: MetricProjector, taxonomy: str | None, words: str | None) -> tuple[str, ...]:
    """Return the words to tell apart; words without an embedding in the projector are embedded and added to it.

    Args:
        model: projector; its card names the default labels.
        taxonomy: name of a taxonomy, or a file with one.
        words: words, separated by commas, in place of a taxonomy.

    Raises:
        ConfigError: both are given, or neither and the card names no taxonomy.
    """
    if taxonomy and words:
        raise ConfigError("--taxonomy and --words exclude each other: give one of them")
    if words is None and taxonomy is None and isinstance(model.card.get("labels"), str):
        words = str(model.card["labels"])
    if words is not None:
        chosen = tuple(dict.fromkeys(canonical_word(word) for word in words.split(",") if word.strip()))
        if not chosen:
            raise ConfigError(f"--words must name at least one word, got {words!r}")
    else:
        choice = taxonomy or model.card.get("taxonomy")
        if not isinstance(choice, str):
            raise ConfigError("the projector's card names no taxonomy: choose the labels with --taxonomy or --words")
        chosen = find_taxonomy(choice).words
    assert model.labels is not None
    missing = model.labels.missing(chosen)
    if missing:
        model.labels = model.labels.extended(embed_labels(table_of(model), missing, model.labels.template))
    return chosen


def choose_own_encoder(
    model: MetricProjector, encoder: str | None = None, revision: str | None = None
) -> tuple[EncoderChoice, EncoderSpec]:
    """Return the encoder whose features a projector was trained on.

    Args:
        model: projector; its card names the encoder.
        encoder: name or folder in place of the card's, where the card does not say enough to find it.
        revision: commit of `encoder` on the hub.

    Raises:
        ConfigError: the card does not say which encoder, or which version of it.
        AssetError: no source has the encoder's files.
        DataError: the files are those of another encoder.
    """
    trained_on = encoder_of_card(model.card)
    if encoder is not None:
        choice = choose_encoder(encoder, revision)
    elif trained_on is None:
        raise ConfigError("the projector's card names no encoder: name it with --encoder")
    else:
        try:
            commit = trained_on.revision if COMMIT.fullmatch(trained_on.revision) else None
            choice = choose_encoder(trained_on.name, commit)
        except ConfigError as error:
            raise ConfigError(
                f"the projector was trained on features of {trained_on}, whose files cannot be found by that name: "
                "say where they are with --encoder FOLDER, or --encoder OWNER/NAME --revision COMMIT"
            ) from error
    spec = describe_choice(choice)
    found = spec.info
    if trained_on is not None and encoder is not None:
        # The user says where the encoder is, so its name does not matter; its weights do, if they can be compared.
        is_comparable = trained_on.revision.startswith("sha256-") == found.revision.startswith("sha256-")
        changed = {"name": trained_on.name} | ({} if is_comparable else {"revision": UNKNOWN})
        found = found.model_copy(update=changed)
    conflict = find_conflict(trained_on, found)
    if conflict is None and model.config.encoder_width != spec.feature_width:
        conflict = f"it takes {model.config.encoder_width} numbers and {spec.info.name} yields {spec.feature_width}"
    if conflict is not None:
        raise DataError(f"the projector was not trained on features of {spec.info}: {conflict}")
    return choice, spec


@dataclass
class Predictor:
    """Worker that encodes images and ranks words for each."""

    projector: MetricProjector
    words: tuple[str, ...]
    choice: EncoderChoice
    spec: EncoderSpec
    batch_size: int | None = None

    def __post_init__(self) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.encoder = open_choice(self.choice, self.spec, device, self.batch_size)

    def __call__(self, images: Sequence[str]) -> list[Row]:
        """Return for each image its label and the cosine of each word, or the problem with it."""
        rows: dict[str, Row] = {}
        readable, pixels = [], []
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for image, found in zip(images, threads.map(self._read, images), strict=True):
                if isinstance(found, str):
                    rows[image] = {"image": image, "problem": found}
                else:
                    readable.append(image)
                    pixels.append(found)
        if readable:
            features = self.encoder.encode(torch.stack(pixels)).pooled
            is_finite = features.isfinite().all(dim=1)
            table = FeatureTable(readable, None, features.nan_to_num(), self.spec.info)
            for row, is_good in zip(predict_labels(self.projector, table, self.words), is_finite, strict=True):
                image = row.pop("id")
                rows[image] = {"image": image, **row, "problem": None}
                if not is_good:
                    rows[image] = {"image": image, "problem": "its features are NaN or Inf"}
        return [rows[image] for image in images]

    def _read(self, image: str) -> torch.Tensor | str:
        try:
            return torch.from_numpy(read_pixels(read_image(image), self.spec.preprocessing).copy())
        except DataError as error:
            return str(error)


def prediction_job(
    model: MetricProjector,
    words: tuple[str, ...],
    choice: EncoderChoice,
    spec: EncoderSpec,
    *,
    output: Path | None = None,
    num_actors: int | None = None,
    batch_size: int | None = None,
) -> Job:
    """Return the job that predicts labels of images; its settings are the projector's weights, words and encoder."""
    digest = hashlib.sha256(json.dumps([words, spec.model_dump(mode="json")]).encode())
    for name, values in sorted(model.state_dict().items()):
        digest.update(name.encode() + values.float().numpy().tobytes())
    build = partial(Predictor, model, words, choice, spec, batch_size)
    return Job(build, digest.hexdigest()[:12], CHUNK_IMAGES, output, num_actors)
