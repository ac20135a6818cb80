"""What lesson 10 defines, against the package and transformers, so that they cannot drift apart."""

import pytest
import torch
from helpers import small_models
from helpers.lessons import NOTEBOOKS, SOLUTIONS, definitions
from transformers import TopPLogitsWarper

LESSON = definitions(NOTEBOOKS / "10_stage2_training.ipynb")
SOLVED = definitions(SOLUTIONS / "10_stage2_training.ipynb")
TEXTS = ["a red star", "two blue circles", "a dog", "nothing"]


@pytest.fixture
def model(tmp_path):
    return small_models.blip2(tmp_path)


@pytest.fixture
def features():
    return torch.randn(4, 10, small_models.QFORMER.image_width)


def test_the_loss_by_hand_equals_the_packages(model, features):
    prompt = model.config.prompts.caption
    ours = LESSON["loss_by_hand"](model, features, prompt, TEXTS)
    torch.testing.assert_close(ours, model(features, [prompt] * 4, TEXTS)["text"])


@pytest.fixture
def small_world(model, monkeypatch):
    """The lesson's own names, with a tiny language model and random features."""
    sizes = {"width": 16, "num_layers": 1, "num_heads": 2, "feed_forward_width": 32}
    sizes |= {"num_queries": 4, "image_width": 12, "cross_attention_every": 1}
    world = {
        "language": model.language_model,
        "SIZES": sizes | {"vocab_size": None, "dropout": 0, "attention_dropout": 0},
        "PROMPT": "a photo:{image}",
        "ASK": "{question}:{image}",
        "names": TEXTS,
        "train_features": torch.randn(4, 10, 12),
    }
    world["prompt_words"] = LESSON["read_words"](model.language_model, world["PROMPT"])
    for name, value in world.items():
        monkeypatch.setitem(LESSON, name, value)


def new_bridge(seed: int):
    torch.manual_seed(seed)
    return LESSON["Bridge"](LESSON["small_qformer"](with_stage1=False), LESSON["language"])


def test_reading_the_words_of_the_prompt_once_changes_nothing(small_world):
    language, prompt = LESSON["language"], LESSON["PROMPT"]
    soft = new_bridge(0)(LESSON["train_features"])
    ours = LESSON["quick_loss"](language, LESSON["prompt_words"], soft, TEXTS)
    torch.testing.assert_close(ours, language.loss(soft, [prompt] * 4, TEXTS))
    again = LESSON["quick_loss"](language, LESSON["prompt_words"], soft, TEXTS)
    assert torch.equal(ours, again)  # the kept words have not grown


def test_learning_lowers_the_loss_and_leaves_the_language_model_alone(small_world):
    before = [p.clone() for p in LESSON["language"].parameters()]
    losses = list(LESSON["learn"](new_bridge(0), with_stage1=False, seed=0, steps=40))
    assert len(losses) == 40 and losses[-1] < losses[0] - 0.3
    after = LESSON["language"].parameters()
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_two_runs_of_one_seed_are_alike(small_world):
    first, second, other = (
        list(LESSON["learn"](new_bridge(0), with_stage1=False, seed=seed, steps=3, batch_size=2))
        for seed in (1, 1, 2)
    )
    assert first == second != other


def test_what_stage_1_taught_is_taken_over(small_world, monkeypatch):
    taught = new_bridge(3).qformer.state_dict()
    state = {f"qformer.{name}": value for name, value in taught.items()}
    monkeypatch.setitem(LESSON, "state", state | {"temperature": torch.ones(())})
    torch.manual_seed(4)
    qformer = LESSON["small_qformer"](with_stage1=True)
    assert all(torch.equal(value, taught[name]) for name, value in qformer.state_dict().items())


def test_a_moved_reader_has_the_queries_of_stage_2_and_the_texts_of_stage_1(model, monkeypatch):
    monkeypatch.setitem(LESSON, "mini", model)
    reader = LESSON["moved_by"](model)
    assert torch.equal(reader.qformer.query_tokens, model.bridge.qformer.query_tokens)
    assert not torch.equal(reader.qformer.query_tokens, model.stage1.qformer.query_tokens)
    words = "word_embeddings.weight"
    assert torch.equal(
        reader.qformer.get_parameter(words), model.stage1.qformer.get_parameter(words)
    )


def test_single_shapes_have_one_and_their_names_match():
    scenes = LESSON["simple_scenes"](1, 6, 50)
    assert len(scenes) == 6 and all(len(scene.shapes) == 1 for scene in scenes)
    names = [LESSON["name_of"](scene).upper() + "." for scene in scenes]
    assert LESSON["matches"](scenes, names) == 100
    assert LESSON["matches"](scenes, ["a dog", *names[1:]]) == pytest.approx(500 / 6)


def test_shapes_are_named_by_kind_and_color():
    scenes = LESSON["simple_scenes"](1, 3, 0)
    texts = [f"A {scene.shapes[0].name.upper()}." for scene in scenes]
    kinds = [scene.shapes[0].kind for scene in scenes]
    assert LESSON["named"](scenes, texts, "kind") == LESSON["named"](scenes, texts, "color") == 100
    assert LESSON["named"](scenes, kinds, "kind") == 100
    assert LESSON["named"](scenes, kinds, "color") == 0


def test_answers_are_learned(small_world):
    scenes = LESSON["simple_scenes"](2, 6, 0)
    assert len(scenes) == 6 and all(len(scene.shapes) <= 2 for scene in scenes)
    features, bridge = torch.randn(6, 10, 12), new_bridge(0)
    how = {"steps": 30, "batch_size": 4}
    losses = list(LESSON["learn_answers"](bridge, features, scenes, **how))
    assert len(losses) == 30 and losses[-1] < losses[0] - 0.3
    assert losses == list(LESSON["learn_answers"](new_bridge(0), features, scenes, **how))
    questions = LESSON["asked"](scenes[0])
    prompts = [LESSON["ASK"].replace("{question}", q["question"]) for q in questions]
    answers = LESSON["write"](bridge, features[:1].expand(len(questions), -1, -1), prompts)
    assert len(answers) == len(questions)


def test_questions_are_scored_by_their_type():
    questions = LESSON["asked"](LESSON["draw_scene"](3))
    right = [question["answer"] for question in questions]
    scores = LESSON["vqa_accuracy"](right, questions)
    assert set(scores.values()) == {100}
    assert {f"VQA {question['question_type']}" for question in questions} < set(scores)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_the_nucleus_is_transformers(top_p):
    torch.manual_seed(0)
    logits = 3 * torch.randn(50)
    kept = TopPLogitsWarper(top_p)(None, logits[None])[0].isfinite()
    assert torch.equal(SOLVED["nucleus"](logits.softmax(dim=0), top_p), kept)


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
def test_a_beam_is_scored_as_transformers_does(model, features, penalty):
    language, prompts = model.language_model, [model.config.prompts.caption]
    soft = model.bridge(features[:1]).detach()
    given, mask = language.embed_prompts(soft, prompts)
    found = language.network.generate(
        inputs_embeds=given,
        attention_mask=mask,
        num_beams=3,
        do_sample=False,
        max_new_tokens=6,
        length_penalty=penalty,
        eos_token_id=language.end_token,
        pad_token_id=language.tokenizer.pad_token_id,
        output_scores=True,
        return_dict_in_generate=True,
    )
    row = torch.cat([given[0], language.embed(found.sequences[0])])
    logits = language.network(inputs_embeds=row[None]).logits[0].log_softmax(dim=-1)
    chosen = found.sequences[0]
    log_p = logits[len(given[0]) - 1 : -1].gather(1, chosen[:, None])[:, 0]
    expected = SOLVED["beam_score"](log_p, penalty)
    torch.testing.assert_close(found.sequences_scores[0], expected, atol=1e-4, rtol=1e-4)
