"""Open any image safely: a path, a URL, bytes or a PIL image becomes one upright RGB image.

A class drops odd files on a notebook. Whatever arrives, the answer is either a picture that an
encoder can use or an `ImageError` with one sentence that says what is wrong and what to do.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import math
import re
import sys
import warnings
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import (
    ExifTags,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
)

from blip2_edu import __version__
from blip2_edu.errors import UserError
from blip2_edu.signatures import CONVERT, HEAD, what_it_is

if TYPE_CHECKING:
    import httpx

# Nothing that starts another program (EPS runs Ghostscript) or is hardly ever a photograph.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")

MAX_PIXELS = 64_000_000  # decoded at most: 192 MB as RGB
MAX_JPEG_PIXELS = 4 * MAX_PIXELS  # a JPEG can be decoded at 1/2, 1/4 or 1/8 of its size
DRAFT_PIXELS = 2_000_000  # what a scaled-down image keeps at least; no image keeps 4 times as many

# JPEG data that would go on anywhere, also after any of the marks at which decoders start anew.
JPEG_NOISE = b"".join(b"\x55" * 8 + bytes([0xFF, 0xD0 + n]) for n in range(8)) + b"\x55" * 8

# What decides the pixels of a PNG, and what comes on top; its other chunks are notes.
PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
PNG_MORE = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")  # transparency, rotation, animation

# The highest values of 8, 10, 12, 14 and 16 bits. Cameras and instruments put any of them in 16.
DEEP_RANGES = (255.0, 1023.0, 4095.0, 16383.0, 65535.0)

MAX_DOWNLOAD_BYTES = 32_000_000
SOCKET_TIMEOUT = 10.0  # seconds without a byte
DOWNLOAD_TIMEOUT = 30.0  # seconds in all, so that a server cannot drip for ever
MAX_REDIRECTS = 5


class ImageError(UserError, ValueError):
    """The image cannot be used; the message is one sentence for the user."""


def open_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """Open `source` as a new upright 8-bit RGB image; `source` itself is not changed.

    `source` is a path, an http(s) URL, the bytes of an image file, or a PIL image. EXIF rotation
    is applied, transparency is put on white, of an animation the first frame is taken that is not
    all transparent, 16-bit and float pixels are scaled to 8 bits. Images of more than `MAX_PIXELS`
    are refused, but baseline JPEGs only above `MAX_JPEG_PIXELS`. Images of 8 megapixels and more
    come back scaled down, by a whole number, to between 2 and 8 megapixels.

    Raises `ImageError` for all that a user can get wrong.
    """
    if isinstance(source, Image.Image):
        return _to_upright_rgb(source, "the PIL image")
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), "the image data")
    if not isinstance(source, str | Path):
        raise ImageError(
            f"a {type(source).__name__} is not an image; "
            "give a path, an http(s) URL, bytes or a PIL image."
        )
    name = _shorten(str(source))
    if isinstance(source, str) and re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", source):
        return _decode(io.BytesIO(_download(source, name)), name)
    try:
        path = Path(source)
        if not path.exists():  # else ~photo.jpg is the name of a file, and no user's home
            path = path.expanduser()
        if path.is_dir():
            raise ImageError(f"{name} is a folder; give the path of one image in it.")
        if not path.exists():
            raise ImageError(f"{name} does not exist; check the path.")
        if not path.is_file():  # reading a pipe or a device might never end
            raise ImageError(f"{name} is not a regular file; give the path of an image file.")
        with path.open("rb") as file:
            return _decode(file, name)
    except PermissionError:
        raise ImageError(f"{name} may not be read; change the permissions of the file.") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody's home is meant by ~nobody
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name} cannot be read ({reason}); check the path.") from None


def _download(url: str, name: str) -> bytes:
    if not re.match(r"https?://", url, re.IGNORECASE):
        raise ImageError(f"{name} is neither http nor https; save the image and give its path.")
    import httpx  # slow to import, and only addresses need it

    try:
        # Asynchronous, because only so does one limit of time hold for all redirects, headers and
        # chunks together; on a thread of its own, because a notebook has an event loop running.
        return ThreadPoolExecutor(1).submit(lambda: asyncio.run(_fetch(url, name))).result()
    except ImageError:
        raise
    except (TimeoutError, httpx.TimeoutException):
        reason = "timed out"
    except (httpx.ReadError, httpx.RemoteProtocolError):
        reason = "the connection broke off"
    except Exception as error:  # nearly anything: of odd ports, names and proxies, too
        reason = " ".join(str(error).split())
    raise ImageError(f"{name} cannot be fetched ({reason}); check the address.")


async def _fetch(url: str, name: str) -> bytes:
    import httpx

    headers = {"User-Agent": f"blip2-edu/{__version__}", "Accept-Encoding": "gzip"}
    async with (
        asyncio.timeout(DOWNLOAD_TIMEOUT),
        httpx.AsyncClient(headers=headers, timeout=SOCKET_TIMEOUT) as client,
    ):
        # Followed here, because httpx would read the body that comes with a redirect to its end.
        for _ in range(1 + MAX_REDIRECTS):
            async with client.stream("GET", url) as response:
                if not response.next_request:
                    return await _read(response, name)
                url = str(response.next_request.url)
                if response.next_request.url.scheme not in ("http", "https"):
                    raise ConnectionError(f"redirection to {url} is not allowed")
        raise ConnectionError(f"HTTP Error {response.status_code}: too many redirects")


async def _read(response: httpx.Response, name: str) -> bytes:
    if not response.is_success:
        raise ConnectionError(f"HTTP Error {response.status_code}: {response.reason_phrase}")
    received = bytearray()
    async for chunk in response.aiter_raw():
        received += chunk
        _check_bytes(len(received), name)
    body = bytes(received)
    encodings = response.headers.get("Content-Encoding", "").lower().split(",")
    for encoding in map(str.strip, reversed(encodings)):
        if encoding in ("gzip", "x-gzip"):
            body = _unpacked(body, name)
        elif encoding not in ("", "identity"):
            raise ConnectionError(f"sent as {encoding}, which was not asked for")
    if body[:2] == b"\x1f\x8b":  # packed without a word; no image begins so
        body = _unpacked(body, name)
    return body


def _unpacked(body: bytes, name: str) -> bytes:
    # Not by httpx: gzip within gzip would fill the memory before it says how much there is.
    with gzip.open(io.BytesIO(body)) as file:
        unpacked = file.read(MAX_DOWNLOAD_BYTES + 1)
    _check_bytes(len(unpacked), name)
    return unpacked


def _check_bytes(number: int, name: str) -> None:
    if number > MAX_DOWNLOAD_BYTES:
        limit = f"{MAX_DOWNLOAD_BYTES / 1e6:g} MB"
        raise ImageError(f"{name} is larger than {limit}; choose a smaller image.")


def open_each(sources: Iterable[str | Path | bytes]) -> tuple[dict, dict]:
    """Open many: by place, the images, and what is wrong with the others."""
    images: dict[int, Image.Image] = {}
    problems: dict[int, str] = {}
    for place, source in enumerate(sources):  # one damaged file does not spoil the others
        try:
            images[place] = open_image(source)
        except ImageError as error:
            problems[place] = str(error)
    return images, problems


def _decode(file: BinaryIO, name: str) -> Image.Image:
    head = file.read(HEAD)
    file.seek(0)
    if not head:
        raise ImageError(f"{name} is empty; copy or download it again.")
    try:
        if head.startswith(b"\xff\xd8\xff"):
            image = _open_jpeg(file, name)
        elif head.startswith(b"\x89PNG\r\n\x1a\n"):
            image = _open_png(file, name)
        else:
            with warnings.catch_warnings():  # PIL only warns of what is refused here in any case
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(file, formats=FORMATS)
        _check_size(image, name)
        if image.format == "TIFF" and image.mode == "RGB" and ";16" in str(image.tile):
            _add_lower_bytes(image, file)
        _seek_visible(image)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(_unknown(head, name)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(_too_large(name)) from None
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise ImageError(_damaged(name, error)) from None
    return _to_upright_rgb(image, name)


def _open_jpeg(file: BinaryIO, name: str) -> ImageFile.ImageFile:
    try:
        image = _jpeg(file, name)
    except ImageError:
        raise
    except Exception:  # of a note, perhaps, and notes do not stop a picture
        file.seek(0)
        file = _jpeg_without_notes(file)
        image = _jpeg(file, name)
    try:
        image.load()
    except OSError:  # cut off: in the middle, or has it only lost the mark at its end?
        file.seek(0)
        data = file.read().rstrip(b"\xff")
        # Pixels that were missing would be read from whatever follows.
        one, other = (
            _jpeg(io.BytesIO(data + more + b"\xff\xd9"), name) for more in (b"", JPEG_NOISE)
        )
        if one.tobytes() != other.tobytes():
            raise
        return one
    return image


def _jpeg(file: BinaryIO, name: str) -> ImageFile.ImageFile:
    # Image.open would refuse by the full size, but libjpeg can compute each block of 8 x 8 pixels
    # as 4 x 4, 2 x 2 or 1 x 1 and then never holds the full picture.
    image = JpegImagePlugin.JpegImageFile(file)
    pixels = image.width * image.height
    baseline = not image.info.get("progressive")  # a progressive one is held whole in any case
    if pixels > (MAX_JPEG_PIXELS if baseline else MAX_PIXELS):
        raise ImageError(_too_large(name))
    shrink = math.sqrt(DRAFT_PIXELS / max(pixels, 1))
    if shrink < 1:
        image.draft(None, (math.ceil(image.width * shrink), math.ceil(image.height * shrink)))
    return image


def _jpeg_without_notes(file: BinaryIO) -> BinaryIO:
    """Of the notes there stay the rotation and what Adobe says of the colours."""
    kept = file.read(2)
    while (mark := file.read(2)) > b"\xff\x00" and mark != b"\xff\xda":  # where the pixels begin
        size = file.read(2)
        data = file.read(int.from_bytes(size, "big") - 2)
        is_note = b"\xff\xe0" <= mark <= b"\xff\xef" or mark == b"\xff\xfe"
        is_adobe = data.startswith(b"Adobe") and len(data) >= 12
        if not is_note or is_adobe or data.startswith(b"Exif\0\0"):
            kept += mark + size + data
    return io.BytesIO(kept + mark + file.read())


def _open_png(file: BinaryIO, name: str) -> ImageFile.ImageFile:
    for kinds in (PNG_PIXELS + PNG_MORE, PNG_PIXELS):
        try:
            return _png(file, name)
        except ImageError:
            raise
        except Exception:  # of a note, perhaps, and notes do not stop a picture
            file.seek(0)
            file = _png_with_only(kinds, file)
    return _png(file, name)


def _png(file: BinaryIO, name: str) -> ImageFile.ImageFile:
    image = PngImagePlugin.PngImageFile(file)
    _check_size(image, name)
    image.load()
    return image


def _png_with_only(kinds: tuple[bytes, ...], file: BinaryIO) -> BinaryIO:
    kept = io.BytesIO()
    kept.write(file.read(8))
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind not in kinds:
            file.seek(length + 4, io.SEEK_CUR)
            continue
        data, checksum = file.read(length), file.read(4)
        if kind in PNG_PIXELS or zlib.crc32(kind + data).to_bytes(4, "big") == checksum:
            kept.write(head + data + checksum)
    kept.seek(0)
    return kept


def _add_lower_bytes(image: ImageFile.ImageFile, file: BinaryIO) -> None:
    """Of 16 bits a colour in a TIFF, PIL keeps the upper 8; of 12 bits that are there, hardly any.

    The same file read in the other order of bytes gives the lower 8.
    """
    image.load()
    if np.asarray(image).max() >= DEEP_RANGES[-2] / 256:
        return
    file.seek(0)
    lower = Image.open(file)
    other_order = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
    for place, tile in enumerate(lower.tile):
        rawmode, *rest = tuple(tile.args or ())
        rawmode = rawmode[:-1] + other_order[rawmode[-1]]
        lower.tile[place] = tile._replace(args=(rawmode, *rest))
    pixels = np.asarray(image, np.uint16) << 8 | np.asarray(lower)
    shades = np.rint(np.arange(pixels.max() + 1) * (255 / _range(pixels)[1])).astype(np.uint8)
    image.paste(Image.fromarray(shades[pixels]))


def _seek_visible(image: Image.Image) -> None:
    """Go to the first frame of an animation that is not all transparent, if there is one."""
    if not getattr(image, "is_animated", False):
        return
    left = MAX_PIXELS  # in all frames that are looked at
    while image.has_transparency_data and (left := left - image.width * image.height) >= 0:
        if image.convert("RGBA").getchannel("A").getbbox():
            break
        try:
            image.seek(image.tell() + 1)
        except EOFError:
            break


def _to_upright_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_size(image, name)
    try:
        rgb = _to_rgb(image)
        rgb.info.clear()  # else the tag stays in the result, and the next to open it turns it again
        rgb.getexif()[ExifTags.Base.Orientation] = _orientation(image)
        ImageOps.exif_transpose(rgb, in_place=True)
    except Exception as error:  # pixels are decoded only now
        raise ImageError(_damaged(name, error)) from None
    return rgb


def _orientation(image: Image.Image) -> int:
    try:
        stored = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a damaged EXIF block does not spoil the pixels
        return 1
    return stored if isinstance(stored, int) and stored in range(2, 9) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> a new RGB image, scaled down before it is copied any further."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled_down(_to_8_bits(image)).convert("RGB")
    if image.has_transparency_data:  # an alpha channel, or one transparent palette entry or colour
        rgba = _scaled_down(image if image.mode == "RGBA" else image.convert("RGBA"))
        if image.format in ("BMP", "DIB") and not rgba.getchannel("A").getbbox():
            return rgba.convert("RGB")  # what wrote it left the fourth byte empty
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode not in ("L", "RGB", "CMYK", "YCbCr"):  # averages of others mean nothing
        image = image.convert("RGB")
    return _scaled_down(image).convert("RGB")


def _scaled_down(image: Image.Image) -> Image.Image:
    factor = math.isqrt(image.width * image.height // DRAFT_PIXELS)
    return image.reduce(factor) if factor > 1 else image


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, 32 bits or floats, scaled; `image.convert("L")` would clip it to white."""
    pixels = np.array(image)
    if image.mode == "F":
        np.nan_to_num(pixels, copy=False, posinf=0, neginf=0)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    low, high = _range(pixels, *tags.get(TiffImagePlugin.BITSPERSAMPLE, ()))
    scale = 255 / max(high - low, 1e-6)
    grey = np.empty(pixels.shape, np.uint8)
    for line, row in zip(grey, pixels, strict=True):  # of the whole, floats would take much memory
        line[:] = np.rint((row.astype(np.float32) - low) * scale)
    white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return Image.fromarray(255 - grey if white_is_zero else grey)


def _range(pixels: np.ndarray, bits: int = 16) -> tuple[float, float]:
    """What is black and what is white, as no header tells it: the smallest usual range that holds
    all values, else their own.
    """
    if pixels.dtype == np.uint16 and bits < 16:
        return 0.0, 2.0**bits - 1
    smallest, largest = float(pixels.min()), float(pixels.max())
    if smallest < 0 or largest > DEEP_RANGES[-1]:
        return smallest, largest
    if pixels.dtype == np.float32:
        if largest < DEEP_RANGES[0] / 16:  # 0 to 1, which may be exceeded a little
            return 0.0, max(largest, 1.0)
    elif not any((row % 257).any() for row in pixels):  # 8 bits that were spread over 16
        return 0.0, DEEP_RANGES[-1]
    return 0.0, next(top for top in DEEP_RANGES if largest <= top)


def _check_size(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(_too_large(name))
    if not image.width * image.height:
        raise ImageError(f"{name} has no pixels; save it again.")


def _too_large(name: str) -> str:
    limit = f"{MAX_PIXELS // 1_000_000} megapixels"
    return f"{name} has too many pixels; scale it down to at most {limit} first."


def _damaged(name: str, error: Exception | None = None) -> str:
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return f"{name} needs more memory than is free; close other programs or scale it down."
    return f"{name} is damaged or cut off; get it again or save it anew as JPEG or PNG."


def _unknown(head: bytes, name: str) -> str:
    if re.match(rb"\xff\xd8|\x89PNG|GIF8|RIFF.{4}WEBP|.{4}ftypavi[fs]", head, re.DOTALL):
        return _damaged(name)
    what, advice = what_it_is(head) or ("not an image of a known kind", CONVERT)
    return f"{name} is {what}; {advice}."


def _shorten(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:80]}...{name[-37:]}"
