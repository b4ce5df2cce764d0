"""One pass over the data: an epoch of training, a validation. Plain values in, plain values out."""

import math
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import decoding
from contract import Decoder, forward_whole, pack
from cuda_graphs import give_gradients, graphed, graphs_on
from encoders import Encoder
from groundwork import distributed
from groundwork.devices import autocast
from groundwork.errors import UserError


@dataclass
class Network:
    """Encoder and decoder as they are run together."""

    encoder: Encoder
    decoder: Decoder
    device: torch.device
    amp: bool  # compute in bfloat16
    tunes_encoder: bool = False  # whether gradients reach it

    def autocast(self):
        """The context in which it computes."""
        return autocast(self.device, self.amp)

    def encode(self, source):
        """Features (I, g, g, D): of images, uint8 (I, 3, S, S), or as they come from the cache."""
        source = source.to(self.device, non_blocking=True)
        if source.dtype != torch.uint8:
            return source
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.tunes_encoder):
            return self.encoder.features(source)

    def read(self, features, captions, lengths):
        """What the decoder makes of true captions: a `contract.Forward`.

        Args:
            features: (I, g, g, D) from `encode`.
            captions, lengths: int64 (I, K, T) and (I, K), from `datasets.CaptionDataset`.
        """
        captions = captions.flatten(0, 1).to(self.device, non_blocking=True)
        return self.decoder(features, captions, lengths.flatten())

    def replays(self, objective):
        """Whether training steps compute the decoder's part in CUDA graphs."""
        if not graphs_on(self.device) or torch.is_anomaly_enabled():
            return False
        # nor where runs are to end alike: a replay may differ from a first call in its last digits,
        # and which steps are replays depends on where a run has begun
        exact = torch.are_deterministic_algorithms_enabled()
        fixed = getattr(objective, "fixed", None)  # one that does not say so is not recorded
        return not exact and fixed is not None and fixed(self.decoder)

    def targets(self, captions, lengths):
        """The words to predict of true captions, packed as in `contract.Forward`."""
        captions = captions.flatten(0, 1).to(self.device, non_blocking=True)
        return pack(captions[:, 1:], lengths.flatten().cpu() - 1)

    def trained(self, finetune, tune_from=8):
        """The parameters that training changes, as lists: the decoder's, and the encoder's, too,
        from the stages of stride `tune_from` on, where it is fine-tuned."""
        self.tunes_encoder = finetune
        self.encoder.fine_tune(finetune, tune_from)
        parts = [self.decoder, *([self.encoder] if finetune else [])]
        return [[p for p in part.parameters() if p.requires_grad] for part in parts]


class Means:
    """Means of the loss and of what the objective measures beside it.

    Args:
        measure: of the objective, as `CrossEntropy.measure`.
    """

    def __init__(self, measure="top5"):
        self.measure, self.count, self.sums = measure, 0, {"loss": 0.0, measure: 0.0}

    def add(self, count, **values):
        self.count += count
        for name, value in values.items():
            self.sums[name] += count * value

    def add_up(self, device):
        """The means over what all processes have found."""
        values = torch.tensor([self.count, *self.sums.values()], dtype=torch.float64)
        count, *sums = distributed.add_up(values.to(device)).tolist()
        total = Means(self.measure)
        total.load({"count": count, "sums": dict(zip(self.sums, sums, strict=True))})
        return total

    def state(self):
        return {"count": self.count, "sums": self.sums}

    def load(self, state):
        self.count, self.sums = state["count"], dict(state["sums"])

    def __getitem__(self, name):
        return self.sums[name] / self.count if self.count else math.nan


def parameters(optimizer):
    """The list of those that an optimizer changes."""
    return [p for group in optimizer.param_groups for p in group["params"]]


# ------------------------------------------------------------------------------------- training


class AnomalyError(UserError):
    """A gradient is not a number, and which operation made it."""


class Step(NamedTuple):
    """What has come of a training step, by all processes together."""

    loss: float
    fault: str | None  # why it was skipped: weights and optimizer are as before
    flags: list[bool]  # whether any process raised them


def train_epoch(
    network, batches, objective, optimizer, grad_clip, means, flags, after_step, accumulate=1
):
    """Updates the weights once a batch, or once so many.

    Args:
        network: a `Network`.
        batches: (source, captions, lengths) each, this process's share of them.
        objective: see `objectives`.
        optimizer: of the parameters to train.
        grad_clip: largest size of a gradient's element.
        means: `Means`, to which the steps' loss and what the objective measures are added.
        flags: called before each step; a list of bool to share among the processes.
        after_step: called with each `Step`.
        accumulate: batches of a step; the last has those that remain.

    Raises:
        AnomalyError: anomaly detection is on and has found the operation.
    """
    network.decoder.train()
    batches = iter(batches)
    while group := list(islice(batches, accumulate)):
        after_step(train_step(network, group, objective, optimizer, grad_clip, means, flags()))


def train_step(network, batches, objective, optimizer, grad_clip, means, flags):
    """One update, if loss and gradients are finite: a `Step`.

    The gradients of several batches add up to that of one batch that holds them all, as each has
    its part of the loss; an attention's moving baseline alone moves with each.
    """
    trained = parameters(optimizer)
    loss, measured, own = add_gradients(network, batches, objective, trained)
    distributed.add_up_gradients(trained)
    gradients = [p.grad for p in trained if p.grad is not None]
    largest = nn.utils.get_total_norm(gradients, math.inf)
    news = distributed.add_up(torch.stack([loss, largest, *loss.new_tensor(flags)]))
    # in one message, as the host waits for the device here
    mine = torch.stack([own[0], measured])
    value, largest, *flags, count, measured = torch.cat([news, mine]).tolist()
    fault = None
    if math.isfinite(value) and math.isfinite(largest):
        nn.utils.clip_grad_value_(trained, grad_clip)
        optimizer.step()
        means.add(int(count), **{"loss": value, objective.measure: measured / count})
    else:
        fault = "a gradient is not finite" if math.isfinite(value) else f"the loss is {value}"
    return Step(value, fault, [bool(flag) for flag in flags])


def add_gradients(network, batches, objective, trained):
    """Makes the gradients of a step's loss, of this process's batches.

    Args:
        network, batches, objective: as `train_step` takes them.
        trained: the parameters; what gradients they had is lost.

    Returns:
        the loss, a scalar; what the objective has measured; and its sizes of these batches.
    """
    loss, measured, own, sizes = 0.0, 0.0, None, None
    replays = network.replays(objective)
    for parameter in trained:
        parameter.grad = None
    if replays:
        give_gradients(network.decoder)
    together = len(batches) > 1 or (replays and distributed.world_size > 1)
    if together:  # of all, before the first is read; in a graph processes cannot add up
        own = sum(objective.sizes(network.targets(*truth)) for _, *truth in batches)
        sizes = distributed.add_up(own.clone())
    compute = _replay if replays else _of_batch
    for batch in batches:
        part, found, own = compute(network, batch, objective, own, sizes)
        loss += part
        measured += found
    return loss, measured, own


def _of_batch(network, batch, objective, own, sizes):
    """Adds the gradients of a batch's part of the loss.

    Args:
        own, sizes: `objective.sizes` of all the step's batches, of this process and of all; None
            where this is the only one, and they are what it has.

    Returns:
        the part of the loss, what the objective has measured, and `own`.
    """
    source, captions, lengths = batch

    def read():
        return objective.read(network, network.encode(source), captions, lengths)

    return _learn_from(read, objective, own, sizes, network.autocast())


def _learn_from(read, objective, own, sizes, precision):
    """Adds the gradients of what read() gives, computed in the context `precision`; the rest is as
    in `_of_batch`."""
    with precision:
        made = read()
        if sizes is None:
            own = objective.sizes(made.targets)
            sizes = distributed.add_up(own.clone())
        loss = objective(*made, sizes=sizes)
    measured = objective.measured(made)
    del made  # the scores' memory is free in the backward pass
    _backward(loss)
    return loss.detach(), measured, own


WORDS = 4  # to a multiple of which captions are filled up that are computed in one CUDA graph


def _replay(network, batch, objective, own, sizes):
    """As `_of_batch`, the decoder's part in a CUDA graph."""
    source, captions, lengths = batch
    with network.autocast():
        features = network.encode(source)
    captions = captions.flatten(0, 1).to(network.device, non_blocking=True)
    longest = int(lengths.max())
    captions = F.pad(captions, (0, longest + -longest % WORDS - captions.shape[1]))
    ends = lengths.flatten().to(network.device, non_blocking=True)
    given = features.detach(), captions, ends, own, sizes
    options = objective, features.requires_grad, network.device, network.amp
    with graphed(_decoder_gradients, network.decoder) as compute:
        _, (*found, of_features) = compute(None, (*given, *options))
    if of_features is not None:
        features.backward(of_features)
    return found


def _decoder_gradients(decoder, _, given):
    """What is computed in a CUDA graph: as `_of_batch`, and the gradient of the features, where one
    is asked for."""
    features, captions, lengths, own, sizes, objective, tunes, device, amp = given
    features = features.detach().requires_grad_(tunes)
    read = partial(forward_whole, decoder, features, captions, lengths)
    found = _learn_from(read, objective, own, sizes, autocast(device, amp))
    return None, (*found, features.grad)


def _backward(loss):
    try:
        loss.backward()
    except RuntimeError as error:
        if "returned nan values" not in str(error):  # what anomaly detection looks for
            raise
        raise AnomalyError(f"{error} The warning above shows where it was called") from error


# ----------------------------------------------------------------------------------- validation


class Greedy(NamedTuple):
    """A caption decoded greedily."""

    words: list[str]
    alphas: Tensor | None  # (T, L)


@torch.inference_mode()
def validate(network, batches, objective, word_map, with_alphas=()):
    """Loss and accuracy with teacher forcing, and free captions, of all processes together.

    Args:
        network: as in `train_epoch`.
        objective: a `CrossEntropy`.
        batches: (source, captions, lengths) each, this process's share of them: see
            `distributed.share`.
        word_map: word -> index.
        with_alphas: numbers of the images whose captions keep their alphas.

    Returns:
        the loss, which does not depend on how the split is cut into batches; the top-5 accuracy;
        and a `Greedy` caption for each image of the split.
    """
    words = {index: word for word, index in word_map.items()}
    sums, right, captions = torch.zeros(2, 2, dtype=torch.float64), 0.0, []
    network.decoder.eval()
    for source, *truth in batches:
        with network.autocast():
            features = network.encode(source)
            with network.decoder.prepared(features):
                read = objective.read(network, features, *truth)
                longest = max(decoding.MAX_LENGTH, truth[0].shape[2] - 2)  # as people's are
                decoded = decoding.greedy(network.decoder, features, word_map, max_length=longest)
            sums += objective.sums(*read[:3])
        right += objective.measured(read).item()
        for caption in decoded:
            # the number that `distributed.share` gives it
            image = distributed.rank + distributed.world_size * len(captions)
            alphas = caption.alphas if image in with_alphas else None
            captions.append(Greedy([words[w] for w in caption.words], alphas))
    total = torch.cat([sums.flatten(), torch.tensor([right], dtype=torch.float64)])
    total = distributed.add_up(total.to(network.device)).cpu()
    sums, right = total[:4].view(2, 2), float(total[4])
    return objective.of(sums), right / float(sums[0, 1]), distributed.collect(captions)
