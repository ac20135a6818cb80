"""The course's photographs: small, readable, each with credits, captions and words that name it."""

import json
import re
from pathlib import Path

import pytest

from blip2_edu.images import open_image
from blip2_edu.metrics import names

FOLDER = Path(__file__).parents[1] / "images"
PHOTOS = sorted(path.name for path in FOLDER.glob("*.jpg"))
CAPTIONS = json.loads((FOLDER / "captions.json").read_text(encoding="utf-8"))
FREE = re.compile(r"public domain|CC0 1\.0|CC BY \d\.\d|GPL-2\+")


def test_the_set():
    assert len(PHOTOS) >= 16
    known = {"CREDITS.md", "captions.json", *PHOTOS}
    assert {path.name for path in FOLDER.iterdir()} == known
    assert sum((FOLDER / name).stat().st_size for name in PHOTOS) <= 6_000_000
    assert list(CAPTIONS) == PHOTOS


def test_credits():
    lines = (FOLDER / "CREDITS.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "`" in line]
    table = {row[0].strip("`"): row[1:] for row in rows if row[0].endswith(".jpg`")}
    assert list(table) == PHOTOS
    for name, (shows, author, licence, source) in table.items():
        assert shows and author and source, name
        assert FREE.fullmatch(licence), f"{name}: {licence}"


@pytest.mark.parametrize("name", PHOTOS)
def test_photo(name):
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*\.jpg", name)
    photo = open_image(FOLDER / name)
    assert photo.mode == "RGB" and 224 <= min(photo.size) <= max(photo.size) <= 640


@pytest.mark.parametrize("name", PHOTOS)
def test_captions(name):
    captions = CAPTIONS[name]["captions"]
    assert len(set(captions)) == len(captions) == 5
    for caption in captions:
        assert re.fullmatch(r"[A-Z][A-Za-z ,-]*[a-z]\.", caption), caption
        assert 4 <= len(caption.split()) <= 16, caption


@pytest.mark.parametrize("name", PHOTOS)
def test_subject(name):
    """Lower-case words, and most of what people wrote names one of them."""
    words = CAPTIONS[name]["subject"]
    assert len(set(words)) == len(words) >= 1
    assert all(re.fullmatch(r"[a-z]+", word) for word in words)
    assert sum(names(caption, words) for caption in CAPTIONS[name]["captions"]) >= 3
