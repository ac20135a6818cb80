"""Frozen image encoders behind one interface: photographs in, a grid of features out.

BLIP-2 trains a bridge and leaves its image encoder as it is (paper, section 3). Here that is a
property of the class, not of the caller's care: its parameters take no gradient and it cannot be
put into training mode.

Axis letters: `B` images, `N` features an image (patches, and a class token if there is one), `W`
width of a feature.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from blip2_edu.checkpoints.embedded import embedded_file
from blip2_edu.checkpoints.published import checkpoint_folder, load_whole, loading
from blip2_edu.errors import WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Pixels a side. Lite2 learned at 260; photographs that are not cropped want a little more. Its
# padding stays that of 260, so at 288 its grid lies half a patch too far right and too low.
EFFICIENTNET_SIZE = {"efficientnet-lite0": 224, "efficientnet-lite2": 288}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageEncoder(nn.Module):
    """Any network that turns pixels into features, frozen.

    name                what `load_image_encoder` was asked for
    width               W
    grid                (rows, columns) of the patches, for pictures
    num_prefix_tokens   features in front of the patches that belong to none (a ViT's [CLS])
    image_size          pixels a side
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        extract: Callable[[Any, Tensor], Tensor],
        *,
        width: int,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        self.name, self.width, self.grid = name, width, grid
        self.num_prefix_tokens, self.image_size = num_prefix_tokens, image_size
        self.network = network.requires_grad_(False).eval()
        self._extract, self._mean, self._std = extract, torch.tensor(mean), torch.tensor(std)

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Stay in evaluation mode, whatever a parent asks for: batch statistics never move."""
        return super().train(False)

    @property
    def num_features(self) -> int:
        """N: prefix tokens and patches."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def check_width(self, wanted: int) -> None:
        """Raise WeightsError unless a Q-Former that reads features `wanted` wide can read ours."""
        if wanted != self.width:
            raise WeightsError(
                f"This Q-Former reads features of width {wanted}, and {self.name} gives "
                f"{self.width}: name the encoder it had."
            )

    def preprocess(self, images: Iterable[Image.Image]) -> Tensor:
        """RGB images of any size -> pixels (B, 3, S, S), squashed to a square, never cropped.

        Images that are made one by one are squashed one by one.
        """
        size = (self.image_size, self.image_size)
        squares = [
            image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
            for image in images
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in squares]))
        pixels = (pixels.float() / 255 - self._mean) / self._std
        return rearrange(pixels, "b h w c -> b c h w")

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) -> features (B, N, W), without gradients."""
        return self._extract(self.network, pixels)

    def fingerprint(self) -> str:
        """Hash of everything that decides the features: weights, buffers and preprocessing."""
        digest = hashlib.sha256(repr((self.image_size, self._mean, self._std)).encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def load_image_encoder(name: str = "efficientnet-lite2") -> ImageEncoder:
    """The embedded EfficientNet-Lite2 or Lite0, or any transformers vision tower by name.

    name  efficientnet-lite2, which `mini` sees with; efficientnet-lite0, of coarser grid and half
          the time; a folder or a hub id

    Of a published BLIP-2 it is the part that sees. Raises WeightsError if the weights cannot be had
    or are not a vision tower's.
    """
    if name in EFFICIENTNET_SIZE:
        return _load_efficientnet(name)
    return _load_vision_tower(name)


def _load_efficientnet(name: str) -> ImageEncoder:
    from efficientnet_lite_pytorch import EfficientNet

    network, size = EfficientNet.from_name(name), EFFICIENTNET_SIZE[name]
    network.load_state_dict(torch.load(embedded_file(name), weights_only=True))
    return ImageEncoder(
        name,
        network.to(memory_format=torch.channels_last),  # half as fast again on a CPU
        lambda net, pixels: rearrange(net.extract_features(pixels), "b w r c -> b (r c) w"),
        width=1280,
        grid=(size // 32, size // 32),
        num_prefix_tokens=0,
        image_size=size,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )


def _load_vision_tower(name: str) -> ImageEncoder:
    from transformers import (
        AutoConfig,
        AutoModel,
        Blip2ForConditionalGeneration,
        Blip2VisionModel,
        CLIPVisionModel,
    )

    folder = checkpoint_folder(name)
    with loading(name, "vision tower"):
        config = AutoConfig.from_pretrained(folder)
        classes = {
            "blip-2": Blip2ForConditionalGeneration,
            "blip_2_vision_model": Blip2VisionModel,
            "clip": CLIPVisionModel,
            "clip_vision_model": CLIPVisionModel,
        }
        network = load_whole(classes.get(config.model_type, AutoModel), folder)
        if hasattr(network.config, "vision_config"):  # it reads, too
            network = network.vision_model
        file = folder / "preprocessor_config.json"
        seen = json.loads(file.read_text()) if file.exists() else {}
        colors = seen.get("image_mean", CLIP_MEAN), seen.get("image_std", CLIP_STD)
        return from_vision_tower(name, network, *colors)


def from_vision_tower(
    name: str,
    network: "PreTrainedModel",
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> ImageEncoder:
    """Wrap a transformers vision model that has `last_hidden_state` over [prefix ; patches].

    mean, std  of red, green and blue, from 0 to 1, in the images that it was trained on
    """
    config = network.config
    side = config.image_size // config.patch_size
    with torch.no_grad():
        pixels = torch.zeros(1, 3, config.image_size, config.image_size)
        length = network(pixel_values=pixels.to(network.dtype)).last_hidden_state.shape[1]
    return ImageEncoder(
        name,
        network,
        lambda net, pixels: net(pixel_values=pixels.to(net.dtype)).last_hidden_state,
        width=config.hidden_size,
        grid=(side, side),
        num_prefix_tokens=length - side * side,
        image_size=config.image_size,
        mean=mean,
        std=std,
    )
