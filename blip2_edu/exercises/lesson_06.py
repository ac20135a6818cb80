"""Checks of lesson 06: image-text matching.

Axis letters: `B` pairs in the batch, `P` pairs put before the matching head, `Q` queries, `D` width
of the Q-Former, `I` images, `T` texts, `k` best texts that are scored a second time.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from blip2_edu.exercises import exercise, expect, noise, same


@exercise
def check_knowing_nothing(knowing_nothing: Callable[[int], float]) -> str:
    """knowing_nothing(negatives to a positive) -> the loss."""
    for n in (1, 2, 5):
        found, positive = float(knowing_nothing(n)), 1 / (n + 1)
        wanted = -positive * math.log(positive) - (1 - positive) * math.log(1 - positive)
        expect(
            n == 1 or abs(found - math.log(2)) > 1e-6,
            "ln 2 is the loss of saying one half; whoever knows that negatives are the more "
            "frequent says less than one half, and pays less",
        )
        expect(
            n == 1 or abs(found - math.log(n + 1)) > 1e-6,
            f"ln {n + 1} is for choosing one out of {n + 1}, as ITC does; here every pair is "
            "judged by itself, yes or no",
        )
        expect(
            abs(found - wanted / math.log(2)) > 1e-6,
            "this is the right number in bits: the loss is measured with the natural logarithm",
        )
        expect(
            abs(found - wanted) < 1e-6,
            f"for {n} negatives: say p = 1 / {n + 1} to every pair; a positive then costs -ln p, a "
            "negative -ln (1 - p), and the loss is their mean over all pairs",
        )
    return "what knowing nothing costs, for any number of negatives to a positive."


@exercise
def check_match_probability(match_probability: Callable[[Tensor, nn.Linear], Tensor]) -> str:
    """match_probability(queries (P, Q, D), head) -> probabilities (P,)."""
    queries, head = noise(6, 5, 8), nn.Linear(8, 2)
    logits = 3 * head(queries).detach()  # (P, Q, 2)
    with torch.no_grad():
        head.weight.mul_(3), head.bias.mul_(3)
    found = match_probability(queries, head).detach()
    expect(
        found.shape != (6, 2),
        "you return both columns; the second one is the probability that the pair matches",
    )
    expect(found.shape == (6,), f"one number a pair is wanted, (6,), not {tuple(found.shape)}")
    mean = logits.mean(dim=1)
    expect(
        not same(found, logits.softmax(dim=-1).mean(dim=1)[:, 1]),
        "you averaged the probabilities of the queries; average their logits first, then softmax",
    )
    expect(
        not same(found, mean.softmax(dim=-1)[:, 0]),
        "that is the probability that the pair does not match: label 1 is the second column",
    )
    expect(not same(found, mean[:, 1]), "that is a logit; the softmax over the two is missing")
    expect(
        not same(found, mean.softmax(dim=0)[:, 1]),
        "your softmax compares the pairs with one another; each pair is judged by itself",
    )
    expect(
        not same(found, logits.amax(dim=1).softmax(dim=-1)[:, 1]),
        "the best query decides in ITC; in ITM all queries are averaged",
    )
    expect(same(found, mean.softmax(dim=-1)[:, 1]), "the numbers differ: head, mean, softmax")
    return "the probability that each pair matches, from the logits averaged over the queries."


@exercise
def check_wrong_images(wrong_images: Callable[[Tensor, Tensor], Tensor]) -> str:
    """wrong_images(similarity (I, T), image_ids (B,)) -> a number of an image a text (T,)."""
    ids = torch.tensor([4, 7, 4, 9])
    similarity = torch.tensor(  # (images, texts), in units of the softmax
        [[5.0, 0.0, 5.0, 2.0], [1.0, 6.0, 0.0, 0.0], [5.0, 3.0, 5.0, 0.0], [0.0, 1.0, 2.0, 7.0]]
    )
    draws = torch.stack([torch.as_tensor(wrong_images(similarity, ids)) for _ in range(400)])
    expect(draws.shape == (400, 4), f"one image a text is wanted, not {tuple(draws.shape[1:])}")
    own = draws == torch.arange(4)
    expect(not own.any(), "some text was given its own image: mask what belongs together first")
    expect(
        not (ids[draws] == ids).any(),
        "image_ids says that some captions are of the same image: you masked the diagonal alone, "
        "and so some negatives are positives",
    )
    own = ids[:, None] == ids[None, :]

    def far_from(scores: Tensor) -> float:
        """How far the draws' frequencies are from the softmax of these scores."""
        chances = scores.masked_fill(own, float("-inf")).softmax(dim=1)
        found = nn.functional.one_hot(draws, 4).float().mean(dim=0)
        return (found - chances).abs().max().item()

    if far_from(similarity.T) > 0.12:
        expect(
            not (draws == draws[0]).all(),
            "always the same image: you take the hardest; draw one, the harder the likelier",
        )
        expect(
            far_from(torch.zeros(4, 4)) > 0.12,
            "you draw all wrong images alike; their chances are the softmax of the similarity",
        )
        expect(
            far_from(similarity) > 0.12,
            "you draw a wrong text for each image: an image is a row, a text a column; transpose",
        )
        expect(False, "the chances are off: they are the softmax over the images that are wrong")
    return "a wrong image for each text, never its own, the more similar the likelier."


@exercise
def check_rerank(rerank: Callable[[Tensor, Tensor, int], Tensor]) -> str:
    """rerank(similarity (I, T), match (I, T), k) -> numbers of the texts (I, T), best first."""
    for k in (3, 1, 7):
        similarity, match = noise(5, 7).tanh(), 4 * noise(5, 7)
        kept = match.clone()
        first = similarity.argsort(dim=1, descending=True)  # (I, T)
        best, rest = first[:, :k], first[:, k:]

        def reordered(scores: Tensor, best: Tensor = best, rest: Tensor = rest) -> Tensor:
            order = scores.gather(1, best).argsort(dim=1, descending=True)
            return torch.cat([best.gather(1, order), rest], dim=1)

        found = torch.as_tensor(rerank(similarity, match, k))
        expect(
            not torch.is_floating_point(found),
            "these are scores; the numbers of the texts are asked for, best first",
        )
        expect(found.shape == (5, 7), f"all texts are ranked, (5, 7), not {tuple(found.shape)}")
        expect(torch.equal(match, kept), "you changed `match`; work on a copy")
        wanted = reordered(similarity + match)
        if not torch.equal(found, wanted):
            everything = (similarity + match).argsort(dim=1, descending=True)
            expect(
                not torch.equal(found, everything),
                "you scored all texts again; only the k best by similarity may be, "
                "the others keep their old order behind them",
            )
            expect(
                not torch.equal(found, reordered(match)),
                "you ranked by the match logit alone; add the similarity",
            )
            expect(not torch.equal(found, first), "the order is still that of the similarity")
            expect(
                torch.equal(found[:, k:], rest),
                "what comes after the first k must be as the similarity had it",
            )
            expect(
                torch.equal(found.sort(dim=1).values, torch.arange(7).expand(5, 7)),
                "some texts are there twice: what you sorted are places among the k best, "
                "and these must be turned back into numbers of texts (gather)",
            )
            expect(False, "the first k are the right ones in a wrong order: highest score first")
    return "the k best by similarity, put in order by both scores together, the rest behind them."
