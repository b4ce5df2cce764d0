"""Prepared data: images (or their cached features) together with all their captions."""

import hashlib
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2

from groundwork import distributed
from groundwork.errors import UserError
from groundwork.files import check_listable, read_json
from groundwork.hdf5 import open_hdf5, read_item
from groundwork.images import unsqueeze
from groundwork.options import MAX_IMAGE_SIZE
from groundwork.wording import counted, some
from mirroring import mirrored_captions, mirrored_words
from utils import are_boxes, input_path, is_size, read_split
from word_maps import check_word_map
from word_rules import rule_of

VIEWS = ("crop", "mirror")  # what the numbered views of an image differ by
FRESH = 2**31  # views to draw from where each epoch has its own


def find_data(data_folder, base=None):
    """Base name of the prepared data set in a folder, None where there is none.

    Raises:
        UserError: several are there and `base` does not say which, or `base` is not among them.
    """
    check_listable(data_folder)
    bases = sorted(
        path.name.removeprefix("WORDMAP_").removesuffix(".json")
        for path in Path(data_folder).glob("WORDMAP_*.json")
    )
    if base is not None and base not in bases:
        raise UserError(f"no data set {base!r} in {data_folder}: there is {some(bases) or 'none'}")
    if base is None and len(bases) > 1:
        raise UserError(
            f"{data_folder} holds {len(bases)} data sets, {some(bases)}: "
            "choose one with --data_name"
        )
    return base or (bases[0] if bases else None)


def is_demo(base):
    """Whether a data set is drawn, by its base name."""
    return base.startswith("demo_")


def read_word_map(data_folder, base):
    """Word -> index of a prepared data set. Raises UserError if the file is unusable."""
    path = input_path(data_folder, base, "WORDMAP")
    word_map = read_json(path)
    check_word_map(word_map, path)
    return word_map


class CaptionDataset(Dataset):
    """Item i, or (i, view), is image i with all its captions: (source, captions, lengths).

    source: uint8 (3, S, S), a view of the image, by itself its first: see `make_view`; or float16
        (g, g, D), the view's features, where `features` names their file.
    captions: int64 (K, T), `<start>` to `<end>`, padded; those of a view that is mirrored have left
        and right exchanged.
    lengths: int64 (K,), `<start>` and `<end>` counted.

    Args:
        data_folder, base, split: which input files; split is TRAIN, VAL or TEST.
        features: path from `cache_features`, or None for images.
        seed: of the views.
        karpathy_json: path of the data set's JSON, for the captions as written where there is no
            REFERENCES file.
        changes: as `make_view` takes them.

    Raises:
        UserError: a file is missing, damaged, or does not belong to the others.
    """

    def __init__(
        self,
        data_folder,
        base,
        split,
        features=None,
        seed=0,
        karpathy_json=None,
        changes=VIEWS,
    ):
        self.base, self.seed, self.changes, self.from_features = base, seed, changes, False
        self.path = input_path(data_folder, base, "IMAGES", split)
        images = open_images(self.path).shape
        self.image_size = images[-1]
        captions = _read_numbers(input_path(data_folder, base, "CAPTIONS", split), 2)
        lengths = _read_numbers(input_path(data_folder, base, "CAPLENS", split), 1)
        word_map = read_word_map(data_folder, base)
        if (
            not images[0]
            or len(captions) < images[0]
            or len(captions) % images[0]
            or len(captions) != len(lengths)
            or captions.min() < 0
            or captions.max() >= len(word_map)
            or lengths.min() < 2
            or lengths.max() > captions.shape[1]
        ):
            raise UserError(
                f"the {split} files of {base} in {data_folder} do not belong together "
                f"({counted(images[0], 'image')}, {counted(len(captions), 'caption')}, "
                f"{counted(len(lengths), 'length')}): run "
                "create_input_files.py again"
            )
        self.captions = captions.view(images[0], -1, captions.shape[1])
        self.lengths = lengths.view(images[0], -1)
        self.mirrored, self.sided = mirrored_words(word_map), {}
        path = input_path(data_folder, base, "REFERENCES", split)
        if path.exists():
            self.references = read_references(path)
        else:
            self.references = references_without_file(self, path, split, word_map, karpathy_json)
        if len(self.references) != images[0]:
            raise UserError(
                f"{path} has references of {counted(len(self.references), 'image')}, not of "
                f"{images[0]}: run create_input_files.py again"
            )
        self.rule, self._data = rule_of(word_map), None
        if not self.rule.whole:
            self.sided = mirrored_captions(self.captions, self.lengths, word_map, self.rule)
            longer = max(map(len, self.sided.values()), default=0) - self.captions.shape[2]
            self.captions = torch.nn.functional.pad(self.captions, (0, max(longer, 0)))
        if features is not None:
            self.use_features(features)

    def use_features(self, path):
        """Takes features in the place of images, from a file of `cache_features`."""
        if not _are_features(path, len(self)):
            raise UserError(f"{path} is damaged: delete it, and it is made again")
        self.path, self.from_features, self._data = path, True, None

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, item):
        i, view = item if isinstance(item, tuple) else (item, 0)
        if self._data is None:  # here, not in __init__: each worker process opens its own
            self._data = open_hdf5(self.path, "features" if self.from_features else "images")
        if self.from_features:
            source = torch.from_numpy(read_item(self._data, (i, view)))
        else:
            image = torch.from_numpy(read_item(self._data, i))
            source = make_view(image, view, (self.seed, i), self.changes)
        captions, lengths = self.captions[i], self.lengths[i]
        if is_mirrored(view, self.changes):
            captions, lengths = self._mirror(i)
        return source, captions, lengths

    def _mirror(self, i):
        """Captions and lengths of the mirror image of image i."""
        if self.rule.whole:
            return self.mirrored[self.captions[i]], self.lengths[i]
        captions, lengths = self.captions[i].clone(), self.lengths[i].clone()
        for k in range(len(captions)):
            if own := self.sided.get((i, k)):
                captions[k, : len(own)], captions[k, len(own) :] = torch.tensor(own), 0
                lengths[k] = len(own)
        return captions, lengths


def count_targets(data, words):
    """How often each of so many words is to be predicted in a split, `<end>` counted, `<start>`
    not: int64 (words,).

    Args:
        data: a `CaptionDataset`.
    """
    places = torch.arange(1, data.captions.shape[2])
    return data.captions[..., 1:][places < data.lengths.unsqueeze(2)].bincount(minlength=words)


class LengthSampler(Sampler):
    """Batches of images whose captions are about equally long; every image once an epoch.

    A batch takes as many steps as its longest caption has words, so an epoch's images, shuffled,
    are cut into pools of `POOL` batches, and each pool is sorted by the images' longest caption
    before it becomes batches. These are shuffled again. The order follows from seed and epoch.

    Yields lists of (image, view) for `CaptionDataset`, the view drawn at random.

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
                f"{counted(len(lengths), 'image')} in batches of {batch_size} at most leave some "
                f"of {world_size} processes without one: use a larger --batch_size"
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


def open_images(path):
    """The images of an input file, uint8 (I, 3, S, S), opened. Raises UserError."""
    images = open_hdf5(path, "images")
    shape = images.shape
    if images.dtype != "uint8" or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise UserError(f"{path} holds no square images: run create_input_files.py again")
    if not 0 < shape[2] <= MAX_IMAGE_SIZE:
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


def _read_numbers(path, dimensions):
    """The whole numbers of a JSON file, int64. Raises UserError if it holds something else."""
    try:
        numbers = torch.tensor(read_json(path))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path} does not hold lists of numbers of equal length") from error
    if numbers.dtype != torch.int64 or numbers.dim() != dimensions:
        raise UserError(f"{path} does not hold whole numbers in {dimensions} dimensions")
    return numbers


def read_references(path, may_lack_captions=False):
    """The images' file names, ids and human captions, of none of them where that is allowed, and
    their widths and heights where they are known. Raises UserError if they are unusable."""
    references = read_json(path)
    if not isinstance(references, list) or not all(map(_is_reference, references)):
        raise UserError(f"{path} is no list of file names, ids, captions and sizes")
    without = sum(not reference["captions"] for reference in references)
    if without and not (may_lack_captions and without == len(references)):
        raise UserError(
            f"{path} has no captions of {counted(without, 'image')} of {len(references)}"
        )
    return references


def references_without_file(data, path, split, word_map, karpathy_json=None):
    """References of a split whose input files were made without them.

    They come from the data set's JSON, or else are the encoded captions, word by word.

    Args:
        data: a `CaptionDataset`, of which it takes captions and lengths.
        path: of the file that is missing.

    Raises:
        UserError: the JSON is of other images.
    """
    words, rule = {index: word for word, index in word_map.items()}, rule_of(word_map)
    encoded = [
        [[words[i] for i in caption[1 : n - 1]] for caption, n in zip(rows, ends, strict=True)]
        for rows, ends in zip(data.captions.tolist(), data.lengths.tolist(), strict=True)
    ]
    if karpathy_json is None:
        _say_once(
            f"there is no {path}: scores compare with the encoded captions instead, of which rare "
            "words are <unk> and some may be left out; --karpathy_json takes them as written"
        )
        return [
            {
                "filename": f"{split} {i}",
                "id": i,
                "captions": list(dict.fromkeys(map(rule.join, captions))) or [""],
            }
            for i, captions in enumerate(encoded)
        ]
    images = read_split(karpathy_json, split, data.captions.shape[2] - 2, rule)
    if len(images) != len(encoded):
        raise UserError(
            f"{karpathy_json} is of other images than {path.parent}: its {split} split has "
            f"{len(images)} with captions, not {len(encoded)}"
        )
    for (reference, own), captions in zip(images, encoded, strict=True):
        known = [[w if w in word_map else "<unk>" for w in caption] for caption in own]
        if captions[0] not in known:
            raise UserError(
                f"{karpathy_json} is of other images than {path.parent}: its "
                f"{reference['filename']} has no caption {rule.join(captions[0])!r}"
            )
    return [reference for reference, _ in images]


@cache
def _say_once(line):
    if distributed.is_main:
        print(line, file=sys.stderr)


def _is_reference(value):
    return (
        isinstance(value, dict)
        and isinstance(value.get("filename"), str)
        and isinstance(value.get("id"), int | str)
        and isinstance(value.get("captions"), list)
        and all(isinstance(caption, str) for caption in value["captions"])
        and are_boxes(value.get("boxes", {}))
        and (
            not value.keys() & {"width", "height"}  # of older files
            or is_size(value.get("width"), value.get("height"))
        )
    )


def proportions(reference):
    """Width and height of a photograph, pixels, by its entry of the REFERENCES; (1, 1) where it
    does not tell, as in older files."""
    return reference.get("width", 1), reference.get("height", 1)


def as_photographed(square, reference):
    """An image of the input files, uint8 (3, S, S), as an RGB PIL.Image in the proportions of its
    photograph, by its entry of the REFERENCES."""
    return unsqueeze(square, *proportions(reference))


def is_mirrored(view, changes=VIEWS):
    """Whether a view of `make_view` is a mirror image: every second is."""
    return bool(view % 2) and "mirror" in changes


def make_view(image, view, seed=(), changes=VIEWS):
    """View 0 is the image (3, S, S) itself, every second a mirror image, from 2 on they are changed
    otherwise, too.

    A crop keeps half of the area or more and is squeezed back to S × S. Colours are changed mildly,
    in brightness, contrast and saturation, but not in hue, which captions name. How, follows from
    the view and the seed, a tuple of ints.

    Args:
        changes: of "crop", "mirror" and "colour", those that there are.
    """
    if view > 1:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.default_rng((*seed, view)).integers(2**32)))
            if "crop" in changes:
                size = image.shape[-2:]
                image = v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True)(image)
            if "colour" in changes:
                image = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)(image)
    return image.flip(-1) if is_mirrored(view, changes) else image


def describe_data(data_folder, base):
    """A data set's name and a hash of its captions, references, words, and of 64 images of each
    split: where it lies does not count."""
    digest = hashlib.sha256()
    for split in (None, "TRAIN", "VAL", "TEST"):
        for kind in ("WORDMAP",) if split is None else ("CAPTIONS", "CAPLENS", "REFERENCES"):
            path = input_path(data_folder, base, kind, split)
            if path.exists():
                digest.update(path.read_bytes())
        path = split and input_path(data_folder, base, "IMAGES", split)
        if path and path.exists():
            images = open_images(path)
            digest.update(str(images.shape).encode())
            for i in np.linspace(0, len(images) - 1, min(64, len(images)), dtype=int):
                digest.update(images[i].tobytes())
    return f"{base}, {digest.hexdigest()[:16]}"
