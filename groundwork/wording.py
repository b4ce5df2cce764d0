"""Words of messages: numbers of things, sizes, lists."""

import math
import sys
from unicodedata import category, east_asian_width

import regex

MOST = 10  # of a list that is shown

# Scripts whose words stand side by side; those of the first write no blanks at all
IDEOGRAPHS = r"\p{Han}\p{Hiragana}\p{Katakana}ー"
SIDE_BY_SIDE = rf"{IDEOGRAPHS}\p{{Thai}}\p{{Lao}}\p{{Khmer}}\p{{Myanmar}}"
# what a line may end with: a word, or a character of these scripts, with what closes it
PIECE = regex.compile(
    rf" *(?:(?=[{SIDE_BY_SIDE}])\X|(?:(?![{SIDE_BY_SIDE}])[^ ])+)"
    r"(?:(?![\x00-\x7f])[\p{Po}\p{Pe}])*"
)


def counted(number, noun, plural=None):
    """A number with its noun: 1 image, 2 images, 2 processes; `plural` where it is another."""
    plural = plural or (f"{noun}es" if noun.endswith("s") else f"{noun}s")
    return f"{number} {noun if number == 1 else plural}"


def size_of(count):
    """Bytes in the unit that fits: "0 bytes", "1.5 kB", "24 GB"."""
    if count < 999.5:
        return counted(round(count), "byte")
    power = next(n for n in range(1, 7) if count < 999.5 * 1000**n or n == 6)
    return f"{count / 1000**power:.3g} {'kMGTPE'[power - 1]}B"


def figure(value, form):
    """A number in a format, a dash where there is none: where it is NaN. Zero has no minus."""
    text = "–" if math.isnan(value) else f"{value:{form}}"
    return text if any(digit in text for digit in "123456789") else text.lstrip("-")


def some(items, most=MOST):
    """The items with commas between, of many the first ones and how many more there are."""
    items = list(map(str, items))
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if items[most:] else "")


def wrap(text, room, width):
    """A text in lines that are `room` wide, or a word long.

    Args:
        width: of a text, in the unit of `room`.
    """
    lines = []
    for piece in PIECE.findall(text):
        if lines and width(lines[-1] + piece) <= room:
            lines[-1] += piece
        else:
            lines.append(piece.lstrip(" "))
    return lines


def columns(text):
    """How wide a text is, in letters: characters of Chinese and its like take two."""
    return sum(
        1 + (east_asian_width(c) in "WF") for c in text if category(c) not in ("Mn", "Me", "Cf")
    )


class Complaints:
    """Lines on stderr about single items, of which there may be a hundred thousand: the first ones,
    and at the end how many more there were."""

    def __init__(self, write=lambda line: print(line, file=sys.stderr)):
        self.write, self.count = write, 0

    def __enter__(self):
        return self

    def add(self, line):
        self.count += 1
        if self.count <= MOST:
            self.write(line)

    def __exit__(self, *_):
        if self.count > MOST:
            self.write(f"… and {self.count - MOST} more")
