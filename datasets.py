"""Prepared data: images (or their cached features) together with all their captions."""

import hashlib
import sys
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from groundwork import distributed
from groundwork.errors import UserError
from groundwork.files import check_folder, check_listable, read_json
from groundwork.images import unsqueeze
from groundwork.wording import counted, some
from input_files import input_path, input_paths
from mirroring import mirrored_captions, mirrored_words
from storage import StoredFeatures, StoredImages
from utils import are_boxes, is_size, read_split
from views import VIEWS, is_mirrored, make_view
from word_maps import check_word_map
from word_rules import rule_of

FRESH = 2**31  # views to draw from where each epoch has its own


def find_data(data_folder, base=None):
    """Base name of the prepared data set in a folder, None where there is none.

    Raises:
        UserError: several are there and `base` does not say which, or `base` is not among them.
    """
    check_listable(data_folder)
    if base is not None:
        check_folder(data_folder, "--data_folder")
    bases = sorted(
        path.name.removeprefix("WORDMAP_").removesuffix(".json")
        for path in Path(data_folder).glob("WORDMAP_*.json")
    )
    if base is not None and base not in bases:
        raise UserError(f"no data set {base!r} in {data_folder}: known are {some(bases) or 'none'}")
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
        features: paths from `cache_features`, or None for images.
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
        self.base, self.seed, self.changes, self.features = base, seed, changes, None
        self.images = open_images(data_folder, base, split)
        self.image_size, self.fit = self.images.side, self.images.fit
        captions = _read_numbers(input_paths(data_folder, base, "CAPTIONS", split), 2)
        lengths = _read_numbers(input_paths(data_folder, base, "CAPLENS", split), 1)
        word_map, count = read_word_map(data_folder, base), len(self.images)
        if (
            not count
            or len(captions) < count
            or len(captions) % count
            or len(captions) != len(lengths)
            or captions.min() < 0
            or captions.max() >= len(word_map)
            or lengths.min() < 2
            or lengths.max() > captions.shape[1]
        ):
            raise UserError(
                f"the {split} files of {base} in {data_folder} do not belong together "
                f"({counted(count, 'image')}, {counted(len(captions), 'caption')}, "
                f"{counted(len(lengths), 'length')}): run "
                "create_input_files.py again"
            )
        self.captions = captions.view(count, -1, captions.shape[1])
        self.lengths = lengths.view(count, -1)
        self.mirrored, self.sided, self.rule = mirrored_words(word_map), {}, rule_of(word_map)
        self._read_references = partial(  # which must not hold this object: its files close with it
            read_references_of,
            data_folder,
            base,
            split,
            word_map=word_map,
            karpathy_json=karpathy_json,
        )
        if not self.has_shards:  # else they are many, and most processes need none of them
            self.references  # noqa: B018 -- so that what is wrong with them is known
        if not self.rule.whole:
            self.sided = mirrored_captions(self.captions, self.lengths, word_map, self.rule)
            longer = max(map(len, self.sided.values()), default=0) - self.captions.shape[2]
            self.captions = torch.nn.functional.pad(self.captions, (0, max(longer, 0)))
        if features is not None:
            self.use_features(features)

    @cached_property
    def references(self):
        """Of each image its entry of the REFERENCES. Raises UserError."""
        return self._read_references(self)

    @property
    def has_shards(self):
        return len(self.images.paths) > 1

    def use_features(self, paths):
        """Takes features in the place of images, from the files of `cache_features`."""
        self.features = StoredFeatures(paths)
        if len(self.features) != len(self):
            raise UserError(f"{paths[0]} is damaged: delete it, and it is made again")

    def owners(self, world_size):
        """The process that takes each image, int64 (I,): of every `world_size`-th shard one does;
        None where there are no shards. Raises UserError where there are fewer than processes."""
        if not self.has_shards:
            return None
        shards = len(self.images.paths)
        if shards < world_size:
            raise UserError(
                f"{counted(shards, 'shard')} of {self.base} cannot be shared by {world_size} "
                "processes: start fewer, or make more by create_input_files.py --shards"
            )
        return np.repeat(np.arange(shards) % world_size, np.diff(self.images.starts))

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, item):
        i, view = item if isinstance(item, tuple) else (item, 0)
        if self.features is not None:
            source = torch.from_numpy(self.features[i, view])
        else:
            image = torch.from_numpy(self.images[i])
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
        owners: of images in shards, the process that has each, int64 (I,): a process's batches are
            of its own images alone, as many as the others', and those of all processes together as
            long as those without shards. One process has them all, and so the same batches.

    Raises:
        UserError: a batch has fewer images than there are processes.
    """

    POOL = 16

    def __init__(self, lengths, batch_size, views=1, seed=0, rank=0, world_size=1, owners=None):
        self.longest = lengths.amax(dim=1).numpy()
        self.batch_size = batch_size
        self.total = -(-len(lengths) // batch_size)
        if owners is None:
            fewest = len(lengths) // world_size
        else:
            fewest = np.bincount(owners, minlength=world_size).min()
        if (
            fewest < self.total
        ):  # found by every process, as one alone would leave the others waiting
            raise UserError(
                f"{counted(len(lengths), 'image')} in batches of {batch_size} at most leave some "
                f"of {world_size} processes without one: use a larger --batch_size"
            )
        self.views, self.seed, self.epoch, self.start = views, seed, 0, 0
        self.own = None if owners is None else owners == rank
        self.share = slice(rank, None, world_size) if owners is None else slice(None)

    def set_epoch(self, epoch, start=0):
        """The epoch whose order comes next, from its batch `start` on."""
        self.epoch, self.start = epoch, start

    def __len__(self):
        return self.total - self.start

    def __iter__(self):
        rng = np.random.default_rng([self.seed % 2**32, self.epoch])
        order = rng.permutation(len(self.longest))
        views = rng.integers(self.views, size=len(order))
        if self.own is not None:
            order = order[self.own[order]]
        batches = np.array_split(order, self.total)
        pools = np.repeat(np.arange(self.total) // self.POOL, [len(batch) for batch in batches])
        order = order[np.lexsort((self.longest[order], pools))]
        batches = np.array_split(order, self.total)
        for i in rng.permutation(self.total)[self.start :]:
            images = batches[i][self.share]
            yield list(zip(images.tolist(), views[images].tolist(), strict=True))


def open_images(data_folder, base, split):
    """The `StoredImages` of a split. Raises UserError."""
    return StoredImages(input_paths(data_folder, base, "IMAGES", split))


def _read_numbers(paths, dimensions):
    """The whole numbers of JSON files, one behind the other, int64. Raises UserError if one holds
    something else."""
    found = []
    for path in paths:
        try:
            numbers = torch.tensor(read_json(path))
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise UserError(f"{path} does not hold lists of numbers of equal length") from error
        if numbers.dtype != torch.int64 or numbers.dim() != dimensions:
            raise UserError(f"{path} does not hold whole numbers in {dimensions} dimensions")
        if found and numbers.shape[1:] != found[0].shape[1:]:
            raise UserError(f"{path} has longer or shorter lists than {paths[0]}: make them again")
        found.append(numbers)
    return torch.cat(found)


def read_references_of(data_folder, base, split, data, word_map, karpathy_json=None):
    """Of each image of a `CaptionDataset` its entry of the REFERENCES. Raises UserError."""
    [path, *others] = input_paths(data_folder, base, "REFERENCES", split)
    if path.exists():
        references = [entry for own in (path, *others) for entry in read_references(own)]
    else:
        references = references_without_file(data, path, split, word_map, karpathy_json)
    return of_images(references, data.images, path)


def of_images(references, images, path):
    """The references of images, each with the images' fit unless they are squeezed. Raises
    UserError unless there is one for each image."""
    if len(references) != len(images):
        raise UserError(
            f"{path} has references of {counted(len(references), 'image')}, not of "
            f"{len(images)}: run create_input_files.py again"
        )
    if images.fit == "squeeze":
        return references
    return [reference | {"fit": images.fit} for reference in references]


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
    """Width and height, pixels, of what a square shows of its photograph, by its entry of the
    REFERENCES: of all of it, where it is squeezed; (1, 1) of what has its proportions, and where
    it does not tell, as in older files."""
    if reference.get("fit", "squeeze") != "squeeze":
        return 1, 1
    return reference.get("width", 1), reference.get("height", 1)


def as_photographed(square, reference):
    """An image of the input files, uint8 (3, S, S), as an RGB PIL.Image in the proportions of its
    photograph, by its entry of the REFERENCES: what a square shows of it."""
    return unsqueeze(square, *proportions(reference))


def describe_data(data_folder, base):
    """A data set's name and a hash of its captions, references, words, and of 64 images of each
    split: where it lies does not count."""
    digest = hashlib.sha256()
    for split in (None, "TRAIN", "VAL", "TEST"):
        for kind in ("WORDMAP",) if split is None else ("CAPTIONS", "CAPLENS", "REFERENCES"):
            for path in (
                [input_path(data_folder, base, kind)]
                if split is None
                else input_paths(data_folder, base, kind, split)
            ):
                if path.exists():
                    digest.update(path.read_bytes())
        if split and input_paths(data_folder, base, "IMAGES", split)[0].exists():
            images = open_images(data_folder, base, split)
            digest.update(str(images.shape).encode())
            for i in np.linspace(0, len(images) - 1, min(64, len(images)), dtype=int):
                digest.update(images[int(i)].tobytes())
    return f"{base}, {digest.hexdigest()[:16]}"
