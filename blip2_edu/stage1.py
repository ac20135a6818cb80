"""The stage-1 model (paper, section 3.2): a Q-Former and the heads that its three losses need.

Axis letters as in `qformer`: `B` pairs, `A` pairs of all processes, `Q` queries, `T` text tokens,
`N` image features, `W` their width, `D` width of the Q-Former, `P` width of the shared space.
"""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from blip2_edu.attention import KeysValues, select
from blip2_edu.checkpoints.names import initialise_from_bert
from blip2_edu.checkpoints.published import load_whole, loading
from blip2_edu.checkpoints.tensors import load_strictly, load_tensors, save_json, save_tensors
from blip2_edu.errors import TrainingError, WeightsError
from blip2_edu.objectives import (
    gather,
    gather_texts,
    itc_loss,
    itc_similarity,
    itg_loss,
    itm_loss,
    number_pairs,
    query_overlap,
    sample_hard_negatives,
    share_of_mean,
)
from blip2_edu.qformer import Cache, QFormer, QFormerConfig, initialise
from blip2_edu.text import Tokenizer

OBJECTIVES = ("itc", "itm", "itg")


@dataclass
class Stage1Config:
    """The Q-Former and the width of the space that images and texts share.

    `image_norm_eps` is the epsilon of the layer norm on the frozen features: 1e-5 in LAVIS.
    """

    qformer: QFormerConfig
    projection_width: int = 256
    image_norm_eps: float = 1e-5


class TextHead(nn.Module):
    """BERT's head: from a text position to a score for every word, tied to the word embeddings."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.activation = nn.GELU()
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        """x (..., D), word_embeddings (V, D) -> logits (..., V)."""
        x = self.norm(self.activation(self.dense(x)))
        return nn.functional.linear(x, word_embeddings, self.bias)


class Blip2Stage1(nn.Module):
    """Learns, from frozen image features and captions, what of an image a text would say.

    The frozen encoder is not in here: features come in, so that they can be computed once.

    tokenizer   makes the ids that it reads from texts
    pretrained  names of the parameters that did not start at random; they learn at a lower rate
    """

    def __init__(self, config: Stage1Config, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self.tokenizer = cast(Tokenizer, tokenizer)  # None in a model that is given ids alone
        self.pretrained: set[str] = set()
        sizes = config.qformer
        self.image_norm = nn.LayerNorm(sizes.image_width, eps=config.image_norm_eps)
        self.qformer = QFormer(sizes)
        self.image_projection = nn.Linear(sizes.width, config.projection_width)
        self.text_projection = nn.Linear(sizes.width, config.projection_width)
        self.itm_head = nn.Linear(sizes.width, 2)
        self.itg_head = TextHead(sizes.width, self.qformer.word_embeddings.num_embeddings)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        for head in (self.image_projection, self.text_projection, self.itm_head, self.itg_head):
            head.apply(initialise)

    @classmethod
    def from_bert(cls, sizes: QFormerConfig, folder: Path) -> "Blip2Stage1":
        """A model that knows words and no images yet (paper, section 3.1: BERT-base).

        folder  a BERT of these sizes in transformers' form, its tokenizer.json beside. Raises
                WeightsError.
        """
        from transformers import BertModel

        with loading(folder, "BERT"):
            bert = load_whole(BertModel, folder)
        model = cls(Stage1Config(sizes), Tokenizer(folder / "tokenizer.json"))
        copied = initialise_from_bert(model.qformer, bert.state_dict())
        model.pretrained = {f"qformer.{name}" for name in copied}
        return model

    def project_image(self, image_features: Tensor) -> list[KeysValues | None]:
        """Frozen features (B, N, W) -> cross-attention keys and values, shared by all passes."""
        return self.qformer.project_image(self.image_norm(image_features))

    def embed_image(self, image_features: Tensor) -> Tensor:
        """Frozen features (B, N, W) -> one unit vector a query, (B, Q, P)."""
        return self.embed_queries(self.qformer(self.project_image(image_features)).queries)

    def embed_queries(self, queries: Tensor) -> Tensor:
        """Query outputs (B, Q, D) -> unit vectors (B, Q, P)."""
        return self._unit_length(self.image_projection(queries))

    def embed_text(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Tokens (B, T), the first being [CLS] -> unit vectors (B, P)."""
        text = self.qformer(text_ids=text_ids, text_mask=text_mask).text
        return self._unit_length(self.text_projection(text[:, 0]))

    def _unit_length(self, x: Tensor) -> Tensor:
        """In the parameters' precision: under autocast a bfloat16 length would be 0.2% off."""
        return normalize(x.to(self.temperature.dtype), dim=-1)

    def match(self, image: list[KeysValues | None], text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Projected images and texts, pair by pair -> (B, 2) logits: does not match, matches."""
        queries = self.qformer(image, text_ids, text_mask).queries
        return self.itm_head(queries).mean(dim=1)  # averaged over the queries

    def generate_logits(self, text: Tensor) -> Tensor:
        """Text outputs (..., D) -> logits of the next token (..., V)."""
        return self.itg_head(text, self.qformer.word_embeddings.weight)

    def forward(
        self,
        image_features: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        image_ids: Tensor | None = None,
        objectives: Collection[str] = OBJECTIVES,
        itm_pairs: int | None = None,
        itg_pairs: int | None = None,
        hard_negatives: bool = True,
        spread: float = 0.0,
    ) -> dict[str, Tensor]:
        """The losses of one batch of pairs, by name; train on their sum.

        image_features (B, N, W); text_ids and text_mask (B, T), [CLS] first; image_ids (B,) as in
        `itc_loss`. itm_pairs limits ITM, by far the most costly of the three, to that many of the B
        pairs and as many negatives of either kind; hard_negatives=False draws these at random,
        which a matching head that knows nothing yet learns from much sooner. itg_pairs limits ITG
        likewise. spread is the weight of `query_overlap`, which is then one more loss.

        Under torch.distributed negatives come from the batches of all processes (A pairs), and the
        mean of the losses is that of the joined batch.
        """
        image = self.project_image(image_features)
        seen = self.qformer(image)
        if image_ids is None:
            image_ids = number_pairs(text_ids)
        losses = {}

        if {"itc", "itm"} & set(objectives):
            image_embeddings = self.embed_queries(seen.queries)  # (B, Q, P)
            text_embeddings = self.embed_text(text_ids, text_mask)  # (B, P)
        if "itc" in objectives:
            losses["itc"] = itc_loss(image_embeddings, text_embeddings, self.temperature, image_ids)
        if "itm" in objectives:
            with torch.no_grad():
                for_texts = itc_similarity(gather(image_embeddings), text_embeddings).T
                for_images = itc_similarity(image_embeddings, gather(text_embeddings))
                similarities = for_texts / self.temperature, for_images / self.temperature
                if not hard_negatives:  # all alike: any negative is as likely as any other
                    similarities = [torch.zeros_like(x) for x in similarities]
            same = image_ids[:, None] == gather(image_ids)[None, :]  # (B, A)
            negatives = [
                sample_hard_negatives(x[:itm_pairs], same[:itm_pairs]) for x in similarities
            ]
            losses["itm"] = self._matching_loss(
                image, image_features, text_ids, text_mask, *negatives, count=len(same[:itm_pairs])
            )
        if "itg" in objectives:
            cache = Cache(select(seen.cache.layers, slice(itg_pairs)), seen.cache.num_queries)
            losses["itg"] = self._generation_loss(
                cache, text_ids[:itg_pairs], text_mask[:itg_pairs]
            )
        if spread:
            losses["overlap"] = spread * query_overlap(seen.queries)
        return losses

    def _matching_loss(
        self,
        image: list[KeysValues | None],
        image_features: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        wrong_images: tuple[Tensor, Tensor],
        wrong_texts: tuple[Tensor, Tensor],
        count: int,
    ) -> Tensor:
        """ITM on `count` pairs, and on each text with a wrong image, each image with a wrong text.

        wrong_images and wrong_texts: own rows, and for each a row among those of all processes.
        """
        own = torch.arange(count, device=text_ids.device)  # (b,)
        text_rows, image_columns = wrong_images
        image_rows, text_columns = wrong_texts
        if dist.is_initialized():  # what others projected is not here: project the few again
            others = self.project_image(gather(image_features)[image_columns])
            image = [
                kv and more and (torch.cat([kv[0], more[0]]), torch.cat([kv[1], more[1]]))
                for kv, more in zip(image, others, strict=True)
            ]
            image_columns = len(text_ids) + torch.arange(len(image_columns), device=own.device)
        all_ids, all_mask = gather_texts(text_ids, text_mask)  # (A, T)
        first = number_pairs(text_ids)[0]  # where the own texts are among those of all
        image_index = torch.cat([own, image_columns, image_rows])  # (3b,)
        text_index = torch.cat([first + own, first + text_rows, text_columns])  # (3b,)
        logits = self.match(select(image, image_index), all_ids[text_index], all_mask[text_index])
        labels = (torch.arange(len(logits), device=own.device) < count).long()
        return itm_loss(logits, labels) * share_of_mean(len(labels), labels.device)

    def _generation_loss(self, cache: Cache, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """ITG with the queries' keys and values from the image pass, so only text is computed."""
        text_ids = text_ids.clone()
        text_ids[:, 0] = self.qformer.word_embeddings.num_embeddings - 1  # [DEC] in place of [CLS]
        text = self.qformer(
            text_ids=text_ids, text_mask=text_mask, pattern="causal", cache=cache
        ).text
        counts = text_mask[:, 1:].bool()  # only real next tokens are scored
        loss = itg_loss(self.generate_logits(text[:, :-1][counts]), text_ids[:, 1:][counts])
        return loss * share_of_mean(int(counts.sum()), loss.device)


def parse_objectives(names: str) -> tuple[str, ...]:
    """Read "itc,itm": which of OBJECTIVES to learn. Raises TrainingError if one does not exist."""
    chosen = tuple(name.strip() for name in names.split(","))
    if unknown := set(chosen) - set(OBJECTIVES):
        raise TrainingError(f"There is no objective {', '.join(sorted(unknown))}.")
    return chosen


def save_stage1(model: Blip2Stage1, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write stage1.json, stage1.safetensors and tokenizer.json into `folder`."""
    state = {name: x.to(dtype) for name, x in model.state_dict().items()}
    save_tensors(state, folder / "stage1.safetensors")
    save_json(asdict(model.config), folder / "stage1.json")
    model.tokenizer.save(folder / "tokenizer.json")


def load_stage1(folder: Path) -> Blip2Stage1:
    """Read what `save_stage1` wrote, into float32. Raises WeightsError."""
    try:
        sizes = json.loads((folder / "stage1.json").read_text())
        config = Stage1Config(**sizes | {"qformer": QFormerConfig(**sizes["qformer"])})
        model = Blip2Stage1(config, Tokenizer(folder / "tokenizer.json"))
    except WeightsError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{folder} holds no readable stage1.json: {error}") from error
    load_strictly(model, load_tensors(folder / "stage1.safetensors")[0])
    model.pretrained = set(model.state_dict())
    return model.eval()
