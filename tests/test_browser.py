"""The live demo in a real browser: Chromium, driven by Playwright, in JupyterLab and as an app.

Skipped where Chromium is not installed; `.ci/run` installs it. BLIP2_SCREENSHOTS=folder keeps what
the browser showed.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
READY, ANSWERED = 240_000, 60_000  # milliseconds to wait for a page and for the model, at most

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


@contextmanager
def server(*command: str) -> Iterator[str]:
    """Start a server on a free port and yield its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", *command, f"--port={port}", "--no-browser"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} stopped with exit code {process.returncode}")
            try:
                urllib.request.urlopen(f"{address}/static/favicon.ico", timeout=60)
                break
            except urllib.error.HTTPError:
                break  # it answers
            except OSError:
                time.sleep(0.2)
        else:
            raise RuntimeError(f"{command[0]} does not answer")
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A container's root may not start Chromium's sandbox; it opens our own pages alone.
        # Its webcam is a moving test picture, lent to every page.
        webcam = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", *webcam]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1366, "height": 900})
    page.set_default_timeout(READY)
    yield page
    page.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Good and bad files, by what they are."""
    folder = tmp_path_factory.mktemp("files")
    photo = ROOT / "images" / "cow.jpg"
    made = {
        "photo": folder / "cow & <b>calf.jpg",
        "animation": folder / "animation.gif",
        "corrupt": folder / "corrupt.jpg",
        "text": folder / "text.jpg",
        "empty": folder / "empty.png",
        "huge": folder / "huge.png",
    }
    shutil.copy(photo, made["photo"])
    frames = [Image.open(ROOT / "images" / f"{name}.jpg") for name in ("horses", "cow")]
    frames[0].save(made["animation"], save_all=True, append_images=[frames[1].resize((99, 66))])
    made["corrupt"].write_bytes(photo.read_bytes()[:3000])
    made["text"].write_text("This is not a photograph.")
    made["empty"].touch()
    Image.new("1", (10_000, 10_001)).save(made["huge"])
    return made


def screenshot(page, name: str) -> None:
    if folder := os.environ.get("BLIP2_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def use_the_demo(page, files: dict[str, Path], name: str) -> None:
    """Do what an instructor does, and what a class would try."""
    picker = page.locator(".blip2-picker")
    picker.wait_for()
    page.get_by_text(re.compile("is ready: choose a photo|Move the slider")).first.wait_for()
    assert picker.locator(".gallery img").count() >= 16
    screenshot(page, f"{name}-1-ready")

    choose = picker.locator("input[type=file]")
    done = page.get_by_alt_text(files["photo"].name)  # in the history, once there is a caption
    start = time.perf_counter()
    choose.set_input_files(files["photo"])
    done.wait_for(timeout=ANSWERED)
    seconds, caption = time.perf_counter() - start, page.locator(".widget-html-content h3")
    assert re.search(r"\w+ \w+", caption.inner_text())
    print(f"{name}: a caption after {seconds:.1f} s: {caption.inner_text()}")
    slider = page.locator(".noUi-target:not([disabled]):visible").first
    slider.wait_for(timeout=ANSWERED)  # until then the words have no maps

    photo = page.locator("img.widget-image, .widget-image img").first
    before = photo.get_attribute("src")
    slider.click()  # in the middle: some word of the caption
    page.wait_for_function(
        "([image, before]) => image.src !== before", arg=[photo.element_handle(), before]
    )
    screenshot(page, f"{name}-2-word")

    question = page.get_by_placeholder("Ask about the photo")
    question.fill("What <img src=x onerror='window.broken=1'> is this?")
    question.press("Enter")
    page.locator("p:visible", has_text="is this?").wait_for(timeout=ANSWERED)
    for asked, said in (("", "Type a question first"), ("why " * 2500, "at most 200 characters")):
        question.fill(asked)
        page.get_by_role("button", name="Ask", exact=True).click()
        page.get_by_role("alert").filter(has_text=said).wait_for(timeout=ANSWERED)
    screenshot(page, f"{name}-3-asked")

    for kind in ("corrupt", "text", "empty", "huge"):
        choose.set_input_files(files[kind])
        page.get_by_role("alert").filter(has_text=files[kind].name).wait_for(timeout=ANSWERED)
        screenshot(page, f"{name}-4-{kind}")
    dropped = page.evaluate_handle(
        "() => { const data = new DataTransfer();"
        " data.items.add(new File(['no image'], 'dropped.txt')); return data; }"
    )
    picker.locator(".drop").dispatch_event("drop", {"dataTransfer": dropped})
    page.get_by_role("alert").filter(has_text="dropped.txt").wait_for(timeout=ANSWERED)

    picker.get_by_role("button", name="Use the webcam").click()
    page.wait_for_function("document.querySelector('.blip2-picker video').videoWidth > 0")
    picker.get_by_role("button", name="Take the photo").click()
    page.locator("figure img[alt='webcam.jpg']").wait_for(timeout=ANSWERED)
    slider.wait_for(timeout=ANSWERED)

    choose.set_input_files(files["animation"])
    page.locator("[aria-live]:visible", has_text="Move the slider").wait_for(timeout=ANSWERED)

    picker.locator("button[title='cow.jpg']").click()
    picker.locator("button[title='horses.jpg']").click()  # two clicks at once: the last one counts
    page.locator("figure img[alt='horses.jpg']").last.wait_for(timeout=ANSWERED)
    page.locator("[aria-live]:visible", has_text="Move the slider").wait_for(timeout=ANSWERED)

    page.get_by_role("tab", name="Match").click()
    page.get_by_role("button", name="Which fits best?").click()
    page.locator("small:visible", has_text="%").first.wait_for(timeout=ANSWERED)
    screenshot(page, f"{name}-5-match")
    with page.expect_download() as download:
        page.get_by_role("link", name="csv").click()
    assert "horses.jpg" in download.value.path().read_text()
    assert page.evaluate("window.broken") is None
    assert page.get_by_text("Traceback").count() == 0


def test_the_demo_as_an_app(page, files):
    with server("voila", "blip2_edu/app/app.ipynb") as address:
        page.goto(address)
        use_the_demo(page, files, "app")


def test_the_demo_in_jupyterlab(page, files, tmp_path):
    shutil.copy(ROOT / "notebooks" / "12_live_demo.ipynb", tmp_path)  # Run All would change it
    options = ["--IdentityProvider.token=", f"--ServerApp.root_dir={tmp_path}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--allow-root")
    with server("jupyter", "lab", *options) as address:
        no_news = page.get_by_role("button", name="No", exact=True)
        page.add_locator_handler(no_news, lambda button: button.click())
        page.goto(f"{address}/lab/tree/12_live_demo.ipynb")
        idle = page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")
        idle.wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=busy]").wait_for()
        idle.wait_for()
        page.locator(".jp-WindowedPanel-outer").first.evaluate("panel => panel.scrollTop = 0")
        use_the_demo(page, files, "lab")
