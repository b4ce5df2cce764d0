"""The model of *Show, Attend and Tell* (Xu et al., 2015) after its encoder, as plain formulas.

Symbols are the paper's: an image has L annotation vectors a_i of D values (§3.1.1); at step t the
decoder weighs them with alphas α_ti (§4.2), gates their mean ẑ_t with β_t (§4.2.1) and feeds it,
with the embedding E y_{t-1} of the previous word, to an LSTM whose state h_t gives the next word
(§3.1.2).

What does not depend on the step is computed before the loop or after it: the projections W_a a_i
once an image, the words' share of the LSTM's gates and the words' scores in one product each. Where
a formula would be slow, its fast form stands in `kernels`, beside the plain one.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import kernels
import stages
from contract import Decoder, build_decoder, register

# ---------------------------------------------------------------------------------- attention


class Annotations(NamedTuple):
    """What the decoder looks at, prepared once per image, in the compute precision."""

    vectors: tuple[Tensor, ...]  # (I, l_s, D_s) annotation vectors a at each stage's own grid
    projected: Tensor  # (I, L, A) W_a a + b at the L places of the attention
    energies: kernels.Energies  # e of a query: see `Attention.energies`
    poolings: tuple[Tensor | None, ...]  # (L, l_s) adaptive pooling P_s, None where L = l_s

    def select(self, images: Tensor) -> "Annotations":
        """Those of the given images: indices or a mask."""
        return self._replace(
            vectors=tuple(vectors[images] for vectors in self.vectors),
            projected=self.projected[images],
            energies=self.energies.select(images),
        )

    def mean(self) -> Tensor:
        """Mean annotation vector of each image, (I, D)."""
        means = (
            vectors.mean(dim=1) if pooling is None else pooling.mean(dim=0) @ vectors
            for vectors, pooling in zip(self.vectors, self.poolings, strict=True)
        )
        return torch.cat(list(means), dim=1)


class Attention(nn.Module):
    """Deterministic soft attention (§4.2): α_t = softmax_i(w · relu(W_a a_i + W_h h_{t-1})).

    Args:
        encoder_dim: D, values of an annotation vector.
        decoder_dim: values of the LSTM's h.
        attention_dim: A, values of the hidden layer.
        encoded_image_size: side of the grid of L places that the alphas cover.
        stage_dims, stage_factors: D_s and f_s of the encoder's stages, as `stages.unpack` takes
            them; empty: one map.
        normalize: whether the vectors of each stage go through a LayerNorm of its own (Ba et al.,
            2016), whose gain and bias are learned.
    """

    def __init__(
        self,
        encoder_dim,
        decoder_dim,
        attention_dim,
        encoded_image_size=14,
        stage_dims=(),
        stage_factors=(),
        normalize=False,
    ):
        super().__init__()
        self.stage_dims, self.stage_factors = stage_dims or (encoder_dim,), stage_factors or (1,)
        if normalize:
            self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in self.stage_dims)
        else:
            self.norms = [nn.Identity()] * len(self.stage_dims)
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)  # W_a
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)  # W_h
        self.full_att = nn.Linear(attention_dim, 1)  # w; its bias, as published, changes nothing
        self.encoded_image_size = encoded_image_size

    def prepare(self, encoder_out: Tensor) -> Annotations:
        """Everything that does not depend on the step, from (I, g, g, M) of any grid g."""
        dtype = _compute_dtype(self.encoder_att.weight)
        vectors = self._vectors(encoder_out.to(dtype))
        weights = self.encoder_att.weight.to(dtype).split([v.shape[2] for v in vectors], dim=1)
        projected, poolings = self.encoder_att.bias.to(dtype), []
        for own, weight in zip(vectors, weights, strict=True):
            own, pooling = own @ weight.T, self._pooling(own)  # W_a a, of the stage's values
            # P (W_a a) + b = W_a (P a) + b
            projected = projected + (own if pooling is None else pooling @ own)
            poolings.append(pooling)
        w = self.full_att.weight.squeeze(0).to(dtype)
        energies = kernels.Energies(projected, w)
        return Annotations(vectors, projected, energies, tuple(poolings))

    def _vectors(self, encoder_out):
        """Annotation vectors (I, l_s, D_s) of each stage."""
        maps = stages.unpack(encoder_out, self.stage_dims, self.stage_factors)
        return tuple(norm(own).to(own) for norm, own in zip(self.norms, maps, strict=True))

    def _pooling(self, vectors):
        """P_s from the grid of these vectors to that of the alphas, None where they are one."""
        grid = math.isqrt(vectors.shape[1])
        if grid == self.encoded_image_size:
            return None
        return kernels.pooling_matrix(grid, self.encoded_image_size).to(vectors)

    def energies(self, annotations: Annotations, query: Tensor, images: Tensor) -> Tensor:
        """e_ti = w · relu(W_a a_i + W_h h_{t-1}) (eq. 4), (n, L): `kernels.plain_energies`.

        Another score function is this method of a subclass, a formula of `annotations.projected`,
        the queries (n, A) and each row's image (n,).
        """
        return annotations.energies(query, images)

    def forward(self, annotations: Annotations, query: Tensor, slots: Tensor, per_image: int):
        """Looks at each row's image.

        Args:
            annotations: of I images.
            query: (n, A) W_h h_{t-1} + b, n ≤ I·K.
            slots: (n,) int64, each row's place among I images × K captions, image by image.
            per_image: K.

        Returns:
            context ẑ_t (n, D), and alphas (n, L), float32, which sum to one in each row.
        """
        energies = self.energies(annotations, query, slots // per_image)
        alphas = (energies.float() + self.full_att.bias).softmax(dim=1)  # eq. 5
        weights, contexts = alphas.to(query.dtype), []
        for vectors, pooling in zip(annotations.vectors, annotations.poolings, strict=True):
            # Σ_i α_i (P a)_i = Σ_j (Pᵀα)_j a_j
            own = weights if pooling is None else weights @ pooling
            contexts.append(kernels.context(vectors, own, slots, per_image))  # eq. 13
        return torch.cat(contexts, dim=1), alphas


# ------------------------------------------------------------------------------------ decoder


class State(NamedTuple):
    """The LSTM's state, a row per caption, float32."""

    h: Tensor  # (n, decoder_dim)
    c: Tensor  # (n, decoder_dim)

    def select(self, rows: Tensor) -> "State":
        """Those of the given rows: indices or a mask."""
        return State(self.h[rows], self.c[rows])


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
class LSTMConfig:
    """Sizes and choices of a `DecoderWithAttention`.

    Args:
        vocab_size: V.
        encoder_dim: values of `encoder_out` at a place of its grid.
        attention_dim, embed_dim, decoder_dim: sizes of the layers.
        dropout: probability, on what enters the vocabulary layer.
        encoded_image_size: side of the grid of L places that the alphas cover.
        gate: "scalar" for the paper's one β_t, "channel" for one for each of D channels.
        query: what the attention's query is made of: "state" for h_{t-1}, as in the paper, "word"
            for that and the previous word, which it else knows of at the next step only.
        deep_output: compute the words from h_t, ẑ_t and the previous word (eq. 7), not h_t alone.
        embed_dropout: probability, on the embeddings of the true words in `forward`.
        stage_dims, stage_factors: of the encoder's stages that `encoder_out` holds, as `Attention`
            takes them.
        feature_norm: "layer" for a LayerNorm of each stage's vectors, or "none".
    """

    vocab_size: int
    encoder_dim: int = 2048
    attention_dim: int = 512
    embed_dim: int = 512
    decoder_dim: int = 512
    dropout: float = 0.5
    encoded_image_size: int = 14
    gate: str = "scalar"
    query: str = "state"
    deep_output: bool = False
    embed_dropout: float = 0.0
    stage_dims: tuple = ()
    stage_factors: tuple = ()
    feature_norm: str = "none"

    @property
    def annotation_dim(self):
        """D, values of an annotation vector."""
        return sum(self.stage_dims) or self.encoder_dim

    def __post_init__(self):
        for name, known in (
            ("gate", ("scalar", "channel")), ("query", ("state", "word")),
            ("feature_norm", ("layer", "none")),
        ):  # fmt: skip
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"its {name} is {value!r}: known are {' and '.join(known)}")
        if len(self.stage_dims) != len(self.stage_factors):
            raise ValueError(f"its stages are {self.stage_dims} and {self.stage_factors}")
        pairs = zip(self.stage_dims, self.stage_factors, strict=True)
        packed = sum(dim * factor**2 for dim, factor in pairs)
        if self.stage_dims and packed != self.encoder_dim:
            raise ValueError(f"its stages make {packed} values, not {self.encoder_dim}")


@register("lstm")
class DecoderWithAttention(Decoder):
    """LSTM decoder with soft attention (§3.1.2, §4.2), parameters named as in the published code.

    Args:
        config: an `LSTMConfig`.
    """

    Config = LSTMConfig
    attention_class = Attention

    def __init__(self, config):
        super().__init__(config)
        dim, hidden, embed = config.annotation_dim, config.decoder_dim, config.embed_dim
        self.attention = self.attention_class(
            dim,
            hidden,
            config.attention_dim,
            config.encoded_image_size,
            config.stage_dims,
            config.stage_factors,
            config.feature_norm == "layer",
        )
        self.embedding = nn.Embedding(config.vocab_size, embed)  # E
        self.embed_dropout = nn.Dropout(config.embed_dropout)
        self.decode_step = nn.LSTMCell(embed + dim, hidden)
        if config.query == "word":
            self.word_att = nn.Linear(embed, config.attention_dim, bias=False)  # W_y
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
        annotations = self.attention.prepare(encoder_out)
        dtype, cell = annotations.projected.dtype, self.decode_step
        stacked = [self.attention.decoder_att, self.f_beta]
        weight = torch.cat([cell.weight_hh, *(layer.weight for layer in stacked)])
        bias = torch.cat([cell.bias_hh + cell.bias_ih, *(layer.bias for layer in stacked)])
        word_weight, context_weight = cell.weight_ih.to(dtype).split(
            [self.config.embed_dim, self.config.annotation_dim], dim=1
        )
        if self.config.query == "word":  # W_h h_{t-1} + W_y E y_{t-1}
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
        inputs = _pack(captions[:, :-1], steps)
        targets = _pack(captions[:, 1:], steps)
        slots, per_image = inputs.sorted_indices, len(captions) // len(encoder_out)

        memory = self.prepare(encoder_out)
        # index_select's gradient is added up in order, that of indexing by several threads at once
        state = State(*(x.index_select(0, slots // per_image) for x in self.init_state(memory)))
        rows = len(inputs.data)
        filler = kernels.filled(rows) - rows  # further rows of zeros, which nothing is read from
        words = self.embed_dropout(self.embedding(F.pad(inputs.data, (0, filler))))
        products = Products(
            kernels.Product(memory.recurrent_weight, len(words)),
            kernels.Product(memory.context_weight, len(words)),
        )
        offsets = self._offsets(words, memory)
        offsets = offsets + products.recurrent.zeros + _widen(products.context.zeros, offsets)

        hs, contexts, alphas = [], [], []
        batch_sizes = inputs.batch_sizes.tolist()
        for n, offset in zip(batch_sizes, offsets[:rows].split(batch_sizes), strict=True):
            state = State(state.h[:n], state.c[:n])  # sorted by length: the first n go on
            state, context, alpha = self._advance(
                memory, products, state, offset, slots[:n], per_image
            )
            hs.append(state.h)
            contexts.append(context)
            alphas.append(F.pad(alpha, (0, 0, 0, len(slots) - n)))
        for product in products:
            product.close()
        for values in (hs, contexts):
            values.append(values[0].new_zeros(filler, values[0].shape[1]))
        scores = self._scores(torch.cat(hs), torch.cat(contexts), words, memory)
        scores, _ = scores.split([rows, filler])
        alphas = torch.stack(alphas, dim=1)[inputs.unsorted_indices]
        return inputs._replace(data=scores), targets, alphas

    def step(self, words: Tensor, state: State, memory: Memory):
        """One decoding step, as in `Decoder.step`."""
        slots = torch.arange(len(words), device=words.device)
        per_image = len(words) // len(memory.annotations.projected)
        words = self.embedding(words)
        offsets = self._offsets(words, memory)
        weights = memory.recurrent_weight, memory.context_weight
        products = Products(*(partial(kernels.plain_product, weight=weight) for weight in weights))
        state, context, alphas = self._advance(memory, products, state, offsets, slots, per_image)
        return self._scores(state.h, context, words, memory), alphas, state

    def _offsets(self, words, memory):
        """What the embeddings and biases add to all that h_{t-1} is multiplied by, n rows."""
        gates = F.linear(words.to(memory.word_weight.dtype), memory.word_weight)
        return _widen(gates, memory.recurrent_bias) + memory.recurrent_bias

    def _advance(self, memory, products, state, offset, slots, per_image):
        """The recurrence, on n rows: next state, gated context β_t ẑ_t (n, D), alphas (n, L)."""
        config = self.config
        hidden = state.h.to(memory.recurrent_weight.dtype)
        recurrent = products.recurrent(hidden) + offset
        widths = [4 * config.decoder_dim, config.attention_dim, self.f_beta.out_features]
        gates, query, beta = recurrent.split(widths, dim=1)
        context, alphas = self.attention(memory.annotations, query, slots, per_image)
        context = torch.sigmoid(beta) * context  # §4.2.1
        gates = gates + products.context(context)
        # eq. 1 to 3; the cell's state stays in float32
        i, f, g, o = gates.float().chunk(4, dim=1)
        c = torch.sigmoid(f) * state.c + torch.sigmoid(i) * torch.tanh(g)
        return State(torch.sigmoid(o) * torch.tanh(c), c), context, alphas

    def _scores(self, h, context, words, memory):
        """Vocabulary scores of n rows: the published checkpoints' layer, or the paper's eq. 7."""
        if self.config.deep_output:
            h = torch.tanh(words + self.output_h(h) + self.output_z(context))
        weight = memory.vocabulary_weight
        return F.linear(self.dropout(h).to(weight.dtype), weight, self.fc.bias.to(weight.dtype))


# ------------------------------------------------------------------------------------- helpers


def _pack(sequences: Tensor, lengths: Tensor) -> PackedSequence:
    return pack_padded_sequence(sequences, lengths, batch_first=True, enforce_sorted=False)


def _widen(values: Tensor, like: Tensor) -> Tensor:
    """Zeros behind the columns, as many as `like` has."""
    return F.pad(values, (0, like.shape[-1] - values.shape[-1]))


def _compute_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
