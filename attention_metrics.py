"""How attention is measured: where it peaks, how much of it lies on what a word names, how
even it is, how far it moves from word to word.

`captions` are (words, alphas) for each image: list of T words, and (T, L) array of the attention
over L = size² places, row by row.

The alphas of a word sum to one; to less where the attention has a sentinel (Lu et al., 2017) that
takes the rest. Then all is measured on the attention at the places alone, scaled to a sum of one,
but for `coverage`, which is of what the regulariser sees.
"""

import math
from typing import NamedTuple

import numpy as np

from word_rules import BLANK

ROUNDING = 1e-3  # by how much the alphas of a word may fall short of one without a sentinel


def at_places(alphas):
    """The attention (…, L) float64 at the places, scaled to a sum of one; even where there is
    none."""
    alphas = np.asarray(alphas, np.float64)
    totals = alphas.sum(axis=-1, keepdims=True)
    even = np.full_like(alphas, 1 / alphas.shape[-1])
    return np.divide(alphas, totals, out=even, where=totals > 0)


def away(alphas):
    """How much of the attention for each word is at no place, (T,) float64 from 0 to 1; None of
    alphas (T, L) that all sum to one: there is no sentinel."""
    rest = 1 - np.asarray(alphas, np.float64).sum(axis=1)
    return rest.clip(0, 1) if (rest > ROUNDING).any() else None


class Pointing(NamedTuple):
    """Outcome of the pointing game (Zhang et al., 2016)."""

    hits: int  # words whose attention peaks inside the region of what they name
    words: int  # words that name something
    chance: float  # share of hits that a uniformly random point would make


def pointing_game(captions, regions):
    """How often the attention's peak for a word lies in the region of what it names.

    The peak is the centre of the place with the largest alpha; where several share it (pooling
    to a finer grid makes such), the mean of their centres.

    Args:
        regions: `regions.Regions` of the images. A word of its `names` that a picture has no region
            for is a miss.
    """
    hits = count = 0
    chance = 0.0
    for alpha, region in _named(captions, regions):
        count += 1
        if region is not None:
            hits += region.contains(*peak(alpha))
            chance += region.area
    return Pointing(hits, count, chance / max(count, 1))


def mass_in_regions(captions, regions):
    """How much of the attention for a word lies in the region of what it names.

    A place is a square of the grid, which counts by the share of it that is in the region. Words
    that the picture has no region for do not count.

    Returns:
        the mean over the words, and what evenly spread attention would give; (nan, nan) of none.
    """
    masses, areas = [], []
    for alpha, region in _named(captions, regions):
        if region is not None:
            shares = region.shares(math.isqrt(len(alpha)))
            masses.append(float(alpha @ shares))
            areas.append(float(shares.mean()))
    return (float(np.mean(masses)), float(np.mean(areas))) if masses else (math.nan, math.nan)


def median_image(captions, regions):
    """Number of the image in the middle when they are ordered by how many of its words' peaks lie
    where they should, and of equal ones by how much of the attention does; of an even number the
    lower one. None where no word names anything.

    Args:
        captions, regions: as in `pointing_game`.
    """
    found = []
    for i, (caption, own) in enumerate(zip(captions, regions.of_images, strict=True)):
        alone = regions._replace(of_images=[own])
        game = pointing_game([caption], alone)
        if game.words:
            mass, _ = mass_in_regions([caption], alone)
            found.append((game.hits / game.words, -math.inf if math.isnan(mass) else mass, i))
    return sorted(found)[(len(found) - 1) // 2][-1] if found else None


def _named(captions, regions):
    """(alpha, region or None) of each word that names something."""
    for (words, alphas), own in zip(captions, regions.of_images, strict=True):
        if own is None:
            continue
        for word, alpha in zip(words, at_places(alphas), strict=True):
            word = word.removeprefix(BLANK)  # of a subword that is a word
            if word in (own if regions.names is None else regions.names):
                yield alpha, own.get(word)


def peak(alpha):
    """Centre (x, y) of the largest of L = size² alphas, fractions of width and height."""
    size = math.isqrt(len(alpha))
    places = np.flatnonzero(alpha >= alpha.max())
    rows, columns = np.divmod(places, size)
    return (columns.mean() + 0.5) / size, (rows.mean() + 0.5) / size


def evenness(alphas):
    """Entropy of the attention for each word as a share of ln L, its greatest: 1 where it is even,
    0 where it is at one place.

    Args:
        alphas: (T, L).

    Returns:
        (T,) float64.
    """
    alphas = at_places(alphas)
    entropy = -(alphas * np.log(alphas.clip(1e-300))).sum(axis=1)
    return entropy / math.log(alphas.shape[1]) if alphas.shape[1] > 1 else np.ones(len(alphas))


def movement(alphas):
    """The share of the attention for each word that is elsewhere than for the word before it,
    ½ Σ_i |α_ti - α_(t-1)i|, the total variation distance.

    Args:
        alphas: (T, L).

    Returns:
        (T,) float64; nan for the first word.
    """
    alphas = at_places(alphas)
    moved = abs(np.diff(alphas, axis=0)).sum(axis=1) / 2
    return np.concatenate([np.full(min(len(alphas), 1), np.nan), moved])


def movement_by_chance(captions):
    """The mean of `movement` were the words of each caption in a random order: each move is then
    between any two of its words."""
    moved = moves = 0.0
    for _, alphas in captions:
        if (count := len(alphas)) > 1:
            alphas = at_places(alphas)
            distances = abs(alphas[:, None] - alphas).sum(axis=2) / 2
            moved += distances.sum() / count  # count - 1 moves, of the mean over all pairs
            moves += count - 1
    return moved / moves if moves else math.nan


def coverage(captions):
    """How far Σ_t α_ti is from 1, which doubly stochastic attention (§4.2.1) pulls it to.

    Returns:
        the mean over captions and places of (1 - Σ_t α_ti)², the sum over the words, and the least
        that it could be: a caption of T words has T / L a place to give, (1 - T / L)².
    """
    totals = [np.asarray(alphas, np.float64).sum(axis=0) for _, alphas in captions]
    uneven = np.mean([((1 - total) ** 2).mean() for total in totals])
    least = np.mean([(1 - total.mean()) ** 2 for total in totals])
    return float(uneven), float(least)
