"""Files written whole or not at all; names that fit transformers and LAVIS, with nothing lost."""

import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import small_models
from helpers.reference import generation_model, retrieval_model
from helpers.samples import random_image, random_qformer, random_stage1, random_text, randomise
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from blip2_edu.checkpoints import tensors
from blip2_edu.checkpoints.embedded import embedded_file
from blip2_edu.checkpoints.names import (
    from_lavis,
    from_transformers,
    initialise_from_bert,
    to_lavis,
    to_transformers,
)
from blip2_edu.checkpoints.tensors import load_strictly, load_tensors, save_tensors
from blip2_edu.errors import WeightsError
from blip2_edu.qformer import QFormer, QFormerConfig
from blip2_edu.stage1 import save_stage1

TINY = QFormerConfig.tiny()
CLOSE = {"atol": 1e-5, "rtol": 0}
State = dict[str, Tensor]


def assert_identical(a: State, b: State) -> None:
    assert sorted(a) == sorted(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


def one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


# --- files ----------------------------------------------------------------------------------------

OLD = {"weight": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(3)}
NEW = {"weight": torch.arange(60_000.0), "step": torch.tensor(4)}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "model [a].safetensors"
    save_tensors(OLD, path, {"note": "old"})
    return path


def assert_old_and_alone(path: Path) -> None:
    tensors, metadata = load_tensors(path)
    assert_identical(tensors, OLD)
    assert metadata == {"note": "old"}
    assert list(path.parent.iterdir()) == [path]


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "new" / "folder" / "x.safetensors"
    tensors = {
        "half": torch.randn(3, 4).half(),
        "transposed": torch.randn(3, 4).T,
        "a parameter": nn.Parameter(torch.randn(2)),
        "scalar": torch.tensor(0.07),
        "empty": torch.empty(0, 4),
    }
    save_tensors(tensors, path)
    loaded, metadata = load_tensors(path)
    assert_identical(loaded, {name: x.detach() for name, x in tensors.items()})
    assert metadata == {}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("no")])
def test_an_error_half_way_leaves_the_old_file(file, monkeypatch, error):
    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(tensors, "save_file", half)
    with pytest.raises(WeightsError) as caught:
        save_tensors(NEW, file)
    assert str(file) in one_sentence(caught) and str(error) in str(caught.value)
    assert_old_and_alone(file)


@pytest.mark.skipif(sys.platform == "win32", reason="limits are of Unix")
def test_a_full_disk_leaves_the_old_file(file):
    """A real one: the system refuses to let the file grow beyond 50 kB."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(WeightsError) as caught:
            save_tensors(NEW, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_sentence(caught)
    assert_old_and_alone(file)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_kill_leaves_the_old_file_and_the_next_save_cleans_up(file):
    script = f"""
import os, signal
from pathlib import Path
from blip2_edu.checkpoints import tensors

def die(state, path, metadata):
    Path(path).write_bytes(b"half a file")
    os.kill(os.getpid(), signal.SIGKILL)

tensors.save_file = die
tensors.save_tensors({{}}, Path({str(file)!r}))
"""
    run = subprocess.run([sys.executable, "-c", script])
    assert run.returncode == -signal.SIGKILL
    assert len(list(file.parent.iterdir())) == 2
    assert_identical(load_tensors(file)[0], OLD)
    save_tensors(OLD, file, {"note": "old"})
    assert_old_and_alone(file)


def test_configurations_too_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = small_models.blip2(tmp_path)
    model.save_pretrained(tmp_path / "model")

    def contents() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}

    def half(path, text, encoding):
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    before = contents()
    for save in (
        lambda: model.save_pretrained(tmp_path / "model"),
        lambda: save_stage1(model.stage1, tmp_path / "model", torch.float16),
        lambda: model.stage1.tokenizer.save(tmp_path / "model" / "tokenizer.json"),
    ):
        with pytest.raises(WeightsError) as caught:
            save()
        assert ".json" in one_sentence(caught)
        assert contents() == before


def test_a_file_that_may_not_be_written(tmp_path):
    (tmp_path / "a file").write_text("")
    with pytest.raises(WeightsError) as caught:
        save_tensors(OLD, tmp_path / "a file" / "x.safetensors")
    one_sentence(caught)


def test_files_that_cannot_be_loaded(file):
    whole = file.read_bytes()
    with pytest.raises(WeightsError, match="is missing"):
        load_tensors(file.with_name("other"))
    for content in (b"", b"text, not tensors", whole[:4], whole[:-1], whole + b"x"):
        file.write_bytes(content)
        with pytest.raises(WeightsError, match="is not a whole safetensors file") as caught:
            load_tensors(file)
        one_sentence(caught)
    with pytest.raises(WeightsError) as caught:
        load_tensors(file.parent)
    one_sentence(caught)


# --- strict loading -------------------------------------------------------------------------------


def test_strict_loading_names_what_does_not_fit():
    model = QFormer(TINY)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = random_qformer(TINY).state_dict()
    state.pop("norm.weight")
    state["stray"] = torch.zeros(1)
    state["norm.bias"] = torch.zeros(5)
    with pytest.raises(WeightsError) as caught:
        load_strictly(model, state)
    message = one_sentence(caught)
    for words in ("missing: norm.weight", "unexpected: stray", "another shape: norm.bias"):
        assert words in message
    assert_identical(model.state_dict(), before)
    with pytest.raises(WeightsError, match=r"missing: \S+, \S+, \S+ and \d+ more") as caught:
        load_strictly(model, {})
    one_sentence(caught)


# --- transformers ---------------------------------------------------------------------------------


def with_language_projection(width: int = 40) -> State:
    """What a stage-2 model holds: no text branch, no heads, a projection into a language model."""
    without_text = random_stage1(TINY).state_dict()
    parts = ("image_norm.", "qformer.query_tokens", "qformer.norm.", "qformer.layers.")
    state = {
        name: x
        for name, x in without_text.items()
        if name.startswith(parts) and ".text_feed_forward." not in name
    }
    projection = randomise(nn.Linear(TINY.width, width)).state_dict()
    return state | {f"language_projection.{name}": x for name, x in projection.items()}


def frozen(model: nn.Module) -> State:
    """What of a transformers BLIP-2 was never trained, and so is not in our state."""
    prefixes = ("vision_model.", "language_model.")
    return {
        name: x
        for name, x in model.state_dict().items()
        if name.startswith(prefixes) and "vision_model.post_layernorm" not in name
    }


@torch.no_grad()
def test_to_the_retrieval_model_of_transformers_and_back():
    ours, theirs = random_stage1(TINY), retrieval_model(TINY)
    state, without_home = to_transformers(ours.state_dict())
    assert sorted(without_home) == [
        "itg_head.bias",
        "itg_head.dense.bias",
        "itg_head.dense.weight",
        "itg_head.norm.bias",
        "itg_head.norm.weight",
        "temperature",
    ]
    theirs.load_state_dict(state | frozen(theirs), strict=True)

    image, (ids, _) = random_image(TINY, 2, 5), random_text(TINY, [6, 6])
    features = ours.image_norm(image)
    queries = theirs.query_tokens.expand(2, -1, -1)
    expected = theirs.qformer(
        theirs.embeddings(ids, query_embeds=queries),
        query_length=TINY.num_queries,
        encoder_hidden_states=features,
    ).last_hidden_state
    output = ours.qformer(ours.project_image(image), ids)
    torch.testing.assert_close(output.queries, expected[:, : TINY.num_queries], **CLOSE)
    torch.testing.assert_close(output.text, expected[:, TINY.num_queries :], **CLOSE)
    for found, head in (
        (ours.image_projection, theirs.vision_projection),
        (ours.text_projection, theirs.text_projection),
        (ours.itm_head, theirs.itm_head),
    ):
        assert torch.equal(found(expected), head(expected))
    assert torch.equal(features, theirs.vision_model.post_layernorm(image))

    back, rest = from_transformers(theirs.state_dict())
    assert_identical(rest, frozen(theirs))
    assert_identical(back | without_home, ours.state_dict())


@torch.no_grad()
def test_to_the_generating_model_of_transformers_and_back():
    config = replace(TINY, vocab_size=None)
    theirs, ours = generation_model(config), with_language_projection()
    state, without_home = to_transformers(ours)
    assert without_home == {}
    theirs.load_state_dict(state | frozen(theirs), strict=True)

    qformer, image = QFormer(config).eval(), random_image(TINY, 2, 5)
    mine = {k.removeprefix("qformer."): x for k, x in ours.items() if k.startswith("qformer.")}
    load_strictly(qformer, mine)
    queries = theirs.query_tokens.expand(2, -1, -1)
    expected = theirs.qformer(queries, encoder_hidden_states=image).last_hidden_state
    torch.testing.assert_close(qformer(image).queries, expected, **CLOSE)
    assert torch.equal(theirs.language_projection.weight, ours["language_projection.weight"])

    back, rest = from_transformers(theirs.state_dict())
    assert_identical(rest, frozen(theirs))
    assert_identical(back, ours)


# --- LAVIS ----------------------------------------------------------------------------------------


def lavis_layer(i: int, config: QFormerConfig, with_text: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes in one BertLayer of LAVIS's Q-Former."""
    width, inner, image = config.width, config.feed_forward_width, config.image_width
    shapes = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    linear("attention.self.query", width, width)
    linear("attention.self.key", width, width)
    linear("attention.self.value", width, width)
    linear("attention.output.dense", width, width)
    norm("attention.output.LayerNorm")
    if i % config.cross_attention_every == 0:
        linear("crossattention.self.query", width, width)
        linear("crossattention.self.key", width, image)
        linear("crossattention.self.value", width, image)
        linear("crossattention.output.dense", width, width)
        norm("crossattention.output.LayerNorm")
    for branch in ("", "_query") if with_text else ("_query",):
        linear(f"intermediate{branch}.dense", inner, width)
        linear(f"output{branch}.dense", width, inner)
        norm(f"output{branch}.LayerNorm")
    return {f"Qformer.bert.encoder.layer.{i}.{name}": shape for name, shape in shapes.items()}


def lavis_shapes(config: QFormerConfig, with_text: bool) -> dict[str, tuple[int, ...]]:
    """What both stages of LAVIS's BLIP-2 have besides the frozen models."""
    width, image = config.width, config.image_width
    shapes = {
        "ln_vision.weight": (image,),
        "ln_vision.bias": (image,),
        "query_tokens": (1, config.num_queries, width),
        "Qformer.bert.embeddings.LayerNorm.weight": (width,),
        "Qformer.bert.embeddings.LayerNorm.bias": (width,),
        "Qformer.bert.embeddings.position_ids": (1, config.max_text_length if with_text else 512),
    }
    for i in range(config.num_layers):
        shapes |= lavis_layer(i, config, with_text)
    return shapes


def lavis_stage1_shapes(config: QFormerConfig, shared: int = 16) -> dict[str, tuple[int, ...]]:
    width, words = config.width, config.vocab_size
    return lavis_shapes(config, with_text=True) | {
        "Qformer.bert.embeddings.word_embeddings.weight": (words, width),
        "Qformer.bert.embeddings.position_embeddings.weight": (config.max_text_length, width),
        "Qformer.cls.predictions.bias": (words,),
        "Qformer.cls.predictions.transform.dense.weight": (width, width),
        "Qformer.cls.predictions.transform.dense.bias": (width,),
        "Qformer.cls.predictions.transform.LayerNorm.weight": (width,),
        "Qformer.cls.predictions.transform.LayerNorm.bias": (width,),
        "Qformer.cls.predictions.decoder.weight": (words, width),
        "Qformer.cls.predictions.decoder.bias": (words,),
        "vision_proj.weight": (shared, width),
        "vision_proj.bias": (shared,),
        "text_proj.weight": (shared, width),
        "text_proj.bias": (shared,),
        "itm_head.weight": (2, width),
        "itm_head.bias": (2,),
        "temp": (),
    }


def shapes_of(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in state.items()}


def random_lavis(shapes: dict[str, tuple[int, ...]]) -> State:
    """A LAVIS checkpoint: everything random but what its modules tie or count."""
    torch.manual_seed(0)
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    ids = "Qformer.bert.embeddings.position_ids"
    state[ids] = torch.arange(shapes[ids][1]).reshape(1, -1)
    head = "Qformer.cls.predictions"
    if f"{head}.bias" in state:
        state[f"{head}.decoder.weight"] = state["Qformer.bert.embeddings.word_embeddings.weight"]
        state[f"{head}.decoder.bias"] = state[f"{head}.bias"]
    return state


@pytest.mark.parametrize("config", [TINY, replace(TINY, num_layers=12)], ids=["3", "12 layers"])
def test_to_stage_1_of_lavis_and_back(config, tmp_path):
    ours = random_stage1(config).state_dict()
    theirs, without_home = to_lavis(ours)
    assert without_home == {}
    assert shapes_of(theirs) == lavis_stage1_shapes(config)
    back, rest = from_lavis(theirs)
    assert rest == {}
    assert_identical(back, ours)
    save_tensors(theirs, tmp_path / "lavis.safetensors")  # tied, and yet no shared memory


def test_from_stage_1_of_lavis_and_back():
    theirs = random_lavis(lavis_stage1_shapes(TINY))
    state, rest = from_lavis(theirs)
    assert rest == {}
    load_strictly(random_stage1(TINY), state)
    back, without_home = to_lavis(state)
    assert without_home == {}
    assert_identical(back, theirs)


@pytest.mark.parametrize("projection", ["opt_proj", "t5_proj", "llm_proj"])
def test_from_stage_2_of_lavis_and_back(projection):
    shapes = lavis_shapes(TINY, with_text=False)
    shapes |= {f"{projection}.weight": (40, TINY.width), f"{projection}.bias": (40,)}
    theirs = random_lavis(shapes)
    state, rest = from_lavis(theirs)
    assert rest == {} and shapes_of(state) == shapes_of(with_language_projection())
    back, _ = to_lavis(state, projection)
    assert_identical(back, theirs)


def test_what_is_frozen_or_not_tied_is_handed_back():
    theirs = random_lavis(lavis_stage1_shapes(TINY))
    theirs["visual_encoder.blocks.0.attn.qkv.weight"] = torch.randn(3)
    theirs["Qformer.cls.predictions.decoder.weight"] = torch.randn(TINY.vocab_size, TINY.width)
    _, rest = from_lavis(theirs)
    assert sorted(rest) == [
        "Qformer.cls.predictions.decoder.weight",
        "visual_encoder.blocks.0.attn.qkv.weight",
    ]
    two = {"opt_proj.bias": torch.zeros(1), "t5_proj.bias": torch.ones(1)}
    state, rest = from_lavis(two)
    assert list(state) == ["language_projection.bias"] and list(rest) == ["t5_proj.bias"]


def test_names_are_read_whole():
    """A name that only begins or ends like one of ours is somebody else's."""
    strangers = {
        name: torch.zeros(1)
        for name in (
            "my_query_tokens",
            "query_tokens.weight.weight",
            "itm_head_2.weight",
            "other.itm_head.weight",
            "qformer.encoder.layer.0.attention.attention.query_norm.weight",
            "Qformer.bert.encoder.layer.0.output_query.dense.lora.weight",
        )
    }
    for convert in (from_transformers, from_lavis, to_transformers, to_lavis):
        renamed, rest = convert(strangers)
        assert renamed == {} and rest.keys() == strangers.keys()


def test_a_truncated_lavis_checkpoint_is_refused_in_one_sentence():
    theirs = random_lavis(lavis_stage1_shapes(TINY))
    kept = {
        name: x
        for name, x in theirs.items()
        if not re.search(r"layer\.2\.|word_embeddings|decoder", name)
    }
    state, rest = from_lavis(kept)
    assert rest == {}
    with pytest.raises(WeightsError, match="missing: qformer.word_embeddings.weight") as caught:
        load_strictly(random_stage1(TINY), state)
    one_sentence(caught)


# --- BERT -----------------------------------------------------------------------------------------

BERT = BertConfig(
    vocab_size=TINY.vocab_size - 1,
    hidden_size=TINY.width,
    num_hidden_layers=TINY.num_layers,
    num_attention_heads=TINY.num_heads,
    intermediate_size=TINY.feed_forward_width,
    max_position_embeddings=TINY.max_text_length,
)


@torch.no_grad()
def test_a_text_pass_equals_the_bert_it_started_from():
    bert, qformer = randomise(BertModel(BERT)).eval(), random_qformer(TINY, seed=5)
    before = {name: x.clone() for name, x in qformer.state_dict().items()}
    copied = initialise_from_bert(qformer, bert.state_dict())
    ids, mask = random_text(replace(TINY, vocab_size=BERT.vocab_size), [7, 3])
    expected = bert(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    found = qformer(text_ids=ids, text_mask=mask).text[mask.bool()]
    torch.testing.assert_close(found, expected, **CLOSE)

    after = qformer.state_dict()
    new = {name for name in after if name == "query_tokens" or "cross_attention" in name}
    assert copied == set(after) - new
    assert all(torch.equal(after[name], before[name]) for name in new)
    assert torch.equal(after["word_embeddings.weight"][-1], before["word_embeddings.weight"][-1])
    for layer in qformer.layers:
        assert_identical(
            layer.query_feed_forward.state_dict(), layer.text_feed_forward.state_dict()
        )


@torch.no_grad()
def test_mini_starts_as_the_embedded_minilm():
    weights, _ = load_tensors(embedded_file("minilm-l6"))
    bert = BertModel(
        BertConfig(
            vocab_size=30522,
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
        ),
        add_pooling_layer=False,
    ).eval()
    not_used = ("pooler.", "embeddings.position_ids")
    bert.load_state_dict({k: x for k, x in weights.items() if not k.startswith(not_used)})
    qformer = QFormer(QFormerConfig.mini()).eval()
    initialise_from_bert(qformer, weights)
    ids = torch.tensor([[101, 1037, 3899, 2003, 2770, 102], [101, 1037, 4937, 102, 0, 0]])
    mask = (ids != 0).long()
    expected = bert(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    found = qformer(text_ids=ids, text_mask=mask).text[mask.bool()]
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": TINY.num_layers + 1}, "unexpected: layers.3."),
        ({"num_hidden_layers": TINY.num_layers - 1}, "missing: layers.2."),
        ({"hidden_size": 12}, "of another shape: "),
        ({"vocab_size": TINY.vocab_size + 5}, "of another shape: word_embeddings.weight"),
    ],
    ids=str,
)
def test_a_bert_of_another_shape_is_refused(change, words):
    bert = BertModel(BertConfig(**{**BERT.to_dict(), **change}))
    with pytest.raises(WeightsError) as caught:
        initialise_from_bert(QFormer(TINY), bert.state_dict())
    assert words in one_sentence(caught)


def test_what_is_no_bert_is_refused():
    with pytest.raises(WeightsError, match="no BERT"):
        initialise_from_bert(QFormer(TINY), {"wte.weight": torch.zeros(3, 3)})
