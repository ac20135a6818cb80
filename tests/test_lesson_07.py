"""What lesson 07 builds by hand is what the package and PyTorch compute."""

import pytest
import torch
from helpers.lessons import NOTEBOOKS, definitions
from helpers.samples import random_qformer, random_stage1, random_text
from torch.nn.functional import cross_entropy

from blip2_edu.objectives import itg_loss
from blip2_edu.qformer import QFormerConfig, joint_mask

CONFIG = QFormerConfig.tiny()


@pytest.fixture(scope="module")
def lesson():
    return definitions(NOTEBOOKS / "07_itg.ipynb")


@pytest.mark.parametrize("lengths", [[5], [1], [7, 3, 1]])
def test_the_mask(lesson, lengths):
    _, text_mask = random_text(CONFIG, lengths)
    assert torch.equal(lesson["causal_mask"](3, text_mask), joint_mask(3, text_mask, "causal"))


def test_a_pass_under_any_mask(lesson):
    qformer, image = random_qformer(CONFIG), torch.randn(1, 6, CONFIG.image_width)
    ids, text_mask = random_text(CONFIG, [5])
    for pattern in ("unimodal", "bidirectional", "causal"):
        mask = joint_mask(CONFIG.num_queries, text_mask, pattern)
        with torch.no_grad():
            ours = lesson["run"](qformer, qformer.query_tokens, image, ids, mask)
            package = qformer(image, ids, pattern=pattern)
        torch.testing.assert_close(ours, torch.cat([package.queries, package.text], dim=1)[0])


def test_what_an_output_depends_on(lesson):
    """The queries and what is seen of the text; the image reaches a word through the queries."""
    lesson["tiny"] = random_qformer(CONFIG).double()
    lesson["image"] = torch.randn(1, 6, CONFIG.image_width, dtype=torch.double)
    lesson["ids"] = torch.tensor([[63, 5, 6, 7]])
    causal = joint_mask(4, torch.ones(1, 4), "causal")
    image, rest = lesson["depends"](causal).split([1, 8], dim=1)
    assert image.all()
    assert torch.equal(rest, causal[0])
    unimodal = joint_mask(4, torch.ones(1, 4), "unimodal")
    assert lesson["depends"](unimodal)[:, 0].tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_loss(lesson, smoothing):
    logits, labels = 3 * torch.randn(9, 13), torch.randint(13, (9,))
    ours = lesson["smoothed_loss"](logits, labels, smoothing)
    torch.testing.assert_close(ours, cross_entropy(logits, labels, label_smoothing=smoothing))
    torch.testing.assert_close(ours, itg_loss(logits, labels, smoothing))


def test_greedy_writing(lesson):
    """Word by word as without a cache, up to the end and no further than told."""
    model, length = random_stage1(CONFIG), 6
    with torch.no_grad():
        image = model.project_image(torch.randn(1, 5, CONFIG.image_width))
        ids = torch.tensor([[CONFIG.vocab_size - 1]])
        for _ in range(length):
            text = model.qformer(image, ids, pattern="causal").text
            following = model.generate_logits(text[:, -1:]).argmax(dim=-1)
            ids = torch.cat([ids, following], dim=1)
    words = ids[0, 1:].tolist()
    assert lesson["greedy"](model, image, end=-1, length=length) == words
    end = words[-1]
    assert lesson["greedy"](model, image, end, length=length) == words[: words.index(end)]


def test_positions_without_a_cache(lesson):
    assert lesson["positions_without_cache"](16, 3) == 17 + 18 + 19
