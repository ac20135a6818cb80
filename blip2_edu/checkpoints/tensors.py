"""Tensors in and out of files: safetensors, never pickle, written whole or not at all."""

import glob
import json
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from blip2_edu.errors import WeightsError

State = dict[str, Tensor]


@contextmanager
def written_aside(path: Path) -> Generator[Path]:
    """Write to what is yielded; it is flushed to the disk and takes the place of `path`.

    So a reader sees the old file or the new, never half of one. Raises WeightsError if the disk is
    full or may not be written; the old file is then intact.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for abandoned in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
            abandoned.unlink()  # a killed run's; they would fill the disk one by one
        yield aside
        with aside.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            aside.unlink()
        raise WeightsError(f"{path} could not be written and is as it was: {error}") from error


def save_tensors(tensors: State, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; raises WeightsError."""
    with written_aside(path) as aside:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, aside, metadata)


def save_json(values: dict, path: Path) -> None:
    """Write a JSON file, whole or not at all; raises WeightsError."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_tensors(path: Path) -> tuple[State, dict[str, str]]:
    """Read all tensors and the metadata of a safetensors file; raises WeightsError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing.") from error
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from error


def load_strictly(module: nn.Module, state: State) -> None:
    """Put all of `state` into all of `module`, or raise WeightsError and leave it as it was."""
    wanted = module.state_dict()
    problems = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": [
            name for name in wanted if name in state and wanted[name].shape != state[name].shape
        ],
    }
    found = "; ".join(f"{kind}: {_first(names)}" for kind, names in problems.items() if names)
    if found:
        raise WeightsError(f"These weights do not fit this model ({found}).")
    module.load_state_dict(state)


def _first(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
