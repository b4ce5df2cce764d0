"""Decoding is checked against searches written out for one image at a time, with python lists,
against every caption of a tiny language, and against teacher forcing."""

from collections import Counter
from itertools import product

import pytest
import torch
from torch import nn

from decoding import beam_search, finished_beams, greedy, sample
from models import DecoderWithAttention, LSTMConfig

WORDS = ["<pad>", *"abcdef", "<unk>", "<start>", "<end>"]
WORD_MAP = {word: i for i, word in enumerate(WORDS)}
START, END = WORD_MAP["<start>"], WORD_MAP["<end>"]
FORBIDDEN = {WORD_MAP[word] for word in ("<pad>", "<unk>", "<start>", "<end>")}
MAX_LENGTH = 8
SIZE = 3  # the alphas cover SIZE × SIZE places


def make_decoder(seed=0, word_map=WORD_MAP, end=0.0, std=1.0, **options):
    """Weights so large that captions differ in words and length; `end` adds to <end>'s score."""
    torch.manual_seed(seed)
    decoder = DecoderWithAttention(
        LSTMConfig(len(word_map), 6, 5, 6, 24, encoded_image_size=SIZE, **options)
    )
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=std)
    with torch.no_grad():
        decoder.fc.weight *= 0.7
        decoder.fc.bias[word_map["<end>"]] += end
    return decoder.eval()


def make_images(count=6, grid=2, seed=0):
    return 2 * torch.randn(count, grid, grid, 6, generator=torch.Generator().manual_seed(seed))


def beam3(decoder, images, word_map, max_length):
    return beam_search(decoder, images, word_map, 3, max_length)


def seeded_sample(decoder, images, word_map, max_length):
    generator = torch.Generator().manual_seed(0)
    return sample(decoder, images, word_map, max_length, generator=generator)


every_method = pytest.mark.parametrize("method", [greedy, seeded_sample, beam3])


# ------------------------------------------------------------------------------------- oracle


def continuations(decoder, memory, word, state, length, max_length, word_map=WORD_MAP):
    """(log p, word) of what may follow `length` words, and the step's alphas and state."""
    scores, alphas, state = decoder.step(torch.tensor([word]), state, memory)
    log_probs = scores[0].log_softmax(0).tolist()
    end = word_map["<end>"]
    never = {word_map[name] for name in ("<pad>", "<unk>", "<start>")}
    if length == max_length:
        options = [end]
    else:
        options = [w for w in range(len(log_probs)) if w not in never and (length or w != end)]
    return [(log_probs[w], w) for w in options], alphas[0], state


@torch.no_grad()
def greedy_by_hand(decoder, image, max_length):
    memory = decoder.prepare(image[None])
    state, words, alphas, total = decoder.init_state(memory), [], [], 0.0
    while END not in words:
        options, alpha, state = continuations(
            decoder, memory, words[-1] if words else START, state, len(words), max_length
        )
        log_prob, word = max(options)
        words.append(word)
        alphas.append(alpha)
        total += log_prob
    return words[:-1], total, torch.stack(alphas[:-1])


@torch.no_grad()
def beam_by_hand(decoder, image, beam_size, max_length, length_penalty):
    """All finished captions the beam meets, the best first: a finished one takes a place for
    good."""
    memory = decoder.prepare(image[None])
    partials = [(0.0, [], [], decoder.init_state(memory))]
    finished = []
    while partials:
        candidates = []
        for total, words, alphas, state in partials:
            options, alpha, state = continuations(
                decoder, memory, words[-1] if words else START, state, len(words), max_length
            )
            for log_prob, word in options:
                candidates.append((total + log_prob, [*words, word], [*alphas, alpha], state))
        candidates.sort(key=lambda candidate: -candidate[0])
        kept = candidates[: beam_size - len(finished)]
        finished += [candidate for candidate in kept if candidate[1][-1] == END]
        partials = [candidate for candidate in kept if candidate[1][-1] != END]
    finished.sort(key=lambda found: -found[0] / len(found[1]) ** length_penalty)
    return [(words[:-1], total, torch.stack(alphas[:-1])) for total, words, alphas, _ in finished]


@torch.no_grad()
def teacher_forced(decoder, image, words):
    """log p of a caption and its words' alphas, from the decoder's forward pass."""
    caption = torch.tensor([[START, *words, END]])
    scores, targets, alphas, _ = decoder(image[None], caption, torch.tensor([caption.shape[1]]))
    log_probs = scores.data.log_softmax(1).gather(1, targets.data[:, None])
    return log_probs.sum().item(), alphas[0, :-1]


def assert_same(caption, words, log_prob, alphas):
    assert caption.words == words
    assert caption.log_prob == pytest.approx(log_prob, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(caption.alphas, alphas, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("gate, deep_output", [("scalar", False), ("channel", True)])
def test_greedy_equals_a_plain_loop_over_one_image(seed, gate, deep_output):
    decoder = make_decoder(seed, gate=gate, deep_output=deep_output)
    images = make_images(seed=seed)
    captions = greedy(decoder, images, WORD_MAP, MAX_LENGTH)
    assert len(captions) == len(images)
    for caption, image in zip(captions, images, strict=True):
        assert_same(caption, *greedy_by_hand(decoder, image, MAX_LENGTH))


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("beam_size", [1, 2, 3, 5, 12])
def test_beam_search_equals_plain_lists_over_one_image(beam_size, length_penalty):
    for seed in range(6):
        decoder = make_decoder(seed)
        images = make_images(5, grid=2 + seed % 2, seed=seed)
        captions = beam_search(decoder, images, WORD_MAP, beam_size, MAX_LENGTH, length_penalty)
        assert len(captions) == len(images)
        for caption, image in zip(captions, images, strict=True):
            best, *_ = beam_by_hand(decoder, image, beam_size, MAX_LENGTH, length_penalty)
            assert_same(caption, *best)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("beam_size", [1, 3, 12])
def test_finished_beams_are_all_that_plain_lists_find(beam_size, length_penalty):
    for seed in range(4):
        decoder, images = make_decoder(seed), make_images(5, seed=seed)
        found = finished_beams(decoder, images, WORD_MAP, beam_size, MAX_LENGTH, length_penalty)
        assert len(found) == len(images)
        for captions, image in zip(found, images, strict=True):
            expected = beam_by_hand(decoder, image, beam_size, MAX_LENGTH, length_penalty)
            assert len(captions) == len(expected) == beam_size
            for caption, by_hand in zip(captions, expected, strict=True):
                assert_same(caption, *by_hand)


def test_a_beam_wider_than_the_language_finishes_every_caption_once():
    decoder, images = make_decoder(1, TINY), make_images(3)
    every_caption = {words for n in (1, 2) for words in product((1, 2, 3), repeat=n)}
    for captions in finished_beams(decoder, images, TINY, 20, 2):
        assert len(captions) == len(every_caption) == 12
        assert {tuple(caption.words) for caption in captions} == every_caption


def test_the_cases_compared_are_diverse():
    """Guards the tests above: the images of a batch finish at different steps, a beam finds other
    captions than greedy, and the length penalty chooses others."""
    lengths, mixed, wider, longer = set(), 0, 0, 0
    for seed in range(6):
        decoder, images = make_decoder(seed), make_images(5, seed=seed)
        plain = [c.words for c in greedy(decoder, images, WORD_MAP, MAX_LENGTH)]
        found = [c.words for c in beam_search(decoder, images, WORD_MAP, 5, MAX_LENGTH)]
        by_mean = [c.words for c in beam_search(decoder, images, WORD_MAP, 5, MAX_LENGTH, 1.0)]
        lengths |= {len(words) for words in found}
        mixed += min(len(set(map(len, captions))) for captions in (plain, found)) > 1
        wider += found != plain
        longer += found != by_mean
    assert lengths >= {1, 2, 3, 4, MAX_LENGTH}
    assert min(mixed, wider, longer) >= 4


TINY = {"<pad>": 0, "a": 1, "b": 2, "c": 3, "<unk>": 4, "<start>": 5, "<end>": 6}


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beam_of_one_is_greedy(length_penalty):
    for seed in range(5):
        decoder, images = make_decoder(seed), make_images(seed=seed)
        captions = beam_search(decoder, images, WORD_MAP, 1, MAX_LENGTH, length_penalty)
        for caption, expected in zip(
            captions, greedy(decoder, images, WORD_MAP, MAX_LENGTH), strict=True
        ):
            assert_same(caption, *expected)


# ----------------------------------------------------------------------------- every method


@every_method
@pytest.mark.parametrize("grid", [2, 3])
def test_log_prob_and_alphas_are_those_of_teacher_forcing(method, grid):
    for seed in range(4):
        decoder, images = make_decoder(seed), make_images(grid=grid, seed=seed)
        captions = method(decoder, images, WORD_MAP, MAX_LENGTH)
        for caption, image in zip(captions, images, strict=True):
            log_prob, alphas = teacher_forced(decoder, image, caption.words)
            assert_same(caption, caption.words, log_prob, alphas)


@every_method
def test_alphas_are_a_distribution_over_places_for_every_word(method):
    for caption in method(make_decoder(1), make_images(), WORD_MAP, MAX_LENGTH):
        assert caption.alphas.shape == (len(caption.words), SIZE**2)
        assert caption.alphas.dtype == torch.float32
        torch.testing.assert_close(caption.alphas.sum(1), torch.ones(len(caption.words)))


@every_method
@pytest.mark.parametrize("likely", sorted(FORBIDDEN))
def test_captions_hold_real_words_only(method, likely):
    """Also where the model would say <pad>, <unk>, <start> or <end> before all others."""
    for seed in range(3):
        decoder = make_decoder(seed)
        with torch.no_grad():
            decoder.fc.bias[likely] += 30
        for max_length in (1, 2, MAX_LENGTH):
            for caption in method(decoder, make_images(seed=seed), WORD_MAP, max_length):
                assert 1 <= len(caption.words) <= max_length
                assert not FORBIDDEN & set(caption.words)


@every_method
def test_a_caption_comes_out_where_the_end_is_never_likely(method):
    decoder = make_decoder(2, end=-1e4)
    for caption, image in zip(
        method(decoder, make_images(), WORD_MAP, MAX_LENGTH), make_images(), strict=True
    ):
        assert len(caption.words) == MAX_LENGTH
        expected = teacher_forced(decoder, image, caption.words)[0]
        assert caption.log_prob == pytest.approx(expected, rel=1e-4)


@every_method
def test_a_caption_has_one_word_where_the_end_is_certain(method):
    for caption in method(make_decoder(2, end=1e4), make_images(), WORD_MAP, MAX_LENGTH):
        assert len(caption.words) == 1


@pytest.mark.parametrize("method", [greedy, beam3])
def test_an_image_alone_gets_the_caption_that_it_gets_in_a_batch(method):
    for seed in range(4):
        decoder, images = make_decoder(seed), make_images(seed=seed)
        together = method(decoder, images, WORD_MAP, MAX_LENGTH)
        for i, caption in enumerate(together):
            assert_same(method(decoder, images[[i]], WORD_MAP, MAX_LENGTH)[0], *caption)


@pytest.mark.parametrize("method", [greedy, beam3])
def test_captions_come_in_the_order_of_the_images(method):
    decoder, images = make_decoder(3), make_images()
    order = [4, 0, 5, 2, 2, 1, 3]
    captions = method(decoder, images, WORD_MAP, MAX_LENGTH)
    assert len({tuple(caption.words) for caption in captions}) > 3
    for caption, i in zip(method(decoder, images[order], WORD_MAP, MAX_LENGTH), order, strict=True):
        assert_same(caption, *captions[i])


@every_method
def test_bfloat16_autocast_gives_captions_with_nearly_their_log_prob(method):
    decoder, images = make_decoder(4, std=0.5), make_images()
    with torch.autocast("cpu", torch.bfloat16):
        captions = method(decoder, images, WORD_MAP, MAX_LENGTH)
    for caption, image in zip(captions, images, strict=True):
        log_prob, alphas = teacher_forced(decoder, image, caption.words)
        assert caption.alphas.dtype == torch.float32
        assert caption.log_prob == pytest.approx(log_prob, rel=0.03, abs=0.1)
        torch.testing.assert_close(caption.alphas, alphas, rtol=0.1, atol=0.05)


@every_method
def test_decoding_leaves_no_graph_and_the_weights_as_they_were(method):
    decoder, images = make_decoder(5), make_images()
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    caption = method(decoder, images, WORD_MAP, MAX_LENGTH)[0]
    assert not caption.alphas.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())


# ----------------------------------------------------------------------------------- sampling

DRAWS = 20_000


def first_words(captions):
    counts = Counter(caption.words[0] for caption in captions)
    return torch.tensor([counts[word] for word in range(len(WORDS))]) / len(captions)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_words_are_drawn_with_the_probability_that_the_scores_tell(temperature):
    decoder, image = make_decoder(6), make_images(1)
    memory = decoder.prepare(image)
    with torch.no_grad():
        scores = decoder.step(torch.tensor([START]), decoder.init_state(memory), memory)[0][0]
    scores[list(FORBIDDEN)] = -torch.inf
    expected = (scores / temperature).softmax(0)
    assert 0.2 < expected.max() < 0.9
    generator = torch.Generator().manual_seed(1)
    images = image.expand(DRAWS, -1, -1, -1)
    captions = sample(decoder, images, WORD_MAP, 1, temperature, generator)
    error = (first_words(captions) - expected).abs()
    assert (error <= 4 * (expected * (1 - expected) / DRAWS).sqrt()).all()


def test_later_words_and_the_end_are_drawn_given_the_words_before():
    decoder = make_decoder(7)
    image = make_images(1)
    generator = torch.Generator().manual_seed(2)
    captions = sample(decoder, image.expand(DRAWS, -1, -1, -1), WORD_MAP, 2, generator=generator)
    counts = Counter(tuple(caption.words) for caption in captions)
    memory = decoder.prepare(image)
    with torch.no_grad():
        scores, _, state = decoder.step(torch.tensor([START]), decoder.init_state(memory), memory)
        scores[:, list(FORBIDDEN)] = -torch.inf
        first = scores[0].softmax(0)
        word = first.argmax()
        scores = decoder.step(word[None], state, memory)[0][0]
    scores[list(FORBIDDEN - {END})] = -torch.inf
    second = first[word] * scores.softmax(0)
    for next_word in [*range(1, 7), END]:
        key = (word.item(),) if next_word == END else (word.item(), next_word)
        p = second[next_word].item()
        assert abs(counts[key] / DRAWS - p) <= 4 * (p * (1 - p) / DRAWS) ** 0.5


def test_a_low_temperature_is_greedy():
    for seed in range(4):
        decoder, images = make_decoder(seed), make_images(seed=seed)
        captions = sample(decoder, images, WORD_MAP, MAX_LENGTH, temperature=1e-3)
        for caption, expected in zip(
            captions, greedy(decoder, images, WORD_MAP, MAX_LENGTH), strict=True
        ):
            assert_same(caption, *expected)


def test_a_generator_makes_sampling_reproducible():
    decoder, images = make_decoder(0, std=0.3), make_images(20)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        captions = sample(decoder, images, WORD_MAP, MAX_LENGTH, generator=generator)
        return [caption.words for caption in captions]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
