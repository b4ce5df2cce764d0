"""Captions a split with a trained model, prints the scores, writes the captions as COCO results.

With --results and --references it scores captions that any other system made.
"""

import hashlib
import os
import sys
from contextlib import contextmanager
from pathlib import Path

from config import SearchConfig
from groundwork.errors import UserError, run
from groundwork.files import check_folder, check_writable, names
from groundwork.options import (
    SEVERAL,
    Parser,
    add_choosing_options,
    add_decoding_options,
    add_device_options,
    add_model_option,
    add_region_options,
    add_workers_option,
    check_seed,
    number,
)
from groundwork.tables import print_tables


def parse_arguments():
    parser = Parser(description=__doc__)
    positive = number(int, above=0)
    add = parser.add_argument
    add_model_option(
        parser,
        "or several, which caption together; None: the one in --output_folder, or the newest under "
        "--data_folder or data/",
        **SEVERAL,
    )
    add(
        "--word_map",
        help="WORDMAP file, for a checkpoint that holds no word map; for --results, the one or a "
        "checkpoint, by whose rule captions are split",
    )
    add("--data_folder", help="with the input files; None: the one that the model was trained on")
    add("--data_name", help="base name of the data set; None: the model's own, or the only one")
    add("--karpathy_json", help="the data set's, where the input files have no REFERENCES")
    add("--split", choices=["test", "val", "train"], default="test")
    add(
        "--subset",
        help="of the split: so many images, from the first, or those whose ids or names a file "
        "lists, one a line or as JSON, COCO results among it",
    )
    add("--beam_size", type=positive, nargs="+", default=[5], help="one, or several to compare")
    add("--batch_size", type=positive, default=128, help="images")
    add(
        "--output_folder",
        "--results_folder",
        help="for the captions; None: the checkpoint's, if it can be written in",
    )
    add(
        "--attention_report",
        type=number(int, least=0),
        nargs="?",
        const=20,
        metavar="IMAGES",
        help="measure where the model looked, too, and on so many images, 20 by default, whether "
        "its words depend on it",
    )
    add_region_options(parser)
    add(
        "--diversity",
        type=number(int, least=2, below=101),
        nargs="?",
        const=5,
        metavar="CAPTIONS",
        help="draw so many captions of each image, too, 5 by default, and measure how varied they "
        "are",
    )
    add("--report", metavar="FOLDER", help="for a page with scores, curves and all captions")
    add(
        "--robustness",
        type=positive,
        nargs="?",
        const=200,
        metavar="IMAGES",
        help="caption images of the split under perturbations, too: so many, 200 by default",
    )
    add("--results", help="captions made elsewhere, as COCO results JSON, to score instead")
    add(
        "--references",
        help="for --results: people's captions, in any format of create_input_files.py; of its "
        "splits --split",
    )
    add_workers_option(parser)
    add_decoding_options(parser)
    choosing = add_choosing_options(parser)
    add_device_options(parser)
    options, typed = parser.parse_args(), parser.typed()
    check_seed(parser, options)
    if (options.results is None) != (options.references is None):
        raise UserError("--results and --references go together")
    if options.results is not None:
        of_model = [
"model", "report", "robustness", "diversity", "attention_report", "regions",
"region_words",
]  # fmt: skip
        for name in [*of_model, "look", *choosing]:
            if name in typed:
                raise UserError(f"--{name} is about a model: it goes without --results")
    return options


def main():
    options = parse_arguments()
    if options.results is not None:
        score_results(options)
        return
    if options.region_words and options.regions is None:
        raise UserError("--region_words are for --regions")

    # what follows takes seconds to import
    from groundwork import distributed
    from groundwork.devices import choose_device

    if options.attention_report is not None:
        from parts_of_speech import check_installed

        check_installed()
    with distributed.group(choose_device(options.device)):
        evaluate(options)


def evaluate(options):
    """Captions the split and says all that was asked for."""
    import attention_report
    import evaluation
    import report
    from captioner import Captioner
    from groundwork import distributed
    from regions import find

    search, widths = choose_search(options)
    paths = find_models(options)
    model = Captioner.load(paths, options.device, options.amp, options.word_map, options.look)
    for beam_size in widths:
        search.of(beam_size).check_words(model.word_map)
    data = open_split(paths[0], model, options)
    regions = find(data.references, options.regions, options.region_words.split())
    logs = training_logs(paths, model) if options.report is not None else {}
    asked = options.output_folder is not None
    folder = Path(options.output_folder if asked else paths[0].parent)
    part, source = file_name_parts(paths, model, data, options)
    written = {k: folder / f"results_{part}_{search.of(k).file_part}_{source}.json" for k in widths}
    first = next(iter(written.values()))
    results = Place(first, CAPTION * len(data), asked, needed=not data.has_captions)
    page = options.report and Place(report.page_path(options.report), PICTURE * len(data))
    picture = options.robustness and Place(
        folder / f"robustness_{part}_{source}.png", PICTURE, asked
    )

    whole, asked_for_attention = bool(page) and page.is_open, options.attention_report is not None
    captions, beams = evaluation.caption_split(model, data, widths, search, whole)
    if distributed.is_main and results.is_open:
        with results.writing():
            write_captions(written, data, captions)
    if not data.has_captions:
        return
    attention = attention_report.measure(
        captions, data.references, regions, asked_for_attention, model.look, model.decoder.blind,
        model.rule,
    )  # fmt: skip
    tables = attention.tables + draw_captions(options, model, data, search)
    if distributed.is_main:
        about, scores = print_scores(
            paths, model, data, captions, attention._replace(tables=tables), search
        )

    def write_page(**further):
        if distributed.is_main and whole:
            with page.writing():
                report.write(
                    page.path, model.word_map, data, captions, beams, about, scores, logs,
                    data.is_of_training, **further,
                )  # fmt: skip
                print(f"report{', with these' if further else ''}: {page.path}")

    write_page()  # before what may take long or fail
    with_attention = options.attention_report and attention.tables
    change_images(options, model, data, captions, with_attention, picture, search, write_page)
    places = (place for place in (results, page, picture) if place)
    if any(place.asked and not place.is_open for place in places):
        sys.exit(1)


def check_for_results_alone(data, options):
    """Raises UserError where more is asked for of images without captions than the results."""
    for name in ("attention_report", "diversity", "regions", "report", "robustness"):
        if getattr(options, name) is not None:
            raise UserError(
                f"--{name} compares with people's captions, of which {data.path.name} has none: "
                "leave it out, for the results file alone"
            )


def draw_captions(options, model, data, search):
    """Tables on how varied captions drawn at random are, where they are asked for."""
    import diversity
    import evaluation
    import metrics

    if options.diversity is None:
        return []
    samples = evaluation.sample_split(model, data, options.diversity, search)
    people = [reference["captions"] for reference in data.references]
    return [diversity.table(samples, people, metrics.are_english(people), model.rule.split)]


def change_images(options, model, data, captions, with_attention, picture, search, write_page):
    """Says what is found on changed images: whether words depend on where the model looked, and how
    robust the captions are."""
    import attention_report
    import robustness
    from groundwork import distributed

    further = {}
    if with_attention:
        count = options.attention_report
        further["probed"] = attention_report.probe_words(model, data, captions, count)
        print_tables("", further["probed"].tables, further["probed"].notes)
        write_page(**further)
    if options.robustness:
        count, width = options.robustness, next(iter(captions))
        shown = picture.path if picture.is_open else None
        with picture.writing():
            changed = robustness.report(model, data, count, options.split, width, search, shown)
        if distributed.is_main and picture.is_open:
            write_page(changed=changed, **further)


def choose_search(options):
    """The `SearchConfig` asked for, and the widths of the beam; of captions that are drawn None."""
    from choosing import Search

    first, *others = options.beam_size
    search = Search.of(vars(options) | {"beam_size": first})
    config = SearchConfig(search, options.batch_size, options.workers, options.seed)
    if search.draws and others:
        raise UserError("several --beam_size are for beam search, and these captions are drawn")
    widths = [None] if search.draws else options.beam_size
    for beam_size in others:
        config.of(beam_size)  # refuses what does not go with it
    return config, widths


def find_models(options):
    """Paths of the checkpoints asked for, or of the one that there is."""
    import checkpoints

    if options.model is not None:
        return list(map(checkpoints.find_checkpoint, options.model))
    if options.output_folder is not None and checkpoints.best_checkpoints(options.output_folder):
        return [checkpoints.find_checkpoint(options.output_folder)]
    if options.data_folder is not None:
        check_folder(options.data_folder, "--data_folder")
    return [checkpoints.newest_best_checkpoint(options.data_folder or "data")]


# Bytes on the disk, at most as a rule: a caption of an image, and an image in the report
CAPTION, PICTURE = 200, 30_000


class Place:
    """Where a file is to be written, tried before hours of work. What cannot be written is one line
    on stderr, and the scores come all the same.

    Args:
        path: of the file.
        size: bytes, about.
        asked: whether the user has named its folder: then the script ends with status 1.
        needed: whether there is nothing else to come, so that it ends at once.
    """

    def __init__(self, path, size, asked=True, needed=False):
        from groundwork import distributed

        self.path, self.asked, self.needed, self.fault = path, asked, needed, None
        if distributed.is_main:
            with self.writing():
                check_writable(path, size)

    @property
    def is_open(self):
        return self.fault is None

    @contextmanager
    def writing(self):
        """Catches what keeps the block from writing, and says it."""
        try:
            yield
        except UserError as error:
            if self.needed:
                raise
            self.fault = error
            kind = "error" if self.asked else "not written"
            print(f"{kind}: {error}; the scores are printed all the same", file=sys.stderr)


def file_name_parts(paths, model, data, options):
    """What tells the files of one evaluation from another's: which part of the data it is of, how
    the model looked where that is not as usual, and the checkpoints, with the data set where it is
    another than the model's."""
    from datasets import describe_data

    subset = ""
    if options.subset is not None:
        which = "first" if options.subset.isdecimal() else f"subset_{data.fingerprint}_"
        subset = f"_{which}{Path(options.subset).stem}"
    look = f"_{model.look}" if model.look in model.decoder.looks[1:] else ""
    other = f"_on_{data.base}" if data.base != model.about["base"] else ""
    folder, [*_, record] = data.path.parent.resolve(), model.about.get("records") or [{}]
    trained = Path(model.about["options"]["data_folder"]).resolve()
    if not other and folder != trained and "data" in record:  # moved data are the same
        elsewhere = record["data"] != describe_data(folder, data.base)
        other = f"_on_{folder.name}" * elsewhere
    return options.split + subset + look, name_together(paths) + other


def name_together(paths):
    """What the names of files call the checkpoints: one by its file's name; several by the parts of
    their paths in which they differ, and by a hash where that makes too long a name."""
    if len(paths) == 1:
        return paths[0].name.removesuffix(".pth.tar")
    found = [Path(name.strip("/")) for name in names(paths)]
    own = ["_".join(path.parts) for path in found]
    folders = ["_".join(path.parts[:-1]) for path in found]
    if all(folders) and len({path.name for path in found}) == 1:
        own = [*folders[:-1], own[-1]]  # the name that all files have but once
    name = "+".join(own)
    if len(os.fsencode(name)) <= 150:  # systems allow 255 bytes, of which more is to come
        return name
    return f"{len(paths)}_models_{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def write_captions(paths, data, captions):
    """The captions of each width of the beam as COCO results."""
    from coco_results import write_results

    for beam_size, found in captions.items():
        write_results(paths[beam_size], data.references, [caption.text for caption in found])
        print(f"captions: {paths[beam_size]}")
    if not data.has_captions:
        print(f"no scores: {data.path.name} comes without people's captions to compare with")


def print_scores(paths, model, data, captions, attention, search):
    """Prints where the captions come from and their scores, and returns both."""
    import evaluation
    from groundwork import provenance

    texts = {
        evaluation.name_of(k, model.look): [caption.text for caption in found]
        for k, found in captions.items()
    }
    about = [
        line
        for path, own in zip(paths, model.abouts, strict=True)
        for line in (
            f"{path}, stage {own['stage']}, epoch {own['epoch']}",
            *provenance.lines(own.get("records", [])),
        )
    ]
    if len(paths) > 1:
        about.append(f"{len(paths)} models together: the mean of their probabilities of a word")
    about.append(
        f"{data.description}; {search.search.description}"
        + ("" if model.look is None else f"; hard attention, look: {model.look}")
    )
    people = [reference["captions"] for reference in data.references]
    scores = evaluation.score(texts, people, model.rule)
    scores = scores._replace(
        tables=scores.tables + attention.tables, left_out=scores.left_out + attention.notes
    )
    print("\n".join(about))
    print_tables(scores.references, scores.tables, scores.left_out)
    return about, scores


def training_logs(paths, model):
    """The `training_log` of each checkpoint, by a short name of it."""
    pairs = zip(paths, model.abouts, strict=True)
    return dict(zip(names(paths), (training_log(*pair) for pair in pairs), strict=True))


def training_log(path, about):
    """The records of a checkpoint's run, with later epochs' where their log lies beside it."""
    from checkpoints import is_log
    from groundwork.logs import read_log

    log, beside = about.get("log", []), path.with_name(f"log_{about['base']}.jsonl")
    if log and beside.is_file():
        longer = read_log(beside)
        return longer if is_log(longer) and longer[: len(log)] == log else log
    return log


def open_split(path, model, options):
    """The `EvaluationData` asked for. Raises UserError."""
    from coco_results import read_subset
    from evaluation_data import EvaluationData, find_data_set

    split = options.split.upper()
    folder, base = find_data_set(path, model.about, options.data_folder, options.data_name, split)
    data = EvaluationData(folder, base, split, model, options.karpathy_json)
    if not data.has_captions:
        check_for_results_alone(data, options)
    if options.subset is not None:
        data.keep(read_subset(options.subset), options.subset)
    return data


def score_results(options):
    """Prints the scores of captions that another system made."""
    import evaluation
    from coco_results import choose, match, read_references, read_results, read_subset
    from word_rules import KARPATHY, rule_of

    rule = KARPATHY
    if options.word_map is not None:
        import transfer  # takes seconds

        rule = rule_of(transfer.read_word_map(options.word_map))
    references = read_references(options.references, options.split, rule)
    captions = read_results(options.results)
    wanted = list(references.captions)
    if options.subset is not None:
        subset = read_subset(options.subset)
        wanted = choose(subset, wanted, references.names, options.subset, options.references)
    pairs = match(captions, references, wanted, (options.results, options.references))
    print(f"{options.results} against {options.references}")
    texts, people = zip(*pairs, strict=True)
    scores = evaluation.score({"results": list(texts)}, list(people), rule)
    print_tables(scores.references, scores.tables, scores.left_out)


if __name__ == "__main__":
    run(main)
