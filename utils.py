"""Split images and captions made into the files that training reads: HDF5, encoded captions, word
map."""

import json
import os
import random
import re
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path

from tqdm import tqdm

import formats
from captioned import SPLITS, has_words, is_split_by_rule, references_of, words_of
from groundwork.errors import UserError
from groundwork.files import (
    check_readable,
    check_space,
    flush,
    make_folder,
    sole_writer,
    temporaries,
)
from groundwork.hdf5 import new_hdf5
from groundwork.images import MAX_ASPECT, read_images
from groundwork.wording import Complaints, counted
from word_maps import Wanted, choose, describe, encode_caption
from word_rules import KARPATHY, rule_of

# --------------------------------------------------------------------------------- input files

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

    source: object  # as `groundwork.images.open_image` takes it
    captions: list[list[str]]  # words; wordless and too long captions left out
    reference: dict  # its entry in the REFERENCES file, to which reading adds width and height


def create_input_files(
    dataset,
    captions,
    image_folder=None,
    captions_per_image=5,
    min_word_freq=5,
    max_len=50,
    output_folder="data",
    image_size=256,
    workers=None,
    seed=0,
    skip_bad_images=False,
    reading=None,
    wanted=None,
):
    """Turns images and their captions, of any of the `formats`, into the files that training reads.

    Writes to `output_folder`, for each split that has images (TRAIN and VAL must, TEST may):
    IMAGES (uint8 (I, 3, image_size, image_size)), CAPTIONS and CAPLENS (captions_per_image
    entries per image), REFERENCES (one entry per image); and one WORDMAP. They appear all
    together at the end or, after an error, not at all; a WORDMAP marks a complete data set. A TEST
    without any captions has IMAGES and REFERENCES alone.

    `dataset` names them. `captions`, `image_folder` and `reading` are as `formats.read` takes them.
    `wanted` is which words there are to be, a `word_maps.Wanted`, beside that they are frequent.
    `workers` threads read the images: None takes all cores.
    Prints a summary and returns it as a dict. Raises UserError if the captions or the folder are
    unusable, if an image is (the first are named on stderr; skip_bad_images leaves them out),
    or if a file cannot be written.
    """
    check_name(dataset)
    data = formats.read(captions, image_folder, reading, seed)
    print("\n".join(data.notes))
    captions = [caption for image in data.images for caption in image.captions]
    rule, word_map = choose(captions, min_word_freq, wanted or Wanted(), data.source)
    samples, left_out = _collect_samples(data.images, max_len, rule)
    left_out.update(data.left_out)
    for split in ("TRAIN", "VAL"):
        if split not in samples:
            raise UserError(f"{data.source} has no {split} image with captions to learn from")
    output_folder, base = Path(output_folder), base_name(dataset, captions_per_image, min_word_freq)
    summary = {"base": base, "splits": {}, "vocabulary": len(word_map), "left_out": dict(left_out)}
    summary["keeps_more"] = (wanted or Wanted()).keeps_more
    summary["by_tokens"] = sum(bool(c.raw) and not is_split_by_rule(c, rule) for c in captions)
    _check_folder(samples, data.source)
    with _all_or_nothing(output_folder, base, samples) as temporary:
        size = sum(map(len, samples.values())) * 3 * image_size**2
        check_space(output_folder, size, "the images", "another --output_folder")
        readable = _write_splits(temporary, samples, image_size, captions_per_image, workers)
        summary["left_out"]["unreadable images"] = _unreadable(samples, readable, skip_bad_images)
        rng = random.Random(seed)
        for split, items in readable.items():
            summary["splits"][split] = _write_captions(
                temporary, split, items, captions_per_image, word_map, max_len, rng
            )
        _write_json(temporary["WORDMAP", None], word_map)
    _print_summary(summary, word_map)
    return summary


def check_name(dataset):
    """Raises UserError for a data set's name that cannot be a part of files' names."""
    if not re.fullmatch(r"\w[\w.-]*", dataset) or len(dataset.encode()) > 100:
        raise UserError(
            f"--dataset {dataset}: give a name of letters, digits, dots, dashes and underscores, "
            "100 bytes at most, that begins with a letter or digit"
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


def _collect_samples(images, max_len, rule):
    """The images that have captions to learn from, by split, and counts of what is left out."""
    samples, bare = {split: [] for split in SPLITS}, []
    left_out = Counter()
    for image in images:
        worded = [words_of(c, rule) for c in image.captions if has_words(c, rule)]
        captions = [words for words in worded if len(words) <= max_len]
        left_out["wordless captions"] += len(image.captions) - len(worded)
        left_out["too long captions"] += len(worded) - len(captions)
        left_out["images without captions"] += not captions
        reference = {"filename": image.name, "id": image.id, "captions": references_of(image, rule)}
        if are_boxes(image.boxes):  # of the demo; COCO's are of another form
            reference["boxes"] = image.boxes
        sample = _Sample(image.source, captions, reference)
        if captions:
            samples[image.split].append(sample)
        elif image.split == "TEST" and not image.captions:
            bare.append(sample)
    if bare and not samples["TEST"]:  # a test whose captions are not published: to be captioned
        samples["TEST"] = bare
        left_out["images without captions"] -= len(bare)
    return {split: items for split, items in samples.items() if items}, left_out


def _check_folder(samples, source):
    """Raises UserError where no image at all is there: one line, not one for each."""
    paths = [sample.source for items in samples.values() for sample in items]
    if all(isinstance(path, Path) and not os.path.exists(path) for path in paths):
        try:
            check_readable(paths[0], f"the first is {paths[0]}")
        except UserError as error:
            raise UserError(
                f"none of the {counted(len(paths), 'image')} of {source} is there ({error}): check "
                "--image_folder"
            ) from error


def read_split(path, split, max_len, rule=KARPATHY):
    """(reference, captions) of each image of a split of Karpathy's JSON that has captions of
    `max_len` words or fewer, in its order: as the input files have them. Raises UserError."""
    samples, _ = _collect_samples(formats.load(path, formats.Options("karpathy")), max_len, rule)
    return [(sample.reference, sample.captions) for sample in samples.get(split, [])]


@contextmanager
def _all_or_nothing(folder, base, samples):
    """Yields temporary paths by (kind, split) for the input files of `samples` and the WORDMAP,
    (WORDMAP, None). All take their places when the block succeeds, else none does."""
    keys = [(kind, split) for split in samples for kind in kinds_of(samples[split])]
    paths = {key: input_path(folder, base, *key) for key in [*keys, ("WORDMAP", None)]}
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
        for kind, split in set(product(_KINDS, SPLITS)).difference(keys):  # an older data set's
            input_path(folder, base, kind, split).unlink(missing_ok=True)
        for temporary, path in zip(beside, paths.values(), strict=True):
            os.replace(temporary, path)


def _write_splits(temporary, samples, size, captions_per_image, workers):
    """Reads the images and writes those of each split to its HDF5 file, the path by (kind, split).
    The first that cannot be read are named on stderr. Returns the samples that are there."""
    sources = [sample.source for items in samples.values() for sample in items]
    pictures = read_images(sources, size, workers)
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


def kinds_of(samples):
    """The kinds of input files of a split, by whether its images have captions."""
    return [kind for kind in _KINDS if samples[0].captions or not kind.startswith("CAP")]


def sample_captions(captions, count, rng):
    """`count` of an image's captions: all of them and repeats where it has too few, otherwise
    a sample without repetition."""
    if len(captions) <= count:
        return captions + rng.choices(captions, k=count - len(captions))
    return rng.sample(captions, count)


def _write_captions(paths, split, samples, per_image, word_map, max_len, rng):
    """Writes the JSON files of a split, at paths by (kind, split); counts for the summary."""
    chosen = [sample_captions(s.captions, per_image, rng) for s in samples if s.captions]
    encoded = [encode_caption(words, word_map, max_len) for own in chosen for words in own]
    captions, lengths = [caption for caption, _ in encoded], [length for _, length in encoded]
    contents = {"CAPTIONS": captions, "CAPLENS": lengths}
    contents["REFERENCES"] = [sample.reference for sample in samples]
    for kind in kinds_of(samples)[1:]:
        _write_json(paths[kind, split], contents[kind])
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
    return unknown / max(1, sum(lengths) - 2 * len(lengths))


def _write_json(path, contents):
    path.write_text(json.dumps(contents), encoding="utf-8")


MANY = 0.2  # share of <unk>, from which on a hint is given


def _print_summary(summary, word_map):
    for split in SPLITS:
        counts = summary["splits"].get(split)
        if counts and not counts["captions"]:
            print(
                f"{split}: {counted(counts['images'], 'image')} without captions, for results alone"
            )
        elif counts:
            print(
                f"{split}: {counted(counts['images'], 'image')}, "
                f"{counted(counts['captions'], 'caption')}, "
                f"{counts['unknown']:.2%} of their words <unk>"
            )
        else:
            print(f"{split}: no images, so no {split} files")
    print(describe(word_map))
    if summary["by_tokens"]:
        print(
            counted(
                summary["by_tokens"], "caption is scored by its", "captions are scored by their"
            )
            + f" tokens: splitting the text into {rule_of(word_map).about} does not give them"
        )
    if any(counts["unknown"] > MANY for counts in summary["splits"].values()):
        print(f"more than {MANY:.0%} of the words are <unk>: {summary['keeps_more']}")
    one = {
        what: re.sub(r"(image|caption|text)s\b", r"\1", what, count=1)
        for what in summary["left_out"]
    }
    left_out = [counted(n, one[what], what) for what, n in summary["left_out"].items()]
    print("left out: " + ", ".join(left_out))
