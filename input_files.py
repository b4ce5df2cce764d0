"""The files that training reads: their names, and writing them, item by item, all or none."""

import json
import os
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path

from captioned import SPLITS
from groundwork.errors import UserError
from groundwork.files import flush, make_folder, sole_writer, temporaries
from storage import new_images, shard_name, shard_of

KINDS = {"IMAGES": "hdf5", "CAPTIONS": "json", "CAPLENS": "json", "REFERENCES": "json"}


def base_name(dataset, captions_per_image, min_word_freq):
    """The part that the names of a data set's input files have in common."""
    return f"{dataset}_{captions_per_image}_cap_per_img_{min_word_freq}_min_word_freq"


def input_path(folder, base, kind, split=None):
    """Path of an input file: WORDMAP, or IMAGES, CAPTIONS, CAPLENS or REFERENCES of a split."""
    if split is None:
        return Path(folder) / f"{kind}_{base}.json"
    return Path(folder) / f"{split}_{kind}_{base}.{KINDS[kind]}"


def shard_paths(path, count):
    """Paths of the shards of what else would be the file at `path`."""
    names = (f"{path.stem}{shard_name(i, count)}{path.suffix}" for i in range(count))
    return [path.with_name(name) for name in names]


def input_paths(folder, base, kind, split):
    """Paths of the input files of a kind and split, in order: of its shards, or of the only one,
    which may be missing. Raises UserError where shards are missing, or are of several numbers."""
    whole = input_path(folder, base, kind, split)
    found = _shards_beside(whole)
    if not found:
        return [whole]
    counts = {shard_of(path)[1] for path in found}
    if whole.exists() or len(counts) > 1:
        raise UserError(
            f"{folder} holds {whole.name} whole and in shards, or in shards twice: run "
            "create_input_files.py again"
        )
    paths = shard_paths(whole, counts.pop())
    if missing := set(paths) - set(found):
        raise UserError(f"{min(missing)} is missing: {len(found)} of {len(paths)} shards are there")
    return paths


def _shards_beside(whole):
    """Shards of what else would be the file at `whole` that are there, of any number."""
    if not whole.parent.is_dir():
        return []
    with os.scandir(whole.parent) as entries:
        named = [whole.with_name(e.name) for e in entries if e.name.startswith(f"{whole.stem}_")]
    shards = [path for path in named if path.suffix == whole.suffix and shard_of(path)]
    # of a data set whose name begins with this one's the shards are others
    return sorted(path for path in shards if path.stem == whole.stem + shard_name(*shard_of(path)))


# ------------------------------------------------------------------------------------- writing


class JsonList:
    """Writes a list to a new JSON file, item by item, as json.dumps would at once."""

    def __init__(self, path):
        self.file, self.between = open(path, "w", encoding="utf-8"), "["  # noqa: SIM115

    def __enter__(self):
        return self

    def add(self, item):
        self.file.write(f"{self.between}{json.dumps(item)}")
        self.between = ", "

    def __exit__(self, kind, *_):
        with self.file:
            if kind is None:
                self.file.write("[]" if self.between == "[" else "]")


@contextmanager
def new_part(paths, count, form):
    """Yields a function that appends an image to new files of a split, or of a shard of it: a
    square, its entry of the REFERENCES, and its encoded captions with their lengths, if any.

    Args:
        paths: by the kinds of files.
        count: of images, at most.
        form: store, image size, fit, and captions of an image, as `new_images` takes them.
    """
    with ExitStack() as stack:
        images = stack.enter_context(new_images(paths["IMAGES"], count, *form))
        lists = {name: stack.enter_context(JsonList(paths[name])) for name in list(paths)[1:]}

        def add(square, reference, encoded):
            images.add(square)
            for caption, length in encoded:
                lists["CAPTIONS"].add(caption)
                lists["CAPLENS"].add(length)
            lists["REFERENCES"].add(reference)

        yield add


@contextmanager
def all_or_nothing(folder, base, kinds, shards):
    """Yields temporary paths for a data set's files, kind -> path, of each part of each split in a
    list, and that of the WORDMAP. All take their places when the block succeeds, else none does.

    Args:
        kinds: split -> the kinds of its files.
        shards: split -> how many, of a split that has shards.
    """
    word_map = input_path(folder, base, "WORDMAP")
    places = {}  # (split, kind) -> paths
    for split, own in kinds.items():
        for kind in own:
            path = input_path(folder, base, kind, split)
            places[split, kind] = shard_paths(path, shards[split]) if split in shards else [path]
    paths = [word_map, *(path for own in places.values() for path in own)]
    make_folder(folder)
    with (
        sole_writer(word_map, "wait for it, or choose another --output_folder"),
        temporaries(paths, f"to {folder}") as beside,
    ):
        new = dict(zip(paths, beside, strict=True))
        yield (
            {
                split: [
                    {kind: new[places[split, kind][i]] for kind in own}
                    for i in range(shards.get(split, 1))
                ]
                for split, own in kinds.items()
            },
            new[word_map],
        )
        for temporary in beside:
            flush(temporary)
        # Only renames are left. The WORDMAP goes first and comes last, so that if they are cut
        # short none vouches for a mixture of old and new files.
        word_map.unlink(missing_ok=True)
        for kind, split in product(KINDS, SPLITS):  # an older data set's
            path = input_path(folder, base, kind, split)
            for old in {path, *_shards_beside(path)} - set(paths):
                old.unlink(missing_ok=True)
        for path in reversed(paths):
            os.replace(new[path], path)
