"""Tiny stand-ins for what is large: a tokenizer of a few words, random numbers as features."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer as WordPieces
from tokenizers import models, pre_tokenizers, processors
from torch import nn

from blip2_edu.data.batches import Source
from blip2_edu.data.examples import Examples
from blip2_edu.data.features import FeatureCache
from blip2_edu.qformer import QFormerConfig
from blip2_edu.stage1 import Blip2Stage1, Stage1Config
from blip2_edu.text import Tokenizer
from blip2_edu.training import Stage1Training, train_stage1
from blip2_edu.vision import ImageEncoder

WORDS = (
    "a the dog cat horse bird man woman child car red blue green on in grass snow runs sits".split()
)
PATCHES = 6


def tokenizer(folder: Path) -> Tokenizer:
    """Whole words of `WORDS`, with BERT's special tokens; fits `QFormerConfig.tiny()`."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    pieces = WordPieces(models.WordLevel(vocabulary, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    pieces.save(str(folder / "words.json"))
    return Tokenizer(folder / "words.json", max_tokens=16)


def sentences(count: int, seed: int = 0, shortest: int = 2, longest: int = 9) -> list[str]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(shortest, longest + 1, size=count)
    return [" ".join(draw.choice(WORDS, length)) for length in lengths]


def captioned(images: int, captions: int = 2, seed: int = 0) -> Examples:
    texts = sentences(images * captions, seed)
    grouped = [texts[i * captions : (i + 1) * captions] for i in range(images)]
    return Examples([{"bytes": None, "path": None}] * images, grouped, [[] for _ in grouped])


def random_features(images: int, views: int = 1, seed: int = 0) -> FeatureCache:
    shape = (images, PATCHES, QFormerConfig.tiny().image_width)
    draw = np.random.default_rng(seed)
    return FeatureCache([draw.standard_normal(shape).astype(np.float16) for _ in range(views)])


def stage1(seed: int = 0, dropout: float = 0.1, words: Tokenizer | None = None) -> Blip2Stage1:
    torch.manual_seed(seed)
    sizes = replace(QFormerConfig.tiny(), dropout=dropout, attention_dropout=dropout)
    return Blip2Stage1(Stage1Config(sizes, projection_width=16), words)


def run_stage1(
    folder: Path,
    resume: bool = False,
    objectives: str = "itc,itm,itg",
    epochs: int = 8,
) -> None:
    """Five steps an epoch; the same everywhere, whatever else the process did."""
    folder.parent.mkdir(exist_ok=True)
    batches = Source(captioned(20), random_features(20, 2), batch_size=4)
    held_out = [(captioned(6, seed=1), random_features(6, seed=1))]
    settings = {"learning_rate_new": 1e-3, "evaluate_every": 7, "objectives": objectives}
    settings |= {"average": 0.8, "random_negatives": 3}
    model = stage1(words=tokenizer(folder.parent))
    model.pretrained = {"qformer.norm.weight"}
    config = Stage1Training(folder, epochs, **settings)
    train_stage1(model, batches, held_out, config, resume)


class Corners(nn.Module):
    """A network that averages each quarter of the picture, and counts how many it has seen."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.seen = 0

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        return nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(2).mT * self.scale


def encoder(scale: float = 1.0, name: str = "corners") -> ImageEncoder:
    """Features (B, 4, 3): the colours of the four quarters, row by row."""
    return ImageEncoder(
        name,
        Corners(scale),
        lambda network, pixels: network(pixels),
        width=3,
        grid=(2, 2),
        num_prefix_tokens=0,
        image_size=16,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )


def ranks(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])
