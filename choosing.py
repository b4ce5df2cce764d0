"""How an image's captions are come by: searched for or drawn, and chosen among."""

import re
from dataclasses import dataclass, fields
from typing import NamedTuple

from torch import Tensor

import decoding
from constraints import MAX_LENGTH, Constraints, sayable
from groundwork.errors import UserError
from groundwork.wording import counted
from rewards import CiderD

RERANKERS = ("consensus",)
DIVERSITY_PENALTY = 0.5  # of several groups, in the middle of what the paper finds good
MANY = 2**31  # no bound
BOUNDS = {  # kind, least and most of each number
    "beam_size": (int, 1, MANY),
    "beam_groups": (int, 1, MANY),
    "diversity_penalty": (float, 0, 1e6),
    "temperature": (float, 0, 1e6),
    "top_k": (int, 1, MANY),
    "top_p": (float, 0, 1),
    "max_words": (int, 1, 1000),
    "min_words": (int, 1, 1000),
    "no_repeat_ngram": (int, 1, 1000),
    "length_penalty": (float, 0, 10),
    "candidates": (int, 2, MANY),
}
OF_BEAMS = ("beam_groups", "diversity_penalty", "must_include")  # beam search alone has them


class Caption(NamedTuple):
    """A `decoding.Caption`, and how alike it is to the others that it was chosen among."""

    words: list[int]
    log_prob: float
    alphas: Tensor | None
    consensus: float | None = None  # mean CIDEr-D, 0 to 10; None where it was not asked for


@dataclass(frozen=True)
class Search:
    """How captions are come by.

    Args:
        beam_size: partial captions kept at each step.
        beam_groups: of diverse beam search, that share the beam out.
        diversity_penalty: λ, what a word costs for each beam of the groups before that has it at
            the same step; None: `DIVERSITY_PENALTY`.
        temperature: above 0, words are drawn at random by p^(1 / temperature), not searched for.
            None: 0, but 1 with `top_k` or `top_p`.
        top_k: draws from so many likeliest words.
        top_p: draws from the nucleus, the fewest words that have this share of the probability.
        max_words, min_words: of a caption, at most and at least.
        no_repeat_ngram: n: no n words in a row come twice in a caption.
        must_include: words that must come, or with | between alternatives of which one must.
        length_penalty: α: captions of a beam are compared by log p / length^α.
        rerank: "consensus": of several candidates those come first that are most like the others
            (Devlin et al., 2015, *Exploring Nearest Neighbor Approaches for Image Captioning*).
        candidates: how many, of the beam or drawn; None: `beam_size`.

    Raises:
        UserError: a number is out of bounds, or options do not go together.
    """

    beam_size: int = 5
    beam_groups: int = 1
    diversity_penalty: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    max_words: int = MAX_LENGTH
    min_words: int = 1
    no_repeat_ngram: int | None = None
    must_include: tuple[str, ...] = ()
    length_penalty: float = 0.0
    rerank: str | None = None
    candidates: int | None = None

    def __post_init__(self):
        for name, bounds in BOUNDS.items():
            value = getattr(self, name)
            if value is not None or getattr(type(self), name) is not None:
                check_number(name, value, *bounds)
        if self.temperature and self.temperature < 1e-6:
            raise UserError(
                f"temperature {self.temperature:g} is too small to draw by: give 0, for none drawn"
            )
        if self.top_p == 0:
            raise UserError("top_p 0 leaves no word to draw: give a share above 0")
        if not isinstance(self.must_include, list | tuple) or not all(
            isinstance(word, str) for word in self.must_include
        ):
            raise UserError(f"must_include {self.must_include!r} is not a list of words")
        if self.rerank not in (None, *RERANKERS):
            raise UserError(f"rerank {self.rerank!r} is not {' or '.join(RERANKERS)}")
        self._check_together()

    @classmethod
    def of(cls, options):
        """Of a dict of more options than its own."""
        return cls(**{field.name: options[field.name] for field in fields(cls)})

    def _check_together(self):
        if self.temperature == 0:
            self._refuse(("top_k", "top_p"), "for what is drawn, which temperature 0 is not")
        if self.draws:
            self._refuse(OF_BEAMS, "for beam search: leave temperature, top_k and top_p out")
        if self.beam_groups == 1:
            self._refuse(["diversity_penalty"], "for several beam_groups: give 2 or more")
        if self.beam_size % self.beam_groups:
            raise UserError(
                f"beam_size {self.beam_size} cannot be shared out among beam_groups "
                f"{self.beam_groups}: give one that they divide"
            )
        if self.rerank is None:
            self._refuse(["candidates"], "for rerank: give rerank consensus, too")
        elif self.count < 2:
            raise UserError(f"rerank {self.rerank} chooses among several: widen the beam")
        self._check_of_beam(self.candidates)

    def _refuse(self, names, reason):
        """Raises UserError where one of the options is not as it is by itself."""
        for name in names:
            if getattr(self, name) != getattr(type(self), name):
                raise UserError(f"{name} is {reason}")

    def _check_of_beam(self, count):
        if count is not None and not self.draws and count > self.beam_size:
            raise UserError(
                f"a beam of {self.beam_size} has no {counted(count, 'caption')}: widen it, or ask "
                "for fewer"
            )

    def check_count(self, n):
        """Raises UserError where there are not `n` captions of an image to be had."""
        check_number("n", n, int, 1, MANY)
        self._check_of_beam(n)
        if self.rerank is not None and n > self.count:
            raise UserError(f"of {counted(self.count, 'candidate')} {n} cannot be chosen")

    def check_words(self, word_map):
        """Raises UserError where no caption in the words of a vocabulary is as asked for."""
        words = len(sayable(word_map))
        if self.beam_size > words:
            raise UserError(
                f"beam_size {self.beam_size} is larger than the vocabulary of "
                f"{counted(words, 'word')}"
            )
        self.constraints.check(word_map, self.max_words)

    @property
    def draws(self):
        """Whether captions are drawn at random."""
        if self.temperature is None:
            return self.top_k is not None or self.top_p is not None
        return self.temperature > 0

    @property
    def count(self):
        """How many candidates captions are chosen among, by `rerank`."""
        return self.candidates or self.beam_size

    @property
    def further(self):
        """Name -> value of what is not as it is by itself, other than the beam's width, the length
        and its penalty."""
        usual = {"beam_size", "length_penalty", "max_words"}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in usual}
        values = {n: v for n, v in values.items() if v != getattr(type(self), n)}
        return {n: v if n != "must_include" else " ".join(v) for n, v in values.items()}

    @property
    def file_part(self):
        """What tells its captions' files from those of another search: `beam5_beam_groups5`."""
        parts = ["drawn" if self.draws else f"beam{self.beam_size}"]
        parts += [f"{name}{value}" for name, value in self.further.items()]
        return re.sub(r"[^\w.]+", "-", "_".join(parts))[:100]

    @property
    def description(self):
        """For people: all but the width of the beam."""
        parts = [
            f"length penalty {self.length_penalty:g}",
            f"{counted(self.max_words, 'word')} at most",
        ]
        return ", ".join([*parts, *(f"{name} {value}" for name, value in self.further.items())])

    @property
    def groups(self):
        """The arguments of beam search that tell of its groups."""
        penalty = self.diversity_penalty
        penalty = DIVERSITY_PENALTY if penalty is None else penalty
        return {"groups": self.beam_groups, "diversity_penalty": penalty}

    @property
    def kept(self):
        """How many captions of an image there are to be had, or drawn where any number is."""
        return self.count if self.rerank or not self.draws else 1

    @property
    def constraints(self):
        return Constraints(self.min_words, self.no_repeat_ngram, tuple(self.must_include))


def check_number(name, value, kind, least, most):
    """Raises UserError unless the value is a number of that kind within the bounds."""
    kinds = (int,) if kind is int else (int, float)
    if type(value) not in kinds or not least <= value <= most:
        bounds = f"of {least} or more" if most >= MANY else f"from {least} to {most:g}"
        number = "a whole number" if kind is int else "a number"
        raise UserError(f"{name} {value!r} is not {number} {bounds}")


def find(decoder, encoder_out, word_map, search, n=1, generator=None):
    """Captions of images.

    Args:
        decoder, encoder_out, word_map: as in `decoding.greedy`.
        search: a `Search` whose `check_words` knows the vocabulary.
        n: how many of an image, at most.
        generator: of what is drawn, a torch.Generator on the decoder's device.

    Returns:
        for each image a list of `Caption`, `n` or fewer: those of a beam the best first, of several
        groups in turn; those drawn the likeliest first; what is reranked by that, and none twice.
    """
    arguments = decoder, encoder_out, word_map
    if search.draws:
        count = n if search.rerank is None else search.count
        found = _draw(*arguments, search, count, generator)
    else:
        beam = search.beam_size, search.max_words, search.length_penalty, search.constraints
        if n == 1 and search.rerank is None:
            found = [[best] for best in decoding.beam_search(*arguments, *beam, **search.groups)]
        else:
            found = decoding.finished_beams(*arguments, *beam, **search.groups)
    if search.rerank is not None:
        found = [by_consensus(captions[: search.count]) for captions in found]
    return [[Caption(*caption) for caption in captions[:n]] for captions in found]


def _draw(decoder, encoder_out, word_map, search, count, generator):
    """`count` captions drawn for each image, the likeliest first."""
    drawn = decoding.sample(
        decoder,
        encoder_out,
        word_map,
        search.max_words,
        search.temperature or 1.0,
        generator,
        search.constraints,
        search.top_k,
        search.top_p,
        count,
    )
    each = [drawn[i : i + count] for i in range(0, len(drawn), count)]
    return [sorted(captions, key=lambda caption: -caption.log_prob) for captions in each]


def by_consensus(captions):
    """`Caption`s, the one first that is most like all of them, by its mean CIDEr-D to the others;
    none twice, but one that comes several times counts as often.

    All n-grams count alike here: how rare they are is known of training captions, not of these.
    """
    alike = CiderD([[]] * 2)  # a corpus without words: any n-gram is as rare as another
    weights = [alike.weigh(caption.words) for caption in captions]
    found = {}
    for i, caption in enumerate(captions):
        others = weights[:i] + weights[i + 1 :]
        consensus = alike.score(weights[i], others) if others else 0.0
        found.setdefault(tuple(caption.words), Caption(*caption, consensus))
    return sorted(found.values(), key=lambda caption: -caption.consensus)
