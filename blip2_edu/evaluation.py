"""How good is it? Retrieval, captions, answers, and where the attention points.

Axis letters: `I` images, `T` texts, `k` best of them that are scored a second time. All scores are
in percent.
"""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from tqdm.auto import tqdm

from blip2_edu.blip2 import Blip2
from blip2_edu.data import Examples, FeatureCache
from blip2_edu.objectives import itc_similarity
from blip2_edu.stage1 import Blip2Stage1
from blip2_edu.text import Tokenizer

ARTICLES = ("a", "an", "the")
NUMBER_WORDS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"}
NUMBER_WORDS |= {"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
BAR = {"leave": False, "delay": 2}  # no bar for what takes less than two seconds


def retrieval_scores(
    for_images: Tensor, owner: Tensor, for_texts: Tensor | None = None
) -> dict[str, float]:
    """Recall at 1, 5, 10 in percent, text retrieval (TR) and image retrieval (IR).

    for_images (I, T) ranks the texts of each image; for_texts (I, T) ranks the images of each text,
    the same unless given; owner (T,) says which image each text belongs to.
    TR@k: one of an image's own texts is among its k best. IR@k: a text's image is among its k best.
    """
    for_texts = for_images if for_texts is None else for_texts
    own = owner[None, :] == torch.arange(len(for_images), device=owner.device)[:, None]  # (I, T)
    text_rank = _rank_of_best(for_images, own)  # (I,)
    image_rank = _rank_of_best(for_texts.T, own.T)  # (T,)
    return {
        f"{name}@{k}": 100 * (ranks < k).float().mean().item()
        for name, ranks in (("TR", text_rank), ("IR", image_rank))
        for k in (1, 5, 10)
    }


def _rank_of_best(scores: Tensor, right: Tensor) -> Tensor:
    """Per row: how many wrong columns score at least as high as the best right one."""
    best = scores.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~right).sum(dim=1)


@torch.no_grad()
def retrieval(
    model: Blip2Stage1,
    tokenizer: Tokenizer,
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
            model.embed_text(*(t.to(device) for t in tokenizer(some)))
            for some in tqdm(list(batched(texts, batch_size)), desc="Texts", **BAR)
        ]
    )
    similarity = torch.cat(
        [itc_similarity(image_embeddings, some) for some in text_embeddings.split(500)], dim=1
    ).cpu()
    scores = retrieval_scores(similarity, owner)
    if k:
        for_images, for_texts = rerank(model, tokenizer, features, images, texts, similarity, k)
        reranked = retrieval_scores(for_images, owner, for_texts)
        scores |= {f"{name} re-ranked": value for name, value in reranked.items()}
    return scores


@torch.no_grad()
def rerank(
    model: Blip2Stage1,
    tokenizer: Tokenizer,
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
    lengths = tokenizer(texts)[1].sum(dim=1)  # (T,)
    match = torch.zeros_like(similarity)
    bar = tqdm(total=int(wanted.sum()), desc="Re-ranking", unit="pair", **BAR)
    for some in batched(range(len(images)), images_at_once):  # all keys and values may be too many
        projected = model.project_image(features.rows([images[i] for i in some]).to(device))
        pairs = wanted[some].nonzero()  # (P, 2): row of `some`, text
        pairs = pairs[lengths[pairs[:, 1]].argsort()]  # alike in length: little padding
        for rows, columns in (part.T for part in pairs.split(batch_size)):
            text_ids, text_mask = tokenizer([texts[t] for t in columns])
            logits = model.match(
                [(kv[0][rows], kv[1][rows]) if kv else None for kv in projected],
                text_ids.to(device),
                text_mask.to(device),
            )
            match[rows + some[0], columns] = logits[:, 1].to(match)
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


def caption_scores(references: list[list[str]], candidates: list[str]) -> dict[str, float]:
    """BLEU-1 to 4 over the whole corpus and CIDEr, lower-cased and without punctuation."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    right = {i: [plain(text) for text in texts] for i, texts in enumerate(references)}
    written = {i: [plain(text)] for i, text in enumerate(candidates)}
    bleu, _ = Bleu(4).compute_score(right, written, verbose=0)
    cider, _ = Cider().compute_score(right, written)
    scores = {f"BLEU-{n}": 100 * value for n, value in enumerate(bleu, start=1)}
    return scores | {"CIDEr": 100 * float(cider)}


def plain(text: str) -> str:
    """Lower case, without punctuation: "A dog's well-worn toy." -> "a dogs well worn toy"."""
    text = re.sub(r"['’`]", "", text.lower())
    return " ".join(re.sub(r"[^\w\s]|_", " ", text).split())


def vqa_accuracy(answers: list[str], questions: list[dict]) -> dict[str, float]:
    """VQA accuracy, overall and by answer type, in percent.

    An answer counts min(1, n / 3) if n people gave it, averaged over the ways to leave one of them
    out (Antol et al. 2015).
    """
    accuracies = defaultdict(list)
    for answer, question in zip(answers, questions, strict=True):
        people = [normalise_answer(a) for a in question["answers"] or [question["answer"]] * 10]
        agree = people.count(normalise_answer(answer))
        others = len(people) - agree
        accuracy = agree * min(1, (agree - 1) / 3) + others * min(1, agree / 3)
        for name in ("VQA", f"VQA {question['answer_type']}"):
            accuracies[name].append(100 * accuracy / len(people))
    return {name: sum(values) / len(values) for name, values in sorted(accuracies.items())}


def normalise_answer(answer: str) -> str:
    """As VQA's own evaluation: lower case, no punctuation, no articles, number words as digits."""
    answer = re.sub(r"['’`]|(?<=\d),(?=\d)", "", answer.lower())
    answer = re.sub(r"(?<!\d)[.:]|[.:](?!\d)|[^\w\s.:]|_", " ", answer)  # 2.5 and 10:30 stay whole
    words = [NUMBER_WORDS.get(word, word) for word in answer.split()]
    return " ".join(word for word in words if word not in ARTICLES)


def blind_answers(
    train: Iterable[dict], questions: list[dict], by: str = "question_type"
) -> list[str]:
    """The best that one can answer without the picture: the most frequent answer of the kind.

    by  `question_type` or `answer_type`; a kind that `train` lacks gets its most frequent answer.
    """
    counts = defaultdict(Counter)
    for question in train:
        for kind in (question[by], None):
            counts[kind][normalise_answer(question["answer"])] += 1
    return [(counts.get(q[by]) or counts[None]).most_common(1)[0][0] for q in questions]


def pointing_game(
    attention: Tensor, boxes: Iterable[Sequence[float]], image_size: tuple[int, int]
) -> bool:
    """Does a map (rows, columns) peak inside one of the boxes (Zhang et al. 2016)?

    boxes are (left, top, right, bottom) in an image of (width, height); the middle of the highest
    cell is what points.
    """
    rows, columns = attention.shape
    row, column = divmod(int(attention.argmax()), columns)
    x, y = (column + 0.5) * image_size[0] / columns, (row + 0.5) * image_size[1] / rows
    return any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in boxes)


def writing_scores(
    model: Blip2,
    examples: Examples,
    features: FeatureCache,
    num_beams: int = 5,
    batch_size: int = 16,
) -> dict[str, float]:
    """Caption scores if there are captions, VQA accuracy if there are questions."""

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
    asked = [(i, question) for i, some in enumerate(examples.questions) for question in some]
    if asked:
        images, questions = zip(*asked, strict=True)
        words = [question["question"] for question in questions]
        answers = write(model.write_answers, images, words, "Answers")
        scores |= vqa_accuracy(answers, questions)
    return scores


def images_per_second(
    model: Blip2, examples: Examples, num_beams: int = 5, batch_size: int = 16
) -> float:
    """From the bytes of a photo to its caption, in a few full batches."""
    count = min(len(examples), 2 * batch_size)
    model.caption([examples.image(0)], num_beams=num_beams)  # whatever is done once is done now
    start = time.perf_counter()
    for some in batched(range(count), batch_size):
        model.caption([examples.image(i) for i in some], num_beams=num_beams)
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
        scores |= retrieval(model.stage1.eval(), model.tokenizer, examples, features, k)
    scores |= writing_scores(model, examples, features, num_beams, batch_size)
    questions = [question for some in examples.questions for question in some]
    if questions and train_questions:
        for by in ("question_type", "answer_type"):
            blind = vqa_accuracy(blind_answers(train_questions, questions, by), questions)
            scores[f"VQA blind, by {by.replace('_', ' ')}"] = blind["VQA"]
    return scores | {"images per second": images_per_second(model, examples, num_beams, batch_size)}


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one perhaps shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
