"""What training minimises: values that an epoch is given, called with what a decoder makes."""

from dataclasses import dataclass

from models import caption_loss


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
