"""What a beam search keeps: the partial captions, the best finished ones, and how each has come.

Shapes are (n, G, S, b): of n images G groups, which is one but in diverse beam search, of each the
S states of its `constraints.Rules`, which is one where no word must come, and of each state b
beams. An image's rows are these K = G·S·b, one behind the other. Before the first word, when all of
a state would be alike, b is one, or as many as together have b next words.
"""

import torch

from contract import of_all


class Beams:
    """The partial captions of some images, each state's likeliest first.

    Args:
        shape: (n, G, S, b).
        diversity_penalty: λ of diverse beam search (Vijayakumar et al., 2016): what a word costs a
            beam for each beam of the groups before that has just been given it, too (their Hamming
            diversity). It tells which beams a group keeps, and is no part of log p.
        words: in the vocabulary.
    """

    def __init__(self, shape, diversity_penalty, words, device):
        alike = -(-shape[3] // words)
        self.log_probs = torch.full((*shape[:3], alike), -torch.inf, device=device)
        self.log_probs[:, :, 0, 0] = 0.0
        self.ranks = self.log_probs  # less what the words have cost
        self.width = shape[3]
        self.places = torch.full((*shape[:3], 1), self.width, device=device)
        self.diversity_penalty = diversity_penalty

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
            parents, words: (n, K), which of its image's rows each goes on from, and with what.
            finished: (n, G, S·b) log p of those that `end` has finished, -inf for the others.
        """
        shape = self.log_probs.shape
        log_probs, words = (values.view(*shape, -1) for values in (log_probs, words))
        log_probs[:, :, :-1].masked_fill_(words[:, :, :-1] == end, -torch.inf)  # too early
        ranks = self.ranks.unsqueeze(4) + log_probs
        log_probs = self.log_probs.unsqueeze(4) + log_probs
        places, found = torch.arange(self.width, device=words.device) < self.places, []
        others = words.new_empty(len(words), 0)  # the words of the groups before
        for group in range(shape[1]):
            cost = self.diversity_penalty * _times(words[:, group], others)
            rank, chosen = _best(ranks[:, group] - cost, self.width, arriving)
            word, log_prob = (
                values[:, group].flatten(1).gather(1, chosen.flatten(1)).view_as(chosen)
                for values in (words, log_probs)
            )
            kept = places[:, group] & rank.isfinite()
            goes_on = kept & (word != end)
            others = torch.cat([others, word.where(goes_on, -1).flatten(1)], dim=1)
            parents = chosen // words.shape[4] + group * shape[2] * shape[3]
            found.append((rank, log_prob, word, parents, kept, goes_on))
        ranks, log_probs, words, parents, kept, goes_on = (
            torch.stack(values, dim=1) for values in zip(*found, strict=True)
        )
        ended = kept & ~goes_on
        self.places = self.places - ended.sum(dim=3, keepdim=True)
        self.log_probs, self.ranks = (v.where(goes_on, -torch.inf) for v in (log_probs, ranks))
        finished = log_probs.where(ended, -torch.inf).flatten(2)
        return parents.flatten(1), words.flatten(1), finished

    @property
    def likeliest(self):
        """log p (n, G) of each group's likeliest caption; -inf where none can finish any more."""
        has_place = self.places[:, :, -1, 0] > 0
        return self.log_probs.amax((2, 3)).where(has_place, -torch.inf)

    def select(self, images):
        """Keeps the beams of some images alone: a mask."""
        self.log_probs, self.ranks, self.places = (
            values[images] for values in (self.log_probs, self.ranks, self.places)
        )


def _times(words, others):
    """How many of the words (n, m) of others each of (n, S, b, w) is, of its image."""
    return (words.flatten(1).unsqueeze(2) == others.unsqueeze(1)).sum(dim=2).view_as(words)


def _best(ranks, k, arriving):
    """The k greatest of (n, S, b, w) that arrive in each state, and where in (S·b·w) they are:
    (n, S, k) each."""
    ranks = ranks.unsqueeze(1)
    if arriving is not None:
        ranks = ranks.where(arriving, -torch.inf)
    return ranks.flatten(2).topk(k)


class Best:
    """The best finished captions of each group of each image, (I, G, keep): their scores, the best
    first, and where their `<end>` stands."""

    def __init__(self, shape, device):
        self.score = torch.full(shape, -torch.inf, device=device)
        self.log_prob = torch.full(shape, -torch.inf, device=device)
        self.step = torch.zeros(shape, dtype=torch.int64, device=device)
        self.beam = torch.zeros(shape, dtype=torch.int64, device=device)

    def update(self, images, log_probs, step, length_penalty):
        """Takes in the captions finished at a step: log_probs (n, G, S·b), -inf for the others."""
        beams = torch.arange(log_probs[0].numel(), device=log_probs.device)
        beams = beams.view(log_probs.shape[1:]).expand_as(log_probs)
        found = (log_probs, torch.full_like(beams, step), beams)
        score = torch.cat([self.score[images], log_probs / (step + 1) ** length_penalty], dim=2)
        self.score[images], order = score.topk(self.score.shape[2])
        for own, new in zip((self.log_prob, self.step, self.beam), found, strict=True):
            own[images] = torch.cat([own[images], new], dim=2).gather(2, order)


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
        """Words (I·G·keep, T) and alphas (I·G·keep, T, L) or None of the `Best` captions, `end`
        from their end on."""
        beam, last = best.beam.flatten(), best.step.flatten()
        images = torch.arange(self.count, device=beam.device)
        images = images.repeat_interleave(best.beam[0].numel())
        words, alphas = [], []
        for step in reversed(range(len(self.words))):
            parent = self.parents[step][images, beam]
            words.append(self.words[step][images, beam].where(step < last, end))
            if self.alphas:
                alphas.append(self.alphas[step][images, parent])
            beam = parent.where(step <= last, beam)
        words = torch.stack(words[::-1], dim=1)
        return words, torch.stack(alphas[::-1], dim=1) if alphas else None
