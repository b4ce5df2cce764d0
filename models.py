"""The model of *Show, Attend and Tell* (Xu et al., 2015) after its encoder, as plain formulas.

Symbols are the paper's: an image has L annotation vectors a_i of D values (§3.1.1); at step t the
decoder weighs them with alphas α_ti (§4.2), gates their mean ẑ_t with β_t (§4.2.1) and feeds it,
with the embedding E y_{t-1} of the previous word, to an LSTM whose state h_t gives the next word
(§3.1.2).

What does not depend on the step is computed before the loop or after it: the projections W_a a_i
once an image, the words' share of the LSTM's gates and the words' scores in one product each. Where
a formula would be slow, its fast form stands in `kernels`, beside the plain one.
"""

from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from annotations import Annotations, compute_dtype, first, of_rows
from attentions import ATTENTIONS, AttendingConfig, word_layer
from contract import (
    Decoder,
    Forward,
    Rows,
    all_rows,
    build_decoder,
    pack,
    packed_rows,
    register,
    seen,
)

# ------------------------------------------------------------------------------------ decoder


class State(NamedTuple):
    """The LSTM's state, a row per caption, float32."""

    h: Tensor  # (n, decoder_dim)
    c: Tensor  # (n, decoder_dim)

    def select(self, rows: Tensor) -> "State":
        """Those of the given rows: indices or a mask."""
        return State(of_rows(self.h, rows), of_rows(self.c, rows))


class Memory(NamedTuple):
    """What all steps of a batch share: its images' annotations and the weights, laid out."""

    annotations: Annotations
    recurrent_weight: Tensor  # all that multiplies h_{t-1}: LSTM gates, W_h, f_β
    recurrent_bias: Tensor
    word_weight: Tensor  # the LSTM gates' columns for the embedding; of such a query W_y, too
    context_weight: Tensor  # and those for the gated context
    vocabulary_weight: Tensor  # of the last layer

    def select(self, images: Tensor) -> "Memory":
        """The memory of the given images alone: indices or a mask."""
        return self._replace(annotations=self.annotations.select(images))


class Products(NamedTuple):
    """The two products of a step, x ↦ W x."""

    recurrent: partial | kernels.Product  # of h_{t-1}
    context: partial | kernels.Product  # of the gated context


@dataclass(frozen=True)
class LSTMConfig(AttendingConfig):
    """Sizes and choices of a `DecoderWithAttention`, beside those of `AttendingConfig`; the paper's
    attentions are "soft" and "hard".

    Args:
        gate: "scalar" for the paper's one β_t, "channel" for one for each value of ẑ_t.
        deep_output: compute the words from h_t, ẑ_t and the previous word (eq. 7), not h_t alone.
    """

    _: KW_ONLY
    gate: str = "scalar"
    deep_output: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.check("gate", ("scalar", "channel"))


@register("lstm")
class DecoderWithAttention(Decoder):
    """The paper's LSTM (Xu et al., 2015, §3.1.2), which looks before each word; its parameters are
    named as in the published code.

    Args:
        config: an `LSTMConfig`.
    """

    Config = LSTMConfig

    def __init__(self, config):
        super().__init__(config)
        self.attention = ATTENTIONS[config.attention](config)
        dim, hidden, embed = self.attention.context_dim, config.decoder_dim, config.embed_dim
        self.query_dim = self.attention.query_dim(config)
        self.embedding = nn.Embedding(config.vocab_size, embed)  # E
        self.embed_dropout = nn.Dropout(config.embed_dropout)
        self.decode_step = nn.LSTMCell(embed + dim, hidden)
        self.word_att = word_layer(config, self.attention)  # W_y
        self.init_h = nn.Linear(dim, hidden)
        self.init_c = nn.Linear(dim, hidden)
        self.f_beta = nn.Linear(hidden, {"scalar": 1, "channel": dim}[config.gate])
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(embed if config.deep_output else hidden, config.vocab_size)  # L_o
        if config.deep_output:
            self.output_h = nn.Linear(hidden, embed)  # L_h
            self.output_z = nn.Linear(dim, embed, bias=False)  # L_z
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.fc.weight, -0.1, 0.1)
        nn.init.zeros_(self.fc.bias)

    @classmethod
    def from_state_dict(cls, state, **choices):
        """A decoder of the sizes, gate and output layer that the tensors' shapes tell.

        Args:
            choices: what they do not tell: `encoded_image_size`, `dropout`, `embed_dropout`.

        Raises:
            ValueError: the tensors are not those of this decoder.
        """
        try:
            attention_dim, encoder_dim = state["attention.encoder_att.weight"].shape
            vocab_size, embed_dim = state["embedding.weight"].shape
            gates, decoder_dim = state["f_beta.weight"].shape
        except KeyError as error:
            raise ValueError(f"not a decoder of this model: it has no tensor {error}") from error
        except (AttributeError, ValueError) as error:
            raise ValueError(f"not a decoder of this model: {error}") from error
        config = LSTMConfig(
            vocab_size,
            encoder_dim,
            attention_dim,
            embed_dim,
            decoder_dim,
            gate="scalar" if gates == 1 else "channel",
            query="word" if "word_att.weight" in state else "state",
            deep_output="output_h.weight" in state,
            **choices,
        )
        return build_decoder("lstm", config, state)

    def prepare(self, encoder_out: Tensor) -> Memory:
        """Everything that the steps share, from (I, g, g, D) of any grid g."""
        dtype, cell = compute_dtype(self.fc.weight), self.decode_step
        annotations = self.attention.prepare(encoder_out.to(dtype))
        stacked = [self.attention.decoder_att, self.f_beta] if self.query_dim else [self.f_beta]
        weight = torch.cat([cell.weight_hh, *(layer.weight for layer in stacked)])
        bias = torch.cat([cell.bias_hh + cell.bias_ih, *(layer.bias for layer in stacked)])
        word_weight, context_weight = cell.weight_ih.to(dtype).split(
            [self.config.embed_dim, self.attention.context_dim], dim=1
        )
        if self.word_att is not None:  # W_h h_{t-1} + W_y E y_{t-1}
            word_weight = torch.cat([word_weight, self.word_att.weight.to(dtype)])
        vocabulary_weight = self.fc.weight.to(dtype)
        weights = (weight.to(dtype), bias.to(dtype), word_weight, context_weight, vocabulary_weight)
        return Memory(annotations, *weights)

    def init_state(self, memory: Memory) -> State:
        """h_0 and c_0, linear maps of the mean annotation vector (§3.1.2), a row per image."""
        mean = memory.annotations.mean()
        return State(self.init_h(mean).float(), self.init_c(mean).float())

    def forward(self, encoder_out: Tensor, captions: Tensor, lengths: Tensor):
        """Teacher forcing, as in `Decoder.forward`.

        Captions are computed on up to their own length: padding costs and changes nothing.
        """
        steps = lengths.cpu() - 1
        inputs = pack(captions[:, :-1], steps)
        targets = pack(captions[:, 1:], steps)
        all_ = packed_rows(inputs, len(encoder_out))

        memory = self.prepare(encoder_out)
        state = State(*(of_rows(x, all_.images) for x in self.init_state(memory)))
        rows = len(inputs.data)
        filler = kernels.filled(rows) - rows  # further rows of zeros, which nothing is read from
        words = self.embed_dropout(self.embedding(F.pad(inputs.data, (0, filler))))
        products = Products(
            kernels.Product(memory.recurrent_weight, len(words)),
            kernels.Product(memory.context_weight, len(words)),
        )
        offsets = self._offsets(words, memory)
        offsets = offsets + products.recurrent.zeros + _widen(products.context.zeros, offsets)

        hs, looks = [], []
        batch_sizes = inputs.batch_sizes.tolist()
        for n, offset in zip(batch_sizes, offsets[:rows].split(batch_sizes), strict=True):
            # sorted by length: the first n go on
            state = State(first(state.h, n), first(state.c, n))
            state, look = self._advance(memory, products, state, offset, all_.first(n))
            hs.append(state.h)
            looks.append(look)
        for product in products:
            product.close()
        contexts = [look.context for look in looks]
        for values in (hs, contexts):
            values.append(values[0].new_zeros(filler, values[0].shape[1]))
        scores = self._scores(torch.cat(hs), torch.cat(contexts), words, memory)
        scores, _ = scores.split([rows, filler])
        return Forward(inputs._replace(data=scores), targets, *seen(looks, inputs))

    def step(self, words: Tensor, state: State, memory: Memory, rows: Rows | None = None):
        """One decoding step, as in `Decoder.step`."""
        rows = rows or all_rows(words, memory.annotations.images)
        words = self.embed_dropout(self.embedding(words))
        offsets = self._offsets(words, memory)
        weights = memory.recurrent_weight, memory.context_weight
        products = Products(*(partial(kernels.plain_product, weight=weight) for weight in weights))
        state, look = self._advance(memory, products, state, offsets, rows)
        return self._scores(state.h, look.context, words, memory), look.alphas, state

    def _offsets(self, words, memory):
        """What the embeddings and biases add to all that h_{t-1} is multiplied by, n rows."""
        gates = F.linear(words.to(memory.word_weight.dtype), memory.word_weight)
        return _widen(gates, memory.recurrent_bias) + memory.recurrent_bias

    def _advance(self, memory, products, state, offset, rows):
        """The recurrence, on n rows: the next state, and a `Look` whose context is β_t ẑ_t."""
        hidden = state.h.to(memory.recurrent_weight.dtype)
        recurrent = products.recurrent(hidden) + offset
        widths = [4 * self.config.decoder_dim, self.query_dim, self.f_beta.out_features]
        gates, query, beta = recurrent.split(widths, dim=1)
        look = self.attention(memory.annotations, query, rows, state.c)
        context = torch.sigmoid(beta) * look.context  # §4.2.1
        # the cell's state stays in float32
        h, c = kernels.cell(gates + products.context(context), state.c)
        return State(h, c), look._replace(context=context)

    def _scores(self, h, context, words, memory):
        """Vocabulary scores of n rows: the published checkpoints' layer, or the paper's eq. 7."""
        if self.config.deep_output:
            h = torch.tanh(words + self.output_h(h) + self.output_z(context))
        weight = memory.vocabulary_weight
        return F.linear(self.dropout(h).to(weight.dtype), weight, self.fc.bias.to(weight.dtype))


def _widen(values: Tensor, like: Tensor) -> Tensor:
    """Zeros behind the columns, as many as `like` has."""
    return F.pad(values, (0, like.shape[-1] - values.shape[-1]))
