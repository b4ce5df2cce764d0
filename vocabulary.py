"""What a decoder knows of its words before it is trained: their vectors, how frequent they are, and
which of them never come.

It is for decoders that have the two layers of `contract.Decoder`'s docstring, `embedding` and `fc`.
"""

from functools import reduce

import torch
from torch import nn

from groundwork.errors import UserError
from word_rules import unsayable

# The bias of a word that is barred. Its probability is 0 in float32, and so is its gradient:
# training leaves the bias as it is. All precisions have the number exactly.
BARRED = -(2.0**14)
LAYERS = {  # which layer, and of which kind, the options of this module are for
    "embeddings": ("embedding", nn.Embedding),
    "freeze_embeddings": ("embedding", nn.Embedding),
    "bias_init": ("fc", nn.Linear),
    "bar_special": ("fc", nn.Linear),
}


@torch.no_grad()
def set_vectors(decoder, vectors):
    """Makes (V, E) float32 the words' embeddings. Raises UserError where they do not fit."""
    weight = _layer(decoder, "embeddings").weight
    if weight.shape != vectors.shape:
        raise UserError(
            f"--embeddings: its words have {vectors.shape[1]} values, and those of the decoder "
            f"{decoder.name!r} {weight.shape[1]}"
        )
    weight.copy_(vectors)


def freeze_embeddings(decoder):
    """Has training leave the words' embeddings as they are. Raises UserError where there are
    none."""
    _layer(decoder, "freeze_embeddings").requires_grad_(False)


@torch.no_grad()
def set_frequencies(decoder, counts):
    """Makes log p of each word its bias, p its share of the training captions' words.

    An untrained decoder then begins near the loss of one that knows no more than these shares. It
    is from the code of Karpathy & Fei-Fei (2015), NeuralTalk.

    Args:
        counts: (V,) how often it comes as a target. A word that never comes counts as half of one.

    Raises:
        UserError: the decoder has no such bias.
    """
    bias = _layer(decoder, "bias_init").bias
    bias.copy_((counts.double().clamp(min=0.5) / counts.sum()).log())


@torch.no_grad()
def bar(decoder, word_map):
    """Takes all probability from the words that no caption is made of, as the last layer of
    TensorFlow's tutorial «Image captioning with visual attention» does. Raises UserError where the
    decoder has no such bias."""
    bias = _layer(decoder, "bar_special").bias
    bias[[word_map[word] for word in unsayable(word_map)]] = BARRED


def barred(decoder):
    """Indices, int64 on its device, of the words that `bar` has taken all probability from, of an
    ensemble those of which all its members give none; None where there are none."""
    found = [_barred(own) for own in getattr(decoder, "members", [decoder])]
    if any(words is None for words in found):
        return None
    words = reduce(lambda some, more: some[torch.isin(some, more)], found)
    return words if len(words) else None


def _barred(decoder):
    """The same of one decoder; empty or None where there are none."""
    bias = getattr(getattr(decoder, "fc", None), "bias", None)
    return None if bias is None else (bias == BARRED).nonzero().squeeze(1)


def check_layers(decoder, options):
    """Raises UserError where the decoder has no layer that one of those of `LAYERS` is for."""
    for option in options:
        _layer(decoder, option)


def _layer(decoder, option):
    """The decoder's layer that an option of `LAYERS` is for, with a row for each word."""
    name, kind = LAYERS[option]
    layer = getattr(decoder, name, None)
    if (
        not isinstance(layer, kind)
        or len(layer.weight) != decoder.config.vocab_size
        or (kind is nn.Linear and layer.bias is None)
    ):
        raise UserError(
            f"--{option}: the decoder {decoder.name!r} has no {kind.__name__} `{name}` with a row "
            f"{'and a bias ' if kind is nn.Linear else ''}for each word"
        )
    return layer
