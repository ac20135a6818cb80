"""Where the queries look: attention, its gradients, rollout.

Axis letters: `B` images, `H` heads, `Q` queries, `N` image features, `R` rows and `K` columns of
the encoder's grid.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from einops import rearrange
from torch import Tensor

from blip2_edu.attention import Attention, KeysValues
from blip2_edu.blip2 import Blip2, ImageSource
from blip2_edu.stage1 import Blip2Stage1


@torch.no_grad()
def attention_maps(
    model: Blip2, images: ImageSource | Sequence[ImageSource], layer: int = -1
) -> Tensor:
    """How the bridge's queries attend to the image, (B, H, Q, R, K).

    layer counts the blocks that have cross-attention. What a query gives to features of no patch
    (a ViT's class token) is left out, so a map sums to at most one. Raises ImageError, and
    ValueError if the bridge attends to nothing.
    """
    look = model.bridge.look(model.encode_images(images))
    return _fold(model, look.cross_attention[layer])


def match_attention(
    model: Blip2, images: ImageSource | Sequence[ImageSource], texts: Sequence[str]
) -> Tensor:
    """Where each image supports its text: gradient-weighted maps of ITM's match logit, (B, R, K).

    Of the Q-Former that matches, over all its blocks. Warns of texts that are cut, with CutText.
    Raises ImageError, and WeightsError if the checkpoint has no such Q-Former.
    """
    reader = model.retriever()
    ids, mask = (x.to(model.device) for x in reader.tokenizer(list(texts), warn=True))
    return _fold(model, match_relevance(reader, model.encode_images(images), ids, mask))


def match_relevance(
    reader: Blip2Stage1, image_features: Tensor, text_ids: Tensor, text_mask: Tensor
) -> Tensor:
    """How much each frozen feature of (B, N, W) speaks for its text (B, T): (B, N).

    Attention weighted by the gradient of the difference of ITM's two logits.
    """
    features = image_features.detach().requires_grad_()
    with torch.enable_grad(), _watch(reader.qformer.readers()) as watched:
        image = reader.project_image(features)
        read = reader.qformer(image, text_ids, text_mask, return_attention=True)
        logits = reader.itm_head(read.queries).mean(dim=1)  # (B, 2)
        score = logits[:, 1] - logits[:, 0]
        return _weigh_by_gradient(score, read.cross_attention, image, watched)


def word_attention(
    model: Blip2,
    images: ImageSource | Sequence[ImageSource],
    texts: Sequence[str],
    prompts: Sequence[str] | None = None,
) -> list[Tensor]:
    """Where each word of a text came from: gradient-weighted maps, (words, R, K) for each image.

    Words are those of `text.split()`; a word's score is the log likelihood of its tokens after the
    prompt (by default that of captions) and the words before it. An empty text has no maps.
    Raises ImageError, and ValueError if the bridge attends to nothing.
    """
    language, prompts = model.language_model, prompts or [model.config.prompts.caption] * len(texts)
    words = [language.word_of_token(text) for text in texts]
    counts = [max(of_token, default=-1) + 1 for of_token in words]
    features = model.encode_images(images).requires_grad_()
    with torch.enable_grad(), _watch(model.bridge.readers()) as watched:
        look = model.bridge.look(features)
        scores = language.log_likelihoods(look.soft_prompt, list(prompts), list(texts))  # (B, T)
        maps = [features.new_zeros(len(features), 0, features.shape[1])]  # (B, words, N) each
        word_of = torch.full_like(scores, -1)  # (B, T)
        for row, of_token in zip(word_of, words, strict=True):
            row[: len(of_token)] = row.new_tensor(of_token)
        for word in range(max(counts)):
            score = (scores * (word_of == word)).sum(dim=1)  # (B,)
            relevance = _weigh_by_gradient(score, look.cross_attention, look.image, watched)
            maps.append(relevance[:, None])
    maps = _fold(model, torch.cat(maps, dim=1))  # (B, words, R, K)
    return [of_image[:count] for of_image, count in zip(maps, counts, strict=True)]


@contextmanager
def _watch(readers: list[Attention]) -> Generator[list[Tensor]]:
    """Collect what each of these attentions reads from the image, (B, Q, D) each."""
    watched: list[Tensor] = []
    hooks = [
        attention.output.register_forward_pre_hook(
            # What another thread reads meanwhile, without gradients, is not meant.
            lambda _, inputs: watched.append(inputs[0]) if inputs[0].requires_grad else None
        )
        for attention in readers
    ]
    try:
        yield watched
    finally:
        for hook in hooks:
            hook.remove()


def _weigh_by_gradient(
    score: Tensor, weights: list[Tensor], image: list[KeysValues | None], watched: list[Tensor]
) -> Tensor:
    """Attention times its gradient, where both raise the score, summed up: (B, N).

    As in Chefer et al. 2021. A fused kernel gives no gradient of attention weights; but what
    is read is weights times values, so it is the gradient of what is read, times the values.
    """
    gradients = torch.autograd.grad(score.sum(), watched, retain_graph=True)
    values = [keys_values[1] for keys_values in image if keys_values is not None]
    raised = []  # in every block, (B, N)
    for weight, value, gradient in zip(weights, values, gradients, strict=True):
        gradient = rearrange(gradient, "b q (h c) -> b h q c", h=value.shape[1])
        raises = weight * (gradient @ value.transpose(-1, -2))  # (B, H, Q, N)
        raised.append(raises.clamp(min=0).sum(dim=(1, 2)))
    return torch.stack(raised).sum(dim=0).detach()


@torch.no_grad()
def attention_rollout(model: Blip2, images: ImageSource | Sequence[ImageSource]) -> Tensor:
    """How much of each patch is in each query after all blocks, (B, Q, R, K).

    Rollout (Abnar and Zuidema 2020) through self- and cross-attention of the bridge: in each of
    them a residual path carries half. Raises ImageError, and ValueError if it attends to nothing.
    """
    look = model.bridge.look(model.encode_images(images))
    cross = iter(look.cross_attention)
    seen = torch.zeros_like(look.cross_attention[0][:, 0])  # (B, Q, N)
    for image, self_attention in zip(look.image, look.self_attention, strict=True):
        seen = (seen + self_attention.mean(dim=1) @ seen) / 2
        if image is not None:  # this block reads it
            seen = (seen + next(cross).mean(dim=1)) / 2
    return _fold(model, seen)


def _fold(model: Blip2, maps: Tensor) -> Tensor:
    """Maps (..., N) -> (..., R, K), without what belongs to no patch."""
    encoder = model.image_encoder
    return rearrange(
        maps[..., encoder.num_prefix_tokens :], "... (r k) -> ... r k", r=encoder.grid[0]
    )
