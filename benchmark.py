"""Times this code against the textbook formulation of the model, side by side.

The textbook formulation, written out plainly below, is the one of the public PyTorch code for this
model: a row of annotation vectors for every caption, all projected again at every step, the
encoder run once per caption and epoch, one image captioned at a time. Both sides have the same
weights and data, and before they are timed their results are compared. Runs alternate; the
figures are medians.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import decoding
import utils
from datasets import CaptionDataset, LengthSampler, cache_features
from models import DecoderWithAttention, Encoder, caption_loss

ENCODERS = {"resnet101": "resnet101", "lite2": "timm:tf_efficientnet_lite2"}
SIZE = 14  # side of the attention's grid
VOCABULARY = 10_000  # the paper's
PER_IMAGE = 5
WORDS = 11  # of a caption that is searched for
BEAM = 5


# ------------------------------------------------------------------------------------ textbook


def textbook_attention(attention, encoder_out, h):
    """ẑ (n, D) and alphas (n, L) for encoder_out (n, L, D)."""
    projected = attention.encoder_att(encoder_out)
    query = attention.decoder_att(h)
    energies = attention.full_att(torch.relu(projected + query.unsqueeze(1))).squeeze(2)
    alphas = energies.softmax(dim=1)
    return (encoder_out * alphas.unsqueeze(2)).sum(dim=1), alphas


def textbook_step(decoder, encoder_out, embedded, h, c):
    context, alphas = textbook_attention(decoder.attention, encoder_out, h)
    context = torch.sigmoid(decoder.f_beta(h)) * context
    h, c = decoder.decode_step(torch.cat([embedded, context], dim=1), (h, c))
    return h, c, alphas


def textbook_loss(decoder, encoder_out, captions, lengths):
    """The loss of n captions; encoder_out (n, L, D) has a row for each."""
    lengths, order = lengths.sort(descending=True)
    encoder_out, captions = encoder_out[order], captions[order]
    steps = (lengths - 1).tolist()
    embedded = decoder.embedding(captions)
    mean = encoder_out.mean(dim=1)
    h, c = decoder.init_h(mean), decoder.init_c(mean)
    scores = encoder_out.new_zeros(len(captions), max(steps), decoder.fc.out_features)
    alphas = encoder_out.new_zeros(len(captions), max(steps), encoder_out.shape[1])
    for t in range(max(steps)):
        n = sum(length > t for length in steps)
        h, c, alpha = textbook_step(decoder, encoder_out[:n], embedded[:n, t], h[:n], c[:n])
        scores[:n, t] = decoder.fc(decoder.dropout(h))
        alphas[:n, t] = alpha
    scores = pack_padded_sequence(scores, steps, batch_first=True).data
    targets = pack_padded_sequence(captions[:, 1:], steps, batch_first=True).data
    return F.cross_entropy(scores, targets) + ((1 - alphas.sum(dim=1)) ** 2).mean()


@torch.no_grad()
def textbook_beam_search(decoder, encoder_out, word_map, k, max_length):
    """The words of one image's caption, encoder_out (1, L, D)."""
    encoder_out = encoder_out.expand(k, -1, -1)
    mean = encoder_out.mean(dim=1)
    h, c = decoder.init_h(mean), decoder.init_c(mean)
    words = torch.full((k, 1), word_map["<start>"], device=encoder_out.device)
    totals = torch.zeros(k, 1, device=encoder_out.device)
    finished = []
    never = [word_map[word] for word in ("<pad>", "<start>", "<unk>")]
    for step in range(max_length + 1):
        embedded = decoder.embedding(words[:, -1])
        h, c, _ = textbook_step(decoder, encoder_out[: len(words)], embedded, h, c)
        scores = F.log_softmax(decoder.fc(h), dim=1)
        scores[:, never] = -torch.inf
        if step == 0:
            scores[:, word_map["<end>"]] = -torch.inf
        scores = totals + scores
        if step == max_length:
            totals = scores[:, word_map["<end>"]]
            finished += list(zip(totals.tolist(), words[:, 1:].tolist(), strict=True))
            break
        if step == 0:
            scores = scores[:1]
        totals, places = scores.flatten().topk(k - len(finished))
        rows, chosen = places // scores.shape[1], places % scores.shape[1]
        words = torch.cat([words[rows], chosen.unsqueeze(1)], dim=1)
        for i in (chosen == word_map["<end>"]).nonzero().flatten().tolist():
            finished.append((totals[i].item(), words[i, 1:-1].tolist()))
        open_ = chosen != word_map["<end>"]
        words, totals, rows = words[open_], totals[open_].unsqueeze(1), rows[open_]
        h, c = h[rows], c[rows]
        if not len(words):
            break
    return max(finished)[1]


def textbook_input_files(paths, output, size):
    """One image after the other, as the tutorials write them."""
    with h5py.File(output, "w") as file:
        images = file.create_dataset("images", (len(paths), 3, size, size), dtype="uint8")
        for i, path in enumerate(paths):
            image = np.array(Image.open(path).resize((size, size)))
            images[i] = image.transpose(2, 0, 1)


# ---------------------------------------------------------------------------------------- data


class Scene:
    """Weights and data that both sides share.

    Args:
        options: from the command line.
        images: how many, each with `per_image` captions.
        words: mean of a caption's; their spread is that of Flickr8k, 0.35 of the mean.
    """

    def __init__(self, options, images=16, per_image=PER_IMAGE, words=10.9, vocabulary=VOCABULARY):
        self.device = options.device
        torch.manual_seed(0)
        self.grid, self.dim = {"resnet101": (8, 2048), "lite2": (8, 1280)}[options.geometry]
        self.decoder = DecoderWithAttention(
            vocabulary, self.dim, dropout=0.0, encoded_image_size=SIZE
        ).to(self.device)
        special = {"<pad>": 0, "<unk>": vocabulary - 3}
        special |= {"<start>": vocabulary - 2, "<end>": vocabulary - 1}
        self.word_map = special | {f"w{i}": i for i in range(1, vocabulary - 3)}
        with torch.no_grad():  # captions of the search all get the same length
            self.decoder.fc.bias[self.word_map["<end>"]] = -100.0
        features = torch.randn(images, self.grid, self.grid, self.dim).relu()
        self.features = features.to(self.device)
        count = images * per_image
        rng = np.random.default_rng(0)
        drawn = rng.gamma(8.2, words / 8.2, count).round().clip(1, 50)
        self.lengths = torch.from_numpy(drawn.astype(np.int64)) + 2
        self.captions = torch.randint(1, vocabulary - 3, (count, int(self.lengths.max())))
        self.captions[:, 0] = special["<start>"]
        self.captions[torch.arange(count), self.lengths - 1] = special["<end>"]
        self.captions = self.captions.to(self.device)
        self.per_image = per_image

    def pooled(self, features):
        """The textbook's annotation vectors: pooled to 14×14, (n, L, D)."""
        pooled = F.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), SIZE)
        return pooled.permute(0, 2, 3, 1).flatten(1, 2)

    def loss(self, amp=False):
        self.decoder.zero_grad(set_to_none=True)
        with autocast(self.device, amp):
            return caption_loss(*self.decoder(self.features, self.captions, self.lengths))

    def textbook_loss(self, amp=False):
        self.decoder.zero_grad(set_to_none=True)
        rows = self.features.repeat_interleave(self.per_image, dim=0)
        with autocast(self.device, amp):
            return textbook_loss(self.decoder, self.pooled(rows), self.captions, self.lengths)


def autocast(device, amp):
    return torch.autocast(device.type, torch.bfloat16, enabled=amp)
