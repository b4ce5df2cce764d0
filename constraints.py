"""What captions keep to: which words may come at a step, and which must have come at the end.

A word that must come is found by constrained beam search (Anderson et al., 2017, *Guided Open
Vocabulary Image Captioning with Constrained Beam Search*): a state machine, whose states are the
sets of words that have come of those that must, with a beam for each of the 2^C; captions end in
the last of them alone, where all have. Anderson et al.'s alternatives are there, as "dog|dogs", and
so are several words in a row, where the vocabulary's rule makes several of what people call one, as
characters: then the states tell, too, how many of them have come.
"""

import itertools
from dataclasses import dataclass
from difflib import get_close_matches

import torch

from groundwork.errors import UserError
from groundwork.wording import counted
from word_rules import rule_of, unsayable

MAX_LENGTH = 50  # of a caption
MUST = 4  # words that must come, at most: their sets double with each
STATES = 100  # of the search for them, at most
EITHER = "|"  # between the alternatives of one


@dataclass(frozen=True)
class Constraints:
    """What captions keep to, beside their greatest length.

    Args:
        min_words: words of a caption, at least.
        no_repeat_ngram: n: no n words in a row come twice in a caption. None: they may.
        must_include: words that must come, `MUST` at most: each a word, or words with | between of
            which one must.
    """

    min_words: int = 1
    no_repeat_ngram: int | None = None
    must_include: tuple[str, ...] = ()

    def machine(self, word_map):
        """The `Machine` that finds the words of `must_include`."""
        if not self.must_include:
            return Machine([])
        rule = rule_of(word_map)
        phrases = [
            [[word_map[piece] for piece in pieces_of(word, rule, word_map)] for word in words]
            for words in (words.split(EITHER) for words in dict.fromkeys(self.must_include))
        ]
        return Machine(phrases)

    def check(self, word_map, max_words):
        """Raises UserError where no caption of `max_words` words of the vocabulary keeps to it."""
        vocabulary = sayable(word_map)
        if self.min_words > max_words:
            raise UserError(f"min_words {self.min_words} is more than max_words {max_words}")
        # with more words there is always one left that does not repeat an n-gram
        if self.no_repeat_ngram is not None and self.min_words > len(vocabulary):
            raise UserError(
                f"min_words {self.min_words} cannot be kept to without repeating n-grams, as the "
                f"vocabulary has {counted(len(vocabulary), 'word')}"
            )
        must = list(dict.fromkeys(self.must_include))
        if len(must) > MUST:
            raise UserError(f"must_include takes {MUST} words at most, not {len(must)}")
        for words in must:
            for word in words.split(EITHER):
                _check_known(word, words, vocabulary, word_map)
        fewest = self.machine(word_map).fewest
        if fewest > max_words:
            raise UserError(
                f"must_include needs {counted(fewest, 'word')}: max_words {max_words} is too few"
            )


FREE = Constraints()


def sayable(word_map):
    """The words that captions are made of, a set."""
    return word_map.keys() - {*unsayable(word_map), "<end>"}


def pieces_of(word, rule, word_map):
    """The words of a vocabulary that what people call a word is made of, mostly itself."""
    if rule.whole and word in word_map:
        return [word]
    pieces = rule.split(word)
    return [word] if rule.whole and len(pieces) == 1 else pieces


def _check_known(word, words, vocabulary, word_map):
    """Raises UserError unless the word, one of the alternatives `words`, can be said."""
    if not word or len(word.split()) > 1:
        raise UserError(
            f"must_include {words!r} is not a word, nor words with {EITHER} between of which one "
            "must come"
        )
    pieces = pieces_of(word, rule_of(word_map), word_map)
    if not pieces or not vocabulary.issuperset(pieces):
        near = get_close_matches(word.lower(), sorted(vocabulary), n=3)
        raise UserError(
            f"must_include {words!r}: the model has no word {word!r}"
            + (f"; near are {', '.join(near)}" if near else "")
        )


class Machine:
    """What has come of phrases that must come, each a list of alternatives, which are lists of
    words: a state machine, whose first state is that nothing has, and the last that all have.

    Attributes:
        states: how many there are.
        words: those that phrases are made of, indices, a list.
        after: state -> for each of these words, and behind them for any other, the state after it.
        fewest: words that it takes from the first state to the last.
    """

    def __init__(self, phrases):
        # of each phrase how far it has come: the longest beginning of an alternative that the last
        # words are, or None, when it has come
        first, last = ((),) * len(phrases), (None,) * len(phrases)
        self.words = list(dict.fromkeys(w for all_ in phrases for own in all_ for w in own))
        depths, after, waiting = {first: 0}, {}, [first]
        for state in waiting:
            after[state] = [
                tuple(map(_advance, phrases, state, itertools.repeat(word)))
                for word in (*self.words, None)
            ]
            for found in after[state]:
                if found not in depths:
                    depths[found] = depths[state] + 1
                    waiting.append(found)
            if len(depths) > STATES:
                raise UserError(
                    "must_include is made of too many of the vocabulary's words to be searched "
                    "for: name fewer, or shorter ones"
                )
        self.states, self.fewest = len(depths), depths[last]
        order = [*(state for state in depths if state != last), last]
        numbers = {state: number for number, state in enumerate(order)}
        self.after = [[numbers[found] for found in after[state]] for state in order]


def _advance(alternatives, seen, word):
    """How far a phrase has come with one word more."""
    if seen is None:
        return None
    seen = (*seen, word)
    if any(seen[-len(own) :] == tuple(own) for own in alternatives):
        return None
    ends = (seen[i:] for i in range(len(seen) + 1))
    return next(end for end in ends if any(end == tuple(own[: len(end)]) for own in alternatives))


class Rules:
    """Which words may come at a step, of captions that keep to `Constraints`.

    In a search a caption is in one of the `states` of a `Machine`, by which of the words have come
    that must. In the last of them alone it may end. Rules are equal that allow the same.
    """

    ROWS = 32  # whose scores a CPU's cache holds

    def __init__(self, constraints, word_map, max_length, device):
        never, self.end = [word_map[word] for word in unsayable(word_map)], word_map["<end>"]
        # one of them twice, so that both are of a length, and a graph's input
        self.never = torch.tensor([*never, never[0]], device=device)
        self.not_yet = torch.tensor([*never, self.end], device=device)
        self.max_length, self.min_words = max_length, constraints.min_words
        self.ngram = constraints.no_repeat_ngram
        machine = constraints.machine(word_map)
        self.states = machine.states
        self.needed = torch.tensor(machine.words, dtype=torch.int64, device=device)
        self.after = torch.tensor(machine.after, dtype=torch.int64, device=device)
        self._all = constraints, max_length, self.end, (*never,), (*machine.words,), device

    def __eq__(self, other):
        return isinstance(other, Rules) and self._all == other._all

    def __hash__(self):
        return hash(self._all)

    def begin(self, rows):
        """What is remembered of the words of so many captions: (rows, 0) int64, or None where it
        is nothing."""
        return None if self.ngram is None else self.never.new_empty(rows, 0)

    def remember(self, said, words, rows=slice(None)):
        """`said`, or some rows of it, with the next word (n,) of each."""
        return None if said is None else torch.cat([said[rows], words.unsqueeze(1)], dim=1)

    def excluded(self, step, words):
        """Those of so many words in the vocabulary that no caption goes on with, int64, when it has
        `step` words."""
        if step == self.max_length:
            words = torch.arange(words, device=self.never.device)
            return words[words != self.end]
        return self.not_yet if step < self.min_words else self.never

    def __call__(self, scores, excluded, said=None):
        """log p (n, V) float32 of scores, the model's own, -inf for the words that may not come.

        Args:
            excluded: from `excluded`.
            said: the words there are, (n, t), from `begin` and `remember`.
        """
        log_probs = scores.log_softmax(dim=1, dtype=torch.float32)
        log_probs.index_fill_(1, excluded, -torch.inf)
        if said is not None and said.shape[1] >= self.ngram:
            followed, same = _following(said, self.ngram)
            repeats = same & (followed != self.end)  # which captions that have ended go on saying
            log_probs.scatter_add_(1, followed, torch.where(repeats, -torch.inf, 0.0))
        return log_probs

    def renormalised(self, scores, step):
        """Over the words that may come, as long as repetitions may; gradients pass."""
        excluded = self.excluded(step, scores.shape[1])
        return scores.float().index_fill(1, excluded, -torch.inf).log_softmax(dim=1)

    def likeliest(self, k, scores, excluded, said=None):
        """The k greatest log p of each row and their words, (n, k) each; where words must come, the
        k greatest of the others and, behind them, those that must, however likely they are."""
        rows = self.ROWS if scores.device.type == "cpu" else len(scores)
        said = itertools.repeat(None) if said is None else said.split(rows)
        parts = [
            self._likeliest(k, self(part, excluded, own))
            for part, own in zip(scores.split(rows), said, strict=False)
        ]
        if len(parts) == 1:
            return parts[0]
        return (torch.cat(values) for values in zip(*parts, strict=True))

    def _likeliest(self, k, log_probs):
        if self.states == 1:
            return log_probs.topk(k)
        must = log_probs.index_select(1, self.needed)
        others, words = log_probs.index_fill_(1, self.needed, -torch.inf).topk(k)
        words = torch.cat([words, self.needed.expand_as(must)], dim=1)
        return torch.cat([others, must], dim=1), words

    def arriving(self, k):
        """From which state to which the words of `likeliest` lead, bool (to, from, 1, words); None
        where there is one state."""
        if self.states == 1:
            return None
        after = torch.cat([self.after[:, -1:].expand(-1, k), self.after[:, :-1]], dim=1)
        state = torch.arange(self.states, device=after.device)
        return (after == state[:, None, None]).unsqueeze(2)


def _following(said, n):
    """The words of each row (r, t) before which there are n - 1, and which of them follow the same
    n - 1 words as the next one will."""
    last = said[:, said.shape[1] - n + 1 :]
    same = (said.unfold(1, n - 1, 1)[:, :-1] == last.unsqueeze(1)).all(dim=2)
    return said[:, n - 1 :], same
