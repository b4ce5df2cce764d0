"""Images and people's captions of a split, of any data set, for a model that is judged by them."""

import hashlib
import json
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from coco_results import choose, id_of
from datasets import CaptionDataset, of_images, open_images, read_references, read_word_map
from groundwork.errors import UserError
from groundwork.files import check_folder, check_listable
from groundwork.images import squeeze
from groundwork.wording import counted, some
from input_files import input_path, input_paths
from storage import shard_name, shard_of
from word_maps import encode_caption
from word_rules import rule_of


class EvaluationData(Dataset):
    """Item i is image i with people's captions: (image, captions, lengths).

    It takes a split's images and references alone: the captions are those of the references, in the
    words of the model. So the data set may be another than the model's.

    image: uint8 (3, S, S), of the size that the model is for.
    captions: int64 (K, T), `<start>` to `<end>`, padded; an image with fewer than others has some
        of them again. Of a split without captions K is 0.
    lengths: int64 (K,), `<start>` and `<end>` counted.

    Args:
        folder, base, split: which input files; split is TRAIN, VAL or TEST.
        model: a `captioner.Captioner`, of which it takes words, image size and training data.
        karpathy_json: path of the data set's JSON, for the captions as written where there is no
            REFERENCES file; without it they are the encoded captions.

    Raises:
        UserError: a file is missing, damaged, or does not belong to the others.
    """

    def __init__(self, folder, base, split, model, karpathy_json=None):
        self.base, self.word_map, self.rule = base, model.word_map, rule_of(model.word_map)
        self.split, self.about = split.lower(), model.about
        self.path = input_path(folder, base, "IMAGES", split)
        self.images = open_images(folder, base, split)
        if self.images.fit != model.fit:
            raise UserError(
                f"{self.path} holds images made by --fit {self.images.fit}, and the model is for "
                f"--fit {model.fit}: make the input files so, by create_input_files.py"
            )
        self.image_size = model.side_for(self.images.side)
        paths = input_paths(folder, base, "REFERENCES", split)
        if paths[0].exists():
            found = [r for own in paths for r in read_references(own, may_lack_captions=True)]
            self.references = of_images(found, self.images, paths[0])
        else:
            whole = CaptionDataset(folder, base, split, karpathy_json=karpathy_json)
            self.references = whole.references
        self.count = len(self.images)
        self.places = list(range(self.count))
        texts = [reference["captions"] for reference in self.references]
        self.per_image = max(map(len, texts))
        self.longest = max((len(self.rule.split(t)) for own in texts for t in own), default=0)

    def keep(self, subset, value):
        """Keeps those images alone that a subset from `coco_results.read_subset` takes; `value` is
        that of --subset. Raises UserError."""
        ids = [id_of(reference["id"]) for reference in self.references]
        names = {r["filename"]: id_ for r, id_ in zip(self.references, ids, strict=True)}
        kept = set(choose(subset, ids, names, value, self.path.name))
        self.places = [i for i, id_ in enumerate(ids) if id_ in kept]
        self.references = [self.references[i] for i in self.places]

    @property
    def has_captions(self):
        """Whether there is something to score by: captions of tests may be kept back."""
        return self.per_image > 0

    @property
    def fingerprint(self):
        """Six hexadecimal digits of the images' ids, for the names of files."""
        ids = [reference["id"] for reference in self.references]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:6]

    @property
    def is_of_training(self):
        """Whether it is the data set that the model was trained on, as far as names and words
        tell."""
        word_map = input_path(self.path.parent, self.base, "WORDMAP")
        if self.base != self.about["base"] or not word_map.exists():
            return self.base == self.about["base"]
        return read_word_map(self.path.parent, self.base) == self.word_map

    @property
    def description(self):
        """For people: data set, split, how much of it."""
        line = f"{self.base}, {self.split} split"
        if len(self) < self.count:
            line += f", {len(self)} of its {counted(self.count, 'image')}"
        if not self.is_of_training:
            line += f" (not what the model was trained on, {self.about['base'] or 'unknown'})"
        return line

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        image = self.images[self.places[i]]
        if image.shape[-1] != self.image_size:
            image = squeeze(Image.fromarray(image.transpose(1, 2, 0)), self.image_size)
        texts = self.references[i]["captions"]
        encoded = [
            encode_caption(self.rule.split(texts[k % len(texts)]), self.word_map, self.longest)
            for k in range(self.per_image)
        ]
        captions = torch.tensor([caption for caption, _ in encoded], dtype=torch.int64)
        lengths = torch.tensor([length for _, length in encoded], dtype=torch.int64)
        return torch.from_numpy(image), captions, lengths


def find_data_set(path, about, folder, name, split):
    """Folder and base name of the data set to evaluate on: the one named, or else the one that the
    model was trained on, or the only one there is.

    Args:
        path: of the checkpoint, and what it says `about` itself.
        folder, name: as they were asked for, or None.
        split: as the files name it.

    Raises:
        UserError: there is none, without this split, or several.
    """
    own, trained_in = about["base"], about["options"]["data_folder"]
    where = Path(folder or trained_in)
    check_listable(where)
    if folder is not None or name is not None:
        check_folder(where, "--data_folder")
    bases = sorted(
        {p.stem.removeprefix("WORDMAP_") for p in where.glob("WORDMAP_*.json")}
        | {_base_of(path) for path in where.glob("*_IMAGES_*.hdf5")}
    )
    base = name or (own if own in bases or (folder is None and own) else None)
    if base is not None and base not in bases:
        raise UserError(
            f"no data set {base!r} in {where}: known are {some(bases) or 'none'}"
            if name
            else f"{path} was trained on {own} in {trained_in}, which is not here: name the folder "
            "that has it now, or another data set's, with --data_folder"
        )
    if base is None and not bases:
        raise UserError(
            f"no data set in {where}: name a folder of create_input_files.py with --data_folder (a "
            "run's own goes to --model)"
        )
    if base is None and len(bases) > 1:
        raise UserError(
            f"{where} holds {len(bases)} data sets, {some(bases)}: choose one with --data_name"
        )
    base = base or bases[0]
    if not input_paths(where, base, "IMAGES", split)[0].exists():
        raise UserError(
            f"{base} in {where} has no {split.lower()} split: choose another with --split"
        )
    return where, base


def _base_of(path):
    """The base name in the name of a file of images."""
    name = path.stem.removesuffix(shard_name(*shard)) if (shard := shard_of(path)) else path.stem
    return name.partition("_IMAGES_")[2]
