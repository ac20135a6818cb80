"""Checks of lesson 01: attention."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from blip2_edu.attention import attention_weights
from blip2_edu.exercises import exercise, expect, noise, same


@exercise
def check_softmax_with_temperature(
    softmax_with_temperature: Callable[[Tensor, float], Tensor],
) -> str:
    """softmax_with_temperature(scores (L, S), temperature) -> weights (L, S)."""
    scores = noise(3, 5)
    result = softmax_with_temperature(scores, 0.5)
    right = (scores / 0.5).softmax(dim=-1)
    expect(isinstance(result, Tensor), "the weights should be a tensor")
    expect(
        not same(result, (scores * 0.5).softmax(dim=-1)),
        "you multiplied by the temperature: divide, so that a low one makes the weights sharp",
    )
    expect(
        not same(result, scores.softmax(dim=-1)),
        "the temperature changes nothing: divide the scores by it before the softmax",
    )
    expect(
        not same(result, scores.softmax(dim=-1) / 0.5),
        "you divided the weights by the temperature: divide the scores, before the softmax",
    )
    expect(
        not same(result, (scores / 0.5).softmax(dim=0)),
        "your columns sum to one: every row asks for itself, so use the last axis",
    )
    expect(
        not same(result, (scores / 0.5).flatten().softmax(dim=0).reshape(3, 5)),
        "all your weights together sum to one: every row should",
    )
    expect(same(result, right), "the weights of a row are exp(score / temperature) over their sum")
    expect(
        same(softmax_with_temperature(1000 * scores, 1.0), (1000 * scores).softmax(dim=-1)),
        "large scores overflow, exp(1000) is infinite: subtract the highest score of a row first",
    )
    return "sharp when cold, even when hot, and safe with scores in the thousands."


@exercise
def check_causal_padding_mask(causal_padding_mask: Callable[[Tensor], Tensor]) -> str:
    """causal_padding_mask(is_token (B, T)) -> boolean mask (B, 1, T, T)."""
    rows = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]  # whole, padded right, padded left
    is_token = torch.tensor(rows).bool()
    mask = causal_padding_mask(is_token)
    earlier, itself = torch.ones(5, 5).tril().bool(), torch.eye(5).bool()
    token = is_token[:, None, :]
    right = earlier & token | itself
    expect(isinstance(mask, Tensor) and mask.dtype == torch.bool, "the mask should be boolean")
    expect(
        mask.shape != right.shape,
        "(B, T, T) does not broadcast over heads: put an axis of 1 behind the batch",
    )
    expect(mask.shape == (3, 1, 5, 5), f"the shape should be (3, 1, 5, 5), not {tuple(mask.shape)}")
    mask = mask[:, 0]
    expect(not torch.equal(mask, ~right), "your mask is turned round: True means may look")
    expect(not (mask & ~earlier).any(), "your mask lets text see later text")
    expect(not (mask & ~token & ~itself).any(), "your mask lets a word look at padding")
    expect(mask.any(dim=-1).all(), "a row is empty, so its softmax is NaN: let it see itself")
    expect(torch.equal(mask, right), "your mask hides something that a position may look at")
    return "no word sees a later one or padding, and no row is empty."


@exercise
def check_multi_head_weights(multi_head_weights: Callable[[Tensor, Tensor, int], Tensor]) -> str:
    """multi_head_weights(query (B, L, D), key (B, S, D), num_heads) -> weights (B, H, L, S)."""
    query, key, heads = 2 * noise(2, 4, 12), noise(2, 6, 12), 3  # C = 4

    def reference(pattern: str = "b l (h c) -> b h l c") -> tuple[Tensor, Tensor]:
        return rearrange(query, pattern, h=heads), rearrange(key, pattern, h=heads)

    q, k = reference()
    weights = multi_head_weights(query, key, heads)
    expect(isinstance(weights, Tensor), "the weights should be a tensor")
    expect(
        weights.shape == (2, 3, 4, 6),
        f"the shape should be (B, H, L, S) = (2, 3, 4, 6), not {tuple(weights.shape)}",
    )
    scores = q @ k.mT
    expect(
        not same(weights, (scores / 12**0.5).softmax(dim=-1)),
        "you scaled by the whole width: a head's dot product has only C = D / H terms",
    )
    expect(not same(weights, scores.softmax(dim=-1)), "the scale 1 / sqrt(C) is missing")
    expect(not same(weights, (scores / 4).softmax(dim=-1)), "you divided by C, not by its root")
    expect(
        not same(weights, (scores / 2).softmax(dim=-2)),
        "your weights sum to one over the queries: they should over the keys, the last axis",
    )
    chopped = attention_weights(query.reshape(2, 3, 4, 4), key.reshape(2, 3, 6, 4))
    expect(
        not same(weights, chopped),
        "your heads mix positions: split the width first, then move the heads forward",
    )
    expect(
        not same(weights, attention_weights(*reference("b l (c h) -> b h l c"))),
        "your heads take every third number: a head is one run of neighbours, (h c)",
    )
    expect(same(weights, attention_weights(q, k)), "the weights differ from softmax(q k / sqrt(C))")
    return "equal to blip2_edu.attention.attention_weights, head by head."


@exercise
def check_merge_attention(
    merge_attention: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> str:
    """merge_attention(output_a (L, C), log_sum_a (L,), output_b, log_sum_b) -> output (L, C)."""
    scores, value = noise(4, 8), noise(8, 3)

    def part(scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return scores.softmax(dim=-1) @ value, scores.logsumexp(dim=-1)

    a, b = part(scores[:, :2], value[:2]), part(scores[:, 2:], value[2:])
    merged = merge_attention(*a, *b)
    expect(isinstance(merged, Tensor), "the merged output should be a tensor")
    expect(merged.shape == (4, 3), f"the shape should be (4, 3), not {tuple(merged.shape)}")
    expect(
        not same(merged, (a[0] + b[0]) / 2),
        "a plain mean: the part with the higher scores should count for more",
    )
    expect(not same(merged, a[0] + b[0]), "a plain sum: the two shares should add up to one")
    share = torch.stack([a[1], b[1]]).softmax(dim=0)[..., None]
    expect(not same(merged, share[1] * a[0] + share[0] * b[0]), "the two shares are swapped")
    expect(
        not same(merged, (a[1][:, None] * a[0] + b[1][:, None] * b[0]) / (a[1] + b[1])[:, None]),
        "the shares go by the sums of the exponentials, not by their logarithms",
    )
    expect(
        same(merged, scores.softmax(dim=-1) @ value),
        "the result differs from attention over all the keys at once",
    )
    a, b = part(1000 * scores[:, :2], value[:2]), part(1000 * scores[:, 2:], value[2:])
    expect(
        same(merge_attention(*a, *b), (1000 * scores).softmax(dim=-1) @ value),
        "large scores overflow: a softmax over the two logarithms never does",
    )
    return "two parts, one answer, and nobody ever held the whole row of weights."
