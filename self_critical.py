"""Self-critical sequence training (Rennie et al., 2017): the decoder learns from captions that it
draws itself, by how good they are.

Of each image K captions are drawn, and r_k says how good the k-th is. What is minimised,

    -Σ_k Σ_t (r_k - b_k) log p(w_kt) / words,    b_k = Σ_{j ≠ k} r_j / (K - 1),

has the gradient that makes good captions likelier and bad ones less likely (REINFORCE; Williams,
1992). b_k, what the image's other captions are worth (Luo, 2020), does not depend on the k-th, so
that it lowers the estimate's variance and leaves its mean alone; the greedy caption, which Rennie
et al. take, costs another pass. The words and their log p come of the same values dropped out.

A reward compares whole captions, `<end>` among their words: without it captions learn to end in
«with a», which people's captions are full of (Hu et al., 2023).

Of hard attention (`attentions.HardAttention`) the places get a gradient in the batches in which it
is soft. In those in which it draws places, the words are judged given the places, and what draws
them learns by the cross-entropy's share alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

import decoding
from contract import Forward
from groundwork import distributed
from objectives import CrossEntropy


class Sampled(NamedTuple):
    """What the decoder has drawn, K captions of each of I images, and how good it is."""

    log_probs: Tensor  # (I·K, T) float32, of each word; zero after `<end>`
    targets: Tensor  # (I·K, T) int64 the words, `<end>` from the end on
    rewards: Tensor  # (I, K) float32
    truth: Forward | None = None  # of people's captions, where cross-entropy has a share


@dataclass(frozen=True)
class SelfCritical:
    """The objective of the self-critical stage, beside a share of cross-entropy.

    Args:
        reward: of an image's captions and its references, lists of indices with `<end>`, gives a
            list of numbers: see `rewards.make`.
        word_map: word -> index.
        max_length: words of a caption, at most.
        samples: K, 2 or more.
        share: of the cross-entropy, 0 to 1; the rest is the module's.
        cross_entropy: whose share it is.
    """

    reward: Callable[[list, list], list[float]]
    word_map: dict[str, int]
    max_length: int
    samples: int = 5
    share: float = 0.0
    cross_entropy: CrossEntropy = field(default_factory=CrossEntropy)
    measure: ClassVar[str] = "reward"

    def read(self, network, features, captions, lengths):
        """`Sampled` captions, and what the decoder makes of people's, as `CrossEntropy.read`."""
        decoder, truth = network.decoder, None
        with decoder.prepared(features):
            words, log_probs = decoding.draw(
                decoder, features, self.word_map, self.samples, self.max_length
            )
            if self.share:
                truth = self.cross_entropy.read(network, features, captions, lengths)
        return Sampled(log_probs, words, self.rewards(words, captions, lengths), truth)

    def rewards(self, words, captions, lengths):
        """(I, K) float32 of the words drawn (I·K, T), by people's captions."""
        ends = self._counts(words).view(-1, self.samples).tolist()
        drawn = words.view(-1, self.samples, words.shape[1]).tolist()
        own = [
            [caption[:n] for caption, n in zip(of_image, counts, strict=True)]
            for of_image, counts in zip(drawn, ends, strict=True)
        ]
        pairs = zip(own, references(captions, lengths), strict=True)
        found = [self.reward(mine, people) for mine, people in pairs]
        return torch.tensor(found, dtype=torch.float32, device=words.device)

    def __call__(self, log_probs, targets, rewards, truth=None, sizes=None):
        """A scalar float32.

        Args:
            log_probs, targets, rewards, truth: from `read`.
            sizes: of the whole batch, where this is a part of it: the sum of its parts' `sizes`.
        """
        _, words = self.sizes(targets) if sizes is None else sizes
        loss = -(advantages(rewards).flatten() @ log_probs.sum(dim=1)) / words
        if truth is None:
            return loss
        of_truth = distributed.add_up(self.cross_entropy.sizes(truth.targets))
        return (1 - self.share) * loss + self.share * self.cross_entropy(*truth, sizes=of_truth)

    def sizes(self, targets):
        """Captions, over which the means of an epoch are, and their words with `<end>`, over which
        the loss is a mean: float32 (2,) on their device."""
        words = self._counts(targets).sum(dtype=torch.float32)
        return torch.stack([words.new_tensor(len(targets)), words])

    def measured(self, read):
        """The sum of the rewards, a scalar float32 on their device."""
        return read.rewards.sum()

    def _counts(self, words):
        """Words of each caption (n, T) with its first `<end>`, (n,) int64."""
        return (words != self.word_map["<end>"]).sum(dim=1) + 1


def advantages(rewards):
    """r_k - b_k (I, K): by how much each caption is better than its image's others on average."""
    others = rewards.sum(dim=1, keepdim=True) - rewards
    return rewards - others / (rewards.shape[1] - 1)


def references(captions, lengths):
    """People's captions of each image as lists of indices, `<end>` the last: what rewards take.

    Args:
        captions, lengths: int64 (I, K, T) and (I, K), from `datasets.CaptionDataset`.
    """
    return [
        [caption[1:n] for caption, n in zip(of_image, ends, strict=True)]
        for of_image, ends in zip(captions.tolist(), lengths.tolist(), strict=True)
    ]
