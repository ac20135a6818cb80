"""Captioned images from any `datasets` source, and the frozen encoder's features of them.

The encoder never changes, so what it says of an image is computed once and kept on disk in a
memory-mapped array. A cache is a derived thing: whenever it does not fit it is made again.
"""

import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from blip2_edu import UserError
from blip2_edu.images import ImageError, open_image
from blip2_edu.scenes import scene_dataset
from blip2_edu.vision import ImageEncoder
from blip2_edu.weights import ROOT

if TYPE_CHECKING:
    from datasets import Dataset

CROP = (0.5, 1.0)  # share of the area that a random crop keeps
QUESTION = {"answers": [], "answer_type": "other", "question_type": ""}  # what may be left out
CACHE_FOLDER = ROOT / "data" / "cache"


class DataError(UserError, ValueError):
    """The data cannot be used as asked; the message is one sentence for the user."""


@dataclass
class Examples:
    """Images with what people said of them. Images are decoded only when asked for."""

    images: Sequence  # of {"bytes", "path"}, as `datasets` stores them undecoded
    captions: list[list[str]]  # several an image; empty lists when there are none
    questions: list[list[dict]]  # question, answer and `QUESTION`; empty when there are none

    def __len__(self) -> int:
        return len(self.captions)

    def image(self, index: int) -> Image.Image:
        """Decode image `index` to RGB; raises ImageError, with the index, if it cannot be."""
        stored = self.images[index]
        try:
            return open_image(stored["bytes"] if stored["bytes"] is not None else stored["path"])
        except ImageError as error:
            raise ImageError(f"Image {index} of the data set: {error}") from error


def load_examples(source: str | Path, split: str = "train", limit: int | None = None) -> Examples:
    """Read images with captions, questions or both.

    source  a parquet file, a folder of images with metadata (`imagefolder`), a hub id, or
            "scenes:N" for N drawn scenes ("scenes:N:SEED" for others than those of seed 0)
    split   which part of a hub data set, or of a folder that has several
    limit   stop after so many examples; a hub data set is then streamed, not downloaded

    Captions may be a list or a string in `captions`, `caption` or `text`, or stand in columns
    `caption_0`, `caption_1`, ...; `questions` is a list of dicts with at least `question` and
    `answer`. Raises DataError.
    """
    from datasets import Dataset, Features, load_dataset
    from datasets import Image as ImageFeature

    path = Path(source)
    with _reading(source):
        if str(source).startswith("scenes:"):
            table = scene_dataset(*map(int, str(source).removeprefix("scenes:").split(":")))
        elif path.is_file():
            table = load_dataset("parquet", data_files={split: str(path)}, split=split)
        elif path.is_dir():
            table = _part(load_dataset("imagefolder", data_dir=str(path)), split)
        else:
            table = load_dataset(str(source), split=split, streaming=limit is not None)
    if limit is not None:
        table = table.take(limit)
    features = table.features or Features()
    image_column = next((c for c in features if isinstance(features[c], ImageFeature)), None)
    if image_column is None:
        raise DataError(f"{source} has no image column; its columns are {', '.join(features)}.")
    table = table.cast_column(image_column, ImageFeature(decode=False))
    columns = _caption_columns(list(features))
    if not columns and "questions" not in features:
        raise DataError(
            f"{source} has neither captions nor questions; its columns are {', '.join(features)}."
        )
    with _reading(source):
        if not isinstance(table, Dataset):  # a streamed one may break off
            rows = [row | {image_column: _fetched(row[image_column])} for row in table]
            fields = {name: [row[name] for row in rows] for name in features}
            table = Dataset.from_dict(fields, features=table.features)
    if not len(table):
        raise DataError(f"{source} is empty.")
    missing = table.with_format("arrow")[:][image_column].is_null().index(True).as_py()
    if missing >= 0:
        raise DataError(f"{source} has no image in row {missing}.")
    captions, questions = [], []
    for number, row in enumerate(table.remove_columns(image_column)):
        captions.append([text for column in columns for text in _as_list(row[column], column)])
        asked = row.get("questions") or []
        if not all(map(_is_question, asked)):
            raise DataError(f"{source} has a question without text or answer in row {number}.")
        given = [{key: x for key, x in question.items() if x is not None} for question in asked]
        questions.append([QUESTION | question for question in given])
    return Examples(table[image_column], captions, questions)  # images stay on the disk


def _part(parts: "dict[str, Dataset]", split: str) -> "Dataset":
    """One part of a folder; a folder that is not divided is one part, whatever it is called."""
    if len(parts) > 1 and split not in parts:
        raise DataError(f"There is no part {split}, only {' and '.join(parts)}.")
    return parts[split] if split in parts else next(iter(parts.values()))


def _fetched(stored: dict | None) -> dict | None:
    """An image of a stream with its bytes, should it only say where they are."""
    if stored is None or stored["bytes"] is not None:
        return stored
    with fsspec.open(stored["path"], "rb") as file:
        return {"bytes": file.read(), "path": None}


def _is_question(asked: object) -> bool:
    """A dict with a question, an answer and perhaps more answers, all of them texts."""
    if not isinstance(asked, dict):
        return False
    texts = [asked.get("question"), asked.get("answer"), *(asked.get("answers") or [])]
    return all(isinstance(text, str) and text for text in texts)


@contextmanager
def _reading(source: str | Path) -> Iterator[None]:
    """Turn whatever the many readers of `datasets` raise into a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{source} cannot be read as a data set: {reason}") from error


def _caption_columns(columns: list[str]) -> list[str]:
    numbered = [c for c in columns if c.startswith("caption_") and c[8:].isdigit()]
    named = [c for c in ("captions", "caption", "text") if c in columns]
    return named[:1] or sorted(numbered, key=lambda c: int(c[8:]))


def tidy(text: str) -> str:
    """Single spaces, none in front of punctuation: a model writes captions as it has read them."""
    return re.sub(r"\s+([.,;:!?])(?=\s|$)", r"\1", " ".join(text.split()))


def _as_list(value: str | list[str] | None, column: str) -> list[str]:
    """One text or several, tidy, less the empty ones."""
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"The column {column} holds something else than texts.")
    return [tidy(text) for text in texts if text.strip()]


@dataclass
class FeatureCache:
    """Features of every image in several views, each view an array (images, N, W) on disk.

    Float16: its rounding is far below what the encoder's features mean.
    """

    views: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.views[0])

    def rows(self, images: Sequence[int], views: Sequence[int] | None = None) -> Tensor:
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
    place = Path(folder or CACHE_FOLDER) / _cache_key(examples, encoder)
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
) -> np.ndarray:
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
    return zlib.crc32(row, zlib.crc32(f"{place.parent.name} {place.name} {index}".encode()))


def _open_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
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
