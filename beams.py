"""What a beam search keeps: the partial captions, the best finished ones, and how each has come.

Shapes are (n, G, S, b): of n images G groups, which is one but in diverse beam search, of each the
S states of its `constraints.Rules`, which is one where no word must come, and of each state b
beams. An image's rows are these K = G·S·b, one behind the other. Before the first word, when all of
a state would be alike, b is one, or as many as together have b next words.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from contract import of_all


class Beams(NamedTuple):
    """The partial captions of some images, each state's likeliest first."""

    log_probs: Tensor  # (n, G, S, b) float32
    ranks: Tensor  # likewise, less what the words have cost
    places: Tensor  # (n, G, S, 1) int64, how many captions are still to be found
    width: int  # the greatest b
    diversity_penalty: float

    @classmethod
    def begin(cls, shape, alike, diversity_penalty, device):
        """Those of no word.

        Args:
            shape: (n, G, S, b).
            alike: beams there are before the first word, at least as many as together have b next
                words, and b at most.
            diversity_penalty: λ of diverse beam search (Vijayakumar et al., 2016): what a word
                costs a beam for each beam of the groups before that has just been given it, too
                (their Hamming diversity). It tells which beams a group keeps, and is no part of
                log p.
        """
        log_probs = torch.full((*shape[:3], alike), -torch.inf, device=device)
        log_probs[:, :, 0, 0] = 0.0
        places = torch.full((*shape[:3], 1), shape[3], device=device)
        return cls(log_probs, log_probs, places, shape[3], diversity_penalty)

    @property
    def candidates(self):
        """How many next words of a beam hold all that its group may choose: as many as a state
        keeps, beside those that other groups may have made dear and an `<end>` too early."""
        _, groups, states, _ = self.log_probs.shape
        return self.width + (groups - 1) * states * self.width + (states > 1)

    def extend(self, log_probs, words, arriving, end):
        """Goes on with the best of the captions with one more word; a finished one takes a place.

        Args:
            log_probs, words: (n·K, w) candidates for each row's next word, from
                `constraints.Rules.likeliest`; before the first word K is G·S.
            arriving: from `constraints.Rules.arriving`.
            end: the word that finishes a caption.

        Returns:
            the beams with it.
            parents, words: (n, K), which of its image's rows each goes on from, and with what.
            finished: (n, G, S·b) log p of those that `end` has finished, -inf for the others.
        """
        shape = self.log_probs.shape
        log_probs, words = (values.view(*shape, -1) for values in (log_probs, words))
        log_probs[:, :, :-1].masked_fill_(words[:, :, :-1] == end, -torch.inf)  # too early
        ranks = self.ranks.unsqueeze(4) + log_probs
        log_probs = self.log_probs.unsqueeze(4) + log_probs
        places, found = torch.arange(self.width, device=words.device) < self.places, []
        others = []  # the words of the groups before
        for group in range(shape[1]):
            rank = ranks[:, group]
            if others:
                rank = rank - self.diversity_penalty * _times(words[:, group], others)
            rank, chosen = _best(rank, self.width, arriving)
            word, log_prob = (
                values[:, group].flatten(1).gather(1, chosen.flatten(1)).view_as(chosen)
                for values in (words, log_probs)
            )
            kept = places[:, group] & rank.isfinite()
            goes_on = kept & (word != end)
            others.append(word.where(goes_on, -1).flatten(1))
            parents = chosen // words.shape[4] + group * shape[2] * shape[3]
            found.append((rank, log_prob, word, parents, kept, goes_on))
        ranks, log_probs, words, parents, kept, goes_on = (
            torch.stack(values, dim=1) if len(values) > 1 else values[0].unsqueeze(1)
            for values in zip(*found, strict=True)
        )
        ended = kept & ~goes_on
        finished = log_probs.where(ended, -torch.inf).flatten(2)
        log_probs, ranks = (values.where(goes_on, -torch.inf) for values in (log_probs, ranks))
        places = self.places - ended.sum(dim=3, keepdim=True)
        beams = self._replace(log_probs=log_probs, ranks=ranks, places=places)
        return beams, parents.flatten(1), words.flatten(1), finished

    @property
    def likeliest(self):
        """log p (n, G) of each group's likeliest caption; -inf where none can finish any more."""
        has_place = self.places[:, :, -1, 0] > 0
        return self.log_probs.amax((2, 3)).where(has_place, -torch.inf)

    def select(self, images):
        """The beams of some images alone: indices."""
        log_probs, ranks, places, *others = self
        return Beams(log_probs[images], ranks[images], places[images], *others)


def _times(words, others):
    """How many of the words of others, (n, m) each, each of (n, S, b, w) is, of its image."""
    others = torch.cat(others, dim=1).unsqueeze(1)
    return (words.flatten(1).unsqueeze(2) == others).sum(dim=2).view_as(words)


def _best(ranks, k, arriving):
    """The k greatest of (n, S, b, w) that arrive in each state, and where in (S·b·w) they are:
    (n, S, k) each."""
    ranks = ranks.unsqueeze(1)
    if arriving is not None:
        ranks = ranks.where(arriving, -torch.inf)
    return ranks.flatten(2).topk(k)


class Best(NamedTuple):
    """The best finished captions of each group of each image, (I, G, keep), the best first."""

    score: Tensor  # float32
    log_prob: Tensor  # float32
    step: Tensor  # int64, and which beam: where their `<end>` stands
    beam: Tensor  # int64

    @classmethod
    def begin(cls, shape, device):
        """None yet, of shape (I, G, keep)."""
        none = torch.full(shape, -torch.inf, device=device)
        nowhere = torch.zeros(shape, dtype=torch.int64, device=device)
        return cls(none, none, nowhere, nowhere)

    def update(self, images, log_probs, step, length_penalty):
        """With the captions finished at a step, a scalar int64: log_probs (n, G, S·b), -inf for the
        others."""
        beams = torch.arange(log_probs[0].numel(), device=log_probs.device)
        beams = beams.view(log_probs.shape[1:]).expand_as(log_probs)
        found = (log_probs, step.expand_as(beams), beams)
        all_ = len(images) == len(self.score)
        before = self if all_ else Best(*(own[images] for own in self))
        score = torch.cat([before.score, log_probs / (step + 1) ** length_penalty], dim=2)
        score, order = score.topk(self.score.shape[2])
        others = (
            torch.cat(pair, dim=2).gather(2, order) for pair in zip(before[1:], found, strict=True)
        )
        best = Best(score, *others)
        if all_:
            return best
        pairs = zip(self, best, strict=True)
        return Best(*(own.index_copy(0, images, new) for own, new in pairs))


class History:
    """What every beam chose at each step, and which beam of the step before it continued.

    Args:
        count: I.
    """

    def __init__(self, count):
        self.count = count
        self.words, self.parents, self.alphas = [], [], []

    def append(self, images, words, parents, alphas):
        """words and parents (n, K) of n images; alphas (rows, L) that led to the parents' words, or
        None."""
        new = [(self.words, words), (self.parents, parents)]
        if alphas is not None:
            new.append((self.alphas, alphas.view(len(words), -1, alphas.shape[1])))
        for steps, values in new:
            steps.append(of_all(values, images, self.count))

    def trace(self, best, end):
        """Words (I·G·keep, T), on the CPU, and alphas (I·G·keep, T, L) or None of the `Best`
        captions, `end` from their end on."""
        beam, last = (values.flatten().cpu() for values in (best.beam, best.step))
        of_words, of_parents = (torch.stack(own).cpu() for own in (self.words, self.parents))
        images = torch.arange(self.count).repeat_interleave(best.beam[0].numel())
        words, parents = torch.empty(2, len(of_words), len(beam), dtype=torch.int64)
        for step in reversed(range(len(words))):
            words[step] = of_words[step][images, beam].where(step < last, end)
            parents[step] = of_parents[step][images, beam]
            beam = parents[step].where(step <= last, beam)
        if not self.alphas:
            return words.T, None
        device = self.alphas[0].device
        images, parents = images.to(device), parents.to(device).unbind()
        pairs = zip(self.alphas, parents, strict=True)
        return words.T, torch.stack([own[images, parent] for own, parent in pairs], dim=1)
