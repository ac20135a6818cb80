"""Captioned images, and questions about images, from any `datasets` source."""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
from PIL import Image

from blip2_edu.data.scenes import scene_dataset
from blip2_edu.errors import UserError
from blip2_edu.images import ImageError, open_image

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

QUESTION = {"answers": [], "answer_type": "other", "question_type": ""}  # what may be left out


class DataError(UserError, ValueError):
    """The data cannot be used as asked; the message is one sentence for the user."""


@dataclass
class Examples:
    """Images with what people said of them. Images are decoded only when asked for."""

    images: Sequence  # of {"bytes", "path"}, as `datasets` stores them undecoded
    captions: list[list[str]]  # several an image; empty lists when there are none
    questions: list[list[dict]]  # question, answer and `QUESTION`; empty when there are none
    # What a caption should name: any of these words. Empty where nobody wrote any down.
    subjects: list[list[str]] = field(default_factory=list)
    scenes: list[list[str]] = field(default_factory=list)

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
    `answer`; words that name what is seen, and where, may be lists in `subject` and `scene`. Raises
    DataError.
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
    captions, questions, subjects, scenes = [], [], [], []
    for number, row in enumerate(table.remove_columns(image_column)):
        captions.append([text for column in columns for text in _as_list(row[column], column)])
        asked = row.get("questions") or []
        if not all(map(_is_question, asked)):
            raise DataError(f"{source} has a question without text or answer in row {number}.")
        given = [{key: x for key, x in question.items() if x is not None} for question in asked]
        questions.append([QUESTION | question for question in given])
        subjects.append(_as_list(row.get("subject"), "subject"))
        scenes.append(_as_list(row.get("scene"), "scene"))
    images = table[image_column]  # they stay on the disk
    return Examples(images, captions, questions, subjects, scenes)


def _part(parts: "DatasetDict", split: str) -> "Dataset":
    """One part of a folder; a folder that is not divided is one part, whatever it is called."""
    if len(parts) > 1 and split not in parts:
        raise DataError(f"There is no part {split}, only {' and '.join(map(str, parts))}.")
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
def _reading(source: str | Path) -> Generator[None]:
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
