"""Turns images and their captions, of any format, into the files that training reads."""

from dataclasses import fields, replace

from groundwork.errors import UserError, run
from groundwork.options import FITS, MAX_IMAGE_SIZE, Parser, number
from word_rules import RULES, USUAL


def parse_arguments():
    parser = Parser(description=__doc__)
    positive, count = number(int, above=0), number(int, least=0)
    size = number(int, above=0, below=MAX_IMAGE_SIZE + 1)
    few = number(int, above=0, below=1001)
    add = parser.add_argument
    add(
        "--dataset",
        help="any name, for the files; demo alone is drawn and made; None: as --download says",
    )
    add(
        "--download",
        choices=["coco", "flickr8k", "flickr30k", "conceptual"],
        help="fetches this data set, or what is missing of it, and takes it: docs/downloads.md",
    )
    add("--download_folder", default="data/downloads", help="where what is fetched goes")
    add("--connections", type=few, default=32, help="images of conceptual fetched at once")
    add("--retry_failed", action="store_true", help="tries images again that could not be had")
    add("--captions", nargs="+", metavar="FILE", help="files or folders with captions, in order")
    add("--karpathy_json", help="--captions in Karpathy's format")
    add("--format", help="of --captions, as docs/data.md names it; None: by its look")
    add("--image_folder", help="of the images, which webdataset and huggingface hold themselves")
    add("--image_column", default="image", help="with names of images, of tables")
    add("--caption_column", default="caption", help="with captions, of tables")
    add("--split_column", help="with train, val or test; None: split, where there is one")
    add(
        "--split_sizes",
        type=number(float, least=0, below=1e9),
        nargs=3,
        metavar=("TRAIN", "VAL", "TEST"),
        help="how images are shared out where the data have no splits; None: 0.8 0.1 0.1",
    )
    add("--max_images", type=positive, help="so many images at most, drawn at random")
    add("--captions_per_image", type=few, default=5, help="sampled for each image")
    add(
        "--words",
        choices=[*RULES],
        help=f"the rule that splits captions, docs/words.md; None: {USUAL}, or --word_map's",
    )
    add("--subwords", type=positive, metavar="N", help="learns so many pieces of words, as words")
    add("--min_word_freq", type=count, default=5, help="words seen more often have an index")
    add(
        "--vocabulary_size",
        type=positive,
        metavar="N",
        help="the most frequent words have an index, so many with the special ones",
    )
    add("--word_map", metavar="FILE", help="takes the words of a WORDMAP file or a checkpoint")
    add("--extend_vocabulary", action="store_true", help="and new ones of the captions, behind")
    add("--max_len", type=few, default=50, help="captions with more words are left out")
    add("--output_folder", default="data", help="where the input files go")
    add("--image_size", type=size, default=256, help="height and width, pixels")
    add(
        "--fit",
        choices=FITS,
        default="squeeze",
        help="how an image becomes a square: all of it squeezed; its middle, cropped; or all of it "
        "in its proportions, on a plain background",
    )
    add(
        "--store",
        choices=["raw", "jpeg"],
        default="raw",
        help="pixels, or JPEGs, which take a tenth of the room and are decoded on the way",
    )
    shards = number(int, above=0, below=100_000)
    add("--shards", type=shards, help="files that the training split is cut into; None: one")
    add("--workers", type=positive, help="threads that read images; None: one for each core")
    add(
        "--seed",
        type=number(int, least=0, below=2**63),
        default=0,
        help="of all that is drawn: captions, splits, --max_images",
    )
    add("--skip_bad_images", action="store_true", help="leave out images that cannot be read")
    add(
        "--preview",
        action="store_true",
        help="writes a page about the data set, its words and its duplicates, and nothing else",
    )
    typed = parser.typed()
    if not typed.keys() & {"dataset", "download"}:
        parser.error("--dataset names the data set, or --download fetches it")
    for name in ("connections", "retry_failed", "download_folder"):
        if name in typed and "download" not in typed:
            parser.error(f"--{name} goes with --download")
        if name != "download_folder" and name in typed and typed["download"] != "conceptual":
            parser.error(f"--{name} goes with --download conceptual")
    for name in ("captions", "karpathy_json", "format", "image_folder"):
        if name in typed and "download" in typed:
            parser.error(f"--{name} goes without --download, which knows its own")
    options = parser.parse_args()
    check_words(parser, options, typed)
    return options


def check_words(parser, options, typed):
    """Refuses options about words that do not go together; changes those that follow from others:
    the rule of --subwords, and --min_word_freq, which is 0 where words are chosen another way."""
    whole = options.word_map is not None and not options.extend_vocabulary
    for name, others in (
        ("subwords", ["word_map", "vocabulary_size", "min_word_freq"]),
        ("word_map", ["vocabulary_size", "min_word_freq"] if whole else []),
    ):
        for other in others:
            if name in typed and other in typed:
                parser.error(f"--{name} goes without --{other}, as it says what words there are")
    if options.extend_vocabulary and options.word_map is None:
        parser.error("--extend_vocabulary goes with --word_map, whose words it adds to")
    if options.subwords is not None and options.words not in (None, "subwords"):
        parser.error(f"--subwords makes other words than --words {options.words}: leave one out")
    if options.words == "subwords" and options.subwords is None and options.word_map is None:
        parser.error("--words subwords takes their number: --subwords 4000")
    if options.subwords is not None:
        options.words = "subwords"
    told = options.subwords or options.vocabulary_size or whole
    if told and "min_word_freq" not in typed:
        options.min_word_freq = 0


def main():
    options = vars(parse_arguments())

    # what follows takes a second to import
    import demo
    import formats
    import utils

    options["reading"] = formats.Options(
        **{field.name: options.pop(field.name) for field in fields(formats.Options)}
    )
    options["wanted"] = find_words(options)
    find_captions(options)
    if options["captions"] is None and options["dataset"] == "demo":
        folder = options["output_folder"]
        options["captions"], options["image_folder"] = demo.find_or_draw(folder)
    if options["captions"] is None:
        raise UserError(
            f"--dataset {options['dataset']} needs its --captions and --image_folder: demo alone "
            "is made here"
        )
    if options.pop("preview"):
        import preview

        preview.write(**{name: options[name] for name in preview.OPTIONS})
    else:
        utils.create_input_files(**options)


def find_words(options):
    """The `word_maps.Wanted` that the options tell, which it takes out of the dict."""
    from word_maps import Wanted

    path, subwords = options.pop("word_map"), options.pop("subwords")
    size = options.pop("vocabulary_size") or subwords
    rule, extend, word_map = options.pop("words"), options.pop("extend_vocabulary"), None
    if path is not None:
        import transfer  # takes seconds

        word_map = transfer.read_word_map(path)
    return Wanted(rule, size, word_map, path, extend)


def find_captions(options):
    """Settles where the captions are and in which format, and fetches them where that is asked for:
    changes the options, a dict."""
    import downloads

    name, folder = options.pop("download"), options.pop("download_folder")
    crawl = {key: options.pop(key) for key in ("connections", "retry_failed")}
    karpathy_json, form = options.pop("karpathy_json"), None
    if name is not None:
        found = downloads.fetch(name, folder, **(crawl if name == "conceptual" else {}))
        options["captions"], options["image_folder"] = found
        options["dataset"] = options["dataset"] or name
        form = "conceptual" if name == "conceptual" else "karpathy"
    elif karpathy_json is not None:
        if options["captions"] is not None or options["reading"].format not in (None, "karpathy"):
            raise UserError(
                "--karpathy_json FILE is --captions FILE --format karpathy: give either"
            )
        options["captions"], form = [karpathy_json], "karpathy"
    elif options["captions"] is None and options["image_folder"] is not None:
        # they lie beside the images
        options["captions"], options["image_folder"] = [options["image_folder"]], None
    if form is not None:
        options["reading"] = replace(options["reading"], format=form)


if __name__ == "__main__":
    run(main)
