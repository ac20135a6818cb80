"""What is installed, what is damaged, and what will run here: `python -m blip2_edu doctor`."""

import hashlib
import importlib.util
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from blip2_edu.checkpoints.embedded import EMBEDDED, INSTALL, embedded_file
from blip2_edu.checkpoints.published import checkpoint_folder
from blip2_edu.errors import WeightsError

NEEDS = {
    "caption": {"efficientnet-lite2", "smollm2-135m", "mini"},
    "ask": {"efficientnet-lite2", "smollm2-135m", "mini"},
    "match": {"efficientnet-lite2", "smollm2-135m", "mini"},
    "train stage1": {"efficientnet-lite2", "minilm-l6"},
    "train stage2": {"efficientnet-lite2", "smollm2-135m"},
    "all lessons": {*EMBEDDED, "mini"},
}


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    value: str
    ok: bool = True


def report() -> list[Check]:
    """Look at everything once; a fault becomes a check that is not ok, never an exception."""
    libraries = _libraries()
    if not _all_ok(libraries):  # looking at the rest needs them
        return libraries + [_embedded(name) for name in EMBEDDED]
    stored = weights()
    present = {check.name for check in stored if check.ok}
    runs = ", ".join(use for use, needs in NEEDS.items() if needs <= present)
    return [*libraries, *_hardware(), *stored, Check("Runs here", runs or "nothing yet")]


def weights() -> list[Check]:
    """Look at the embedded models and at mini."""
    return [*(_embedded(name) for name in EMBEDDED), _mini()]


def show(checks: list[Check]) -> int:
    """Print them; return 1 if something is missing or damaged, else 0."""
    for check in checks:
        print(f"{'ok' if check.ok else 'PROBLEM':<9}{check.name:<20}{check.value}")
    return 0 if _all_ok(checks) else 1


def _all_ok(checks: list[Check]) -> bool:
    return all(check.ok for check in checks)


def _libraries() -> list[Check]:
    """The course itself, and one check for each library that is missing or does not fit."""
    try:
        course = Check("blip2_edu", version("blip2-edu"))
    except PackageNotFoundError:
        command = "python -m pip install --no-deps -e ."
        return [
            Check("blip2_edu", f"Not installed: run `{command}` in the course's folder.", False)
        ]
    wanted = [Requirement(line) for line in requires("blip2-edu") or []]
    checks = [
        _library(one) for one in wanted if not one.marker or one.marker.evaluate({"extra": "lab"})
    ]
    return [course, *(check for check in checks if not check.ok)]


def _library(wanted: Requirement) -> Check:
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        found = "none"
    if found != "none" and wanted.specifier.contains(found, prereleases=True):
        return Check(wanted.name, found)
    need = f"Version {wanted.specifier} is needed and {found} is installed"
    command = "python -m pip install -r requirements.txt"
    return Check(wanted.name, f"{need}: run `{command}` in the course's folder.", False)


def _hardware() -> list[Check]:
    from blip2_edu.app.hardware import hardware_table

    return [Check(name, value) for name, value in hardware_table()]


def _embedded(name: str) -> Check:
    try:
        file = embedded_file(name)
    except WeightsError as error:
        return Check(name, str(error), False)
    if name.startswith("efficientnet") and not importlib.util.find_spec(
        "efficientnet_lite_pytorch"
    ):
        return Check(name, f"The code of this network is not installed: run `{INSTALL}`.", False)
    return Check(name, f"intact, {file.stat().st_size / 1e6:.0f} MB")


def _mini() -> Check:
    """Every file of mini is compared with the checksums that stand beside them."""
    try:
        folder = checkpoint_folder("mini")
        lines = (folder / "SHA256SUMS").read_text().splitlines()
        sums = {name: wanted for wanted, name in map(str.split, lines)}
        if not sums:
            raise ValueError("SHA256SUMS is empty")
        for name, wanted in sums.items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
                    raise ValueError(f"{name} has changed")
    except WeightsError as error:
        return Check("mini", str(error), False)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        restore = "git checkout -- data/checkpoints/mini"
        return Check("mini", f"Damaged ({reason}): run `{restore}` in the course's folder.", False)
    return Check(
        "mini", f"intact, {sum((folder / name).stat().st_size for name in sums) / 1e6:.0f} MB"
    )
