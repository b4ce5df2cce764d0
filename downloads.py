"""Published data sets fetched from where their authors put them."""

import hashlib
import sys
from pathlib import Path
from signal import Signals
from typing import NamedTuple

from groundwork.crawling import Crawl
from groundwork.errors import UserError
from groundwork.files import check_space, folder_for, sole_writer
from groundwork.transfers import Published, fetch_file
from groundwork.unpacking import unpack
from groundwork.wording import counted


class Fetched(NamedTuple):
    """What input files are made of."""

    captions: list[Path]  # in Karpathy's format, or lines of caption TAB address
    image_folder: Path


class Archive(NamedTuple):
    """A zip archive, and what is wanted of it."""

    published: Published
    wanted: tuple[str, ...]  # files or folders at its top
    unpacked: int  # bytes that these take, about


# Sizes and digests are those that other collections of data sets compare with, TensorFlow Datasets,
# Hugging Face's datasets and torch for R: the authors give none.
KARPATHY = Archive(
    Published(
        "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
        36_745_453,
        "sha256:4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
    ),
    ("dataset_coco.json", "dataset_flickr8k.json", "dataset_flickr30k.json"),
    191_540_365,
)

# Name -> archives of the images, and the folder of the images below that of the data set. COCO's
# are not to be had over HTTPS: the digests say that they are the right ones.
IMAGES = {
    "coco": (
        [
            Archive(
                Published(
                    "http://images.cocodataset.org/zips/train2014.zip",
                    13_510_573_713,
                    "sha256:ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
                ),
                ("train2014",),
                13_600_000_000,
            ),
            Archive(
                Published(
                    "http://images.cocodataset.org/zips/val2014.zip",
                    6_645_013_297,
                    "sha256:fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
                ),
                ("val2014",),
                6_700_000_000,
            ),
        ],
        "",
    ),
    "flickr8k": (
        [
            Archive(
                Published(
                    "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
                    "Flickr8k_Dataset.zip",
                    1_115_419_746,
                    "md5:f18a1e2920de5bd84dae7cf08ec78978",
                ),
                ("Flicker8k_Dataset",),  # spelt so
                1_200_000_000,
            )
        ],
        "Flicker8k_Dataset",
    ),
    "flickr30k": ([], "flickr30k-images"),
}

FLICKR30K_FORM = "https://shannon.cs.illinois.edu/DenotationGraph/"

CONCEPTUAL = (  # lines of caption TAB address
    Published(
        "https://storage.googleapis.com/gcc-data/Train/GCC-training.tsv",
        564_607_502,
        "sha256:eab84e5ebc713a41a6b1f6ae6fa3d6617821a13b03fe24e16004cc4aac189635",
    ),
    Published(
        "https://storage.googleapis.com/gcc-data/Validation/GCC-1.1.0-Validation.tsv",
        2_603_670,
        "sha256:528a0c939ec2ad8d1740bd3f459a51e9fe67643050e29f68fabb6da3f8ac985d",
    ),
)
CONCEPTUAL_ROWS = 3_318_333 + 15_840

NAMES = (*IMAGES, "conceptual")


def fetch(name, folder, web=None, **options):
    """Fetches a data set, or what is missing of it, to a folder.

    Args:
        name: one of `NAMES`.
        folder: for several data sets: what they share lies in it, the rest in one of the name.
        web: a `groundwork.web.Web`, None for the usual one.
        options: of `Crawl` and `Crawl.run`, for Conceptual Captions.

    Returns:
        a `Fetched`: of Conceptual Captions, whose images `file_name` names, the training's captions
        and the validation's, of the others those in Karpathy's format.

    Raises:
        UserError: something cannot be had, is not what was published, does not fit on the disk, or
            another process is fetching to the folder.
        SystemExit: a signal has stopped it, with 128 and the signal's number.
    """
    folder = Path(folder)
    with (
        folder_for(folder / name) as own,
        sole_writer(folder / "downloads", "wait for it, or choose another --download_folder"),
    ):
        if name == "conceptual":
            return _conceptual(own, web, **options)
        archives, images = IMAGES[name]
        if not archives and not _has_files(own / images):
            raise UserError(
                f"Flickr30k is given out by a form, {FLICKR30K_FORM}: unpack the images that it "
                f"leads to so that they lie in {own / images}, and run the same command again"
            )
        places = {KARPATHY: folder} | dict.fromkeys(archives, own)
        _check_space(folder, places)
        for archive, place in places.items():
            _fetch_archive(archive, place, web)
    return Fetched([folder / f"dataset_{name}.json"], own / images)


def file_name(address):
    """Where the image of an address lies, below the folder of images: "3f/3f…a1.jpg", by the
    address's SHA-256, whatever the image's format. A reader of addresses leaves out those that have
    no file there: they could not be fetched."""
    digest = hashlib.sha256(address.strip().encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return f"{digest[:2]}/{digest}.jpg"


def _has_files(folder):
    return folder.is_dir() and any(folder.iterdir())


def _missing(archive, folder):
    """What is not unpacked yet. It gets its name last: what is there is whole."""
    return [name for name in archive.wanted if not (folder / name).exists()]


def _check_space(folder, places):
    """Raises UserError where archives and what they hold do not fit side by side."""
    size = 0
    for archive, place in places.items():
        if _missing(archive, place):
            path = place / archive.published.name
            parts = [path, path.with_name(f"{path.name}.part")]
            size += archive.published.size - sum(p.stat().st_size for p in parts if p.exists())
            size += archive.unpacked
    check_space(folder, size, "the archives and what they hold", "another --download_folder")


def _fetch_archive(archive, folder, web):
    if missing := _missing(archive, folder):
        path = folder / archive.published.name
        fetch_file(archive.published, path, web)
        unpack(path, folder, missing)
        print(f"{path} is unpacked and needed no more", flush=True)


def _conceptual(folder, web, retry_failed=False, **options):
    captions = [folder / published.name for published in CONCEPTUAL]
    size = sum(
        published.size
        for published, path in zip(CONCEPTUAL, captions, strict=True)
        if not path.exists()
    )
    check_space(folder, size, "the captions", "another --download_folder")
    for published, path in zip(CONCEPTUAL, captions, strict=True):
        fetch_file(published, path, web)
    crawl = Crawl(folder / "images", file_name, web, **options)
    counts = crawl.run(_addresses(captions), CONCEPTUAL_ROWS, retry_failed)
    there = counts["fetched"] + counts["there"]
    failed = counts["failed"] + counts["failed before"]
    print(
        f"{counted(there, 'caption')} with an image in {crawl.folder}, {counts['fetched']} of them "
        f"new; {failed} without: {crawl.folder / 'failed.tsv'} says why, and --retry_failed tries "
        "them again"
    )
    if crawl.signal:
        print(f"stopped by {Signals(crawl.signal).name}: the same command goes on", flush=True)
        sys.exit(128 + crawl.signal)
    return Fetched(captions, crawl.folder)


def _addresses(paths):
    """Yields the address at the end of each line."""
    for path in paths:
        with open(path, encoding="utf-8", newline="\n") as file:
            for line in file:
                if address := line.rpartition("\t")[2].strip():
                    yield address
