"""What the notebooks define, for tests: functions and classes, without running the lessons."""

import ast
from pathlib import Path
from typing import Any

import nbformat

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("*.ipynb"))
SOLUTIONS = NOTEBOOKS / "solutions"


def code_cells(path: Path) -> list[str]:
    """The source of every code cell."""
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


def definitions(path: Path) -> dict[str, Any]:
    """Everything that a notebook imports or defines, by name; nothing else in it is executed.

    Where a name is defined several times the last one counts, as it would for the reader.
    """
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    nodes = [node for source in code_cells(path) for node in ast.parse(source).body]
    module = ast.Module([node for node in nodes if isinstance(node, kept)], type_ignores=[])
    names: dict[str, Any] = {"__name__": path.stem}
    exec(compile(module, str(path), "exec"), names)
    return names
