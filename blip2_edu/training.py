"""Training of both stages on one CPU, one GPU or many, through Hugging Face Accelerate.

Everything random in a step is drawn from (seed, step, rank), so a run that was killed and resumed
goes on exactly as if it had never stopped, and nothing about random generators need be saved.
"""

import json
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import TypeVar

import numpy as np
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
from blip2_edu.app.options import Stage1Training, TrainingConfig
from blip2_edu.blip2 import Blip2
from blip2_edu.checkpoints.runs import METRICS, open_run, save_best, save_state, trainable_state
from blip2_edu.data.batches import Batch, Joined, Mixture, Source
from blip2_edu.data.examples import Examples
from blip2_edu.data.features import FeatureCache
from blip2_edu.errors import TrainingError
from blip2_edu.evaluation import query_cosine, retrieval, writing_scores
from blip2_edu.language import split_prefix
from blip2_edu.stage1 import Blip2Stage1, parse_objectives

Model = TypeVar("Model", Blip2Stage1, Blip2)


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
    model: Model,
    batches: Source | Joined | Mixture,
    prepare: Callable[[Batch, int], dict],
    evaluate: Callable[[Model], tuple[float, dict[str, float]]],
    config: TrainingConfig,
    resume: bool = False,
) -> Model:
    """Train `model`, whose forward returns losses by name, on their sum.

    Returns it as it is after the last step; the best one is in the folder, see `load_best`.

    model       its `pretrained` names the parameters that learn at the lower rate
    batches     what to learn from
    prepare     what the model's forward is called with, from a batch and the number of its step
    evaluate    the score that decides which model is best, higher is better, and all metrics

    Raises TrainingError when the loss is not finite or there is nothing to resume.
    """
    accelerator = start_accelerator(config)
    steps = count_steps(batches, config, accelerator.num_processes)
    model.to(accelerator.device)
    groups = parameter_groups(model, model.pretrained, config)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    mean = Mean(model, config.average)
    start, best = open_run(
        config.folder, model, optimizer, mean.weights, resume, accelerator.is_main_process
    )
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    bar = tqdm(
        range(start, steps), initial=start, total=steps, disable=not accelerator.is_main_process
    )
    for step in bar:
        factor = learning_rate_factor(step, steps, max(1, int(config.warmup * steps)))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        losses = train_step(accelerator, wrapped, optimizer, batches, prepare, config, step)
        mean.follow(model, step)
        record(accelerator, config, "train", step, losses)
        bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
        if (step + 1) % config.evaluate_every == 0 or step + 1 == steps:
            if accelerator.is_main_process:
                with mean.instead(model):
                    with torch.no_grad(), accelerator.autocast():
                        score, metrics = evaluate(model.eval())
                    record(accelerator, config, "evaluation", step, metrics)
                    best = save_best(config.folder, model, score, best)
                save_state(config.folder, model, optimizer, mean.weights, step + 1, best)
                said = "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())
                bar.write(f"step {step + 1}: {said}")
            accelerator.wait_for_everyone()
    return model.eval()


class Mean:
    """The running mean of the weights that learn, often better than the last ones.

    weights  by name; empty with decay 0, when there is none
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        state = trainable_state(model) if decay else {}
        self.weights = {name: p.detach().clone() for name, p in state.items()}

    @torch.no_grad()
    def follow(self, model: nn.Module, step: int) -> None:
        """Move a little towards the weights of now; the first steps are forgotten sooner."""
        if self.weights:
            now, decay = trainable_state(model), min(self.decay, (1 + step) / (10 + step))
            pairs = [(mean, now[name]) for name, mean in self.weights.items()]
            torch._foreach_lerp_(*map(list, zip(*pairs, strict=True)), 1 - decay)

    @contextmanager
    def instead(self, model: nn.Module) -> Generator[None]:
        """Let the model have the mean for its weights, for a while."""
        now = trainable_state(model)
        last = {name: now[name].data for name in self.weights}
        for name, mean in self.weights.items():
            now[name].data = mean
        try:
            yield
        finally:
            for name, weights in last.items():
                now[name].data = weights


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """Devices, processes and precision, from what there is. Raises TrainingError."""
    if config.tensorboard and not is_tensorboard_available():
        raise TrainingError("TensorBoard is missing: run `python -m pip install tensorboard`.")
    accelerator = Accelerator(
        mixed_precision="bf16" if native_bfloat16(PartialState().device or "cpu") else "no",
        log_with="tensorboard" if config.tensorboard else None,
        project_dir=config.folder,
        # A head whose objective is left out takes no part in the backward pass.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if config.tensorboard:
        accelerator.init_trackers("")
    return accelerator


def count_steps(batches: Source | Joined | Mixture, config: TrainingConfig, processes: int) -> int:
    """Steps of the whole run. Raises TrainingError if the data do not fill one."""
    steps = int(config.epochs * batches.steps_per_epoch(processes)) // config.gradient_accumulation
    if steps == 0:
        raise TrainingError("The data do not fill one step: use a smaller --batch-size.")
    for source in batches.sources if isinstance(batches, Mixture) else [batches]:
        if source.steps_per_epoch(processes) == 0:
            raise TrainingError(
                f"A source of {source.images} images does not fill a batch of "
                f"{source.batch_size}: use a smaller --batch-size or --questions-per-step."
            )
    return steps


def train_step(
    accelerator: Accelerator,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Source | Joined | Mixture,
    prepare: Callable[[Batch, int], dict],
    config: TrainingConfig,
    step: int,
) -> dict[str, float]:
    """Learn from the batches of one step; returns the losses of the last of them."""
    rank, parts = accelerator.process_index, config.gradient_accumulation
    wrapped.train()
    for part in range(parts):
        number = step * parts + part
        torch.manual_seed(seed_of(config.seed, number, rank))
        batch = prepare(batches.batch(number, rank, accelerator.num_processes), step)
        batch = send_to_device(batch, accelerator.device)
        last = part == parts - 1
        with accelerator.autocast(), nullcontext() if last else accelerator.no_sync(wrapped):
            losses = wrapped(**batch)
            loss = sum(losses.values()) / parts
            if not torch.isfinite(loss):
                raise TrainingError(_not_finite(losses, step, config.folder))
            accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
    if not torch.isfinite(norm):  # a step with it would make every parameter NaN
        raise TrainingError(_not_finite({"gradient": norm}, step, config.folder))
    optimizer.step()
    optimizer.zero_grad()
    return {name: value.item() for name, value in losses.items()}


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, the same on every machine and in every Python."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def record(
    accelerator: Accelerator, config: TrainingConfig, kind: str, step: int, values: dict[str, float]
) -> None:
    """Add a line to the metrics; kind is train or evaluation."""
    if accelerator.is_main_process:
        with (config.folder / METRICS).open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind} | values) + "\n")
    if config.tensorboard:
        accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step)


def _not_finite(losses: dict[str, Tensor], step: int, folder: Path) -> str:
    values = ", ".join(f"{name} {value.item()}" for name, value in losses.items())
    state_file = folder / "state.safetensors"
    kept = f"the state in {state_file} is from before" if state_file.exists() else "no state yet"
    return f"Not a finite number at step {step} ({values}); {kept}: try a lower learning rate."


def train_stage1(
    model: Blip2Stage1,
    batches: Source | Joined | Mixture,
    validation: list[tuple[Examples, FeatureCache]],
    config: Stage1Training,
    resume: bool = False,
) -> Blip2Stage1:
    """Stage 1 (paper, section 3.2); the best model is the one with the highest TR@1 + IR@1.

    validation: data with captions; a score is the mean over them.
    """
    objectives = parse_objectives(config.objectives)

    def prepare(batch: Batch, step: int) -> dict:
        text_ids, text_mask = model.tokenizer(batch.texts)
        first: dict[str, int] = {}  # the same words of two images: neither is the other's negative
        image_ids = [
            first.setdefault(text, number)
            for text, number in zip(batch.texts, batch.image_ids.tolist(), strict=True)
        ]
        return {
            "image_features": batch.image_features,
            "text_ids": text_ids,
            "text_mask": text_mask,
            "image_ids": torch.tensor(image_ids),
            "objectives": objectives,
            "itm_pairs": config.itm_pairs,
            "itg_pairs": config.itg_pairs,
            "hard_negatives": step >= config.random_negatives,
            "spread": config.spread,
        }

    def evaluate(model: Blip2Stage1) -> tuple[float, dict[str, float]]:
        scores = mean_scores([retrieval(model, *held_out) for held_out in validation])
        cosine = fmean(query_cosine(model, features) for _, features in validation)
        return scores["TR@1"] + scores["IR@1"], scores | {"query cosine": cosine}

    return fit(model, batches, prepare, evaluate, config, resume)


def train_stage2(
    model: Blip2,
    batches: Source | Joined | Mixture,
    validation: list[tuple[Examples, FeatureCache]],
    config: TrainingConfig,
    resume: bool = False,
) -> Blip2:
    """Stage 2 (paper, section 3.3); the best model has the highest CIDEr + VQA accuracy.

    validation: data with captions, with questions or with both, already cut to a size that is
    quick to write texts for. A score that several of them have is their mean. An encoder-decoder
    learns from one caption an image in a step.
    """
    prompts = model.config.prompts

    def prepare(batch: Batch, step: int) -> dict:
        texts = batch.texts
        if batch.questions is not None:
            asked = [model.question_prompt(question) for question in batch.questions]
        else:
            asked = [prompts.caption] * len(batch.image_features)
            if model.language_model.is_encoder_decoder:  # it reads how a caption begins
                beginnings, texts = zip(*map(split_prefix, texts), strict=True)
                plain = map(model.language_model.without_control, beginnings)
                asked = [f"{prompts.caption} {beginning}" for beginning in plain]
        return {
            "image_features": batch.image_features,
            "prompts": asked,
            "texts": list(texts),
        }

    def evaluate(model: Blip2) -> tuple[float, dict[str, float]]:
        each = [writing_scores(model, *held_out, num_beams=1) for held_out in validation]
        scores = mean_scores(each)
        return scores.get("CIDEr", 0.0) + scores.get("VQA", 0.0), scores

    return fit(model, batches, prepare, evaluate, config, resume)


def mean_scores(each: list[dict[str, float]]) -> dict[str, float]:
    """Of scores by name, those of several data sets, the mean over the data sets that have them."""
    names = {name: None for scores in each for name in scores}  # in the order they came
    return {name: fmean(scores[name] for scores in each if name in scores) for name in names}
