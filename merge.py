"""The merge decoder: the image joins the sentence after the LSTM, which never sees it.

Tanti, Gatt and Camilleri, *Where to put the Image in an Image Caption Generator* (2018), gave the
architecture its name and compare it with the others; the sizes are those of Brownlee's tutorial
«How to Develop a Deep Learning Photo Caption Generator from Scratch» (2017): the image's vector, of
VGG16's fully connected layer, and the LSTM's state have 256 values each, which are added up; a
layer of 256 comes before the vocabulary's.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from annotations import AnnotationVectors, MapConfig, compute_dtype, of_rows
from contract import Decoder, Forward, Rows, all_rows, pack, register
from models import State


class Memory(NamedTuple):
    """What is added to the sentence of each image."""

    image: Tensor  # (I, H)

    def select(self, images: Tensor) -> "Memory":
        """Those of the given images: indices or a mask."""
        return Memory(self.image[images])


@dataclass(frozen=True)
class MergeConfig(MapConfig):
    """Sizes of a `MergeDecoder`, beside those of `MapConfig`.

    Args:
        embed_dim: values of a word.
        decoder_dim: H, of the LSTM's state, the image and the layer after their sum.
        dropout: probability, on the image's vector and on the words.
    """

    embed_dim: int = 256
    decoder_dim: int = 256
    dropout: float = 0.5


@register("merge")
class MergeDecoder(Decoder):
    """The merge architecture (Tanti et al., 2018, §3), without attention: p(y_t) from relu(W (h_t +
    v)), h_t of an LSTM over the words, v = relu(W_v a) of the image's vector a, the mean over the
    feature map.

    Args:
        config: a `MergeConfig`.
    """

    Config, attends = MergeConfig, False

    def __init__(self, config):
        super().__init__(config)
        hidden = config.decoder_dim
        self.dropout = nn.Dropout(config.dropout)
        self.annotations = AnnotationVectors(config)
        self.image = nn.Linear(config.annotation_dim, hidden)  # W_v
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.lstm = nn.LSTM(config.embed_dim, hidden, batch_first=True)
        self.merged = nn.Linear(hidden, hidden)  # W
        self.fc = nn.Linear(hidden, config.vocab_size)

    def prepare(self, encoder_out: Tensor) -> Memory:
        """v of each image, from (I, g, g, D) of any grid g; of (I, 1, 1, D) a is the vector."""
        maps = self.annotations.annotate(encoder_out.to(compute_dtype(self.fc.weight))).vectors
        mean = torch.cat([vectors.mean(dim=1) for vectors in maps], dim=1)
        return Memory(torch.relu(self.image(self.dropout(mean))))

    def init_state(self, memory: Memory) -> State:
        """Zeros, a row per image."""
        zeros = self.fc.weight.new_zeros(memory.image.shape[0], self.config.decoder_dim)
        return State(zeros, zeros)

    def step(self, words: Tensor, state: State, memory: Memory, rows: Rows | None = None):
        """One decoding step, as in `Decoder.step`; there are no alphas."""
        embedded = self.dropout(self.embedding(words)).unsqueeze(1)
        hidden, (h, c) = self._sentence(embedded, (state.h.unsqueeze(0), state.c.unsqueeze(0)))
        rows = rows or all_rows(words, memory.image.shape[0])
        scores = self._scores(hidden.squeeze(1), rows.images, memory)
        return scores, None, State(h.squeeze(0), c.squeeze(0))

    def forward(self, encoder_out: Tensor, captions: Tensor, lengths: Tensor) -> Forward:
        """Teacher forcing, as in `Decoder.forward`; there are no alphas."""
        steps, images = lengths.cpu() - 1, all_rows(captions, len(encoder_out)).images
        inputs, targets = pack(captions[:, :-1], steps), pack(captions[:, 1:], steps)
        images = pack(images.unsqueeze(1).expand_as(captions), steps)
        memory = self.prepare(encoder_out)
        embedded = inputs._replace(data=self.dropout(self.embedding(inputs.data)))
        hidden, _ = self._sentence(embedded)
        scores = self._scores(hidden.data, images.data, memory)
        return Forward(inputs._replace(data=scores), targets, None)

    def _sentence(self, embedded, state=None):
        """What the LSTM makes of further words, in float32: a CPU's has no bfloat16 for all sizes,
        and a cell sums up many steps."""
        with torch.autocast(self.fc.weight.device.type, enabled=False), ExitStack() as stack:
            if torch.is_grad_enabled() and not self.training:  # when cuDNN's has no gradient
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            return self.lstm(embedded, state)

    def _scores(self, hidden, images, memory):
        """Vocabulary scores of hidden states, each of a caption of one of the `images`."""
        return self.fc(torch.relu(self.merged(hidden + of_rows(memory.image, images))))
