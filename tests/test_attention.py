"""Attention against PyTorch's own module and against its formula."""

import pytest
import torch
from torch import nn

from blip2_edu.attention import (
    Attention,
    append_keys_values,
    attention_weights,
    fused_attention,
)

B, L, S, D, W, H = 2, 3, 5, 12, 7, 3


@pytest.fixture
def cross() -> Attention:
    torch.manual_seed(0)
    return Attention(D, H, context_width=W).eval()


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, L, D), torch.randn(B, S, W)


MASK = torch.tensor([[True, False, True, True, False], [False, False, False, True, True]])


def pytorch_twin(attention: Attention) -> nn.MultiheadAttention:
    twin = nn.MultiheadAttention(D, H, kdim=W, vdim=W, batch_first=True).eval()
    twin.q_proj_weight.data = attention.query.weight.data
    twin.k_proj_weight.data = attention.key.weight.data
    twin.v_proj_weight.data = attention.value.weight.data
    biases = [attention.query.bias, attention.key.bias, attention.value.bias]
    twin.in_proj_bias.data = torch.cat(biases).detach()
    twin.out_proj.load_state_dict(attention.output.state_dict())
    return twin


@pytest.mark.parametrize("mask", [None, MASK])
@torch.no_grad()
def test_equals_pytorchs_multi_head_attention(cross, inputs, mask):
    x, context = inputs
    ours = None if mask is None else mask[:, None, None, :]
    output, weights = cross(x, cross.keys_values(context), ours, return_weights=True)
    theirs = None if mask is None else ~mask  # PyTorch marks what is forbidden
    expected, expected_weights = pytorch_twin(cross)(
        x, context, context, key_padding_mask=theirs, average_attn_weights=False
    )
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=0)


@torch.no_grad()
def test_weights_are_the_softmax_and_asking_changes_nothing(cross, inputs):
    x, context = inputs
    mask = MASK[:, None, None, :]
    keys_values = cross.keys_values(context)
    output, weights = cross(x, keys_values, mask, return_weights=True)
    silent, none = cross(x, keys_values, mask)
    assert none is None and torch.equal(output, silent)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(B, H, L), atol=1e-6, rtol=0)
    assert weights[~mask.expand_as(weights)].max() == 0
    by_hand = cross.output((weights @ keys_values[1]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, by_hand, atol=1e-6, rtol=0)


def test_weights_of_one_number_by_hand():
    query, key = torch.tensor([[[[2.0]]]]), torch.tensor([[[[0.0], [1.0]]]])
    e2 = torch.e**2
    expected = torch.tensor([[[[1 / (1 + e2), e2 / (1 + e2)]]]])
    torch.testing.assert_close(attention_weights(query, key), expected)


@torch.no_grad()
def test_growing_keys_and_values_equal_one_pass():
    torch.manual_seed(0)
    attention, x = Attention(D, H).eval(), torch.randn(B, L, D)
    together, _ = attention(x, attention.keys_values(x), torch.ones(L, L).tril().bool())
    cache = None
    for i in range(L):
        word = x[:, i : i + 1]
        cache = append_keys_values(cache, attention.keys_values(word))
        torch.testing.assert_close(attention(word, cache)[0], together[:, i : i + 1])


def test_dropout_only_while_training(inputs):
    torch.manual_seed(0)
    x, context = inputs
    attention = Attention(D, H, context_width=W, dropout=0.5)
    keys_values = attention.keys_values(context)
    assert not torch.equal(attention(x, keys_values)[0], attention(x, keys_values)[0])
    attention.eval()
    assert torch.equal(attention(x, keys_values)[0], attention(x, keys_values)[0])


def test_gradients(inputs):
    torch.manual_seed(0)
    attention = Attention(D, H, context_width=W).double()
    x, context = (part.double().requires_grad_() for part in inputs)

    def run(x, context):
        return attention(x, attention.keys_values(context), MASK[:, None, None, :])[0]

    assert torch.autograd.gradcheck(run, (x, context))


@pytest.mark.parametrize("masked", [False, True])
def test_bfloat16_is_attended_in_float32_and_comes_back(masked):
    """Against the weights written out, in float32 on the same rounded numbers; gradients, too."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, dtype=torch.bfloat16) for n in (4, 5, 5))
    mask = torch.rand(2, 1, 4, 5) > 0.3 if masked else None
    given = [x.requires_grad_() for x in (query, key, value)]
    mixed = fused_attention(query, key, value, mask)
    assert mixed.dtype == torch.bfloat16
    exact = [x.detach().float().requires_grad_() for x in given]
    expected = attention_weights(exact[0], exact[1], mask) @ exact[2]
    assert torch.equal(mixed, expected.bfloat16()) or (mixed - expected).abs().max() < 2e-2
    mixed.float().square().sum().backward()
    expected.square().sum().backward()
    for ours, right in zip(given, exact, strict=True):
        torch.testing.assert_close(ours.grad.float(), right.grad, atol=0.05, rtol=0.05)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="10 does not divide into 3 heads"):
        Attention(10, 3)
