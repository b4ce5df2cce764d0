"""Words and vocabulary; test_create_input_files.py has the rest."""

import pytest
from conftest import WORDS

import word_maps
import word_rules
from groundwork.errors import UserError


@pytest.mark.parametrize(
    "word_map",
    [
        None,
        list(WORDS),
        {},
        {word: i for word, i in WORDS.items() if word != "<end>"},
        WORDS | {"cat": 7},  # a gap
        WORDS | {"cat": 2},  # twice the same
        WORDS | {"cat": -1},
        WORDS | {"cat": "six"},
        WORDS | {"cat": [6]},
    ],
)
def test_what_is_no_word_map(word_map):
    with pytest.raises(UserError, match="^somewhere is no word map"):
        word_maps.check_word_map(word_map, "somewhere")


def test_word_map():
    word_maps.check_word_map(WORDS, "somewhere")
    word_maps.check_word_map(dict(reversed(WORDS.items())), "somewhere")
    word_maps.check_word_map(WORDS | {str(i): i for i in range(6, 1000)}, "somewhere")


def test_tokenize():
    assert word_rules.tokenize(" A man's dog , a black-and-white one , RUNS .\n") == (
        ["a", "mans", "dog", "a", "blackandwhite", "one", "runs"]
    )
