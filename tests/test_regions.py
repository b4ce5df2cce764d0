"""Files of regions: what they may hold, and what is refused in a line."""

import json
import math

import numpy as np
import pytest

import regions
from groundwork.errors import UserError
from regions import Region

BOX, MASK = [0.1, 0.2, 0.5, 0.8], ["0011", "0000"]
ANNOTATION = """<annotation><filename>7.jpg</filename>
<size><width>500</width><height>200</height><depth>3</depth></size>
<object><name>1</name><bndbox><xmin>50</xmin><ymin>20</ymin><xmax>250</xmax><ymax>200</ymax>
</bndbox></object>
<object><name>1</name><name>3</name><bndbox><xmin>300</xmin><ymin>100</ymin><xmax>500</xmax>
<ymax>150</ymax></bndbox></object>
<object><name>2</name><scene>1</scene><nobndbox>1</nobndbox></object></annotation>"""
SENTENCES = """[/EN#1/people Two young men] in [/EN#2/scene the garden] .
[/EN#3/people A Guy] waves at [/EN#0/notvisual it] ."""


def write(path, contents):
    path.write_text(json.dumps(contents))
    return path


def same(region, *boxes):
    return np.allclose(region.shares(20), Region.of_boxes(boxes).shares(20))


def test_boxes_and_masks_of_words(tmp_path):
    path = write(tmp_path / "r.json", {"a.jpg": {"Dog": BOX, "cat": [BOX, [0, 0, 1, 0.1]]},
                                       "b.jpg": {"dog": MASK}, "c.jpg": {}})  # fmt: skip
    found = regions.read_regions(path)
    assert same(found["a.jpg"]["dog"], BOX)
    assert same(found["a.jpg"]["cat"], BOX, [0, 0, 1, 0.1])
    assert same(found["b.jpg"]["dog"], [0.5, 0, 1, 0.5])
    assert found["c.jpg"] == {}


def test_a_region_of_the_whole_file_is_that_of_the_words_named(tmp_path):
    path = write(tmp_path / "r.json", {"a.jpg": MASK, "b.jpg": BOX})
    found = regions.read_regions(path, ["man", "Men"])
    assert set(found["a.jpg"]) == set(found["b.jpg"]) == {"man", "men"}
    assert same(found["b.jpg"]["men"], BOX)


def test_flickr30k_entities(tmp_path):
    """Made by its published layout: a phrase may have several boxes, a box several entities."""
    for folder, name, text in (
        ("Annotations", "7.xml", ANNOTATION), ("Sentences", "7.txt", SENTENCES)
    ):  # fmt: skip
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    found = regions.read_regions(tmp_path)
    assert set(found) == {"7.jpg"} and set(found["7.jpg"]) == {"men", "guy"}
    assert same(found["7.jpg"]["men"], [0.1, 0.1, 0.5, 1], [0.6, 0.5, 1, 0.75])
    assert same(found["7.jpg"]["guy"], [0.6, 0.5, 1, 0.75])
    (tmp_path / "Annotations" / "7.xml").write_text("<annotation></annotation>")
    with pytest.raises(UserError, match=r"7\.xml is no annotation of Flickr30k Entities"):
        regions.read_regions(tmp_path)
    for wrong in (ANNOTATION.replace("500</width>", "0</width>"), ANNOTATION.replace("250", "20")):
        (tmp_path / "Annotations" / "7.xml").write_text(wrong)
        with pytest.raises(UserError, match=r"7\.xml is no annotation"):
            regions.read_regions(tmp_path)
    (tmp_path / "Annotations" / "7.xml").write_text(ANNOTATION)
    (tmp_path / "Sentences" / "7.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"7\.txt"):
        regions.read_regions(tmp_path)
    (tmp_path / "Sentences" / "7.txt").write_text("[/EN#1/other  ] .")
    with pytest.raises(UserError, match=r"no Sentences/\*\.txt with boxes"):
        regions.read_regions(tmp_path)


def test_a_mask_of_nothing_is_no_region_and_many_boxes_are_quick(tmp_path):
    rng = np.random.default_rng(0)
    many = np.sort(rng.random((2000, 2, 2)), axis=1).reshape(-1, 4).tolist()
    path = write(tmp_path / "r.json", {"a.jpg": {"dog": ["00"], "cat": many}})
    found = regions.read_regions(path)["a.jpg"]
    assert set(found) == {"cat"} and 0.99 < found["cat"].area <= 1 + 1e-9


@pytest.mark.parametrize("contents, words, message", [
    ([BOX], [], "holds no regions"),
    ({}, [], "holds no regions"),
    ({"a.jpg": MASK}, [], "without words for a.jpg: .*--region_words"),
    ({"a.jpg": {"dog": MASK}}, ["man"], "words of its own: leave --region_words out"),
    ({"a.jpg": {"dog": [0.1, 0.2, 0.5]}}, [], "of a.jpg is neither .*four numbers"),
    ({"a.jpg": {"dog": [[0.1, 0.2], [0.5, 1]]}}, [], "of a.jpg is neither .*four numbers"),
    ({"a.jpg": {"dog": [10, 20, 50, 80]}}, [], "fractions, from 0 to 1"),
    ({"a.jpg": {"dog": [0.5, 0.2, 0.1, 0.8]}}, [], "second corner"),
    ({"a.jpg": {"dog": ["01", "0"]}}, [], "differ in length"),
    ({"a.jpg": {"dog": ["02"]}}, [], "not of 0 and 1"),
    ({"a.jpg": {"dog": ["", ""]}}, [], "of a.jpg is neither"),
    ({"a.jpg": {"dog": []}}, [], "of a.jpg is neither"),
    ({"a.jpg": {"dog": "0110"}}, [], "of a.jpg is neither"),
    ({"a.jpg": {"dog": [False, False, True, True]}}, [], "four numbers"),
    ({"a.jpg": {"dog": [0, 0, 10**400, 1]}}, [], "fractions, from 0 to 1"),
    ({"a.jpg": {"dog": [0, 0, math.nan, 1]}}, [], "fractions, from 0 to 1"),
    ({"a.jpg": {"dog": BOX, "Dog": BOX}}, [], "'dog' of a.jpg twice"),
    ({"a.jpg": {"big dog": BOX}}, [], "'big dog' of a.jpg is not one word"),
    ({"a.jpg": BOX}, ["red heart"], "'red heart' of a.jpg is not one word"),
    ({"a.jpg": {"dog": [[]]}}, [], "of a.jpg is neither"),
    ({"a.jpg": {"dog": {"x": 1}}}, [], "of a.jpg is neither"),
    ({"a.jpg": {"dog": None}}, [], "of a.jpg is neither"),
    ({"a.jpg": None}, ["man"], "of a.jpg is neither"),
    ({"a.jpg": {"dog": [None, 0, 1, 1]}}, [], "of a.jpg is neither"),
])  # fmt: skip
def test_what_is_no_file_of_regions_is_refused(tmp_path, contents, words, message):
    path = write(tmp_path / "r.json", contents)
    with pytest.raises(UserError, match=message) as refused:
        regions.read_regions(path, words)
    assert str(path) in str(refused.value)


def test_no_region_at_all_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "no.json"):
        with pytest.raises(UserError, match=str(path)):
            regions.read_regions(path)


def test_the_regions_of_a_split_are_those_of_its_files(tmp_path):
    found = regions.read_regions(write(tmp_path / "r.json", {"b.jpg": {"dog": BOX}}))
    own = regions.of_split([{"filename": "a.jpg"}, {"filename": "b.jpg"}], found, "r.json")
    assert own.known == 1 and own.of_images[0] is None and same(own.of_images[1]["dog"], BOX)
    with pytest.raises(UserError, match=r"r\.json has regions of 1 image, b\.jpg.*a\.jpg"):
        regions.of_split([{"filename": "a.jpg"}], found, "r.json")


def test_boxes_of_the_data_set_are_complete_or_none():
    own = regions.complete([{"boxes": {"star": BOX}}], ["star", "heart"])
    assert same(own.of_images[0]["star"], BOX) and own.names == {"star", "heart"}
    assert regions.complete([{"boxes": {"star": BOX}}, {}], ["star"]) is None
