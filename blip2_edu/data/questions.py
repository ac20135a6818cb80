"""Questions that captions answer: five people's sentences about a photo hold more than sentences.

"A brown dog runs on a beach" says what colour the dog is, that there is a dog and perhaps no car,
and where it is. Rules make questions of that, about five for each photo (the idea is that of Ren
et al. 2015, COCO-QA, and of Changpinyo et al. 2022, where a language model does it). They are what
rules give: few forms, and some mistakes.
"""

import re
from collections import Counter
from dataclasses import replace

import numpy as np

from blip2_edu.data.examples import Examples

COLORS = (
    "black and white|brown and white|black|white|brown|red|blue|green|yellow|orange|pink|purple"
)
COLORED = (
    "dog|shirt|jacket|ball|hat|dress|grass|toy|coat|helmet|collar|uniform|hair|car|frisbee|building|"
    "sweater|bird|horse|bike|boat|umbrella|motorcycle|surfboard|skirt|cap|bag|fence|wall|slide|"
    "shorts|pants|jeans|flowers"
)
COUNTED = {
    "dogs": "dog",
    "men": "man",
    "women": "woman",
    "boys": "boy",
    "girls": "girl",
    "children": "child",
    "people": "person",
    "horses": "horse",
    "birds": "bird",
}
NUMBERS = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
ACTORS = "dog|man|woman|boy|girl|child|person"
ACTIONS = (
    "running|playing|jumping|sitting|walking|standing|riding|climbing|swimming|eating|sleeping|"
    "surfing|skiing|skateboarding|snowboarding|dancing|smiling|drinking|catching|fishing|hiking"
)
PLACES = (
    "beach|snow|grass|water|street|field|park|pool|ocean|sand|sidewalk|woods|forest|lake|river|"
    "mountain|road|bench|couch|bed|kitchen|table"
)
THINGS = (
    "dog|cat|bird|horse|ball|bike|car|boat|hat|helmet|skateboard|surfboard|frisbee|guitar|umbrella|"
    "fence|bench|motorcycle|rope|table"
)
FORMS = {"bicycle": "bike", "puppy": "dog", "teddy bear": "toy", "kids": "children"}


def with_questions(examples: Examples) -> Examples:
    """The same images, asked what their captions answer."""
    questions = [questions_from_captions(own, seed) for seed, own in enumerate(examples.captions)]
    return replace(examples, questions=questions)


def questions_from_captions(captions: list[str], seed: int = 0) -> list[dict]:
    """Questions about one image that its captions answer, each a dict as in `Examples.questions`.

    Where captions contradict one another, the answer is what most of them say, but for the place:
    a photo can be of several. What is answered with "no" is an action or a thing, drawn at random,
    that no caption mentions.
    """
    draw = np.random.default_rng(seed)
    captions = [_plain(caption) for caption in captions]
    asked = []

    def ask(question: str, answer: str, answer_type: str, question_type: str) -> None:
        kind = {"answer_type": answer_type, "question_type": question_type}
        asked.append({"question": question, "answer": answer, "answers": []} | kind)

    for thing, color in _most_said(captions, rf"(?P<what>{COLORS}) (?P<of>{COLORED})").items():
        verb = "are" if thing.endswith("s") and thing not in ("dress", "grass") else "is"
        ask(f"What color {verb} the {thing}?", color, "other", f"what color {verb} the")
    counts = _most_said(
        captions, rf"(?P<what>{'|'.join(NUMBERS)}) (\w+ )?(?P<of>{'|'.join(COUNTED)})"
    )
    for many, one in COUNTED.items():
        said = [bool(re.search(rf"\b(a|an|the|one) (\w+ ){{0,3}}{one}\b", c)) for c in captions]
        if many in counts:
            ask(f"How many {many} are there?", NUMBERS[counts[many]], "number", "how many")
        elif 2 * sum(said) > len(said) and not _mentions(captions, many):
            ask(f"How many {many} are there?", "1", "number", "how many")
    doing = _most_said(captions, rf"(?P<of>{ACTORS}) (is )?(?P<what>{ACTIONS})")
    for actor, action in doing.items():
        ask(f"What is the {actor} doing?", action, "other", f"what is the {actor}")
        # Whoever "runs" is running: an action is denied only if no form of it is there.
        forms = {other: rf"{other[:-4]}\w*" for other in ACTIONS.split("|")}
        others = [other for other, form in forms.items() if not _mentions(captions, form)]
        if others:
            ask(f"Is the {actor} {action}?", "yes", "yes/no", "is the")
            ask(f"Is the {actor} {draw.choice(others)}?", "no", "yes/no", "is the")
    places = _most_said(captions, rf"(?P<of>in|on|at|through|near) (the|a|an) (?P<what>{PLACES})")
    for place in sorted(set(places.values())):
        ask("Where is this?", place, "other", "where is")
    things = [thing for thing in THINGS.split("|") if _mentions(captions, rf"{thing}(s|es)?")]
    absent = [thing for thing in THINGS.split("|") if thing not in things]
    for thing in things:
        ask(f"Is there a {thing} in the photo?", "yes", "yes/no", "is there a")
    for thing in draw.permutation(absent)[: max(1, len(things))]:
        ask(f"Is there a {thing} in the photo?", "no", "yes/no", "is there a")
    return asked


def _plain(caption: str) -> str:
    caption = " ".join(re.findall(r"\w+", caption.lower()))
    for form, usual in FORMS.items():
        caption = re.sub(rf"\b{form}\b", usual, caption)
    return caption


def _mentions(captions: list[str], pattern: str) -> bool:
    return any(re.search(rf"\b{pattern}\b", caption) for caption in captions)


def _most_said(captions: list[str], pattern: str) -> dict[str, str]:
    """For each `of` that the pattern finds, the `what` that it finds most often with it."""
    said: dict[str, Counter] = {}
    for caption in captions:
        for match in re.finditer(rf"\b{pattern}\b", caption):
            said.setdefault(match["of"], Counter())[match["what"]] += 1
    return {of: whats.most_common(1)[0][0] for of, whats in said.items()}
