"""How fast is it here? `python tests/benchmarks/speed.py` prints a table of medians.

Not a test: a busy machine would fail it. Each figure is the median of several runs after one that
warms up; the Q-Former is the paper's size over 257 image features.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from blip2_edu.blip2 import Blip2
from blip2_edu.paths import ROOT
from blip2_edu.qformer import QFormer, QFormerConfig


def median_seconds(work: Callable[[], object], runs: int = 5) -> float:
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def report(name: str, seconds: float) -> None:
    print(f"{name:<58}{1000 * seconds:>10.0f} ms")


def qformer_against_transformers(batch: int = 8) -> None:
    ours = QFormer(replace(QFormerConfig.base(), vocab_size=None)).eval()
    theirs = Blip2QFormerModel(Blip2QFormerConfig()).eval()
    image = torch.randn(batch, 257, 1408)
    queries = torch.randn(batch, 32, 768)
    report("Q-Former, image only: ours", median_seconds(lambda: ours(image)))
    projected = ours.project_image(image)
    report("  with keys and values given", median_seconds(lambda: ours(projected)))
    seconds = median_seconds(lambda: theirs(queries, encoder_hidden_states=image))
    report("  transformers", seconds)


def generation_with_and_without_cache(batch: int = 4, length: int = 24) -> None:
    model = QFormer(QFormerConfig.base()).eval()
    image = model.project_image(torch.randn(batch, 257, 1408))
    ids = torch.randint(0, 30000, (batch, length))

    def cached() -> None:
        cache = model(image).cache
        for i in range(length):
            cache = model(text_ids=ids[:, i : i + 1], pattern="causal", cache=cache).cache

    def anew() -> None:
        for i in range(length):
            model(image, ids[:, : i + 1], pattern="causal")

    report(f"{length} words after the queries: cached", median_seconds(cached, runs=3))
    report("  everything anew for every word", median_seconds(anew, runs=3))


def captions() -> None:
    start = time.perf_counter()
    model = Blip2.from_pretrained("mini")
    photos = sorted((ROOT / "images").glob("*.jpg"))[:16]
    model.caption(photos[0])
    report("mini: load and caption the first photo", time.perf_counter() - start)
    report("  one photo, 5 beams", median_seconds(lambda: model.caption(photos[1])))
    report("  one photo, greedy", median_seconds(lambda: model.caption(photos[1], num_beams=1)))
    each = median_seconds(lambda: [model.caption(photo) for photo in photos], runs=2)
    report("  16 photos, one at a time", each)
    report("  16 photos in one batch", median_seconds(lambda: model.caption(photos), runs=2))


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.inference_mode():
        qformer_against_transformers()
        generation_with_and_without_cache()
        captions()
