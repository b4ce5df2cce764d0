"""Images and people's captions of a split, of any data set, for a model that is judged by them."""

import hashlib
import json
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from coco_results import choose, id_of
from datasets import CaptionDataset, open_images, read_references, read_word_map
from groundwork.errors import UserError
from groundwork.files import check_listable
from groundwork.hdf5 import open_hdf5, read_item
from groundwork.images import squeeze
from groundwork.wording import counted, some
from utils import input_path
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
        count, _, side, _ = open_images(self.path).shape
        self.image_size = model.side_for(side)
        path = input_path(folder, base, "REFERENCES", split)
        if path.exists():
            self.references = read_references(path, may_lack_captions=True)
        else:
            whole = CaptionDataset(folder, base, split, karpathy_json=karpathy_json)
            self.references = whole.references
        if len(self.references) != count:
            raise UserError(
                f"{path} has references of {counted(len(self.references), 'image')}, not of "
                f"{count}: run create_input_files.py again"
            )
        self.places, self.count, self._images = list(range(count)), count, None
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
        if self._images is None:  # here, not in __init__: each worker process opens its own
            self._images = open_hdf5(self.path, "images")
        image = read_item(self._images, self.places[i])
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
    bases = sorted(
        {p.stem.removeprefix("WORDMAP_") for p in where.glob("WORDMAP_*.json")}
        | {p.stem.partition("_IMAGES_")[2] for p in where.glob("*_IMAGES_*.hdf5")}
    )
    base = name or (own if own in bases or (folder is None and own) else None)
    if base is not None and base not in bases:
        raise UserError(
            f"no data set {base!r} in {where}: there is {some(bases) or 'none'}"
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
    if not input_path(where, base, "IMAGES", split).exists():
        raise UserError(
            f"{base} in {where} has no {split.lower()} split: choose another with --split"
        )
    return where, base
