"""Which words of an English caption are nouns: by the Hanover Tagger, HanTa (Wartena, 2023)."""

from functools import cache


@cache
def _tagger():
    from HanTa.HanoverTagger import HanoverTagger  # takes half a second, so only when asked for

    return HanoverTagger("morphmodel_en.pgz")


def kinds(words):
    """For each of a caption's words "nouns" or "other words".

    Args:
        words: T strings, in their order, which tells «a play» from «they play».
    """
    tags = (tag for _, _, tag in _tagger().tag_sent(list(words)))  # of the British National Corpus
    return ["nouns" if tag.startswith(("NN", "NP")) else "other words" for tag in tags]
