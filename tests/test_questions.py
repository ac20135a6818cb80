"""Questions that captions answer."""

import pytest

from blip2_edu.data.examples import QUESTION, Examples
from blip2_edu.data.questions import THINGS, questions_from_captions, with_questions

DOG = [
    "A brown dog runs along a beach .",
    "A brown puppy is running on the beach.",
    "One dog outside.",
]


def answers(captions: list[str], seed: int = 0) -> dict[str, str]:
    return {q["question"]: q["answer"] for q in questions_from_captions(captions, seed)}


def test_what_captions_say():
    said = answers(DOG)
    assert said["What color is the dog?"] == "brown"
    assert said["How many dogs are there?"] == "1"
    assert said["What is the dog doing?"] == "running"
    assert said["Is the dog running?"] == "yes"
    assert said["Where is this?"] == "beach"
    assert said["Is there a dog in the photo?"] == "yes"


def test_numbers_plurals_and_several_words_of_color():
    said = answers(
        ["Two young boys in blue shorts.", "Two boys and a black and white dog on a bench"]
    )
    assert said["How many boys are there?"] == "2"
    assert said["What color are the shorts?"] == "blue"
    assert said["What color is the dog?"] == "black and white"
    assert "How many dogs are there?" not in said  # one of two captions sees one


def test_most_captions_decide():
    said = answers(["a red ball", "the blue ball", "a blue ball in the grass"])
    assert said["What color is the ball?"] == "blue"


@pytest.mark.parametrize("seed", range(20))
def test_what_is_denied_is_in_no_caption(seed):
    denied = [question for question, answer in answers(DOG, seed).items() if answer == "no"]
    assert len(denied) == 2  # as many as are affirmed: a thing and an action
    words = " ".join(denied)
    assert "Is there a dog" not in words and "running" not in words and "Is the dog" in words


def test_a_thing_is_a_whole_word():
    said = answers(["A man carrying hats catches a balloon."])
    assert said["Is there a hat in the photo?"] == "yes"
    assert not {f"Is there a {thing} in the photo?" for thing in ("car", "cat", "ball")} & {
        question for question, answer in said.items() if answer == "yes"
    }


def test_it_depends_on_the_seed_alone():
    assert answers(DOG, 3) == answers(DOG, 3)
    assert len({str(answers(DOG, seed)) for seed in range(20)}) > 5


def test_captions_that_answer_nothing_or_mention_everything():
    assert list(answers(["Hello."]).values()) == ["no"]  # is there, say, a boat?
    everything = answers(["a " + " and a ".join(THINGS.split("|"))])
    assert "no" not in everything.values()


def test_examples_keep_their_images_and_captions():
    examples = Examples([{"bytes": b"", "path": None}] * 2, [DOG, []], [[], []])
    asked = with_questions(examples)
    assert asked.images == examples.images and asked.captions == examples.captions
    assert all(QUESTION.keys() | {"question", "answer"} == q.keys() for q in asked.questions[0])
    assert examples.questions == [[], []]
