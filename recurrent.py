"""Recurrent decoders with any of `attentions`: what all have in common, and two beside the paper's
(`models`): the captioner that TensorFlow's tutorial teaches, and the top-down half of "Bottom-Up
and Top-Down Attention" (Anderson et al., 2018), on a grid of features in place of its regions."""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from annotations import Annotations, compute_dtype, first, of_rows
from attentions import ATTENTIONS, AttendingConfig, word_layer
from contract import Decoder, Forward, Rows, all_rows, pack, packed_rows, register, seen


class Memory(NamedTuple):
    """What the steps share of I images."""

    annotations: Annotations
    mean: Tensor | None = None  # (I, context_dim) float32, of a decoder that takes it in

    def select(self, images: Tensor) -> "Memory":
        """That of the given images: indices or a mask."""
        mean = None if self.mean is None else self.mean[images]
        return Memory(self.annotations.select(images), mean)


class Hidden(NamedTuple):
    """The state of n rows, float32: of one recurrent layer or several."""

    layers: tuple[Tensor, ...]  # (n, decoder_dim) each

    def select(self, rows: Tensor) -> "Hidden":
        """Those of the given rows: indices or a mask."""
        return Hidden(tuple(of_rows(layer, rows) for layer in self.layers))


class RecurrentDecoder(Decoder):
    """A decoder that looks at the image once a word, as a formula of one step: `advance`.

    Teacher forcing and decoding both go through it; the vocabulary's scores are made of all words
    at once. A class derived from it has `Config`, an `AttendingConfig`, says how many `layers` its
    state has, and makes `fc` in its `__init__`, the nn.Linear of the V words' scores.
    """

    Config = AttendingConfig
    layers: ClassVar[int]  # tensors (n, decoder_dim) of its state: one of a GRU, two of an LSTM
    fc: nn.Linear

    def __init__(self, config):
        super().__init__(config)
        self.attention = ATTENTIONS[config.attention](config)
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.embed_dropout = nn.Dropout(config.embed_dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.word_att = word_layer(config, self.attention)

    def prepare(self, encoder_out: Tensor) -> Memory:
        """What the steps share, from (I, g, g, D) of any grid g."""
        dtype = compute_dtype(self.embedding.weight)
        return Memory(self.attention.prepare(encoder_out.to(dtype)))

    def advance(self, words, state, memory, rows):
        """One step of n rows.

        Args:
            words: (n, embed_dim) embeddings of the previous words.
            state: `Hidden` of the rows.
            memory: from `prepare`.
            rows: which captions they are, a `contract.Rows`.

        Returns:
            what the scores are made of, (n, decoder_dim); the `attentions.Look`; the next state.
        """
        raise NotImplementedError

    def scores(self, hidden: Tensor) -> Tensor:
        """(n, V) of what `advance` gives, (n, decoder_dim)."""
        return self.fc(self.dropout(hidden))

    def look(self, words, h, cell, memory, rows):
        """What the attention sees for the state h and the memory cell, (n, decoder_dim) each."""
        query = None
        if self.attention.decoder_att is not None:
            query = self.attention.decoder_att(h)
            if self.word_att is not None:
                query = query + self.word_att(words)
            query = query.to(memory.annotations.dtype)
        return self.attention(memory.annotations, query, rows, cell)

    def init_state(self, memory: Memory) -> Hidden:
        """Zeros, a row per image."""
        images = memory.annotations.images
        zeros = self.embedding.weight.new_zeros(images, self.config.decoder_dim)
        return Hidden((zeros,) * self.layers)

    def step(self, words: Tensor, state: Hidden, memory: Memory, rows: Rows | None = None):
        """One decoding step, as in `Decoder.step`."""
        rows = rows or all_rows(words, memory.annotations.images)
        words = self.embed_dropout(self.embedding(words))
        hidden, look, state = self.advance(words, state, memory, rows)
        return self.scores(hidden), look.alphas, state

    def forward(self, encoder_out: Tensor, captions: Tensor, lengths: Tensor) -> Forward:
        """Teacher forcing, as in `Decoder.forward`."""
        steps = lengths.cpu() - 1
        inputs, targets = pack(captions[:, :-1], steps), pack(captions[:, 1:], steps)
        rows = packed_rows(inputs, len(encoder_out))
        memory = self.prepare(encoder_out)
        state = Hidden(tuple(of_rows(x, rows.images) for x in self.init_state(memory).layers))
        words = self.embed_dropout(self.embedding(inputs.data))
        hiddens, looks = [], []
        batch_sizes = inputs.batch_sizes.tolist()
        for n, own in zip(batch_sizes, words.split(batch_sizes), strict=True):
            state = Hidden(tuple(first(layer, n) for layer in state.layers))
            hidden, look, state = self.advance(own, state, memory, rows.first(n))
            hiddens.append(hidden)
            looks.append(look)
        scores = inputs._replace(data=self.scores(torch.cat(hiddens)))
        return Forward(scores, targets, *seen(looks, inputs))


@dataclass(frozen=True)
class GRUConfig(AttendingConfig):
    """Sizes and choices of a `GRUDecoder`: those of `AttendingConfig`, the defaults the tutorial's
    but for the attention's hidden layer, which has 512 values there."""

    attention_dim: int = 256
    embed_dim: int = 256
    dropout: float = 0.0
    _: KW_ONLY
    attention: str = "bahdanau"


@register("gru")
class GRUDecoder(RecurrentDecoder):
    """The captioner of TensorFlow's tutorial «Image captioning with visual attention» (2018):
    a GRU of the context beside the word's embedding, and two linear layers after it.

    Args:
        config: a `GRUConfig`.
    """

    Config, layers = GRUConfig, 1

    def __init__(self, config):
        super().__init__(config)
        hidden = config.decoder_dim
        self.gru = nn.GRUCell(self.attention.context_dim + config.embed_dim, hidden)
        self.fc1 = nn.Linear(hidden, hidden)
        self.fc = nn.Linear(hidden, config.vocab_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def advance(self, words, state, memory, rows):
        (h,) = state.layers
        look = self.look(words, h, h, memory, rows)
        h = self.gru(torch.cat([look.context.to(words), words], dim=1), h).float()
        return h, look, Hidden((h,))

    def scores(self, hidden):
        return self.fc(self.dropout(self.fc1(hidden)))


@register("topdown")
class TopDownDecoder(RecurrentDecoder):
    """Two LSTMs (Anderson et al., 2018, §3.2), on a grid of features. The first steers the
    attention: it reads the other's state, the mean vector and the previous word; the second writes
    the words from what was seen.

    Their energies (eq. 3) are w · tanh(W_v v_i + W_h h¹_t) of regions that a detector finds; here
    they are those of the `attention`, by default "soft", which has relu in place of tanh, and v_i
    are the places of a grid.

    Args:
        config: an `AttendingConfig`.
    """

    layers = 4  # h and c of the one, h and c of the other

    def __init__(self, config):
        super().__init__(config)
        hidden, dim = config.decoder_dim, self.attention.context_dim
        self.attention_lstm = nn.LSTMCell(hidden + dim + config.embed_dim, hidden)
        self.language_lstm = nn.LSTMCell(dim + hidden, hidden)
        self.fc = nn.Linear(hidden, config.vocab_size)
        # As in the paper's decoder. PyTorch's own are half as large; the state of two LSTMs behind
        # each other is small at first, so that scores would hardly differ for long.
        nn.init.uniform_(self.fc.weight, -0.1, 0.1)
        nn.init.zeros_(self.fc.bias)

    def prepare(self, encoder_out):
        memory = super().prepare(encoder_out)
        return memory._replace(mean=memory.annotations.mean().to(self.embedding.weight))

    def advance(self, words, state, memory, rows):
        h1, c1, h2, c2 = state.layers
        mean = of_rows(memory.mean, rows.images)
        h1, c1 = self.attention_lstm(torch.cat([h2, mean, words], dim=1), (h1, c1))  # eq. 2
        # eq. 4 and 5; in place of eq. 3 the attention's own energies
        look = self.look(words, h1, c1, memory, rows)
        h2, c2 = self.language_lstm(torch.cat([look.context.to(h1), h1], dim=1), (h2, c2))  # eq. 6
        state = Hidden(tuple(layer.float() for layer in (h1, c1, h2, c2)))
        return state.layers[2], look, state
