"""HDF5 files: written on disks that may be full, read where they may be damaged."""

import math
from contextlib import contextmanager, suppress

import h5py

from groundwork.errors import UserError
from groundwork.files import check_readable

MAX_CHUNK = 2**28  # bytes, all of which reading one item may take


@contextmanager
def new_hdf5(path):
    """Yields a new h5py.File to write.

    Without a chunk cache, a full disk is an OSError of the write that fills it; with one, HDF5
    finds out when it closes the file, and may crash.
    """
    file = h5py.File(path, "w", rdcc_nbytes=0)
    try:
        yield file
    except BaseException:
        with suppress(RuntimeError):  # closing fails like the write before it
            file.close()
        raise
    try:
        file.close()
    except RuntimeError as error:
        raise OSError(str(error)) from error


def open_hdf5(path, name, other=None):
    """The data set `name` of an HDF5 file, or where it has none, `other`, opened for reading.
    Raises UserError if it cannot be."""
    check_readable(path, f"{path} is missing: run create_input_files.py")
    try:
        file = h5py.File(path, "r")
        name = other if other and other in file and name not in file else name
        data = file[name]
        if not isinstance(data, h5py.Dataset) or data.is_virtual or data.external:
            raise TypeError(f"{name} is no data set of its own")
        if math.prod(data.chunks or ()) * data.dtype.itemsize > MAX_CHUNK:
            raise ValueError("its chunks are too large")
    except Exception as error:  # on damaged files h5py raises nearly anything
        raise UserError(f"{path} is damaged ({error}): make it again") from error
    return data


def read_item(data, index):
    """Values of an HDF5 data set. Raises UserError where they are damaged."""
    try:
        return data[index]
    except Exception as error:  # as in open_hdf5
        raise UserError(
            f"{data.file.filename} is damaged at {index} ({error}): make it again"
        ) from error
