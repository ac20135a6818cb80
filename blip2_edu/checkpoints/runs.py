"""A run of training on disk: its last state, its best model, its metrics."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from blip2_edu.checkpoints.tensors import load_tensors, save_tensors
from blip2_edu.errors import TrainingError

METRICS = "metrics.jsonl"  # a line a step, and a line an evaluation


def open_run(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mean: dict[str, Tensor],
    resume: bool,
    is_main_process: bool,
) -> tuple[int, float]:
    """Begin a run in `folder`, or go on with the one that is there: its step and best score.

    Raises TrainingError rather than mix two runs.
    """
    state_file, start, best = folder / "state.safetensors", 0, -math.inf
    if resume and not folder.exists():
        raise TrainingError(f"There is no run in {folder} to resume.")
    if resume and state_file.exists():  # else it was killed before its first state
        start, best = load_state(state_file, model, optimizer, mean)
    elif state_file.exists():
        raise TrainingError(f"{folder} holds a run already: add --resume, or name another folder.")
    if is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        keep_metrics_before(folder / METRICS, start)
    return start, best


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that learn, by name: what a checkpoint holds."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_best(folder: Path, model: nn.Module, score: float, best: float) -> float:
    """Save the model if it is the best yet; returns the best score."""
    if score > best:
        save_tensors(trainable_state(model), folder / "best.safetensors")
    return max(score, best)


def save_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mean: dict[str, Tensor],
    step: int,
    best: float,
) -> None:
    """All that a run needs to go on, in one file: parameters, their mean, AdamW's two moments."""
    parameters = trainable_state(model)
    tensors = {f"model.{name}": p for name, p in parameters.items()}
    tensors |= {f"mean.{name}": x for name, x in mean.items()}
    for name, parameter in parameters.items():
        for moment, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{moment}.{name}"] = value
    said = {"step": str(step), "best": repr(best)}
    save_tensors(tensors, folder / "state.safetensors", said)


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, mean: dict[str, Tensor]
) -> tuple[int, float]:
    """Put back what `save_state` wrote; returns the step to go on with and the best score yet.

    Raises TrainingError if it is the state of another model.
    """
    tensors, metadata = load_tensors(path)
    put_back(trainable_state(model), _part(tensors, "model"), path)
    put_back(mean, _part(tensors, "mean"), path)
    for name, parameter in trainable_state(model).items():
        if f"optimizer.step.{name}" in tensors:  # not of a head whose objective is left out
            optimizer.state[parameter] = {
                moment: tensors[f"optimizer.{moment}.{name}"].to(parameter.device)
                for moment in ("step", "exp_avg", "exp_avg_sq")
            }
    return int(metadata["step"]), float(metadata["best"])


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    start = f"{name}."
    return {k.removeprefix(start): x for k, x in tensors.items() if k.startswith(start)}


def keep_metrics_before(path: Path, step: int) -> None:
    """Drop the lines that a killed run wrote after its last saved state, the last perhaps half."""
    if path.exists():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line[-1] == "\n"]
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(line for line in whole if json.loads(line)["step"] < step))
        aside.replace(path)


def load_best(model: nn.Module, folder: Path) -> None:
    """Put the best model of a run into `model`. Raises TrainingError if it is another's."""
    path = folder / "best.safetensors"
    put_back(trainable_state(model), load_tensors(path)[0], path)


def put_back(own: Mapping[str, Tensor], saved: dict[str, Tensor], path: Path) -> None:
    """Copy what was read from `path` into tensors of the same names and shapes."""
    if {k: x.shape for k, x in saved.items()} != {k: x.shape for k, x in own.items()}:
        raise TrainingError(f"{path} is of another model: resume with the options of its run.")
    for name, x in own.items():
        x.data.copy_(saved[name])
