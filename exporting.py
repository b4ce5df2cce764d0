"""A trained captioner as two graphs that leave Python: what `torch.export` traces, written as ONNX,
also in int8, or compiled by AOTInductor. `exported` runs them, and says what goes in and comes out.

The graphs are of the formulas: of the fast energies the plain ones take the place.
"""

import logging
import os
import shutil
import sys
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import kernels
from constraints import MAX_LENGTH
from exported import ABOUT, ENDINGS, GRAPHS
from groundwork.errors import UserError, in_a_line
from groundwork.files import (
    flush,
    flush_folder,
    os_errors_as_user_errors,
    temporaries,
    write_json,
)
from word_rules import unsayable

# Sizes of the example that is traced, none 0 or 1, which would be taken for what always is
IMAGES, BEAMS, WORDS = 2, 3, 4
ONE_FILE = 2**31 - 2**20  # bytes of weights that an ONNX file holds; more lie in a file beside it


def _is_fast(value):
    return isinstance(value, kernels.Energies)


class Layout:
    """Which tensors of a memory, or of a state, belong to single images, or rows: those of which
    its `select` gives others. What remains, as weights laid out anew, is the graph's own.

    Args:
        whole: the `contract.Selectable`.
    """

    def __init__(self, whole):
        values, self.spec = tree_flatten(whole, is_leaf=_is_fast)
        fast = list(map(_is_fast, values))
        some = tree_leaves(whole.select(torch.arange(1)), is_leaf=_is_fast)
        self.own = [a is not b and not f for a, b, f in zip(values, some, fast, strict=True)]
        self.shared = [None if f else value for value, f in zip(values, fast, strict=True)]

    def apart(self, whole) -> list[Tensor]:
        """The tensors of single images, or rows."""
        values = tree_leaves(whole, is_leaf=_is_fast)
        return [value for value, own in zip(values, self.own, strict=True) if own]

    def together(self, tensors):
        """The memory, or state, of those tensors."""
        tensors, pairs = iter(tensors), zip(self.own, self.shared, strict=True)
        return tree_unflatten([next(tensors) if own else value for own, value in pairs], self.spec)


class Beginning(nn.Module):
    """All that comes before the first word: images (I, 3, S, S) uint8 to the tensors (I, …) of the
    memory and of the first state."""

    def __init__(self, model, of_image, of_row):
        super().__init__()
        self.encoder, self.decoder = model.encoder, model.decoder
        self.of_image, self.of_row = of_image, of_row

    def forward(self, images):
        memory = self.decoder.prepare(self.encoder.features(images))
        state = self.decoder.init_state(memory)
        return self.of_image.apart(memory) + self.of_row.apart(state)


class Step(nn.Module):
    """`contract.Decoder.step` of K captions of each of I images: words (I, K), tensors (I, K, …) of
    the state and (I, …) of the memory to log p (I, K, V), alphas (I, K, L) where there are any, and
    the next state."""

    def __init__(self, model, of_image, of_row):
        super().__init__()
        self.decoder, self.of_image, self.of_row = model.decoder, of_image, of_row

    def forward(self, words, state, memory):
        rows = self.of_row.together([own.flatten(0, 1) for own in state])
        memory = self.of_image.together(memory)
        scores, alphas, rows = self.decoder.step(words.flatten(), rows, memory)
        log_probs = scores.log_softmax(dim=1, dtype=torch.float32)
        found = [log_probs, *([] if alphas is None else [alphas]), *self.of_row.apart(rows)]
        return [own.unflatten(0, words.shape) for own in found]


# -------------------------------------------------------------------------------------- graphs


class Graph(NamedTuple):
    """A graph, and what goes in and comes out, by name."""

    program: ExportedProgram
    inputs: list[str]
    outputs: list[str]
    grows: bool = False  # whether the state has a place for each word, none before the first


@torch.no_grad()
def trace(model):
    """The graphs of a captioner.

    Args:
        model: `captioner.Captioner` that computes in float32 on the CPU.

    Returns:
        name -> `Graph`, of `exported.GRAPHS`; and of how many tensors the memory is, and whether
        there are alphas, by the names that captioner.json has for them.

    Raises:
        UserError: what it does is in no graph.
    """
    if model.look == "sample":
        raise UserError(
            "--look sample draws places at random, which no graph does: export with soft or argmax"
        )
    decoder, side = model.decoder, model.image_size
    images = torch.zeros(IMAGES, 3, side, side, dtype=torch.uint8)
    memory = decoder.prepare(model.encoder.features(images))
    rows = torch.arange(IMAGES).repeat_interleave(BEAMS)
    first = state = decoder.init_state(memory).select(rows)
    words = torch.full((IMAGES * BEAMS,), model.word_map["<start>"])
    for _ in range(WORDS):
        _, alphas, state = decoder.step(words, state, memory)
    layouts = of_image, of_row = Layout(memory), Layout(first)
    memory, first, state = of_image.apart(memory), of_row.apart(first), of_row.apart(state)

    image = {0: Dim("images", min=1)}
    row = image | {1: Dim("beams", min=1)}
    words, *in_beams = (own.unflatten(0, (IMAGES, BEAMS)) for own in (words, *state))
    axes = row, [row | _growing(*pair) for pair in zip(first, state, strict=True)]
    axes = *axes, [image] * len(memory)
    beginning = _export("encoder", Beginning(model, *layouts), (images,), (image,))
    step = _export("decoder", Step(model, *layouts), (words, in_beams, memory), axes)
    memories, states = _numbered("memory", memory), _numbered("state", state)
    outputs = ["log_probs", *["alphas"] * (alphas is not None), *_numbered("next_state", state)]
    graphs = (
        Graph(beginning, ["images"], memories + states),
        Graph(step, ["words", *states, *memories], outputs, any(len(own) > 2 for own in axes[1])),
    )
    about = {"memory": len(memory), "attends": alphas is not None}
    return dict(zip(GRAPHS, graphs, strict=True)), about


def _growing(first, later):
    """The axis of a state (I, K, …) that has a place for each word, as its tensors (I·K, …) before
    the first word and later tell."""
    pairs = enumerate(zip(first.shape, later.shape, strict=True), start=1)
    return {axis: Dim("words", min=0) for axis, (before, after) in pairs if before != after}


def _numbered(name, tensors):
    return [f"{name}_{i}" for i, _ in enumerate(tensors)]


def _export(part, module, example, axes):
    with _refusing(f"the {part}", "traced as a graph"):
        return torch.export.export(module.eval(), example, dynamic_shapes=axes)


@contextmanager
def _refusing(what, done):
    """Makes an error of the block a UserError. Of a thousand encoders and any decoder they are of
    many classes; and what the exporters tell their developers is passed over."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(f"{what} cannot be {done}: {in_a_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)


# --------------------------------------------------------------------------------------- files


def check_possible(formats):
    """Raises UserError where a package or the compiler is missing that a format needs."""
    for format in formats:
        packages = ("onnx", "onnxscript", "onnxruntime") if format in ("onnx", "int8") else ()
        if missing := [name for name in packages if not find_spec(name)]:
            raise UserError(f"--format {format} needs packages: pip install {' '.join(missing)}")
    if "aoti" in formats:
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler) is None:
            raise UserError(
                f"--format aoti compiles C++, and there is no {compiler}: install it, or name "
                "another compiler in the environment's CXX"
            )


def write_onnx(graph, path, squares=None):
    """Writes a graph as ONNX."""
    program = torch.onnx.export(
        graph.program,
        dynamo=True,
        verbose=False,
        input_names=graph.inputs,
        output_names=graph.outputs,
    )
    program.save(path, external_data=size_of_weights(graph) > ONE_FILE)


def size_of_weights(graph):
    """Bytes."""
    return sum(tensor.nbytes for tensor in graph.program.state_dict.values())


def write_int8(graph, path, squares):
    """Writes a graph as ONNX in int8; its scales are those that it has on the squares."""
    import quantizing  # which takes a package that not everyone has

    if len(squares) == 0:
        raise UserError("--format int8 takes photographs, and there are none")
    if size_of_weights(graph) > ONE_FILE:
        raise UserError("--format int8: weights of more than 2 GB are not quantized")
    with TemporaryDirectory() as folder:
        source = Path(folder, "float32.onnx")
        write_onnx(graph, source)
        if graph.inputs == ["images"]:
            quantizing.quantize_encoder(source, path, squares)
        else:
            quantizing.quantize_step(source, path)


def write_aoti(graph, path, squares=None):
    """Compiles a graph for this machine's processor."""
    from torch._inductor import aoti_compile_and_package  # takes seconds to import

    # runs in any number of threads, where it would in as many as there are now
    options = {"cpp.dynamic_threads": True}
    aoti_compile_and_package(graph.program, package_path=str(path), inductor_configs=options)


WRITERS = {
    "onnx": ("ONNX", write_onnx),
    "int8": ("ONNX in int8", write_int8),
    "aoti": ("an AOTInductor package", write_aoti),
}


@contextmanager
def written(model, formats, squares=()):
    """For the block a folder with the exported captioner, which `keep` keeps.

    Args:
        model: as of `trace`.
        formats: of `exported.ENDINGS`.
        squares: photographs, as `exported.square` makes them, on which int8 measures its scales.

    Raises:
        UserError: the model cannot be exported so.
    """
    graphs, about = trace(model)
    if "aoti" in formats and graphs["step"].grows:
        raise UserError(
            "--format aoti: the state of this decoder grows with each word, and what AOTInductor "
            "compiles of it captions otherwise than the model: export it as onnx"
        )
    about |= {
        "formats": list(formats),
        "image_size": model.image_size,
        "fit": model.fit,
        "max_words": MAX_LENGTH,
        "never": unsayable(model.word_map),
        "between": " " if model.rule.whole else "",
        "word_map": model.word_map,
    }
    with TemporaryDirectory() as folder:
        with os_errors_as_user_errors(folder):
            for format in formats:
                name, write = WRITERS[format]
                for part, graph in graphs.items():
                    with _refusing(f"the {part}'s graph", f"written as {name}"):
                        write(graph, Path(folder, part + ENDINGS[format]), squares)
        write_json(Path(folder, ABOUT), about, ensure_ascii=False)
        yield Path(folder)


def keep(folder, place):
    """Copies what `written` has made into the folder `place`, all of it or nothing, and returns the
    files' paths. An export that is there is replaced, of whichever formats it is; captioner.json,
    without which there is none, goes first and comes last."""
    sources = sorted(folder.iterdir(), key=lambda path: (path.name == ABOUT, path.name))
    place = Path(place)
    paths = [place / path.name for path in sources]
    with temporaries(paths, place) as beside:
        for source, temporary in zip(sources, beside, strict=True):
            shutil.copyfile(source, temporary)
            flush(temporary)
        before = [path for part in GRAPHS for path in place.glob(f"{part}.*")]
        for path in [place / ABOUT, *before]:
            if path.name == ABOUT or path.suffix in (*ENDINGS.values(), ".data"):
                path.unlink(missing_ok=True)
        for temporary, path in zip(beside, paths, strict=True):
            os.replace(temporary, path)
        flush_folder(place)
    return paths
