"""Typical wrong attempts at the exercises of lesson 06, and words their verdicts must hold."""

import math

import torch

SAME = float("-inf")


def in_bits(n):
    p = 1 / (n + 1)
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def sum_of_both(n):
    return -math.log(1 / (n + 1)) - math.log(n / (n + 1))


def mean_of_probabilities(queries, head):
    return head(queries).softmax(dim=-1).mean(dim=1)[:, 1]


def does_not_match(queries, head):
    return head(queries).mean(dim=1).softmax(dim=-1)[:, 0]


def across_pairs(queries, head):
    return head(queries).mean(dim=1).softmax(dim=0)[:, 1]


def draw(scores, same):
    return torch.multinomial(scores.masked_fill(same, SAME).softmax(dim=1), 1)[:, 0]


def same_image(image_ids):
    return image_ids[:, None] == image_ids[None, :]


def unmasked(similarity, image_ids):
    return torch.multinomial(similarity.T.softmax(dim=1), 1)[:, 0]


def only_the_diagonal(similarity, image_ids):
    return draw(similarity.T, torch.eye(len(image_ids), dtype=torch.bool))


def the_hardest(similarity, image_ids):
    return similarity.T.masked_fill(same_image(image_ids), SAME).argmax(dim=1)


def at_random(similarity, image_ids):
    return draw(0 * similarity.T, same_image(image_ids))


def not_transposed(similarity, image_ids):
    return draw(similarity, same_image(image_ids))


def easiest_first(similarity, image_ids):
    return draw(-similarity.T, same_image(image_ids))


def all_of_them(similarity, match, k):
    return (similarity + match).argsort(dim=1, descending=True)


def by_match_alone(similarity, match, k):
    first = similarity.argsort(dim=1, descending=True)
    best, rest = first[:, :k], first[:, k:]
    order = match.gather(1, best).argsort(dim=1, descending=True)
    return torch.cat([best.gather(1, order), rest], dim=1)


def forgets_to_gather(similarity, match, k):
    first = similarity.argsort(dim=1, descending=True)
    order = (similarity + match).gather(1, first[:, :k]).argsort(dim=1, descending=True)
    return torch.cat([order, first[:, k:]], dim=1)


def drops_the_rest(similarity, match, k):
    first = similarity.argsort(dim=1, descending=True)[:, :k]
    order = (similarity + match).gather(1, first).argsort(dim=1, descending=True)
    return first.gather(1, order)


MISTAKES = {
    "check_knowing_nothing": [
        (lambda n: math.log(2), "one half"),
        (lambda n: math.log(n + 1), "as ITC does"),
        (in_bits, "in bits"),
        (sum_of_both, "mean over all pairs"),
    ],
    "check_match_probability": [
        (mean_of_probabilities, "averaged the probabilities"),
        (does_not_match, "does not match"),
        (across_pairs, "with one another"),
        (lambda queries, head: head(queries).mean(dim=1)[:, 1], "that is a logit"),
        (lambda queries, head: head(queries).mean(dim=1).softmax(dim=1), "both columns"),
        (lambda queries, head: head(queries).amax(dim=1).softmax(dim=1)[:, 1], "best query"),
    ],
    "check_wrong_images": [
        (unmasked, "its own image"),
        (only_the_diagonal, "diagonal alone"),
        (the_hardest, "the harder the likelier"),
        (at_random, "all wrong images alike"),
        (not_transposed, "transpose"),
        (easiest_first, "the chances are off"),
    ],
    "check_rerank": [
        (all_of_them, "only the k best"),
        (by_match_alone, "match logit alone"),
        (forgets_to_gather, "gather"),
        (drops_the_rest, "all texts are ranked"),
        (lambda s, m, k: s.argsort(dim=1, descending=True), "still that of the similarity"),
        (lambda s, m, k: s + m, "these are scores"),
    ],
}
