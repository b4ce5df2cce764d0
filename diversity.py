"""How varied captions are, and whether they end as sentences do: what scores do not tell, and what
training by a score is known to harm."""

import math

import metrics
import rewards
from groundwork.wording import counted, figure
from word_rules import tokenize

# Words that no English caption ends with: determiners, prepositions, conjunctions, auxiliaries. Not
# those that end phrases of verbs, too, as «looking up» and «standing around».
FUNCTION_WORDS = frozenset(
    tokenize(
        "a an the this these those some his its their my your our of in on at by with from to into "
        "onto for over under near behind beside between through against along among above below "
        "beneath during without within toward towards upon next while as and or but nor so than is "
        "are was were be been being has have had who which whose"
    )
)


def dangling(captions):
    """The share of captions, texts, that end in a function word, as «a man with a» does."""
    ends = [tokenize(text)[-1:] for text in captions]
    return sum(bool(end) and end[0] in FUNCTION_WORDS for end in ends) / max(len(captions), 1)


def of_greedy(captions, english, split=tokenize):
    """What the log has of an epoch's captions, texts, by name.

    Args:
        english: whether they are in English, whose function words are known.
        split: a text into its words.
    """
    found = {"distinct_words": metrics.describe(captions, split)["distinct_words"]}
    return found | ({"dangling": dangling(captions)} if english else {})


def distinct(samples, n, split=tokenize):
    """Div-n (Shetty et al., 2017): distinct n-grams of an image's captions by all their words, on
    average over images.

    Args:
        samples: for each image several captions, texts.
        split: a text into its words.
    """
    shares = []
    for texts in samples:
        captions = list(map(split, texts))
        ngrams = {ngram for words in captions for ngram in rewards.ngrams(words)[n - 1]}
        shares.append(len(ngrams) / max(sum(map(len, captions)), 1))
    return _mean(shares)


def mutual_bleu(samples, split=tokenize):
    """mBLEU: BLEU-4 of each caption against the others of its image, on average; lower where they
    differ. NaN where an image has one caption.

    Args:
        samples, split: as in `distinct`.
    """
    scores = []
    for texts in samples:
        captions = list(map(split, texts))
        for i, words in enumerate(captions):
            others = captions[:i] + captions[i + 1 :]
            scores += rewards.bleu4([words], others) if others else [math.nan]
    return _mean(scores)


def table(samples, references, english, split=tokenize):
    """How varied the captions drawn of an image are, beside as many of people's: title and rows, as
    `groundwork.tables` prints them.

    Args:
        samples: as in `distinct`, as many of each image.
        references: for each image the list of its human captions.
        english, split: as in `of_greedy`.
    """
    count = len(samples[0])
    people = [texts[:count] for texts in references]
    rows = []
    for name, own in (("drawn", samples), ("people's", people)):
        texts = [text for of_image in own for text in of_image]
        found = of_greedy(texts, english, split)
        row = {"": name} | {f"Div-{n}": figure(distinct(own, n, split), ".3f") for n in (1, 2)}
        row["mBLEU-4"] = figure(100 * mutual_bleu(own, split), ".1f")
        row["distinct words"] = str(found["distinct_words"])
        row["dangling ends"] = figure(found.get("dangling", math.nan), ".1%")
        rows.append(row)
    title = f"diversity: {counted(count, 'caption')} of each image, drawn at random"
    return title, rows


def _mean(values):
    return sum(values) / len(values) if values else math.nan
