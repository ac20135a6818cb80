"""Tiny random models of transformers with the shapes of ours, to compare with."""

from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
)

from blip2_edu.qformer import QFormerConfig
from helpers.samples import randomise


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
