"""Where the time of the benchmark's works goes, by PyTorch's profiler."""

import math
import re
from collections import Counter
from functools import partial
from operator import attrgetter
from typing import NamedTuple

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmark_data import Scene
from benchmark_parts import finetuning_sides, photographs_sides, search_sides, step_sides
from benchmark_report import machine
from groundwork.progress import say
from groundwork.timing import alternate, synchronize

SHOWN = 10  # operations


class Profile(NamedTuple):
    """What a function spends its time on."""

    shares: dict[str, float]  # by operation, of the time of all, the greatest first
    busy: float | None  # part of the time in which a GPU computes; None on a CPU


def profile_of(function, device):
    """The `Profile` of function(), after calls that are not measured."""
    cuda = device.type == "cuda"
    if cuda:
        [seconds] = alternate(device, 1, function)  # the profiler takes time itself
    else:
        function()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    with profile(activities=activities) as found:
        function()
        synchronize(device)
    times = Counter()  # microseconds
    for event in found.key_averages():
        if not cuda:
            times[event.key] += event.self_cpu_time_total
        elif event.device_type == DeviceType.CUDA:  # a kernel
            times[_name_of_kernel(event.key)] += event.self_device_time_total
    total = sum(times.values())
    names = sorted(times, key=times.get, reverse=True)
    shares = {name: times[name] / total for name in names}
    kernels = (event for event in found.events() if event.device_type == DeviceType.CUDA)
    busy = _length(event.time_range for event in kernels) / 1e6 / seconds if cuda else None
    return Profile(shares, busy)


def _name_of_kernel(signature):
    """Its function's name, of "void at::native::(anonymous namespace)::NAME<…>(…)"."""
    name, inner = signature.removeprefix("void ").replace("(anonymous namespace)", ""), None
    while name != inner:  # brackets from the innermost out
        inner, name = name, re.sub(r"<[^<>]*>|\([^()]*\)", "", name)
    return name.split()[-1].rpartition("::")[2] if "::" in name else name.strip()


def _length(ranges):
    """How long they last, of ranges with `start` and `end` that may overlap, together."""
    total, last = 0.0, -math.inf
    for own in sorted(ranges, key=attrgetter("start")):
        total += max(0.0, own.end - max(own.start, last))
        last = max(last, own.end)
    return total


def works(settings):
    """Yields each work's name, and ours of it as a function."""
    precision = "bfloat16" if settings.amp else "float32"
    step = step_sides(Scene(settings), settings)[1]
    yield f"decoder training step, {precision}", step
    yield "fine-tuning step", finetuning_sides(Scene(settings, images=6), settings)[1]
    scene = Scene(settings, images=64)
    yield "beam-5 evaluation from features", search_sides(scene, settings, few=4)[1]
    from_photographs = photographs_sides(scene, settings)[1]
    yield "beam-5 evaluation from photographs", partial(from_photographs, 64)
    yield "beam-5, one photograph alone", partial(from_photographs, 1)


def print_profiles(settings):
    """Prints each work with the operations that take most of its time, as soon as it is known."""
    say(f"{settings.geometry} geometry, {machine(settings.device)}; shares of the time")
    for name, function in works(settings):
        found = profile_of(function, settings.device)
        waits = "" if found.busy is None else f"; the GPU computes {found.busy:.0%} of the time"
        most = list(found.shares.items())[:SHOWN]
        parts = ", ".join(f"{name.removeprefix('aten::')} {share:.0%}" for name, share in most)
        say(f"{name}: {parts}{waits}")
