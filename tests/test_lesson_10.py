"""What lesson 10 defines, against the package and transformers, so that they cannot drift apart."""

import pytest
import small_models
import torch
from lessons import NOTEBOOKS, SOLUTIONS, definitions
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


def test_learning_lowers_the_loss_and_leaves_the_frozen_parts_alone(model, features, monkeypatch):
    config = LESSON["TrainingConfig"](LESSON["Path"](), learning_rate=1e-3, learning_rate_new=1e-2)
    monkeypatch.setitem(LESSON, "RATES", config)
    frozen = (model.language_model, model.image_encoder, model.stage1)
    before = [p.clone() for part in frozen for p in part.parameters()]
    losses = list(LESSON["learn"](model, set(), features, TEXTS, steps=25, seed=0))
    assert len(losses) == 25 and losses[-1] < losses[0] - 0.5
    after = [p for part in frozen for p in part.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_two_runs_of_one_seed_see_the_same_scenes(model, features, monkeypatch):
    monkeypatch.setitem(LESSON, "RATES", LESSON["TrainingConfig"](LESSON["Path"]()))
    seen = []

    def loss(model, features, prompt, texts):
        seen.append(texts)
        return model.soft_prompt(features).mean()

    monkeypatch.setitem(LESSON, "loss_by_hand", loss)
    for _ in range(2):
        list(LESSON["learn"](model, set(), features, TEXTS, steps=3, seed=1, batch_size=2))
    assert seen[:3] == seen[3:] and len(set(map(tuple, seen[:3]))) > 1


def test_a_new_bridge_starts_from_stage_1_with_a_projection_of_its_own(model, monkeypatch):
    monkeypatch.setitem(LESSON, "mini", model)
    bridge, known = LESSON["new_bridge"](seed=0, with_stage1=True)
    assert torch.equal(bridge.qformer.query_tokens, model.stage1.qformer.query_tokens)
    assert not torch.equal(bridge.language_projection.weight, model.language_projection.weight)
    assert {name.split(".")[0] for name in known} == {"qformer", "image_norm"}
    assert bridge.language_model is model.language_model


def test_a_moved_reader_has_the_queries_of_stage_2_and_the_texts_of_stage_1(model, monkeypatch):
    monkeypatch.setitem(LESSON, "mini", model)
    reader = LESSON["moved_by"](model)
    assert torch.equal(reader.qformer.query_tokens, model.qformer.query_tokens)
    assert not torch.equal(reader.qformer.query_tokens, model.stage1.qformer.query_tokens)
    words = "word_embeddings.weight"
    assert torch.equal(
        reader.qformer.get_parameter(words), model.stage1.qformer.get_parameter(words)
    )


def test_small_scenes_are_small_and_their_captions_match():
    scenes = LESSON["small_scenes"](6, 50)
    assert len(scenes) == 6 and all(len(scene.shapes) <= 2 for scene in scenes)
    captions = [LESSON["shortest"](scene).upper() + "." for scene in scenes]
    assert LESSON["matches"](scenes, captions) == 100
    assert LESSON["matches"](scenes, ["a dog", *captions[1:]]) == pytest.approx(500 / 6)


def test_shapes_are_named_by_kind_and_color():
    scenes = [scene for scene in map(LESSON["draw_scene"], range(40)) if len(scene.shapes) == 1][:3]
    texts = [f"A {scene.shapes[0].name.upper()}." for scene in scenes]
    kinds = [scene.shapes[0].kind for scene in scenes]
    assert LESSON["named"](scenes, texts, "kind") == LESSON["named"](scenes, texts, "color") == 100
    assert LESSON["named"](scenes, kinds, "kind") == 100
    assert LESSON["named"](scenes, kinds, "color") == 0


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
    soft = model.soft_prompt(features[:1]).detach()
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
