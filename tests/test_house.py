"""The order of the house: what may import what, and that the README leads to every room."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "blip2_edu"
WINGS = ("data", "checkpoints", "app", "exercises")


def modules() -> dict[str, Path]:
    """Every module of the package by name, the package itself and its wings among them."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(source: str, names: set[str], anywhere: bool = True) -> set[str]:
    """What of `names` a module imports, within functions too; not what only a type checker reads.

    `import_module` in the package's own front door is not seen: it is there to break the chain.
    """
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names} & names
            found |= parts or {node.module} & names
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & names
        todo += ast.iter_child_nodes(node)
    return found


def test_the_imports_form_no_circle():
    files = modules()
    graph = {name: imports(file.read_text(), set(files)) for name, file in files.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert len(order) == len(files) and order.index("blip2_edu.errors") < order.index(
        "blip2_edu.blip2"
    )


def test_a_circle_hidden_in_a_function_would_be_found():
    names = {"blip2_edu.a", "blip2_edu.b"}
    hidden = "def f():\n    from blip2_edu.b import g\n"
    assert imports(hidden, names) == {"blip2_edu.b"}
    assert imports("from blip2_edu import a\n", names) == {"blip2_edu.a"}
    assert imports("if TYPE_CHECKING:\n    from blip2_edu.b import g\n", names) == set()


def test_every_wing_is_installed():
    packages = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    assert {"blip2_edu", *(f"blip2_edu.{wing}" for wing in WINGS)} == {
        name.strip(' "\n') for name in packages.split(",") if name.strip()
    }
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == {*WINGS}


def readme_files() -> list[str]:
    """The files that the README's tables name, in their order."""
    readme = (ROOT / "README.md").read_text()
    tables = readme[readme.index("## The house") : readme.index("## Without make")]
    rows = [line for line in tables.splitlines() if line.startswith("|")]
    return re.findall(r"`((?:\w+/)?\w+\.(?:py|ipynb))`", "\n".join(rows))


def test_a_file_imports_only_what_the_readme_has_above_it():
    order = [Path(name).stem for name in readme_files() if "/" not in name]
    names = {f"blip2_edu.{stem}" for stem in order if stem != "__main__"}
    for place, stem in enumerate(order):
        above = {f"blip2_edu.{other}" for other in order[:place]}
        found = imports((PACKAGE / f"{stem}.py").read_text(), names)
        assert found <= above, f"{stem} imports {found - above}"


def test_the_readme_names_every_file_and_no_other():
    named = set(readme_files())
    present = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" and path.parent.name != "exercises"
    }
    assert {name for name in named if name.endswith(".py")} == present


@pytest.mark.parametrize("name", ["Blip2", "QFormer", "QFormerConfig", "demo"])
def test_what_everybody_tries_first_works(name):
    script = f"from blip2_edu import {name}; print({name}.__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == name, done.stderr


def test_importing_the_package_alone_is_quick():
    script = (
        "import sys, blip2_edu; print({'torch', 'numpy', 'PIL', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
    with pytest.raises(ImportError, match="no_such_thing"):
        exec("from blip2_edu import no_such_thing")
