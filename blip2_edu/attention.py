"""Multi-head attention, the one operation that everything else here is made of.

Axis letters: `B` batch, `H` heads, `L` length of what asks, `S` length
of what is asked, `D` width, `C` width of one head.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

KeysValues = tuple[Tensor, Tensor]  # keys and values, (B, H, S, C) each


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax of the scaled dot products, written out (Vaswani et al. 2017, equation 1).

    query (B, H, L, C), key (B, H, S, C), mask boolean and broadcastable to (B, H, L, S), True where
    attention is allowed. Returns (B, H, L, S); every row sums to one.
    """
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """What the weights of `attention_weights` mix of the values, (B, H, L, C), by PyTorch's kernel.

    bfloat16 on a CPU is attended in float32: with gradients its kernel takes ten times as long.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            exact = query.float(), key.float(), value.float()
            return fused_attention(*exact, mask, dropout).bfloat16()
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


class Attention(nn.Module):
    """Self-attention if keys and values are made of the input itself, else cross-attention.

    Keys and values are made apart from the attending, so that they can be computed once and used
    often: by several passes over one image, or by every next word of a growing text.
    """

    def __init__(
        self, width: int, num_heads: int, context_width: int | None = None, dropout: float = 0.0
    ):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} does not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width or width, width)
        self.value = nn.Linear(context_width or width, width)
        self.output = nn.Linear(width, width)

    def _split_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b l (h c) -> b h l c", h=self.num_heads)

    def keys_values(self, context: Tensor) -> KeysValues:
        """context (B, S, context width) -> keys and values, (B, H, S, C) each."""
        return self._split_heads(self.key(context)), self._split_heads(self.value(context))

    def forward(
        self,
        x: Tensor,
        keys_values: KeysValues,
        mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, L, D) attends to keys and values; mask is boolean, True where it may look.

        Returns the output (B, L, D) and, only if asked, the weights (B, H, L, S). The output is
        computed by the fused kernel either way, so asking changes nothing but the cost.
        """
        key, value = keys_values
        query = self._split_heads(self.query(x))  # (B, H, L, C)
        dropout = self.dropout if self.training else 0.0
        attended = fused_attention(query, key, value, mask, dropout)
        weights = attention_weights(query, key, mask) if return_weights else None
        return self.output(rearrange(attended, "b h l c -> b l (h c)")), weights


def select(
    keys_values: list[KeysValues | None], rows: Tensor | slice | list[int]
) -> list[KeysValues | None]:
    """Keys and values of some rows of a batch, in every block that has them (the others have None).

    rows  what indexes a first axis; a row may be taken many times, without being projected again
    """
    return [kv and (kv[0][rows], kv[1][rows]) for kv in keys_values]


def append_keys_values(past: KeysValues | None, new: KeysValues) -> KeysValues:
    """Put new keys and values behind those already computed, along the length."""
    if past is None:
        return new
    return torch.cat([past[0], new[0]], dim=2), torch.cat([past[1], new[1]], dim=2)
