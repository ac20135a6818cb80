"""Training that can be killed at any moment, stops on nonsense, and moves what it should move."""

import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import small_models, tiny
from torch import Tensor, nn

from blip2_edu.checkpoints.runs import keep_metrics_before
from blip2_edu.checkpoints.tensors import load_tensors
from blip2_edu.data.batches import Mixture, Source, join
from blip2_edu.data.examples import DataError
from blip2_edu.errors import TrainingError
from blip2_edu.stage1 import Blip2Stage1
from blip2_edu.training import (
    Mean,
    Stage1Training,
    TrainingConfig,
    fit,
    learning_rate_factor,
    parameter_groups,
    train_stage1,
    train_stage2,
)

os.environ["ACCELERATE_USE_CPU"] = "true"  # where runs are the same bit for bit


def metrics(folder: Path, kind: str | None = None) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


# A model of one matrix, for what concerns the loop alone -----------------------------------------


class Line(nn.Module):
    """Fits y = Wx + b; `frozen` does not learn."""

    pretrained = frozenset()

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 3))
        self.b = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: Tensor, y: Tensor, odd: Tensor) -> dict[str, Tensor]:
        losses = {"square": (x @ self.w.T + self.b - y).square().mean()}
        return losses | {"odd": odd * self.w.sum()} if odd else losses


class Points:
    """Batches of points; `odd` gives the loss of that step another addend."""

    def __init__(self, odd: dict[int, float] | None = None, size: int = 4):
        self.odd, self.size = odd or {}, size

    def steps_per_epoch(self, processes: int) -> int:
        return 5

    def batch(self, step: int, rank: int, processes: int) -> dict:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(self.size, 3, generator=generator)
        y = x @ torch.tensor([[1.0, 2, 3], [4, 5, 6]]).T
        return {"x": x, "y": y, "odd": torch.tensor(self.odd.get(step, 0.0))}


def config(folder: Path, **settings) -> TrainingConfig:
    return TrainingConfig(folder, **{"epochs": 4, "evaluate_every": 2} | settings)


def fit_line(folder: Path, batches=None, resume: bool = False, **settings) -> nn.Module:
    def evaluate(model: nn.Module) -> tuple[float, dict[str, float]]:
        score = -(model.w - 1).square().sum().item()
        return score, {"score": score}

    return fit(
        Line(),
        batches or Points(),
        lambda batch, step: batch,
        evaluate,
        config(folder, **settings),
        resume,
    )


def test_every_step_has_a_line_and_every_evaluation(tmp_path):
    fit_line(tmp_path)
    assert [line["step"] for line in metrics(tmp_path, "train")] == list(range(20))
    assert [line["step"] for line in metrics(tmp_path, "evaluation")] == list(range(1, 20, 2))


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit_line(tmp_path, tensorboard=True)
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    shown = EventAccumulator(str(events)).Reload()
    for tag, kind, name in (
        ("train/square", "train", "square"),
        ("evaluation/score", "evaluation", "score"),
    ):
        seen = [(event.step, event.value) for event in shown.Scalars(tag)]
        written = [(line["step"], line[name]) for line in metrics(tmp_path, kind)]
        assert [step for step, _ in seen] == [step for step, _ in written]
        assert [value for _, value in seen] == pytest.approx([value for _, value in written])


def test_without_tensorboard_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("blip2_edu.training.is_tensorboard_available", lambda: False)
    with pytest.raises(TrainingError, match="TensorBoard is missing: run `python -m pip"):
        fit_line(tmp_path, tensorboard=True)


BFLOAT16 = """
import sys
from pathlib import Path
from accelerate.state import AcceleratorState
from blip2_edu import training
from helpers import tiny
training.native_bfloat16 = lambda device: True
tiny.run_stage1(Path(sys.argv[1]) / "run", epochs=1)
print(AcceleratorState().mixed_precision)
"""


def test_a_device_with_bfloat16_is_used_so(tmp_path):
    """In a process of its own: Accelerate settles the precision once and for all."""
    command = [sys.executable, "-c", BFLOAT16, str(tmp_path)]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("bf16"), done.stderr[-2000:]


def test_the_best_model_is_kept(tmp_path):
    fit_line(tmp_path, learning_rate_new=0.3, epochs=20)
    scores = [line["score"] for line in metrics(tmp_path, "evaluation")]
    assert max(scores) > scores[-1]  # the run passes by the point that `evaluate` likes best
    best, _ = load_tensors(tmp_path / "best.safetensors")
    assert -(best["w"] - 1).square().sum().item() == pytest.approx(max(scores))
    assert set(best) == {"w", "b"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_state(tmp_path, value):
    with pytest.raises(TrainingError, match="at step 7 .*odd .*state.safetensors is from before"):
        fit_line(tmp_path / "spoilt", Points(odd={7: value}))
    fit_line(tmp_path / "whole")
    spoilt, stopped = load_tensors(tmp_path / "spoilt" / "state.safetensors")
    assert stopped["step"] == "6" and all(x.isfinite().all() for x in spoilt.values())
    resumed = fit_line(tmp_path / "spoilt", resume=True)  # with sound data it can go on
    assert metrics(tmp_path / "spoilt") == metrics(tmp_path / "whole")
    whole, _ = load_tensors(tmp_path / "whole" / "state.safetensors")
    assert torch.equal(resumed.w, whole["model.w"])


def test_a_gradient_that_is_no_number_does_not_reach_the_state(tmp_path, monkeypatch):
    """The loss is 0, its gradient 0 / 0; step 7 would be saved right after it."""
    forward = Line.forward

    def with_odd_gradient(self, x, y, odd):
        losses = forward(self, x, y, torch.tensor(0.0))
        return losses | {"root": (self.w.sum() * 0).sqrt()} if odd else losses

    monkeypatch.setattr(Line, "forward", with_odd_gradient)
    with pytest.raises(TrainingError, match="at step 7 .*gradient"):
        fit_line(tmp_path, Points(odd={7: 1.0}))
    tensors, metadata = load_tensors(tmp_path / "state.safetensors")
    assert metadata["step"] == "6" and all(x.isfinite().all() for x in tensors.values())


def test_no_run_is_overwritten_and_none_is_resumed_from_nowhere(tmp_path):
    fit_line(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(TrainingError, match="holds a run already: add --resume"):
        fit_line(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    with pytest.raises(TrainingError, match="no run in .* to resume"):
        fit_line(tmp_path / "mistyped", resume=True)
    assert not (tmp_path / "mistyped").exists()


def test_a_finished_run_resumes_to_itself(tmp_path):
    model = fit_line(tmp_path)
    before = metrics(tmp_path)
    assert torch.equal(fit_line(tmp_path, resume=True).w, model.w)
    assert metrics(tmp_path) == before


def test_a_run_killed_before_its_first_state_starts_anew(tmp_path):
    fit_line(tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "metrics.jsonl").write_text('{"step": 0, "kind": "train"}\n{"step": 1')
    for resume in (True, False):
        fit_line(tmp_path / "killed", resume=resume)
        assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
        (tmp_path / "killed" / "state.safetensors").unlink()


def test_half_a_line_of_metrics_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    keep_metrics_before(file, 2)
    assert file.read_text() == '{"step": 0}\n{"step": 1}\n'
    keep_metrics_before(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists()


def test_the_state_of_another_model_is_refused(tmp_path, monkeypatch):
    fit_line(tmp_path)
    original = Line.__init__

    def larger(self):
        original(self)
        self.b = nn.Parameter(torch.zeros(2, 2))

    monkeypatch.setattr(Line, "__init__", larger)
    with pytest.raises(TrainingError, match="is of another model"):
        fit_line(tmp_path, resume=True)


@pytest.mark.parametrize("settings", [{"epochs": 0.1}, {"gradient_accumulation": 30}])
def test_too_little_for_one_step(tmp_path, settings):
    with pytest.raises(TrainingError, match="do not fill one step"):
        fit_line(tmp_path, **settings)


def test_gradient_accumulation_equals_a_larger_batch(tmp_path):
    class Halves(Points):
        def batch(self, step, rank, processes):
            whole = super().batch(step // 2, rank, processes)
            return whole | {name: whole[name].chunk(2)[step % 2] for name in "xy"}

    parts = fit_line(tmp_path / "parts", Halves(size=8), gradient_accumulation=2, epochs=8)
    whole = fit_line(tmp_path / "whole", Points(size=8))
    torch.testing.assert_close(parts.w, whole.w, atol=1e-6, rtol=1e-5)
    assert not torch.equal(whole.w, torch.zeros(2, 3))


def test_gradients_are_clipped(tmp_path, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def watch(self, *arguments, **settings):
        seen.append(sum(p.grad.square().sum() for g in self.param_groups for p in g["params"]))
        return step(self, *arguments, **settings)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    fit_line(tmp_path, Points(odd={3: 1e6}), max_grad_norm=0.5)
    assert len(seen) == 20 and max(seen) == pytest.approx(0.25, rel=1e-3)


def test_frozen_parameters_stay(tmp_path):
    model = fit_line(tmp_path)
    assert torch.equal(model.frozen, torch.ones(2))
    assert not any("frozen" in name for name in load_tensors(tmp_path / "state.safetensors")[0])


# Schedule and parameter groups -------------------------------------------------------------------


@pytest.mark.parametrize(
    "step, factor",
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (35, 0.8535534), (60, 0.5), (85, 0.1464466)],
)
def test_warm_up_and_cosine(step, factor):
    assert learning_rate_factor(step, steps=110, warmup=10) == pytest.approx(factor)
    assert 0 < learning_rate_factor(109, steps=110, warmup=10) < 0.001


def test_weight_decay_on_matrices_and_two_rates(tmp_path):
    model = tiny.stage1()
    model.itm_head.requires_grad_(False)
    pretrained = {"qformer.layers.0.self_attention.attention.query.weight", "qformer.norm.bias"}
    groups = parameter_groups(model, pretrained, config(tmp_path))
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in groups:
        for p in group["params"]:
            assert names[id(p)] not in found
            found[names[id(p)]] = (group["lr"], group["weight_decay"])
    assert set(found) == {n for n in names.values() if not n.startswith("itm_head")}
    for name, (rate, decay) in found.items():
        assert rate == (1e-4 if name in pretrained else 3e-4), name
        assert decay == (0.0 if name.endswith(("bias", "norm.weight", "temperature")) else 0.05)


# Batches -----------------------------------------------------------------------------------------


def source(images: int = 10, batch_size: int = 4, **settings) -> Source:
    return Source(tiny.captioned(images), tiny.random_features(images, 2), batch_size, **settings)


def test_an_epoch_shows_each_image_once_with_its_own_text_and_features():
    batches = source(12)
    assert batches.steps_per_epoch(1) == 3
    orders = []
    for epoch in range(2):
        seen = [batches.batch(3 * epoch + step, 0, 1) for step in range(3)]
        ids = torch.cat([batch.image_ids for batch in seen]).tolist()
        assert sorted(ids) == list(range(12))
        orders.append(ids)
        for batch in seen:
            for row, image, text in zip(
                batch.image_features, batch.image_ids, batch.texts, strict=True
            ):
                assert text in batches.examples.captions[image]
                views = [view[image] for view in batches.features.views]
                assert any(torch.equal(row, torch.from_numpy(view).float()) for view in views)
    assert orders[0] != orders[1]


def test_processes_share_an_epoch():
    batches = source(16)
    ids = [batches.batch(step, rank, 2).image_ids for step in range(2) for rank in range(2)]
    assert batches.steps_per_epoch(2) == 2
    assert sorted(torch.cat(ids).tolist()) == list(range(16))


def test_several_texts_an_image_come_image_by_image():
    batches = source(8, texts_per_image=2)
    batch = batches.batch(0, 0, 1)
    for i, image in enumerate(batch.image_ids):
        texts = batch.texts[2 * i : 2 * i + 2]
        assert sorted(texts) == sorted(batches.examples.captions[image])
    assert len(source(8, texts_per_image=5).batch(0, 0, 1).texts) == 20  # of two captions


def test_images_without_texts_are_left_out():
    batches = source(10, batch_size=3)
    for i in (0, 4, 5, 9):
        batches.examples.captions[i] = []
    batches = replace(batches)
    ids = torch.cat([batches.batch(step, 0, 1).image_ids for step in range(2)])
    assert sorted(ids.tolist()) == [1, 2, 3, 6, 7, 8]


def test_questions_come_with_their_answers():
    examples = tiny.captioned(4)
    examples.questions = [[{"question": f"who is {i}?", "answer": f"{i}"}] for i in range(4)]
    batch = Source(examples, tiny.random_features(4), 4, ask=True).batch(0, 0, 1)
    assert [f"who is {image}?" for image in batch.image_ids] == batch.questions
    assert [str(int(image)) for image in batch.image_ids] == batch.texts


def test_a_mixture_holds_an_epoch_of_the_first_and_a_share_of_the_others():
    mixture = Mixture([source(8, 2), source(6, 3, seed=1)], share=0.25)
    assert mixture.steps_per_epoch(1) == 5
    others = []
    for epoch in range(4):
        batches = [mixture.batch(5 * epoch + step, 0, 1) for step in range(5)]
        ids = [b.image_ids for b in batches if len(b.image_ids) == 2]
        assert sorted(torch.cat(ids).tolist()) == list(range(8))
        others += [b.image_ids for b in batches if len(b.image_ids) == 3]
    assert len(others) == 4  # one an epoch, so two pass through all six images
    for two in (others[:2], others[2:]):
        assert sorted(torch.cat(two).tolist()) == list(range(6))


def test_a_joined_batch_has_images_of_each_source_in_proportion():
    joined = join([source(20, 1), source(10, 1, seed=1)], [1.0, 4.0], batch_size=6)
    assert [part.batch_size for part in joined.sources] == [2, 4]
    assert joined.steps_per_epoch(1) == 5
    batches = [joined.batch(step, 0, 1) for step in range(10)]
    for step, batch in enumerate(batches):
        parts = [part.batch(step, 0, 1) for part in joined.sources]
        ids = parts[0].image_ids.tolist() + (parts[1].image_ids + 20).tolist()
        assert sorted(batch.image_ids.tolist()) == sorted(ids)
        for image, text, features in zip(
            batch.image_ids.tolist(), batch.texts, batch.image_features, strict=True
        ):
            place = ids.index(image)
            own, place = (parts[0], place) if place < 2 else (parts[1], place - 2)
            assert text == own.texts[place] and torch.equal(features, own.image_features[place])
    ids = torch.stack([batch.image_ids for batch in batches])
    assert sorted(ids[ids < 20].tolist()) == list(range(20))
    assert (ids >= 20).sum(dim=1).tolist() == [4] * 10
    assert (ids[:, :3] < 20).any() and (ids[:, :3] >= 20).any()  # the first few are of all sources


def test_joined_questions_stay_with_their_answers():
    examples = tiny.captioned(4)
    examples.questions = [[{"question": f"who is {i}?", "answer": f"{i}"}] for i in range(4)]
    asked = Source(examples, tiny.random_features(4), 1, ask=True)
    batch = join([asked, asked], [1, 1], batch_size=4).batch(0, 0, 1)
    assert [f"who is {text}?" for text in batch.texts] == batch.questions
    assert [image % 4 for image in batch.image_ids.tolist()] == [int(x) for x in batch.texts]
    assert sum(image >= 4 for image in batch.image_ids.tolist()) == 2


def test_joined_captions_stay_image_by_image():
    sources = [source(8, 1, texts_per_image=2), source(6, 1, seed=1, texts_per_image=2)]
    batch = join(sources, [1, 1], batch_size=7).batch(3, 0, 1)
    for i, image in enumerate(batch.image_ids.tolist()):
        which, row = (0, image) if image < 8 else (1, image - 8)
        assert sorted(batch.texts[2 * i : 2 * i + 2]) == sorted(
            sources[which].examples.captions[row]
        )


@pytest.mark.parametrize("counts", [(1000, 3, 2), (5, 5, 5), (7, 900, 1)])
def test_of_every_source_there_is_at_least_one(counts):
    joined = join([source(n, 1) for n in counts], [1, 1, 1], batch_size=10)
    sizes = [part.batch_size for part in joined.sources]
    assert sum(sizes) == 10 and min(sizes) >= 1
    for i, j in itertools.combinations(range(3), 2):  # the more images, the larger the part
        assert abs(sizes[i] - sizes[j]) <= 1 or (sizes[i] > sizes[j]) == (counts[i] > counts[j])


def test_what_cannot_be_joined():
    with pytest.raises(DataError, match="batch of 1 is too small for 2 sources"):
        join([source(4, 1)] * 2, [1, 1], batch_size=1)
    with pytest.raises(DataError, match="weight above 0"):
        join([source(4, 1)] * 2, [1, 0], batch_size=2)


def test_a_source_that_fills_no_batch_is_named(tmp_path):
    batches = Mixture([source(8, 2), source(6, 7)])
    with pytest.raises(TrainingError, match="6 images does not fill a batch of 7"):
        fit(tiny.stage1(), batches, None, None, config(tmp_path / "run"))


def test_patches_are_left_out_anew_in_every_step():
    some = source(8, 4)
    few = replace(some, keep_features=2)
    kept = set()
    for step in range(6):
        whole, part = some.batch(step, 0, 1), few.batch(step, 0, 1)
        assert part.image_features.shape[1] == 2
        for all_patches, patches in zip(whole.image_features, part.image_features, strict=True):
            same = (patches[:, None] == all_patches[None]).all(dim=2)  # (2, N)
            assert same.sum(dim=1).tolist() == [1, 1] and same.any(dim=0).sum() == 2
            kept.add(tuple(same.any(dim=0).tolist()))
    assert len(kept) > 6


# Stage 1, and killing it -------------------------------------------------------------------------


def same_run(first: Path, second: Path) -> None:
    for name in ("state.safetensors", "best.safetensors"):
        a, b = load_tensors(first / name), load_tensors(second / name)
        assert a[1] == b[1] and a[0].keys() == b[0].keys()
        for tensor in a[0]:
            assert torch.equal(a[0][tensor], b[0][tensor]), tensor
    assert (first / "metrics.jsonl").read_text() == (second / "metrics.jsonl").read_text()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on Windows")
@pytest.mark.parametrize("train", [tiny.run_stage1, small_models.run_stage2])
def test_killed_at_any_moment_it_goes_on_as_if_never_stopped(tmp_path, monkeypatch, train):
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    # A server that has imported everything forks the runs: starting one costs milliseconds.
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["helpers.small_models"])

    def start(folder: str, resume: bool):
        process = processes.Process(target=train, args=(tmp_path / folder, resume))
        process.start()
        return process

    whole = start("whole", False)
    whole.join()
    assert whole.exitcode == 0
    kills = 0
    for line in sorted(draw.sample(range(2, 40), 3)):
        process = start("killed", resume=kills > 0)
        file = tmp_path / "killed" / "metrics.jsonl"
        while process.is_alive() and (not file.exists() or file.read_text().count("\n") < line):
            time.sleep(0.001)
        time.sleep(draw.random() * 0.03)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"seed {seed}: it was over before the kill"
        kills += 1
    last = start("killed", resume=True)
    last.join()
    assert last.exitcode == 0, f"seed {seed}"
    same_run(tmp_path / "whole", tmp_path / "killed")
    steps = [line["step"] for line in metrics(tmp_path / "killed", "train")]
    assert steps == list(range(40)), f"seed {seed}"


def test_an_objective_left_out_can_be_resumed(tmp_path, monkeypatch):
    """Its head has no gradient, so the optimiser knows nothing of it."""
    tiny.run_stage1(tmp_path / "whole", objectives="itc", epochs=2)
    tokenize, calls = type(tiny.tokenizer(tmp_path)).__call__, []

    def interrupt(self, texts):
        calls.append(len(texts))
        if calls.count(4) == 9:  # batches of training have four texts
            raise KeyboardInterrupt
        return tokenize(self, texts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("blip2_edu.text.Tokenizer.__call__", interrupt)
        tiny.run_stage1(tmp_path / "stopped", objectives="itc", epochs=2)
    tiny.run_stage1(tmp_path / "stopped", resume=True, objectives="itc", epochs=2)
    same_run(tmp_path / "whole", tmp_path / "stopped")
    first = metrics(tmp_path / "whole", "train")[0]
    assert set(first) == {"step", "kind", "itc"}


def test_the_mean_of_the_weights_is_what_is_kept(tmp_path):
    """By hand: decay min(0.8, (1 + t) / (10 + t)), from the weights that the run began with."""
    seen = []
    follow = Mean.follow

    def watch(self, model, step):
        follow(self, model, step)
        seen.append(model.qformer.norm.weight.detach().clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mean, "follow", watch)
        tiny.run_stage1(tmp_path / "run", epochs=1)
    mean = torch.ones_like(seen[0])
    for step, weight in enumerate(seen):
        decay = min(0.8, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weight
    best = load_tensors(tmp_path / "run" / "best.safetensors")[0]["qformer.norm.weight"]
    state = load_tensors(tmp_path / "run" / "state.safetensors")[0]
    torch.testing.assert_close(best, mean)
    assert torch.equal(best, state["mean.qformer.norm.weight"])
    assert torch.equal(seen[-1], state["model.qformer.norm.weight"])
    assert not torch.equal(best, seen[-1])


def test_equal_words_of_two_images_are_no_negatives(tmp_path, monkeypatch):
    examples, seen = tiny.captioned(4, captions=1), []
    examples.captions[2] = examples.captions[0]
    monkeypatch.setattr(
        Blip2Stage1, "forward", lambda self, **given: seen.append(given) or {"x": self.temperature}
    )
    words = tiny.tokenizer(tmp_path)
    batches = Source(examples, tiny.random_features(4), 4)
    held_out = [(examples, tiny.random_features(4))]
    settings = Stage1Training(tmp_path / "run", epochs=3, random_negatives=2)
    train_stage1(tiny.stage1(words=words), batches, held_out, settings)
    for step, given in enumerate(seen):
        texts, ids = batches.batch(step, 0, 1).texts, given["image_ids"]
        for a, b in itertools.product(range(4), repeat=2):
            assert (ids[a] == ids[b]) == (texts[a] == texts[b])
    assert [given["hard_negatives"] for given in seen] == [False, False, True]


def test_stage1_learns_eight_pairs_by_heart(tmp_path):
    examples, features = tiny.captioned(8, captions=1), tiny.random_features(8)
    settings = {"epochs": 60, "evaluate_every": 60, "learning_rate_new": 1e-3}
    train_stage1(
        tiny.stage1(dropout=0.0, words=tiny.tokenizer(tmp_path)),
        Source(examples, features, 8),
        [(examples, features)],
        Stage1Training(tmp_path / "run", **settings),
    )
    lines = metrics(tmp_path / "run", "train")
    for name, share in (("itc", 0.75), ("itg", 0.9)):
        first, last = (sum(line[name] for line in part) for part in (lines[:5], lines[-5:]))
        assert last < share * first, name
    assert metrics(tmp_path / "run", "evaluation")[-1]["TR@1"] >= 50


# Stage 2 -----------------------------------------------------------------------------------------


def test_stage2_moves_what_should_learn_and_nothing_else(tmp_path):
    model = small_models.blip2(tmp_path)
    model.bridge.start_from(model.stage1)
    examples, features = small_models.asked(8), tiny.random_features(8)
    batches = Mixture(
        [Source(examples, features, 4, texts_per_image=2), Source(examples, features, 4, ask=True)]
    )
    before = {name: x.clone() for name, x in model.state_dict().items()}
    train_stage2(
        model,
        batches,
        [(examples, features)],
        config(tmp_path / "run", epochs=2, evaluate_every=8, learning_rate_new=1e-2),
    )
    after = model.state_dict()
    moved = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"bridge"}
    scores = metrics(tmp_path / "run", "evaluation")[-1]
    assert {"BLEU-4", "CIDEr", "VQA", "VQA other"} <= set(scores)
    losses = [line["text"] for line in metrics(tmp_path / "run", "train")]
    assert sum(losses[-3:]) < sum(losses[:3])
