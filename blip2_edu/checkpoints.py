"""Tensors in and out of files, and the names that others give to the same tensors.

Files are safetensors, never pickle, and are written whole or not at all.
"""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip2_edu.qformer import QFormer
from blip2_edu.weights import WeightsError

State = dict[str, Tensor]


def save_tensors(tensors: State, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write aside, flush to the disk, rename: a reader sees the old file or the new, never half.

    Raises WeightsError if the disk is full or may not be written; the old file is then intact.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, aside, metadata)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise WeightsError(f"{path} could not be written ({error}): free some space.") from error


def load_tensors(path: Path) -> tuple[State, dict[str, str]]:
    """Read all tensors and the metadata of a safetensors file; raises WeightsError."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing.") from error
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from error


def initialise_from_bert(qformer: QFormer, bert: State) -> set[str]:
    """Start a Q-Former from a BERT of the same shape, as the paper does (section 3.1).

    Both feed-forwards start as BERT's one. BERT's token type 0, which every token of a single
    sentence gets, is added to the positions, so that a pass over text alone equals BERT's. Queries,
    cross-attention and the row of [DEC] are new. Returns the names of what was copied.
    """
    state = {}
    ours, words = "word_embeddings.weight", bert["embeddings.word_embeddings.weight"]
    state[ours] = torch.cat([words, qformer.word_embeddings.weight.detach()[len(words) :]])
    state["position_embeddings.weight"] = (
        bert["embeddings.position_embeddings.weight"]
        + bert["embeddings.token_type_embeddings.weight"][0]
    )
    state |= _renamed(bert, "embeddings.LayerNorm", "norm")
    for i in range(qformer.config.num_layers):
        theirs, ours = f"encoder.layer.{i}", f"layers.{i}"
        for part in ("query", "key", "value"):
            state |= _renamed(
                bert,
                f"{theirs}.attention.self.{part}",
                f"{ours}.self_attention.attention.{part}",
            )
        state |= _renamed(
            bert, f"{theirs}.attention.output.dense", f"{ours}.self_attention.attention.output"
        )
        state |= _renamed(
            bert, f"{theirs}.attention.output.LayerNorm", f"{ours}.self_attention.norm"
        )
        for branch in ("query_feed_forward", "text_feed_forward"):
            state |= _renamed(bert, f"{theirs}.intermediate.dense", f"{ours}.{branch}.up")
            state |= _renamed(bert, f"{theirs}.output.dense", f"{ours}.{branch}.down")
            state |= _renamed(bert, f"{theirs}.output.LayerNorm", f"{ours}.{branch}.norm")
    unknown = qformer.load_state_dict(state, strict=False).unexpected_keys
    if unknown:
        raise WeightsError(f"The BERT has layers that the Q-Former lacks: {unknown}")
    return set(state)


def _renamed(state: State, old: str, new: str) -> State:
    """The tensors under the prefix `old`, under the prefix `new`."""
    old, new = old + ".", new + "."
    return {new + name[len(old) :]: x for name, x in state.items() if name.startswith(old)}
