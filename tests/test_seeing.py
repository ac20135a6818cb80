"""Maps of one text or one word: their gradients by another way, and that looking changes nothing.

The package never holds attention weights that a gradient could reach: its kernel is fused. Here
every attention is written out instead, and autograd gives the gradient of its weights.
"""

import copy

import numpy as np
import pytest
import torch
from helpers import small_models
from PIL import Image
from test_blip2 import published

from blip2_edu.blip2 import Blip2
from blip2_edu.errors import WeightsError
from blip2_edu.images import ImageError
from blip2_edu.seeing import attention_rollout, match_attention, match_relevance, word_attention

PHOTOS = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    for seed in range(3)
]
TEXTS = ["the dog runs", "a red car on grass", "cat"]
KERNEL = "blip2_edu.attention.scaled_dot_product_attention"
FEATURES = 10  # a class token and 3 x 3 patches
CLOSE = {"atol": 1e-6, "rtol": 1e-4}


@pytest.fixture(scope="module", params=small_models.KINDS)
def any_model(request, tmp_path_factory) -> Blip2:
    return small_models.blip2(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Blip2:
    return small_models.blip2(tmp_path_factory.mktemp("blip2"))


class WrittenOut:
    """Attention written out, its cross-attention weights kept; `nudge` is added to one of them."""

    def __init__(self, nudge: tuple[int, tuple[int, ...], float] | None = None):
        self.kept, self.nudge = [], nudge

    def __call__(self, query, key, value, attn_mask=None, dropout_p=0.0):
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        weights = scores.softmax(dim=-1)
        if weights.shape[-1] == FEATURES:
            if self.nudge and self.nudge[0] == len(self.kept):
                _, place, size = self.nudge
                weights = weights.index_put([torch.tensor(i) for i in place], weights[place] + size)
            self.kept.append(weights)
        return weights @ value


def by_autograd(score: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
    gradients = torch.autograd.grad(score.sum(), kept, retain_graph=True)
    parts = [(w * g).clamp(min=0).sum(dim=(1, 2)) for w, g in zip(kept, gradients, strict=True)]
    return sum(parts)[:, 1:].unflatten(1, (3, 3)).detach()


def match_score(model: Blip2, features: torch.Tensor) -> torch.Tensor:
    logits = model.stage1.match(
        model.stage1.project_image(features.requires_grad_()), *model.stage1.tokenizer(TEXTS)
    )
    return logits[:, 1] - logits[:, 0]


def test_a_match_map_equals_autograd_through_attention_written_out(model, monkeypatch):
    maps = match_attention(model, PHOTOS, TEXTS)
    monkeypatch.setattr(KERNEL, written := WrittenOut())
    score = match_score(model, model.encode_images(PHOTOS))
    assert len(written.kept) == 2 and maps.shape == (3, 3, 3)
    torch.testing.assert_close(maps, by_autograd(score, written.kept), **CLOSE)


def test_the_gradient_is_what_a_nudged_weight_changes(model, monkeypatch):
    exact = copy.deepcopy(model).double()
    features = exact.encode_images(PHOTOS)
    monkeypatch.setattr(KERNEL, written := WrittenOut())
    score = match_score(exact, features)
    gradients = torch.autograd.grad(score.sum(), written.kept)
    for block, place in ((0, (0, 1, 2, 3)), (0, (2, 0, 3, 9)), (1, (1, 2, 0, 5))):
        monkeypatch.setattr(KERNEL, WrittenOut((block, place, 1e-5)))
        change = (match_score(exact, features) - score)[place[0]].item() / 1e-5
        assert change == pytest.approx(gradients[block][place].item(), rel=1e-3, abs=1e-7)


def test_word_maps_equal_autograd_through_attention_written_out(any_model, monkeypatch):
    maps = word_attention(any_model, PHOTOS, TEXTS)
    assert [len(some) for some in maps] == [3, 5, 1]
    monkeypatch.setattr(KERNEL, written := WrittenOut())
    soft_prompt = any_model.bridge(any_model.encode_images(PHOTOS).requires_grad_())
    prompts = [any_model.config.prompts.caption] * 3
    scores = any_model.language_model.log_likelihoods(soft_prompt, prompts, TEXTS)
    for row, text in enumerate(TEXTS):
        end = 0
        for number, word in enumerate(text.split()):  # a letter is a token, and so is a space
            start, end = end, min(len(text), end + len(word) + 1)
            expected = by_autograd(scores[row, start:end].sum(), written.kept)[row]
            torch.testing.assert_close(maps[row][number], expected, **CLOSE)


def test_one_at_a_time_is_the_same(any_model):
    words, matches = (
        word_attention(any_model, PHOTOS, TEXTS),
        match_attention(any_model, PHOTOS, TEXTS),
    )
    rollouts = attention_rollout(any_model, PHOTOS)
    for i, (photo, text) in enumerate(zip(PHOTOS, TEXTS, strict=True)):
        torch.testing.assert_close(word_attention(any_model, photo, [text])[0], words[i], **CLOSE)
        torch.testing.assert_close(
            match_attention(any_model, photo, [text])[0], matches[i], **CLOSE
        )
        torch.testing.assert_close(attention_rollout(any_model, photo)[0], rollouts[i], **CLOSE)


def hooks(model) -> list[int]:
    """How many hooks each module has; the language model's head has one of its own."""
    return [len(module._forward_pre_hooks) for module in model.modules()]


def test_looking_leaves_the_model_as_it_was(model):
    features, hooks_before = model.encode_images(PHOTOS), hooks(model)

    def outputs() -> list[torch.Tensor]:
        return [model.bridge(features), model.match(PHOTOS[0], TEXTS).score]

    before = [x.detach() for x in outputs()]
    learns = [p.requires_grad for p in model.parameters()]
    maps = [match_attention(model, PHOTOS, TEXTS), *word_attention(model, PHOTOS, TEXTS)]
    match_relevance(model.stage1, features, *model.stage1.tokenizer(TEXTS))
    for x, y in zip(before, outputs(), strict=True):
        assert torch.equal(x, y)
    assert not any(map.requires_grad for map in maps) and not features.requires_grad
    assert learns == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert hooks(model) == hooks_before


def test_nothing_stays_attached_when_it_goes_wrong(model, monkeypatch):
    monkeypatch.setattr("blip2_edu.seeing._weigh_by_gradient", lambda *_: 1 / 0)
    hooks_before = hooks(model)
    with pytest.raises(ZeroDivisionError):
        match_attention(model, PHOTOS, TEXTS)
    assert hooks(model) == hooks_before


@torch.no_grad()
def test_maps_can_be_had_where_gradients_are_switched_off(model):
    assert match_attention(model, PHOTOS, TEXTS).max() > 0
    assert word_attention(model, PHOTOS, TEXTS)[0].max() > 0


def test_what_belongs_to_no_place_is_left_out(model):
    relevance = match_relevance(
        model.stage1, model.encode_images(PHOTOS), *model.stage1.tokenizer(TEXTS)
    )
    assert relevance.shape == (3, FEATURES) and (relevance >= 0).all()
    maps = match_attention(model, PHOTOS, TEXTS)
    torch.testing.assert_close(maps.flatten(1), relevance[:, 1:])


def test_an_empty_text_has_no_maps(model):
    assert word_attention(model, PHOTOS[0], [""])[0].shape == (0, 3, 3)
    nothing, something = word_attention(model, PHOTOS[:2], ["", "a dog"])
    assert nothing.shape == (0, 3, 3) and something.shape == (2, 3, 3)


@torch.no_grad()
def test_rollout_equals_products_of_whole_matrices(model):
    """With the features among what is asked, every attention is one square matrix."""
    read = model.bridge.look(model.encode_images(PHOTOS))
    queries = small_models.QFORMER.num_queries
    flow = torch.eye(queries + FEATURES).expand(3, -1, -1)
    cross = list(read.cross_attention)
    for number, self_attention in enumerate(read.self_attention):
        steps = [(slice(0, queries), self_attention)]
        if number % 2 == 0:
            steps.append((slice(queries, None), cross[number // 2]))
        for columns, weights in steps:
            step = torch.eye(queries + FEATURES).repeat(3, 1, 1)
            step[:, :queries] /= 2
            step[:, :queries, columns] += weights.mean(dim=1) / 2
            flow = step @ flow
    expected = flow[:, :queries, queries + 1 :].unflatten(2, (3, 3))
    torch.testing.assert_close(attention_rollout(model, PHOTOS), expected, **CLOSE)
    assert flow.sum(dim=-1).allclose(torch.ones(3, queries + FEATURES))  # nothing is lost


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_published_model_shows_words_and_has_no_matching(kind, tmp_path):
    published(kind).save_pretrained(tmp_path)
    small_models.tokenizer(kind).save_pretrained(tmp_path)
    model = Blip2.from_pretrained(tmp_path)
    (maps,) = word_attention(model, PHOTOS[0], ["a dog"])
    assert maps.shape == (2, 3, 3) and maps.isfinite().all()
    assert attention_rollout(model, PHOTOS).shape == (3, small_models.QFORMER.num_queries, 3, 3)
    with pytest.raises(WeightsError, match="stage-1"):
        match_attention(model, PHOTOS[0], ["a dog"])


def test_a_bad_image_is_an_image_error(model):
    for look in (match_attention, word_attention):
        with pytest.raises(ImageError):
            look(model, b"no image", ["a dog"])
