"""The images of a split in their files, squares of pixels or JPEGs that are decoded on the way, and
what features they have; in one file, or in shards."""

import io
import re
from bisect import bisect_right
from contextlib import contextmanager
from itertools import accumulate

import numpy as np
from PIL import Image

from groundwork.errors import UserError
from groundwork.hdf5 import new_hdf5, open_hdf5, read_item
from groundwork.options import FITS, MAX_IMAGE_SIZE

QUALITY = 90  # of JPEGs, 0 to 95
MAX_JPEG = 2**24  # bytes of one: more than the pixels of the largest square take
BLOCK = 2**20  # bytes of JPEGs that HDF5 keeps together

_SHARD = re.compile(r"_(\d{5})-of-(\d{5})$")  # the end of a file's name


def shard_name(number, count):
    """What stands at the end of the names of a shard's files."""
    return f"_{number:05d}-of-{count:05d}"


def shard_of(path):
    """Number and count of a shard by its file's name; None of a file that is whole."""
    found = _SHARD.search(path.stem)
    return found and (int(found[1]), int(found[2]))


# ------------------------------------------------------------------------------------- writing


class ImageWriter:
    """Appends squares to a new file of images.

    Args:
        file: an open h5py.File.
        count: of the images, at most.
        size: side of the squares, pixels.
        fit: of `FITS`: how they were made.
        store: "raw" keeps their pixels, uint8 (I, 3, size, size), "jpeg" JPEGs: `jpeg`, the bytes
            of all in a row, and `ends`, where each ends, int64 (I,).
    """

    def __init__(self, file, count, size, fit, store):
        self.file, self.raw, self.count, self.ends = file, store == "raw", 0, []
        file.attrs["fit"] = fit
        if self.raw:
            shape = (count, 3, size, size)
            self.images = file.create_dataset(
                "images", shape=shape, maxshape=shape, chunks=(1, *shape[1:]), dtype="uint8"
            )
        else:
            file.attrs["image_size"] = size
            self.images = file.create_dataset("jpeg", (0,), "uint8", maxshape=(None,), chunks=BLOCK)

    def add(self, square):
        """Appends a square, np.uint8 (3, size, size)."""
        if self.raw:
            self.images[self.count] = square
        else:
            contents = io.BytesIO()
            picture = Image.fromarray(np.ascontiguousarray(square.transpose(1, 2, 0)))
            picture.save(contents, "JPEG", quality=QUALITY)
            start = self.ends[-1] if self.ends else 0
            self.ends.append(start + contents.getbuffer().nbytes)
            self.images.resize((self.ends[-1],))
            self.images[start:] = np.frombuffer(contents.getbuffer(), np.uint8)
        self.count += 1

    def close(self):
        if self.raw:
            self.images.resize(self.count, axis=0)
        else:
            self.file["ends"] = np.array(self.ends, np.int64)


@contextmanager
def new_images(path, count, store, size, fit, per_image):
    """Yields an `ImageWriter` for a new file, in which `per_image`, captions an image, stands."""
    with new_hdf5(path) as file:
        file.attrs["captions_per_image"] = per_image
        writer = ImageWriter(file, count, size, fit, store)
        yield writer
        writer.close()


# ------------------------------------------------------------------------------------- reading


class _File:
    """The images of one file."""

    def __init__(self, path):
        data = open_hdf5(path, "images", "jpeg")
        self.path, self.raw = path, data.name == "/images"
        try:
            self.fit = str(data.file.attrs.get("fit", "squeeze"))  # which older files lack
            size = None if self.raw else int(data.file.attrs["image_size"])
        except Exception as error:  # as in `open_hdf5`
            raise UserError(f"{path} is damaged ({error}): make it again") from error
        if self.fit not in FITS:
            raise UserError(f"{path} holds images of an unknown fit: make it again")
        if self.raw:
            shape = data.shape
            if data.dtype != "uint8" or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
                raise UserError(f"{path} holds no square images: run create_input_files.py again")
            self.count, _, _, self.side = shape
        else:
            self.side, self.ends = size, _ends(path, data)
            self.count = len(self.ends) - 1
        if not 0 < self.side <= MAX_IMAGE_SIZE:
            raise UserError(
                f"{path} holds images of {self.side} × {self.side} pixels: make it again"
            )
        self.data = data

    def __getitem__(self, i):
        if self.raw:
            return read_item(self.data, i)
        start, end = map(int, self.ends[i : i + 2])
        return self._decoded(read_item(self.data, slice(start, end)).tobytes(), i)

    def _decoded(self, contents, i):
        try:
            with Image.open(io.BytesIO(contents), formats=["JPEG"]) as picture:
                if picture.size != (self.side, self.side) or picture.mode != "RGB":
                    raise ValueError(f"{picture.width}×{picture.height} pixels, {picture.mode}")
                return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))
        except Exception as error:  # on damaged files Pillow raises nearly anything
            raise UserError(f"{self.path} is damaged at {i} ({error}): make it again") from error


def _ends(path, data):
    """Where each of a file's JPEGs ends, and 0 before the first: int64 (I + 1,)."""
    ends = open_hdf5(path, "ends")
    if data.dtype != "uint8" or data.ndim != 1 or ends.dtype != "int64" or ends.ndim != 1:
        raise UserError(f"{path} holds no JPEGs: run create_input_files.py again")
    ends = np.concatenate([[0], read_item(ends, slice(None))])
    sizes = np.diff(ends)
    if len(sizes) and (sizes.min() <= 0 or sizes.max() > MAX_JPEG or ends[-1] > len(data)):
        raise UserError(f"{path} is damaged (its JPEGs do not fit in it): make it again")
    return ends


class _Stored:
    """What a split has for each of its images, in one file or several.

    A file is open from the first of its images that is read on; a copy for another process, as
    DataLoader's, has none open.
    """

    def __init__(self, paths, counts):
        self.paths, self.starts, self.open = list(paths), [0, *accumulate(counts)], {}

    def __getstate__(self):
        return self.__dict__ | {"open": {}}

    def __len__(self):
        return self.starts[-1]

    def place(self, i):
        """The open file that holds image i, and its number there."""
        number = bisect_right(self.starts, i) - 1
        if number not in self.open:
            self.open[number] = self.open_file(self.paths[number])
        return self.open[number], i - self.starts[number]


class StoredImages(_Stored):
    """The images of a split, np.uint8 (3, S, S), by their numbers.

    Args:
        paths: of its files, in order.

    Raises:
        UserError: one is missing, damaged, or of other images than the first.
    """

    open_file = _File

    def __init__(self, paths):
        files = [_File(path) for path in paths]
        super().__init__(paths, [file.count for file in files])
        self.side, self.fit = files[0].side, files[0].fit
        for file in files:
            if (file.side, file.fit) != (self.side, self.fit):
                raise UserError(
                    f"{file.path} holds images of {file.side} pixels, {file.fit}, and "
                    f"{self.paths[0]} of {self.side}, {self.fit}: make them again"
                )

    @property
    def shape(self):
        return len(self), 3, self.side, self.side

    def __getitem__(self, i):
        """Raises UserError where it is damaged."""
        file, place = self.place(i)
        return file[place]


class StoredFeatures(_Stored):
    """Features by the numbers of their images and views: np.float16 (g, g, D).

    Args:
        paths: of files of `features.cache_features`.

    Raises:
        UserError: one is damaged.
    """

    def __init__(self, paths):
        shapes = [feature_shape(path) for path in paths]
        for path, shape in zip(paths, shapes, strict=True):
            if shape is None or shape[1:] != shapes[0][1:]:
                raise UserError(f"{path} is damaged: delete it, and it is made again")
        super().__init__(paths, [shape[0] for shape in shapes])

    def open_file(self, path):
        return open_hdf5(path, "features")

    def __getitem__(self, item):
        """Raises UserError where it is damaged."""
        i, view = item
        file, place = self.place(i)
        return read_item(file, (place, view))


def feature_shape(path):
    """(I, views, g, g, D) of a file of features; None where it is none."""
    try:
        features = open_hdf5(path, "features")
    except UserError:
        return None
    shape = features.shape
    whole = len(shape) == 5 and shape[2] == shape[3] and min(shape[1:]) > 0
    return shape if whole and features.dtype == "float16" else None
