"""Checks of lesson 11, seeing attention: a grid, the pointing game, a weighted map, rollout."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blip2_edu.exercises import exercise, expect, noise, same
from blip2_edu.metrics import pointing_game

Box = tuple[float, float, float, float]  # left, top, right, bottom


@exercise
def check_fold_patches(fold_patches: Callable[[Tensor, int, int], Tensor]) -> str:
    """fold_patches(weights (..., N), num_prefix_tokens, num_rows) -> maps (..., R, K)."""
    for prefix in (1, 0, 2):
        weights = noise(2, 5, prefix + 12).softmax(dim=-1)
        maps = fold_patches(weights, prefix, 3)
        expect(isinstance(maps, Tensor), "the maps should be a tensor")
        expect(maps.shape != (2, 5, 4, 3), "rows and columns are swapped: the last axis is a row's")
        expect(
            maps.shape == (2, 5, 3, 4),
            f"the shape should be (2, 5, 3, 4) for 3 rows of 4, not {tuple(maps.shape)}",
        )
        right = weights[..., prefix:].unflatten(-1, (3, 4))
        expect(
            not prefix or not same(maps, weights[..., :-prefix].unflatten(-1, (3, 4))),
            "you dropped the last patches: the prefix tokens come first",
        )
        expect(
            not same(maps, weights[..., prefix:].unflatten(-1, (4, 3)).mT),
            "you counted down the columns: the encoder goes row by row",
        )
        expect(
            not prefix or not same(maps, right / right.sum(dim=(-2, -1), keepdim=True)),
            "you made the rest sum to one again: what the prefix tokens took should stay missing",
        )
        expect(same(maps, right), f"with {prefix} prefix tokens the maps are not as they should be")
    return "without, with one and with two prefix tokens, and rows that are longer than columns."


@exercise
def check_points_inside(
    points_inside: Callable[[Tensor, Sequence[Box], tuple[int, int]], bool],
) -> str:
    """points_inside(attention (R, K), boxes, image_size) -> True or False."""
    size = (400, 200)  # of the image: width, height

    def ask(row: int, column: int, *boxes: Box) -> bool:
        attention = noise(4, 5).sigmoid() / 2
        attention[row, column] = 1
        answer = points_inside(attention, boxes, size)
        expect(isinstance(answer, bool), "the answer should be True or False")
        return answer == pointing_game(attention, boxes, size)

    expect(ask(0, 4, (310, 0, 395, 49)), "in an image that is wider than high you take x for y")
    for box in ((150, 40, 170, 60), (150, 70, 190, 80), (190, 40, 210, 60)):
        expect(ask(1, 2, box), "a patch points with its middle, not with its corner")
    hit, other = (100, 110, 140, 140), (300, 0, 390, 40)
    expect(ask(2, 1, hit, other), "any of the boxes may be hit, they need not all be")
    expect(ask(2, 1, other, hit), "any of the boxes may be hit, not only the first")
    expect(ask(2, 1), "where nothing is to be hit nothing is hit")
    for row in range(4):
        for column in range(5):
            expect(ask(row, column, (100, 60, 290, 140)), f"wrong for row {row}, column {column}")
    return "equal to blip2_edu.metrics.pointing_game wherever the map peaks."


@exercise
def check_gradient_weighted(gradient_weighted: Callable[[Tensor, Tensor], Tensor]) -> str:
    """gradient_weighted(weights (H, Q, N), their gradients (H, Q, N)) -> map (N,)."""
    weights, gradients = noise(3, 4, 6).softmax(dim=-1), noise(3, 4, 6)  # (H, Q, N)
    product = weights * gradients
    found = gradient_weighted(weights, gradients)
    expect(isinstance(found, Tensor), "the map should be a tensor")
    expect(found.shape == (6,), f"one number a patch, (6,), not {tuple(found.shape)}")
    for wrong, mistake in (
        (product.sum(dim=(0, 1)), "what lowers the score is still in: clamp at zero"),
        (
            product.sum(dim=(0, 1)).clamp(min=0),
            "you clamped the sum: one head that objects then silences another that agrees",
        ),
        (product.sum(dim=0).clamp(min=0).sum(dim=0), "clamp before you sum over the heads"),
        (product.sum(dim=1).clamp(min=0).sum(dim=0), "clamp before you sum over the queries"),
        (product.abs().sum(dim=(0, 1)), "the absolute value counts objections as support"),
        (gradients.clamp(min=0).sum(dim=(0, 1)), "the attention weights are missing"),
        (weights.sum(dim=(0, 1)), "the gradients are missing"),
        (product.clamp(min=0).mean(dim=(0, 1)), "a sum was asked for, this is a mean"),
        (product.clamp(max=0).sum(dim=(0, 1)), "you kept what lowers the score"),
    ):
        expect(not same(found, wrong), mistake)
    right = product.clamp(min=0).sum(dim=(0, 1))
    expect(same(found, right), "it is the sum of weight times gradient where that is positive")
    return "support is added up over heads and queries, objections are left out."


@exercise
def check_rollout(rollout: Callable[[list[Tensor], list[Tensor]], Tensor]) -> str:
    """rollout(self_attentions, each (Q, Q), cross_attentions, each (Q, N)) -> (Q, N)."""

    def reference(selves: list[Tensor], crosses: list[Tensor], cross_first: bool = False) -> Tensor:
        seen = torch.zeros_like(crosses[0])
        for self_attention, cross in zip(selves, crosses, strict=True):
            if cross_first:
                seen = (seen + cross) / 2
            seen = (seen + self_attention @ seen) / 2
            if not cross_first:
                seen = (seen + cross) / 2
        return seen

    selves = list(noise(2, 3, 3).softmax(dim=-1))  # two blocks of 3 queries and 5 features
    crosses = list(noise(2, 3, 5).softmax(dim=-1))
    found = rollout(selves, crosses)
    expect(isinstance(found, Tensor), "the result should be a tensor")
    expect(found.shape == (3, 5), f"(Q, N) = (3, 5) is wanted, not {tuple(found.shape)}")
    expect(
        not same(found, reference(selves, crosses, cross_first=True)),
        "in a block self-attention comes first, then cross-attention",
    )
    expect(not same(found, crosses[-1]), "without the residual all but the last block is lost")
    expect(
        not same(found, sum(crosses) / len(crosses)), "a mean over blocks forgets self-attention"
    )
    turned = [self_attention.mT for self_attention in selves]
    expect(
        not same(found, reference(turned, crosses)),
        "a row of the self-attention asks: multiply from the left, without transposing",
    )
    whole = sum(reference(selves, crosses).sum(dim=-1))
    expect(
        found.sum() <= whole + 1e-4,
        "the shares add up to more than they may: half is kept, half comes in",
    )
    expect(same(found, reference(selves, crosses)), "two blocks give another result")
    three = [selves[0], selves[1], selves[0]], [crosses[1], crosses[0], crosses[1]]
    expect(same(rollout(*three), reference(*three)), "right for two blocks, wrong for three")
    return "every step passes half on and keeps half, through any number of blocks."
