"""Readers of data sets that are lines of text: CSV, TSV and JSON lines, Flickr8k's and Flickr30k's
own files, Conceptual Captions' addresses."""

import ast
import csv
import gzip
import json
import re
import zlib
from contextlib import suppress
from functools import partial

from captioned import (
    Caption,
    Fault,
    Faults,
    captions_of,
    place_in,
    said,
    split_in_name,
    split_of,
    written,
)
from downloads import file_name
from groundwork.errors import UserError
from groundwork.files import check_readable
from groundwork.wording import some

MAX_LINE = 10_000_000  # bytes

GZIP = b"\x1f\x8b"

# --------------------------------------------------------------------------------------- lines


def open_text(path):
    """A file, unpacked where gzip has packed it, as bytes."""
    with open(path, "rb") as file:
        packed = file.read(2) == GZIP
    return gzip.open(path) if packed else open(path, "rb")


def lines_of(path):
    """Yields number, from 1, and text of a file's lines, as they end; gzipped or not.

    Raises UserError: it cannot be read, is cut off, or is not UTF-8.
    """
    check_readable(path)
    number = 0
    try:
        with open_text(path) as file:
            for line in iter(partial(file.readline, MAX_LINE), b""):
                number += 1
                if len(line) == MAX_LINE:
                    raise UserError(f"{path} cannot be used: line {number} has no end")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} cannot be used: line {number} has other bytes than UTF-8: save it as UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged after line {number}: {error}") from error


def name_of(path):
    """A file's name in lower case, without the ending of gzip."""
    return path.name.lower().removesuffix(".gz")


def _first(head):
    return head.split("\n", 1)[0].rstrip("\r")


# -------------------------------------------------------------------------- CSV, TSV, JSON lines


def is_csv(path, head):
    return name_of(path).endswith((".csv", ".txt")) and any(d in _first(head) for d in ",;\t")


def is_tsv(path, head):
    return name_of(path).endswith((".tsv", ".tab"))


def read_csv(files, reading, images):
    """Gathers the images of tables with a line of columns' names, in their order; commas,
    semicolons or tabs stand between columns. Rows of the same image are its captions, and so are
    lists."""
    _read_rows(files, reading, images, _csv_rows)


def _csv_rows(path, reading, faults):
    """Yields the place and the cells of a table's rows, by their columns' names."""
    lines, end = (line for _, line in lines_of(path)), 0
    delimiter, columns = _columns(next(lines, "").strip(), reading)
    check_columns(path, columns, reading)
    if len(set(columns)) < len(columns):
        raise UserError(f"{path} cannot be used: two columns have the same name")
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        for row in rows:
            where, end = f"line {end + 2}", rows.line_num
            if row and len(row) != len(columns):
                faults.add(where, f"{len(row)} columns, not the {len(columns)} of the first line")
            elif row:
                cells = dict(zip(columns, row, strict=True))
                cells[reading.caption_column] = _cell(cells[reading.caption_column])
                yield where, cells
    except csv.Error as error:
        faults.add(f"line {end + 2}", f"cells that cannot be told apart ({error})")


def _columns(header, reading):
    """What stands between a table's columns, and their names: those with which most of the wanted
    ones are there."""
    wanted = {reading.image_column, reading.caption_column, reading.split_column or "split"}
    found = {}
    for delimiter in ",;\t":
        with suppress(csv.Error):
            names = next(csv.reader([header], delimiter=delimiter), [])
            found[delimiter] = [name.strip() for name in names]
    return max(found.items(), default=(",", []), key=lambda item: len(wanted & set(item[1])))


def check_columns(path, columns, reading):
    """Raises UserError where a table lacks a column that is needed."""
    for kind in ("image", "caption", "split"):
        name = getattr(reading, f"{kind}_column")
        if name is not None and name not in columns:
            there = f"only {some(columns)}" if columns else "as its first line names none"
            raise UserError(
                f"{path} has no column {name!r}, {there}: name the one with the {kind}s by "
                f"--{kind}_column"
            )


def _cell(text):
    """A caption of a table: text, a list of texts written as in JSON or Python, or a number, which
    is none."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(value, list):
                return value
    try:
        return float(text)
    except ValueError:
        return text


def is_jsonl(path, head):
    if name_of(path).endswith((".jsonl", ".ndjson")):
        return True
    first, _, rest = head.partition("\n")
    return first.strip().startswith("{") and first.strip().endswith("}") and rest[:1] == "{"


def read_jsonl(files, reading, images):
    """Gathers the images of files with a JSON object a line, as in `read_csv`."""
    _read_rows(files, reading, images, _json_rows)


def _json_rows(path, reading, faults):
    for number, line in lines_of(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.add(f"line {number}", f"no valid JSON ({error})")
            continue
        if isinstance(row, dict):
            yield f"line {number}", row
        else:
            faults.add(f"line {number}", "no keys")


def _read_rows(files, reading, images, rows_of):
    for path in files:
        with Faults(path) as faults:
            for where, row in rows_of(path, reading, faults):
                try:
                    parts = _parts(row, path, reading)
                    images.add_row(reading.folder, f"{path.name}, {where},", *parts)
                except Fault as fault:
                    faults.add(where, fault)


def _parts(row, path, reading):
    """Image's name, captions and split of a row by columns' names. Raises Fault."""
    for kind in ("image", "caption", "split"):
        name = getattr(reading, f"{kind}_column")
        if name is not None and name not in row:
            raise Fault(f"no {name!r} (see --{kind}_column)")
    image = row[reading.image_column]
    if not isinstance(image, str) or not image.strip():
        raise Fault(f"no name of an image, but {image!r:.40}")
    return image.strip(), captions_of(row[reading.caption_column]), row_split(row, path, reading)


def row_split(row, path, reading):
    """The split of a row by columns' names, or of its file. Raises Fault."""
    value = row.get(reading.split_column or "split")
    return reading.file_splits.get(path) if value is None else split_of(value)


# ------------------------------------------------------------------------- Flickr8k, Flickr30k

# 1.jpg#0<tab>A dog runs; 1.jpg| 0| A dog runs. The published results.csv has a row without the last
# bar, which is read all the same.
_NUMBERED = re.compile(r"([^\t|#]+)(?:#\d+\t|\|\s*\d+\s*(?:\||\s))\s*(.*)")
_BARS = re.compile(r"image_name\s*\|\s*comment_number\s*\|\s*comment\s*")


def is_flickr8k(path, head):
    return bool(re.match(r"[^\t|#]+#\d+\t", _first(head))) and not is_flickr30k(path, head)


def is_flickr30k(path, head):
    tokens = re.match(r"[^\t|#]+#\d+\t", _first(head)) and name_of(path).startswith("results")
    return bool(tokens or _BARS.fullmatch(_first(head)))


def read_flickr(files, reading, images):
    """Gathers the images of Flickr8k.token.txt, or results_20130124.token, or results.csv, in their
    order. Files with other lines list the images of a split, which their names tell; without any,
    those that lie beside Flickr8k.token.txt are taken."""
    numbered = [path for path in files if _NUMBERED.match(next(lines_of(path), (0, ""))[1])]
    numbered += [path for path in files if _BARS.match(next(lines_of(path), (0, ""))[1])]
    lists = [path for path in files if path not in numbered]
    if not lists and len(numbered) == 1:
        beside = sorted(numbered[0].parent.glob("*.*Images.txt"))
        lists = [path for path in beside if split_in_name(path) is not None]
        if lists:
            reading.notes.append(f"splits by {some(path.name for path in lists)} beside it")
    splits, seen = _read_lists(lists), set()
    for path in numbered:
        with Faults(path) as faults:
            for number, line in lines_of(path):
                try:
                    if found := _numbered(line, number):
                        split = splits.get(found[0]) if lists else reading.file_splits.get(path)
                        if lists:
                            seen.add(found[0])
                        if split is not None or not lists:
                            where = f"{path.name}, line {number},"
                            images.add_row(reading.folder, where, *found, split)
                except Fault as fault:
                    faults.add(f"line {number}", fault)
    if absent := splits.keys() - seen:
        raise UserError(f"{some(numbered)} has no captions of {some(sorted(absent), 3)}, listed")
    reading.left_out["images of no split"] += len(seen - splits.keys())


def _numbered(line, number):
    """Image and captions of a line of Flickr's, None of one that says nothing. Raises Fault."""
    line = line.strip("\r\n ")
    if not line or (number == 1 and _BARS.fullmatch(line)):
        return None
    found = _NUMBERED.fullmatch(line)
    if found is None:
        raise Fault("no image, number and caption")
    return found[1].strip(), [Caption(written(found[2].strip()))]


def _read_lists(paths):
    """Image -> split, of files that list them."""
    splits = {}
    for path in paths:
        split = split_in_name(path)
        if split is None:
            raise UserError(
                f"{path} has no lines name#number<tab>caption, and its name does not tell of what "
                "split it is the list"
            )
        with Faults(path) as faults:
            for number, line in lines_of(path):
                name = line.strip()
                if name and splits.setdefault(name, split) != split:
                    faults.add(f"line {number}", f"{name}, which is in {said(splits[name])}, too")
    return splits


# ------------------------------------------------------------------------- Conceptual Captions


def is_conceptual(path, head):
    return bool(re.fullmatch(r"[^\t]+\thttps?://\S+", _first(head)))


def read_conceptual(files, reading, images):
    """Gathers the images of Conceptual Captions' lines, caption<tab>address, in their order, whose
    files `downloads.file_name` names. What is not there could not be fetched, and is left out, as
    is what another split has: the addresses come from the web, and may come twice."""
    for path in files:
        with Faults(path) as faults:
            for number, line in lines_of(path):
                caption, tab, address = line.rstrip("\r\n").rpartition("\t")
                where = f"{path.name}, line {number},"
                try:
                    if not tab or not re.match("https?://", address):
                        raise Fault("no caption<tab>address")
                    captions = [Caption(written(caption))]
                    name, split = file_name(address), reading.file_splits.get(path)
                    path_of_image = place_in(reading.folder, name)
                    known = images.find(str(path_of_image))
                    if reading.folder is not None and not path_of_image.exists():
                        reading.left_out["images not fetched"] += 1
                    elif known is not None and known.split != split:
                        reading.left_out["images of an earlier file's split"] += 1
                    else:
                        images.add_row(reading.folder, where, name, captions, split)
                except Fault as fault:
                    faults.add(f"line {number}", fault)
    if reading.left_out["images not fetched"] and not len(images):
        raise UserError(
            f"none of the images of {some(files)} is in {reading.folder}: check --image_folder"
        )
