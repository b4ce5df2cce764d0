"""The demo's captions and boxes are checked against its pixels, by a reader of their own."""

import colorsys
import json
import os
import re
from itertools import combinations, pairwise

import numpy as np
import pytest
from conftest import failure, run_here
from PIL import Image

import demo
import draw_demo
import word_rules

COUNTS = {"train": 60, "val": 5, "test": 3}

# What each word means, told apart from the generator: hues in degrees, sides as fractions.
HUES = {
    "red": (345, 375),
    "orange": (20, 40),
    "yellow": (42, 60),
    "green": (110, 160),
    "blue": (200, 230),
    "purple": (255, 290),
    "pink": (310, 345),
}
SIDES = {"small": (0, 0.21), "big": (0.33, 1)}
RELATIONS = {
    "above": (0, -1),
    "below": (0, 1),
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
}
PLACES = {"at the top": (0, -1), "at the bottom": (0, 1), "on the left": (-1, 0)}
PLACES |= {"on the right": (1, 0), "in the middle": (0, 0)}
GROUNDS = ("plain", "shaded", "striped", "dotted", "cloudy")
NOUN = re.compile(
    rf"\b(a|an|the) (?:({'|'.join(SIDES)}) )?(?:({'|'.join(HUES)}) )?({'|'.join(demo.SHAPES)})\b"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    path = demo.make_demo(folder, COUNTS, seed=3)
    return folder, json.loads(path.read_text())


def pixels_of(folder, image):
    return np.asarray(Image.open(folder / "images" / image["filename"])).astype(int)


def coloured(pixels):
    """Where a picture (h, w, 3) is vivid; backgrounds and shadows never are."""
    return np.ptp(pixels, axis=2) > 60


def crop(array, box):
    x0, y0, x1, y1 = np.round(np.array(box) * array.shape[0]).astype(int)
    return array[y0:y1, x0:x1]


def colour_word(pixels, box):
    inside = crop(pixels, box)
    typical = np.median(inside[coloured(inside)], axis=0) / 255
    hue = 360 * colorsys.rgb_to_hsv(*typical)[0]
    (word,) = [w for w, (low, high) in HUES.items() if low < hue < high or low < hue + 360 < high]
    return word


def centre(box):
    return np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])


def parse(caption):
    """The noun phrases (article, size, colour, shape) and the rest, each noun put as N."""
    text = caption.lower().removesuffix(" .")
    return NOUN.findall(text), NOUN.sub("N", text)


def check_relation(words, first, second):
    """`second` is the point; `first` lies from it as `words` say, more that way than across."""
    along = np.array(RELATIONS[words])
    offset = centre(first) - centre(second)
    assert offset @ along > 1.5 * abs(offset @ along[::-1])
    axis = int(along[0] == 0)
    before, after = (first, second) if along.sum() < 0 else (second, first)
    assert before[axis + 2] < after[axis]


def test_colours_and_sizes_in_captions_are_those_of_the_pixels(made):
    folder, data = made
    for image in data["images"]:
        pixels = pixels_of(folder, image)
        seen = {shape: colour_word(pixels, box) for shape, box in image["boxes"].items()}
        assert len(set(seen.values())) == len(seen)
        for sentence in image["sentences"]:
            nouns, _ = parse(sentence["raw"])
            assert nouns
            for _, size, colour, shape in nouns:
                assert colour in ("", seen[shape])
                x0, y0, x1, y1 = image["boxes"][shape]
                low, high = SIDES.get(size, (0, 1))
                assert low < max(x1 - x0, y1 - y0) < high


def test_relations_places_and_counts_in_captions_hold(made):
    _, data = made
    found = set()
    any_relation = "|".join(RELATIONS)
    for image in data["images"]:
        boxes = image["boxes"]
        for sentence in image["sentences"]:
            nouns, rest = parse(sentence["raw"])
            named = [boxes[noun[3]] for noun in nouns]
            for words, box in zip(re.findall(any_relation, rest), named[1:], strict=False):
                # Every relation in a caption starts from the thing it names first.
                check_relation(words, named[0], box)
                found.add(words)
            for words in re.findall("|".join(PLACES), re.sub(any_relation, "", rest)):
                way, off = np.array(PLACES[words]), centre(named[0]) - 0.5
                assert off @ way > 0.1 if way.any() else np.abs(off).max() < 0.1
            if number := re.search("two|three|only", rest):
                expected = {"two": 2, "three": 3, "only": 1}[number[0]]
                assert len(boxes) == len(named) == expected
    assert found == set(RELATIONS)


def test_captions_name_the_background_drawn(made):
    folder, data = made
    roughness = {ground: [] for ground in GROUNDS}
    for image in data["images"]:
        pixels = pixels_of(folder, image).mean(2)
        for box in image["boxes"].values():
            # The shape and its shadow are no part of the background.
            crop(pixels, np.clip(np.array(box) + [-0.06, -0.06, 0.06, 0.06], 0, 1))[:] = np.nan
        roughness[image["scene"]["background"]].append(np.nanstd(pixels))
        for sentence in image["sentences"]:
            for word in re.findall(r"on a (\w+) background", sentence["raw"]):
                assert word == image["scene"]["background"]
    flat = roughness.pop("plain")
    assert all(max(flat) < min(others) for others in roughness.values())


def test_boxes_are_tight_apart_and_cover_all_that_is_vivid(made):
    folder, data = made
    for image in data["images"]:
        vivid = coloured(pixels_of(folder, image))
        for box in image["boxes"].values():
            assert all(0 <= edge <= 1 for edge in box)
            x0, y0, x1, y1 = np.array(box) * vivid.shape[0]
            part = vivid[int(y0) - 3 : int(y1) + 4, int(x0) - 3 : int(x1) + 4]
            columns, rows = np.flatnonzero(part.any(0)), np.flatnonzero(part.any(1))
            drawn = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) - 3
            drawn = drawn + [int(x0), int(y0), int(x0), int(y0)]
            np.testing.assert_allclose(drawn, [x0, y0, x1, y1], atol=2)
        for one, two in combinations(image["boxes"].values(), 2):
            assert one[2] < two[0] or two[2] < one[0] or one[3] < two[1] or two[3] < one[1]
        for box in image["boxes"].values():
            crop(vivid, np.clip(np.array(box) + [-0.01, -0.01, 0.01, 0.01], 0, 1))[:] = False
        assert not vivid.any()


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        ("circle", np.pi / 4),
        ("square", 1),
        ("triangle", 1 / 2),
        ("diamond", 1 / 2),
        ("cross", 5 / 9),
        ("heart", 180 * np.pi / (32 * 28.9)),
        (
            "star",
            5 * 0.45 * np.sin(np.pi / 5) / (2 * np.sin(0.4 * np.pi) * (1 + np.cos(np.pi / 5))),
        ),
    ],
)
def test_each_shape_fills_its_box_as_geometry_says(shape, share):
    thing = demo.Thing(shape, "blue", "big", 0.5, 0.5, 0.9, 0.0)
    picture = demo.draw(demo.Scene("plain", (thing,)), 256, np.random.default_rng(0))
    assert crop(coloured(np.asarray(picture).astype(int)), demo.box(thing)).mean() == pytest.approx(
        share, abs=0.03
    )


def test_captions_are_five_distinct_grammatical_sentences_of_few_words():
    vocabulary, named = set(), set()
    for seed in range(600):
        rng = np.random.default_rng(seed)
        texts = demo.captions(demo.compose(rng), rng)
        assert len(texts) == len(set(texts)) == 5
        for text in texts:
            tokens = word_rules.tokenize(text)
            assert 5 <= len(tokens) <= 16
            vocabulary.update(tokens)
            for article, following in pairwise(tokens):
                if article in ("a", "an"):
                    assert (article == "an") == (following[0] in "aeiou")
            shapes = [token for token in tokens if token in demo.SHAPES]
            assert len(shapes) == len(set(shapes))
            named.add(len(shapes))
    assert named == {1, 2, 3}
    assert vocabulary >= {*demo.SHAPES, *HUES, *SIDES, *GROUNDS}
    assert len(vocabulary) < 60


def test_json_is_in_karpathy_format(made):
    folder, data = made
    images = data["images"]
    assert data["dataset"] == "demo"
    assert {s: sum(i["split"] == s for i in images) for s in COUNTS} == COUNTS
    assert [image["imgid"] for image in images] == list(range(sum(COUNTS.values())))
    assert {image["filename"] for image in images} == set(os.listdir(folder / "images"))
    sentids = [sentence["sentid"] for image in images for sentence in image["sentences"]]
    assert sentids == list(range(5 * len(images)))
    for image in images:
        assert pixels_of(folder, image).shape == (256, 256, 3)
        assert set(image["boxes"]) <= set(demo.SHAPES) and 1 <= len(image["boxes"]) <= 3
        assert image["sentids"] == [sentence["sentid"] for sentence in image["sentences"]]
        for sentence in image["sentences"]:
            assert sentence["imgid"] == image["imgid"]
            assert sentence["raw"][0].isupper() and sentence["raw"].endswith(" .")
            letters = "".join(c for c in sentence["raw"].lower() if c.isalpha() or c == " ")
            assert sentence["tokens"] == letters.split()


def test_the_same_seed_makes_the_same_bytes_and_another_does_not(tmp_path):
    def files(name, seed):
        folder = demo.make_demo(tmp_path / name, {"train": 4}, 64, seed).parent
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    first = files("a", 1)
    assert len(first) == 5
    assert files("b", 1) == first
    assert not set(files("c", 2).values()) & set(first.values())


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path):
    def known(name, images):
        path = demo.make_demo(tmp_path / name, images, 64)
        return {
            image["filename"]: (
                (path.parent / "images" / image["filename"]).read_bytes(),
                [sentence["raw"] for sentence in image["sentences"]],
                image["boxes"],
            )
            for image in json.loads(path.read_text())["images"]
        }

    few, many = known("few", {"val": 3, "train": 2}), known("many", {"train": 4, "val": 3})
    assert all(few[name] == many[name] for name in few)
    assert len({pixels for pixels, _, _ in many.values()}) == 7


@pytest.mark.parametrize("broken", ["demo.draw", "os.replace"])
def test_an_interrupted_run_leaves_no_json(tmp_path, monkeypatch, broken):
    def interrupt(*_):
        raise KeyboardInterrupt

    whole = demo.make_demo(tmp_path, {"train": 2}, 64)
    assert whole.exists()
    monkeypatch.setattr(broken, interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo.make_demo(tmp_path, {"train": 2}, 64)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("wrong", ["folder", "seed", "none", "size"])
def test_command_line_refuses_in_one_line(tmp_path, wrong):
    (tmp_path / "file").write_text("")
    arguments = {
        "folder": ["--folder", tmp_path / "file"],
        "seed": ["--seed", -1],
        "none": ["--train", 0, "--val", 0, "--test", 0],
        "size": ["--image_size", 1],
    }[wrong]
    run = ["--folder", tmp_path, "--train", 1, "--val", 0, "--test", 0, *arguments]
    failure(run_here("draw_demo.py", *run))


def test_command_line_prints_where_the_json_is(tmp_path, monkeypatch, capsys):
    flags = ["--train", "2", "--val", "1", "--test", "0", "--image_size", "64"]
    monkeypatch.setattr("sys.argv", ["draw_demo.py", "--folder", str(tmp_path), *flags])
    draw_demo.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "dataset_demo.json")
    assert len(list((tmp_path / "images").iterdir())) == 3
