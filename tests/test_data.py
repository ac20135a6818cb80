"""Data sets in every form, and a feature cache that is never wrong and never does a thing twice."""

import io
import json
import os
import re
import shutil

import datasets
import fsspec
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from helpers import tiny
from PIL import Image, ImageOps

from blip2_edu.data import features
from blip2_edu.data.examples import DataError, Examples, load_examples, tidy
from blip2_edu.data.features import FeatureCache, open_features, view_of
from blip2_edu.images import ImageError
from blip2_edu.vision import ImageEncoder

TEXT = Value("string")
QUESTIONS = List({"question": TEXT, "answer": TEXT})


def picture(seed: int) -> Image.Image:
    """Four quarters of random colours."""
    colors = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(colors.repeat(8, axis=0).repeat(8, axis=1))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def parquet(folder, columns: dict, types: dict, images: list | None = None) -> str:
    """Write a parquet file of pictures 0, 1, ... with these columns."""
    count = len(next(iter(columns.values())))
    stored = images or [{"bytes": png(picture(i)), "path": None} for i in range(count)]
    features = Features({"image": ImageFeature()} | types)
    file = str(folder / "data.parquet")
    Dataset.from_dict({"image": stored} | columns, features=features).to_parquet(file)
    return file


@pytest.fixture(autouse=True)
def no_litter(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(features, "CACHE", tmp_path / "cache")


# Data sets ---------------------------------------------------------------------------------------

WANTED = [["a dog", "the dog"], ["a cat", "the cat"]]
FORMS = {
    "list": ({"captions": WANTED}, {"captions": List(TEXT)}),
    "list named caption": ({"caption": WANTED}, {"caption": List(TEXT)}),
    "numbered": (
        {"caption_1": ["the dog", "the cat"], "caption_0": ["a dog", "a cat"]},
        {"caption_1": TEXT, "caption_0": TEXT},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_captions_in_every_form(tmp_path, form):
    examples = load_examples(parquet(tmp_path, *FORMS[form]))
    assert examples.captions == WANTED and examples.questions == [[], []]
    assert examples.image(1).tobytes() == picture(1).tobytes()


def test_numbered_captions_are_in_order_of_number(tmp_path):
    names = [f"caption_{i}" for i in (10, 2, 0)]
    file = parquet(tmp_path, {name: [name] for name in names}, dict.fromkeys(names, TEXT))
    assert load_examples(file).captions == [["caption_0", "caption_2", "caption_10"]]


def test_one_caption_an_image_some_missing(tmp_path):
    file = parquet(tmp_path, {"text": ["a dog", None, ""]}, {"text": TEXT})
    assert load_examples(file).captions == [["a dog"], [], []]


def test_questions(tmp_path):
    asked = [[{"question": "who?", "answer": "a dog"}], None]
    examples = load_examples(parquet(tmp_path, {"questions": asked}, {"questions": QUESTIONS}))
    assert examples.captions == [[], []] and examples.questions[1] == []
    (question,) = examples.questions[0]
    assert question["question"] == "who?" and question["answer_type"] == "other"


def test_what_a_caption_should_name(tmp_path):
    columns = {"caption": ["a", "b"], "subject": [["dog", " puppy"], None], "scene": ["park", ""]}
    read = load_examples(
        parquet(tmp_path, columns, {"caption": TEXT, "subject": List(TEXT), "scene": TEXT})
    )
    assert read.subjects == [["dog", "puppy"], []] and read.scenes == [["park"], []]


def test_image_folder_with_metadata(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = []
    for i, captions in enumerate(WANTED):
        picture(i).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "captions": captions}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    examples = load_examples(folder)
    assert examples.captions == WANTED
    assert examples.image(1).tobytes() == picture(1).tobytes()
    assert len(open_features(examples, tiny.encoder())) == 2


@pytest.fixture
def divided(tmp_path):
    """A folder with a part named as people name it; the pictures in both are different ones."""
    for i, part in enumerate(("train", "val")):
        folder = tmp_path / "photos" / part
        folder.mkdir(parents=True)
        picture(i).save(folder / "photo.png")
        line = json.dumps({"file_name": "photo.png", "text": WANTED[i][0]})
        (folder / "metadata.jsonl").write_text(line)
    return tmp_path / "photos"


def test_the_parts_of_a_folder(divided):
    for split, i in (("train", 0), ("validation", 1)):
        examples = load_examples(divided, split)
        assert examples.captions == [[WANTED[i][0]]]
        assert examples.image(0).tobytes() == picture(i).tobytes()
    with pytest.raises(DataError, match="no part test, only train and validation"):
        load_examples(divided, "test")
    assert load_examples(divided / "val", "validation").captions == [[WANTED[1][0]]]


def test_limit(tmp_path):
    file = parquet(tmp_path, {"text": ["a", "b", "c"]}, {"text": TEXT})
    assert load_examples(file, limit=2).captions == [["a"], ["b"]]
    assert len(load_examples(file, limit=9)) == 3


@pytest.mark.parametrize("limit", [None, 2])
def test_a_hub_data_set_is_streamed_if_only_a_part_is_wanted(tmp_path, monkeypatch, limit):
    table = Dataset.from_parquet(
        parquet(tmp_path, {"text": ["a", "b", "c"]}, {"text": TEXT}), cache_dir=str(tmp_path)
    )
    asked = {}

    def load_dataset(name, split, streaming):
        asked.update(name=name, split=split, streaming=streaming)
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = load_examples("somebody/photos", "test", limit)
    assert asked == {"name": "somebody/photos", "split": "test", "streaming": limit is not None}
    assert len(examples) == (limit or 3)
    assert examples.image(1).tobytes() == picture(1).tobytes()


def test_a_stream_that_only_says_where_its_images_are(monkeypatch):
    place = "memory://photos/0.png"
    with fsspec.open(place, "wb") as file:
        file.write(png(picture(0)))
    rows = [{"image": {"bytes": None, "path": place}, "text": "a dog"}]
    table = Dataset.from_list(rows, features=Features({"image": ImageFeature(), "text": TEXT}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table.to_iterable_dataset())
    examples = load_examples("somebody/photos", limit=1)
    assert examples.image(0).tobytes() == picture(0).tobytes()
    assert len(open_features(examples, tiny.encoder())) == 1


@pytest.mark.parametrize(
    "count, words", [(0, "photos is empty"), (1, "photos cannot be read.*goodbye")]
)
def test_a_stream_that_breaks_off(monkeypatch, count, words):
    def rows():
        if count:
            yield {"image": {"bytes": png(picture(0)), "path": None}, "text": "a"}
            raise ConnectionError("the server said goodbye")

    features = datasets.Features({"image": datasets.Image(), "text": TEXT})
    table = datasets.IterableDataset.from_generator(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    with pytest.raises(DataError, match=words):
        load_examples("somebody/photos", limit=2)


def test_scenes():
    examples = load_examples("scenes:3:7")
    assert len(examples) == 3 and all(examples.captions) and all(examples.questions)
    assert load_examples("scenes:3:8").captions != examples.captions


def no_images(folder):
    file = str(folder / "data.parquet")
    Dataset.from_dict({"text": ["a"]}).to_parquet(file)
    return file


def no_texts(folder):
    return parquet(folder, {"label": [1]}, {"label": Value("int64")})


def no_parquet(folder):
    file = folder / "text.parquet"
    file.write_text("This is no parquet file.")
    return file


def no_answer(folder):
    asked = [[{"question": "who?", "answer": None}]]
    return parquet(folder, {"questions": asked}, {"questions": QUESTIONS})


def number_as_answer(folder):
    asked = [[{"question": "how many?", "answer": 2}]]
    types = {"questions": List({"question": TEXT, "answer": Value("int64")})}
    return parquet(folder, {"questions": asked}, types)


def answers_that_are_no_texts(folder):
    given = {"question": "who?", "answer": "a dog", "answers": [{"answer": "a dog", "id": 1}]}
    types = {"question": TEXT, "answer": TEXT}
    types |= {"answers": List({"answer": TEXT, "id": Value("int64")})}
    return parquet(folder, {"questions": [[given]]}, {"questions": List(types)})


def no_picture(folder):
    return parquet(folder, {"text": ["a", "b"]}, {"text": TEXT}, [{"bytes": png(picture(0))}, None])


@pytest.mark.parametrize(
    "make, words",
    [
        (no_images, "no image column; its columns are text"),
        (no_texts, "neither captions nor questions"),
        (no_parquet, "cannot be read as a data set"),
        (no_answer, "in row 0"),
        (number_as_answer, "in row 0"),
        (answers_that_are_no_texts, "in row 0"),
        (no_picture, "no image in row 1"),
        (lambda folder: "scenes:many", "cannot be read"),
        (lambda folder: folder / "nothing.parquet", "cannot be read"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(tmp_path, monkeypatch, make, words):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        load_examples(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_corrupt_image_is_named(tmp_path):
    images = [{"bytes": png(picture(i)), "path": None} for i in range(3)]
    images[2]["bytes"] = images[2]["bytes"][:-30]
    examples = Examples(images, [["a"]] * 3, [[]] * 3)
    with pytest.raises(ImageError, match=r"^Image 2 of the data set: .* is damaged[^\n]*\.$"):
        open_features(examples, tiny.encoder())


# The feature cache -------------------------------------------------------------------------------


def pictures(count: int, first: int = 0) -> Examples:
    images = [{"bytes": png(picture(first + i)), "path": None} for i in range(count)]
    return Examples(images, [["a"] for _ in images], [[] for _ in images])


def expected(examples: Examples, mirrored: bool = False) -> torch.Tensor:
    """Features straight from the encoder, rounded as the cache rounds."""
    images = [examples.image(i) for i in range(len(examples))]
    if mirrored:
        images = [ImageOps.mirror(image) for image in images]
    encoder = tiny.encoder()
    return encoder(encoder.preprocess(images)).half().float()


def open_and_count(examples: Examples, **settings) -> tuple[FeatureCache, int]:
    encoder = tiny.encoder()
    cache = open_features(examples, encoder, batch_size=4, **settings)
    return cache, encoder.network.seen


def everything(cache: FeatureCache, view: int = 0) -> torch.Tensor:
    return cache.rows(range(len(cache)), [view] * len(cache))


def test_features_are_computed_once():
    examples = pictures(10)
    cache, seen = open_and_count(examples)
    assert seen == 10 and torch.equal(everything(cache), expected(examples))
    cache, seen = open_and_count(examples)
    assert seen == 0 and torch.equal(everything(cache), expected(examples))
    assert everything(cache).dtype == torch.float32 and len(cache) == 10


def test_an_encoder_in_bfloat16(monkeypatch):
    forward = ImageEncoder.forward
    monkeypatch.setattr(ImageEncoder, "forward", lambda *given: forward(*given).bfloat16())
    cache, seen = open_and_count(pictures(3))
    assert seen == 3 and everything(cache).dtype == torch.float32
    monkeypatch.undo()
    torch.testing.assert_close(everything(cache), expected(pictures(3)), atol=0.01, rtol=0.01)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="of Unix")
def test_the_disk_space_of_a_cache_is_taken_at_once(tmp_path, monkeypatch):
    """A mapped file that grows where no space is left kills the process without a word."""
    monkeypatch.setattr(ImageEncoder, "forward", lambda *_: 1 / 0)
    for _ in range(2):  # and when it is opened again
        with pytest.raises(ZeroDivisionError):
            open_features(pictures(4000), tiny.encoder())
        (file,) = (tmp_path / "cache").glob("*/view-0/features.npy")
        size = file.stat()
        assert size.st_size > 4000 * 4 * 3 * 2 and 512 * size.st_blocks >= size.st_size
        with file.open("r+b") as hollow:
            hollow.truncate(4096)
            hollow.truncate(size.st_size)


def test_flipped_views():
    examples = pictures(5)
    cache, seen = open_and_count(examples, views=2)
    assert seen == 10
    assert torch.equal(everything(cache, 1), expected(examples, mirrored=True))
    mixed = cache.rows([3, 3, 0], [0, 1, 1])
    assert torch.equal(mixed[0], expected(examples)[3])
    assert torch.equal(mixed[1:], expected(examples, mirrored=True)[[3, 0]])
    assert open_and_count(examples)[1] == 0  # the original view alone is there already


def test_a_crop_is_a_part_and_always_the_same():
    columns, rows = np.meshgrid(np.arange(200), np.arange(100))
    ramp = np.stack([columns, rows, 0 * rows], axis=2)
    image = Image.fromarray(ramp.astype(np.uint8))  # red tells the column, green the row
    parts, mirrored = set(), 0
    for seed in range(20):
        crop = np.asarray(view_of(image, 2, seed)).astype(int)
        assert np.array_equal(crop, np.asarray(view_of(image, 2, seed)))
        assert not np.array_equal(crop, np.asarray(view_of(image, 3, seed)))
        height, width = crop.shape[:2]
        assert 0.48 < width * height / (200 * 100) <= 1
        assert width / height == pytest.approx(2, rel=0.05)
        step = crop[0, 1, 0] - crop[0, 0, 0]
        left, top = crop[0, :, 0].min(), crop[0, 0, 1]
        part = ramp[top : top + height, left : left + width]
        assert step in (1, -1) and np.array_equal(crop[:, ::step], part)
        parts.add((left, top, width))
        mirrored += step == -1
    assert len(parts) > 10 and 3 < mirrored < 17


def test_captions_are_tidied():
    assert tidy("a .22 rifle :)") == "a .22 rifle :)"
    assert tidy(" A dog ,  a cat\tand a man 's hat . ") == "A dog, a cat and a man 's hat."


def test_what_was_computed_before_a_crash_is_not_computed_again():
    examples = pictures(10)
    encoder = tiny.encoder()
    compute = encoder.network.forward

    def fail_in_the_third_batch(pixels):
        if encoder.network.seen == 8:
            raise KeyboardInterrupt
        return compute(pixels)

    encoder.network.forward = fail_in_the_third_batch
    with pytest.raises(KeyboardInterrupt):
        open_features(examples, encoder, batch_size=4)
    cache, seen = open_and_count(examples)
    assert seen == 2 and torch.equal(everything(cache), expected(examples))


def test_another_encoder_or_image_has_another_cache(tmp_path):
    examples = pictures(3)
    open_and_count(examples)
    other = open_features(examples, tiny.encoder(scale=2.0))
    torch.testing.assert_close(everything(other), 2 * expected(examples), atol=2e-3, rtol=0)
    moved = pictures(3, first=1)
    assert torch.equal(everything(open_and_count(moved)[0]), expected(moved))
    swapped = Examples(examples.images[::-1], examples.captions, examples.questions)
    assert torch.equal(everything(open_and_count(swapped)[0]), expected(swapped))
    assert len(list((tmp_path / "cache").iterdir())) == 4
    cache, seen = open_and_count(examples)
    assert seen == 0 and torch.equal(everything(cache), expected(examples))


@pytest.mark.parametrize("foreign", ["encoder", "view", "images"])
def test_a_foreign_cache_in_the_place_of_ours_is_not_used(tmp_path, foreign):
    """All of its rows are whole, and none is ours."""
    examples = pictures(5)
    open_and_count(examples, views=2)
    (ours,) = (tmp_path / "cache").iterdir()
    if foreign == "encoder":
        open_features(examples, tiny.encoder(scale=2.0))
    if foreign == "images":
        open_and_count(pictures(5, first=9))
    theirs = next((f for f in (tmp_path / "cache").iterdir() if f != ours), None)
    source = ours / "view-1" if foreign == "view" else theirs / "view-0"
    shutil.copytree(source, ours / "view-0", dirs_exist_ok=True)
    cache, seen = open_and_count(examples)
    assert seen == 5 and torch.equal(everything(cache), expected(examples))


def flip_a_byte_of_row_3(file):
    content = bytearray(file.read_bytes())
    content[-7 * 4 * 3 * 2 + 5] ^= 1  # the rows 3 to 9 are the last seven, 4 x 3 halves each
    file.write_bytes(content)


def cut_in_two(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def of_other_shape(file):
    np.save(file, np.zeros((10, 4, 4), np.float16))


DAMAGES = {
    "one bit of one row": (flip_a_byte_of_row_3, 1),
    "cut in two": (cut_in_two, None),
    "empty": (lambda file: file.write_bytes(b""), 10),
    "text": (lambda file: file.write_text("hello"), 10),
    "another shape": (of_other_shape, 10),
    "gone": (lambda file: file.unlink(), 10),
}


@pytest.mark.parametrize(
    "damage, name",
    [(damage, "features.npy") for damage in DAMAGES]
    + [(damage, "checksums.npy") for damage in list(DAMAGES)[1:]],
)
def test_a_damaged_cache_is_mended(tmp_path, damage, name):
    examples = pictures(10)
    open_and_count(examples)
    (file,) = (tmp_path / "cache").glob(f"*/view-0/{name}")
    spoil, again = DAMAGES[damage]
    spoil(file)
    cache, seen = open_and_count(examples)
    assert seen == again if again else 0 < seen <= 10
    assert torch.equal(everything(cache), expected(examples))
    assert open_and_count(examples)[1] == 0


def test_no_flipped_byte_of_a_header_goes_unnoticed(tmp_path):
    examples = pictures(2)
    open_and_count(examples)
    (file,) = (tmp_path / "cache").glob("*/view-0/features.npy")
    whole = file.read_bytes()
    checksums = (file.parent / "checksums.npy").read_bytes()
    for place in range(128):
        content = bytearray(whole)
        content[place] ^= 1
        file.write_bytes(content)
        (file.parent / "checksums.npy").write_bytes(checksums)
        assert torch.equal(everything(open_and_count(examples)[0]), expected(examples)), place
