"""Captions image files and draws where the model looked for each word."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import checkpoints
import utils
from utils import UserError


def parse_arguments():
    parser = utils.Parser(description=__doc__)
    positive = utils.number(int, above=0)
    add = parser.add_argument
    add("--img", required=True, nargs="+", help="image files, or folders of them")
    add("--model", help="a checkpoint; None: the newest BEST checkpoint under data/")
    add("--word_map", help="WORDMAP file, for a checkpoint that holds no word map")
    add("--beam_size", type=positive, default=5, help="partial captions kept at each step")
    add("--batch_size", type=positive, default=32, help="images captioned together")
    add("--output_folder", default="captions", help="for the pictures, one an image")
    add("--json", action="store_true", help="print a JSON list instead of lines")
    add("--show", action="store_true", help="open the pictures")
    utils.add_decoding_options(parser)
    utils.add_device_options(parser)
    return parser.parse_args()


def main():
    options = parse_arguments()
    paths = find_images(options.img)
    path = options.model or checkpoints.newest_best_checkpoint("data")
    model = checkpoints.load_model(path, options.device, options.amp, options.word_map)
    utils.check_beam_size(options.beam_size, model.word_map)
    pictures = name_pictures(paths, utils.make_folder(options.output_folder))

    records, unreadable = [], []
    for start in range(0, len(paths), options.batch_size):
        batch, images = [], []
        for path in paths[start : start + options.batch_size]:
            try:
                images.append(utils.read_image(path, model.checkpoint["image_size"]))
                batch.append(path)
            except UserError as error:  # the others get their captions before it is reported
                unreadable.append(path)
                print(error, file=sys.stderr)
        for path, caption in zip(batch, caption_images(model, images, options), strict=True):
            records.append(report(path, caption, pictures[path], model, options))
    if options.json:
        print(json.dumps(records, indent=2))
    if unreadable:
        raise UserError(
            f"{len(unreadable)} of {len(paths)} images cannot be read (named above): "
            "mend them or leave them out of --img"
        )


def find_images(arguments):
    """The files named, and those in the folders named that have an image's ending, sorted."""
    endings = {e for e, kind in Image.registered_extensions().items() if kind in utils.FORMATS}
    paths = []
    for argument in map(Path, arguments):
        if argument.is_dir():
            found = sorted(
                p for p in argument.iterdir() if p.suffix.lower() in endings and p.name[0] != "."
            )
            if not found:
                raise UserError(f"--img {argument}: no image in this folder")
            paths += found
        else:
            paths.append(argument)
    return list(dict.fromkeys(paths))


def name_pictures(paths, folder):
    """Path of each image's picture; files of the same name get numbers."""
    pictures, taken = {}, set()
    for path in paths:
        names = (f"{path.stem}{number}_attention.png" for number in ["", *range(2, len(paths) + 1)])
        pictures[path] = folder / next(name for name in names if name not in taken)
        taken.add(pictures[path].name)
    return pictures


@torch.inference_mode()
def caption_images(model, images, options):
    """A `decoding.Caption` for each image, np.uint8 (3, S, S)."""
    if not images:
        return []
    with model.autocast():
        features = model.encoder.features(torch.from_numpy(np.stack(images)).to(model.device))
    return model.search(features, options.beam_size, options)


def report(path, caption, picture, model, options):
    """Draws and prints an image's caption; returns what --json prints of it."""
    words = model.to_words(caption)
    utils.draw_attention(utils.open_image(path), words, caption.alphas, picture)
    text = " ".join(words)
    if not options.json:
        line = f"{path}: {text} (log p {caption.log_prob:.2f}, attention in {picture})"
        print(utils.printable(line))
    if options.show:
        Image.open(picture).show()
    return {
        "image": str(path),
        "caption": text,
        "log_prob": round(caption.log_prob, 4),
        "picture": str(picture),
    }


if __name__ == "__main__":
    utils.run(main)
