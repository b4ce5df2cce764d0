"""Captions image files and draws where the model looked for each word."""

import json
import sys
from pathlib import Path

from groundwork.errors import UserError, printable, run
from groundwork.files import atomic_write, make_folder
from groundwork.options import Parser, add_decoding_options, add_device_options, number
from groundwork.wording import counted


def parse_arguments():
    parser = Parser(description=__doc__)
    positive = number(int, above=0)
    add = parser.add_argument
    add("--img", required=True, nargs="+", help="image files, or folders of them")
    add("--model", help="a checkpoint; None: the newest BEST checkpoint under data/")
    add("--word_map", help="WORDMAP file, for a checkpoint that holds no word map")
    add("--beam_size", type=positive, default=5, help="partial captions kept at each step")
    add("--batch_size", type=positive, default=32, help="images captioned together")
    add("--output_folder", default="captions", help="for the pictures, one an image")
    add("--json", action="store_true", help="print a JSON list instead of lines")
    add("--show", action="store_true", help="open the pictures")
    add_decoding_options(parser)
    add_device_options(parser)
    return parser.parse_args()


def main():
    options = parse_arguments()

    # what follows takes seconds to import
    import checkpoints
    from captioner import Captioner

    paths = find_images(options.img)
    path = options.model or checkpoints.newest_best_checkpoint("data")
    model = Captioner.load(path, options.device, options.amp, options.word_map)
    model.check_beam_size(options.beam_size)
    pictures = name_pictures(paths, make_folder(options.output_folder))

    read, unreadable, records = [], [], []
    captions = model.caption(
        open_images(paths, read, unreadable),
        options.beam_size,
        max_length=options.max_len,
        length_penalty=options.length_penalty,
        batch_size=options.batch_size,
    )
    for i, caption in enumerate(captions):
        path = read[i]
        records.append(report(path, caption, pictures[path], options))
    if options.json:
        print(json.dumps(records, indent=2))
    if unreadable:
        raise UserError(
            f"{len(unreadable)} of {counted(len(paths), 'image')} cannot be read (named above): "
            "mend them or leave them out of --img"
        )


def find_images(arguments):
    """The files named, and those in the folders named that have an image's ending, sorted."""
    from groundwork.images import endings

    paths = []
    for argument in map(Path, arguments):
        if argument.is_dir():
            found = sorted(
                p for p in argument.iterdir() if p.suffix.lower() in endings() and p.name[0] != "."
            )
            if not found:
                raise UserError(f"--img {argument}: no image in this folder")
            paths += found
        else:
            paths.append(argument)
    return list(dict.fromkeys(paths))


def open_images(paths, read, unreadable):
    """Yields the images' pictures, and adds each path to one of the lists. What cannot be read is
    named on stderr, and the others get their captions."""
    from groundwork.images import open_image

    for path in paths:
        try:
            picture = open_image(path)
        except UserError as error:
            unreadable.append(path)
            print(error, file=sys.stderr)
        else:
            read.append(path)
            yield picture


def name_pictures(paths, folder):
    """Path of each image's picture; files of the same name get numbers."""
    pictures, taken = {}, set()
    for path in paths:
        names = (f"{path.stem}{number}_attention.png" for number in ["", *range(2, len(paths) + 1)])
        pictures[path] = folder / next(name for name in names if name not in taken)
        taken.add(pictures[path].name)
    return pictures


def report(path, caption, picture, options):
    """Draws and prints an image's caption; returns what --json prints of it."""
    drawn = caption.draw(path)
    with atomic_write(picture) as temporary:
        drawn.save(temporary, format="PNG")
    if not options.json:
        line = f"{path}: {caption.text} (log p {caption.log_prob:.2f}, attention in {picture})"
        print(printable(line))
    if options.show:
        drawn.show()
    return {
        "image": str(path),
        "caption": caption.text,
        "log_prob": round(caption.log_prob, 4),
        "picture": str(picture),
    }


if __name__ == "__main__":
    run(main)
