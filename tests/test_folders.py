"""A folder into a table: every file has one row, whatever happens in between."""

import csv
import os
import shutil
import weakref
from pathlib import Path

import pytest
from PIL import Image

from blip2_edu.app import folders
from blip2_edu.app.folders import HEADER, TableError, caption_folder

PHOTOS = Path(__file__).parents[1] / "images"


class Fake:
    """Captions an image by its size; `patience` batches later it is interrupted."""

    def __init__(self, patience: int = 99):
        self.patience, self.batches = patience, []

    def caption(self, images: list[Image.Image], num_beams: int) -> list[str]:
        if len(self.batches) == self.patience:
            raise KeyboardInterrupt
        self.batches.append(len(images))
        return [f'{image.width}, "{num_beams}"\nbeams' for image in images]


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "photos"
    (place / "below").mkdir(parents=True)
    for i in range(5):
        Image.new("RGB", (10 + i, 9)).save(place / f"{i}.png")
    Image.new("RGB", (40, 9)).save(place / "below" / "=x, y.jpg")
    (place / "notes.txt").write_text("no image")
    Image.new("RGB", (50, 9)).save(place / "z\u2028\n.png")  # the last row
    (place / ".hidden").mkdir()
    Image.new("RGB", (60, 9)).save(place / ".hidden" / "shown.png")
    (place / "empty.jpg").touch()
    (place / ".hidden.png").write_bytes(b"")
    return place


def rows(table: Path) -> list[dict]:
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == HEADER
        return list(reader)


def complete(table: Path) -> bool:
    found = {row["file"]: row for row in rows(table)}
    assert len(found) == len(rows(table)) == 9
    assert found["3.png"]["caption"] == '13, "5" beams' and not found["3.png"]["problem"]
    assert found["z\u2028\n.png"]["caption"].startswith("50")
    assert found["below/=x, y.jpg"]["caption"].startswith("40")
    assert not found["notes.txt"]["caption"] and "not an image" in found["notes.txt"]["problem"]
    assert "empty" in found["empty.jpg"]["problem"]
    return True


def test_every_file_has_a_row_and_a_bad_one_says_why(folder, tmp_path):
    model, table = Fake(), tmp_path / "out.csv"
    assert caption_folder(folder, table, lambda: model, batch_size=3) == (7, 2)
    assert complete(table)
    assert max(model.batches) > 1
    again = caption_folder(folder, table, lambda: pytest.fail("loaded for nothing"))
    assert again == (0, 0) and complete(table)


def test_a_batch_is_let_go_before_the_next_is_opened(folder, tmp_path, monkeypatch):
    seen, really_open = [], folders.open_each

    class Model:
        def caption(self, images, num_beams):
            seen.extend(map(weakref.ref, images))
            return ["a photo"] * len(images)

    def open_each(paths):
        assert not any(image() for image in seen)
        return really_open(paths)

    monkeypatch.setattr(folders, "open_each", open_each)
    assert caption_folder(folder, tmp_path / "out.csv", Model, batch_size=2) == (7, 2)
    assert len(seen) == 7


def test_it_goes_on_where_it_was_stopped(folder, tmp_path):
    table = tmp_path / "out.csv"
    with pytest.raises(KeyboardInterrupt):
        caption_folder(folder, table, lambda: Fake(patience=2), batch_size=2)
    some = len(rows(table))
    assert 0 < some < 9
    model = Fake()
    caption_folder(folder, table, lambda: model, batch_size=2)
    assert complete(table) and sum(model.batches) < 7


@pytest.mark.parametrize("cut", [*range(1, 40), 300, 10_000])
def test_a_half_written_row_is_written_again(folder, tmp_path, cut):
    table = tmp_path / "out.csv"
    caption_folder(folder, table, Fake)
    table.write_bytes(table.read_bytes()[: max(-cut, 10 - table.stat().st_size)])
    caption_folder(folder, table, Fake)
    assert complete(table)


def test_a_name_that_is_no_utf8(folder, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        Image.new("RGB", (70, 9)).save(folder / name)
    except OSError:
        pytest.skip("this file system holds no such name")
    table = tmp_path / "out.csv"
    assert caption_folder(folder, table, Fake) == (8, 2)
    assert caption_folder(folder, table, Fake) == (0, 0)
    assert b"caf\xe9.png" in table.read_bytes()


def test_the_table_may_lie_in_the_folder(folder):
    table = folder / "out.csv"
    caption_folder(folder, table, Fake)
    assert complete(table)


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\x00", b"file,caption,problem\nx\n"])
def test_another_file_is_not_written_into(folder, tmp_path, content):
    table = tmp_path / "out.csv"
    table.write_bytes(content)
    with pytest.raises(TableError, match="something else"):
        caption_folder(folder, table, Fake)
    assert table.read_bytes() == content


def test_real_photos_are_captioned_by_the_command(tmp_path, capsys):
    from blip2_edu.app.cli import main

    for name in ("cow.jpg", "horses.jpg"):
        shutil.copy(PHOTOS / name, tmp_path)
    arguments = ["caption", str(tmp_path), "--csv", str(tmp_path / "out.csv"), "--beams", "1"]
    assert main(arguments) == 0
    assert [row["file"] for row in rows(tmp_path / "out.csv")] == ["cow.jpg", "horses.jpg"]
    assert all(row["caption"] for row in rows(tmp_path / "out.csv"))
    assert "2 captions and 0 problems" in capsys.readouterr().out
    assert main(["caption", "--csv", str(tmp_path / "out.csv")]) == 2
    assert "one folder" in capsys.readouterr().err
