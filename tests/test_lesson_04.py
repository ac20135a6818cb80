"""Lesson 04's versions of the Q-Former, as the notebook defines them, against the package's."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers.lessons import NOTEBOOKS, definitions
from helpers.samples import random_image, random_qformer, random_text, randomise
from torch import nn

from blip2_edu.qformer import QFormer, QFormerConfig, joint_mask

LESSON = definitions(NOTEBOOKS / "04_qformer.ipynb")
TINY = QFormerConfig.tiny()
ODD = replace(TINY, width=21, num_heads=7, num_layers=4, num_queries=5, cross_attention_every=3)
CLOSE = {"atol": 1e-5, "rtol": 0}
PATTERNS = ["unimodal", "bidirectional", "causal"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("lengths", [[4, 2, 1], [1], [7, 7]], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_masks_are_the_packages(pattern, lengths, queries):
    _, mask = random_text(TINY, lengths)
    expected = joint_mask(queries, mask, pattern)
    assert torch.equal(LESSON["joint_mask"](queries, mask, pattern), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("config", [TINY, ODD], ids=["tiny", "odd"])
@torch.no_grad()
def test_the_last_version_is_the_packages(config, pattern):
    package, by_hand = random_qformer(config), LESSON["QFormerByHand"](config).eval()
    by_hand.load_state_dict(package.state_dict())
    image, (ids, mask) = random_image(config, 3, 6), random_text(config, [5, 2, 4])
    queries, text = by_hand(image, ids, mask, pattern)
    expected = package(image, ids, mask, pattern=pattern)
    torch.testing.assert_close(queries, expected.queries, **CLOSE)
    torch.testing.assert_close(text, expected.text, **CLOSE)


@torch.no_grad()
def test_the_first_version_is_a_text_pass():
    package, bert = random_qformer(TINY), LESSON["Bert"](TINY).eval()
    assert not bert.load_state_dict(package.state_dict(), strict=False).missing_keys
    ids, _ = random_text(TINY, [6, 6])
    torch.testing.assert_close(bert(ids), package(text_ids=ids).text, **CLOSE)


@torch.no_grad()
def test_a_block_of_the_first_version_is_pytorchs():
    block = randomise(LESSON["BertBlock"](TINY)).eval()
    theirs = nn.TransformerEncoderLayer(
        TINY.width,
        TINY.num_heads,
        TINY.feed_forward_width,
        activation="gelu",
        layer_norm_eps=1e-12,
        batch_first=True,
    ).eval()
    attention, feed_forward = block.self_attention, block.text_feed_forward
    for kind in ("weight", "bias"):
        parts = [getattr(attention.attention, name) for name in ("query", "key", "value")]
        joined = torch.cat([getattr(part, kind) for part in parts])
        getattr(theirs.self_attn, f"in_proj_{kind}").data = joined
    for name, ours in {
        "self_attn.out_proj": attention.attention.output,
        "norm1": attention.norm,
        "linear1": feed_forward.up,
        "linear2": feed_forward.down,
        "norm2": feed_forward.norm,
    }.items():
        theirs.get_submodule(name).load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, TINY.width)
    torch.testing.assert_close(block(x), theirs(x), **CLOSE)


@torch.no_grad()
def test_each_version_is_the_next_one_without_what_is_new():
    """Queries that no text sees; cross-attention that adds nothing; one feed-forward for both."""
    image, (ids, mask) = random_image(TINY, 2, 6), random_text(TINY, [5, 5])
    last = randomise(LESSON["QFormerByHand"](TINY)).eval()
    names = "Bert BertWithQueries BertWithImage BertWithTwoBranches".split()
    bert, queries, seeing, branches = (LESSON[name](TINY).eval() for name in names)
    for model in (bert, queries, seeing, branches):
        model.load_state_dict(last.state_dict(), strict=False)

    for a, b in zip(branches(image, ids), last(image, ids, mask, "bidirectional"), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    for layer in branches.layers:
        layer.query_feed_forward = layer.text_feed_forward
    for a, b in zip(seeing(image, ids), branches(image, ids), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    for layer in seeing.layers:
        layer.cross_attention = None
    torch.testing.assert_close(queries(ids), torch.cat(seeing(image, ids), dim=1), **CLOSE)
    blind = last(image, ids, mask, "unimodal")[1]
    torch.testing.assert_close(bert(ids), blind, **CLOSE)


@torch.no_grad()
def test_swapped_feed_forwards_would_be_noticed():
    package, by_hand = random_qformer(TINY), LESSON["QFormerByHand"](TINY).eval()
    by_hand.load_state_dict(package.state_dict())
    layer = by_hand.layers[0]
    layer.query_feed_forward, layer.text_feed_forward = (
        layer.text_feed_forward,
        layer.query_feed_forward,
    )
    image, (ids, mask) = random_image(TINY, 2, 6), random_text(TINY, [5, 2])
    queries, _ = by_hand(image, ids, mask, "causal")
    assert (queries - package(image, ids, mask, pattern="causal").queries).abs().max() > 1e-2


def test_sizes_grow_to_the_papers():
    names = "Bert BertWithQueries BertWithImage BertWithTwoBranches QFormerByHand".split()
    with torch.device("meta"):
        sizes = [LESSON["size"](LESSON[name](QFormerConfig.base())) for name in names]
        package = LESSON["size"](QFormer(QFormerConfig.base()))
    queries, cross_attention, second, masks = (b - a for a, b in pairwise(sizes))
    assert queries == 32 * 768
    assert cross_attention == 6 * (2 * 768 * (768 + 1408) + 6 * 768)
    assert second == 161_825_280 - 105_137_664
    assert masks == 0
    assert sizes[-1] == package
