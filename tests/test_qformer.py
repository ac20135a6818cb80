"""The Q-Former against transformers, its sizes, its masks and everything that must not matter."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers.reference import retrieval_model
from helpers.samples import random_image, random_qformer, random_text
from torch import Tensor, nn
from transformers import Blip2QFormerModel

from blip2_edu.bridges import QFormerBridge, QFormerBridgeConfig
from blip2_edu.checkpoints.names import from_transformers
from blip2_edu.checkpoints.tensors import load_strictly
from blip2_edu.qformer import QFormer, QFormerConfig, QFormerOutput, joint_mask
from blip2_edu.stage1 import Blip2Stage1, Stage1Config

TINY = QFormerConfig.tiny()
CLOSE = {"atol": 1e-5, "rtol": 0}
CONFIGS = {
    "tiny": TINY,
    "odd sizes": QFormerConfig(
        width=21,
        num_layers=4,
        num_heads=7,
        feed_forward_width=33,
        num_queries=5,
        image_width=13,
        vocab_size=51,
        max_text_length=11,
    ),
    "every third": replace(TINY, num_layers=5, cross_attention_every=3, num_heads=1, num_queries=1),
}
CASES = {  # text lengths (None: no text), patches, patches that are real (None: all)
    "queries only": (None, 6, None),
    "text of different lengths": ([5, 2, 9], 6, None),
    "image mask": (
        None,
        5,
        [5, 1],
    ),  # with a text as well, transformers makes a mask that is too tall
    "batch of one": ([6], 1, None),
    "one word": ([1, 1], 3, None),
}


def pair(config: QFormerConfig) -> tuple[QFormer, Blip2QFormerModel, nn.Module]:
    """Ours and theirs with the same random weights, and their text embeddings."""
    theirs = retrieval_model(config)
    state, _ = from_transformers(theirs.state_dict())
    ours = QFormer(config).eval()
    mine = {k.removeprefix("qformer."): v for k, v in state.items() if k.startswith("qformer.")}
    load_strictly(ours, mine)
    return ours, theirs.qformer, theirs.embeddings


@contextmanager
def recorded_attention(theirs: Blip2QFormerModel) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Their eager self- and cross-attention weights, taken where they are computed.

    (`output_attentions` will not do: it lists cross-attention among self-attention.)
    """
    found, hooks = ([], []), []
    for layer in theirs.encoder.layer:
        parts = [layer.attention, *([layer.crossattention] if layer.has_cross_attention else [])]
        for weights, part in zip(found, parts, strict=False):
            hooks.append(
                part.attention.register_forward_hook(
                    lambda module, inputs, output, weights=weights: weights.append(output[1])
                )
            )
    yield found
    for hook in hooks:
        hook.remove()


def compare_attention(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        torch.testing.assert_close(a.sum(dim=-1), torch.ones(a.shape[:-1]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_equals_transformers_with_queries(config, case):
    """Outputs to 1e-5 and, against their eager softmax, attention weights to 1e-6."""
    lengths, patches, real_patches = CASES[case]
    batch = len(lengths or real_patches or [0, 0])
    ours, theirs, embeddings = pair(config)
    image = random_image(config, batch, patches)
    image_mask = None
    if real_patches:
        image_mask = (torch.arange(patches) < torch.tensor(real_patches)[:, None]).long()
    ids, mask = random_text(config, lengths) if lengths else (None, None)

    queries = ours.query_tokens.expand(batch, -1, -1)
    joint = mask if mask is None else torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1)
    with recorded_attention(theirs) as (self_attention, cross_attention):
        last = theirs(
            query_embeds=queries if ids is None else embeddings(ids, query_embeds=queries),
            query_length=config.num_queries,
            attention_mask=joint,
            encoder_hidden_states=image,
            encoder_attention_mask=image_mask,
        ).last_hidden_state
    output = ours(image, ids, mask, image_mask=image_mask, return_attention=True)
    torch.testing.assert_close(output.queries, last[:, : config.num_queries], **CLOSE)
    if ids is None:
        assert output.text is None
    else:
        real = mask.bool()
        torch.testing.assert_close(output.text[real], last[:, config.num_queries :][real], **CLOSE)
    compare_attention(output.self_attention, self_attention)
    compare_attention(output.cross_attention, cross_attention)

    silent = ours(image, ids, mask, image_mask=image_mask)
    assert silent.self_attention is None and silent.cross_attention is None
    assert torch.equal(silent.queries, output.queries)
    assert ids is None or torch.equal(silent.text, output.text)


@pytest.mark.parametrize("lengths", [[5, 2, 9], [7], [1, 1]], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_equals_transformers_with_text_alone(config, lengths):
    ours, theirs, embeddings = pair(config)
    ids, mask = random_text(config, lengths)
    with recorded_attention(theirs) as (self_attention, _):
        expected = theirs(embeddings(ids), query_length=0, attention_mask=mask).last_hidden_state
    output = ours(text_ids=ids, text_mask=mask, return_attention=True)
    assert output.queries is None and output.cross_attention == []
    torch.testing.assert_close(output.text[mask.bool()], expected[mask.bool()], **CLOSE)
    compare_attention(output.self_attention, self_attention)


def count(config: QFormerConfig) -> int:
    """Parameters of blocks and embedding norm, as transformers counts a Q-Former."""
    with torch.device("meta"):
        qformer = QFormer(config)
    return sum(p.numel() for part in (qformer.layers, qformer.norm) for p in part.parameters())


def test_sizes_are_the_papers():
    base = QFormerConfig.base()
    assert count(replace(base, vocab_size=None)) == 105_137_664
    assert count(base) == 161_825_280
    with torch.device("meta"):
        qformer = QFormer(base)
        plain = QFormerBridgeConfig(base, norm_image_features=False, norm_soft_prompt=False)
        projection = QFormerBridge(plain, torch.empty(1, 2560)).language_projection
    assert sum(p.numel() for p in projection.parameters()) == 1_968_640
    assert qformer.query_tokens.shape == (1, 32, 768)
    assert qformer.word_embeddings.weight.shape == (30_523, 768)


def test_mini_has_minilms_shape():
    mini = QFormerConfig.mini()
    shape = (mini.num_layers, mini.width, mini.num_heads, mini.feed_forward_width)
    assert shape == (6, 384, 12, 1536)
    assert (mini.num_queries, mini.image_width, mini.vocab_size) == (32, 1280, 30_523)


def test_fresh_parameters():
    torch.manual_seed(0)
    qformer = QFormer(replace(TINY, num_queries=200))
    assert qformer.query_tokens.std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(qformer.query_tokens.mean().item()) < 2e-3
    assert qformer.layers[0].self_attention.attention.key.bias.abs().max() == 0


def picture(*rows: str) -> Tensor:
    return torch.tensor([[cell == "x" for cell in row] for row in rows])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("unimodal", picture("xx...", "xx...", "..xx.", "..xx.", "..xx.")),
        ("bidirectional", picture("xxxx.", "xxxx.", "xxxx.", "xxxx.", "xxxx.")),
        ("causal", picture("xx...", "xx...", "xxx..", "xxxx.", "xxxx.")),
    ],
)
def test_masks_of_two_queries_and_two_words_and_padding(pattern, expected):
    assert torch.equal(joint_mask(2, torch.tensor([[1, 1, 0]]), pattern)[0], expected)


def test_unknown_mask():
    with pytest.raises(ValueError, match="unknown mask pattern 'diagonal'"):
        joint_mask(2, torch.ones(1, 3), "diagonal")


@torch.no_grad()
def run(pattern: str, ids: Tensor, mask: Tensor, seed: int = 0) -> QFormerOutput:
    image = random_image(TINY, len(ids), 6, seed)
    return random_qformer(TINY)(image, ids, mask, pattern=pattern)


@pytest.mark.parametrize("pattern", ["unimodal", "causal"])
def test_text_leaves_the_queries_alone(pattern):
    ids, mask = random_text(TINY, [5, 3])
    other, _ = random_text(TINY, [5, 3], seed=1)
    assert torch.equal(run(pattern, ids, mask).queries, run(pattern, other, mask).queries)


def test_text_reaches_the_queries_when_bidirectional():
    ids, mask = random_text(TINY, [5, 3])
    other = ids.clone()
    other[:, 2] = (other[:, 2] + 1) % TINY.vocab_size
    change = run("bidirectional", ids, mask).queries - run("bidirectional", other, mask).queries
    assert change.abs().amax(dim=-1).min() > 1e-3  # every query of every pair


def test_a_later_word_does_not_reach_an_earlier_one():
    ids, mask = random_text(TINY, [6, 6])
    for i in range(6):
        other = ids.clone()
        other[:, i] = (other[:, i] + 1) % TINY.vocab_size
        a, b = run("causal", ids, mask).text, run("causal", other, mask).text
        assert torch.equal(a[:, :i], b[:, :i])
        assert (a[:, i:] - b[:, i:]).abs().amax(dim=-1).min() > 1e-3


@pytest.mark.parametrize(("pattern", "reaches"), [("unimodal", False), ("causal", True)])
def test_whether_the_image_reaches_the_text(pattern, reaches):
    ids, mask = random_text(TINY, [5, 3])
    change = run(pattern, ids, mask, seed=0).text - run(pattern, ids, mask, seed=1).text
    assert (change.abs().amax(dim=-1).min() > 1e-3) == reaches
    assert reaches or change.abs().max() == 0


@torch.no_grad()
def test_unimodal_is_two_separate_passes():
    qformer, image = random_qformer(TINY), random_image(TINY, 2, 6)
    ids, mask = random_text(TINY, [5, 3])
    joint = qformer(image, ids, mask, pattern="unimodal")
    torch.testing.assert_close(joint.queries, qformer(image).queries, **CLOSE)
    alone = qformer(text_ids=ids, text_mask=mask).text
    torch.testing.assert_close(joint.text[mask.bool()], alone[mask.bool()], **CLOSE)


@pytest.mark.parametrize("pattern", ["unimodal", "bidirectional", "causal"])
@torch.no_grad()
def test_padding_changes_nothing(pattern):
    """Neither what stands in the padding, nor how much there is, nor the others in the batch."""
    qformer, image = random_qformer(TINY), random_image(TINY, 2, 6)
    ids, mask = random_text(TINY, [5, 3])
    together = qformer(image, ids, mask, pattern=pattern)
    alone = qformer(image[1:], ids[1:, :3], pattern=pattern)
    torch.testing.assert_close(together.queries[1:], alone.queries, **CLOSE)
    torch.testing.assert_close(together.text[1:, :3], alone.text, **CLOSE)


@torch.no_grad()
def test_masked_patches_change_nothing():
    qformer, image = random_qformer(TINY), random_image(TINY, 2, 6)
    ids, mask = random_text(TINY, [4, 4])
    output = qformer(image, ids, mask, image_mask=torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]))
    short, full = qformer(image[:1, :4], ids[:1]), qformer(image[1:], ids[1:])
    torch.testing.assert_close(output.queries, torch.cat([short.queries, full.queries]), **CLOSE)
    torch.testing.assert_close(output.text, torch.cat([short.text, full.text]), **CLOSE)


@pytest.mark.parametrize("lengths", [[6], [6, 3]], ids=str)
@torch.no_grad()
def test_cached_text_equals_one_pass(lengths):
    qformer, image = random_qformer(TINY), random_image(TINY, len(lengths), 5)
    ids, mask = random_text(TINY, lengths)
    expected = qformer(image, ids, mask, pattern="causal", return_attention=True)
    cache = qformer(image).cache
    cached = qformer(
        text_ids=ids, text_mask=mask, pattern="causal", cache=cache, return_attention=True
    )
    real = mask.bool()
    torch.testing.assert_close(cached.text[real], expected.text[real], **CLOSE)
    for a, b in zip(cached.self_attention, expected.self_attention, strict=True):
        torch.testing.assert_close(a, b[:, :, TINY.num_queries :], **CLOSE)


@pytest.mark.parametrize("step", [1, 2])
@torch.no_grad()
def test_word_by_word_equals_one_pass(step):
    qformer, image = random_qformer(TINY), random_image(TINY, 2, 5)
    ids, mask = random_text(TINY, [6, 3])
    expected = qformer(image, ids, mask, pattern="causal").text
    output = qformer(image)
    for i in range(0, 6, step):
        output = qformer(
            text_ids=ids[:, i : i + step],
            text_mask=mask[:, : i + step],
            pattern="causal",
            cache=output.cache,
        )
        real = mask[:, i : i + step].bool()
        torch.testing.assert_close(output.text[real], expected[:, i : i + step][real], **CLOSE)


@torch.no_grad()
def test_image_projected_once_equals_features():
    qformer, image = random_qformer(TINY), random_image(TINY, 2, 5)
    ids, mask = random_text(TINY, [4, 2])
    projected = qformer.project_image(image)
    assert torch.equal(qformer(projected).queries, qformer(image).queries)
    a, b = qformer(projected, ids, mask), qformer(image, ids, mask)
    assert torch.equal(a.queries, b.queries) and torch.equal(a.text, b.text)


def spread_after_training(start: float, dropout: float = 0.0) -> float:
    """How far the queries' outputs are apart after stage-1 steps from queries of N(0, start)."""
    torch.manual_seed(0)
    sizes = replace(TINY, dropout=dropout, attention_dropout=0.0)
    model = Blip2Stage1(Stage1Config(sizes, projection_width=8)).double()
    nn.init.normal_(model.qformer.query_tokens, std=start)
    image = random_image(TINY, 4, 5).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(5):
        optimizer.zero_grad()
        sum(model(image, *random_text(TINY, [5, 3, 4, 5])).values()).backward()
        optimizer.step()
    assert model.qformer.query_tokens.abs().max() > 1e-3  # they did learn
    queries = model.eval().qformer(model.project_image(image)).queries
    return (queries - queries[:, :1]).abs().max().item()


def test_queries_from_zero_stay_identical_and_random_ones_part():
    """No loss of stage 1 tells queries apart; only where they start, or dropout, can."""
    assert spread_after_training(start=0.0) < 1e-9
    assert spread_after_training(start=0.02) > 0.05
    assert spread_after_training(start=0.0, dropout=0.1) > 1e-3


def test_dropout_only_while_training():
    qformer, image = random_qformer(TINY), random_image(TINY, 1, 5)
    assert torch.equal(qformer(image).queries, qformer(image).queries)
    qformer.train()
    assert not torch.equal(qformer(image).queries, qformer(image).queries)


def test_wrong_use_is_said():
    qformer, image = random_qformer(TINY), random_image(TINY, 1, 5)
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="give an image, a text or both"):
        qformer()
    with pytest.raises(ValueError, match="a cache continues a text causally"):
        qformer(text_ids=ids, cache=qformer(image).cache)
    with pytest.raises(ValueError, match="a cache continues a text causally"):
        qformer(image, ids, pattern="causal", cache=qformer(image).cache)
    with pytest.raises(ValueError, match="no text branch"):
        QFormer(replace(TINY, vocab_size=None))(image, ids)


def test_gradients_reach_everything_exactly():
    config = QFormerConfig(
        width=6,
        num_layers=3,
        num_heads=2,
        feed_forward_width=5,
        num_queries=2,
        image_width=4,
        vocab_size=7,
        max_text_length=4,
    )
    qformer = random_qformer(config).double()
    names, parameters = zip(*qformer.named_parameters(), strict=True)
    image = random_image(config, 2, 3).double().requires_grad_()
    ids, mask = random_text(config, [4, 2])

    def outputs(image, *parameters):
        arguments = (image, ids, mask)
        state = dict(zip(names, parameters, strict=True))
        output = torch.func.functional_call(qformer, state, arguments, {"pattern": "causal"})
        return output.queries, output.text[mask.bool()]

    assert torch.autograd.gradcheck(outputs, (image, *parameters), fast_mode=True)


@torch.no_grad()
def test_a_cache_of_text_alone_is_continued_where_it_ends():
    """It holds no queries, so none may be counted: neither in the positions nor in the mask."""
    qformer = random_qformer(TINY)
    ids, _ = random_text(TINY, [6, 6])
    together = qformer(text_ids=ids, pattern="causal")
    first = qformer(text_ids=ids[:, :4], pattern="causal")
    assert (first.cache.num_queries, first.cache.length) == (0, 4)
    rest = qformer(text_ids=ids[:, 4:], pattern="causal", cache=first.cache)
    torch.testing.assert_close(rest.text, together.text[:, 4:])
    assert (rest.cache.num_queries, rest.cache.length) == (0, 6)
    image = qformer(random_image(TINY, 2, 5))
    assert (image.cache.num_queries, image.cache.length) == (TINY.num_queries, TINY.num_queries)
