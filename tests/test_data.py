"""Data sets in every form, and a feature cache that is never wrong and never does a thing twice."""

import io
import json
import os
import re
import shutil
import tarfile
import zipfile

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from helpers import tiny
from PIL import Image, ImageOps

from blip2_edu.data import examples as examples_module
from blip2_edu.data import features, sources
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
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")


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


def test_the_parts_in_an_archive(divided, tmp_path):
    shutil.make_archive(str(tmp_path / "photos"), "zip", divided)
    for split, i in (("train", 0), ("validation", 1)):
        examples = load_examples(tmp_path / "photos.zip", split)
        assert examples.captions == [[WANTED[i][0]]]
        assert examples.image(0).tobytes() == picture(i).tobytes()


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


# One row a caption: pictures 0 and 1 with their captions in turn, one of them twice.
ROWS = [(0, "a dog"), (1, "a cat"), (0, "the dog"), (1, "the cat"), (0, "a dog")]


def rows_table() -> Dataset:
    rows = [{"image": {"bytes": png(picture(i)), "path": None}, "text": text} for i, text in ROWS]
    return Dataset.from_list(rows, features=Features({"image": ImageFeature(), "text": TEXT}))


def rows_in_parquet(folder):
    rows_table().to_parquet(str(folder / "photos.parquet"))
    return folder / "photos.parquet"


def rows_saved(folder):
    rows_table().save_to_disk(str(folder / "photos"))
    return folder / "photos"


def rows_saved_in_parts(folder):
    parts = {"train": rows_table(), "validation": rows_table().select([0])}
    DatasetDict(parts).save_to_disk(str(folder / "photos"))
    return folder / "photos"


def rows_in_a_clone(folder):
    (folder / "photos" / "data").mkdir(parents=True)
    (folder / "photos" / "README.md").write_text("A data set of the hub.")
    (folder / "photos" / ".gitattributes").write_text("*.parquet filter=lfs")
    for shard, rows in enumerate(([0, 1, 2], [3, 4])):
        file = folder / "photos" / "data" / f"train-0000{shard}-of-00002.parquet"
        rows_table().select(rows).to_parquet(str(file))
    file = folder / "photos" / "data" / "validation-00000-of-00001.parquet"
    rows_table().select([0]).to_parquet(str(file))
    return folder / "photos"


def image_files(folder):
    (folder / "images").mkdir(parents=True)
    for i in range(2):
        picture(i).save(folder / "images" / f"{i}.png")


def rows_in_metadata(folder):
    image_files(folder / "photos")
    lines = [json.dumps({"file_name": f"images/{i}.png", "caption": text}) for i, text in ROWS]
    (folder / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    return folder / "photos"


def rows_in_csv(folder):
    image_files(folder)
    lines = [f"images/{i}.png,{text}" for i, text in ROWS]
    (folder / "captions.csv").write_text("\n".join(["image,caption", *lines]), "utf-8-sig")
    return folder / "captions.csv"


def rows_in_jsonl(folder):
    image_files(folder)
    rows = [{"image": str(folder / "images" / f"{i}.png"), "caption": text} for i, text in ROWS]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "captions.jsonl"


def rows_in_zip(folder):
    inside = rows_in_metadata(folder)
    (folder / "zipped").mkdir()
    with zipfile.ZipFile(folder / "zipped" / "images.zip", "w") as archive:
        for file in inside.rglob("*"):
            archive.write(file, file.relative_to(inside))
    shutil.rmtree(inside)
    return folder / "zipped"


def rows_in_tar(folder):
    """As WebDataset has it: files of the same name beside one another."""
    with tarfile.open(folder / "photos.tar", "w") as archive:
        for number, (i, text) in enumerate(ROWS):
            for ending, content in (("png", png(picture(i))), ("txt", f"{text}\n".encode())):
                member = tarfile.TarInfo(f"{number:05}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder / "photos.tar"


@pytest.mark.parametrize(
    "make",
    [
        rows_in_parquet,
        rows_saved,
        rows_saved_in_parts,
        rows_in_a_clone,
        rows_in_metadata,
        rows_in_csv,
        rows_in_jsonl,
        rows_in_zip,
        rows_in_tar,
    ],
)
def test_every_kind_of_source_with_a_row_a_caption(tmp_path, monkeypatch, make):
    source = make(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(examples_module, "open_image", lambda stored: 1 / 0)
        examples = load_examples(source)  # decodes nothing
    assert examples.captions == WANTED
    for i in range(2):
        assert examples.image(i).tobytes() == picture(i).tobytes()
    assert load_examples(source, limit=1).captions == WANTED[:1]


@pytest.mark.parametrize("limit, wanted", [(None, WANTED), (2, WANTED), (1, WANTED[:1])])
def test_a_row_a_caption_from_the_hub(monkeypatch, limit, wanted):
    """A limited stream is read until one image too many comes."""
    table = rows_table().select([0, 4, 2, 1, 3])
    given = {True: table.to_iterable_dataset(), False: table}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, streaming: given[streaming])
    assert load_examples("somebody/photos", limit=limit).captions == wanted


def test_equal_images_share_all_that_is_said_of_them(tmp_path):
    """Equal bytes make an image, not names: those are often all alike in a table."""
    stored = [{"bytes": png(picture(i)), "path": "image.png"} for i in (3, 4, 3)]
    asked = [{"question": "who?", "answer": "a dog"}, {"question": "where?", "answer": "a park"}]
    columns = {
        "captions": [["a dog", "a dog"], [], ["the dog"]],
        "questions": [asked[:1], [], asked],
        "subject": [["dog"], None, ["puppy", "dog"]],
        "scene": [None, ["sea"], ["park"]],
    }
    types = {"captions": List(TEXT), "questions": QUESTIONS}
    types |= {"subject": List(TEXT), "scene": List(TEXT)}
    read = load_examples(parquet(tmp_path, columns, types, stored))
    assert read.captions == [["a dog", "the dog"], []] and len(read) == len(read.images) == 2
    assert [[q["answer"] for q in each] for each in read.questions] == [["a dog", "a park"], []]
    assert read.subjects == [["dog", "puppy"], []] and read.scenes == [["park"], ["sea"]]
    assert read.image(1).tobytes() == picture(4).tobytes()


def test_copies_of_a_file_are_one_image(tmp_path):
    file = rows_in_csv(tmp_path)
    shutil.copy(tmp_path / "images" / "0.png", tmp_path / "images" / "copy.png")
    with file.open("a") as lines:
        lines.write("\nimages/copy.png,a copy\n./images/1.png,again\n")
    assert load_examples(file).captions == [[*WANTED[0], "a copy"], [*WANTED[1], "again"]]


@pytest.mark.parametrize("name", ["photos [2024]", "a*b?", "{a,b}", "__all", "100 %20 #1", "~me"])
def test_names_are_no_patterns(tmp_path, monkeypatch, name):
    place = tmp_path / name
    place.mkdir()
    monkeypatch.chdir(tmp_path)  # "~me" as it is, not as a home
    rows_in_metadata(place)
    rows_table().to_parquet(str(place / "[1].parquet"))
    assert load_examples(place / "[1].parquet").captions == WANTED
    assert load_examples(f"{name}/[1].parquet").captions == WANTED
    assert load_examples(f"{name}/photos").captions == WANTED
    shutil.rmtree(place / "photos")
    assert load_examples(name).captions == WANTED


def test_photos_named_like_parts_are_not_left_out(tmp_path):
    names = ["train-station.png", "test.png", "val 1.png"]
    for i, name in enumerate(names):
        picture(i).save(tmp_path / name)
    lines = ["file_name,text", *(f"{name},{name[:3]}" for name in names)]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    assert load_examples(tmp_path).captions == [["tra"], ["tes"], ["val"]]


def test_a_changed_archive_and_a_changed_table_are_read_anew(tmp_path):
    for make in (rows_in_tar, rows_in_parquet):
        file = make(tmp_path)
        assert load_examples(file).captions == WANTED
        state = file.stat()
        changed = file.read_bytes().replace(b"the cat", b"the cow")
        file.write_bytes(changed)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
        assert load_examples(file).captions == [WANTED[0], ["a cat", "the cow"]]


FORMS_OF_IMAGES = {
    "struct": lambda i: {"bytes": png(picture(i)), "path": "0.png"},
    "bytes": lambda i: png(picture(i)),
    "paths": lambda i: f"images/{i}.png",
    "struct of paths": lambda i: {"bytes": None, "path": f"images/{i}.png"},
}


@pytest.mark.parametrize("form", FORMS_OF_IMAGES)
def test_images_without_what_datasets_notes_of_them(tmp_path, form):
    image_files(tmp_path)
    column = [FORMS_OF_IMAGES[form](i) for i in range(2)]
    table = pa.table({"picture": column, "text": ["a", "b"]})
    pq.write_table(table, tmp_path / "data.parquet")
    examples = load_examples(tmp_path / "data.parquet")
    assert examples.captions == [["a"], ["b"]]
    assert examples.image(1).tobytes() == picture(1).tobytes()
    assert len(open_features(examples, tiny.encoder())) == 2


@pytest.mark.parametrize("limit", [None, 5])
def test_of_several_image_columns_image_is_taken_and_said(tmp_path, monkeypatch, limit):
    masks = [{"bytes": png(picture(9)), "path": None}] * 5
    kept = rows_table().add_column("mask", masks).cast_column("mask", ImageFeature())
    kept = kept.select_columns(["mask", "image", "text"])
    given = {True: kept.to_iterable_dataset(), False: kept}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, streaming: given[streaming])
    with pytest.warns(UserWarning, match="several columns of images; image is taken, not mask"):
        examples = load_examples("somebody/photos", limit=limit)
    assert len(examples) == 2 and examples.image(1).tobytes() == picture(1).tobytes()


def test_lists_keep_every_field(tmp_path):
    """Texts that look like numbers or like nothing, fields that only later rows have, any types."""
    image_files(tmp_path)
    (tmp_path / "list.csv").write_text("image,caption\nimages/0.png,12\nimages/1.png,NA\n")
    assert load_examples(tmp_path / "list.csv").captions == [["12"], ["NA"]]
    rows = [
        {"image": "images/0.png", "questions": [{"question": "who?", "answer": "a dog"}]},
        {"image": "images/1.png", "caption": "a", "id": 1},
        {"image": "images\\1.png", "caption": ["b", "c"], "id": "two"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    examples = load_examples(tmp_path / "list.json")
    assert examples.captions == [[], ["a", "b", "c"]] and len(examples.questions[0]) == 1


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


def half_a_shard(folder):
    source = rows_in_a_clone(folder)
    shard = source / "data" / "train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    return source


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


def write(name, text):
    """Make a file of this text beside two images."""

    def make(folder):
        image_files(folder)
        (folder / name).write_text(text)
        return folder / name

    return make


def number_as_image(folder):
    Dataset.from_dict({"image": [1], "text": ["a"]}).to_parquet(str(folder / "data.parquet"))
    return folder / "data.parquet"


def images_alone(folder):
    image_files(folder)
    return folder


def several_kinds(folder):
    rows_in_csv(folder)
    rows_table().to_parquet(str(folder / "photos.parquet"))
    return folder


def several_folders(folder):
    for name in ("en", "fr"):
        (folder / name).mkdir()
        rows_in_parquet(folder / name).rename(folder / name / "train-00000-of-00001.parquet")
    return folder


def one_of_no_part(folder):
    shutil.copy(rows_in_parquet(folder), folder / "train.parquet")
    return folder


@pytest.mark.parametrize(
    "make, words",
    [
        (no_images, "no image column; its columns are text"),
        (number_as_image, "no image column; its columns are image (int64), text (string)"),
        (images_alone, "2 images without captions; write captions into metadata.jsonl"),
        (lambda folder: folder, "no images with captions"),
        (several_kinds, "several kinds, 1 .csv and 1 .parquet; name one of the files"),
        (several_folders, "holds data in en and in fr; name one of them"),
        (one_of_no_part, "photos.parquet belongs to no part of"),
        (lambda folder: image_files(folder) or folder / "images" / "0.png", "is one image"),
        (write("notes.txt", "A dog."), "is no data set; its name would end in .parquet"),
        (write("data.parquet", "version https://git-lfs.github.com/spec/v1"), "`git lfs pull`"),
        (write("a.csv", "image,caption\nimages/0.png,a dog, a cat"), "Line 2 of a.csv has more"),
        (write("a.csv", "image,caption\nimages/0.png,\nimages/1.png, "), "all texts are empty"),
        (write("a.csv", "image,caption\nimages/2.png,a"), "images/2.png, which is no file, in row"),
        (write("a.jsonl", '{"image": "http://a.b/c.jpg", "text": "a"}'), "names http://a.b/c.jpg"),
        (write("a.jsonl", '{"image": "images/0.png", "text": "a"}\n{'), "Line 2 of a.jsonl is no"),
        (write("a.json", '["images/0.png"]'), "does not name what it holds"),
        (write("a.json", "[]"), "is empty"),
        (write("a.csv", "file_name,text\nimages/0.png,a\n,b"), "has no image in row 1"),
        (lambda folder: write("images/0.json", "{")(folder).parent, "Line 1 of 0.json is no JSON"),
        (lambda folder: write("images/0.json", "[]")(folder).parent, "is not about one image"),
        (write("a.zip", "This is no archive."), "cannot be read as a data set"),
        (no_texts, "neither captions nor questions"),
        (no_parquet, "text.parquet is no parquet file, or only a part of one"),
        (half_a_shard, "train-00001-of-00002.parquet is no parquet file, or only a part of one"),
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
