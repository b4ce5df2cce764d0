"""Captions of mirror images, in whole words and in pieces of them."""

import pytest
import torch

import mirroring
from word_maps import _numbered, encode_caption
from word_rules import learn_subwords, make_rule, rule_of


def test_left_and_right_change_places_in_texts():
    for text, other in [
        ("Left, top-left of the leftmost!", "Right, top-right of the rightmost!"),
        ("LEFT upright leftover bright", "RIGHT upright leftover bright"),
        ("一个圆形在左边，方块在右边", "一个圆形在右边，方块在左边"),
        ("a man", "a man"),
    ]:
        assert mirroring.mirrored(text) == other
        assert mirroring.mirrored(other) == text


TEXTS = ["a dog on the left of a cat", "a cat", "the right dog and left cat", "左边的 dog"]


@pytest.mark.parametrize("name", ["characters", "subwords"])
def test_captions_in_pieces_say_the_other_side(name):
    """Of another length than before, too."""
    words = learn_subwords(TEXTS, 40) if name == "subwords" else None
    every = words or sorted({c for text in TEXTS for c in make_rule(name).split(text)} | {"右"})
    word_map = _numbered([*every], name)
    rule = rule_of(word_map)
    split = [rule.split(text) for text in TEXTS]
    encoded = [encode_caption(own, word_map, max(map(len, split))) for own in split]
    captions = torch.tensor([caption for caption, _ in encoded]).view(2, 2, -1)
    lengths = torch.tensor([length for _, length in encoded]).view(2, 2)
    found = mirroring.mirrored_captions(captions, lengths, word_map, rule)
    assert found.keys() == {(0, 0), (1, 0), (1, 1)}
    names = {index: word for word, index in word_map.items()}
    for place, text in [
        ((0, 0), "a dog on the right of a cat"),
        ((1, 0), "the left dog and right cat"),
    ]:
        assert rule.join([names[index] for index in found[place][1:-1]]) == text
    if name == "characters":
        assert rule.join([names[index] for index in found[1, 1][1:-1]]) == "右边的dog"
        assert len(found[0, 0]) == lengths[0, 0] + 1
