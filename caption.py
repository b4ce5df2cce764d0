"""Captions image files and draws where the model looked for each word."""

import io
import json
import os
import sys
from collections import Counter, deque
from pathlib import Path

from groundwork.errors import UserError, printable, run
from groundwork.files import check_writable, make_folder, write_json, write_new
from groundwork.options import (
    SEVERAL,
    Parser,
    add_choosing_options,
    add_decoding_options,
    add_device_options,
    add_model_option,
    check_seed,
    number,
)
from groundwork.wording import Complaints, counted


def parse_arguments():
    parser = Parser(description=__doc__)
    positive = number(int, above=0)
    add = parser.add_argument
    add("--img", required=True, help="image files, folders of them; -: a list on stdin", **SEVERAL)
    add("--recursive", action="store_true", help="take the folders in the folders, too")
    otherwise = "or several, which caption together; None: the newest under data/"
    add_model_option(parser, otherwise, **SEVERAL)
    add("--word_map", help="WORDMAP file, for a checkpoint that holds no word map")
    add("--beam_size", type=positive, default=5, help="partial captions kept at each step")
    add("--n", type=positive, default=1, help="captions of an image, the best of the beam")
    add("--batch_size", type=positive, default=32, help="images captioned together")
    add("--output_folder", default="captions", help="for the pictures, one a caption")
    add("--no_pictures", action="store_true", help="draw none, which is faster")
    add("--numbers", action="store_true", help="in the pictures, how spread the attention is")
    add("--json", nargs="?", const="-", metavar="FILE", help="for all captions; -: print, no lines")
    add("--results", metavar="FILE", help="for the best captions as COCO results JSON")
    add("--ids", metavar="JSON", help="--results: COCO's or Karpathy's images, or name -> id")
    add("--show", action="store_true", help="open the pictures")
    add_decoding_options(parser)
    add_choosing_options(parser)
    add_device_options(parser)
    options = parser.parse_args()
    if options.show and options.no_pictures:
        parser.error("--show opens the pictures that --no_pictures leaves out")
    if options.numbers and options.no_pictures:
        parser.error("--numbers are in the pictures that --no_pictures leaves out")
    if options.ids and not options.results:
        parser.error("--ids are for --results")
    if options.results == "-":
        parser.error("--results takes a file")
    check_seed(parser, options)
    return options


def main():
    options = parse_arguments()

    # what follows takes seconds to import
    import checkpoints
    from captioner import Captioner
    from choosing import Search
    from coco_results import image_ids, write_results

    search = Search.of(vars(options))
    search.check_count(options.n)
    paths = find_images(options.img, options.recursive)
    ids = image_ids(paths, options.ids) if options.results else {}
    for file in (options.json, options.results):
        if file not in (None, "-"):
            check_writable(file)
    named = options.model or [checkpoints.newest_best_checkpoint("data")]
    model = Captioner.load(named, options.device, options.amp, options.word_map, options.look)
    search.check_words(model.word_map)
    if not options.no_pictures:
        make_folder(options.output_folder)

    records, unreadable = caption_all(model, paths, search, options)
    lengths = [len(caption["words"]) for record in records for caption in record["captions"]]
    if long := sum(length >= search.max_words for length in lengths):
        ends = counted(long, "caption ends", "captions end")
        print(f"{ends} at --max_words {search.max_words}: more may be wanted", file=sys.stderr)
    if options.json == "-":
        print(json.dumps(records, indent=2))
    elif options.json:
        write_json(options.json, records, indent=2)
    if options.results:
        references = [{"id": ids[record["image"]]} for record in records]
        write_results(options.results, references, [record["caption"] for record in records])
    if unreadable:
        raise UserError(
            f"{unreadable} of {counted(len(paths), 'image')} cannot be read (named above): "
            "mend them or leave them out of --img"
        )


# ------------------------------------------------------------------------------- images


def find_images(arguments, recursive):
    """The files named, and those in the folders named that have an image's ending, sorted. What
    else a folder holds is counted on stderr."""
    paths = {}
    for argument in arguments:
        for named in read_list() if argument == "-" else [argument]:
            for path in images_in(named, recursive) if Path(named).is_dir() else [named]:
                paths.setdefault(os.path.abspath(path), path)
    return list(paths.values())


def read_list():
    """The paths on standard input, one a line."""
    lines = [os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer]
    paths = [line for line in lines if line.strip()]
    if not paths:
        raise UserError("--img -: standard input names no image, one a line")
    return paths


def images_in(folder, recursive):
    """Paths of the images in a folder. Raises UserError where it has none, or cannot be read."""
    from groundwork.images import HEIC, endings

    known, found, other, closed, links = endings(), [], Counter(), 0, 0

    def refuse(error):
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(name for name in files if name[0] != "."):
            ending = Path(name).suffix.lower()
            if ending in known:
                found.append(os.path.join(place, name))
            else:
                other[ending or "without an ending"] += 1
        if not recursive:
            closed += len(folders)
            break
        links += sum(os.path.islink(os.path.join(place, name)) for name in folders)
    passed = [f"{count} {kind}" for kind, count in other.most_common()]
    if closed:
        passed.append(f"{counted(closed, 'folder')} (--recursive takes what is in there)")
    if links:
        passed.append(counted(links, "link to a folder", "links to folders"))
    kinds = ", ".join(passed)
    if other.keys() & set(HEIC):
        kinds += " (HEIC: pip install pillow-heif)"
    if not found:
        raise UserError(f"--img {folder}: no image in this folder{kinds and f', but {kinds}'}")
    if kinds:
        print(printable(f"{folder}: passed over {kinds}"), file=sys.stderr)
    return found


# ----------------------------------------------------------------------------- captions


def caption_all(model, paths, search, options):
    """Captions, draws and prints: the records for --json, and how many images cannot be read."""
    from groundwork.images import in_threads
    from groundwork.progress import progress

    def draw(item):
        """The item, with its captions' pictures as PNG."""
        path, image, captions = item
        return path, captions, [draw_png(caption, image, options.numbers) for caption in captions]

    records, unreadable = [], []
    with progress(total=len(paths), desc="captions", unit="image") as bar:
        captioned = caption_images(model, paths, unreadable, search, options)
        if options.no_pictures:
            drawn = ((path, captions, [None] * len(captions)) for path, _, captions in captioned)
        else:
            drawn = in_threads(draw, captioned)
        for path, captions, pictures in drawn:
            found = [keep(path, *pair, options) for pair in zip(captions, pictures, strict=True)]
            records.append({"image": path, **found[0], "captions": found})
            bar.update(len(records) + len(unreadable) - bar.n)
        bar.update(len(paths) - bar.n)
    return records, len(unreadable)


def caption_images(model, paths, unreadable, search, options):
    """Yields each image's path, itself in a size to draw, and its captions. What cannot be read is
    named on stderr and added to the list, and the others get their captions."""
    from groundwork.images import in_threads, open_image
    from groundwork.progress import say

    waiting = deque()

    def read(path):
        try:
            image = open_image(path)
        except UserError as error:
            return str(error)
        square = model.square(image).transpose(1, 2, 0)
        image.thumbnail((1320, 1320))  # as large as it is drawn at most: many wait
        return square, image

    def squares():
        with Complaints(lambda line: say(line, sys.stderr)) as complaints:
            for path, outcome in zip(paths, in_threads(read, paths), strict=True):
                if isinstance(outcome, str):
                    unreadable.append(path)
                    complaints.add(outcome)
                else:
                    square, image = outcome
                    waiting.append((path, image))
                    yield square

    asked = {"n": options.n, "batch_size": options.batch_size, "seed": options.seed}
    for captions in model.caption(squares(), **asked, **vars(search)):
        yield *waiting.popleft(), captions


def draw_png(caption, image, numbers):
    contents = io.BytesIO()
    # other levels take twice as long
    caption.draw(image, numbers).save(contents, format="PNG", compress_level=1)
    return contents.getvalue()


def keep(path, caption, png, options):
    """Writes a caption's picture and prints its line; returns what --json has of it."""
    from groundwork.progress import say

    about, picture, more = f"log p {caption.log_prob:.2f}", None, {}
    if caption.consensus is not None:
        about += f", consensus {caption.consensus:.2f}"
        more["consensus"] = round(caption.consensus, 4)
    if png is not None:
        name = os.fsdecode(os.fsencode(Path(path).name)[:180])  # systems allow 255 bytes
        picture = str(write_new(Path(options.output_folder, f"{name}_attention.png"), png))
        about += f", {'picture' if caption.alphas is None else 'attention'} in {picture}"
    if options.json != "-":
        say(f"{path}: {caption.text} ({about})")
    if options.show:
        from PIL import Image

        Image.open(io.BytesIO(png)).show()
    return {
        "caption": caption.text,
        "words": caption.words,
        "log_prob": round(caption.log_prob, 4),
        **more,
        "picture": picture,
    }


if __name__ == "__main__":
    run(main)
