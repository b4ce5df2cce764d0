"""Training curves, and text and pixels of other figures by matplotlib."""

import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from groundwork import fonts
from groundwork.files import atomic_write
from groundwork.logs import read_log

# Stages that follow others: how dark their epochs are, and what they are called
LATER = {"finetune": ("0.92", "fine-tuning"), "scst": ("0.85", "self-critical")}


def curves_path(log_path):
    """Path of a log's curves: `log_….jsonl` to `curves_….png`."""
    return log_path.with_name(log_path.stem.replace("log_", "curves_", 1) + ".png")


def draw_curves(log_path):
    """Draws a training log as a PNG beside it, at `curves_path`.

    Raises:
        UserError: a line of the log is damaged, or the PNG cannot be written.
    """
    log_path = Path(log_path)
    figure = curves(read_log(log_path))
    with atomic_write(curves_path(log_path)) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def curves(records):
    """A matplotlib figure of losses, BLEU, CIDEr-D and learning rate over the epochs.

    Args:
        records: dicts, one an epoch, with `stage`, `loss`, `val_loss`, `bleu1` to `bleu4` (0 to 1)
            and `lr`, where the encoder is trained, too, `encoder_lr`, and where they are known
            `cider` and `reward`, of which the loss of an epoch with a reward is no likelihood;
            epochs of stages that follow others are shaded.
    """
    scored = any("cider" in record for record in records)
    figure = Figure(figsize=(16 if scored else 12, 3.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    loss, bleu, *cider, rate = figure.subplots(1, 4 if scored else 3)
    losses = [record | ({"loss": math.nan} if "reward" in record else {}) for record in records]
    _plot(loss, losses, "loss", {"training": "loss", "validation": "val_loss"})
    scores = {f"BLEU-{n}": f"bleu{n}" for n in range(1, 5)}
    _plot(bleu, records, "validation BLEU (%)", scores, scale=100)
    if scored:
        ciders = {"validation": "cider"}
        if any("reward" in record for record in records):
            ciders["reward"] = "reward"
        title = "CIDEr-D (%)" + (", reward × 100" if len(ciders) > 1 else "")
        _plot(cider[0], records, title, ciders, scale=100)
    rates = {"decoder": "lr"}
    if any("encoder_lr" in record for record in records):
        rates["encoder"] = "encoder_lr"
    _plot(rate, records, "learning rate (10⁻⁴)", rates, scale=1e4)
    for axes in (bleu, *cider, rate):
        axes.set_ylim(0, 1.05 * axes.dataLim.y1 or 1)
    return figure


def _plot(axes, records, title, curves, scale=1):
    """Plots each label's key of the records, where they have it, against the epochs, counted over
    all stages."""
    end = len(records) + 0.5
    for label, key in curves.items():
        values = [scale * record.get(key, math.nan) for record in records]
        axes.plot(range(1, len(records) + 1), values, ".-", label=label)
    stages = [record["stage"] for record in records]
    for stage, (shade, name) in LATER.items():
        if stage in stages[1:] and (begin := stages.index(stage)):
            stop = begin + stages.count(stage) + 0.5
            label = name if len(curves) < 4 else None  # else it has no room
            axes.axvspan(begin + 0.5, stop, color=shade, label=label)
    axes.set_title(title, loc="left", pad=24)
    axes.set_xlabel("epoch")
    axes.set_xlim(0.5, end)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(  # between title and curves, which it must not hide
        loc="lower left",
        bbox_to_anchor=(0, 1.01),
        borderaxespad=0,
        borderpad=0.2,
        ncols=5,
        frameon=False,
        fontsize="small",
        handlelength=1,
        handletextpad=0.4,
        columnspacing=0.9,
    )


def write_text(figure, place, text, size, room, **options):
    """Writes text at (x, y) inches from the top left, smaller where it is wider than `room`."""
    x, y = place[0] / figure.get_figwidth(), 1 - place[1] / figure.get_figheight()
    options |= {"fontfamily": fonts.families(text), "linespacing": 1.25, "parse_math": False}
    text = figure.text(x, y, text, fontsize=size, **options)
    width = text.get_window_extent().width / figure.dpi
    if width > room:
        text.set_fontsize(size * room / width)


def show_pixels(figure, box, pixels):
    """Axes at a box of inches from the top left that hold `pixels` (h, w, 3), in 0..1."""
    (left, top, width, height), (across, down) = box, figure.get_size_inches()
    place = (left / across, 1 - (top + height) / down, width / across, height / down)
    axes = figure.add_axes(place, frameon=False, xticks=[], yticks=[])
    axes.imshow(pixels, aspect="auto")
    return axes
