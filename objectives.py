"""What training minimises: values that an epoch is given, called with what a decoder makes."""

from dataclasses import dataclass

import torch

from models import caption_loss, loss_terms


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
