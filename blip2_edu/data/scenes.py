"""Drawn scenes: one to four shapes, with exact captions, questions, boxes and masks.

Real captions are loose and real questions leak their answers; here every sentence is true, every
question has one answer, and the question alone does not tell it. So a lesson can train in a
minute and score exactly. The same seed always gives the same scene.
"""

from __future__ import annotations

import io
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (220, 30, 40),
    "orange": (245, 130, 20),
    "yellow": (245, 215, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 220),
    "purple": (130, 50, 170),
    "pink": (250, 140, 190),
    "brown": (125, 75, 35),
}
RADII = {"small": (0.08, 0.10), "large": (0.15, 0.18)}  # of the circle around it, in image sizes
SHADES = {"dark": (30, 70), "light": (170, 230)}  # of the grey background
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = ("no", "one", "two", "three", "four")
MAX_SHAPES = 4

# A scene rarely has four stars. Asking about rare numbers more readily makes them all alike.
ASK_HOW_MANY = {0: 0.06, 1: 0.14, 2: 0.18, 3: 0.41, 4: 1.0}


@dataclass(frozen=True)
class Shape:
    """A shape inside the circle of `radius` around (x, y), in pixels."""

    kind: str
    color: str
    size: str
    x: int
    y: int
    radius: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"

    def draw(self, canvas: ImageDraw.ImageDraw, fill: int | tuple[int, int, int]) -> None:
        if self.kind == "circle":
            x, y, r = self.x, self.y, self.radius
            canvas.ellipse((x - r, y - r, x + r, y + r), fill)
        else:
            outline = [
                (self.x + self.radius * u, self.y + self.radius * v) for u, v in OUTLINES[self.kind]
            ]
            canvas.polygon(outline, fill)


def _polygon(corners: int, turn: float, *radii: float) -> list[tuple[float, float]]:
    """Corners around (0, 0), the first one up when `turn` is 0; `radii` are taken in turn."""
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    return [
        (radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a))
        for i, a in enumerate(angles)
    ]


OUTLINES = {
    "square": _polygon(4, math.pi / 4, 1.0),
    "triangle": _polygon(3, 0.0, 1.0),
    "star": _polygon(10, 0.0, 1.0, 0.42),
}


@dataclass(frozen=True)
class Question:
    """`type` is color, shape, count, relation or yes/no."""

    question: str
    answer: str
    type: str


@dataclass(frozen=True)
class Scene:
    image: Image.Image
    captions: list[str]
    questions: list[Question]
    shapes: list[Shape]

    @cached_property
    def masks(self) -> np.ndarray:
        """(shapes, height, width) bool: the pixels of each shape; shapes never overlap."""
        return np.stack([np.asarray(mask) for mask in self._mask_images])

    @cached_property
    def boxes(self) -> list[tuple[int, int, int, int]]:
        """(x0, y0, x1, y1) of each shape: x0 and y0 are its first pixels, x1 and y1 the next."""
        return [box for mask in self._mask_images if (box := mask.getbbox())]

    @cached_property
    def _mask_images(self) -> list[Image.Image]:
        masks = [Image.new("1", self.image.size) for _ in self.shapes]
        for mask, shape in zip(masks, self.shapes, strict=True):
            shape.draw(ImageDraw.Draw(mask), 1)
        return masks


class SwappedCaptions(NamedTuple):
    """One true caption and two false ones made of the same words or of one word turned round."""

    true: str
    attributes_swapped: str
    relation_swapped: str


def draw_scene(seed: int, size: int = 224) -> Scene:
    """The scene of this seed, `size` x `size` pixels; `size` is at least 64."""
    if size < 64:
        raise ValueError(f"a scene has at least 64 x 64 pixels, not {size} x {size}")
    rng = random.Random(seed)
    shapes = _arrange(rng, _choose(rng), size)
    shade = rng.choice(tuple(SHADES))
    image = _background(rng, shade, size)
    canvas = ImageDraw.Draw(image)
    for shape in shapes:
        shape.draw(canvas, COLORS[shape.color])
    return Scene(image, _captions(shapes, shade), _questions(rng, shapes), shapes)


def relation(a: Shape, b: Shape) -> str | None:
    """Where `a` is, seen from `b`; None where two answers could be defended (on a diagonal)."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= 2 * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) >= 2 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def swapped_captions(scene: Scene) -> SwappedCaptions:
    """Captions that only a model which binds colors to shapes and knows left from right can tell.

    Raises ValueError unless the scene has two shapes of different kind and color that do not stand
    on a diagonal.
    """
    if len(scene.shapes) != 2:
        raise ValueError(f"captions are swapped between two shapes, not {len(scene.shapes)}")
    a, b = scene.shapes
    if a.kind == b.kind or a.color == b.color:
        raise ValueError(f"{_a(a.name)} and {_a(b.name)} must differ in kind and in color")
    where = relation(a, b)
    if where is None:
        raise ValueError(f"{_a(a.name)} and {_a(b.name)} stand on a diagonal")
    return SwappedCaptions(
        f"{_a(a.name)} {where} {_a(b.name)}",
        f"{_a(f'{b.color} {a.kind}')} {where} {_a(f'{a.color} {b.kind}')}",
        f"{_a(a.name)} {OPPOSITE[where]} {_a(b.name)}",
    )


def scene_dataset(n: int, seed: int = 0, size: int = 224) -> Dataset:
    """`n` scenes as a data set: image, captions, questions in the form of VQA v2.

    Two different `seed`s share no scene; the first rows do not depend on `n`.
    """
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    text = Value("string")
    fields = {"question": text, "answer": text, "answers": List(text)}
    fields |= {"answer_type": text, "question_type": text}
    features = Features(
        {"image": ImageFeature(), "captions": List(text), "questions": List(fields)}
    )
    seeds = random.Random(seed)
    scenes = (draw_scene(seeds.getrandbits(62), size) for _ in range(n))
    return Dataset.from_list([_row(scene) for scene in scenes], features=features)


def _row(scene: Scene) -> dict:
    file = io.BytesIO()
    scene.image.save(file, "PNG", compress_level=1)
    answer_types = {"count": "number", "yes/no": "yes/no"}
    questions = [
        {
            "question": q.question,
            "answer": q.answer,
            "answers": [q.answer] * 10,  # VQA v2 asked ten people
            "answer_type": answer_types.get(q.type, "other"),
            "question_type": q.type,
        }
        for q in scene.questions
    ]
    image = {"bytes": file.getvalue(), "path": None}
    return {"image": image, "captions": scene.captions, "questions": questions}


def _choose(rng: random.Random) -> list[tuple[str, str, str]]:
    """(kind, color, size) of each shape. One kind is repeated, so that counting is worth it."""
    n = rng.randint(1, MAX_SHAPES)
    repeated = rng.randint(1, n)
    first, *others = rng.sample(KINDS, len(KINDS))
    kinds = [first] * repeated + rng.choices(others, k=n - repeated)
    rng.shuffle(kinds)
    colors = rng.choices(tuple(COLORS), k=n)
    sizes = rng.choices(tuple(RADII), k=n)
    return list(zip(kinds, colors, sizes, strict=True))


def _arrange(rng: random.Random, chosen: list[tuple[str, str, str]], size: int) -> list[Shape]:
    """Places without overlap; two shapes alone always have a clear relation."""
    gap = round(0.03 * size)
    while True:
        shapes: list[Shape] = []
        for kind, color, extent in chosen:
            low, high = RADII[extent]
            radius = round(rng.uniform(low, high) * size)
            edge = radius + 2
            x, y = rng.randint(edge, size - 1 - edge), rng.randint(edge, size - 1 - edge)
            if any(math.hypot(x - s.x, y - s.y) < radius + s.radius + gap for s in shapes):
                break
            shapes.append(Shape(kind, color, extent, x, y, radius))
        else:
            if len(shapes) != 2 or relation(*shapes):
                return shapes


def _background(rng: random.Random, shade: str, size: int) -> Image.Image:
    """A grey of the shade, plain or with a light texture: never one of the shapes' colors."""
    grey = rng.randint(*SHADES[shade])
    if rng.random() < 0.5:
        return Image.new("RGB", (size, size), (grey, grey, grey))
    x, y = rng.randint(0, size), rng.randint(0, size)
    texture = _texture(size).crop((x, y, x + size, y + size))
    return texture.point([min(255, grey + i) for i in range(256)]).convert("RGB")


@cache
def _texture(size: int) -> Image.Image:
    """(2 size, 2 size) grey levels 0..15, soft clouds with grain, to cut backgrounds from."""
    generator = np.random.default_rng(0)
    clouds = Image.fromarray(generator.integers(0, 256, (16, 16), dtype=np.uint8))
    clouds = np.asarray(clouds.resize((2 * size, 2 * size), Image.Resampling.BICUBIC)) // 21
    return Image.fromarray(clouds + generator.integers(0, 4, clouds.shape, dtype=np.uint8))


def _captions(shapes: Sequence[Shape], shade: str) -> list[str]:
    names = Counter(shape.name for shape in shapes)
    sized = Counter(f"{shape.size} {shape.name}" for shape in shapes)
    listed = _list(names)
    captions = [
        listed,
        _list(sized),
        f"{listed} on a {shade} background",
        f"a {shade} picture with {listed}",
    ]
    pair = next(iter(_clear_pairs(shapes)), None)
    if pair:
        a, b, where = pair
        captions += [
            f"{_a(a.name)} {where} {_a(b.name)}",
            f"{_a(b.name)} {OPPOSITE[where]} {_a(a.name)}",
            f"there is {_a(a.name)} {where} {_a(b.name)}",
        ]
    return captions


def _clear_pairs(shapes: Sequence[Shape]) -> list[tuple[Shape, Shape, str]]:
    """(a, b, relation) for all pairs that are named without doubt and not on a diagonal."""
    names = Counter(shape.name for shape in shapes)
    named = [shape for shape in shapes if names[shape.name] == 1]
    pairs = [(a, b, relation(a, b)) for a in named for b in named if a is not b]
    return [(a, b, where) for a, b, where in pairs if where]


def _questions(rng: random.Random, shapes: Sequence[Shape]) -> list[Question]:
    """At most one question of each type, only such as have exactly one right answer."""
    pairs = _clear_pairs(shapes)
    questions = [
        _ask_color(rng, shapes),
        _ask_shape(rng, shapes),
        _ask_count(rng, shapes),
        _ask_relation(rng, pairs),
        _ask_yes_no(rng, shapes, pairs),
    ]
    return [question for question in questions if question]


def _ask_color(rng: random.Random, shapes: Sequence[Shape]) -> Question | None:
    kinds = Counter(shape.kind for shape in shapes)
    single = [shape for shape in shapes if kinds[shape.kind] == 1]
    if not single:
        return None
    shape = rng.choice(single)
    if len(single) == len(shapes) == 2 and rng.random() < 0.5:
        other = shapes[shape is shapes[0]]
        where = relation(shape, other)
        return Question(f"What color is the shape {where} the {other.kind}?", shape.color, "color")
    return Question(f"What color is the {shape.kind}?", shape.color, "color")


def _ask_shape(rng: random.Random, shapes: Sequence[Shape]) -> Question | None:
    colors = Counter(shape.color for shape in shapes)
    single = [shape for shape in shapes if colors[shape.color] == 1]
    if not single:
        return None
    shape = rng.choice(single)
    return Question(f"What shape is {shape.color}?", shape.kind, "shape")


def _ask_count(rng: random.Random, shapes: Sequence[Shape]) -> Question | None:
    if rng.random() < 0.5:
        return Question("How many shapes are there?", str(len(shapes)), "count")
    kinds = Counter(shape.kind for shape in shapes)
    kind, count = max(kinds.items(), key=lambda item: item[1])
    absent = [kind for kind in KINDS if kind not in kinds]
    if absent and rng.random() < ASK_HOW_MANY[0]:
        kind, count = rng.choice(absent), 0
    elif rng.random() >= ASK_HOW_MANY[count]:
        return None
    return Question(f"How many {kind}s are there?", str(count), "count")


def _ask_relation(rng: random.Random, pairs: Sequence[tuple[Shape, Shape, str]]) -> Question | None:
    if not pairs:
        return None
    a, b, where = rng.choice(pairs)
    side = where.removesuffix(" of")
    return Question(f"Where is the {a.name} relative to the {b.name}?", side, "relation")


def _ask_yes_no(
    rng: random.Random, shapes: Sequence[Shape], pairs: Sequence[tuple[Shape, Shape, str]]
) -> Question:
    """The answer is thrown like a coin first; a "no" is a near miss, never far-fetched."""
    answer = rng.choice(("yes", "no"))
    if pairs and rng.random() < 0.5:
        a, b, where = rng.choice(pairs)
        where = where if answer == "yes" else OPPOSITE[where]
        return Question(f"Is the {a.name} {where} the {b.name}?", answer, "yes/no")
    shape = rng.choice(shapes)
    name = shape.name
    while answer == "no" and any(shape.name == name for shape in shapes):
        if rng.random() < 0.5:
            name = f"{rng.choice(tuple(COLORS))} {shape.kind}"
        else:
            name = f"{shape.color} {rng.choice(KINDS)}"
    return Question(f"Is there {_a(name)}?", answer, "yes/no")


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _list(names: Counter[str]) -> str:
    """{"red circle": 2, "blue star": 1} -> "two red circles and a blue star"."""
    parts = [_a(name) if n == 1 else f"{NUMBERS[n]} {name}s" for name, n in names.items()]
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
