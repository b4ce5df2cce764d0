"""Readers of data sets that are one JSON document: Karpathy's splits, and COCO's annotations."""

import json
import os
import re
import zlib
from pathlib import Path

from captioned import (
    Caption,
    CaptionedImage,
    Fault,
    Faults,
    check_length,
    place_in,
    said,
    split_of,
    written,
)
from formats_tables import name_of, open_text
from groundwork.errors import UserError
from groundwork.files import check_readable
from word_rules import is_special


def read_document(path):
    """The contents of a JSON file, gzipped or not. Raises UserError."""
    check_readable(path)
    try:
        with open_text(path) as file:
            return json.loads(file.read())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    except (ValueError, RecursionError) as error:  # bad syntax, encoding, or endless nesting
        raise UserError(f"{path} is not valid JSON: {error}") from error


# ------------------------------------------------------------------------------------ Karpathy's


def is_karpathy(path, head):
    return (_is_document(head) or name_of(path).endswith(".json")) and not is_coco(path, head)


def _is_document(head):
    """Whether a text begins as a JSON document does that is more than its first line."""
    return head.lstrip()[:1] in ("{", "[")


def read_karpathy(files, reading, images):
    """Gathers the images of files in Karpathy's format, in their order."""
    for path in files:
        contents = read_document(path)
        entries = contents.get("images") if isinstance(contents, dict) else None
        if not isinstance(entries, list):
            raise UserError(f'{path} is not in Karpathy\'s format: it has no list "images"')
        with Faults(path, "is not in Karpathy's format") as faults:
            for i, entry in enumerate(entries):
                try:
                    images.add(_entry(entry, f"images[{i}]", reading.folder))
                except Fault as fault:
                    faults.add(f"images[{i}]", fault)


def _entry(entry, where, folder):
    """The image of an entry of Karpathy's JSON. Raises Fault."""
    if not isinstance(entry, dict):
        raise Fault("no keys")
    entry = {"filepath": ""} | entry
    for key, kind in {"filename": str, "filepath": str, "split": str, "sentences": list}.items():
        if not isinstance(entry.get(key), kind):
            raise Fault(f'no {"text" if kind is str else "list"} "{key}"')
    split = split_of(entry["split"])
    for key in ("cocoid", "imgid"):
        id_ = entry.get(key)
        whole = isinstance(id_, float) and id_ % 1 == 0  # as pandas writes them
        if not whole and type(id_) not in (int, str, type(None)):
            raise Fault(f"{key} {id_!r}, which is no whole number or text")
    captions = [_sentence(sentence) for sentence in entry["sentences"]]
    id_ = entry.get("imgid") if entry.get("cocoid") is None else entry["cocoid"]
    path = place_in(folder, entry["filepath"], entry["filename"])
    boxes = entry.get("boxes")
    return CaptionedImage(entry["filename"], path, captions, split, where, id_, boxes)


def _sentence(sentence):
    """A caption of Karpathy's JSON, which has its words, itself as written, or both."""
    if not isinstance(sentence, dict) or sentence.keys().isdisjoint({"tokens", "raw"}):
        raise Fault('a sentence without "tokens" and "raw"')
    tokens, raw = sentence.get("tokens"), sentence.get("raw")
    if tokens is None:
        return Caption(written(raw))
    if not isinstance(tokens, list) or not all(isinstance(word, str) for word in tokens):
        raise Fault('a sentence without a list "tokens" of words')
    if not isinstance(raw, str | None):
        raise Fault('a sentence whose "raw" is no text')
    if reserved := set(filter(is_special, tokens)):
        raise Fault(f"a sentence with the reserved word {min(reserved)}")
    check_length(tokens, " ".join(tokens))
    written(raw or "-")
    return Caption(raw, tokens)


# ---------------------------------------------------------------------------------------- COCO's


def is_coco(path, head):
    return _is_document(head) and bool(re.search(r'"(annotations|file_name|image_id)"\s*:', head))


def read_coco(files, reading, images):
    """Gathers the images of files of COCO's format, in their order, with the captions that any of
    the files has for them."""
    annotations = []
    for path in files:
        contents = read_document(path)
        if not isinstance(contents, dict) or contents.keys().isdisjoint({"images", "annotations"}):
            raise UserError(f'{path} is not in COCO\'s format: no "images", no "annotations"')
        with Faults(path, "is not in COCO's format") as faults:
            for i, entry in enumerate(_list(contents.get("images", []))):
                try:
                    _add_image(images, entry, path, f"images[{i}]", reading)
                except Fault as fault:
                    faults.add(f"images[{i}]", fault)
        annotations.append((path, contents.get("annotations", [])))
    for path, entries in annotations:
        with Faults(path, "is not in COCO's format") as faults:
            for i, entry in enumerate(_list(entries)):
                try:
                    _add_caption(images, entry, reading)
                except Fault as fault:
                    faults.add(f"annotations[{i}]", fault)


def _list(entries):
    return entries if isinstance(entries, list) else [None]


def _add_image(images, entry, path, where, reading):
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise Fault('no text "file_name"')
    id_, split = _whole(entry.get("id")), reading.file_splits.get(path)
    place = _place(reading.folder, path, entry["file_name"])
    known = images.find(str(id_))
    if known is None:
        where = f"{path.name}, {where},"
        images.add(CaptionedImage(entry["file_name"], place, [], split, where, id_), str(id_))
    elif (known.name, known.split) != (entry["file_name"], split):
        raise Fault(
            f"the id {id_!r} for {entry['file_name']}, split {said(split)}, and {known.where} has "
            f"it for {known.name}, split {said(known.split)}"
        )


def _place(folder, path, name):
    """Path of an image, in the folder itself, or in the one that is named as its annotations."""
    place = place_in(folder, name)
    part = Path(path).name.partition(".")[0].rpartition("_")[2]  # captions_train2014
    if folder is not None and part and not os.path.exists(place):
        deeper = place_in(folder, part, name)
        return deeper if os.path.exists(deeper) else place
    return place


def _add_caption(images, entry, reading):
    if not isinstance(entry, dict):
        raise Fault("no keys")
    id_ = _whole(entry.get("image_id"))
    known, captions = images.find(str(id_)), [Caption(written(entry.get("caption")))]
    if known is not None:
        images.add_captions(known.place, captions)
    elif reading.folder is None:  # captions alone are wanted
        images.add(CaptionedImage(str(id_), None, captions, None, "", id_), str(id_))
    else:
        raise Fault(f"the image_id {id_!r}, which no image has")


def _whole(id_):
    """An id, whole numbers as such. Raises Fault."""
    if isinstance(id_, float) and id_ % 1 == 0:
        id_ = int(id_)
    if type(id_) not in (int, str):
        raise Fault(f"the id {id_!r}, which is no whole number or text")
    return id_
