"""Karpathy's split images and captions made into the files that training reads: HDF5, encoded
captions, word map."""

import json
import os
import random
import string
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from groundwork.errors import UserError
from groundwork.files import (
    check_readable,
    check_space,
    flush,
    make_folder,
    read_json,
    sole_writer,
    temporaries,
)
from groundwork.hdf5 import new_hdf5
from groundwork.images import MAX_ASPECT, read_images
from groundwork.wording import Complaints, counted

# ------------------------------------------------------------------------------------ captions

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
    reference: dict  # its entry in the REFERENCES file, to which reading adds width and height


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
    unusable, if an image is (the first are named on stderr; skip_bad_images leaves them out),
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
    if len(word_map) == len(SPECIAL_WORDS):
        raise UserError(
            f"{karpathy_json} has no word more than {counted(min_word_freq, 'time')}, so there is "
            "nothing to say: lower --min_word_freq, to 0 for all words"
        )
    output_folder, base = Path(output_folder), base_name(dataset, captions_per_image, min_word_freq)
    summary = {"base": base, "splits": {}, "vocabulary": len(word_map), "left_out": dict(left_out)}
    written = [s for image in images for s in image["sentences"] if s.get("raw")]
    summary["by_tokens"] = sum(not is_split_by_rule(sentence) for sentence in written)

    _check_folder(samples, karpathy_json)
    with _all_or_nothing(output_folder, base, samples) as temporary:
        count = sum(map(len, samples.values()))
        size = count * 3 * image_size**2
        check_space(output_folder, size, "the images", "another --output_folder")
        readable = _write_splits(temporary, samples, image_size, captions_per_image, workers)
        summary["left_out"]["unreadable images"] = _unreadable(samples, readable, skip_bad_images)
        rng = random.Random(seed)
        for split, items in readable.items():
            chosen = [sample_captions(item.captions, captions_per_image, rng) for item in items]
            encoded = [encode_caption(words, word_map, max_len) for c in chosen for words in c]
            summary["splits"][split] = _write_captions(temporary, split, items, encoded, word_map)
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
    _give_ids(images, path)
    return images


def _give_ids(images, path):
    """Makes "imgid" each image's own within its split: COCO's id, the one that it has, its place,
    or where that is another's id, its file name. Raises UserError for an id that two have."""
    taken, without = {}, []
    for i, image in enumerate(images):
        id_ = image.get("imgid") if image.get("cocoid") is None else image["cocoid"]
        if id_ is None:
            without.append(i)
            continue
        # pandas writes whole numbers as floats
        image["imgid"] = int(id_) if isinstance(id_, float) else id_
        key = SPLITS[image["split"]], str(image["imgid"])  # 1 and "1" are one
        if key in taken:
            raise UserError(
                f"{path} has the id {id_!r} twice, of images[{taken[key]}] and images[{i}]: give "
                "each image its own, which results are told apart by"
            )
        taken[key] = i
    for i in without:
        images[i]["imgid"] = (
            images[i]["filename"] if (SPLITS[images[i]["split"]], str(i)) in taken else i
        )


def are_boxes(value):
    """Whether a value is name -> [x0, y0, x1, y1]: where the objects that words name are."""
    return isinstance(value, dict) and all(
        isinstance(box, list) and len(box) == 4 and all(isinstance(x, int | float) for x in box)
        for box in value.values()
    )


def is_size(width, height):
    """Whether two values are width and height of a picture, pixels."""
    return (
        type(width) is type(height) is int
        and min(width, height) > 0
        and max(width, height) <= MAX_ASPECT * min(width, height)
    )


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
    for key in ("cocoid", "imgid"):
        id_ = image.get(key)
        whole = isinstance(id_, float) and id_ % 1 == 0
        if not whole and type(id_) not in (int, str, type(None)):
            return f"{key} {id_!r}, which is no whole number or text"
    for sentence in image["sentences"]:
        tokens = sentence.get("tokens") if isinstance(sentence, dict) else None
        if not isinstance(tokens, list) or not all(isinstance(word, str) for word in tokens):
            return 'a sentence without a list "tokens" of words'
        if not isinstance(sentence.get("raw"), str | None):
            return 'a sentence whose "raw" is no text'
        if reserved := set(tokens).intersection(SPECIAL_WORDS):
            return f"a sentence with the reserved word {min(reserved)}"
    return None


def reference_of(image):
    """What an entry of `read_karpathy` is scored by: its id, and all captions with words."""
    worded = [sentence for sentence in image["sentences"] if any(sentence["tokens"])]
    return {"id": image["imgid"], "captions": list(map(text_of, worded))}


def text_of(sentence):
    """A caption as written, or its tokens, where the rule does not split the one into the other:
    words are to be compared with words."""
    return sentence["raw"] if is_split_by_rule(sentence) else " ".join(sentence["tokens"])


def is_split_by_rule(sentence):
    """Whether `tokenize` makes the tokens of what was written."""
    return tokenize(sentence.get("raw") or "") == sentence["tokens"]


def _collect_samples(images, folder, max_len):
    """The images that have captions to learn from, by split, and counts of what is left out."""
    samples = {split: [] for split in SPLITS.values()}
    left_out = Counter()
    for image in images:
        worded = [s for s in image["sentences"] if any(s["tokens"])]
        captions = [s["tokens"] for s in worded if len(s["tokens"]) <= max_len]
        left_out["wordless captions"] += len(image["sentences"]) - len(worded)
        left_out["too long captions"] += len(worded) - len(captions)
        left_out["images without captions"] += not captions
        if captions:
            reference = {"filename": image["filename"], **reference_of(image)}
            if are_boxes(image.get("boxes")):  # of the demo; COCO's are of another form
                reference["boxes"] = image["boxes"]
            path = _image_path(folder, image)
            samples[SPLITS[image["split"]]].append(_Sample(path, captions, reference))
    return {split: items for split, items in samples.items() if items}, left_out


def _image_path(folder, image):
    """Where an entry's image is; names may have been written on Windows."""
    names = [image.get("filepath", ""), image["filename"]]
    path = folder.joinpath(*names)
    if "\\" in "".join(names) and not os.path.exists(path):
        path = folder.joinpath(*(name.replace("\\", "/") for name in names))
    return path


def _check_folder(samples, source):
    """Raises UserError where no image at all is there: one line, not one for each."""
    paths = [sample.path for items in samples.values() for sample in items]
    if not any(map(os.path.exists, paths)):
        try:
            check_readable(paths[0], f"the first is {paths[0]}")
        except UserError as error:
            raise UserError(
                f"none of the {counted(len(paths), 'image')} of {source} is there ({error}): check "
                "--image_folder"
            ) from error


def read_split(path, split, max_len):
    """(reference, captions) of each image of a split of Karpathy's JSON that has captions of
    `max_len` words or fewer, in its order: as the input files have them. Raises UserError."""
    samples, _ = _collect_samples(read_karpathy(path), Path(), max_len)
    return [(sample.reference, sample.captions) for sample in samples.get(split, [])]


@contextmanager
def _all_or_nothing(folder, base, splits):
    """Yields temporary paths by (kind, split) for the input files of `splits` and the WORDMAP,
    (WORDMAP, None). All take their places when the block succeeds, else none does."""
    keys = [*((kind, split) for split in splits for kind in _KINDS), ("WORDMAP", None)]
    paths = {key: input_path(folder, base, *key) for key in keys}
    make_folder(folder)
    with (
        sole_writer(paths["WORDMAP", None], "wait for it, or choose another --output_folder"),
        temporaries(paths.values(), f"to {folder}") as beside,
    ):
        yield dict(zip(paths, beside, strict=True))
        for temporary in beside:
            flush(temporary)
        # Only renames are left. The WORDMAP goes first and comes last, so that if they are cut
        # short none vouches for a mixture of old and new files.
        paths["WORDMAP", None].unlink(missing_ok=True)
        for split in set(SPLITS.values()).difference(splits):  # an older data set may have had it
            for kind in _KINDS:
                input_path(folder, base, kind, split).unlink(missing_ok=True)
        for temporary, path in zip(beside, paths.values(), strict=True):
            os.replace(temporary, path)


def _write_splits(temporary, samples, size, captions_per_image, workers):
    """Reads the images and writes those of each split to its HDF5 file, the path by (kind, split).
    The first that cannot be read are named on stderr. Returns the samples that are there."""
    paths = [sample.path for items in samples.values() for sample in items]
    pictures = read_images(paths, size, workers)
    with Complaints(partial(tqdm.write, file=sys.stderr)) as complaints:
        return {
            split: _write_images(
                temporary["IMAGES", split], items, pictures, size, captions_per_image, complaints
            )
            for split, items in samples.items()
        }


def _write_images(path, samples, pictures, size, captions_per_image, complaints):
    """Writes the next len(samples) of `pictures` to a new HDF5 file, without those that are error
    lines, which are `complaints`. Returns the samples whose picture is in the file."""
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
                complaints.add(picture)
            else:
                images[len(readable)], width, height = picture
                sample.reference |= {"width": width, "height": height}
                readable.append(sample)
        images.resize(len(readable), axis=0)
    return readable


def _write_captions(paths, split, samples, encoded, word_map):
    """Writes the JSON files of a split, at paths by (kind, split); counts for the summary."""
    captions, lengths = zip(*encoded, strict=True)
    _write_json(paths["CAPTIONS", split], captions)
    _write_json(paths["CAPLENS", split], lengths)
    _write_json(paths["REFERENCES", split], [sample.reference for sample in samples])
    return {
        "images": len(samples),
        "captions": len(captions),
        "unknown": _share_unknown(captions, lengths, word_map),
    }


def _unreadable(samples, readable, skip_bad_images):
    """The number of images that are left out. Raises UserError if that must not or cannot be."""
    total = sum(map(len, samples.values()))
    count = total - sum(map(len, readable.values()))
    if count and not skip_bad_images:
        raise UserError(
            f"{count} of {counted(total, 'image')} cannot be read (named above), so nothing was "
            "written: mend them or leave them out with --skip_bad_images"
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


MANY = 0.2  # share of <unk>, from which on a hint is given


def _print_summary(summary):
    for split in dict.fromkeys(SPLITS.values()):
        if counts := summary["splits"].get(split):
            print(
                f"{split}: {counted(counts['images'], 'image')}, "
                f"{counted(counts['captions'], 'caption')}, "
                f"{counts['unknown']:.2%} of their words <unk>"
            )
        else:
            print(f"{split}: no images, so no {split} files")
    print(f"vocabulary: {summary['vocabulary']} words, the {len(SPECIAL_WORDS)} special included")
    if summary["by_tokens"]:
        print(
            counted(
                summary["by_tokens"], "caption is scored by its", "captions are scored by their"
            )
            + " tokens: splitting the lower-cased text at blanks, without punctuation, does not "
            "give them"
        )
    if any(counts["unknown"] > MANY for counts in summary["splits"].values()):
        print(f"more than {MANY:.0%} of the words are <unk>: a lower --min_word_freq keeps more")
    one = {"images without captions": "image without captions"}  # the others lose an s
    left_out = summary["left_out"].items()
    left_out = [counted(n, one.get(what, what.removesuffix("s")), what) for what, n in left_out]
    print("left out: " + ", ".join(left_out))
