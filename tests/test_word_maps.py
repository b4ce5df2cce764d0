"""Which words there are: by frequency, by number, another model's, and new ones behind them."""

import pytest
from conftest import failure, run_here

import word_maps
from captioned import Caption
from groundwork.errors import UserError
from groundwork.files import read_json
from word_maps import Wanted, choose

TEXTS = ["b a a a", "c a b", "d b c", "e"]  # a 4, b 3, c 2, d 1, e 1
CAPTIONS = [Caption(text) for text in TEXTS]
OLD = word_maps._numbered(["dog", "a"], "karpathy")


def words(min_word_freq=0, **wanted):
    _, word_map, _ = choose(CAPTIONS, min_word_freq, Wanted(**wanted), "x.json")
    assert sorted(word_map.values()) == list(range(len(word_map)))
    return sorted(word_map, key=word_map.get)


def test_words_by_frequency_stand_as_they_come_first():
    special = ["<unk>", "<start>", "<end>"]
    assert words() == ["<pad>", *"bacde", *special]
    assert words(1) == ["<pad>", *"bac", *special]
    assert words(1, rule="whitespace") == ["<pad>", *"bac", *special, "<rule:whitespace>"]


def test_words_by_number_are_the_most_frequent():
    assert words(size=6)[1:3] == ["b", "a"]
    assert words(size=8)[1:5] == list("bacd")  # of equal ones the first
    assert words(size=100)[1:6] == list("bacde")
    assert words(1, size=100)[1:4] == list("bac")
    assert len(words(size=7, rule="ptb")) == 7
    for rule, size in [("karpathy", 4), ("ptb", 5)]:
        with pytest.raises(UserError, match=f"--vocabulary_size {size} is below .* {size + 1} or"):
            words(size=size, rule=rule)


def test_another_models_words_are_taken_as_they_are_or_extended():
    assert words(word_map=OLD) == sorted(OLD, key=OLD.get)
    longer = words(word_map=OLD, extend=True)
    assert longer[: len(OLD)] == sorted(OLD, key=OLD.get) and longer[len(OLD) :] == list("bcde")
    assert words(1, word_map=OLD, extend=True)[len(OLD) :] == ["b", "c"]
    assert words(word_map=OLD, extend=True, size=8)[len(OLD) :] == ["b", "c"]
    with pytest.raises(UserError, match="--vocabulary_size 6 is below what is needed"):
        words(word_map=OLD, extend=True, size=6)
    same = {word: i for i, word in enumerate(longer)}
    assert words(word_map=same, extend=True) == longer
    assert word_maps.is_extension(same, OLD) and not word_maps.is_extension(OLD, same)
    assert not word_maps.is_extension(OLD, OLD)
    assert not word_maps.is_extension(OLD | {"<rule:ptb>": len(OLD)}, OLD)


def test_what_cannot_be_is_one_line():
    other = word_maps._numbered(["dog"], "characters")
    for wanted, line in [
        ({"word_map": OLD, "rule": "ptb"}, "old.json has words of the rule karpathy, not of ptb"),
        ({"word_map": other}, "x.json has none of the words of old.json"),
        (  # <unk>, which subwords are split into, is none
            {"word_map": word_maps._numbered(["▁dog"], "subwords")},
            "x.json has none of the words of old.json",
        ),
        (
            {"word_map": word_maps._numbered(["▁a"], "subwords"), "extend": True},
            "old.json has subwords, of which new words are made, too",
        ),
    ]:
        with pytest.raises(UserError, match=line):
            words(source="old.json", **wanted)


CHINESE = [Caption("一只棕色的狗在草地上跑"), Caption("两个孩子在玩球"), Caption("a dog")]


def test_sentences_that_stand_as_one_word_are_told_with_the_way_out(monkeypatch):
    monkeypatch.setattr("test_word_maps.CAPTIONS", CHINESE)
    for rule in ("karpathy", "whitespace", "ptb"):
        with pytest.raises(UserError, match="50% of the words .* --words characters"):
            words(1, rule=rule)
    with pytest.raises(UserError, match="lower --min_word_freq"):
        words(9, rule="characters")


def test_what_keeps_more_words_can_be_done():
    pieces = word_maps._numbered(["▁a"], "subwords")
    assert "--extend_vocabulary" in Wanted(word_map=OLD).keeps_more
    assert "--extend_vocabulary" not in Wanted(word_map=pieces).keeps_more
    assert "--subwords" in Wanted(word_map=pieces).keeps_more


OWN = ["--dataset", "x", "--captions", "x.csv"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--words", "bpe"], "invalid choice: 'bpe'"),
        (["--words", "subwords"], "--words subwords takes their number: --subwords 4000"),
        (["--words", "ptb", "--subwords", 9], "--subwords makes other words than --words ptb"),
        (["--subwords", 9, "--min_word_freq", 2], "--subwords goes without --min_word_freq"),
        (["--subwords", 9, "--vocabulary_size", 9], "--subwords goes without --vocabulary_size"),
        (["--word_map", "w.json", "--vocabulary_size", 9], "--word_map goes without"),
        (["--extend_vocabulary"], "--extend_vocabulary goes with --word_map"),
        (["--vocabulary_size", 0], "--vocabulary_size: 0"),
        (["--word_map", "nowhere.json"], "cannot read nowhere.json: No such file"),
        (["--word_map", "nowhere.pth.tar"], "there is no checkpoint nowhere.pth.tar"),
        (["--word_map", __file__], "--word_map takes a WORDMAP_….json, a checkpoint or its folder"),
    ],
)
def test_options_that_do_not_go_together(options, line):
    assert line in failure(run_here("create_input_files.py", *OWN, *options))


def test_a_checkpoints_words_are_another_data_sets(checkpoint, scenes, tiny_data, tmp_path):
    """And of results of another system."""
    made = run_here(
        "create_input_files.py", "--dataset", "again", "--karpathy_json", scenes / "karpathy.json",
        "--image_folder", scenes / "images", "--output_folder", tmp_path, "--image_size", 16,
        "--word_map", checkpoint,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    own = read_json(tmp_path / "WORDMAP_again_5_cap_per_img_0_min_word_freq.json")
    folder, base = tiny_data
    assert own == read_json(folder / f"WORDMAP_{base}.json")
