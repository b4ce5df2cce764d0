"""Which words of an English caption are nouns: by the Hanover Tagger, HanTa (Wartena, 2023)."""

from functools import cache

from groundwork.errors import UserError


def check_installed():
    """Raises UserError where the tagger is missing."""
    _tagger()


@cache
def _tagger():
    try:
        from HanTa.HanoverTagger import HanoverTagger  # takes half a second, so only when asked for
    except ImportError as error:
        raise UserError(
            f"nouns cannot be told from other words: {error}: pip install HanTa"
        ) from error

    return HanoverTagger("morphmodel_en.pgz")


def kinds(words):
    """For each of a caption's words "nouns" or "other words".

    Args:
        words: T strings, in their order, which tells «a play» from «they play».
    """
    tags = (tag for _, _, tag in _tagger().tag_sent(list(words)))  # of the British National Corpus
    return ["nouns" if tag.startswith(("NN", "NP")) else "other words" for tag in tags]
