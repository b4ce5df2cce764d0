"""A model's captions of a split, their scores, and where the model looked."""

import math
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

import demo
import metrics
from groundwork import distributed
from groundwork.devices import loader_options
from groundwork.progress import progress
from groundwork.wording import counted, figure


@torch.inference_mode()
def caption_split(model, data, beam_sizes, search, whole=False):
    """Captions a split, running the encoder once for all beam widths.

    Args:
        model: a `captioner.Captioner`.
        data: an `evaluation_data.EvaluationData`, or a `datasets.CaptionDataset` from images.
        beam_sizes: widths of the beam.
        search: a `SearchConfig`.
        whole: whether to keep all captions of the widest beam.

    Returns:
        beam_size -> for each image its best `captioner.Caption`; and for each image all captions of
        the widest beam, the best first, where they are kept, else an empty list.
    """
    captions, beams = {beam_size: [] for beam_size in beam_sizes}, []
    share = distributed.share(len(data))
    reading = loader_options(model.device, search.workers)
    loader = DataLoader(data, search.batch_size, sampler=share, **reading)
    bounds = search.max_length, search.length_penalty
    batches = progress(loader, desc="captioning", unit="batch")
    for features in model.encode_ahead(images for images, *_ in batches):
        for beam_size, best in captions.items():
            kept = beam_size if whole and beam_size == max(captions) else 1
            found = model.search(features, beam_size, kept, *bounds)
            best += [beam[0] for beam in found]
            if whole and beam_size == max(captions):
                beams += found
    captions = {beam_size: distributed.collect(found) for beam_size, found in captions.items()}
    return captions, distributed.collect(beams)


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
    left_out = coco.left_out
    if any(coco.corpus.values()) and not metrics.are_english(references):
        left_out = [*left_out, "COCO's tokenizer and METEOR are for English, these words are not"]
    images, texts = counted(len(references), "image"), counted(count, "human caption")
    against = f"{images}, {texts}, all of them references"
    return Scores(f"{against}; in per cent", tables, left_out, coco.each)


def pointing_tables(captions, data):
    """On data with boxes: how often the attention points at what a word names."""
    if not (boxes := boxes_of(data)):
        return []
    rows = []
    for beam_size, found in looks(captions).items():
        game = metrics.pointing_game(found, boxes, demo.SHAPES)
        hits, chance = (game.hits / game.words, game.chance) if game.words else (math.nan,) * 2
        share = f"{figure(hits, '.1%')} of {game.words}"
        row = {"": f"beam {beam_size}", "hits": share, "random point": figure(chance, ".1%")}
        rows.append(row)
    title = "pointing game: the attention's peak for a shape word lies in that object's box"
    return [(title, rows)]


def attention_tables(captions, data):
    """What the attention is like: how even for each word, and over each caption."""
    captions = looks(captions)
    boxes, rows, parts = boxes_of(data), [], []
    for beam_size, found in captions.items():
        name = {"": f"beam {beam_size}"}
        entropy, _ = metrics.attention_entropy(found).get("all", (math.nan, 0))  # of no word at all
        uneven, least = metrics.coverage(found)
        row = name | {"entropy": figure(entropy, ".2f"), "(1 - Σα)²": f"{uneven:.3f}"}
        row["least possible"] = f"{least:.3f}"
        if boxes:
            mass, area = metrics.mass_in_boxes(found, boxes, demo.SHAPES)
            row |= {"in the box": figure(mass, ".1%"), "if even": figure(area, ".1%")}
            kinds = metrics.attention_entropy(found, demo.part_of_speech)
            row_of_parts = {
                part: f"{kinds[part][0]:.2f} of {kinds[part][1]}" if part in kinds else ""
                for part in demo.PARTS_OF_SPEECH
            }
            parts.append(name | row_of_parts)
        rows.append(row)
    places = next(iter(captions.values()))[0][1].shape[1]
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


def has_attention(captions):
    """Whether the model that made captions, by beam width, looks at places."""
    return all(caption.alphas is not None for found in captions.values() for caption in found)


def looks(captions):
    """beam_size -> (words, alphas) of each caption, as `metrics` takes them."""
    return {
        beam_size: [(caption.words, caption.alphas) for caption in found]
        for beam_size, found in captions.items()
    }
