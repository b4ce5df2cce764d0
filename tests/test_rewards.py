"""Rewards against pycocoevalcap, of the same words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider_scorer import CiderScorer

import metrics
import rewards

VOCABULARY = ["a", "dog", "runs", "on", "the", "grass", "<unk>", "<end>"]
WORDS = st.sampled_from(VOCABULARY)
CAPTIONS = st.lists(st.lists(WORDS, min_size=1, max_size=9), min_size=1, max_size=4)
CORPUS = st.lists(st.tuples(st.lists(WORDS, max_size=9), CAPTIONS), min_size=1, max_size=6)


def as_text(words):
    return " ".join(map(str, words))


def numbered(words):
    """The same words as indices."""
    return [VOCABULARY.index(word) for word in words]


def official_cider(captions, references):
    scorer = CiderScorer()
    for words, people in zip(captions, references, strict=True):
        scorer += (as_text(words), [as_text(own) for own in people])
    return scorer.compute_score()


@given(CORPUS, st.booleans())
def test_cider_equals_the_official_one_of_each_caption_and_of_all(corpus, numbers):
    captions, references = zip(*corpus, strict=True)
    total, each = official_cider(captions, references)
    if numbers:
        captions = [numbered(words) for words in captions]
        references = [[numbered(words) for words in people] for people in references]
    score = rewards.CiderD(references)
    found = [score([own], people)[0] for own, people in zip(captions, references, strict=True)]
    assert found == pytest.approx(each.tolist(), abs=1e-6)
    if not numbers:
        texts = [[as_text(own).replace("<", "").replace(">", "") for own in p] for p in references]
        ours = [as_text(own).replace("<", "").replace(">", "") for own in captions]
        assert metrics.cider(texts, ours) == pytest.approx(total, abs=1e-6)


@given(st.lists(CAPTIONS, min_size=2, max_size=6), CORPUS.map(lambda pairs: pairs[:2]))
def test_frequencies_of_other_images_are_those_of_the_official_scorer(training, judged):
    frequencies, official = CiderScorer(), CiderScorer()
    for people in training:
        frequencies += ("", [as_text(own) for own in people])
    frequencies.compute_doc_freq()
    official.document_frequency = frequencies.document_frequency
    # it takes the number of images from what it judges
    for words, people in judged + [([], [[]])] * (len(training) - len(judged)):
        official += (as_text(words), [as_text(own) for own in people])
    expected = official.compute_cider()[: len(judged)]
    score = rewards.CiderD(training)
    found = [score([words], people)[0] for words, people in judged]
    assert found == pytest.approx(expected, abs=1e-6)


@given(CORPUS)
def test_bleu_equals_the_official_one_of_each_caption(corpus):
    scorer = BleuScorer(n=4)
    for words, people in corpus:
        scorer += (as_text(words), [as_text(own) for own in people])
    _, (*_, expected) = scorer.compute_score(option="closest")
    found = [rewards.bleu4([words], people)[0] for words, people in corpus]
    assert found == pytest.approx(expected, abs=1e-9)


def test_several_captions_of_an_image_are_scored_each_by_itself():
    people = [["a", "dog", "runs", "<end>"], ["the", "dog", "<end>"]]
    captions = [["a", "dog", "<end>"], ["a", "dog"], ["grass", "<end>"], []]
    corpus = [people, [["grass", "<end>"]], [["a", "cat", "<end>"]]]
    for score in (rewards.CiderD(corpus), rewards.bleu4):
        alone = [score([own], people)[0] for own in captions]
        assert score(captions, people) == alone
    with_end, without, *_ = rewards.CiderD(corpus)(captions, people)
    assert with_end > without  # the end that people's captions have is worth something


def test_rewards_are_added_up_by_their_weights():
    people = [["a", "dog", "runs", "on", "grass"], ["a", "dog", "runs"]]
    corpus, captions = [people, [["a", "cat"]]], [["a", "dog", "runs", "on"], ["cat"]]
    found = rewards.make(rewards.parse("cider=2, bleu4=0.5"), corpus)(captions, people)
    ciders, bleus = rewards.CiderD(corpus)(captions, people), rewards.bleu4(captions, people)
    assert found == [2 * c + 0.5 * b for c, b in zip(ciders, bleus, strict=True)]
    assert found[0] > 1 and found[1] < 1e-3
    assert rewards.parse("bleu4=1e-3") == {"bleu4": 0.001}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("meteor=1", "no reward 'meteor': known are cider, bleu4"),
        ("cider", "cider has the weight ''"),
        ("cider=much", "weight 'much'"),
        ("cider=0", "weight '0'"),
        ("cider=-1", "weight '-1'"),
        ("cider=nan", "weight 'nan'"),
        ("cider=inf", "weight 'inf'"),
        ("cider=1,cider=2", "cider stands twice"),
        ("cider=1,", "no reward ''"),
        ("", "no reward ''"),
    ],
)
def test_weights_that_cannot_be_are_one_line(text, words):
    with pytest.raises(ValueError, match=words) as error:
        rewards.parse(text)
    assert "\n" not in str(error.value)
