"""A transformer decoder that looks at the feature map.

The layers are those of Vaswani et al., *Attention Is All You Need* (2017), §3.1 to §3.5, normalised
after each sum, in the sizes of TensorFlow's tutorial «Image captioning with visual attention»
(https://www.tensorflow.org/text/tutorials/image_captioning): two layers of 256 units with two
heads, learned positions, a feed-forward layer of twice the units, dropout 0.5. Unlike the
tutorial's, the heads share the units out, as in the paper, and the feature map is first brought to
them, at the grid of the alphas.

What does not depend on the words, keys and values of the image's places, is made once an image; the
keys and values of the words are kept from step to step.
"""

import math
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from annotations import AnnotationVectors, MapConfig, compute_dtype, project
from contract import Decoder, Forward, Rows, of_all, pack, register

MAX_LAYERS = 100  # a checkpoint's configuration is not to be trusted


class Memory(NamedTuple):
    """Keys and values of the images' places, of each layer."""

    places: tuple[Tensor, ...]  # (I, 2, heads, L, E / heads)

    def select(self, images: Tensor) -> "Memory":
        """Those of the given images: indices or a mask."""
        return Memory(tuple(places[images] for places in self.places))


class State(NamedTuple):
    """Keys and values of the t words so far, of each layer."""

    words: tuple[Tensor, ...]  # (n, 2, heads, t, E / heads)

    def select(self, rows: Tensor) -> "State":
        """Those of the given rows: indices or a mask."""
        return State(tuple(words[rows] for words in self.words))


@dataclass(frozen=True)
class TransformerConfig(MapConfig):
    """Sizes and choices of a `TransformerDecoder`, beside those of `MapConfig`.

    Args:
        embed_dim: E, units of the words, the positions and the layers.
        dropout: probability, on the weights of both attentions and on what the feed-forward layers
            add.
        layers, heads: how many; the heads of a layer share E out.
        positions: that are learned; the words after them count as at the last.
    """

    embed_dim: int = 256
    dropout: float = 0.5
    _: KW_ONLY
    layers: int = 2
    heads: int = 2
    positions: int = 64

    def __post_init__(self):
        super().__post_init__()
        if self.embed_dim % self.heads:
            raise ValueError(
                f"its {self.heads} heads cannot share {self.embed_dim} units out: give heads that "
                "divide its embed_dim"
            )
        if self.layers > MAX_LAYERS:
            raise ValueError(f"its layers are {self.layers}: {MAX_LAYERS} at most")


class Layer(nn.Module):
    """Self-attention over the words so far, attention over the places, feed-forward."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.self_in = nn.Linear(dim, 3 * dim)  # queries, keys and values
        self.self_out = nn.Linear(dim, dim)
        self.self_norm = nn.LayerNorm(dim)
        self.cross_query = nn.Linear(dim, dim)
        self.cross_places = nn.Linear(dim, 2 * dim)  # keys and values
        self.cross_out = nn.Linear(dim, dim)
        self.cross_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim), nn.Dropout(dropout)
        )
        self.feed_forward_norm = nn.LayerNorm(dim)

    def places(self, annotations: Tensor) -> Tensor:
        """Keys and values (I, 2, heads, L, E / heads) of annotations (I, L, E)."""
        return self._heads(self.cross_places(annotations), 2)

    def forward(self, x: Tensor, words: Tensor, places: Tensor, rows: Rows | None = None):
        """What the layer makes of T further words of n captions.

        Args:
            x: (n, T, E).
            words: (n, 2, heads, t, E / heads) keys and values of the t words before them; where
                T > 1, t is 0.
            places: from `places`, of I images.
            rows: which captions they are; otherwise n = I·K, image by image.

        Returns:
            (n, T, E); the words' keys and values with those of these T; alphas (n, T, L), float32,
            the mean over the heads.
        """
        query, *pair = self._heads(self.self_in(x), 3).unbind(1)
        words = torch.cat([words, torch.stack(pair, dim=1)], dim=3)
        seen = F.scaled_dot_product_attention(
            query,
            *words.unbind(1),
            dropout_p=self.dropout.p if self.training else 0.0,
            is_causal=x.shape[1] > 1,
        )
        x = self.self_norm(x + self.self_out(seen.transpose(1, 2).flatten(2)))
        seen, alphas = self._look(x, *places.unbind(1), rows)
        x = self.cross_norm(x + self.cross_out(seen))
        return self.feed_forward_norm(x + self.feed_forward(x)), words, alphas

    def _look(self, x, keys, values, rows):
        """softmax(q kᵀ / √d) v, written out as its weights are asked for; the captions of an image
        share its keys."""
        query = self.cross_query(x)
        if rows is not None:
            query = of_all(query, rows.slots, len(keys) * rows.per_image)
        captions = query.shape
        query = self._heads(query.view(keys.shape[0], -1, x.shape[2]), 1).squeeze(1)
        energies = query @ keys.transpose(2, 3) / math.sqrt(query.shape[3])
        alphas = energies.softmax(dim=3, dtype=torch.float32)  # (I, heads, K·T, L)
        seen = self.dropout(alphas).to(values.dtype) @ values
        seen = seen.transpose(1, 2).reshape(captions)
        alphas = alphas.mean(dim=1).view(*captions[:2], -1)
        return (seen, alphas) if rows is None else (seen[rows.slots], alphas[rows.slots])

    def _heads(self, values, parts):
        """(n, T, parts·E) as (n, parts, heads, T, E / heads)."""
        return values.unflatten(2, (parts, self.heads, -1)).permute(0, 2, 3, 1, 4)


@register("transformer")
class TransformerDecoder(Decoder):
    """Layers of attention over words and places (Vaswani et al., 2017, §3), in the sizes of
    TensorFlow's captioning tutorial; its alphas are the mean over layers and heads.

    Args:
        config: a `TransformerConfig`.
    """

    Config = TransformerConfig
    scst_lr = 1e-5

    def __init__(self, config):
        super().__init__(config)
        dim = config.embed_dim
        self.annotations = AnnotationVectors(config)
        self.places = nn.Linear(config.annotation_dim, dim)
        self.embedding = nn.Embedding(config.vocab_size, dim)
        self.positions = nn.Embedding(config.positions, dim)
        self.layers = nn.ModuleList(
            Layer(dim, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.fc = nn.Linear(dim, config.vocab_size)
        for module in self.modules():  # as in the tutorial
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.uniform_(module.weight, -0.05, 0.05)

    def prepare(self, encoder_out: Tensor) -> Memory:
        """Each layer's keys and values of the L places, from (I, g, g, D) of any grid g."""
        maps = encoder_out.to(compute_dtype(self.fc.weight))
        annotations = project(self.places, self.annotations.annotate(maps))
        return Memory(tuple(layer.places(annotations) for layer in self.layers))

    def init_state(self, memory: Memory) -> State:
        """That of no word, a row per image."""
        return State(tuple(places[:, :, :, :0] for places in memory.places))

    def step(self, words: Tensor, state: State, memory: Memory, rows: Rows | None = None):
        """One decoding step, as in `Decoder.step`."""
        x, alphas, state = self._advance(words.unsqueeze(1), state, memory, rows)
        return self.fc(x.squeeze(1)), alphas.squeeze(1), state

    def forward(self, encoder_out: Tensor, captions: Tensor, lengths: Tensor) -> Forward:
        """Teacher forcing, as in `Decoder.forward`: all words at once."""
        steps = lengths.cpu() - 1
        longest, per_image = int(steps.max()), len(captions) // len(encoder_out)
        memory = self.prepare(encoder_out)
        images = torch.arange(len(captions), device=captions.device) // per_image
        state = self.init_state(memory).select(images)
        x, alphas, _ = self._advance(captions[:, :longest], state, memory)
        inputs, targets = pack(x, steps), pack(captions[:, 1:], steps)
        if int(steps.min()) < longest:
            real = torch.arange(longest) < steps.unsqueeze(1)
            alphas = alphas * real.unsqueeze(2).to(alphas)
        return Forward(inputs._replace(data=self.fc(inputs.data)), targets, alphas)

    def _advance(self, words, state, memory, rows=None):
        """What the layers make of T further words (n, T): (n, T, E), alphas (n, T, L), state."""
        before = state.words[0].shape[3]
        places = torch.arange(before, before + words.shape[1], device=words.device)
        x = self.embedding(words) + self.positions(places.clamp(max=self.config.positions - 1))
        kept, alphas = [], []
        for layer, own, image in zip(self.layers, state.words, memory.places, strict=True):
            x, own, alpha = layer(x, own, image, rows)
            kept.append(own)
            alphas.append(alpha)
        return x, torch.stack(alphas).mean(dim=0), State(tuple(kept))
