"""Wrong attempts at the exercises of lesson 02, and words that their verdicts must hold."""

import torch
from einops import rearrange
from torch import nn


def lay(pattern):
    def unpatchify(patches, rows, size):
        return rearrange(patches, pattern, r=rows, p=size, q=size)

    return unpatchify


def keep_asleep(module):
    module.train = lambda mode=True: module
    return module


class WithoutGradients(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module.requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, x):
        return self.module(x)


def zeroed(module):
    for p in module.parameters():
        p.data.zero_()
    return keep_asleep(module.requires_grad_(False).eval())


MISTAKES = {
    "check_num_tokens": [
        (lambda image, patch: (image // patch) ** 2, "left out the class token"),
        (lambda image, patch: image // patch + 1, "along one side"),
        (lambda image, patch: (image // patch + 1) ** 2, "once, not once a row"),
        (lambda image, patch: (image / patch) ** 2 + 1, "divide with //"),
        (lambda image, patch: image * patch, "are not 3136"),
    ],
    "check_unpatchify": [
        (lambda patches, rows, size: patches, "make (2, 3, 8, 12)"),
        (lay("b (k r) (p q c) -> b c (k p) (r q)"), "lies on its side"),
        (lay("b (k r) (p q c) -> b c (r p) (k q)"), "column by column"),
        (lay("b (r k) (q p c) -> b c (r p) (k q)"), "every patch lies on its side"),
        (lay("b (r k) (c p q) -> b c (r p) (k q)"), "colour by colour"),
        (lay("b (r k) (p q c) -> b c (p r) (q k)"), "one pixel of every patch"),
    ],
    "check_freeze": [
        (lambda module: module.eval(), "still take gradients"),
        (lambda module: module.requires_grad_(False), "in training mode"),
        (lambda module: module.requires_grad_(False).eval(), "woke it up"),
        (lambda module: WithoutGradients(module).eval(), "comes through to the input"),
        (zeroed, "gradient comes through"),
    ],
}
