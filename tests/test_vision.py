"""The frozen encoders: frozen for good, and features equal to those of the networks themselves."""

import hashlib
import json
import weakref

import numpy as np
import pytest
import torch
from helpers import small_models
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTModel,
)

from blip2_edu.errors import WeightsError
from blip2_edu.images import open_image
from blip2_edu.paths import ROOT
from blip2_edu.vision import CLIP_MEAN, CLIP_STD, ImageEncoder, load_image_encoder

EGYPTIAN_CAT = 285
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module", params=["efficientnet-lite0", "efficientnet-lite2"])
def efficientnet(request) -> ImageEncoder:
    return load_image_encoder(request.param)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> ImageEncoder:
    return small_models.image_encoder(tmp_path_factory.mktemp("clip"))


def noise(count: int, size: tuple[int, int] = (50, 40), seed: int = 0) -> list[Image.Image]:
    draw = np.random.default_rng(seed)
    return [Image.fromarray(draw.integers(256, size=(*size, 3), dtype=np.uint8))] * count


def state_hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_efficientnet_knows_a_cat(efficientnet):
    """The network's own classifier, on our pixels: wrong channels, scale or size would not do."""
    pixels = efficientnet.preprocess([open_image(ROOT / "images" / "chelsea.jpg")])
    assert efficientnet.network(pixels).argmax().item() == EGYPTIAN_CAT


def test_efficientnet_features(efficientnet):
    pixels = efficientnet.preprocess(noise(2))
    features = efficientnet(pixels)
    side = {"efficientnet-lite0": 7, "efficientnet-lite2": 9}[efficientnet.name]
    assert features.shape == (2, side**2, 1280)
    assert efficientnet.grid == (side, side) and efficientnet.num_prefix_tokens == 0
    assert (efficientnet.num_features, efficientnet.width) == (side**2, 1280)
    grid = efficientnet.network.extract_features(pixels)  # (B, W, rows, columns)
    assert torch.equal(features[:, side * 2 + 5], grid[:, :, 2, 5])


def test_efficientnet_pixels(efficientnet):
    """What the network was trained on: (value - 127) / 128, squashed, not cropped."""
    size = efficientnet.image_size
    image = noise(1, (size, size))[0]
    pixels = efficientnet.preprocess([image])
    expected = (torch.tensor(np.asarray(image), dtype=torch.float32) - 127) / 128
    torch.testing.assert_close(pixels[0], expected.permute(2, 0, 1), **CLOSE)
    halves = Image.new("RGB", (1000, 10), "black")
    halves.paste("white", (500, 0, 1000, 10))
    wide = efficientnet.preprocess([halves])[0]
    assert wide.shape == (3, size, size)
    assert (wide[:, :, :100] < 0).all() and (wide[:, :, -100:] > 0).all()


def test_images_are_squashed_one_by_one(efficientnet):
    """A batch of large ones never stands in memory at once."""
    alive = []

    def opened():
        for image in noise(1, (900, 700)) + noise(1, (500, 700)) + noise(1, (700, 900)):
            image = image.copy()
            assert sum(one() is not None for one in alive) <= 1
            alive.append(weakref.ref(image))
            yield image

    pixels = efficientnet.preprocess(opened())
    together = noise(1, (900, 700)) + noise(1, (500, 700)) + noise(1, (700, 900))
    assert torch.equal(pixels, efficientnet.preprocess(together))


@pytest.fixture(params=["efficientnet-lite0", "efficientnet-lite2", "clip"])
def encoder(request, clip) -> ImageEncoder:
    return clip if request.param == "clip" else load_image_encoder(request.param)


def test_frozen(encoder):
    """Training a parent for a step changes nothing, batch statistics included."""
    before = state_hash(encoder)
    parent = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(encoder.width, 2)}).train()
    assert parent.training and parent["head"].training
    assert not any(module.training for module in encoder.modules())
    features = encoder(encoder.preprocess(noise(2)))
    assert not features.requires_grad
    optimizer = torch.optim.SGD((p for p in parent.parameters() if p.requires_grad), lr=1.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    parent["head"](features).sum().backward()
    optimizer.step()
    assert all(p.grad is None for p in encoder.parameters())
    assert state_hash(encoder) == before


def test_batch_norm_would_have_moved(efficientnet):
    """That the test above can fail: in training mode the statistics do move."""
    before = state_hash(efficientnet)
    saved = {name: x.clone() for name, x in efficientnet.state_dict().items()}
    efficientnet.network.train()
    efficientnet(efficientnet.preprocess(noise(1)))
    efficientnet.network.eval()
    assert state_hash(efficientnet) != before
    efficientnet.load_state_dict(saved)
    assert state_hash(efficientnet) == before


@pytest.mark.parametrize("kind", ["clip", "blip-2"])
def test_a_vision_tower_equals_transformers(kind, tmp_path):
    encoder = small_models.image_encoder(tmp_path, kind)
    theirs = small_models.vision_network(kind)
    pixels = encoder.preprocess(noise(2, (60, 30)))
    assert pixels.shape == (2, 3, 42, 42)
    expected = theirs(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(encoder(pixels), expected, **CLOSE)
    assert encoder.name == str(tmp_path) and encoder.width == expected.shape[2] == 20
    assert encoder.grid == (3, 3) and encoder.num_prefix_tokens == 1
    assert encoder.num_features == expected.shape[1] == 10


def same_features(encoder: ImageEncoder, theirs: nn.Module) -> None:
    pixels = encoder.preprocess(noise(1))
    expected = theirs(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(encoder(pixels), expected, **CLOSE)


TEXT_SIDE = {
    "vocab_size": 50,
    "hidden_size": 20,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}


def test_the_vision_half_of_a_whole_clip(tmp_path):
    vision = small_models.vision_config(CLIPVisionConfig)
    text = CLIPTextConfig(**TEXT_SIDE)
    torch.manual_seed(0)
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    whole.save_pretrained(tmp_path)
    same_features(load_image_encoder(str(tmp_path)), whole.vision_model)


def test_the_vision_half_of_a_whole_siglip(tmp_path):
    vision = small_models.vision_config(SiglipVisionConfig)
    text = SiglipTextConfig(**TEXT_SIDE)
    torch.manual_seed(0)
    whole = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    whole.save_pretrained(tmp_path)
    encoder = load_image_encoder(str(tmp_path))
    assert encoder.num_prefix_tokens == 0 and encoder.num_features == 9
    same_features(encoder, whole.vision_model)


def test_any_other_vision_tower(tmp_path):
    torch.manual_seed(0)
    theirs = ViTModel(small_models.vision_config(ViTConfig)).eval()
    theirs.save_pretrained(tmp_path)
    same_features(load_image_encoder(str(tmp_path)), theirs)


def test_clip_pixels(clip):
    image = noise(1, (42, 42))[0]
    values = torch.tensor(np.asarray(image) / 255, dtype=torch.float32)
    expected = (values - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(clip.preprocess([image])[0], expected.permute(2, 0, 1), **CLOSE)


def test_a_tower_that_was_trained_on_other_pixels(tmp_path, clip):
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.25]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    encoder = small_models.image_encoder(tmp_path, "clip")
    white = encoder.preprocess([Image.new("RGB", (42, 42), (255, 255, 255))])[0, :, 0, 0]
    torch.testing.assert_close(white, torch.tensor([1.0, 1.2, 2.8]), **CLOSE)
    assert encoder.fingerprint() != clip.fingerprint()  # their features are not to be mixed up


def test_features_do_not_depend_on_the_batch(encoder):
    images = noise(1) + noise(1, (31, 77), seed=1) + noise(1, (224, 224), seed=2)
    together = encoder(encoder.preprocess(images))
    for image, features in zip(images, together, strict=True):
        alone = encoder(encoder.preprocess([image]))[0]
        torch.testing.assert_close(alone, features, atol=1e-4, rtol=1e-4)


def test_the_fingerprint_sees_weights_and_preprocessing(tmp_path):
    first, second = (small_models.image_encoder(tmp_path / name) for name in ("a", "b"))
    assert first.fingerprint() == second.fingerprint()
    next(second.network.parameters()).data.view(-1)[0] += 1e-3
    assert first.fingerprint() != second.fingerprint()
    third = small_models.image_encoder(tmp_path / "a")
    third._mean = third._mean + 0.1
    assert first.fingerprint() != third.fingerprint()


def damaged(kind: str, folder) -> str:
    small_models.image_encoder(folder)
    if kind == "truncated":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
    elif kind == "no weights":
        (folder / "model.safetensors").unlink()
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "text as config":
        (folder / "config.json").write_text("Dear reader,\n\nthis is a letter.\n")
    elif kind == "a tensor less":
        tensors = load_file(folder / "model.safetensors")
        tensors.popitem()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    elif kind == "language model":
        small_models.save_language_model("llama", folder)
    return str(folder)


DAMAGES = (
    "truncated",
    "no weights",
    "a tensor less",
    "no config",
    "text as config",
    "language model",
)


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_no_vision_tower_is_one_sentence(kind, tmp_path):
    with pytest.raises(WeightsError) as error:
        load_image_encoder(damaged(kind, tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
