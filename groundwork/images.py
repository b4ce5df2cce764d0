"""Image files of every kind that people have, read as upright RGB pictures, several at a time."""

import os
import threading
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
from PIL import Image, ImageOps

from groundwork.errors import UserError
from groundwork.files import check_readable
from groundwork.progress import progress

_opening = threading.Lock()  # the filters of warnings are all threads' own

_large = threading.Lock()  # one at a time: the threads' memory adds up

# Those of pictures: others, as EPS, have Pillow start other programs
FORMATS = ["BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "TGA", "TIFF"]

FORMATS += ["WEBP"]

MAX_ASPECT = 100

MAX_PIXELS = 2**26  # of an image; decoded, turned upright and made RGB it takes under a gigabyte


def endings():
    """Endings of files of the formats that are read, lower case, with the dot."""
    return {e for e, kind in Image.registered_extensions().items() if kind in FORMATS}


def open_image(path):
    """The image file's picture as an upright RGB PIL.Image, transparent parts on white.

    Of an animated file the first frame. Raises UserError naming the file if it is missing, not
    an image of `FORMATS`, damaged, has more than `MAX_PIXELS`, or is over `MAX_ASPECT` times as
    long as wide.
    """
    check_readable(path, f"there is no image {path}")
    try:
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours comes earlier
            image = Image.open(path, formats=FORMATS)
        with image:
            return to_rgb(image)
    except Exception as error:  # on damaged files Pillow's decoders raise nearly anything
        raise UserError(f"cannot read image {path}: {error or type(error).__name__}") from error


def to_rgb(image):
    """A PIL.Image of any mode as an upright RGB one, transparent parts on white.

    Raises ValueError for a size that cannot be, and others of many classes for damaged pixels.
    """
    size, pixels = f"{image.width}×{image.height} pixels", image.width * image.height
    if pixels > MAX_PIXELS:
        raise ValueError(f"{size} are more than {MAX_PIXELS:,}, make it smaller")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{size} are a line, not a picture")
    with _large if pixels > MAX_PIXELS / 8 else nullcontext():
        return _convert(ImageOps.exif_transpose(image))


def _convert(image):
    if image.mode.startswith("I"):  # 16 bits in a pixel, which Pillow would clip at 255
        pixels = np.array(image, dtype=np.int32)  # divided in place, as it may be large
        pixels.clip(0, 65535, out=pixels)
        pixels += 128
        pixels //= 257
        image = Image.fromarray(pixels.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def read_image(path, size):
    """An image file's picture, `squeeze`d. Raises UserError."""
    return squeeze(open_image(path), size)


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


def read_images(paths, size, workers):
    """Yields each path's picture, `squeeze`d, with its width and height as it stands upright, or
    the line that says why it cannot be read, in order.

    `workers` threads read ahead, since Pillow decodes and resizes beside Python's other threads,
    but no further than a few images each.
    """
    if workers is None:  # the cores that this process may use, where the system tells
        affinity = getattr(os, "sched_getaffinity", None)
        workers = len(affinity(0)) if affinity else os.cpu_count()

    def read(path):
        try:
            image = open_image(path)
            return squeeze(image, size), *image.size
        except UserError as error:
            return str(error)

    with (
        progress(total=len(paths), desc="reading images", unit="image") as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        ahead = deque()
        for path in paths:
            ahead.append(pool.submit(read, path))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
                bar.update()
        for future in ahead:
            yield future.result()
            bar.update()
