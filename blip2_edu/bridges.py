"""What stands between a frozen image encoder and a frozen language model.

A bridge turns image features (B, N, W) into a soft prompt (B, Q, E): as many vectors as it likes,
each as wide as a word embedding. It is all that stage 2 trains and a checkpoint keeps.

Axis letters: `B` images, `N` image features, `W` their width, `Q` vectors of the soft prompt, `E`
width of a word embedding, `D` width of the Q-Former, `H` heads.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from blip2_edu.attention import Attention, KeysValues
from blip2_edu.errors import UserError, WeightsError
from blip2_edu.qformer import QFormer, QFormerConfig
from blip2_edu.stage1 import Blip2Stage1


@dataclass
class Look:
    """How a bridge came to its soft prompt: what attended to what.

    soft_prompt      (B, Q, E)
    image            keys and values of the image in every block, (B, H, N, C) each, or None
    cross_attention  weights on the image, every block that reads it, (B, H, Q, N)
    self_attention   weights of the queries on one another, every block, (B, H, Q, Q)
    """

    soft_prompt: Tensor
    image: list[KeysValues | None]
    cross_attention: list[Tensor]
    self_attention: list[Tensor]


class NoMaps(UserError, ValueError):
    """A bridge attends to nothing, so there are no maps to show."""


class Bridge(nn.Module):
    """Image features (B, N, W) -> soft prompt (B, Q, E); what every bridge has in common.

    config       a dataclass from which the bridge is made again
    image_width  W
    num_queries  Q, the vectors of the soft prompt
    pretrained   names of the parameters that did not start at random; they learn at a lower rate
    """

    def __init__(self, config: Any, image_width: int, num_queries: int):
        super().__init__()
        self.config, self.image_width, self.num_queries = config, image_width, num_queries
        self.pretrained: set[str] = set()

    def forward(self, image_features: Tensor) -> Tensor:
        raise NotImplementedError

    def readers(self) -> list[Attention]:
        """The attentions that read the image; a bridge without any has no maps to show."""
        return []

    def look(self, image_features: Tensor) -> Look:
        """The soft prompt, and the attention behind it. Raises NoMaps if there is none."""
        raise NoMaps(f"A {type(self).__name__} attends to nothing: it has no maps to show.")


@dataclass
class QFormerBridgeConfig:
    """Sizes of the Q-Former, and the norms around it, both of which the published models lack.

    norm_image_features  a learned layer norm before the Q-Former (LAVIS's `ln_vision`); in
                         transformers it is the last layer of the vision tower
    norm_soft_prompt     a layer norm behind the projection, its gain starting at the standard
                         deviation of the word embeddings: in a training as short as mini's the soft
                         prompt must start out as large as the words it stands among
    """

    qformer: QFormerConfig
    norm_image_features: bool = True
    norm_soft_prompt: bool = True

    def __post_init__(self):
        if isinstance(self.qformer, dict):  # as it stands in a config.json
            self.qformer = QFormerConfig(**self.qformer)


class QFormerBridge(Bridge):
    """BLIP-2's own: the Q-Former without its text branch, and a projection (paper, section 3.3).

    words  the language model's word embeddings, (V, E)
    """

    def __init__(self, config: QFormerBridgeConfig, words: Tensor):
        sizes = config.qformer
        super().__init__(config, sizes.image_width, sizes.num_queries)
        self.image_norm = nn.Identity()
        if config.norm_image_features:
            self.image_norm = nn.LayerNorm(sizes.image_width)
        self.qformer = QFormer(replace(sizes, vocab_size=None))
        self.language_projection = nn.Linear(sizes.width, words.shape[1])
        self.soft_prompt_norm = nn.Identity()
        if config.norm_soft_prompt:
            self.soft_prompt_norm = nn.LayerNorm(words.shape[1])
            nn.init.constant_(self.soft_prompt_norm.weight, words.std().item())

    def start_from(self, stage1: Blip2Stage1) -> None:
        """Copy the Q-Former of stage 1, less its text branch, and the norm in front of it."""
        ours, learned = self.qformer.state_dict(), stage1.qformer.state_dict()
        self.qformer.load_state_dict({name: learned[name] for name in ours})
        self.image_norm.load_state_dict(stage1.image_norm.state_dict())
        self.pretrained = stage1.pretrained & set(self.state_dict())

    def forward(self, image_features: Tensor) -> Tensor:
        return self._project(self.qformer(self.image_norm(image_features)).queries)

    def _project(self, queries: Tensor) -> Tensor:
        """Query outputs (B, Q, D) -> soft prompt (B, Q, E)."""
        return self.soft_prompt_norm(self.language_projection(queries))

    def readers(self) -> list[Attention]:
        return self.qformer.readers()

    def look(self, image_features: Tensor) -> Look:
        image = self.qformer.project_image(self.image_norm(image_features))
        read = self.qformer(image, return_attention=True)
        prompt = self._project(read.queries)
        return Look(prompt, image, read.cross_attention, read.self_attention)


# What a config.json and `train stage2 --bridge` may name. A new bridge is a class, its config with
# an `image_width` and defaults for everything else, and a line here.
Maker = Callable[[Any, Tensor], Bridge]
BRIDGES: dict[str, tuple[type, Maker]] = {"qformer": (QFormerBridgeConfig, QFormerBridge)}


def describe(bridge: Bridge) -> dict[str, Any]:
    """What `make_bridge` makes an untrained bridge of the same shape from, as JSON can hold it.

    Raises WeightsError if it stands in no line of BRIDGES.
    """
    for kind, (_, bridge_class) in BRIDGES.items():
        if type(bridge) is bridge_class:
            return {"kind": kind} | asdict(bridge.config)
    raise WeightsError(f"{type(bridge).__name__} has no line in BRIDGES: add one, to save it.")


def make_bridge(description: dict[str, Any], words: Tensor) -> Bridge:
    """An untrained bridge to the language model whose word embeddings (V, E) are `words`.

    Raises WeightsError if there is no such bridge.
    """
    settings = dict(description)
    kind = str(settings.pop("kind", None))
    if kind not in BRIDGES:
        raise WeightsError(f"There is no bridge {kind!r}, only {', '.join(BRIDGES)}.")
    config_class, bridge_class = BRIDGES[kind]
    try:
        return bridge_class(config_class(**settings), words)
    except (TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"A bridge cannot be made of this description: {error}.") from error
