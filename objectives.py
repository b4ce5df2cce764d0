"""What training minimises: values that an epoch is given, called with what a decoder makes."""

from dataclasses import dataclass

import torch

import kernels


@dataclass(frozen=True)
class CrossEntropy:
    """-log p of the true words and doubly stochastic attention (§4.2.1): see `caption_loss`."""

    alpha_c: float = 1.0
    label_smoothing: float = 0.0

    def __call__(self, scores, targets, alphas, sizes=None):
        """A scalar float32.

        Args:
            scores, targets, alphas: from `Decoder.forward`.
            sizes: words and captions of the whole batch, where this is a part of it.
        """
        return caption_loss(scores, targets, alphas, self.alpha_c, self.label_smoothing, sizes)

    def sums(self, scores, targets, alphas):
        """What adds up over batches and processes: float64 (2, 2), a row for each term of the loss,
        its sum and how many words or captions it is over."""
        terms = loss_terms(scores, targets, alphas, self.label_smoothing)
        counts = len(targets.data), int(targets.batch_sizes[0])
        rows = [[term.item(), count] for term, count in zip(terms, counts, strict=True)]
        return torch.tensor(rows, dtype=torch.float64)

    def of(self, sums):
        """The loss, a float, of what `sums` gives, added up."""
        (missed, words), (uneven, captions) = sums.tolist()
        return missed / words + self.alpha_c * uneven / captions


def caption_loss(scores, targets, alphas, alpha_c=1.0, label_smoothing=0.0, sizes=None):
    """What training minimises: -log p of the words, and doubly stochastic attention (eq. 14).

    Args:
        scores, targets, alphas: from `Decoder.forward`; without alphas there is no second term.
        alpha_c: λ, weight of the mean over captions and places of (1 - Σ_t α_ti)².
        label_smoothing: share of the target spread over the vocabulary.
        sizes: words and captions of the batch that this is a part of, and to whose loss the
            parts' losses add up; None for a batch by itself.

    Returns:
        scalar float32: the mean over the real words, plus the regularisation.
    """
    words, captions = (len(targets.data), int(targets.batch_sizes[0])) if sizes is None else sizes
    missed, uneven = loss_terms(scores, targets, alphas, label_smoothing)
    return missed / words + alpha_c * uneven / captions


def loss_terms(scores, targets, alphas, label_smoothing=0.0):
    """Sums of `caption_loss`: of -log p over words, of the mean (1 - Σ_t α_ti)² over captions."""
    missed = kernels.missed(scores.data, targets.data, label_smoothing)
    if alphas is None:
        return missed, missed.new_zeros(())
    return missed, ((1 - alphas.sum(dim=1)) ** 2).mean(dim=1).sum()
