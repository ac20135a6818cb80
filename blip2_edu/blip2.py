"""The whole model: frozen image encoder, bridge, frozen language model.

Axis letters: `B` images, `N` image features, `W` their width, `Q` queries, `E` width of a word
embedding, `T` texts, `P` width of the space that images and texts share.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from blip2_edu.app.hardware import native_bfloat16
from blip2_edu.attention import select
from blip2_edu.bridges import (
    Bridge,
    QFormerBridge,
    QFormerBridgeConfig,
    describe,
    make_bridge,
)
from blip2_edu.checkpoints.names import from_transformers
from blip2_edu.checkpoints.published import checkpoint_folder, load_whole, loading
from blip2_edu.checkpoints.tensors import load_strictly, load_tensors, save_json, save_tensors
from blip2_edu.errors import WeightsError
from blip2_edu.images import open_image
from blip2_edu.language import IMAGE, LanguageModel, load_language_model, load_tokenizer
from blip2_edu.objectives import itc_similarity
from blip2_edu.qformer import QFormerConfig
from blip2_edu.stage1 import Blip2Stage1, load_stage1, save_stage1
from blip2_edu.vision import ImageEncoder, from_vision_tower, load_image_encoder

ImageSource = str | Path | bytes | Image.Image


@dataclass
class Prompts:
    """What stands around the soft prompt, and what ends a text (None: the tokenizer's own token).

    A frozen model answers best in the form it was trained for.
    """

    caption: str
    question: str
    end_of_text: str | None = None  # one token

    @classmethod
    def opt(cls) -> "Prompts":
        return cls(IMAGE, IMAGE + "Question: {question} Answer:")

    @classmethod
    def t5(cls) -> "Prompts":
        return cls(IMAGE, IMAGE + "Question: {question} Short answer:")

    @classmethod
    def smollm2(cls) -> "Prompts":
        chat = f"<|im_start|>user\n{IMAGE}\n%s<|im_end|>\n<|im_start|>assistant\n"
        return cls(
            caption=chat % "Describe the photo in one short sentence.",
            question=chat % "{question} Answer in a word or two.",
            end_of_text="<|im_end|>",  # what the tokenizer names depends on who reads the file
        )

    @classmethod
    def for_model(cls, language_model: LanguageModel) -> "Prompts":
        """The chat form of SmolLM2 for the embedded one, and for others what the paper has."""
        if language_model.name == "smollm2-135m":
            return cls.smollm2()
        return cls.t5() if language_model.is_encoder_decoder else cls.opt()


@dataclass
class Blip2Config:
    """The frozen parts of a checkpoint, by name, and what stands around the soft prompt."""

    image_encoder: str
    language_model: str
    prompts: Prompts


def read_config(values: dict) -> tuple[Blip2Config, dict]:
    """A config.json of ours -> the configuration, and what `make_bridge` makes the bridge from."""
    config = Blip2Config(
        values["image_encoder"], values["language_model"], Prompts(**values["prompts"])
    )
    return config, values["bridge"]


class Blip2(nn.Module):
    """Captions, answers, matches and embeds images.

    Two Q-Formers: that of `bridge` prompts the language model, `stage1` (if there) matches and
    retrieves. They start as one, but stage 2 moves the first away from what ITC and ITM had taught
    it; keeping both costs a third more bytes and nothing else.

    A model comes in evaluation mode, from wherever it is loaded or made, and whatever trains it
    puts it back: nothing that asks it for an answer changes its mode.
    """

    def __init__(
        self,
        config: Blip2Config,
        image_encoder: ImageEncoder,
        bridge: Bridge,
        language_model: LanguageModel,
        stage1: Blip2Stage1 | None = None,
    ):
        super().__init__()
        image_encoder.check_width(bridge.image_width)
        self.config = config
        self.image_encoder = image_encoder
        self.bridge = bridge
        self.language_model = language_model
        if config.prompts.end_of_text is not None:  # what is taught and what is waited for
            language_model.end_with(config.prompts.end_of_text)
        self.stage1 = stage1.requires_grad_(False) if stage1 is not None else None
        self.eval()

    @classmethod
    def from_stage1(
        cls, stage1: Blip2Stage1, image_encoder: ImageEncoder, language_model: LanguageModel
    ) -> "Blip2":
        """What stage 2 begins with: the Q-Former of stage 1 and a projection that knows nothing."""
        bridge = QFormerBridge(QFormerBridgeConfig(stage1.config.qformer), language_model.words)
        bridge.start_from(stage1)
        prompts = Prompts.for_model(language_model)
        config = Blip2Config(image_encoder.name, language_model.name, prompts)
        return cls(config, image_encoder, bridge, language_model, stage1)

    @property
    def device(self) -> torch.device:
        return self.language_model.device

    @property
    def pretrained(self) -> set[str]:
        """Names of the parameters that learn but did not start at random."""
        return {f"bridge.{name}" for name in self.bridge.pretrained}

    def forward(
        self, image_features: Tensor, prompts: list[str], texts: list[str]
    ) -> dict[str, Tensor]:
        """The loss of stage 2 (paper, section 3.3), by name; arguments as in LanguageModel.loss."""
        return {"text": self.language_model.loss(self.bridge(image_features), prompts, texts)}

    @torch.no_grad()
    def encode_images(self, images: ImageSource | Sequence[ImageSource]) -> Tensor:
        """Open images and run the frozen encoder: features (B, N, W). Raises ImageError."""
        pixels = self.image_encoder.preprocess(open_image(image) for image in as_list(images))
        dtype = next((p.dtype for p in self.bridge.parameters()), torch.float32)
        return self.image_encoder(pixels.to(self.device)).to(dtype)

    @torch.no_grad()
    def write(self, image_features: Tensor, prompts: list[str], **decoding) -> list[str]:
        """Features (B, N, W) and B prompts -> B texts; one image may have many prompts.

        Beam search over 5 beams unless told otherwise.
        """
        soft_prompt = self.bridge(image_features)  # (B, Q, E)
        if len(soft_prompt) == 1:
            soft_prompt = soft_prompt.expand(len(prompts), -1, -1)
        if len(soft_prompt) != len(prompts):
            raise ValueError(f"{len(soft_prompt)} images do not go with {len(prompts)} questions")
        settings = {"max_new_tokens": 32, "num_beams": 5, "do_sample": False} | decoding
        return self.language_model.generate(soft_prompt, prompts, **settings)

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
        return self.write_answers(self.encode_images(images), as_list(questions), **decoding)

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
        """The prompt that asks `question`; whatever a user typed, a `{image}` too, is only text.

        So is a control token of the language model, such as <|im_end|>.
        """
        question = question.encode("utf-8", "replace").decode()
        question = " ".join(question.replace(IMAGE, "image").split())
        question = self.language_model.without_control(question)
        return self.config.prompts.question.replace("{question}", question)

    @torch.no_grad()
    def embed_image(self, images: ImageSource | Sequence[ImageSource]) -> Tensor:
        """Unit vectors (B, Q, P), one for each query."""
        return self.retriever().embed_image(self.encode_images(images))

    @torch.no_grad()
    def embed_text(self, texts: str | Sequence[str]) -> Tensor:
        """Unit vectors (T, P), one for each text. Warns of texts that are cut, with CutText."""
        model = self.retriever()
        ids, mask = model.tokenizer(as_list(texts), warn=True)
        return model.embed_text(ids.to(self.device), mask.to(self.device))

    @torch.no_grad()
    def match(self, image: ImageSource, texts: str | Sequence[str]) -> "MatchScores":
        """How well each of T texts fits the image, which is projected once for all.

        Warns of texts that are cut, with CutText. Raises ImageError and WeightsError.
        """
        model, texts = self.retriever(), as_list(texts)
        ids, mask = (x.to(self.device) for x in model.tokenizer(texts, warn=True))
        projected = model.project_image(self.encode_images(image))
        embedded = model.embed_queries(model.qformer(projected).queries)  # (1, Q, P)
        similarity = itc_similarity(embedded, model.embed_text(ids, mask))[0]  # (T,)
        logits = model.match(select(projected, [0] * len(texts)), ids, mask)  # (T, 2)
        return MatchScores(logits.softmax(dim=1)[:, 1], similarity, logits[:, 1] + similarity)

    def retriever(self) -> Blip2Stage1:
        """The model that matches and embeds. Raises WeightsError if this checkpoint has none."""
        if self.stage1 is None:
            raise WeightsError("This checkpoint has no stage-1 heads: it cannot match or embed.")
        return self.stage1

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the configuration and all that was learned; the frozen parts stay out."""
        folder = Path(folder)
        values = {"bridge": describe(self.bridge)} | asdict(self.config)
        learned = {name: x.to(dtype) for name, x in self.bridge.state_dict().items()}
        save_tensors(learned, folder / "stage2.safetensors")
        if self.stage1 is not None:
            save_stage1(self.stage1, folder, dtype)
        else:  # nor may that of another model stay behind
            for name in ("stage1.json", "stage1.safetensors", "tokenizer.json"):
                (folder / name).unlink(missing_ok=True)
        save_json(values, folder / "config.json")

    @classmethod
    def from_pretrained(cls, name: str | Path = "mini") -> "Blip2":
        """Load "mini", a folder that `save_pretrained` wrote, or a published BLIP-2 by hub id.

        What we learned is kept in half precision and loaded into float32. Raises WeightsError.
        """
        folder = checkpoint_folder(name)
        try:
            values = json.loads((folder / "config.json").read_text())
            kind = values.get("model_type")  # only a published model has one
            ours = read_config(values) if kind is None else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{folder} holds no config.json of a BLIP-2: {error}") from error
        if ours is None:
            if kind != "blip-2":
                other = "an InstructBLIP" if kind == "instructblip" else f"a model of type {kind}"
                raise WeightsError(f"{name} is {other}, and this course loads BLIP-2: name one.")
            return load_published(name, folder)
        config, bridge_settings = ours
        stage1 = load_stage1(folder) if (folder / "stage1.json").exists() else None
        image_encoder = load_image_encoder(config.image_encoder)
        language_model = load_language_model(config.language_model)
        bridge = make_bridge(bridge_settings, language_model.words)
        load_strictly(bridge, load_tensors(folder / "stage2.safetensors")[0])
        bridge.pretrained = set(bridge.state_dict())
        return cls(config, image_encoder, bridge, language_model, stage1)


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
    qformer = QFormerConfig(
        width=sizes.hidden_size,
        num_layers=sizes.num_hidden_layers,
        num_heads=sizes.num_attention_heads,
        feed_forward_width=sizes.intermediate_size,
        num_queries=theirs.config.num_query_tokens,
        image_width=sizes.encoder_hidden_size,
        cross_attention_every=sizes.cross_attention_frequency,
        vocab_size=None,
    )
    language_model = LanguageModel(
        str(name), theirs.language_model, tokenizer, theirs.generation_config.eos_token_id
    )
    bridge = QFormerBridge(QFormerBridgeConfig(qformer, False, False), language_model.words)
    state, _ = from_transformers(theirs.state_dict())
    # Their image norm is the last layer of the vision tower, and so of our encoder.
    load_strictly(bridge, {k: x for k, x in state.items() if not k.startswith("image_norm.")})
    bridge.pretrained = set(bridge.state_dict())
    config = Blip2Config(str(name), str(name), Prompts.for_model(language_model))
    encoder = from_vision_tower(str(name), theirs.vision_model)
    return Blip2(config, encoder, bridge, language_model)


def as_list(items) -> list:
    """One thing or a sequence of things -> a list of things."""
    one = isinstance(items, str | bytes) or not isinstance(items, Sequence)
    return [items] if one else list(items)
