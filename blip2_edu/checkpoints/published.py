"""Published checkpoints: a folder, or a hub id, as the parts that transformers loads from it."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blip2_edu.errors import WeightsError
from blip2_edu.paths import CHECKPOINTS


def checkpoint_folder(name: str | Path) -> Path:
    """Return the folder of a checkpoint: "mini", a folder on this disk, or a hub id's download."""
    if str(name) == "mini":
        folder = CHECKPOINTS / "mini"
        if not folder.is_dir():
            raise WeightsError(
                f'The checkpoint "mini" is missing ({folder}): '
                "run `git checkout -- data/checkpoints/mini` in the course's folder."
            )
        return folder
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise WeightsError(f'"{name}" is a file: name the folder of the checkpoint instead.')
    return _download(str(name))


@contextmanager
def quiet_transformers() -> Generator[None]:
    """No progress bars and no advice on stdout while weights load."""
    from transformers.utils import logging as hub_logging  # slow to import

    was_on, level = hub_logging.is_progress_bar_enabled(), hub_logging.get_verbosity()
    hub_logging.disable_progress_bar()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        if was_on:
            hub_logging.enable_progress_bar()


@contextmanager
def loading(name: str | Path, kind: str) -> Generator[None]:
    """Around what transformers loads: quiet, and a failure becomes a WeightsError."""
    try:
        with quiet_transformers():
            yield
    except WeightsError:
        raise
    except Exception as error:  # transformers passes on what its many parts raise
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise WeightsError(f"{name} is no {kind} that transformers can load: {reason}") from error


def load_whole(network_class: Any, folder: Path):
    """A network of transformers, or WeightsError: it would fill missing tensors with noise.

    Only a pooler may be missing; nothing here uses one. What has another shape than config.json
    says is named; transformers would only point to a report that it logs.
    """
    network, found = network_class.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True
    )
    if other := sorted(found["mismatched_keys"]):
        name, stored, wanted = other[0]
        more = f" (and {len(other) - 1} more tensors do not fit)" if len(other) > 1 else ""
        raise WeightsError(
            f"{folder} holds {name} of size {tuple(stored)} where its config.json asks for "
            f"{tuple(wanted)}{more}: save model and configuration together."
        )
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WeightsError(f"{folder} lacks weights: {missing[0]}{more}.")
    return network


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    try:
        # Safetensors only: a pickle may run code, and most repositories hold both.
        wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except Exception as error:  # the hub's client passes on what its many parts raise
        reason = str(error).strip().split("\n")[0]
        raise WeightsError(
            f'There is no folder "{hub_id}" and the hub did not give it: {reason}'
        ) from error
