"""The demo data set: coloured shapes on quiet backgrounds, with five true captions each.

Nothing is downloaded: every picture is drawn here, and its captions and boxes are read off the
same `Scene` that was drawn, so they are true by construction. The JSON has Karpathy's layout, so
the demo is read by the same code as Flickr8k and COCO, with two keys more for each image: `boxes`
(where each named shape is) and `scene` (what was drawn).

Lengths and places are fractions of the picture's side; x runs right and y runs down.
"""

import json
import string
from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from groundwork.files import atomic_write, make_folder, os_errors_as_user_errors
from groundwork.progress import progress
from utils import create_input_files
from word_rules import tokenize

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond")
COLOURS = {
    "red": (217, 35, 41),
    "orange": (247, 127, 0),
    "yellow": (255, 214, 36),
    "green": (36, 160, 72),
    "blue": (28, 104, 222),
    "purple": (124, 52, 184),
    "pink": (255, 135, 190),
}
# The longest side of a shape's box. The gaps between the ranges keep the size words honest.
SIZES = {"small": (0.16, 0.20), "medium": (0.24, 0.28), "big": (0.34, 0.42)}
BACKGROUNDS = ("plain", "shaded", "striped", "dotted", "cloudy")
# Pairs of muted neighbours, far less saturated than any colour that has a name above.
TONES = (
    ((247, 241, 230), (232, 221, 202)),
    ((228, 235, 241), (204, 216, 227)),
    ((228, 236, 225), (205, 219, 202)),
    ((236, 232, 241), (217, 210, 227)),
    ((244, 234, 230), (229, 213, 207)),
    ((242, 242, 240), (222, 222, 219)),
    ((60, 66, 78), (76, 84, 98)),
    ((54, 68, 71), (69, 86, 89)),
)
SPLITS = {"train": 1200, "val": 100, "test": 200}

MARGIN = 0.03  # least gap between two shapes, and between a shape and the picture's edge
RIM = 0.018  # width of the darker line around a shape; its round joints soften the corners
STEEPNESS = 1.7  # how many times further along one axis than the other "above" or "left" asks for
FINE = 4  # shapes are drawn this many times larger, then averaged down, for smooth edges
CAPTIONS, SHORTEST, LONGEST = 5, 5, 16  # captions per image; words per caption

# A wording suits a scene when `facts` has something true for each of its blanks.
WORDINGS = (
    "{all} {behind}",
    "{all} in the picture",
    "there is {all} {behind}",
    "the picture shows {all}",
    "there is only {lone}",
    "only {lone} {behind}",
    "there is {lone} {where}",
    "{lone} {where} of the picture",
    "{group}",
    "the {number} shapes are {group}",
    "{a} {how} {b}",
    "{a} {how} {b} {behind}",
    "there is {a} {how} {b}",
    "{the_a} is {how} {the_b}",
    "{a} {how} {b} and {how_else} {c}",
)


@dataclass(frozen=True)
class Thing:
    """One shape: its words, its box's centre and longest side, and its tilt in radians."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    side: float
    tilt: float


@dataclass(frozen=True)
class Scene:
    """Everything a picture shows and a caption may say."""

    background: str
    things: tuple[Thing, ...]


# ---------------------------------------------------------------------------- composing a scene


def compose(rng: Generator) -> Scene:
    """A random scene of one to three things; no two share a shape word or a colour word."""
    count = rng.choice([1, 2, 3], p=[0.15, 0.6, 0.25])
    background = str(rng.choice(BACKGROUNDS))
    shapes = rng.choice(SHAPES, count, replace=False).tolist()
    colours = rng.choice(list(COLOURS), count, replace=False).tolist()
    sizes, sides, centres = arrange(count, rng)
    tilts = rng.uniform(-0.2, 0.2, count).tolist()
    rows = zip(shapes, colours, sizes, *centres.T.tolist(), sides.tolist(), tilts, strict=True)
    return Scene(background, tuple(Thing(*row) for row in rows))


def arrange(count: int, rng: Generator) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Size words, sides (count,) and centres (count, 2) of things that keep clear of each other."""
    while True:
        sizes = rng.choice(list(SIZES), count).tolist()
        sides = np.array([rng.uniform(*SIZES[size]) for size in sizes])
        reach = MARGIN + sides[:, None] / 2
        centres = rng.uniform(reach, 1 - reach, (count, 2))
        if all(
            np.abs(centres[i] - centres[j]).max() > (sides[i] + sides[j]) / 2 + MARGIN
            for i, j in combinations(range(count), 2)
        ):
            return sizes, sides, centres


# --------------------------------------------------------------------------- putting it in words


def captions(scene: Scene, rng: Generator) -> list[str]:
    """Five different true captions, such as "a small red circle above a blue square"."""
    chosen: list[str] = []
    while True:
        for wording in rng.permutation(WORDINGS).tolist():
            known = facts(scene, rng)
            if not blanks(wording) <= known.keys():
                continue
            text = wording.format(**known)
            if SHORTEST <= len(tokenize(text)) <= LONGEST and text not in chosen:
                chosen.append(text)
            if len(chosen) == CAPTIONS:
                return chosen


def facts(scene: Scene, rng: Generator) -> dict[str, str]:
    """What can truly fill the blanks of a wording; whom it names, and how fully, is drawn anew."""
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    everything = listing([describe(thing, rng) for thing in things])
    known = {"all": everything, "behind": f"on a {scene.background} background"}
    if len(things) == 1:
        where = place(things[0])
        return known | {"lone": everything} | ({"where": where} if where else {})

    known |= {"group": everything, "number": {2: "two", 3: "three"}[len(things)]}
    related = [(a, how, b) for a, b in permutations(things, 2) if (how := relation(a, b))]
    if related:
        # `things` is in random order, so the first pair is any pair.
        a, how, b = related[0]
        known |= {"a": describe(a, rng), "how": how, "b": describe(b, rng)}
        known |= {"the_a": describe(a, rng, "the"), "the_b": describe(b, rng, "the")}
        for other, how_else, c in related[1:]:
            if other is a:
                known |= {"how_else": how_else, "c": describe(c, rng)}
    return known


def describe(thing: Thing, rng: Generator, article: str = "a") -> str:
    """The thing's shape, mostly with its colour and often with its size: "an orange star"."""
    said = [thing.shape]
    if rng.random() < 0.9:
        said.insert(0, thing.colour)
    if thing.size != "medium" and rng.random() < 0.6:
        said.insert(0, thing.size)
    if article == "a" and said[0][0] in "aeiou":
        article = "an"
    return " ".join([article, *said])


def listing(items: list[str]) -> str:
    """Join as English does: "x", "x and y", "x , y and z"."""
    return " and ".join([" , ".join(items[:-1]), items[-1]] if items[1:] else items)


def relation(a: Thing, b: Thing) -> str | None:
    """How `a` lies from `b`, or None where they are too much aslant to say."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dy) > STEEPNESS * abs(dx):
        return "above" if dy < 0 else "below"
    if abs(dx) > STEEPNESS * abs(dy):
        return "to the left of" if dx < 0 else "to the right of"
    return None


def place(thing: Thing) -> str | None:
    """Where in the picture the thing plainly is, or None where no word is plainly right."""
    dx, dy = thing.x - 0.5, thing.y - 0.5
    if max(abs(dx), abs(dy)) < 0.08:
        return "in the middle"
    if max(abs(dx), abs(dy)) < 0.16:
        return None
    if abs(dy) > STEEPNESS * abs(dx):
        return "at the top" if dy < 0 else "at the bottom"
    if abs(dx) > STEEPNESS * abs(dy):
        return "on the left" if dx < 0 else "on the right"
    return None


def blanks(wording: str) -> set[str]:
    """The names in braces."""
    return {name for _, name, _, _ in string.Formatter().parse(wording) if name}


# ------------------------------------------------------------------------------------- drawing it


def draw(scene: Scene, size: int, rng: Generator) -> Image.Image:
    """The scene as an RGB picture of size x size pixels; `rng` draws the background's details."""
    canvas = backdrop(scene.background, size, rng)
    for thing in scene.things:
        body, core = masks(outline(thing), size)
        # The light comes from above and a little from the left.
        cast = ImageChops.offset(body, round(0.008 * size), round(0.016 * size))
        shadow = np.asarray(cast.filter(ImageFilter.GaussianBlur(0.014 * size)))[..., None] / 255
        canvas *= 1 - 0.35 * shadow
        colour = np.array(COLOURS[thing.colour], float)
        canvas = blend(canvas, 0.74 * colour, body)
        height = (thing.y - (np.arange(size) + 0.5) / size) / thing.side
        lit = colour + 40 * height.clip(-0.5, 0.5)[:, None, None]
        canvas = blend(canvas, lit, core)
    return Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8))


def blend(under: np.ndarray, over: np.ndarray, mask: Image.Image) -> np.ndarray:
    """Lay `over` on `under` (size, size, 3) where `mask`, a grey picture, is white."""
    share = np.asarray(mask)[..., None] / 255
    return under + share * (over - under)


def masks(corners: np.ndarray, size: int) -> tuple[Image.Image, Image.Image]:
    """The whole shape and the shape within its rim, as grey pictures of size x size pixels."""
    fine = size * FINE
    points = [tuple(point) for point in corners * fine]
    # Two points more than the ring has, so that its last joint is rounded as well.
    ring = [*points, *points[:2]]
    width = round(RIM * fine)
    made = []
    for ink in (255, 0):
        mask = Image.new("L", (fine, fine))
        pen = ImageDraw.Draw(mask)
        pen.polygon(points, fill=255)
        pen.line(ring, fill=ink, width=width, joint="curve")
        made.append(mask.reduce(FINE))
    return made[0], made[1]


def outline(thing: Thing) -> np.ndarray:
    """The corners (n, 2) of the middle of the thing's rim, placed in the picture."""
    cos, sin = np.cos(thing.tilt), np.sin(thing.tilt)
    corners = unit_shapes()[thing.shape] @ [[cos, sin], [-sin, cos]]
    low, high = corners.min(0), corners.max(0)
    scale = (thing.side - RIM) / (high - low).max()
    return (corners - (low + high) / 2) * scale + np.array([thing.x, thing.y])


def box(thing: Thing) -> list[float]:
    """The tight box [x0, y0, x1, y1] around the thing, its rim included."""
    corners = outline(thing)
    edges = [*(corners.min(0) - RIM / 2), *(corners.max(0) + RIM / 2)]
    return [round(float(edge), 4) for edge in edges]


def backdrop(kind: str, size: int, rng: Generator) -> np.ndarray:
    """A background (size, size, 3), in 0..255: two neighbouring tones, mixed as `kind` tells."""
    first, second = np.array(TONES[rng.integers(len(TONES))], float)
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    turn = rng.uniform(0, 2 * np.pi)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    wave = 2 * np.pi / rng.uniform(0.07, 0.13)
    if kind == "plain":
        mix = np.zeros((size, size))
    elif kind == "shaded":
        # Ends beyond the second tone: between the two the change would hardly show.
        mix = 2 * (u - u.min()) / np.ptp(u)
    elif kind == "striped":
        mix = 0.5 + 0.5 * np.tanh(6 * np.sin(wave * u))
    elif kind == "dotted":
        mix = 0.5 + 0.5 * np.tanh(6 * (np.cos(wave * u) + np.cos(wave * v) - 1.1))
    else:
        mix = clouds(size, rng)
    grain = rng.normal(0, 1.5, (size, size))
    return first + mix[..., None] * (second - first) + grain[..., None]


def clouds(size: int, rng: Generator) -> np.ndarray:
    """Soft noise (size, size) of three grains, the coarser the stronger."""
    mix = np.zeros((size, size))
    for cells in (4, 8, 16):
        coarse = Image.fromarray(rng.normal(0, 1.2 / cells**0.5, (cells, cells)).astype(np.float32))
        mix += np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    # Bounded, lest a patch of cloud stray so far from the tones that it has a colour of its own.
    return 0.8 + np.tanh(mix)


@cache
def unit_shapes() -> dict[str, np.ndarray]:
    """The corners (n, 2) of each shape, upright, around (0, 0); `outline` sets the scale."""

    def ring(*radii: float, count: int) -> np.ndarray:
        turn = 2 * np.pi * np.arange(count) / count
        return np.resize(radii, count)[:, None] * np.stack([np.sin(turn), -np.cos(turn)], 1)

    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    lobes = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    arm = [(1, 1), (1, 3), (-1, 3), (-1, 1)]
    return {
        "circle": ring(1, count=64),
        "square": np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)]),
        "triangle": ring(1, count=3),
        "star": ring(1, 0.45, count=10),
        "heart": np.stack([16 * np.sin(t) ** 3, -lobes], 1),
        "cross": np.concatenate(
            [np.array(arm) @ np.linalg.matrix_power([[0, 1], [-1, 0]], k) for k in range(4)]
        ),
        "diamond": np.array([(0.68, 0), (0, 1), (-0.68, 0), (0, -1)]),
    }


# ------------------------------------------------------------------------------ writing it to disk


def make_demo(
    folder: str | Path,
    images: dict[str, int] | None = None,
    image_size: int = 256,
    seed: int = 0,
) -> Path:
    """Write `images` pictures per split (default `SPLITS`) and the JSON that describes them.

    Returns the path of the JSON. Picture i of a split depends on `seed`, the split and i alone.
    """
    folder = Path(folder)
    target = folder / "dataset_demo.json"
    # The JSON vouches for the pictures: it goes before the first is touched and comes last.
    make_folder(folder / "images")
    with os_errors_as_user_errors(folder):
        target.unlink(missing_ok=True)

    counts = SPLITS if images is None else images
    jobs = [(split, i) for split, n in counts.items() for i in range(n)]
    entries = []
    for imgid, (split, i) in enumerate(progress(jobs, desc="drawing the demo", unit="image")):
        rng = np.random.default_rng([seed, list(SPLITS).index(split), i])
        scene = compose(rng)
        entries.append(entry(scene, captions(scene, rng), f"{split}_{i:05d}.jpg", split, imgid))
        picture = draw(scene, image_size, rng)
        path = folder / "images" / entries[-1]["filename"]
        with os_errors_as_user_errors(path):
            picture.save(path, quality=95, subsampling=0)

    with atomic_write(target) as temporary:
        temporary.write_text(json.dumps({"dataset": "demo", "images": entries}))
    return target


def prepare(output_folder: str | Path, **options) -> str:
    """Input files of the demo data in `output_folder`; its pictures are drawn if they are missing.

    `options` are those of `utils.create_input_files`. Returns the data set's base name.
    """
    summary = create_input_files(
        "demo", *find_or_draw(output_folder), output_folder=output_folder, **options
    )
    return summary["base"]


def find_or_draw(output_folder):
    """The demo data's JSON and the folder of its pictures, drawn where they are missing."""
    folder = Path(output_folder) / "demo"
    karpathy_json = folder / "dataset_demo.json"
    if not karpathy_json.exists():
        make_demo(folder)
    return karpathy_json, folder / "images"


def entry(scene: Scene, texts: list[str], filename: str, split: str, imgid: int) -> dict:
    """The image's entry in the JSON."""
    sentences = [
        {
            "tokens": tokenize(text),
            "raw": text.capitalize() + " .",
            "imgid": imgid,
            "sentid": imgid * CAPTIONS + k,
        }
        for k, text in enumerate(texts)
    ]
    return {
        "filename": filename,
        "imgid": imgid,
        "split": split,
        "sentids": [sentence["sentid"] for sentence in sentences],
        "sentences": sentences,
        "boxes": {thing.shape: box(thing) for thing in scene.things},
        "scene": {
            "background": scene.background,
            "things": [
                {"shape": thing.shape, "colour": thing.colour, "size": thing.size}
                for thing in scene.things
            ],
        },
    }
