"""What the benchmark times, by the textbook formulation and by ours."""

import copy
import json
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

import decoding
import textbook
import utils
from benchmark_data import (
    BASE,
    PER_IMAGE,
    Loss,
    Scene,
    check_equal,
    check_kernels,
    write_input_files,
)
from captioner import Captioner
from cuda_graphs import without_graphs
from datasets import CaptionDataset, LengthSampler
from engine import Network, add_gradients
from features import cache_features
from groundwork.timing import (
    Work,
    alternate,
    calls_ahead,
    count_work,
    forget_peak,
    process_peak,
)
from groundwork.wording import size_of

WORDS = 11  # of a caption that is searched for
BEAM = 5


@dataclass
class Row:
    """A line of the table; times in seconds, or bytes, `work` that of ours."""

    name: str
    target: float | None
    textbook: float
    ours: float
    work: Work | None = None
    amp: bool = False
    captions: int | None = None  # that the time is of

    @property
    def ratio(self):
        return self.textbook / self.ours

    @property
    def missed(self):
        return self.target is not None and self.ratio < self.target


def _work_of(ours):
    with without_graphs():  # of which nothing could be counted
        return count_work(ours)


# ---------------------------------------------------------------------------------- benchmarks


def step_sides(scene, settings):
    """Training steps of the decoder on features: the textbook's, and ours."""
    theirs = partial(scene.step, partial(scene.textbook, scene.features))
    return theirs, partial(scene.ours, scene.features, settings.amp)


def decoder_step(settings):
    """A training step of the decoder on features: 80 captions of 16 images."""
    scene = Scene(settings)
    theirs, _ = step_sides(scene, settings)
    check_equal(scene)
    check_kernels(scene)
    for amp, target in ((False, 14), (True, 30)):
        if amp and not settings.amp:
            continue
        ours = partial(scene.ours, scene.features, amp)
        seconds = alternate(settings.device, settings.rounds, theirs, ours)
        name = f"decoder training step, {'bfloat16' if amp else 'float32'}"
        yield Row(name, target, *seconds, _work_of(ours), amp, len(scene.captions))


def stage1_epoch(settings):
    """An epoch of stage 1, after the first, over 64 images with 5 captions, from their files."""
    scene = Scene(settings, images=64)
    parameters = list(scene.decoder.parameters())
    optimizer = torch.optim.Adam(parameters, 4e-4, fused=True)
    network = Network(scene.encoder, scene.decoder, settings.device, settings.amp)
    their_optimizer = torch.optim.Adam(parameters, 4e-4)

    with tempfile.TemporaryDirectory() as folder:
        write_input_files(scene, folder)
        with redirect_stdout(None):
            features = cache_features(scene.encoder, folder, BASE, "TRAIN", amp=settings.amp)
        data = CaptionDataset(folder, BASE, "TRAIN", features)
        loader = DataLoader(data, batch_sampler=LengthSampler(data.lengths, 16))

        def ours():
            for batch in loader:
                add_gradients(network, [batch], Loss(), parameters)
                optimizer.step()

        images = CaptionDataset(folder, BASE, "TRAIN")
        places = [(i, k) for i in range(len(images)) for k in range(PER_IMAGE)]

        def theirs():
            for chosen in torch.randperm(len(places)).split(80):
                rows = [(images[places[j][0]], places[j][1]) for j in chosen]
                their_optimizer.zero_grad(set_to_none=True)
                batch = torch.stack([source for (source, *_), _ in rows]).to(settings.device)
                captions = torch.stack([c[k] for (_, c, _), k in rows]).to(settings.device)
                lengths = torch.stack([n[k] for (*_, n), k in rows])
                with torch.no_grad():
                    encoder_out = textbook.encode(scene.encoder, batch)
                textbook.loss(scene.decoder, encoder_out, captions, lengths).backward()
                their_optimizer.step()

        seconds = alternate(settings.device, settings.slow_rounds, theirs, ours)
        count = len(scene.captions)
        yield Row(
            "stage-1 epoch after the first", 100, *seconds, _work_of(ours), settings.amp, count
        )


def finetuning_step(settings):
    """A training step of encoder and decoder: 30 captions of 6 images."""
    scene = Scene(settings, images=6)
    # cuDNN rounds to TF32 otherwise, each memory format in its own way
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        pooled, theirs = scene.encoder(scene.images), textbook.encode(scene.encoder, scene.images)
        assert (pooled.flatten(1, 2) - theirs).norm() < 1e-4 * theirs.norm()
    sides = finetuning_sides(scene, settings)
    seconds = alternate(settings.device, settings.slow_rounds, *sides)
    work, count = _work_of(sides[1]), len(scene.captions)
    yield Row("fine-tuning step", 16, *seconds, work, settings.amp, count)


def finetuning_sides(scene, settings):
    """Training steps of the decoder and an encoder that learns: the textbook's, and ours."""
    scene.encoder.fine_tune(True)
    scene.tunes_encoder = True
    scene.encoder.to(memory_format=torch.channels_last)

    def theirs():
        encoder_out = textbook.encode(scene.encoder, scene.rows(scene.images))
        return textbook.loss(scene.decoder, encoder_out, scene.captions, scene.lengths)

    return partial(scene.step, theirs), partial(scene.ours, scene.images, settings.amp)


def search_sides(scene, settings, few):
    """The textbook's search of the first `few` images, and ours of all, from features."""

    def theirs():
        return [
            textbook.beam_search(
                scene.decoder, scene.pooled(features[None]), scene.word_map, BEAM, WORDS
            )
            for features in scene.features[:few]
        ]

    @torch.inference_mode()
    def ours(amp=settings.amp):
        with scene.autocast(amp):
            return search(scene, scene.features)

    return theirs, ours


def photographs_sides(scene, settings):
    """The textbook's search of the first images, how many they are given, and ours."""

    def theirs(count):
        for image in scene.images[:count]:
            with torch.no_grad():
                encoder_out = textbook.encode(scene.encoder, image[None])
            textbook.beam_search(scene.decoder, encoder_out, scene.word_map, BEAM, WORDS)

    scene.encoder.to(memory_format=torch.channels_last)
    encoder = copy.deepcopy(scene.encoder)
    encoder.freeze(torch.bfloat16 if settings.amp else torch.float32)
    model = Captioner(
        encoder, scene.decoder, scene.word_map, 256, settings.device, settings.amp, {}
    )

    def ours(count):
        for features in model.encode_ahead(scene.images[:count].split(32)):
            with model.autocast():
                search(scene, features)

    return theirs, ours


def search(scene, features):
    return decoding.beam_search(scene.decoder, features, scene.word_map, BEAM, WORDS)


def evaluation(settings):
    """Beam search with five beams for captions of eleven words: seconds for one image, of many
    together, and of one alone."""
    count, few = 64, 4
    scene = Scene(settings, images=count)
    theirs, ours = search_sides(scene, settings, few)
    assert [caption.words for caption in ours(amp=False)[:few]] == theirs()

    from_photographs = photographs_sides(scene, settings)
    several = [partial(side, n) for side, n in zip(from_photographs, (few, count), strict=True)]
    one, batch = (partial(from_photographs[1], n) for n in (1, 32))  # encoded in this thread
    for name, target, counts, sides, counted in (
        ("evaluation from features, an image", 60, (few, count), (theirs, ours), (ours, count)),
        ("evaluation from photographs, an image", 12, (few, count), several, (batch, 32)),
        ("one photograph alone", 4, (1, 1), [partial(from_photographs[0], 1), one], (one, 1)),
    ):
        seconds = alternate(settings.device, settings.rounds, *sides)
        seconds = [own / of for own, of in zip(seconds, counts, strict=True)]
        work = _work_of(counted[0]).of_each(counted[1])
        yield Row(f"beam-5 {name}", target, *seconds, work, settings.amp, 1)


def input_files(settings):
    """Input files of small photographs, and of such as telephones take."""
    for count, width, height in ((256, 640, 480), (24, 4032, 3024)):
        with tempfile.TemporaryDirectory() as folder:
            sides = input_files_sides(Path(folder), count, width, height)
            seconds = alternate(torch.device("cpu"), settings.slow_rounds, *sides)
        yield Row(f"input files of {count} photographs, {width} × {height}", 3, *seconds)


def input_files_sides(folder, count, width, height):
    """Input files of JPEGs, which it writes into a folder: the textbook's way, and ours."""
    rng, images = np.random.default_rng(0), []
    for i in range(count):
        small = Image.fromarray(rng.integers(256, size=(48, 64, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
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

    return partial(textbook.input_files, paths, folder / "textbook.hdf5", 256), ours


# -------------------------------------------------------------------------------------- memory


def peak_memory(settings):
    """Bytes that some of the work takes at its peak beyond model and data."""
    works = [
        ("a training step", 6, _prepare_step),
        ("beam-5 evaluation from features", None, _prepare_search),
    ]
    if settings.device.type != "cuda":  # no GPU makes them
        works.append(("input files", None, _prepare_input_files))
    for name, target, prepare in works:
        measure = partial(_peak_of, settings, prepare)
        if settings.device.type == "cuda":
            theirs, ours = map(measure, (0, 1))
        else:  # a process for each, whose peak only grows
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
                theirs, ours = pool.map(measure, (0, 1))
        sizes = f"{size_of(theirs)} / {size_of(ours)}"
        yield Row(f"peak memory of {name}, {sizes}", target, theirs, ours)


def _peak_of(settings, prepare, side):
    """Of one of the two sides that `prepare` gives."""
    with tempfile.TemporaryDirectory() as folder:
        work = prepare(settings, Path(folder))[side]
        cuda = settings.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak()
        before = torch.cuda.memory_allocated() if cuda else process_peak()
        for _ in range(calls_ahead(settings.device)):  # with the memory of graphs
            work()
        return (torch.cuda.max_memory_allocated() if cuda else process_peak()) - before


def _prepare_step(settings, _):
    return step_sides(Scene(settings), settings)


def _prepare_search(settings, _):
    return search_sides(Scene(settings, images=64), settings, few=4)


def _prepare_input_files(_, folder):
    return input_files_sides(folder, 64, 640, 480)


# -------------------------------------------------------------------------------------- growth

GROWTH = {  # axis -> argument of Scene, its values
    "images in a training batch": ("images", [4, 8, 16, 32]),
    "words in a caption": ("words", [5, 11, 22]),
    "words in the vocabulary": ("vocabulary", [2_500, 10_000, 40_000]),
}


def growth(settings):
    """Axis -> values, and median seconds of textbook and ours at each."""
    found = {}
    for axis, (name, values) in GROWTH.items():
        seconds = []
        for value in values:
            scene = Scene(settings, **{name: value})
            sides = step_sides(scene, settings)
            seconds.append(alternate(settings.device, settings.slow_rounds, *sides))
        found[axis] = (values, seconds)
    counts = [1, 4, 16] + [50] * (settings.device.type == "cuda")  # one after the other in theirs
    seconds = []
    for count in counts:
        sides = search_sides(Scene(settings, images=count), settings, count)
        seconds.append(alternate(settings.device, settings.slow_rounds, *sides))
    found["images to caption"] = (counts, seconds)
    return found


# Percent of the whole time that each part takes, by which the bar tells how long it goes on: with
# the lite2 geometry and one round on two cores; ResNet-101 spends more of it in the encoder's parts
SHARES = {
    decoder_step: 12,
    stage1_epoch: 33,
    finetuning_step: 4,
    evaluation: 5,
    input_files: 2,
    peak_memory: 4,
    growth: 40,
}
