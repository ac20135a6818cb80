"""The three losses as plain functions: against loops written out, and where they must not look."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from blip2_edu.objectives import (
    itc_loss,
    itc_similarity,
    itg_loss,
    itm_loss,
    query_overlap,
    sample_hard_negatives,
)


def embeddings(batch: int, queries: int = 3, width: int = 5, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, queries, width, generator=generator, dtype=torch.float64)
    texts = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    return [normalize(images, dim=-1), normalize(texts, dim=-1)]


def itc_by_loops(images, texts, temperature, image_ids, smoothing) -> float:
    """The paper's sentence, number by number: best query, two softmaxes, shared targets."""
    batch = len(texts)
    similarity = [[max(float(q @ text) for q in image) for text in texts] for image in images]
    total = 0.0
    for row in range(batch):
        partners = [i for i in range(batch) if image_ids[i] == image_ids[row]]
        image_to_text = [similarity[row][i] / temperature for i in range(batch)]
        text_to_image = [similarity[i][row] / temperature for i in range(batch)]
        for scores in (image_to_text, text_to_image):
            log_sum = math.log(sum(math.exp(s) for s in scores))
            for i, score in enumerate(scores):
                target = smoothing / batch + (1 - smoothing) * (i in partners) / len(partners)
                total -= target * (score - log_sum)
    return total / batch / 2


@pytest.mark.parametrize("image_ids", [[0, 1, 2, 3], [7, 3, 7, 7], [1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_itc_equals_loops(image_ids, smoothing):
    images, texts = embeddings(4)
    loss = itc_loss(images, texts, 0.3, torch.tensor(image_ids), smoothing)
    expected = itc_by_loops(images, texts, 0.3, image_ids, smoothing)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_itc_without_ids_takes_all_images_for_different():
    images, texts = embeddings(4)
    expected = itc_loss(images, texts, 0.07, torch.tensor([5, 2, 9, 4]))
    assert itc_loss(images, texts, 0.07) == expected


def test_the_best_query_decides():
    images = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [-1.0, 0.0]]])
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    expected = torch.tensor([[1.0, 0.8, 0.0], [-1.0, -0.6, 1.0]])
    torch.testing.assert_close(itc_similarity(images, texts), expected)


def test_similarity_is_precise_under_autocast():
    images, texts = (x.float() for x in embeddings(6, width=64))
    expected = itc_similarity(images, texts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = itc_similarity(images, texts)
        coarse = itc_similarity(images.bfloat16(), texts.bfloat16())
    assert torch.equal(found, expected)
    assert coarse.dtype == torch.float32


def test_another_caption_of_the_same_image_is_no_negative():
    """Which of two captions of one image stands in which row makes no difference."""
    images, texts = embeddings(3)
    swapped = texts[[1, 0, 2]]
    for ids, equal in (([4, 4, 5], True), ([4, 6, 5], False)):
        a, b = (itc_loss(images, x, 0.07, torch.tensor(ids)) for x in (texts, swapped))
        assert torch.isclose(a, b) == equal


def test_itc_of_one_pair_is_zero():
    images, texts = embeddings(1)
    assert itc_loss(images, texts, 0.07).item() == 0


SCORES = torch.tensor([[9.0, 1.0, 2.0, 0.0], [1.0, 9.0, 1.0, 9.0], [0.5, 0.0, 9.0, -1.0]])
SAME = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]]).bool()


def test_hard_negatives_are_never_right():
    torch.manual_seed(0)
    for _ in range(300):
        rows, columns = sample_hard_negatives(SCORES, SAME)
        assert rows.tolist() == [0, 1, 2]
        assert not SAME[rows, columns].any()


def test_hard_negatives_are_drawn_in_proportion():
    """Pearson's chi-square on 6,000 draws a row; 1 in 1,000 fair samplers would exceed 13.8."""
    torch.manual_seed(0)
    draws = 6000
    rows, columns = sample_hard_negatives(SCORES.repeat(draws, 1), SAME.repeat(draws, 1))
    for row in range(3):
        wrong = ~SAME[row]
        expected = draws * SCORES[row][wrong].softmax(dim=0)
        found = torch.bincount(columns[rows % 3 == row], minlength=4)[wrong]
        assert ((found - expected) ** 2 / expected).sum() < 13.8


def test_rows_without_a_wrong_column_are_left_out():
    same = torch.tensor([[True, True], [False, True]])
    rows, columns = sample_hard_negatives(torch.zeros(2, 2), same)
    assert (rows.tolist(), columns.tolist()) == ([1], [0])
    rows, columns = sample_hard_negatives(torch.zeros(1, 1), torch.ones(1, 1).bool())
    assert rows.numel() == columns.numel() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_similarity_still_gives_columns(bad):
    """The loss is to tell of NaN, in words; multinomial would crash before it."""
    rows, columns = sample_hard_negatives(torch.full((3, 3), bad), torch.eye(3).bool())
    assert len(rows) == 3 and columns.max() < 3


def test_the_overlap_of_queries_by_hand():
    """Cosines of 1, 0 and 0.6 between three queries; the second image has all alike."""
    three = torch.tensor([[3.0, 0, 0], [0, 0, 2], [0.6, 0.8, 0]])
    apart, alike = three[None], torch.ones(1, 3, 3)
    assert query_overlap(apart).item() == pytest.approx(0.6**2 / 3)
    assert query_overlap(alike).item() == pytest.approx(1)
    assert query_overlap(torch.cat([apart, alike])).item() == pytest.approx((0.12 + 1) / 2)


def test_less_overlap_drives_queries_apart():
    queries = (torch.ones(2, 4, 8) + 0.01 * torch.randn(2, 4, 8)).requires_grad_()
    optimizer = torch.optim.SGD([queries], lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        query_overlap(queries).backward()
        optimizer.step()
    assert query_overlap(queries) < 0.01


def test_itm_of_a_guess():
    labels = torch.tensor([1, 0, 0] * 5)
    assert itm_loss(torch.zeros(15, 2), labels).item() == pytest.approx(math.log(2))
    # Knowing that one pair in three matches, and nothing else, is the best guess there is.
    best = torch.tensor([[2 / 3, 1 / 3]]).log().expand(15, 2)
    assert itm_loss(best, labels).item() == pytest.approx(0.6365, abs=1e-4)
    for shift in (-0.1, 0.1):
        assert itm_loss(best + torch.tensor([shift, 0.0]), labels) > itm_loss(best, labels)


def test_itg_equals_loops():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 7), torch.tensor([[3, -100, 6], [0, 1, -100]])
    total, count = 0.0, 0
    for row, label in zip(logits.flatten(0, 1), labels.flatten().tolist(), strict=True):
        if label != -100:
            logs = row.log_softmax(dim=0)
            total -= 0.9 * logs[label] + 0.1 * logs.mean()
            count += 1
    torch.testing.assert_close(itg_loss(logits, labels), total / count)


def test_itg_does_not_look_where_the_label_is_minus_100():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 7), torch.tensor([[3, -100, 6], [0, 1, -100]])
    changed = logits.clone()
    changed[labels == -100] += torch.randn(7)
    assert itg_loss(changed, labels) == itg_loss(logits, labels)
    changed[0, 0] += torch.randn(7)
    assert itg_loss(changed, labels) != itg_loss(logits, labels)


def test_gradients():
    images, texts = (x.requires_grad_() for x in embeddings(3))
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([1, 2, 1])
    check = torch.autograd.gradcheck
    assert check(lambda *x: itc_loss(*x, image_ids=ids), (images, texts, temperature))
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert check(lambda x: itg_loss(x, torch.tensor([1, -100, 0, 4])), (logits,))
    assert check(lambda x: itm_loss(x[:, :2], torch.tensor([1, 0, 0, 1])), (logits,))
