"""A frozen encoder's output, computed once and kept on disk."""

import errno
import glob
import hashlib
import json
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path

import h5py
import torch

from datasets import make_view, open_images
from groundwork.errors import UserError
from groundwork.files import flush, os_errors_as_user_errors, reserve, temporary_path
from groundwork.hdf5 import new_hdf5, open_hdf5, read_item
from groundwork.progress import progress
from groundwork.wording import counted, size_of
from utils import input_path


def cache_features(encoder, data_folder, base, split, views=1, seed=0, amp=False, batch_size=32):
    """Runs a frozen encoder over a split once and keeps its features in an HDF5 file.

    The file's name carries a hash of the encoder's name and weights, of the images' file, the
    views and the precision, so that a changed encoder or data set never meets old features; and
    the first image's are compared with what the encoder gives now, for its code may have changed.
    What an interrupted call has computed is kept, and the next one goes on from there.

    Args:
        encoder: on the device it is to run on.
        views: how many views of each image to keep.
        seed: of the views.
        amp: compute in bfloat16.

    Returns:
        the path: data set `features`, float16 (I, views, g, g, D); None where the disk has no
        room for it.

    Raises:
        UserError: the file cannot be written, or another process is at it.
    """
    images = input_path(data_folder, base, "IMAGES", split)
    source = open_images(images)
    key = _features_key(encoder, images, views, seed, amp)
    path = Path(data_folder) / f"{split}_FEATURES_{base}_{key}.hdf5"
    partial = path.with_suffix(".part")
    first = _compute(encoder, [torch.from_numpy(read_item(source, 0))], amp)
    shape = (len(source), views, *first.shape[1:])
    if path.exists():
        if _agrees(path, first):
            return path
        print(f"{path} is damaged, or the encoder computes something else: made anew")
    size = 2 * math.prod(shape)
    free = shutil.disk_usage(data_folder).free
    print(
        f"caching {split} features, {counted(len(source), 'image')} × {counted(views, 'view')}: "
        f"{size_of(size)} in {path}"
    )
    if partial.exists() and not _can_go_on(partial, shape, first):
        print(f"{partial} is damaged or of another encoder: starting anew")
        partial.unlink()
    if not partial.exists():
        if free < 1.1 * size:
            print(f"not cached, as only {size_of(free)} are free: the encoder runs in every epoch")
            return None
        try:
            with os_errors_as_user_errors(partial):
                _allocate(partial, shape)
        except UserError as error:
            read_only = (errno.EACCES, errno.EPERM, errno.EROFS)
            if getattr(error.__cause__, "errno", None) not in read_only:
                raise
            print(f"not cached ({error}): the encoder runs in every epoch")
            return None
    with os_errors_as_user_errors(partial):
        _fill(partial, encoder, source, seed, amp, batch_size)
        os.replace(partial, path)
    return path


def other_features(data_folder, base, paths):
    """Files of features of that data set beside the given ones: other encoders', other views'.

    Those that another process is making are left out.
    """
    key = "[0-9a-f]" * 12  # not *, which would match other data sets' names that begin like this
    found = Path(data_folder).glob(f"*_FEATURES_{glob.escape(base)}_{key}.*")
    return [
        path
        for path in sorted(found)
        if path not in paths
        and (path.suffix == ".hdf5" or (path.suffix == ".part" and not _is_being_made(path)))
    ]


def _is_being_made(path):
    try:
        with h5py.File(path, "r+"):  # which takes its lock
            return False
    except BlockingIOError:
        return True
    except Exception:  # as in `open_hdf5`
        return False


def _can_go_on(path, shape, first):
    """Whether a file is the unfinished features of that shape, or another process is at it."""
    try:
        with h5py.File(path, "r") as file:
            features, done = file["features"], int(file["done"][()])
            whole = features.shape == shape and 0 <= done <= shape[0]
    except (BlockingIOError, PermissionError):  # not damaged: filling it says what is the matter
        return True
    except Exception:  # as in `open_hdf5`
        return False
    return whole and (done == 0 or _agrees(path, first))


def _agrees(path, first):
    """Whether the first image's features in a file are (1, g, g, D) `first`, but for rounding."""
    try:
        kept = torch.from_numpy(read_item(open_hdf5(path, "features"), (slice(1), 0))).float()
    except UserError:
        return False
    # bfloat16 rounds to 0.4 %, and the layers add that up
    return kept.shape == first.shape and bool((kept - first).norm() <= 0.05 * first.norm())


def _allocate(path, shape):
    """A new file of features whose structure is whole from the start, unless there is one.

    Writing the values later changes nothing but them, so that a process that is killed meanwhile
    leaves a readable file.
    """
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    temporary = temporary_path(path)
    try:
        reserve(temporary, 2 * math.prod(shape))  # HDF5 complains of a full disk at length
        with new_hdf5(temporary) as file:
            file.create_dataset("features", shape, "float16", dcpl=early)
            file["done"] = 0  # images
        reserve(temporary, temporary.stat().st_size)  # so that filling it cannot fail
        flush(temporary)
        with suppress(FileExistsError):  # another process was faster
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _fill(path, encoder, images, seed, amp, batch_size):
    with h5py.File(path, "r+") as file:
        features, done = file["features"], int(file["done"][()])
        bar = progress(total=len(images), initial=done, desc="features", unit="image")
        for start in range(done, len(images), batch_size):
            batch = torch.from_numpy(read_item(images, slice(start, start + batch_size)))
            for view in range(features.shape[1]):
                seen = [make_view(image, view, (seed, start + i)) for i, image in enumerate(batch)]
                out = _compute(encoder, seen, amp)
                features[start : start + len(batch), view] = out.half().numpy()
            file.flush()
            flush(path)
            file["done"][()] = start + len(batch)
            bar.update(len(batch))
        bar.close()
    flush(path)


@torch.inference_mode()
def _compute(encoder, images, amp):
    """Features (n, g, g, D) of a list of n images (3, S, S), float32 on the CPU."""
    device = encoder.mean.device
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        return encoder.features(torch.stack(images).to(device)).float().cpu()


def _features_key(encoder, images, views, seed, amp):
    digest = hashlib.sha256()
    for tensor in encoder.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    file = images.stat()
    rest = [encoder.name, file.st_size, file.st_mtime_ns, views, amp, seed if views > 2 else None]
    if encoder.stages != ("last",):
        rest.append(encoder.stages)
    digest.update(json.dumps(rest).encode())
    return digest.hexdigest()[:12]
