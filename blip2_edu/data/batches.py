"""Batches to learn from: one source, or several mixed.

Everything random in a batch is drawn from (seed, step, rank), so that a resumed run sees what the
stopped one would have seen.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from blip2_edu.data.examples import DataError, Examples
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

    @property
    def images(self) -> int:
        return len(self.usable)

    def steps_per_epoch(self, processes: int) -> int:
        return self.images // (self.batch_size * processes)

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
            kept = torch.from_numpy(kept).to(features.device)
            kept = repeat(kept, "b k -> b k w", w=features.shape[2])
            features = features.gather(1, kept)  # (B, K, W)
        if self.ask:
            questions = (self.examples.questions[i] for i in chosen)
            asked = [each[draw.integers(len(each))] for each in questions]
            answers = [question["answer"] for question in asked]
            return Batch(features, image_ids, answers, [q["question"] for q in asked])
        texts = []
        for i in chosen:  # those of an image that has fewer are taken again
            captions = self.examples.captions[i]
            order = np.resize(draw.permutation(len(captions)), self.texts_per_image)
            texts += [captions[place] for place in order]
        return Batch(features, image_ids, texts)


@dataclass
class Joined:
    """Several sources that are as one: every batch has images of each, in fixed numbers.

    A source goes through its own images at the pace of its batch size. So images of all are one
    another's negatives, and a source can be seen more often than another, see `join`. They stand
    in a batch in any order: ITM and ITG may take the first few alone, which must be of all sources.
    """

    sources: list[Source]

    @property
    def batch_size(self) -> int:
        return sum(source.batch_size for source in self.sources)

    @property
    def images(self) -> int:
        return sum(source.images for source in self.sources)

    def steps_per_epoch(self, processes: int) -> int:
        """As many steps as all images together fill."""
        if not all(source.steps_per_epoch(processes) for source in self.sources):
            return 0
        return self.images // (self.batch_size * processes)

    def batch(self, step: int, rank: int, processes: int) -> Batch:
        parts = [source.batch(step, rank, processes) for source in self.sources]
        offsets = np.cumsum([0] + [len(source.examples) for source in self.sources[:-1]])
        ids = [part.image_ids + first for part, first in zip(parts, offsets, strict=True)]
        order = np.random.default_rng([step, rank]).permutation(self.batch_size)
        texts = [text for part in parts for text in part.texts]
        each = len(texts) // self.batch_size  # image by image
        questions = [question for part in parts for question in part.questions or []]
        return Batch(
            torch.cat([part.image_features for part in parts])[order],
            torch.cat(ids)[order],
            [text for i in order for text in texts[i * each : (i + 1) * each]],
            [questions[i] for i in order] if questions else None,
        )


def join(sources: list[Source], weights: Sequence[float], batch_size: int) -> Joined:
    """Share a batch among sources: to each in proportion to its images times its weight.

    With weight 2 an image is seen twice as often as with 1; of every source there is at least one.
    Raises DataError if the batch is too small for that, or a weight not above 0.
    """
    if len(sources) > batch_size:
        raise DataError(f"A batch of {batch_size} is too small for {len(sources)} sources.")
    if min(weights) <= 0:
        raise DataError("A source is given a weight above 0, or left out.")
    wanted = np.array([s.images * w for s, w in zip(sources, weights, strict=True)])
    wanted = wanted * batch_size / wanted.sum()
    sizes = np.maximum(np.floor(wanted).astype(int), 1)
    while (missing := batch_size - sizes.sum()) != 0:
        late = np.sign(missing) * (wanted - sizes)
        late[(sizes == 1) & (missing < 0)] = -np.inf
        sizes[late.argmax()] += np.sign(missing)
    return Joined([replace(s, batch_size=int(n)) for s, n in zip(sources, sizes, strict=True)])


@dataclass
class Mixture:
    """Several sources, their batches shuffled.

    An epoch is one of the first source; each further source gives `share` batches for one of the
    first, and goes through its own images at that pace.
    """

    sources: Sequence[Source | Joined]
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
