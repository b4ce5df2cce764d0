"""Scores against computations of the test's own."""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pycocoevalcap.eval
import pytest
import sacrebleu
import scipy.stats
import torch
from conftest import ROOT, needs_java
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.eval import COCOEvalCap
from pycocotools.coco import COCO

import demo
import metrics
import utils

WORDS = st.sampled_from(["a", "dog", "runs", "on", "the", "red", "grass"])
# four words or more: of a shorter caption nltk counts one 4-gram, the definition none
SENTENCES = st.lists(WORDS, min_size=4, max_size=8)


def bleu_by_hand(references, captions, n, penalised=True):
    """Papineni et al. (2002): clipped n-gram precisions over the corpus, geometric mean."""
    log_precision, length, closest = 0.0, 0, 0
    for order in range(1, n + 1):
        matches = total = 0
        for sentences, caption in zip(references, captions, strict=True):

            def grams(words, order=order):
                return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))

            most = Counter()
            for sentence in sentences:
                most |= grams(sentence)
            matches += sum((grams(caption) & most).values())
            total += max(len(caption) - order + 1, 0)
        if not matches:
            return 0.0
        log_precision += math.log(matches / total) / n
    for sentences, caption in zip(references, captions, strict=True):
        length += len(caption)
        closest += min((abs(len(s) - len(caption)), len(s)) for s in sentences)[1]
    penalty = 1.0 if length > closest else math.exp(1 - closest / length)
    return math.exp(log_precision) * (penalty if penalised else 1.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(SENTENCES, min_size=1, max_size=5), SENTENCES), min_size=1))
def test_bleu_equals_its_definition_with_and_without_brevity_penalty(corpus):
    references, captions = zip(*corpus, strict=True)
    as_text = [[" ".join(s) for s in sentences] for sentences in references]
    found = metrics.bleu(as_text, [" ".join(c) for c in captions])
    for n in range(1, 5):
        for scores, penalised in ((found.scores, True), (found.unpenalised, False)):
            expected = bleu_by_hand(references, captions, n, penalised)
            assert scores[n - 1] == pytest.approx(expected, abs=1e-9)


def test_bleu_compares_words_without_case_and_punctuation():
    found = metrics.bleu([["A man's dog , running ."]], ["a mans dog running"])
    assert found.scores == pytest.approx([1, 1, 1, 1])


def test_a_short_caption_is_penalised_as_the_formula_says():
    found = metrics.bleu([["a dog runs on the grass"]], ["a dog runs"])
    assert found.unpenalised[0] == pytest.approx(1)
    assert found.scores[0] == pytest.approx(math.exp(1 - 6 / 3))


def test_words_of_other_alphabets_are_not_english():
    assert metrics.are_english([["A dog runs on the grass .", "two black cats sit at a café"]])
    assert not metrics.are_english([["一个 黄色 方块"], ["a dog"]])


def test_describe_counts():
    assert metrics.describe(["a dog", "a dog runs on"]) == {
        "captions": 2,
        "mean_length": 3.0,
        "distinct_words": 4,
    }


def test_the_pointing_game_counts_peaks_inside_the_named_objects_box():
    corner = np.zeros(16)
    corner[3] = 1.0  # of the 4×4 grid the top right place, centre (0.875, 0.125)
    even = np.full(16, 1 / 16)  # peaks nowhere: the centre of the picture
    caption = (["a", "star", "heart", "cross"], np.stack([corner, corner, even, corner]))
    boxes = {"star": [0.8, 0.0, 1.0, 0.2], "heart": [0.0, 0.0, 0.4, 0.4]}
    game = metrics.pointing_game([caption], [boxes], ("star", "heart", "cross"))
    assert (game.hits, game.words) == (1, 3)  # the heart is missed, there is no cross
    assert game.chance == pytest.approx((0.2 * 0.2 + 0.4 * 0.4) / 3)


def test_the_peak_of_places_blown_up_from_a_coarser_grid_is_their_middle():
    alphas = np.kron([[0, 1], [0, 0]], np.ones((2, 2))).reshape(1, 16) / 4
    boxes = {"star": [0.74, 0.24, 0.76, 0.26]}
    assert metrics.pointing_game([(["star"], alphas)], [boxes], ("star",)).hits == 1


def test_no_named_object_is_no_game():
    assert metrics.pointing_game([(["a"], np.ones((1, 4)))], [{}], ("star",)) == (0, 0, 0.0)


@pytest.mark.parametrize("vocabulary", [3, 40])
def test_top5_accuracy_equals_a_loop(vocabulary):
    scores, targets = torch.randn(30, vocabulary), torch.randint(vocabulary, (30,))
    right = [
        t in sorted(range(vocabulary), key=lambda w, row=row: -row[w])[:5]
        for row, t in zip(scores.tolist(), targets.tolist(), strict=True)
    ]
    assert metrics.top5_accuracy(scores, targets) == pytest.approx(sum(right) / 30)


# -------------------------------------------------------------------------- the official scores

CAPTIONS = [
    "a dog runs on the grass",
    "two men in red shirts play football",
    "a child is smiling at the camera\u2028and waving",  # a line break of a kind
]
REFERENCES = [
    ["A dog runs on the green grass.", "The brown dog's running!"],
    ["Two men play football; they wear red.", "Men (in red) playing soccer", "A match."],
    ["A smiling child", "A kid waves at the camera -- and smiles."],
]


@pytest.mark.slow
@needs_java
def test_coco_scores_are_those_of_the_official_evaluation(tmp_path):
    """To the last digit, from files, by the official class with the scorers that are there."""
    images = [{"id": i} for i in range(3)]
    annotations = [
        {"image_id": i, "id": 10 * i + j, "caption": text}
        for i, texts in enumerate(REFERENCES)
        for j, text in enumerate(texts)
    ]
    results = [
        {"image_id": i, "caption": " ".join(text.split())} for i, text in enumerate(CAPTIONS)
    ]
    (tmp_path / "truth.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "info": {}, "licenses": []})
    )
    (tmp_path / "results.json").write_text(json.dumps(results))
    truth = COCO(str(tmp_path / "truth.json"))
    official = COCOEvalCap(truth, truth.loadRes(str(tmp_path / "results.json")))
    with pytest.MonkeyPatch.context() as patch:
        # SPICE would download its models
        spice = argparse.Namespace(method=lambda: "", compute_score=lambda *_: (0.0, [0.0] * 3))
        patch.setattr(pycocoevalcap.eval, "Spice", lambda: spice)
        official.evaluate()

    lists = {"empty": ["", "a dog", ""], "ours": CAPTIONS, "turned": CAPTIONS[::-1]}
    found = metrics.coco_scores(REFERENCES, lists)
    names = {f"BLEU-{n}": f"Bleu_{n}" for n in range(1, 5)}
    names |= {"METEOR": "METEOR", "ROUGE-L": "ROUGE_L", "CIDEr-D": "CIDEr"}
    assert found.corpus["ours"] == {ours: official.eval[theirs] for ours, theirs in names.items()}
    for ours, theirs in names.items():
        assert found.each["ours"][ours] == [official.imgToEval[i][theirs] for i in range(3)], ours
    assert found.corpus["turned"]["CIDEr-D"] < found.corpus["ours"]["CIDEr-D"]
    only = metrics.coco_scores(REFERENCES, {"turned": CAPTIONS[::-1]}, only="CIDEr-D").corpus
    assert only == {"turned": {"CIDEr-D": found.corpus["turned"]["CIDEr-D"]}}


def test_smoothed_bleu_worked_by_hand():
    """One is added to matches and counts of n-grams from 2 on; the penalty is for brevity."""
    found = metrics.smoothed_bleu([["A dog runs fast."], ["a cat"]], ["a dog runs home", "a cat"])
    first = (3 / 4 * (2 + 1) / (3 + 1) * (1 + 1) / (2 + 1) * (0 + 1) / (1 + 1)) ** 0.25
    assert found[0] == pytest.approx(first)
    assert 0 < found[1] <= 1


def test_without_java_a_line_says_what_is_left_out(monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = metrics.coco_scores(REFERENCES, {"ours": CAPTIONS})
    assert found.corpus == found.each == {"ours": {}}
    assert len(found.left_out) == 1 and "Java" in found.left_out[0]


JAVAS = {  # what `java` on the path does: the words of the reason, and the scores that are left
    "none": ("echo 'Unable to locate a Java Runtime.' >&2; exit 1", "Unable to locate", set()),
    "silent": ("exit 1", "without a word", set()),
    "too old for METEOR": (
        'case "$*" in *meteor*) echo "UnsupportedClassVersionError: 1.6" >&2; exit 1;; '
        '*) exec {java} "$@";; esac',
        "UnsupportedClassVersionError",
        {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"},
    ),
    "dying in the middle": (
        'case "$*" in *meteor*) read line; exit 137;; *) exec {java} "$@";; esac',
        "without a word",
        {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"},
    ),
}


@needs_java
@pytest.mark.parametrize(
    "kind", ["none", *(pytest.param(k, marks=pytest.mark.slow) for k in list(JAVAS)[1:])]
)
def test_a_java_that_does_not_run_costs_its_scores_alone(kind, tmp_path):
    """In a process of its own, which ends."""
    script, reason, left = JAVAS[kind]
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\n{script.format(java=shutil.which('java'))}\n")
    java.chmod(0o755)
    code = f"""
import json, metrics
found = metrics.coco_scores({REFERENCES!r}, {{"ours": {CAPTIONS!r}}})
print(json.dumps([sorted(found.corpus["ours"]), found.left_out]))
"""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stderr == "", "nothing stands between the tables"
    names, left_out = json.loads(process.stdout)
    assert set(names) == left
    [line] = [line for line in left_out if "SPICE: its" not in line]
    assert reason in line and ("METEOR" in line or "COCO" in line)


@settings(max_examples=50)
@given(st.lists(st.tuples(SENTENCES, SENTENCES, SENTENCES), min_size=1, max_size=6))
def test_bleu_is_sacrebleus(examples):
    captions = [" ".join(words) for words, *_ in examples]
    references = [[" ".join(words) for words in rest] for _, *rest in examples]
    theirs = sacrebleu.corpus_bleu(
        captions, list(zip(*references, strict=True)), smooth_method="none", tokenize="none",
        force=True,
    )  # fmt: skip
    assert 100 * metrics.bleu(references, captions).scores[3] == pytest.approx(theirs.score)


# --------------------------------------------------------------------------------- the attention


@settings(max_examples=50)
@given(
    st.integers(1, 6),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_mass_in_a_box_is_the_integral_over_it(size, corners, seed):
    """Against a grid of points, each in one place."""
    x0, x1, y0, y1 = *sorted(corners[:2]), *sorted(corners[2:])
    alpha = np.random.default_rng(seed).dirichlet(np.ones(size**2))
    fine = (np.arange(400) + 0.5) / 400
    inside = np.outer((y0 <= fine) & (fine <= y1), (x0 <= fine) & (fine <= x1))
    density = alpha.reshape(size, size)[
        np.ix_((fine * size).astype(int), (fine * size).astype(int))
    ]
    mass, area = metrics.mass_in_boxes(
        [(["a", "star"], np.stack([alpha, alpha]))], [{"star": [x0, y0, x1, y1]}], ("star",)
    )
    assert mass == pytest.approx((density * inside).sum() * size**2 / 400**2, abs=0.02)
    assert area == pytest.approx((x1 - x0) * (y1 - y0), abs=1e-9)


def test_mass_counts_words_whose_object_is_there():
    captions = [(["star", "heart"], np.eye(2, 4)), (["star"], np.eye(1, 4))]
    boxes = [{"star": [0, 0, 0.5, 0.5]}, {"heart": [0, 0, 1, 1]}]
    assert metrics.mass_in_boxes(captions, boxes, ("star", "heart")) == (1.0, 0.25)
    assert all(map(math.isnan, metrics.mass_in_boxes(captions, boxes, ("cross",))))


def test_entropy_is_scipys_and_grouped():
    rng = np.random.default_rng(0)
    alphas = rng.dirichlet(np.ones(9), size=3)
    alphas[2] = np.eye(9)[4]  # one place: 0
    captions = [(["a", "star"], alphas[:2]), (["star"], alphas[2:])]
    by_hand = scipy.stats.entropy(alphas, axis=1)
    assert metrics.attention_entropy(captions)["all"] == (pytest.approx(by_hand.mean()), 3)
    found = metrics.attention_entropy(captions, demo.part_of_speech)
    assert found == {
        "determiner": (pytest.approx(by_hand[0]), 1),
        "noun": (pytest.approx(by_hand[1:].mean()), 2),
    }


def test_coverage_is_the_regularisers_and_its_least():
    rng = np.random.default_rng(0)
    captions = [(["a"] * n, rng.dirichlet(np.ones(16), size=n)) for n in (3, 30)]
    uneven, least = metrics.coverage(captions)
    by_hand = [((1 - alphas.sum(0)) ** 2).mean() for _, alphas in captions]
    assert uneven == pytest.approx(np.mean(by_hand))
    assert least == pytest.approx(((1 - 3 / 16) ** 2 + (1 - 30 / 16) ** 2) / 2)
    even = [(words, np.full_like(alphas, 1 / 16)) for words, alphas in captions]
    assert metrics.coverage(even) == (pytest.approx(least), pytest.approx(least))


def test_every_word_of_the_demo_has_one_part_of_speech():
    words = [word for words in demo.PARTS_OF_SPEECH.values() for word in words]
    assert len(words) == len(set(words))
    rng = np.random.default_rng(0)
    spoken = {
        word
        for _ in range(300)
        for caption in demo.captions(demo.compose(rng), rng)
        for word in utils.tokenize(caption)
    }
    assert spoken <= set(words)
