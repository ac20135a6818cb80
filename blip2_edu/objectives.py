"""The three losses of stage 1 (paper, section 3.2): ITC, ITM, ITG. Plain functions on tensors.

Axis letters: `B` pairs in the batch, `A` pairs on all processes together, `Q` queries, `P` width of
the shared space.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, pad


class _Gather(torch.autograd.Function):
    """PyTorch's own gathering with gradients is deprecated; this is all of it that ITC needs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        everyones = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(everyones)  # the loss of every process pulls at every row
        return everyones.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Tensor) -> Tensor:
    """(B, ...) on every process -> (A, ...) on all of them, in the order of ranks.

    Gradients flow back to the process that each row came from.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _Gather.apply(x.contiguous())


def gather_texts(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T) of every process, padded to the longest of all -> (A, T) each."""
    longest = torch.tensor(ids.shape[1], device=ids.device)
    if dist.is_initialized():
        dist.all_reduce(longest, dist.ReduceOp.MAX)
    missing = (0, int(longest) - ids.shape[1])
    return gather(pad(ids, missing)), gather(pad(mask, missing))


def number_pairs(pairs: Tensor) -> Tensor:
    """For B `pairs` of this process, numbers (B,) that no pair of any other process has."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.arange(len(pairs), device=pairs.device) + rank * len(pairs)


def share_of_mean(count: int, device: torch.device) -> Tensor | float:
    """What a mean over `count` items here must be multiplied with, so that the mean over processes
    (which is what data parallelism takes of gradients) is the mean over the items of all.
    """
    if not dist.is_initialized():
        return 1.0
    everyones = torch.tensor(float(count), device=device)
    dist.all_reduce(everyones)
    return count * dist.get_world_size() / everyones


def itc_similarity(image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
    """How well each image fits each text: the best of the queries decides.

    image_embeddings (I, Q, P) and text_embeddings (T, P), both of unit length. Returns (I, T), each
    the maximum over queries of the dot product. Never in half precision, whatever autocast says:
    bfloat16 would round a similarity of 0.9 to steps of 0.004, and every ranking would be full of
    ties.
    """
    precise = torch.promote_types(image_embeddings.dtype, torch.float32)
    with torch.autocast(image_embeddings.device.type, enabled=False):
        every_query = torch.einsum(
            "iqp,tp->itq", image_embeddings.to(precise), text_embeddings.to(precise)
        )
    return every_query.amax(dim=-1)


def itc_loss(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    temperature: Tensor | float,
    image_ids: Tensor | None = None,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Image-text contrastive loss, a scalar: pick each image's text, and each text's image.

    image_embeddings (B, Q, P) and text_embeddings (B, P) of unit length, row i of one belonging to
    row i of the other. image_ids (B,) says which rows show the same image: their captions share
    the target instead of being one another's negatives. Under torch.distributed every process
    compares its own rows with the gathered rows of all. An untrained model scores ln A.
    """
    if image_ids is None:
        image_ids = number_pairs(text_embeddings)
    image_to_text = itc_similarity(image_embeddings, gather(text_embeddings))  # (B, A)
    text_to_image = itc_similarity(gather(image_embeddings), text_embeddings).T  # (B, A)
    positives = (image_ids[:, None] == gather(image_ids)[None, :]).to(image_to_text.dtype)
    targets = positives / positives.sum(dim=1, keepdim=True)
    return (
        cross_entropy(image_to_text / temperature, targets, label_smoothing=label_smoothing)
        + cross_entropy(text_to_image / temperature, targets, label_smoothing=label_smoothing)
    ) / 2


def sample_hard_negatives(similarity: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """For each row, draw a wrong column, the more similar the likelier (paper, section 3.2).

    similarity (B, A) in units of the softmax (already divided by the temperature), same (B, A) true
    where row and column belong together. Returns (rows, columns), both (R,) with R <= B: a row
    that has no wrong column, as in a batch of one, is left out.
    """
    scores = similarity.float().masked_fill(same, float("-inf"))
    rows = (~same).any(dim=1).nonzero()[:, 0]
    if len(rows) == 0:
        return rows, rows
    # A model that has come to NaN must reach its loss, which says so; multinomial would only crash.
    chances = scores[rows].softmax(dim=1).nan_to_num(nan=1.0)
    return rows, torch.multinomial(chances, 1)[:, 0]


def query_cosines(queries: Tensor) -> Tensor:
    """Cosines between the different queries of each image: (B, Q, D) -> (B, Q x (Q - 1))."""
    unit = normalize(queries.float(), dim=-1)
    different = ~torch.eye(unit.shape[1], dtype=torch.bool, device=unit.device)
    return (unit @ unit.transpose(1, 2))[:, different]


def query_overlap(queries: Tensor) -> Tensor:
    """Mean squared cosine between the different queries of an image, a scalar from 0 to 1.

    queries (B, Q, D). Not in the paper: in a short training the queries of an image become one and
    the same within twenty steps, unless this is part of the loss.
    """
    return query_cosines(queries).square().mean()


def itm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Image-text matching: does this pair belong together?

    logits (pairs, 2), labels (pairs,) 0 or 1. With one positive to two negatives, knowing nothing
    but that costs 0.6365.
    """
    return cross_entropy(logits, labels)


def itg_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """Image-grounded text generation: logits (..., V) of the token that follows, labels (...).

    Labels of -100 do not count.
    """
    return cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=-100, label_smoothing=label_smoothing
    )
