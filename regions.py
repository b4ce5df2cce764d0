"""Where in a picture stands what a word names: boxes or masks, from a file or a data set's own.

They measure the attention, and never train it.
"""

import re
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import NamedTuple

import numpy as np

from groundwork.errors import UserError
from groundwork.files import read_json
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
        y, x = ((edges[1:] + edges[:-1]) / 2 for edges in (rows, columns))
        down = (y0 < y[:, None]) & (y[:, None] < y1)  # (R, boxes)
        across = (x0 < x[:, None]) & (x[:, None] < x1)
        return cls(rows, columns, (down[:, None] & across).any(axis=2))

    @classmethod
    def of_mask(cls, mask):
        """The ones of a mask (R, C) of even rows and columns."""
        mask = np.asarray(mask, bool)
        return cls(*(np.linspace(0, 1, count + 1) for count in mask.shape), mask)

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
    about: str = "in the region of what it names"

    @property
    def known(self):
        """Images of which something is known."""
        return sum(own is not None for own in self.of_images)


def complete(references, names):
    """`Regions` of a data set that has all its objects' boxes, else None.

    Args:
        references: of the images, with `boxes`, word -> [x0, y0, x1, y1].
        names: the objects' words; one that a picture has no box for is not in it.
    """
    boxes = [reference.get("boxes") for reference in references]
    if not boxes or not all(boxes):
        return None
    own = [{word: Region.of_boxes([box]) for word, box in found.items()} for found in boxes]
    return Regions(own, frozenset(names), "in the box of the object that it names")


def of_split(references, found, path):
    """`Regions` of a file, for the images of a split.

    Args:
        references: of the images, with `filename`.
        found: what `read_regions` gives, of the file at `path`.

    Raises:
        UserError: it knows none of the images.
    """
    own = [found.get(reference["filename"]) for reference in references]
    regions = Regions(own, about=f"in the region of {path} that is the word's")
    if not regions.known:
        raise UserError(
            f"{path} has regions of {counted(len(found), 'image')}, {next(iter(found))} the first, "
            f"none of which is in this split, whose first is {references[0]['filename']}: choose "
            "a file of this split"
        )
    return regions


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
    if isinstance(entry, dict):
        return {word.lower(): _region(path, image, values) for word, values in entry.items()}
    return dict.fromkeys(map(str.lower, words), _region(path, image, entry))


def _region(path, image, values):
    """The `Region` of a box, boxes, or a mask."""
    try:
        if isinstance(values[0], str):
            if set("".join(values)) - set("01") or len(set(map(len, values))) != 1 or not values[0]:
                raise ValueError("its rows are empty, differ in length or are not of 0 and 1")
            return Region.of_mask([[c == "1" for c in row] for row in values])
        boxes = np.asarray(values, np.float64)
        boxes = boxes[None] if boxes.ndim == 1 else boxes
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError("a box has four numbers")
        if not ((boxes >= 0) & (boxes <= 1)).all():
            raise ValueError("a box's numbers are fractions, from 0 to 1")
        if (boxes[:, :2] >= boxes[:, 2:]).any():
            raise ValueError("a box's second corner is right of its first and below it")
        return Region.of_boxes(boxes)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{path}: the region of {image} is neither boxes [x0, y0, x1, y1] nor a mask, rows of "
            f"0 and 1: {error}"
        ) from error


PHRASE = re.compile(r"\[/EN#(\d+)\S* ([^\]]*)\]")  # entity's number, words


def _read_entities(folder):
    """Flickr30k Entities: the boxes of a phrase are those of its last word, «a young man»."""
    found = {}
    for sentences in sorted(folder.glob("Sentences/*.txt")):
        boxes = _boxes_of_entities(folder / "Annotations" / f"{sentences.stem}.xml")
        words = {}
        for entity, phrase in PHRASE.findall(sentences.read_text(encoding="utf-8")):
            words.setdefault(phrase.split()[-1].lower(), set()).update(boxes.get(entity, ()))
        found[f"{sentences.stem}.jpg"] = {
            word: Region.of_boxes(sorted(own)) for word, own in words.items() if own
        }
    if not found:
        raise UserError(f"{folder} has no Sentences/*.txt, as Flickr30k Entities has them")
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
                for name in thing.iter("name"):
                    corners = x0 / width, y0 / height, x1 / width, y1 / height
                    found.setdefault(name.text, []).append(corners)
        return found
    except (OSError, xml.ParseError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no annotation of Flickr30k Entities: {error}") from error
