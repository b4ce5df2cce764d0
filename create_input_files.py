"""Turns a folder of images and their captions into the files that training reads."""

from groundwork.errors import UserError, run
from groundwork.options import MAX_IMAGE_SIZE, Parser, number


def parse_arguments():
    parser = Parser(description=__doc__)
    positive, count = number(int, above=0), number(int, least=0)
    size = number(int, above=0, below=MAX_IMAGE_SIZE + 1)
    few = number(int, above=0, below=1001)
    add = parser.add_argument
    add(
        "--dataset",
        choices=["coco", "flickr8k", "flickr30k", "demo"],
        help="names the input files; None: as --download says",
    )
    add(
        "--download",
        choices=["coco", "flickr8k", "flickr30k", "conceptual"],
        help="fetches this data set, or what is missing of it, and takes it: docs/downloads.md",
    )
    add("--download_folder", default="data/downloads", help="where what is fetched goes")
    add("--connections", type=few, default=32, help="images of conceptual fetched at once")
    add("--retry_failed", action="store_true", help="tries images again that could not be had")
    add("--karpathy_json", help="captions and splits in Karpathy's format; the demo makes its own")
    add("--image_folder", help="where the JSON's images are; the demo makes its own")
    add("--captions_per_image", type=few, default=5, help="sampled for each image")
    add("--min_word_freq", type=count, default=5, help="words seen more often have an index")
    add("--max_len", type=few, default=50, help="captions with more words are left out")
    add("--output_folder", default="data", help="where the input files go")
    add("--image_size", type=size, default=256, help="height and width, pixels")
    add("--workers", type=positive, help="threads that read images; None: one for each core")
    add(
        "--seed",
        type=number(int, least=0, below=2**63),
        default=0,
        help="of the sampling of captions",
    )
    add("--skip_bad_images", action="store_true", help="leave out images that cannot be read")
    typed = parser.typed()
    if not typed.keys() & {"dataset", "download"}:
        parser.error("--dataset names the data set, or --download fetches it")
    for name in ("connections", "retry_failed", "download_folder"):
        if name in typed and "download" not in typed:
            parser.error(f"--{name} goes with --download")
        if name != "download_folder" and name in typed and typed["download"] != "conceptual":
            parser.error(f"--{name} goes with --download conceptual")
    return parser.parse_args()


def main():
    options = vars(parse_arguments())

    # what follows takes a second to import
    import demo
    import downloads
    import utils

    name, folder = options.pop("download"), options.pop("download_folder")
    crawl = {key: options.pop(key) for key in ("connections", "retry_failed")}
    sources = (options["karpathy_json"], options["image_folder"])
    if name is not None:
        if sources != (None, None):
            raise UserError("--download takes neither --karpathy_json nor --image_folder")
        found = downloads.fetch(name, folder, **(crawl if name == "conceptual" else {}))
        if name != "conceptual":  # of which there is no reader
            [options["karpathy_json"]], options["image_folder"] = found
            options["dataset"] = options["dataset"] or name
            utils.create_input_files(**options)
    elif options["dataset"] == "demo" and sources == (None, None):
        for name in ("dataset", "karpathy_json", "image_folder"):
            del options[name]
        demo.prepare(**options)
    elif None in sources:
        needs = "takes both or neither of" if options["dataset"] == "demo" else "needs both"
        raise UserError(
            f"--dataset {options['dataset']} {needs} --karpathy_json and --image_folder"
        )
    else:
        utils.create_input_files(**options)


if __name__ == "__main__":
    run(main)
