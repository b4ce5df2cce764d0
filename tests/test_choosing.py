"""How captions are come by: what is drawn from, which options go together, consensus, and what the
scripts make of it."""

import json
import math
from collections import Counter

import pytest
import torch
from conftest import failure, run_here
from test_decoding import (
    DRAWS,
    FORBIDDEN,
    MAX_LENGTH,
    START,
    WORD_MAP,
    assert_same,
    first_words,
    make_decoder,
    make_images,
    teacher_forced,
)

import decoding
from captioner import Captioner
from choosing import Search, by_consensus, find
from constraints import sayable
from groundwork.errors import UserError

# ------------------------------------------------------------------------------------- drawing


def truncated(scores, temperature, top_k, top_p):
    """The probabilities of the words that are drawn from, in plain lists: the definition."""
    weights = {w: math.exp(s / temperature) for w, s in enumerate(scores) if math.isfinite(s)}
    order = sorted(weights, key=lambda w: -weights[w])[:top_k]
    total, kept = sum(weights[w] for w in order), []
    for word in order:
        if top_p is not None and sum(weights[w] for w in kept) >= top_p * total:
            break
        kept.append(word)
    total = sum(weights[w] for w in kept)
    return torch.tensor([weights[w] / total if w in kept else 0.0 for w in range(len(scores))])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 3, None), (1.0, None, 0.7), (2.0, None, 0.7), (1.0, 4, 0.8), (0.5, 2, 0.99),
     (1.0, 99, 1.0)],
)  # fmt: skip
def test_words_are_drawn_from_the_likeliest_alone(temperature, top_k, top_p):
    decoder, image = make_decoder(6), make_images(1)
    memory = decoder.prepare(image)
    with torch.no_grad():
        scores = decoder.step(torch.tensor([START]), decoder.init_state(memory), memory)[0][0]
    scores[list(FORBIDDEN)] = -torch.inf
    expected = truncated(scores.tolist(), temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(1)
    captions = decoding.sample(
        decoder, image, WORD_MAP, 1, temperature, generator, top_k=top_k, top_p=top_p,
        per_image=DRAWS,
    )  # fmt: skip
    found = first_words(captions)
    assert ((found > 0) <= (expected > 0)).all()
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / DRAWS).sqrt()).all()
    whole = truncated(scores.tolist(), temperature, None, None)
    assert (len(whole.nonzero()) > len(expected.nonzero())) == (top_k != 99)
    own = {caption.words[0]: caption.log_prob for caption in captions}
    for word, log_prob in own.items():  # the model's own, not that of what is drawn from
        assert log_prob == pytest.approx(teacher_forced(decoder, image[0], [word])[0], rel=1e-3)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}])
def test_drawing_from_one_word_is_greedy(options):
    decoder, images = make_decoder(3), make_images(seed=3)
    drawn = decoding.sample(decoder, images, WORD_MAP, MAX_LENGTH, 5.0, **options)
    plain = decoding.greedy(decoder, images, WORD_MAP, MAX_LENGTH)
    for caption, expected in zip(drawn, plain, strict=True):
        assert_same(caption, *expected)


def test_several_captions_of_an_image_are_drawn_each_by_itself():
    decoder, images = make_decoder(1, std=0.3), make_images(3)
    drawn = decoding.sample(decoder, images, WORD_MAP, MAX_LENGTH, per_image=5)
    assert len(drawn) == 15 and len({tuple(caption.words) for caption in drawn}) > 8
    for i, caption in enumerate(drawn):
        assert_same(caption, caption.words, *teacher_forced(decoder, images[i // 5], caption.words))


# ----------------------------------------------------------------------------------- consensus


def likeness(a, b):
    """CIDEr-D of two captions with all n-grams alike, by its formula (Vedantam et al., 2015)."""
    total = 0.0
    for n in range(1, 5):
        counts = [Counter(zip(*(w[i:] for i in range(n)), strict=False)) for w in (a, b)]
        norms = [math.sqrt(sum(c * c for c in own.values())) for own in counts]
        shared = sum(min(counts[0][g], c) * c for g, c in counts[1].items())
        total += shared / (norms[0] * norms[1]) / 4 if shared else 0.0
    return 10 * total * math.exp(-((len(a) - len(b)) ** 2) / (2 * 6**2))


def test_consensus_is_the_mean_likeness_to_the_others():
    texts = ["a b c d", "a b c e", "a b c d e", "f", "a b c d", "b a", "f e d c b a"]
    words = [text.split() for text in texts]
    captions = [decoding.Caption(own, -float(i), None) for i, own in enumerate(words)]
    found = by_consensus(captions)
    assert " ".join(found[0].words) == "a b c d"
    assert len(found) == len(set(texts))  # what comes twice counts twice, and is there once
    for caption in found:
        i = words.index(caption.words)
        others = words[:i] + words[i + 1 :]
        expected = sum(likeness(words[i], own) for own in others) / len(others)
        assert caption.consensus == pytest.approx(expected, abs=1e-9)
    values = [caption.consensus for caption in found]
    assert values == sorted(values, reverse=True) and values[-1] < values[0]
    [only] = by_consensus(captions[:1])
    assert only.words == words[0] and only.consensus == 0


def test_candidates_are_those_of_the_beam_or_as_many_drawn():
    decoder, images = make_decoder(2, std=0.5), make_images(4)
    beams = decoding.finished_beams(decoder, images, WORD_MAP, 6, MAX_LENGTH)
    asked = Search(6, max_words=MAX_LENGTH, rerank="consensus", candidates=4)
    moved = 0
    for captions, beam in zip(find(decoder, images, WORD_MAP, asked, 9), beams, strict=True):
        assert sorted(c.words for c in captions) == sorted(c.words for c in beam[:4])
        assert [c.words for c in captions] == [c.words for c in by_consensus(beam[:4])]
        moved += captions[0].words != beam[0].words
    assert moved
    asked = Search(temperature=1.0, max_words=MAX_LENGTH, rerank="consensus", candidates=12)
    generator = torch.Generator().manual_seed(0)
    found = find(decoder, images, WORD_MAP, asked, 12, generator)
    generator.manual_seed(0)
    drawn = decoding.sample(decoder, images, WORD_MAP, MAX_LENGTH, 1.0, generator, per_image=12)
    for i, captions in enumerate(found):
        own = {tuple(caption.words) for caption in drawn[12 * i :][:12]}
        assert {tuple(caption.words) for caption in captions} == own
        assert captions[0].consensus == max(caption.consensus for caption in captions)


# ------------------------------------------------------------------------- what goes with what


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 0}, "top_k 0 is not a whole number of 1 or more"),
        ({"top_k": 2.5}, "top_k 2.5 is not a whole number"),
        ({"top_p": 0}, "top_p 0 leaves no word"),
        ({"top_p": 1.01}, "top_p 1.01 is not a number from 0 to 1"),
        ({"top_p": float("nan")}, "top_p nan"),
        ({"top_p": 0.9, "temperature": 0}, "top_p is for what is drawn, which temperature"),
        ({"top_k": 5, "temperature": 0.0}, "top_k is for what is drawn"),
        ({"beam_groups": 2}, "beam_size 5 cannot be shared out among beam_groups 2"),
        ({"beam_groups": 0}, "beam_groups 0"),
        ({"beam_groups": 5, "temperature": 1.0}, "beam_groups is for beam search"),
        ({"must_include": ["dog"], "top_p": 0.9}, "must_include is for beam search"),
        ({"diversity_penalty": 1.0}, "diversity_penalty is for several beam_groups"),
        ({"beam_groups": 5, "diversity_penalty": -1}, "diversity_penalty -1 is not a number"),
        ({"no_repeat_ngram": 0}, "no_repeat_ngram 0"),
        ({"min_words": 0}, "min_words 0"),
        ({"must_include": "dog"}, "must_include 'dog' is not a list of words"),
        ({"must_include": [1]}, "is not a list of words"),
        ({"rerank": "best"}, "rerank 'best' is not consensus"),
        ({"candidates": 3}, "candidates is for rerank"),
        ({"rerank": "consensus", "candidates": 1}, "candidates 1 is not a whole number of 2"),
        ({"rerank": "consensus", "candidates": 9}, "a beam of 5 has no 9 captions"),
        ({"rerank": "consensus", "beam_size": 1}, "chooses among several: widen the beam"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"temperature": 1e-40}, "temperature 1e-40 is too small to draw by"),
        ({"max_words": None}, "max_words None is not a whole number from 1 to 1000"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(options, words):
    with pytest.raises(UserError) as error:
        Search(**options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_how_many_there_are_to_be_had():
    Search(5).check_count(5)
    Search(5, temperature=1.0).check_count(50)
    Search(top_p=0.5, rerank="consensus", candidates=50).check_count(50)
    for search, n in (
        (Search(5), 6),
        (Search(5, rerank="consensus", candidates=3), 4),
        (Search(5, temperature=1.0, rerank="consensus"), 6),
    ):
        with pytest.raises(UserError, match=f"{n}"):
            search.check_count(n)


@pytest.mark.parametrize(
    ("options", "draws"),
    [({}, False), ({"temperature": 0}, False), ({"temperature": 0.1}, True), ({"top_k": 3}, True),
     ({"top_p": 1.0}, True), ({"top_p": 0.9, "temperature": 2.0}, True)],
)  # fmt: skip
def test_top_k_and_top_p_draw_at_temperature_1_by_themselves(options, draws):
    assert Search(**options).draws == draws
    if draws and "temperature" not in options:
        decoder, images, found = make_decoder(1, std=0.5), make_images(), []
        for search in (Search(**options), Search(temperature=1.0, **options)):
            generator = torch.Generator().manual_seed(5)
            captions = find(decoder, images, WORD_MAP, search, 3, generator)
            found.append([[caption.words for caption in own] for own in captions])
        assert found[0] == found[1]


def test_files_of_one_search_are_told_from_anothers():
    assert Search(3).file_part == "beam3"
    assert Search(3, length_penalty=1.0, max_words=9).file_part == "beam3"
    assert Search(6, 3).file_part == "beam6_beam_groups3"
    assert Search(top_p=0.9).file_part == "drawn_top_p0.9"
    part = Search(must_include=["dog|dogs", "../a"], no_repeat_ngram=3).file_part
    assert part == "beam5_no_repeat_ngram3_must_includedog-dogs-..-a"
    assert (
        "no_repeat_ngram 3, must_include dog|dogs ../a"
        in Search(must_include=["dog|dogs", "../a"], no_repeat_ngram=3).description
    )


# ------------------------------------------------------------------------------- the scripts


@pytest.fixture(scope="module")
def model(checkpoint):
    return Captioner.load(checkpoint, "cpu", amp="off")


@pytest.fixture(scope="module")
def image(scenes):
    return sorted((scenes / "images").iterdir())[0]


@pytest.fixture
def caption(checkpoint, image):
    """Runs caption.py on an image: its captions' records."""

    def run(*arguments):
        process = run_here(
            "caption.py", "--model", checkpoint, "--device", "cpu", "--amp", "off", "--img", image,
            "--no_pictures", "--json", *arguments,
        )  # fmt: skip
        if process.returncode:
            return failure(process)
        return json.loads(process.stdout)[0]["captions"]

    return run


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (
            ["--beam_groups", 3, "--beam_size", 6, "--diversity_penalty", 10],
            {"beam_groups": 3, "beam_size": 6, "diversity_penalty": 10.0},
        ),
        (["--no_repeat_ngram", 1], {"no_repeat_ngram": 1}),
        (["--min_words", 12, "--max_words", 13], {"min_words": 12, "max_words": 13}),
        (["--max_len", 3], {"max_words": 3}),
        (["--rerank", "consensus", "--candidates", 4], {"rerank": "consensus", "candidates": 4}),
        (["--top_k", 4, "--seed", 3], {"top_k": 4, "seed": 3}),
        (
            ["--top_p", 0.9, "--temperature", 2, "--seed", 3, "--rerank", "consensus"],
            {"top_p": 0.9, "temperature": 2.0, "seed": 3, "rerank": "consensus"},
        ),
    ],
)
def test_a_script_chooses_as_the_library_does(arguments, options, caption, model, image):
    records = caption("--n", 3, *arguments)
    [captions] = model.caption(image, n=3, **options)
    assert [record["words"] for record in records] == [c.words for c in captions]
    for record, own in zip(records, captions, strict=True):
        assert record["log_prob"] == pytest.approx(own.log_prob, abs=1e-3)
        assert record.get("consensus") == pytest.approx(own.consensus, abs=1e-3)
    plain = [c.words for c in next(model.caption(image, n=3, max_words=50))]
    assert [c.words for c in captions] != plain or "consensus" in records[0]


@pytest.mark.slow
def test_words_that_must_come_do(caption, model):
    known = sorted(sayable(model.word_map))
    for words in (known[-1:], [known[0], f"{known[3]}|{known[4]}"], known[1:8:2]):
        [record] = caption("--must_include", *words)
        assert all(set(either.split("|")) & set(record["words"]) for either in words)
    longest = max(known, key=len)
    line = caption("--must_include", f"{longest}x")
    assert f"no word '{longest}x'; near are {longest}" in line
    assert "max_words 1 is too few" in caption("--must_include", *known[:2], "--max_words", 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--top_p", 0], "--top_p: 0 is not above 0"),
        (["--top_p", 1.5], "--top_p: 1.5 is more than 1"),
        (["--top_p", 0.5, "--temperature", 0], "top_p is for what is drawn"),
        (["--seed", 1], "--seed is for what is drawn"),
        (["--beam_groups", 2], "cannot be shared out"),
        (["--n", 6], "a beam of 5 has no 6 captions"),
        (["--rerank", "consensus", "--n", 4, "--candidates", 3], "of 3 candidates 4 cannot"),
        (["--rerank", "votes"], "invalid choice"),
    ],
)
def test_a_script_refuses_what_cannot_be_before_it_reads_a_model(arguments, words, image):
    process = run_here("caption.py", "--model", "missing.pth.tar", "--img", image, *arguments)
    assert words in failure(process)


def test_the_scores_of_what_is_chosen(checkpoint, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no Java, which takes seconds

    def evaluate(*arguments):
        return run_here(
            "eval.py", "--model", checkpoint, "--data_folder", tiny_data[0], "--device", "cpu",
            "--subset", 3, "--output_folder", tmp_path, *arguments,
        )  # fmt: skip

    process = evaluate("--beam_size", 2, 4, "--beam_groups", 2, "--rerank", "consensus")
    assert process.returncode == 0, process.stderr
    assert "beam_groups 2, rerank consensus" in process.stdout and "beam 4" in process.stdout
    process = evaluate("--top_p", 0.9, "--seed", 1, "--report", tmp_path / "page")
    assert process.returncode == 0, process.stderr
    assert "top_p 0.9" in process.stdout and "drawn" in process.stdout
    names = {path.name.partition("_BEST")[0] for path in tmp_path.glob("results_*.json")}
    assert names == {
        "results_test_first3_beam2_beam_groups2_rerankconsensus",
        "results_test_first3_beam4_beam_groups2_rerankconsensus",
        "results_test_first3_drawn_top_p0.9",
    }
    assert "several --beam_size" in failure(evaluate("--top_k", 3, "--beam_size", 1, 3))
    line = failure(evaluate("--beam_size", 2, 3, "--beam_groups", 2))
    assert "beam_size 3 cannot be shared out" in line
    line = failure(run_here("eval.py", "--results", "a", "--references", "b", "--top_p", 0.9))
    assert "--top_p is about a model" in line
