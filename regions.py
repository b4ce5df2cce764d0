"""Where in a picture stands what a word names: boxes or masks, from a file or a data set's own.

They measure the attention, and never train it.
"""

import re
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import NamedTuple

import numpy as np

import demo
from groundwork.errors import UserError
from groundwork.files import read_json
from groundwork.images import frame
from groundwork.wording import counted


class Region(NamedTuple):
    """A part of a picture, as rectangles of a grid of uneven rows and columns.

    Coordinates are fractions of the picture's height and width.
    """

    rows: np.ndarray  # (R + 1,) where rows begin and end, increasing from 0 to 1
    columns: np.ndarray  # (C + 1,) likewise
    covered: np.ndarray  # (R, C) bool

    @classmethod
    def of_boxes(cls, boxes):
        """The union of boxes [x0, y0, x1, y1], of which the picture's own part counts."""
        x0, y0, x1, y1 = np.asarray(boxes, np.float64).clip(0, 1).T
        rows, columns = (np.unique([0, 1, *low, *high]) for low, high in ((y0, y1), (x0, x1)))
        covered = np.zeros((len(rows) - 1, len(columns) - 1), bool)
        edges = rows.searchsorted([y0, y1]), columns.searchsorted([x0, x1])
        for top, bottom, left, right in zip(*edges[0], *edges[1], strict=True):
            covered[top:bottom, left:right] = True
        return cls(rows, columns, covered)

    @classmethod
    def of_mask(cls, mask):
        """The ones of a mask (R, C) of even rows and columns."""
        mask = np.asarray(mask, bool)
        return cls(*(np.linspace(0, 1, count + 1) for count in mask.shape), mask)

    def framed(self, reference):
        """The part of it that a square shows of the picture, by its entry of the REFERENCES, in
        fractions of the square."""
        fit = reference.get("fit", "squeeze")
        if fit == "squeeze" or "width" not in reference:
            return self
        left, top, right, bottom = frame(reference["width"], reference["height"], fit)
        rows, columns = self.rows - top, self.columns - left
        rows, columns = rows / (bottom - top), columns / (right - left)
        covered = np.pad(self.covered, 1)  # the ground
        rows, columns = (np.array([0, *edges.clip(0, 1), 1]) for edges in (rows, columns))
        seen = np.diff(rows) > 0, np.diff(columns) > 0
        edges = (own[:-1][part] for own, part in zip((rows, columns), seen, strict=True))
        return Region(*(np.append(own, 1.0) for own in edges), covered[np.ix_(*seen)])

    def shares(self, size):
        """The share of each place of a size × size grid that is in the region, row by row."""
        down, across = (_overlaps(edges, size) for edges in (self.rows, self.columns))
        return (down @ self.covered @ across.T).ravel()

    def contains(self, x, y):
        """Whether a point is in the region; its edges are."""
        rows = (self.rows[:-1] <= y) & (y <= self.rows[1:])
        columns = (self.columns[:-1] <= x) & (x <= self.columns[1:])
        return bool(self.covered[np.ix_(rows, columns)].any())

    @property
    def area(self):
        """Share of the picture."""
        return float(self.shares(1)[0])


def _overlaps(edges, size):
    """(size, n): how much of each of `size` even parts each of n uneven parts takes."""
    places = np.arange(size + 1) / size
    low = np.maximum(places[:-1, None], edges[:-1])
    high = np.minimum(places[1:, None], edges[1:])
    return (high - low).clip(0) * size


class Regions(NamedTuple):
    """What is known of the pictures of a split."""

    of_images: list  # for each image word -> Region, or None where nothing is known
    names: frozenset | None = None  # words that count everywhere, as the regions are complete
    about: str = "on it"

    @property
    def known(self):
        """Images of which something is known."""
        return sum(own is not None for own in self.of_images)


def find(references, path=None, words=()):
    """`Regions` of a file, or of the data set itself; None where there are none.

    Args:
        references: of the images.
        path, words: as `read_regions` takes them.

    Raises:
        UserError: the file is wrong, or knows none of the images.
    """
    if path is not None:
        return of_split(references, read_regions(path, words), path)
    return complete(references, demo.SHAPES)


def complete(references, names):
    """`Regions` of a data set that has all its objects' boxes, else None.

    Args:
        references: of the images, with `boxes`, word -> [x0, y0, x1, y1].
        names: the objects' words; one that a picture has no box for is not in it.
    """
    boxes = [reference.get("boxes") for reference in references]
    if not boxes or not all(boxes):
        return None
    own = [
        _framed({word: Region.of_boxes([box]) for word, box in found.items()}, reference)
        for found, reference in zip(boxes, references, strict=True)
    ]
    return Regions(own, frozenset(names), "in the object's box")


def of_split(references, found, path):
    """`Regions` of a file, for the images of a split.

    Args:
        references: of the images, with `filename`.
        found: what `read_regions` gives, of the file at `path`.

    Raises:
        UserError: it knows none of the images.
    """
    own = [_framed(found.get(reference["filename"]), reference) for reference in references]
    regions = Regions(own, about=f"in its region of {path}")
    if not regions.known:
        raise UserError(
            f"{path} has regions of {counted(len(found), 'image')}, {next(iter(found))} the first, "
            f"none of which is in this split, whose first is {references[0]['filename']}: names "
            "are those of the data set's JSON, without folders"
        )
    return regions


def _framed(found, reference):
    """An image's regions, word -> `Region`, as a square shows them; None where none is known."""
    if found is None:
        return None
    framed = {word: region.framed(reference) for word, region in found.items()}
    return {word: region for word, region in framed.items() if region.covered.any()}


# --------------------------------------------------------------------------------------- files


def read_regions(path, words=()):
    """File name of an image -> word -> `Region`.

    Args:
        path: JSON of image -> word -> region, or of image -> region, which then is that of all
            `words`; a region is a box [x0, y0, x1, y1] or a list of them, in fractions of width
            and height, or a mask, a list of rows of "0" and "1". Or the folder of Flickr30k
            Entities (Plummer et al., 2015), with its Annotations and Sentences.
        words: the words that a region without words is for.

    Raises:
        UserError: the file holds something else, or a region without words has none.
    """
    path = Path(path)
    if path.is_dir():
        return _read_entities(path)
    contents = read_json(path)
    if not isinstance(contents, dict) or not contents:
        raise UserError(f"{path} holds no regions: a JSON object, image -> word -> boxes or mask")
    named = [isinstance(entry, dict) for entry in contents.values()]
    if words and any(named):
        raise UserError(f"{path} has words of its own: leave --region_words out")
    if not words and not all(named):
        image = list(contents)[named.index(False)]
        raise UserError(
            f"{path} has a region without words for {image}: name the words that it is for with "
            "--region_words"
        )
    return {image: _regions_of(path, image, entry, words) for image, entry in contents.items()}


def _regions_of(path, image, entry, words):
    """Word -> `Region` of an image; a mask without a one is no region."""
    named = entry if isinstance(entry, dict) else dict.fromkeys(words, entry)
    found = {}
    for word, values in named.items():
        if len(word.split()) != 1:
            raise UserError(f"{path}: {word!r} of {image} is not one word")
        if word.lower() in found:
            raise UserError(f"{path} has {word.lower()!r} of {image} twice: give all boxes at once")
        try:
            found[word.lower()] = _region(values)
        except ValueError as error:
            raise UserError(
                f"{path}: the region of {image} is neither boxes [x0, y0, x1, y1] nor a mask, rows "
                f"of 0 and 1: {error}"
            ) from error
    return {word: region for word, region in found.items() if region.covered.any()}


def _region(values):
    """The `Region` of a box, boxes, or a mask. Raises ValueError."""
    if not isinstance(values, list) or not values:
        raise ValueError("it is no list, or empty")
    if all(isinstance(row, str) for row in values):
        if set("".join(values)) - set("01") or len(set(map(len, values))) != 1 or not values[0]:
            raise ValueError("its rows are empty, differ in length or are not of 0 and 1")
        return Region.of_mask([[c == "1" for c in row] for row in values])
    boxes = values if isinstance(values[0], list) else [values]
    for box in boxes:
        if (
            not isinstance(box, list)
            or len(box) != 4
            or any(type(x) not in (int, float) for x in box)
        ):
            raise ValueError("a box has four numbers")
        if not all(0 <= x <= 1 for x in box):  # nor is NaN
            raise ValueError("a box's numbers are fractions, from 0 to 1")
        if box[0] >= box[2] or box[1] >= box[3]:
            raise ValueError("a box's second corner is right of its first and below it")
    return Region.of_boxes(boxes)


PHRASE = re.compile(r"\[/EN#(\d+)\S* ([^\]]*)\]")  # entity's number, words


def _read_entities(folder):
    """Flickr30k Entities: the boxes of a phrase are those of its last word, «a young man»."""
    found = {}
    for sentences in sorted(folder.glob("Sentences/*.txt")):
        boxes = _boxes_of_entities(folder / "Annotations" / f"{sentences.stem}.xml")
        try:
            phrases = PHRASE.findall(sentences.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {sentences}: {error}") from error
        words = {}
        for entity, phrase in phrases:
            for word in phrase.split()[-1:]:
                words.setdefault(word.lower(), set()).update(boxes.get(entity, ()))
        named = {word: Region.of_boxes(sorted(own)) for word, own in words.items() if own}
        if named:
            found[f"{sentences.stem}.jpg"] = named
    if not found:
        raise UserError(
            f"{folder} has no Sentences/*.txt with boxes, as Flickr30k Entities has them"
        )
    return found


def _boxes_of_entities(path):
    """Entity's number -> its boxes (x0, y0, x1, y1), fractions of width and height."""
    try:
        root = xml.parse(path).getroot()
        width, height = (float(root.find(f"size/{side}").text) for side in ("width", "height"))
        found = {}
        for thing in root.iter("object"):
            if (box := thing.find("bndbox")) is not None:
                x0, y0, x1, y1 = (float(box.find(k).text) for k in ("xmin", "ymin", "xmax", "ymax"))
                if not (
                    x0 < x1 <= 2 * width and y0 < y1 <= 2 * height and x0 < width and y0 < height
                ):
                    raise ValueError(
                        f"its size is {width:g}×{height:g}, a box {x0}, {y0}, {x1}, {y1}"
                    )
                for name in thing.iter("name"):
                    corners = x0 / width, y0 / height, x1 / width, y1 / height
                    found.setdefault(name.text, []).append(corners)
        return found
    except (OSError, xml.ParseError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no annotation of Flickr30k Entities: {error}") from error
