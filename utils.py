"""What the scripts share: errors a user can mend, files written whole, images, input files."""

import argparse
import glob
import io
import json
import math
import os
import platform
import random
import shutil
import string
import sys
import textwrap
import threading
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

import h5py
import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps
from tqdm import tqdm

import distributed
from models import EncoderError

# ---------------------------------------------------------------------------- errors and files


class UserError(Exception):
    """An error the user can mend: one line that names the file or option and the way out."""

    def __init__(self, message):
        super().__init__(printable(message.strip()))


def printable(text):
    """The text with escapes for line breaks and all else that would disturb a line of a terminal:
    names of files may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def run(main):
    """Calls main(); an error the user can mend ends the process with one line and status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold what it cannot write
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (UserError, EncoderError) as error:
        # a DataLoader's process puts its traceback before the message
        sys.exit(f"error: {str(error).rpartition('UserError: ')[2]}")
    except (RuntimeError, MemoryError) as error:
        if "does not have a deterministic implementation" in str(error):
            sys.exit(f"error: {printable(error)[:200]}: leave out --deterministic")
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not out_of_memory and "can't allocate memory" not in str(error):
            raise
        sys.exit("error: the memory is too small for the batch or the sizes asked for: lower them")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def progress(iterable=None, **options):
    """tqdm's bar, on a terminal and in the main process alone."""
    return tqdm(iterable, disable=None if distributed.is_main else True, **options)


@contextmanager
def sole_writer(path, way_out):
    """Holds a lock on `path` for the block, which ends with the process at the latest.

    Raises:
        UserError: another process holds it, `way_out` being what to do then.
    """
    path = Path(path)
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file, blocking=False)
    with os_errors_as_user_errors(path):
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(f"another run is writing {path}: {way_out}") from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()


@contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path`, which takes its place when the block succeeds.

    When the block fails, the temporary file is removed and an older `path` stays as it was.
    Raises UserError for any OSError: a full disk, no permission, a missing folder.
    """
    path = Path(path)
    with _temporaries([path], path) as [temporary]:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush_folder(path.parent)


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


@contextmanager
def _temporaries(paths, goal):
    """Yields a temporary path beside each path; those not renamed by the end are removed."""
    temporaries = [temporary_path(path) for path in paths]
    with os_errors_as_user_errors(goal):
        try:
            yield temporaries
        finally:
            for temporary in temporaries:
                temporary.unlink(missing_ok=True)


def temporary_path(path):
    """A path beside `path` that no other process takes, of this machine or another."""
    return path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.tmp")


def _remove_stale_temporaries(folder):
    """Removes what processes of this machine that were killed while they wrote have left."""
    for path in Path(folder).glob(f"*.{glob.escape(platform.node())}.*.tmp"):
        pid = path.suffixes[-2][1:]
        if pid.isdecimal() and not _is_running(int(pid)):
            path.unlink(missing_ok=True)


def _is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


@contextmanager
def os_errors_as_user_errors(path):
    """Makes any OSError of the block, which writes `path`, a UserError that names it."""
    try:
        yield
    except BlockingIOError as error:  # HDF5 locks the files that it writes
        raise UserError(f"cannot write {path}: another run is writing it") from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {_reason(error)}") from error


def _reason(error):
    """An OSError's reason without the path, which our messages name themselves."""
    return os.strerror(error.errno) if error.errno else error


def reserve(path, size):
    """Takes the room on the disk that a file of `size` bytes needs, where the system can."""
    with open(path, "ab") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)


def flush(path):
    """Returns when the file's contents are on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def flush_folder(path):
    """Returns when the names in the folder are on the disk, where the system can tell."""
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def make_folder(path):
    """The folder of that path, made if it is missing, without what killed processes left in it.

    Raises UserError if it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        _remove_stale_temporaries(path)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {_reason(error)}") from error
    return Path(path)


def read_json(path):
    """The contents of a JSON file. Raises UserError if it cannot be read or is not valid JSON."""
    if Path(path).exists() and not Path(path).is_file():  # reading a pipe would wait for ever
        raise UserError(f"cannot read {path}: it is no file")
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {_reason(error)}") from error
    except (ValueError, RecursionError) as error:  # bad syntax, encoding, or endless nesting
        raise UserError(f"{path} is not valid JSON: {error}") from error


# -------------------------------------------------------------------------------------- images


_opening = threading.Lock()  # the filters of warnings are all threads' own
_large = threading.Lock()  # one at a time: the threads' memory adds up
# Those of pictures: others, as EPS, have Pillow start other programs
FORMATS = ["BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "TGA", "TIFF"]
FORMATS += ["WEBP"]
MAX_ASPECT = 100
MAX_PIXELS = 2**26  # of an image; decoded, turned upright and made RGB it takes under a gigabyte


def open_image(path):
    """The image file's picture as an upright RGB PIL.Image, transparent parts on white.

    Of an animated file the first frame. Raises UserError naming the file if it is missing, not
    an image of `FORMATS`, damaged, has more than `MAX_PIXELS`, or is over `MAX_ASPECT` times as
    long as wide.
    """
    if not Path(path).exists():
        raise UserError(f"there is no image {path}")
    if not Path(path).is_file():  # opening a pipe would wait for ever
        raise UserError(f"cannot read image {path}: it is no file")
    try:
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours comes earlier
            image = Image.open(path, formats=FORMATS)
        with image:
            size, pixels = f"{image.width}×{image.height} pixels", image.width * image.height
            if pixels > MAX_PIXELS:
                raise ValueError(f"{size} are more than {MAX_PIXELS:,}, make it smaller")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"{size} are a line, not a picture")
            with _large if pixels > MAX_PIXELS / 8 else nullcontext():
                return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # on damaged files Pillow's decoders raise nearly anything
        raise UserError(f"cannot read image {path}: {error or type(error).__name__}") from error


def _to_rgb(image):
    if image.mode.startswith("I"):  # 16 bits in a pixel, which Pillow would clip at 255
        pixels = np.array(image, dtype=np.int32)  # divided in place, as it may be large
        pixels.clip(0, 65535, out=pixels)
        pixels += 128
        pixels //= 257
        image = Image.fromarray(pixels.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def read_image(path, size):
    """An image file's picture, `squeeze`d. Raises UserError."""
    return squeeze(open_image(path), size)


def squeeze(image, size):
    """An RGB PIL.Image made a square: np.uint8 (3, size, size)."""
    # Pillow widens the filter's support when it shrinks: no aliasing.
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _read_images(paths, size, workers):
    """Yields what read_image() makes of each path, or the line that says why it cannot, in order.

    `workers` threads read ahead, since Pillow decodes and resizes beside Python's other threads,
    but no further than a few images each.
    """
    if workers is None:  # the cores that this process may use, where the system tells
        affinity = getattr(os, "sched_getaffinity", None)
        workers = len(affinity(0)) if affinity else os.cpu_count()

    def read(path):
        try:
            return read_image(path, size)
        except UserError as error:
            return str(error)

    with (
        progress(total=len(paths), desc="reading images", unit="image") as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        ahead = deque()
        for path in paths:
            ahead.append(pool.submit(read, path))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
                bar.update()
        for future in ahead:
            yield future.result()
            bar.update()


# ------------------------------------------------------------------------------------ captions

MAX_IMAGE_SIZE, MAX_GRID = 2048, 64  # pixels and places along a side: memory grows with the square

SPECIAL_WORDS = ("<unk>", "<start>", "<end>", "<pad>")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def tokenize(sentence):
    """The words of a sentence as Karpathy's data sets split it: lower case, no punctuation."""
    return sentence.lower().translate(_NO_PUNCTUATION).split()


def make_word_map(captions, min_word_freq):
    """Word -> index over captions (lists of words): words seen more than `min_word_freq` times
    from 1 in order of first appearance, then <unk>, <start>, <end>; <pad> is 0."""
    counts = Counter(word for caption in captions for word in caption)
    words = [word for word, count in counts.items() if count > min_word_freq]
    word_map = {word: i for i, word in enumerate([*words, "<unk>", "<start>", "<end>"], start=1)}
    return word_map | {"<pad>": 0}


def encode_caption(words, word_map, max_len):
    """Indices of <start>, the words and <end>, padded to max_len + 2, and the unpadded length."""
    known = [word_map.get(word, word_map["<unk>"]) for word in words]
    caption = [word_map["<start>"], *known, word_map["<end>"]]
    return caption + [word_map["<pad>"]] * (max_len + 2 - len(caption)), len(caption)


def check_word_map(word_map, source):
    """Raises UserError unless `word_map` is a dict that numbers its words, the special ones
    among them, from 0 without gaps."""
    if (
        not isinstance(word_map, dict)
        or not all(word in word_map for word in SPECIAL_WORDS)
        or not all(isinstance(word, str) for word in word_map)
        or not all(type(index) is int for index in word_map.values())
        or sorted(word_map.values()) != list(range(len(word_map)))
    ):
        raise UserError(f"{source} is no word map: make it with create_input_files.py")


def sample_captions(captions, count, rng):
    """`count` of an image's captions: all of them and repeats where it has too few, otherwise
    a sample without repetition."""
    if len(captions) <= count:
        return captions + rng.choices(captions, k=count - len(captions))
    return rng.sample(captions, count)


# --------------------------------------------------------------------------------- input files

SPLITS = {"train": "TRAIN", "restval": "TRAIN", "val": "VAL", "test": "TEST"}
_KINDS = {"IMAGES": "hdf5", "CAPTIONS": "json", "CAPLENS": "json", "REFERENCES": "json"}


def base_name(dataset, captions_per_image, min_word_freq):
    """The part that the names of a data set's input files have in common."""
    return f"{dataset}_{captions_per_image}_cap_per_img_{min_word_freq}_min_word_freq"


def input_path(folder, base, kind, split=None):
    """Path of an input file: WORDMAP, or IMAGES, CAPTIONS, CAPLENS or REFERENCES of a split."""
    if split is None:
        return Path(folder) / f"{kind}_{base}.json"
    return Path(folder) / f"{split}_{kind}_{base}.{_KINDS[kind]}"


@dataclass
class _Sample:
    """An image that has captions to learn from."""

    path: Path
    captions: list[list[str]]  # words; wordless and too long captions left out
    reference: dict  # its entry in the REFERENCES file


def create_input_files(
    dataset,
    karpathy_json,
    image_folder,
    captions_per_image=5,
    min_word_freq=5,
    max_len=50,
    output_folder="data",
    image_size=256,
    workers=None,
    seed=0,
    skip_bad_images=False,
):
    """Turns a folder of images and Karpathy's JSON into the files that training reads.

    Writes to `output_folder`, for each split that has images (TRAIN and VAL must, TEST may):
    IMAGES (uint8 (I, 3, image_size, image_size)), CAPTIONS and CAPLENS (captions_per_image
    entries per image), REFERENCES (one entry per image); and one WORDMAP. They appear all
    together at the end or, after an error, not at all; a WORDMAP marks a complete data set.

    `workers` threads read the images: None takes all cores.
    Prints a summary and returns it as a dict. Raises UserError if the JSON or the folder is
    unusable, if an image is (each is named on stderr; skip_bad_images leaves them out instead),
    or if a file cannot be written.
    """
    images = read_karpathy(karpathy_json)
    if not Path(image_folder).is_dir():
        raise UserError(f"there is no folder {image_folder}: check --image_folder")
    samples, left_out = _collect_samples(images, Path(image_folder), max_len)
    for split in ("TRAIN", "VAL"):
        if split not in samples:
            raise UserError(f"{karpathy_json} has no {split} image with captions to learn from")
    word_map = make_word_map((s["tokens"] for i in images for s in i["sentences"]), min_word_freq)
    output_folder, base = Path(output_folder), base_name(dataset, captions_per_image, min_word_freq)
    summary = {"base": base, "splits": {}, "vocabulary": len(word_map), "left_out": dict(left_out)}

    paths = [sample.path for items in samples.values() for sample in items]
    with _all_or_nothing(output_folder, base, samples) as temporary:
        _check_space(output_folder, len(paths) * 3 * image_size**2)
        pictures = _read_images(paths, image_size, workers)
        readable = {}
        for split, items in samples.items():
            file = temporary["IMAGES", split]
            readable[split] = _write_images(file, items, pictures, image_size, captions_per_image)
        summary["left_out"]["unreadable images"] = _unreadable(samples, readable, skip_bad_images)
        rng = random.Random(seed)
        for split, items in readable.items():
            chosen = [sample_captions(item.captions, captions_per_image, rng) for item in items]
            encoded = [encode_caption(words, word_map, max_len) for c in chosen for words in c]
            captions, lengths = zip(*encoded, strict=True)
            _write_json(temporary["CAPTIONS", split], captions)
            _write_json(temporary["CAPLENS", split], lengths)
            _write_json(temporary["REFERENCES", split], [item.reference for item in items])
            summary["splits"][split] = {
                "images": len(items),
                "captions": len(captions),
                "unknown": _share_unknown(captions, lengths, word_map),
            }
        _write_json(temporary["WORDMAP", None], word_map)
    _print_summary(summary)
    return summary


def read_karpathy(path):
    """The list of images of a JSON file in Karpathy's format. Raises UserError if it is none."""
    contents = read_json(path)
    images = contents.get("images") if isinstance(contents, dict) else None
    if not isinstance(images, list):
        raise UserError(f'{path} is not in Karpathy\'s format: it has no list "images"')
    for i, image in enumerate(images):
        if fault := _fault(image):
            raise UserError(f"{path} is not in Karpathy's format: images[{i}] has {fault}")
    return images


def _fault(image):
    """What keeps an entry of Karpathy's JSON from being used, or None."""
    if not isinstance(image, dict):
        return "no keys"
    image = {"filepath": ""} | image
    for key, kind in {"filename": str, "filepath": str, "split": str, "sentences": list}.items():
        if not isinstance(image.get(key), kind):
            return f'no {"text" if kind is str else "list"} "{key}"'
    if image["split"] not in SPLITS:
        return f"an unknown split {image['split']!r}: known are {', '.join(SPLITS)}"
    for sentence in image["sentences"]:
        tokens = sentence.get("tokens") if isinstance(sentence, dict) else None
        if not isinstance(tokens, list) or not all(isinstance(word, str) for word in tokens):
            return 'a sentence without a list "tokens" of words'
        if not isinstance(sentence.get("raw", ""), str):
            return 'a sentence whose "raw" is no text'
        if reserved := set(tokens).intersection(SPECIAL_WORDS):
            return f"a sentence with the reserved word {min(reserved)}"
    return None


def reference_of(image, i):
    """What the `i`-th entry of Karpathy's JSON is scored by: its id, and all captions with words,
    as written."""
    return {
        "id": image.get("cocoid", image.get("imgid", i)),
        "captions": [
            s.get("raw", " ".join(s["tokens"])) for s in image["sentences"] if any(s["tokens"])
        ],
    }


def _collect_samples(images, folder, max_len):
    """The images that have captions to learn from, by split, and counts of what is left out."""
    samples = {split: [] for split in SPLITS.values()}
    left_out = Counter()
    for i, image in enumerate(images):
        worded = [s for s in image["sentences"] if any(s["tokens"])]
        captions = [s["tokens"] for s in worded if len(s["tokens"]) <= max_len]
        left_out["wordless captions"] += len(image["sentences"]) - len(worded)
        left_out["too long captions"] += len(worded) - len(captions)
        left_out["images without captions"] += not captions
        if captions:
            reference = {"filename": image["filename"], **reference_of(image, i)}
            if "boxes" in image:
                reference["boxes"] = image["boxes"]
            path = folder / image.get("filepath", "") / image["filename"]
            samples[SPLITS[image["split"]]].append(_Sample(path, captions, reference))
    return {split: items for split, items in samples.items() if items}, left_out


@contextmanager
def _all_or_nothing(folder, base, splits):
    """Yields temporary paths by (kind, split) for the input files of `splits` and the WORDMAP,
    (WORDMAP, None). All take their places when the block succeeds, else none does."""
    keys = [*((kind, split) for split in splits for kind in _KINDS), ("WORDMAP", None)]
    paths = {key: input_path(folder, base, *key) for key in keys}
    make_folder(folder)
    with (
        sole_writer(paths["WORDMAP", None], "wait for it, or choose another --output_folder"),
        _temporaries(paths.values(), f"to {folder}") as temporaries,
    ):
        yield dict(zip(paths, temporaries, strict=True))
        for temporary in temporaries:
            flush(temporary)
        # Only renames are left. The WORDMAP goes first and comes last, so that if they are cut
        # short none vouches for a mixture of old and new files.
        paths["WORDMAP", None].unlink(missing_ok=True)
        for split in set(SPLITS.values()).difference(splits):  # an older data set may have had it
            for kind in _KINDS:
                input_path(folder, base, kind, split).unlink(missing_ok=True)
        for temporary, path in zip(temporaries, paths.values(), strict=True):
            os.replace(temporary, path)


def _check_space(folder, size):
    """Raises UserError if `size` bytes do not fit: better now than after reading for an hour."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"the images take {size / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free: "
            "make room or choose another --output_folder"
        )


def _write_images(path, samples, pictures, size, captions_per_image):
    """Writes the next len(samples) of `pictures` to a new HDF5 file, without those that are error
    lines: these go to stderr. Returns the samples whose picture is in the file."""
    readable = []
    with new_hdf5(path) as file:
        file.attrs["captions_per_image"] = captions_per_image
        images = file.create_dataset(
            "images",
            shape=(len(samples), 3, size, size),
            maxshape=(len(samples), 3, size, size),
            chunks=(1, 3, size, size),
            dtype="uint8",
        )
        for sample, picture in zip(samples, islice(pictures, len(samples)), strict=True):
            if isinstance(picture, str):
                tqdm.write(picture, file=sys.stderr)
            else:
                images[len(readable)] = picture
                readable.append(sample)
        images.resize(len(readable), axis=0)
    return readable


def _unreadable(samples, readable, skip_bad_images):
    """The number of images that are left out. Raises UserError if that must not or cannot be."""
    total = sum(map(len, samples.values()))
    count = total - sum(map(len, readable.values()))
    if count and not skip_bad_images:
        raise UserError(
            f"{count} of {total} images cannot be read (named above), so nothing was written: "
            "mend them or leave them out with --skip_bad_images"
        )
    for split, items in readable.items():
        if not items:
            raise UserError(f"no image of the {split} split can be read (named above)")
    return count


def _share_unknown(captions, lengths, word_map):
    """The share of <unk> among the captions' words, <start> and <end> not counted."""
    unknown = sum(caption.count(word_map["<unk>"]) for caption in captions)
    return unknown / (sum(lengths) - 2 * len(lengths))


def _write_json(path, contents):
    path.write_text(json.dumps(contents), encoding="utf-8")


def _print_summary(summary):
    for split in dict.fromkeys(SPLITS.values()):
        if counts := summary["splits"].get(split):
            print(
                f"{split}: {counts['images']} images, {counts['captions']} captions, "
                f"{counts['unknown']:.2%} of their words <unk>"
            )
        else:
            print(f"{split}: no images, so no {split} files")
    print(f"vocabulary: {summary['vocabulary']} words, the {len(SPECIAL_WORDS)} special included")
    print("left out: " + ", ".join(f"{n} {what}" for what, n in summary["left_out"].items()))


# ------------------------------------------------------------------------- devices and options


def choose_device(name=None):
    """The device of that name, or CUDA when present, else the CPU. Raises UserError.

    Where several processes share a machine's GPUs, each has its own.
    """
    if distributed.world_size > 1 and name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{distributed.local_rank}"
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def has_fast_bfloat16(device):
    """Whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)  # private, so it may go
    return device.type == "cpu" and supported()


class Parser(argparse.ArgumentParser):
    """Shows the defaults, and answers a wrong option with one line."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def add_device_options(parser):
    """Where and how precisely to compute, for every script."""
    add = parser.add_argument
    add("--device", help="cuda, cuda:1, cpu; None: CUDA when present, else the CPU")
    add("--amp", choices=["auto", "off"], default="auto", help="bfloat16 where it is faster")


def add_workers_option(parser):
    """Who reads the data, for training and evaluation."""
    parser.add_argument(
        "--workers",
        type=number(int, least=0),
        help="processes that read batches ahead; None: 4 for a GPU, else none",
    )


def loader_options(options):
    """DataLoader's arguments for what --device and --workers say."""
    cuda = options.device.type == "cuda"
    workers = options.workers if options.workers is not None else 4 if cuda else 0
    return {"num_workers": workers, "pin_memory": cuda}


def add_decoding_options(parser):
    """How captions are searched for, beside --beam_size."""
    add = parser.add_argument
    add(
        "--max_len",
        type=number(int, above=0, below=1001),
        default=50,
        help="words of a caption, at most",
    )
    add(
        "--length_penalty",
        type=number(float, least=0, below=10),
        default=0.0,
        help="α: captions are compared by log p / length^α",
    )


def check_beam_size(beam_size, word_map):
    """Raises UserError for a beam wider than there are words to say."""
    words = len(word_map) - len(SPECIAL_WORDS)
    if beam_size > words:
        raise UserError(f"--beam_size {beam_size} is larger than the vocabulary of {words} words")


def number(kind, above=None, least=None, below=None):
    """An argparse type: an int or float within bounds."""

    def parse(text):
        value = kind(text)
        if kind is int and abs(value) >= (below or 2**31):
            raise argparse.ArgumentTypeError(f"{text} is too large")
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if above is not None and not value > above:
            raise argparse.ArgumentTypeError(f"{text} is not above {above}")
        if least is not None and not value >= least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        if below is not None and not value < below:
            raise argparse.ArgumentTypeError(f"{text} is not below {below}")
        return value

    parse.__name__ = kind.__name__
    return parse


# -------------------------------------------------------------------------------------- tables


def print_table(rows):
    """Prints dicts of column -> text as a Markdown table, its columns aligned."""
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join(t.rjust(w) for t, w in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    rule = "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|"
    print("\n".join([lines[0], rule, *lines[1:]]))


# ------------------------------------------------------------------------------------ pictures


def curves_path(log_path):
    """Path of a log's curves: `log_….jsonl` to `curves_….png`."""
    return log_path.with_name(log_path.stem.replace("log_", "curves_", 1) + ".png")


def read_log(path):
    """The records of a training log, one an epoch. Raises UserError if a line is damaged."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path} has a damaged line, take it out: {error}") from error


def draw_curves(log_path):
    """Draws a training log as a PNG beside it, at `curves_path`.

    Raises:
        UserError: a line of the log is damaged, or the PNG cannot be written.
    """
    log_path = Path(log_path)
    figure = curves(read_log(log_path))
    with atomic_write(curves_path(log_path)) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def curves(records):
    """A matplotlib figure of losses, BLEU and learning rate over the epochs.

    Args:
        records: dicts, one an epoch, with `stage`, `loss`, `val_loss`, `bleu1` to `bleu4` (0 to 1)
            and `lr`; epochs of stage "finetune" that follow others are shaded.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    loss, bleu, rate = figure.subplots(1, 3)
    _plot(loss, records, "loss", {"training": "loss", "validation": "val_loss"})
    scores = {f"BLEU-{n}": f"bleu{n}" for n in range(1, 5)}
    _plot(bleu, records, "validation BLEU (%)", scores, scale=100)
    _plot(rate, records, "learning rate (10⁻⁴)", {"decoder": "lr"}, scale=1e4)
    for axes in (bleu, rate):
        axes.set_ylim(0, 1.05 * axes.dataLim.y1 or 1)
    return figure


def _plot(axes, records, title, curves, scale=1):
    """Plots each label's key of the records against the epochs, counted over all stages."""
    end = len(records) + 0.5
    for label, key in curves.items():
        values = [scale * record[key] for record in records]
        axes.plot(range(1, len(records) + 1), values, ".-", label=label)
    stages = [record["stage"] for record in records]
    if len(set(stages)) > 1:
        axes.axvspan(stages.index("finetune") + 0.5, end, color="0.92", label="fine-tuning")
    axes.set_title(title, loc="left", pad=24)
    axes.set_xlabel("epoch")
    axes.set_xlim(0.5, end)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(  # between title and curves, which it must not hide
        loc="lower left",
        bbox_to_anchor=(0, 1.01),
        borderaxespad=0,
        borderpad=0.2,
        ncols=5,
        frameon=False,
        fontsize="small",
        handlelength=1,
        handletextpad=0.4,
        columnspacing=0.9,
    )


def draw_attention(image, words, alphas, path):
    """Writes `attention_figure` as a PNG.

    Raises:
        UserError: the PNG cannot be written.
    """
    figure = attention_figure(image, words, alphas)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def attention_figure(image, words, alphas):
    """Draws where the decoder looked for each word, as a figure 1320 pixels wide or less.

    The photograph under its caption, then a panel a word: what the decoder looked at is as
    photographed, the rest dim and gray, with a line where the attention is half its maximum.
    Attention spread evenly leaves the whole panel as photographed, and draws no line. The panels
    of a dark photograph are lightened.

    Args:
        image: upright RGB PIL.Image of any size.
        words: T strings.
        alphas: (T, L) array or tensor of non-negative numbers, no row all zero; L = size², a
            row-major grid that stretches over the whole image.
    """
    alphas = torch.as_tensor(alphas).detach().float().cpu().numpy()
    size = math.isqrt(alphas.shape[1])
    grid = _choose_grid(" ".join(words), len(words), image.width / image.height)
    photograph, *panels = boxes = grid.boxes()
    figure = Figure(figsize=(grid.width, grid.height), dpi=_DPI)
    write_text(figure, (_MARGIN, _MARGIN), "\n".join(grid.lines), 17, grid.inner, va="top")
    show_pixels(figure, photograph, _resize(image, photograph))
    small = _brighten(_resize(image, boxes[-1]))
    for word, alpha, box in zip(words, alphas, panels, strict=True):
        attention = _smooth(alpha.reshape(size, size), small.shape[:2])
        axes = show_pixels(figure, box, _spotlight(small, attention))
        if attention.min() < 0.5:
            axes.contour(attention, levels=[0.5], colors=["#ffb81c"], linewidths=4 * grid.strip)
        left, top, width, _ = box
        write_text(figure, (left, top - 0.22 * grid.strip), word, 40 * grid.strip, width + 0.1)
    return figure


_DPI, _MARGIN = 110, 0.25  # of a figure of attention: dots per inch, inches


@dataclass
class _Grid:
    """A photograph in span × span cells at the top left, panels in the others, row by row.

    Lengths in inches. Above each cell a strip takes the panel's word.
    """

    caption: str
    count: int  # panels
    aspect: float  # a picture's width / height
    width: float  # of the whole figure
    span: int
    columns: int

    def __post_init__(self):
        self.inner = self.width - 2 * _MARGIN
        self.lines = textwrap.wrap(self.caption, int(8 * self.inner))
        self.rows = max(self.span, math.ceil((self.span**2 + self.count) / self.columns))
        self.strip = min(max(0.17 * self.inner / self.columns, 0.24), 0.38)
        # With this gap between columns the photograph fills its cells, unless it gets too wide.
        widest = min(0.4, 0.22 * self.inner / self.columns)
        self.gap = min(max(self.strip * self.aspect, 0.1), widest)
        self.cell = (self.inner - (self.columns - 1) * self.gap) / self.columns
        self.head = _MARGIN + 0.31 * len(self.lines)
        self.height = self.head + self.rows * (self.strip + self.cell / self.aspect) + _MARGIN

    def cost(self):
        """How far the figure is from 16:10, from no empty cells, and the photograph from 30 %."""
        cells, photograph = self.rows * self.columns, self.span**2
        return (
            max(0, abs(math.log(self.width / self.height / 1.6)) - 0.2)
            + 1.5 * (cells - photograph - self.count) / cells
            + 0.25 * abs(math.log(photograph / cells / 0.3))
        )

    def boxes(self):
        """(left, top, width, height) of the photograph and of each panel, from the top left."""
        width, height, span = self.cell, self.cell / self.aspect, self.span
        across, down, top = width + self.gap, height + self.strip, self.head + self.strip
        photograph = min(span * across - self.gap, (span * down - self.strip) * self.aspect)
        boxes = [(_MARGIN, top, photograph, photograph / self.aspect)]
        for row, column in product(range(self.rows), range(self.columns)):
            if max(row, column) >= span:
                boxes.append((_MARGIN + column * across, top + row * down, width, height))
        return boxes[: 1 + self.count]


def _choose_grid(caption, count, aspect):
    """The best grid 12 inches wide, or less where that would be over 10 high."""

    def best(width):
        spans = range(1, min(max(count, 1), 3) + 1)
        grids = [
            _Grid(caption, count, aspect, width, span, columns)
            for span in spans
            for columns in range(span, span + count + 1)
        ]
        return min(grids, key=_Grid.cost)

    grid = best(12)
    return grid if grid.height <= 10 else best(max(4, 120 / grid.height))


def write_text(figure, place, text, size, room, **options):
    """Writes text at (x, y) inches from the top left, smaller where it is wider than `room`."""
    x, y = place[0] / figure.get_figwidth(), 1 - place[1] / figure.get_figheight()
    text = figure.text(x, y, text, fontsize=size, linespacing=1.25, parse_math=False, **options)
    width = text.get_window_extent().width / figure.dpi
    if width > room:
        text.set_fontsize(size * room / width)


def show_pixels(figure, box, pixels):
    """Axes at a box of inches from the top left that hold `pixels` (h, w, 3), in 0..1."""
    (left, top, width, height), (across, down) = box, figure.get_size_inches()
    place = (left / across, 1 - (top + height) / down, width / across, height / down)
    axes = figure.add_axes(place, frameon=False, xticks=[], yticks=[])
    axes.imshow(pixels, aspect="auto")
    return axes


def _resize(image, box):
    """The image in as many pixels as a box has: float (h, w, 3), 0..1."""
    size = [max(2, round(_DPI * side)) for side in box[2:]]  # contours need two
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2)) / 255


def _brighten(photo):
    """Lightens a dark photograph, on which dim and lit places would look alike."""
    return photo ** np.clip(np.log(0.4) / np.log(photo.mean().clip(0.01, 0.99)), 0.45, 1)


def _smooth(grid, shape):
    """A square grid blown up to `shape` and scaled to a maximum of 1.

    Each pixel is the mean of the grid weighted by a Gaussian of the distance to its places, so
    that peaks are round, and what is even stays even up to the edges.
    """

    def weights(length):
        pixels = (np.arange(length)[:, None] + 0.5) * len(grid) / length
        weights = np.exp(-0.5 * ((pixels - np.arange(len(grid)) - 0.5) / 0.65) ** 2)
        return weights / weights.sum(axis=1, keepdims=True)

    smooth = weights(shape[0]) @ grid @ weights(shape[1]).T
    return smooth / smooth.max()


def _spotlight(photo, attention):
    """The photograph (h, w, 3) in full where attention (h, w) is 1, dim and gray where it is 0."""
    dim = 0.4 * photo @ np.array([[0.299], [0.587], [0.114]])
    return dim + attention[..., None] ** 0.8 * (photo - dim)
