"""The live demo without a browser: every job ends in a clear state. `test_browser` has the rest."""

import csv
import io
from html.parser import HTMLParser
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from helpers import small_models
from PIL import Image

import blip2_edu
from blip2_edu.app import widgets
from blip2_edu.app.widgets import Entry, history_csv, history_html
from blip2_edu.paths import ROOT

COW = ROOT / "images" / "cow.jpg"
MARKUP = "<img src=x onerror=alert(1)>"


class Tags(HTMLParser):
    """The names of all tags in a text."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)


@pytest.fixture(scope="module")
def shared():
    demo = blip2_edu.demo()
    demo.wait()
    assert "mini is ready" in demo.status.value and demo.progress.value == 3
    return demo


@pytest.fixture
def demo(shared):
    shared.open_photo(COW, "cow.jpg")
    shared.wait()
    assert "alert" not in shared.status.value
    return shared


def said(demo) -> str:
    demo.wait()
    assert "Traceback" not in demo.status.value and "<progress" not in demo.status.value
    return demo.status.value


def test_a_photo_gets_a_caption_and_a_map_for_each_word(demo):
    caption = demo.history[-1].caption
    assert caption and demo.caption.value == f"<h3>{caption}</h3>"
    assert len(demo.words) == len(caption.split()) == len(demo.word.options) - 1
    shown = [demo.photo.value]
    for option in demo.word.options[1:3]:
        demo.word.value = option
        shown.append(demo.photo.value)
    assert len(set(shown)) == 3
    assert all(max(Image.open(io.BytesIO(x)).size) == widgets.SHOWN for x in shown)


def test_clicking_returns_at_once(demo, monkeypatch):
    """The page answers while the model still works."""
    release = widgets.Future()
    monkeypatch.setattr(demo.model, "caption", lambda *a, **k: [release.result(timeout=30)])
    demo.describe()
    assert "<progress" in demo.status.value and not demo._last.done()
    release.set_result("a cow at last")
    demo.wait()
    assert "a cow at last" in demo.caption.value


def test_the_last_of_many_clicks_wins(demo):
    before = len(demo.history)
    for name in ("horses", "kitten", "coffee"):
        demo.open_photo(ROOT / "images" / f"{name}.jpg", name)
    said(demo)
    assert demo.history[-1].name == "coffee"
    assert len(demo.history) <= before + 2  # the first may have begun; what waited was dropped


def test_decoding_settings_reach_the_model(demo, monkeypatch):
    seen = {}
    monkeypatch.setattr(demo.model, "caption", lambda image, **k: [seen.update(k) or "a cow"])
    demo.beams.value, demo.length.value = 2, 9
    demo.describe()
    said(demo)
    assert seen == {"num_beams": 2, "max_new_tokens": 9}
    demo.temperature.value = 0.5
    demo.describe()
    said(demo)
    assert seen["do_sample"] and seen["temperature"] == 0.5 and seen["num_beams"] == 1
    demo.temperature.value, demo.beams.value, demo.length.value = 0, 5, 32


def test_a_chat(demo):
    for question in ("What animal is this?", MARKUP):
        demo.ask(question)
        said(demo)
    assert [question for question, _ in demo.history[-1].answers] == [
        "What animal is this?",
        MARKUP,
    ]
    assert set(Tags(demo.chat.value).found) <= {"p", "b", "br"}


@pytest.mark.parametrize(
    ("question", "words"), [("", "first"), ("  \n", "first"), ("x" * 10_000, "at most 200")]
)
def test_what_is_no_question_is_refused(demo, question, words):
    demo.ask(question)
    assert words in said(demo) and "alert" in demo.status.value
    assert not demo.history[-1].answers


def test_a_question_typed_meanwhile_stays(demo):
    demo.question.value = "who is this?"
    demo.ask("what is this?")
    said(demo)
    assert demo.question.value == "who is this?"
    demo.ask(demo.question.value)
    said(demo)
    assert demo.question.value == ""


def test_a_checkpoint_that_arrives_after_closing_is_let_go(monkeypatch):
    go_on, begun = Event(), Event()

    def slow(name):
        begun.set()
        go_on.wait()
        return SimpleNamespace(caption=lambda *_, **__: ["a dog"])

    monkeypatch.setattr(widgets, "load_fastest", slow)
    demo = widgets.Demo()
    begun.wait()
    demo.close()
    go_on.set()
    demo.wait()
    assert demo.model is None


def test_sentences_are_ranked(demo):
    demo.compare("a plate of food\n\na cow on grass\n" + MARKUP)
    said(demo)
    assert demo.bars.value.count("%</small>") == 3
    assert set(Tags(demo.bars.value).found) <= {"div", "small"}
    shares = torch.tensor([float(x.split("%")[0]) for x in demo.bars.value.split("width:")[1:]])
    assert shares.sum() == pytest.approx(100, abs=0.2)
    assert (shares.sort(descending=True).values == shares).all()
    demo.compare("\n".join(["a cow"] * 20))
    assert "8 sentences were too many" in said(demo)
    demo.compare("  ")
    assert "alert" in said(demo)


def test_a_sentence_that_is_cut_is_named(monkeypatch, tmp_path, recwarn):
    model = small_models.blip2(tmp_path)
    monkeypatch.setattr(widgets, "load_fastest", lambda checkpoint: model)
    demo = widgets.Demo()
    demo.open_photo(COW, "cow.jpg")
    said(demo)
    recwarn.clear()
    demo.compare("\n".join(["a dog " * 40 + "cat", "a dog " * 40, *["a dog"] * 11]))
    cut = "2 of 12 texts cut: only the first 16 tokens are read. 1 sentences were too many"
    assert cut in said(demo) and not recwarn
    demo.compare("a cow\na dog")
    assert "cut" not in said(demo)
    demo.close()


BAD = {
    "half.jpg": COW.read_bytes()[:3000],
    "text.jpg": b"no image",
    "empty.png": b"",
    MARKUP + ".gif": b"GIF89a",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_a_sentence_and_the_photo_stays(demo, name):
    caption = demo.caption.value
    demo.open_photo(BAD[name], name)
    assert "alert" in said(demo)
    assert set(Tags(demo.status.value).found) == {"div"}
    assert demo.caption.value == caption
    demo.ask("What animal is this?")
    assert "alert" not in said(demo)


def test_a_hundred_megapixels_are_refused(demo, recwarn):
    file = io.BytesIO()
    Image.new("1", (10_000, 10_001)).save(file, "PNG")
    demo.open_photo(file.getvalue(), "huge.png")
    assert "huge.png has too many pixels" in said(demo)
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]


def test_a_fault_of_ours_is_a_sentence_too(demo, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("a fault <b>planted</b>")

    monkeypatch.setattr(demo.model, "caption", fail)
    demo.describe()
    assert "did not work (RuntimeError: a fault &lt;b&gt;" in said(demo)


def test_a_wrong_checkpoint_leaves_the_model(demo, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = demo.model
    demo.load("no/such <i>checkpoint</i>")
    assert "alert" in said(demo) and "<i>" not in demo.status.value
    assert demo.model is model
    demo.load("mini")
    assert "alert" not in said(demo) and demo.progress.value == 3
    assert demo.model is not model and demo.caption.value  # the photo was captioned anew


def test_before_anything_is_loaded_or_chosen(monkeypatch):
    monkeypatch.setattr(widgets.Demo, "load", lambda self, checkpoint: None)
    demo = widgets.Demo()
    demo.ask("who?")
    assert "load one first" in said(demo)
    demo.model = object()
    demo.describe()
    assert "Choose a photo first" in said(demo)


def test_a_slider_that_is_ahead_of_its_words_shows_the_photo(demo):
    demo.word.value = demo.word.options[-1]
    with_word = demo.photo.value
    demo.words = None  # as while a new caption is being written
    demo._show_photo()
    assert demo.photo.value != with_word and "Traceback" not in demo.status.value


def test_a_cell_that_runs_again_closes_its_demo(monkeypatch):
    monkeypatch.setattr(widgets.Demo, "load", lambda self, checkpoint: None)
    monkeypatch.setattr(widgets, "current", None)
    first = blip2_edu.demo()
    first.model = object()
    second = blip2_edu.demo()
    assert first.model is None and first.comm is None
    assert first.question.comm is None and first.picker.comm is None  # and what is inside
    assert widgets.current is second


def picker(calls: list) -> widgets.PhotoPicker:
    return widgets.PhotoPicker([COW], lambda *photo: calls.append(photo), calls.append)


def test_the_picker_hands_on_photos_of_the_gallery_only():
    calls = []
    chosen = picker(calls)
    chosen._receive(chosen, {"kind": "photo", "name": "cow.jpg"}, [])
    chosen._receive(chosen, {"kind": "photo", "name": "../../secret.jpg"}, [])
    assert calls == [(COW, "cow.jpg")]


def test_the_picker_puts_pieces_together():
    calls = []
    chosen = picker(calls)
    for upload, piece in (("a", b"12"), ("b", b"xy"), ("a", b"3"), ("b", b"z")):
        about = {"kind": "piece", "id": upload, "name": upload, "size": 3}
        chosen._receive(chosen, about, [memoryview(piece)])
    assert calls == [(b"123", "a"), (b"xyz", "b")]
    chosen._receive(chosen, {"kind": "piece", "id": "c", "name": "c", "size": 0}, [b""])
    assert calls[-1] == (b"", "c") and not chosen._arriving


def test_the_picker_says_what_the_browser_cannot_give():
    calls = []
    chosen = picker(calls)
    chosen._receive(chosen, {"kind": "too large", "name": "a.tif", "size": 99_000_000}, [])
    chosen._receive(chosen, {"kind": "no webcam", "reason": "denied"}, [])
    chosen._receive(chosen, {"kind": "piece", "id": "d", "name": "d", "size": 9}, [b"1"])
    chosen._receive(chosen, {"kind": "unreadable", "id": "d", "name": "d"}, [])
    assert not chosen._arriving
    assert calls == [
        "a.tif has 99 MB; at most 32 MB can be sent: save it smaller.",
        "The browser gives no webcam: denied.",
        "The browser cannot read d: drop one file, no folder.",
    ]


def test_exports_escape_what_comes_from_outside():
    history = [
        Entry(MARKUP, "data:,", "=1+1", [(MARKUP, '"quoted", and\nbroken')]),
        Entry("b.jpg", "data:,", "a cow"),
    ]
    assert set(Tags(history_html(history)).found) <= {
        *("meta", "title", "table", "tr", "th", "td", "img", "br")
    }
    assert Tags(history_html(history)).found.count("img") == 2
    rows = list(csv.reader(io.StringIO(history_csv(history))))
    assert rows[1:] == [
        [MARKUP, "'=1+1", MARKUP, '"quoted", and\nbroken'],
        ["b.jpg", "a cow", "", ""],
    ]
