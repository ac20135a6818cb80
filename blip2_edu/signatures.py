"""What a file is that is no photograph, by its first bytes: its name may say anything."""

import re

HEAD = 1024  # bytes that are looked at

CONVERT = "convert it to JPEG or PNG first"
EXTRACT = "save the picture that is in it as JPEG or PNG"
FRAME = "save one frame of it as JPEG or PNG"
UNPACK = "unpack it and give a picture that is in it"
INSTEAD = "get the picture itself"
OTHER = "give a photograph"

# How a file begins, what it is, what to do; the first that fits. Markup may follow a byte order
# mark, declarations and comments.
MARKUP = rb"(?i)(\xef\xbb\xbf)?\s*((<\?.*?\?>|<!--.*?-->)\s*)*<"
SIGNATURES = [
    (rb"version https?://git-lfs", "a Git LFS pointer, not an image", "fetch it with git lfs pull"),
    (
        MARKUP + rb"(!doctype html|(html|head|body|title|meta|script|style|center|div|h\d|p)[\s>])",
        "a web page, not an image",
        "get the picture itself, not the page that shows it",
    ),
    (MARKUP + rb"(!doctype |\w+:)?svg[\s>]", "an SVG drawing", CONVERT),
    (MARKUP + rb"(\?xml|[!\w])", "an XML file, not an image", INSTEAD),
    (rb"data:\w+/", "a data address, not an image", "decode it into a file first"),
    (rb"(\xef\xbb\xbf)?\s*(\{\s*[\"}]|\[\s*[\[{\"\]\d-])", "a JSON file, not an image", INSTEAD),
    (rb"\[InternetShortcut\]|L\0\0\0\x01\x14\x02\0", "a shortcut, not an image", "give its target"),
    (rb"\s*%PDF-", "a PDF document, not an image", EXTRACT),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript", CONVERT),
    (rb"\{\\rtf|\xd0\xcf\x11\xe0", "an office document, not an image", EXTRACT),
    (
        rb"PK\x03\x04.*(\[Content_Types\]|_rels/|word/|ppt/|xl/|mimetypeapplication/)",
        "an office document, not an image",
        EXTRACT,
    ),
    (
        rb"PK[\x03\x05\x07]|Rar!\x1a|7z\xbc\xaf|\x1f\x8b|BZh\d|\xfd7zXZ|\x28\xb5\x2f\xfd"
        rb"|.{257}ustar",
        "an archive (zip or the like), not an image",
        UNPACK,
    ),
    (rb"\0.{3}ftyp.{0,40}?(hei[cfmsx]|hev[cmsx])", "a HEIC photo", CONVERT),
    (rb"\0.{3}ftypcrx|FUJIFILMCCD|II(R[OS]\x08|U\0)|.{8}CR\x02", "a camera's raw file", CONVERT),
    (rb"\0.{3}ftypM4[AB]|RIFF.{4}WAVE|ID3[\x02-\x04]|fLaC", "a sound, not an image", OTHER),
    (rb"\xff[\xf1-\xfb]|OggS\0|MThd\0", "a sound, not an image", OTHER),
    (rb"\0.{3}(ftyp(?!avi[fs]|mi[af]|msf1)|moov|mdat|wide)", "a video, not an image", FRAME),
    (rb"RIFF.{4}AVI |\x1aE\xdf\xa3|FLV\x01|\0\0\x01[\xb3\xba]", "a video, not an image", FRAME),
    (rb"\x30\x26\xb2\x75|G.{187}G", "a video, not an image", FRAME),
    (rb"8BP[SB]\0|gimp xcf", "a file of a drawing program", CONVERT),
    (rb"\0\0[\x01\x02]\0[^\0]\0|icns\0", "an icon", CONVERT),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL image", CONVERT),
    (
        rb"v/1\x01|#\?RADIANCE|#\?RGBE|DDS \x7c|SIMPLE  =|.{128}DICM",
        "an image of a rare kind",
        CONVERT,
    ),
    (rb"\x93NUMPY|\x89HDF|PAR1", "an array or a table, not an image", OTHER),
    (rb"SQLite format 3\0", "a database, not an image", OTHER),
    (
        rb"\0\x05\x16[\0\x07]|\0{3}\x01Bud1",
        "what macOS notes about a file, not an image",
        "give the file itself",
    ),
    (
        rb"MZ[^ \w]|\x7fELF|[\xcf\xce]\xfa\xed\xfe|\xca\xfe\xba\xbe",
        "a program, not an image",
        OTHER,
    ),
    (rb"\0+$", "nothing but zeros, not an image", "copy or download it again"),
    (rb"\xff\xfe|\xfe\xff|[^\0-\x08\x0e-\x1a\x1c-\x1f\x7f]+$", "a text, not an image", INSTEAD),
]


def what_it_is(head: bytes) -> tuple[str, str] | None:
    """The first bytes of a file -> what it is and what to do about it; None if nobody knows."""
    for signature, what, advice in SIGNATURES:
        if re.match(signature, head[:HEAD], re.DOTALL):
            return what, advice
    return None
