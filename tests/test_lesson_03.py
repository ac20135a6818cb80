"""What lesson 03 defines: the reader, its questions, its measures, and queries that stay tied."""

import pytest
import torch
from helpers.lessons import NOTEBOOKS, definitions
from torch import nn

from blip2_edu.data.scenes import COLORS, KINDS, Scene, Shape, draw_scene
from blip2_edu.qformer import QFormer

LESSON = definitions(NOTEBOOKS / "03_query_tokens.ipynb")
B, N, W, Q, D = 3, 5, 6, 4, 8


def test_the_reader_equals_pytorchs_attention():
    torch.manual_seed(0)
    reader, features = (
        LESSON["QueryReader"](Q, W, width=D, num_heads=2).eval(),
        torch.randn(B, N, W),
    )
    twin = nn.MultiheadAttention(D, 2, kdim=W, vdim=W, batch_first=True).eval()
    parts = (reader.attention.query, reader.attention.key, reader.attention.value)
    twin.q_proj_weight.data, twin.k_proj_weight.data, twin.v_proj_weight.data = (
        part.weight.data for part in parts
    )
    twin.in_proj_bias.data = torch.cat([part.bias for part in parts]).detach()
    twin.out_proj.load_state_dict(reader.attention.output.state_dict())
    queries = reader.norm(reader.query_tokens).expand(B, -1, -1)
    torch.testing.assert_close(reader(features), twin(queries, features, features)[0])


def test_the_reader_starts_like_the_package():
    torch.manual_seed(0)
    tokens = LESSON["QueryReader"](64, W, width=96).query_tokens
    assert isinstance(tokens, nn.Parameter)
    assert tokens.std().item() == pytest.approx(0.02, rel=0.05)
    assert tokens.mean().item() == pytest.approx(0, abs=0.002)


def test_answers_of_a_known_scene():
    shapes = [
        Shape("star", "red", "small", 20, 20, 10),  # upper left
        Shape("circle", "blue", "small", 150, 30, 10),  # upper right, with another
        Shape("square", "pink", "small", 200, 100, 10),
        Shape("triangle", "brown", "small", 112, 112, 10),  # lower right, on its edge
    ]
    scene = Scene(draw_scene(0).image, [], [], shapes)
    red, brown = list(COLORS).index("red"), list(COLORS).index("brown")
    star, triangle = KINDS.index("star"), KINDS.index("triangle")
    assert LESSON["answers"](scene) == [
        3,
        *(red, -100, -100, brown),
        *(star, -100, -100, triangle),
        *(1, 1, 0, 1),
    ]


def labelled(num_scenes: int) -> torch.Tensor:
    return torch.tensor([LESSON["answers"](draw_scene(seed)) for seed in range(num_scenes)])


def certain(labels: torch.Tensor) -> torch.Tensor:
    """Logits (B, 60) that give every answer that was asked for, with certainty."""
    logits, start = [], 0
    for times, choices in ((1, 4), (4, 8), (4, 4), (4, 2)):
        part = labels[:, start : start + times].clamp(min=0)
        logits.append(20.0 * nn.functional.one_hot(part, choices).flatten(1))
        start += times
    return torch.cat(logits, dim=1)


def test_right_answers_score_one_and_cost_nothing():
    labels = labelled(20)
    logits = certain(labels)
    assert LESSON["accuracy"](logits, labels) == dict.fromkeys(
        ("count", "color", "shape", "position"), 1.0
    )
    assert LESSON["scene_loss"](logits, labels).item() < 1e-6


def test_what_was_not_asked_does_not_count():
    labels = labelled(20)
    wrong = certain(labels)
    wrong[:, 4 + 32 + 16 :] *= -1  # position
    assert LESSON["accuracy"](wrong, labels)["position"] == 0
    assert LESSON["accuracy"](wrong, labels)["color"] == 1
    labels[:, 1:5] = -100
    labels[0, 1] = 0
    logits = torch.zeros(20, 60)
    logits[:, 4] = 1  # the first color, in the first quarter
    assert LESSON["accuracy"](logits, labels)["color"] == 1


def test_an_undecided_guess_costs_the_entropy_of_chance():
    loss = LESSON["scene_loss"](torch.zeros(20, 60), labelled(20)).item()
    assert loss == pytest.approx(torch.tensor([4.0, 8, 4, 2]).log().sum().item(), rel=1e-5)


def test_measures_of_parting():
    alike = torch.ones(1, 3, 2)
    assert LESSON["mean_cosine"](alike).item() == pytest.approx(1)
    assert LESSON["largest_difference"](alike).item() == 0
    square = torch.tensor([[[1.0, 0], [0, 2], [-3, 0], [0, -4]]])  # 4 pairs at 0, 2 pairs at -1
    assert LESSON["mean_cosine"](square).item() == pytest.approx(-1 / 3)
    assert LESSON["largest_difference"](square).item() == 6


@pytest.mark.parametrize(
    ("zeros", "dropout", "head", "tied"),
    [
        (True, 0.0, "MeanHead", True),
        (False, 0.0, "MeanHead", False),
        (True, 0.1, "MeanHead", False),
        (True, 0.0, "by_position", False),
    ],
)
def test_only_noise_or_a_place_parts_equal_queries(zeros, dropout, head, tied):
    torch.manual_seed(0)
    qformer = LESSON["small_qformer"](W, zeros, dropout)
    assert isinstance(qformer, QFormer)
    features, labels = torch.randn(40, N, W), labelled(40)
    head = LESSON[head](qformer.config.width, 60)
    history, loss = LESSON["watch"](qformer, head, features, labels, steps=10)
    difference, outputs, maps = history[-1]
    assert len(history) == 3 and loss > 0
    assert (difference < 1e-6) == tied
    assert (outputs > 1 - 1e-5) == tied
    assert maps <= 1 + 1e-5


def test_the_mean_head_favours_no_query():
    torch.manual_seed(0)
    head, queries = LESSON["MeanHead"](D, 7), torch.randn(B, Q, D)
    torch.testing.assert_close(head(queries), head(queries.flip(1)))
    assert head(queries).shape == (B, 7)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    features, labels = torch.randn(64, N, W), labelled(64)
    model = nn.Sequential(LESSON["QueryReader"](Q, W), LESSON["probe"](Q))
    before = LESSON["scene_loss"](model(features), labels)
    LESSON["train"](model, features, labels, steps=30)
    assert LESSON["scene_loss"](model(features), labels) < 0.8 * before
    assert not model.training
