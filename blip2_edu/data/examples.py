"""Captioned images, and questions about images, from any source."""

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
from PIL import Image

from blip2_edu.data.sources import DataError, caption_columns, names_image, open_source
from blip2_edu.images import ImageError, open_image

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

TOLD = ("questions", "subject", "scene")  # columns beside those of captions
QUESTION = {"answers": [], "answer_type": "other", "question_type": ""}  # what may be left out


@dataclass
class Examples:
    """Images with what people said of them. Images are decoded only when asked for."""

    images: Sequence  # of {"bytes", "path"}, the path where there are no bytes
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


@dataclass
class StoredImages(Sequence):
    """Some rows of a column of images, undecoded and left on the disk, as {"bytes", "path"}."""

    column: "pa.ChunkedArray"  # of such, of bytes, or of paths; null where a row has no image
    folder: Path  # where the paths start
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return StoredImages(self.column, self.folder, self.rows[index])
        return _stored(self.column[self.rows[index]].as_py(), self.folder)


def _stored(value: dict | bytes | str | None, folder: Path) -> dict:
    """An image in any of the forms in which tables hold them; both None if there is none."""
    given = value if isinstance(value, dict) else {}
    data = value if isinstance(value, bytes) else given.get("bytes")
    path = value if isinstance(value, str) else given.get("path")
    if data is not None or not path:
        return {"bytes": data, "path": None}
    return {"bytes": None, "path": path if "://" in path else str(folder / path)}


def load_examples(source: str | Path, split: str = "train", limit: int | None = None) -> Examples:
    """Read images with captions, questions or both; equal images are one, with the texts of all.

    source  a table (parquet, csv or jsonl), a folder with one, with images and metadata, or written
            by `save_to_disk`, an archive of such a folder, a hub id, or "scenes:N" for N drawn
            scenes ("scenes:N:SEED" for others than those of seed 0)
    split   which part of a hub data set, or of a folder that has several
    limit   stop after so many images; a hub data set is then streamed, not downloaded

    Images may be paths, from the folder of their table on. Captions may be a list or a string in
    `captions`, `caption` or `text`, or stand in columns `caption_0`, `caption_1`, ...; `questions`
    is a list of dicts with at least `question` and `answer`; words that name what is seen, and
    where, may be lists in `subject` and `scene`. Warns if several columns hold images. Raises
    DataError.
    """
    from datasets import Dataset

    with _reading(source):
        table, folder = open_source(source, split, stream=limit is not None)
    if isinstance(table, Dataset) and not len(table):
        raise DataError(f"{source} is empty.")
    features = table.features or {}
    image_column = _image_column(table, source)
    columns = caption_columns(list(features))
    told = [*columns, *(name for name in TOLD if name in features)]
    if not columns and "questions" not in features:
        raise DataError(
            f"{source} has neither captions nor questions; its columns are {_columns(table)}."
        )
    with _reading(source):
        table = table.select_columns([image_column, *told])
        if not isinstance(table, Dataset):
            table = _collected(table, image_column, limit)
        if not len(table):
            raise DataError(f"{source} is empty.")
        column = table.with_format("arrow")[:][image_column]
        owners = _owners(StoredImages(column, folder, range(len(table))), source, limit)
    firsts: dict[int, int] = {}
    for row, owner in owners.items():
        firsts.setdefault(owner, row)
    texts = [([], [], [], []) for _ in firsts]
    rows = table.select_columns(told).select(list(owners))
    for (number, owner), row in zip(owners.items(), rows, strict=True):
        asked = row.get("questions") or []
        if not all(map(_is_question, asked)):
            raise DataError(f"{source} has a question without text or answer in row {number}.")
        given = [{key: x for key, x in question.items() if x is not None} for question in asked]
        found = (
            [text for column in columns for text in _as_list(row[column], column)],
            [QUESTION | question for question in given],
            _as_list(row.get("subject"), "subject"),
            _as_list(row.get("scene"), "scene"),
        )
        for known, new in zip(texts[owner], found, strict=True):
            known += [x for place, x in enumerate(new) if x not in known + new[:place]]
    captions, questions, subjects, scenes = map(list, zip(*texts, strict=True))
    if not any(captions) and not any(questions):
        those = "all texts up to the limit" if limit else "all texts"
        raise DataError(f"{source} has neither captions nor questions: {those} are empty.")
    images = StoredImages(column, folder, [firsts[owner] for owner in range(len(firsts))])
    return Examples(images, captions, questions, subjects, scenes)


def _image_column(table: "Dataset | IterableDataset", source: str | Path) -> str:
    """The column that holds the images: `image`, or what else holds some, images before paths."""
    from datasets import Dataset, Value
    from datasets import Image as ImageFeature

    images, data, paths = [], [], []
    for name, kind in (table.features or {}).items():
        if isinstance(kind, ImageFeature) or (
            isinstance(kind, dict) and {"bytes", "path"} & {*kind}
        ):
            images.append(name)
        elif isinstance(kind, Value) and kind.dtype in ("binary", "large_binary", "binary_view"):
            data.append(name)
        elif isinstance(kind, Value) and isinstance(table, Dataset) and "string" in kind.dtype:
            value = next((text for text in table[name] if text), None)
            paths += [name] if names_image(name, value) else []
    found = images or data or paths
    if not found:
        raise DataError(f"{source} has no image column; its columns are {_columns(table)}.")
    chosen = "image" if "image" in images + data + paths else found[0]
    others = [name for name in found if name != chosen]
    if others:
        warnings.warn(
            f"{source} has several columns of images; {chosen} is taken, not {', '.join(others)}.",
            stacklevel=3,
        )
    return chosen


def _columns(table: "Dataset | IterableDataset") -> str:
    """The columns with their types, in words."""
    if not table.features:
        return "unknown"
    return ", ".join(f"{field.name} ({field.type})" for field in table.features.arrow_schema)


def _collected(table: "IterableDataset", image_column: str, limit: int | None) -> "Dataset":
    """The rows of a stream until there are `limit` different images and a further one comes."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    features = table.features or Features()
    if isinstance(features[image_column], ImageFeature):
        table = table.cast_column(image_column, ImageFeature(decode=False))
    rows, seen = [], set()
    for row in table:
        row[image_column] = _fetched(row[image_column])
        seen.add(_digest(_stored(row[image_column], Path())))
        if limit is not None and len(seen) > limit:
            break
        rows.append(row)
    fields = {name: [row[name] for row in rows] for name in features}
    return Dataset.from_dict(fields, features=features)


def _fetched(stored: dict | None) -> dict | None:
    """An image of a stream with its bytes, should it only say where they are."""
    if not isinstance(stored, dict) or stored.get("bytes") is not None:
        return stored
    with fsspec.open(stored["path"], "rb") as file:
        return {"bytes": file.read(), "path": None}


def _owners(images: StoredImages, source: str | Path, limit: int | None) -> dict[int, int]:
    """Of each row the image that it is about, numbered as they come, rows of equal images alike.

    Rows of images after the first `limit` are left out.
    """
    sizes = [_size(stored) for stored in images]
    shared = {size for size, count in Counter(sizes).items() if count > 1}
    owners, numbers = {}, {}
    for row, size in enumerate(sizes):
        full = len(numbers) == limit
        if size is None:
            if full:
                continue
            path = images[row]["path"]
            wrong = f"names {path}, which is no file," if path else "has no image"
            raise DataError(f"{source} {wrong} in row {row}.")
        # Where no other image is as long, there is no need to read it.
        content = _digest(images[row]) if size in shared else size
        if content in numbers or not full:
            owners[row] = numbers.setdefault(content, len(numbers))
    return owners


def _size(stored: dict) -> int | None:
    """Bytes of an image; None if there is none."""
    if stored["bytes"] is not None:
        return len(stored["bytes"])
    path = Path(stored["path"] or "")
    return path.stat().st_size if path.is_file() else None


def _digest(stored: dict) -> bytes:
    data = stored["bytes"]
    if data is None:
        data = Path(stored["path"]).read_bytes() if stored["path"] else b""
    return hashlib.sha256(data).digest()


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


def tidy(text: str) -> str:
    """Single spaces, none in front of punctuation: a model writes captions as it has read them."""
    return re.sub(r"\s+([.,;:!?])(?=\s|$)", r"\1", " ".join(text.split()))


def _as_list(value: str | list[str] | None, column: str) -> list[str]:
    """One text or several, tidy, less the empty ones."""
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"The column {column} holds something else than texts.")
    return [tidy(text) for text in texts if text.strip()]
