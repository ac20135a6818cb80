"""What lesson 01 defines, against the package and PyTorch, so that they cannot drift apart."""

import pytest
import torch
from helpers.lessons import NOTEBOOKS, definitions
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from blip2_edu.attention import Attention, attention_weights

LESSON = definitions(NOTEBOOKS / "01_attention.ipynb")
B, H, L, S, C, D, W = 2, 3, 4, 5, 8, 24, 7


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def masks() -> list[torch.Tensor | None]:
    some = torch.rand(B, 1, L, S) > 0.5
    some[..., 0] = True  # no empty row
    return [None, some, torch.ones(L, S).tril().bool()]


@pytest.mark.parametrize("temperature, expected", [(1e-3, [1.0, 5.0]), (1e6, [3.0, 3.0])])
def test_a_lookup_is_the_nearest_when_cold_and_the_mean_when_hot(temperature, expected):
    keys, values = torch.eye(2), torch.tensor([1.0, 5.0])
    queries = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    answers, weights = LESSON["soft_lookup"](queries, keys, values, temperature)
    torch.testing.assert_close(answers, torch.tensor(expected), atol=1e-4, rtol=0)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2))


@pytest.mark.parametrize("case", range(3))
def test_attend_equals_pytorch_and_the_package(case):
    query, key, value = torch.randn(B, H, L, C), torch.randn(B, H, S, C), torch.randn(B, H, S, C)
    mask = masks()[case]
    output, weights = LESSON["attend"](query, key, value, mask)
    expected = scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(weights, attention_weights(query, key, mask), atol=1e-6, rtol=0)


def test_an_empty_row_is_not_a_number():
    mask = torch.tensor([[False, False], [True, True]])
    output, _ = LESSON["attend"](*torch.randn(3, 2, C), mask)
    assert output[0].isnan().all() and output[1].isfinite().all()


@pytest.mark.parametrize("context_width", [None, W])
@pytest.mark.parametrize("case", range(3))
@torch.no_grad()
def test_the_module_equals_the_packages(context_width, case):
    ours, mask = LESSON["MultiHeadAttention"](D, H, context_width), masks()[case]
    package = Attention(D, H, context_width)
    package.load_state_dict(ours.state_dict())
    x, context = torch.randn(B, L, D), torch.randn(B, S, context_width or D)
    output, weights = ours(x, context, mask=mask)
    expected, expected_weights = package(x, package.keys_values(context), mask, True)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_module_equals_pytorchs_under_the_opposite_mask():
    ours = LESSON["MultiHeadAttention"](D, H)
    pytorch = nn.MultiheadAttention(D, H, batch_first=True)
    maps = ours.query, ours.key, ours.value
    pytorch.in_proj_weight.data = torch.cat([part.weight for part in maps])
    pytorch.in_proj_bias.data = torch.cat([part.bias for part in maps])
    pytorch.out_proj.load_state_dict(ours.output.state_dict())
    x, causal = torch.randn(B, L, D), torch.ones(L, L).tril().bool()
    expected, _ = pytorch(x, x, x, attn_mask=~causal)
    torch.testing.assert_close(ours(x, x, mask=causal)[0], expected, atol=1e-6, rtol=0)


def test_looking_by_direction_does_not_hear_who_shouts():
    features = torch.randn(6, 20) * torch.tensor([1, 1, 1, 1, 1, 30.0])[:, None]
    weights = LESSON["look_by_direction"](features, 0.2)
    centred = features - features.mean(dim=0)
    cosines = torch.cosine_similarity(centred[:, None], centred[None], dim=-1)
    torch.testing.assert_close(weights, (cosines / 0.2).softmax(dim=-1))
    assert (weights.argmax(dim=-1) == torch.arange(6)).all()


def test_the_clock_takes_the_least_disturbed_run(monkeypatch):
    ticks = iter([0, 5, 10, 11, 20, 23])
    monkeypatch.setattr(LESSON["time"], "perf_counter", lambda: next(ticks))
    calls = []
    assert LESSON["seconds"](calls.append, "x", repeats=3) == 1
    assert calls == ["x"] * 3


def test_a_frame_is_drawn_around_the_patch_that_asks():
    photo = LESSON["open_image"](LESSON["ROOT"] / "images" / "german_shepherd.jpg")
    picture = LESSON["asked_from"](photo, torch.eye(81), 40)
    width, height = picture.size
    frame = (0x56, 0xB4, 0xE9)
    left = int(4 * width / 9) + 1  # patch 40 is the middle
    assert picture.getpixel((left, height // 2)) == frame
    assert picture.getpixel((width // 2, height // 2)) != frame
    assert frame not in set(picture.crop((0, 0, width // 9, height // 9)).get_flattened_data())
