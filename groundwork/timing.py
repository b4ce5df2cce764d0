"""How long functions take side by side, how much work they do, how much memory they take."""

import resource
import statistics
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, flop_registry


def calls_ahead(device):
    """How often a function is called before it is measured: on a GPU CUDA graphs are recorded in
    these calls."""
    return 3 if device.type == "cuda" else 1


def alternate(device, rounds, *functions, best=False):
    """Median seconds of each function, or the fewest, called in turn `rounds` times after
    `calls_ahead`."""
    seconds = [[] for _ in functions]
    ahead = calls_ahead(device)
    for i in range(rounds + ahead):
        for function, times in zip(functions, seconds, strict=True):
            synchronize(device)
            started = time.perf_counter()
            function()
            synchronize(device)
            if i >= ahead:
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
    # of convolutions in groups PyTorch counts a weight's gradient as if they were in one, and those
    # that oneDNN computes with what follows it does not know
    mended = {torch.ops.aten.convolution_backward: _flops_of_convolution_backward}
    if fused := _fused_convolution():
        mended[fused] = _flops_of_convolution
    with FlopCounterMode(display=False, custom_mapping=mended) as counter, _Traffic() as traffic:
        function()
    return Work(counter.get_total_flops(), traffic.bytes)


def _fused_convolution():
    """That of PyTorch's builds with oneDNN, or None."""
    return getattr(torch.ops.mkldnn, "_convolution_pointwise", None)


def _flops_of_convolution(image, weight, *_, out_shape, **__):
    return conv_flop_count(image, weight, out_shape)


def _flops_of_convolution_backward(of_output, image, weight, *others, **_):
    """Of shapes: each of the two gradients takes what the convolution took."""
    *_, transposed, _, _, wanted = others
    return sum(wanted[:2]) * conv_flop_count(image, weight, of_output, transposed)


class _Traffic(TorchDispatchMode):
    """Counts the bytes that operations other than matrix products read and write."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        name = packet.__name__
        product = packet in flop_registry or packet is _fused_convolution()
        if not (function.is_view or product or name.startswith(("empty", "new_e"))):
            leaves = tree_leaves((args, kwargs, result))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            if name.startswith(("index", "gather", "scatter")) or name == "embedding":
                # touches as much of the large tensor as the small one has
                sizes = [t.nbytes for t in tensors if t.is_floating_point()]
                self.bytes += 3 * min(sizes, default=0)
            else:
                self.bytes += sum(t.nbytes for t in tensors)
        return result


def measure_speeds(device, amps):
    """`Speeds`: the best of ten large products, and of a hundred sums of tensors in the cache.

    Args:
        amps: whether to measure products in bfloat16, in float32: a set of bool.
    """
    flops = {}
    for amp in amps:
        dtype = torch.bfloat16 if amp else torch.float32
        a, b = (torch.randn(4096, 4096, device=device, dtype=dtype) for _ in range(2))
        flops[amp] = 2 * 4096**3 / alternate(device, 10, partial(torch.mm, a, b), best=True)[0]
    size = 2**28 if device.type == "cuda" else 2**18
    a, b, out = (torch.zeros(size, device=device) for _ in range(3))
    [seconds] = alternate(device, 100, partial(torch.add, a, b, out=out), best=True)
    return Speeds(flops, 12 * size / seconds)


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
