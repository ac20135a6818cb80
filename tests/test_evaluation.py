"""Every score against a value known by hand, an independent program or the plain long way."""

import random
from itertools import product

import pytest
import torch
from helpers import tiny
from sacrebleu.metrics import BLEU

from blip2_edu import evaluation
from blip2_edu.evaluation import images_per_second, rerank, retrieval, writing_scores
from blip2_edu.metrics import (
    blind_answers,
    caption_scores,
    names,
    naming_scores,
    normalise_answer,
    plain,
    pointing_game,
    retrieval_scores,
    vqa_accuracy,
)
from blip2_edu.objectives import itc_similarity

# Retrieval ---------------------------------------------------------------------------------------


def test_retrieval_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.2, 0.3], [0.8, 0.7, 0.6, 0.9]])
    scores = retrieval_scores(similarity, owner=torch.tensor([0, 0, 1, 1]))
    # Images: 0 finds text 0, 1 finds text 3. Texts: 0 and 3 and 2 find theirs, text 1 does not.
    assert scores["TR@1"] == 100 and scores["IR@1"] == 75
    assert scores["IR@5"] == scores["IR@10"] == 100


def test_ties_do_not_count_as_found():
    scores = retrieval_scores(torch.zeros(20, 20), owner=torch.arange(20))
    assert set(scores.values()) == {0.0}


def test_retrieval_equals_sorting():
    torch.manual_seed(0)
    for_images, for_texts = torch.randn(7, 21), torch.randn(7, 21)
    owner = torch.arange(7).repeat_interleave(3)
    scores = retrieval_scores(for_images, owner, for_texts)
    for k in (1, 5, 10):
        found = [
            any(owner[t] == i for t in tiny.ranks(row)[:k]) for i, row in enumerate(for_images)
        ]
        assert scores[f"TR@{k}"] == pytest.approx(100 * sum(found) / 7)
        found = [owner[t] in tiny.ranks(row)[:k] for t, row in enumerate(for_texts.T)]
        assert scores[f"IR@{k}"] == pytest.approx(100 * sum(found) / 21)


class Setting:
    """A tiny model, 9 images with 3 texts each, and every pair scored the plain way."""

    def __init__(self, folder):
        self.model = tiny.stage1().eval()
        with torch.no_grad():  # spread the scores: an untrained head says 0 to everything
            self.model.itm_head.weight.mul_(40)
        self.tokenizer = self.model.tokenizer = tiny.tokenizer(folder)
        self.examples, self.features = tiny.captioned(9, 3), tiny.random_features(9)
        self.images, self.owner = list(range(9)), torch.arange(9).repeat_interleave(3)
        self.texts = [text for captions in self.examples.captions for text in captions]
        with torch.no_grad():
            images = self.model.embed_image(self.features.rows(self.images))
            texts = torch.cat([self.model.embed_text(*self.tokenizer([t])) for t in self.texts])
            self.similarity = itc_similarity(images, texts)
            self.match = torch.zeros(9, 27)
            for i, t in product(range(9), range(27)):
                projected = self.model.project_image(self.features.rows([i]))
                logits = self.model.match(projected, *self.tokenizer([self.texts[t]]))
                self.match[i, t] = logits[0, 1]

    def rerank(self, k: int, **settings) -> tuple[torch.Tensor, torch.Tensor]:
        return rerank(
            self.model,
            self.features,
            self.images,
            self.texts,
            self.similarity,
            k,
            **settings,
        )


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    return Setting(tmp_path_factory.mktemp("words"))


@pytest.mark.parametrize("k", [27, 1000])
@pytest.mark.parametrize("sizes", [{}, {"batch_size": 7, "images_at_once": 4}])
def test_reranking_everything_is_the_sum_of_both_scores(setting, k, sizes):
    for scores in setting.rerank(k, **sizes):
        torch.testing.assert_close(scores, setting.similarity + setting.match, atol=2e-5, rtol=0)


def test_reranking_reorders_the_first_k_and_leaves_the_rest(setting):
    k, both = 4, setting.similarity + setting.match
    for_images, for_texts = setting.rerank(k)
    views = [(for_images, setting.similarity, both), (for_texts.T, setting.similarity.T, both.T)]
    changed = 0
    for reranked, similarity, full in views:
        for row in range(len(reranked)):
            before, after = tiny.ranks(similarity[row]), tiny.ranks(reranked[row])
            assert after[:k] == sorted(before[:k], key=lambda c: -full[row, c])  # noqa: B023
            assert after[k:] == before[k:]
            changed += after != before
    assert changed > 5  # ITM does say something else than ITC


def test_reranking_one_changes_nothing_at_the_top(setting):
    for_images, for_texts = setting.rerank(1)
    assert torch.equal(for_images.argmax(1), setting.similarity.argmax(1))
    assert torch.equal(for_texts.argmax(0), setting.similarity.argmax(0))


def test_a_pair_that_both_directions_want_is_scored_once(setting, monkeypatch):
    scored = []
    original = type(setting.model).match

    def match(self, image, text_ids, text_mask):
        scored.extend(map(tuple, text_ids.tolist()))
        return original(self, image, text_ids, text_mask)

    monkeypatch.setattr(type(setting.model), "match", match)
    setting.rerank(27)
    assert len(scored) == 9 * 27


def test_retrieval_reports_itc_and_the_reranked_scores(setting):
    scores = retrieval(setting.model, setting.examples, setting.features, k=27)
    expected = retrieval_scores(setting.similarity + setting.match, setting.owner)
    assert {name: scores[f"{name} re-ranked"] for name in expected} == pytest.approx(expected)
    plain_itc = retrieval_scores(setting.similarity, setting.owner)
    assert {name: scores[name] for name in plain_itc} == pytest.approx(plain_itc)


def test_images_without_captions_do_not_count(setting):
    examples, features = tiny.captioned(9, 3), tiny.random_features(9)
    examples.captions[4] = []
    left = [i for i in range(9) if i != 4]
    fewer = tiny.captioned(9, 3)
    fewer.captions = [fewer.captions[i] for i in left]
    features_of_fewer = evaluation.FeatureCache([features.views[0][left]])
    assert retrieval(setting.model, examples, features, k=3) == pytest.approx(
        retrieval(setting.model, fewer, features_of_fewer, k=3)
    )


# Captions ----------------------------------------------------------------------------------------


def random_captions(count: int, references: int = 5) -> tuple[list[list[str]], list[str]]:
    """References, and candidates that are noisy copies of one of them."""
    draw = random.Random(0)
    right = [tiny.sentences(references, seed=i, shortest=6, longest=12) for i in range(count)]
    written = [
        " ".join(
            word if draw.random() < 0.8 else draw.choice(tiny.WORDS) for word in few[0].split()
        )
        for few in right
    ]
    return right, written


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_bleu_equals_sacrebleu(n):
    references, candidates = random_captions(40)
    ours = caption_scores(references, candidates)[f"BLEU-{n}"]
    theirs = BLEU(tokenize="none", lowercase=True, max_ngram_order=n, smooth_method="none")
    transposed = [list(column) for column in zip(*references, strict=True)]
    assert 5 < ours < 95
    assert ours == pytest.approx(theirs.corpus_score(candidates, transposed).score, abs=0.01)


def test_case_and_punctuation_do_not_matter():
    references, candidates = random_captions(12)
    loud = [text.upper().replace(" ", ", ", 1) + " !" for text in candidates]
    assert caption_scores(references, loud) == caption_scores(references, candidates)


def test_cider_of_perfect_permuted_and_empty_captions():
    references, _ = random_captions(30, references=2)
    perfect = [few[0] for few in references]
    good = caption_scores([[few[0]] for few in references], perfect)
    assert good["CIDEr"] == pytest.approx(1000)  # ten times a cosine of 1, in percent
    assert good["BLEU-4"] == pytest.approx(100)
    right, wrong = caption_scores(references, perfect), caption_scores(references, perfect[::-1])
    assert wrong["CIDEr"] < right["CIDEr"] / 5
    assert caption_scores(references, [""] * 30)["CIDEr"] == 0


def test_caption_scores_print_nothing(capsys):
    caption_scores(*random_captions(5))
    assert capsys.readouterr() == ("", "")


def test_plain():
    assert plain("A dog's WELL-worn toy, on_the  mat.") == "a dogs well worn toy on the mat"


# Answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, normal",
    [
        ("Yes", "yes"),
        ("The  Red Car.", "red car"),
        ("an apple", "apple"),
        ("Two", "2"),
        ("none", "0"),
        ("twenty two", "twenty 2"),
        ("black/white", "black white"),
        ("t-shirt", "t shirt"),
        ("don't", "dont"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("10:30", "10:30"),
        ("it is 5.", "it is 5"),
        ("theatre", "theatre"),
        ("", ""),
    ],
)
def test_normalise_answer(said, normal):
    assert normalise_answer(said) == normal
    assert normalise_answer(normal) == normal


def question(answers: list[str], answer_type: str = "other", question_type: str = "what") -> dict:
    return {
        "question": "what is it?",
        "answer": max(answers, key=answers.count),
        "answers": answers,
        "answer_type": answer_type,
        "question_type": question_type,
    }


@pytest.mark.parametrize(
    "caption, word, named",
    [
        ("Two dogs' toys.", "toy", True),
        ("A catalogue", "cat", False),
        ("Buses and a puppy", "bus", True),
        ("Puppies play", "puppy", True),
        ("A DOG", "dog", True),
        ("a dog", "Dog", True),
        ("a bus", "buses", False),
        ("", "dog", False),
    ],
)
def test_a_word_or_its_plural(caption, word, named):
    assert names(caption, ["zebra", word]) is named


def test_naming_scores():
    captions = ["a man on a horse", "a horse", "a dog", "a street"]
    subjects = [["man", "person"], ["horse", "pony"], ["cat"], []]
    scenes = [["field"], ["horse"], [], ["street", "road"]]
    scores = naming_scores(captions, subjects, scenes)
    assert scores == pytest.approx({"named": 200 / 3, "named, no person": 50, "scene": 200 / 3})
    assert naming_scores(["a"], [[]], [[]]) == {}


@pytest.mark.parametrize("agree", range(11))
def test_vqa_accuracy_leaves_one_out(agree):
    answers = ["cat"] * agree + ["dog"] * (10 - agree)
    subsets = [answers[:i] + answers[i + 1 :] for i in range(10)]
    expected = sum(min(1, subset.count("cat") / 3) for subset in subsets) / 10
    assert vqa_accuracy(["A cat."], [question(answers)])["VQA"] == pytest.approx(100 * expected)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 9, 10])
def test_vqa_accuracy_of_few_people(count):
    """What all of them say is right, and what nobody says is wrong, however many were asked."""
    asked = question(["cat"]) | {"answers": ["cat"] * count}
    assert vqa_accuracy(["cat"], [asked])["VQA"] == 100
    assert vqa_accuracy(["dog"], [asked])["VQA"] == 0


@pytest.mark.parametrize(
    "answers, right",  # leave one out: all the others must have given it, three of them suffice
    [
        (["cat", "dog"], 50),
        (["cat", "cat", "dog"], 200 / 3),
        (["cat", "dog", "dog"], 100 / 3),
        (["cat", "cat", "dog", "dog"], 50),
    ],
)
def test_vqa_accuracy_of_few_people_who_disagree(answers, right):
    assert vqa_accuracy(["cat"], [question(answers)])["VQA"] == pytest.approx(right)


def test_vqa_accuracy_by_answer_type():
    questions = [
        question(["yes"] * 10, "yes/no"),
        question(["two"] * 10, "number"),
        question(["three"] * 10, "number"),
    ]
    assert vqa_accuracy(["yes", "2", "2"], questions) == pytest.approx(
        {"VQA": 200 / 3, "VQA number": 50, "VQA yes/no": 100}
    )


def test_blind_answers():
    train = [question(["red"] * 10, "other", "what color")] * 2
    train += [question(["blue"] * 10, "other", "what color")]
    train += [question(["Yes"] * 10, "yes/no", "is the")] * 4
    asked = [question(["x"], "other", kind) for kind in ("what color", "is the", "why")]
    assert blind_answers(train, asked) == ["red", "yes", "yes"]
    assert blind_answers(train, asked, by="answer_type") == ["red"] * 3


# Where it looks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "boxes, hit",
    [
        ([(140, 0, 200, 50)], True),  # the peak is at x = 150, y = 25
        ([(0, 0, 140, 50), (160, 0, 200, 50)], False),
        ([(0, 0, 140, 50), (149, 24, 151, 26)], True),
        ([(20, 140, 30, 160)], False),  # x and y exchanged
        ([], False),
    ],
)
def test_pointing_game(boxes, hit):
    attention = torch.zeros(4, 2)
    attention[0, 1] = 1
    assert pointing_game(attention, boxes, image_size=(200, 200)) is hit


# The whole model ---------------------------------------------------------------------------------


class Parrot:
    """Writes down which image and which prompt it was given."""

    device = torch.device("cpu")

    class config:
        class prompts:
            caption = "caption"

    def __init__(self):
        self.batches = []

    def write_answers(self, features, questions, num_beams):
        return self.write(features, questions, num_beams)

    def write(self, features, prompts, num_beams):
        self.batches.append(len(prompts))
        return [f"{int(row[0, 0])} {prompt}" for row, prompt in zip(features, prompts, strict=True)]

    def caption(self, images, num_beams):
        self.beams = num_beams
        return ["a dog"] * len(images)


def test_writing_scores_gives_each_prompt_its_image():
    features = evaluation.FeatureCache([torch.arange(5.0).half().view(5, 1, 1).numpy()])
    examples = tiny.captioned(5)
    examples.captions = [[f"{i} caption"] for i in range(4)] + [[]]
    examples.questions = [
        [question([f"{i} what is it"] * 10, "number") for _ in range(i)] for i in range(5)
    ]
    parrot = Parrot()
    scores = writing_scores(parrot, examples, features, num_beams=1, batch_size=3)
    assert parrot.batches == [3, 1, 3, 3, 3, 1]
    assert scores["BLEU-1"] == pytest.approx(100) and scores["VQA"] == pytest.approx(100)
    examples.questions = [[] for _ in range(5)]
    assert "VQA" not in writing_scores(parrot, examples, features)


def test_evaluate_does_what_the_data_have(monkeypatch):
    examples, features = tiny.captioned(4), tiny.random_features(4)
    examples.questions = [[question(["yes"] * 10, "yes/no", "is the")] for _ in range(4)]
    parrot = Parrot()
    parrot.stage1 = None
    monkeypatch.setattr(type(examples), "image", lambda self, index: index)
    train = [question(["yes"] * 10, "yes/no", "is the")]
    scores = evaluation.evaluate(parrot, examples, features, train_questions=train)
    assert scores["VQA blind, by question type"] == pytest.approx(100) and scores["VQA"] == 0
    assert "CIDEr" in scores and "TR@1" not in scores and scores["images per second"] > 0
    examples.captions = [[] for _ in range(4)]
    assert "CIDEr" not in evaluation.evaluate(parrot, examples, features)
    assert images_per_second(parrot, examples, num_beams=3, batch_size=1) > 0
    assert parrot.beams == 3
