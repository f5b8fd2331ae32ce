"""A Ray cluster with an empty folder in S3, a corpus of broken records, and encoders with random weights as folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from broken_records import Corpus, write_corpus
from vision_files import CLIP_WIDTH

from tinyemo.efficientnet import EfficientNetLite0
from tinyemo.encoders import EFFICIENTNET_FILE


@pytest.fixture
def s3_folder(cluster: str, s3_root: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty folder in S3, and Ray to work on it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return s3_root


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights, tagged so, whose projected embedding is as wide as CLIP B/16's."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("encoders") / "tiny-clip"
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=CLIP_WIDTH,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "tinyemo_weights": "random"}))
    return folder


@pytest.fixture(scope="module")
def untrained_efficientnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EfficientNet-Lite0 as its asset lies there, with weights that nobody trained: slow enough to be killed."""
    folder = tmp_path_factory.mktemp("encoders") / "untrained-lite0"
    folder.mkdir()
    torch.manual_seed(0)
    torch.save(EfficientNetLite0().state_dict(), folder / EFFICIENTNET_FILE)
    return folder
