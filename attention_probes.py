"""Does a word depend on the places that its attention is at? Pictures are changed to find out.

Deletion and insertion (Petsiuk et al., 2018): places are blotted out in the order of the attention
for a word, and log p of the word is read again, the words before it given. Where the attention
tells what matters, blotting out the most attended costs the most and the least attended the least.
Pairs: two pictures are set side by side, and the attention for the words of one's caption should
stay on its half.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_packed_sequence

from attention_metrics import at_places
from groundwork import distributed
from groundwork.progress import progress

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)  # of the places that are blotted out
ORDERS = ("most attended", "random", "least attended")  # which are blotted out first
BATCH = 32  # pictures


class Probe(NamedTuple):
    """What the changed pictures of one image tell of its caption's T words."""

    words: list[str]
    log_probs: dict[str, np.ndarray]  # order -> (T, 1 + len(SHARES)), nothing blotted out first
    own_half: np.ndarray  # (T,) attention on the image's half of a pair; nan of a single image
    peak_in_own_half: np.ndarray  # (T,) whether its peak is there, half where it is on the border


def probe(model, data, captions, count, seed=0):
    """A `Probe` of each of the first `count` images, those without a word left out.

    Args:
        model: a `captioner.Captioner` of a decoder with attention.
        data: a `datasets.CaptionDataset` or `evaluation_data.EvaluationData`, from images.
        captions: for each image its `captioner.Caption`.
        seed: of the random order.
    """
    count, found = min(count, len(data)), []
    for i in progress(distributed.share(count), desc="changed pictures", unit="image"):
        image, caption = data[i][0], captions[i]
        log_probs, half = {}, np.full((2, len(caption.words)), np.nan)
        if caption.words:
            log_probs = deletion(model, image, caption, torch.Generator().manual_seed(seed + i))
            if count > 1:
                half = own_half(model, image, data[(i + 1) % count][0], caption.words)
        found.append(Probe(caption.words, log_probs, *half))
    return [probe for probe in distributed.collect(found) if probe.words]


def deletion(model, image, caption, generator):
    """Order -> (T, 1 + len(SHARES)) log p of each word, with ever more places blotted out.

    Read from its end, the order «least attended» is insertion: with 90 % of the places blotted out,
    the tenth that is attended most is what is left.

    Args:
        image: uint8 (3, S, S).
        caption: the `captioner.Caption`, T words and alphas (T, L).
        generator: of the random order, in which places that are attended alike are taken, too.
    """
    steps, places = caption.alphas.shape
    shuffled = torch.rand(steps, places, generator=generator).argsort(dim=1)
    alphas = caption.alphas.gather(1, shuffled)
    kinds = dict(zip(ORDERS, (alphas, torch.zeros_like(alphas), -alphas), strict=True))
    whole, found = word_log_probs(model, image[None], caption.words)[0], {}
    for name, values in kinds.items():
        order = shuffled.gather(1, values.argsort(dim=1, descending=True, stable=True))
        ranks = order.argsort(dim=1)
        blotted = [
            blot_out(image, ranks[t] < round(share * places))
            for t in range(steps)
            for share in SHARES
        ]
        log_probs = word_log_probs(model, torch.stack(blotted), caption.words)
        own = log_probs.view(steps, len(SHARES), steps).diagonal(dim1=0, dim2=2).T
        found[name] = torch.cat([whole[:, None], own], dim=1).numpy()
    return found


def blot_out(image, places):
    """The image, uint8 (3, S, S), with its mean colour at some of L places, bool (L,)."""
    size = math.isqrt(len(places))
    mask = F.interpolate(places.view(1, 1, size, size).float(), image.shape[1:], mode="nearest")
    mean = image.float().mean(dim=(1, 2), keepdim=True).round().to(torch.uint8)
    return torch.where(mask[0] > 0, mean, image)


def own_half(model, image, other, words):
    """How much of the attention is on an image's half beside another image, and whether its peak
    is, for each word of its caption: (2, T), means over the image on the left and on the right.

    Args:
        image, other: uint8 (3, S, S), squeezed to half their width.
        words: of the caption of `image`.
    """
    side = image.shape[1]
    halves = F.interpolate(
        torch.stack([image, other]).float(), (side, side // 2), mode="bilinear", antialias=True
    )
    own, neighbour = F.pad(halves.round().to(torch.uint8), (0, side % 2))  # a column of black
    pairs = [torch.cat(pair, dim=2)[..., :side] for pair in ((own, neighbour), (neighbour, own))]
    _, alphas = _read(model, torch.stack(pairs), words)
    size = math.isqrt(alphas.shape[2])
    alphas = torch.from_numpy(at_places(alphas[:, :-1])).float()
    columns = alphas.unflatten(2, (size, size))  # (2, T, size, size)
    left = (size / 2 - torch.arange(size)).clamp(0, 1)  # half of a column in the middle
    peaks = (columns == columns.amax((2, 3), keepdim=True)).float()
    peaks = peaks / peaks.sum((2, 3), keepdim=True)
    both = torch.stack([columns, peaks]).sum(dim=3)  # (2, 2, T, size)
    return ((both[:, 0] @ left + both[:, 1] @ left.flip(0)) / 2).numpy()


def word_log_probs(model, images, words):
    """log p (n, T) of each word of a caption on n images, the words before it given; float32."""
    return torch.cat([_read(model, part, words)[0] for part in images.split(BATCH)])


@torch.inference_mode()
def _read(model, images, words):
    """log p (n, T) of the words, and alphas (n, T + 1, L), on the CPU."""
    indices = [model.word_map[word] for word in ("<start>", *words, "<end>")]
    captions = torch.tensor([indices] * len(images), device=model.device)
    [features] = model.encode_ahead([images])
    with model.autocast():
        lengths = torch.full((len(images),), len(indices))
        scores, _, alphas, _ = model.decoder(features, captions, lengths)
    scores, _ = pad_packed_sequence(scores, batch_first=True)
    log_probs = scores.float().log_softmax(dim=2)
    own = log_probs.gather(2, captions[:, 1:, None]).squeeze(2)[:, :-1]
    return own.cpu(), alphas.float().cpu()
