"""Wrong attempts at the exercises of lesson 11, and words that their verdicts must hold."""

import torch

from blip2_edu.metrics import pointing_game


def fold(weights, rows):
    return weights.unflatten(-1, (rows, -1))


def renormalised(weights, prefix, rows):
    patches = weights[..., prefix:]
    return fold(patches / patches.sum(dim=-1, keepdim=True), rows)


def pointing(x=lambda column, w: (column + 0.5) * w, y=lambda row, h: (row + 0.5) * h, over=any):
    def points_inside(attention, boxes, size):
        rows, columns = attention.shape
        row, column = divmod(int(attention.argmax()), columns)
        at_x, at_y = x(column, size[0] / columns), y(row, size[1] / rows)
        return over(x0 <= at_x <= x1 and y0 <= at_y <= y1 for x0, y0, x1, y1 in boxes)

    return points_inside


def swapped(attention, boxes, size):
    return pointing_game(attention.mT, boxes, size)


def first_alone(attention, boxes, size):
    return pointing_game(attention, boxes[:1], size)


def roll(keep=0.5, cross_first=False, turn=False, mix=0.5):
    def rollout(selves, crosses):
        seen = torch.zeros_like(crosses[0])
        for self_attention, cross in zip(selves, crosses, strict=True):
            if cross_first:
                seen = keep * seen + mix * cross
            seen = keep * seen + mix * (self_attention.mT if turn else self_attention) @ seen
            if not cross_first:
                seen = keep * seen + mix * cross
        return seen

    return rollout


MISTAKES = {
    "check_fold_patches": [
        (lambda w, prefix, rows: fold(w[..., : w.shape[-1] - prefix], rows), "come first"),
        (lambda w, prefix, rows: fold(w[..., prefix:], 4), "rows and columns are swapped"),
        (lambda w, prefix, rows: fold(w[..., prefix:], 4).mT, "row by row"),
        (renormalised, "should stay missing"),
        (lambda w, prefix, rows: w[..., prefix:], "the shape should be"),
        (lambda w, prefix, rows: fold(w[..., 1:], rows), "your code stops"),
    ],
    "check_points_inside": [
        (swapped, "x for y"),
        (pointing(x=lambda column, w: column * w), "not with its corner"),
        (pointing(y=lambda row, h: row * h), "not with its corner"),
        (first_alone, "not only the first"),
        (pointing(over=all), "need not all be"),
        (lambda attention, boxes, size: 1, "True or False"),
    ],
    "check_gradient_weighted": [
        (lambda w, g: (w * g).sum(dim=(0, 1)), "clamp at zero"),
        (lambda w, g: (w * g).sum(dim=(0, 1)).clamp(min=0), "you clamped the sum"),
        (lambda w, g: (w * g).sum(dim=0).clamp(min=0).sum(dim=0), "over the heads"),
        (lambda w, g: (w * g).sum(dim=1).clamp(min=0).sum(dim=0), "over the queries"),
        (lambda w, g: (w * g).abs().sum(dim=(0, 1)), "objections as support"),
        (lambda w, g: g.clamp(min=0).sum(dim=(0, 1)), "weights are missing"),
        (lambda w, g: w.sum(dim=(0, 1)), "gradients are missing"),
        (lambda w, g: (w * g).clamp(min=0).mean(dim=(0, 1)), "this is a mean"),
        (lambda w, g: (w * g).clamp(min=0), "one number a patch"),
    ],
    "check_rollout": [
        (roll(cross_first=True), "self-attention comes first"),
        (roll(keep=0.0, mix=1.0), "residual"),
        (lambda selves, crosses: sum(crosses) / len(crosses), "forgets self-attention"),
        (roll(turn=True), "a row of the self-attention asks"),
        (roll(keep=1.0, mix=1.0), "more than they may"),
        (roll(keep=0.7, mix=0.3), "another result"),
    ],
}
