"""The whole model: frozen image encoder, Q-Former, projection, frozen language model.

Axis letters: `B` images, `N` image features, `W` their width, `Q` queries, `D` width of the
Q-Former, `E` width of a word embedding, `P` width of the space that images and texts share.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from blip2_edu.app.hardware import native_bfloat16
from blip2_edu.checkpoints.names import from_transformers
from blip2_edu.checkpoints.published import checkpoint_folder, load_whole, loading
from blip2_edu.checkpoints.tensors import load_strictly, load_tensors, save_json, save_tensors
from blip2_edu.errors import WeightsError
from blip2_edu.images import open_image
from blip2_edu.language import IMAGE, LanguageModel, load_language_model, load_tokenizer
from blip2_edu.objectives import itc_similarity
from blip2_edu.qformer import QFormer, QFormerConfig
from blip2_edu.stage1 import Blip2Stage1, load_stage1, save_stage1
from blip2_edu.text import Tokenizer
from blip2_edu.vision import ImageEncoder, from_vision_tower, load_image_encoder

ImageSource = str | Path | bytes | Image.Image


@dataclass
class Prompts:
    """What stands around the soft prompt, and what ends a text (None: the tokenizer's own token).

    A frozen model answers best in the form it was trained for.
    """

    caption: str
    question: str
    end_of_text: str | None = None

    @classmethod
    def opt(cls) -> "Prompts":
        return cls(IMAGE, IMAGE + "Question: {question} Answer:", end_of_text="\n")

    @classmethod
    def t5(cls) -> "Prompts":
        return cls(IMAGE, IMAGE + "Question: {question} Short answer:")

    @classmethod
    def smollm2(cls) -> "Prompts":
        chat = f"<|im_start|>user\n{IMAGE}\n%s<|im_end|>\n<|im_start|>assistant\n"
        return cls(
            caption=chat % "Describe the photo in one short sentence.",
            question=chat % "{question} Answer in a word or two.",
        )


@dataclass
class Blip2Config:
    """What a checkpoint is made of.

    norm_image_features puts a learned layer norm before the Q-Former (LAVIS's `ln_vision`);
    transformers counts it as the last layer of its vision tower.
    norm_soft_prompt puts a layer norm behind the projection, its gain starting at the standard
    deviation of the language model's word embeddings: in a training as short as mini's the soft
    prompt must start out as large as the words it stands among. The published models have none.
    """

    qformer: QFormerConfig
    image_encoder: str = "efficientnet-lite0"
    language_model: str = "smollm2-135m"
    prompts: Prompts = field(default_factory=Prompts.smollm2)
    norm_image_features: bool = True
    norm_soft_prompt: bool = True

    @classmethod
    def from_dict(cls, values: dict) -> "Blip2Config":
        """The inverse of `dataclasses.asdict`."""
        parts = {
            "qformer": QFormerConfig(**values["qformer"]),
            "prompts": Prompts(**values["prompts"]),
        }
        return cls(**values | parts)


class Blip2(nn.Module):
    """Captions, answers, matches and embeds images.

    Two Q-Formers: `qformer` prompts the language model, `stage1` (if there) matches and retrieves.
    They start as one, but stage 2 moves the first away from what ITC and ITM had taught it; keeping
    both costs a third more bytes and nothing else.
    """

    def __init__(
        self,
        config: Blip2Config,
        image_encoder: ImageEncoder,
        language_model: LanguageModel,
        stage1: Blip2Stage1 | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        super().__init__()
        image_encoder.check_width(config.qformer.image_width)
        self.config = config
        self.image_encoder = image_encoder
        self.language_model = language_model
        self.stage1 = stage1.requires_grad_(False) if stage1 is not None else None
        self.tokenizer = tokenizer
        self.image_norm = nn.Identity()
        if config.norm_image_features:
            self.image_norm = nn.LayerNorm(config.qformer.image_width)
        self.qformer = QFormer(replace(config.qformer, vocab_size=None))
        self.language_projection = nn.Linear(config.qformer.width, language_model.width)
        self.soft_prompt_norm = nn.Identity()
        if config.norm_soft_prompt:
            self.soft_prompt_norm = nn.LayerNorm(language_model.width)
            words = language_model.network.get_input_embeddings().weight
            nn.init.constant_(self.soft_prompt_norm.weight, words.std().item())

    def start_from_stage1(self) -> set[str]:
        """Copy the stage-1 Q-Former, less its text branch; returns the names of what was copied."""
        ours = set(self.qformer.state_dict())
        learned = self.stage1.qformer.state_dict()
        self.qformer.load_state_dict({name: learned[name] for name in ours})
        self.image_norm.load_state_dict(self.stage1.image_norm.state_dict())
        return {f"qformer.{name}" for name in ours} | {"image_norm.weight", "image_norm.bias"}

    @property
    def device(self) -> torch.device:
        return self.language_projection.weight.device

    def soft_prompt(self, image_features: Tensor) -> Tensor:
        """Frozen features (B, N, W) -> soft prompt (B, Q, E)."""
        queries = self.qformer(self.image_norm(image_features)).queries
        return self.soft_prompt_norm(self.language_projection(queries))

    def forward(
        self, image_features: Tensor, prompts: list[str], texts: list[str]
    ) -> dict[str, Tensor]:
        """The loss of stage 2 (paper, section 3.2), by name; arguments as in LanguageModel.loss."""
        loss = self.language_model.loss(self.soft_prompt(image_features), prompts, texts)
        return {"text": loss}

    @torch.no_grad()
    def encode_images(self, images: ImageSource | Sequence[ImageSource]) -> Tensor:
        """Open images and run the frozen encoder: features (B, N, W). Raises ImageError."""
        pixels = self.image_encoder.preprocess([open_image(image) for image in as_list(images)])
        return self.image_encoder(pixels.to(self.device)).to(self.language_projection.weight.dtype)

    @torch.no_grad()
    def write(self, image_features: Tensor, prompts: list[str], **decoding) -> list[str]:
        """Features (B, N, W) and B prompts -> B texts. Beam search over 5 beams unless told."""
        self.eval()
        settings = {"max_new_tokens": 32, "num_beams": 5, "do_sample": False} | decoding
        return self.language_model.generate(self.soft_prompt(image_features), prompts, **settings)

    def caption(self, images: ImageSource | Sequence[ImageSource], **decoding) -> list[str]:
        """One caption for each image; decoding as for transformers' `generate`."""
        features = self.encode_images(images)
        return self.write(features, [self.config.prompts.caption] * len(features), **decoding)

    def answer(
        self,
        images: ImageSource | Sequence[ImageSource],
        questions: str | Sequence[str],
        **decoding,
    ) -> list[str]:
        """One answer for each image and question; a single image may take many questions."""
        features, questions = self.encode_images(images), as_list(questions)
        if len(features) == 1:
            features = features.expand(len(questions), -1, -1)
        if len(features) != len(questions):
            raise ValueError(f"{len(features)} images do not go with {len(questions)} questions")
        return self.write_answers(features, questions, **decoding)

    def write_answers(
        self, image_features: Tensor, questions: Sequence[str], **decoding
    ) -> list[str]:
        """Features (B, N, W) and B questions -> B answers.

        Beams are ranked with a length penalty of -1 unless told: people answer in a word or two
        (paper, section 4.1).
        """
        if decoding.get("num_beams") != 1:  # without beams there is nothing to rank
            decoding = {"length_penalty": -1.0} | decoding
        return self.write(image_features, [self.question_prompt(q) for q in questions], **decoding)

    def question_prompt(self, question: str) -> str:
        """The prompt that asks `question`; whatever a user typed, a `{image}` too, is only text."""
        question = question.encode("utf-8", "replace").decode()
        question = " ".join(question.replace(IMAGE, "image").split())
        return self.config.prompts.question.replace("{question}", question)

    @torch.no_grad()
    def embed_image(self, images: ImageSource | Sequence[ImageSource]) -> Tensor:
        """Unit vectors (B, Q, P), one for each query."""
        return self.retriever().embed_image(self.encode_images(images))

    @torch.no_grad()
    def embed_text(self, texts: str | Sequence[str]) -> Tensor:
        """Unit vectors (T, P), one for each text."""
        model, (ids, mask) = self.retriever(), self.tokenizer(as_list(texts))
        return model.embed_text(ids.to(self.device), mask.to(self.device))

    @torch.no_grad()
    def match(self, image: ImageSource, texts: str | Sequence[str]) -> "MatchScores":
        """How well each of T texts fits the image."""
        model, texts = self.retriever(), as_list(texts)
        features = self.encode_images(image)
        ids, mask = (x.to(self.device) for x in self.tokenizer(texts))
        similarity = itc_similarity(model.embed_image(features), model.embed_text(ids, mask))[0]
        image_keys_values = model.project_image(features.expand(len(texts), -1, -1))
        logits = model.match(image_keys_values, ids, mask)
        return MatchScores(logits.softmax(dim=1)[:, 1], similarity, logits[:, 1] + similarity)

    def retriever(self) -> Blip2Stage1:
        """The model that matches and embeds. Raises WeightsError if this checkpoint has none."""
        if self.stage1 is None:
            raise WeightsError("This checkpoint has no stage-1 heads: it cannot match or embed.")
        return self.stage1.eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write configuration, tokenizer and all that was learned; the frozen parts stay out."""
        folder = Path(folder)
        learned = {name: x.to(dtype) for name, x in learned_state(self).items()}
        save_tensors(learned, folder / "stage2.safetensors")
        if self.stage1 is not None:
            save_stage1(self.stage1, self.tokenizer, folder, dtype)
        save_json(asdict(self.config), folder / "config.json")

    @classmethod
    def from_pretrained(cls, name: str | Path = "mini") -> "Blip2":
        """Load "mini", a folder that `save_pretrained` wrote, or a published BLIP-2 by hub id.

        What we learned is kept in half precision and loaded into float32. Raises WeightsError.
        """
        folder = checkpoint_folder(name)
        try:
            values = json.loads((folder / "config.json").read_text())
            published = values.get("model_type") == "blip-2"
            config = None if published else Blip2Config.from_dict(values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{folder} holds no config.json of a BLIP-2: {error}") from error
        if published:
            return load_published(name, folder)
        stage1, tokenizer = (
            load_stage1(folder) if (folder / "stage1.json").exists() else (None, None)
        )
        image_encoder = load_image_encoder(config.image_encoder)
        language_model = load_language_model(config.language_model, config.prompts.end_of_text)
        model = cls(config, image_encoder, language_model, stage1, tokenizer)
        load_learned(model, load_tensors(folder / "stage2.safetensors")[0])
        return model.eval()


def load_fastest(name: str | Path = "mini") -> Blip2:
    """Load a checkpoint for use: on the GPU if there is one, its language model in bfloat16 where
    the device computes in it. Writing a word is reading all weights, so half the bytes is half the
    time. Raises WeightsError.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Blip2.from_pretrained(name).to(device)
    if native_bfloat16(device):
        model.language_model.network.to(torch.bfloat16)
    return model


@dataclass
class MatchScores:
    """What `Blip2.match` says of T texts, each (T,).

    probability   of ITM: do image and text belong together?
    similarity    of ITC: cosine of the best query and the text
    score         ITM's match logit plus the similarity, by which retrieval is re-ranked
    """

    probability: Tensor
    similarity: Tensor
    score: Tensor


LEARNED = ("image_norm", "qformer", "language_projection", "soft_prompt_norm")


def learned_state(model: Blip2) -> dict[str, Tensor]:
    """What stage 2 trains: the modules that are neither frozen nor stage 1's, by name."""
    return {k: v for k, v in model.state_dict().items() if k.split(".")[0] in LEARNED}


def load_learned(model: Blip2, state: dict[str, Tensor]) -> None:
    """Put back what `learned_state` gave; raises WeightsError if anything lacks or is left over."""
    for part in LEARNED:
        own = {k.removeprefix(part + "."): v for k, v in state.items() if k.split(".")[0] == part}
        load_strictly(getattr(model, part), own)


def load_published(name: str | Path, folder: Path) -> Blip2:
    """A BLIP-2 in transformers' form, such as Salesforce/blip2-opt-2.7b, as ours.

    Encoder and language model keep the precision of the files; the Q-Former and the queries come in
    float32, as the published ones are.
    """
    from transformers import Blip2ForConditionalGeneration

    with loading(name, "BLIP-2"):
        theirs = load_whole(Blip2ForConditionalGeneration, folder)
        tokenizer = load_tokenizer(folder)
    sizes = theirs.config.qformer_config
    decoder_only = not theirs.language_model.config.is_encoder_decoder
    config = Blip2Config(
        QFormerConfig(
            width=sizes.hidden_size,
            num_layers=sizes.num_hidden_layers,
            num_heads=sizes.num_attention_heads,
            feed_forward_width=sizes.intermediate_size,
            num_queries=theirs.config.num_query_tokens,
            image_width=sizes.encoder_hidden_size,
            cross_attention_every=sizes.cross_attention_frequency,
            vocab_size=None,
        ),
        image_encoder=str(name),
        language_model=str(name),
        prompts=Prompts.opt() if decoder_only else Prompts.t5(),
        norm_image_features=False,
        norm_soft_prompt=False,
    )
    model = Blip2(
        config,
        from_vision_tower(str(name), theirs.vision_model),
        LanguageModel(str(name), theirs.language_model, tokenizer, config.prompts.end_of_text),
    )
    state, _ = from_transformers(theirs.state_dict())
    # Their image norm is the last layer of the vision tower, and so of our encoder.
    load_learned(model, {k: x for k, x in state.items() if not k.startswith("image_norm.")})
    return model.eval()


def as_list(items) -> list:
    """One thing or a sequence of things -> a list of things."""
    one = isinstance(items, str | bytes) or not isinstance(items, Sequence)
    return [items] if one else list(items)
