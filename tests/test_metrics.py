"""Scores against computations of the test's own."""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter

import pycocoevalcap.eval
import pytest
import sacrebleu
import torch
from conftest import ROOT, needs_java
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.eval import COCOEvalCap
from pycocotools.coco import COCO

import evaluation
import metrics
from objectives import top5_right

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


@pytest.mark.parametrize("vocabulary", [3, 40])
@pytest.mark.parametrize("barred", [None, torch.tensor([0, 2])])
def test_top5_right_equals_a_loop(vocabulary, barred):
    scores, targets = torch.randn(30, vocabulary), torch.randint(vocabulary, (30,))
    right = [
        t in sorted(range(vocabulary), key=lambda w, row=row: -row[w])[:5]
        and (barred is None or t not in barred)
        for row, t in zip(scores.tolist(), targets.tolist(), strict=True)
    ]
    assert top5_right(scores, targets, barred) == sum(right)


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


@pytest.mark.parametrize("module", ["pycocoevalcap", "pycocoevalcap.cider.cider"])
def test_without_pycocoevalcap_a_line_says_what_is_left_out_and_how_to_have_it(module, monkeypatch):
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    scores = evaluation.score({"ours": CAPTIONS}, REFERENCES)
    [(_, rows)] = scores.tables
    assert rows[0]["BLEU-4"] == f"{100 * metrics.bleu(REFERENCES, CAPTIONS).scores[3]:.1f}"
    [line] = scores.left_out
    for part in ("METEOR", "CIDEr-D", "pip install pycocoevalcap"):
        assert part in line
    assert metrics.cider(REFERENCES, CAPTIONS) > 0  # its own


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
