"""What training minimises: values that an epoch is given, called with what a decoder makes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import kernels
from groundwork import distributed
from groundwork.devices import random_state, set_random_state


@dataclass(frozen=True)
class CrossEntropy:
    """-log p of the true words and doubly stochastic attention (§4.2.1): see `caption_loss`."""

    alpha_c: float = 1.0
    label_smoothing: float = 0.0
    barred: Tensor | None = None  # from `vocabulary.barred`
    measure: ClassVar[str] = "top5"  # what `measured` sums up

    def read(self, network, features, captions, lengths):
        """What the loss is of: the decoder's `contract.Forward` of people's captions.

        Args:
            network: an `engine.Network`.
            features: (I, g, g, D).
            captions, lengths: int64 (I, K, T) and (I, K), from `datasets.CaptionDataset`.
        """
        if not (network.decoder.looks and network.decoder.training):
            return network.read(features, captions, lengths)
        return read_softly_too(network, features, captions, lengths)

    def fixed(self, decoder):
        """Whether it has a GPU do the same for all batches of a shape: not where places are drawn,
        in some batches."""
        return not decoder.looks

    def measured(self, read):
        """How many words are among the five likeliest, a scalar float32 on their device."""
        return top5_right(read.scores.data, read.targets.data, self.barred)

    def __call__(self, scores, targets, alphas, drawn=None, sizes=None):
        """A scalar float32.

        Args:
            scores, targets, alphas, drawn: from `Decoder.forward`.
            sizes: of the whole batch, where this is a part of it: the sum of its parts' `sizes`.
        """
        terms = self.alpha_c, self.label_smoothing
        return caption_loss(scores, targets, alphas, drawn, *terms, sizes, self.barred)

    def sizes(self, targets):
        """Words and captions that the loss is a mean over, float32 (2,) on their device; over the
        words are the means of an epoch, too."""
        return sizes_of(targets, self.barred)

    def sums(self, scores, targets, alphas):
        """What adds up over batches and processes: float64 (2, 2), a row for each term of the loss,
        its sum and how many words or captions it is over."""
        terms = loss_terms(scores, targets, alphas, self.label_smoothing, self.barred)
        return torch.stack([torch.stack(terms), self.sizes(targets)], dim=1).cpu().double()

    def of(self, sums):
        """The loss, a float, of what `sums` gives, added up."""
        (missed, words), (uneven, captions) = sums.tolist()
        return missed / words + self.alpha_c * uneven / captions


def caption_loss(
    scores,
    targets,
    alphas,
    drawn=None,
    alpha_c=1.0,
    label_smoothing=0.0,
    sizes=None,
    barred=None,
):
    """What training minimises: -log p of the words, and doubly stochastic attention (eq. 14).

    Args:
        scores, targets, alphas, drawn: from `Decoder.forward`; without alphas there is no second
            term, and with what was drawn there is a third: see `reinforce`.
        alpha_c: λ, weight of the mean over captions and places of (1 - Σ_t α_ti)².
        label_smoothing: share of the target spread over the vocabulary.
        sizes: words and captions of the batch that this is a part of, and to whose loss the
            parts' losses add up; None for a batch by itself.
        barred: int64, words that the decoder gives no probability, from `vocabulary.barred`: they
            are left out where they are targets, and have no share of the label smoothing.

    Returns:
        scalar float32: the mean over the real words, plus the regularisation.
    """
    words, captions = sizes_of(targets, barred) if sizes is None else sizes
    missed, uneven = loss_terms(scores, targets, alphas, label_smoothing, barred)
    loss = missed / words + alpha_c * uneven / captions
    if drawn is not None:
        loss = loss + reinforce(scores, targets, drawn, words / captions, barred=barred) / captions
    return loss


def sizes_of(targets, barred=None):
    """Words, without those barred, and captions of packed targets: float32 (2,)."""
    words = _counted(targets.data, barred).sum(dtype=torch.float32)
    return torch.stack([words, words.new_full((), int(targets.batch_sizes[0]))])


def _counted(targets, barred):
    """Which of the targets (n,) are no barred words, bool."""
    counted = targets != kernels.IGNORED
    return counted if barred is None else counted & ~torch.isin(targets, barred)


def loss_terms(scores, targets, alphas, label_smoothing=0.0, barred=None):
    """Sums of `caption_loss`: of -log p over words, of the mean (1 - Σ_t α_ti)² over captions."""
    missed = kernels.missed(scores.data, targets.data, label_smoothing, barred)
    if alphas is None:
        return missed, missed.new_zeros(())
    return missed, ((1 - alphas.sum(dim=1)) ** 2).mean(dim=1).sum()


def top5_right(scores, targets, barred=None):
    """How many targets (n,) int64 are among the five largest scores of their row (n, V), and not
    `barred`, int64: a scalar float32 on their device, so that the host need not wait for it."""
    top = scores.topk(min(5, scores.shape[1]), dim=1).indices
    right = (top == targets.unsqueeze(1)).any(dim=1)
    if barred is not None:
        right &= (targets.unsqueeze(1) != barred).all(dim=1)
    return right.float().sum()


# The authors' settings for stochastic attention.
RETURN_SCALE, BASELINE_DECAY, ENTROPY_WEIGHT = 0.1, 0.9, 0.002


def read_softly_too(network, features, captions, lengths):
    """A `contract.Forward` of a network in training. Where it has drawn places, `drawn.softly` is
    of the same weights and the same values dropped out, but of the expected context at every step,
    without gradients.

    Args:
        network, features, captions, lengths: as in `CrossEntropy.read`.
    """
    device = network.device
    with network.decoder.prepared(features):
        before = random_state(device)
        read = network.read(features, captions, lengths)
        if read.drawn is None:
            return read
        after = random_state(device)
        set_random_state(device, before)
        with torch.no_grad(), network.decoder.looking_softly():
            softly = network.read(features, captions, lengths)
        set_random_state(device, after)
    missed = missed_each(softly.scores, softly.targets)
    return read._replace(drawn=read.drawn._replace(softly=missed))


def missed_each(scores, targets):
    """-log p of each word, (n,) float32, without gradients, of packed scores and targets."""
    log_p = scores.data.detach().log_softmax(dim=1, dtype=torch.float32)
    return -log_p.gather(1, targets.data.unsqueeze(1)).squeeze(1)


def reinforce(
    scores,
    targets,
    drawn,
    words_each,
    scale=RETURN_SCALE,
    entropy=ENTROPY_WEIGHT,
    barred=None,
):
    """What stochastic attention minimises beside -log p of the words (§4.1, eq. 11 and 12): its
    gradient is the estimate of how the places' distribution changes the expected loss.

        Σ_t R_t log α_{t,s_t} - w H(α_t),    R_t = scale / words_each · Σ_{u ≥ t} (m_u - b)

    A place is judged by the words that follow it, as those before do not depend on it. m_u is by
    how much worse the word went than when looking softly, -log p(y_u) + log p̃(y_u): how hard a word
    is has nothing to do with the places, and p̃ does not depend on what is drawn, so that the mean
    of the estimate stays. Without `drawn.softly` it is -log p(y_u).

    b, the moving average of m, is moved by a tenth of the way to a batch's mean after each call,
    and begins with that of the first batch: as its own words are in it, that one estimate is too
    small by about the share of a caption in them. A batch whose mean is not finite, so that its
    step is skipped, leaves b alone.

    The authors subtract their average once, whatever number of words follow. Taken once a word, it
    leaves nothing of the returns' fall along a caption.

    Args:
        scores, targets, drawn: from `Decoder.forward`, or `read_softly_too`.
        words_each: a caption's words, on average.
        scale: 1 for the gradient of the expected loss itself.
        entropy: w.
        barred: as in `caption_loss`: a place is not judged by these words.

    Returns:
        a scalar float32, the sum over captions.
    """
    missed = missed_each(scores, targets)
    if drawn.softly is not None:
        missed = missed - drawn.softly
    counted = _counted(targets.data, barred).to(missed)
    sums = distributed.add_up(torch.stack([(missed * counted).sum(), counted.sum()]))
    mean, (baseline, begun) = sums[0] / sums[1], drawn.baseline.clone()
    baseline = torch.where(begun > 0, baseline, mean)
    excess = (missed - baseline) * counted
    following, total = [], missed.new_zeros(int(targets.batch_sizes[0]))
    for own in reversed(excess.split(targets.batch_sizes.tolist())):  # from the last word on
        total[: len(own)] += own
        following.append(total[: len(own)].clone())
    returns = torch.cat(following[::-1]) * scale / words_each
    moved = BASELINE_DECAY * baseline + (1 - BASELINE_DECAY) * mean
    moved = torch.stack([moved, torch.ones_like(moved)])
    drawn.baseline.copy_(moved.where(mean.isfinite(), drawn.baseline))
    return (returns * drawn.log_p - entropy * drawn.entropy).sum()
