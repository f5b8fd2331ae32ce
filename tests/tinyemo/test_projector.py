"""The projector: architecture, round trip, precision, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tinyemo.config import ProjectorConfig
from tinyemo.errors import DataError
from tinyemo.families import FAMILY
from tinyemo.label_embeddings import LabelEmbeddings
from tinyemo.projector import CONFIG_FILE, LABELS_FILE, WEIGHTS_FILE, MetricProjector

CARD = {"llm": "smollm2-135m", "llm_weights": "random", "taxonomy": "ekman", "num_train": 12, "generated": True}
WORDS = ("anger", "joy", "cheerfulness")


def trained(hidden_size: int = 32) -> MetricProjector:
    """A projector whose running statistics are not those of a fresh one."""
    torch.manual_seed(0)
    model = MetricProjector(ProjectorConfig(encoder_width=512, hidden_size=hidden_size))
    for _ in range(3):
        model(torch.randn(16, 512) * 2 + 1)
    return model.eval()


def labels(width: int = 32) -> LabelEmbeddings:
    vectors = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    return LabelEmbeddings(WORDS, vectors, "some/llm", "seed-0", "random", "word")


@pytest.mark.parametrize("encoder_width", [512, 768, 1024, 1152, 1280])
def test_the_architecture_is_the_published_one(encoder_width: int):
    for size in FAMILY.values():
        with torch.device("meta"):
            model = MetricProjector(ProjectorConfig(encoder_width=encoder_width, hidden_size=size.hidden_size))
        kinds = (nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Dropout, nn.Linear)
        assert all(isinstance(layer, kind) for layer, kind in zip(model.layers, kinds, strict=True))
        d, h = encoder_width, size.hidden_size
        assert sum(p.numel() for p in model.parameters()) == (d * h + h) + 2 * h + (h * h + h)
    assert ProjectorConfig().dropout == 0.2


def test_it_computes_what_plain_torch_computes():
    model = trained()
    plain = nn.Sequential(nn.Linear(512, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 32)).eval()
    plain.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in model.state_dict().items()})
    x = torch.randn(5, 512)
    assert torch.equal(model(x), nn.functional.normalize(plain(x), dim=-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_unit_length_in_float32(dtype: torch.dtype):
    """Half-precision features as they are stored, and weights in the precision of a GPU run."""
    model = MetricProjector(ProjectorConfig(encoder_width=512, hidden_size=32))
    for module in (model, model.bfloat16()):
        embeds = module.train()(torch.randn(8, 512).to(dtype))
        assert embeds.dtype == torch.float32
        assert torch.allclose(embeds.norm(dim=-1), torch.ones(8), atol=1e-6)
        embeds.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_float64_stays_float64():
    assert MetricProjector(ProjectorConfig(encoder_width=512)).double()(torch.randn(4, 512)).dtype == torch.float64


def test_normalised_features_make_the_scale_of_the_input_irrelevant():
    x = torch.randn(4, 512)
    for is_normalized in (False, True):
        config = ProjectorConfig(encoder_width=512, hidden_size=32, normalize_features=is_normalized)
        torch.manual_seed(0)
        model = MetricProjector(config).eval()
        assert torch.allclose(model(x), model(3 * x), atol=1e-6) is is_normalized


def test_it_comes_back_to_the_last_bit(tmp_path: Path):
    model, vectors = trained(), labels()
    model.save_pretrained(tmp_path / "p", labels=vectors, card=CARD)
    again = MetricProjector.from_pretrained(tmp_path / "p")
    assert {path.name for path in (tmp_path / "p").iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, LABELS_FILE}
    assert again.config == model.config
    assert again.card == CARD
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert again.labels is not None
    assert again.labels.words == WORDS
    assert torch.equal(again.labels.vectors, vectors.vectors)
    x = torch.randn(5, 512)
    assert torch.equal(again(x), model(x))


def test_a_bfloat16_projector_stays_one(tmp_path: Path):
    model = trained().bfloat16()
    model.save_pretrained(tmp_path, labels=labels(), card=CARD)
    again = MetricProjector.from_pretrained(tmp_path)
    assert {name: t.dtype for name, t in again.state_dict().items()} == {
        name: t.dtype for name, t in model.state_dict().items()
    }
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_the_same_projector_is_the_same_file(tmp_path: Path):
    for name in ("a", "b"):
        trained().save_pretrained(tmp_path / name, labels=labels(), card=CARD)
    for name in (CONFIG_FILE, WEIGHTS_FILE, LABELS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_classify_gives_cosines_and_leaves_the_mode_alone(tmp_path: Path):
    trained().save_pretrained(tmp_path, labels=labels(), card=CARD)
    model = MetricProjector.from_pretrained(tmp_path).train()
    x = torch.randn(5, 512)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = model.classify(x, ["joy", "cheerfullness"])
    assert model.training
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    texts = nn.functional.normalize(labels().vectors[[1, 2]], dim=-1)
    assert torch.allclose(scores, model.eval()(x) @ texts.T, atol=1e-6)
    with pytest.raises(DataError, match=r"no label embedding for awe"):
        model.classify(x, ["awe"])


def test_classify_needs_labels():
    with pytest.raises(DataError, match="has no label embeddings"):
        trained().classify(torch.zeros(1, 512), ["joy"])


def test_another_width_is_named_on_both_sides(tmp_path: Path):
    with pytest.raises(DataError, match=r"features are 768 wide and the projector takes 512"):
        trained()(torch.zeros(2, 768))
    with pytest.raises(DataError, match=r"label embeddings are 16 wide and the projector maps into 32"):
        trained().save_pretrained(tmp_path, labels=labels(16), card=CARD)
    with pytest.raises(ValidationError, match="encoder_width"):
        ProjectorConfig(encoder_width=700)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, LABELS_FILE])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped"])
def test_a_damaged_folder_is_one_clear_line(tmp_path: Path, name: str, damage: str):
    trained().save_pretrained(tmp_path, labels=labels(), card=CARD)
    content = (tmp_path / name).read_bytes()
    if damage == "missing":
        (tmp_path / name).unlink()
    else:
        half = len(content) // 2
        broken = {"empty": b"", "cut": content[:half], "flipped": content[:half] + b"\xff" + content[half + 1 :]}
        (tmp_path / name).write_bytes(broken[damage])
    with pytest.raises(DataError) as caught:
        MetricProjector.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_files_of_two_projectors_do_not_load_as_one(tmp_path: Path):
    for name, size in (("a", 32), ("b", 32)):
        model = trained(size)
        nn.init.ones_(model.layers[4].bias) if name == "b" else None
        model.save_pretrained(tmp_path / name, labels=labels(size), card=CARD)
    (tmp_path / "a" / WEIGHTS_FILE).write_bytes((tmp_path / "b" / WEIGHTS_FILE).read_bytes())
    with pytest.raises(DataError, match=r"is not the file that config\.json names"):
        MetricProjector.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 2, "not of a projector of format 1"),
        ("projector", {"encoder_width": 700}, "encoder_width"),
        ("projector", {"encoder_width": 1024, "hidden_size": 32}, "does not fit config.json"),
        ("sha256", {}, "does not hold a whole projector"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(tmp_path: Path, key: str, value: object, message: str):
    trained().save_pretrained(tmp_path, labels=labels(), card=CARD)
    document = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**document, key: value}))
    with pytest.raises(DataError, match=message):
        MetricProjector.from_pretrained(tmp_path)
