"""How varied captions are, against plain loops."""

import math

import pytest
from conftest import failure, run_here
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from test_scripts import tables

import diversity

WORDS = st.sampled_from(["a", "Dog", "runs", "on", "the", "grass", "."])
TEXTS = st.lists(WORDS, min_size=1, max_size=8).map(" ".join)
SAMPLES = st.lists(st.lists(TEXTS, min_size=2, max_size=4), min_size=1, max_size=4)


def words_of(text):
    return text.lower().replace(".", "").split()


@given(SAMPLES, st.integers(1, 3))
def test_distinct_ngrams_equal_a_loop(samples, n):
    shares = []
    for texts in samples:
        found, words = [], 0
        for text in texts:
            own = words_of(text)
            words += len(own)
            for i in range(len(own) - n + 1):
                if own[i : i + n] not in found:
                    found.append(own[i : i + n])
        shares.append(len(found) / words if words else 0)
    assert diversity.distinct(samples, n) == pytest.approx(sum(shares) / len(shares))


@given(SAMPLES)
def test_mutual_bleu_is_the_official_one_of_each_against_the_others(samples):
    scores = []
    for texts in samples:
        for i, text in enumerate(texts):
            others = [" ".join(words_of(other)) for j, other in enumerate(texts) if j != i]
            scorer = BleuScorer(" ".join(words_of(text)), others)
            scores.append(scorer.compute_score(option="closest")[1][3][0])
    assert diversity.mutual_bleu(samples) == pytest.approx(sum(scores) / len(scores), abs=1e-9)


def test_one_caption_of_an_image_is_not_compared():
    assert math.isnan(diversity.mutual_bleu([["a dog runs"]]))
    assert diversity.distinct([["a dog a dog"], ["a"]], 1) == (2 / 4 + 1) / 2


@pytest.mark.parametrize(
    ("caption", "dangles"),
    [
        ("a man with a", True),
        ("A dog and THE .", True),
        ("two men in", True),
        ("a man in a red shirt", False),
        ("a dog looking up", False),
        ("of mice", False),
        ("", False),
    ],
)
def test_captions_dangle_by_their_last_word(caption, dangles):
    assert diversity.dangling([caption]) == dangles
    assert diversity.dangling([caption, "a dog"]) == dangles / 2
    found = diversity.of_greedy([caption, "a dog"], english=True)
    assert found["dangling"] == dangles / 2 and found["distinct_words"] >= 2
    assert "dangling" not in diversity.of_greedy([caption], english=False)


def test_eval_says_how_varied_captions_are(checkpoint, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no Java, which takes seconds
    run = ["eval.py", "--model", checkpoint, "--data_folder", tiny_data[0], "--device", "cpu"]
    run += ["--results_folder", tmp_path, "--beam_size", 1]
    process = run_here(*run, "--diversity", 3)
    assert process.returncode == 0, process.stderr
    scores, *_, drawn = tables(process.stdout)
    # learned by heart: eight scenes, each with a caption of its own
    assert scores["beam 1"]["used twice"] == "0.0%" == scores["beam 1"]["dangling ends"]
    assert "3 captions of each image, drawn at random" in process.stdout
    assert 0 < float(drawn["drawn"]["Div-1"]) < float(drawn["drawn"]["Div-2"]) < 1
    assert float(drawn["drawn"]["mBLEU-4"]) > 0
    assert drawn["people's"]["mBLEU-4"] == "–"  # they have one each
    again = run_here(*run, "--diversity", 3)
    assert tables(again.stdout)[-1] == drawn


def test_it_is_about_a_model(tmp_path):
    run = ["eval.py", "--results", "x.json", "--references", "y.json", "--diversity", 5]
    assert "--diversity is about a model" in failure(run_here(*run))
