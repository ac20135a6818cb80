"""Checks of lesson 07: a caption that teaches, a caption that is scored, a caption that is written.

Axis letters: `B` captions, `T` tokens, `V` vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from blip2_edu.attention import KeysValues
from blip2_edu.exercises import exercise, expect, noise
from blip2_edu.qformer import QFormerConfig
from blip2_edu.stage1 import Blip2Stage1, Stage1Config

CLS, SEP, DEC = 101, 102, 30522


@exercise
def check_inputs_and_labels(inputs_and_labels: Callable[[Tensor, Tensor, int], tuple]) -> str:
    """inputs_and_labels(text_ids (B, T), text_mask (B, T), dec) -> two tensors (B, T - 1)."""
    ids = 1000 + noise(4 * 9).argsort().reshape(4, 9)
    lengths = torch.tensor([9, 4, 6, 5])
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids[:, 0] = CLS
    ids[torch.arange(4), lengths - 1] = SEP
    ids = ids * mask
    before, next_tokens = ids.clone(), ids[:, 1:].clone()
    real = mask[:, 1:].bool()

    result = inputs_and_labels(ids, mask, DEC)
    expect(isinstance(result, tuple | list) and len(result) == 2, "return inputs and labels")
    inputs, labels = result
    expect(torch.equal(ids, before), "you changed the caller's text_ids: clone them first")
    expect(inputs.shape == labels.shape, "inputs and labels must have the same shape")
    expect(
        inputs.shape == (4, 8),
        "of T tokens T - 1 are inputs and T - 1 are labels: the last has nothing to predict, and "
        "the first is predicted by nothing",
    )
    expect((inputs[:, 0] != CLS).all(), "the inputs begin with [CLS]: [DEC] stands in its place")
    expect((inputs[:, 0] == DEC).all(), "the inputs must begin with [DEC]")
    expect(
        not torch.equal(labels[real], inputs[real]) and not (labels == DEC).any(),
        "each label is the token that stands there: shift them, so that it is the next one",
    )
    expect(torch.equal(inputs[:, 1:], before[:, 1:-1]), "after [DEC] the inputs are the words")
    expect((labels[~real] == -100).all(), "padding is among the labels: put -100 there")
    expect(
        (labels[torch.arange(4), lengths - 2] == SEP).all(),
        "[SEP] must be a label, or the model never learns to stop",
    )
    expect(torch.equal(labels[real], next_tokens[real]), "a label is the next token of the text")
    return "[DEC] in front, every label the next token, no padding among them."


@exercise
def check_caption_scores(caption_scores: Callable[[Tensor, Tensor], Tensor]) -> str:
    """caption_scores(logits (B, T, V), labels (B, T), -100 on padding) -> (B,)."""
    logits, labels = noise(5, 7, 11), noise(5, 7, 11).argmax(dim=-1)
    lengths = torch.tensor([7, 2, 4, 3, 1])
    real = torch.arange(7) < lengths[:, None]
    right = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0] * real
    labels = labels.masked_fill(~real, -100)
    expected = right.sum(dim=1) / lengths

    def same(other: Tensor) -> bool:
        return scores.shape == other.shape and torch.allclose(scores, other, atol=1e-5)

    scores = caption_scores(logits.clone(), labels.clone())
    expect(isinstance(scores, Tensor), "return a tensor")
    expect(scores.shape == (5,), "one score for each caption: average over its own tokens only")
    expect(not same(-expected), "the sign: the better caption must have the higher score")
    expect(
        not same(right.sum(dim=1)),
        "you sum: the longer caption would nearly always lose. Take the mean",
    )
    expect(
        not same(right.mean(dim=1)),
        "you divide by the padded length: each caption has its own number of tokens",
    )
    smoothed = 0.9 * right + 0.1 * logits.log_softmax(-1).mean(-1) * real
    expect(
        not same(smoothed.sum(dim=1) / lengths), "label smoothing is for training, not for scores"
    )
    expect(
        not same((right.exp() * real).sum(dim=1) / lengths),
        "you average probabilities: take their logarithms",
    )
    expect(same(expected), "the mean, over the real tokens, of the label's log probability")
    return "one mean log probability a caption, whatever the padding."


@exercise
def check_greedy_captions(
    greedy_captions: Callable[[Blip2Stage1, list[KeysValues | None], int, int], Tensor],
) -> str:
    """greedy_captions(model, image, end, length) -> ids (B, length), 0 after the end."""
    model, image, words, end = _captions_with_an_end()
    is_end = words == end
    ended = (is_end.cumsum(dim=1) - is_end.long()) > 0  # after its first end
    expected = words.masked_fill(ended | is_end, 0)
    batch, length = words.shape
    texts, images = [], []

    def count(module: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        names = dict(zip(("image", "text_ids"), arguments, strict=False)) | options
        images.append(names.get("image") is not None)
        texts.append(0 if names.get("text_ids") is None else names["text_ids"].shape[1])

    model.qformer.register_forward_pre_hook(count, with_kwargs=True)
    with torch.no_grad():
        captions = greedy_captions(model, image, end, length)
    expect(isinstance(captions, Tensor), "return a tensor of ids")
    expect(captions.shape == (batch, length), f"return ids (B, length), here ({batch}, {length})")
    expect(
        torch.equal(captions[:, 0], expected[:, 0]),
        "the first word is wrong already: feed [DEC], the last id of the vocabulary, with the "
        "queries' cache, and take the likeliest word",
    )
    expect(
        not torch.equal(captions, words),
        "a caption that has ended goes on: fill it with 0 instead",
    )
    expect(
        not torch.equal(captions, words.masked_fill(ended, 0)),
        "the end itself is no word of the caption: put 0 there",
    )
    expect(
        torch.equal(captions, expected),
        "the first word is right and later ones are not: each step needs the newest word and the "
        "newest cache, in which all earlier words are",
    )
    expect(
        sum(images) == 1,
        f"right, but you read the image {sum(images)} times: once is enough, the cache keeps it",
    )
    expect(
        sum(texts) <= length,
        f"right, but {sum(texts)} text positions were computed for {length} words: feed the newest "
        "word alone, the cache has the rest",
    )
    return f"{length} words, {sum(texts)} text positions computed, and the image read once."


@torch.no_grad()
def _captions_with_an_end() -> tuple[Blip2Stage1, list[KeysValues | None], Tensor, int]:
    """A model, projected images, what it says of them (8, 8), and a word to be taken for the end.

    Drawn anew until some captions end in the middle, none at once, and most not at all.
    """
    while True:
        model = _talkative_model()
        image = model.project_image(noise(8, 5, model.config.qformer.image_width))
        words = _without_cache(model, image, length=8)
        end = int(words[0, 3])
        ends = words == end
        if not ends[:, 0].any() and ends.any(dim=1).sum() <= 4:
            return model, image, words, end


@torch.no_grad()
def _talkative_model() -> Blip2Stage1:
    """Tiny and random, with numbers so large that every image and every word makes a difference."""
    model = Blip2Stage1(Stage1Config(QFormerConfig.tiny(), projection_width=8)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            scale = 1.0 if "embeddings" in name else 2 * parameter.shape[-1] ** -0.5
            parameter.copy_(scale * noise(*parameter.shape))
    return model


def _without_cache(model: Blip2Stage1, image: list[KeysValues | None], length: int) -> Tensor:
    """Every word from a pass over everything: (B, length), no heed paid to the end."""
    batch = next(x for x in image if x)[0].shape[0]
    ids = torch.full((batch, 1), model.qformer.word_embeddings.num_embeddings - 1)
    for _ in range(length):
        text = model.qformer(image, ids, pattern="causal").text
        words = model.generate_logits(text[:, -1:]).argmax(dim=-1)
        ids = torch.cat([ids, words], dim=1)
    return ids[:, 1:]
