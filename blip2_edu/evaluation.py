"""How good is it? Retrieval, captions, answers, and where the attention points."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from blip2_edu.data import Examples, FeatureCache
from blip2_edu.objectives import itc_similarity
from blip2_edu.stage1 import Blip2Stage1
from blip2_edu.text import Tokenizer


def retrieval_scores(similarity: Tensor, owner: Tensor) -> dict[str, float]:
    """Recall at 1, 5, 10 in percent, text retrieval (TR) and image retrieval (IR).

    similarity (I, T) of I images and T texts; owner (T,) says which image each text belongs to.
    TR@k: one of an image's own texts is among its k best. IR@k: a text's image is among its k best.
    """
    own = owner[None, :] == torch.arange(len(similarity), device=owner.device)[:, None]  # (I, T)
    text_rank = _rank_of_best(similarity, own)  # (I,)
    image_rank = _rank_of_best(similarity.T, own.T)  # (T,)
    return {
        f"{name}@{k}": 100 * (ranks < k).float().mean().item()
        for name, ranks in (("TR", text_rank), ("IR", image_rank))
        for k in (1, 5, 10)
    }


def _rank_of_best(scores: Tensor, right: Tensor) -> Tensor:
    """Per row: how many wrong columns score at least as high as the best right one."""
    best = scores.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~right).sum(dim=1)


@torch.no_grad()
def retrieval(
    model: Blip2Stage1,
    tokenizer: Tokenizer,
    examples: Examples,
    features: FeatureCache,
    batch_size: int = 100,
) -> dict[str, float]:
    """Retrieval over all images and all their captions, by ITC alone."""
    device = model.temperature.device
    texts = [text for captions in examples.captions for text in captions]
    counts = torch.tensor([len(captions) for captions in examples.captions])
    owner = torch.repeat_interleave(torch.arange(len(examples)), counts)
    image_embeddings = torch.cat(
        [
            model.embed_image(features.rows(rows).to(device))
            for rows in batched(range(len(examples)), batch_size)
        ]
    )
    text_embeddings = torch.cat(
        [
            model.embed_text(*(t.to(device) for t in tokenizer(some)))
            for some in batched(texts, batch_size)
        ]
    )
    similarity = torch.cat(
        [itc_similarity(image_embeddings, some) for some in text_embeddings.split(500)], dim=1
    )
    return retrieval_scores(similarity.cpu(), owner)


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one perhaps shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
