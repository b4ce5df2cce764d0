"""Captions and references as files: COCO results, COCO annotations, Karpathy's JSON."""

import re
from pathlib import Path

from groundwork.errors import UserError
from groundwork.files import read_json, write_json
from utils import SPLITS, read_karpathy, reference_of, tokenize


def read_references(path, split):
    """Image id -> its human captions, of a split of Karpathy's JSON or of COCO's own format."""
    contents = read_json(path)
    references = {}
    if isinstance(contents, dict) and "annotations" in contents:
        for id_, caption in _image_captions(contents["annotations"], path):
            references.setdefault(id_, []).append(caption)
    else:
        for image in read_karpathy(path):
            reference = reference_of(image)
            if SPLITS[image["split"]] == split.upper() and reference["captions"]:
                references[reference["id"]] = reference["captions"]
    if not references:
        raise UserError(f"{path} has no captions of the {split} split")
    for id_, texts in references.items():
        if not any(map(tokenize, texts)):
            raise UserError(f"{path} has no words for image {id_}: leave it out")
    return references


def read_results(path):
    """Image id -> caption, of a file of COCO results. Raises UserError."""
    captions = {}
    for id_, caption in _image_captions(read_json(path), path):
        if id_ in captions:
            raise UserError(f"{path} has several captions for image {id_}")
        captions[id_] = caption
    return captions


def _image_captions(entries, path):
    """Yields id and caption of a list of {"image_id", "caption"}."""
    for entry in entries if isinstance(entries, list) else [None]:
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("image_id"), int | str)
            or not _is_text(entry.get("caption"))
        ):
            raise UserError(f'{path} is no list of {{"image_id", "caption"}}')
        yield entry["image_id"], entry["caption"]


def _is_text(value):
    """Whether a value of JSON is text that can be written: it may hold halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def write_results(path, references, texts):
    """Writes COCO results: a list of {"image_id", "caption"}.

    Args:
        references: with the ids of the images, as the REFERENCES files hold them.
        texts: a caption for each.
    """
    results = [
        {"image_id": reference["id"], "caption": text}
        for reference, text in zip(references, texts, strict=True)
    ]
    write_json(path, results)


def image_ids(paths, source=None):
    """Path -> the id that results name the image by: that of `source`; without one COCO's number in
    the file's name, or the name.

    Args:
        paths: of image files.
        source: a JSON file: COCO's, with "images" that have "file_name" and "id", Karpathy's, or
            file name -> id.

    Raises:
        UserError: an image has no id there, or two images have the same.
    """
    known = {} if source is None else _read_ids(source)
    ids, images = {}, {}
    for path in paths:
        name = Path(path).name
        if source is not None and name not in known:
            raise UserError(f"{source} has no id for {path}: add it, or leave the image out")
        number = re.search(r"(?:^|_)(\d{12})\.\w+$", name)
        id_ = known[name] if source is not None else int(number[1]) if number else name
        if id_ in images:
            raise UserError(f"{path} and {images[id_]} have the same id, {id_}: name ids by --ids")
        ids[path], images[id_] = id_, path
    return ids


def _read_ids(path):
    """File name -> id."""
    contents = read_json(path)
    images = contents.get("images") if isinstance(contents, dict) else None
    if images is None:
        pairs = list(contents.items()) if isinstance(contents, dict) else [(None, None)]
    elif isinstance(images, list) and all("file_name" in i for i in images if isinstance(i, dict)):
        images = [image if isinstance(image, dict) else {} for image in images]
        pairs = [(image.get("file_name"), image.get("id")) for image in images]
    else:
        pairs = [(image["filename"], image["imgid"]) for image in read_karpathy(path)]
    ids = {}
    for name, id_ in pairs:
        if not isinstance(name, str) or type(id_) not in (int, str):
            raise UserError(f"{path} is no list of images with file names and ids")
        if ids.setdefault(name, id_) != id_:
            raise UserError(f"{path} has two ids for {name}, {ids[name]} and {id_}")
    return ids
