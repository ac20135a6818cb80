"""What lesson 11 defines, against the package and by hand, so that they cannot drift apart."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import small_models
from helpers.lessons import NOTEBOOKS, SOLUTIONS, definitions
from PIL import Image
from torch import nn

from blip2_edu.blip2 import Blip2
from blip2_edu.data.scenes import KINDS
from blip2_edu.metrics import pointing_game
from blip2_edu.seeing import attention_maps, match_attention, match_relevance

LESSON = definitions(NOTEBOOKS / "11_seeing_attention.ipynb")
SOLVED = definitions(SOLUTIONS / "11_seeing_attention.ipynb")
PHOTOS = [Image.effect_noise((40, 30), 90).convert("RGB").rotate(angle) for angle in (0, 180)]
TEXTS = ["the dog runs on grass", "a car"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Blip2:
    return small_models.blip2(tmp_path_factory.mktemp("blip2"))


def test_the_map_by_hand_equals_the_packages(model):
    features, text = model.encode_images(PHOTOS), model.stage1.tokenizer(TEXTS)
    hooks_before = [len(module._forward_pre_hooks) for module in model.modules()]
    by_hand = LESSON["match_by_hand"](model.stage1, features, *text)
    torch.testing.assert_close(by_hand, match_relevance(model.stage1, features, *text))
    assert hooks_before == [len(module._forward_pre_hooks) for module in model.modules()]
    score, *_ = LESSON["watch_reading"](model.stage1, features, *text)
    logits = model.stage1.match(model.stage1.project_image(features), *text)
    torch.testing.assert_close(score.detach(), (logits[:, 1] - logits[:, 0]).detach())


def test_sharpness():
    flat, peak = torch.ones(2, 3, 4), torch.zeros(3, 4)
    peak[1, 2] = 0.5
    assert LESSON["sharpness"](flat) == 1
    assert LESSON["sharpness"](peak) == pytest.approx(12)
    assert LESSON["sharpness"](torch.stack([flat[0], peak])) == pytest.approx(6.5)


def test_shuffling_keeps_the_numbers_and_the_frozen_models(model):
    before = copy.deepcopy(model.state_dict())
    other = LESSON["shuffled"](model)
    assert other.language_model is model.language_model
    assert other.image_encoder is model.image_encoder
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), name
    readers = (
        (model.bridge.qformer, other.bridge.qformer),
        (model.stage1.qformer, other.stage1.qformer),
    )
    for ours, theirs in readers:
        x, y = ours.query_tokens.flatten(), theirs.query_tokens.flatten()
        assert not torch.equal(x, y) and torch.equal(x.sort().values, y.sort().values)


def test_the_methods_give_a_map_for_every_image(model):
    maps = LESSON["maps_of"](model, PHOTOS, model.encode_images(PHOTOS), TEXTS)
    assert all(some.shape == (2, 3, 3) and (some >= 0).all() for some in maps.values())
    assert (maps["maximum over queries"] >= maps["mean over queries"]).all()
    packages = attention_maps(model, PHOTOS).mean(dim=(1, 2))
    torch.testing.assert_close(maps["mean over queries"], packages)
    packages = match_attention(model, PHOTOS, TEXTS)
    torch.testing.assert_close(maps["gradient, matched text"], packages)


def test_how_alike_maps_are():
    apart = torch.eye(4).view(4, 2, 2)
    assert LESSON["alike"](apart) == 0
    assert LESSON["alike"](torch.stack([apart[0], 3 * apart[0]])) == pytest.approx(1)
    assert LESSON["alike"](apart[[0, 0, 1]]) == pytest.approx(1 / 3)


class Mosaic:
    """An encoder whose feature is the mean colour of its patch, or of the patch beside it."""

    image_size, grid = 288, (9, 9)

    def __init__(self, right: int):
        self.right = right

    def preprocess(self, images: list[Image.Image]) -> torch.Tensor:
        return torch.from_numpy(np.stack(images)).float().permute(0, 3, 1, 2)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = nn.functional.avg_pool2d(pixels, 32).roll(self.right, dims=3)
        return patches.flatten(2).mT


@pytest.mark.parametrize("right", [0, 1])
def test_the_pointers_error_is_measured(right):
    torch.manual_seed(0)
    error = LESSON["pointer_error"](Mosaic(right))
    torch.testing.assert_close(error, torch.tensor([right, 0.0]), atol=0.1, rtol=0)


def test_a_map_is_moved_by_the_error():
    attention = torch.zeros(9, 9)
    attention[4, 4] = 1
    for error, row, column in ((0.5, 40, 40), (0.0, 45, 45)):
        fine = LESSON["moved"](attention, torch.tensor([error, error]))
        assert fine.shape == (90, 90) and (fine >= 0).all()
        peak = (fine == fine.max()).nonzero().float().mean(dim=0)
        torch.testing.assert_close(peak, torch.tensor([row, column]) - 0.5, atol=0.6, rtol=0)


def test_rank_correlation():
    a = torch.rand(3, 4, 5)
    order = LESSON["rank_correlation"]
    torch.testing.assert_close(order(a, a.exp()), torch.ones(3).double())
    torch.testing.assert_close(order(a, -a), -torch.ones(3).double())
    few = torch.tensor([[[1.0, 2, 3, 4]]])
    other = torch.tensor([[[2.0, 1, 4, 3]]])
    assert order(few, other).item() == pytest.approx(1 - 6 * 4 / (4 * 15))  # Spearman's formula


def test_scenes_name_every_shape_once():
    for scene in LESSON["clear_scenes"](5, first_seed=0):
        shapes = scene.shapes
        assert len(shapes) > 1
        assert len({s.kind for s in shapes}) == len({s.color for s in shapes}) == len(shapes)


def test_a_grown_box_is_hit_by_the_cells_that_touch_it():
    LESSON["size"], LESSON["margin"] = (70, 70), 5.0
    cells = torch.eye(49).view(49, 7, 7)
    boxes = LESSON["grown"]([(22, 41, 28, 52)])
    hits = LESSON["play"](cells, [boxes] * 49).view(7, 7)
    for row in range(7):
        for column in range(7):
            x, y = 10 * column, 10 * row
            touches = x <= 28 and x + 10 >= 22 and y <= 52 and y + 10 >= 41
            assert hits[row, column] == touches
            assert touches == pointing_game(cells[7 * row + column], boxes, (70, 70))
    slipped = LESSON["play"](cells, [boxes] * 49, torch.tensor([1.0, 2.0])).view(7, 7)
    assert torch.equal(slipped[2:, 1:], hits[:-2, :-1])  # a column further right, two rows lower


@pytest.mark.parametrize("misses, outcome", [(5, "clearly beats"), (55, "does not clearly beat")])
def test_the_verdict_needs_more_than_luck(misses, outcome, capsys):
    hits = (torch.arange(100) >= misses).float()
    LESSON["guesses"] = {"named": {"chance": torch.full((100,), 0.4)}}
    LESSON["verdict"]({"weak": (torch.zeros(100),) * 2, "best": (hits, hits)})
    assert capsys.readouterr().out.startswith(f"best {outcome} chance")


def test_the_verdict_compares_the_same_scenes(capsys):
    """A guess that fails only where a method did not play is not beaten."""
    LESSON["guesses"] = {"named": {"centre": (torch.arange(100) < 40).float()}}
    LESSON["verdict"]({"word": (torch.ones(40), torch.ones(40))})
    assert "does not clearly beat centre: +0%" in capsys.readouterr().out


def test_every_word_is_asked_of_every_scene(model):
    LESSON.update(words=["a", "b", "c"], model=model)
    features = model.encode_images(PHOTOS)
    with torch.no_grad():
        together = LESSON["judge"](model.stage1, features).view(2, 3, 2)
        for scene in range(2):
            for word in range(3):
                image = model.stage1.project_image(features[scene : scene + 1])
                ids = torch.tensor([[0, 1 + word]])
                alone = model.stage1.match(image, ids, torch.ones_like(ids))[0]
                torch.testing.assert_close(together[scene, word], alone, atol=1e-5, rtol=0)


def test_the_words_of_a_scene():
    LESSON["words"] = KINDS
    scene = SimpleNamespace(shapes=[SimpleNamespace(kind="star"), SimpleNamespace(kind="square")])
    assert LESSON["true_words"]([scene]).tolist() == [[0, 1, 0, 1]]


def test_rollout_as_solved_equals_the_packages(model):
    """In the tiny model every second block looks, so its other blocks look at nothing."""
    from blip2_edu.seeing import attention_rollout

    blind = copy.deepcopy(model)
    blind.bridge.qformer.layers = nn.ModuleList([model.bridge.qformer.layers[0]])
    with torch.no_grad():
        read = blind.bridge.look(blind.encode_images(PHOTOS))
    seen = [
        SOLVED["rollout"]([read.self_attention[0].mean(1)[i]], [read.cross_attention[0].mean(1)[i]])
        for i in range(2)
    ]
    folded = SOLVED["fold_patches"](torch.stack(seen), 1, 3)
    torch.testing.assert_close(folded, attention_rollout(blind, PHOTOS))
