"""Readers of data sets that hold their images: folders of images and texts, WebDataset's shards."""

import json
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

from captioned import (
    SPLIT_NAMES,
    SPLITS,
    Caption,
    CaptionedImage,
    Fault,
    Faults,
    captions_of,
    place_in,
    written,
)
from formats_tables import GZIP, row_split
from groundwork.errors import UserError
from groundwork.files import check_readable
from groundwork.images import endings

MAX_TEXT = 1_000_000  # bytes of the captions of an image


def texts_of(contents):
    """Captions, one a line, of the bytes of a text. Raises Fault."""
    if len(contents) > MAX_TEXT:
        raise Fault(f"a text of over {MAX_TEXT} bytes")
    try:
        lines = contents.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise Fault("a text with other bytes than UTF-8") from None
    return [Caption(written(line.strip())) for line in lines if line.strip()] or [written("")]


# --------------------------------------------------------------------------------------- folder


def is_folder(path, head):
    return path.is_dir()


def read_folder(files, reading, images):
    """Gathers the images in folders and the folders in them, in the order of their names, each with
    the lines of the text file of its name. Where all of them lie in folders named as splits, these
    are their splits."""
    for folder in files:
        found = sorted(
            path.relative_to(folder)
            for path in Path(folder).rglob("*")
            if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
        known = endings()
        texts = {path.with_suffix(""): path for path in found if path.suffix.lower() == ".txt"}
        paths = [path for path in found if path.suffix.lower() in known]
        if not paths:
            raise UserError(f"{folder} has no images in it")
        splits = all(_split(path) for path in paths)
        if splits:
            paths.sort(key=lambda path: SPLITS.index(_split(path)))
        with Faults(folder) as faults:
            for path in paths:
                split = _split(path) if splits else None
                name = path.relative_to(path.parts[0]) if splits else path
                image = CaptionedImage(name.as_posix(), folder / path, [], split, str(path))
                if (text := texts.get(path.with_suffix(""))) is not None:
                    try:
                        image.captions += texts_of(_contents(folder / text))
                    except Fault as fault:
                        faults.add(str(text), fault)
                images.add(image)
        alone = texts.keys() - {path.with_suffix("") for path in paths}
        reading.left_out["texts without an image"] += len(alone)


def _split(path):
    """The split of which a folder's name is, or None."""
    return SPLIT_NAMES.get(path.parts[0].lower()) if path.parts[1:] else None


def _contents(path):
    check_readable(path)
    with open(path, "rb") as file:
        return file.read(MAX_TEXT + 1)


# ----------------------------------------------------------------------------------- WebDataset


class Member(NamedTuple):
    """An image in an archive that is not unpacked, as `open_image` takes it."""

    archive: Path
    name: str
    offset: int  # bytes
    size: int

    def read(self):
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self):
        return f"{self.name} in {self.archive}"


def is_webdataset(path, head):
    if path.is_dir():
        return any(path.glob("*.tar"))
    return path.name.lower().endswith((".tar", ".tar.gz", ".tgz")) or head[257:262] == "ustar"


def read_webdataset(files, reading, images):
    """Gathers the images of shards, in the order of their members: `key.jpg`, with the captions in
    `key.txt`, one a line, or those of `key.json`, by its columns."""
    for path in files:
        for image in _shard(path, reading):
            images.add(image)


def _shard(path, reading):
    """The images of a shard, in its order."""
    known, texts, kinds = {}, {}, endings()
    with Faults(path) as faults:
        for member, contents in _members(path):
            try:
                name = place_in(path, member.name).relative_to(path)
                key, kind = _key(name)
                if kind in ("txt", "json"):
                    if (key, kind) in texts:
                        raise Fault("a name that another member has, too")
                    texts[key, kind] = _text(kind, contents, path, reading)
                elif f".{kind}" in kinds:
                    if key in known:
                        raise Fault(f"an image beside {known[key].name}: one is the most")
                    source = Member(path, member.name, member.offset_data, member.size)
                    where, split = f"{path.name}, {member.name},", reading.file_splits.get(path)
                    known[key] = CaptionedImage(name.as_posix(), source, [], split, where)
            except Fault as fault:
                faults.add(member.name, fault)
        for (key, kind), (captions, split) in texts.items():
            if key not in known:
                faults.add(f"{key}.{kind}", "no image beside it")
                continue
            if captions is None and split != "TEST" and (key, "txt") not in texts:
                faults.add(f"{key}.json", f"no {reading.caption_column!r} (see --caption_column)")
            known[key].split = known[key].split if split is None else split
            if kind == "txt" or (key, "txt") not in texts:
                known[key].captions += captions or []
    return known.values()


def _key(path):
    """A member's name before and after the first dot of its last part."""
    key, _, ending = path.name.partition(".")
    return (path.parent / key).as_posix(), ending.lower()


def _text(kind, contents, path, reading):
    """Captions, None where there is no column of them, and split of a text beside an image. Raises
    Fault."""
    if kind == "txt":
        return texts_of(contents), None
    try:
        row = json.loads(contents[: MAX_TEXT + 1])
    except (ValueError, RecursionError) as error:
        raise Fault(f"no valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise Fault("no keys")
    if reading.split_column is not None and reading.split_column not in row:
        raise Fault(f"no {reading.split_column!r} (see --split_column)")
    there = reading.caption_column in row
    captions = captions_of(row[reading.caption_column]) if there else None
    return captions, row_split(row, path, reading)


def _members(path):
    """Yields the files of an archive, and the contents of those that are texts. Raises UserError
    where it is damaged, cut off, or packed."""
    check_readable(path)
    with open(path, "rb") as file:
        if file.read(2) == GZIP:
            raise UserError(f"{path} is packed, and no image in it can be reached: gunzip it first")
    size, end = os.path.getsize(path), 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // 512) * 512
                if member.isfile() and end > size:
                    raise tarfile.ReadError("unexpected end of data")
                if not member.isfile() or member.issparse():
                    continue
                text = member.name.lower().endswith((".txt", ".json"))
                yield member, archive.extractfile(member).read(MAX_TEXT + 1) if text else None
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError("unexpected end of data")
    except UserError:
        raise
    except Exception as error:  # on damaged archives tarfile raises nearly anything
        raise UserError(f"{path} is damaged or cut off ({error}): make it again") from error
