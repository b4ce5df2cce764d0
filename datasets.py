"""Prepared data: images (or their cached features) together with all their captions."""

import hashlib
import json
import shutil
from pathlib import Path

import h5py
import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2
from tqdm import tqdm

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
    """Item i is image i with all its captions: (source, captions, lengths).

    source: uint8 (3, S, S), the image; or float16 (g, g, D), its features, where `features` names
        their file. With several views, one of them by chance.
    captions: int64 (K, T), `<start>` to `<end>`, padded.
    lengths: int64 (K,), `<start>` and `<end>` counted.

    Args:
        data_folder, base, split: which input files; split is TRAIN, VAL or TEST.
        features: path from `cache_features`, or None for images.
        views: number of views of an image to choose from: see `make_view`.

    Raises:
        UserError: a file is missing, damaged, or does not belong to the others.
    """

    def __init__(self, data_folder, base, split, features=None, views=1):
        self.base, self.views, self.from_features = base, views, features is not None
        images = open_hdf5(utils.input_path(data_folder, base, "IMAGES", split), "images").shape
        self.image_size = images[-1]
        captions = _read_numbers(utils.input_path(data_folder, base, "CAPTIONS", split), 2)
        lengths = _read_numbers(utils.input_path(data_folder, base, "CAPLENS", split), 1)
        path = utils.input_path(data_folder, base, "REFERENCES", split)
        self.references = _read_references(path)
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
        self.path = features or utils.input_path(data_folder, base, "IMAGES", split)
        self._data = None

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, i):
        if self._data is None:  # here, not in __init__: each worker process opens its own
            self._data = open_hdf5(self.path, "features" if self.from_features else "images")
        view = int(torch.randint(self.views, ())) if self.views > 1 else 0
        if self.from_features:
            source = torch.from_numpy(self._data[i, view])
        else:
            source = make_view(torch.from_numpy(self._data[i]), view)
        return source, self.captions[i], self.lengths[i]


def open_hdf5(path, name):
    """The data set `name` of an HDF5 file, opened for reading. Raises UserError if it cannot be."""
    if not Path(path).exists():
        raise UserError(f"{path} is missing: run create_input_files.py")
    try:
        return h5py.File(path, "r")[name]
    except (OSError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): make it again") from error


def _read_numbers(path, dimensions):
    """The whole numbers of a JSON file, int64. Raises UserError if it holds something else."""
    try:
        numbers = torch.tensor(utils.read_json(path))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} does not hold lists of numbers of equal length") from error
    if numbers.dtype != torch.int64 or numbers.dim() != dimensions:
        raise UserError(f"{path} does not hold whole numbers in {dimensions} dimensions")
    return numbers


def _read_references(path):
    references = utils.read_json(path)
    if not isinstance(references, list) or not all(
        isinstance(r, dict) and {"filename", "id", "captions"} <= r.keys() for r in references
    ):
        raise UserError(f"{path} is no list of file names, ids and captions")
    return references


# ------------------------------------------------------------------------------------ views


def make_view(image, view):
    """View 0 is the image (3, S, S) itself, 1 its mirror image, others crops by chance.

    A crop keeps half of the area or more and is squeezed back to S × S; every second is mirrored.
    """
    if view == 0:
        return image
    if view > 1:
        crop = v2.RandomResizedCrop(image.shape[-2:], scale=(0.5, 1.0), antialias=True)
        image = crop(image)
    return image.flip(-1) if view % 2 else image


# ------------------------------------------------------------------------------------ features


def cache_features(encoder, data_folder, base, split, views=1, seed=0, amp=False, batch_size=32):
    """Runs a frozen encoder over a split once and keeps its features in an HDF5 file.

    The file's name carries a hash of the encoder's name and weights, of the images' file and of
    the views, so that a changed encoder or data set never meets old features.

    Args:
        encoder: on the device it is to run on.
        views: how many views of each image to keep.
        amp: compute in bfloat16.

    Returns:
        the path: data set `features`, float16 (I, views, g, g, D); None where the disk has no
        room for it.
    """
    images = utils.input_path(data_folder, base, "IMAGES", split)
    count, *_, side = open_hdf5(images, "images").shape
    key = _features_key(encoder, images, views, seed, amp)
    path = Path(data_folder) / f"{split}_FEATURES_{base}_{key}.hdf5"
    if path.exists():
        return path
    device = encoder.mean.device
    with torch.inference_mode():
        shape = encoder.features(torch.zeros(1, 3, side, side, device=device)).shape[1:]
    size = 2 * count * views * shape.numel()
    free = shutil.disk_usage(data_folder).free
    print(
        f"caching {split} features, {count} images × {views} views: {size / 1e9:.2f} GB in {path}"
    )
    if free < 1.1 * size:
        print(f"not cached, as only {free / 1e9:.2f} GB are free: the encoder runs in every epoch")
        return None
    with utils.atomic_write(path) as temporary, utils.new_hdf5(temporary) as out:
        features = out.create_dataset(
            "features", (count, views, *shape), "float16", chunks=(1, 1, *shape)
        )
        _fill(features, encoder, images, views, seed, amp, batch_size, split)
    return path


@torch.inference_mode()
def _fill(features, encoder, images, views, seed, amp, batch_size, split):
    device = encoder.mean.device
    source = open_hdf5(images, "images")
    with (
        torch.random.fork_rng(devices=[]),
        torch.autocast(device.type, torch.bfloat16, enabled=amp),
        tqdm(
            total=len(features) * views, desc=f"features {split}", unit="image", disable=None
        ) as bar,
    ):
        torch.manual_seed(seed)  # of the crops
        for start in range(0, len(features), batch_size):
            batch = torch.from_numpy(source[start : start + batch_size])
            for view in range(views):
                seen = torch.stack([make_view(image, view) for image in batch])
                out = encoder.features(seen.to(device))
                features[start : start + len(batch), view] = out.half().cpu().numpy()
                bar.update(len(batch))


def _features_key(encoder, images, views, seed, amp):
    digest = hashlib.sha256()
    for tensor in encoder.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    file = images.stat()
    rest = [encoder.name, file.st_size, file.st_mtime_ns, views, amp, seed if views > 2 else None]
    digest.update(json.dumps(rest).encode())
    return digest.hexdigest()[:12]
