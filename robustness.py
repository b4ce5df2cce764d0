"""How captions and scores change when the images do.

Photographs come compressed, blurred, noisy, cut. The fast gradient sign method (Goodfellow et al.,
2014) is the worst that can be done to all pixels at once, as far as the loss is linear in them:
x + ε sign ∇J, a step of ε in the direction in which the model's loss J rises. Random signs are its
control.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as transforms

import metrics
import vocabulary
from datasets import proportions
from evaluation import name_of
from groundwork import distributed
from groundwork.devices import loader_options
from groundwork.files import atomic_write
from groundwork.progress import progress
from groundwork.tables import print_table
from groundwork.wording import columns, wrap
from mirroring import mirrored
from objectives import caption_loss
from pictures import show_pixels, write_text
from word_rules import KARPATHY, tokenize

# Images whose gradient is taken together: the encoder keeps all their feature maps for it.
TOGETHER = 8

# ------------------------------------------------------------------------------- perturbations


class Source(NamedTuple):
    """A batch of images with all that perturbing them takes: float32 (n, 3, S, S), on the CPU."""

    images: Tensor  # 0 to 1
    ascent: Tensor  # sign ∇J: -1, 0 or 1
    noise: Tensor  # Gaussian, of standard deviation 1
    coins: Tensor  # -1 or 1 at random


def prepare(model, images, captions, lengths, indices):
    """The `Source` of a batch.

    Args:
        model: a `captioner.Captioner`.
        images, captions, lengths: from `datasets.CaptionDataset`, stacked.
        indices: of the images in their split. Noise follows from them, whatever the batch.
    """
    generators = [torch.Generator().manual_seed(i) for i in indices]
    size, images = images.shape[1:], images / 255
    return Source(
        images,
        ascent(model, images, captions, lengths),
        torch.stack([torch.randn(size, generator=g) for g in generators]),
        torch.stack([torch.randint(2, size, generator=g) * 2.0 - 1 for g in generators]),
    )


def ascent(model, images, captions, lengths):
    """sign ∇J of each image at the encoder's input, before it normalises.

    J is the loss of the image's human captions with teacher forcing: in float32, without dropout,
    label smoothing and the attention's regulariser.

    Args:
        images: float32 (n, 3, S, S), 0 to 1.
        captions, lengths: int64 (n, K, T) and (n, K).

    Returns:
        float32 (n, 3, S, S) on the CPU.
    """
    signs = []
    parts = (tensor.split(TOGETHER) for tensor in (images, captions, lengths))
    for part, words, ends in zip(*parts, strict=True):
        part = part.to(model.device).requires_grad_()
        # the mean is over other images, too, which scales the gradient and leaves its sign
        loss = _loss(model, model.encoder.features(part), words, ends)
        # a decoder may pass over the image
        [gradient] = torch.autograd.grad(loss, part, allow_unused=True, materialize_grads=True)
        signs.append(gradient.sign().cpu())
    return torch.cat(signs)


def _loss(model, features, captions, lengths):
    """The mean of -log p over the words of captions (n, K, T) of lengths (n, K)."""
    captions = captions.flatten(0, 1).to(model.device)
    made = model.decoder(features, captions, lengths.flatten())
    return caption_loss(*made, alpha_c=0.0, barred=vocabulary.barred(model.decoder))


def _jpeg(source, quality):
    def through(image):
        file = io.BytesIO()
        pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255

    return torch.stack([through(image) for image in source.images])


def _blur(source, sigma):
    reach = min(3 * sigma, source.images.shape[-1] - 1)  # past its edges the image is mirrored
    return transforms.gaussian_blur(source.images, 2 * reach + 1, float(sigma))


def _crop(source, share):
    side = source.images.shape[-1]
    return transforms.resize(
        transforms.center_crop(source.images, [round(share * side)]), [side, side]
    )


_EPSILONS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
_KINDS = (
    ("none", lambda source, _: source.images, [None]),
    ("JPEG, quality {}", _jpeg, [50, 20, 10, 5]),
    ("blur, σ = {} pixels", _blur, [1, 2, 4]),
    ("noise, σ = {}", lambda source, sigma: source.images + sigma * source.noise, [0.05, 0.1, 0.2]),
    ("crop, {} of the side", _crop, [0.9, 0.75, 0.5]),
    ("mirror image", lambda source, _: source.images.flip(-1), [None]),
    ("grayscale", lambda source, _: transforms.rgb_to_grayscale(source.images, 3), [None]),
    ("FGSM, ε = {}", lambda source, step: source.images + step * source.ascent, _EPSILONS),
    ("random signs, ε = {}", lambda source, step: source.images + step * source.coins, _EPSILONS),
)
# name -> function of a `Source` and a level, and the level
PERTURBATIONS = {
    name.format(level): (change, level) for name, change, levels in _KINDS for level in levels
}


def perturb(source, name):
    """The source's images after the perturbation of that name: float32 (n, 3, S, S), 0 to 1."""
    change, level = PERTURBATIONS[name]
    return change(source, level).clamp(0, 1)


# -------------------------------------------------------------------------------------- report


class Outcome(NamedTuple):
    """What a model makes of perturbed images, by the perturbation's name."""

    captions: dict[str, list[str]]  # of each image
    losses: dict[str, float]  # mean of -log p over the words of the human captions


class Findings(NamedTuple):
    """What was found out, for people."""

    protocol: list[str]  # lines
    rows: list[dict]  # of the table, column -> text
    picture: Path
    filename: str  # of the image in it


def report(model, data, count, split, beam_size, search, path):
    """Prints the table and draws the picture; several processes share the work.

    Args:
        model: a `captioner.Captioner`.
        data: the split, a `datasets.CaptionDataset`.
        count: of its images, from the first.
        split: its name, for people.
        beam_size: width of the beam; None: the search's own.
        search: a `config.SearchConfig`.
        path: of the picture, a PNG, or None for none.

    Returns:
        what it prints: `Findings`; None where another process is the main one.
    """
    count = min(count, len(data))
    outcome = caption(model, data, count, beam_size, search)
    if not distributed.is_main:
        return None
    references = [reference["captions"] for reference in data.references[:count]]
    protocol = _protocol(model, data, references, split, beam_size)
    rows = table(outcome, references, model.rule)
    print("", *protocol, sep="\n")
    print_table(rows)
    if path is None:
        return None
    index = choose(outcome.captions, references, model.rule.split)
    source = prepare(model, *(tensor[None] for tensor in data[index]), [index])
    captions = {name: texts[index] for name, texts in outcome.captions.items()}
    own = data.references[index]
    draw(source, captions, own, path)
    print(f"picture: {path}, of {own['filename']}")
    return Findings(protocol, rows, path, own["filename"])


def caption(model, data, count, beam_size, search):
    """The `Outcome` of the first `count` images; the arguments are those of `report`."""
    share = distributed.share(count)
    reading = loader_options(model.device, search.workers)
    loader = DataLoader(data, search.batch_size, sampler=share, **reading)
    how, generator = search.of(beam_size), model.generator(search.seed)
    captions = {name: [] for name in PERTURBATIONS}
    words, missed = 0, dict.fromkeys(PERTURBATIONS, 0.0)
    bar = progress(total=len(share) * len(PERTURBATIONS), desc="perturbed", unit="image")
    for images, texts, lengths in loader:
        indices = share[len(captions["none"]) :][: len(images)]
        source = prepare(model, images, texts, lengths, indices)
        batch_words = int((lengths - 1).sum())
        words += batch_words
        perturbed = (perturb(source, name) for name in PERTURBATIONS)
        for name, features in zip(PERTURBATIONS, model.encode_ahead(perturbed), strict=True):
            with torch.inference_mode(), model.autocast():
                missed[name] += batch_words * _loss(model, features, texts, lengths).item()
                found = model.search(features, how, generator=generator)
                captions[name] += [best.text for [best] in found]
            bar.update(len(images))
    bar.close()
    totals = torch.tensor([words, *missed.values()], dtype=torch.float64, device=model.device)
    words, *missed = distributed.add_up(totals).tolist()
    return Outcome(
        {name: distributed.collect(found) for name, found in captions.items()},
        {name: total / words for name, total in zip(PERTURBATIONS, missed, strict=True)},
    )


def table(outcome, references, rule=KARPATHY):
    """The rows of the table: a dict of column -> text for each perturbation.

    Args:
        outcome: an `Outcome`.
        references: for each image the list of its human captions.
        rule: as in `evaluation.score`.
    """
    captions, split = outcome.captions, rule.split
    bleu = {name: metrics.bleu(references, texts, split).scores for name, texts in captions.items()}
    scores = {f"BLEU-{n}": {name: bleu[name][n - 1] for name in captions} for n in (1, 4)}
    english = metrics.are_english(references)
    coco = metrics.coco_scores(references, captions, "CIDEr-D", None if english else split).corpus
    scores["CIDEr-D"] = {name: found["CIDEr-D"] for name, found in coco.items() if found}
    rows = []
    for name, texts in captions.items():
        row = {"": name}
        for kind, of in scores.items():
            if of:  # of CIDEr-D there may be none
                row[kind] = f"{100 * of[name]:.1f}"
                row[f"Δ {kind}"] = f"{100 * (of[name] - of['none']):+.1f}".replace("-", "−")
        same = np.mean([a == b for a, b in zip(texts, captions["none"], strict=True)])
        rows.append(row | {"same": f"{same:.0%}", "loss": f"{outcome.losses[name]:.2f}"})
    return rows


def _protocol(model, data, references, split, beam_size):
    """Lines on what the table's numbers are."""
    texts = [text for texts in references for text in texts]
    sided = sum(mirrored(text) != text for text in texts)
    return [
        f"robustness: the first {len(references)} of {len(data)} images of the {split} split, "
        f"{data.image_size}×{data.image_size} pixels, {name_of(beam_size, model.look)}, "
        f"{'bfloat16' if model.amp else 'float32'}",
        "nltk's BLEU and COCO's CIDEr-D in per cent against all human captions, Δ from the images "
        "as they are",
        "same: captions word for word as of these; loss: −log p a word of the human captions, "
        "teacher-forced",
        "noise and ε on a scale of 0 to 1; crops are central, and blown up again",
        "FGSM: x + ε sign ∇J, clipped, not rounded; J is the loss over each image's human "
        f"captions, {len(data[0][1])} at most, in float32",
        f"human captions that say left or right, which a mirror image belies: {sided} of "
        f"{len(texts)}",
    ]


# ------------------------------------------------------------------------------------- picture

ATTACK = "FGSM, ε = 0.02"
SHOWN = ("none", ATTACK, "random signs, ε = 0.02", "JPEG, quality 10", "blur, σ = 4 pixels")
SHOWN += ("noise, σ = 0.1", "crop, 0.75 of the side", "mirror image", "grayscale")


def choose(captions, references, split=tokenize):
    """The index of the image to draw: whose caption loses most BLEU-4 by the attack.

    Args:
        captions: of an `Outcome`.
        references: for each image the list of its human captions.
        split: a text into its words.
    """

    def bleu4(name, i):
        return metrics.bleu([references[i]], [captions[name][i]], split).scores[3]

    return max(range(len(references)), key=lambda i: bleu4("none", i) - bleu4(ATTACK, i))


_DPI, _COLUMNS = 110, 3
# inches: an image's longer side, what was changed beside it
_MARGIN, _SIDE, _APART, _GAP = 0.2, 1.32, 0.05, 0.3
_PAIR, _TITLE, _LINE = 2 * _SIDE + _APART, 0.3, 0.165  # a pair's width, heights of text
_HEAD = (
    "Beside each image: what changed, amplified as stated, around gray. Below: the caption, gray "
    "where it stayed the same."
)


def draw(source, captions, reference, path):
    """Draws an image perturbed in several ways, beside it what was changed, below it the caption.

    Args:
        source: the `Source` of the image alone.
        captions: of the image, by the perturbation's name.
        reference: its entry of the REFERENCES, with human captions and maybe the size.
        path: the PNG to write.

    Raises:
        UserError: the PNG cannot be written.
    """
    texts = [wrap(captions[name], 42, columns) for name in SHOWN]
    people = wrap(f"human: {reference['captions'][0]}", 42, columns)
    sides = proportions(reference)
    width, height = (_SIDE * side / max(sides) for side in sides)  # of an image
    lines = [len(text) for text in texts]
    lines[0] += len(people)
    rows = [max(lines[i : i + _COLUMNS]) for i in range(0, len(lines), _COLUMNS)]
    bottoms = np.cumsum([2 * _MARGIN, *(_TITLE + height + _LINE * (n + 1.5) for n in rows)])
    inner = _COLUMNS * (_PAIR + _GAP) - _GAP
    figure = Figure(figsize=(inner + 2 * _MARGIN, bottoms[-1]), dpi=_DPI)
    write_text(figure, (_MARGIN, 0.7 * _MARGIN), _HEAD, 9, inner, va="top")
    for i, (name, text) in enumerate(zip(SHOWN, texts, strict=True)):
        left, top = _MARGIN + i % _COLUMNS * (_PAIR + _GAP), bottoms[i // _COLUMNS]
        _draw_pair(figure, (left, top, width, height), source, name)
        top += _TITLE + height
        same = name != "none" and captions[name] == captions["none"]
        _write_below(figure, left, top, text, color="0.5" if same else "black")
        if name == "none":
            _write_below(figure, left, top + len(text) * _LINE, people, style="italic")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_pair(figure, box, source, name):
    """A perturbed image under its name and, beside it, what was changed under its strength.

    Args:
        box: left and top of the pair, width and height of an image, inches.
    """
    left, top, width, height = box
    image, below = perturb(source, name)[0], top + 0.8 * _TITLE
    change = image - source.images[0]
    most = change.abs().quantile(0.99)  # nearly all of it stays between black and white
    factor = max((times for times in (2, 5, 10, 20) if times * most <= 0.5), default=1)
    sides = (left, image), (left + width + _APART, 0.5 + factor * change)
    for x, pixels in sides:
        pixels = pixels.clamp(0, 1).permute(1, 2, 0).numpy()
        show_pixels(figure, (x, below, width, height), pixels)
    write_text(figure, (left, top + 0.6 * _TITLE), name, 9, _PAIR - 0.4, weight="bold")
    if name != "none":
        place = (left + _PAIR, top + 0.6 * _TITLE)
        write_text(figure, place, f"× {factor}", 9, 0.4, ha="right", color="0.35")


def _write_below(figure, left, top, lines, **options):
    write_text(figure, (left, top), "\n".join(lines), 8.5, _PAIR, va="top", **options)
