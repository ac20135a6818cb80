"""Checks of lesson 08, training stage 1: schedule, weight decay, recall, re-ranking."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from blip2_edu.exercises import exercise, expect, noise
from blip2_edu.training import learning_rate_factor


@exercise
def check_warmup_cosine(warmup_cosine: Callable[[int, int, int], float]) -> str:
    """warmup_cosine(step, steps, warmup) -> the factor on the learning rate."""
    for steps, warmup in ((100, 10), (37, 5), (8, 1)):
        factors = [warmup_cosine(step, steps, warmup) for step in range(steps)]
        right = [learning_rate_factor(step, steps, warmup) for step in range(steps)]
        expect(
            factors[0] != 0,
            "step 0 has a rate of 0 and is wasted: the warm-up ends at 1, it does not start at 0",
        )
        expect(
            torch.tensor(factors[:warmup]).allclose(torch.tensor(right[:warmup])),
            "the warm-up is a straight line: 1/warmup at the first step, 1 at the last",
        )
        expect(
            abs(factors[warmup] - 1) < 1e-6,
            "the cosine starts at 1 right after the warm-up: count its steps from there",
        )
        expect(
            factors[-1] < 0.2,
            f"at the last of {steps} steps the factor is still {factors[-1]:.2f}: half a period "
            "of the cosine fills the steps after the warm-up",
        )
        expect(
            torch.tensor(factors).allclose(torch.tensor(right), atol=1e-6),
            "the ends are right, what lies between is not: (1 + cos) / 2 of a growing angle",
        )
    return "a straight line up to 1, then half a cosine down, whatever the number of steps"


class _Model(nn.Module):
    """Every kind of parameter: matrices, vectors, one number, and a frozen matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.queries = nn.Parameter(noise(1, 2, 3))
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.encoder = nn.Linear(3, 3).requires_grad_(False)


@exercise
def check_decay_groups(decay_groups: Callable[[nn.Module, float], list[dict[str, Any]]]) -> str:
    """decay_groups(model, weight_decay) -> parameter groups for AdamW."""
    model = _Model()
    groups = decay_groups(model, 0.05)
    torch.optim.AdamW([dict(group) for group in groups])  # what it cannot read it says best itself
    decays = {}
    for group in groups:
        expect("weight_decay" in group, "a group names no weight_decay: AdamW would take its own")
        for parameter in group["params"]:
            expect(id(parameter) not in decays, "a parameter is in two groups")
            decays[id(parameter)] = group["weight_decay"]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            expect(id(parameter) not in decays, f"{name} is frozen: leave it out")
            continue
        expect(id(parameter) in decays, f"{name} learns, and is in no group")
        decay = decays[id(parameter)]
        if parameter.ndim >= 2:
            expect(decay == 0.05, f"{name} has {parameter.ndim} dimensions and gets no decay")
        else:
            expect(decay == 0, f"{name} is a vector or a single number, and is decayed")
    return "decay on matrices alone, every learning parameter once, the frozen ones nowhere"


@exercise
def check_recall_at_k(
    recall_at_k: Callable[[Tensor, Tensor, int], tuple[float, float]],
) -> str:
    """recall_at_k(similarity (I, T), owner (T,), k) -> TR@k and IR@k in percent."""
    # Image 0 owns texts 0 and 1, image 1 owns 2 and 3; image 0 also draws text 2 to itself.
    similarity = torch.tensor([[0.9, 0.1, 0.95, 0.2], [0.2, 0.0, 0.7, 0.8]])
    given = tuple(map(float, recall_at_k(similarity, torch.tensor([0, 0, 1, 1]), 1)))
    expect(max(given) > 1, "give percent: multiply the shares by 100")
    expect(given != (75, 50), "TR and IR are the wrong way round")
    expect(given != (50, 50), "IR@k asks every text, also the second one of an image")
    for images, k in ((7, 1), (9, 3), (5, 2)):
        counts = 2 + noise(images, 3).argmax(dim=1)  # two to four texts each
        owner = torch.repeat_interleave(torch.arange(images), counts)
        own = owner[None, :] == torch.arange(images)[:, None]  # (I, T)
        similarity = noise(*own.shape) + own  # better than chance
        found = own.gather(1, similarity.topk(k, dim=1).indices)  # (I, k)
        found_image = own.gather(0, similarity.topk(k, dim=0).indices)  # (k, T)
        tr = 100 * found.any(dim=1).float().mean().item()
        ir = 100 * found_image.any(dim=0).float().mean().item()
        given_tr, given_ir = map(float, recall_at_k(similarity, owner, k))
        share = 100 * (found.sum(dim=1) / counts).mean().item()
        of_k = 100 * found.float().mean().item()
        expect(
            abs(given_tr - tr) < 1e-3 or min(abs(given_tr - share), abs(given_tr - of_k)) > 1e-3,
            "TR@k is reached as soon as ONE of an image's own texts is among its k best",
        )
        expect(
            abs(given_tr - tr) < 1e-3,
            f"TR@{k} is {given_tr:.1f} and should be {tr:.1f}: per image (row), is a text that it "
            "owns among the k best?",
        )
        expect(
            abs(given_ir - ir) < 1e-3,
            f"IR@{k} is {given_ir:.1f} and should be {ir:.1f}: per text (column), is its owner "
            "among the k best images?",
        )
    return "one of several own texts is enough for TR, and every text counts for IR"


@exercise
def check_rerank_by_sum(rerank_by_sum: Callable[[Tensor, Tensor, int], Tensor]) -> str:
    """rerank_by_sum(similarity (I,), match (I,), k) -> numbers of the images (I,), best first."""
    for count, k in ((8, 3), (20, 5), (6, 6)):
        similarity, match = noise(count).tanh(), noise(count)
        order = torch.as_tensor(rerank_by_sum(similarity, match, k))
        right = similarity.argsort(descending=True)
        best, rest = right[:k], right[k:]

        def by(score: Tensor, best: Tensor = best, rest: Tensor = rest) -> Tensor:
            return torch.cat([best[score[best].argsort(descending=True)], rest])

        expect(
            order.shape == (count,) and set(order.tolist()) == set(range(count)),
            f"all {count} images must be in the order, each once; yours has shape "
            f"{tuple(order.shape)}",
        )
        mistakes = {
            "you sorted by ITC alone": right,
            "you sorted the k best by ITM alone: add the similarity": by(match),
            "you sorted everything by the sum; ITM is too costly for more than the k best": (
                (similarity + match).argsort(descending=True)
            ),
            "your best come last: sort in descending order": by(-similarity - match),
        }
        wanted = by(similarity + match)
        for mistake, wrong in mistakes.items():
            expect(not order.equal(wrong) or wrong.equal(wanted), mistake)
        expect(
            set(order[:k].tolist()) == set(best.tolist()),
            "the first k are not the k most similar: ITC chooses them, ITM only reorders",
        )
        expect(order[:k].equal(wanted[:k]), "the k best are not in the order of the sum")
        expect(order[k:].equal(rest), "what ITM did not score keeps its order by ITC")
    return "ITC chooses k, the sum orders them, the rest stays behind"
