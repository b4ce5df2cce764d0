"""What a run is made with. The command line takes its defaults from here."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and decoder. Which of the sizes and choices a decoder has, its own `Config` tells,
    and what it takes where they are None here."""

    encoder: str = "resnet101"  # a torchvision model or timm:NAME
    encoder_stages: str = "last"  # which alone is the paper's; or strides, as "16 32"
    feature_norm: str | None = None  # "layer": a LayerNorm for each stage; "none"; or by the stages
    encoded_image_size: int = 14  # side of the attention's grid
    decoder: str = "lstm"  # of `contract.DECODERS`
    attention: str | None = None  # of `attentions.ATTENTIONS`
    heads: int | None = None  # of an attention that has several
    gate: str = "scalar"  # one β_t, or one for each "channel"
    query: str = "state"  # of the attention: h_{t-1} as in the paper, or with the previous "word"
    deep_output: bool = False  # the paper's output layer, eq. 7
    attention_dim: int | None = None
    embed_dim: int | None = None
    decoder_dim: int | None = None
    layers: int | None = None  # of a decoder that has several alike
    positions: int | None = None  # of words, that a decoder learns
    dropout: float | None = None  # probability, before the vocabulary layer
    embed_dropout: float | None = None  # probability, on the words' embeddings
    embeddings: str | None = None  # a file of word vectors, or a package
    freeze_embeddings: bool = False
    bias_init: str | None = None  # of the vocabulary layer, "frequencies"; None: the decoder's own
    bar_special: bool = False  # <pad>, <start> and <unk> have no probability


@dataclass(frozen=True)
class TrainingConfig:
    """How the model is trained."""

    epochs: int = 120  # at most, in each stage
    batch_size: int = 80  # captions, stage 1
    finetune_batch_size: int = 32  # captions, stage 2
    decoder_lr: float = 4e-4  # Adam
    encoder_lr: float = 1e-4
    schedule: str = "plateau"  # or "cosine"
    select_by: str = "bleu4"  # what tells the best epoch, or "cider", "loss"
    patience: int = 8  # epochs, of the plateau schedule
    stop_after: int = 20  # epochs without a better one
    grad_clip: float = 5.0  # element-wise
    alpha_c: float = 1.0  # weight of doubly stochastic attention
    label_smoothing: float = 0.0  # share spread over the vocabulary
    views: int = 1  # of an image to train on
    seed: int = 0


@dataclass(frozen=True)
class SearchConfig:
    """How a split is captioned."""

    search: Any  # a `choosing.Search` with any width of the beam
    batch_size: int = 50  # images
    workers: int | None = None  # processes that read ahead; None: the device's usual
    seed: int | None = None  # of what is drawn

    def of(self, beam_size):
        """The `Search` with another width of the beam; None: with its own."""
        return replace(self.search, beam_size=beam_size or self.search.beam_size)
