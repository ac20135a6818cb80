"""Checks of lesson 05: image-text contrast.

Axis letters: `I` images, `T` texts, `Q` queries, `P` width of the shared space, `B` pairs.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from blip2_edu.exercises import exercise, expect, noise, same


@exercise
def check_winning_query(winning_query: Callable[[Tensor, Tensor], Tensor]) -> str:
    """winning_query(images (I, Q, P), texts (T, P)), both normalised -> numbers (I, T)."""
    images, texts = normalize(noise(5, 6, 16), dim=-1), normalize(noise(7, 16), dim=-1)
    every_query = torch.einsum("iqp,tp->itq", images, texts)
    found, wanted = winning_query(images, texts), every_query.argmax(dim=-1)
    expect(
        found.shape != (7, 5),
        "your result is (texts, images); images come first in a similarity matrix, (I, T)",
    )
    expect(found.shape == (5, 7), f"the result is (I, T), here (5, 7), not {tuple(found.shape)}")
    expect(
        not same(found, every_query.amax(dim=-1)),
        "these are the similarities of the winners; the numbers of the winners are asked for",
    )
    expect(not same(found, every_query.argmin(dim=-1)), "these queries fit worst, not best")
    expect(
        not same(found, every_query.abs().argmax(dim=-1)),
        "a dot product of -0.9 is a very bad fit, not a good one: leave the signs in",
    )
    expect(
        same(found, wanted),
        "some winners are wrong: for each image and text take the argmax "
        "over the queries of the dot product",
    )
    return "the number of the query that speaks for each image and text."


@exercise
def check_recall_at_1(recall_at_1: Callable[[Tensor, Tensor], float]) -> str:
    """recall_at_1(similarity (I, T), owner (T,)) -> a share."""
    owner = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 1])
    for _ in range(3):
        similarity = noise(5, 10)
        similarity[owner, torch.arange(10)] += 1.0
        found = float(recall_at_1(similarity, owner))
        of_texts = (similarity.argmax(dim=0) == owner).float().mean().item()
        of_images = (owner[similarity.argmax(dim=1)] == torch.arange(5)).float().mean().item()
        expect(
            of_images == of_texts or abs(found - of_images) > 1e-6,
            "this is text retrieval: you asked each image for its best text (a row), "
            "not each text for its best image (a column)",
        )
        counted = (similarity.argmax(dim=0) == torch.arange(10)).float().mean().item()
        expect(
            counted == of_texts or abs(found - counted) > 1e-6,
            "text t need not belong to image t: look it up in `owner`",
        )
        expect(
            abs(found - 10 * of_texts) > 1e-3 and abs(found - 100 * of_texts) > 1e-3,
            "the answer is a share between 0 and 1, neither a count nor a percentage",
        )
        expect(
            abs(found - of_texts) < 1e-6,
            f"{of_texts:.2f} of the texts here have their own image on top, you say {found:.2f}",
        )
    return "the share of texts whose own image is the most similar one."


@exercise
def check_shared_targets(shared_targets: Callable[[Tensor, float], Tensor]) -> str:
    """shared_targets(image_ids (B,), label_smoothing) -> targets (B, B)."""
    ids = torch.tensor([700, 3, 700, 9, 3, 700])
    fitting = (ids[:, None] == ids[None, :]).float()
    for smoothing in (0.0, 0.1):
        found = shared_targets(ids, smoothing)
        shared = (1 - smoothing) * fitting / fitting.sum(dim=1, keepdim=True)
        alone = (1 - smoothing) * torch.eye(6)
        expect(found.shape == (6, 6), f"targets are (B, B), here (6, 6), not {tuple(found.shape)}")
        expect(
            not same(found, alone + smoothing / 6),
            "other captions of the same photo are still negatives: compare the image ids",
        )
        expect(
            not same(found, (1 - smoothing) * fitting + smoothing / 6),
            "each row must sum to 1: divide by the number of captions that share the target",
        )
        if smoothing:
            expect(not same(found, shared / (1 - smoothing)), "the smoothing is missing")
            expect(
                not same(found, shared),
                "you took the smoothing away from the right ones and gave it to nobody: every "
                "column gets label_smoothing / B",
            )
            wrong_only = (1 - fitting) / (6 - fitting.sum(dim=1, keepdim=True))
            expect(
                not same(found, shared + smoothing * wrong_only),
                "you smooth over the wrong columns only; PyTorch and BLIP-2 spread it over all B",
            )
        expect(
            torch.allclose(found.sum(dim=1), torch.ones(6), atol=1e-5),
            "each row must sum to 1",
        )
        expect(same(found, shared + smoothing / 6), "the rows sum to 1, yet some targets are off")
    return "captions of one photo share the target, and every row sums to 1."


@exercise
def check_similarity_gradient(similarity_gradient: Callable[[Tensor, float], Tensor]) -> str:
    """similarity_gradient(similarity (B, B), temperature) -> the gradient of the loss (B, B)."""
    batch, temperature = 6, 0.2
    similarity = noise(batch, batch).tanh()
    by_row = (similarity / temperature).softmax(dim=1) - torch.eye(batch)
    by_column = (similarity / temperature).softmax(dim=0) - torch.eye(batch)
    wanted = (by_row + by_column) / (2 * batch * temperature)
    found = similarity_gradient(similarity.clone(), temperature)
    expect(found.shape == (batch, batch), "one number for each entry of the matrix, (B, B)")
    expect(
        not same(found, -wanted),
        "the sign is turned: a gradient says where the loss rises, so wrong pairs get plus",
    )
    expect(
        not same(found, wanted * temperature),
        "the temperature divides the scores, so by the chain rule it divides the gradient too",
    )
    expect(not same(found, wanted * batch), "the loss is a mean over the B rows: divide by B")
    expect(not same(found, wanted * 2), "the two directions are averaged, not added")
    for one_way in (by_row, by_column):
        expect(
            not any(same(found, one_way / (n * batch * temperature)) for n in (1, 2)),
            "this is one direction only: texts choose among images as well",
        )
    expect(
        same(found, wanted),
        "compare with autograd: softmax minus target, for rows and for columns",
    )
    return "softmax minus target, both ways: exactly what autograd finds."
