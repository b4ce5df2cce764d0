"""Captions a split with a trained model, prints the scores, writes the captions as COCO results.

With --results and --references it scores captions that any other system made.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

import checkpoints
import decoding
import demo
import distributed
import metrics
import provenance
import report
import robustness
import utils
from datasets import CaptionDataset, find_data, read_word_map
from utils import UserError


def parse_arguments():
    parser = utils.Parser(description=__doc__)
    positive = utils.number(int, above=0)
    add = parser.add_argument
    add("--checkpoint", help="None: the newest BEST checkpoint under --data_folder, or data/")
    add("--word_map", help="WORDMAP file, for a checkpoint that holds no word map")
    add("--data_folder", help="with the input files; None: the one that the model was trained on")
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
    utils.add_workers_option(parser)
    utils.add_decoding_options(parser)
    utils.add_device_options(parser)
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
    options.device = utils.choose_device(options.device)
    with distributed.group(options.device):
        evaluate(options)


def evaluate(options):
    path = Path(
        options.checkpoint or checkpoints.newest_best_checkpoint(options.data_folder or "data")
    )
    model = checkpoints.load_model(path, options.device, options.amp, options.word_map)
    utils.check_beam_size(max(options.beam_size), model.word_map)
    data = open_split(path, model, options)
    folder = utils.make_folder(options.results_folder or path.parent)

    log = []
    if options.report is not None:  # what may keep it from being written is found out here
        with utils.os_errors_as_user_errors(options.report):
            tempfile.TemporaryFile(dir=utils.make_folder(options.report)).close()
        log = training_log(path, model.checkpoint)

    captions, beams = caption_split(model, data, options)
    if distributed.is_main:
        write_and_print(path, model, data, captions, beams, folder, log, options)
    if options.robustness:
        robustness.report(model, data, options.robustness, options, folder)


def write_and_print(path, model, data, captions, beams, folder, log, options):
    """The captions as files, and all that is said of them."""
    for beam_size, found in captions.items():
        results = folder / f"results_{options.split}_beam{beam_size}_{data.base}.json"
        write_results(results, found, data)
        print(f"captions: {results}")
    about = [
        f"{path}, stage {model.checkpoint['stage']}, epoch {model.checkpoint['epoch']}",
        *provenance.lines(model.checkpoint.get("records", [])),
        f"{data.base}, {options.split} split; length penalty {options.length_penalty:g}, "
        f"{options.max_len} words at most",
    ]
    texts = {
        f"beam {beam_size}": [" ".join(words) for words, _ in found]
        for beam_size, found in captions.items()
    }
    scores = score(texts, [reference["captions"] for reference in data.references])
    tables = scores.tables + pointing_tables(captions, data)
    if options.attention_report:
        tables += attention_tables(captions, data)
    print("\n".join(about))
    print_tables(scores.references, tables, scores.left_out)
    if options.report is not None:
        scores = scores._replace(tables=tables)
        page = report.write(options.report, model, data, captions, beams, about, scores, log)
        print(f"report: {page}")


def training_log(path, checkpoint):
    """The records of a checkpoint's run, with later epochs' where their log lies beside it."""
    log, beside = checkpoint.get("log", []), path.with_name(f"log_{checkpoint['base']}.jsonl")
    if log and beside.is_file():
        longer = utils.read_log(beside)
        return longer if checkpoints.is_log(longer) and longer[: len(log)] == log else log
    return log


def open_split(path, model, options):
    """The data set that a checkpoint was trained on. Raises UserError if it is not at hand."""
    folder = options.data_folder or model.checkpoint["options"]["data_folder"]
    base = find_data(folder, model.checkpoint["base"] or None)
    if base is None:
        raise UserError(f"no data set in {folder}: name its folder with --data_folder")
    if read_word_map(folder, base) != model.word_map:
        raise UserError(f"{path} is of another vocabulary than {base} in {folder}")
    split = options.split.upper()
    if not utils.input_path(folder, base, "IMAGES", split).exists():
        raise UserError(f"{base} in {folder} has no {options.split} split: choose another --split")
    return CaptionDataset(folder, base, split)


@torch.inference_mode()
def caption_split(model, data, options):
    """Captions the split, running the encoder once for all beam widths.

    Returns:
        beam_size -> list of (words, alphas) per image; and per image all captions of the widest
        beam as (text, log p), the best first, where a report shows them.
    """
    captions, beams = {beam_size: [] for beam_size in options.beam_size}, []
    share = distributed.share(len(data))
    loader = DataLoader(data, options.batch_size, sampler=share, **utils.loader_options(options))
    batches = utils.progress(loader, desc="captioning", unit="batch")
    for features in model.encode_ahead(images for images, *_ in batches):
        for beam_size, found in captions.items():
            if options.report is not None and beam_size == max(captions):
                finished = model.search(features, beam_size, options, decoding.finished_beams)
                beams += [[(" ".join(model.to_words(c)), c.log_prob) for c in f] for f in finished]
                best = [f[0] for f in finished]
            else:
                best = model.search(features, beam_size, options)
            found += [(model.to_words(caption), caption.alphas) for caption in best]
    captions = {beam_size: distributed.collect(found) for beam_size, found in captions.items()}
    return captions, distributed.collect(beams)


def score_results(options):
    """Prints the scores of captions that another system made."""
    references = read_references(options.references, options.split)
    captions = read_results(options.results)
    if unknown := captions.keys() - references.keys():
        raise UserError(
            f"{options.results} has {len(unknown)} images that {options.references} has not in its "
            f"{options.split} split, {min(unknown, key=str)} among them: check --split"
        )
    if missing := references.keys() - captions.keys():
        raise UserError(
            f"{options.results} has no caption for {len(missing)} of {len(references)} images of "
            f"{options.references}, {min(missing, key=str)} among them"
        )
    print(f"{options.results} against {options.references}")
    scores = score({"results": [captions[id_] for id_ in references]}, list(references.values()))
    print_tables(scores.references, scores.tables, scores.left_out)


def read_references(path, split):
    """Image id -> its human captions, of a split of Karpathy's JSON or of COCO's own format."""
    contents = utils.read_json(path)
    references = {}
    if isinstance(contents, dict) and "annotations" in contents:
        for id_, caption in _image_captions(contents["annotations"], path):
            references.setdefault(id_, []).append(caption)
    else:
        for i, image in enumerate(utils.read_karpathy(path)):
            reference = utils.reference_of(image, i)
            if utils.SPLITS[image["split"]] == split.upper() and reference["captions"]:
                references[reference["id"]] = reference["captions"]
    if not references:
        raise UserError(f"{path} has no captions of the {split} split")
    for id_, texts in references.items():
        if not any(map(utils.tokenize, texts)):
            raise UserError(f"{path} has no words for image {id_}: leave it out")
    return references


def read_results(path):
    """Image id -> caption, of a file of COCO results. Raises UserError."""
    captions = {}
    for id_, caption in _image_captions(utils.read_json(path), path):
        if id_ in captions:
            raise UserError(f"{path} has several captions for image {id_}")
        captions[id_] = caption
    return captions


def _image_captions(entries, path):
    """Yields id and caption of a list of {"image_id", "caption"}."""
    for entry in entries if isinstance(entries, list) else [None]:
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("image_id"), int | str)
            or not _is_text(entry.get("caption"))
        ):
            raise UserError(f'{path} is no list of {{"image_id", "caption"}}')
        yield entry["image_id"], entry["caption"]


def _is_text(value):
    """Whether a value of JSON is text that can be written: it may hold halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


class Scores(NamedTuple):
    """Scores of captions, each under the protocol that it follows."""

    references: str  # what the captions are compared with
    tables: list[tuple[str, list[dict]]]  # protocol, and a row for each list of captions
    left_out: list[str]  # a line for what cannot be computed, with the reason
    each: dict[str, dict[str, list[float]]]  # list of captions -> score -> its value of each image


def score(captions, references):
    """`Scores` of captions.

    Args:
        captions: name -> a caption for each image, text.
        references: for each image the list of its human captions.
    """
    count, rows = sum(map(len, references)), []
    for name, texts in captions.items():
        bleu, description = metrics.bleu(references, texts), metrics.describe(texts)
        row = {"": name}
        row |= {f"BLEU-{n}": f"{100 * s:.1f}" for n, s in enumerate(bleu.scores, start=1)}
        row |= {f"B-{n} no BP": f"{100 * s:.1f}" for n, s in enumerate(bleu.unpenalised, start=1)}
        row["words each"] = f"{description['mean_length']:.1f}"
        row["distinct words"] = str(description["distinct_words"])
        rows.append(row)
    tables = [
        (
            "nltk corpus_bleu on lower-cased words without punctuation; the last four without "
            "brevity penalty",
            rows,
        )
    ]
    coco = metrics.coco_scores(references, captions)
    if any(coco.corpus.values()):
        rows = [
            {"": name} | {kind: f"{100 * score:.1f}" for kind, score in found.items()}
            for name, found in coco.corpus.items()
        ]
        tables.append(("COCO's caption evaluation, pycocoevalcap with its PTB tokenizer", rows))
    against = f"{len(references)} images, {count} human captions, all of them references"
    return Scores(f"{against}; in per cent", tables, coco.left_out, coco.each)


def print_tables(head, tables, notes):
    print(head)
    for title, rows in tables:
        print(f"\n{title}")
        utils.print_table(rows)
    for note in notes:
        print(note)


def pointing_tables(captions, data):
    """On data with boxes: how often the attention points at what a word names."""
    if not (boxes := boxes_of(data)):
        return []
    rows = []
    for beam_size, found in captions.items():
        game = metrics.pointing_game(found, boxes, demo.SHAPES)
        share = f"{game.hits / max(game.words, 1):.1%} of {game.words}"
        rows.append({"": f"beam {beam_size}", "hits": share, "by chance": f"{game.chance:.1%}"})
    title = "pointing game: the attention's peak for a shape word lies in that object's box"
    return [(title, rows)]


def attention_tables(captions, data):
    """What the attention is like: how even for each word, and over each caption."""
    boxes, rows, parts = boxes_of(data), [], []
    for beam_size, found in captions.items():
        name = {"": f"beam {beam_size}"}
        [(entropy, _)] = metrics.attention_entropy(found).values()
        uneven, least = metrics.coverage(found)
        row = name | {"entropy": f"{entropy:.2f}", "(1 - Σα)²": f"{uneven:.3f}"}
        row["least possible"] = f"{least:.3f}"
        if boxes:
            mass, area = metrics.mass_in_boxes(found, boxes, demo.SHAPES)
            row |= {"in the box": f"{mass:.1%}", "if even": f"{area:.1%}"}
            kinds = metrics.attention_entropy(found, demo.part_of_speech)
            row_of_parts = {
                part: f"{kinds[part][0]:.2f} of {kinds[part][1]}" if part in kinds else ""
                for part in demo.PARTS_OF_SPEECH
            }
            parts.append(name | row_of_parts)
        rows.append(row)
    places = captions[min(captions)][0][1].shape[1]
    title = (
        f"attention over {places} places: entropy in nats, {math.log(places):.2f} where it is "
        "even; Σα, over a caption's words, should be near 1 at every place"
        + ("; in the box of the object that a shape word names" if boxes else "")
    )
    return [(title, rows)] + (
        [("entropy by part of speech, of so many words", parts)] * bool(boxes)
    )


def boxes_of(data):
    """The boxes of each image's objects, None where the data has none."""
    boxes = [reference.get("boxes") for reference in data.references]
    return boxes if all(boxes) else None


def write_results(path, captions, data):
    """COCO results: a list of {"image_id", "caption"}."""
    results = [
        {"image_id": reference["id"], "caption": " ".join(words)}
        for reference, (words, _) in zip(data.references, captions, strict=True)
    ]
    with utils.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    utils.run(main)
