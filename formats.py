"""Formats of data sets: a registry of their readers, which one a file has, and what all have in
common: splits, ids, a subset.

`read` gives images with their captions, whatever the format; `utils.create_input_files` makes the
files that training reads of them.
"""

import gzip
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import formats_archives as archives
import formats_json as documents
import formats_parquet as parquet
import formats_tables as tables
from captioned import SPLITS, Reading, splits_in_names
from gathered import Gathered
from groundwork.errors import UserError
from groundwork.files import check_folder, check_listable, check_readable
from groundwork.wording import counted, some

HEAD = 2**16  # bytes that a format is told by


class Format(NamedTuple):
    """A format of data sets."""

    fits: Callable[
        [Path, str], bool
    ]  # whether a path, and the first of what it holds, look like it
    read: Callable[[list[Path], Reading, Gathered], None]
    holds_images: bool = False  # or names their files, in a folder


FORMATS = {  # looked at in this order
    "webdataset": Format(archives.is_webdataset, archives.read_webdataset, True),
    "huggingface": Format(parquet.is_huggingface, parquet.read_huggingface, True),
    "folder": Format(archives.is_folder, archives.read_folder, True),
    "jsonl": Format(tables.is_jsonl, tables.read_jsonl),
    "coco": Format(documents.is_coco, documents.read_coco),
    "karpathy": Format(documents.is_karpathy, documents.read_karpathy),
    "flickr30k": Format(tables.is_flickr30k, tables.read_flickr),
    "flickr8k": Format(tables.is_flickr8k, tables.read_flickr),
    "conceptual": Format(tables.is_conceptual, tables.read_conceptual),
    "tsv": Format(tables.is_tsv, tables.read_csv),
    "csv": Format(tables.is_csv, tables.read_csv),
}

SIZES = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class Options:
    """How a data set is read."""

    format: str | None = None  # of `FORMATS`; None: found out by looking
    image_column: str = "image"
    caption_column: str = "caption"
    split_column: str | None = None  # None: "split", where there is one
    split_sizes: tuple[float, float, float] | None = None  # where the data have no splits; `SIZES`
    max_images: int | None = None


@dataclass
class DataSet:
    """What `read` gives."""

    images: Gathered  # each with a split and an id
    source: str  # its files, for messages
    left_out: dict[str, int]
    notes: list[str]  # lines on how it was read, for people


def read(files, folder=None, asked=None, seed=0):
    """A data set's images in order, each with captions, split and id.

    Args:
        files: paths of its captions, files or folders, or a single path.
        folder: of the images; None: where the captions are, of a format that holds them.
        asked: `Options`.
        seed: of splits and subset.

    Raises:
        UserError: the format is unknown or cannot be read.
    """
    asked, files = asked or Options(), _paths(files)
    check(asked)
    name = asked.format or find_format(files)
    if folder is None and not FORMATS[name].holds_images:
        raise UserError(f"{some(files)} names images, it does not hold them: give --image_folder")
    if folder is not None:
        check_folder(folder, "--image_folder")
    columns = asked.image_column, asked.caption_column, asked.split_column
    reading = Reading(Path(folder or files[0]), *columns)
    images = _read(name, files, reading)
    notes = [f"format: {name}" + ("" if asked.format else ", by its look (see --format)")]
    notes += reading.notes
    give_ids(images, some(files))
    told = images.splits().keys() - {None}
    if not told:
        reading.left_out["images without captions"] += images.keep()
    elif asked.split_sizes is not None:
        raise UserError(f"{some(files)} has splits of its own: leave out --split_sizes")
    if not images.have_captions():
        raise UserError(f"{some(files)} has no image with captions")
    rng = random.Random(seed)
    if asked.max_images is not None:
        choose(images, asked.max_images, rng)
    if not told:
        notes.append(share_out(images, asked.split_sizes or SIZES, rng, seed))
    notes += _in_several(images)
    return DataSet(images, some(files), reading.left_out, notes)


def check(asked):
    """Raises UserError for options that cannot be."""
    if asked.format is not None and asked.format not in FORMATS:
        raise UserError(f"--format {asked.format}: known are {', '.join(FORMATS)}")
    if asked.split_sizes is not None and not all(asked.split_sizes[:2]):
        raise UserError("--split_sizes: training and validation need more than 0")


def load(files, asked=None):
    """The images of a data set, `Gathered`, with captions and ids, to be compared with and not
    opened; their splits are None where the data tell none. Raises UserError."""
    asked, files = asked or Options(), _paths(files)
    columns = asked.image_column, asked.caption_column, asked.split_column
    images = _read(asked.format or find_format(files), files, Reading(None, *columns))
    give_ids(images, some(files))
    return images


def _read(name, files, reading):
    """The images of files of a format."""
    if FORMATS[name].holds_images:
        files = [inner for path in files for inner in _shards(name, path)]
    reading.file_splits = splits_in_names(files)
    images = Gathered()
    FORMATS[name].read(list(reading.file_splits) or files, reading, images)
    without = images.splits().get(None, 0)
    if without and without < len(images):
        raise UserError(
            f"{next(images.of_split(None)).where} has no split and others have one"
            f" ({counted(without, 'image')}): give all of them one, or none"
        )
    return images


def _shards(name, path):
    """The files of a folder of shards, in the order of their names."""
    if name != "webdataset" or not path.is_dir():
        return [path]
    shards = sorted(path.rglob("*.tar"))
    if not shards:
        raise UserError(f"{path} has no shards, .tar, in it")
    return shards


def _paths(files):
    files = [files] if isinstance(files, str | Path) else files
    return [Path(path) for path in files]


# -------------------------------------------------------------------------------- which format


def find_format(files):
    """The name of the files' format, by the first file whose look tells it. Raises UserError."""
    for path in files:
        head = _head(path)
        for name, format_ in FORMATS.items():
            if format_.fits(path, head):
                return name
    raise UserError(
        f"{some(files)}: no known format of captions: choose one by --format ({', '.join(FORMATS)})"
    )


def _head(path):
    """The first of what a file holds, as text; nothing of a folder."""
    if path.is_dir():
        check_listable(path)
        return ""
    check_readable(path)
    try:
        with tables.open_text(path) as file:
            return file.read(HEAD).decode("utf-8-sig", "replace")
    except (OSError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged: {error}") from error


# ------------------------------------------------------------------------- ids, splits, subset


def give_ids(images, source):
    """Gives each image an id of its own within its split. Raises UserError for an id that two
    have."""
    if twice := images.give_ids():
        one, other = twice
        raise UserError(
            f"{source} has the id {other.id!r} twice, of {one.where} and {other.where}: "
            "give each image its own, which results are told apart by"
        )


def shares(total, weights):
    """`total` in whole numbers in proportion to weights, those above 0 getting 1 or more."""
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [max(int(share), int(share > 0)) for share in exact]
    while sum(parts) != total:
        step = 1 if sum(parts) < total else -1
        places = [i for i, part in enumerate(parts) if (exact[i] if step > 0 else part > 1)]
        places = places or [i for i, part in enumerate(parts) if part]
        place = max(places, key=lambda i: (step * (exact[i] - parts[i]), -step * i))
        parts[place] += step
    return parts


def choose(images, count, rng):
    """Keeps so many of the images, drawn at random; splits keep their proportions."""
    if count >= len(images):
        return
    by_split = list(images.places().values())
    sizes = shares(count, list(map(len, by_split)))
    pairs = zip(by_split, sizes, strict=True)
    images.keep(sorted(place for own, size in pairs for place in rng.sample(own, size)))


def share_out(images, sizes, rng, seed):
    """Gives images splits at random, and returns a line about it."""
    counts = shares(len(images), sizes)
    splits = bytearray(i for i, count in enumerate(counts) for _ in range(count))
    rng.shuffle(splits)
    images.give_splits(SPLITS[i] for i in splits)
    return f"splits: drawn at random, {counts[0]}, {counts[1]} and {counts[2]} images, seed {seed}"


def _in_several(images):
    """A line about images that stand in several splits, as the data have it."""
    several, first = 0, []
    for name in images.in_several_splits():
        several += 1
        first = [*first, name][:3]
    if several:
        are = counted(several, "image stands", "images stand")
        more = f" and {several - 3} more" if several > 3 else ""
        yield f"{are} in several splits ({', '.join(first)}{more})"
