"""What a run is made with. The command line takes its defaults from here."""

from dataclasses import dataclass, replace
from typing import Any

CHANGES = ("crop", "mirror", "colour")  # what the fresh views of an image differ by
# How the share of words of the model's own grows, by its name: the default of k, updates
SCHEDULES = {"linear": 10000, "exponential": 10000, "inverse_sigmoid": 500}


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
    scst_batch_size: int = 50  # captions drawn, self-critical stage
    decoder_lr: float = 4e-4  # AdamW
    encoder_lr: float = 1e-4
    scst_lr: float | None = None  # of the self-critical stage; None: the decoder's own
    tune_from: int = 8  # stride of the encoder's first stage that is fine-tuned
    augment: str | None = None  # of `CHANGES`, joined: fresh views of an image every epoch
    warmup: int = 0  # updates over which the rates rise from 0
    weight_decay: float = 0.0
    accumulate: int = 1  # batches whose gradients make an update
    ema: float = 0.0  # decay of the moving average of the weights; 0: none
    schedule: str = "plateau"  # or "cosine"
    select_by: str = "bleu4"  # what tells the best epoch, or "cider", "loss"
    patience: int = 8  # epochs, of the plateau schedule
    stop_after: int = 20  # epochs without a better one
    grad_clip: float = 5.0  # element-wise
    scst_grad_clip: float = 0.1  # in the self-critical stage
    alpha_c: float = 1.0  # weight of doubly stochastic attention
    label_smoothing: float = 0.0  # share spread over the vocabulary
    scheduled_sampling: str | None = None  # of `SCHEDULES`: words of the model's own are read
    sampling_start: int = 0  # updates before it begins
    sampling_k: float | None = None  # how slow, in updates
    sampling_max: float = 0.25  # share of the words read that are the model's own, at most
    samples: int = 5  # captions of an image that are drawn, self-critical stage
    reward: str = "cider=1"  # what they are judged by, and its weight: see `rewards.parse`
    cross_entropy_share: float = 0.0  # of the self-critical stage's loss
    views: int = 1  # of an image to train on
    seed: int = 0


@dataclass(frozen=True)
class SearchConfig:
    """How a split is captioned."""

    search: Any  # a `choosing.Search` with any width of the beam
    batch_size: int = 128  # images
    workers: int | None = None  # processes that read ahead; None: the device's usual
    seed: int | None = None  # of what is drawn

    def of(self, beam_size):
        """The `Search` with another width of the beam; None: with its own."""
        return replace(self.search, beam_size=beam_size or self.search.beam_size)
