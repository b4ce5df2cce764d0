"""The images of a data set, gathered on disk: however many there are, they take no more memory."""

import pickle
import sqlite3
from array import array
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from captioned import Caption, CaptionedImage, Fault, place_in, said

CACHE = 16_000  # kB of memory

TABLES = """
PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
CREATE TABLE images (place INTEGER PRIMARY KEY, key BLOB UNIQUE, file BLOB, split TEXT, id BLOB,
                     content BLOB);
CREATE TABLE captions (image INTEGER, number INTEGER, content BLOB, PRIMARY KEY (image, number))
    WITHOUT ROWID;
BEGIN
"""


class Known(NamedTuple):
    """An image that was gathered."""

    place: int
    name: str
    split: str | None
    where: str


class Gathered:
    """Images with their captions, as `CaptionedImage`s, in the order in which they were added.

    They lie in a temporary file without a name, which ends with the process.
    """

    def __init__(self):
        # one thread at a time, but not always the same: subwords are learned in another
        self.db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self.db.execute(f"PRAGMA cache_size = -{CACHE}")
        self.db.executescript(TABLES)
        self.count = self.calls = 0

    # ---------------------------------------------------------------------------- gathering

    def add(self, image, key=None):
        """Adds an image; its place.

        Args:
            key: a text, by which `find` finds it.
        """
        place, self.count = self.count, self.count + 1
        id_ = int(image.id) if isinstance(image.id, float) else image.id
        content = image.name, image.source, image.where, image.boxes, id_
        id_ = None if id_ is None else _bytes(str(id_))  # 1 and "1" are one
        row = place, key and _bytes(key), _bytes(str(image.source)), image.split, id_
        self.db.execute(
            "INSERT INTO images VALUES (?, ?, ?, ?, ?, ?)", (*row, pickle.dumps(content))
        )
        self.add_captions(place, image.captions)
        return place

    def add_captions(self, place, captions):
        """Adds captions to the image at a place."""
        if captions:
            self.calls += 1
            row = place, self.calls, pickle.dumps([tuple(caption) for caption in captions])
            self.db.execute("INSERT INTO captions VALUES (?, ?, ?)", row)

    def find(self, key):
        """The `Known` image of a key, or None."""
        rows = self.db.execute(
            "SELECT place, split, content FROM images WHERE key = ?", (_bytes(key),)
        )
        if (row := rows.fetchone()) is None:
            return None
        name, _, where, *_ = pickle.loads(row[2])
        return Known(row[0], name, row[1], where)

    def add_row(self, folder, where, name, captions, split):
        """Adds what a row tells of the image of that name, which others may name, too. Raises Fault
        where it does not go with the rows before."""
        path = place_in(folder, name)
        known = self.find(str(path))
        if known is None:
            self.add(CaptionedImage(name, path, captions, split, where), str(path))
        elif known.split != split:
            raise Fault(
                f"the image {name} in the split {said(split)}, which {known.where} has in "
                f"{said(known.split)}"
            )
        else:
            self.add_captions(known.place, captions)

    # ------------------------------------------------------------------------------ reading

    def __len__(self):
        return self._value("SELECT count(*) FROM images")

    def __iter__(self):
        return self.where("1")

    def __getitem__(self, i):
        found = self.where("place = (SELECT place FROM images ORDER BY place LIMIT 1 OFFSET ?)", i)
        if i < 0 or (image := next(found, None)) is None:
            raise IndexError(i)
        return image

    def where(self, condition, *values):
        """Yields the images of which a condition in SQL holds."""
        rows = self.db.execute(
            "SELECT place, split, images.content, captions.content FROM images LEFT JOIN captions "
            f"ON image = place WHERE {condition} ORDER BY place, number",
            values,
        )
        for _, own in groupby(rows, itemgetter(0)):
            own = list(own)
            name, source, where, boxes, id_ = pickle.loads(own[0][2])
            parts = (pickle.loads(part) for *_, part in own if part)
            captions = [Caption(*caption) for part in parts for caption in part]
            yield CaptionedImage(name, source, captions, own[0][1], where, id_, boxes)

    def have_captions(self):
        """Whether any has."""
        query = "SELECT EXISTS (SELECT 1 FROM images JOIN captions ON image = place)"
        return bool(self._value(query))

    def of_split(self, split):
        """Yields the images of a split, None for those of none."""
        return self.where("split IS ?", split)

    def splits(self):
        """Split -> how many of the images have it."""
        return dict(self.db.execute("SELECT split, count(*) FROM images GROUP BY split"))

    def places(self):
        """Split -> the places of its images, in the order of the first."""
        found = {}
        for place, split in self.db.execute("SELECT place, split FROM images ORDER BY place"):
            found.setdefault(split, array("q")).append(place)
        return found

    def in_several_splits(self):
        """Yields of each file that stands in several splits its name, and where, of one image each:
        texts."""
        rows = self.db.execute(
            "SELECT min(place), max(place) FROM images GROUP BY file "
            "HAVING count(DISTINCT split) > 1 ORDER BY min(place)"
        )
        for places in rows.fetchall():
            first, last = self.where("place IN (?, ?)", *places)
            yield f"{first.name}: {first.where} and {last.where}"

    # ----------------------------------------------------------------------------- changing

    def give_ids(self):
        """Gives each image an id of its own within its split: the one that it has, or its place, or
        where that is another's id, its file name. Returns two images that have the same id, if
        there are."""
        self.db.execute("CREATE INDEX ids ON images (split, id)")
        twice = self.db.execute(
            "SELECT split, id FROM images WHERE id IS NOT NULL GROUP BY split, id "
            "HAVING count(*) > 1 ORDER BY min(place) LIMIT 1"
        ).fetchone()
        if twice:
            same = self.where("split IS ? AND id = ?", *twice)
            return next(same), next(same)
        self.db.create_function("with_id", 3, _with_id, deterministic=True)
        self.db.execute(
            "UPDATE images AS own SET content = with_id(content, place, EXISTS (SELECT 1 FROM "
            "images WHERE split IS own.split AND id = CAST(CAST(own.place AS TEXT) AS BLOB))) "
            "WHERE id IS NULL"
        )
        return None

    def keep(self, places=None):
        """Leaves out all but the images at the places, which increase; None: all without captions.
        Returns how many."""
        before = len(self)
        if places is None:
            self.db.execute("DELETE FROM images WHERE NOT EXISTS (SELECT 1 FROM captions "
                            "WHERE image = place)")  # fmt: skip
        else:
            self.db.execute("CREATE TEMP TABLE kept (place INTEGER PRIMARY KEY)")
            self.db.executemany("INSERT INTO kept VALUES (?)", ((place,) for place in places))
            self.db.execute("DELETE FROM images WHERE place NOT IN kept")
        return before - len(self)

    def give_splits(self, splits):
        """Gives the images, in their order, splits of an iterable."""
        [places] = self.places().values()
        self.db.execute("DROP INDEX ids")  # which would be kept up to date for nothing
        self.db.executemany(
            "UPDATE images SET split = ? WHERE place = ?", zip(splits, places, strict=True)
        )

    def _value(self, query):
        return self.db.execute(query).fetchone()[0]


def _with_id(content, place, taken):
    """An image's content with its place as the id, or its name where that is taken."""
    name, *rest, _ = pickle.loads(content)
    return pickle.dumps((name, *rest, name if taken else place))


def _bytes(text):
    """What SQL compares texts by: names may hold what is no character."""
    return text.encode("utf-8", "surrogatepass")
