"""Vocabularies: which words there are, by frequency or by number, new or another data set's; and
captions as their indices."""

from collections import Counter
from dataclasses import dataclass

from captioned import words_of
from groundwork.errors import UserError
from groundwork.wording import counted
from word_rules import (
    SPECIAL_WORDS,
    USUAL,
    hint,
    is_special,
    learn_subwords,
    make_rule,
    mark_of,
    rule_of,
)


@dataclass(frozen=True)
class Wanted:
    """Which words a vocabulary is to have, beside that they are frequent enough."""

    rule: str | None = None  # of `word_rules.RULES`; None: karpathy, or the word map's
    size: int | None = None  # words at most, the special ones among them, the most frequent
    word_map: dict[str, int] | None = None  # whose words are taken
    source: str | None = None  # of that word map, for messages
    extend: bool = False  # the word map by the captions' new words, which come behind

    @property
    def keeps_more(self):
        """What there is to do where many words are unknown, for people."""
        if self.word_map is not None and rule_of(self.word_map).name == "subwords":
            return "--subwords in the place of --word_map learns subwords of these captions"
        if self.word_map is not None and not self.extend:
            return "--extend_vocabulary adds new ones"
        if self.size is not None:
            return "a larger number of words keeps more"
        return "a lower --min_word_freq keeps more"


def choose(captions, min_word_freq, wanted, source):
    """The `Rule` by which captions are split, word -> index, and how often each word comes in the
    captions, as `count_words` has it.

    Args:
        captions: `captioned.Caption`s, which are gone through several times.
        min_word_freq: words seen more often are taken.
        wanted: `Wanted`.
        source: of the captions, for messages.

    Raises:
        UserError: there would be no words, or more than there may be; the rule is another than the
            word map's, or lacks its library.
    """
    known = wanted.word_map
    rule = _new_rule(captions, wanted) if known is None else _rule_of_known(wanted)
    counts = count_words(captions, rule)
    words = [word for word, count in counts.items() if count > min_word_freq]
    if known is None:
        words = rule.words if rule.name == "subwords" else words
        known = _numbered([], rule.name)
        if not words:
            way_out = hint(rule, counts) or "lower --min_word_freq, to 0 for all words"
            raise UserError(
                f"{source} has no word more than {counted(min_word_freq, 'time')}, so there is "
                f"nothing to say: {way_out}"
            )
    elif not wanted.extend and all(map(is_special, known.keys() & counts.keys())):
        raise UserError(f"{source} has none of the words of {wanted.source}")
    else:
        words = [word for word in words if word not in known] if wanted.extend else []
    room = len(words) if wanted.size is None else wanted.size - len(known)
    if room < min(1, len(words)):
        raise UserError(
            f"--vocabulary_size {wanted.size} is below what is needed: {len(known)} words are there"
            f" without any of the captions', so give {len(known) + 1} or more"
        )
    if len(words) > room:
        most = set(sorted(words, key=lambda word: -counts[word])[:room])
        words = [word for word in words if word in most]
    if wanted.word_map is None:
        return rule, _numbered(words, rule.name), counts
    return rule, known | {word: i for i, word in enumerate(words, start=len(known))}, counts


def count_words(captions, rule):
    """Word -> how often it stands in captions, in the order of first appearance."""
    return Counter(word for caption in captions for word in words_of(caption, rule))


def _new_rule(captions, wanted):
    if wanted.rule == "subwords":
        texts = (caption.text for caption in captions)
        return make_rule(wanted.rule, learn_subwords(texts, wanted.size))
    return make_rule(wanted.rule or USUAL)


def _rule_of_known(wanted):
    rule = rule_of(wanted.word_map)
    if wanted.rule not in (None, rule.name):
        raise UserError(
            f"{wanted.source} has words of the rule {rule.name}, not of {wanted.rule}: leave "
            "--words out"
        )
    if wanted.extend and rule.name == "subwords":
        raise UserError(
            f"{wanted.source} has subwords, of which new words are made, too: leave "
            "--extend_vocabulary out"
        )
    return rule


def _numbered(words, rule):
    """Word -> index: the words from 1, then the special ones and the rule's name; <pad> is 0."""
    words = [*words, "<unk>", "<start>", "<end>", *mark_of(rule)]
    return {word: i for i, word in enumerate(words, start=1)} | {"<pad>": 0}


def check_word_map(word_map, source):
    """Raises UserError unless `word_map` is a dict that numbers its words, the special ones
    among them, from 0 without gaps, and they are of a rule that is known."""
    if (
        not isinstance(word_map, dict)
        or not all(word in word_map for word in SPECIAL_WORDS)
        or not all(isinstance(word, str) for word in word_map)
        or not all(type(index) is int for index in word_map.values())
        or sorted(word_map.values()) != list(range(len(word_map)))
    ):
        raise UserError(f"{source} is no word map: make it with create_input_files.py")
    try:
        rule_of(word_map)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def check_same(own, other, message):
    """Raises UserError with the message, and the rules where they differ, unless two word maps are
    the same."""
    if own != other:
        rules = [rule_of(word_map).name for word_map in (own, other)]
        differ = f" (words of the rule {rules[0]}, not of {rules[1]})" * (rules[0] != rules[1])
        raise UserError(message.format(differ))


def is_extension(word_map, of):
    """Whether a word map has all words of another, with their indices, and more, of its rule."""
    return of.items() < word_map.items() and not any(map(is_special, word_map.keys() - of.keys()))


def encode_caption(words, word_map, max_len):
    """Indices of <start>, the words and <end>, padded to max_len + 2, and the unpadded length."""
    known = [word_map.get(word, word_map["<unk>"]) for word in words]
    caption = [word_map["<start>"], *known, word_map["<end>"]]
    return caption + [word_map["<pad>"]] * (max_len + 2 - len(caption)), len(caption)


def describe(word_map):
    """How many words a word map has, for people."""
    rule = rule_of(word_map)
    special = len(SPECIAL_WORDS) + len(mark_of(rule.name))
    line = f"vocabulary: {len(word_map)} words, the {special} special included"
    return line if rule.name == USUAL else f"{line}; {rule.about}"
