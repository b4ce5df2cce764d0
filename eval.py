"""Captions a split with a trained model, prints the scores, writes the captions as COCO results.

With --results and --references it scores captions that any other system made.
"""

import tempfile
from pathlib import Path

from config import SearchConfig
from groundwork.errors import UserError, run
from groundwork.files import make_folder, os_errors_as_user_errors
from groundwork.options import (
    Parser,
    add_decoding_options,
    add_device_options,
    add_workers_option,
    number,
)
from groundwork.tables import print_tables
from groundwork.wording import counted


def parse_arguments():
    parser = Parser(description=__doc__)
    positive = number(int, above=0)
    add = parser.add_argument
    add("--checkpoint", help="None: the newest BEST checkpoint under --data_folder, or data/")
    add("--word_map", help="WORDMAP file, for a checkpoint that holds no word map")
    add("--data_folder", help="with the input files; None: the one that the model was trained on")
    add("--karpathy_json", help="the data set's, where the input files have no REFERENCES")
    add("--split", choices=["test", "val"], default="test")
    add("--beam_size", type=positive, nargs="+", default=[5], help="one, or several to compare")
    add("--batch_size", type=positive, default=50, help="images")
    add("--results_folder", help="for the captions; None: the checkpoint's folder")
    add("--attention_report", action="store_true", help="measure where the model looked, too")
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
    add("--references", help="for --results: Karpathy's JSON, of which --split, or COCO's captions")
    add_workers_option(parser)
    add_decoding_options(parser)
    add_device_options(parser)
    return parser.parse_args()


def main():
    options = parse_arguments()
    if (options.results is None) != (options.references is None):
        raise UserError("--results and --references go together")
    if options.results is not None:
        for name in ("report", "robustness", "attention_report"):
            if getattr(options, name):
                raise UserError(f"--{name} is about a model: it goes without --results")
        score_results(options)
        return

    # what follows takes seconds to import
    from groundwork import distributed
    from groundwork.devices import choose_device

    with distributed.group(choose_device(options.device)):
        evaluate(options)


def evaluate(options):
    """Captions the split and says all that was asked for."""
    import checkpoints
    import evaluation
    import robustness
    from captioner import Captioner
    from groundwork import distributed

    path = Path(
        options.checkpoint or checkpoints.newest_best_checkpoint(options.data_folder or "data")
    )
    model = Captioner.load(path, options.device, options.amp, options.word_map)
    model.check_beam_size(max(options.beam_size))
    data = open_split(path, model, options)
    folder = make_folder(options.results_folder or path.parent)

    log = []
    if options.report is not None:  # what may keep it from being written is found out here
        with os_errors_as_user_errors(options.report):
            tempfile.TemporaryFile(dir=make_folder(options.report)).close()
        log = training_log(path, model.about)

    search = SearchConfig(
        options.max_len, options.length_penalty, options.batch_size, options.workers
    )
    whole = options.report is not None
    captions, beams = evaluation.caption_split(model, data, options.beam_size, search, whole)
    if distributed.is_main:
        write_and_print(path, model, data, captions, beams, folder, log, options)
    if options.robustness:
        picture = folder / f"robustness_{options.split}_{data.base}.png"
        robustness.report(
            model, data, options.robustness, options.split, options.beam_size[0], search, picture
        )


def write_and_print(path, model, data, captions, beams, folder, log, options):
    """The captions as files, and all that is said of them."""
    import evaluation
    import report
    from coco_results import write_results
    from groundwork import provenance

    texts = {f"beam {k}": [caption.text for caption in found] for k, found in captions.items()}
    for beam_size in captions:
        results = folder / f"results_{options.split}_beam{beam_size}_{data.base}.json"
        write_results(results, data.references, texts[f"beam {beam_size}"])
        print(f"captions: {results}")
    about = [
        f"{path}, stage {model.about['stage']}, epoch {model.about['epoch']}",
        *provenance.lines(model.about.get("records", [])),
        f"{data.base}, {options.split} split; length penalty {options.length_penalty:g}, "
        f"{counted(options.max_len, 'word')} at most",
    ]
    scores = evaluation.score(texts, [reference["captions"] for reference in data.references])
    if evaluation.has_attention(captions):
        tables = scores.tables + evaluation.pointing_tables(captions, data)
        if options.attention_report:
            tables += evaluation.attention_tables(captions, data)
        scores = scores._replace(tables=tables)
    elif options.attention_report:
        left_out = [*scores.left_out, "no attention report: this decoder has no attention"]
        scores = scores._replace(left_out=left_out)
    print("\n".join(about))
    print_tables(scores.references, scores.tables, scores.left_out)
    if options.report is not None:
        page = report.write(
            options.report, model.word_map, data, captions, beams, about, scores, log
        )
        print(f"report: {page}")


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
    """The data set that a checkpoint was trained on. Raises UserError if it is not at hand."""
    from datasets import CaptionDataset, find_data, read_word_map
    from utils import input_path

    folder = options.data_folder or model.about["options"]["data_folder"]
    base = find_data(folder, model.about["base"] or None)
    if base is None:
        raise UserError(f"no data set in {folder}: name its folder with --data_folder")
    if read_word_map(folder, base) != model.word_map:
        raise UserError(f"{path} is of another vocabulary than {base} in {folder}")
    split = options.split.upper()
    if not input_path(folder, base, "IMAGES", split).exists():
        raise UserError(f"{base} in {folder} has no {options.split} split: choose another --split")
    return CaptionDataset(folder, base, split, karpathy_json=options.karpathy_json)


def score_results(options):
    """Prints the scores of captions that another system made."""
    import evaluation
    from coco_results import read_references, read_results

    references = read_references(options.references, options.split)
    captions = read_results(options.results)
    if unknown := captions.keys() - references.keys():
        raise UserError(
            f"{options.results} has {counted(len(unknown), 'image')} that {options.references} has "
            f"not in its {options.split} split, {min(unknown, key=str)} among them: check --split"
        )
    if missing := references.keys() - captions.keys():
        raise UserError(
            f"{options.results} has no caption for {len(missing)} of "
            f"{counted(len(references), 'image')} of {options.references}, "
            f"{min(missing, key=str)} among them"
        )
    print(f"{options.results} against {options.references}")
    texts = {"results": [captions[id_] for id_ in references]}
    scores = evaluation.score(texts, list(references.values()))
    print_tables(scores.references, scores.tables, scores.left_out)


if __name__ == "__main__":
    run(main)
