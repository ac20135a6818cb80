"""The live demo: one widget in which a class sees BLIP-2 caption, answer, match and look.

The kernel's own thread only shows things; the model works in a thread of its own, one job after
the other, so that the page never stands still. A job that fails ends in one sentence on the page.
"""

import base64
import csv
import io
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from threading import Lock

import anywidget
import ipywidgets as widgets
import torch
import traitlets
from PIL import Image

from blip2_edu.blip2 import Blip2, load_fastest
from blip2_edu.checkpoints.published import checkpoint_folder
from blip2_edu.errors import WeightsError
from blip2_edu.images import MAX_DOWNLOAD_BYTES, ImageError, open_image
from blip2_edu.paths import IMAGES
from blip2_edu.seeing import word_attention
from blip2_edu.text import CutText
from blip2_edu.visualize import overlay

MAX_QUESTION = 200  # characters; a longer one is no question about a photo
MAX_SENTENCES = 12
SHOWN = 420  # pixels of the longer side of the photo on the page
THUMBNAIL = 96
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would compute
LINE = "min-height:1.6em"  # of the status, so that nothing moves when it is empty


current: "Demo | None" = None  # what `blip2_edu.demo()` made last


class PhotoPicker(anywidget.AnyWidget):
    """Gallery, drag and drop, file dialog and webcam; calls `on_photo(source, name)`.

    `source` is a path of the gallery or the bytes of a file; `on_refusal(sentence)` is called where
    the browser has no photo to give.
    """

    _esm = Path(__file__).with_name("picker.js")
    _css = Path(__file__).with_name("picker.css")
    photos = traitlets.List().tag(sync=True)
    max_bytes = traitlets.Int(MAX_DOWNLOAD_BYTES).tag(sync=True)

    def __init__(
        self,
        gallery: list[Path],
        on_photo: Callable[[Path | bytes, str], None],
        on_refusal: Callable[[str], None],
    ):
        photos = [
            {"name": path.name, "thumbnail": data_url(open_image(path), THUMBNAIL)}
            for path in gallery
        ]
        super().__init__(photos=photos)
        self._gallery = {path.name: path for path in gallery}
        self._on_photo, self._on_refusal = on_photo, on_refusal
        self._arriving: dict[str, bytearray] = {}
        self.on_msg(self._receive)

    def _receive(self, _, message: dict, buffers: list) -> None:
        match message:
            case {"kind": "photo", "name": name} if name in self._gallery:
                self._on_photo(self._gallery[name], name)
            case {"kind": "piece", "id": upload, "name": name, "size": size}:
                data = self._arriving.setdefault(upload, bytearray())
                data += buffers[0]
                if len(data) >= size:
                    self._on_photo(bytes(self._arriving.pop(upload)), str(name))
            case {"kind": "unreadable", "id": upload, "name": name}:
                self._arriving.pop(upload, None)
                self._on_refusal(f"The browser cannot read {name}: drop one file, no folder.")
            case {"kind": "too large", "name": name, "size": size}:
                limit = f"{size / 1e6:.0f} MB; at most {self.max_bytes / 1e6:.0f} MB can be sent"
                self._on_refusal(f"{name} has {limit}: save it smaller.")
            case {"kind": "no webcam", "reason": reason}:
                self._on_refusal(f"The browser gives no webcam: {reason}.")


@dataclass
class Entry:
    """What was done with one photo: a row of the history and of its exports."""

    name: str
    thumbnail: str
    caption: str = ""
    answers: list[tuple[str, str]] = field(default_factory=list)


class Demo(widgets.VBox):
    """What `blip2_edu.demo()` shows. `wait()` returns when all jobs begun so far are done."""

    def __init__(self, checkpoint: str = "mini"):
        self._jobs = ThreadPoolExecutor(max_workers=1)
        self._last: Future | None = None
        self._photo_number = 0
        self._closed = False
        self._showing = Lock()  # what the slider shows belongs to the photo and words of now
        self.model: Blip2 | None = None
        self.image: Image.Image | None = None
        self.words: torch.Tensor | None = None  # (words, R, K)
        self.history: list[Entry] = []

        gallery = sorted(IMAGES.glob("*.jpg"))
        self.picker = PhotoPicker(gallery, self.open_photo, self._refuse)
        wide = {"width": "100%"}
        self.checkpoint = widgets.Text(
            checkpoint, description="Checkpoint", placeholder="mini, a folder or a hub id"
        )
        self.load_button = widgets.Button(description="Load", layout={"width": "80px"})
        self.progress = widgets.IntProgress(max=3, layout={"width": "160px"})
        self.status = widgets.HTML()
        self.photo = widgets.Image(format="jpeg", layout={"max_width": "100%"})
        self.photo.layout.visibility = "hidden"
        self.caption = widgets.HTML()
        self.beams = widgets.IntSlider(5, 1, 8, description="Beams")
        self.temperature = widgets.FloatSlider(0, min=0, max=1.5, step=0.1, description="Temp.")
        self.length = widgets.IntSlider(32, 4, 48, description="Max. tokens")
        self.caption_button = widgets.Button(description="Caption again", button_style="primary")
        self.word = widgets.SelectionSlider(
            options=["photo"], description="Where:", disabled=True, layout=wide
        )
        self.question = widgets.Text(placeholder="Ask about the photo, then Enter", layout=wide)
        self.ask_button = widgets.Button(description="Ask", layout={"width": "80px"})
        self.chat = widgets.HTML()
        self.sentences = widgets.Textarea(
            "a dog outdoors\na person on a beach\na plate of food", rows=4, layout=wide
        )
        self.match_button = widgets.Button(description="Which fits best?")
        self.bars = widgets.HTML()
        self.strip = widgets.HTML()
        self.downloads = widgets.HTML()
        super().__init__(self._arrange())

        self.load_button.on_click(lambda _: self.load(self.checkpoint.value))
        self.caption_button.on_click(lambda _: self.describe())
        self.word.observe(lambda _: self._show_photo(), "value")
        self.ask_button.on_click(lambda _: self.ask(self.question.value))
        self.question.on_submit(lambda _: self.ask(self.question.value))
        self.match_button.on_click(lambda _: self.compare(self.sentences.value))
        self.load(checkpoint)

    def _arrange(self) -> list[widgets.Widget]:
        bar = widgets.HBox([self.checkpoint, self.load_button, self.progress])
        seen = widgets.VBox([self.photo, self.word, self.caption], layout={"flex": "1 1 340px"})
        decoding = widgets.VBox([self.beams, self.temperature, self.length, self.caption_button])
        chat = widgets.VBox([self.chat, widgets.HBox([self.question, self.ask_button])])
        match = widgets.VBox([self.sentences, self.match_button, self.bars])
        tabs = widgets.Tab([chat, match, decoding], layout={"flex": "1 1 340px"})
        tabs.titles = ("Ask", "Match", "Decoding")
        picker = widgets.Box([self.picker], layout={"flex": "1 1 220px", "max_width": "320px"})
        columns = widgets.HBox(
            [picker, seen, tabs], layout={"flex_flow": "row wrap", "grid_gap": "16px"}
        )
        return [bar, self.status, columns, self.strip, self.downloads]

    # What the buttons do. Each returns at once; the work is done in the other thread.

    def load(self, checkpoint: str) -> None:
        """Load a checkpoint: "mini", a folder or a hub id. The present one stays until then."""
        checkpoint = checkpoint.strip() or "mini"

        def work() -> None:
            self.progress.value = 0
            checkpoint_folder(checkpoint)  # downloads it, if need be
            self.progress.value = 1
            model = load_fastest(checkpoint)
            self.progress.value = 2
            model.caption(Image.new("RGB", (64, 64)), max_new_tokens=2)  # what is done once
            if self._closed:
                return
            self.model = model
            self.progress.value = 3
            self._say(f"{checkpoint} is ready: choose a photo, or drop one.")
            if self.image is not None:
                self._describe()

        self._start(f"Loading {checkpoint}", work)

    def open_photo(self, source: Path | bytes, name: str) -> None:
        """Take a photo, show it and caption it."""
        self._photo_number += 1  # what still waits to be done to an earlier photo is left undone

        def work() -> None:
            self._loaded()  # without a model a photo is not taken
            try:
                image = open_image(source)
            except ImageError as error:
                raise ImageError(str(error).replace("the image data", name, 1)) from error
            with self._showing:
                self.image, self.words = image, None
            self.chat.value = self.bars.value = ""
            self.history.append(Entry(name, data_url(image, THUMBNAIL)))
            self._describe()

        self._start(f"Opening {name}", work, self._photo_number)

    def describe(self) -> None:
        """Caption the photo anew, with the settings of the sliders."""
        self._start("Looking", self._describe, self._photo_number)

    def _describe(self) -> None:
        """Caption the photo, then find where each word comes from."""
        model, image = self._loaded(), self._chosen()
        with self._showing:
            self.words = None
        self.word.disabled, self.word.options = True, ["photo"]
        self.caption.value = ""
        self._show_photo()
        self._say("Looking", busy=True)
        settings: dict[str, float] = {
            "num_beams": self.beams.value,
            "max_new_tokens": self.length.value,
        }
        if self.temperature.value > 0:
            settings |= {"do_sample": True, "temperature": self.temperature.value, "num_beams": 1}
        caption = model.caption(image, **settings)[0]
        self.caption.value = f"<h3>{escape(caption)}</h3>"
        self.history[-1].caption = caption
        self._show_history()
        if not caption:
            return self._say("The model has nothing to say about this photo.")
        self._say("Finding out where each word comes from", busy=True)
        maps = word_attention(model, image, [caption])[0]
        with self._showing:
            self.words = maps
        words = [f"{i} {word}" for i, word in enumerate(caption.split(), start=1)]
        self.word.options, self.word.disabled = ["photo", *words], False
        self._say("Move the slider: where does each word come from?")

    def ask(self, question: str) -> None:
        """Answer a question about the photo."""
        question = question.strip()
        if not question:
            return self._refuse("Type a question first.")
        if len(question) > MAX_QUESTION:
            limit = f"at most {MAX_QUESTION} characters, and this one has {len(question):,}"
            return self._refuse(f"A question may have {limit}.")

        def work() -> None:
            model, image = self._loaded(), self._chosen()
            if self.question.value.strip() == question:  # else the next one is being typed
                self.question.value = ""
            answer = model.answer(image, question, max_new_tokens=16)[0]
            self.history[-1].answers.append((question, answer))
            self.chat.value = "".join(
                f"<p><b>{escape(q)}</b><br>{escape(a)}</p>" for q, a in self.history[-1].answers
            )
            self._show_history()
            self._say("")

        self._start("Thinking", work, self._photo_number)

    def compare(self, sentences: str) -> None:
        """Rank sentences, one a line, by how well they fit the photo."""
        lines = [line.strip() for line in sentences.splitlines() if line.strip()]
        if not lines:
            return self._refuse("Type a sentence first, or several, one a line.")

        def work() -> None:
            chosen = lines[:MAX_SENTENCES]
            with warnings.catch_warnings(record=True, action="always") as warned:
                scores = self._loaded().match(self._chosen(), chosen)
            shares = scores.score.softmax(dim=0)
            order = scores.score.argsort(descending=True).tolist()
            shown = [line[:MAX_QUESTION] for line in chosen]
            self.bars.value = "".join(bar(shown[i], shares[i].item()) for i in order)
            said = [str(w.message) for w in warned if issubclass(w.category, CutText)]
            if dropped := len(lines) - len(chosen):
                said.append(f"{dropped} sentences were too many and left out.")
            self._say(" ".join(said))

        self._start("Comparing", work, self._photo_number)

    def close(self) -> None:
        """Let go of the model; ipywidgets keeps every widget that is not closed."""
        self._closed = True
        self._jobs.shutdown(wait=False, cancel_futures=True)
        self.model = self.image = self.words = None
        inside = list(self.children)
        while inside:
            widget = inside.pop()
            inside += getattr(widget, "children", ())
            widget.close()
        super().close()

    def wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def _loaded(self) -> Blip2:
        if self.model is None:
            raise WeightsError("No checkpoint is loaded: load one first.")
        return self.model

    def _chosen(self) -> Image.Image:
        if self.image is None:
            raise ImageError("Choose a photo first.")
        return self.image

    def _start(self, what: str, work: Callable[[], None], photo: int | None = None) -> None:
        """Queue a job, unless its photo is no longer the current one when its turn comes."""
        self._say(what, busy=True)

        def job() -> None:
            if photo is not None and photo != self._photo_number:
                return
            try:
                self._say(what, busy=True)
                work()
            except (ImageError, WeightsError) as error:
                self._refuse(str(error))
            except Exception as error:  # nothing may end in a traceback before a class
                self._refuse(f"That did not work ({type(error).__name__}: {error}).")

        self._last = self._jobs.submit(job)

    # What is shown.

    def _say(self, sentence: str, busy: bool = False) -> None:
        dots = '<progress style="width:4em"></progress> ' if busy else ""
        self.status.value = f"<div aria-live='polite' style='{LINE}'>{dots}{escape(sentence)}</div>"

    def _refuse(self, sentence: str) -> None:
        style = f"{LINE};color:#B00020"
        self.status.value = f"<div role='alert' style='{style}'>{escape(sentence)}</div>"

    def _show_photo(self) -> None:
        """The photo, or the map of the word that the slider is on."""
        with self._showing:
            shown, word = self._chosen(), (self.word.index or 0) - 1
            if self.words is not None and 0 <= word < len(self.words):
                shown = overlay(shown, self.words[word])
            self.photo.value = jpeg(shown, SHOWN)
        self.photo.layout.visibility = "visible"

    def _show_history(self) -> None:
        figures = "".join(
            f"<figure style='display:inline-block;width:{THUMBNAIL + 20}px;margin:4px;"
            f"vertical-align:top'><img src='{e.thumbnail}' alt='{escape(e.name)}'>"
            "<figcaption style='font-size:11px;line-height:1.3;white-space:normal'>"
            f"{escape(e.caption)}</figcaption></figure>"
            for e in self.history
        )
        self.strip.value = f"<div style='overflow-x:auto;white-space:nowrap'>{figures}</div>"
        self.downloads.value = "Save the history: " + " ".join(
            f"<a download='blip2.{kind}' href='data:text/{kind};base64,{encode(text)}'>{kind}</a>"
            for kind, text in (
                ("html", history_html(self.history)),
                ("csv", history_csv(self.history)),
            )
        )


def bar(sentence: str, share: float) -> str:
    """One sentence with its share of the belief, as HTML."""
    return (
        f"<div style='margin:4px 0'>{escape(sentence)}"
        f"<div style='background:#0072B2;color:white;height:18px;width:{100 * share:.1f}%'></div>"
        f"<small>{share:.0%}</small></div>"
    )


def history_html(history: list[Entry]) -> str:
    """A page with every photo, its caption and its questions."""
    rows = "".join(
        f"<tr><td><img src='{e.thumbnail}' alt=''><br>{escape(e.name)}</td>"
        f"<td>{escape(e.caption)}</td>"
        f"<td>{'<br>'.join(escape(f'{q} {a}') for q, a in e.answers)}</td></tr>"
        for e in history
    )
    head = "<tr><th>photo</th><th>caption</th><th>answers</th></tr>"
    return f"<!doctype html><meta charset='utf-8'><title>BLIP-2</title><table>{head}{rows}</table>"


def history_csv(history: list[Entry]) -> str:
    """A row for each photo and question; what would be a formula is quoted."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["photo", "caption", "question", "answer"])
    for e in history:
        for question, answer in e.answers or [("", "")]:
            row = (e.name, e.caption, question, answer)
            writer.writerow([f"'{cell}" if cell.startswith(FORMULA) else cell for cell in row])
    return file.getvalue()


def jpeg(image: Image.Image, side: int) -> bytes:
    """A copy whose longer side is at most `side` pixels, as the bytes of a JPEG."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(file, "JPEG", quality=85)
    return file.getvalue()


def data_url(image: Image.Image, side: int) -> str:
    return f"data:image/jpeg;base64,{encode(jpeg(image, side))}"


def encode(data: str | bytes) -> str:
    return base64.b64encode(data.encode() if isinstance(data, str) else data).decode()


def demo(checkpoint: str = "mini") -> Demo:
    """The live demo as a widget, for a notebook; checkpoint as for `Blip2.from_pretrained`.

    One at a time: a cell that is run again closes the demo it made before, model and all.
    """
    global current
    if current is not None:
        current.close()
    current = Demo(checkpoint)
    return current
