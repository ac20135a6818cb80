"""Open any image safely: a path, a URL, bytes or a PIL image becomes one upright RGB image.

A class drops odd files on a notebook. Whatever arrives, the answer is either a picture that an
encoder can use or an `ImageError` with one sentence that says what is wrong and what to do.
"""

from __future__ import annotations

import asyncio
import io
import math
import re
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin

from blip2_edu import __version__
from blip2_edu.errors import UserError

if TYPE_CHECKING:
    import httpx

# Nothing that starts another program (EPS runs Ghostscript) or is hardly ever a photograph.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")

MAX_PIXELS = 64_000_000  # decoded at most: 192 MB as RGB
MAX_JPEG_PIXELS = 4 * MAX_PIXELS  # a JPEG can be decoded at 1/2, 1/4 or 1/8 of its size
DRAFT_PIXELS = 4_000_000  # what a scaled-down JPEG keeps at least

MAX_DOWNLOAD_BYTES = 32_000_000
SOCKET_TIMEOUT = 10.0  # seconds without a byte
DOWNLOAD_TIMEOUT = 30.0  # seconds in all, so that a server cannot drip for ever
MAX_REDIRECTS = 5


class ImageError(UserError, ValueError):
    """The image cannot be used; the message is one sentence for the user."""


def open_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """Open `source` as a new upright 8-bit RGB image; `source` itself is not changed.

    `source` is a path, an http(s) URL, the bytes of an image file, or a PIL image. EXIF rotation
    is applied, transparency is put on white, of an animation the first frame is taken, 16-bit and
    float pixels are scaled to 8 bits. Images of more than `MAX_PIXELS` are refused, but baseline
    JPEGs only above `MAX_JPEG_PIXELS`: JPEGs of 16 megapixels and more come back at 1/2, 1/4 or
    1/8 of their size.

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
    if isinstance(source, str) and re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", source):
        return _decode(io.BytesIO(_download(source, name)), name)
    try:
        path = Path(source).expanduser()
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
    # Gzip grows a chunk a thousandfold at most; others, or gzip within gzip, could fill the memory.
    is_gzip = response.headers.get("Content-Encoding", "").lower() == "gzip"
    body = bytearray()
    async for chunk in response.aiter_bytes() if is_gzip else response.aiter_raw():
        body += chunk
        if len(body) > MAX_DOWNLOAD_BYTES:
            limit = f"{MAX_DOWNLOAD_BYTES / 1e6:g} MB"
            raise ImageError(f"{name} is larger than {limit}; choose a smaller image.")
    return bytes(body)


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
    head = file.read(3)
    file.seek(0)
    if not head:
        raise ImageError(f"{name} is empty; copy or download it again.")
    try:
        if head == b"\xff\xd8\xff":
            image = _open_jpeg(file, name)
        else:
            with warnings.catch_warnings():  # PIL only warns of what is refused here in any case
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(file, formats=FORMATS)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(
            f"{name} is not an image of a known kind; convert it to JPEG or PNG first."
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(_too_large(name)) from None
    except Exception:  # decoders raise nearly anything on a damaged file
        raise ImageError(_damaged(name)) from None
    return _to_upright_rgb(image, name)


def _open_jpeg(file: BinaryIO, name: str) -> Image.Image:
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


def _to_upright_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(_too_large(name))
    if not image.width * image.height:
        raise ImageError(f"{name} has no pixels; save it again.")
    try:
        rgb = _to_rgb(image)
    except Exception:  # pixels are decoded only now
        raise ImageError(_damaged(name)) from None
    rgb.info.clear()  # else the tag stays in the result and the next one to open it turns it again
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(rgb, in_place=True)
    except Exception:  # a damaged EXIF block does not spoil the pixels
        pass
    return rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> a new RGB image."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _to_8_bits(image).convert("RGB")
    if image.has_transparency_data:  # an alpha channel, or one transparent palette entry or colour
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, 32 bits or floats, scaled; `image.convert("L")` would clip it to white."""
    pixels = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    low, high = 0.0, 65535.0
    if not image.mode.startswith("I;16"):
        # No header tells the range: the smallest usual one that holds all values, else their own.
        smallest, largest = float(pixels.min()), float(pixels.max())
        usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        fitting = [top for top in usual if smallest >= 0 and largest <= top]
        low, high = (0.0, fitting[0]) if fitting else (smallest, largest)
    scaled = (pixels - low) * (255 / max(high - low, 1e-6))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def _too_large(name: str) -> str:
    limit = f"{MAX_PIXELS // 1_000_000} megapixels"
    return f"{name} has too many pixels; scale it down to at most {limit} first."


def _damaged(name: str) -> str:
    return f"{name} is damaged or cut off; get it again or save it anew as JPEG or PNG."


def _shorten(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:80]}...{name[-37:]}"
