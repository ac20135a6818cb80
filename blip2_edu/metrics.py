"""How good is it? Pure functions: scores of retrieval, captions, answers and maps, in percent.

Axis letters: `I` images, `T` texts, `k` best of them.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

ARTICLES = ("a", "an", "the")
NUMBER_WORDS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"}
NUMBER_WORDS |= {"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}


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


PEOPLE = {"person", "people", "man", "men", "woman", "women", "boy", "girl", "child", "children"}


def naming_scores(
    captions: list[str], subjects: list[list[str]], scenes: list[list[str]]
) -> dict[str, float]:
    """In how many captions, in percent, the main thing has its name, and the place or action.

    captions  one for each image
    subjects  for each image words of which any will do, see `names`; an image without is left out.
              "named, no person" is the share among images whose words name nobody (PEOPLE)
    scenes    likewise
    """
    named = [
        (names(caption, words), bool(PEOPLE & set(words)))
        for caption, words in zip(captions, subjects, strict=True)
        if words
    ]
    placed = [names(c, words) for c, words in zip(captions, scenes, strict=True) if words]
    kinds = {
        "named": [right for right, _ in named],
        "named, no person": [right for right, person in named if not person],
        "scene": placed,
    }
    return {name: 100 * sum(right) / len(right) for name, right in kinds.items() if right}


def names(caption: str, words: Iterable[str]) -> bool:
    """Does a caption hold any of these words, or its plural?"""
    held = set(plain(caption).split())
    endings = ("", "s", "es")
    forms = {word + ending for word in words for ending in endings}
    forms |= {word[:-1] + "ies" for word in words if word.endswith("y")}
    return bool(held & {form.lower() for form in forms})


def vqa_accuracy(answers: list[str], questions: list[dict]) -> dict[str, float]:
    """VQA accuracy, overall and by answer type, in percent.

    An answer counts min(1, n / 3) if n people gave it, averaged over the ways to leave one of them
    out (Antol et al. 2015). Of fewer than four people all the others must have given it.
    """
    accuracies = defaultdict(list)
    for answer, question in zip(answers, questions, strict=True):
        people = [normalise_answer(a) for a in question["answers"] or [question["answer"]]]
        if len(people) == 1:  # nobody would be left
            people *= 2
        needed = min(3, len(people) - 1)
        agree = people.count(normalise_answer(answer))
        others = len(people) - agree
        accuracy = agree * min(1, (agree - 1) / needed) + others * min(1, agree / needed)
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
    patch is what points.
    """
    rows, columns = attention.shape
    row, column = divmod(int(attention.argmax()), columns)
    x, y = (column + 0.5) * image_size[0] / columns, (row + 0.5) * image_size[1] / rows
    return any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in boxes)
