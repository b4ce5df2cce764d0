"""Several models that write one caption: the probability of a word is the mean of theirs.

`Ensemble` is a decoder like any other, so that every way of searching runs on it; `Encoders` is the
encoder that belongs to it, and `Features` what passes between the two. The members may be any
decoders, with any attentions and encoders, of one vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contract import Decoder, Forward, Rows


@dataclass(frozen=True)
class Features:
    """The features of I images for each member of an ensemble; members whose encoders are alike
    have the same tensor. It can do what the searches ask of a tensor of features."""

    parts: tuple[Tensor, ...]  # (I, g, g, D) each, of grids of their own

    def __len__(self):
        return len(self.parts[0])

    @property
    def device(self) -> torch.device:
        return self.parts[0].device


class Parts(NamedTuple):
    """The members' memories of the same images, or their states of the same rows."""

    parts: tuple[Any, ...]

    def select(self, rows: Tensor) -> "Parts":
        """Those of the given images or rows: indices or a mask."""
        return Parts(tuple(part.select(rows) for part in self.parts))


class Encoders(nn.Module):
    """The members' encoders, of which those that are alike run once.

    Args:
        encoders: an `encoders.Encoder` for each member.
        sizes: side of the images that each is given, pixels.
    """

    def __init__(self, encoders, sizes):
        super().__init__()
        distinct, self.sources = [], []  # and which of the distinct is each member's
        for own in zip(encoders, sizes, strict=True):
            place = next((i for i, other in enumerate(distinct) if _alike(own, other)), None)
            self.sources.append(len(distinct) if place is None else place)
            if place is None:
                distinct.append(own)
        encoders, self.sizes = zip(*distinct, strict=True)
        self.encoders = nn.ModuleList(encoders)

    def features(self, images: Tensor) -> Features:
        """`Encoder.features` of each, as it sees the images at its own size.

        Args:
            images: (N, 3, S, S) RGB, uint8 0 to 255 or float 0 to 1, of any size.
        """
        pairs = zip(self.encoders, self.sizes, strict=True)
        found = [encoder.features(_resized(images, size)) for encoder, size in pairs]
        return Features(tuple(found[i] for i in self.sources))

    def freeze(self, dtype=torch.float32):
        """As `Encoder.freeze`."""
        for encoder in self.encoders:
            encoder.freeze(dtype)


def _alike(one, other):
    """Whether two pairs of encoder and image size give the same features."""
    (encoder, size), (known, own_size) = one, other
    if (encoder.name, encoder.stages, size) != (known.name, known.stages, own_size):
        return False
    weights = known.state_dict()
    return all(tensor.equal(weights[name]) for name, tensor in encoder.state_dict().items())


def _resized(images, size):
    """Squares at another size, floats from 0 to 1, as `groundwork.images.squeeze` makes them but
    for the rounding; those of that size as they are."""
    if images.shape[3] == size:
        return images
    images = images / 255 if images.dtype == torch.uint8 else images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


class Ensemble(Decoder):
    """Decoders that write together: p of a word is the mean of their p's. It has no configuration
    of its own.

    Args:
        members: `contract.Decoder`s of one vocabulary.
    """

    blind = "these decoders have no attention, or grids of several sizes, which have no mean"

    def __init__(self, members):
        super().__init__(None)
        self.members = nn.ModuleList(members)

    def prepare(self, encoder_out: Features) -> Parts:
        pairs = zip(self.members, encoder_out.parts, strict=True)
        return Parts(tuple(member.prepare(own) for member, own in pairs))

    def init_state(self, memory: Parts) -> Parts:
        pairs = zip(self.members, memory.parts, strict=True)
        return Parts(tuple(member.init_state(own) for member, own in pairs))

    def step(self, words: Tensor, state: Parts, memory: Parts, rows: Rows | None = None):
        """As `Decoder.step`; the scores are log p, float32, and the alphas the mean of those of the
        members that look, None where their grids differ."""
        triples = zip(self.members, state.parts, memory.parts, strict=True)
        scores, alphas, states = zip(
            *(member.step(words, own, seen, rows) for member, own, seen in triples), strict=True
        )
        return log_mean(scores), mean_alphas(alphas), Parts(states)

    def forward(self, encoder_out: Features, captions: Tensor, lengths: Tensor) -> Forward:
        """Teacher forcing, as in `Decoder.forward`, with scores and alphas as those of `step`."""
        pairs = zip(self.members, encoder_out.parts, strict=True)
        made = [member(own, captions, lengths) for member, own in pairs]
        scores = log_mean([own.scores.data for own in made])
        alphas = mean_alphas([own.alphas for own in made])
        return Forward(made[0].scores._replace(data=scores), made[0].targets, alphas)


def log_mean(scores) -> Tensor:
    """log of the mean probability of each word, (n, V) float32, of several decoders' scores
    (n, V)."""
    log_probs = [own.log_softmax(dim=1, dtype=torch.float32) for own in scores]
    # without leaving the logarithm, in which a barred word's probability is no zero
    return torch.stack(log_probs).logsumexp(dim=0) - math.log(len(log_probs))


def mean_alphas(alphas) -> Tensor | None:
    """Mean of several decoders' alphas (…, L), those that are None left out; None where L differs
    or none is left."""
    seen = [own for own in alphas if own is not None]
    if len({own.shape[-1] for own in seen}) != 1:
        return None
    return torch.stack(seen).mean(dim=0)
