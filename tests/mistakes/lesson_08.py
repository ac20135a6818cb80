"""Wrong attempts at the exercises of lesson 08, and words that the verdict must hold."""

import math

import torch


def starts_at_nothing(step, steps, warmup):
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def jumps(step, steps, warmup):
    if step < warmup:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def cosine_from_step_0(step, steps, warmup):
    return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * step / steps))


def quarter_period(step, steps, warmup):
    if step < warmup:
        return (step + 1) / warmup
    return math.cos(0.25 * math.pi * (step - warmup) / (steps - warmup))


def line_down(step, steps, warmup):
    return (step + 1) / warmup if step < warmup else 1 - (step - warmup) / (steps - warmup)


def quadratic(step, steps, warmup):
    angle = math.pi * (step - warmup) / (steps - warmup)
    return (step + 1) / warmup if step < warmup else (0.5 * (1 + math.cos(angle))) ** 1.1


def only_biases(model, weight_decay):
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in named if "bias" not in n], "weight_decay": weight_decay},
        {"params": [p for n, p in named if "bias" in n], "weight_decay": 0.0},
    ]


def with_frozen(model, weight_decay):
    everything = list(model.parameters())
    return [
        {"params": [p for p in everything if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in everything if p.ndim < 2], "weight_decay": 0.0},
    ]


def matrices_only(model, weight_decay):
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    return [{"params": matrices, "weight_decay": weight_decay}]


def exactly_two(model, weight_decay):
    learning = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in learning if p.ndim == 2], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.ndim != 2], "weight_decay": 0.0},
    ]


def unnamed_decay(model, weight_decay):
    return [{"params": [p for p in model.parameters() if p.requires_grad]}]


def own_pairs(similarity, owner):
    return owner[None, :] == torch.arange(len(similarity))[:, None]


def recalls(similarity, owner, k):
    own = own_pairs(similarity, owner)
    text = own.gather(1, similarity.topk(k, dim=1).indices)  # (I, k)
    image = own.gather(0, similarity.topk(k, dim=0).indices)  # (k, T)
    return text, image


def shares(similarity, owner, k):
    text, image = recalls(similarity, owner, k)
    return text.any(1).float().mean(), image.any(0).float().mean()


def percent(similarity, owner, k):
    return [100 * share for share in shares(similarity, owner, k)]


def share_of_own(similarity, owner, k):
    text, _ = recalls(similarity, owner, k)
    found = 100 * (text.sum(1) / owner.bincount()).mean()
    return found, percent(similarity, owner, k)[1]


def first_caption_only(similarity, owner, k):
    own, (text, image) = own_pairs(similarity, owner), recalls(similarity, owner, k)
    first = own.float().argmax(dim=1)
    return 100 * text.any(1).float().mean(), 100 * image.any(0)[first].float().mean()


def one_caption_an_image(similarity, owner, k):
    owner = torch.arange(len(owner))
    return percent(similarity, owner, k)


def sum_of_all(similarity, match, k):
    return (similarity + match).argsort(descending=True)


def itc_alone(similarity, match, k):
    return similarity.argsort(descending=True)


def only_the_best(similarity, match, k):
    best = similarity.topk(k).indices
    return best[(similarity + match)[best].argsort(descending=True)]


def match_alone(similarity, match, k):
    order = similarity.argsort(descending=True)
    return torch.cat([order[:k][match[order[:k]].argsort(descending=True)], order[k:]])


def forgets_the_indices(similarity, match, k):
    order = similarity.argsort(descending=True)
    return torch.cat([(similarity + match)[order[:k]].argsort(descending=True), order[k:]])


def rest_by_sum(similarity, match, k):
    order, total = similarity.argsort(descending=True), similarity + match
    parts = order[:k], order[k:]
    return torch.cat([part[total[part].argsort(descending=True)] for part in parts])


def worst_of_the_best_first(similarity, match, k):
    order = similarity.argsort(descending=True)
    return torch.cat([order[:k][(similarity + match)[order[:k]].argsort()], order[k:]])


MISTAKES = {
    "check_warmup_cosine": [
        (starts_at_nothing, "is wasted"),
        (jumps, "straight line"),
        (cosine_from_step_0, "count its steps from there"),
        (quarter_period, "half a period"),
        (line_down, "between"),
        (quadratic, "between"),
    ],
    "check_decay_groups": [
        (only_biases, "is a vector or a single number"),
        (with_frozen, "encoder.weight is frozen"),
        (matrices_only, "is in no group"),
        (exactly_two, "queries has 3 dimensions"),
        (unnamed_decay, "names no weight_decay"),
    ],
    "check_recall_at_k": [
        (shares, "give percent"),
        (share_of_own, "ONE of an image's own texts"),
        (first_caption_only, "also the second"),
        (one_caption_an_image, "should be"),
        (lambda *x: percent(*x)[::-1], "wrong way round"),
    ],
    "check_rerank_by_sum": [
        (sum_of_all, "too costly"),
        (itc_alone, "ITC alone"),
        (match_alone, "ITM alone"),
        (only_the_best, "must be in the order"),
        (forgets_the_indices, "must be in the order"),
        (rest_by_sum, "keeps its order"),
        (worst_of_the_best_first, "descending"),
    ],
}
