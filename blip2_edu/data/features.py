"""The frozen encoder's features of images, computed once.

The encoder never changes, so what it says of an image is kept on disk in a memory-mapped array. A
cache is a derived thing: whenever it does not fit it is made again.
"""

import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from blip2_edu.data.examples import Examples
from blip2_edu.paths import CACHE
from blip2_edu.vision import ImageEncoder

Indices = Sequence[int] | np.ndarray

CROP = (0.5, 1.0)  # share of the area that a random crop keeps


@dataclass
class FeatureCache:
    """Features of every image in several views, each view an array (images, N, W) on disk.

    Float16: its rounding is far below what the encoder's features mean.
    """

    views: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.views[0])

    def rows(self, images: Indices, views: Indices | None = None) -> Tensor:
        """Features (B, N, W), float32, of these images, each in its view (by default the first)."""
        chosen = views if views is not None else [0] * len(images)
        rows = [self.views[view][image] for view, image in zip(chosen, images, strict=True)]
        return torch.from_numpy(np.stack(rows)).float()


def open_features(
    examples: Examples,
    encoder: ImageEncoder,
    views: int = 1,
    folder: str | Path | None = None,
    batch_size: int = 16,
) -> FeatureCache:
    """Open the features that this encoder has of these images, computing those not there yet.

    The folder is named by a hash of the encoder's weights and of every image. Each row has a
    checksum, written after it, of its bytes and of that name: rows that a killed run left
    unfinished, that were damaged since, or that belong elsewhere are computed again.

    views       how many ways of looking at an image, see `view_of`
    batch_size  images a pass of the encoder; small ones stay in a processor's cache
    """
    place = Path(folder or CACHE) / _cache_key(examples, encoder)
    shape = (len(examples), encoder.num_features, encoder.width)
    return FeatureCache(
        [_open_view(place, shape, examples, encoder, view, batch_size) for view in range(views)]
    )


def _cache_key(examples: Examples, encoder: ImageEncoder) -> str:
    digest = hashlib.sha256(f"{encoder.fingerprint()} {CROP}".encode())
    for stored in examples.images:
        data = stored["bytes"]
        data = data if data is not None else Path(stored["path"]).read_bytes()
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()[:32]


def view_of(image: Image.Image, view: int, seed: int = 0) -> Image.Image:
    """View 0 is the image, view 1 its mirror image, every further one a random crop, half mirrored.

    A crop keeps the proportions and depends on `view` and `seed` alone.
    """
    if view == 0:
        return image
    if view == 1:
        return ImageOps.mirror(image)
    draw = np.random.default_rng([view, seed])
    side = draw.uniform(*CROP) ** 0.5  # of the crop, in sides of the image
    left, top = draw.uniform(0, 1 - side, 2) * image.size
    width, height = side * image.width, side * image.height
    crop = image.crop((round(left), round(top), round(left + width), round(top + height)))
    return ImageOps.mirror(crop) if draw.random() < 0.5 else crop


def _open_view(
    place: Path,
    shape: tuple[int, int, int],
    examples: Examples,
    encoder: ImageEncoder,
    view: int,
    batch_size: int,
) -> np.memmap:
    place = place / f"view-{view}"
    place.mkdir(parents=True, exist_ok=True)
    features = _open_array(place / "features.npy", shape, np.float16)
    checksums = _open_array(place / "checksums.npy", shape[:1], np.uint32)
    missing = [i for i in range(shape[0]) if checksums[i] != _checksum(features[i], place, i)]
    batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    for batch in tqdm(
        batches, desc=f"Image features, view {view + 1}", unit="batch", disable=not batches
    ):
        images = [view_of(examples.image(i), view, seed=i) for i in batch]
        pixels = encoder.preprocess(images).to(encoder.device)
        features[batch] = encoder(pixels).float().cpu().numpy()
        for i in batch:
            checksums[i] = _checksum(features[i], place, i)
    features.flush()
    checksums.flush()
    return features


def _checksum(row: np.ndarray, place: Path, index: int) -> int:
    """Of a row's bytes, of whose they are, in which view and where: those of others never fit."""
    return zlib.crc32(row.data, zlib.crc32(f"{place.parent.name} {place.name} {index}".encode()))


def _open_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.memmap:
    """Map the array at `path` for writing; one of another shape, or none, becomes an empty one."""
    array = None
    try:
        array = np.lib.format.open_memmap(path, mode="r+")
    except Exception:  # not there or not an array; numpy raises nearly anything on a damaged header
        pass
    if array is None or array.shape != shape or array.dtype != dtype:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # a disk too full is an OSError now, else a crash later
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
