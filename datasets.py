"""Prepared data: images (or their cached features) together with all their captions."""

import hashlib
import json
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2

import utils
from utils import UserError

# ------------------------------------------------------------------------------------ input files


def find_data(data_folder, base=None):
    """Base name of the prepared data set in a folder, None where there is none.

    Raises:
        UserError: several are there and `base` does not say which, or `base` is not among them.
    """
    bases = sorted(
        path.name.removeprefix("WORDMAP_").removesuffix(".json")
        for path in Path(data_folder).glob("WORDMAP_*.json")
    )
    if base is not None and base not in bases:
        raise UserError(
            f"no data set {base!r} in {data_folder}: there is {', '.join(bases) or 'none'}"
        )
    if base is None and len(bases) > 1:
        raise UserError(
            f"{data_folder} holds {len(bases)} data sets, {', '.join(bases)}: "
            "choose one with --data_name"
        )
    return base or (bases[0] if bases else None)


def read_word_map(data_folder, base):
    """Word -> index of a prepared data set. Raises UserError if the file is unusable."""
    path = utils.input_path(data_folder, base, "WORDMAP")
    word_map = utils.read_json(path)
    utils.check_word_map(word_map, path)
    return word_map


class CaptionDataset(Dataset):
    """Item i, or (i, view), is image i with all its captions: (source, captions, lengths).

    source: uint8 (3, S, S), a view of the image, by itself its first: see `make_view`; or float16
        (g, g, D), the view's features, where `features` names their file.
    captions: int64 (K, T), `<start>` to `<end>`, padded.
    lengths: int64 (K,), `<start>` and `<end>` counted.

    Args:
        data_folder, base, split: which input files; split is TRAIN, VAL or TEST.
        features: path from `cache_features`, or None for images.
        seed: of the views.

    Raises:
        UserError: a file is missing, damaged, or does not belong to the others.
    """

    def __init__(self, data_folder, base, split, features=None, seed=0):
        self.base, self.seed, self.from_features = base, seed, features is not None
        self.path = features or utils.input_path(data_folder, base, "IMAGES", split)
        images = open_images(utils.input_path(data_folder, base, "IMAGES", split)).shape
        self.image_size = images[-1]
        captions = _read_numbers(utils.input_path(data_folder, base, "CAPTIONS", split), 2)
        lengths = _read_numbers(utils.input_path(data_folder, base, "CAPLENS", split), 1)
        path = utils.input_path(data_folder, base, "REFERENCES", split)
        self.references = read_references(path)
        if (
            not images[0]
            or len(self.references) != images[0]
            or len(captions) % images[0]
            or len(captions) != len(lengths)
            or captions.min() < 0
            or captions.max() >= len(read_word_map(data_folder, base))
            or lengths.min() < 2
            or lengths.max() > captions.shape[1]
        ):
            raise UserError(
                f"the {split} files of {base} in {data_folder} do not belong together "
                f"({images[0]} images, {len(captions)} captions, {len(lengths)} lengths, "
                f"{len(self.references)} references): run create_input_files.py again"
            )
        self.captions = captions.view(images[0], -1, captions.shape[1])
        self.lengths = lengths.view(images[0], -1)
        self._data = None
        if self.from_features and not _are_features(self.path, images[0]):
            raise UserError(f"{self.path} is damaged: delete it, and it is made again")

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, item):
        i, view = item if isinstance(item, tuple) else (item, 0)
        if self._data is None:  # here, not in __init__: each worker process opens its own
            self._data = open_hdf5(self.path, "features" if self.from_features else "images")
        if self.from_features:
            source = torch.from_numpy(_read(self._data, (i, view)))
        else:
            source = make_view(torch.from_numpy(_read(self._data, i)), view, (self.seed, i))
        return source, self.captions[i], self.lengths[i]


class LengthSampler(Sampler):
    """Batches of images whose captions are about equally long; every image once an epoch.

    A batch takes as many steps as its longest caption has words, so an epoch's images, shuffled,
    are cut into pools of `POOL` batches, and each pool is sorted by the images' longest caption
    before it becomes batches. These are shuffled again. The order follows from seed and epoch.

    Yields lists of (image, view) for `CaptionDataset`, the view by chance.

    Args:
        lengths: (I, K) captions' lengths.
        batch_size: images, at most; batches differ by one image at most, `total` an epoch.
        views: number of views to choose from.
        rank, world_size: take every `world_size`-th item of each batch, from item `rank` on.

    Raises:
        UserError: a batch has fewer images than there are processes.
    """

    POOL = 16

    def __init__(self, lengths, batch_size, views=1, seed=0, rank=0, world_size=1):
        self.longest = lengths.amax(dim=1).numpy()
        self.batch_size = batch_size
        self.total = -(-len(lengths) // batch_size)
        if len(lengths) // self.total < world_size:
            raise UserError(
                f"{len(lengths)} images in batches of {batch_size} at most leave some of "
                f"{world_size} processes without an image: use a larger --batch_size"
            )
        self.views, self.seed, self.epoch, self.start = views, seed, 0, 0
        self.share = slice(rank, None, world_size)

    def set_epoch(self, epoch, start=0):
        """The epoch whose order comes next, from its batch `start` on."""
        self.epoch, self.start = epoch, start

    def __len__(self):
        return self.total - self.start

    def __iter__(self):
        rng = np.random.default_rng([self.seed % 2**32, self.epoch])
        order = rng.permutation(len(self.longest))
        views = rng.integers(self.views, size=len(order))
        batches = np.array_split(order, self.total)
        pools = np.repeat(np.arange(self.total) // self.POOL, [len(batch) for batch in batches])
        order = order[np.lexsort((self.longest[order], pools))]
        batches = np.array_split(order, self.total)
        for i in rng.permutation(self.total)[self.start :]:
            images = batches[i][self.share]
            yield list(zip(images.tolist(), views[images].tolist(), strict=True))


def open_hdf5(path, name):
    """The data set `name` of an HDF5 file, opened for reading. Raises UserError if it cannot be."""
    if not Path(path).exists():
        raise UserError(f"{path} is missing: run create_input_files.py")
    if not Path(path).is_file():  # opening a pipe would wait for ever
        raise UserError(f"{path} is no file: run create_input_files.py")
    try:
        data = h5py.File(path, "r")[name]
        if not isinstance(data, h5py.Dataset) or data.is_virtual or data.external:
            raise TypeError(f"{name} is no data set of its own")
        if math.prod(data.chunks or ()) * data.dtype.itemsize > MAX_CHUNK:
            raise ValueError("its chunks are too large")
    except Exception as error:  # on damaged files h5py raises nearly anything
        raise UserError(f"{path} is damaged ({error}): make it again") from error
    return data


MAX_CHUNK = 2**28  # bytes, all of which reading one item may take


def open_images(path):
    """The images of an input file, uint8 (I, 3, S, S), opened. Raises UserError."""
    images = open_hdf5(path, "images")
    shape = images.shape
    if images.dtype != "uint8" or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise UserError(f"{path} holds no square images: run create_input_files.py again")
    if not 0 < shape[2] <= utils.MAX_IMAGE_SIZE:
        raise UserError(f"{path} holds images of {shape[2]} × {shape[3]} pixels: make it again")
    return images


def _are_features(path, count):
    """Whether a file holds the features of `count` images."""
    try:
        features = open_hdf5(path, "features")
    except UserError:
        return False
    shape = features.shape
    return (
        features.dtype == "float16"
        and len(shape) == 5
        and shape[0] == count
        and shape[2] == shape[3]
        and min(shape) > 0
    )


def _read(data, index):
    """Values of an HDF5 data set. Raises UserError where they are damaged."""
    try:
        return data[index]
    except Exception as error:  # as in open_hdf5
        raise UserError(
            f"{data.file.filename} is damaged at {index} ({error}): make it again"
        ) from error


def _read_numbers(path, dimensions):
    """The whole numbers of a JSON file, int64. Raises UserError if it holds something else."""
    try:
        numbers = torch.tensor(utils.read_json(path))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path} does not hold lists of numbers of equal length") from error
    if numbers.dtype != torch.int64 or numbers.dim() != dimensions:
        raise UserError(f"{path} does not hold whole numbers in {dimensions} dimensions")
    return numbers


def read_references(path):
    """The images' file names, ids and human captions. Raises UserError if they are unusable."""
    references = utils.read_json(path)
    if not isinstance(references, list) or not all(map(_is_reference, references)):
        raise UserError(f"{path} is no list of file names, ids and captions")
    return references


def _is_reference(value):
    return (
        isinstance(value, dict)
        and isinstance(value.get("filename"), str)
        and isinstance(value.get("id"), int | str)
        and isinstance(value.get("captions"), list)
        and value["captions"]
        and all(isinstance(caption, str) for caption in value["captions"])
        and _are_boxes(value.get("boxes", {}))
    )


def _are_boxes(value):
    return isinstance(value, dict) and all(
        isinstance(box, list) and len(box) == 4 and all(isinstance(x, int | float) for x in box)
        for box in value.values()
    )


# ------------------------------------------------------------------------------------ views


def make_view(image, view, seed=()):
    """View 0 is the image (3, S, S) itself, 1 its mirror image, others are crops of it.

    A crop keeps half of the area or more and is squeezed back to S × S; every second is mirrored.
    Which part it keeps follows from the view and the seed, a tuple of ints.
    """
    if view == 0:
        return image
    if view > 1:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.default_rng((*seed, view)).integers(2**32)))
            crop = v2.RandomResizedCrop(image.shape[-2:], scale=(0.5, 1.0), antialias=True)
            image = crop(image)
    return image.flip(-1) if view % 2 else image


# ------------------------------------------------------------------------------------ features


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
    images = utils.input_path(data_folder, base, "IMAGES", split)
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
        f"caching {split} features, {count} images × {views} views: {size / 1e9:.2f} GB in {path}"
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
        with utils.os_errors_as_user_errors(partial):
            _allocate(partial, (count, views, *grid))
    with utils.os_errors_as_user_errors(partial):
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
    except Exception:  # as in open_hdf5
        return False


def _allocate(path, shape):
    """A new file of features whose structure is whole from the start, unless there is one.

    Writing the values later changes nothing but them, so that a process that is killed meanwhile
    leaves a readable file.
    """
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    temporary = utils.temporary_path(path)
    try:
        utils.reserve(temporary, 2 * math.prod(shape))  # HDF5 complains of a full disk at length
        with utils.new_hdf5(temporary) as file:
            file.create_dataset("features", shape, "float16", dcpl=early)
            file["done"] = 0  # images
        utils.reserve(temporary, temporary.stat().st_size)  # so that filling it cannot fail
        utils.flush(temporary)
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
        bar = utils.progress(total=len(source), initial=done, desc="features", unit="image")
        for start in range(done, len(source), batch_size):
            batch = torch.from_numpy(_read(source, slice(start, start + batch_size)))
            for view in range(features.shape[1]):
                seen = [make_view(image, view, (seed, start + i)) for i, image in enumerate(batch)]
                out = encoder.features(torch.stack(seen).to(device))
                features[start : start + len(batch), view] = out.half().cpu().numpy()
            file.flush()
            utils.flush(path)
            file["done"][()] = start + len(batch)
            bar.update(len(batch))
        bar.close()
    utils.flush(path)


def _features_key(encoder, images, views, seed, amp):
    digest = hashlib.sha256()
    for tensor in encoder.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    file = images.stat()
    rest = [encoder.name, file.st_size, file.st_mtime_ns, views, amp, seed if views > 2 else None]
    digest.update(json.dumps(rest).encode())
    return digest.hexdigest()[:12]
