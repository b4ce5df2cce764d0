"""Captions of a mirror image: left and right exchanged."""

import re

import torch

from word_maps import encode_caption

# What is made of left and right: "leftmost", "left-hand", "lefthanded", "topright". Words that only
# look so, as "leftover", "upright", "bright" or "rightful", are not among them.
SIDED = re.compile(
    r"(?<![\w-])((?:top|bottom|upper|lower|far|front|back|rear|center|mid)-?)?(left|right)"
    r"(-?(?:most|hand|handed|hander|side|ward|wards|wing|foot|footed|facing))?(?![\w-])"
    r"|[左右]",  # of Chinese and Japanese, whatever stands beside
    re.IGNORECASE,
)
OTHERS = {"left": "right", "right": "left", "左": "右", "右": "左"}


def mirrored(text):
    """A text with left and right exchanged, in letters as large as they were."""

    def other(found):
        before, side, after = found.groups(default="")
        side = side or found[0]
        new = OTHERS[side.lower()]
        new = new.upper() if side.isupper() else new.title() if side.istitle() else new
        return before + new + after

    return SIDED.sub(other, text)


def mirrored_words(word_map):
    """The word that stands for each in the captions of a mirror image: int64 (V,), right for left
    and left for right, and itself for all others; `<unk>` where the vocabulary has but one of a
    pair."""
    words = torch.arange(1 + max(word_map.values()))
    for word, index in word_map.items():
        if (other := mirrored(word)) != word:
            words[index] = word_map.get(other, word_map["<unk>"])
    return words


def mirrored_captions(captions, lengths, word_map, rule):
    """(image, caption) -> the caption of the mirror image, a list of indices, of those captions
    that say left or right: for words that are less than what people call words, as they may be
    made of several, and of others than before.

    Args:
        captions, lengths: int64 (I, K, T) and (I, K), from `datasets.CaptionDataset`.
    """
    words, found = {index: word for word, index in word_map.items()}, {}
    for i, (rows, ends) in enumerate(zip(captions.tolist(), lengths.tolist(), strict=True)):
        for k, (caption, n) in enumerate(zip(rows, ends, strict=True)):
            text = rule.join([words[index] for index in caption[1 : n - 1]])
            if (other := mirrored(text)) != text:
                found[i, k], _ = encode_caption(rule.split(other), word_map, 0)
    return found
