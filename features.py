"""A frozen encoder's output, computed once and kept on disk."""

import errno
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
from groundwork.hdf5 import new_hdf5, read_item
from groundwork.progress import progress
from groundwork.wording import counted
from utils import input_path


def cache_features(encoder, data_folder, base, split, views=1, seed=0, amp=False, batch_size=32):
    """Runs a frozen encoder over a split once and keeps its features in an HDF5 file.

    The file's name carries a hash of the encoder's name and weights, of the images' file, the
    views and the precision, so that a changed encoder or data set never meets old features. What
    an interrupted call has computed is kept, and the next one goes on from there.

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
    count, *_, side = open_images(images).shape
    key = _features_key(encoder, images, views, seed, amp)
    path = Path(data_folder) / f"{split}_FEATURES_{base}_{key}.hdf5"
    if path.exists():
        return path
    device = encoder.mean.device
    with torch.inference_mode():
        grid = encoder.features(torch.zeros(1, 3, side, side, device=device)).shape[1:]
    size = 2 * count * views * grid.numel()
    free = shutil.disk_usage(data_folder).free
    print(
        f"caching {split} features, {counted(count, 'image')} × {counted(views, 'view')}: "
        f"{size / 1e9:.2f} GB in {path}"
    )
    partial = path.with_suffix(".part")
    if partial.exists() and not _can_go_on(partial, (count, views, *grid)):
        print(f"{partial} is damaged: starting anew")
        partial.unlink()
    if not partial.exists():
        if free < 1.1 * size:
            print(
                f"not cached, as only {free / 1e9:.2f} GB are free: the encoder runs in every epoch"
            )
            return None
        try:
            with os_errors_as_user_errors(partial):
                _allocate(partial, (count, views, *grid))
        except UserError as error:
            read_only = (errno.EACCES, errno.EPERM, errno.EROFS)
            if getattr(error.__cause__, "errno", None) not in read_only:
                raise
            print(f"not cached ({error}): the encoder runs in every epoch")
            return None
    with os_errors_as_user_errors(partial):
        _fill(partial, encoder, images, seed, amp, batch_size)
        os.replace(partial, path)
    return path


def _can_go_on(path, shape):
    """Whether a file is the unfinished features of that shape, or another process is at it."""
    try:
        with h5py.File(path, "r") as file:
            done = file["done"][()]
            return file["features"].shape == shape and 0 <= int(done) <= shape[0]
    except BlockingIOError:
        return True
    except Exception:  # as in `open_hdf5`
        return False


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


@torch.inference_mode()
def _fill(path, encoder, images, seed, amp, batch_size):
    device = encoder.mean.device
    source = open_images(images)
    with h5py.File(path, "r+") as file, torch.autocast(device.type, torch.bfloat16, enabled=amp):
        features, done = file["features"], int(file["done"][()])
        bar = progress(total=len(source), initial=done, desc="features", unit="image")
        for start in range(done, len(source), batch_size):
            batch = torch.from_numpy(read_item(source, slice(start, start + batch_size)))
            for view in range(features.shape[1]):
                seen = [make_view(image, view, (seed, start + i)) for i, image in enumerate(batch)]
                out = encoder.features(torch.stack(seen).to(device))
                features[start : start + len(batch), view] = out.half().cpu().numpy()
            file.flush()
            flush(path)
            file["done"][()] = start + len(batch)
            bar.update(len(batch))
        bar.close()
    flush(path)


def _features_key(encoder, images, views, seed, amp):
    digest = hashlib.sha256()
    for tensor in encoder.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    file = images.stat()
    rest = [encoder.name, file.st_size, file.st_mtime_ns, views, amp, seed if views > 2 else None]
    digest.update(json.dumps(rest).encode())
    return digest.hexdigest()[:12]
