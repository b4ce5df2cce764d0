"""Pictures of where the decoder looked for each word."""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from groundwork import fonts

LINE = "#ffb81c"  # around where the attention is half its maximum or more
LEGEND = "half of the strongest attention; bright: looked at for the word; gray: not"


def draw_attention(image, words, alphas):
    """Draws where the decoder looked for each word: an RGB PIL.Image 1320 pixels wide or less.

    The photograph under its caption, then a panel a word: what the decoder looked at is as
    photographed, the rest dim and gray, with a line where the attention is half its maximum.
    Attention spread evenly leaves the whole panel as photographed, and draws no line. The panels
    of a dark photograph are lightened. The last line of the picture says so.

    Args:
        image: upright RGB PIL.Image of any size.
        words: T strings.
        alphas: (T, L) array or tensor of non-negative numbers, no row all zero; L = size², a
            row-major grid that stretches over the whole image. None of a model without attention:
            then there are no panels.
    """
    count = 0 if alphas is None else len(words)
    grid = _choose_grid(words, count, image.width / image.height)
    canvas = Image.new("RGB", _pixels(grid.width, grid.height), "white")
    for i, line in enumerate(grid.lines):
        _write(canvas, (_MARGIN, _MARGIN + 0.31 * (i + 0.75)), line, 17, grid.inner)
    photograph, *panels = grid.boxes()
    photo = _resize(image, photograph)
    canvas.paste(photo, _pixels(*photograph[:2]))
    if alphas is None:
        return canvas
    small = _resize(photo, panels[-1])
    bright = _brighten(np.asarray(small, dtype=np.float32) / 255)
    dim = 0.4 * bright @ np.array([[0.299], [0.587], [0.114]], dtype=np.float32)
    alphas = torch.as_tensor(alphas).detach().float().cpu().numpy()
    for word, alpha, box in zip(words, alphas, panels, strict=True):
        panel = _panel(bright, dim, alpha, 4 * grid.strip / 72 * _DPI)
        canvas.paste(panel, _pixels(*box[:2]))
        above = (box[0], box[1] - 0.22 * grid.strip)
        _write(canvas, above, word, 40 * grid.strip, box[2] + 0.1)
    _write_legend(canvas, grid)
    return canvas


def _panel(bright, dim, alpha, width):
    """The photograph (h, w, 3), 0..1, in full where the decoder looked, `dim` (h, w, 1) elsewhere,
    with a line of some pixels' width between."""
    size = math.isqrt(len(alpha))
    attention = _smooth(alpha.reshape(size, size), bright.shape[:2])
    pixels = dim + (attention**0.8)[..., None] * (bright - dim)
    panel = Image.fromarray((255 * pixels + 0.5).astype(np.uint8))
    if attention.min() < 0.5:
        # by the slope, how many pixels away the attention is half
        slope = np.hypot(*np.gradient(attention)) + 1e-9
        line = np.clip(width / 2 + 0.5 - abs(attention - 0.5) / slope, 0, 1)
        panel.paste(LINE, mask=Image.fromarray((255 * line + 0.5).astype(np.uint8)))
    return panel


_DPI, _MARGIN, _LEGEND = 110, 0.25, 0.15  # dots per inch, inches, inches for the legend


@dataclass
class _Grid:
    """A photograph in span × span cells at the top left, panels in the others, row by row.

    Lengths in inches. Above each cell a strip takes the panel's word.
    """

    lines: list[str]  # the caption
    count: int  # panels
    aspect: float  # a picture's width / height
    width: float  # of the whole figure
    span: int
    columns: int

    def __post_init__(self):
        self.inner = self.width - 2 * _MARGIN
        self.rows = max(self.span, math.ceil((self.span**2 + self.count) / self.columns))
        self.strip = min(max(0.17 * self.inner / self.columns, 0.24), 0.38)
        # With this gap between columns the photograph fills its cells, unless it gets too wide.
        widest = min(0.4, 0.22 * self.inner / self.columns)
        self.gap = min(max(self.strip * self.aspect, 0.1), widest)
        self.cell = (self.inner - (self.columns - 1) * self.gap) / self.columns
        self.head = _MARGIN + 0.31 * len(self.lines)
        self.height = self.head + self.rows * (self.strip + self.cell / self.aspect) + _MARGIN
        self.height += _LEGEND if self.count else 0

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


def _choose_grid(words, count, aspect):
    """The best grid 12 inches wide, or less where that would be over 10 high."""

    def best(width):
        lines = _wrap(words, 17, width - 2 * _MARGIN)
        spans = range(1, min(max(count, 1), 3) + 1)
        grids = [
            _Grid(lines, count, aspect, width, span, columns)
            for span in spans
            for columns in range(span, span + count + 1)
        ]
        return min(grids, key=_Grid.cost)

    grid = best(12)
    return grid if grid.height <= 10 else best(max(4, 120 / grid.height))


def _write_legend(canvas, grid):
    """What bright, gray and the line mean, under all else."""
    left, base, dash = _MARGIN, grid.height - 0.6 * _MARGIN, 0.22
    (x, y), (end, _) = _pixels(left, base - 0.05), _pixels(left + dash, base)
    ImageDraw.Draw(canvas).line([(x, y), (end, y)], fill=LINE, width=3)
    _write(canvas, (left + dash + 0.07, base), LEGEND, 9, grid.inner - dash, "#666")


def _wrap(words, size, room):
    """The words in lines that are `room` inches wide, or a word long."""
    lines = [[]]
    for word in words:
        if lines[-1] and _width(" ".join([*lines[-1], word]), size) > room:
            lines.append([])
        lines[-1].append(word)
    return [" ".join(line) for line in lines if line]


def _write(canvas, place, text, size, room, colour="black"):
    """Writes a line at (x, y) inches from the top left, smaller where it is wider than `room`."""
    size = min(size, size * room / max(_width(text, size), 1e-9))
    (x, y), draw = _pixels(*place), ImageDraw.Draw(canvas)
    for piece, path in fonts.runs(text):
        draw.text((x, y), piece, colour, _font(path, size), anchor="ls")
        x += _font(path, size).getlength(piece)


def _width(text, size):
    """Inches."""
    return sum(_font(path, size).getlength(piece) for piece, path in fonts.runs(text)) / _DPI


@lru_cache(64)
def _font(path, size):
    return ImageFont.truetype(path, size * _DPI / 72)


def _pixels(*inches):
    return tuple(round(_DPI * length) for length in inches)


def _resize(image, box):
    """The image in as many pixels as a box has."""
    size = [max(2, side) for side in _pixels(*box[2:])]  # a slope needs two
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2)


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
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)

    smooth = weights(shape[0]) @ grid @ weights(shape[1]).T
    return smooth / smooth.max()
