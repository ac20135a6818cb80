"""A whole folder of images into a table of captions, in batches, and on from where it stopped."""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from blip2_edu.blip2 import Blip2
from blip2_edu.checkpoints.tensors import written_aside
from blip2_edu.data.batches import batched
from blip2_edu.errors import UserError
from blip2_edu.images import open_each

HEADER = ["file", "caption", "problem"]
FIRST_LINE = ",".join(HEADER) + "\r\n"
BYTE_ORDER_MARK = "\ufeff"  # Excel writes it in front of UTF-8


class TableError(UserError, ValueError):
    """The table cannot be continued; the message is one sentence for the user."""


@dataclass
class Table:
    """What a table holds, and its style: other programs have delimiters and line ends of their own.

    rows      as they stand in it, the header first, each with its file; not one half written
    header    the columns, those of HEADER among them
    done      the files that have a caption, or whose row somebody emptied
    problems  the cells of each other file, by column
    """

    rows: list[tuple[str, str]]
    header: list[str] = field(default_factory=lambda: HEADER)
    delimiter: str = ","
    line_end: str = "\r\n"
    done: set[str] = field(default_factory=set)
    problems: dict[str, dict[str, str]] = field(default_factory=dict)

    def without(self, files: set[str]) -> str:
        """The text of the table without the rows of these files."""
        return "".join(row for name, row in self.rows if name not in files)


def caption_folder(
    folder: Path, table: Path, load: Callable[[], Blip2], batch_size: int = 16, num_beams: int = 5
) -> tuple[int, int]:
    """Write a row for each file of `folder` and below it: its caption, or why it has none.

    Rows are written batch by batch, and files that have a caption already are left out, so that a
    stopped run goes on when it is called again; a file with a problem is tried again, and its row
    replaced if the file has changed. Rows that somebody wrote stay as they are, and new ones are
    written as the table has them. Hidden files are no photographs. The table keeps names as they
    are, even those that are no valid UTF-8. Returns how many files were captioned, and how many
    have a problem now. Raises TableError.
    """
    known = read_table(table)
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part[0] == "." for part in path.relative_to(folder).parts)
        and path.resolve() != table.resolve()
    }
    failing = known.problems.keys() & files.keys()
    as_before = {x for x in failing if still(known.problems[x]["problem"], files[x])}
    missing = [name for name in files if name not in known.done | as_before]
    content = known.without(failing - as_before)
    if table.exists() and encode(content) != table.read_bytes():
        with written_aside(table.resolve()) as aside:
            aside.write_bytes(encode(content))
    model, captioned, failed = None, 0, len(as_before)
    with table.open("a", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(
            file, known.header, delimiter=known.delimiter, lineterminator=known.line_end
        )
        if file.tell() == 0:
            file.write(content)
        bar = tqdm(total=len(missing), desc="Captions", unit="file", disable=not missing)
        for names in batched(missing, batch_size):
            images, problems = open_each(files[name] for name in names)
            captions = {}
            if images:
                model = model or load()  # not before the table can be written
                texts = model.caption(list(images.values()), num_beams=num_beams)
                captions = dict(zip(images, texts, strict=True))
            images.clear()  # before those of the next batch are opened
            for place, name in enumerate(names):
                said = (one_line(x.get(place, "")) for x in (captions, problems))
                cells = dict(zip(HEADER, (name, *said), strict=True))
                writer.writerow(known.problems.get(name, {}) | cells)
            file.flush()
            captioned, failed = captioned + len(captions), failed + len(problems)
            bar.update(len(names))
        bar.close()
    return captioned, failed


def still(problem: str, file: Path) -> bool:
    """Does a file still have the problem of its row? What somebody else wrote there, it has."""
    found = one_line(open_each([file])[1].get(0, ""))
    if found.startswith(problem):
        return found == problem  # else it was only half written
    return one_line(file.name[-30:]) not in problem  # ours name the file, a long one by its end


def one_line(text: str) -> str:
    return " ".join(text.split())


def encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def read_table(path: Path) -> Table:
    """Read a table of captions, whoever has written to it since; a new one if there is none.

    Raises TableError if the file holds something else.
    """
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape") if path.exists() else ""
        return _parse(text)
    except (csv.Error, ValueError) as error:
        raise TableError(
            f"{path} holds something else than a table of captions in UTF-8 ({error}): "
            "name another file."
        ) from error


def _parse(text: str) -> Table:
    """Raises ValueError or csv.Error, with the reason, if this is no table of captions."""
    mark = BYTE_ORDER_MARK if text.startswith(BYTE_ORDER_MARK) else ""
    lines = list(io.StringIO(text.removeprefix(mark), newline=""))
    if FIRST_LINE.startswith("".join(lines)):  # nothing, or a header that was only half written
        return Table([("", mark + FIRST_LINE)])
    for delimiter in ",;\t":
        header = next(csv.reader(lines, delimiter=delimiter))
        if set(HEADER) <= set(header):
            break
    else:
        raise ValueError(f"its first row does not name {', '.join(HEADER)}")
    first = lines[0]
    line_end = first[len(first.rstrip("\r\n")) :] or "\r\n"
    table = Table([("", mark)], header, delimiter, line_end)
    reader, start = csv.reader(lines, delimiter=delimiter), 0
    for number, row in enumerate(reader, start=1):
        raw, start = "".join(lines[start : reader.line_num]), reader.line_num
        if start == len(lines):
            if _is_open(raw, delimiter):
                inside = csv.reader(raw.splitlines()[1:], delimiter=delimiter)
                if any(len(line) >= len(header) for line in inside):  # whole rows of somebody
                    raise ValueError(f"a quotation begins in row {number} and does not end")
                break
            if len(row) < len(header) and not raw.endswith(("\r", "\n")):
                break
            raw = raw.rstrip("\r\n") + line_end  # some editors leave the last one out
        if number == 1 or not any(cell.strip() for cell in row):
            table.rows.append(("", raw))
            continue
        # Excel may leave out empty cells at the end of a row.
        cells = dict(zip(header, row + [""] * len(header), strict=False))
        said = cells["caption"] or cells["problem"]
        if any(row[len(header) :]) or (len(row) < len(header) and not said):
            raise ValueError(f"row {number} has {len(row)} cells, and the first {len(header)}")
        table.rows.append((cells["file"], raw))
        if cells["problem"] and not cells["caption"]:
            table.problems[cells["file"]] = cells
        else:
            table.done.add(cells["file"])
    for name in table.done & table.problems.keys():
        del table.problems[name]
    return table


def _is_open(row: str, delimiter: str) -> bool:
    """Does a row end within a quotation, so that a further line would belong to it, too?"""
    return len(list(csv.reader([row, "further"], delimiter=delimiter))) == 1
