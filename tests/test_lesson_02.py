"""What lesson 02 defines, against the package, PyTorch and transformers."""

from copy import deepcopy

import pytest
import torch
from helpers.lessons import NOTEBOOKS, definitions
from torch import nn
from torch.nn import functional as F

from blip2_edu.paths import ROOT
from blip2_edu.vision import ImageEncoder, load_image_encoder


@pytest.fixture(scope="module")
def lesson() -> dict:
    return definitions(NOTEBOOKS / "02_frozen_image_encoder.ipynb")


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    return load_image_encoder()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 288, 288, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_stages_end_in_the_encoders_features(lesson, encoder, pixels):
    maps = lesson["stages"](encoder.network, pixels)
    assert list(maps) == ["stem", *(f"block {i}" for i in range(21)), "head"]
    assert torch.equal(maps["head"].flatten(2).mT, encoder(pixels))


def test_the_last_stages_go_on_where_the_others_end(lesson, encoder, pixels):
    last = lesson["LastStages"](encoder.network, 15).eval()
    maps = lesson["below"](encoder.network, 15, pixels)
    assert torch.equal(maps, lesson["stages"](encoder.network, pixels)["block 14"])
    expected = encoder(pixels).mean(dim=1)
    torch.testing.assert_close(last(maps), expected, atol=1e-4, rtol=1e-4)
    assert all(p.requires_grad for p in last.parameters())
    assert not any(p.requires_grad for p in encoder.parameters())


def test_patchify_agrees_with_unfold(lesson):
    images = torch.randn(2, 3, 28, 42)
    patches = lesson["patchify"](images, 14)
    unfolded = F.unfold(images, 14, stride=14)  # (B, C x size x size, N), colour by colour
    by_color = unfolded.unflatten(1, (3, 14, 14)).permute(0, 4, 2, 3, 1)
    assert torch.equal(patches, by_color.flatten(2))


def test_similarity_is_the_cosine(lesson):
    features = torch.randn(6, 20)
    alike = lesson["similarity"](features, 4)
    torch.testing.assert_close(alike, F.cosine_similarity(features, features[4:5]))
    assert alike.argmax() == 4


def test_pca_colors_follow_the_main_direction(lesson):
    torch.manual_seed(0)
    along = torch.randn(200)
    features = 5 * along[:, None] * torch.eye(8)[3] + 0.1 * torch.randn(200, 8) + 7
    colors = lesson["pca_colors"](features)
    assert colors.shape == (200, 3) and colors.min() == 0 and colors.max() == 1
    agreement = torch.corrcoef(torch.stack([colors[:, 0], along]))[0, 1]
    assert agreement.abs() > 0.95


def test_the_hash_sees_parameters_and_buffers(lesson):
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = lesson["state_hash"](network)
    assert lesson["state_hash"](deepcopy(network)) == before
    network[1].running_mean[2] += 1e-3
    assert lesson["state_hash"](network) != before


def test_what_is_kept_for_the_backward_pass(lesson):
    """A linear layer keeps its input, a ReLU its output; without gradients nothing is kept."""
    network = nn.Sequential(nn.Linear(10, 20), nn.ReLU())
    x = torch.randn(8, 10)
    kept = lesson["kept_for_backward"](network, x)
    assert kept == pytest.approx(4 * (8 * 10 + 8 * 20) / 1e6)
    assert lesson["kept_for_backward"](network.requires_grad_(False), x) == 0


def test_the_names_of_the_classes():
    lines = (ROOT / "data" / "imagenet_classes.txt").read_text().splitlines()
    names = [line for line in lines if not line.startswith("#")]
    assert len(names) == 1000 and all(name == name.strip() != "" for name in names)
    known = {0: "tench", 207: "golden retriever", 285: "Egyptian cat", 388: "giant panda"}
    known |= {555: "fire engine", 736: "pool table", 817: "sports car", 967: "espresso"}
    assert {i: names[i] for i in known} == known
