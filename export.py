"""Writes a trained model as graphs that run without PyTorch, and captions with them.

As ONNX, in float32 or int8, it runs in onnxruntime; as an AOTInductor package, compiled for this
machine's processor, in PyTorch, from Python or C++. After writing, photographs are captioned by
both and the captions compared. With --run what was exported captions photographs, and with --time
it is timed beside PyTorch.
"""

import statistics
import time
from pathlib import Path

from groundwork.errors import UserError, in_a_line, run
from groundwork.files import check_readable, check_writable, folder_for, read_json
from groundwork.options import SEVERAL, Gathered, Parser, add_model_option, number
from groundwork.tables import print_table
from groundwork.wording import counted, size_of

CLOSE = 1e-3  # log p of the same caption, at most so far apart


def parse_arguments():
    parser = Parser(description=__doc__)
    positive = number(int, above=0)
    add = parser.add_argument
    otherwise = "or several, which caption together; None: the newest under data/"
    add_model_option(parser, otherwise, **SEVERAL)
    add("--word_map", help="WORDMAP file, for a checkpoint that holds no word map")
    add(
        "--look",
        choices=["soft", "argmax", "sample"],
        help="of hard attention: at the expected context, as it does without, or at the likeliest "
        "place; one drawn at random is in no graph",
    )
    add(
        "--format",
        choices=["onnx", "int8", "aoti"],
        nargs="+",
        action=Gathered,
        help="to write: onnx by default, int8 with --quantize; with --run: to caption with, the "
        "first that the folder has by default",
    )
    add(
        "--quantize",
        help="photographs, 50 to 100, for int8 to measure activations on",
        **SEVERAL,
    )
    add("--output_folder", default="exported", help="an export in it is replaced")
    add("--run", metavar="FOLDER", help="caption --img with what was exported to it")
    add(
        "--img",
        help="image files; without --run to compare captions of, None: a drawn scene",
        **SEVERAL,
    )
    add("--beam_size", type=positive, default=5, help="partial captions kept at each step")
    add(
        "--time",
        action="store_true",
        help="of --run: caption --img with --model in PyTorch, too, greedily and by the beam, and "
        "print milliseconds a photograph and the share of equal captions",
    )
    add("--threads", type=positive, default=1, help="number of threads, for --run")
    add("--results", metavar="FILE", help="with --run: for the captions as COCO results JSON")
    options, typed = parser.parse_args(), parser.typed()
    if options.run is None:
        for name in ("time", "threads", "results"):
            if name in typed:
                parser.error(f"--{name} is for --run")
        options.format = options.format or ["int8" if options.quantize else "onnx"]
        if "int8" in options.format and not options.quantize:
            parser.error("--format int8 takes photographs: name some by --quantize")
        if options.quantize and "int8" not in options.format:
            parser.error("--quantize is for --format int8: name it, too, or leave --quantize out")
        return options
    if not options.img:
        parser.error("--run captions photographs: name them by --img")
    if options.time and options.results:
        parser.error("--results goes without --time")
    if options.format and len(options.format) > 1 and not options.time:
        parser.error("--run captions by one --format; several are for --time")
    of_model = () if options.time else ("model", "word_map", "look")
    for name in ("output_folder", "quantize", *of_model):
        if name in typed:
            parser.error(f"--{name} is for exporting, and goes without --run")
    return options


def main():
    options = parse_arguments()
    if options.run is None:
        export(options)
    elif options.time:
        compare(options)
    else:
        caption(options)


# ------------------------------------------------------------------------------------ exporting


def export(options):
    """Writes the graphs, and keeps them where they caption as the model does."""
    # what follows takes seconds to import
    import exported
    import exporting
    from choosing import Search

    formats = list(dict.fromkeys(options.format))
    exporting.check_possible(formats)
    images = dict(open_images(options.img)) if options.img else {"a drawn scene": draw_scene()}
    for path in options.quantize or []:
        check_readable(path)
    with folder_for(options.output_folder) as place:
        check_writable(place / exported.ABOUT)
        model = load_model(options)
        Search(beam_size=options.beam_size).check_words(model.word_map)
        squares = [
            exported.square(image, model.image_size, model.fit)
            for _, image in open_images(options.quantize or [])
        ]
        with exporting.written(model, formats, squares) as folder:
            for format in formats:
                check(model, exported.Captioner(folder, format), images, options.beam_size)
            kept = exporting.keep(folder, place)
    for path in kept:
        print(f"{path}: {size_of(path.stat().st_size)}")


def load_model(options):
    """The `captioner.Captioner`, as graphs compute: in float32, on the CPU."""
    import checkpoints
    from captioner import Captioner

    named = options.model or [checkpoints.newest_best_checkpoint("data")]
    return Captioner.load(named, "cpu", "off", options.word_map, options.look)


def draw_scene():
    """A picture for those who name none."""
    from numpy.random import default_rng

    import demo

    rng = default_rng(0)
    return demo.draw(demo.compose(rng), 256, rng)


def check(model, graphs, images, beam_size):
    """Raises UserError where what is exported captions an image in other words than the model, or
    by another log p, as int8 alone may; prints the captions."""
    for name, image in images.items():
        [expected] = model.caption(image, beam_size=beam_size)
        try:
            found = graphs.caption(image, beam_size)
        except ValueError as error:
            raise UserError(f"{graphs.format}: nothing is kept: {error}") from error
        apart = abs(found.log_prob - expected.log_prob)
        said = f"{graphs.format}: {name}: '{found.text}'"
        if graphs.format == "int8" and found.words != expected.words:
            print(f"{said}, in PyTorch '{expected.text}'")
            continue
        if graphs.format != "int8" and (found.words != expected.words or not apart <= CLOSE):
            raise UserError(
                f"{graphs.format}: nothing is kept, as of {name} the export's caption "
                f"'{found.text}' ({found.log_prob:.4f}) is not the model's, '{expected.text}' "
                f"({expected.log_prob:.4f})"
            )
        print(f"{said}, as in PyTorch, log p {apart:.1e} apart")


# ----------------------------------------------------------------------------------- captioning


def open_images(paths):
    """Yields each file's path and its picture. Raises UserError."""
    from groundwork.images import open_image

    for path in paths:
        yield path, open_image(path)


def open_exported(folder, format, threads):
    """The `exported.Captioner` of a folder. Raises UserError."""
    import exported

    about = Path(folder, exported.ABOUT)
    check_readable(about, f"there is no exported model in {folder}: write one with export.py")
    found = read_json(about)
    if fault := exported.fault(found):
        raise UserError(f"{about} is not as export.py writes it: {fault}")
    if format not in (None, *found["formats"]):
        has = ", ".join(found["formats"])
        more = " --quantize PHOTOGRAPHS" if format == "int8" else ""
        again = " ".join([*found["formats"], format]) + more
        raise UserError(f"{folder} has no {format}, but {has}: export with --format {again}")
    try:
        return exported.Captioner(folder, format, threads)
    except ImportError as error:
        raise UserError(f"{folder} takes a package: pip install {error.name}") from error
    except Exception as error:  # of many classes, onnxruntime's own among them
        raise UserError(f"{folder} cannot be used, export again: {in_a_line(error)}") from error


def caption(options):
    """Prints what the exported model says of each photograph, and writes --results."""
    from word_rules import rule_of

    if options.results:
        from coco_results import image_ids, write_results  # which takes PyTorch

        ids = image_ids(options.img)
        check_writable(options.results)
    graphs = open_exported(options.run, (options.format or [None])[0], options.threads)
    rule = rule_of(graphs.about["word_map"])
    texts = []
    for path, image in open_images(options.img):
        found = graphs.caption(image, options.beam_size)
        texts.append(rule.join(found.words))
        print(f"{path}: {texts[-1]} (log p {found.log_prob:.2f})")
    if options.results:
        write_results(options.results, [{"id": ids[path]} for path in options.img], texts)


def compare(options):
    """Prints how long a photograph takes in PyTorch and exported, and how often they agree."""
    import torch

    torch.set_num_threads(options.threads)
    model = load_model(options)
    formats = options.format or open_exported(options.run, None, 1).about["formats"]
    systems = {"PyTorch": lambda image, width: next(model.caption(image, beam_size=width))}
    for format in formats:
        systems[format] = open_exported(options.run, format, options.threads).caption
    images = [image for _, image in open_images(options.img)]
    rows = []
    for width in dict.fromkeys([1, options.beam_size]):
        seconds, words = in_turn(systems, images, width)
        for name, own in seconds.items():
            equal = statistics.mean(
                a == b for a, b in zip(words[name], words["PyTorch"], strict=True)
            )
            times = {"beam": f"{width}", "by": name, "ms a photograph": f"{1000 * own:.0f}"}
            rows.append(times | {"captions as in PyTorch": f"{100 * equal:.0f}%"})
    print(f"{counted(len(images), 'photograph')}, {counted(options.threads, 'thread')}")
    print_table(rows)


def in_turn(systems, images, beam_size):
    """Median seconds of each system, and the words of its captions, of images that one after the
    other all of them caption; the first once before, unmeasured."""
    seconds, words = {name: [] for name in systems}, {name: [] for name in systems}
    for image in [images[0], *images]:
        for name, caption in systems.items():
            started = time.perf_counter()
            words[name].append(caption(image, beam_size).words)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(own[1:]) for name, own in seconds.items()}
    return medians, {name: own[1:] for name, own in words.items()}


if __name__ == "__main__":
    run(main)
