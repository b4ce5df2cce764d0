"""Image files of every kind that people have, read as upright RGB pictures, several at a time."""

import io
import os
import re
import struct
import threading
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.util import find_spec

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from groundwork.errors import UserError
from groundwork.files import check_readable

_opening = threading.Lock()  # the filters of warnings are all threads' own

_large = threading.Lock()  # one at a time: the threads' memory adds up

# Those of pictures: others, as EPS, have Pillow start other programs
FORMATS = ["BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP"]

HEIC = [".heic", ".heif", ".hif"]  # endings of what telephones write

# What these and AVIF name in the box that their files begin with
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}
AVIF_BRANDS = {b"avif", b"avis"}

MAX_ASPECT = 100  # longer side / shorter side

MAX_PIXELS = 2**26  # of an image; decoded, turned upright and made RGB it takes under a gigabyte

GROUND = 124, 116, 104  # the mean colour of ImageNet, which encoders take away

FRAME = 2048  # pixels

ORIENTATION = ExifTags.Base.Orientation

# Greatest values of pixels that are no bytes: shares, 8 bits, cameras' 12 bits, 16 bits
RANGES = 1, 255, 4095, 65535


def endings():
    """Endings of files of the formats that can be read here, lower case, with the dot."""
    known = Image.registered_extensions().items()  # AVIF's only where Pillow can read it
    heic = HEIC if find_spec("pillow_heif") else []
    return {ending for ending, kind in known if kind in [*FORMATS, "AVIF"]}.union(heic)


def open_image(path):
    """The image file's picture as an upright RGB PIL.Image, transparent parts on white.

    Of an animated file the first frame. `path` is a file's, or what reads a part of a larger file:
    its `read()` gives bytes, and its text says where they are from. Raises UserError naming it if
    it is missing, not an image of `FORMATS`, AVIF or HEIC, damaged, has more than `MAX_PIXELS`,
    or is over `MAX_ASPECT` times as long as wide, or if a package that reads it is missing.
    """
    return _open(path)[0]


def _open(path, side=None):
    """`open_image`, and the picture's width and height.

    Args:
        side: of the square that will be made of it, pixels, for which a JPEG far larger is decoded
            at a reduced `_scale`, in a fraction of the time.
    """
    is_file = isinstance(path, str | os.PathLike)
    if is_file:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(path)) and not os.path.exists(path):
            raise UserError(f"{path}: addresses are not fetched: download it and name the file")
        check_readable(path, f"there is no image {path}")
    try:
        file = path if is_file else io.BytesIO(path.read())
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours comes earlier
            image = Image.open(file, formats=_formats(file))
        with image:
            check_size(image)
            turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
            size = image.size[::-1] if turned else image.size
            if side is not None and (scale := _scale(image.size, side)):
                # does nothing to what is no JPEG
                image.draft(None, [length // scale for length in image.size])
            return to_rgb(image), size
    except Image.DecompressionBombError as error:  # over twice Pillow's own bound, far above ours
        raise UserError(
            f"cannot read image {path}: more than {MAX_PIXELS:,} pixels, make it smaller"
        ) from error
    except UnidentifiedImageError as error:  # whose own text names the object in memory
        raise UserError(
            f"cannot read image {path}: cannot identify it as one of {', '.join(FORMATS)}"
        ) from error
    except Exception as error:  # on damaged files Pillow's decoders raise nearly anything
        raise UserError(f"cannot read image {path}: {error or type(error).__name__}") from error


def _scale(size, side):
    """8, 4 or 2, by which the largest can be divided without a rest, as else the picture shifts a
    little, and leaves twice the side of its square or more; None where none does."""
    fine = (s for s in (8, 4, 2) if min(size) >= 2 * s * side and not any(x % s for x in size))
    return next(fine, None)


def _formats(path):
    """What the file may be, by its first bytes. Raises ValueError where a package is missing."""
    with nullcontext(path) if isinstance(path, io.BytesIO) else open(path, "rb") as file:
        size, kind, *brands = struct.unpack("4s" * 16, file.read(64).ljust(64, b"\0"))
    if kind != b"ftyp":
        return FORMATS
    brands = set(brands[: max(0, int.from_bytes(size, "big") // 4 - 2)])
    if brands & AVIF_BRANDS:
        if ".avif" not in Image.registered_extensions():
            raise ValueError("this Pillow reads no AVIF: pip install --upgrade pillow")
        return ["AVIF"]
    if brands & HEIC_BRANDS:
        try:
            import pillow_heif
        except ImportError:
            raise ValueError("it is HEIC: pip install pillow-heif") from None
        pillow_heif.register_heif_opener()
        return ["HEIF"]
    return FORMATS


def to_rgb(image):
    """A PIL.Image of any mode as an upright RGB one, transparent parts on white.

    Raises ValueError for a size that cannot be, and others of many classes for damaged pixels.
    """
    check_size(image)
    with _large if image.width * image.height > MAX_PIXELS / 8 else nullcontext():
        return _convert(ImageOps.exif_transpose(image))


def check_size(image):
    """Raises ValueError for an image whose size cannot be."""
    size = f"{image.width}×{image.height} pixels"
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{size} are more than {MAX_PIXELS:,}, make it smaller")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{size} are a line, not a picture")


def _convert(image):
    if image.mode.startswith("I") or image.mode == "F":  # which Pillow would clip at 255
        image = Image.fromarray(_to_bytes(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _to_bytes(image):
    """np.uint8 (H, W) of an image of whole numbers or floats, whose range is the least of `RANGES`
    that holds them. Raises ValueError where it is none, so that nothing comes out black."""
    values = np.array(image, np.float32 if image.mode == "F" else np.int32)
    least, most = values.min(), values.max()
    if not (least >= 0 and (most <= 1 or 16 <= most <= RANGES[-1])):  # nor where they are NaN
        raise ValueError(
            f"its pixels' values are from {least:g} to {most:g}, which may mean anything: scale "
            "them to 0 … 1, 255 or 65535"
        )
    top = next(top for top in RANGES if most <= top)
    values *= 255  # in place, as it may be large
    values += values.dtype.type(top / 2)
    return np.floor_divide(values, top, out=values).astype(np.uint8)


def read_image(path, size):
    """An image file's picture, `squeeze`d. Raises UserError."""
    return squeeze(_open(path, size)[0], size)


def square(image, size, fit="squeeze"):
    """An RGB PIL.Image made a square: np.uint8 (3, size, size).

    Args:
        fit: of `FITS`: the whole of it squeezed; its middle, cropped to a square; or the whole of
            it in its proportions, on a ground of `GROUND`.
    """
    if fit == "crop":
        return squeeze(image.crop(_middle(image)), size)
    if fit == "pad":
        scale = size / max(image.size)
        sides = [max(1, round(scale * side)) for side in image.size]
        image = _on_ground(image.resize(sides, Image.Resampling.BILINEAR))
    return squeeze(image, size)


def framed(image, fit="squeeze"):
    """What a `square` shows of an RGB PIL.Image, in its proportions: itself, its middle, or itself
    on the ground, then at most `FRAME` pixels wide."""
    if fit == "crop":
        return image.crop(_middle(image))
    if fit == "pad":
        image = image.copy()
        image.thumbnail((FRAME, FRAME))  # a line of many pixels would be a very large square
        return _on_ground(image)
    return image


def frame(width, height, fit="squeeze"):
    """Where the edges of a `square` are in a picture of that width and height: left, top, right,
    bottom, fractions of width and height, which are below 0 and above 1 where there is ground."""
    if fit == "squeeze":
        return 0.0, 0.0, 1.0, 1.0
    side = (min if fit == "crop" else max)(width, height)
    x, y = (0.5 * (1 - side / length) for length in (width, height))
    return x, y, 1 - x, 1 - y


def _middle(image):
    """The largest square in the middle: left, top, right, bottom, pixels."""
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return left, top, left + side, top + side


def _on_ground(image):
    """The image in the middle of the smallest square that holds it."""
    side = max(image.size)
    ground = Image.new("RGB", (side, side), GROUND)
    ground.paste(image, [(side - length) // 2 for length in image.size])
    return ground


def squeeze(image, size):
    """An RGB PIL.Image made a square: np.uint8 (3, size, size)."""
    # Pillow widens the filter's support when it shrinks: no aliasing.
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def unsqueeze(square, width, height):
    """A `squeeze`d image (3, S, S) as an RGB PIL.Image as long and wide as one of width × height,
    its longer side S pixels."""
    image = Image.fromarray(np.ascontiguousarray(square.transpose(1, 2, 0)))
    scale = image.width / max(width, height)
    return image.resize([max(1, round(scale * side)) for side in (width, height)])


def read_images(paths, size, workers, fit="squeeze", total=None):
    """Yields each path's picture as a `square`, with its width and height as it stands upright, or
    the line that says why it cannot be read, in order.

    Args:
        total: how many paths there are, where they are no list.
        workers: threads that read ahead; None: as many as there are cores.
    """

    def read(path):
        try:
            image, shape = _open(path, size)
            return square(image, size, fit), *shape
        except UserError as error:
            return str(error)

    from groundwork.progress import progress  # which takes PyTorch, as reading an image does not

    total = len(paths) if total is None else total
    with progress(total=total, desc="reading images", unit="image") as bar:
        for image in in_threads(read, paths, workers):
            yield image
            bar.update()


def in_threads(function, items, workers=None):
    """Yields function(item) of each item, in order.

    Threads compute ahead, since Pillow works beside Python's other threads, but no further than a
    few items each. None: as many as the cores that this process may use.
    """
    if workers is None:
        affinity = getattr(os, "sched_getaffinity", None)  # where the system tells
        workers = len(affinity(0)) if affinity else os.cpu_count()
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
