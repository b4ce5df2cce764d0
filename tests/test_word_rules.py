"""How captions are split into words and joined by every rule, up to the model's own captions."""

import json
import subprocess
import sys
import unicodedata
from collections import Counter

import pytest
import torch
from conftest import OFFLINE, ROOT, SMALL, run_here
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import word_maps
import word_rules
from captioned import Caption
from groundwork.errors import UserError
from groundwork.files import read_json
from groundwork.wording import wrap
from word_rules import RULES, SPECIAL_WORDS, make_rule, rule_of

ALPHABET = "abcdefghijklmnopqrstuvwxyz.,!?()'\"0123456789#<>-红色的圆形。赤い丸สุนัขéß"
CAPTIONS = [
    "A man's dog , a black-and-white one, RUNS. It isn't brown!",
    "一个红色的圆形在图片左边。",
    "これは 赤い丸です。",
    "มีสุนัขสองตัววิ่งเล่น",
    *ALPHABET,
]
# of the four captions above, each joined again as it should be
SPLIT = {
    "karpathy": [
        ["a", "mans", "dog", "a", "blackandwhite", "one", "runs", "it", "isnt", "brown"],
        ["一个红色的圆形在图片左边。"],
        ["これは", "赤い丸です。"],
        ["มีสุนัขสองตัววิ่งเล่น"],
    ],
    "whitespace": [
        [
            "A",
            "man's",
            "dog",
            ",",
            "a",
            "black-and-white",
            "one,",
            "RUNS.",
            "It",
            "isn't",
            "brown!",
        ],
        ["一个红色的圆形在图片左边。"],
        ["これは", "赤い丸です。"],
        ["มีสุนัขสองตัววิ่งเล่น"],
    ],
    "ptb": [
        [
            "a",
            "man",
            "'s",
            "dog",
            ",",
            "a",
            "black-and-white",
            "one",
            ",",
            "runs",
            ".",
            "it",
            "is",
            "n't",
            "brown",
            "!",
        ],
        ["一个红色的圆形在图片左边。"],
        ["これは", "赤い丸です。"],
        ["มีสุนัขสองตัววิ่งเล่น"],
    ],
    "characters": [
        list("a▁mans▁dog▁a▁blackandwhite▁one▁runs▁it▁isnt▁brown"),
        list("一个红色的圆形在图片左边"),
        list("これは赤い丸です"),
        ["มี", "สุ", "นั", "ข", "ส", "อ", "ง", "ตั", "ว", "วิ่", "ง", "เ", "ล่", "น"],
    ],
    "unicode": [
        ["a", "man's", "dog", "a", "black", "and", "white", "one", "runs", "it", "isn't", "brown"],
        ["一个", "红色", "的", "圆形", "在", "图片", "左边"],
        ["これ", "は", "赤い", "丸", "です"],
        ["มี", "สุนัข", "สอง", "ตัว", "วิ่ง", "เล่น"],
    ],
}
JOINED = {
    "ptb": "a man's dog, a black-and-white one, runs. it isn't brown!",
    "characters": "a mans dog a blackandwhite one runs it isnt brown",
}


def learned(texts=CAPTIONS, size=400):
    return make_rule("subwords", word_rules.learn_subwords(texts, size))


def all_rules():
    return [learned() if name == "subwords" else make_rule(name) for name in RULES]


NEW = pytest.mark.skipif(sys.version_info < (3, 11), reason="icu4py is for Python 3.11 or newer")


def each(values):
    """Of each rule's name and its value a parameter of tests."""
    return [
        pytest.param(value, id=name, marks=[NEW] * (name == "unicode"))
        for name, value in values.items()
    ]


RULE = pytest.mark.parametrize("rule", each(dict(zip(RULES, all_rules(), strict=True))))


@pytest.mark.parametrize("name", each({name: name for name in SPLIT}))
def test_captions_of_several_languages(name):
    rule = make_rule(name)
    for caption, words in zip(CAPTIONS[:4], SPLIT[name], strict=True):
        assert rule.split(caption) == words
        assert rule.split(rule.join(words)) == words
    if name in JOINED:
        assert rule.join(SPLIT[name][0]) == JOINED[name]
    elif name == "unicode":
        assert [rule.join(words) for words in SPLIT[name][1:]] == [
            "一个红色的圆形在图片左边", "これは赤い丸です", "มีสุนัขสองตัววิ่งเล่น",
        ]  # fmt: skip
        assert rule.join(["一", "dog", "犬", "two", "cats"]) == "一 dog 犬 two cats"


WORD = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)


@RULE
@given(words=st.lists(WORD, min_size=1, max_size=8))
def test_plain_words_come_back(rule, words):
    """But where a treebank has two words for one that a line break or a blank would part."""
    text = " ".join(words)
    if rule.name == "ptb" and len(rule.split(text)) != len(words):
        return
    assert rule.join(rule.split(text)) == text


@pytest.mark.parametrize("name", each({n: n for n in ("characters", "unicode", "subwords")}))
@given(text=st.text("一个红色的圆形在图片左边赤い丸です", min_size=1, max_size=30))
def test_what_is_written_without_blanks_comes_back(name, text):
    rule = LEARNED if name == "subwords" else make_rule(name)
    assert rule.join(rule.split(text)) == text


LEARNED = learned()


@given(text=st.text(ALPHABET + " ", max_size=40))
def test_subwords_give_all_back_but_capitals_and_how_many_blanks_there_are(text):
    found = LEARNED.join(LEARNED.split(text))
    assert found == " ".join(unicodedata.normalize("NFC", text.lower()).split())


@pytest.mark.parametrize("name", ["karpathy", "whitespace", "characters", "subwords"])
@given(text=st.text(max_size=40))
def test_what_is_joined_is_split_again_into_the_same_words(name, text):
    rule = LEARNED if name == "subwords" else make_rule(name)
    words = rule.split(text)
    if name != "subwords" or set(words) <= set(LEARNED.words):  # others have no pieces
        assert rule.split(rule.join(words)) == words


@RULE
@given(parts=st.lists(st.sampled_from(["<", ">", "unk", "start", "end", "rule:ptb", " ", "a"])))
def test_no_word_of_a_caption_is_a_special_one(rule, parts):
    words = rule.split("".join(parts))
    assert not {"<start>", "<end>", "<pad>", "<rule:ptb>"} & set(words)
    assert "<unk>" not in words or rule.name == "subwords"


@RULE
def test_characters_are_the_same_in_whatever_way_they_are_written(rule):
    composed, apart = (
        unicodedata.normalize(form, "un café crème, Ångström") for form in ("NFC", "NFD")
    )
    assert composed != apart
    assert rule.split(composed) == rule.split(apart)


def test_a_grapheme_is_one_character():
    family, flag = "👩‍👩‍👧", "🇨🇭"
    assert make_rule("characters").split(f"{family}{flag} é") == [family, flag, "▁", "é"]


def test_learning_subwords_gives_the_same_ones_in_any_process():
    program = f"import word_rules; print(word_rules.learn_subwords({CAPTIONS[:4]!r} * 3, 90))"
    found = {
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env={"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in "123"
    }  # fmt: skip
    assert len(found) == 1 and "'▁a'" in found.pop()


def test_subwords_take_room_for_every_character():
    for size in (1, 3, 9):
        with pytest.raises(UserError, match=rf"--subwords {size} is below .* captions need, 11"):
            word_rules.learn_subwords(["abcde"], size)
    assert len(word_rules.learn_subwords(["abcde"], 11)) == 6  # with the blank, and 5 special words


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("unicode", "icu4py.breakers", "icu4py"), ("subwords", "tokenizers", "tokenizers")],
)
def test_a_missing_library_is_one_line_with_the_way_out(name, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"the rule '{name}' take.*pip install {package}"):
        make_rule(name, ["▁a"]).split("a dog")


def test_a_word_map_tells_its_rule():
    for name in RULES:
        assert rule_of(word_maps._numbered(["a"], name)).name == name
    special = {word: i for i, word in enumerate(SPECIAL_WORDS[::-1])}
    assert rule_of(special).name == "karpathy"
    with pytest.raises(UserError, match="^x: there is no rule of words 'foo': known are karpathy"):
        word_maps.check_word_map(special | {"<rule:foo>": 4}, "x")
    with pytest.raises(UserError, match="has one rule of words, not 2"):
        word_maps.check_word_map(special | {"<rule:ptb>": 4, "<rule:unicode>": 5}, "x")


def test_lines_break_where_a_language_has_no_blanks():
    text = "一个红色的圆形。a dog runs"
    assert wrap(text, 7, len) == ["一个红色的圆", "形。a dog", "runs"]
    assert wrap("a dog runs", 5, len) == ["a dog", "runs"]
    assert wrap("", 5, len) == []


# --------------------------------------------------------------------------------- all the way


@pytest.fixture(scope="module")
def bilingual(tmp_path_factory):
    """A table of captions of four plain images, half of them in Chinese."""
    folder = tmp_path_factory.mktemp("bilingual")
    rows = ["image,caption,split"]
    for i, (colour, word) in enumerate([("red", "红色"), ("blue", "蓝色")] * 2):
        Image.new("RGB", (32, 32), colour).save(folder / f"{i}.png")
        split = "train" if i < 2 else "val"
        rows += [f"{i}.png,A dog's {colour} ball.,{split}", f"{i}.png,一个{word}的球。,{split}"]
    (folder / "captions.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder


TINY = [*SMALL, "--encoded_image_size", 1, "--amp", "off", "--encoder", OFFLINE, "--device", "cpu"]
TINY += ["--stage", "decoder", "--batch_size", 4, "--epochs", 1, "--dropout", 0, "--bar_special"]


@pytest.mark.parametrize("name", each({name: name for name in RULES}))
def test_captions_by_every_rule_from_a_table_to_a_models_own(name, bilingual, tmp_path):
    options = ["--words", name] if name != "subwords" else ["--subwords", 60]
    made = run_here(
        "create_input_files.py", "--dataset", "both", "--captions", bilingual / "captions.csv",
        "--image_folder", bilingual, "--output_folder", tmp_path, "--image_size", 32,
        *options, *(["--min_word_freq", 0] if name != "subwords" else []),
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    word_map = read_json(tmp_path / "WORDMAP_both_5_cap_per_img_0_min_word_freq.json")
    assert sorted(word_map.values()) == list(range(len(word_map)))
    rule = rule_of(word_map)
    assert rule.name == name
    for caption in ("A dog's red ball.", "一个蓝色的球。"):
        assert set(rule.split(caption)) <= word_map.keys()
    trained = run_here("train.py", "--data_folder", tmp_path, *TINY)
    assert trained.returncode == 0, trained.stderr
    shown = run_here(
        "caption.py", "--img", bilingual / "0.png", "--model", tmp_path, "--json",
        "--no_pictures", "--device", "cpu",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    [found] = json.loads(shown.stdout)
    assert found["words"] and set(found["words"]) <= word_map.keys() - set(SPECIAL_WORDS)
    assert not any(word.startswith("<rule:") for word in found["words"])
    assert found["caption"] == rule.join(found["words"])
    bias = torch.load(
        tmp_path / "BEST_checkpoint_both_5_cap_per_img_0_min_word_freq.pth.tar", weights_only=True
    )["decoder"]["fc.bias"]
    never = [word_map[word] for word in word_rules.unsayable(word_map)]
    assert len(never) == 3 + (name != "karpathy") and (bias[never] == -(2.0**14)).all()


def test_tokens_are_taken_by_the_rules_that_split_as_they_do():
    caption = Caption("红色圆形。", ["红色", "圆形"])
    for name, words in {
        "karpathy": ["红色", "圆形"],
        "whitespace": ["红色", "圆形"],
        "characters": ["红", "色", "圆", "形"],
        "ptb": ["红色圆形。"],
    }.items():
        assert word_maps.words_of(caption, make_rule(name)) == words
    # what was written says nothing, or is missing
    for name in RULES.keys() - {"subwords", "unicode"}:
        for raw in (".", None):
            assert word_maps.words_of(Caption(raw, ["a", "dog"]), make_rule(name)) == (
                list("a▁dog") if name == "characters" else ["a", "dog"]
            )


def test_a_word_that_no_piece_has_stays_whole_and_unknown():
    rule = word_rules.make_rule("subwords", {"▁a": 1, "▁": 2, "b": 3, "<unk>": 4})
    words = ["▁a", "▁a", "b", "▁жук", "▁a", "!"]
    assert rule.split("A ab жук a!") == words and rule.join(words) == "a ab жук a!"
    assert rule.split("жук") == ["▁жук"]


def test_a_few_names_without_blanks_are_no_reason_for_another_rule():
    rule = word_rules.make_rule("karpathy")
    assert not word_rules.hint(rule, Counter({"a": 91, "一只棕色的狗": 9}))
    assert "11% of the words" in word_rules.hint(rule, Counter({"a": 89, "一只棕色的狗": 11}))
    assert not word_rules.hint(word_rules.make_rule("characters"), Counter({"一只棕色的狗": 9}))
