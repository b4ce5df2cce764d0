"""Captions and references as files: COCO results, and references of all formats."""

import re
from pathlib import Path
from typing import NamedTuple

import formats
from captioned import references_of, said, text_of
from groundwork.errors import UserError
from groundwork.files import check_readable, read_json, write_json
from groundwork.wording import counted, some
from word_rules import KARPATHY

FEW = 3  # ids that stand for many in a message


def id_of(value):
    """An id by its value, as text: 1, 1.0 and "1" are the same. None of what is no id."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if type(value) in (int, str) else None


class References(NamedTuple):
    """People's captions of images, which are named by their ids as `id_of` gives them."""

    captions: dict[str, list[str]]  # id -> captions
    names: dict[str, str]  # file's name -> id
    elsewhere: dict[str, str]  # id -> split, of the images of the other splits


def read_references(path, split, rule=KARPATHY):
    """`References` of a split of a data set in any of the `formats`: of all of it where the format
    has no splits, as COCO's; `rule` splits captions into words. Raises UserError."""
    found = References({}, {}, {})
    for image in formats.load(path):
        id_ = id_of(image.id)
        # where there are no splits, nothing has been left out of input files
        texts = (
            references_of(image, rule)
            if image.split
            else [text_of(caption, rule) for caption in image.captions]
        )
        if not texts:
            continue
        if image.split in (None, split.upper()):
            found.captions[id_] = texts
            found.names[image.name] = id_
        else:
            found.elsewhere[id_] = said(image.split)
    if not found.captions:
        there = ", ".join(sorted(set(found.elsewhere.values())))
        of_split = f" of the {split} split, see --split: there are {there}" if there else ""
        raise UserError(f"{path} has no captions{of_split}")
    for id_, texts in found.captions.items():
        if not any(map(rule.split, texts)):
            raise UserError(f"{path} has no words for image {id_}: leave it out")
    return found


def read_results(path):
    """Image's id -> caption, of a file of COCO results. Raises UserError."""
    captions = {}
    for id_, caption in _image_captions(read_json(path), path):
        if id_ in captions:
            raise UserError(f"{path} has several captions for image {id_}")
        captions[id_] = caption
    if not captions:
        raise UserError(f"{path} has no captions")
    return captions


def _image_captions(entries, path):
    """Yields id and caption of a list of {"image_id", "caption"}."""
    for entry in entries if isinstance(entries, list) else [None]:
        if (
            not isinstance(entry, dict)
            or id_of(entry.get("image_id")) is None
            or not _is_text(entry.get("caption"))
        ):
            raise UserError(f'{path} is no list of {{"image_id", "caption"}}')
        yield id_of(entry["image_id"]), entry["caption"]


def _is_text(value):
    """Whether a value of JSON is text that can be written: it may hold halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def match(results, references, wanted, files):
    """(caption, references) of each wanted image.

    Args:
        results: from `read_results`; by the images' ids, or by the names of their files.
        references: `References`.
        wanted: ids, of the references'.
        files: paths of results and references, for the message.

    Raises:
        UserError: the results are of other images, or lack some; how they differ.
    """
    if not references.captions.keys() & results.keys():  # by the names of the images' files?
        results = {references.names.get(name, name): text for name, text in results.items()}
    alone = [id_ for id_ in results if id_ not in references.captions]
    missing = [id_ for id_ in wanted if id_ not in results]
    if not alone and not missing:
        return [(results[id_], references.captions[id_]) for id_ in wanted]
    differences, way_out = [], ""
    if alone:
        differences.append(
            f"of {counted(len(results), 'id')} in the results {counted(len(alone), 'is', 'are')} "
            f"not in the references ({some(alone, FEW)})"
        )
        splits = sorted({references.elsewhere[id_] for id_ in alone if id_ in references.elsewhere})
        way_out = f": in the splits {', '.join(splits)}, see --split" if splits else ""
    if missing:
        differences.append(
            f"of {counted(len(wanted), 'id')} in the references "
            f"{counted(len(missing), 'has', 'have')} no caption ({some(missing, FEW)})"
        )
        if not alone:
            way_out = f": for the scores of those that have, --subset {files[0]}"
    raise UserError(f"{files[0]} and {files[1]} differ: {'; '.join(differences)}{way_out}")


# -------------------------------------------------------------------------------------- subsets


def read_subset(value):
    """What --subset names: the number of images, or the ids and names of files that a file lists,
    one a line, or as JSON, also of COCO results. Raises UserError."""
    if value.isdecimal():
        if int(value) == 0:
            raise UserError("--subset 0 leaves no image")
        return int(value)
    check_readable(value, f"--subset {value} is neither a number of images nor a file")
    text = Path(value).read_bytes()
    if text.lstrip()[:1] in (b"[", b"{"):
        entries = read_json(value)
        entries = entries if isinstance(entries, list) else [None]
        found = [id_of(e.get("image_id") if isinstance(e, dict) else e) for e in entries]
    else:
        found = [line.strip() for line in text.decode("utf-8", "replace").splitlines()]
        found = [line for line in found if line]
    if not found or None in found:
        raise UserError(f"--subset {value} lists no ids or names of images, one a line or as JSON")
    return list(dict.fromkeys(found))


def choose(subset, ids, names, value, where):
    """Those of the ids, in their order, that a subset from `read_subset` takes.

    Args:
        ids: list of ids as `id_of` gives them.
        names: file's name -> id.
        value: of --subset, and `where` the images are, for the message.

    Raises:
        UserError: one that is listed is not there.
    """
    if subset is None or isinstance(subset, int):
        return ids[:subset]
    there = set(ids)
    unknown = [entry for entry in subset if entry not in there and names.get(entry) not in there]
    if unknown:
        raise UserError(
            f"--subset {value}: of {counted(len(subset), 'image')} "
            f"{counted(len(unknown), 'is', 'are')} not in {where} ({some(unknown, FEW)})"
        )
    wanted = {entry if entry in there else names[entry] for entry in subset}
    return [id_ for id_ in ids if id_ in wanted]


# -------------------------------------------------------------------------------------- writing


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
            an image's path or file name -> id.

    Raises:
        UserError: an image has no id there, or two images have the same.
    """
    known = {} if source is None else _read_ids(source)
    ids, images = {}, {}
    for path in paths:
        name = Path(path).name
        id_ = known.get(str(path), known.get(name))
        if source is not None and id_ is None:
            raise UserError(f"{source} has no id for {path}: add it, or leave the image out")
        if source is None:
            number = re.search(r"(?:^|_)(\d{12})\.\w+$", name)
            id_ = int(number[1]) if number else name
        if id_ in images:
            raise UserError(
                f"{path} and {images[id_]} have the same id, {id_}: give the ids of both paths in "
                "--ids"
            )
        ids[path], images[id_] = id_, path
    return ids


def _read_ids(path):
    """Path or file name -> id, a whole number or a text."""
    contents = read_json(path)
    images = contents.get("images") if isinstance(contents, dict) else None
    if images is None:
        pairs = list(contents.items()) if isinstance(contents, dict) else [(None, None)]
    elif isinstance(images, list) and all("file_name" in i for i in images if isinstance(i, dict)):
        images = [image if isinstance(image, dict) else {} for image in images]
        pairs = [(image.get("file_name"), image.get("id")) for image in images]
    else:
        found = formats.load(path, formats.Options("karpathy"))
        pairs = [(image.name, image.id) for image in found]
    ids = {}
    for name, id_ in pairs:
        if not isinstance(name, str) or id_of(id_) is None:
            raise UserError(
                f"{path} is no list of images with file names and ids: {name!r}, {id_!r}"
            )
        id_ = id_ if isinstance(id_, str) else int(id_)
        if ids.setdefault(name, id_) != id_:
            raise UserError(f"{path} has two ids for {name}, {ids[name]} and {id_}")
    return ids
