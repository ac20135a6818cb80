"""A folder into a table: every file has one row, whatever happens in between."""

import csv
import io
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
    assert again == (0, 2) and complete(table)


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
    assert caption_folder(folder, table, Fake) == (0, 2)
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


def test_another_file_is_refused_with_the_reason(folder, tmp_path):
    table = tmp_path / "out.csv"
    for content, reason in (("a,b\n", "does not name file"), ("x\n", "row 2 has 1 cells")):
        table.write_text("file,caption,problem\n" * (content == "x\n") + content)
        with pytest.raises(TableError, match=reason):
            caption_folder(folder, table, Fake)


def test_a_quotation_that_does_not_end_swallows_no_rows(folder, tmp_path):
    table = tmp_path / "out.csv"
    broken = b'file,caption,problem\r\n0.png,"a cow,\r\n1.png,a dog,\r\n2.png,a pig,\r\n'
    table.write_bytes(broken)
    with pytest.raises(TableError, match="a quotation begins in row"):
        caption_folder(folder, table, Fake)
    assert table.read_bytes() == broken
    odd = b'file,caption,problem\r\n0.png,"a" cow,\r\n'  # as somebody typed it
    table.write_bytes(odd)
    caption_folder(folder, table, Fake)
    assert table.read_bytes().startswith(odd)


def quoted(text: str) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows(csv.reader(io.StringIO(text, newline="")))
    return out.getvalue()


def delimited(text: str, delimiter: str) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows(csv.reader(io.StringIO(text, newline="")))
    return out.getvalue()


STYLES = {  # what other programs make of a table, and the delimiter, line end and start it has then
    "pandas": (lambda text: text.replace("\r\n", "\n"), ",", "\n", "f"),
    "a byte-order mark": (lambda text: "\ufeff" + text, ",", "\r\n", "\ufefff"),
    "an old Mac": (lambda text: text.replace("\r\n", "\r"), ",", "\r", "f"),
    "a blank line": (lambda text: text + "\r\n", ",", "\r\n", "f"),
    "several, of spaces": (lambda text: text + "\r\n  \r\n", ",", "\r\n", "f"),
    "empty cells": (lambda text: text + ",,\r\n", ",", "\r\n", "f"),
    "no last line end": (lambda text: text.removesuffix("\r\n"), ",", "\r\n", "f"),
    "neither, by pandas": (lambda text: text.replace("\r\n", "\n")[:-1], ",", "\n", "f"),
    "quotation marks": (quoted, ",", "\r\n", '"'),
    "a German Excel": (lambda text: "\ufeff" + delimited(text, ";"), ";", "\r\n", "\ufefff"),
    "Excel, less empty cells": (lambda text: text.replace(",\r\n", "\r\n"), ",", "\r\n", "f"),
    "a cell too many": (lambda text: text.replace(",\r\n", ",,\r\n"), ",", "\r\n", "f"),
    "tabs": (lambda text: delimited(text, "\t"), "\t", "\r\n", "f"),
}


@pytest.mark.parametrize("style", STYLES)
def test_a_table_that_another_program_has_saved_is_continued_in_its_style(folder, tmp_path, style):
    change, delimiter, line_end, start = STYLES[style]
    table = tmp_path / "out.csv"
    caption_folder(folder, table, Fake)
    text = table.read_bytes().decode().replace("13, ", "mine, ") + "gone.png,written by hand,\r\n"
    before = change(text).encode()
    table.write_bytes(before)
    assert caption_folder(folder, table, lambda: pytest.fail("loaded for nothing")) == (0, 2)
    unchanged = table.read_bytes()
    assert unchanged.rstrip(b"\r\n") == before.rstrip(b"\r\n")

    Image.new("RGB", (80, 9)).save(folder / "new.png")
    assert caption_folder(folder, table, Fake) == (1, 2)
    after = table.read_bytes()
    row = f'new.png{delimiter}"80, ""5"" beams"{delimiter}{line_end}'
    assert after == unchanged + row.encode() and after.decode().startswith(start)
    found = list(csv.reader(io.StringIO(after.decode(), newline=""), delimiter=delimiter))
    assert ["gone.png", "written by hand"] in [row[:2] for row in found]
    assert ["3.png", 'mine, "5" beams'] in [row[:2] for row in found]
    assert caption_folder(folder, table, Fake) == (0, 2) and table.read_bytes() == after


def test_columns_of_somebody_else_are_kept(folder, tmp_path):
    table = tmp_path / "out.csv"
    problem = f"{folder / '4.png'} is empty; copy or download it again."
    table.write_text(
        f"number,caption,file,problem\n1,a cow,3.png,\n2,,4.png,{problem}\n3,,2.png,secret!\n"
    )
    assert caption_folder(folder, table, Fake) == (5, 3)
    with table.open(newline="") as file:
        found = {row["file"]: row for row in csv.DictReader(file)}
    assert found["3.png"] == {"number": "1", "caption": "a cow", "file": "3.png", "problem": ""}
    assert found["4.png"]["caption"] == '14, "5" beams' and found["4.png"]["number"] == "2"
    assert found["2.png"]["problem"] == "secret!" and found["1.png"]["number"] == ""


def test_a_problem_is_tried_again(folder, tmp_path):
    table = tmp_path / "out.csv"
    (folder / "an empty.jpg").touch()  # its row ends as that of the other
    assert caption_folder(folder, table, Fake) == (7, 3)
    before = {row["file"]: row for row in rows(table)}
    old = table.stat().st_mtime - 1000
    Image.new("RGB", (33, 9)).save(folder / "empty.jpg")
    os.utime(folder / "empty.jpg", (old, old))  # as a backup that is put back
    assert caption_folder(folder, table, Fake) == (1, 2)
    after = {row["file"]: row for row in rows(table)}
    assert len(rows(table)) == 10 and after["empty.jpg"]["caption"].startswith("33")
    assert after | {"empty.jpg": None} == before | {"empty.jpg": None}
    (folder / "an empty.jpg").write_text("no image either")
    assert caption_folder(folder, table, Fake) == (0, 2)
    found = [row for row in rows(table) if row["file"] == "an empty.jpg"]
    assert len(found) == 1 and "not an image" in found[0]["problem"]


def test_a_problem_for_which_somebody_wrote_a_caption_is_none(folder, tmp_path):
    table = tmp_path / "out.csv"
    caption_folder(folder, table, Fake)
    table.write_bytes(table.read_bytes().replace(b"notes.txt,,", b"notes.txt,my notes,"))
    before = table.read_bytes()
    assert caption_folder(folder, table, Fake) == (0, 1) and table.read_bytes() == before


def test_the_exit_code_says_whether_problems_remain(folder, tmp_path, monkeypatch):
    from blip2_edu.app import cli

    monkeypatch.setattr(cli, "load_model", lambda name: Fake())
    command = ["caption", str(folder), "--csv", str(tmp_path / "out.csv")]
    assert cli.main(command) == cli.main(command) == 1
    (folder / "notes.txt").unlink()
    assert cli.main(command) == 1
    Image.new("RGB", (33, 9)).save(folder / "empty.jpg")
    assert cli.main(command) == cli.main(command) == 0


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
