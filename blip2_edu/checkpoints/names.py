"""The names that others give to our tensors: transformers, LAVIS and BERT.

Renaming goes by one table of (ours, theirs) for each format, read from left to right or from right
to left; a tensor that the other format has no name for is handed back, never dropped.
"""

from typing import TYPE_CHECKING

import torch

from blip2_edu.checkpoints.tensors import State, load_strictly
from blip2_edu.errors import WeightsError

if TYPE_CHECKING:
    from blip2_edu.qformer import QFormer

Table = tuple[tuple[str, str], ...]  # names of modules or parameters; {i} is a layer's number


def _layers(theirs: str, attention: str) -> Table:
    """One block of the Q-Former in BERT's words; `attention` is the module around its matrices."""
    parts = [
        ("query_feed_forward.up", "intermediate_query.dense"),
        ("query_feed_forward.down", "output_query.dense"),
        ("query_feed_forward.norm", "output_query.LayerNorm"),
        ("text_feed_forward.up", "intermediate.dense"),
        ("text_feed_forward.down", "output.dense"),
        ("text_feed_forward.norm", "output.LayerNorm"),
    ]
    for ours, name in (("self_attention", "attention"), ("cross_attention", "crossattention")):
        parts += [
            (f"{ours}.attention.{matrix}", f"{name}.{attention}.{matrix}")
            for matrix in ("query", "key", "value")
        ]
        parts += [
            (f"{ours}.attention.output", f"{name}.output.dense"),
            (f"{ours}.norm", f"{name}.output.LayerNorm"),
        ]
    return tuple((f"qformer.layers.{{i}}.{ours}", f"{theirs}.{{i}}.{name}") for ours, name in parts)


# Blip2ForImageTextRetrieval and Blip2ForConditionalGeneration, which share their names. They have
# nothing for `itg_head` and `temperature`.
TRANSFORMERS: Table = (
    ("image_norm", "vision_model.post_layernorm"),
    ("qformer.query_tokens", "query_tokens"),
    ("qformer.word_embeddings", "embeddings.word_embeddings"),
    ("qformer.position_embeddings", "embeddings.position_embeddings"),
    ("qformer.norm", "qformer.layernorm"),
    *_layers("qformer.encoder.layer", "attention"),
    ("image_projection", "vision_projection"),
    ("text_projection", "text_projection"),
    ("itm_head", "itm_head"),
    ("language_projection", "language_projection"),
)
LAVIS: Table = (
    ("image_norm", "ln_vision"),
    ("qformer.query_tokens", "query_tokens"),
    ("qformer.word_embeddings", "Qformer.bert.embeddings.word_embeddings"),
    ("qformer.position_embeddings", "Qformer.bert.embeddings.position_embeddings"),
    ("qformer.norm", "Qformer.bert.embeddings.LayerNorm"),
    *_layers("Qformer.bert.encoder.layer", "self"),
    ("image_projection", "vision_proj"),
    ("text_projection", "text_proj"),
    ("itm_head", "itm_head"),
    ("itg_head.dense", "Qformer.cls.predictions.transform.dense"),
    ("itg_head.norm", "Qformer.cls.predictions.transform.LayerNorm"),
    ("itg_head.bias", "Qformer.cls.predictions.bias"),
    ("temperature", "temp"),
)
LAVIS_PROJECTIONS = ("opt_proj", "t5_proj", "llm_proj")  # each language model has its own name


def to_transformers(state: State) -> tuple[State, State]:
    """Our state -> (theirs, what has no name there: `itg_head` and `temperature`)."""
    return _rename(state, TRANSFORMERS)


def from_transformers(state: State) -> tuple[State, State]:
    """Their state -> (ours, what is not ours to hold: the frozen encoder and language model)."""
    return _rename(state, _reversed(TRANSFORMERS))


def to_lavis(state: State, projection: str = "opt_proj") -> tuple[State, State]:
    """Our state -> (theirs, what has no name there); `projection` is one of LAVIS_PROJECTIONS."""
    renamed, rest = _rename(state, (*LAVIS, ("language_projection", projection)))
    return renamed | _repeated_in_lavis(renamed), rest


def from_lavis(state: State) -> tuple[State, State]:
    """Their state (the "model" of a checkpoint) -> (ours, what is not ours to hold).

    What merely repeats another tensor is left out; `to_lavis` puts it back. Should it differ, which
    our tied head cannot hold, it is in the second part.
    """
    repeated = _repeated_in_lavis(state)
    needed = {
        name: x
        for name, x in state.items()
        if name not in repeated or not torch.equal(x, repeated[name])
    }
    projections = tuple((name, "language_projection") for name in LAVIS_PROJECTIONS)
    return _rename(needed, (*_reversed(LAVIS), *projections))


def _repeated_in_lavis(state: State) -> State:
    """What LAVIS saves although the rest implies it: a head tied to the words, counted positions.

    Without a text branch the positions are still BERT's 512.
    """
    repeated, bert, head = {}, "Qformer.bert.embeddings", "Qformer.cls.predictions"
    if f"{head}.bias" in state:
        repeated[f"{head}.decoder.bias"] = state[f"{head}.bias"].clone()
        if f"{bert}.word_embeddings.weight" in state:
            repeated[f"{head}.decoder.weight"] = state[f"{bert}.word_embeddings.weight"].clone()
    if f"{bert}.LayerNorm.weight" in state:
        positions = state.get(f"{bert}.position_embeddings.weight")
        count = 512 if positions is None else len(positions)
        repeated[f"{bert}.position_ids"] = torch.arange(count)[None]
    return repeated


def _reversed(table: Table) -> Table:
    return tuple((theirs, ours) for ours, theirs in table)


def _rename(state: State, table: Table) -> tuple[State, State]:
    """Read `table` from left to right; returns (renamed, those that it has no new name for)."""
    numbers = {"0", *(part for name in state for part in name.split(".") if part.isdigit())}
    new_names = {old.format(i=i): new.format(i=i) for old, new in table for i in numbers}
    renamed, rest = {}, {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        new = new_names.get(name) or (module in new_names and f"{new_names[module]}.{leaf}")
        if new and new not in renamed:  # two of their names for one of ours: the second waits
            renamed[new] = tensor
        else:
            rest[name] = tensor
    return renamed, rest


def initialise_from_bert(qformer: "QFormer", bert: State) -> set[str]:
    """Start a Q-Former from a BERT of the same shape, as the paper does (section 3.1).

    Both feed-forwards start as BERT's one. BERT's token type 0, which every token of a single
    sentence gets, is added to the positions, so that a pass over text alone equals BERT's. Queries,
    cross-attention and the row of [DEC] are new. Returns the names of what was copied; raises
    WeightsError if the shapes or the number of layers differ.
    """
    renamed, rest = from_lavis({f"Qformer.bert.{name}": x for name, x in bert.items()})
    state = {name.removeprefix("qformer."): x for name, x in renamed.items()}
    words, positions = "word_embeddings.weight", "position_embeddings.weight"
    types = "Qformer.bert.embeddings.token_type_embeddings.weight"
    if not (words in state and positions in state and types in rest):
        raise WeightsError("These weights are no BERT: they lack its embeddings.")
    new_words = qformer.word_embeddings.weight.detach()[len(state[words]) :]
    if new_words.shape[1] == state[words].shape[1]:  # else the strict load says what is wrong
        state[words] = torch.cat([state[words], new_words])
    state[positions] = state[positions] + rest[types][0]
    for name in [name for name in state if ".text_feed_forward." in name]:
        state[name.replace(".text_feed_forward.", ".query_feed_forward.")] = state[name]
    new = {
        name: x
        for name, x in qformer.state_dict().items()
        if name == "query_tokens" or ".cross_attention." in name
    }
    load_strictly(qformer, new | state)
    return set(state)
