"""Times this code against the textbook formulation of the model, side by side.

The textbook formulation, written out plainly below, is the one of the public PyTorch code for this
model: a row of annotation vectors for every caption, all projected again at every step, the
encoder run once per caption and epoch, one image captioned at a time. Both sides have the same
weights and data, and before they are timed their results are compared. Runs alternate; the
figures are medians.
"""

import copy
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import checkpoints
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


def textbook_encode(encoder, images):
    """Annotation vectors (n, L, D) of uint8 images (n, 3, S, S)."""
    features = encoder.resnet((images / 255 - encoder.mean) / encoder.std)
    return textbook_pool(features)


def textbook_pool(features):
    """Annotation vectors (n, L, D) from (n, D, g, g)."""
    return F.adaptive_avg_pool2d(features, SIZE).permute(0, 2, 3, 1).flatten(1, 2)


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
    """Weights and features that both sides share.

    Captions have Flickr8k's lengths: 10.9 words on average, with a standard deviation of 3.8.

    Args:
        options: from the command line.
        images: how many, each with `PER_IMAGE` captions.
        words: mean of a caption's; the deviation grows with it.
        vocabulary: V.
    """

    def __init__(self, options, images=16, words=10.9, vocabulary=VOCABULARY):
        self.device = options.device
        torch.manual_seed(0)
        self.encoder = Encoder(ENCODERS[options.geometry], SIZE, weights=None)
        self.decoder = DecoderWithAttention(
            vocabulary, self.encoder.dim, dropout=0.0, encoded_image_size=SIZE
        )
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
        return textbook_pool(features.permute(0, 3, 1, 2))

    def ours(self, features, amp=False):
        with self.autocast(amp):
            return caption_loss(*self.decoder(features, self.captions, self.lengths))

    def textbook(self, features):
        rows = self.pooled(self.rows(features))
        return textbook_loss(self.decoder, rows, self.captions, self.lengths)

    def step(self, loss):
        """Gradients of what loss() gives; returns its value."""
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
    losses, sides = [], []
    for side in (scene.textbook, scene.ours):
        losses.append(scene.step(partial(side, features)))
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


# -------------------------------------------------------------------------------------- timing


@dataclass
class Row:
    """A line of the table; times in seconds, `work` that of ours."""

    name: str
    target: float | None
    textbook: float
    ours: float
    work: "Work | None" = None
    amp: bool = False

    @property
    def ratio(self):
        return self.textbook / self.ours


def alternate(device, rounds, *functions, best=False):
    """Median seconds of each function, or the fewest, called in turn `rounds` times after a call
    unmeasured."""
    seconds = [[] for _ in functions]
    for i in range(rounds + 1):
        for function, times in zip(functions, seconds, strict=True):
            synchronize(device)
            started = time.perf_counter()
            function()
            synchronize(device)
            if i:
                times.append(time.perf_counter() - started)
    return [min(times) if best else statistics.median(times) for times in seconds]


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Work(NamedTuple):
    """What a function has the device do."""

    flops: float  # of matrix products and convolutions
    bytes: float  # that all other operations read and write

    def of_each(self, count):
        return Work(self.flops / count, self.bytes / count)


class Speeds(NamedTuple):
    """What the device can do in a second."""

    flops: dict[bool, float]  # by amp: in bfloat16, and in float32
    bytes: float

    def limit(self, work, amp):
        """Seconds that the work takes at these speeds, one operation after the other: a roofline.

        Kernels that fuse element-wise operations would move fewer bytes.
        """
        return work.flops / self.flops[amp] + work.bytes / self.bytes


def count_work(function):
    """The `Work` of function()."""
    with FlopCounterMode(display=False) as counter, _Traffic() as traffic:
        function()
    return Work(counter.get_total_flops(), traffic.bytes)


class _Traffic(TorchDispatchMode):
    """Counts the bytes that operations other than matrix products read and write."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        name = packet.__name__
        if not (function.is_view or packet in flop_registry or name.startswith(("empty", "new_e"))):
            leaves = tree_leaves((args, kwargs, result))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            if name.startswith(("index", "gather", "scatter")) or name == "embedding":
                # touches as much of the large tensor as the small one has
                sizes = [t.nbytes for t in tensors if t.is_floating_point()]
                self.bytes += 3 * min(sizes, default=0)
            else:
                self.bytes += sum(t.nbytes for t in tensors)
        return result


def measure_speeds(options):
    """`Speeds`: the best of ten large products, and of a hundred sums of tensors in the cache."""
    device, flops = options.device, {}
    for amp in {False, options.amp}:
        dtype = torch.bfloat16 if amp else torch.float32
        a, b = (torch.randn(4096, 4096, device=device, dtype=dtype) for _ in range(2))
        flops[amp] = 2 * 4096**3 / alternate(device, 10, partial(torch.mm, a, b), best=True)[0]
    size = 2**28 if device.type == "cuda" else 2**18
    a, b, out = (torch.zeros(size, device=device) for _ in range(3))
    [seconds] = alternate(device, 100, partial(torch.add, a, b, out=out), best=True)
    return Speeds(flops, 12 * size / seconds)


# ---------------------------------------------------------------------------------- benchmarks


def decoder_step(options):
    """A training step of the decoder on features: 80 captions of 16 images."""
    scene = Scene(options)
    textbook = partial(scene.step, lambda: scene.textbook(scene.features))
    check_equal(scene)
    for amp, target in ((False, 8), (True, 15)):
        if amp and not options.amp:
            continue
        ours = partial(scene.step, lambda amp=amp: scene.ours(scene.features, amp))
        seconds = alternate(options.device, options.rounds, textbook, ours)
        name = f"decoder training step, {'bfloat16' if amp else 'float32'}"
        yield Row(name, target, *seconds, count_work(ours), amp)


def stage1_epoch(options):
    """An epoch of stage 1, after the first, over 64 images with 5 captions, from their files."""
    scene = Scene(options, images=64)
    parameters = list(scene.decoder.parameters())
    optimizer = torch.optim.Adam(parameters, 4e-4, fused=True)
    textbook_optimizer = torch.optim.Adam(parameters, 4e-4)

    with tempfile.TemporaryDirectory() as folder:
        write_input_files(scene, folder)
        with redirect_stdout(None):
            features = cache_features(scene.encoder, folder, BASE, "TRAIN", amp=options.amp)
        data = CaptionDataset(folder, BASE, "TRAIN", features)
        loader = DataLoader(data, batch_sampler=LengthSampler(data.lengths, 16))

        def ours():
            for source, captions, lengths in loader:
                optimizer.zero_grad(set_to_none=True)
                source, captions = source.to(options.device), captions.to(options.device)
                with scene.autocast(options.amp):
                    outputs = scene.decoder(source, captions.flatten(0, 1), lengths.flatten())
                    loss = caption_loss(*outputs)
                loss.backward()
                optimizer.step()

        images = CaptionDataset(folder, BASE, "TRAIN")
        places = [(i, k) for i in range(len(images)) for k in range(PER_IMAGE)]

        def textbook():
            for chosen in torch.randperm(len(places)).split(80):
                rows = [(images[places[j][0]], places[j][1]) for j in chosen]
                textbook_optimizer.zero_grad(set_to_none=True)
                batch = torch.stack([source for (source, *_), _ in rows]).to(options.device)
                captions = torch.stack([c[k] for (_, c, _), k in rows]).to(options.device)
                lengths = torch.stack([n[k] for (*_, n), k in rows])
                with torch.no_grad():
                    encoder_out = textbook_encode(scene.encoder, batch)
                textbook_loss(scene.decoder, encoder_out, captions, lengths).backward()
                textbook_optimizer.step()

        seconds = alternate(options.device, options.slow_rounds, textbook, ours)
        yield Row("stage-1 epoch after the first", 50, *seconds, count_work(ours), options.amp)


def finetuning_step(options):
    """A training step of encoder and decoder: 30 captions of 6 images."""
    scene = Scene(options, images=6)
    with torch.no_grad():
        ours, theirs = scene.encoder(scene.images), textbook_encode(scene.encoder, scene.images)
        assert (ours.flatten(1, 2) - theirs).norm() < 1e-4 * theirs.norm()
    scene.encoder.fine_tune(True)

    def ours(amp=options.amp):
        with scene.autocast(amp):
            features = scene.encoder.features(scene.images)
        return scene.ours(features, amp)

    def textbook():
        encoder_out = textbook_encode(scene.encoder, scene.rows(scene.images))
        return textbook_loss(scene.decoder, encoder_out, scene.captions, scene.lengths)

    textbook_step, ours_step = partial(scene.step, textbook), partial(scene.step, ours)
    scene.encoder.to(memory_format=torch.channels_last)
    seconds = alternate(options.device, options.slow_rounds, textbook_step, ours_step)
    yield Row("fine-tuning step", 4, *seconds, count_work(ours_step), options.amp)


def search_sides(scene, options, few):
    """The textbook's search of the first `few` images, and ours of all, from features."""

    def textbook():
        return [
            textbook_beam_search(
                scene.decoder, scene.pooled(features[None]), scene.word_map, BEAM, WORDS
            )
            for features in scene.features[:few]
        ]

    @torch.inference_mode()
    def ours(amp=options.amp):
        with scene.autocast(amp):
            return search(scene, scene.features)

    return textbook, ours


def search(scene, features):
    return decoding.beam_search(scene.decoder, features, scene.word_map, BEAM, WORDS)


def evaluation(options):
    """Beam search with five beams for captions of eleven words: seconds for one image."""
    count, few = 64, 4
    scene = Scene(options, images=count)
    textbook, ours = search_sides(scene, options, few)
    assert [caption.words for caption in ours(amp=False)[:few]] == textbook()

    def textbook_from_photographs():
        for image in scene.images[:few]:
            with torch.no_grad():
                encoder_out = textbook_encode(scene.encoder, image[None])
            textbook_beam_search(scene.decoder, encoder_out, scene.word_map, BEAM, WORDS)

    encoder = copy.deepcopy(scene.encoder).to(memory_format=torch.channels_last)
    encoder.fold_batch_norm()
    model = checkpoints.Model(
        encoder, scene.decoder, scene.word_map, {}, options.device, options.amp
    )

    def ours_from_photographs():
        for features in model.encode_ahead(scene.images.split(32)):
            with model.autocast():
                search(scene, features)

    scene.encoder.to(memory_format=torch.channels_last)
    for source, target, *sides in (
        ("features", 30, textbook, ours),
        ("photographs", 8, textbook_from_photographs, ours_from_photographs),
    ):
        seconds = alternate(options.device, options.rounds, *sides)
        name = f"beam-5 evaluation from {source}, an image"
        work = count_work(sides[1]).of_each(count)
        yield Row(name, target, seconds[0] / few, seconds[1] / count, work, options.amp)


def input_files(options):
    """Input files from 256 photographs of 640×480 pixels."""
    count = 256
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        folder, images = Path(folder), []
        for i in range(count):
            small = Image.fromarray(rng.integers(256, size=(48, 64, 3), dtype=np.uint8))
            small.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
            sentences = [{"tokens": ["a", "dog"]}] * PER_IMAGE
            split = "train" if i else "val"
            images.append({"filename": f"{i}.jpg", "split": split, "sentences": sentences})
        (folder / "karpathy.json").write_text(json.dumps({"images": images}))
        paths = [folder / image["filename"] for image in images]

        def ours():
            with redirect_stdout(None):
                utils.create_input_files(
                    "flickr8k", folder / "karpathy.json", folder, output_folder=folder / "ours"
                )

        def textbook():
            textbook_input_files(paths, folder / "textbook.hdf5", 256)

        seconds = alternate(torch.device("cpu"), options.slow_rounds, textbook, ours)
        yield Row(f"input files of {count} photographs", None, *seconds)


BASE = "benchmark_5_cap_per_img_0_min_word_freq"


def write_input_files(scene, folder):
    """The scene's images and captions as the files that training reads."""
    with utils.new_hdf5(utils.input_path(folder, BASE, "IMAGES", "TRAIN")) as file:
        file["images"] = scene.images.cpu().numpy()
    contents = {
        ("CAPTIONS", "TRAIN"): scene.captions.tolist(),
        ("CAPLENS", "TRAIN"): scene.lengths.tolist(),
        ("REFERENCES", "TRAIN"): [{"filename": "", "id": 0, "captions": ["a"]}] * len(scene.images),
        ("WORDMAP", None): scene.word_map,
    }
    for (kind, split), value in contents.items():
        utils.input_path(folder, BASE, kind, split).write_text(json.dumps(value))


# -------------------------------------------------------------------------------------- memory


def peak_memory(options):
    """Bytes that a decoder training step takes at its peak beyond model and data: both sides."""
    if options.device.type == "cuda":
        return [_peak_of_step(options, side) for side in ("textbook", "ours")]
    found = []
    for side in ("textbook", "ours"):  # a process for each, whose peak only grows
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(_peak_of_step, options, side).result())
    return found


def _peak_of_step(options, side):
    scene = Scene(options)
    amp = {"amp": options.amp} if side == "ours" else {}
    cuda = options.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()
    before = torch.cuda.memory_allocated() if cuda else process_peak()
    scene.step(lambda: getattr(scene, side)(scene.features, **amp))
    return (torch.cuda.max_memory_allocated() if cuda else process_peak()) - before


def forget_peak():
    """Makes the memory in use now the peak, on Linux."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def process_peak():
    """Bytes of memory that the process has taken at most."""
    try:  # not as getrusage has it, which counts in the process that started this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except FileNotFoundError:  # elsewhere than on Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


# -------------------------------------------------------------------------------------- growth

GROWTH = {  # axis -> argument of Scene, its values
    "images in a training batch": ("images", [4, 8, 16, 32]),
    "words in a caption": ("words", [5, 11, 22]),
    "words in the vocabulary": ("vocabulary", [2_500, 10_000, 40_000]),
}


def growth(options):
    """Axis -> values, and median seconds of textbook and ours at each."""
    found = {}
    for axis, (name, values) in GROWTH.items():
        seconds = []
        for value in values:
            scene = Scene(options, **{name: value})
            textbook = partial(scene.step, partial(scene.textbook, scene.features))
            ours = partial(scene.step, partial(scene.ours, scene.features, options.amp))
            seconds.append(alternate(options.device, options.slow_rounds, textbook, ours))
        found[axis] = (values, seconds)
    counts = [1, 4, 16]
    seconds = []
    for count in counts:
        sides = search_sides(Scene(options, images=count), options, count)
        seconds.append(alternate(options.device, options.slow_rounds, *sides))
    found["images to caption"] = (counts, seconds)
    return found


# -------------------------------------------------------------------------------------- report


def describe(options, speeds, rows, memory):
    """The table in Markdown, and what it was measured on."""
    device = (
        torch.cuda.get_device_name(options.device)
        if options.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    products = ", ".join(
        f"{flops / 1e9:,.0f} GFLOP/s in {'bfloat16' if amp else 'float32'}"
        for amp, flops in speeds.flops.items()
    )
    lines = [
        f"{options.geometry} geometry, {device}, PyTorch {torch.__version__}; large products "
        f"of matrices run at {products}, sums of tensors at {speeds.bytes / 1e9:,.0f} GB/s.",
        "",
        "| | textbook / ours | at least | of the matrix products' speed | of the roofline |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        shares = "| | |"
        if row.work:
            product = row.work.flops / speeds.flops[row.amp] / row.ours
            shares = f"| {product:.0%} | {speeds.limit(row.work, row.amp) / row.ours:.0%} |"
        target = f"{row.target}×" if row.target else ""
        lines.append(f"| {row.name} | {row.ratio:.1f}× | {target} {shares}")
    textbook, ours = memory
    lines.append(
        f"| peak memory of a training step, {textbook / 2**20:.0f} / {ours / 2**20:.0f} MiB "
        f"| {textbook / ours:.1f}× | 3× | | |"
    )
    return "\n".join(lines)


def draw(rows, grown):
    """Bars of the ratios, and how the times of both sides grow along each axis."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.2])
    bars = left.subplots()
    names = [f"{textwrap.fill(row.name, 26)}: {row.ratio:.1f}×" for row in rows]
    bars.barh(names, [row.ratio for row in rows], color="#4c72b0", label="measured")
    goals = [(row.target, i) for i, row in enumerate(rows) if row.target]
    bars.scatter(*zip(*goals, strict=True), color="black", marker="|", s=300, label="goal")
    bars.set_xscale("log")
    bars.set_xlim(0.8, 1.5 * max(row.ratio for row in rows))
    bars.xaxis.set_major_formatter("{x:g}×")
    bars.invert_yaxis()
    bars.set_title("times faster than the textbook formulation", loc="left")
    bars.spines[["top", "right"]].set_visible(False)
    bars.legend(loc="lower right", frameon=False, markerscale=0.5)
    for axes, (axis, (values, seconds)) in zip(
        right.subplots(2, 2).flat, grown.items(), strict=True
    ):
        for label, times in zip(("textbook", "ours"), zip(*seconds, strict=True), strict=True):
            relative = [time / seconds[0][1] for time in times]
            axes.plot(values, relative, "o-", label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(values, [f"{value:,}" for value in values], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlabel(axis)
        axes.set_ylabel("time, relative to our least")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def parse_arguments():
    parser = utils.Parser(description=__doc__)
    positive = utils.number(int, above=0)
    add = parser.add_argument
    add("--geometry", choices=list(ENCODERS), default="resnet101", help="of encoder and features")
    add("--rounds", type=positive, default=5, help="of which the median is taken")
    add("--slow_rounds", type=positive, default=3, help="likewise, where the encoder runs")
    add("--output_folder", default="benchmark", help="for table and picture")
    utils.add_device_options(parser)
    options = parser.parse_args()
    options.device = utils.choose_device(options.device)
    options.amp = options.amp == "auto" and utils.has_fast_bfloat16(options.device)
    return options


def main():
    options = parse_arguments()
    folder = utils.make_folder(options.output_folder)
    speeds = measure_speeds(options)
    rows = []
    for benchmark in (decoder_step, stage1_epoch, finetuning_step, evaluation, input_files):
        for row in benchmark(options):
            print(f"{row.name}: {row.ratio:.1f}×", flush=True)
            rows.append(row)
    memory, grown = peak_memory(options), growth(options)
    report = describe(options, speeds, rows, memory)
    print(report)
    with utils.atomic_write(folder / f"benchmark_{options.geometry}.md") as temporary:
        temporary.write_text(report + "\n", encoding="utf-8")
    with utils.atomic_write(folder / f"benchmark_{options.geometry}.png") as temporary:
        draw(rows, grown).savefig(temporary, format="png", dpi=110)


if __name__ == "__main__":
    utils.run(main)
