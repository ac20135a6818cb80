"""Opens what people keep captioned images in: files, folders, archives, the hub, drawn scenes."""

import csv
import hashlib
import json
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from blip2_edu.data.scenes import scene_dataset
from blip2_edu.errors import UserError
from blip2_edu.paths import CACHE

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

T = TypeVar("T")

IMAGES = tuple(".jpg .jpeg .jpe .png .webp .gif .bmp .tif .tiff .avif .jp2 .ppm .pgm".split())
ARCHIVES = tuple(".zip .tar .tgz .tar.gz .tar.bz2 .tar.xz".split())
LISTS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")  # of texts, with the paths of the images
TABLES = (".parquet", ".arrow", *LISTS)
METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "config.json"}
PATHS = ("image", "file_name")  # columns that hold paths whatever the names of the files
PARTS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


class DataError(UserError, ValueError):
    """The data cannot be used as asked; the message is one sentence for the user."""


def open_source(
    source: str | Path, split: str, stream: bool
) -> "tuple[Dataset | IterableDataset, Path]":
    """The table of a source, and the folder from which the paths in it start.

    stream  do not download a hub data set, but read it row by row

    Raises DataError where a folder leaves open what is meant, and whatever the readers raise.
    """
    from datasets import load_dataset

    path = Path(source)
    if str(source).startswith("scenes:"):
        return scene_dataset(*map(int, str(source).removeprefix("scenes:").split(":"))), path
    if path.is_dir():
        return _folder(path.absolute(), split, str(source))
    if path.is_file():
        return _table([path.absolute()], split, str(source))
    return load_dataset(str(source), split=split, streaming=stream), path


def caption_columns(columns: list[str]) -> list[str]:
    """Those that hold captions: `captions`, `caption` or `text`, else `caption_0`, ..."""
    numbered = [c for c in columns if re.fullmatch(r"caption_\d+", c)]
    named = [c for c in ("captions", "caption", "text") if c in columns]
    return named[:1] or sorted(numbered, key=lambda c: int(c[8:]))


def names_image(column: str, value: object) -> bool:
    """Whether a value is the path of an image: by its column's name, or by its own ending."""
    if not isinstance(value, str) or not value or caption_columns([column]):
        return False
    return column in PATHS or ("://" not in value and value.lower().endswith(IMAGES))


# Folders -----------------------------------------------------------------------------------------


def _folder(path: Path, split: str, name: str) -> "tuple[Dataset, Path]":
    """What a folder holds: a saved data set, else metadata, else texts beside images, else tables.

    Every file is found by its name, never by a pattern, so that names may be any.
    """
    from datasets import Dataset, load_from_disk

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        return saved if isinstance(saved, Dataset) else _part(dict(saved), split), path
    files = list(_files(path))
    metadata = [file for file in files if file.name.lower() in METADATA]
    if metadata:
        return _table(_part(_divided(metadata, path, name), split), split, name)
    images = [file for file in files if _is(file, IMAGES)]
    present = set(files)
    described = [x for x in images if {x.with_suffix(".txt"), x.with_suffix(".json")} & present]
    if described:
        chosen = _part(_divided(described, path, name), split)
        return _from_rows([_beside(image) for image in chosen]), path
    tables = [x for x in files if _is(x, TABLES + ARCHIVES) and x.name not in ABOUT]
    if not tables:
        found = f"{len(images)} images without captions" if images else "no images with captions"
        line = '{"file_name": "photo.jpg", "caption": "a dog"}'
        raise DataError(
            f"{name} holds {found}; write captions into metadata.jsonl there, a line {line} each."
        )
    kinds = Counter(_ending(file) for file in tables)
    if len(kinds) > 1:
        found = " and ".join(f"{count} {ending}" for ending, count in kinds.items())
        raise DataError(f"{name} holds files of several kinds, {found}; name one of the files.")
    chosen = _part(_divided(tables, path, name, by_name=True), split)
    places = sorted({file.parent.relative_to(path).as_posix() for file in chosen})
    if len(places) > 1:
        raise DataError(f"{name} holds data in {' and in '.join(places)}; name one of them.")
    return _table(chosen, split, name)


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, in order, but for those that are hidden."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(x for x in folders if not x.startswith((".", "__")))
        yield from (Path(place, x) for x in sorted(names) if not x.startswith("."))


def _is(file: Path, endings: tuple[str, ...]) -> bool:
    return file.name.lower().endswith(endings)


def _ending(file: Path) -> str:
    return next((x for x in ARCHIVES + TABLES if _is(file, (x,))), file.suffix)


def _divided(
    files: list[Path], root: Path, name: str, by_name: bool = False
) -> dict[str, list[Path]]:
    """Files by the part that their folder below `root` or, for tables, their name tells.

    If none tells any, all are one part.
    """
    parts: dict[str, list[Path]] = {}
    for file in files:
        stem = file.name[: -len(_ending(file))] if by_name else ""
        names = [*file.relative_to(root).parts[:-1], stem]
        shard = re.fullmatch(r"(.+)-\d+-of-\d+", stem)
        words = [word for x in names for word in re.split(r"[-._ 0-9]+", x.lower())]
        found = [part for word in words for part, known in PARTS.items() if word in known]
        part = found[0] if found else shard[1] if shard else ""
        parts.setdefault(part, []).append(file)
    if "" in parts and len(parts) > 1:
        raise DataError(
            f"{parts[''][0].relative_to(root)} belongs to no part of {name}, which has "
            f"{' and '.join(filter(None, parts))}; name the file or folder that you mean."
        )
    order = [*PARTS, *sorted(parts)]
    return {part: parts[part] for part in sorted(parts, key=order.index)}


def _part(parts: Mapping[Any, T], split: str) -> T:
    """One part of a folder; a folder that is not divided is one part, whatever it is called."""
    if len(parts) > 1 and split not in parts:
        raise DataError(f"There is no part {split}, only {' and '.join(map(str, parts))}.")
    return parts[split] if split in parts else next(iter(parts.values()))


def _beside(image: Path) -> dict:
    """A row of an image: what the .json beside it says, and the .txt as its caption."""
    row, fields, text = {}, image.with_suffix(".json"), image.with_suffix(".txt")
    if fields.is_file():
        found = list(_objects(fields))
        if len(found) != 1:
            raise DataError(f"{fields.name} is not about one image, as its name says.")
        row = found[0]
    if text.is_file():
        row["caption"] = text.read_text("utf-8-sig")
    return row | {"image": str(image)}


# Files -------------------------------------------------------------------------------------------


def _table(files: list[Path], split: str, name: str) -> "tuple[Dataset, Path]":
    """The rows of files of one kind: tables, lists of texts with paths, or archives."""
    from datasets import concatenate_datasets, load_dataset
    from datasets.data_files import DataFilesList
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_schema

    first = files[0]
    if _is(first, ARCHIVES):
        opened = [_folder(_unpacked(file), split, file.name) for file in files]
        return concatenate_datasets([table for table, _ in opened]), opened[0][1]
    if _is(first, LISTS):
        return _from_rows([row for file in files for row in _listed(file)]), first.parent
    if _is(first, IMAGES):
        raise DataError(f"{name} is one image; name a folder of images with captions.")
    with first.open("rb") as file:
        head = file.read(12)
    if head == b"version http":  # instead of a large file, in a clone made without Git LFS
        raise DataError(f"{first.name} is not there, only a note of it; run `git lfs pull`.")
    if not _is(first, TABLES) and head[:4] != b"PAR1":
        raise DataError(f"{name} is no data set; its name would end in {', '.join(TABLES)}.")
    reader = "arrow" if _is(first, (".arrow",)) else "parquet"
    for file in files if reader == "parquet" else []:
        try:
            read_schema(file)
        except ArrowInvalid:  # of which `datasets` would say more than a sentence
            wrong = f"{file.name} is no parquet file, or only a part of one; get it again."
            raise DataError(f"{name} cannot be read as a data set: {wrong}") from None
    # Not as names, which `datasets` takes for patterns; with the times it knows a file's new state.
    known = DataFilesList(list(map(str, files)), [(str(x.stat().st_mtime_ns),) for x in files])
    return load_dataset(reader, data_files={"train": known}, split="train"), first.parent


def _from_rows(rows: list[dict]) -> "Dataset":
    from datasets import Dataset

    names = dict.fromkeys(name for row in rows for name in row)  # not those of the first row alone
    fields = {name: [row.get(name) for row in rows] for name in names}
    return Dataset.from_dict(fields, on_mixed_types="use_json")


def _listed(file: Path) -> Iterator[dict]:
    """The rows of a .csv, .tsv, .json or .jsonl; paths of images from the file's folder on."""
    for row in _separated(file) if _is(file, (".csv", ".tsv")) else _objects(file):
        for column, value in row.items():
            if names_image(column, value) and "://" not in value:
                row[column] = str(file.parent / value.replace("\\", "/"))
        yield row


def _separated(file: Path) -> Iterator[dict]:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if _is(file, (".tsv",)) else ",")
        for row in reader:
            if None in row:
                raise DataError(
                    f"Line {reader.line_num} of {file.name} has more fields than the first line; "
                    "put quotation marks around texts with commas."
                )
            yield row


def _objects(file: Path) -> Iterator[dict]:
    text = file.read_text("utf-8-sig")
    whole = re.match(r"\s*(\[|\{\s*\n)", text)  # else a row a line
    for number, part in enumerate([text] if whole else text.split("\n"), 1):
        try:
            found = json.loads(part) if part.strip() else []
        except json.JSONDecodeError as error:
            line = error.lineno if whole else number
            raise DataError(f"Line {line} of {file.name} is no JSON: {error.msg}.") from None
        rows = found if isinstance(found, list) else [found]
        if not all(isinstance(row, dict) for row in rows):
            raise DataError(f"Line {number} of {file.name} does not name what it holds.")
        yield from rows


def _unpacked(archive: Path) -> Path:
    """The folder into which an archive is unpacked, once for each state of it."""
    state = archive.stat()
    name = f"{archive} {state.st_size} {state.st_mtime_ns}"
    place = CACHE / "unpacked" / hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=place.parent) as draft:  # nobody finds it half unpacked
        whole = Path(draft, "whole")
        whole.mkdir()
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(whole)
        else:
            with tarfile.open(archive) as opened:
                opened.extractall(whole, filter="data")
        try:
            whole.rename(place)
        except OSError:  # another process was faster
            if not place.is_dir():
                raise
    return place
