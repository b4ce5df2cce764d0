"""Rules that split captions into words, and join words to captions: one of them is a vocabulary's.

Which one it is stands in the word map, as a special word, `<rule:characters>`; in one that has none
it is karpathy. So a word map or a checkpoint, which holds it, tells all that captioning and scoring
need, and word maps stay what they are, word -> index.
"""

import importlib
import re
import unicodedata
from abc import ABC, abstractmethod
from functools import cached_property

import regex

from groundwork.errors import UserError
from groundwork.wording import IDEOGRAPHS, SIDE_BY_SIDE

SPECIAL_WORDS = ("<unk>", "<start>", "<end>", "<pad>")
MARK = re.compile(r"<rule:(.*)>", re.DOTALL)  # a special word, too
USUAL = "karpathy"
BLANK = "▁"  # that stands for a blank, as SentencePiece writes it

NEEDLESS_BLANK = regex.compile(rf"(?<=[{IDEOGRAPHS}]) | (?=[{IDEOGRAPHS}])")

UNSPLIT = regex.compile(rf"[{SIDE_BY_SIDE}]{{5}}")  # longer than nearly all words

RULES = {}  # name -> class


def register(name):
    """Makes a rule known by a name."""

    def add(rule):
        rule.name = name
        RULES[name] = rule
        return rule

    return add


class Rule(ABC):
    """How captions are split into words, and words joined.

    Args:
        words: of the vocabulary, which a rule may go by.

    Attributes:
        about: for people, what its words are.
        takes_tokens: whether the words of a data set that has its captions split are taken as they
            are.
        whole: whether its words are what people call words, of which some are nouns.
        at_blanks: whether scripts that write no blanks are left unsplit.
    """

    name: str
    about: str
    takes_tokens = False
    whole = True
    at_blanks = False

    def __init__(self, words=()):
        self.words = words

    def split(self, text):
        """The words of a caption, none of which is a special word."""
        return [bare(word) for word in self._split(text)]

    @abstractmethod
    def _split(self, text): ...

    def join(self, words):
        """The caption that words are of."""
        return " ".join(words)


def bare(word):
    """A word, without the brackets that would make it one of a word map's special words."""
    return word.strip("<>") if is_special(word) else word


def is_special(word):
    """Whether a word is no word of captions: `<end>`, or the one that names a rule."""
    return word in SPECIAL_WORDS or MARK.fullmatch(word) is not None


def normalised(text):
    """A text with each character in the one form (NFC) that all ways to write it have."""
    return unicodedata.normalize("NFC", text)


def lowered(text):
    return normalised(normalised(text).lower())


# ----------------------------------------------------------------------------------------- rules


@register("karpathy")
class Karpathy(Rule):
    """As Karpathy's data sets are split, in lower case, without ASCII's punctuation, at blanks."""

    about = "lower-cased words without punctuation"
    takes_tokens = at_blanks = True
    _no_punctuation = str.maketrans("", "", r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~""")

    def _split(self, text):
        return lowered(text).translate(self._no_punctuation).split()


@register("whitespace")
class Whitespace(Rule):
    """At blanks and nowhere else, capitals and punctuation kept: for captions split beforehand."""

    about = "words between blanks, as written"
    takes_tokens = at_blanks = True

    def _split(self, text):
        return normalised(text).split()


@register("ptb")
class PennTreebank(Rule):
    """As the Penn Treebank is split, in lower case: punctuation by itself, «do n't», «dog 's»."""

    about = "lower-cased words and punctuation as of the Penn Treebank"
    at_blanks = True

    @cached_property
    def _parts(self):
        from nltk.tokenize import NLTKWordTokenizer, TreebankWordDetokenizer  # takes a second

        return NLTKWordTokenizer().tokenize, TreebankWordDetokenizer().detokenize

    def _split(self, text):
        tokenize, _ = self._parts
        # which takes one sentence at a time, a full stop being the last of it
        sentences = re.split(r"(?<=[.!?])\s+", lowered(text))
        return [word for sentence in sentences for word in tokenize(sentence)]

    def join(self, words):
        _, detokenize = self._parts
        sentences, own = [], []
        for word in words:
            own.append(word)
            if word in (".", "!", "?"):
                sentences.append(own)
                own = []
        return " ".join(detokenize(sentence) for sentence in [*sentences, own] if sentence)


@register("characters")
class Characters(Rule):
    """Characters as people see them, in lower case, without punctuation: for Chinese, Japanese and
    Thai. A blank is one, too, `BLANK`, but beside Chinese and Japanese ones, where it says nothing.
    """

    about = "lower-cased characters without punctuation"
    whole = False

    def _split(self, text):
        text = regex.sub(r"\p{P}", "", lowered(text).replace(BLANK, " "))
        text = NEEDLESS_BLANK.sub("", " ".join(text.split()))
        return regex.findall(r"\X", text.replace(" ", BLANK))

    def join(self, words):
        return "".join(words).replace(BLANK, " ").strip()


@register("unicode")
class UnicodeWords(Rule):
    """By ICU's word boundaries, which are Unicode's (UAX #29) and, of Chinese, Japanese, Thai, Lao,
    Khmer and Burmese, those of a dictionary; in lower case, without punctuation."""

    about = "lower-cased words by ICU's boundaries, without punctuation"

    @cached_property
    def _segments(self):
        return _needs("icu4py.breakers", "unicode", ", on Python 3.11 or newer").WordBreaker

    def _split(self, text):
        segments = self._segments(lowered(text), "und")
        return [segment for segment in segments if regex.search(r"[\p{L}\p{N}\p{So}]", segment)]

    def join(self, words):
        joined = ""
        for word in words:
            beside = joined and not _side_by_side(joined[-1], word[0])
            joined += " " + word if beside else word
        return joined


def _side_by_side(*characters):
    return all(regex.match(f"[{SIDE_BY_SIDE}]", character) for character in characters)


@register("subwords")
class Subwords(Rule):
    """Pieces of words, in lower case, learned from the captions by the library `tokenizers`; the
    vocabulary is all that was learned, as a word is split into the longest that it has (WordPiece).
    The first piece of a word begins with `BLANK`, so that joining gives all back."""

    about = "lower-cased subwords"
    whole = False

    @cached_property
    def _encode(self):
        from_words = dict.fromkeys(word for word in self.words if not is_special(word))
        vocabulary = {word: index for index, word in enumerate(["<unk>", *from_words])}
        return _tokenizer(vocabulary).encode

    def _split(self, text):
        text = _with_blanks(text)
        found = self._encode(text)
        words = found.tokens
        for i, (start, end) in enumerate(found.offsets):
            if words[i] == "<unk>":  # a word with a character that no piece has: it stays whole
                words[i] = BLANK * (i == 0) + text[start:end].replace(" ", BLANK)
        return words

    join = Characters.join


def _with_blanks(text):
    return " ".join(lowered(text).replace(BLANK, " ").split())


def _tokenizer(vocabulary):
    """A `tokenizers.Tokenizer` of pieces, str -> index."""
    library = _needs("tokenizers", "subwords")
    model = library.models.WordPiece(
        vocabulary, unk_token="<unk>", continuing_subword_prefix="", max_input_chars_per_word=10**6
    )
    tokenizer = library.Tokenizer(model)
    before = library.pre_tokenizers
    tokenizer.pre_tokenizer = before.Sequence([before.Metaspace(), before.Punctuation("isolated")])
    return tokenizer


def learn_subwords(texts, size):
    """The pieces of words that `size` words of a word map have room for, the special ones among
    them, learned from captions.

    Raises:
        UserError: `size` has no room for all characters of the captions, or the library is missing.
    """
    tokenizer, others = _tokenizer({"<unk>": 0}), len(SPECIAL_WORDS) + 1
    trainer = _needs("tokenizers", "subwords").trainers.WordPieceTrainer(
        vocab_size=max(0, size - others + 1),  # of these it has <unk>
        special_tokens=["<unk>"],
        continuing_subword_prefix="",
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(_with_blanks, texts), trainer)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    pieces = [piece for piece, _ in pieces if not is_special(piece)]
    if len(pieces) + others > size:
        raise UserError(
            f"--subwords {size} is below what the captions need, {len(pieces) + others:,}, as each "
            "of their characters is a subword: give so many, or more"
        )
    return pieces


def _needs(module, rule, note=""):
    """A module of a library that is there for one rule alone. Raises UserError."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"the words of the rule {rule!r} take the library {package} ({error}): "
            f"pip install {package}{note}"
        ) from error


# ------------------------------------------------------------------------------------- word maps


def make_rule(name, words=()):
    """A `Rule` by its name, with the words of its vocabulary. Raises UserError."""
    if name not in RULES:
        raise UserError(f"there is no rule of words {name!r}: known are {', '.join(RULES)}")
    return RULES[name](words)


def hint(rule, counts):
    """What there is to do, for people, where many words of captions are sentences of scripts
    without blanks, which a rule that goes by blanks has not split; "" where they are not.

    Args:
        counts: a Counter of the captions' words.
    """
    if not rule.at_blanks:
        return ""
    unsplit = sum(n for word, n in counts.items() if UNSPLIT.search(word))
    if unsplit <= counts.total() / 10:
        return ""
    return (
        f"{unsplit / counts.total():.0%} of the words are of scripts without blanks: --words "
        "characters or --words unicode splits these"
    )


KARPATHY = make_rule(USUAL)
tokenize = KARPATHY.split


def mark_of(name):
    """The special words, a list, that a rule's name is kept by."""
    return [] if name == USUAL else [f"<rule:{name}>"]


def rule_of(word_map):
    """The `Rule` whose words a word map, word -> index, has. Raises UserError where it is none that
    is known."""
    marks = [MARK.fullmatch(mark)[1] for mark in _marks(word_map)]
    if len(marks) > 1:
        raise UserError(f"a word map has one rule of words, not {len(marks)}: {', '.join(marks)}")
    return make_rule(marks[0] if marks else USUAL, word_map)


def unsayable(word_map):
    """The words of a word map that no caption is made of: all special ones but `<end>`, a list."""
    return ["<pad>", "<start>", "<unk>", *_marks(word_map)]


def _marks(word_map):
    """The special words that name rules."""
    return [word for word in word_map if word.startswith("<rule:") and MARK.fullmatch(word)]
