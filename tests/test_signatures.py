"""What is no photograph is called by its name, whatever the file is called."""

import bz2
import gzip
import io
import lzma
import sqlite3
import tarfile
import wave
import zipfile

import numpy as np
import pytest
from PIL import Image

from blip2_edu.images import ImageError, open_image


def packed(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "hello")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    return buffer.getvalue()


def sound() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(100))
    return buffer.getvalue()


def drawn(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, kind)
    return buffer.getvalue()


def array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((4, 4)))
    return buffer.getvalue()


def box(brand: bytes) -> bytes:
    """The beginning of a file in ISO's container."""
    return b"\0\0\0\x1cftyp" + brand + bytes(4) + b"isom" + brand + bytes(40)


with sqlite3.connect(":memory:") as connection:
    connection.execute("create table t (x)")
    DATABASE = connection.serialize()

XML = b'<?xml version="1.0" encoding="UTF-8"?>\n'
CASES = [
    (b"<!DOCTYPE html>\n<html>", "a web page", "the picture itself"),
    (b"\xef\xbb\xbf\r\n  <HTML lang=en>", "a web page", "the picture itself"),
    (b"<!-- saved -->\n<head>", "a web page", "the picture itself"),
    (XML + b'<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0">', "a web page", "the picture itself"),
    (b"<center><h1>403 Forbidden</h1>", "a web page", "the picture itself"),
    (XML + b"<Error><Code>AccessDenied</Code>", "an XML file", "the picture itself"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG", "convert it"),
    (XML + b"<!-- by hand -->\n<svg width='9'>", "SVG", "convert it"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "Git LFS", "git lfs pull"),
    (b'{"error": "not found"}', "a JSON file", "the picture itself"),
    (b"Not Found", "a text", "the picture itself"),
    ("Grüße".encode("latin-1"), "a text", "the picture itself"),
    ("Grüße".encode("utf-16"), "a text", "the picture itself"),
    (b"import os\n" * 999, "a text", "the picture itself"),
    (b"data:image/png;base64,iVBORw0KGgo", "a data address", "decode it"),
    (b"[InternetShortcut]\r\nURL=http://a.b/c.jpg", "a shortcut", "target"),
    (drawn("PDF"), "a PDF document", "save the picture"),
    (drawn("EPS"), "PostScript", "convert it"),
    (packed("[Content_Types].xml", "word/document.xml"), "an office document", "save the picture"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "an office document", "save the picture"),
    (b"{\\rtf1\\ansi", "an office document", "save the picture"),
    (packed("a.jpg", "b.jpg"), "an archive", "unpack it"),
    (gzip.compress(drawn("PNG")), "an archive", "unpack it"),
    (bz2.compress(drawn("PNG")), "an archive", "unpack it"),
    (lzma.compress(drawn("PNG")), "an archive", "unpack it"),
    (tarred(), "an archive", "unpack it"),
    (b"Rar!\x1a\x07\x01\0", "an archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c\0\x04", "an archive", "unpack it"),
    (box(b"heic"), "HEIC", "convert it"),
    (b"\0\0\0\x1cftypmif1" + bytes(4) + b"mif1heic" + bytes(40), "HEIC", "convert it"),
    (box(b"crx "), "raw file", "convert it"),
    (box(b"isom"), "a video", "one frame"),
    (box(b"qt  "), "a video", "one frame"),
    (b"\x1aE\xdf\xa3\x9fB\x86\x81", "a video", "one frame"),
    (b"RIFF\x24\0\x01\0AVI LIST", "a video", "one frame"),
    (sound(), "a sound", "give a photograph"),
    (b"ID3\x04\0\0\0\0", "a sound", "give a photograph"),
    (drawn("ICO"), "an icon", "convert it"),
    (drawn("DDS"), "an image of a rare kind", "convert it"),
    (b"8BPS\0\x01" + bytes(30), "a drawing program", "convert it"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image", "convert it"),
    (array(), "an array", "give a photograph"),
    (DATABASE, "a database", "give a photograph"),
    (b"\x7fELF\x02\x01\x01" + bytes(30), "a program", "give a photograph"),
    (b"\0\x05\x16\x07\0\x02\0\0Mac OS X", "what macOS notes", "the file itself"),
    (bytes(5000), "nothing but zeros", "download it again"),
    (drawn("TGA"), "not an image of a known kind", "convert it"),
]


@pytest.mark.parametrize(("data", "what", "advice"), CASES, ids=[what for _, what, _ in CASES])
def test_what_is_no_photograph_is_called_by_its_name(data, what, advice, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        open_image(path)
    said, advised = str(caught.value).split("; ")
    assert what in said and advice in advised and advised.endswith(".")
    assert "convert" not in advised or "convert" in advice


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "AVIF", "JPEG"])
def test_the_beginning_of_an_image_is_a_damaged_one(kind):
    for length in (20, 40):
        with pytest.raises(ImageError, match="damaged or cut off"):
            open_image(drawn(kind)[:length])
