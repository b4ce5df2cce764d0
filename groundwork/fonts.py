"""Fonts that have the characters of a text: DejaVu Sans, or those that are installed."""

import sys
import threading
import unicodedata
from functools import cache, lru_cache
from itertools import groupby

from groundwork.errors import printable

_BOXES = "last resort", "lastresort", "adobe blank"  # fonts with a box for every character

_said = set()  # characters that no font has
_saying = threading.Lock()


def runs(text):
    """The text in pieces, each with the path of a font that has its characters.

    One font for the whole text where there is one, else for each word. Characters that no font
    has are named on stderr, once, and stand in a font that draws a box for them.
    """
    breaks = ("Cc", "Cs", "Zl", "Zp")  # of lines, and halves of characters
    text = "".join(" " if unicodedata.category(c) in breaks else c for c in text)
    if path := _font_of(text):
        return [(text, path)]
    if " " in text:
        pieces = [run for word in text.split(" ") for run in [*runs(word), (" ", _default())]][:-1]
    else:
        pieces = [(character, _font_of(character)) for character in text]
    _say({character for piece, path in pieces if path is None for character in piece})
    grouped = groupby(((piece, path or _default()) for piece, path in pieces), lambda run: run[1])
    return [("".join(piece for piece, _ in group), path) for path, group in grouped]


def families(text):
    """Names of fonts that have the text's characters, as matplotlib's `fontfamily` takes them."""
    return [_known_to_matplotlib(path) for path in dict.fromkeys(path for _, path in runs(text))]


@cache
def _known_to_matplotlib(path):
    from matplotlib import font_manager

    font_manager.fontManager.addfont(path)
    return _face(path).family_name


@cache
def _default():
    from matplotlib import font_manager  # here, as it takes time

    return font_manager.findfont("DejaVu Sans")


@cache
def _face(path):
    """matplotlib's reader of a font file, None of one that cannot be drawn at any size."""
    from matplotlib.ft2font import FT2Font

    try:
        face = FT2Font(path)
    except RuntimeError:  # damaged, or of an unknown format
        return None
    boxes = any(name in face.family_name.lower() for name in _BOXES)
    return face if face.scalable and not boxes else None


@cache
def _installed():
    """Paths of the system's fonts, upright ones of regular weight without serifs first."""
    from matplotlib import font_manager

    def rank(path):
        face = _face(path)
        plain = face.style_name in ("Regular", "Book", "Normal", "Roman")
        family = face.family_name
        return not plain, "Mono" in family, "Sans" not in family, family, path

    # not matplotlib's own list, which does not know what was installed after it was made
    return sorted(filter(_face, font_manager.findSystemFonts()), key=rank)


@lru_cache(2**14)
def _font_of(text):
    """Path of the first font that has all characters of the text, None if none has."""
    needed = {c for c in text if unicodedata.category(c) not in ("Cf", "Mn", "Zs")}
    codes = [ord(character) for character in needed]

    def has_all(path):
        return all(_face(path).get_char_index(code) for code in codes)

    if has_all(_default()):
        return _default()
    return next(filter(has_all, _installed()), None)


def _say(characters):
    with _saying:
        new = characters - _said
        _said.update(new)
    if new:
        scripts = sorted({unicodedata.name(c, "unknown").split()[0] for c in new})
        print(
            f"no installed font has {printable(' '.join(sorted(new)))} ({', '.join(scripts)}): "
            "boxes stand for them in pictures; Debian has most in fonts-noto-core and "
            "fonts-noto-cjk",
            file=sys.stderr,
        )
