"""Split images and captions made into the files that training reads: HDF5, encoded captions, word
map."""

import json
import os
import random
import re
import sys
from collections import Counter
from functools import partial
from itertools import chain, islice, tee
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import formats
from captioned import SPLITS, Captions, has_words, is_split_by_rule, references_of, words_of
from groundwork.errors import UserError
from groundwork.files import check_readable, check_space
from groundwork.images import MAX_ASPECT, read_images
from groundwork.wording import Complaints, counted
from input_files import KINDS, all_or_nothing, base_name, new_part
from word_maps import Wanted, choose, describe, encode_caption
from word_rules import KARPATHY, hint, rule_of

# --------------------------------------------------------------------------------- input files

SMALLER = 8  # times, that JPEGs are than pixels, or more


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
    fit="squeeze",
    store="raw",
    shards=None,
    wanted=None,
):
    """Turns images and their captions, of any of the `formats`, into the files that training reads.

    Writes to `output_folder`, for each split that has images (TRAIN and VAL must, TEST may):
    IMAGES (`storage.ImageWriter`), CAPTIONS and CAPLENS (captions_per_image entries per
    image), REFERENCES (one entry per image); and one WORDMAP. They appear all together at the end
    or, after an error, not at all; a WORDMAP marks a complete data set. A TEST without any captions
    has IMAGES and REFERENCES alone. However many images there are, it takes no more memory.

    `dataset` names them. `captions`, `image_folder` and `reading` are as `formats.read` takes them.
    `wanted` is which words there are to be, a `word_maps.Wanted`, beside that they are frequent.
    `workers` threads read the images, None: all cores. `fit` is of `groundwork.options.FITS`,
    `store` raw or jpeg, `shards` the number of files that the TRAIN split is cut into. Prints a
    summary and returns it as a dict. Raises UserError if the captions or the folder are unusable,
    if an image is (the first are named on stderr; skip_bad_images leaves them out), or if a file
    cannot be written.
    """
    check_name(dataset)
    data = formats.read(captions, image_folder, reading, seed)
    print("\n".join(data.notes))
    rule, word_map, summary = _choose_words(data, min_word_freq, wanted or Wanted())
    samples = Samples(data.images, max_len, rule)
    samples.check(data.source, shards)
    base, rng = base_name(dataset, captions_per_image, min_word_freq), random.Random(seed)

    def encode(captions):
        chosen = sample_captions(captions, captions_per_image, rng) if captions else []
        return [encode_caption(words, word_map, max_len) for words in chosen]

    cut = {"TRAIN": shards} if shards else {}
    with all_or_nothing(output_folder, base, samples.kinds, cut) as (parts, path):
        size = samples.counts.total() * 3 * image_size**2 // (SMALLER if store == "jpeg" else 1)
        check_space(output_folder, size, "the images", "another --output_folder")
        pictures = partial(read_images, size=image_size, workers=workers, fit=fit)
        form = store, image_size, fit, captions_per_image
        written = _write_splits(parts, samples, pictures, encode, form)
        unreadable = _unreadable(samples, written, skip_bad_images)
        path.write_text(json.dumps(word_map), encoding="utf-8")
    summary |= _summarise(data, samples, written, unreadable, word_map["<unk>"]) | {"base": base}
    _print_summary(summary, word_map)
    return summary


def _choose_words(data, min_word_freq, wanted):
    """The rule and the word map of a `formats.DataSet`, and what the summary has of them."""
    rule, word_map, counts = choose(Captions(data.images), min_word_freq, wanted, data.source)
    summary = {"vocabulary": len(word_map), "keeps_more": wanted.keeps_more}
    return rule, word_map, summary | {"hint": hint(rule, counts)}


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


class Sample(NamedTuple):
    """An image as the input files have it."""

    source: object  # as `groundwork.images.open_image` takes it
    captions: list[list[str]]  # words; wordless and too long captions left out
    reference: dict  # its entry in the REFERENCES file, to which reading adds width and height


class Samples:
    """The images of a data set that have captions to learn from, by split, and counts of what is
    left out. A TEST whose captions are not published, none of any image, is kept: to be captioned.

    Args:
        images: a `gathered.Gathered`.
        max_len: words of a caption, at most.
        rule: by which captions are split, a `word_rules.Rule`.
    """

    def __init__(self, images, max_len, rule):
        self.images, self.max_len, self.rule = images, max_len, rule
        found, bare, self.left_out = Counter(), 0, Counter()
        for image in images:
            _, captions, _ = self._sample(image)
            wordless = sum(not has_words(caption, rule) for caption in image.captions)
            self.left_out["wordless captions"] += wordless
            self.left_out["too long captions"] += len(image.captions) - wordless - len(captions)
            self.left_out["images without captions"] += not captions
            found[image.split] += bool(captions)
            bare += image.split == "TEST" and not image.captions
        self.bare = {"TEST"} if bare and not found["TEST"] else set()
        if self.bare:
            found["TEST"] = bare
            self.left_out["images without captions"] -= bare
        self.counts = Counter({split: found[split] for split in SPLITS if found[split]})

    @property
    def kinds(self):
        """Split -> the kinds of its files."""
        return {
            split: [kind for kind in KINDS if not (split in self.bare and kind.startswith("CAP"))]
            for split in self.counts
        }

    def of(self, split):
        """Yields the `Sample`s of a split, in order."""
        for image in self.images.of_split(split):
            sample = self._sample(image)
            if not image.captions if split in self.bare else sample.captions:
                yield sample

    def _sample(self, image):
        rule = self.rule
        captions = [words_of(c, rule) for c in image.captions if has_words(c, rule)]
        captions = [words for words in captions if len(words) <= self.max_len]
        reference = {"filename": image.name, "id": image.id, "captions": references_of(image, rule)}
        if are_boxes(image.boxes):  # of the demo; COCO's are of another form
            reference["boxes"] = image.boxes
        return Sample(image.source, captions, reference)

    def _why(self):
        """What has been left out, for people, where anything was."""
        parts = []
        if long := self.left_out["too long captions"]:
            are = counted(long, "caption has", "captions have")
            parts.append(f"{are} more words than --max_len {self.max_len}")
        if wordless := self.left_out["wordless captions"]:
            are = counted(wordless, "caption has", "captions have")
            parts.append(f"{are} no words by the rule {self.rule.name}")
        return f": {' and '.join(parts)}" if parts else ""

    def check(self, source, shards):
        """Raises UserError where training or validation have no image, or fewer than there are to
        be shards, or where no image at all is there: one line, not one for each."""
        for split in ("TRAIN", "VAL"):
            if split not in self.counts:
                raise UserError(
                    f"{source} has no {split} image with captions to learn from{self._why()}"
                )
        if shards is not None and shards > self.counts["TRAIN"]:
            few = counted(self.counts["TRAIN"], "training image")
            raise UserError(f"--shards {shards}: there are {few}, give fewer")
        paths = (sample.source for split in self.counts for sample in self.of(split))
        first = next(paths)
        if any(not isinstance(p, Path) or os.path.exists(p) for p in chain([first], paths)):
            return
        try:
            check_readable(first, f"the first is {first}")
        except UserError as error:
            total = counted(self.counts.total(), "image")
            raise UserError(
                f"none of the {total} of {source} is there ({error}): check --image_folder"
            ) from error


def read_split(path, split, max_len, rule=KARPATHY):
    """(reference, captions) of each image of a split of Karpathy's JSON that has captions of
    `max_len` words or fewer, in its order: as the input files have them. Raises UserError."""
    samples = Samples(formats.load(path, formats.Options("karpathy")), max_len, rule)
    return [(reference, captions) for _, captions, reference in samples.of(split)]


def _write_splits(parts, samples, pictures, encode, form):
    """Reads the images and writes the files of each split, or of its shards. The images that cannot
    be read are left out, and the first named on stderr.

    Args:
        parts: from `all_or_nothing`.
        pictures: what `read_images` makes of the images' sources.
        encode: what `encode_caption` makes of those of an image's captions that are chosen.
        form: as `new_part` takes it.

    Returns:
        split -> a Counter of images, captions, words, and of the words by their indices.
    """
    own, ahead = tee(sample for split in samples.counts for sample in samples.of(split))
    pictures = pictures((s.source for s in ahead), total=samples.counts.total())
    pairs, written = zip(own, pictures, strict=True), {}
    with Complaints(partial(tqdm.write, file=sys.stderr)) as complaints:
        for split, total in samples.counts.items():
            written[split], n = Counter(images=0), len(parts[split])
            for i, paths in enumerate(parts[split]):
                count = total * (i + 1) // n - total * i // n
                with new_part(paths, count, form) as add:
                    found = _write_part(add, islice(pairs, count), encode, complaints)
                if n > 1 and not found["images"]:
                    raise UserError(
                        f"none of the {counted(count, 'image')} of shard {i} can be read (named "
                        "above): mend them, or give fewer --shards"
                    )
                written[split].update(found)
        next(pairs, None)  # the bar is done
    return written


def _write_part(add, pairs, encode, complaints):
    """Adds those of (sample, picture) whose picture is no line that says why there is none, and
    counts as `_write_splits` does."""
    found = Counter(images=0)
    for sample, picture in pairs:
        if isinstance(picture, str):
            complaints.add(picture)
            continue
        square, width, height = picture
        encoded = encode(sample.captions)
        add(square, sample.reference | {"width": width, "height": height}, encoded)
        found.update(images=1, captions=len(encoded))
        for caption, length in encoded:
            found.update(caption[1 : length - 1])
    return found


def sample_captions(captions, count, rng):
    """`count` of an image's captions: all of them and repeats where it has too few, otherwise
    a sample without repetition."""
    if len(captions) <= count:
        return captions + rng.choices(captions, k=count - len(captions))
    return rng.sample(captions, count)


def _unreadable(samples, written, skip_bad_images):
    """The number of images that are left out. Raises UserError if that must not or cannot be."""
    total = samples.counts.total()
    count = total - sum(found["images"] for found in written.values())
    if count and not skip_bad_images:
        raise UserError(
            f"{count} of {counted(total, 'image')} cannot be read (named above), so nothing was "
            "written: mend them or leave them out with --skip_bad_images"
        )
    for split, found in written.items():
        if not found["images"]:
            raise UserError(f"no image of the {split} split can be read (named above)")
    return count


def _summarise(data, samples, written, unreadable, unknown):
    """What the summary has of a `formats.DataSet` and of what `_write_splits` has counted.

    Args:
        unreadable: images, left out.
        unknown: index of <unk>.
    """
    left_out = samples.left_out.copy()  # with its zeros, which + would leave out
    left_out.update(data.left_out)
    people, rule = Captions(data.images), samples.rule
    return {
        "left_out": {**left_out, "unreadable images": unreadable},
        "splits": {split: _numbers(found, unknown) for split, found in written.items()},
        "by_tokens": sum(bool(c.raw) and not is_split_by_rule(c, rule) for c in people),
    }


def _numbers(found, unknown):
    """What the summary has of what `_write_splits` has counted: unknown is the share of <unk> among
    the captions' words, <start> and <end> not counted."""
    words = sum(count for word, count in found.items() if isinstance(word, int))
    return {
        "images": found["images"],
        "captions": found["captions"],
        "unknown": found[unknown] / max(1, words),
    }


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
    if summary["hint"]:
        print(summary["hint"])
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
