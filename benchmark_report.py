"""The benchmark's table and picture."""

import textwrap

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from groundwork.wording import counted


def machine(device):
    """What is measured on, in words."""
    kind = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    )
    return f"{kind}, PyTorch {torch.__version__}"


def describe(settings, speeds, rows, grown):
    """The table in Markdown, and what it was measured on; of a GPU, which has a name, in captions a
    second, too, and the times that `draw` shows."""
    gpu = settings.device.type == "cuda"
    products = ", ".join(
        f"{flops / 1e9:,.0f} GFLOP/s in {'bfloat16' if amp else 'float32'}"
        for amp, flops in speeds.flops.items()
    )
    lines = [
        f"{settings.geometry} geometry, {machine(settings.device)}; large products of matrices run "
        f"at {products}, sums of tensors at {speeds.bytes / 1e9:,.0f} GB/s.",
        "",
        "| | textbook / ours | at least | of the matrix products' speed | of the roofline |"
        + " captions/s |" * gpu,
        "| --- | ---: | ---: | ---: | ---: |" + " ---: |" * gpu,
    ]
    for row in rows:
        shares = "| | |"
        if row.work:
            product = row.work.flops / speeds.flops[row.amp] / row.ours
            shares = f"| {product:.0%} | {speeds.limit(row.work, row.amp) / row.ours:.0%} |"
        target = f"{row.target}×" if row.target else ""
        target += ", missed" if row.missed else ""
        rate = f" {row.captions / row.ours:,.0f} |" if row.captions else " |"
        lines.append(f"| {row.name} | {row.ratio:.1f}× | {target} {shares}" + rate * gpu)
    if gpu:
        lines += ["", "Milliseconds, textbook / ours:", ""]
        for axis, (values, seconds) in grown.items():
            times = (f"{1e3 * theirs:.1f} / {1e3 * ours:.1f}" for theirs, ours in seconds)
            pairs = zip(values, times, strict=True)
            lines.append(f"- {axis}: " + ", ".join(f"{value:,}: {time}" for value, time in pairs))
    return "\n".join(lines)


def draw(rows, grown):
    """Bars of the ratios, and how the times of both sides grow along each axis."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.2])
    bars = left.subplots()
    names = [f"{textwrap.fill(row.name, 26)}: {row.ratio:.1f}×" for row in rows]
    longer = [row.ratio - 1 for row in rows]  # than 1, from which bars go to both sides
    bars.barh(names, longer, left=1, color="#4c72b0", label="measured")
    goals = [(row.target, i) for i, row in enumerate(rows) if row.target]
    bars.scatter(*zip(*goals, strict=True), color="black", marker="|", s=300, label="goal")
    bars.set_xscale("log")
    ends = [1, *(row.ratio for row in rows), *(target for target, _ in goals)]
    bars.set_xlim(0.8 * min(ends), 1.5 * max(ends))
    bars.xaxis.set_major_formatter("{x:g}×")
    bars.invert_yaxis()
    bars.set_title("time or memory, textbook formulation / ours", loc="left")
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
        for numbers in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            numbers(LogFormatter())  # as 10, where the usual one has a power
        axes.set_xlabel(axis)
        axes.set_ylabel("time, relative to our least")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure
