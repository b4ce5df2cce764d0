"""What a decoder is: all that search, training, evaluation, pictures and checkpoints know of one.

A variant is a class derived from `Decoder` with a `Config`, and a line `@register(name)` above it;
`checkpoints` imports its module, so that the name is known.
"""

import dataclasses
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import kernels
from groundwork.devices import shapes_only
from groundwork.errors import in_a_line

DECODERS: dict[str, type["Decoder"]] = {}  # by the name that --decoder takes and checkpoints keep


def register(name):
    """A class decorator: the decoder of that name."""

    def add(decoder):
        DECODERS[name], decoder.name = decoder, name
        return decoder

    return add


class Selectable(Protocol):
    """The memory of some images, or the state of some rows."""

    def select(self, rows: Tensor) -> "Selectable":
        """Those of the given images or rows: indices or a mask."""


class Rows(NamedTuple):
    """Which captions the rows of a step are, of K of each of I images."""

    slots: Tensor  # (n,) int64, each row's place among the I·K captions, image by image
    images: Tensor  # (n,) int64, the image of each row
    per_image: int  # K
    whole: bool = False  # whether they are all of the captions, image by image

    def select(self, rows: Tensor) -> "Rows":
        """Some of them: indices."""
        return Rows(self.slots[rows], self.images[rows], self.per_image)

    def first(self, n: int) -> "Rows":
        """The first n of them."""
        if n == len(self.slots):
            return self
        return Rows(self.slots[:n], self.images[:n], self.per_image)


def rows_of(slots, per_image):
    """The `Rows` of slots, of K captions of each image."""
    return Rows(slots, slots // per_image, per_image)


def all_rows(words, images):
    """The `Rows` of words (I·K,) of so many images where none is left out."""
    count = words.shape[0]  # which, unlike len, may be a graph's own number
    slots = torch.arange(count, device=words.device)
    return rows_of(slots, count // images)._replace(whole=True)


def packed_rows(inputs, images):
    """The `Rows` of a first step of packed captions, of so many images."""
    if inputs.sorted_indices is None:
        return all_rows(inputs.data[: int(inputs.batch_sizes[0])], images)
    return rows_of(inputs.sorted_indices, len(inputs.sorted_indices) // images)


def of_all(values, slots, count, others=0):
    """(count, …): the values (n, …) of some, whose places (n,) ascend, and what the others have."""
    if len(values) == count:
        return values
    whole = values.new_full((count, *values.shape[1:]), others)
    return whole.index_copy(0, slots, values)


class Drawn(NamedTuple):
    """What an attention has drawn at random in a forward pass, for the objective: see
    `objectives.reinforce`. Words are in the order of the packed scores."""

    log_p: Tensor  # (Σ(lengths - 1),) float32, of the place looked at before each word
    entropy: Tensor  # (Σ(lengths - 1),) float32, of what it was drawn from
    baseline: Tensor  # (2,) the attention's own, which the objective moves
    softly: Tensor | None = None  # (Σ(lengths - 1),) float32 -log p of the words, looking softly


class Forward(NamedTuple):
    """What a decoder makes of true captions."""

    scores: PackedSequence  # (Σ(lengths - 1), V), before the softmax
    targets: PackedSequence  # (Σ(lengths - 1),) the words to predict
    alphas: Tensor | None  # (I·K, max(lengths) - 1, L) float32, zero past a caption's end
    drawn: Drawn | None = None


class Decoder(nn.Module):
    """Writes captions from `encoder_out`, word by word.

    Args:
        config: of the class's own `Config`, a dataclass of numbers and texts that all decoders'
            have these fields in common: `vocab_size` V, `encoder_dim` D, and `encoded_image_size`,
            the side of the grid that alphas cover. Its `__post_init__` raises ValueError for values
            that cannot be.

    Most have two layers by these names, which `vocabulary` prepares: `embedding`, an nn.Embedding
    of the V words, and `fc`, the nn.Linear with a bias that gives their scores.
    """

    Config: ClassVar[type]
    attends: ClassVar[bool] = True  # whether it has alphas; else its attention tells, if it has one
    scst_lr: ClassVar[float] = 5e-5  # learning rate of self-critical training
    blind: ClassVar[str] = "this decoder has no attention"  # why, where it gives no alphas
    name: ClassVar[str]  # by which it is registered

    def __init__(self, config):
        super().__init__()
        self.config = config

    @property
    def looks(self) -> tuple[str, ...]:
        """The ways in which it can look at an image while it decodes, the usual one first: the
        `LOOKS` of a part of it that has such a choice; empty where none has."""
        return next((part.LOOKS for part in self._lookers()), ())

    @property
    def draws(self) -> bool:
        """Whether it draws at random while it decodes."""
        return any(part.look == "sample" for part in self._lookers())

    def set_look(self, look: str, seed: int = 0):
        """From now on decodes in one of the ways of `looks`; training goes its own.

        Args:
            seed: of what is drawn at random, from which each `prepare` begins anew.
        """
        for part in self._lookers():
            part.look, part.seed = look, seed

    @contextmanager
    def looking_softly(self):
        """For the block an attention that draws places looks at the expected context instead, in
        training, too."""
        for part in self._lookers():
            part.softly = True
        try:
            yield
        finally:
            for part in self._lookers():
                part.softly = False

    def _lookers(self):
        """Its parts that can look in several ways."""
        return (part for part in self.modules() if hasattr(part, "LOOKS"))

    def prepare(self, encoder_out: Tensor) -> Selectable:
        """The memory: everything that the steps share, from (I, g, g, D) of any grid g."""
        raise NotImplementedError

    @contextmanager
    def prepared(self, encoder_out: Tensor):
        """For the block `prepare` gives the memory of `encoder_out`, made once for all that ask for
        it: the forward pass, and a search over the same images. Within such a block, nothing."""
        if "prepare" in vars(self):
            yield
            return
        memory = self.prepare(encoder_out)
        self.prepare = lambda _: memory  # hides the class's own
        try:
            yield
        finally:
            del self.prepare

    def init_state(self, memory: Selectable) -> Selectable:
        """The state before the first word, a row per image."""
        raise NotImplementedError

    def step(
        self, words: Tensor, state: Any, memory: Any, rows: Rows | None = None
    ) -> tuple[Tensor, Tensor | None, Any]:
        """One decoding step, which greedy, sampling and beam search share.

        Args:
            words: (n,) int64, the previous word of each caption.
            state: the captions' state, n rows.
            memory: from `prepare`, of I images.
            rows: which captions they are, where others have left; otherwise n = I·K, image by
                image.

        Returns:
            scores (n, V) before the softmax; alphas (n, L) float32, None from a decoder that has
            no attention; and the next state.
        """
        raise NotImplementedError

    def forward(self, encoder_out: Tensor, captions: Tensor, lengths: Tensor) -> Forward:
        """Teacher forcing: scores of every word given the true words before it.

        Args:
            encoder_out: (I, g, g, D) from `Encoder` or `Encoder.features`.
            captions: (I·K, T) int64, `<start>` to `<end>`; caption i belongs to image i // K.
            lengths: (I·K,) int64 from 2 to T, with `<start>` and `<end>`.

        Returns:
            a `Forward`; its alphas are None of a decoder without attention.
        """
        raise NotImplementedError


def forward_whole(decoder, encoder_out, captions, lengths):
    """`Decoder.forward` of captions that are all computed on to the end, in shapes that do not
    depend on their lengths, as a CUDA graph has them. Past a caption's end its alphas are zero and
    its targets `kernels.IGNORED`.

    Args:
        encoder_out, captions: as there.
        lengths: (I·K,) int64 on the captions' device.
    """
    steps = torch.full((len(captions),), captions.shape[1] - 1)
    read = decoder(encoder_out, captions, steps + 1)
    past = torch.arange(1, captions.shape[1], device=captions.device) >= lengths.unsqueeze(1)
    targets = pack(captions[:, 1:].masked_fill(past, kernels.IGNORED), steps)
    alphas = None if read.alphas is None else read.alphas.masked_fill(past.unsqueeze(2), 0.0)
    return read._replace(targets=targets, alphas=alphas)


def seen(looks, inputs):
    """What `Forward` tells of the looks of a batch: alphas, and what was drawn.

    Args:
        looks: an `attentions.Look` for each step.
        inputs: the PackedSequence of the words that the steps took.
    """
    alphas = drawn = None
    if looks[0].alphas is not None:
        rows = len(looks[0].alphas)
        alphas = torch.stack([_filled_up(look.alphas, rows) for look in looks], dim=1)
        if inputs.unsorted_indices is not None:
            alphas = alphas[inputs.unsorted_indices]
    if looks[0].log_p is not None:
        log_p, entropy = (
            torch.cat([getattr(look, name) for look in looks]) for name in ("log_p", "entropy")
        )
        drawn = Drawn(log_p, entropy, looks[0].baseline)
    return alphas, drawn


def _filled_up(values, rows):
    """(rows, …): values (n, …), and zeros."""
    return F.pad(values, (0, 0, 0, rows - len(values))) if len(values) < rows else values


def pack(sequences: Tensor, lengths: Tensor) -> PackedSequence:
    """Sequences (n, T, …) of those lengths, on the CPU, packed."""
    longest = int(lengths.max())
    if int(lengths.min()) == longest:  # as they lie: nothing of their order moves to a GPU
        rows = sequences[:, :longest].transpose(0, 1).flatten(0, 1)
        return PackedSequence(rows, torch.full((longest,), len(sequences)))
    return pack_padded_sequence(sequences, lengths, batch_first=True, enforce_sorted=False)


def make_config(name, values):
    """The configuration of the decoder of that name.

    Args:
        values: dict of its fields; those with defaults may be missing.

    Raises:
        ValueError: there is no such decoder, no such field, or a value cannot be.
    """
    fields = config_fields(name)
    if unknown := values.keys() - fields.keys():
        raise ValueError(f"decoder {name!r} has no {min(unknown)}")
    for key, field in fields.items():
        if key in values and not _can_be(values[key], field.type):
            raise ValueError(f"its {key} is {values[key]!r}")
        if key not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"it has no {key}")
    return DECODERS[name].Config(**values)


def _can_be(value, kind):
    """Whether a value is a size, a number, a text, or a tuple of sizes, as a field has them."""
    if kind is tuple:
        return type(value) is tuple and all(_can_be(item, int) for item in value)
    if kind is int:
        return type(value) is int and value >= 1
    return type(value) in ((int, float) if kind is float else (kind,))


def config_fields(name):
    """Name -> dataclasses.Field of the configuration of the decoder of that name.

    Raises:
        ValueError: there is no such decoder.
    """
    if name not in DECODERS:
        raise ValueError(f"there is no decoder {name!r}: known are {', '.join(DECODERS)}")
    return {field.name: field for field in dataclasses.fields(DECODERS[name].Config)}


def build_decoder(name, config, state=None):
    """The decoder of that name and configuration, with random weights or those of a state dict.

    Raises:
        ValueError: the weights are not those of this decoder.
    """
    if state is None:
        return DECODERS[name](config)
    try:
        with shapes_only():  # no memory yet: the sizes may be anything
            shapes = DECODERS[name](config)
        own = {key: tensor.float().contiguous() for key, tensor in state.items()}
        shapes.load_state_dict(own, assign=True)
        # once more in memory, with what is in no state dict; its weights are drawn in vain
        with torch.random.fork_rng(devices=[]):
            decoder = DECODERS[name](config)
        decoder.load_state_dict(own)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"not a decoder of this model: {in_a_line(error)}") from error
    return decoder
