"""One pass over the data: an epoch of training, a validation. Plain values in, plain values out."""

import math
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

import decoding
from contract import Decoder, pack
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
    loss, measured, own, sizes = 0.0, 0.0, None, None
    if len(batches) > 1:  # of all, before the first is read
        own = sum(objective.sizes(network.targets(*truth)) for _, *truth in batches)
    optimizer.zero_grad(set_to_none=True)
    for source, captions, lengths in batches:
        with network.autocast():
            read = objective.read(network, network.encode(source), captions, lengths)
            own = objective.sizes(read.targets) if own is None else own
            sizes = distributed.add_up(own.clone()) if sizes is None else sizes
            part = objective(*read, sizes=sizes)
        measured += objective.measured(read)
        _backward(part)
        loss += part.detach()
    trained = parameters(optimizer)
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
