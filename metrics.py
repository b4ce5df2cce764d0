"""Scores of captions against people's: nltk's BLEU, the official COCO scores; its attention.

What is compared are words, those of both by one rule: `split` is that of a `word_rules.Rule`, by
default karpathy's. The COCO scores have a tokenizer of their own, for English. Neither ever
compares with `<unk>`.
"""

import importlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from contextlib import contextmanager, redirect_stdout, suppress
from itertools import filterfalse
from pathlib import Path
from typing import NamedTuple

from nltk.translate.bleu_score import (
    SmoothingFunction,
    brevity_penalty,
    closest_ref_length,
    corpus_bleu,
    sentence_bleu,
)

from groundwork.errors import UserError
from rewards import CiderD
from word_rules import KARPATHY, is_special, rule_of, tokenize

NGRAM_WEIGHTS = [(1.0,), (1 / 2,) * 2, (1 / 3,) * 3, (1 / 4,) * 4]


class Bleu(NamedTuple):
    """Corpus BLEU-1 to BLEU-4, each 0 to 1."""

    scores: list[float]  # with the brevity penalty, as is usual
    unpenalised: list[float]  # without, as the paper reports its own (§5.3)


def bleu(references, captions, split=tokenize):
    """Corpus BLEU of nltk.

    Args:
        references: for each image the list of its human captions, as written.
        captions: for each image one caption, text.
        split: a text into its words.
    """
    references = [list(map(split, texts)) for texts in references]
    captions = list(map(split, captions))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no common 4-gram: the score is 0 and says so itself
        scores = corpus_bleu(references, captions, NGRAM_WEIGHTS)
    scores = [score if score > 1e-9 else 0.0 for score in scores]  # nltk's 0 is 1e-231
    length = sum(map(len, captions))
    closest = sum(closest_ref_length(r, len(c)) for r, c in zip(references, captions, strict=True))
    penalty = brevity_penalty(closest, length)
    return Bleu(
        [float(s) for s in scores], [float(s) / penalty if penalty else 0.0 for s in scores]
    )


def cider(references, captions, split=tokenize):
    """CIDEr-D of the corpus, on the words of `bleu`: without Java.

    Args:
        references, captions, split: as in `bleu`.
    """
    references = [list(map(split, texts)) for texts in references]
    score = CiderD(references)
    pairs = zip(captions, references, strict=True)
    return sum(score([split(text)], own)[0] for text, own in pairs) / len(references)


def are_english(references):
    """Whether nearly all words of captions have letters of the English alphabet alone."""
    words = [word for texts in references for text in texts for word in tokenize(text)]
    return sum(word.isascii() for word in words) >= 0.9 * len(words)


def smoothed_bleu(references, captions, split=tokenize):
    """BLEU-4 of each caption by itself, with one added to counts of n-grams from 2 on (nltk's
    method 2; Lin and Och, 2004), without which most would be 0.

    Args:
        references, captions, split: as in `bleu`.
    """
    smooth = SmoothingFunction().method2
    return [
        float(sentence_bleu(list(map(split, texts)), split(text), smoothing_function=smooth))
        for texts, text in zip(references, captions, strict=True)
    ]


def _of_coco(module):
    """A module of pycocoevalcap, imported here, as most runs do without. Raises UserError."""
    try:
        return importlib.import_module(f"pycocoevalcap.{module}")
    except ImportError as error:
        raise UserError(
            f"CIDEr-D and COCO's other scores need the package pycocoevalcap ({error}): "
            "pip install pycocoevalcap"
        ) from error


class CocoScores(NamedTuple):
    """Scores of the COCO caption evaluation of named lists of captions: "BLEU-1" to "BLEU-4",
    "METEOR", "ROUGE-L", "CIDEr-D", "SPICE", or those of them that can be computed here."""

    corpus: dict[str, dict[str, float]]  # list's name -> score -> value
    each: dict[str, dict[str, list[float]]]  # and of each image, in their order
    left_out: list[str]  # a line for what cannot be computed, with the reason


def coco_scores(references, captions, only=None, split=None):
    """The scores of the official implementation, pycocoevalcap.

    Args:
        references: as in `bleu`.
        captions: name -> captions as in `bleu`. Several lists cost the starts of Java of one.
        only: the one score that is wanted; None: all.
        split: a text into its words; None: its PTB tokenizer does, which is for English.
    """
    corpus, each = ({name: {} for name in captions} for _ in range(2))
    with redirect_stdout(io.StringIO()), _java_aside() as said:  # they tell what they are doing
        try:
            kinds, left_out = _coco_scorers(only)
            truth, found = _tokenize(references, captions, said, split)
        except (UserError, OSError) as error:
            return CocoScores(
                corpus, each, [f"no COCO scores (BLEU, METEOR, ROUGE-L, CIDEr-D, SPICE): {error}"]
            )
        for make, names in kinds:
            try:
                of_lists = {name: _score(make, names, truth, own) for name, own in found.items()}
            except OSError as error:
                left_out.append(f"no {names[0]}: {error}")
                continue
            for name, (totals, of_each) in of_lists.items():
                corpus[name] |= dict(zip(names, totals, strict=True))
                each[name] |= dict(zip(names, of_each, strict=True))
    return CocoScores(corpus, each, left_out)


def _score(make, names, truth, found):
    """What a scorer finds, for each of its names: of the corpus, and a list of each image.

    Raises:
        OSError: its Java has ended.
    """
    scorer = make()
    try:
        totals, of_each = scorer.compute_score(truth, found)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        if hasattr(scorer, "meteor_p"):
            raise OSError(_end_meteor(scorer)) from error
        raise OSError(str(error)) from error
    if names == ["SPICE"]:
        of_each = [scores["All"]["f"] for scores in of_each]
    if len(names) == 1:
        totals, of_each = [totals], [of_each]
    return list(map(float, totals)), [list(map(float, scores)) for scores in of_each]


def _end_meteor(scorer):
    """Ends METEOR's process, for which its own destructor would wait for ever; why it failed."""
    process = scorer.meteor_p
    process.kill()
    with suppress(OSError):
        process.stdin.close()
    said = process.stderr.read().decode(errors="replace").split("\n")
    if scorer.lock.locked():
        scorer.lock.release()
    return f"its Java ended ({next(filter(None, said), 'without a word')[:200]})"


@contextmanager
def _java_aside():
    """Keeps what programs started in the block write on stderr; yields a function that gives it."""
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        own = os.dup(2)
        os.dup2(file.fileno(), 2)

        def said():
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield said
        finally:
            os.dup2(own, 2)
            os.close(own)


def _coco_scorers(only):
    """pycocoevalcap's scorers, to be made, with the names of their scores, and lines for those left
    out. Raises UserError."""
    bleu, spice = _of_coco("bleu.bleu"), _of_coco("spice.spice")
    kinds = [(lambda: bleu.Bleu(4), [f"BLEU-{n}" for n in range(1, 5)])]
    kinds += [
        (_of_coco("meteor.meteor").Meteor, ["METEOR"]),
        (_of_coco("rouge.rouge").Rouge, ["ROUGE-L"]),
        (_of_coco("cider.cider").Cider, ["CIDEr-D"]),
    ]
    left_out = []
    if list(Path(spice.__file__).parent.glob("lib/stanford-corenlp-*-models.jar")):
        kinds.append((spice.Spice, ["SPICE"]))
    else:
        left_out.append("no SPICE: its Java models are not in the package pycocoevalcap")
    if only is not None:
        kinds = [(make, names) for make, names in kinds if only in names]
    return kinds, left_out


def _tokenize(references, captions, said, split=None):
    """References and named lists of captions in words with blanks between: image's number -> list
    of texts, of the references and of each list.

    Args:
        said: gives what Java has written on stderr.
        split: as in `coco_scores`.

    Raises:
        OSError: there is no Java that runs, or no writing in the package's own folder, as it needs
            to.
        UserError: there is no pycocoevalcap.
    """
    tokenizer = _of_coco("tokenizer.ptbtokenizer").PTBTokenizer
    if shutil.which("java") is None:
        raise OSError("their tokenizer needs Java")

    def tokenize(lists):
        if split is not None:
            return {key: [" ".join(split(t)) for t in texts] for key, texts in lists.items()}
        # line breaks of any kind would shift what it gives
        one_line = {
            key: [{"caption": " ".join(text.split())} for text in texts]
            for key, texts in lists.items()
        }
        tokens = tokenizer().tokenize(one_line)
        if any(len(tokens.get(key, ())) != len(texts) for key, texts in lists.items()):
            lines = [line for line in said().splitlines() if line.strip()]
            reason = lines[-1][:200] if lines else "without a word"
            raise OSError(f"their tokenizer's Java ended ({reason})")
        return tokens

    every = {(name, i): [t] for name, texts in captions.items() for i, t in enumerate(texts)}
    found = {name: {} for name in captions}
    for (name, i), texts in tokenize(every).items():
        found[name][i] = texts
    return tokenize(dict(enumerate(references))), found


def describe(captions, split=tokenize):
    """How many captions, their mean length in words, how many distinct words: a dict."""
    words = list(map(split, captions))
    return {
        "captions": len(captions),
        "mean_length": sum(map(len, words)) / max(len(words), 1),
        "distinct_words": len({word for caption in words for word in caption}),
    }


class VocabularyUse(NamedTuple):
    """Counts of distinct words, and a share of all."""

    said: int  # of the vocabulary, by the captions
    known: int  # in the vocabulary
    human: int  # in the human captions
    human_known: int  # of these, in the vocabulary
    covered: float  # share of the human captions' words that the vocabulary has


def vocabulary_use(captions, references, word_map):
    """`VocabularyUse` of captions, and of people's.

    Args:
        captions, references: as in `bleu`.
        word_map: word -> index.
    """
    vocabulary, split = set(filterfalse(is_special, word_map)), rule_of(word_map).split
    said = {word for text in captions for word in split(text)}
    human = Counter(word for texts in references for text in texts for word in split(text))
    known = human.keys() & vocabulary
    covered = sum(human[word] for word in known) / max(human.total(), 1)
    return VocabularyUse(len(said & vocabulary), len(vocabulary), len(human), len(known), covered)


def repeated(captions, most=3, rule=KARPATHY):
    """The share of captions that are another image's, too, and the `most` frequent of these with
    their counts."""
    counts = Counter(rule.join(rule.split(text)) for text in captions)
    several = [(text, count) for text, count in counts.most_common() if count > 1]
    return sum(count for _, count in several) / max(len(captions), 1), several[:most]


def novelty(captions, training, split=tokenize):
    """The share of captions that are, word for word, none of the training captions."""
    known = {tuple(split(text)) for text in training}
    return sum(tuple(split(text)) not in known for text in captions) / max(len(captions), 1)
