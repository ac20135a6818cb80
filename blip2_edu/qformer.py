"""The Q-Former (Li et al. 2023, section 3.1 and figure 2).

A BERT whose sequence starts with learned queries. In every block queries and text attend to one
another as far as a mask allows; in every second block the queries, and they alone, then look at the
image; at the end of a block queries and text pass through feed-forwards of their own.

Axis letters: `B` batch, `Q` queries, `T` text tokens, `N` image features, `W` their width, `D`
width of the Q-Former, `H` heads.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from blip2_edu.attention import Attention, KeysValues, append_keys_values

MaskPattern = Literal["unimodal", "bidirectional", "causal"]


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes of a Q-Former. `vocab_size=None` leaves the text branch out, as stage 2 does."""

    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    feed_forward_width: int = 3072
    num_queries: int = 32
    image_width: int = 1408
    cross_attention_every: int = 2
    vocab_size: int | None = 30523  # BERT's 30522 and [DEC]
    max_text_length: int = 512
    dropout: float = 0.1
    attention_dropout: float = 0.1

    @classmethod
    def tiny(cls) -> "QFormerConfig":
        """For tests and drawings: milliseconds on any machine."""
        return cls(
            width=24,
            num_layers=3,
            num_heads=3,
            feed_forward_width=48,
            num_queries=4,
            image_width=20,
            vocab_size=64,
            max_text_length=32,
        )

    @classmethod
    def mini(cls) -> "QFormerConfig":
        """The shape of MiniLM-L6 over an EfficientNet-Lite; trains on a laptop's processor.

        No dropout on attention weights, because the fused kernel is fast only without it.
        """
        return cls(
            width=384,
            num_layers=6,
            feed_forward_width=1536,
            image_width=1280,
            attention_dropout=0.0,
        )

    @classmethod
    def base(cls) -> "QFormerConfig":
        """The paper's: the shape of BERT-base over EVA-CLIP ViT-g."""
        return cls()


@dataclass
class Cache:
    """What a later pass need not compute again: every block's self-attention keys and values.

    num_queries  how many positions at the front are queries; the others are text
    """

    layers: list[KeysValues | None]  # (B, H, num_queries + T, C) each; None before the first pass
    num_queries: int = 0

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers[0] else 0


@dataclass
class QFormerOutput:
    """What one pass gives. `None` stands for what was not asked for or not in the sequence."""

    queries: Tensor | None  # (B, Q, D)
    text: Tensor | None  # (B, T, D)
    cache: Cache
    self_attention: list[Tensor] | None  # every block: (B, H, L, S)
    cross_attention: list[Tensor] | None  # every block that has it: (B, H, Q, N)


def joint_mask(num_queries: int, text_mask: Tensor, pattern: MaskPattern) -> Tensor:
    """Who may look at whom in the sequence [queries ; text] (paper, figure 2, right).

    text_mask (B, T) is true on tokens and false on padding. Returns a boolean (B, Q + T, Q + T):
    entry [b, i, j] says whether position i may look at position j. Queries always see queries.

    unimodal       queries and text are blind to one another (ITC)
    bidirectional  everybody sees everybody (ITM)
    causal         queries see queries; text sees all queries and itself up to now (ITG)
    """
    batch, text_length = text_mask.shape
    length = num_queries + text_length
    is_text = torch.arange(length, device=text_mask.device) >= num_queries
    row_is_text, column_is_text = is_text[:, None], is_text[None, :]
    if pattern == "unimodal":
        allowed = row_is_text == column_is_text
    elif pattern == "bidirectional":
        allowed = torch.ones(length, length, dtype=torch.bool, device=text_mask.device)
    elif pattern == "causal":
        allowed = torch.ones(length, length, dtype=torch.bool, device=text_mask.device).tril()
        allowed = allowed | ~(row_is_text | column_is_text)
    else:
        raise ValueError(f"unknown mask pattern {pattern!r}: unimodal, bidirectional or causal")
    is_real = torch.cat([text_mask.new_ones(batch, num_queries), text_mask], dim=1).bool()
    return allowed & is_real[:, None, :]


class FeedForward(nn.Module):
    """BERT's position-wise feed-forward with its residual and layer norm."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.up = nn.Linear(config.width, config.feed_forward_width)
        self.activation = nn.GELU()
        self.down = nn.Linear(config.feed_forward_width, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.down(self.activation(self.up(x)))))


class AttentionBlock(nn.Module):
    """Attention with its residual and layer norm (after the sum, as in BERT)."""

    def __init__(self, config: QFormerConfig, context_width: int):
        super().__init__()
        self.attention = Attention(
            config.width, config.num_heads, context_width, config.attention_dropout
        )
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)

    def forward(
        self, x: Tensor, keys_values: KeysValues, mask: Tensor | None, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attention(x, keys_values, mask, return_weights)
        return self.norm(x + self.dropout(attended)), weights


class QFormerLayer(nn.Module):
    """One block: joint self-attention, cross-attention of the queries, two feed-forwards."""

    def __init__(self, config: QFormerConfig, has_cross_attention: bool):
        super().__init__()
        self.self_attention = AttentionBlock(config, config.width)
        self.cross_attention = (
            AttentionBlock(config, config.image_width) if has_cross_attention else None
        )
        self.query_feed_forward = FeedForward(config)
        self.text_feed_forward = FeedForward(config) if config.vocab_size else None

    def forward(
        self,
        x: Tensor,
        num_queries: int,
        mask: Tensor | None,
        past: KeysValues | None,
        image: KeysValues | None,
        image_mask: Tensor | None,
        return_attention: bool,
    ) -> tuple[Tensor, KeysValues, Tensor | None, Tensor | None]:
        """x (B, num_queries + T, D), its first `num_queries` positions being queries."""
        cache = append_keys_values(past, self.self_attention.attention.keys_values(x))
        x, self_weights = self.self_attention(x, cache, mask, return_attention)

        queries, text = x[:, :num_queries], x[:, num_queries:]
        parts, cross_weights = [], None
        if num_queries:
            if self.cross_attention is not None:
                queries, cross_weights = self.cross_attention(
                    queries, image, image_mask, return_attention
                )
            parts.append(self.query_feed_forward(queries))
        if self.text_feed_forward is not None and text.shape[1]:
            parts.append(self.text_feed_forward(text))
        return torch.cat(parts, dim=1), cache, self_weights, cross_weights


class QFormer(nn.Module):
    """Learned queries that read an image, alone or together with a text.

    One module serves every pass of the paper:

    image only           qformer(image)
    text only            qformer(text_ids=..., text_mask=...)
    both, bidirectional  qformer(image, text_ids, text_mask)
    both, causal         qformer(image, text_ids, text_mask, pattern="causal")
    text after queries   qformer(text_ids=..., pattern="causal", cache=earlier.cache)
    """

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_queries, config.width))
        if config.vocab_size:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.width)
            self.position_embeddings = nn.Embedding(config.max_text_length, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)
        layers = nn.ModuleList(
            QFormerLayer(config, has_cross_attention=i % config.cross_attention_every == 0)
            for i in range(config.num_layers)
        )
        self.layers = cast(list[QFormerLayer], layers)
        self.apply(initialise)
        nn.init.normal_(self.query_tokens, std=0.02)

    def readers(self) -> list[Attention]:
        """The attentions that read the image, block by block."""
        return [x.cross_attention.attention for x in self.layers if x.cross_attention is not None]

    def project_image(self, image_features: Tensor) -> list[KeysValues | None]:
        """Image features (B, N, W) -> every block's cross-attention keys and values.

        They do not depend on queries or text: compute them once, pass them to every call.
        """
        return [
            layer.cross_attention.attention.keys_values(image_features)
            if layer.cross_attention is not None
            else None
            for layer in self.layers
        ]

    def forward(
        self,
        image: Tensor | list[KeysValues | None] | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        pattern: MaskPattern = "bidirectional",
        image_mask: Tensor | None = None,
        cache: Cache | None = None,
        return_attention: bool = False,
    ) -> QFormerOutput:
        """One pass over [queries ; text], [queries] or [text].

        image      features (B, N, W), or what `project_image` made of them; with it the queries
                   are in the sequence, without it they are not
        text_ids   (B, T) integer
        text_mask  (B, T), true on tokens; with `cache`, (B, T so far) over all text until now
        pattern    see `joint_mask`
        image_mask (B, N), true on real features; None means all are
        cache      `cache` of an earlier pass over queries, text or both; these positions are then
                   seen, not computed again
        """
        if cache is not None and (image is not None or pattern != "causal"):
            raise ValueError("a cache continues a text causally: pattern='causal', no image")
        if image is None and text_ids is None:
            raise ValueError("nothing to do: give an image, a text or both")
        if text_ids is not None and self.config.vocab_size is None:
            raise ValueError("this Q-Former has no text branch (vocab_size is None)")
        if isinstance(image, Tensor):
            image = self.project_image(image)

        past = cache or Cache([None] * len(self.layers))
        past_text = past.length - past.num_queries
        num_queries = self.config.num_queries if image is not None else 0  # in this pass
        seen_queries = num_queries or past.num_queries
        embeddings = []
        if image is not None:
            batch = next(x for x in image if x)[0].shape[0]
            embeddings.append(self.query_tokens.expand(batch, -1, -1))  # (B, Q, D)
        if text_ids is not None:
            positions = past_text + torch.arange(text_ids.shape[1], device=text_ids.device)
            embeddings.append(self.word_embeddings(text_ids) + self.position_embeddings(positions))
        x = self.dropout(self.norm(torch.cat(embeddings, dim=1)))  # (B, Q + T, D)

        mask = None
        if text_ids is not None:
            if text_mask is None:
                text_mask = text_ids.new_ones(text_ids.shape[0], past_text + text_ids.shape[1])
            mask = joint_mask(seen_queries, text_mask, pattern)[:, None, past.length :]
        if image_mask is not None:
            image_mask = image_mask.bool()[:, None, None, :]  # (B, 1, 1, N)

        new_cache, self_attention, cross_attention = [], [], []
        for i, layer in enumerate(self.layers):
            x, keys_values, self_weights, cross_weights = layer(
                x,
                num_queries,
                mask,
                past.layers[i],
                image[i] if image else None,
                image_mask,
                return_attention,
            )
            new_cache.append(keys_values)
            self_attention.append(self_weights)
            if cross_weights is not None:
                cross_attention.append(cross_weights)
        return QFormerOutput(
            queries=x[:, :num_queries] if num_queries else None,
            text=x[:, num_queries:] if text_ids is not None else None,
            cache=Cache(new_cache, seen_queries),
            self_attention=self_attention if return_attention else None,
            cross_attention=cross_attention if return_attention else None,
        )


def initialise(module: nn.Module) -> None:
    """BERT's initialisation: weights from N(0, 0.02), biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
