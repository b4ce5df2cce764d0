"""Captions a split with a trained model, prints the scores, writes the captions as COCO results.

With --results and --references it scores captions that any other system made.
"""

import json
import math
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import checkpoints
import decoding
import demo
import distributed
import metrics
import provenance
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
        if options.robustness:
            raise UserError("--robustness perturbs images for a model: it goes without --results")
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

    captions = caption_split(model, data, options)
    if distributed.is_main:
        write_and_print(path, model, data, captions, folder, options)
    if options.robustness:
        robustness.report(model, data, options.robustness, options, folder)


def write_and_print(path, model, data, captions, folder, options):
    """The captions as files, and all that is said of them."""
    for beam_size, found in captions.items():
        results = folder / f"results_{options.split}_beam{beam_size}_{data.base}.json"
        write_results(results, found, data)
        print(f"captions: {results}")
    print(f"{path}, stage {model.checkpoint['stage']}, epoch {model.checkpoint['epoch']}")
    for line in provenance.lines(model.checkpoint.get("records", [])):
        print(line)
    print(
        f"{data.base}, {options.split} split; length penalty {options.length_penalty:g}, "
        f"{options.max_len} words at most"
    )
    texts = {
        f"beam {beam_size}": [" ".join(words) for words, _ in found]
        for beam_size, found in captions.items()
    }
    print_scores(texts, [reference["captions"] for reference in data.references])
    print_pointing(captions, data)
    if options.attention_report:
        print_attention(captions, data)


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
    """beam_size -> list of (words, alphas) per image; the encoder runs once for all beams."""
    captions = {beam_size: [] for beam_size in options.beam_size}
    share = distributed.share(len(data))
    loader = DataLoader(data, options.batch_size, sampler=share, **utils.loader_options(options))
    batches = utils.progress(loader, desc="captioning", unit="batch")
    for features in model.encode_ahead(images for images, *_ in batches):
        with model.autocast():
            for beam_size, found in captions.items():
                beams = decoding.beam_search(
                    model.decoder,
                    features,
                    model.word_map,
                    beam_size,
                    options.max_len,
                    options.length_penalty,
                )
                found += [(model.to_words(caption), caption.alphas) for caption in beams]
    return {beam_size: distributed.collect(found) for beam_size, found in captions.items()}


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
    print_scores({"results": [captions[id_] for id_ in references]}, list(references.values()))


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
            or not isinstance(entry.get("caption"), str)
        ):
            raise UserError(f'{path} is no list of {{"image_id", "caption"}}')
        yield entry["image_id"], entry["caption"]


def print_scores(captions, references):
    """Two tables, each under the protocol that its figures follow.

    Args:
        captions: name -> a caption for each image, text.
        references: for each image the list of its human captions.
    """
    count = sum(map(len, references))
    print(
        f"{len(references)} images, {count} human captions, all of them references; in per cent\n\n"
        "nltk corpus_bleu on lower-cased words without punctuation; the last four without brevity "
        "penalty"
    )
    rows = []
    for name, texts in captions.items():
        bleu, description = metrics.bleu(references, texts), metrics.describe(texts)
        row = {"": name}
        row |= {f"BLEU-{n}": f"{100 * s:.1f}" for n, s in enumerate(bleu.scores, start=1)}
        row |= {f"B-{n} no BP": f"{100 * s:.1f}" for n, s in enumerate(bleu.unpenalised, start=1)}
        row["words each"] = f"{description['mean_length']:.1f}"
        row["distinct words"] = str(description["distinct_words"])
        rows.append(row)
    utils.print_table(rows)

    found = {name: metrics.coco_scores(references, texts) for name, texts in captions.items()}
    [*_, last] = found.values()
    if last.corpus:
        print("\nCOCO's caption evaluation, pycocoevalcap with its PTB tokenizer")
        utils.print_table(
            [
                {"": name} | {kind: f"{100 * s:.1f}" for kind, s in scores.corpus.items()}
                for name, scores in found.items()
            ]
        )
    for line in last.left_out:
        print(line)


def print_pointing(captions, data):
    """On data with boxes: how often the attention points at what a word names."""
    if not (boxes := boxes_of(data)):
        return
    print("\npointing game: the attention's peak for a shape word lies in that object's box")
    rows = []
    for beam_size, found in captions.items():
        game = metrics.pointing_game(found, boxes, demo.SHAPES)
        share = f"{game.hits / max(game.words, 1):.1%} of {game.words}"
        rows.append({"": f"beam {beam_size}", "hits": share, "by chance": f"{game.chance:.1%}"})
    utils.print_table(rows)


def print_attention(captions, data):
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
    print(
        f"\nattention over {places} places: entropy in nats, {math.log(places):.2f} where it is "
        "even; Σα, over a caption's words, should be near 1 at every place"
        + ("; in the box of the object that a shape word names" if boxes else "")
    )
    utils.print_table(rows)
    if parts:
        print("\nentropy by part of speech, of so many words")
        utils.print_table(parts)


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
