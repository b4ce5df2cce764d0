"""A model's captions of a split and their scores."""

from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

import diversity
import fused
import metrics
from choosing import Search
from groundwork import distributed
from groundwork.devices import loader_options
from groundwork.progress import progress
from groundwork.wording import counted
from word_rules import KARPATHY


@torch.inference_mode()
def caption_split(model, data, beam_sizes, search, whole=False):
    """Captions a split, running the encoder once for all beam widths.

    Args:
        model: a `captioner.Captioner`.
        data: an `evaluation_data.EvaluationData`, or a `datasets.CaptionDataset` from images.
        beam_sizes: widths of the beam; None among them: the search's own.
        search: a `config.SearchConfig`.
        whole: whether to keep all captions of the widest beam.

    Returns:
        beam_size -> for each image its best `captioner.Caption`; and for each image all captions of
        the widest beam, the best first, where they are kept, else an empty list.
    """
    fused.build(model.device)
    captions, beams, widest = {beam_size: [] for beam_size in beam_sizes}, [], max(beam_sizes)
    generator = model.generator(search.seed)
    for features in _features(model, data, search, "captioning"):
        for beam_size, best in captions.items():
            kept = search.of(beam_size).kept if whole and beam_size == widest else 1
            found = model.search(features, search.of(beam_size), kept, generator)
            best += [beam[0] for beam in found]
            if whole and beam_size == widest:
                beams += found
    captions = {beam_size: distributed.collect(found) for beam_size, found in captions.items()}
    return captions, distributed.collect(beams)


@torch.inference_mode()
def sample_split(model, data, count, search, seed=0):
    """So many captions drawn at random of each image of a split, texts.

    Args:
        model, data, search: as in `caption_split`.
        seed: of what is drawn; several processes draw otherwise than one.
    """
    generator, drawn = model.generator(seed + distributed.rank), []
    freely = Search(temperature=1.0, max_words=search.search.max_words)
    for features in _features(model, data, search, "drawing"):
        found = model.search(features, freely, count, generator)
        drawn += [[caption.text for caption in captions] for captions in found]
    return distributed.collect(drawn)


def _features(model, data, search, doing):
    """Yields the features of this process's share of a split, a batch at a time; arguments as in
    `caption_split`, and what the progress bar says is done with them."""
    share, reading = distributed.share(len(data)), loader_options(model.device, search.workers)
    loader = DataLoader(data, search.batch_size, sampler=share, **reading)
    batches = progress(loader, desc=doing, unit="batch")
    yield from model.encode_ahead(images for images, *_ in batches)


def name_of(beam_size, look=None):
    """What tables call the captions of a beam, or, where it is None, those drawn; `look` is how
    hard attention was told to look."""
    name = "drawn" if beam_size is None else f"beam {beam_size}"
    return name + ("" if look is None else f", {look}")


class Scores(NamedTuple):
    """Scores of captions, each under the protocol that it follows."""

    references: str  # what the captions are compared with
    tables: list[tuple[str, list[dict]]]  # protocol, and a row for each list of captions
    left_out: list[str]  # a line for what cannot be computed, with the reason
    each: dict[str, dict[str, list[float]]]  # list of captions -> score -> its value of each image


def score(captions, references, rule=KARPATHY):
    """`Scores` of captions.

    Args:
        captions: name -> a caption for each image, text.
        references: for each image the list of its human captions.
        rule: `word_rules.Rule` whose words are compared; of English captions the COCO scores have
            those of their own tokenizer.
    """
    count, rows, english = sum(map(len, references)), [], metrics.are_english(references)
    split = rule.split
    for name, texts in captions.items():
        bleu, description = metrics.bleu(references, texts, split), metrics.describe(texts, split)
        row = {"": name}
        row |= {f"BLEU-{n}": f"{100 * s:.1f}" for n, s in enumerate(bleu.scores, start=1)}
        row |= {f"B-{n} no BP": f"{100 * s:.1f}" for n, s in enumerate(bleu.unpenalised, start=1)}
        row["words each"] = f"{description['mean_length']:.1f}"
        row["distinct words"] = str(description["distinct_words"])
        row["used twice"] = f"{metrics.repeated(texts, rule=rule)[0]:.1%}"  # or more often
        if english:
            row["dangling ends"] = f"{diversity.dangling(texts):.1%}"
        rows.append(row)
    tables = [
        (
            f"nltk corpus_bleu on {rule.about}; the last four without brevity penalty",
            rows,
        )
    ]
    coco = metrics.coco_scores(references, captions, split=None if english else split)
    if any(coco.corpus.values()):
        rows = [
            {"": name} | {kind: f"{100 * score:.1f}" for kind, score in found.items()}
            for name, found in coco.corpus.items()
        ]
        words = "with its PTB tokenizer" if english else f"on {rule.about}"
        tables.append((f"COCO's caption evaluation, pycocoevalcap {words}", rows))
    left_out = coco.left_out
    if any(coco.corpus.values()) and not english:
        left_out = [*left_out, "METEOR is for English, these words are not"]
    images, texts = counted(len(references), "image"), counted(count, "human caption")
    against = f"{images}, {texts}, all of them references"
    return Scores(f"{against}; in per cent", tables, left_out, coco.each)
