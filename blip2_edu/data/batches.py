"""Batches to learn from: one source, or several mixed.

Everything random in a batch is drawn from (seed, step, rank), so that a resumed run sees what the
stopped one would have seen.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from blip2_edu.data.examples import Examples
from blip2_edu.data.features import FeatureCache


@dataclass
class Batch:
    """B images and what is said of them; `questions` only where the texts are answers."""

    image_features: Tensor  # (B, N, W)
    image_ids: Tensor  # (B,)
    texts: list[str]  # B x texts an image, image by image
    questions: list[str] | None = None  # B


@dataclass
class Source:
    """Batches from one data set, each image once an epoch, with some of its texts drawn anew.

    What a batch holds depends on the seed, the step and the rank alone. With `ask`, a text is the
    answer to one of the image's questions, else one of its captions. Images without are skipped.
    `keep_features` leaves only so many of the N features of an image, drawn anew in each step: it
    must not be known again by one of them.
    """

    examples: Examples
    features: FeatureCache
    batch_size: int
    seed: int = 0
    texts_per_image: int = 1
    ask: bool = False
    keep_features: int | None = None

    def __post_init__(self):
        texts = self.examples.questions if self.ask else self.examples.captions
        self.usable = np.array([i for i, of_image in enumerate(texts) if of_image])

    def steps_per_epoch(self, processes: int) -> int:
        return len(self.usable) // (self.batch_size * processes)

    def batch(self, step: int, rank: int, processes: int) -> Batch:
        epoch, position = divmod(step, self.steps_per_epoch(processes))
        order = np.random.default_rng([self.seed, epoch]).permutation(self.usable)
        start = (position * processes + rank) * self.batch_size
        chosen = order[start : start + self.batch_size]
        draw = np.random.default_rng([self.seed, step, rank])
        views = draw.integers(len(self.features.views), size=self.batch_size)
        features, image_ids = self.features.rows(chosen, views), torch.from_numpy(chosen)
        if self.keep_features:
            kept = draw.random(features.shape[:2]).argsort(axis=1)[:, : self.keep_features]
            kept = repeat(torch.from_numpy(kept), "b k -> b k w", w=features.shape[2])
            features = features.gather(1, kept)  # (B, K, W)
        if self.ask:
            asked = [draw.choice(self.examples.questions[i]) for i in chosen]
            answers = [question["answer"] for question in asked]
            return Batch(features, image_ids, answers, [q["question"] for q in asked])
        texts = []
        for i in chosen:
            captions = self.examples.captions[i]
            few = len(captions) < self.texts_per_image
            texts += draw.choice(captions, self.texts_per_image, replace=few).tolist()
        return Batch(features, image_ids, texts)


@dataclass
class Mixture:
    """Several sources, their batches shuffled.

    An epoch is one of the first source; each further source gives `share` batches for one of the
    first, and goes through its own images at that pace.
    """

    sources: list[Source]
    share: float = 1.0
    seed: int = 0

    def _counts(self, processes: int) -> list[int]:
        first = self.sources[0].steps_per_epoch(processes)
        further = max(1, round(self.share * first)) if self.share else 0
        return [first] + [further] * (len(self.sources) - 1)

    def steps_per_epoch(self, processes: int) -> int:
        return sum(self._counts(processes))

    def batch(self, step: int, rank: int, processes: int) -> Batch:
        counts = self._counts(processes)
        epoch, position = divmod(step, sum(counts))
        order = np.random.default_rng([self.seed, epoch]).permutation(
            np.repeat(np.arange(len(counts)), counts)
        )
        which = order[position]
        earlier = int((order[:position] == which).sum())
        return self.sources[which].batch(epoch * counts[which] + earlier, rank, processes)


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one perhaps shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
