"""Wrong attempts at the exercises of lesson 01, and words that their verdicts must hold."""

import torch
from einops import rearrange

LATER = "your mask lets text see later text"


def causal(is_token):
    length = is_token.shape[1]
    return torch.ones(length, length, device=is_token.device).tril().bool()


def solved(is_token):
    itself = torch.eye(is_token.shape[1]).bool()
    return (causal(is_token) & is_token[:, None] | itself)[:, None]


def heads(x, num_heads, pattern="b l (h c) -> b h l c"):
    return rearrange(x, pattern, h=num_heads)


def chopped(x, num_heads):
    return x.reshape(x.shape[0], num_heads, x.shape[1], -1)


def overflowing(a, log_a, b, log_b):
    share_a, share_b = log_a.exp()[:, None], log_b.exp()[:, None]
    return (share_a * a + share_b * b) / (share_a + share_b)


def weigh_by(share_a, share_b):
    def merge(a, log_a, b, log_b):
        return share_a(log_a, log_b)[:, None] * a + share_b(log_a, log_b)[:, None] * b

    return merge


MISTAKES = {
    "check_softmax_with_temperature": [
        (lambda s, t: (s * t).softmax(dim=-1), "you multiplied"),
        (lambda s, t: s.softmax(dim=-1), "changes nothing"),
        (lambda s, t: s.softmax(dim=-1) / t, "you divided the weights"),
        (lambda s, t: (s / t).softmax(dim=0), "your columns sum to one"),
        (lambda s, t: (s / t).exp() / (s / t).exp().sum(), "together sum to one"),
        (lambda s, t: (s / t).exp(), "over their sum"),
        (lambda s, t: (s / t).exp() / (s / t).exp().sum(-1, keepdim=True), "overflow"),
        (lambda s, t: (s / t).tolist(), "should be a tensor"),
    ],
    "check_causal_padding_mask": [
        (lambda is_token: is_token[:, None, None].expand(-1, 1, 5, -1), LATER),
        (lambda is_token: solved(is_token).mT, LATER),
        (lambda is_token: causal(is_token).expand(3, 1, 5, 5), "look at padding"),
        (lambda is_token: (causal(is_token) & is_token[:, None])[:, None], "NaN"),
        (lambda is_token: (causal(is_token) & is_token[..., None])[:, None], "padding"),
        (lambda is_token: ~solved(is_token), "turned round"),
        (lambda is_token: solved(is_token)[:, 0], "does not broadcast"),
        (lambda is_token: solved(is_token)[0, 0], "the shape should be"),
        (lambda is_token: solved(is_token).float(), "boolean"),
        (lambda is_token: torch.eye(5).bool().expand(3, 1, 5, 5), "hides something"),
    ],
    "check_multi_head_weights": [
        (lambda q, k, h: (heads(q, h) @ heads(k, h).mT / 12**0.5).softmax(-1), "whole width"),
        (lambda q, k, h: (heads(q, h) @ heads(k, h).mT).softmax(-1), "is missing"),
        (lambda q, k, h: (heads(q, h) @ heads(k, h).mT / 4).softmax(-1), "not by its root"),
        (lambda q, k, h: (heads(q, h) @ heads(k, h).mT / 2).softmax(-2), "over the queries"),
        (lambda q, k, h: (chopped(q, h) @ chopped(k, h).mT / 2).softmax(-1), "mix positions"),
        (
            lambda q, k, h: (
                heads(q, h, "b l (c h) -> b h l c") @ heads(k, h, "b l (c h) -> b h c l") / 2
            ).softmax(-1),
            "run of neighbours",
        ),
        (lambda q, k, h: (q @ k.mT / 12**0.5).softmax(-1), "the shape should be"),
        (lambda q, k, h: heads(q, h) @ heads(k, h).mT / 2, "differ"),
    ],
    "check_merge_attention": [
        (lambda a, log_a, b, log_b: (a + b) / 2, "a plain mean"),
        (lambda a, log_a, b, log_b: a + b, "a plain sum"),
        (weigh_by(lambda a, b: (b - a).sigmoid(), lambda a, b: (a - b).sigmoid()), "swapped"),
        (weigh_by(lambda a, b: a / (a + b), lambda a, b: b / (a + b)), "not by their logarithms"),
        (weigh_by(lambda a, b: a.exp(), lambda a, b: b.exp()), "differs"),
        (overflowing, "overflow"),
    ],
}
