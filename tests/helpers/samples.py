"""Random models, texts and images of ours, small enough for a test."""

import torch
from torch import Tensor, nn

from blip2_edu.qformer import QFormer, QFormerConfig
from blip2_edu.stage1 import Blip2Stage1, Stage1Config


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Large random parameters, norms included: nothing hides behind zeros, ones or tiny numbers."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        scale = 0.5 if parameter.ndim < 2 or "embeddings" in name else parameter.shape[-1] ** -0.5
        noise = scale * torch.randn(parameter.shape, generator=generator)
        shift = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        parameter.data.copy_(noise + shift)
    return module


def random_qformer(config: QFormerConfig, seed: int = 0) -> QFormer:
    return randomise(QFormer(config), seed).eval()


def random_stage1(config: QFormerConfig, seed: int = 0, projection_width: int = 16) -> Blip2Stage1:
    model = randomise(Blip2Stage1(Stage1Config(config, projection_width, 1e-6)), seed).eval()
    model.temperature.data.fill_(0.07)
    return model


def random_text(config: QFormerConfig, lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids (B, T) and mask (B, T) of texts with these lengths, padded with arbitrary words."""
    generator = torch.Generator().manual_seed(seed)
    size = (len(lengths), max(lengths))
    ids = torch.randint(1, config.vocab_size, size, generator=generator)
    return ids, (torch.arange(size[1]) < torch.tensor(lengths)[:, None]).long()


def random_image(config: QFormerConfig, batch: int, patches: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, patches, config.image_width, generator=generator)
