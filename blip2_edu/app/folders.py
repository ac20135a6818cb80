"""A whole folder of images into a table of captions, in batches, and on from where it stopped."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm

from blip2_edu.blip2 import Blip2
from blip2_edu.data.batches import batched
from blip2_edu.errors import UserError
from blip2_edu.images import open_each

HEADER = ["file", "caption", "problem"]
FIRST_LINE = (",".join(HEADER) + "\r\n").encode()


class TableError(UserError, ValueError):
    """The table cannot be continued; the message is one sentence for the user."""


def caption_folder(
    folder: Path, table: Path, load: Callable[[], Blip2], batch_size: int = 16, num_beams: int = 5
) -> tuple[int, int]:
    """Write a row for each file of `folder` and below it: its caption, or why it has none.

    Rows are written batch by batch, and files that have one already are left out, so that a stopped
    run goes on when it is called again. Hidden files are no photographs. The table keeps names as
    they are, even those that are no valid UTF-8. Returns how many files were captioned and how many
    could not be. Raises TableError.
    """
    done = rows_in(table)
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part[0] == "." for part in path.relative_to(folder).parts)
        and path.resolve() != table.resolve()
    ]
    missing = [path for path in files if path.relative_to(folder).as_posix() not in done]
    captioned = failed = 0
    with table.open("a", newline="", encoding="utf-8", errors="surrogateescape") as file:
        model = load() if missing else None  # not before the table can be written
        writer = csv.writer(file)
        if table.stat().st_size == 0:
            writer.writerow(HEADER)
        bar = tqdm(total=len(missing), desc="Captions", unit="file", disable=not missing)
        for paths in batched(missing, batch_size):
            images, problems = open_each(paths)
            captions = {}
            if model and images:
                texts = model.caption(list(images.values()), num_beams=num_beams)
                captions = dict(zip(images, texts, strict=True))
            images.clear()  # before those of the next batch are opened
            for place, path in enumerate(paths):
                name = path.relative_to(folder).as_posix()
                said = (" ".join(x.get(place, "").split()) for x in (captions, problems))
                writer.writerow([name, *said])
            file.flush()
            captioned, failed = captioned + len(captions), failed + len(problems)
            bar.update(len(paths))
        bar.close()
    return captioned, failed


def rows_in(table: Path) -> set[str]:
    """The files that have a row already; a last row that was only half written is cut off.

    Raises TableError if the file holds something else.
    """
    if not table.exists() or table.stat().st_size == 0:
        return set()
    data = table.read_bytes()
    whole = data[: data.rfind(b"\r\n") + 2] if b"\r\n" in data else b""
    text = whole.decode("utf-8", "surrogateescape")
    try:
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error:
        rows = []
    if not whole and FIRST_LINE.startswith(data):
        rows = [HEADER]
    if not rows or rows[0] != HEADER or any(len(row) != len(HEADER) for row in rows):
        raise TableError(f"{table} holds something else than captions: name another file.")
    if whole != data:
        with table.open("rb+") as file:
            file.truncate(len(whole))
    return {row[0] for row in rows[1:]}
