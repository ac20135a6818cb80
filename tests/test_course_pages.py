"""The course map and the instructor's notes say what the notebooks say."""

import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from helpers.lessons import LESSONS, NOTEBOOKS

MAP = (NOTEBOOKS / "README.md").read_text()
NOTES = (NOTEBOOKS / "INSTRUCTOR.md").read_text()

DIFFICULTIES = ("easy", "medium", "hard")
PLANS = (50, 90)  # minutes
PARTS = (*(f"{n} minutes" for n in PLANS), "Wrong answers you will hear", "Demo moment")


@dataclass(frozen=True)
class Lesson:
    """What a notebook says of itself."""

    file: str
    title: str
    minutes: int
    needs: set[int]
    headings: set[str]
    exercises: set[int]

    @property
    def number(self) -> str:
        return self.file[:2]


def lesson(file: str, cells: list[str]) -> Lesson:
    """Read a lesson's Markdown cells."""
    text, opening = "\n".join(cells), cells[0]
    needs = re.search(r"\*\*What it needs:\*\*(.*?)\*\*How long", opening, re.DOTALL)[1]
    return Lesson(
        file,
        re.match(r"# \d\d · (.*)", opening)[1],
        int(re.search(r"\*\*How long it takes:\*\*\s*(\d+) minutes", opening)[1]),
        lessons_in(needs),
        set(re.findall(r"^#+ (.*?)\s*$", text, re.MULTILINE)),
        {int(number) for number in re.findall(r"\*\*Exercise (\d+)\*\*", text)},
    )


def numbers_in(text: str, digits: str = r"\d+") -> set[int]:
    """The numbers that a text names: "4, and 9 to 11" names four."""
    ranges = re.findall(rf"\b({digits})\b(?:\s+to\s+({digits})\b)?", text)
    return {n for first, last in ranges for n in range(int(first), int(last or first) + 1)}


def lessons_in(text: str) -> set[int]:
    """The lessons that a text names, always by two digits."""
    return numbers_in(text, r"\d\d")


def exercises_in(text: str) -> set[int]:
    """The exercises that a text names: "exercises 1, 3 and 4" names three."""
    lists = re.findall(r"exercises?\s+(\d+(?:(?:,\s+|\s+and\s+|\s+to\s+)\d+)*)", text.lower())
    return set().union(*map(numbers_in, lists))


def begins(heading: str, title: str) -> bool:
    """Whether a title is a heading, or what stands in front of its colon."""
    return heading == title or heading.startswith(f"{title}:")


def rows_of(page: str) -> list[list[str]]:
    """The cells of every table row that begins with a lesson's number."""
    rows = re.findall(r"^\| (\d\d \|.*)\|\s*$", page, re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def sections_of(page: str) -> dict[str, list[tuple[str, str]]]:
    """By number of lesson, the title and the text of every section about it."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        if found := re.fullmatch(r"(\d\d) · (.*)", heading):
            sections.setdefault(found[1], []).append((found[2], text))
    return sections


def map_faults(page: str, one: Lesson, folder: Path) -> list[str]:
    """What is wrong with the map's row of a lesson."""
    rows = [row for row in rows_of(page) if row[0] == one.number]
    if len(rows) != 1 or len(rows[0]) != 6:
        return [f"{len(rows)} rows, or not six columns"]
    _, link, minutes, difficulty, needs, afterwards = rows[0]
    title, target = re.fullmatch(r"\[(.*)\]\((.*)\)", link).groups()
    needed = lessons_in(needs)
    wrong = {
        f"the link leads to {target}": target != one.file or not (folder / target).is_file(),
        f"the title is {title}": not begins(one.title, title),
        f"{minutes} minutes, not {one.minutes}": minutes != str(one.minutes),
        f"the difficulty is {difficulty}": difficulty not in DIFFICULTIES,
        f"needs {needs}, itself or a later one": not all(n < int(one.number) for n in needed),
        f"needs {needs}, the notebook says otherwise": needed != one.needs,
        "nothing can be done afterwards": not afterwards,
    }
    return [fault for fault, is_so in wrong.items() if is_so]


def notes_faults(page: str, one: Lesson) -> list[str]:
    """What is wrong with the instructor's section on a lesson."""
    sections = sections_of(page).get(one.number, [])
    if len(sections) != 1:
        return [f"{len(sections)} sections"]
    title, text = sections[0]
    found = [] if begins(one.title, title) else [f"the title is {title}"]

    marks = re.findall(r"^\*\*([^*]+):\*\*", text, re.MULTILINE)
    if marks != list(PARTS):
        return [*found, f"the bold parts are {', '.join(marks)}"]
    parts = re.split(r"^\*\*[^*]+:\*\*", text, flags=re.MULTILINE)[1:]
    for minutes, plan in zip(PLANS, parts, strict=False):
        total = sum(map(int, re.findall(r"\((\d+) min\)", plan)))
        if total != minutes:
            found.append(f"the plan for {minutes} minutes adds up to {total}")

    unknown = exercises_in(text) - one.exercises
    found += [f"there is no exercise {number}" for number in sorted(unknown)]
    for quoted in re.findall("“(.*?)”", text, re.DOTALL):
        if " ".join(quoted.split()) not in one.headings:
            found.append(f"there is no heading {quoted}")
    return found


def read(path: Path) -> Lesson:
    cells = nbformat.read(path, as_version=4).cells
    return lesson(path.name, [cell.source for cell in cells if cell.cell_type == "markdown"])


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_the_map_says_what_the_notebook_says(path):
    assert map_faults(MAP, read(path), NOTEBOOKS) == []


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_the_notes_are_about_what_is_in_the_notebook(path):
    assert notes_faults(NOTES, read(path)) == []


def test_no_page_speaks_of_a_lesson_that_is_not_there():
    numbers = [path.name[:2] for path in LESSONS]
    assert [row[0] for row in rows_of(MAP)] == numbers  # in order, too
    assert list(sections_of(NOTES)) == numbers


def test_the_benchmark_finds_its_place():
    assert re.search(
        r"^<!-- measured: begin -->\n(.*\n)*<!-- measured: end -->$", MAP, re.MULTILINE
    )


# A small lesson with its row and its section, and everything that can be wrong with them.

LESSON = lesson(
    "05_five.ipynb",
    [
        "# 05 · Five: a lesson\n**What it needs:** lesson 01, and 03 to 04.\n"
        "**How long it takes:** 40 minutes, 2 of them waiting.",
        "## Building\n### It stands: a wall\n**Exercise 1** *(easy, 2 minutes)*.",
        "**Exercise 2** *(hard, 9 minutes)*.",
    ],
)
ROW = "| 05 | [Five](05_five.ipynb) | 40 | easy | 01, 03, 04 | build |\n"
SECTION = """## Before the class
Open “A door”.

## 05 · Five

**50 minutes:**
- “Building” (30 min)
- exercises 1 and 2 (20 min)

**90 minutes:**
- “It stands:
  a wall” (80 min)
- Exercise 2 (10 min)

**Wrong answers you will hear:** *None.*

**Demo moment:** The wall.

## 06 · Six
See exercise 9.
"""

WRONG_ROWS = {
    "0 rows": ("| 05 |", "| 06 |"),
    "2 rows": (ROW, ROW + ROW),
    "columns": ("| build |", "|"),
    "leads to 04_five.ipynb": ("05_five", "04_five"),
    "title is Fi": ("Five", "Fi"),
    "30 minutes, not 40": ("40", "30"),
    "difficulty is mild": ("easy", "mild"),
    "itself or a later one": ("04", "05"),
    "needs 01, 03, the notebook": (", 04", ""),
    "nothing can be done": ("build", ""),
}
WRONG_SECTIONS = {
    "0 sections": ("## 05", "## 07"),
    "2 sections": ("## 06 · Six", "## 05 · Five"),
    "title is Fi": ("Five", "Fi"),
    "bold parts are 50 minutes, 90": ("**Demo moment:**", "Demo:"),
    "bold parts are 60 minutes": ("**50 m", "**60 m"),
    "50 minutes adds up to 49": ("(30 min)", "(29 min)"),
    "90 minutes adds up to 91": ("(80 min)", "(81 min)"),
    "50 minutes adds up to 30": ("(20 min)", "(20 minutes)"),
    "no exercise 3": ("1 and 2", "1 and 3"),
    "no exercise 4": ("Exercise 2", "Exercise 4"),
    "no heading A house": ("“Building”", "“A house”"),
    "no heading Build": ("“Building”", "“Build”"),
}


def test_what_a_lesson_says_of_itself():
    assert (LESSON.number, LESSON.title, LESSON.minutes) == ("05", "Five: a lesson", 40)
    assert LESSON.needs == {1, 3, 4}
    assert LESSON.headings == {"05 · Five: a lesson", "Building", "It stands: a wall"}
    assert LESSON.exercises == {1, 2}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("exercises 1, 3 and 4", {1, 3, 4}),
        ("Exercise\n2; 5 more", {2}),
        ("exercises 2 to 4", {2, 3, 4}),
        ("exercise 1 (5 min)", {1}),
        ("3 exercises", set()),
    ],
)
def test_exercises_named(text, expected):
    assert exercises_in(text) == expected


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / LESSON.file).touch()
    return tmp_path


def test_good_pages_have_no_faults(folder):
    assert map_faults(ROW, LESSON, folder) == []
    assert notes_faults(SECTION, LESSON) == []


@pytest.mark.parametrize("fault", WRONG_ROWS)
def test_a_wrong_row_is_found(fault, folder):
    found = map_faults(ROW.replace(*WRONG_ROWS[fault]), LESSON, folder)
    assert any(fault in one for one in found)


@pytest.mark.parametrize("fault", WRONG_SECTIONS)
def test_a_wrong_section_is_found(fault):
    found = notes_faults(SECTION.replace(*WRONG_SECTIONS[fault]), LESSON)
    assert any(fault in one for one in found)


def test_a_dead_link_is_found(tmp_path):
    assert map_faults(ROW, LESSON, tmp_path) == ["the link leads to 05_five.ipynb"]
