"""Pictures for people: training curves, and where the decoder looked for each word."""

import math
import textwrap
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from groundwork.files import atomic_write
from groundwork.logs import read_log


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
    """A matplotlib figure of losses, BLEU and learning rate over the epochs.

    Args:
        records: dicts, one an epoch, with `stage`, `loss`, `val_loss`, `bleu1` to `bleu4` (0 to 1)
            and `lr`, and where the encoder is trained, too, `encoder_lr`; epochs of stage
            "finetune" that follow others are shaded.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    loss, bleu, rate = figure.subplots(1, 3)
    _plot(loss, records, "loss", {"training": "loss", "validation": "val_loss"})
    scores = {f"BLEU-{n}": f"bleu{n}" for n in range(1, 5)}
    _plot(bleu, records, "validation BLEU (%)", scores, scale=100)
    rates = {"decoder": "lr"}
    if any("encoder_lr" in record for record in records):
        rates["encoder"] = "encoder_lr"
    _plot(rate, records, "learning rate (10⁻⁴)", rates, scale=1e4)
    for axes in (bleu, rate):
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
    if len(set(stages)) > 1:
        axes.axvspan(stages.index("finetune") + 0.5, end, color="0.92", label="fine-tuning")
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


def draw_attention(image, words, alphas):
    """`attention_figure` as an RGB PIL.Image."""
    canvas = FigureCanvasAgg(attention_figure(image, words, alphas))
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def attention_figure(image, words, alphas):
    """Draws where the decoder looked for each word, as a figure 1320 pixels wide or less.

    The photograph under its caption, then a panel a word: what the decoder looked at is as
    photographed, the rest dim and gray, with a line where the attention is half its maximum.
    Attention spread evenly leaves the whole panel as photographed, and draws no line. The panels
    of a dark photograph are lightened.

    Args:
        image: upright RGB PIL.Image of any size.
        words: T strings.
        alphas: (T, L) array or tensor of non-negative numbers, no row all zero; L = size², a
            row-major grid that stretches over the whole image. None of a model without attention:
            then there are no panels.
    """
    count = 0 if alphas is None else len(words)
    grid = _choose_grid(" ".join(words), count, image.width / image.height)
    photograph, *panels = grid.boxes()
    figure = Figure(figsize=(grid.width, grid.height), dpi=_DPI)
    write_text(figure, (_MARGIN, _MARGIN), "\n".join(grid.lines), 17, grid.inner, va="top")
    show_pixels(figure, photograph, _resize(image, photograph))
    if alphas is not None:
        small = _brighten(_resize(image, panels[-1]))
        alphas = torch.as_tensor(alphas).detach().float().cpu().numpy()
        for word, alpha, box in zip(words, alphas, panels, strict=True):
            _draw_panel(figure, box, word, alpha, small, grid.strip)
    return figure


def _draw_panel(figure, box, word, alpha, small, strip):
    """A word, and below it the small photograph with where the decoder looked."""
    size = math.isqrt(len(alpha))
    attention = _smooth(alpha.reshape(size, size), small.shape[:2])
    axes = show_pixels(figure, box, _spotlight(small, attention))
    if attention.min() < 0.5:
        axes.contour(attention, levels=[0.5], colors=["#ffb81c"], linewidths=4 * strip)
    left, top, width, _ = box
    write_text(figure, (left, top - 0.22 * strip), word, 40 * strip, width + 0.1)


_DPI, _MARGIN = 110, 0.25  # of a figure of attention: dots per inch, inches


@dataclass
class _Grid:
    """A photograph in span × span cells at the top left, panels in the others, row by row.

    Lengths in inches. Above each cell a strip takes the panel's word.
    """

    caption: str
    count: int  # panels
    aspect: float  # a picture's width / height
    width: float  # of the whole figure
    span: int
    columns: int

    def __post_init__(self):
        self.inner = self.width - 2 * _MARGIN
        self.lines = textwrap.wrap(self.caption, int(8 * self.inner))
        self.rows = max(self.span, math.ceil((self.span**2 + self.count) / self.columns))
        self.strip = min(max(0.17 * self.inner / self.columns, 0.24), 0.38)
        # With this gap between columns the photograph fills its cells, unless it gets too wide.
        widest = min(0.4, 0.22 * self.inner / self.columns)
        self.gap = min(max(self.strip * self.aspect, 0.1), widest)
        self.cell = (self.inner - (self.columns - 1) * self.gap) / self.columns
        self.head = _MARGIN + 0.31 * len(self.lines)
        self.height = self.head + self.rows * (self.strip + self.cell / self.aspect) + _MARGIN

    def cost(self):
        """How far the figure is from 16:10, from no empty cells, and the photograph from 30 %."""
        cells, photograph = self.rows * self.columns, self.span**2
        return (
            max(0, abs(math.log(self.width / self.height / 1.6)) - 0.2)
            + 1.5 * (cells - photograph - self.count) / cells
            + 0.25 * abs(math.log(photograph / cells / 0.3))
        )

    def boxes(self):
        """(left, top, width, height) of the photograph and of each panel, from the top left."""
        width, height, span = self.cell, self.cell / self.aspect, self.span
        across, down, top = width + self.gap, height + self.strip, self.head + self.strip
        photograph = min(span * across - self.gap, (span * down - self.strip) * self.aspect)
        boxes = [(_MARGIN, top, photograph, photograph / self.aspect)]
        for row, column in product(range(self.rows), range(self.columns)):
            if max(row, column) >= span:
                boxes.append((_MARGIN + column * across, top + row * down, width, height))
        return boxes[: 1 + self.count]


def _choose_grid(caption, count, aspect):
    """The best grid 12 inches wide, or less where that would be over 10 high."""

    def best(width):
        spans = range(1, min(max(count, 1), 3) + 1)
        grids = [
            _Grid(caption, count, aspect, width, span, columns)
            for span in spans
            for columns in range(span, span + count + 1)
        ]
        return min(grids, key=_Grid.cost)

    grid = best(12)
    return grid if grid.height <= 10 else best(max(4, 120 / grid.height))


def write_text(figure, place, text, size, room, **options):
    """Writes text at (x, y) inches from the top left, smaller where it is wider than `room`."""
    x, y = place[0] / figure.get_figwidth(), 1 - place[1] / figure.get_figheight()
    text = figure.text(x, y, text, fontsize=size, linespacing=1.25, parse_math=False, **options)
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


def _resize(image, box):
    """The image in as many pixels as a box has: float (h, w, 3), 0..1."""
    size = [max(2, round(_DPI * side)) for side in box[2:]]  # contours need two
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2)) / 255


def _brighten(photo):
    """Lightens a dark photograph, on which dim and lit places would look alike."""
    return photo ** np.clip(np.log(0.4) / np.log(photo.mean().clip(0.01, 0.99)), 0.45, 1)


def _smooth(grid, shape):
    """A square grid blown up to `shape` and scaled to a maximum of 1.

    Each pixel is the mean of the grid weighted by a Gaussian of the distance to its places, so
    that peaks are round, and what is even stays even up to the edges.
    """

    def weights(length):
        pixels = (np.arange(length)[:, None] + 0.5) * len(grid) / length
        weights = np.exp(-0.5 * ((pixels - np.arange(len(grid)) - 0.5) / 0.65) ** 2)
        return weights / weights.sum(axis=1, keepdims=True)

    smooth = weights(shape[0]) @ grid @ weights(shape[1]).T
    return smooth / smooth.max()


def _spotlight(photo, attention):
    """The photograph (h, w, 3) in full where attention (h, w) is 1, dim and gray where it is 0."""
    dim = 0.4 * photo @ np.array([[0.299], [0.587], [0.114]])
    return dim + attention[..., None] ** 0.8 * (photo - dim)
