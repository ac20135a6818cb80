"""Tiny random models of transformers with the shapes of ours, to compare with."""

import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
)

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


def transformers_config(config: QFormerConfig, projection_width: int = 16) -> Blip2Config:
    qformer = Blip2QFormerConfig(
        vocab_size=config.vocab_size or 64,
        hidden_size=config.width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.feed_forward_width,
        max_position_embeddings=config.max_text_length,
        cross_attention_frequency=config.cross_attention_every,
        encoder_hidden_size=config.image_width,
        use_qformer_text_input=config.vocab_size is not None,
    )
    vision = Blip2VisionConfig(
        hidden_size=config.image_width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=28,
        patch_size=14,
    )
    language = OPTConfig(
        vocab_size=50,
        hidden_size=40,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=40,
    )
    return Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=language,
        num_query_tokens=config.num_queries,
        image_text_hidden_size=projection_width,
    )


def retrieval_model(config: QFormerConfig, seed: int = 1) -> Blip2ForImageTextRetrieval:
    settings = transformers_config(config)
    settings._attn_implementation = "eager"
    return randomise(Blip2ForImageTextRetrieval(settings), seed).eval()


def generation_model(config: QFormerConfig, seed: int = 1) -> Blip2ForConditionalGeneration:
    return randomise(Blip2ForConditionalGeneration(transformers_config(config)), seed).eval()
