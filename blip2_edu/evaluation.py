"""Runs a model over data and scores it: retrieval, captions, answers.

Axis letters: `I` images, `T` texts, `k` best of them that are scored a second time. Scores are in
percent.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from blip2_edu.attention import select
from blip2_edu.blip2 import Blip2
from blip2_edu.data.batches import batched
from blip2_edu.data.examples import Examples
from blip2_edu.data.features import FeatureCache
from blip2_edu.metrics import (
    blind_answers,
    caption_scores,
    naming_scores,
    retrieval_scores,
    vqa_accuracy,
)
from blip2_edu.objectives import itc_similarity, query_cosines
from blip2_edu.stage1 import Blip2Stage1

BAR = {"leave": False, "delay": 2}  # no bar for what takes less than two seconds


@torch.no_grad()
def retrieval(
    model: Blip2Stage1,
    examples: Examples,
    features: FeatureCache,
    k: int = 0,
    batch_size: int = 100,
) -> dict[str, float]:
    """Retrieval over all images and all their captions by ITC, and, if k, re-ranked by ITM too."""
    images = [i for i, captions in enumerate(examples.captions) if captions]
    texts = [text for captions in examples.captions for text in captions]
    counts = torch.tensor([len(examples.captions[i]) for i in images])
    owner = torch.repeat_interleave(torch.arange(len(images)), counts)
    device = model.temperature.device
    image_embeddings = torch.cat(
        [
            model.embed_image(features.rows(rows).to(device))
            for rows in tqdm(list(batched(images, batch_size)), desc="Images", **BAR)
        ]
    )
    text_embeddings = torch.cat(
        [
            model.embed_text(*(t.to(device) for t in model.tokenizer(batch)))
            for batch in tqdm(list(batched(texts, batch_size)), desc="Texts", **BAR)
        ]
    )
    similarity = torch.cat(
        [itc_similarity(image_embeddings, part) for part in text_embeddings.split(500)], dim=1
    ).cpu()
    scores = retrieval_scores(similarity, owner)
    if k:
        for_images, for_texts = rerank(model, features, images, texts, similarity, k)
        reranked = retrieval_scores(for_images, owner, for_texts)
        scores |= {f"{name} re-ranked": value for name, value in reranked.items()}
    return scores


@torch.no_grad()
def query_cosine(model: Blip2Stage1, features: FeatureCache, images: int = 64) -> float:
    """Mean cosine between the outputs of different queries of an image: 1 if they are all alike."""
    rows = features.rows(range(min(images, len(features)))).to(model.temperature.device)
    return query_cosines(model.qformer(model.project_image(rows)).queries).mean().item()


@torch.no_grad()
def rerank(
    model: Blip2Stage1,
    features: FeatureCache,
    images: Sequence[int],
    texts: list[str],
    similarity: Tensor,
    k: int = 128,
    batch_size: int = 128,
    images_at_once: int = 200,
) -> tuple[Tensor, Tensor]:
    """Score the k best of each image and of each text again, by ITM's match logit plus ITC.

    images (I,) are rows of the features; similarity (I, T). Returns the scores that rank texts for
    images and those that rank images for texts, (I, T) each; what was not among the k best stays
    behind them in its old order. A pair that both directions want is scored once.
    """
    device = model.temperature.device
    best_texts = _among_best(similarity, k, dim=1)
    best_images = _among_best(similarity, k, dim=0)
    wanted = best_texts | best_images
    lengths = model.tokenizer(texts)[1].sum(dim=1)  # (T,)
    match = torch.zeros_like(similarity)
    bar = tqdm(total=int(wanted.sum()), desc="Re-ranking", unit="pair", **BAR)
    for part in batched(range(len(images)), images_at_once):  # all keys and values may be too many
        projected = model.project_image(features.rows([images[i] for i in part]).to(device))
        pairs = wanted[part].nonzero()  # (pairs, 2): row of `part`, text
        pairs = pairs[lengths[pairs[:, 1]].argsort()]  # alike in length: little padding
        for rows, columns in (batch.T for batch in pairs.split(batch_size)):
            text_ids, text_mask = model.tokenizer([texts[t] for t in columns])
            image = select(projected, rows)
            logits = model.match(image, text_ids.to(device), text_mask.to(device))
            match[rows + part[0], columns] = logits[:, 1].to(match)
            bar.update(len(rows))
    bar.close()
    return _put_first(similarity, match, best_texts), _put_first(similarity, match, best_images)


def _among_best(scores: Tensor, k: int, dim: int) -> Tensor:
    """True on the k highest along `dim`."""
    best = scores.topk(min(k, scores.shape[dim]), dim=dim).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(dim, best, True)


def _put_first(similarity: Tensor, match: Tensor, chosen: Tensor) -> Tensor:
    """Both scores where `chosen`, else the similarity, shifted below all of those."""
    scores = similarity + match
    gap = scores[chosen].min() - similarity.max() - 1
    return torch.where(chosen, scores, similarity + gap)


def writing_scores(
    model: Blip2,
    examples: Examples,
    features: FeatureCache,
    num_beams: int = 5,
    batch_size: int = 16,
) -> dict[str, float]:
    """Caption scores if there are captions, VQA accuracy if there are questions.

    Where the data say what is in an image, also how often a caption names it.
    """

    def write(by: Callable, images: list[int], prompts: list[str], what: str) -> list[str]:
        bar = tqdm(total=len(images), desc=what, unit="text", **BAR)
        texts = []
        for places in batched(range(len(images)), batch_size):
            rows = features.rows([images[p] for p in places]).to(model.device)
            texts += by(rows, [prompts[p] for p in places], num_beams=num_beams)
            bar.update(len(places))
        bar.close()
        return texts

    scores = {}
    captioned = [i for i, captions in enumerate(examples.captions) if captions]
    if captioned:
        prompts = [model.config.prompts.caption] * len(captioned)
        references = [examples.captions[i] for i in captioned]
        captions = write(model.write, captioned, prompts, "Captions")
        scores |= caption_scores(references, captions)
        if any(examples.subjects):
            told = [(examples.subjects[i], examples.scenes[i]) for i in captioned]
            scores |= naming_scores(captions, *map(list, zip(*told, strict=True)))
    asked = [(i, question) for i, each in enumerate(examples.questions) for question in each]
    if asked:
        images, questions = [i for i, _ in asked], [question for _, question in asked]
        words = [question["question"] for question in questions]
        answers = write(model.write_answers, images, words, "Answers")
        scores |= vqa_accuracy(answers, questions)
    return scores


def images_per_second(
    model: Blip2, examples: Examples, num_beams: int = 5, batch_size: int = 16
) -> float:
    """From the bytes of a photo to its caption, in two batches if there are so many photos."""
    count = min(len(examples), 2 * batch_size)
    model.caption([examples.image(0)], num_beams=num_beams)  # whatever is done once is done now
    start = time.perf_counter()
    for batch in batched(range(count), batch_size):
        model.caption([examples.image(i) for i in batch], num_beams=num_beams)
    return count / (time.perf_counter() - start)


def evaluate(
    model: Blip2,
    examples: Examples,
    features: FeatureCache,
    k: int = 16,
    num_beams: int = 5,
    batch_size: int = 16,
    train_questions: list[dict] | None = None,
) -> dict[str, float]:
    """All that the data allow: retrieval, captions, answers (and blind ones), images a second.

    train_questions  what the answers that ignore the picture are learned from
    """
    scores = {}
    if any(examples.captions) and model.stage1 is not None:
        scores |= retrieval(model.stage1, examples, features, k)
    scores |= writing_scores(model, examples, features, num_beams, batch_size)
    questions = [question for each in examples.questions for question in each]
    if questions and train_questions:
        for by in ("question_type", "answer_type"):
            blind = vqa_accuracy(blind_answers(train_questions, questions, by), questions)
            scores[f"VQA blind, by {by.replace('_', ' ')}"] = blind["VQA"]
    return scores | {"images per second": images_per_second(model, examples, num_beams, batch_size)}
