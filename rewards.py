"""How good captions are by their words alone: CIDEr-D and BLEU-4, of words of any kind.

Training takes them as rewards (`self_critical`), and CIDEr-D tells the best epoch (`metrics`). Both
are what pycocoevalcap computes of the same words, to rounding.
"""

import math
from collections import Counter
from typing import NamedTuple

ORDERS = range(1, 5)  # n of the n-grams
SIGMA = 6.0  # words, of CIDEr-D's penalty for another length
NONE, FEW = 1e-15, 1e-9  # that keep BLEU from dividing by 0, as published


def ngrams(words):
    """For each of `ORDERS` the n-grams of a caption, tuples, with their counts.

    Args:
        words: a sequence of words, texts or indices.
    """
    words = tuple(words)
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in ORDERS]


class Weights(NamedTuple):
    """A caption as CIDEr-D sees it."""

    ngrams: list[dict]  # of each order, n-gram -> its count times how much it tells
    norms: list[float]  # their Euclidean lengths
    length: int


class CiderD:
    """CIDEr-D (Vedantam et al., 2015): how much of what people say a caption says, n-grams that
    come with few images counting most, 0 to 10.

    Args:
        corpus: for each image the list of its human captions, which tell how frequent n-grams are.
    """

    def __init__(self, corpus):
        images = Counter()
        for captions in corpus:
            images.update({ngram for words in captions for own in ngrams(words) for ngram in own})
        self.rare = math.log(len(corpus))  # of an n-gram that comes with one image, or with none
        # the others alone, as most come with one
        self.idf = {ngram: self.rare - math.log(n) for ngram, n in images.items() if n > 1}

    def __call__(self, captions, references):
        """A number for each of an image's captions, of its references."""
        references = [self.weigh(words) for words in references]
        return [self.score(self.weigh(words), references) for words in captions]

    def weigh(self, words):
        """`Weights` of a caption."""
        counts, idf, rare = ngrams(words), self.idf, self.rare
        weights = [{ngram: n * idf.get(ngram, rare) for ngram, n in own.items()} for own in counts]
        norms = [math.sqrt(sum(w * w for w in own.values())) for own in weights]
        return Weights(weights, norms, counts[1].total())  # counted in pairs, as published

    def score(self, caption, references):
        """Ten times the mean likeness of a caption and its references, all `Weights`."""
        return 10 * sum(likeness(caption, own) for own in references) / len(references)


def likeness(caption, reference):
    """The mean over the orders of the cosine of two captions' `Weights`, those of the first no
    greater than the other's: repeating a word brings nothing. 0 to 1."""
    total = 0.0
    # in the order of the caption's words, so that the sum is the same to the last bit
    for mine, theirs, *norms in zip(
        caption.ngrams, reference.ngrams, caption.norms, reference.norms, strict=True
    ):
        shared = sum(min(w, theirs[g]) * theirs[g] for g, w in mine.items() if g in theirs)
        if shared:
            total += shared / (norms[0] * norms[1])
    apart = caption.length - reference.length
    return total / len(ORDERS) * math.exp(-(apart**2) / (2 * SIGMA**2))


def bleu4(captions, references):
    """BLEU-4 of each caption of an image by itself, against all its references, 0 to 1."""
    counts = [ngrams(words) for words in references]
    most = [Counter() for _ in ORDERS]
    for of_reference in counts:
        for own, theirs in zip(most, of_reference, strict=True):
            own |= theirs
    lengths = [len(words) for words in references]
    return [_bleu4(words, most, lengths) for words in captions]


def _bleu4(words, most, lengths):
    """BLEU-4 of a caption, of how often each n-gram may come, and the references' lengths."""
    product = 1.0
    for n, own, allowed in zip(ORDERS, ngrams(words), most, strict=True):
        right = sum(min(count, allowed[ngram]) for ngram, count in own.items())
        product *= (right + NONE) / (max(len(words) - n + 1, 0) + FEW)
    closest = min((abs(length - len(words)), length) for length in lengths)[1]
    ratio = (len(words) + NONE) / (closest + FEW)
    return product ** (1 / len(ORDERS)) * math.exp(min(0.0, 1 - 1 / ratio))


# By the names that --reward takes: what makes, of the training captions, the function of an image's
# captions and references
REWARDS = {"cider": CiderD, "bleu4": lambda corpus: bleu4}


def parse(text):
    """Name -> weight of "cider=1,bleu4=0.5".

    Raises:
        ValueError: it is no such text, in one line.
    """
    weights = {}
    for part in text.split(","):
        name, _, weight = map(str.strip, part.partition("="))
        if name not in REWARDS:
            raise ValueError(f"there is no reward {name!r}: known are {', '.join(REWARDS)}")
        if name in weights:
            raise ValueError(f"{name} stands twice: give each reward once, as cider=1,bleu4=0.5")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise ValueError(
                f"{name} has the weight {weight!r}: give a number above 0, as {name}=1"
            )
    return weights


def make(weights, corpus):
    """The weighted sum of rewards: a function of an image's captions and references, which gives a
    list of a number for each caption.

    Args:
        weights: from `parse`.
        corpus: as `CiderD` takes it.
    """
    parts = [(weight, REWARDS[name](corpus)) for name, weight in weights.items()]

    def reward(captions, references):
        each = [[weight * s for s in score(captions, references)] for weight, score in parts]
        return [sum(scores) for scores in zip(*each, strict=True)]

    return reward
