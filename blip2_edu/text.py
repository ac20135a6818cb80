"""Captions as the Q-Former reads them: BERT's word pieces."""

import json
import re
import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer as WordPieces
from torch import Tensor

from blip2_edu.checkpoints.tensors import save_json
from blip2_edu.errors import WeightsError

MAX_TOKENS = 32  # as in LAVIS; the longest caption of a photograph is rarely over 25


class CutText(UserWarning):
    """Only the beginning of a text is read; the message is one sentence for the user."""


def clean(text: str) -> str:
    """Lower case, single spaces, no punctuation but ' and -: close to how BLIP-2 was trained."""
    return " ".join(re.sub(r"[^\w\s'-]", " ", text.lower()).split())


class Tokenizer:
    """Texts in, padded token ids out. The first token is [CLS], the last [SEP]."""

    def __init__(self, file: Path, max_tokens: int = MAX_TOKENS):
        if not file.is_file():
            raise WeightsError(f"The tokenizer {file} is missing: fetch the checkpoint again.")
        try:
            self.pieces = WordPieces.from_file(str(file))
        except Exception as error:  # tokenizers has no class of its own for what it cannot read
            raise WeightsError(f"{file} is no tokenizer: {error}") from error
        self.max_tokens = max_tokens
        self.pieces.enable_truncation(max_tokens)
        self.pieces.enable_padding()

    def __call__(self, texts: list[str], warn: bool = False) -> tuple[Tensor, Tensor]:
        """Returns ids (B, T) and a mask (B, T), 1 on tokens and 0 on padding.

        warn  give a CutText if there are texts of which only the beginning is read
        """
        encoded = self.pieces.encode_batch([clean(text) for text in texts])
        if warn and (cut := sum(bool(e.overflowing) for e in encoded)):
            read = f"only the first {self.max_tokens} tokens are read"
            # Level 4 is where `Blip2.match`, within no_grad, was called.
            warnings.warn(f"{cut} of {len(texts)} texts cut: {read}.", CutText, stacklevel=4)
        return (
            torch.tensor([e.ids for e in encoded]),
            torch.tensor([e.attention_mask for e in encoded]),
        )

    def save(self, file: Path) -> None:
        save_json(json.loads(self.pieces.to_str()), file)

    def decode(self, ids: Tensor) -> list[str]:
        """ids (B, T) -> texts, without special tokens."""
        return self.pieces.decode_batch(ids.tolist())
