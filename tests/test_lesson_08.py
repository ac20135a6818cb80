"""Lesson 08 against the package: its step is fit's step, its search is what match would say."""

import inspect
import json
import re
import shlex
from types import SimpleNamespace

import nbformat
import pytest
import torch
import typer
from helpers import tiny
from helpers.lessons import NOTEBOOKS, definitions

from blip2_edu.app.train import train as train_command
from blip2_edu.data.batches import Source
from blip2_edu.objectives import itc_similarity
from blip2_edu.training import (
    Stage1Training,
    learning_rate_factor,
    parameter_groups,
    seed_of,
    train_stage1,
)

PATH = NOTEBOOKS / "08_stage1_training.ipynb"
TEXTS = ["a dog on the grass", "the red car", "a cat sits", "a blue bird in snow"]


@pytest.fixture
def lesson(tmp_path, monkeypatch) -> dict:
    """What the notebook defines, with tiny stand-ins for the values that it had made by then."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tokenizer = tiny.tokenizer(tmp_path)
    stage1 = tiny.stage1(dropout=0.0, words=tokenizer).eval()
    features = tiny.random_features(9).rows(range(9))
    with torch.no_grad():
        made = {
            "tokenizer": tokenizer,
            "mini": SimpleNamespace(stage1=stage1),
            "photos": [tmp_path / f"photo{i}.jpg" for i in range(9)],
            "photo_features": features,
            "photo_embeddings": stage1.embed_image(features),
            "photo_keys_values": stage1.project_image(features),
            "texts": TEXTS,
            "text_embeddings": stage1.embed_text(*tokenizer(TEXTS)),
        }
    return definitions(PATH) | made


def in_lesson(lesson: dict, name: str):
    """The notebook's function, with the stand-ins as its globals."""
    inspect.unwrap(lesson[name]).__globals__.update(lesson)
    return lesson[name]


def test_the_step_by_hand_is_a_step_of_fit(lesson, tmp_path):
    source = Source(tiny.captioned(20), tiny.random_features(20), batch_size=4)
    held_out = tiny.captioned(6, seed=1), tiny.random_features(6, seed=1)
    settings = {"epochs": 2, "learning_rate_new": 1e-3, "warmup": 0.2}
    settings |= {"itm_pairs": 32, "random_negatives": 1000}  # as the lesson has it
    config = Stage1Training(tmp_path / "run", **settings)
    by_package = tiny.stage1(words=lesson["tokenizer"])
    train_stage1(by_package, source, [held_out], config)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    recorded = [line for line in lines if line["kind"] == "train"]

    by_hand = tiny.stage1().train()
    groups = parameter_groups(by_hand, set(), config)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    assert len(recorded) == 10
    for step, line in enumerate(recorded):
        torch.manual_seed(seed_of(0, step, 0))
        batch, factor = source.batch(step, 0, 1), learning_rate_factor(step, 10, 2)
        losses = in_lesson(lesson, "take_step")(by_hand, optimizer, batch, factor)
        assert losses == pytest.approx({name: line[name] for name in losses}, abs=1e-6)


def test_search_finds_what_match_says(lesson):
    stage1, tokenizer = lesson["mini"].stage1, lesson["tokenizer"]
    for text in TEXTS:
        found, scores = in_lesson(lesson, "find_photos")(text, k=4)
        text_ids, text_mask = tokenizer([text])
        similarity = itc_similarity(
            lesson["photo_embeddings"], stage1.embed_text(text_ids, text_mask)
        )[:, 0]
        assert set(found.tolist()) == set(tiny.ranks(similarity.tolist())[:4])
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)
        for i, score in zip(found, scores, strict=True):
            image = stage1.project_image(lesson["photo_features"][i : i + 1])
            match = stage1.match(image, text_ids, text_mask)[0, 1]
            assert torch.isclose(score, match + similarity[i], atol=1e-5)


def test_search_for_texts_is_the_same_table_along_the_other_side(lesson):
    for photo in range(9):
        texts, scores = in_lesson(lesson, "find_texts")(photo, k=3)
        for text, score in zip(texts, scores, strict=True):
            found, by_text = in_lesson(lesson, "find_photos")(text, k=9)
            assert torch.isclose(score, by_text[found.tolist().index(photo)], atol=1e-5)


def test_what_is_typed_is_escaped(lesson, monkeypatch):
    pytest.importorskip("IPython")
    lesson["gallery_figure"] = lambda photos, titles, **_: titles
    lesson["show"] = lambda titles, alt, **_: alt
    heading, alt = in_lesson(lesson, "answer")("<img src=x onerror=alert(1)> a dog & cat")
    assert "<img" not in heading.data and "<img" not in alt
    assert "&lt;img src=x onerror=alert(1)&gt; a dog &amp; cat" in heading.data


@torch.no_grad()
def test_told_apart_counts_the_pairs_whose_truth_scores_higher(lesson):
    model, tokenizer = lesson["mini"].stage1, lesson["tokenizer"]
    features = lesson["photo_features"][:4]
    wrong = TEXTS[1:] + TEXTS[:1]
    right = {"itc": 0, "itm": 0}
    for row, texts in enumerate(zip(TEXTS, wrong, strict=True)):
        text_ids, text_mask = tokenizer(list(texts))
        embedded = model.embed_image(features[row : row + 1])
        itc = itc_similarity(embedded, model.embed_text(text_ids, text_mask))[0]
        image = model.project_image(features[row : row + 1].expand(2, -1, -1))
        itm = model.match(image, text_ids, text_mask)[:, 1]
        right["itc"] += int(itc[0] > itc[1])
        right["itm"] += int(itm[0] > itm[1])
    given = in_lesson(lesson, "told_apart")(model, features, TEXTS, wrong)
    assert given == [25 * right["itc"], 25 * right["itm"]]


def test_held_out_scenes_can_be_told_apart_only_by_binding():
    scenes = definitions(PATH)["held_out_scenes"](range(150))
    assert len(scenes) > 5
    for _, captions in scenes:
        assert sorted(captions.true.split()) == sorted(captions.attributes_swapped.split())
        assert captions.true != captions.attributes_swapped
    assert len({captions.true for _, captions in scenes}) == len(scenes)


def test_maps_are_shares_of_attention(lesson):
    grid = SimpleNamespace(image_encoder=SimpleNamespace(grid=(2, 3)))
    lesson["mini"].image_encoder = grid.image_encoder
    stage1 = lesson["mini"].stage1
    maps = in_lesson(lesson, "query_maps")(stage1, lesson["photo_features"][:1])
    assert maps.shape == (stage1.config.qformer.num_queries, 2, 3)
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(len(maps)))


def test_the_commands_exist():
    cells = nbformat.read(PATH, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    commands = [
        shlex.split(line)
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    assert len(commands) >= 2
    known = typer.main.get_command(train_command).commands["stage1"].params
    options = {name for parameter in known for name in parameter.opts}
    for command in commands:
        place = command.index("-m")
        assert command[place : place + 4] == ["-m", "blip2_edu", "train", "stage1"]
        assert {word for word in command[place + 4 :] if word.startswith("--")} <= options
