"""Captions a split with a trained model, prints the scores, writes the captions as COCO results."""

import json
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import checkpoints
import decoding
import demo
import distributed
import metrics
import provenance
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
    utils.add_workers_option(parser)
    utils.add_decoding_options(parser)
    utils.add_device_options(parser)
    return parser.parse_args()


def main():
    options = parse_arguments()
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
    if not distributed.is_main:
        return
    references = [reference["captions"] for reference in data.references]
    print(f"{path}, stage {model.checkpoint['stage']}, epoch {model.checkpoint['epoch']}")
    for line in provenance.lines(model.checkpoint.get("records", [])):
        print(line)
    print(
        f"{data.base}, {options.split}: {len(data)} images; nltk corpus_bleu against all human "
        f"captions; length penalty {options.length_penalty:g}"
    )
    for line in format_table([score(*item, references, data) for item in captions.items()]):
        print(line)
    for beam_size, found in captions.items():
        results = folder / f"results_{options.split}_beam{beam_size}_{data.base}.json"
        write_results(results, found, data)
        print(f"captions: {results}")


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


def score(beam_size, captions, references, data):
    """A row of the table, column -> text."""
    texts = [" ".join(words) for words, _ in captions]
    bleu, description = metrics.bleu(references, texts), metrics.describe(texts)
    row = {"beam": str(beam_size)}
    row |= {f"BLEU-{n}": f"{100 * s:.1f}" for n, s in enumerate(bleu.scores, start=1)}
    row |= {f"B-{n} no BP": f"{100 * s:.1f}" for n, s in enumerate(bleu.unpenalised, start=1)}
    row["captions"] = str(description["captions"])
    row["words each"] = f"{description['mean_length']:.1f}"
    row["distinct words"] = str(description["distinct_words"])
    boxes = [reference.get("boxes") for reference in data.references]
    if all(boxes):
        game = metrics.pointing_game(captions, boxes, demo.SHAPES)
        row["pointing"] = f"{game.hits / max(game.words, 1):.1%} of {game.words}"
        row["by chance"] = f"{game.chance:.1%}"
    return row


def format_table(rows):
    """Lines of a Markdown table, its columns aligned."""
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join(t.rjust(w) for t, w in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    return [lines[0], "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|", *lines[1:]]


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
