"""The stage-1 model: its scores against transformers, its losses against loops and definitions."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.reference import retrieval_model
from helpers.samples import random_image, random_stage1, random_text
from test_qformer import CONFIGS
from torch import Tensor
from torch.nn.functional import cross_entropy

from blip2_edu.checkpoints.names import from_transformers, to_transformers
from blip2_edu.checkpoints.tensors import load_strictly
from blip2_edu.objectives import itc_similarity, query_overlap
from blip2_edu.qformer import QFormerConfig
from blip2_edu.stage1 import Blip2Stage1, Stage1Config

TINY = QFormerConfig.tiny()
STILL = replace(TINY, dropout=0.0, attention_dropout=0.0)
CLOSE = {"atol": 1e-5, "rtol": 0}


def untrained(config: QFormerConfig = TINY) -> Blip2Stage1:
    torch.manual_seed(0)
    return Blip2Stage1(Stage1Config(config)).eval()


@pytest.mark.parametrize("lengths", [[5, 2, 9], [4]], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_scores_equal_transformers(config, lengths):
    """ITC similarities and ITM logits of Blip2ForImageTextRetrieval, from pixels."""
    theirs = retrieval_model(config)
    ours = random_stage1(config, seed=2)
    state, _ = from_transformers(theirs.state_dict())
    _, without_home = to_transformers(ours.state_dict())
    load_strictly(ours, state | without_home)
    ids, mask = random_text(config, lengths)
    pixels = torch.randn(len(lengths), 3, 28, 28)
    features = []  # what stands before their last vision norm, which is our `image_norm`
    hook = theirs.vision_model.post_layernorm.register_forward_pre_hook(
        lambda module, inputs: features.append(inputs[0])
    )
    logits = theirs(pixels, ids, mask, use_image_text_matching_head=True).logits_per_image
    features = features[0]
    hook.remove()
    similarity = theirs(pixels, ids, mask, use_image_text_matching_head=False).logits_per_image

    found = itc_similarity(ours.embed_image(features), ours.embed_text(ids, mask))
    torch.testing.assert_close(found, similarity, **CLOSE)
    torch.testing.assert_close(ours.match(ours.project_image(features), ids, mask), logits, **CLOSE)


@torch.no_grad()
def test_losses_of_an_untrained_model():
    """ln B, ln 2 and ln V: what one pays for knowing nothing, a good check of any new run."""
    ids, mask = random_text(TINY, [6] * 16)
    losses = untrained()(random_image(TINY, 16, 5), ids, mask)
    assert losses["itc"].item() == pytest.approx(math.log(16), abs=0.2)
    assert losses["itm"].item() == pytest.approx(math.log(2), abs=0.05)
    assert losses["itg"].item() == pytest.approx(math.log(TINY.vocab_size), abs=0.2)


def test_an_itm_head_without_insight_learns_to_score_0_6365():
    """With one positive to two negatives, a head that cannot see learns the odds and no more."""
    model = untrained()
    optimizer = torch.optim.Adam([model.itm_head.bias], lr=0.05)
    ids, mask = random_text(TINY, [4] * 6)
    image = random_image(TINY, 6, 5)
    for _ in range(40):
        loss = model(image, ids, mask, objectives=["itm"])["itm"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(0.6365, abs=0.01)


def by_hand_itg(model: Blip2Stage1, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """One pass with the multimodal causal mask, then word after word."""
    decoded = ids.clone()
    decoded[:, 0] = TINY.vocab_size - 1
    text = model.qformer(model.project_image(image), decoded, mask, pattern="causal").text
    losses = []
    for row in range(len(ids)):
        for position in range(int(mask[row].sum()) - 1):
            logits = model.generate_logits(text[row, position])
            losses.append(cross_entropy(logits, ids[row, position + 1], label_smoothing=0.1))
    return torch.stack(losses).mean()


@torch.no_grad()
def test_itg_equals_loops_over_one_causal_pass():
    model, image = random_stage1(TINY), random_image(TINY, 3, 5)
    ids, mask = random_text(TINY, [6, 2, 4])
    found = model(image, ids, mask, objectives=["itg"])["itg"]
    torch.testing.assert_close(found, by_hand_itg(model, image, ids, mask), **CLOSE)


@torch.no_grad()
def test_a_later_word_does_not_change_an_earlier_itg_logit():
    model, image = random_stage1(TINY), random_image(TINY, 1, 5)
    ids, _ = random_text(TINY, [6])
    other = ids.clone()
    other[:, 3:] = (other[:, 3:] + 1) % TINY.vocab_size
    a, b = (
        model.generate_logits(model.qformer(model.project_image(image), x, pattern="causal").text)
        for x in (ids, other)
    )
    assert torch.equal(a[:, :3], b[:, :3])
    assert not torch.isclose(a[:, 3:], b[:, 3:]).all()


@torch.no_grad()
def test_padding_changes_no_loss():
    model, image = random_stage1(TINY), random_image(TINY, 3, 5)
    ids, mask = random_text(TINY, [6, 2, 4])
    wider = torch.cat([ids, torch.full((3, 4), 9)], dim=1)
    wider_mask = torch.cat([mask, torch.zeros(3, 4, dtype=mask.dtype)], dim=1)
    torch.manual_seed(0)
    narrow = model(image, ids, mask)
    torch.manual_seed(0)  # the same hard negatives
    wide = model(image, wider, wider_mask)
    for name, loss in narrow.items():
        torch.testing.assert_close(wide[name], loss, **CLOSE)


def matched_pairs(model: Blip2Stage1, *batch, **options) -> list[tuple[int, int]]:
    """The (image, text) rows that ITM compares, in order."""
    seen = []
    original = model.match

    def spy(image, ids, mask):
        seen.append((image[0][0], ids))
        return original(image, ids, mask)

    model.match = spy
    torch.manual_seed(0)
    model(*batch, objectives=["itm"], **options)
    keys, ids = seen[0]
    all_keys = model.project_image(batch[0])[0][0]
    images = [next(i for i, k in enumerate(all_keys) if torch.allclose(k, key)) for key in keys]
    texts = [next(i for i, t in enumerate(batch[1]) if torch.equal(t, text)) for text in ids]
    return list(zip(images, texts, strict=True))


@torch.no_grad()
def test_itm_compares_positives_then_wrong_images_then_wrong_texts():
    image, (ids, mask) = random_image(TINY, 4, 5), random_text(TINY, [5, 4, 3, 5])
    pairs = matched_pairs(random_stage1(TINY), image, ids, mask)
    assert pairs[:4] == [(i, i) for i in range(4)]
    assert [text for _, text in pairs[4:8]] == [0, 1, 2, 3]
    assert [image for image, _ in pairs[8:]] == [0, 1, 2, 3]
    assert all(image != text for image, text in pairs[4:])


@torch.no_grad()
def test_itm_takes_the_most_similar_when_the_temperature_is_low():
    """Each text gets the wrong image that fits it best, each image the wrong text."""
    model, image = random_stage1(TINY), random_image(TINY, 6, 5)
    ids, mask = random_text(TINY, [5, 4, 3, 5, 6, 2])
    model.temperature.fill_(1e-5)
    similarity = itc_similarity(model.embed_image(image), model.embed_text(ids, mask))
    wrong = similarity - 10 * torch.eye(6)
    pairs = matched_pairs(model, image, ids, mask)
    assert [image for image, _ in pairs[6:12]] == wrong.argmax(dim=0).tolist()
    assert [text for _, text in pairs[12:]] == wrong.argmax(dim=1).tolist()
    assert wrong.argmax(dim=0).tolist() != wrong.argmax(dim=1).tolist()  # so neither is the other


@torch.no_grad()
def test_itm_of_some_pairs_and_of_captions_of_one_image():
    image, (ids, mask) = random_image(TINY, 4, 5), random_text(TINY, [5, 4, 3, 5])
    pairs = matched_pairs(random_stage1(TINY), image, ids, mask, itm_pairs=2)
    assert len(pairs) == 6 and pairs[:2] == [(0, 0), (1, 1)]
    owners = torch.tensor([3, 3, 3, 8])
    pairs = matched_pairs(random_stage1(TINY), image, ids, mask, image_ids=owners)
    assert len(pairs) == 12 and all((image == 3) != (text == 3) for image, text in pairs[4:])


def test_itm_labels_match_the_order():
    """Rewarding "matches" for positives alone must be what lowers the loss."""
    model, image = random_stage1(TINY), random_image(TINY, 4, 5)
    ids, mask = random_text(TINY, [5, 4, 3, 5])
    right = torch.tensor([1] * 4 + [0] * 8)
    model.match = lambda *_: torch.stack([-9.0 * right, 9.0 * right], dim=1) - 4.5
    assert model(image, ids, mask, objectives=["itm"])["itm"] < math.log(2)
    model.match = lambda *_: torch.stack([9.0 * right, 9.0 - 9.0 * right], dim=1)
    assert model(image, ids, mask, objectives=["itm"])["itm"] > 5


def test_batch_of_one_learns():
    model = untrained()
    losses = model(random_image(TINY, 1, 5), *random_text(TINY, [4]))
    assert losses["itc"].item() == 0 and all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert model.qformer.query_tokens.grad.abs().max() > 0


def test_every_parameter_learns():
    model = random_stage1(TINY)
    sum(model(random_image(TINY, 3, 5), *random_text(TINY, [5, 3, 4])).values()).backward()
    without = [
        name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0
    ]
    assert without == []


def test_only_what_was_asked_for():
    batch = (random_image(TINY, 2, 5), *random_text(TINY, [5, 3]))
    assert set(untrained()(*batch, objectives=["itg", "itc"])) == {"itc", "itg"}


@torch.no_grad()
def test_itg_of_some_pairs_and_the_spread():
    model, image = random_stage1(TINY), random_image(TINY, 4, 5)
    ids, mask = random_text(TINY, [5, 4, 3, 5])
    some = model(image, ids, mask, objectives=["itg"], itg_pairs=2, spread=0.5)
    assert set(some) == {"itg", "overlap"}
    few = model(image[:2], ids[:2], mask[:2], objectives=["itg"])
    torch.testing.assert_close(some["itg"], few["itg"])
    queries = model.qformer(model.project_image(image)).queries
    torch.testing.assert_close(some["overlap"], 0.5 * query_overlap(queries))


@torch.no_grad()
def test_one_step_projects_the_image_once():
    """Three losses and five passes share one set of image keys and values."""
    model, calls = random_stage1(TINY), []
    for layer in model.qformer.layers:
        if layer.cross_attention is not None:
            layer.cross_attention.attention.key.register_forward_hook(lambda *_: calls.append(1))
    model(random_image(TINY, 3, 5), *random_text(TINY, [5, 3, 4]))
    assert len(calls) == 2  # blocks 0 and 2


@torch.no_grad()
def test_embeddings_have_unit_length_even_under_autocast():
    model, image = random_stage1(TINY), random_image(TINY, 2, 5)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = [model.embed_image(image), model.embed_text(*random_text(TINY, [5, 3]))]
        for x in found:
            torch.testing.assert_close(x.norm(dim=-1), torch.ones(x.shape[:-1]))


@pytest.mark.parametrize("objective", ["itc", "itm", "itg"])
def test_gradients(objective):
    """Every parameter of a tiny model at once, against finite differences in float64."""
    config = QFormerConfig(
        width=6,
        num_layers=2,
        num_heads=2,
        feed_forward_width=5,
        num_queries=2,
        image_width=4,
        vocab_size=7,
        max_text_length=4,
    )
    model = random_stage1(config, projection_width=3).double()
    model.temperature.data.fill_(0.5)
    names, parameters = zip(*model.named_parameters(), strict=True)
    image = random_image(config, 3, 3).double().requires_grad_()
    ids, mask = random_text(config, [4, 2, 3])

    def loss(image, *parameters):
        torch.manual_seed(0)  # the same hard negatives every time
        state = dict(zip(names, parameters, strict=True))
        options = {"objectives": [objective], "image_ids": torch.tensor([1, 2, 1])}
        return torch.func.functional_call(model, state, (image, ids, mask), options)[objective]

    assert torch.autograd.gradcheck(loss, (image, *parameters), fast_mode=True)


def test_learns_a_batch_by_heart():
    """All three losses fall far when there are only four pairs to know.

    (From ln 4, ln 2 and ln 64; label smoothing keeps the first and the last from zero.)
    """
    model = untrained(STILL)
    batch = (random_image(TINY, 4, 5), *random_text(TINY, [5, 4, 3, 5]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        losses = model(*batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert losses["itc"] < 0.6 and losses["itm"] < 0.45 and losses["itg"] < 1.2
