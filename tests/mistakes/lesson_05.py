"""Typical mistakes in the exercises of lesson 05."""

import torch


def every_query(images, texts):
    return torch.einsum("iqp,tp->itq", images, texts)


def targets(image_ids, smoothing, share=True, spread=True):
    same = (image_ids[:, None] == image_ids[None, :]).float()
    if share:
        same = same / same.sum(dim=1, keepdim=True)
    return (1 - smoothing) * same + (smoothing / len(image_ids) if spread else 0)


def smoothed_over_the_wrong(image_ids, smoothing):
    wrong = (image_ids[:, None] != image_ids[None, :]).float()
    right = targets(image_ids, smoothing, spread=False)
    return right + smoothing * wrong / wrong.sum(dim=1, keepdim=True)


def gradient(similarity, temperature, rows=0.5, columns=0.5):
    right, scores = torch.eye(len(similarity)), similarity / temperature
    pull = rows * (scores.softmax(dim=1) - right) + columns * (scores.softmax(dim=0) - right)
    return pull / len(similarity) / temperature


MISTAKES = {
    "check_winning_query": [
        (lambda i, t: every_query(i, t).amax(dim=-1), "numbers of the winners"),
        (lambda i, t: every_query(i, t).argmin(dim=-1), "fit worst"),
        (lambda i, t: every_query(i, t).abs().argmax(dim=-1), "leave the signs in"),
        (lambda i, t: every_query(i, t).argmax(dim=-1).T, "images come first"),
        (lambda i, t: every_query(i, t).argmax(dim=1), "(I, T)"),
        (lambda i, t: every_query(i, t).argmax(dim=-1) * 0, "some winners are wrong"),
    ],
    "check_recall_at_1": [
        (
            lambda s, owner: (owner[s.argmax(dim=1)] == torch.arange(len(s))).float().mean(),
            "this is text retrieval",
        ),
        (lambda s, owner: (s.argmax(dim=0) == torch.arange(len(owner))).float().mean(), "`owner`"),
        (lambda s, owner: 100 * (s.argmax(dim=0) == owner).float().mean(), "percentage"),
        (lambda s, owner: (s.argmax(dim=0) == owner).sum(), "count"),
        (lambda s, owner: (s.argmin(dim=0) == owner).float().mean(), "you say"),
    ],
    "check_shared_targets": [
        (lambda ids, e: (1 - e) * torch.eye(len(ids)) + e / len(ids), "compare the image ids"),
        (lambda ids, e: targets(ids, e, share=False), "each row must sum to 1: divide"),
        (lambda ids, e: targets(ids, 0.0), "smoothing is missing"),
        (lambda ids, e: targets(ids, e, spread=False), "gave it to nobody"),
        (smoothed_over_the_wrong, "over the wrong columns only"),
    ],
    "check_similarity_gradient": [
        (lambda s, t: -gradient(s, t), "the sign is turned"),
        (lambda s, t: gradient(s, t) * t, "chain rule"),
        (lambda s, t: gradient(s, t) * len(s), "divide by B"),
        (lambda s, t: gradient(s, t, 1.0, 1.0), "averaged, not added"),
        (lambda s, t: gradient(s, t, 1.0, 0.0), "one direction only"),
        (lambda s, t: gradient(s, t, 0.0, 0.5), "one direction only"),
        (lambda s, t: gradient(s, 1.0), "compare with autograd"),
    ],
}
