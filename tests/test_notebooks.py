"""What every committed lesson must be, whether or not it runs: nbval sees to that it runs."""

import json
import re
from copy import deepcopy

import nbformat
import pytest
from helpers.lessons import LESSONS
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

MAX_BYTES = 1_500_000
MAX_LINES = 15  # of a code cell
OPENING = ("What you will be able to do", "What it needs", "How long it takes")
ABSOLUTE = re.compile(r"(?<![\w.:/])/(home|root|work|Users|tmp|usr|opt|var|mnt)/|\b[A-Z]:\\\\")
REMOTE_FIGURE = re.compile(r"!\[[^\]]*\]\(\s*https?:|<img[^>]+src=.https?:")


def text_of(output: NotebookNode) -> str:
    """What can be read of an output; pictures are left out."""
    data = output.get("data", {})
    return output.get("text", "") + "".join(
        json.dumps(value) for kind, value in data.items() if not kind.startswith("image/")
    )


def faults(notebook: NotebookNode, name: str) -> list[str]:
    """Everything that is wrong with a lesson; nothing, if it may be committed."""
    found, code = [], [cell for cell in notebook.cells if cell.cell_type == "code"]
    first = notebook.cells[0].source
    for part in (f"# {name[:2]} · ", *OPENING):
        if part not in first:
            found.append(f"the first cell lacks {part!r}")
    if not re.search(r"\d+ (minutes|hours)", first):
        found.append("the first cell does not say how many minutes")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("not run from top to bottom in a fresh kernel")
    if not any(cell.outputs for cell in code):
        found.append("no outputs")
    if notebook.metadata.get("widgets"):
        found.append("widget state is stored")
    for i, cell in enumerate(notebook.cells):
        outputs = cell.get("outputs", [])
        if cell.cell_type == "code" and len(cell.source.splitlines()) > MAX_LINES:
            found.append(f"cell {i} is longer than {MAX_LINES} lines")
        if any(ABSOLUTE.search(text) for text in (cell.source, *map(text_of, outputs))):
            found.append(f"cell {i} holds an absolute path")
        if cell.cell_type == "markdown" and REMOTE_FIGURE.search(cell.source):
            found.append(f"cell {i} shows a remote figure")
        if cell.source.count("<details>") != cell.source.count("</details>"):
            found.append(f"cell {i} leaves <details> open")
        for output in outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"cell {i} ends in an error or a warning")
            widget = output.get("data", {}).get("text/plain", "")
            if "\r" in output.get("text", "") or "%|" in widget:
                found.append(f"cell {i} holds an unfinished progress bar")
            for kind in output.get("data", {}):
                if kind.startswith("image/") and not output.metadata.get(kind, {}).get("alt"):
                    found.append(f"cell {i} shows a picture without alt text")
    return found


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_a_lesson_may_be_committed(path):
    assert path.stat().st_size <= MAX_BYTES
    assert re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", path.name)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not faults(notebook, path.name)


def good() -> NotebookNode:
    picture = new_output(
        "display_data", {"image/jpeg": "/9j/"}, metadata={"image/jpeg": {"alt": "a dog"}}
    )
    return new_notebook(
        cells=[
            new_markdown_cell(
                "# 07 · Seven\n**What you will be able to do**: seven.\n"
                "**What it needs:** nothing. **How long it takes:** 5 minutes."
            ),
            new_code_cell("1 + 1", execution_count=1, outputs=[picture]),
            new_markdown_cell("[paper](https://arxiv.org/abs/2301.12597) <details>a</details>"),
            new_code_cell("print('images/dog.jpg')", execution_count=2),
        ]
    )


def stream(name: str, text: str) -> list[NotebookNode]:
    return [new_output("stream", name=name, text=text)]


PLANTED = {
    "'# 07 · '": lambda cells: cells[0].update(source=cells[0].source.replace("07", "08")),
    "How long": lambda cells: cells[0].update(source="# 07 · Seven: 5 minutes"),
    "how many minutes": lambda cells: cells[0].update(source="How long it takes: a while"),
    "top to bottom": lambda cells: cells[3].update(execution_count=5),
    "no outputs": lambda cells: cells[1].update(outputs=[]),
    "longer than": lambda cells: cells[1].update(source="1\n" * (MAX_LINES + 1)),
    "absolute path": lambda cells: cells[3].update(outputs=stream("stdout", "/home/ada/dog.jpg")),
    "remote figure": lambda cells: cells[2].update(source="![a](https://example.org/a.png)"),
    "<details> open": lambda cells: cells[2].update(source="<details>"),
    "a warning": lambda cells: cells[3].update(outputs=stream("stderr", "beware")),
    "unfinished progress bar": lambda cells: cells[3].update(
        outputs=stream("stdout", "\r 0%|  | 0/2") + stream("stdout", "\r100%|##| 2/2\n")
    ),
    "holds an unfinished": lambda cells: cells[3].update(
        outputs=[new_output("display_data", {"text/plain": "Features: 0%|  | 0/2"})]
    ),
    "an error": lambda cells: cells[3].update(outputs=[new_output("error")]),
    "alt text": lambda cells: cells[1].outputs[0].update(metadata={}),
}


def test_a_good_lesson_has_no_faults():
    assert faults(good(), "07_seven.ipynb") == []


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault):
    notebook = deepcopy(good())
    PLANTED[fault](notebook.cells)
    assert any(fault in found for found in faults(notebook, "07_seven.ipynb"))


@pytest.mark.parametrize("path", ["/root/x", "(/home/ada/x)", "'/Users/ada'", "C:\\\\Users"])
def test_absolute_paths(path):
    assert ABSOLUTE.search(path)


@pytest.mark.parametrize("text", ["images/home/x", "https://a.org/home/x", "../work/x", "and/or"])
def test_not_absolute_paths(text):
    assert not ABSOLUTE.search(text)
