"""Every kind of image becomes proper RGB; every fault becomes one sentence."""

import asyncio
import gzip
import io
import os
import subprocess
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image, ImageOps

from blip2_edu import images
from blip2_edu.images import ImageError, open_image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def quarters() -> Image.Image:
    """Red, green / blue, white: no two of the eight orientations look alike."""
    image = Image.new("RGB", (64, 48), "white")
    image.paste((255, 0, 0), (0, 0, 32, 24))
    image.paste((0, 255, 0), (32, 0, 64, 24))
    image.paste((0, 0, 255), (0, 24, 32, 48))
    return image


def png_of_size(width: int, height: int) -> bytes:
    """A valid PNG header that announces `width` x `height` pixels, with next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + crc

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    data = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data


def assert_one_sentence(error: ImageError, *words: str) -> None:
    text = str(error)
    assert "\n" not in text and text.endswith(".") and ". " not in text and "; " in text, text
    for word in words:
        assert word in text, text


def assert_close(image: Image.Image, expected: Image.Image, tolerance: int) -> None:
    assert image.mode == "RGB" and image.size == expected.size
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= tolerance


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("PPM", {}, 0),
        ("GIF", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG2000", {}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 40),
        ("AVIF", {"quality": 95, "subsampling": "4:4:4"}, 40),
    ],
)
def test_formats(tmp_path, kind, options, tolerance):
    data = encoded(quarters(), kind, **options)
    path = tmp_path / "image.jpg"  # the ending is not trusted
    path.write_bytes(data)
    for source in (data, path, str(path)):
        assert_close(open_image(source), quarters(), tolerance)


def test_pil_image_is_copied_not_changed():
    source = quarters()
    opened = open_image(source)
    opened.paste((9, 9, 9), (0, 0, 64, 48))
    assert_close(source, quarters(), 0)


# How the camera stored an upright picture: by the value of EXIF tag 0x0112.
STORED = {
    1: lambda image: image,
    2: ImageOps.mirror,
    3: lambda image: image.rotate(180),
    4: ImageOps.flip,
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.rotate(90, expand=True),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.rotate(270, expand=True),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "PIL"])
def test_exif_rotation(orientation, kind):
    stored = STORED[orientation](quarters())
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "PNG" if kind == "PIL" else kind, exif=exif)
    opened = open_image(Image.open(io.BytesIO(data)) if kind == "PIL" else data)
    assert opened.size == (64, 48)
    for point in ((16, 12), (48, 12), (16, 36), (48, 36)):
        assert np.allclose(opened.getpixel(point), quarters().getpixel(point), atol=40)
    assert_close(open_image(opened), opened, 0)  # not turned a second time
    assert_close(open_image(encoded(opened, "PNG")), opened, 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_ignored():
    opened = open_image(encoded(quarters(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xffgarbage"))
    assert opened.size == (64, 48)


def test_transparency_is_white():
    rgba = quarters().convert("RGBA")
    rgba.putalpha(0)
    half = Image.new("LA", (4, 4), (0, 128))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert open_image(rgba).getextrema() == ((255, 255),) * 3
    assert open_image(encoded(half, "PNG")).getpixel((0, 0)) == (127, 127, 127)
    assert open_image(encoded(palette, "PNG", transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(palette, "GIF", transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(palette, "PNG")).getpixel((0, 0)) == (0, 0, 255)
    grey = Image.new("L", (4, 4), 7)
    assert open_image(encoded(grey, "PNG", transparency=7)).getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_and_grey():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = open_image(encoded(cmyk, "JPEG")).getpixel((8, 8))
    assert red > 220 and green < 30 and blue < 30
    assert open_image(Image.new("L", (4, 4), 99)).getpixel((0, 0)) == (99, 99, 99)
    assert open_image(Image.new("1", (4, 4), 1)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([[0, 257 * 100, 65535]], dtype=np.uint16), [0, 100, 255]),
        (np.array([[0, 100, 255]], dtype=np.int32), [0, 100, 255]),
        (np.array([[0, 257 * 100, 65535]], dtype=np.int32), [0, 100, 255]),
        (np.array([[-500, 0, 500]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0, 0.4, 1]], dtype=np.float32), [0, 102, 255]),
        (np.array([[0, 100, 255]], dtype=np.float32), [0, 100, 255]),
        (np.array([[np.nan, 0.4, 1]], dtype=np.float32), [0, 102, 255]),
        (np.array([[7, 7, 7]], dtype=np.float32) * 1e5, [0, 0, 0]),
    ],
)
def test_deep_pixels_are_scaled_not_clipped(pixels, expected):
    image = Image.fromarray(pixels)
    assert image.mode in ("I;16", "I", "F")
    for source in (image, encoded(image, "TIFF")):
        assert np.asarray(open_image(source))[0, :, 0].tolist() == expected


def test_16_bit_png():
    image = Image.fromarray(np.full((4, 4), 257 * 42, dtype=np.uint16))
    assert open_image(encoded(image, "PNG")).getpixel((0, 0)) == (42, 42, 42)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.allclose(open_image(data).getpixel((4, 4)), (255, 0, 0), atol=4)


def test_large_jpeg_is_opened_small(tmp_path):
    path = tmp_path / "large.jpg"
    Image.new("RGB", (6000, 4000), (10, 200, 30)).save(path)
    opened = open_image(path)
    assert opened.size == (3000, 2000)
    assert np.allclose(opened.getpixel((5, 5)), (10, 200, 30), atol=3)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory of Linux")
def test_100_megapixel_jpeg_in_bounded_memory(tmp_path):
    path = tmp_path / "huge.jpg"
    Image.new("L", (12000, 8500), 128).save(path)
    code = (
        "import re, sys, warnings; warnings.simplefilter('error');"
        "from blip2_edu.images import open_image; image = open_image(sys.argv[1]);"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1];"
        "print(*image.size, int(peak) // 1024)"
    )
    output = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    width, height, megabytes = map(int, output.stdout.split())
    assert (width, height) == (3000, 2125)
    assert megabytes < 200  # decoded whole it would be 306 MB on top of Python's own


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(9_000, 9_000), (10_000, 10_000), (60_000, 60_000)])
def test_too_many_pixels(size):
    with pytest.raises(ImageError) as caught:
        open_image(png_of_size(*size))
    assert_one_sentence(caught.value, "too many pixels", "64 megapixels")


def test_too_many_pixels_when_warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="too many pixels"):
            open_image(png_of_size(10_000, 10_000))


def test_too_large_jpeg(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 3000)
    monkeypatch.setattr(images, "MAX_JPEG_PIXELS", 3050)
    for progressive in (False, True):
        with pytest.raises(ImageError, match="too many pixels"):
            open_image(encoded(quarters(), "JPEG", progressive=progressive))
    monkeypatch.setattr(images, "MAX_JPEG_PIXELS", 3072)
    monkeypatch.setattr(images, "DRAFT_PIXELS", 768)
    assert open_image(encoded(quarters(), "JPEG")).size == (32, 24)
    with pytest.raises(ImageError, match="too many pixels"):  # held whole: the lower limit
        open_image(encoded(quarters(), "JPEG", progressive=True))


def test_bad_files(tmp_path, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    cases = {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"these are words, not pixels", "convert it"),
        "page.jpg": (b"<!DOCTYPE html><html></html>", "convert it"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "convert it"),
        "cut.jpg": (encoded(noise, "JPEG")[:2000], "damaged"),
        "cut.png": (encoded(noise, "PNG")[:2000], "damaged"),
        "cut.webp": (encoded(noise, "WEBP")[:900], "damaged"),
        "stub.jpg": (b"\xff\xd8\xff", "damaged"),
    }
    for name, (data, word) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError) as caught:
            open_image(tmp_path / name)
        assert_one_sentence(caught.value, name, word)
        with pytest.raises(ImageError) as caught:
            open_image(data)
        assert_one_sentence(caught.value, "the image data", word)

    os.mkfifo(tmp_path / "pipe.jpg")
    for source, word in [
        (tmp_path, "folder"),
        ("", "folder"),
        (tmp_path / "missing.jpg", "does not exist"),
        (tmp_path / "text.jpg" / "deeper.jpg", "does not exist"),
        (tmp_path / "pipe.jpg", "not a regular file"),
        ("a" * 5000, "cannot be read"),
        ("~nobody-of-that-name/a.jpg", "cannot be read"),
        ("null\0byte.jpg", "does not exist"),
        (None, "NoneType"),
        (np.zeros((4, 4, 3)), "ndarray"),
        (Image.new("RGB", (0, 5)), "no pixels"),
    ]:
        with pytest.raises(ImageError) as caught:
            open_image(source)
        assert_one_sentence(caught.value, word)
        assert len(str(caught.value)) < 250

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images.Path, "open", refuse)  # chmod does not stop root
    with pytest.raises(ImageError) as caught:
        open_image(tmp_path / "text.jpg")
    assert_one_sentence(caught.value, "text.jpg", "permissions")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage_never_escapes():
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    outcomes = set()
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000", "AVIF"):
        options = {"exif": exif} if kind in ("JPEG", "PNG", "TIFF", "WEBP") else {}
        good = encoded(quarters(), kind, **options)
        for _ in range(60):
            data = bytearray(good)
            for position in generator.integers(0, len(data), 4):
                data[position] = generator.integers(256)
            try:
                assert open_image(bytes(data)).mode == "RGB"
                outcomes.add("opened")
            except ImageError as error:
                assert_one_sentence(error)
                outcomes.add("refused")
    assert outcomes == {"opened", "refused"}


def test_threads():
    data = encoded(quarters(), "PNG")
    with ThreadPoolExecutor(8) as pool:
        for opened in pool.map(open_image, [data] * 64):
            assert_close(opened, quarters(), 0)


@pytest.fixture(scope="module")
def server():
    """A web server on this machine; the path says how it behaves. Yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = encoded(quarters(), "PNG")
            kind = self.path.strip("/").split("/")[0]
            redirects = {
                "to-file": "file:///etc/hostname",
                "to-ftp": "ftp://127.0.0.1/a.png",
                "to-good": "/good",
                "to-good-endless": "/good",
                "loop": "/loop",
                "slow-loop": "/slow-loop",
                **{f"hop-{n}": f"/hop-{n - 1}" for n in range(2, 7)},
                "hop-1": "/good",
            }
            bodies = {
                "good": body,
                "m%C3%BCde%20katze.png": body,
                "cut": body,
                "text": b"words",
                "gzip": gzip.compress(body),
                "gzip-bomb": gzip.compress(bytes(50_000_000)),
                "gzip-twice": gzip.compress(gzip.compress(body)),
                "gzip-damaged": body,
            }
            if kind == "silent" or kind == "slow-loop":
                time.sleep(1 if kind == "silent" else 0.2)
            if kind in redirects:
                self.send_response(302)
                self.send_header("Location", redirects[kind])
            elif kind in bodies or kind in ("endless", "drip", "drip-headers"):
                self.send_response(200)
            else:
                self.send_error(404)
                return
            if kind == "cut":
                self.send_header("Content-Length", str(len(body) + 100))
            if kind.startswith("gzip"):
                encoding = "gzip, gzip" if kind == "gzip-twice" else "gzip"
                self.send_header("Content-Encoding", encoding)
            try:
                if kind == "drip-headers":
                    self.flush_headers()
                else:
                    self.end_headers()
                while kind.startswith("drip"):
                    self.wfile.write(b"x")
                    time.sleep(0.02)
                while kind.endswith("endless"):
                    self.wfile.write(bytes(1 << 16))
                self.wfile.write(bodies.get(kind, b""))
            except OSError:
                pass  # the client hung up, as it should

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize(
    "path", ["good", "to-good", "to-good-endless", "hop-5", "müde katze.png", "gzip"]
)
def test_url(server, path):
    assert_close(open_image(f"{server}/{path}"), quarters(), 0)


def test_url_while_an_event_loop_runs(server):
    async def cell():
        return open_image(f"{server}/good")

    assert_close(asyncio.run(cell()), quarters(), 0)


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("missing", "404"),
        ("to-file", "not allowed"),
        ("to-ftp", "ftp"),
        ("loop", "HTTP Error 302"),
        ("hop-6", "too many redirects"),
        ("endless", "larger than 1 MB"),
        ("silent", "timed out"),
        ("drip", "timed out"),
        ("drip-headers", "timed out"),
        ("slow-loop", "timed out"),
        ("cut", "broke off"),
        ("text", "convert it"),
        ("gzip-bomb", "larger than 1 MB"),
        ("gzip-twice", "convert it"),
        ("gzip-damaged", "cannot be fetched"),
    ],
)
def test_bad_url(server, path, word, monkeypatch):
    monkeypatch.setattr(images, "MAX_DOWNLOAD_BYTES", 1_000_000)
    if word == "timed out":  # the others must not, however busy the machine is
        monkeypatch.setattr(images, "SOCKET_TIMEOUT", 0.3)
        monkeypatch.setattr(images, "DOWNLOAD_TIMEOUT", 0.6)
    began = time.monotonic()
    with pytest.raises(ImageError) as caught:
        open_image(f"{server}/{path}")
    assert time.monotonic() - began < 5
    assert f"{server}/{path}" in str(caught.value) and word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("file:///etc/hostname", "neither http nor https"),
        ("ftp://127.0.0.1/a.png", "neither http nor https"),
        ("http://127.0.0.1:1/a.png", "cannot be fetched"),
        ("http://127.0.0.1:port/a.png", "cannot be fetched"),
        ("http://127.0.0.1:99999/a.png", "cannot be fetched"),
        ("http:///a.png", "cannot be fetched"),
        ("http://[::1/a.png", "cannot be fetched"),
    ],
)
def test_impossible_url(url, word):
    with pytest.raises(ImageError) as caught:
        open_image(url)
    assert word in str(caught.value) and url in str(caught.value)


def test_import_is_light():
    heavy = {"torch", "transformers", "httpx"}
    code = f"import sys, blip2_edu.images; print({heavy} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout.strip() == "set()"
