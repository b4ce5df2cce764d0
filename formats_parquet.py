"""Reader of data sets that Hugging Face's `datasets` has saved, and of Parquet files, which hold
their images."""

import hashlib
import threading
from bisect import bisect_right
from collections import OrderedDict
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from captioned import (
    CaptionedImage,
    Fault,
    Faults,
    captions_of,
    place_in,
    splits_in_names,
)
from formats_tables import check_columns, row_split
from groundwork.errors import UserError
from groundwork.files import check_readable, read_json


def is_huggingface(path, head):
    if path.is_dir():
        known = ("dataset_info.json", "dataset_dict.json", "state.json")
        return any((path / name).exists() for name in known) or any(path.rglob("*.parquet"))
    return path.name.endswith((".parquet", ".arrow"))


def read_huggingface(files, reading, images):
    """Gathers the images of folders that `datasets` has saved, or of Parquet files, in their order:
    rows with an image column and one of captions, texts or lists of them."""
    open_table.cache_clear()  # a file may be another than before
    for path in files:
        for table, split in _tables(Path(path), reading):
            _add_rows(images, table, split, reading)


def _tables(path, reading):
    """Yields the files of tables in a folder, and their splits, where they are told."""
    split = reading.file_splits.get(path)
    if not path.is_dir():
        yield path, split
    elif (path / "dataset_dict.json").exists():
        folders = _named(path / "dataset_dict.json", "splits", lambda name: name)
        splits = splits_in_names(folders)
        for folder in splits or folders:
            for table, _ in _tables(folder, reading):
                yield table, splits.get(folder)
    elif (path / "state.json").exists():
        for table in _named(path / "state.json", "_data_files", lambda entry: entry["filename"]):
            yield table, split
    else:
        tables = sorted(path.rglob("*.parquet"))
        if not tables:
            raise UserError(f"{path} has no files of rows: it is not what save_to_disk writes")
        splits = splits_in_names(tables)
        for table in splits or tables:
            yield table, splits.get(table, split)


def _named(path, key, name_of):
    """The paths that a JSON file lists, in its own folder. Raises UserError."""
    try:
        contents = read_json(path)
        if contents.get("_indices_files"):  # of an older version
            raise Fault("rows in another order than they are stored")
        return [place_in(path.parent, name_of(entry)) for entry in contents[key]]
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f'{path} has no list "{key}"') from error
    except Fault as fault:
        raise UserError(f"{path} has {fault}: save the data set again") from fault


# ---------------------------------------------------------------------------------------- rows


class Cell(NamedTuple):
    """An image in a table, as `open_image` takes it."""

    path: Path
    column: str
    row: int

    def read(self):
        value = open_table(self.path).value(self.column, self.row)
        value = value["bytes"] if isinstance(value, dict) else value
        if value is None:
            raise ValueError("only the name of an image, save the data set with the images in it")
        return value

    def digest(self):
        """Of its bytes; where there are none, another than all others'."""
        try:
            return hashlib.sha256(self.read()).hexdigest()
        except ValueError:  # which opening it tells
            return str(self)

    def __str__(self):
        return f"row {self.row} of {self.path}"


def _add_rows(images, path, split, reading):
    """Adds those of a table to the images by what tells one from another."""
    table = open_table(path)
    check_columns(path, table.names, reading)
    table.check_images(reading.image_column)
    columns = [reading.caption_column, reading.split_column or "split"]
    rows = table.rows(reading.image_column, [name for name in columns if name in table.names])
    with Faults(path) as faults:
        for number, (name, row) in enumerate(rows):
            try:
                image, key = _image(table, number, name, reading)
                image.split = row_split(row, path, reading) or split
                image.captions += captions_of(row[reading.caption_column])
                _merge(images, key, image)
            except Fault as fault:
                faults.add(f"row {number}", fault)


def _image(table, number, name, reading):
    """The image of a row, without captions, that it holds or whose file it names; and what tells it
    from others: a hash of its bytes, as rows may name none, or the file's path."""
    where = f"{table.path.name}, row {number},"
    if table.holds_images(reading.image_column):
        cell = Cell(table.path, reading.image_column, number)
        name = Path(name).name if name else f"{table.path.stem}_{number}"
        return CaptionedImage(name, cell, [], None, where), cell.digest()
    if not isinstance(name, str) or not name.strip():
        raise Fault("no image")
    path = place_in(reading.folder, name)
    return CaptionedImage(name, path, [], None, where), str(path)


def _merge(images, key, image):
    """Adds an image to those by key: to its own other row, where there is one."""
    if (known := images.find(key)) is None:
        images.add(image, key)
    elif known.split != image.split:
        raise Fault(f"another split than {known.where} for {image.name}")
    else:
        images.add_captions(known.place, image.captions)


@lru_cache(maxsize=8)
def open_table(path):
    """The `Table` at a path, kept for its next rows."""
    return Table(path)


class Table:
    """Rows of a file of Arrow's or Parquet's format, of which single ones can be read.

    Raises UserError: pyarrow is missing, or the file is damaged.
    """

    KEPT = 4  # groups of rows: threads are a few rows apart

    def __init__(self, path):
        self.path, self.lock, self.kept = Path(path), threading.Lock(), OrderedDict()
        check_readable(path)
        try:
            import pyarrow.compute
            import pyarrow.ipc
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(
                f"{path} is read by the package pyarrow: pip install pyarrow"
            ) from error
        self.arrow = pyarrow
        with self.errors():
            if self.path.suffix == ".arrow":
                reader = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
                self.schema, self.groups = reader.schema, list(reader)
                for group in self.groups:
                    group.validate(full=True)  # else damaged bytes end the process
                counts = [group.num_rows for group in self.groups]
            else:
                self.groups, self.file = None, pyarrow.parquet.ParquetFile(path)
                self.schema, about = self.file.schema_arrow, self.file.metadata
                counts = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
        self.starts = [0, *accumulate(counts)]

    @contextmanager
    def errors(self):
        """Makes what pyarrow raises on damaged files a UserError."""
        try:
            yield
        except Exception as error:  # of many classes
            line = str(error).partition("\n")[0]
            raise UserError(f"{self.path} is damaged or cut off: {line}") from error

    @property
    def names(self):
        return self.schema.names

    def check_images(self, column):
        """Raises UserError for a column of neither images nor their files' names."""
        types, kind = self.arrow.types, self.schema.field(column).type
        names = types.is_string(kind) or types.is_large_string(kind)
        whole = not types.is_struct(kind) or kind.get_field_index("bytes") >= 0
        if not (names or (self.holds_images(column) and whole)):
            raise UserError(f"{self.path} has no images in the column {column!r}, but {kind}")

    def holds_images(self, column):
        """Whether a column has images themselves, not their files' names."""
        kind = self.schema.field(column).type
        types = self.arrow.types
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_struct(kind)

    def rows(self, image, columns):
        """Yields the name of each row's image, or None, without reading the images, and the values
        of some columns, by their names."""
        kind = self.schema.field(image).type
        inside = self.arrow.types.is_struct(kind)
        named = not self.holds_images(image) or (inside and kind.get_field_index("path") >= 0)
        wanted = [f"{image}.path" if inside else image] if named else []
        for i in range(len(self.starts) - 1):
            with self.errors():
                read = self._read(i, [*columns, *wanted])
                names = [None] * read.num_rows
                if named:
                    names = read.column(image)
                    names = self.arrow.compute.struct_field(names, "path") if inside else names
                    names = names.to_pylist()
                values = read.select(columns).to_pylist()
            yield from zip(names, values, strict=True)

    def value(self, column, row):
        """A single value. Raises UserError."""
        i = bisect_right(self.starts, row) - 1
        with self.lock, self.errors():
            if (i, column) not in self.kept:
                self.kept[i, column] = self._read(i, [column])
                while len(self.kept) > self.KEPT:
                    self.kept.popitem(last=False)
            return self.kept[i, column].column(column)[row - self.starts[i]].as_py()

    def _read(self, i, columns):
        """A group of rows, of some columns."""
        if self.groups is None:
            return self.file.read_row_group(i, columns=columns)
        whole = [name if name in self.names else name.removesuffix(".path") for name in columns]
        return self.groups[i].select(whole)
