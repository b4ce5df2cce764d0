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
from typing import NamedTuple

import h5py
import torch

from datasets import open_images
from groundwork import distributed
from groundwork.errors import UserError
from groundwork.files import flush, os_errors_as_user_errors, reserve, temporary_path
from groundwork.hdf5 import new_hdf5, open_hdf5, read_item
from groundwork.progress import progress
from groundwork.wording import counted, size_of
from input_files import shard_paths
from views import make_view


class Caching(NamedTuple):
    """How features are made and kept."""

    views: int = 1  # of each image
    seed: int = 0  # of the views
    amp: bool = False  # compute in bfloat16
    batch_size: int = 32


def cache_features(encoder, data_folder, base, split, views=1, seed=0, amp=False, batch_size=32):
    """Runs a frozen encoder over a split once and keeps its features in HDF5 files, one for each
    file of images.

    The files' names carry a hash of the encoder's name and weights, of the images' files, the
    views and the precision, so that a changed encoder or data set never meets old features; and
    the first image's are compared with what the encoder gives now, for its code may have changed.
    What an interrupted call has computed is kept, and the next one goes on from there. Of several
    processes that call it together each makes those of the shards that it takes, every n-th; where
    there are no shards, the main one makes them, and the others wait.

    Args:
        encoder: on the device it is to run on.
        views: how many views of each image to keep.
        seed: of the views.
        amp: compute in bfloat16.

    Returns:
        the paths: in each the data set `features`, float16 (I, views, g, g, D); None where a disk
        has no room for them.

    Raises:
        UserError: a file cannot be written, or another process is at it.
    """
    images = open_images(data_folder, base, split)
    key = _features_key(encoder, images.paths, views, seed, amp)
    whole = Path(data_folder) / f"{split}_FEATURES_{base}_{key}.hdf5"
    count = len(images.paths)
    paths = shard_paths(whole, count) if count > 1 else [whole]
    caching, missing = Caching(views, seed, amp, batch_size), 0
    for i in distributed.share(count):
        missing += not _cache(encoder, images, i, paths[i], caching)
    missing = distributed.add_up(torch.tensor(missing, device=encoder.mean.device))
    return None if missing else paths


def _cache(encoder, images, number, path, caching):
    """Keeps the features of the images in a file of theirs, by its number, at a path. Whether it
    can: the disk may have no room, or be read-only."""
    partial, (start, end) = path.with_suffix(".part"), images.starts[number : number + 2]
    first = _compute(encoder, [torch.from_numpy(images[start])], caching.amp)
    shape = (end - start, caching.views, *first.shape[1:])
    if path.exists():
        if _agrees(path, first):
            return True
        print(f"{path} is damaged, or the encoder computes something else: made anew")
    size = 2 * math.prod(shape)
    print(
        f"caching features, {counted(shape[0], 'image')} × {counted(caching.views, 'view')}: "
        f"{size_of(size)} in {path}"
    )
    if partial.exists() and not _can_go_on(partial, shape, first):
        print(f"{partial} is damaged or of another encoder: starting anew")
        partial.unlink()
    if not partial.exists() and not _make_room(partial, shape):
        return False
    with os_errors_as_user_errors(partial):
        _fill(partial, encoder, images, start, caching)
        os.replace(partial, path)
    return True


def _make_room(partial, shape):
    """Makes the unfinished file of features, whether it could."""
    size, free = 2 * math.prod(shape), shutil.disk_usage(partial.parent).free
    if free < 1.1 * size:
        print(f"not cached, as only {size_of(free)} are free: the encoder runs in every epoch")
        return False
    try:
        with os_errors_as_user_errors(partial):
            _allocate(partial, shape)
    except UserError as error:
        read_only = (errno.EACCES, errno.EPERM, errno.EROFS)
        if getattr(error.__cause__, "errno", None) not in read_only:
            raise
        print(f"not cached ({error}): the encoder runs in every epoch")
        return False
    return True


def other_features(data_folder, base, paths):
    """Files of features of that data set beside the given ones: other encoders', other views'.

    Those that another process is making are left out.
    """
    key = "[0-9a-f]" * 12  # not *, which would match other data sets' names that begin like this
    name = f"*_FEATURES_{glob.escape(base)}_{key}"
    found = {path for end in (".*", "_*-of-*.*") for path in Path(data_folder).glob(name + end)}
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


def _fill(path, encoder, images, first, caching):
    """Computes what is missing of the features in a file, of the images from number `first` on."""
    with h5py.File(path, "r+") as file:
        features, done = file["features"], int(file["done"][()])
        total, size = len(features), caching.batch_size
        bar = progress(total=total, initial=done, desc="features", unit="image")
        for start in range(done, total, size):
            numbers = range(first + start, first + min(start + size, total))
            batch = [torch.from_numpy(images[i]) for i in numbers]
            for view in range(features.shape[1]):
                seen = [
                    make_view(image, view, (caching.seed, i))
                    for i, image in zip(numbers, batch, strict=True)
                ]
                out = _compute(encoder, seen, caching.amp)
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
    files = [value for path in images for value in (path.stat().st_size, path.stat().st_mtime_ns)]
    rest = [encoder.name, *files, views, amp, seed if views > 2 else None]
    if encoder.stages != ("last",):
        rest.append(encoder.stages)
    digest.update(json.dumps(rest).encode())
    return digest.hexdigest()[:12]
