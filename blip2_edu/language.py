"""Frozen language models behind one interface: a soft prompt and words in, a loss or words out.

A language model reads vectors; that they are word embeddings is habit. BLIP-2 puts projected
queries in their place (paper, section 3.3 and figure 3).

Axis letters: `B` images, `Q` queries, `E` width of a word embedding, `L` length of a prompt, `C`
texts an image, `T` tokens of a text, `S` tokens of all texts, `V` words of the vocabulary.
"""

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import repeat
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from blip2_edu.checkpoints.embedded import embedded_file
from blip2_edu.checkpoints.published import (
    checkpoint_folder,
    load_whole,
    loading,
    quiet_transformers,
)
from blip2_edu.errors import WeightsError
from blip2_edu.packing import packed_logits, positions
from blip2_edu.paths import CACHE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMAGE = "{image}"  # where the soft prompt goes in a prompt
PLAIN = {"add_special_tokens": False, "split_special_tokens": True}  # text that is only text


class LanguageModel(nn.Module):
    """A transformers language model, decoder-only or encoder-decoder, frozen.

    name          what `load_language_model` was asked for
    width         E
    end_of_text   what ends a text: a string of one token, or the id of a token (of several, the
                  first), as a generation_config has it; None: the tokenizer's own. The loss teaches
                  it, and generation waits for it

    A prompt is a string in which `{image}` marks the place of the soft prompt. What the tokenizer
    adds by itself (OPT's BOS, T5's EOS) goes with the words after the image.
    """

    def __init__(
        self,
        name: str,
        network: "PreTrainedModel",
        tokenizer,
        end_of_text: str | int | list[int] | None = None,
    ):
        super().__init__()
        self.name = name
        self.network = network.requires_grad_(False).eval()
        if head := network.get_output_embeddings():
            # PyTorch multiplies a frozen matrix with a slice image by image; a copy is much faster.
            head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        self.tokenizer = tokenizer
        self.is_encoder_decoder = network.config.is_encoder_decoder
        self.uses_alibi = tells_positions_by_alibi(network.config)
        self.width = network.get_input_embeddings().embedding_dim
        self.end_token: int = tokenizer.eos_token_id
        if end_of_text is not None:
            self.end_with(end_of_text)

    def end_with(self, end_of_text: str | int | list[int]) -> None:
        """Let texts end so from now on. Raises WeightsError if the tokenizer has no such token."""
        if isinstance(end_of_text, str):
            ids = self.tokenizer.encode(end_of_text, add_special_tokens=False)
            unknown = self.tokenizer.unk_token_id in ids and end_of_text != self.tokenizer.unk_token
            if len(ids) != 1 or unknown:
                count = f"{len(ids)} tokens" if len(ids) > 1 else "no token"
                raise WeightsError(
                    f"The tokenizer of {self.name} has {count} for {end_of_text!r}, and one must "
                    "end a text: name another in the checkpoint's prompts."
                )
            self.end_token = ids[0]
        else:
            self.end_token = end_of_text[0] if isinstance(end_of_text, list) else end_of_text

    def train(self, mode: bool = True) -> "LanguageModel":
        """Stay in evaluation mode, whatever a parent asks for."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def words(self) -> Tensor:
        """All word embeddings, (V, E): what a soft prompt stands among."""
        return self.network.get_input_embeddings().weight

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) -> word embeddings (..., E)."""
        return self.network.get_input_embeddings()(ids)

    def token_ids(self, text: str, add_special_tokens: bool = False) -> Tensor:
        """One text -> ids (T,)."""
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def without_control(self, text: str) -> str:
        """A text for a prompt: a control token that is written out in it is broken by a space."""
        added = self.tokenizer.added_tokens_decoder.values()
        control = {token.content for token in added if token.special}
        for token in sorted(control, key=len, reverse=True):
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def embed_prompts(self, soft_prompt: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Put each soft prompt into its prompt: embeddings (B, L, E) and their mask (B, L).

        soft_prompt (B, Q, E). Shorter prompts are padded on the left, so that the text that follows
        starts right behind every one of them; those of an encoder on the right, for many an encoder
        counts positions from the first vector on, padding or not.
        """
        side = "right" if self.is_encoder_decoder else "left"
        words = {prompt: self._words_around_image(prompt) for prompt in set(prompts)}
        rows = []
        for vectors, prompt in zip(soft_prompt.to(self.words.dtype), prompts, strict=True):
            before, after = words[prompt]
            rows.append(torch.cat([before, vectors, after]))  # (L of this prompt, E)
        real = [torch.ones(len(row), dtype=torch.long, device=self.device) for row in rows]
        embeddings, mask = (pad_sequence(x, True, padding_side=side) for x in (rows, real))
        return embeddings, mask

    def _words_around_image(self, prompt: str) -> tuple[Tensor, Tensor]:
        """The embeddings of what a prompt says before its image and after it, (T, E) each."""
        before, image, after = prompt.partition(IMAGE)
        if not image:
            raise ValueError(f"the prompt {prompt!r} has no {IMAGE} to put the image in")
        return self.embed(self.token_ids(before)), self.embed(self.token_ids(after, True))

    def label_ids(self, texts: list[str]) -> Tensor:
        """Texts -> token ids (B, T), each closed by the end token; -100 behind it. On the CPU.

        A control token that is written out in a text is spelled like any other word.
        """
        rows = self.tokenizer(texts, **PLAIN).input_ids
        rows = [torch.tensor([*ids, self.end_token], dtype=torch.long) for ids in rows]
        return pad_sequence(rows, batch_first=True, padding_value=-100)

    def loss(self, soft_prompt: Tensor, prompts: list[str], texts: list[str]) -> Tensor:
        """Mean negative log likelihood of the tokens of `texts`, a scalar with gradient.

        soft_prompt (B, Q, E), B prompts, and B x C texts, image by image: C for each prompt.
        Nothing but the texts is scored: queries, prompt and padding have no label.
        """
        logits, labels = self.score(soft_prompt, prompts, texts)
        return cross_entropy(logits, labels[labels >= 0])

    def log_likelihoods(self, soft_prompt: Tensor, prompts: list[str], texts: list[str]) -> Tensor:
        """Log likelihood of every token of the texts, (B x C, T) with gradient; 0 on padding.

        Arguments as for `loss`; the last token of a text is the end token.
        """
        logits, labels = self.score(soft_prompt, prompts, texts)
        scored = labels >= 0
        likelihoods = logits.new_zeros(labels.shape)
        likelihoods[scored] = -cross_entropy(logits, labels[scored], reduction="none")
        return likelihoods

    def score(
        self, soft_prompt: Tensor, prompts: list[str], texts: list[str]
    ) -> tuple[Tensor, Tensor]:
        """Logits (S, V) of the S tokens of all texts, padding left out, and labels (B x C, T)."""
        copies, rest = divmod(len(texts), len(prompts))
        if rest or not copies:
            raise ValueError(f"{len(texts)} texts do not divide among {len(prompts)} prompts")
        embeddings, mask = self.embed_prompts(soft_prompt, prompts)
        labels = self.label_ids(texts)  # (B x C, T)
        if self.is_encoder_decoder or self.uses_alibi:
            embeddings = repeat(embeddings, "b l e -> (b c) l e", c=copies)
            mask = repeat(mask, "b l -> (b c) l", c=copies)
            logits = self.logits(embeddings, mask, labels.to(self.device))
        else:  # the same, several times faster: a prompt is read once for all of its texts
            logits = packed_logits(self.network, embeddings, mask, labels, copies)
        return logits.float(), labels.to(self.device)

    def logits(self, embeddings: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Logits (S, V) of the tokens of one text for each prompt; what `packed_logits` must equal.

        embeddings (B, L, E) and mask (B, L) of the prompts, labels (B, T) with -100 on padding. A
        decoder reads [prompt][text]: the prompt's last vector predicts the first token, each token
        the next. An encoder reads the prompt, and the decoder writes the text.
        """
        scored = labels >= 0
        if self.is_encoder_decoder:
            given = {"inputs_embeds": embeddings, "attention_mask": mask, "labels": labels}
            return self.network(**given).logits[scored]
        read = self.embed(labels[:, :-1].clamp(min=0))  # behind the last token nothing is asked
        mask = torch.cat([mask, scored[:, :-1].long()], dim=1)
        logits = self.network(
            inputs_embeds=torch.cat([embeddings, read], dim=1),
            attention_mask=mask,
            **self._positions(mask),
            use_cache=False,
            logits_to_keep=labels.shape[1],
        ).logits  # (B, T, V)
        return logits[scored]

    def _positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Where each token stands, for a network that wants to be told."""
        return {} if self.uses_alibi else {"position_ids": positions(mask)}

    def word_of_token(self, text: str) -> list[int]:
        """For each token of a text, which of the words of `text.split()` it ends in."""
        offsets = self.tokenizer(text, **PLAIN, return_offsets_mapping=True).offset_mapping
        return [max(0, len(text[:end].split()) - 1) for _, end in offsets]

    def _read(self, embeddings: Tensor, mask: Tensor, copies: int):
        """Keys and values of prompts (B, L, E), each repeated for `copies` continuations."""
        cache = self.network.base_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            **self._positions(mask),
            use_cache=True,
        ).past_key_values
        cache.batch_repeat_interleave(copies)
        return cache

    @torch.no_grad()
    def generate(self, soft_prompt: Tensor, prompts: list[str], **decoding) -> list[str]:
        """Soft prompts (B, Q, E) in their prompts -> texts, through transformers' `generate`.

        One text for each, or `num_return_sequences` of them one behind the other.

        decoding: num_beams, do_sample, top_p, temperature, length_penalty, max_new_tokens, ...
        """
        embeddings, mask = self.embed_prompts(soft_prompt, prompts)
        beams = decoding.get("num_beams", 1)
        own_cache = self.network.generation_config.cache_implementation is None
        if beams > 1 and own_cache and embeddings.shape[1] > 1 and not self.is_encoder_decoder:
            # Else every beam would read the prompt again.
            decoding |= {"past_key_values": self._read(embeddings[:, :-1], mask[:, :-1], beams)}
        ids = self.network.generate(
            inputs_embeds=embeddings,
            attention_mask=mask,
            eos_token_id=self.end_token,
            pad_token_id=self.tokenizer.pad_token_id,
            **decoding,
        )
        # The end may be an ordinary word piece, which decoding would keep.
        rows = [[token for token in row if token != self.end_token] for row in ids.tolist()]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.strip() for text in texts]


def tells_positions_by_alibi(config) -> bool:
    """Some decoders tell positions by a bias on their attention (ALiBi) and take no numbers."""
    return config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False)


def split_prefix(text: str, generator: torch.Generator | None = None) -> tuple[str, str]:
    """Cut a text for an encoder-decoder: the encoder reads the prefix, the suffix is to be written.

    The cut lies at random between the first word and the middle (LAVIS, blip2_t5 prefix loss).
    """
    words = text.split()
    last = max(1, len(words) // 2)
    cut = int(torch.randint(1, last + 1, (), generator=generator)) if len(words) > 1 else 0
    return " ".join(words[:cut]), " ".join(words[cut:])


def load_language_model(name: str = "smollm2-135m") -> LanguageModel:
    """The embedded SmolLM2-135M, or any transformers language model by folder or hub id.

    Of a published BLIP-2 it is the part that writes. Raises WeightsError if the weights cannot be
    had or are not a language model's.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        Blip2ForConditionalGeneration,
    )

    folder = unpack_smollm2() if name == "smollm2-135m" else checkpoint_folder(name)
    end_of_text = None
    with loading(name, "language model"):
        config = AutoConfig.from_pretrained(folder)
        if config.model_type == "blip-2":
            whole = load_whole(Blip2ForConditionalGeneration, folder)
            network = whole.language_model
            end_of_text = whole.generation_config.eos_token_id
        else:
            auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            network = load_whole(auto, folder)
        tokenizer = load_tokenizer(folder)
    return LanguageModel(name, network, tokenizer, end_of_text)


def load_tokenizer(folder: Path):
    """The tokenizer of a folder; where its files are missing transformers makes an empty one up."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.encode("a", add_special_tokens=False):
        raise WeightsError(f"{folder} has no tokenizer.")
    return tokenizer


def unpack_smollm2() -> Path:
    """The GGUF as a folder that loads in a second: unpacked once, exactly, into float32."""
    file = embedded_file("smollm2-135m")
    folder = CACHE / "smollm2-135m"
    if (folder / "model.safetensors").exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    print("Unpacking SmolLM2-135M, once; this takes half a minute ...", flush=True)
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    for other in folder.parent.glob(f"{folder.name}.*.tmp"):
        if time.time() - other.stat().st_mtime > 3600:  # half a gigabyte of a run that was killed
            shutil.rmtree(other, ignore_errors=True)
    with quiet_transformers():
        network = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        settings = network.config.to_dict()
        settings.pop("quantization_config")  # it is not quantised any more
        plain = LlamaForCausalLM(LlamaConfig(**settings))
        plain.load_state_dict(network.state_dict())
    try:
        with quiet_transformers():
            plain.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.replace(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise WeightsError(f"{folder} could not be written ({error}): free 600 MB.") from error
    return folder
