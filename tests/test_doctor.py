"""The doctor finds each planted fault, says it in one line, and counts it in its exit code."""

import hashlib
import importlib.metadata
import json
import platform
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blip2_edu.app import doctor, hardware
from blip2_edu.checkpoints import embedded, published


def sums(folder) -> str:
    """As `sha256sum` prints them, of what a checkpoint is made of."""
    files = [*sorted(folder.glob("*.json")), *sorted(folder.glob("*.safetensors"))]
    return "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files)


@pytest.fixture(autouse=True)
def mini(tmp_path, monkeypatch):
    """A whole checkpoint named mini in a course folder of its own; returns its folder."""
    folder = tmp_path / "data" / "checkpoints" / "mini"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"format": 1}))
    save_file({"queries": torch.zeros(32, 384)}, folder / "stage2.safetensors")
    (folder / "SHA256SUMS").write_text(sums(folder))
    monkeypatch.setattr(published, "CHECKPOINTS", tmp_path / "data" / "checkpoints")
    return folder


def examine(capsys) -> tuple[int, dict[str, str], list[str]]:
    """Run the doctor; return its exit code, the value of every name, and the names at fault."""
    code = doctor.show(doctor.report())
    lines = capsys.readouterr().out.splitlines()
    values = {line[9:29].strip(): line[29:] for line in lines}
    return code, values, [line[9:29].strip() for line in lines if line.startswith("PROBLEM")]


def missing_package(monkeypatch, name: str) -> None:
    entry = embedded.EMBEDDED[name]
    absent = {**vars(entry), "package": "no_such_package"}
    monkeypatch.setitem(embedded.EMBEDDED, name, embedded.EmbeddedFile(**absent))


def test_all_is_well(capsys):
    code, values, faults = examine(capsys)
    assert (code, faults) == (0, [])
    assert values["PyTorch"] == torch.__version__
    assert values["minilm-l6"] == "intact, 91 MB"
    assert values["mini"].startswith("intact")
    assert values["Runs here"] == ", ".join(doctor.NEEDS)


def test_missing_weights(capsys, monkeypatch):
    missing_package(monkeypatch, "smollm2-135m")
    code, values, faults = examine(capsys)
    assert (code, faults) == (1, ["smollm2-135m"])
    assert embedded.INSTALL in values["smollm2-135m"]
    assert values["Runs here"] == "train stage1"


def test_damaged_weights(capsys, monkeypatch):
    entry = embedded.EMBEDDED["minilm-l6"]
    expected = {**vars(entry), "sha256": "0" * 64}
    monkeypatch.setitem(embedded.EMBEDDED, "minilm-l6", embedded.EmbeddedFile(**expected))
    code, values, faults = examine(capsys)
    assert (code, faults) == (1, ["minilm-l6"])
    assert "damaged" in values["minilm-l6"] and "train stage1" not in values["Runs here"]


def test_every_fault_has_its_line(capsys, monkeypatch, mini):
    for name in embedded.EMBEDDED:
        missing_package(monkeypatch, name)
    shutil.rmtree(mini)
    code, values, faults = examine(capsys)
    assert (code, faults) == (1, [*embedded.EMBEDDED, "mini"])
    assert values["Runs here"] == "nothing yet"


def cut_short(folder):
    file = folder / "stage2.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def flipped(folder):
    file = folder / "stage2.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


FAULTS = {
    "cut short": cut_short,
    "one bit flipped": flipped,
    "no checksums": lambda folder: (folder / "SHA256SUMS").unlink(),
    "empty checksums": lambda folder: (folder / "SHA256SUMS").write_text(""),
    "checksums of another form": lambda folder: (folder / "SHA256SUMS").write_text("abc"),
    "no weights": lambda folder: (folder / "stage2.safetensors").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "broken config": lambda folder: (folder / "config.json").write_text("{"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_mini(capsys, mini, fault):
    FAULTS[fault](mini)
    code, values, faults = examine(capsys)
    assert (code, faults) == (1, ["mini"])
    assert "git checkout" in values["mini"]


@pytest.mark.parametrize("library, says", [("torch", "none"), ("jupyterlab", "none")])
def test_missing_library(capsys, monkeypatch, library, says):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == library:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor, "version", version)
    code, values, faults = examine(capsys)
    assert (code, faults) == (1, [library])
    assert "none is installed" in values[library] and "requirements.txt" in values[library]


def test_library_of_another_version(capsys, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(doctor, "version", lambda name: "2.0" if name == "torch" else real(name))
    code, values, faults = examine(capsys)
    assert (code, faults) == (1, ["torch"])
    assert "2.13.0 is needed and 2.0 is installed" in values["torch"]


def test_course_not_installed(capsys, monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", version)
    code, values, faults = examine(capsys)
    assert (code, faults) == (1, ["blip2_edu"])
    assert "pip install --no-deps -e ." in values["blip2_edu"]


def test_the_checksums_beside_mini_are_of_its_files():
    folder = Path(__file__).parents[1] / "data" / "checkpoints" / "mini"
    written = (folder / "SHA256SUMS").read_text()
    assert written == sums(folder) and written.count("\n") == 5


def test_hardware_table_names_no_machine():
    table = hardware.hardware_table()
    assert len({name for name, _ in table}) == len(table) and all(value for _, value in table)
    assert platform.node() not in " ".join(value for _, value in table)


@pytest.mark.parametrize(
    "able, native",
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True}, False)],
)
def test_native_bfloat16_on_a_cpu(monkeypatch, able, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert hardware.native_bfloat16("cpu") is native


@pytest.mark.parametrize("capability, native", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_native_bfloat16_on_a_gpu(monkeypatch, capability, native):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert hardware.native_bfloat16("cuda") is native
    assert hardware.native_bfloat16("mps") is False
