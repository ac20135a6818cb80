"""Checks of lesson 03, query tokens.

Axis letters: `B` images, `N` features, `Q` queries, `D` width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from blip2_edu.attention import attention_weights
from blip2_edu.exercises import exercise, expect, noise, same

B, N, Q, D = 4, 7, 5, 8

Reader = Callable[[Tensor, Tensor], Tensor]  # queries (1, Q, D), features (B, N, D) -> (B, Q, D)


def _look(queries: Tensor, features: Tensor) -> Tensor:
    """One head without projections: queries (1, Q, D), features (B, N, D) -> (B, Q, D)."""
    weights = attention_weights(queries[:, None], features[:, None])[:, 0]  # (B, Q, N)
    return weights @ features


@exercise
def check_look(look: Reader) -> str:
    """look(queries (1, Q, D), features (B, N, D)) -> (B, Q, D)."""
    queries, features = noise(1, Q, D), noise(B, N, D)
    seen = look(queries, features)
    scores = queries @ features.mT
    shape = tuple(seen.shape)
    expect(
        shape != (B, Q, N),
        "these are the weights; each query must still take the features' weighted sum",
    )
    expect(
        shape == (B, Q, D),
        f"{B} images and {Q} queries of width {D} must give ({B}, {Q}, {D}), not {shape}",
    )
    expect(
        not same(seen, (scores / D**0.5).softmax(dim=1) @ features),
        "your softmax runs over the queries, so that they compete for features; it must run over "
        "the features, because every query has one unit of attention to spend",
    )
    expect(
        not same(seen, scores.softmax(dim=-1) @ features),
        "the scores lack the division by the square root of the width",
    )
    expect(
        not same(seen, features.mean(dim=1, keepdim=True).expand(-1, Q, -1)),
        "this is the mean of the features: the queries had no say in it",
    )
    expect(same(seen, _look(queries, features)), "these are not the softmax-weighted sums")
    return "the same queries read every image of the batch, each in its own way"


@exercise
def check_compression(compression: Callable[[int, int, int, int], float]) -> str:
    """compression(num_features, feature_width, num_queries, query_width) -> a factor."""
    sizes = [(257, 1024, 32, 768), (81, 1280, 32, 384), (100, 30, 7, 50)]
    for num_features, feature_width, num_queries, query_width in sizes:
        factor = compression(num_features, feature_width, num_queries, query_width)
        right = num_features * feature_width / (num_queries * query_width)

        def issame(value: float, factor: float = factor) -> bool:
            return abs(factor - value) < 1e-6 * abs(value)

        expect(
            not issame(num_features / num_queries),
            "you compared how many vectors there are; they are not equally wide",
        )
        expect(not issame(1 / right), "upside down: how many times more goes in than comes out?")
        expect(
            not issame((num_features + feature_width) / (num_queries + query_width)),
            "you added; a grid of vectors holds their number times their width",
        )
        expect(
            issame(right),
            f"{num_features} x {feature_width} numbers go in and {num_queries} x {query_width} "
            f"come out: the factor is {right:.3f}, not {factor:.3f}",
        )
    return "in the paper's example, section 3.1, the queries hold about a tenth of the numbers"


@exercise
def check_queries_are_a_set(queries_are_a_set: Callable[[Reader, Tensor, Tensor], bool]) -> str:
    """queries_are_a_set(read, queries (1, Q, D), features (B, N, D)) -> True or False."""
    queries, features = noise(1, Q, D), noise(B, N, D)
    of_queries, of_features, mixing = noise(1, Q, D), noise(1, N, D), noise(Q, Q)

    def judge(read: Reader) -> bool:
        return bool(queries_are_a_set(read, queries, features))

    expect(
        judge(_look),
        "attention treats queries as a set, and you say that it does not: put the outputs in the "
        "new order too before you compare",
    )
    expect(
        judge(lambda q, f: _look(q, f + of_features)),
        "here only the features have positions, and the queries are a set: leave the features in "
        "order",
    )
    expect(
        not judge(lambda q, f: _look(q + of_queries, f)),
        "this reader adds a position embedding to its queries, and you did not notice: change the "
        "order of the queries, dimension 1, and compare every number",
    )
    expect(
        not judge(lambda q, f: torch.einsum("pq,bqd->bpd", mixing, _look(q, f))),
        "this reader mixes the outputs by their position, and you did not notice",
    )
    return "queries have no order, unless somebody gives them one"


@exercise
def check_stays_tied(
    stays_tied: Callable[[Reader, Callable[[Tensor], Tensor], Tensor, Tensor], bool],
) -> str:
    """stays_tied(read, loss, equal queries (1, Q, D), features (B, N, D)) -> True or False."""
    features, alike = noise(B, N, D), noise(1, 1, D).expand(1, Q, D).clone()
    direction, by_position = noise(D), noise(Q * D)
    losses = {
        "the mean over queries": lambda x: (x.mean(dim=1) @ direction).square().sum(),
        "amax over queries": lambda x: (x @ direction).amax(dim=1).sum(),
    }
    for name, loss in losses.items():
        expect(
            stays_tied(_look, loss, alike, features),
            f"with {name} equal queries get equal gradients: compare the rows of the gradient with "
            "one another, up to rounding",
        )

    def noisy(queries: Tensor, features: Tensor) -> Tensor:
        return _look(queries, features) * (noise(len(features), Q, D) > -0.5)

    expect(
        not stays_tied(_look, lambda x: (x.flatten(1) @ by_position).sum(), alike, features),
        "a linear layer on the flattened queries pulls each of them another way; their outputs are "
        "still alike in this step, so look at the gradients",
    )
    expect(
        not stays_tied(noisy, lambda x: x.square().sum(), alike, features),
        "this reader drops outputs at random, so that equal queries get unequal gradients",
    )
    return "equal queries part only if the noise or the loss can tell them apart"
