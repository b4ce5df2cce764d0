"""Images gathered on disk: as a list would have them, and memory that does not grow."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measure_input_files import measure

from captioned import Caption, CaptionedImage, Fault
from gathered import Gathered


def image(name, split=None, id_=None, captions=()):
    return CaptionedImage(name, None, [Caption(c) for c in captions], split, f"at {name}", id_)


def gathered(images):
    found = Gathered()
    for own in images:
        found.add(own)
    return found


IDS = st.one_of(st.none(), st.integers(0, 12), st.integers(0, 12).map(str), st.just("9" * 30))


@settings(max_examples=60)
@given(st.lists(st.tuples(IDS, st.sampled_from(["TRAIN", "VAL"])), max_size=12))
def test_ids_are_places_or_names_and_none_is_twice(entries):
    images = [image(f"name{i}", split, id_) for i, (id_, split) in enumerate(entries)]
    own = [(split, str(id_)) for id_, split in entries if id_ is not None]
    found = gathered(images)
    twice = found.give_ids()
    assert (twice is not None) == (len(set(own)) < len(own))
    if twice:
        assert str(twice[0].id) == str(twice[1].id) and twice[0].split == twice[1].split
        return
    for i, (one, other) in enumerate(zip(images, found, strict=True)):
        expected = i if (one.split, str(i)) not in own else one.name
        assert other.id == (expected if one.id is None else one.id) and other.name == one.name


def test_rows_of_an_image_are_its_captions_and_names_may_hold_anything(tmp_path):
    found, name = Gathered(), "half \udcff of a character"
    for i in range(3):
        found.add_row(tmp_path, f"line {i}", name, [Caption(f"a dog {i}")], "TRAIN")
    found.add_row(tmp_path, "line 3", "other", [Caption("a", ["a"])], None)
    with pytest.raises(Fault, match="in the split val, which line 0 has in train"):
        found.add_row(tmp_path, "line 4", f"./{name}", [Caption("a cat")], "VAL")
    first, second = found
    assert (first.name, first.source, first.split) == (name, tmp_path / name, "TRAIN")
    assert first.captions == [Caption(f"a dog {i}") for i in range(3)]
    assert second == found[1] and second.captions == [Caption("a", ["a"])]
    assert found.splits() == {"TRAIN": 1, None: 1} and len(found) == 2


def test_what_is_left_out_is_gone_and_the_others_keep_their_order():
    found = gathered([image(str(i), None, None, ["a"] * (i % 3)) for i in range(9)])
    found.give_ids()
    assert found.keep() == 3 and [own.name for own in found] == ["1", "2", "4", "5", "7", "8"]
    assert found.keep([2, 5, 8]) == 3
    found.give_splits(["TRAIN", "VAL", "TRAIN"])
    assert [(own.id, own.split) for own in found] == [(2, "TRAIN"), (5, "VAL"), (8, "TRAIN")]
    assert [own.id for own in found.of_split("TRAIN")] == [2, 8]


def test_another_thread_may_read():
    """As the library does that learns subwords."""
    found = gathered([image(str(i), captions=["a dog"]) for i in range(3)])
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(list, found).result() == list(found)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images():
    _, few, _ = measure(1000)
    _, many, _ = measure(8000)
    assert many < few + 12  # MB; in lists they took 11 kB each, captions encoded
