"""What both sides of the benchmark are given, and that they compute the same."""

import json
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import kernels
import textbook
from encoders import OFFLINE_ENCODER, Encoder
from engine import Network, add_gradients
from groundwork.hdf5 import new_hdf5
from input_files import input_path
from models import DecoderWithAttention, LSTMConfig
from objectives import CrossEntropy
from textbook import SIZE

ENCODERS = {"resnet101": "resnet101", "lite2": OFFLINE_ENCODER}
VOCABULARY = 10_000  # the paper's
PER_IMAGE = 5
BASE = "benchmark_5_cap_per_img_0_min_word_freq"


@dataclass(frozen=True)
class Settings:
    """How the benchmark is run."""

    geometry: str  # of `ENCODERS`
    device: torch.device
    amp: bool  # ours in bfloat16
    rounds: int  # of which the median is taken
    slow_rounds: int  # likewise, where the encoder runs


@dataclass(frozen=True)
class Loss(CrossEntropy):
    """Ours, without the accuracy that training shows, which the textbook's has not."""

    def measured(self, read):
        return read.scores.data.new_zeros((), dtype=torch.float32)


class Scene:
    """Weights and features that both sides share.

    Captions have Flickr8k's lengths: 10.9 words on average, with a standard deviation of 3.8.

    Args:
        settings: `Settings`, of which it takes geometry and device.
        images: how many, each with `PER_IMAGE` captions.
        words: mean of a caption's; the deviation grows with it.
        vocabulary: V.
    """

    def __init__(self, settings, images=16, words=10.9, vocabulary=VOCABULARY):
        self.device = settings.device
        torch.manual_seed(0)
        self.tunes_encoder = False
        self.encoder = Encoder(ENCODERS[settings.geometry], SIZE, weights=None)
        config = LSTMConfig(vocabulary, self.encoder.dim, dropout=0.0, encoded_image_size=SIZE)
        self.decoder = DecoderWithAttention(config)
        names = ["<pad>", *(f"w{i}" for i in range(vocabulary - 4)), "<unk>", "<start>", "<end>"]
        self.word_map = {name: i for i, name in enumerate(names)}
        with torch.no_grad():  # every caption that is searched for is as long as it may be
            self.decoder.fc.bias[-1] = -100.0
        count = images * PER_IMAGE
        drawn = np.random.default_rng(0).gamma(8.2, words / 8.2, count)
        self.lengths = torch.from_numpy(drawn.round().clip(1, 50).astype(np.int64)) + 2
        self.captions = torch.randint(1, vocabulary - 3, (count, int(self.lengths.max())))
        self.captions[:, 0] = vocabulary - 2
        self.images = torch.randint(256, (images, 3, 256, 256), dtype=torch.uint8)
        self.features = torch.randn(images, 8, 8, self.encoder.dim).relu()
        for name in ("encoder", "decoder", "captions", "images", "features"):
            setattr(self, name, getattr(self, name).to(self.device))

    def autocast(self, amp):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=amp)

    def rows(self, per_image):
        """A row for each caption, of what there is for each image."""
        return per_image.repeat_interleave(PER_IMAGE, dim=0)

    def pooled(self, features):
        """The textbook's annotation vectors (n, L, D), from (n, g, g, D)."""
        return textbook.pool(features.permute(0, 3, 1, 2))

    def ours(self, source, amp=False):
        """Gradients by our training step, of images or their features; returns the loss."""
        trained = [p for part in (self.decoder, self.encoder) for p in part.parameters()]
        network = Network(self.encoder, self.decoder, self.device, amp, self.tunes_encoder)
        captions = self.captions.view(-1, PER_IMAGE, self.captions.shape[1])
        batch = source, captions, self.lengths.view(-1, PER_IMAGE)
        return add_gradients(network, [batch], Loss(), trained)[0]

    def textbook(self, features):
        """The textbook's loss."""
        rows = self.pooled(self.rows(features))
        return textbook.loss(self.decoder, rows, self.captions, self.lengths)

    def step(self, loss):
        """The textbook's training step: gradients of what loss() gives; returns its value."""
        self.encoder.zero_grad(set_to_none=True)
        self.decoder.zero_grad(set_to_none=True)
        loss = loss()
        loss.backward()
        return loss.detach()

    def gradients(self):
        parameters = [*self.decoder.named_parameters(), *self.encoder.named_parameters()]
        return {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def check_equal(scene):
    """Raises AssertionError unless loss and every gradient agree in float32.

    Where the textbook's own gradient is uncertain by more than 1e-4, as rounding cancels out in
    the attention's, ours must be about as near to the gradient in float64.
    """
    features = scene.features
    theirs = partial(scene.step, partial(scene.textbook, features))
    losses, sides = [], []
    # ours three times, as a GPU replays its graphs then
    for side, times in ((theirs, 1), (partial(scene.ours, features), 3)):
        for _ in range(times):
            loss = side()
        losses.append(loss)
        sides.append(scene.gradients())
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    scene.decoder.double()
    scene.step(partial(scene.textbook, features.double()))
    exact = scene.gradients()
    scene.decoder.float()
    for name, gradient in exact.items():
        size = gradient.norm().clamp_min(1e-4)  # the attention's last bias has none: it cancels
        theirs, ours = ((side[name] - gradient).norm() / size for side in sides)
        assert ours < max(1e-4, 2 * theirs), f"{name}: {ours} apart, the textbook {theirs}"


def write_input_files(scene, folder):
    """The scene's images and captions as the files that training reads."""
    with new_hdf5(input_path(folder, BASE, "IMAGES", "TRAIN")) as file:
        file["images"] = scene.images.cpu().numpy()
    contents = {
        ("CAPTIONS", "TRAIN"): scene.captions.tolist(),
        ("CAPLENS", "TRAIN"): scene.lengths.tolist(),
        ("REFERENCES", "TRAIN"): [{"filename": "", "id": 0, "captions": ["a"]}] * len(scene.images),
        ("WORDMAP", None): scene.word_map,
    }
    for (kind, split), value in contents.items():
        input_path(folder, BASE, kind, split).write_text(json.dumps(value))


def check_kernels(scene):
    """Raises AssertionError unless each of `kernels` gives what its plain formula gives, in
    float32, on the scene's shapes."""
    decoder, per_image = scene.decoder, PER_IMAGE
    with torch.no_grad():
        vectors = textbook.pool(scene.features.permute(0, 3, 1, 2))
        projected = decoder.attention.encoder_att(vectors)
        slots = torch.arange(len(vectors) * per_image, device=scene.device)
        query = torch.randn(len(slots), projected.shape[2], device=scene.device)
        w, images = decoder.attention.full_att.weight[0], slots // per_image
        energies = kernels.plain_energies(projected, query, w, images)
        alphas = energies.softmax(dim=1)
        scores = torch.randn(len(slots), decoder.config.vocab_size, device=scene.device)
        targets = scene.captions[:, 1]
        pairs = [
            (kernels.Energies(projected, w)(query, images), energies),
            (
                kernels.context(vectors, alphas, slots, per_image),
                kernels.plain_context(vectors, alphas, slots, per_image),
            ),
            (kernels.missed(scores, targets, 0.1), kernels.plain_missed(scores, targets, 0.1)),
            (
                kernels.pooling_matrix(8, SIZE).to(vectors) @ scene.features.flatten(1, 2),
                kernels.plain_pool(scene.features, SIZE).flatten(1, 2),
            ),
            (kernels.Product(w[None], len(query))(query), kernels.plain_product(query, w[None])),
        ]
    for fast, plain in pairs:
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)
