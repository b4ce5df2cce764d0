"""Pictures of where the decoder looked for each word."""

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from attention_metrics import at_places, away, evenness, peak
from groundwork import fonts
from groundwork.wording import wrap

LINE = 255, 184, 28  # around where a word's attention is half its maximum or more
EVEN = 1.001  # times the least alpha: where the largest is no more, attention counts as even

# No-break spaces hold a sign and the word behind it together.
LEGEND = (
    "Full colour: the caption's strongest attention; gray: little or none. "
    "━━\N{NO-BREAK SPACE}half of the word's own maximum. ◎\N{NO-BREAK SPACE}its strongest place."
)
NUMBERS = (
    " In the corners: the share of the image that the attention is spread over, and the share of "
    "it at the strongest place."
)
AWAY = " “Does not look”: the share of a word's attention that is at no place; the rest is shown."
_SIGNS = {"━━": LINE, "◎": "black"}


def draw_attention(image, words, alphas, numbers=False, text=None):
    """Draws where the decoder looked for each word: an RGB PIL.Image 1320 pixels wide or less.

    The photograph under its caption, then a panel a word: as photographed where the attention is
    as strong as it is anywhere in the caption, and the less of it there is, the dimmer and grayer.
    All panels have this one scale, so that a word that looks nowhere in particular is dim all over
    beside one that looks at an object. It is logarithmic, log(1 + x) with x times as much attention
    as a place would get were it even, so that one sharp word does not put out the others. A line
    runs where a word's attention is half of its own maximum, and a ring marks its largest alpha, or
    the mean of the places that share it. A word whose attention is even has neither, and where all
    have, every panel is as photographed. The panels of a dark photograph are lightened. The last
    lines of the picture say what it shows.

    Args:
        image: upright RGB PIL.Image of any size.
        words: T strings.
        alphas: (T, L) array or tensor of non-negative numbers; L = size², a row-major grid that
            stretches over the whole image. Rows are scaled to a sum of one; where one sums to less,
            each panel says in a corner how much is missing: how much its word does not look. None
            of a model without attention: then there are no panels.
        numbers: whether each panel has in a corner, in per cent, the share of the image that its
            word's attention is spread over, e^entropy / L, and its largest alpha.
        text: the caption; None: the words with blanks between.
    """
    about, notes = "", []
    if alphas is not None:
        alphas = torch.as_tensor(alphas).detach().double().cpu().numpy()
        alphas, rest = at_places(alphas), away(alphas)
        about = LEGEND + NUMBERS * numbers + AWAY * (rest is not None)
        notes = _notes(alphas, rest, numbers)
    text = " ".join(words) if text is None else text
    grid = _choose_grid(text, len(notes), image.width / image.height, about)
    canvas = Image.new("RGB", _pixels(grid.width, grid.height + grid.foot), "white")
    for i, line in enumerate(grid.lines):
        _write(canvas, (_MARGIN, _MARGIN + 0.31 * (i + 0.75)), line, 17, grid.inner)
    photograph, *panels = grid.boxes()
    photo = _resize(image, photograph)
    canvas.paste(photo, _pixels(*photograph[:2]))
    if not panels:
        return canvas
    small = _resize(photo, panels[-1])
    bright = 255 * _brighten(np.asarray(small, dtype=np.float32) / 255)
    dim = 0.4 * bright @ np.array([[0.299], [0.587], [0.114]], dtype=np.float32)
    contrast = bright - dim
    attentions = [_smooth(alpha, bright.shape[:2]) for alpha in alphas]
    most = max(attention.max() for attention in attentions)
    looks = zip(words, alphas, attentions, notes, panels, strict=True)
    for word, alpha, attention, note, box in looks:
        light = np.log1p(attention) / np.log1p(most)
        panel = Image.fromarray((dim + light[..., None] * contrast + 0.5).astype(np.uint8))
        if alpha.max() > EVEN * alpha.min():
            _draw_line(panel, attention, grid.stroke)
            _draw_ring(panel, peak(alpha), grid.stroke)
        _write_note(panel, note, 26 * grid.strip, at_top=peak(alpha)[1] > 0.7)
        canvas.paste(panel, _pixels(*box[:2]))
        above = (box[0], box[1] - 0.22 * grid.strip)
        _write(canvas, above, word, 40 * grid.strip, box[2] + 0.1)
    _write_legend(canvas, grid)
    return canvas


def _notes(alphas, rest, numbers):
    """What stands in each word's panel, lines.

    Args:
        alphas: (T, L), rows that sum to one.
        rest: (T,) of `attention_metrics.away`, or None.
        numbers: as in `draw_attention`.
    """
    notes = [[] for _ in alphas]
    for t, (note, alpha) in enumerate(zip(notes, alphas, strict=True)):
        if rest is not None:
            note.append(f"does not look: {_percent(rest[t])}")
        if numbers:
            note.append(f"{_percent(_spread(alpha))} · {_percent(alpha.max())}")
    return notes


def _spread(alpha):
    """Over what share of the image attention is spread: e^entropy of L alphas that sum to one, by
    L. 1 where it is even over all places, 1/n where it is even over an n-th of them."""
    return len(alpha) ** (evenness(alpha[None])[0] - 1)


def _draw_line(panel, attention, width):
    """Draws into a panel the line where its attention (h, w) is half its maximum, `width` pixels
    wide."""
    half = attention.max() / 2
    if attention.min() < half:
        # by the slope, how many pixels away the attention is half
        slope = np.hypot(*np.gradient(attention)) + 1e-9
        panel.paste(LINE, mask=_stroke(abs(attention - half) / slope, width))


def _draw_ring(panel, place, width):
    """Draws into a panel a ring around (x, y), fractions of width and height, white in black, which
    shows on any ground."""
    reach, radius = math.ceil(4 * width), 2.5 * width
    centre = np.array(place) * panel.size
    corner = centre.astype(int) - reach
    xs, ys = np.arange(2 * reach + 1) + 0.5 - (centre - corner)[:, None]
    distance = abs(np.hypot(xs, ys[:, None]) - radius)
    for colour, times in (("black", 2), ("white", 1)):
        panel.paste(colour, tuple(map(int, corner)), _stroke(distance, times * width))


def _stroke(distance, width):
    """The mask of a stroke of some width, from the distance (h, w) of each pixel to its middle."""
    share = np.clip(width / 2 + 0.5 - distance, 0, 1)
    return Image.fromarray((255 * share + 0.5).astype(np.uint8))


_DPI, _MARGIN, _LEGEND = 110, 0.25, 0.16  # dots per inch, inches, inches a line of the legend


@dataclass
class _Grid:
    """A photograph in span × span cells at the top left, panels in the others, row by row.

    Lengths in inches. Above each cell a strip takes the panel's word.
    """

    lines: list[str]  # the caption
    legend: list[str]  # in lines, too; none without panels
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
        self.foot = _LEGEND * len(self.legend)  # under it; the legend does not change the grid
        self.stroke = 4 * self.strip / 72 * _DPI  # pixels, of lines in the panels

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


def _choose_grid(text, count, aspect, about):
    """The best grid 12 inches wide, or less where that would be over 10 high; `about` is what the
    legend says."""

    def best(width):
        room = width - 2 * _MARGIN
        lines = wrap(text, room, lambda line: _width(line, 17))
        legend = wrap(about if count else "", room, lambda line: _width(line, 9))
        spans = range(1, min(max(count, 1), 3) + 1)
        grids = [
            _Grid(lines, legend, count, aspect, width, span, columns)
            for span in spans
            for columns in range(span, span + count + 1)
        ]
        return min(grids, key=_Grid.cost)

    grid = best(12)
    return grid if grid.height <= 10 else best(max(4, 120 / grid.height))


def _write_note(panel, lines, size, at_top):
    """Writes lines into the lower left corner of a panel, on a ground that they show on; into the
    upper one where they would hide the ring."""
    room = panel.width / _DPI - 0.08
    sizes = [size * min(1, room / _width(line, size)) for line in lines]
    heights = [1.6 * own / 72 for own in sizes]
    top = 0 if at_top else panel.height / _DPI - sum(heights)
    for line, own, height in zip(lines, sizes, heights, strict=True):
        width = _width(line, own) + 0.08
        ImageDraw.Draw(panel).rectangle((_pixels(0, top), _pixels(width, top + height)), 0)
        _write(panel, (0.04, top + 0.75 * height), line, own, width, "white")
        top += height


def _percent(share):
    return f"{share:.{0 if share >= 0.0995 else 1}%}"


def _write_legend(canvas, grid):
    """What the picture shows, under all else."""
    base = grid.height - 0.6 * _MARGIN
    for line in grid.legend:
        left, base = _MARGIN, base + _LEGEND
        for piece in re.split("(━━|◎)", line):
            _write(canvas, (left, base), piece, 9, grid.inner, _SIGNS.get(piece, "#666"))
            left += _width(piece, 9)


def _write(canvas, place, text, size, room, colour="black"):
    """Writes a line at (x, y) inches from the top left, smaller where it is wider than `room`."""
    size = min(size, size * room / max(_width(text, size), 1e-9))
    (x, y), draw = _pixels(*place), ImageDraw.Draw(canvas)
    for piece, path in fonts.runs(text):
        draw.text((x, y), piece, colour, _font(path, size), anchor="ls")
        x += _font(path, size).getlength(piece)


@lru_cache(1024)
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
    mean = float(photo.mean().clip(0.01, 0.99))
    return photo ** min(max(math.log(0.4) / math.log(mean), 0.45), 1.0)


def _smooth(alpha, shape):
    """L alphas that sum to one, a square grid, blown up to `shape`: how many times as much as if
    it were even the attention is at each pixel.

    A pixel is the mean of the grid weighted by a Gaussian of the distance to its places, so that
    peaks are round, and what is even stays even up to the edges.
    """
    size = math.isqrt(len(alpha))
    grid = len(alpha) * alpha.reshape(size, size)

    def weights(length):
        pixels = (np.arange(length)[:, None] + 0.5) * size / length
        weights = np.exp(-0.5 * ((pixels - np.arange(size) - 0.5) / 0.65) ** 2)
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)

    return weights(shape[0]) @ grid @ weights(shape[1]).T
