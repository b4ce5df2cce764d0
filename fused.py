"""Builds `fused.cpp` with the machine's C++ compiler, and calls it: the attention's energies, and
what their gradients are made of, without the hidden layer in memory.

Nothing needs it: without a compiler `kernels` takes PyTorch's operations. Once built it lies in a
folder beside PyTorch's other caches, by a name that tells source, flags and kind of processor, and
whoever finds it there makes use of it. `build` is for the beginning of what takes long, so that all
of a training is computed in one way; who captions a photograph never waits for a compiler.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from groundwork.errors import UserError, printable
from groundwork.files import atomic_write, make_folder

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC"]
OF_PROCESSOR = {  # by what PyTorch makes use of here; those of other kinds need no flags
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": [f"-m{name}" for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma")],
}


def flags():
    """The compiler's."""
    return FLAGS + OF_PROCESSOR.get(torch.backends.cpu.get_cpu_capability(), [])


def library_path():
    """Where the library lies, once it is built."""
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(flags()).encode()).hexdigest()[:16]
    name = f"fused-{platform.system()}-{platform.machine()}-{digest}.so"
    return Path(torch.hub.get_dir()).parent / "show_attend_tell" / name


@cache
def library():
    """The library, or None where it is not built."""
    try:
        return _load(library_path())
    except (OSError, AttributeError):
        return None


def _load(path):
    found = ctypes.CDLL(str(path))
    number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    problem = [number] * 2 + [pointer] * 3 + [size] * 4 + [number]
    found.forward.argtypes = problem + [pointer] * 2
    found.backward.argtypes = problem + [pointer] * 4
    return found


@cache
def build(device: torch.device):
    """Builds the library where it is missing and the device is a CPU, which takes about two
    seconds; where that fails, prints a line that says why. A process tries once.

    Several processes may build at once: each writes a file of its own, which takes its place whole.
    """
    if device.type != "cpu" or library() is not None:
        return
    try:
        _compile(library_path())
    except (UserError, subprocess.SubprocessError, OSError, AttributeError, ValueError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in said if "error" in line), said[0])
        print(f"attention computed more slowly, as {SOURCE.name} is not built: {printable(reason)}")


def _compile(path):
    name = os.environ.get("CXX") or "c++"
    compiler = shlex.split(name)
    if shutil.which(compiler[0]) is None:
        raise UserError(
            f"there is no compiler {name}: install g++, for example, or name another in the "
            "environment variable CXX"
        )
    make_folder(path.parent)
    with atomic_write(path) as temporary:
        command = [*compiler, *flags(), str(SOURCE), "-o", str(temporary)]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
    _load(path)  # says why, where it cannot be
    library.cache_clear()


def runs(projected: Tensor) -> bool:
    """Whether the library is there, and for keys of this device and precision."""
    known = projected.device.type == "cpu" and projected.dtype in (torch.float32, torch.bfloat16)
    return known and library() is not None


def energies(projected: Tensor, query: Tensor, w: Tensor, images: Tensor, activation) -> Tensor:
    """`kernels.plain_energies`, (n, L) float32, without gradients.

    Args:
        activation: torch.relu or torch.tanh.
    """
    found = torch.empty(len(query), projected.shape[1])
    _call(library().forward, activation, projected, query, images, w.float(), found)
    return found


def slopes(
    grad: Tensor,
    projected: Tensor,
    query: Tensor,
    w: Tensor,
    images: Tensor,
    activation,
    of_projected: Tensor,
) -> tuple[Tensor, Tensor]:
    """What the gradients of the energies are made of, given theirs, (n, L): with f' the slope of
    the activation f, grad · f' is added up over places, and over rows into `of_projected`.

    Args:
        of_projected: (I, L, A) float32, contiguous, to which it is added.

    Returns:
        the gradient of the query, w · Σ_i grad · f', (n, A); and what w's is the sum of, Σ_i
        grad · f of each row, (n, A), with relu of it the query's part alone: query · Σ_i grad · f'.
    """
    of_query, of_hidden = torch.zeros(2, *query.shape)
    sums = of_projected, of_query, of_hidden
    _call(library().backward, activation, projected, query, images, grad.float(), *sums)
    if activation is torch.relu:
        of_hidden = query * of_query
    return of_query.mul_(w), of_hidden


def _call(function, activation, projected, query, images, *others):
    tensors = [t.contiguous() for t in (projected, query.float(), images, *others)]
    pointers = [t.data_ptr() for t in tensors]
    kind = projected.dtype == torch.bfloat16, activation is torch.tanh
    sizes = *projected.shape, len(query), torch.get_num_threads()
    function(*kind, *pointers[:3], *sizes, *pointers[3:])
