"""One interface between encoder and language model: another bridge is another class, no more."""

from dataclasses import dataclass

import pytest
import torch
from helpers import small_models, tiny
from PIL import Image
from torch import Tensor, nn

from blip2_edu import bridges
from blip2_edu.app.cli import main
from blip2_edu.app.options import Stage2Options
from blip2_edu.app.train import new_blip2
from blip2_edu.blip2 import Blip2
from blip2_edu.bridges import Bridge, QFormerBridge, describe, make_bridge
from blip2_edu.data.batches import Source
from blip2_edu.errors import WeightsError
from blip2_edu.seeing import attention_maps, attention_rollout, word_attention
from blip2_edu.training import TrainingConfig, train_stage2
from blip2_edu.visualize import architecture_figure

PHOTO = Image.new("RGB", (30, 20), "red")


@dataclass
class PlainConfig:
    image_width: int


class PlainBridge(Bridge):
    """A linear layer on every feature: what a later lesson compares the Q-Former with."""

    def __init__(self, config: PlainConfig, words: Tensor):
        super().__init__(config, config.image_width, tiny.PATCHES)
        self.projection = nn.Linear(config.image_width, words.shape[1])

    def forward(self, image_features: Tensor) -> Tensor:
        return self.projection(image_features)


@pytest.fixture
def plain(tmp_path, monkeypatch) -> Blip2:
    """The small model with another bridge, for which nothing but `bridges` was told."""
    monkeypatch.setitem(bridges.BRIDGES, "plain", (PlainConfig, PlainBridge))
    whole = small_models.blip2(tmp_path)
    words = whole.language_model.network.get_input_embeddings().weight
    torch.manual_seed(0)
    bridge = make_bridge({"kind": "plain", "image_width": small_models.QFORMER.image_width}, words)
    return Blip2(whole.config, whole.image_encoder, bridge, whole.language_model, whole.stage1)


def test_another_bridge_learns_writes_and_is_read_again(plain, tmp_path):
    examples, features = small_models.asked(8), tiny.random_features(8)
    before = {name: x.clone() for name, x in plain.state_dict().items()}
    config = TrainingConfig(tmp_path / "run", epochs=2, evaluate_every=8, learning_rate_new=1e-2)
    train_stage2(plain, Source(examples, features, 4), [(examples, features)], config)
    moved = {n for n, x in plain.state_dict().items() if not torch.equal(x, before[n])}
    assert moved == {"bridge.projection.weight", "bridge.projection.bias"}
    plain.save_pretrained(tmp_path / "saved", torch.float32)
    again = Blip2.from_pretrained(tmp_path / "saved")
    assert isinstance(again.bridge, PlainBridge) and not again.training
    assert again.caption(PHOTO) == plain.caption(PHOTO)
    assert again.answer(PHOTO, "what?") == plain.answer(PHOTO, "what?")
    assert torch.equal(again.match(PHOTO, "a dog").score, plain.match(PHOTO, "a dog").score)


def test_a_bridge_that_attends_to_nothing_says_so_and_is_drawn(plain):
    for look in (
        lambda: attention_maps(plain, PHOTO),
        lambda: attention_rollout(plain, PHOTO),
        lambda: word_attention(plain, PHOTO, ["a dog"]),
    ):
        with pytest.raises(ValueError, match="PlainBridge attends to nothing"):
            look()
    drawn = [text.get_text() for text in architecture_figure(plain).axes[0].texts]
    assert "PlainBridge" in drawn and "Q-Former" not in drawn


@torch.no_grad()
def test_looking_gives_the_same_soft_prompt(tmp_path):
    model = small_models.blip2(tmp_path)
    features = model.encode_images([PHOTO, PHOTO.rotate(90)])
    look = model.bridge.look(features)
    assert torch.equal(look.soft_prompt, model.bridge(features))
    readers = model.bridge.readers()
    assert len(look.cross_attention) == len(readers) == sum(x is not None for x in look.image)
    assert len(look.self_attention) == len(look.image) == small_models.QFORMER.num_layers


def test_a_bridge_is_made_again_from_its_description(tmp_path):
    model = small_models.blip2(tmp_path)
    description = describe(model.bridge)
    again = make_bridge(description, model.language_model.network.get_input_embeddings().weight)
    assert isinstance(again, QFormerBridge) and again.config == model.bridge.config
    shapes = ({n: x.shape for n, x in b.state_dict().items()} for b in (again, model.bridge))
    assert next(shapes) == next(shapes)


@pytest.mark.parametrize(
    "description, words",
    [
        ({"kind": "ferry"}, "no bridge 'ferry', only qformer"),
        ({}, "no bridge 'None'"),
        ({"kind": "qformer", "colour": "red"}, "colour"),
        ({"kind": "qformer", "qformer": {"width": 8, "depth": 2}}, "depth"),
        ({"kind": "qformer", "qformer": {"width": 8, "num_heads": 5}}, "divide"),
        ({"kind": "qformer", "qformer": "large"}, "description"),
        ({"kind": ["qformer"]}, "no bridge"),
    ],
)
def test_a_bridge_that_cannot_be_made_is_one_sentence(description, words):
    with pytest.raises(WeightsError, match=words) as error:
        make_bridge(description, torch.ones(3, 4))
    assert "\n" not in str(error.value)


def test_the_command_line_trains_it_and_refuses_its_maps(plain, tmp_path, capsys):
    PHOTO.save(tmp_path / "photo.png")
    options = Stage2Options(
        folder=tmp_path / "run",
        validation=[],
        bridge="plain",
        encoder=plain.config.image_encoder,
        language_model=plain.config.language_model,
    )
    model = new_blip2(options)
    assert isinstance(model.bridge, PlainBridge) and model.stage1 is None
    model.save_pretrained(tmp_path / "saved")
    command = ["caption", str(tmp_path / "photo.png"), "--model", str(tmp_path / "saved")]
    assert main(command) == 0
    assert main([*command, "--attention", str(tmp_path / "map.png")]) == 1
    assert "attends to nothing" in capsys.readouterr().err


def test_a_bridge_without_a_line_is_not_saved_half(plain, tmp_path):
    class Other(PlainBridge):
        pass

    words = plain.language_model.network.get_input_embeddings().weight
    other = Other(PlainConfig(small_models.QFORMER.image_width), words)
    model = Blip2(plain.config, plain.image_encoder, other, plain.language_model)
    with pytest.raises(WeightsError, match="Other has no line in BRIDGES"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_saved_over_another_it_does_not_match_with_its_heads(plain, tmp_path):
    plain.save_pretrained(tmp_path / "saved")
    alone = Blip2(plain.config, plain.image_encoder, plain.bridge, plain.language_model)
    alone.save_pretrained(tmp_path / "saved")
    assert Blip2.from_pretrained(tmp_path / "saved").stage1 is None
