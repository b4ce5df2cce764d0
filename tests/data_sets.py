"""A small data set of drawn photographs, written in every format that there is a reader of."""

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from downloads import file_name

TEXTS = ("A dog runs over the grass.", "Two cats, a red one and a black one", "The bird sleeps .")


class Photograph(NamedTuple):
    name: str
    split: str
    captions: list[str]
    contents: bytes  # of its file


def draw(count=12, hashed=False):
    """Photographs in the order of their splits and names; every third is for validation, every
    fourth for the test."""
    rng, made = np.random.default_rng(5), []
    splits = sorted(["train", "train", "val", "test"] * (count // 4), key="train val test".index)
    for i, split in enumerate(splits):
        buffer = io.BytesIO()
        pixels = rng.integers(256, size=(5, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((14, 10)).save(buffer, "JPEG")
        name = file_name(address(i)) if hashed else f"a{i:03}.jpg"
        captions = [f"{text} {i}" for text in TEXTS[: 1 + i % 3]]
        made.append(Photograph(name, split, captions, buffer.getvalue()))
    return made


def address(i):
    return f"https://photographs.example/{i}.jpg"


def rows(photographs):
    return [(p, text) for p in photographs for text in p.captions]


def of_splits(photographs):
    """Split -> its photographs, with their places."""
    found = {}
    for i, photograph in enumerate(photographs):
        found.setdefault(photograph.split, []).append((i, photograph))
    return found


def write_images(folder, photographs):
    """The photographs' files, and the folder they are in."""
    for photograph in photographs:
        path = folder / photograph.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photograph.contents)
    return folder


# -------------------------------------------- what create_input_files.py is told of each format


def karpathy(folder, photographs):
    images = [
        {"filename": p.name, "split": p.split, "sentences": [{"raw": text} for text in p.captions]}
        for p in photographs
    ]
    (folder / "captions.json").write_text(json.dumps({"images": images, "dataset": "mine"}))
    return [folder / "captions.json"]


def coco(folder, photographs):
    paths = []
    for split, own in of_splits(photographs).items():
        images = [{"id": i, "file_name": p.name} for i, p in own]
        captions = [{"image_id": i, "id": 0, "caption": c} for i, p in own for c in p.captions]
        paths.append(folder / f"captions_{split}2014.json")
        paths[-1].write_text(
            json.dumps({"info": {}, "images": images, "licenses": [], "annotations": captions})
        )
    return paths


def flickr8k(folder, photographs):
    lines = [f"{p.name}#{k}\t{text}" for p in photographs for k, text in enumerate(p.captions)]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines))
    for split, own in of_splits(photographs).items():
        name = {"train": "train", "val": "dev", "test": "test"}[split]
        listed = folder / f"Flickr_8k.{name}Images.txt"
        listed.write_text("".join(f"{p.name}\n" for _, p in own))
    return [folder / "Flickr8k.token.txt"]


def flickr30k(folder, photographs):
    paths = []
    for split, own in of_splits(photographs).items():
        paths.append(folder / f"results_{split}.csv")
        lines = ["image_name| comment_number| comment"]
        lines += [f"{p.name}| {k}| {text}" for _, p in own for k, text in enumerate(p.captions)]
        paths[-1].write_text("\n".join(lines))
    return paths


def conceptual(folder, photographs):
    names = {"train": "Train_GCC-training", "val": "Validation_GCC-1.1.0-Validation"}
    paths = []
    for split, own in of_splits(photographs).items():
        paths.append(folder / f"{names.get(split, split)}.tsv")
        paths[-1].write_text(
            "".join(f"{text}\t{address(i)}\n" for i, p in own for text in p.captions)
        )
    return paths


def table(folder, photographs, name="captions.csv", delimiter=","):
    with open(folder / name, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["split", "image", "caption"])
        writer.writerows((p.split, p.name, text) for p, text in rows(photographs))
    return [folder / name]


def tsv(folder, photographs):
    return table(folder, photographs, "captions.tsv", "\t")


def jsonl(folder, photographs):
    lines = [{"image": p.name, "caption": p.captions, "split": p.split} for p in photographs]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [folder / "captions.jsonl"]


def folder_(folder, photographs):
    for photograph in photographs:
        path = folder / "photographs" / photograph.split / photograph.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photograph.contents)
        path.with_suffix(".txt").write_text("\n".join(photograph.captions))
    return [folder / "photographs"]


def webdataset(folder, photographs):
    """Texts in one half, JSON in the other."""
    (folder / "shards").mkdir()
    for k, (split, own) in enumerate(of_splits(photographs).items()):
        with tarfile.open(folder / "shards" / f"{k}-{split}-00000.tar", "w") as archive:
            for i, photograph in own:
                stem = photograph.name.removesuffix(".jpg")
                kind, text = "txt", "\n".join(photograph.captions)
                if i % 2:
                    kind, text = "json", json.dumps({"caption": photograph.captions})
                for ending, contents in ((kind, text.encode()), ("jpg", photograph.contents)):
                    member = tarfile.TarInfo(f"{stem}.{ending}")
                    member.size = len(contents)
                    archive.addfile(member, io.BytesIO(contents))
    return [folder / "shards"]


def _arrow(photographs, caption=list):
    pyarrow = pytest.importorskip("pyarrow")
    images = [{"bytes": p.contents, "path": p.name} for p in photographs]
    return pyarrow.table({"image": images, "caption": [caption(p.captions) for p in photographs]})


def parquet(folder, photographs):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    (folder / "data").mkdir()
    for k, (split, own) in enumerate(of_splits(photographs).items()):
        path = folder / "data" / f"{k}-{split}-00000-of-00001.parquet"
        pyarrow.write_table(_arrow([p for _, p in own]), path, row_group_size=2)
    return [folder / "data"]


def saved_to_disk(folder, photographs):
    """The files of `DatasetDict.save_to_disk`."""
    ipc, names = pytest.importorskip("pyarrow.ipc"), {"val": "validation"}
    splits = {names.get(split, split): own for split, own in of_splits(photographs).items()}
    (folder / "saved").mkdir()
    (folder / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    for split, own in splits.items():
        place, name = folder / "saved" / split, "data-00000-of-00001.arrow"
        place.mkdir()
        rows = _arrow([p for _, p in own])
        with ipc.new_stream(str(place / name), rows.schema) as stream:
            stream.write_table(rows, max_chunksize=2)
        (place / "dataset_info.json").write_text("{}")
        (place / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    return [folder / "saved"]


WRITERS = {  # format, as it is told by its look -> its files
    "karpathy": [karpathy],
    "coco": [coco],
    "flickr8k": [flickr8k],
    "flickr30k": [flickr30k],
    "conceptual": [conceptual],
    "csv": [table],
    "tsv": [tsv],
    "jsonl": [jsonl],
    "folder": [folder_],
    "webdataset": [webdataset],
    "huggingface": [parquet, saved_to_disk],
}


def files_below(path):
    """A file, or the files in a folder."""
    return [path] if Path(path).is_file() else sorted(p for p in path.rglob("*") if p.is_file())
