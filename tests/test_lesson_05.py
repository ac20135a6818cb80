"""What lesson 05 defines is what the package does."""

import math

import pytest
import torch
from helpers.lessons import NOTEBOOKS, definitions
from helpers.samples import random_image, random_stage1, random_text
from torch.nn.functional import normalize

from blip2_edu.objectives import itc_loss, itc_similarity
from blip2_edu.qformer import QFormerConfig

TINY = QFormerConfig.tiny()
LESSON = definitions(NOTEBOOKS / "05_itc.ipynb")


def embeddings(batch, seed=0):
    torch.manual_seed(seed)
    images, texts = torch.randn(batch, 3, 8), torch.randn(batch, 8)
    return normalize(images, dim=-1), normalize(texts, dim=-1)


def test_similarity():
    images, texts = embeddings(6)
    found = LESSON["best_query_similarity"](images, texts[:4])
    torch.testing.assert_close(found, itc_similarity(images, texts[:4]))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.3])
def test_loss(label_smoothing):
    images, texts = embeddings(6)
    found = LESSON["contrastive_loss"](itc_similarity(images, texts), 0.07, label_smoothing)
    expected = itc_loss(images, texts, 0.07, label_smoothing=label_smoothing)
    torch.testing.assert_close(found, expected)


def test_the_floor_is_the_lowest_loss():
    """Found by descent on the scores of a single row, with PyTorch's own loss."""
    scores = torch.zeros(1, 5, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=200)

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(scores, torch.tensor([2]), label_smoothing=0.1)
        value.backward()
        return value

    optimizer.step(loss)
    assert LESSON["lowest_loss"](5, 0.1) == pytest.approx(loss().item(), abs=1e-5)
    assert LESSON["lowest_loss"](2, 0.1) < math.log(2)


def test_ranks_together_are_the_joined_batch():
    images, texts = embeddings(6)
    parts = list(images.split(2)), list(texts.split(2))
    losses = [LESSON["loss_of_rank"](rank, *parts, 0.07) for rank in range(3)]
    torch.testing.assert_close(sum(losses) / 3, itc_loss(images, texts, 0.07))


@pytest.mark.parametrize("chunk", [1, 4, 6])
def test_cached_gradients_are_the_gradients(chunk):
    model, (ids, mask) = random_stage1(TINY), random_text(TINY, [5, 3, 4, 5, 2, 4])
    batch = random_image(TINY, 6, 4), ids, mask
    loss = model(*batch, objectives=["itc"])["itc"]
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.testing.assert_close(LESSON["cached_backward"](model, *batch, chunk), loss.detach())
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_graph_megabytes_grow_with_the_batch():
    model, (ids, mask) = random_stage1(TINY), random_text(TINY, [4] * 8)
    image = random_image(TINY, 8, 4)
    whole = LESSON["graph_megabytes"](model, image, ids, mask)
    half = LESSON["graph_megabytes"](model, image[:4].clone(), ids[:4].clone(), mask[:4].clone())
    assert 0.4 * whole < half < 0.6 * whole
