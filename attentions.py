"""Every attention: how a decoder looks at an image before it says a word (§4 and others).

`Attention` is the paper's, and the interface of all. Another is a class derived from it with a line
`@register(name)` above it; `--attention` takes the name, and decoders know nothing else of it. Most
need another score function alone, `energies`.
"""

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import kernels
from annotations import Annotations, AnnotationVectors, MapConfig, of_rows, project
from contract import Rows
from groundwork import distributed

ATTENTIONS: dict[str, type["Attention"]] = {}  # by the name that --attention takes


def register(name):
    """A class decorator: the attention of that name."""

    def add(attention):
        ATTENTIONS[name] = attention
        return attention

    return add


class Look(NamedTuple):
    """What has been seen at one step, a row per caption."""

    context: Tensor  # (n, context_dim) ẑ_t
    alphas: Tensor | None  # (n, L) float32, where that is; None of an attention without places
    log_p: Tensor | None = None  # (n,) float32 log α of the place, where training draws one
    entropy: Tensor | None = None  # (n,) float32 of the alphas it is drawn from
    baseline: Tensor | None = None  # (2,) with log_p: the attention's own, as in `contract.Drawn`


@dataclass(frozen=True)
class AttendingConfig(MapConfig):
    """Sizes and choices of a recurrent decoder that attends, beside those of `MapConfig`.

    Args:
        attention_dim, embed_dim, decoder_dim: sizes of the layers.
        dropout, embed_dropout: probabilities, on what enters the vocabulary layer, and on the
            embeddings of the true words in `forward`.
        attention: of `attentions.ATTENTIONS`.
        heads: of the attention "multihead".
        query: what the attention's query is made of: "state", as in the paper, or "word" for that
            and the previous word, which the state of a decoder that attends first has not seen.
    """

    attention_dim: int = 512
    embed_dim: int = 512
    decoder_dim: int = 512
    dropout: float = 0.5
    _: KW_ONLY
    attention: str = "soft"
    heads: int = 4
    query: str = "state"
    embed_dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.check("attention", ATTENTIONS)
        self.check("query", ("state", "word"))


@register("soft")
class Attention(AnnotationVectors):
    """Deterministic soft attention (Xu et al., 2015, §4.2): α_t = softmax_i(w · relu(W_a a_i +
    W_h h_{t-1})), and ẑ_t = Σ_i α_ti a_i.

    The decoder adds to the query what it knows of the previous word, W_y E y_{t-1}, where its
    configuration or `knows_word` says so.

    Args:
        config: an `AttendingConfig`, or a `MapConfig` with the fields of it that are used: here
            `decoder_dim`, values of the decoder's state, and `attention_dim` A, of the hidden
            layer.
    """

    attends = True  # whether it has alphas
    fields = ("attention_dim", "query")  # of a decoder's configuration, those that it is made with
    knows_word = False  # whether its query is always made of the previous word, too
    activation = staticmethod(torch.relu)  # of the hidden layer

    def __init__(self, config):
        super().__init__(config)
        self.attention_dim = config.attention_dim
        self.context_dim = config.annotation_dim  # values of ẑ_t, and of `Annotations.mean`
        self.encoder_att = nn.Linear(config.annotation_dim, self.attention_dim)  # W_a
        self.decoder_att = nn.Linear(config.decoder_dim, self.query_dim(config))  # W_h
        self.full_att = nn.Linear(self.attention_dim, 1)  # w; its bias, as published, is idle

    @staticmethod
    def query_dim(config) -> int:
        """Values of a query."""
        return config.attention_dim

    def prepare(self, encoder_out: Tensor) -> Annotations:
        """Everything that does not depend on the step, from (I, g, g, M) of any grid g, in the
        precision to compute in."""
        annotations = self.annotate(encoder_out)
        projected = project(self.encoder_att, annotations)
        return annotations._replace(projected=projected, energies=self.fast_energies(projected))

    def fast_energies(self, projected: Tensor) -> kernels.Energies:
        """`energies` of the keys (I, L, A)."""
        w = self.full_att.weight.squeeze(0).to(projected)
        return kernels.Energies(projected, w, self.activation)

    def energies(self, annotations: Annotations, query: Tensor, images: Tensor) -> Tensor:
        """e_ti = w · relu(W_a a_i + W_h h_{t-1}) (eq. 4), (n, L): `kernels.plain_energies`.

        Another score function is this method of a subclass, a formula of `annotations.projected`,
        the queries (n, A) and each row's image (n,).
        """
        if annotations.energies is None:  # in a graph that leaves Python
            w = self.full_att.weight.squeeze(0).to(query.dtype)
            return kernels.plain_energies(annotations.projected, query, w, images, self.activation)
        return annotations.energies(query, images)

    def forward(
        self,
        annotations: Annotations,
        query: Tensor,
        rows: Rows,
        cell: Tensor | None = None,
    ) -> Look:
        """Looks at each row's image.

        Args:
            annotations: of I images.
            query: (n, query_dim) W_h h_{t-1} + b, n ≤ I·K.
            rows: which captions they are.
            cell: (n, decoder_dim) the decoder's memory, for the attentions that ask for it.

        Returns:
            a `Look`; its alphas sum to one in each row.
        """
        alphas = self.log_alphas(annotations, query, rows.images).softmax(dim=1)  # eq. 5
        weights = alphas.to(query.dtype)
        return Look(annotations.weighted(weights, rows), alphas)

    def log_alphas(self, annotations, query, images):
        """log α but for a constant in each row, (n, L) float32."""
        return self.energies(annotations, query, images).float() + self.full_att.bias


@register("hard")
class HardAttention(Attention):
    """Stochastic hard attention (Xu et al., 2015, §4.1): one place s_t is drawn from the alphas,
    ẑ_t = a_{s_t}.

    Training draws in one half of the batches and is soft in the other, as the authors' code does
    (github.com/kelvinxu/arctic-captions); `objectives.reinforce` makes the gradient. A trained one
    looks in one of the ways of `LOOKS`: at the expected context, at the likeliest place, or at a
    drawn one. Its alphas are the probabilities of the places in any case.
    """

    LOOKS = ("soft", "argmax", "sample")  # see `contract.Decoder.looks`
    SOFT_SHARE = 0.5  # of the batches

    def __init__(self, config):
        super().__init__(config)
        self.look, self.seed, self.generator, self.softly = "soft", 0, None, False
        # kept in checkpoints, so that a run goes on exactly: the moving average of what words cost
        # beyond a soft look, and whether it has begun; how many batches there have been
        self.register_buffer("baseline", torch.zeros(2))
        self.register_buffer("batches", torch.zeros(()))

    def prepare(self, encoder_out: Tensor) -> Annotations:
        look, self.generator = self.look, None
        if self.training:
            # from the batch's number, so that all processes draw in the same ones
            batch = int(self.batches)  # once, as a GPU is waited for
            generator = torch.Generator().manual_seed(batch)
            soft = torch.rand((), generator=generator) < self.SOFT_SHARE
            look = "soft" if soft else "sample"
            # of its own, so that the same values are dropped out whether places are drawn or not
            seed = batch * distributed.world_size + distributed.rank
            self.batches += 1
        elif look == "sample":
            seed = self.seed
        if look == "sample":
            self.generator = torch.Generator(encoder_out.device).manual_seed(seed)
        return super().prepare(encoder_out)._replace(look=look)

    def forward(self, annotations, query, rows, cell=None) -> Look:
        log_alphas = self.log_alphas(annotations, query, rows.images).log_softmax(dim=1)
        alphas = log_alphas.exp()
        if annotations.look == "soft" or self.softly:
            return Look(annotations.weighted(alphas.to(query.dtype), rows), alphas)
        if annotations.look == "argmax":
            places = alphas.detach().argmax(dim=1, keepdim=True)
        else:
            places = torch.multinomial(alphas.detach(), 1, generator=self.generator)
        chosen = torch.zeros_like(alphas, dtype=query.dtype).scatter(1, places, 1.0)
        context = annotations.weighted(chosen, rows)
        if not self.training:
            return Look(context, alphas)
        entropy = -(alphas * log_alphas).sum(dim=1)
        log_p = log_alphas.gather(1, places).squeeze(1)
        return Look(context, alphas, log_p, entropy, self.baseline)


@register("none")
class NoAttention(AnnotationVectors):
    """No attention: ẑ_t is the mean annotation vector at every step. The captioner that attention
    was compared with (Vinyals et al., 2015, §3.1) is given the image once, as the LSTM's input
    before the first word."""

    attends, fields, knows_word = False, (), False
    decoder_att = None

    def __init__(self, config):
        super().__init__(config)
        self.context_dim = config.annotation_dim

    @staticmethod
    def query_dim(config) -> int:
        return 0

    def prepare(self, encoder_out: Tensor) -> Annotations:
        mean = self.annotate(encoder_out).mean()
        return Annotations((mean.unsqueeze(1),), (None,))

    def forward(self, annotations, query, rows, cell=None) -> Look:
        return Look(of_rows(annotations.vectors[0], rows.images).squeeze(1), None)


class TanhAttention(Attention):
    """What the additive attentions with tanh in place of relu have in common: their energies."""

    activation = staticmethod(torch.tanh)

    def score(self, keys: Tensor, query: Tensor) -> Tensor:
        """v · tanh(k_i + q), (n, L), of keys (n, L, A) and queries (n, A)."""
        w = self.full_att.weight.squeeze(0).to(query.dtype)
        return torch.tanh(keys + query.unsqueeze(1)) @ w


@register("bahdanau")
class BahdanauAttention(TanhAttention):
    """Additive attention (Bahdanau et al., 2015, appendix A.1.2): e_ti = v · tanh(W_1 a'_i +
    W_2 h_{t-1}), over a'_i = relu(W_a a_i + b), as TensorFlow's captioning tutorial has it. There
    a'_i has 256 values and the hidden layer 512; here both have `attention_dim`."""

    def __init__(self, config):
        super().__init__(config)
        self.context_dim = self.attention_dim
        self.key_att = nn.Linear(self.attention_dim, self.attention_dim)  # W_1

    def prepare(self, encoder_out: Tensor) -> Annotations:
        annotations = self.annotate(encoder_out)
        vectors = torch.relu(project(self.encoder_att, annotations))
        annotations = Annotations((vectors,), (None,))
        projected = project(self.key_att, annotations)
        return annotations._replace(projected=projected, energies=self.fast_energies(projected))


@register("adaptive")
class AdaptiveAttention(TanhAttention):
    """Attention with a visual sentinel (Lu et al., 2017, §2.3): it weighs the places against what
    the decoder remembers.

    Beside the L places stands s_t = σ(W_x E y_{t-1} + W_h h_{t-1}) ⊙ tanh(c_{t-1}), and the context
    is

        ĉ_t = β_t W s_t + Σ_i α_ti a_i,
        (α_t, β_t) = softmax([w · tanh(W_a a_i + q_t); w · tanh(W_s s_t + q_t)]).

    The alphas of a word sum to 1 - β_t: how much it looked. Lu et al. add β_t s_t itself, where W
    here gives it as many values as a_i has; the input of their gate holds a vector of the image
    beside the word; and they ask with h_t and add ĉ_t to the output. Here the attention comes
    before the LSTM's step, as in the rest of this model, so it asks with h_{t-1} and the previous
    word.
    """

    fields, knows_word = ("attention_dim",), True

    def __init__(self, config):
        super().__init__(config)
        self.sentinel_att = nn.Linear(config.decoder_dim, self.attention_dim)  # W_s
        self.sentinel = nn.Linear(config.decoder_dim, self.context_dim)  # W

    @staticmethod
    def query_dim(config) -> int:
        return config.attention_dim + config.decoder_dim  # that of the attention, and s_t's gate

    def forward(self, annotations, query, rows, cell=None) -> Look:
        query, gate = query.split([self.attention_dim, query.shape[1] - self.attention_dim], dim=1)
        sentinel = torch.sigmoid(gate) * torch.tanh(cell).to(gate.dtype)
        key = self.sentinel_att(sentinel).to(query.dtype)
        own = self.score(key.unsqueeze(1), query).float() + self.full_att.bias
        places = self.log_alphas(annotations, query, rows.images)
        weights = torch.cat([places, own], dim=1).softmax(dim=1)
        alphas, beta = weights[:, :-1], weights[:, -1:].to(query.dtype)
        context = annotations.weighted(alphas.to(query.dtype), rows)
        return Look(context + beta * self.sentinel(sentinel).to(query.dtype), alphas)


@register("multihead")
class MultiHeadAttention(Attention):
    """Scaled dot-product attention with several heads (Vaswani et al., 2017, §3.2): of each head
    α = softmax_i(q · W_k a_i / √d), and Σ_i α_i W_v a_i; the heads' results through W_o. The alphas
    are the mean over heads."""

    fields = (*Attention.fields, "heads")

    def __init__(self, config):
        super().__init__(config)
        if self.attention_dim % config.heads:
            raise ValueError(
                f"its attention_dim {self.attention_dim} is no multiple of its heads, "
                f"{config.heads}: give heads that divide it"
            )
        del self.full_att
        self.heads, self.context_dim = config.heads, self.attention_dim
        self.value_att = nn.Linear(config.annotation_dim, self.attention_dim)  # W_v
        self.out_att = nn.Linear(self.attention_dim, self.attention_dim)  # W_o

    def prepare(self, encoder_out: Tensor) -> Annotations:
        annotations = self.annotate(encoder_out)
        keys, values = (project(own, annotations) for own in (self.encoder_att, self.value_att))
        return Annotations((values,), (None,), keys)

    def forward(self, annotations, query, rows, cell=None) -> Look:
        images = rows.images
        heads = self.heads, self.attention_dim // self.heads
        query = query.unflatten(1, heads).unsqueeze(2)  # (n, heads, 1, d)
        keys, values = (  # (n, heads, L, d)
            of_rows(own, images).unflatten(2, heads).transpose(1, 2)
            for own in (annotations.projected, annotations.vectors[0])
        )
        scale = heads[1] ** -0.5
        alphas = (scale * (query @ keys.transpose(2, 3)).float()).softmax(dim=3)
        context = (alphas.to(values.dtype) @ values).squeeze(2).flatten(1)
        return Look(self.out_att(context).to(query.dtype), alphas.squeeze(2).mean(dim=1))


def word_layer(config, attention) -> nn.Linear | None:
    """W_y, which adds the previous word to the attention's query; None where the query is made of
    the state alone, or there is none.

    Args:
        config: an `AttendingConfig`.
    """
    query_dim = attention.query_dim(config)
    if query_dim and (config.query == "word" or attention.knows_word):
        return nn.Linear(config.embed_dim, query_dim, bias=False)
    return None
