"""Training of both stages on one CPU, one GPU or many, through Hugging Face Accelerate.

Everything random in a step is drawn from (seed, step), so a run that was killed and resumed goes on
exactly as if it had never stopped, and nothing about random generators need be saved.
"""

import json
import math
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    is_tensorboard_available,
    send_to_device,
)
from torch import Tensor, nn
from tqdm.auto import tqdm

from blip2_edu.app.hardware import native_bfloat16
from blip2_edu.blip2 import Blip2
from blip2_edu.checkpoints.tensors import load_tensors, save_tensors
from blip2_edu.data.batches import Batch, Mixture, Source
from blip2_edu.data.examples import Examples
from blip2_edu.data.features import FeatureCache
from blip2_edu.errors import UserError
from blip2_edu.evaluation import retrieval, writing_scores
from blip2_edu.language import split_prefix
from blip2_edu.stage1 import OBJECTIVES, Blip2Stage1
from blip2_edu.text import Tokenizer


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message is one sentence for the user."""


@dataclass
class TrainingConfig:
    """How a run learns. `folder` receives `metrics.jsonl`, the last state and the best model."""

    folder: Path
    epochs: float = 10
    learning_rate: float = 1e-4  # of parameters that start pretrained
    learning_rate_new: float = 3e-4  # of parameters that start random
    weight_decay: float = 0.05
    warmup: float = 0.05  # share of all steps
    max_grad_norm: float = 1.0
    gradient_accumulation: int = 1
    evaluate_every: int = 200  # steps; a state is saved as often
    seed: int = 0
    tensorboard: bool = False


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to nothing."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def parameter_groups(model: nn.Module, pretrained: set[str], config: TrainingConfig) -> list[dict]:
    """Two learning rates, and weight decay on matrices only. Frozen parameters are in no group."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = config.learning_rate if name in pretrained else config.learning_rate_new
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def fit(
    model: nn.Module,
    batches: Source | Mixture,
    prepare: Callable[[Batch], dict],
    evaluate: Callable[[nn.Module], tuple[float, dict[str, float]]],
    pretrained: set[str],
    config: TrainingConfig,
    resume: bool = False,
) -> nn.Module:
    """Train `model`, whose forward returns losses by name, on their sum; returns it.

    batches     what to learn from
    prepare     what the model's forward is called with, from a batch
    evaluate    the score that decides which model is best, higher is better, and all metrics
    pretrained  names of the parameters that learn at the lower rate

    Raises TrainingError when the loss is not finite or there is nothing to resume.
    """
    if config.tensorboard and not is_tensorboard_available():
        raise TrainingError("TensorBoard is missing: run `python -m pip install tensorboard`.")
    accelerator = Accelerator(
        mixed_precision="bf16" if native_bfloat16(PartialState().device) else "no",
        log_with="tensorboard" if config.tensorboard else None,
        project_dir=config.folder,
        # A head whose objective is left out takes no part in the backward pass.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    rank, processes = accelerator.process_index, accelerator.num_processes
    steps = int(config.epochs * batches.steps_per_epoch(processes)) // config.gradient_accumulation
    if steps == 0:
        raise TrainingError("The data do not fill one step: use a smaller --batch-size.")
    for source in batches.sources if isinstance(batches, Mixture) else [batches]:
        if source.steps_per_epoch(processes) == 0:
            raise TrainingError(
                f"A source of {len(source.usable)} images does not fill a batch of "
                f"{source.batch_size}: use a smaller --batch-size or --questions-per-step."
            )
    optimizer = torch.optim.AdamW(
        parameter_groups(model, pretrained, config), betas=(0.9, 0.98), fused=True
    )
    state_file, start, best = config.folder / "state.safetensors", 0, -math.inf
    metrics_file = config.folder / "metrics.jsonl"
    model.to(accelerator.device)
    if resume and not config.folder.exists():
        raise TrainingError(f"There is no run in {config.folder} to resume.")
    if resume and state_file.exists():  # else it was killed before its first state
        start, best = load_state(state_file, model, optimizer)
    elif state_file.exists():
        raise TrainingError(
            f"{config.folder} holds a run already: add --resume, or name another folder."
        )
    if accelerator.is_main_process:
        config.folder.mkdir(parents=True, exist_ok=True)
        keep_metrics_before(metrics_file, start)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if config.tensorboard:
        accelerator.init_trackers("")

    def record(kind: str, step: int, values: dict[str, float]) -> None:
        if accelerator.is_main_process:
            with metrics_file.open("a") as file:
                file.write(json.dumps({"step": step, "kind": kind} | values) + "\n")
        if config.tensorboard:
            accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step)

    bar = tqdm(
        range(start, steps), initial=start, total=steps, disable=not accelerator.is_main_process
    )
    for step in bar:
        factor = learning_rate_factor(step, steps, max(1, int(config.warmup * steps)))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        wrapped.train()
        for part in range(config.gradient_accumulation):
            small_step = step * config.gradient_accumulation + part
            torch.manual_seed(hash((config.seed, small_step, rank)) % 2**63)
            batch = prepare(batches.batch(small_step, rank, processes))
            batch = send_to_device(batch, accelerator.device)
            last = part == config.gradient_accumulation - 1
            with accelerator.autocast(), nullcontext() if last else accelerator.no_sync(wrapped):
                losses = wrapped(**batch)
                loss = sum(losses.values()) / config.gradient_accumulation
                if not torch.isfinite(loss):
                    raise TrainingError(_not_finite(losses, step, state_file))
                accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
        if not torch.isfinite(norm):  # a step with it would make every parameter NaN
            raise TrainingError(_not_finite({"gradient": norm}, step, state_file))
        optimizer.step()
        optimizer.zero_grad()
        values = {name: value.item() for name, value in losses.items()}
        record("train", step, values)
        bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
        if (step + 1) % config.evaluate_every == 0 or step + 1 == steps:
            wrapped.eval()
            if accelerator.is_main_process:
                with torch.no_grad(), accelerator.autocast():
                    score, metrics = evaluate(model)
                record("evaluation", step, metrics)
                said = "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())
                bar.write(f"step {step + 1}: {said}")
                if score > best:
                    best = score
                    save_tensors(trainable_state(model), config.folder / "best.safetensors")
                save_state(state_file, model, optimizer, step + 1, best)
            accelerator.wait_for_everyone()
    return model


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that learn, by name: what a checkpoint holds."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, best: float
) -> None:
    """Everything a run needs to go on, in one file: parameters and AdamW's two moments."""
    parameters = trainable_state(model)
    tensors = {f"model.{name}": p for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for moment, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{moment}.{name}"] = value
    save_tensors(tensors, path, {"step": str(step), "best": repr(best)})


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Put back what `save_state` wrote; returns the step to go on with and the best score yet.

    Raises TrainingError if it is the state of another model.
    """
    tensors, metadata = load_tensors(path)
    parameters = trainable_state(model)
    saved = {name: x.shape for name, x in tensors.items() if name.startswith("model.")}
    if saved != {f"model.{name}": parameter.shape for name, parameter in parameters.items()}:
        raise TrainingError(f"{path} is of another model: resume with the options of its run.")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"model.{name}"])
        if f"optimizer.step.{name}" in tensors:  # not of a head whose objective is left out
            optimizer.state[parameter] = {
                moment: tensors[f"optimizer.{moment}.{name}"].to(parameter.device)
                for moment in ("step", "exp_avg", "exp_avg_sq")
            }
    return int(metadata["step"]), float(metadata["best"])


def keep_metrics_before(path: Path, step: int) -> None:
    """Drop the lines that a killed run wrote after its last saved state, the last perhaps half."""
    if path.exists():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line[-1] == "\n"]
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(line for line in whole if json.loads(line)["step"] < step))
        aside.replace(path)


def _not_finite(losses: dict[str, Tensor], step: int, state_file: Path) -> str:
    values = ", ".join(f"{name} {value.item()}" for name, value in losses.items())
    kept = f"the state in {state_file} is from before" if state_file.exists() else "no state yet"
    return f"Not a finite number at step {step} ({values}); {kept}: try a lower learning rate."


def train_stage1(
    model: Blip2Stage1,
    tokenizer: Tokenizer,
    batches: Source | Mixture,
    validation: tuple[Examples, FeatureCache],
    pretrained: set[str],
    config: TrainingConfig,
    objectives: Collection[str] = OBJECTIVES,
    itm_pairs: int | None = None,
    hard_negatives: bool = True,
    resume: bool = False,
) -> Blip2Stage1:
    """Stage 1 (paper, section 3.1); the best model is the one with the highest TR@1 + IR@1."""

    def prepare(batch: Batch) -> dict:
        text_ids, text_mask = tokenizer(batch.texts)
        return {
            "image_features": batch.image_features,
            "text_ids": text_ids,
            "text_mask": text_mask,
            "image_ids": batch.image_ids,
            "objectives": objectives,
            "itm_pairs": itm_pairs,
            "hard_negatives": hard_negatives,
        }

    def evaluate(model: Blip2Stage1) -> tuple[float, dict[str, float]]:
        scores = retrieval(model, tokenizer, *validation)
        return scores["TR@1"] + scores["IR@1"], scores

    return fit(model, batches, prepare, evaluate, pretrained, config, resume)


def train_stage2(
    model: Blip2,
    batches: Source | Mixture,
    validation: list[tuple[Examples, FeatureCache]],
    pretrained: set[str],
    config: TrainingConfig,
    resume: bool = False,
) -> Blip2:
    """Stage 2 (paper, section 3.2); the best model has the highest CIDEr + VQA accuracy.

    validation: data with captions, with questions or with both, already cut to a size that is
    quick to write texts for. A score that several of them have is their mean. An encoder-decoder
    learns from one caption an image in a step.
    """
    prompts = model.config.prompts

    def prepare(batch: Batch) -> dict:
        texts = batch.texts
        if batch.questions is not None:
            asked = [model.question_prompt(question) for question in batch.questions]
        else:
            asked = [prompts.caption] * len(batch.image_features)
            if model.language_model.is_encoder_decoder:  # it reads how a caption begins
                beginnings, texts = zip(*map(split_prefix, texts), strict=True)
                asked = [f"{prompt} {some}" for prompt, some in zip(asked, beginnings, strict=True)]
        return {
            "image_features": batch.image_features,
            "prompts": asked,
            "texts": list(texts),
        }

    def evaluate(model: Blip2) -> tuple[float, dict[str, float]]:
        each = [writing_scores(model, *some, num_beams=1) for some in validation]
        scores = {}
        for name in {name: None for some in each for name in some}:  # in the order they came
            values = [some[name] for some in each if name in some]
            scores[name] = sum(values) / len(values)
        return scores.get("CIDEr", 0.0) + scores.get("VQA", 0.0), scores

    return fit(model, batches, prepare, evaluate, pretrained, config, resume)
