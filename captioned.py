"""What every reader of a data set gives, images with people's captions, and what it checks."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from groundwork.errors import UserError
from groundwork.wording import MOST, counted
from word_rules import normalised, tokenize

SPLITS = ("TRAIN", "VAL", "TEST")

SPLIT_NAMES = {
    "train": "TRAIN",
    "restval": "TRAIN",
    "val": "VAL",
    "validation": "VAL",
    "dev": "VAL",
    "test": "TEST",
}

NUMBER = re.compile(r"\s*[-+]?\d[\d.,]*\s*")  # of another column, in place of a caption

MAX_WORDS, MAX_LENGTH = 1000, 20_000  # of a caption: words between blanks, characters


class Caption(NamedTuple):
    """A person's caption: as written, as words, or both."""

    raw: str | None
    tokens: list[str] | None = None  # None: a rule of `word_rules` makes them

    @property
    def text(self):
        """As written, or else its tokens."""
        has_words = self.tokens is None or tokenize(self.raw or "")
        return self.raw if has_words else " ".join(self.tokens)


def words_of(caption, rule):
    """The words of a `Caption` by a `word_rules.Rule`."""
    if rule.takes_tokens and caption.tokens is not None:
        return list(map(normalised, caption.tokens))
    return rule.split(caption.text)


def has_words(caption, rule):
    """Whether there is more to a `Caption` than punctuation."""
    by_hand = caption.tokens is not None
    return any(words_of(caption, rule)) and (by_hand or bool(tokenize(caption.raw)))


def is_split_by_rule(caption, rule):
    """Whether a rule makes the words of what was written."""
    return rule.split(caption.raw or "") == words_of(caption, rule)


def text_of(caption, rule):
    """A caption as written, or its tokens, where the rule does not split the one into the other:
    words are to be compared with words."""
    return caption.raw if is_split_by_rule(caption, rule) else " ".join(caption.tokens)


def references_of(image, rule):
    """What a `CaptionedImage` is scored by: all of its captions with words, as texts."""
    return [text_of(caption, rule) for caption in image.captions if has_words(caption, rule)]


@dataclass(slots=True)
class CaptionedImage:
    """An image of a data set."""

    name: str  # of its file, as the data set has it
    source: object  # what `groundwork.images.open_image` takes: a path, or a part of a larger file
    captions: list[Caption]
    split: str | None  # TRAIN, VAL, TEST; None: the data do not tell
    where: str  # it stands in its file, for messages
    id: int | str | float | None = None  # as the data set has it
    boxes: object = None  # where the objects are that words name; of the demo


@dataclass(frozen=True)
class Captions:
    """All captions of images, to be gone through as often as one likes."""

    images: Iterable[CaptionedImage]

    def __iter__(self):
        return (caption for image in self.images for caption in image.captions)


@dataclass
class Reading:
    """What a reader is told beside its files, and what it tells beside its images."""

    folder: Path | None = None  # of the images; None: they are not going to be opened
    image_column: str = "image"
    caption_column: str = "caption"
    split_column: str | None = None  # None: "split", where there is one
    file_splits: dict[Path, str] = field(default_factory=dict)  # by the files' names
    left_out: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)  # lines for people


# ------------------------------------------------------------------------------------- faults


class Fault(Exception):
    """What an entry has that keeps it from being used: "no caption"."""


class Faults:
    """Faults of a file's entries, which the end of the block raises as one UserError: the first
    ones with their places, and how many more there are.

    Args:
        path: of the file.
        what: is said of it.
    """

    def __init__(self, path, what="cannot be used"):
        self.path, self.what, self.lines, self.count = path, what, [], 0

    def add(self, where, fault):
        self.count += 1
        if self.count <= MOST:
            self.lines.append(f"{where} has {fault}")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.count and kind is None:
            more = f"; and {self.count - MOST} more" if self.count > MOST else ""
            raise UserError(f"{self.path} {self.what}: {'; '.join(self.lines)}{more}")


def written(value):
    """A caption as written. Raises Fault unless it is text of a caption's length."""
    if value is None or value == "":
        raise Fault("no caption")
    if not isinstance(value, str):
        raise Fault(f"a caption that is no text, {value!r:.40}")
    if NUMBER.fullmatch(value):
        raise Fault(f"a caption that is a number, {value.strip():.40}")
    check_length(value.split(), value)
    if re.search("[\ud800-\udfff]", value):
        raise Fault("a caption with half a character")
    return value


def check_length(words, text):
    """Raises Fault for a caption that no person wrote of a picture."""
    if len(words) > MAX_WORDS or len(text) > MAX_LENGTH:
        raise Fault(
            f"a caption of {counted(len(words), 'word')}, {len(text)} characters: {MAX_WORDS} and "
            f"{MAX_LENGTH} are the most"
        )


def captions_of(value):
    """Captions, of a text or a list of texts. Raises Fault."""
    return [Caption(written(text)) for text in (value if isinstance(value, list) else [value])]


def split_of(value):
    """TRAIN, VAL or TEST of a data set's word for it. Raises Fault."""
    split = SPLIT_NAMES.get(value.strip().lower()) if isinstance(value, str) else None
    if split is None:
        raise Fault(f"an unknown split {value!r:.40}: known are {', '.join(SPLIT_NAMES)}")
    return split


def split_in_name(path):
    """TRAIN, VAL or TEST where a file's name tells one, or else its folder's; None otherwise."""
    for name in (path.name, path.parent.name):
        words = re.findall(r"(?<![a-z])(train|val|validation|dev|test)(?:ing)?(?![a-z])",
                           re.sub("[Ii]mages", "", name).lower())  # fmt: skip
        found = {SPLIT_NAMES[word] for word in words}
        if len(found) == 1:
            return found.pop()
    return None


def splits_in_names(files):
    """File -> split, training first, where each file's name tells one, and not all the same."""
    splits = {path: split_in_name(Path(path)) for path in files}
    if None in splits.values() or len(set(splits.values())) < 2:
        return {}
    return dict(sorted(splits.items(), key=lambda item: SPLITS.index(item[1])))


def place_in(folder, *names):
    """Path of an image that a data set names, which may have been written on Windows. Raises Fault
    where it is outside its folder."""
    if not all(isinstance(name, str) for name in names) or not names[-1].strip():
        raise Fault("no name of an image")
    path = os.path.normpath(os.path.join(folder or "", *names))
    if "\\" in path and not os.path.exists(path):
        names = (name.replace("\\", "/") for name in names)
        path = os.path.normpath(os.path.join(folder or "", *names))
    if folder is not None:
        inside = os.path.join(os.path.abspath(folder), "")
        if not os.path.abspath(path).startswith(inside):
            raise Fault(f"a path outside the folder {folder}, {path}")
    return Path(path)


def said(split):
    """A split as people name it."""
    return "none" if split is None else split.lower()
