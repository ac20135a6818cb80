"""Checks of lesson 04, the Q-Former: what looking costs, a mask, two feed-forwards, and proof."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from blip2_edu.exercises import exercise, expect, noise
from blip2_edu.qformer import FeedForward, MaskPattern, QFormer, QFormerConfig

# A Q-Former before an image, from outside: text_ids (1, T) -> outputs of (queries, text)
Run = Callable[[Tensor], tuple[Tensor, Tensor]]


@exercise
def check_cross_attention_parameters(
    cross_attention_parameters: Callable[[QFormerConfig], int],
) -> str:
    """cross_attention_parameters(config) -> how many parameters look at the image."""
    odd = replace(QFormerConfig.tiny(), num_layers=7, cross_attention_every=3)
    for config in (odd, QFormerConfig.tiny(), QFormerConfig.mini(), QFormerConfig.base()):
        width, image_width = config.width, config.image_width
        every, blocks = config.cross_attention_every, config.num_layers
        one, look = 2 * width * (width + image_width) + 6 * width, -(-blocks // every)
        with torch.device("meta"):
            named = QFormer(config).named_parameters()
        exact = sum(p.numel() for name, p in named if ".cross_attention." in name)
        given = cross_attention_parameters(config)
        for wrong, mistake in (
            (one, "that is one block's cross-attention: how many blocks look?"),
            (
                blocks * one,
                "not every block looks at the image, only some: see `cross_attention_every`",
            ),
            (blocks // every * one, "block 0 looks too: the number that look is rounded up"),
            (
                look * (4 * width * width + 6 * width),
                "keys and values are made of image features, which are `image_width` wide",
            ),
            (look * (one - 2 * width), "you left out the layer norms"),
            (look * (one - 4 * width), "you left out the biases of the linear layers"),
        ):
            expect(given != wrong or wrong == exact, mistake)
        expect(given == exact, f"for {blocks} blocks of {width} it is {exact:,}")
    return f"four sizes, to the unit; the paper's looks with {exact:,} parameters"


@exercise
def check_prefix_mask(prefix_mask: Callable[[int, int, int], Tensor]) -> str:
    """prefix_mask(num_queries, prefix_length, text_length) -> boolean mask (Q + T, Q + T)."""
    for queries, prefix, text in ((3, 2, 5), (1, 4, 4), (4, 1, 6), (2, 3, 7)):
        given = torch.as_tensor(prefix_mask(queries, prefix, text))
        length, known = queries + text, queries + prefix
        expect(
            given.shape == (length, length),
            f"the mask of {length} positions is ({length}, {length}), not {tuple(given.shape)}",
        )
        expect(given.dtype == torch.bool, f"the mask must be boolean, not {given.dtype}")
        exact = torch.ones(length, length, dtype=torch.bool).tril()
        exact[:queries, :queries] = exact[queries:known, queries:known] = True
        expect(not torch.equal(given, ~exact), "it is the wrong way round: True means may look")
        expect(
            not torch.equal(given, exact.T) or torch.equal(exact, exact.T),
            "rows and columns are swapped: row i looks, column j is seen",
        )
        expect(given[:queries, :queries].all(), "every query must see all queries")
        expect(not given[:queries, queries:].any(), "a query sees text, and with it the answer")
        expect(given[queries:, :queries].all(), "text must see all queries: they know the image")
        expect(
            given[queries:known, queries:known].all(),
            "the words of the beginning must see one another in both directions",
        )
        expect(
            not given[queries:known, known:].any(),
            "the beginning sees words that are generated after it",
        )
        expect(
            not given[known:, known:].triu(1).any(), "your mask lets text see later generated text"
        )
        expect(torch.equal(given, exact), "a generated word must see itself and all text before it")
    return "queries, beginning and generated words each see what they should, in four sizes"


@exercise
def check_route(route: Callable[[Tensor, Tensor, FeedForward, FeedForward], Tensor]) -> str:
    """route(x (B, L, D), is_query (L,), of_queries, of_text) -> (B, L, D)."""
    sizes = QFormerConfig.tiny()
    feed_forwards = [FeedForward(sizes).eval().requires_grad_(False) for _ in range(2)]
    for feed_forward in feed_forwards:
        _randomise(feed_forward)
    front = [True] * 4 + [False] * 3
    for kinds in (front, [False, True, True, False, False, True], [True] * 3, [False] * 4):
        is_query = torch.tensor(kinds)
        x = noise(2, len(kinds), sizes.width)
        for_query, for_text = (feed_forward(x) for feed_forward in feed_forwards)
        before = x.clone()
        given = route(x, is_query, *feed_forwards)
        expect(torch.equal(x, before), "you wrote into `x`: make an output of its own")
        expect(given.shape == x.shape, f"the output must have the shape of `x`: {tuple(x.shape)}")
        kind = is_query[:, None]
        exact = torch.where(kind, for_query, for_text)
        by_place = is_query.sort(descending=True).values[:, None]
        mixed = is_query.any() and not is_query.all()
        for wrong, mistake in (
            (torch.where(kind, for_text, for_query), "the two feed-forwards are swapped"),
            (for_query, "the text went through the feed-forward of the queries, too"),
            (for_text, "the queries went through the feed-forward of the text, too"),
            (
                torch.where(by_place, for_query, for_text),
                "you routed the first positions as queries: queries may stand anywhere",
            ),
            (
                torch.cat([exact[:, is_query], exact[:, ~is_query]], dim=1),
                "queries first, text after: every position must stay where it was",
            ),
        ):
            differs = mixed and not torch.allclose(wrong, exact, atol=1e-5)
            expect(not (differs and torch.allclose(given, wrong, atol=1e-5)), mistake)
        expect(
            torch.allclose(given, exact, atol=1e-5),
            "a position did not get what its feed-forward gives",
        )
    return "queries in front, in between, alone and absent"


@exercise
def check_which_mask(which_mask: Callable[[Run, Tensor], str]) -> str:
    """which_mask(run, text_ids (1, T)) -> the name of the mask that run uses."""
    sizes = QFormerConfig.tiny()
    assert sizes.vocab_size
    patterns: list[MaskPattern] = ["unimodal", "bidirectional", "causal"]
    for length in (2, 5, 8):
        for choice in noise(3).argsort().tolist():
            pattern = patterns[choice]
            run = _black_box(sizes, pattern)
            words = 1 + noise(1, sizes.vocab_size - 1).argsort()[:, :length]  # all differ
            given = which_mask(run, words)
            expect(given in patterns, f"{given!r} is none of {', '.join(patterns)}")
            if pattern == "bidirectional":
                mistake = "the queries do notice when the text changes: bidirectional"
            elif given == "bidirectional":
                mistake = f"no query notices a new word, so it is not bidirectional but {pattern}"
            elif pattern == "causal":
                mistake = "no word notices a change behind it: causal"
            else:
                mistake = "the first word notices that the last one changed: unimodal, not causal"
            expect(given == pattern, mistake)
    return "nine Q-Formers, each told by its behaviour alone"


def _black_box(sizes: QFormerConfig, pattern: MaskPattern) -> Run:
    """A random Q-Former before one random image."""
    qformer = _randomise(QFormer(sizes).eval().requires_grad_(False))
    image = noise(1, 6, sizes.image_width)

    def run(text_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = qformer(image, text_ids, pattern=pattern)
        return output.queries, output.text

    return run


@torch.no_grad()
def _randomise(module: nn.Module) -> nn.Module:
    """Large random parameters, so that no effect hides in small numbers."""
    for parameter in module.parameters():
        parameter.copy_(0.3 * noise(*parameter.shape))
    return module
