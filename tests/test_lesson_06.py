"""What lesson 06 defines, against the package, so that they cannot drift apart."""

import ast
from types import SimpleNamespace

import pytest
import torch
from helpers.lessons import NOTEBOOKS, SOLUTIONS, code_cells, definitions

from blip2_edu.data.scenes import OPPOSITE, draw_scene, swapped_captions
from blip2_edu.evaluation import rerank
from blip2_edu.metrics import retrieval_scores
from blip2_edu.objectives import itc_similarity, sample_hard_negatives
from blip2_edu.qformer import QFormerConfig
from blip2_edu.stage1 import Blip2Stage1, Stage1Config
from blip2_edu.vision import load_image_encoder

PATH = NOTEBOOKS / "06_itm.ipynb"
LESSON = definitions(PATH)
for cell in code_cells(PATH):  # and the constants that its functions read
    for node in ast.parse(cell).body:
        if ast.unparse(node).startswith(("WORDS =", "SIZES =", "SIZES |=", "FOLDER =")):
            exec(ast.unparse(node), LESSON)
B, N, T = 5, 6, 7


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny() -> tuple[Blip2Stage1, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A model whose heads differ from pair to pair, features, and padded texts."""
    model = Blip2Stage1(Stage1Config(QFormerConfig.tiny(), projection_width=8)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    ids, mask = torch.randint(1, 60, (B, T)), torch.ones(B, T, dtype=torch.long)
    mask[0, 4:] = 0
    return model, torch.randn(B, N, 20), ids, mask


@pytest.fixture
def small(monkeypatch) -> Blip2Stage1:
    """The lesson's own model, narrower."""
    sizes = {"width": 32, "feed_forward_width": 64}
    monkeypatch.setitem(LESSON, "SIZES", LESSON["SIZES"] | sizes)
    return LESSON["small_model"]()


def some_texts(count: int) -> torch.Tensor:
    """Of the first scenes, (count, 6, 3, T)."""
    scenes = LESSON["pair_scenes"](count, first_seed=0)
    return LESSON["all_texts"]([swapped_captions(scene) for scene in scenes])


def test_scenes_have_two_shapes_that_differ_and_are_the_same_at_any_size():
    scenes = LESSON["pair_scenes"](6, first_seed=0)
    assert len(scenes) == 6
    for scene in scenes:
        a, b = scene.shapes
        assert a.kind != b.kind and a.color != b.color and scene.image.size == (224, 224)
    for seed in range(20):
        shapes = [draw_scene(seed, size).shapes for size in (64, 224)]
        assert len({tuple((s.kind, s.color) for s in some) for some in shapes}) == 1


@torch.no_grad()
def test_matching_by_hand_equals_the_package():
    model, features, ids, mask = tiny()
    logits, votes = LESSON["match_by_hand"](model, features, ids, mask)
    expected = model.match(model.project_image(features), ids, mask)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(votes.mean(dim=1), expected)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_drawing_equals_the_package(temperature):
    similarity = torch.rand(B, B)
    belongs = torch.eye(B, dtype=torch.bool)
    for draw in range(20):
        torch.manual_seed(draw)
        found = LESSON["draw_wrong"](similarity, temperature)
        torch.manual_seed(draw)
        rows, columns = sample_hard_negatives(similarity / temperature, belongs)
        assert torch.equal(found, columns) and torch.equal(rows, torch.arange(B))


def test_three_b():
    wrong_images, wrong_texts = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
    images, texts, labels = LESSON["three_b"](wrong_images, wrong_texts)
    assert images.tolist() == [0, 1, 2, 1, 2, 0, 0, 1, 2]
    assert texts.tolist() == [0, 1, 2, 0, 1, 2, 2, 0, 1]
    assert torch.equal(labels, (images == texts).long()) and labels.sum() == 3


@torch.no_grad()
def test_the_loss_equals_the_package():
    model, *batch = tiny()
    torch.manual_seed(3)
    found = LESSON["matching_loss"](model, *batch)
    torch.manual_seed(3)
    torch.testing.assert_close(found, model(*batch, objectives=("itm",))["itm"])


def test_captions_told_from_the_other_shape_are_true_too():
    assert set(OPPOSITE) == {"left of", "right of", "above", "below"}
    for scene in LESSON["pair_scenes"](8, first_seed=500):
        true = swapped_captions(scene).true
        told = LESSON["told_from_the_other"](true)
        assert told != true and {true, told} <= set(scene.captions)
        assert LESSON["told_from_the_other"](told) == true


def test_the_ways_to_tell_a_scene():
    """The first caption of each way is true of the scene, the two others are not."""
    for scene in LESSON["pair_scenes"](8, first_seed=900):
        ways = LESSON["six_ways"](swapped_captions(scene))
        names = [shape.name for shape in scene.shapes]
        for true, *wrong in ways[:2]:
            assert true in scene.captions and not set(wrong) & set(scene.captions)
        for true, *wrong in ways[2:4]:
            assert true.split(" ", 1)[1] in names
            assert not {text.split(" ", 1)[1] for text in wrong} & set(names)
        for (true, *wrong), told in zip(ways[4:], ways[:2], strict=True):
            assert told[0].startswith(true) and told[1].startswith(wrong[0])
            assert told[2].startswith(wrong[1])


def test_tokens():
    texts = ["a red star left of an orange circle", "an orange star"]
    words = [[LESSON["WORDS"][i] for i in row] for row in LESSON["tokenize"](texts).tolist()]
    assert words[0] == ["[CLS]", "red", "star", "left", "orange", "circle"]
    assert words[1] == ["[CLS]", "orange", "star", "[PAD]", "[PAD]", "[PAD]"]


def test_principal_components_have_equal_spread_and_positions_are_added():
    features = torch.randn(40, 49, 6) @ torch.randn(6, 6) + 3
    mean, basis = LESSON["principal_components"](features, width=4)
    found = LESSON["with_positions"](features, mean, basis)
    assert found.shape == (40, 49, 4 + 16)
    torch.testing.assert_close(
        torch.cov(found[..., :4].flatten(0, 1).T), torch.eye(4), atol=1e-3, rtol=0
    )
    rows, columns = found[0, :, 4].view(7, 7), found[0, :, 5].view(7, 7)
    assert torch.equal(rows, columns.T) and rows[0].unique() == -1 and rows[-1].unique() == 1


@torch.no_grad()
def test_contrast_by_loops(small):
    texts = some_texts(3)[:, 0]
    queries = torch.randn(3, 4, 32)
    loss, similarity = LESSON["contrast"](small, queries, texts)
    images = small.embed_queries(queries)
    read = [small.embed_text(texts[:, i], texts[:, i] > 0) for i in range(3)]
    torch.testing.assert_close(similarity, itc_similarity(images, read[0]) / 0.07)
    total = 0.0
    for i in range(3):
        swapped = [itc_similarity(images[i : i + 1], r[i : i + 1])[0] / 0.07 for r in read[1:]]
        choices = torch.cat([similarity[i], *swapped])
        total += (choices.logsumexp(0) + similarity[:, i].logsumexp(0) - 2 * similarity[i, i]) / 6
    torch.testing.assert_close(loss, total)


def test_both_losses_reach_all_that_learns(small):
    sum(LESSON["both_losses"](small, torch.randn(B, 49, 144), some_texts(B)[:, 0])).backward()
    for name, parameter in small.named_parameters():
        assert (parameter.grad is None) == name.startswith("itg_head"), name


def test_training_lowers_both_losses(small):
    texts, features = some_texts(8), torch.randn(8, 49, 144)
    log, exams = LESSON["train"](small, features, texts, (features, texts[:, 0]), 100, 16, 3e-3)
    assert log.shape == (100, 2) and len(exams) == 1 and exams[0].shape == (4,)
    assert (log[-10:].mean(dim=0) < 0.9 * log[:5].mean(dim=0)).all()


@torch.no_grad()
def test_judging(small):
    texts, features = some_texts(4)[:, 0], torch.randn(4, 49, 144)
    itc, itm = LESSON["judge"](small, features, texts)
    image = small.project_image(features)
    for i in range(3):
        ids = texts[:, i]
        similarity = itc_similarity(
            small.embed_queries(small.qformer(image).queries), small.embed_text(ids, ids > 0)
        )
        torch.testing.assert_close(itc[:, i], similarity.diag())
        probability = small.match(image, ids, ids > 0).softmax(dim=1)[:, 1]
        torch.testing.assert_close(itm[:, i].sigmoid(), probability)
    won = LESSON["wins"](torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 0.0]]))
    assert won.tolist() == [50, 50]


@pytest.fixture(scope="module")
def unseen() -> tuple[torch.Tensor, torch.Tensor]:
    """Scenes that neither the training nor the lesson has: features, and captions as they are."""
    scenes = LESSON["pair_scenes"](40, first_seed=2_000_000)
    encoder = load_image_encoder("efficientnet-lite0")
    texts = LESSON["all_texts"]([swapped_captions(scene) for scene in scenes])
    return encoder(encoder.preprocess([scene.image for scene in scenes])), texts[:, 0]


def test_what_the_trained_ones_tell_apart(unseen):
    """The lesson's story, far from its numbers: colors with swaps, relations never."""
    features, texts = unseen
    won = {}
    for name in ("random", "swapped"):
        model, log, exams, mean, basis = LESSON["load_checkpoint"](name)
        assert log.shape == (1500, 2) and exams.shape == (15, 4)
        scores = LESSON["judge"](model, LESSON["with_positions"](features, mean, basis), texts)
        won[name] = torch.stack([LESSON["wins"](x) for x in scores])  # (ITC and ITM, 2 kinds)
    assert won["swapped"][1, 0] > 80 and (won["random"] < 80).all()


def test_the_trained_ones_are_small():
    assert sum(file.stat().st_size for file in LESSON["FOLDER"].iterdir()) < 3_000_000


def test_a_checkpoint_is_made_as_it_is_read(small, monkeypatch, tmp_path):
    monkeypatch.setitem(LESSON, "FOLDER", tmp_path)
    pairs = LESSON["pair_scenes"](8, first_seed=0)
    monkeypatch.setitem(LESSON, "pair_scenes", lambda count, first_seed: (pairs * 26)[:count])
    monkeypatch.setitem(LESSON, "encode", lambda scenes: torch.randn(len(scenes), 49, 200).half())
    LESSON["make_checkpoint"]("some", 3, how_many=8, steps=100)
    _, log, exams, mean, basis = LESSON["load_checkpoint"]("some")
    assert log.shape == (100, 2) and exams.shape == (1, 4)
    assert mean.shape == (200,) and basis.shape == (200, 128)


@torch.no_grad()
def test_reranking_equals_the_package(monkeypatch):
    """Both the lesson's first place and the solution's whole order, against `evaluation.rerank`."""
    model, features, ids, mask = tiny()
    owner, names = torch.arange(B), [str(i) for i in range(B)]

    def tokenizer(texts):
        rows = [int(text) for text in texts]
        return ids[rows], mask[rows]

    model.tokenizer = tokenizer
    similarity = torch.rand(B, B)
    cache = SimpleNamespace(rows=lambda rows: features[list(rows)])
    for k in (2, B):
        expected, _ = rerank(model, cache, list(range(B)), names, similarity, k)
        near, best = similarity.topk(k, dim=1)
        monkeypatch.setitem(LESSON, "ProgressBar", range)
        match = LESSON["match_logits"](model, features, ids, mask, best)
        for name, value in (("best", best), ("owner", owner)):
            monkeypatch.setitem(LESSON, name, value)
        first = retrieval_scores(expected, owner)["TR@1"]
        assert LESSON["top_1"](match + near) == pytest.approx(first)
        order = definitions(SOLUTIONS / PATH.name)["rerank"](
            similarity, torch.zeros(B, B).scatter(1, best, match), k
        )
        assert torch.equal(order, expected.argsort(dim=1, descending=True))
