"""Tiny random encoders, language models and whole BLIP-2s: milliseconds, nothing to download."""

from pathlib import Path

import torch
from tokenizers import Tokenizer as Pieces
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from blip2_edu.blip2 import Blip2, Blip2Config, Prompts
from blip2_edu.bridges import QFormerBridge, QFormerBridgeConfig
from blip2_edu.data.batches import Mixture, Source
from blip2_edu.data.examples import Examples
from blip2_edu.language import LanguageModel
from blip2_edu.qformer import QFormerConfig
from blip2_edu.training import TrainingConfig, train_stage2
from blip2_edu.vision import ImageEncoder, load_image_encoder
from helpers import tiny
from helpers.samples import random_stage1, randomise

QFORMER = QFormerConfig.tiny()  # reads features of width 20
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
PAD, START, END, IMAGE = range(len(SPECIAL))
VOCABULARY = len(SPECIAL) + 256
KINDS = ("llama", "opt", "t5")  # nothing is added to a text; a first token; a last token
MORE_KINDS = ("gpt2", "bart")  # as llama; as t5


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Every byte is a token; one that is not ASCII stays a letter of its own when decoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    pieces = Pieces(models.BPE(vocabulary, []))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.Sequence(
        [decoders.Fuse(), decoders.Replace("Ġ", " "), decoders.Replace("Ċ", "\n")]
    )
    if kind not in ("llama", "gpt2"):
        template = "<s> $A" if kind == "opt" else "$A </s>"
        added = [("<s>", START)] if kind == "opt" else [("</s>", END)]
        pieces.post_processor = TemplateProcessing(single=template, special_tokens=added)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )


def language_config(kind: str) -> PreTrainedConfig:
    ends = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=3, n_positions=128, **ends
        )
    if kind == "bart":
        return BartConfig(
            vocab_size=VOCABULARY,
            d_model=24,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=3,
            decoder_attention_heads=3,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=128,
            decoder_start_token_id=PAD,
            forced_eos_token_id=None,
            **ends,
        )
    if kind == "llama":
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **ends,
        )
    if kind == "opt":
        return OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=128,
            word_embed_proj_dim=24,
            dropout=0.1,
            **ends,
        )
    return T5Config(
        vocab_size=VOCABULARY,
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=3,
        decoder_start_token_id=PAD,
        **ends,
    )


def language_network(kind: str, seed: int = 3) -> nn.Module:
    classes = {
        "llama": LlamaForCausalLM,
        "opt": OPTForCausalLM,
        "t5": T5ForConditionalGeneration,
        "gpt2": GPT2LMHeadModel,
        "bart": BartForConditionalGeneration,
    }
    return randomise(classes[kind](language_config(kind)), seed).eval()


def language_model(kind: str, end_of_text: str | None = None) -> LanguageModel:
    return LanguageModel(kind, language_network(kind), tokenizer(kind), end_of_text)


def save_language_model(kind: str, folder: Path) -> str:
    language_network(kind).save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    return str(folder)


def vision_config(config_class: type) -> CLIPVisionConfig | Blip2VisionConfig:
    """A class token and 3 x 3 patches."""
    return config_class(
        hidden_size=QFORMER.image_width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=42,
        patch_size=14,
    )


def vision_network(kind: str = "clip", seed: int = 4) -> nn.Module:
    network_class, config_class = {
        "clip": (CLIPVisionModel, CLIPVisionConfig),
        "blip-2": (Blip2VisionModel, Blip2VisionConfig),
    }[kind]
    return randomise(network_class(vision_config(config_class)), seed).eval()


def image_encoder(folder: Path, kind: str = "clip") -> ImageEncoder:
    vision_network(kind).save_pretrained(folder)
    return load_image_encoder(str(folder))


def blip2(folder: Path, kind: str = "llama", seed: int = 5) -> Blip2:
    """A whole untrained model, its frozen parts saved below `folder`."""
    encoder = image_encoder(folder / "encoder")
    name = save_language_model(kind, folder / "language")
    prompts = Prompts("see {image}:", "{image}Q: {question} A:", end_of_text="\n")
    config = Blip2Config(encoder.name, name, prompts)
    language = LanguageModel(name, language_network(kind), tokenizer(kind), "\n")
    stage1 = random_stage1(QFORMER, seed)
    stage1.tokenizer = tiny.tokenizer(folder)
    torch.manual_seed(seed)
    words = language.network.get_input_embeddings().weight
    bridge = QFormerBridge(QFormerBridgeConfig(QFORMER), words)
    randomise(bridge.qformer, seed)
    bridge.soft_prompt_norm.weight.data *= 8  # so that an untrained language model cannot miss it
    return Blip2(config, encoder, bridge, language, stage1)


def asked(images: int, seed: int = 0) -> Examples:
    """Images with captions, and with a question each."""
    examples = tiny.captioned(images, seed=seed)
    for questions in examples.questions:
        question = {"question": "who?", "answer": "dog", "answers": ["dog"] * 10}
        questions.append(question | {"answer_type": "other", "question_type": "who"})
    return examples


def run_stage2(folder: Path, resume: bool = False) -> None:
    """Forty steps of captions and questions; the same everywhere, as `tiny.run_stage1`."""
    model = blip2(folder.parent)
    examples, features = asked(20), tiny.random_features(20, 2)
    captions = Source(examples, features, batch_size=4, texts_per_image=2)
    questions = Source(examples, features, batch_size=4, ask=True)
    held_out = [(asked(3, seed=1), tiny.random_features(3, seed=1))]
    config = TrainingConfig(folder, epochs=4, learning_rate_new=1e-3, evaluate_every=7)
    model.bridge.start_from(model.stage1)
    train_stage2(model, Mixture([captions, questions]), held_out, config, resume)
