"""What a file is by its contents, to say so where it is not what was asked for."""

import codecs
import tarfile
import warnings
import zipfile
from contextlib import suppress

from PIL import Image

SAFETENSORS, PICTURE, PACKED = "a file of safetensors", "a picture", "a file packed"

_BEGINNINGS = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x1f\x8b": f"{PACKED} by gzip",
    b"\xfd7zXZ\x00": f"{PACKED} by xz",
    b"\x93NUMPY": "a NumPy array",
    b"%PDF": "a PDF",
}


def kind_of(path):
    """A file's kind, "a picture (JPEG)", "an HDF5 file", "empty"; None of one that is not known, or
    may be what torch.save wrote, whole or not. The file is to be readable."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head:
        return "empty"
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27:
        return SAFETENSORS
    if image := _image_format(path, head):
        return f"{PICTURE} ({image})"
    return _archive_kind(path) or _text_kind(head)


def _archive_kind(path):
    with suppress(Exception), zipfile.ZipFile(path) as archive:  # it raises many for damaged files
        ours = any(name.endswith("/data.pkl") for name in archive.namelist())
        return None if ours else "a zip archive of another kind"
    with suppress(Exception):
        return "a tar archive" if tarfile.is_tarfile(path) else None
    return None


def _image_format(path, head):
    """Of the formats that are told by more than a byte or two."""
    if head[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypavif"):  # by phones
        return head[8:12].decode().upper()
    formats = ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=formats) as image:
                return image.format
    except Exception:  # Pillow raises nearly anything for what is no image
        return None


def _text_kind(head):
    """JSON or another text, with its beginning; None of bytes that are none."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # it may end within a letter
    except ValueError:
        return None
    if not all(letter.isprintable() or letter in "\r\n\t\ufeff" for letter in text):
        return None
    text = text.lstrip("\ufeff \r\n\t")
    return "JSON" if text[:1] in ("{", "[") else f"a text, {text.partition(chr(10))[0][:40]!r} …"
