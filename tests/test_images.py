"""Every kind of image becomes proper RGB; every fault becomes one sentence."""

import asyncio
import gzip
import io
import os
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from blip2_edu import images
from blip2_edu.images import ImageError, open_image

PHOTOS = Path(__file__).parents[1] / "images"


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


def photo() -> Image.Image:
    return Image.open(PHOTOS / "chelsea.jpg").convert("RGB")


def chunk(kind: bytes, data: bytes, wrong_sum: int = 0) -> bytes:
    """Of a PNG."""
    crc = (zlib.crc32(kind + data) ^ wrong_sum).to_bytes(4, "big")
    return len(data).to_bytes(4, "big") + kind + data + crc


def png_of_size(width: int, height: int) -> bytes:
    """A valid PNG header that announces `width` x `height` pixels, with next to no data."""
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
        # 8, 10, 12 and 14 bits in more
        (np.array([[0, 100, 255]], dtype=np.uint16), [0, 100, 255]),
        (np.array([[0, 4 * 100, 1023]], dtype=np.uint16), [0, 100, 255]),
        (np.array([[0, 16 * 136, 4095]], dtype=np.uint16), [0, 136, 255]),
        (np.array([[0, 16 * 136, 4095]], dtype=np.int32), [0, 136, 255]),
        (np.array([[0, 16 * 136, 4095]], dtype=np.float32), [0, 136, 255]),
        (np.array([[0, 64 * 100, 16383]], dtype=np.uint16), [0, 100, 255]),
        (np.array([[0, 64 * 100, 16383]], dtype=np.float32), [0, 100, 255]),
        (np.array([[0, 257 * 7, 257 * 9]], dtype=np.uint16), [0, 7, 9]),  # dark, of 8 bits
        (np.array([[0, 0.51, 1.02]], dtype=np.float32), [0, 128, 255]),
    ],
)
def test_deep_pixels_are_scaled_not_clipped(pixels, expected):
    image = Image.fromarray(pixels)
    assert image.mode in ("I;16", "I", "F")
    for source in (image, encoded(image, "TIFF")):
        assert np.asarray(open_image(source))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})]
)
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_a_deep_photo_is_as_bright_as_one_of_8_bits(kind, options, bits):
    grey = np.asarray(photo().convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) << (bits - 8))
    opened = np.asarray(open_image(encoded(deep, kind, **options)), dtype=int)
    assert np.abs(opened - grey[..., None]).max() <= 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_a_deep_tiff_in_colour_is_as_bright_as_one_of_8_bits(order, bits):
    colors = np.asarray(photo().resize((60, 40)))
    data = (colors.astype(f"{order}u2") << (bits - 8)).astype(f"{order}u2").tobytes()
    # Width, height, bits, no compression, RGB, where, upright but turned, 3 colours, all rows.
    tags = [256, 257, 258, 259, 262, 273, 274, 277, 278, 279]
    values = [60, 40, 3, 1, 2, 136 + 6, 6, 3, 40, len(data)]
    entries = b"".join(
        struct.pack(f"{order}HHII", tag, 4, 1, value)
        if tag != 258
        else struct.pack(f"{order}HHII", 258, 3, 3, 136)
        for tag, value in zip(tags, values, strict=True)
    )
    start = b"II*\0" if order == "<" else b"MM\0*"
    head = start + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(2 + 4)
    file = head[:136].ljust(136, b"\0") + struct.pack(f"{order}3H", 16, 16, 16) + data
    opened = open_image(file)
    assert opened.size == (40, 60)  # turned, as the file says
    upright = np.rot90(np.asarray(opened, dtype=int))
    assert np.abs(upright - colors).max() <= 1


@pytest.mark.parametrize("factor", [16, 257])
def test_16_bits_where_white_is_zero(factor):
    grey = np.asarray(photo().convert("L"))
    negative = Image.fromarray((255 - grey).astype(np.uint16) * factor)
    for compression in ("raw", "tiff_lzw"):
        opened = open_image(encoded(negative, "TIFF", tiffinfo={262: 0}, compression=compression))
        assert np.abs(np.asarray(opened, dtype=int) - grey[..., None]).max() <= 1


def test_12_bits_packed_know_their_range():
    # Two pixels of 0x0ff and 0x07f in three bytes; as Pillow writes no such file, an 8-bit one of
    # three pixels is told to be one of two.
    data = encoded(Image.fromarray(np.array([[0x0F, 0xF0, 0x7F]], dtype=np.uint8)), "TIFF")
    for tag, kind, old, new in ((256, 4, 3, 2), (258, 3, 8, 12)):
        size = {3: 2, 4: 4}[kind]
        before, after = (
            tag.to_bytes(2, "little")
            + kind.to_bytes(2, "little")
            + (1).to_bytes(4, "little")
            + x.to_bytes(size, "little")
            for x in (old, new)
        )
        assert data.count(before) == 1
        data = data.replace(before, after)
    assert np.asarray(open_image(data))[0, :, 0].tolist() == [16, 8]  # of 255: 255 and 127 of 4095


def test_16_bit_png():
    image = Image.fromarray(np.full((4, 4), 257 * 42, dtype=np.uint16))
    assert open_image(encoded(image, "PNG")).getpixel((0, 0)) == (42, 42, 42)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.allclose(open_image(data).getpixel((4, 4)), (255, 0, 0), atol=4)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_transparent_frames_before_the_first_that_shows_something(kind):
    clear, red = Image.new("RGBA", (8, 8)), Image.new("RGBA", (8, 8), "red")
    options = {"save_all": True, "duration": [100, 200, 300]}
    data = encoded(clear, kind, append_images=[clear, red], **options)
    assert np.allclose(open_image(data).getpixel((4, 4)), (255, 0, 0), atol=4)
    none = encoded(clear, kind, append_images=[clear, clear], **options)
    assert open_image(none).getpixel((4, 4)) == (255, 255, 255)
    if kind == "PNG":  # nor does a note that is too long keep the animation back
        note = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**21)))
        assert open_image(data[:33] + note + data[33:]).getpixel((4, 4)) == (255, 0, 0)


def test_bmp_with_an_empty_fourth_byte():
    image = quarters().convert("RGBA")
    image.putalpha(0)
    data = encoded(image, "BMP")
    header = (108).to_bytes(4, "little")  # of version 4, with masks: the fourth byte is alpha
    masks = b"".join(x.to_bytes(4, "little") for x in (0xFF0000, 0xFF00, 0xFF, 0xFF000000))
    pixels = data[int.from_bytes(data[10:14], "little") :]
    info = header + data[18:30] + (3).to_bytes(4, "little") + data[34:54] + masks + bytes(52)
    start = (14 + len(info)).to_bytes(4, "little")
    v4 = data[:10] + start + info + pixels
    assert len(info) == 108 and Image.open(io.BytesIO(v4)).mode == "RGBA"
    assert_close(open_image(v4), quarters(), 0)
    some = bytearray(v4)
    some[-1] = 255  # one pixel that is seen: the others are not
    assert open_image(bytes(some)).getpixel((0, 0)) in ((255, 255, 255), (255, 0, 0))
    assert open_image(bytes(some)).getpixel((5, 40)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (b"zTXt", b"k\0\0" + zlib.compress(b"x" * 2**21)),
        (b"zTXt", b"k\0\7of no known method"),
        (b"iTXt", b"k\0\1\0en\0k\0" + zlib.compress(b"x" * 2**21)),
        (b"tEXt", b"k\0" + b"x" * 70_000_000),
        (b"iCCP", b"k\0\0" + zlib.compress(b"x" * 2**21)),
        (b"pHYs", b"\0"),
        (b"gAMA", b""),
        (b"tRNS", b"\0"),
        (b"fcTL", bytes(26)),
        (b"eXIf", b"no EXIF"),
    ],
)
def test_notes_do_not_stop_a_png(kind, data):
    good = encoded(quarters(), "PNG")
    for place in (33, len(good) - 12):  # after IHDR, before IEND
        assert_close(open_image(good[:place] + chunk(kind, data) + good[place:]), quarters(), 0)


@pytest.mark.parametrize("kind", [b"pHYs", b"tEXt", b"gAMA", b"eXIf", b"tIME", b"prVt"])
def test_wrong_sums_of_notes_do_not_stop_a_png(kind):
    clear = Image.new("P", (4, 4), 1)
    clear.putpalette([255, 0, 0, 0, 0, 255])
    good, damaged = encoded(clear, "PNG", transparency=1), chunk(kind, bytes(32), wrong_sum=1)
    opened = open_image(good[:33] + damaged + good[33:])
    assert opened.getpixel((0, 0)) == (255, 255, 255)  # what is transparent stays so
    with pytest.raises(ImageError, match="damaged"):  # the size is no note
        open_image(good[:29] + b"\0\0\0\0" + good[33:])


def test_notes_do_not_stop_a_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6
    good = encoded(quarters(), "JPEG", exif=exif)
    for mark, note in [
        (0xE2, b"ICC_PROFILE\0"),
        (0xE0, b"JFIF\0"),
        (0xED, b"Photoshop 3.0\x008BIM\4\4"),
        (0xEE, b"Adobe"),
    ]:
        segment = bytes([0xFF, mark]) + (2 + len(note)).to_bytes(2, "big") + note
        for place in (2, good.index(b"\xff\xc0")):  # at the beginning, before the size
            opened = open_image(good[:place] + segment + good[place:])
            assert opened.size == (48, 64)
            assert_close(opened, open_image(good), 0)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"quality": 95}]
)
def test_jpeg_that_lacks_only_its_end(options):
    good = encoded(photo(), "JPEG", **options)
    assert good.endswith(b"\xff\xd9")
    for lost in (1, 2):
        assert_close(open_image(good[:-lost]), open_image(good), 0)
    places = np.random.default_rng(0).integers(600, len(good) - 50, 40).tolist()
    if "restart_marker_rows" in options:  # where a decoder could start anew
        places += [good.index(b"\xff\xd3", 600) + n for n in range(3)]
    for place in places:
        with pytest.raises(ImageError, match="damaged"):
            open_image(good[:place])


def test_large_images_come_back_small_and_alike():
    small = photo()
    for size, factor in (((2000, 1000), 1), ((3200, 3000), 2), ((4960, 7016), 4)):
        large = small.resize(size)
        for mode in ("RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "I;16", "I", "F"):
            grey = mode in ("1", "L", "LA", "I;16", "I", "F")
            source = large.convert("L").convert(mode) if grey else large.convert(mode)
            opened = open_image(source)
            assert opened.size == (size[0] // factor, size[1] // factor)
            ours = np.asarray(opened.resize((9, 9), Image.Resampling.BOX), dtype=int)
            theirs = large.convert("L") if grey else large
            theirs = theirs.convert("RGB").resize((9, 9), Image.Resampling.BOX)
            assert np.abs(ours - np.asarray(theirs, dtype=int)).max() <= 12, mode
            assert source.size == size


def with_peak_memory(code: str, argument: Path) -> tuple[list[int], int]:
    """The numbers that a program prints, and how many megabytes it held at most, on Linux."""
    peak = "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    command = [sys.executable, "-c", f"import re, sys; {code}; {peak}", argument]
    output = subprocess.run(command, capture_output=True, text=True)
    *said, kilobytes = map(int, output.stdout.split())
    return said, kilobytes // 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory of Linux")
def test_a_batch_of_scanned_pages_in_bounded_memory(tmp_path):
    first = tmp_path / "0.png"
    Image.new("RGB", (4960, 7016), (10, 200, 30)).save(first, compress_level=1)
    code = (
        "from blip2_edu.images import open_each; images, _ = open_each(sys.argv[1:2] * 16);"
        "print(len(images), *images[15].getpixel((0, 0)))"
    )
    said, megabytes = with_peak_memory(code, first)
    assert said == [16, 10, 200, 30]
    assert megabytes < 500  # at full size the sixteen were 2.2 GB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory as Linux does")
@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
def test_a_page_too_large_for_the_memory(tmp_path, kind):
    Image.new("RGB", (4960, 7016)).save(tmp_path / "page", kind)
    code = (
        "import re, resource, sys; from blip2_edu.images import ImageError, open_image;"
        "taken = re.search(r'VmSize:\\s+(\\d+) kB', open('/proc/self/status').read())[1];"
        "limit = int(taken) * 1024 + 50_000_000;"
        "open_image(sys.argv[2]);"  # what decoders load when they are first used
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit));"
        "\ntry: print(open_image(sys.argv[1]))\nexcept ImageError as error: print(error)"
    )
    quarters().save(tmp_path / "small", kind)
    arguments = [sys.executable, "-c", code, tmp_path / "page", tmp_path / "small"]
    output = subprocess.run(arguments, capture_output=True, text=True)
    assert "needs more memory than is free" in output.stdout, output.stderr


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_too_little_memory_is_no_damage(kind, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(quarters(), kind, exif=exif)

    def exhausted(*_, **__):
        raise MemoryError

    of_pil = images.JpegImagePlugin.JpegImageFile if kind == "JPEG" else Image.Image
    for module, name in [(of_pil, "load"), (Image.Image, "convert"), (ImageOps, "exif_transpose")]:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, exhausted)
            with pytest.raises(ImageError) as caught:
                open_image(data)
            assert_one_sentence(caught.value, "more memory")


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
        "import warnings; warnings.simplefilter('error');"
        "from blip2_edu.images import open_image; print(*open_image(sys.argv[1]).size)"
    )
    said, megabytes = with_peak_memory(code, path)
    assert said == [3000, 2125]
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
        "text.jpg": (b"these are words, not pixels", "is a text"),
        "page.jpg": (b"<!DOCTYPE html><html></html>", "is a web page"),
        "unknown.jpg": (bytes(range(256)), "convert it"),
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
        ("C://p.jpg", "does not exist"),
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
                "gzip-bomb-twice": gzip.compress(gzip.compress(bytes(50_000_000))),
                "gzip-twice": gzip.compress(gzip.compress(body)),
                "gzip-x": gzip.compress(body),
                "gzip-parts": gzip.compress(body[:50]) + gzip.compress(body[50:]),
                "gzip-in-silence": gzip.compress(body),
                "gzip-cut": gzip.compress(body)[:-20],
                "gzip-damaged": body,
                "identity": body,
                "br": body,
            }
            encodings = {
                "gzip-twice": "gzip, gzip",
                "gzip-bomb-twice": "gzip, gzip",
                "gzip-x": "X-GZip",
                "gzip-in-silence": "",
                "identity": "identity",
                "br": "br",
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
            encoding = encodings.get(kind, "gzip" if kind.startswith("gzip") else "")
            if encoding:
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
    "path",
    [
        *("good", "to-good", "to-good-endless", "hop-5", "müde katze.png"),
        *("gzip", "gzip-twice", "gzip-x", "gzip-parts", "gzip-in-silence", "identity"),
    ],
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
        ("text", "is a text"),
        ("gzip-bomb", "larger than 1 MB"),
        ("gzip-bomb-twice", "larger than 1 MB"),
        ("gzip-damaged", "cannot be fetched"),
        ("gzip-cut", "ended before"),
        ("br", "sent as br"),
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


def test_names_that_look_like_homes_and_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["~photo.jpg", "~root", "~/photo.jpg", "C://photo.jpg"]
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        quarters().save(name, "PNG")
    for name in names:
        assert_close(open_image(name), quarters(), 0)
        assert_close(open_image(Path(name)), quarters(), 0)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    quarters().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "home" / "other.png")
    assert open_image("~/other.png").size == (48, 64)


def test_import_is_light():
    heavy = {"torch", "transformers", "httpx"}
    code = f"import sys, blip2_edu.images; print({heavy} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout.strip() == "set()"
