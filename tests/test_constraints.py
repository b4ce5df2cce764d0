"""What captions keep to is checked against every caption of a tiny language, and against searches
written out for one image at a time, with python lists."""

from itertools import product

import pytest
import torch
from test_decoders import build, make_batch, unpacked
from test_decoding import (
    MAX_LENGTH,
    START,
    TINY,
    WORD_MAP,
    assert_same,
    continuations,
    make_decoder,
    make_images,
    teacher_forced,
)

from constraints import FREE, Constraints
from contract import DECODERS
from decoding import beam_search, finished_beams, greedy, sample
from groundwork.errors import UserError

WORDS = list(WORD_MAP)
KINDS = [
    Constraints(min_words=3),
    Constraints(no_repeat_ngram=1),
    Constraints(no_repeat_ngram=2),
    Constraints(no_repeat_ngram=3),
    Constraints(must_include=("b",)),
    Constraints(must_include=("c", "a")),
    Constraints(must_include=("a|b", "c")),
    Constraints(must_include=("a", "a|b")),  # one word may be both
    Constraints(must_include=("a", "b", "c")),
    Constraints(min_words=3, no_repeat_ngram=2, must_include=("c",)),
    Constraints(min_words=2, no_repeat_ngram=1, must_include=("a|c", "b")),
]


def keeps_to(words, constraints):
    """Whether a caption, a tuple of texts, is as it should be; the definition, word by word."""
    n = constraints.no_repeat_ngram
    ngrams = [words[i : i + n] for i in range(len(words) - n + 1)] if n else []
    return (
        len(words) >= constraints.min_words
        and len(ngrams) == len(set(ngrams))
        and all(set(either.split("|")) & set(words) for either in constraints.must_include)
    )


# -------------------------------------------------------------------------------- every caption

LONGEST = 4
ALL = [w for n in range(1, LONGEST + 1) for w in product("abc", repeat=n)]


def every_log_prob(decoder, images):
    """log p (I, captions) of `ALL`, by teacher forcing."""
    rows = [[TINY["<start>"], *(TINY[w] for w in words), TINY["<end>"]] for words in ALL]
    captions = torch.tensor([row + [0] * (LONGEST + 2 - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    with torch.no_grad():
        many = captions.repeat(len(images), 1), lengths.repeat(len(images))
        scores, targets, *_ = decoder(images, *many)
    own = scores.data.log_softmax(1).gather(1, targets.data[:, None]).squeeze(1)
    return unpacked(targets._replace(data=own)).sum(1).view(len(images), -1)


@pytest.mark.parametrize("name", DECODERS)
def test_a_wide_beam_finds_all_that_keeps_to_it_and_the_best_first(name):
    decoder = build((name, {}), 1.0, vocab_size=7)
    images = make_batch([2] * 2, 1, grid=2)[0]
    log_probs, firsts = every_log_prob(decoder, images), set()
    for constraints in [FREE, *KINDS]:
        expected = [i for i, words in enumerate(ALL) if keeps_to(words, constraints)]
        assert 0 < len(expected) <= len(ALL)
        found = finished_beams(decoder, images, TINY, len(ALL), LONGEST, 0.7, constraints)
        best = beam_search(decoder, images, TINY, len(ALL), LONGEST, 0.7, constraints)
        for captions, first, own in zip(found, best, log_probs, strict=True):
            score = {i: own[i].item() / (len(ALL[i]) + 1) ** 0.7 for i in expected}
            order = sorted(expected, key=lambda i: -score[i])
            texts = [tuple("?abc"[word] for word in caption.words) for caption in captions]
            assert sorted(texts) == sorted(ALL[i] for i in expected)
            assert texts[0] == ALL[order[0]] and first.words == captions[0].words
            for caption, i in zip(captions, order, strict=True):
                assert caption.log_prob == pytest.approx(own[i].item(), rel=1e-3, abs=1e-3)
            firsts.add((constraints, texts[0]))
    assert len({text for _, text in firsts}) > 3  # they make a difference


@pytest.mark.parametrize(
    "must", [("ab",), ("aab",), ("ab", "bc"), ("ab|cc", "a"), ("aba|bc",), ("abc", "c")]
)
def test_words_of_several_characters_come_as_they_are_written(must):
    """Of a vocabulary of characters, which makes several of its words of one of people's."""
    word_map = TINY | {"<rule:characters>": len(TINY)}
    decoder = build(("lstm", {}), 1.0, vocab_size=len(word_map))
    images = make_batch([2] * 2, 1, grid=2)[0]
    constraints = Constraints(must_include=must)
    constraints.check(word_map, LONGEST)
    expected = {
        "".join(words)
        for words in ALL
        if all(any(own in "".join(words) for own in either.split("|")) for either in must)
    }
    for captions in finished_beams(decoder, images, word_map, len(ALL), LONGEST, 0.7, constraints):
        texts = ["".join("?abc"[word] for word in caption.words) for caption in captions]
        assert len(texts) == len(set(texts)) and set(texts) == expected


def test_too_many_characters_are_one_line():
    special = ["<pad>", "<unk>", "<start>", "<end>", "<rule:characters>"]
    word_map = {word: i for i, word in enumerate([*special, *"abcdefgh"])}
    with pytest.raises(UserError, match="made of too many of the vocabulary's words"):
        Constraints(must_include=("abcdefg", "hgfedcba", "acegbdfh", "hbd")).check(word_map, 50)
    with pytest.raises(UserError, match="must_include needs 8 words: max_words 7 is too few"):
        Constraints(must_include=("hgfedcba",)).check(word_map, 7)
    with pytest.raises(UserError, match="the model has no word 'xyz'"):
        Constraints(must_include=("xyz",)).check(word_map, 7)


# ----------------------------------------------------------------------------------- by hand


@torch.no_grad()
def by_hand(
    decoder,
    image,
    beam_size,
    max_length,
    length_penalty=0.0,
    constraints=FREE,
    groups=1,
    diversity_penalty=0.0,
):
    """Diverse and constrained beam search of one image in plain lists: group after group, for each
    set of the words that have come, until nothing is left to go on with. (words, log p, alphas) of
    the captions in turn, none twice."""
    must = [set(either.split("|")) for either in constraints.must_include]
    memory, width = decoder.prepare(image[None]), beam_size // groups
    start = (0.0, 0.0, [], [], decoder.init_state(memory))
    beams = [{frozenset(): [start]} for _ in range(groups)]
    finished = [[] for _ in range(groups)]
    for length in range(max_length + 1):
        before = []
        for group in range(groups):
            reached, said = {}, []
            for met, partials in beams[group].items():
                for rank, total, words, alphas, state in partials:
                    options, alpha, state = continuations(
                        decoder, memory, words[-1] if words else START, state, length, max_length
                    )
                    for log_prob, word in options:
                        text = tuple(WORDS[w] for w in [*words, word])
                        if text[-1] == "<end>":
                            if len(met) < len(must) or length < constraints.min_words:
                                continue
                        elif not keeps_to(text, Constraints(0, constraints.no_repeat_ngram)):
                            continue
                        now = met | {i for i, own in enumerate(must) if text[-1] in own}
                        cost = diversity_penalty * before.count(word)
                        partial = rank + log_prob - cost, total + log_prob
                        extended = (*partial, [*words, word], [*alphas, alpha], state)
                        reached.setdefault(now, []).append(extended)
            beams[group] = {}
            for met, candidates in reached.items():
                candidates.sort(key=lambda candidate: -candidate[0])
                places = width - len(finished[group]) * (len(met) == len(must))
                kept = candidates[:places]
                ended = [c for c in kept if WORDS[c[2][-1]] == "<end>"]
                beams[group][met] = [c for c in kept if WORDS[c[2][-1]] != "<end>"]
                finished[group] += ended
                said += [c[2][-1] for c in beams[group][met]]
            before += said
    return in_turn(finished, length_penalty)


def in_turn(finished, length_penalty):
    found = {}
    for captions in finished:
        captions.sort(key=lambda c: -c[1] / len(c[2]) ** length_penalty)
    for turn in range(max(map(len, finished))):
        own = [captions[turn] for captions in finished if turn < len(captions)]
        for _, total, words, alphas, _ in sorted(
            own, key=lambda c: -c[1] / len(c[2]) ** length_penalty
        ):
            found.setdefault(tuple(words), (words[:-1], total, torch.stack(alphas[:-1])))
    return list(found.values())


BY_HAND = [
    ("ordinary", {}, 5),
    ("two groups", {"groups": 2, "diversity_penalty": 0.5}, 6),
    ("groups of one", {"groups": 4, "diversity_penalty": 3.0}, 4),
    ("groups at no cost", {"groups": 3, "diversity_penalty": 0.0}, 6),
    ("no pair twice", {"constraints": Constraints(no_repeat_ngram=2)}, 4),
    ("a word", {"constraints": Constraints(must_include=("d",))}, 3),
    ("two words", {"constraints": Constraints(must_include=("e", "a|b"))}, 2),
    ("three words", {"constraints": Constraints(3, 1, ("a", "b|c", "f"))}, 1),
    (
        "groups with a word",
        {"groups": 2, "diversity_penalty": 1.0, "constraints": Constraints(must_include=("c",))},
        4,
    ),
]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize(
    "options, beam_size", [k[1:] for k in BY_HAND], ids=[k[0] for k in BY_HAND]
)
def test_search_equals_plain_lists_over_one_image(options, beam_size, length_penalty):
    for seed in range(2):
        decoder, images = make_decoder(seed), make_images(4, seed=seed)
        asked = decoder, images, WORD_MAP, beam_size, MAX_LENGTH, length_penalty
        found = finished_beams(*asked, **options)
        best = beam_search(*asked, **options)
        for captions, first, image in zip(found, best, images, strict=True):
            expected = by_hand(decoder, image, beam_size, MAX_LENGTH, length_penalty, **options)
            assert_same(first, *expected[0])
            assert len(captions) == len(expected)
            for caption, own in zip(captions, expected, strict=True):
                assert_same(caption, *own)


@pytest.mark.parametrize(
    "options, beam_size", [k[1:] for k in BY_HAND], ids=[k[0] for k in BY_HAND]
)
def test_an_image_alone_gets_the_captions_that_it_gets_in_a_batch(options, beam_size):
    decoder, images = make_decoder(3), make_images(6, seed=3)
    together = finished_beams(decoder, images, WORD_MAP, beam_size, MAX_LENGTH, **options)
    assert len({len(captions[0].words) for captions in together}) > 1
    for i, captions in enumerate(together):
        [alone] = finished_beams(decoder, images[[i]], WORD_MAP, beam_size, MAX_LENGTH, **options)
        for one, other in zip(alone, captions, strict=True):
            assert_same(one, *other)


# ------------------------------------------------------------------------------------- groups


def test_one_group_is_ordinary_beam_search_and_so_is_each_at_no_cost():
    decoder, images = make_decoder(2), make_images(seed=2)

    def words(beam_size, **options):
        found = finished_beams(decoder, images, WORD_MAP, beam_size, MAX_LENGTH, **options)
        return [[caption.words for caption in captions] for captions in found]

    assert words(3, groups=1, diversity_penalty=9.0) == words(3)
    assert words(6, groups=2, diversity_penalty=0.0) == words(3)


def test_a_penalty_makes_the_groups_say_other_words():
    said = {}
    for penalty in (0.0, 0.5, 5.0):
        said[penalty] = 0
        for seed in range(4):
            found = finished_beams(
                make_decoder(seed), make_images(seed=seed), WORD_MAP, 4, MAX_LENGTH,
                groups=4, diversity_penalty=penalty,
            )  # fmt: skip
            said[penalty] += sum(len({c.words[0] for c in captions}) for captions in found)
    assert said[0.0] < said[0.5] < said[5.0]


# ------------------------------------------------------------------------- what is always kept to


@pytest.mark.parametrize("beam_size", [1, 3])
def test_words_come_however_unlikely_they_are_in_as_few_as_they_take(beam_size):
    for seed in range(3):
        decoder = make_decoder(seed)
        with torch.no_grad():
            decoder.fc.bias[[WORD_MAP["e"], WORD_MAP["f"]]] -= 200
        must = Constraints(must_include=("f", "e|f", "e"))
        for longest in (2, 3, MAX_LENGTH):
            for caption, image in zip(
                beam_search(
                    decoder, make_images(seed=seed), WORD_MAP, beam_size, longest, 0.0, must
                ),
                make_images(seed=seed),
                strict=True,
            ):
                assert {WORD_MAP["e"], WORD_MAP["f"]} <= set(caption.words)
                assert len(caption.words) <= longest
                log_prob, alphas = teacher_forced(decoder, image, caption.words)
                assert_same(caption, caption.words, log_prob, alphas)


def draw(decoder, images, word_map, max_length, constraints):
    generator = torch.Generator().manual_seed(0)
    return sample(decoder, images, word_map, max_length, 1.0, generator, constraints, per_image=3)


def beam(decoder, images, word_map, max_length, constraints):
    return beam_search(decoder, images, word_map, 3, max_length, 0.0, constraints)


@pytest.mark.parametrize("method", [greedy, draw, beam])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_words_in_a_row_come_twice(method, n):
    free, kept = 0, Constraints(4, n)
    for seed in range(4):
        decoder, images = make_decoder(seed, end=-3.0), make_images(seed=seed)
        longest = 6 if n == 1 else 12
        for caption in method(decoder, images, WORD_MAP, longest, kept):
            assert keeps_to(tuple(WORDS[w] for w in caption.words), kept)
            assert 4 <= len(caption.words) <= longest
        free += sum(
            not keeps_to(tuple(caption.words), Constraints(no_repeat_ngram=n))
            for caption in method(decoder, images, WORD_MAP, longest, FREE)
        )
    assert free > 3  # it does repeat itself where it may


def test_greedy_takes_the_likeliest_word_that_does_not_repeat():
    for seed in range(4):
        decoder, images = make_decoder(seed, end=-2.0), make_images(seed=seed)
        kept = Constraints(no_repeat_ngram=2)
        for caption, image in zip(
            greedy(decoder, images, WORD_MAP, MAX_LENGTH, kept), images, strict=True
        ):
            expected = by_hand(decoder, image, 1, MAX_LENGTH, constraints=kept)
            assert_same(caption, *expected[0])


# -------------------------------------------------------------------------------------- messages

VOCABULARY = {"<pad>": 0, "dog": 1, "dogs": 2, "door": 3, "red": 4} | {
    "<unk>": 5, "<start>": 6, "<end>": 7,
}  # fmt: skip


@pytest.mark.parametrize(
    ("constraints", "max_words", "words"),
    [
        (Constraints(must_include=("dgo",)), 50, "no word 'dgo'; near are dog"),
        (Constraints(must_include=("Dog",)), 50, "no word 'Dog'; near are dog, dogs"),
        (Constraints(must_include=("dog|qqq",)), 50, "'dog|qqq': the model has no word 'qqq'"),
        (Constraints(must_include=("<unk>",)), 50, "no word '<unk>'"),
        (Constraints(must_include=("<end>",)), 50, "no word '<end>'"),
        (Constraints(must_include=("red dog",)), 50, "'red dog' is not a word"),
        (Constraints(must_include=("dog|",)), 50, "'dog|' is not a word"),
        (Constraints(must_include=("",)), 50, "'' is not a word"),
        (Constraints(must_include=("dog", "red")), 1, "needs 2 words: max_words 1 is too few"),
        (Constraints(must_include=tuple("abcde")), 50, "takes 4 words at most, not 5"),
        (Constraints(min_words=6), 5, "min_words 6 is more than max_words 5"),
        (Constraints(5, 1), 50, "min_words 5 cannot be kept to without repeating"),
    ],
)
def test_what_no_caption_can_keep_to_is_one_line(constraints, max_words, words):
    with pytest.raises(UserError) as error:
        constraints.check(VOCABULARY, max_words)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("constraints", "max_words"),
    [
        (Constraints(must_include=("dog", "dog|dogs")), 1),  # one word is both
        (Constraints(must_include=("dog", "dog", "red")), 2),
        (Constraints(must_include=("dog", "dogs", "door", "red")), 4),
        (Constraints(4, 1), 4),
        (FREE, 1),
    ],
)
def test_what_can_be_kept_to_is(constraints, max_words):
    constraints.check(VOCABULARY, max_words)
    decoder = make_decoder(0, VOCABULARY)
    [caption] = beam_search(decoder, make_images(1), VOCABULARY, 1, max_words, 0.0, constraints)
    names = list(VOCABULARY)
    assert keeps_to(tuple(names[w] for w in caption.words), constraints)


def test_words_that_must_come_are_for_beam_search():
    with pytest.raises(ValueError, match="for beam search"):
        greedy(make_decoder(0), make_images(1), WORD_MAP, 5, Constraints(must_include=("a",)))
