"""Scheduled sampling (Bengio, Vinyals, Jaitly and Shazeer, 2015): training reads, in the place of
ever more of the true words before a word, what the model itself would have written there, as it has
to when it captions."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from contract import Forward, of_all, pack
from decoding import drawn_from, roll_out
from objectives import CrossEntropy


def own_share(schedule, updates, k, most):
    """Share of the words read that are the model's own after so many updates, 1 - ε_i of §2.4.

    Args:
        schedule: "linear", i / k; "exponential", 1 - exp(-i / k), whose ε_i is the paper's k^i with
            exp(-1 / k) for k; or "inverse_sigmoid", 1 - k / (k + exp(i / k)), half at i = k ln k.
        updates: i; before the first it is below 0, and the share 0.
        k: above 0.
        most: that the share stays at.
    """
    if updates < 0:
        return 0.0
    decayed = math.exp(-updates / k)  # which may be 0, where its inverse is beyond a float
    grown = {
        "linear": updates / k,
        "exponential": 1 - decayed,
        "inverse_sigmoid": 1 / (1 + k * decayed),
    }
    return min(most, grown[schedule])


@dataclass(frozen=True)
class ScheduledSampling(CrossEntropy):
    """-log p of the true words as ever, but each word that the decoder reads before one is by a
    coin of its own the true one or drawn from the distribution that the decoder has just given,
    over the words with which a caption goes on. No gradient passes through the draw.

    Attention that draws its places has no gradient for them here: see `contract.Forward.drawn`.
    """

    share: Callable[[], float] = lambda: 0.0  # of the words read, drawn: asked for at each batch
    never: Tensor | None = None  # (n,) int64, words that are not drawn

    def fixed(self, decoder):
        """As `CrossEntropy.fixed`: not while words are drawn."""
        return super().fixed(decoder) and not self.share()

    def read(self, network, features, captions, lengths):
        """As `CrossEntropy.read`."""
        if not (share := self.share()):
            return super().read(network, features, captions, lengths)
        captions = captions.flatten(0, 1).to(features.device, non_blocking=True)
        return self.read_own(network.decoder, features, captions, lengths.flatten(), share)

    def read_own(self, decoder, encoder_out, captions, lengths, share):
        """A `contract.Forward`; the other arguments are those of `Decoder.forward`.

        Args:
            share: probability of each word after `<start>` to be the decoder's own.
        """
        steps = lengths.cpu() - 1
        count, ends = len(captions), steps.to(captions.device)

        @torch.no_grad()
        def choose(scores, step, rows):
            own = torch.rand(len(rows), device=captions.device) < share
            likely = scores.float().index_fill(1, self.never, -torch.inf).softmax(dim=1)
            words = drawn_from(likely).squeeze(1).where(own, captions[rows, step + 1])
            return words, ends[rows] > step + 1

        rolled = list(roll_out(decoder, encoder_out, captions[:, 0], choose))
        scores = torch.stack([of_all(own, rows, count) for rows, own, *_ in rolled], dim=1)
        alphas = None
        if rolled[0][2] is not None:
            alphas = torch.stack([of_all(own, rows, count) for rows, _, own, _ in rolled], dim=1)
            real = torch.arange(len(rolled), device=captions.device) < ends.unsqueeze(1)
            alphas = alphas * real.unsqueeze(2)
        return Forward(pack(scores, steps), pack(captions[:, 1:], steps), alphas)
