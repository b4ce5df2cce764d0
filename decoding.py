"""From features to captions: greedy decoding, sampling and beam search, batched over images.

All produce words only: `<pad>`, `<start>` and `<unk>` never, and `<end>` neither before the
first word nor later than after `max_length` words, so that a caption always comes out.
Log-probabilities are the model's own, over its whole vocabulary; where `vocabulary.bar` has left a
part of it no probability, over the rest.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from vocabulary import NEVER

# Finished images leave the batch once it is no fuller than this: leaving copies the others, and on
# a CPU every new batch size has its kernels compiled.
LEAVE = 0.75

MAX_LENGTH = 50  # words


class Caption(NamedTuple):
    """One image's caption, on the CPU."""

    words: list[int]  # indices, without <start> and <end>
    log_prob: float  # Σ log p of the words and of <end>
    alphas: Tensor | None  # (len(words), L) float32; None of a decoder without attention


def greedy(decoder, encoder_out, word_map, max_length=MAX_LENGTH):
    """The likeliest word at every step.

    Args:
        decoder: a `contract.Decoder`.
        encoder_out: (I, g, g, D) from `Encoder` or `Encoder.features`.
        word_map: word -> index.
        max_length: words, at most.

    Returns:
        list of I `Caption`.
    """
    return _search_one(decoder, encoder_out, word_map, max_length, lambda p: p.max(dim=1))


def sample(decoder, encoder_out, word_map, max_length=MAX_LENGTH, temperature=1.0, generator=None):
    """Words drawn at random, p^(1 / temperature) renormalised; the rest as in `greedy`.

    Args:
        temperature: above 0; small values come near to `greedy`.
        generator: torch.Generator on the decoder's device.
    """

    def choose(log_probs):
        words = drawn_from((log_probs / temperature).softmax(dim=1), generator)
        return log_probs.gather(1, words).squeeze(1), words.squeeze(1)

    return _search_one(decoder, encoder_out, word_map, max_length, choose)


@torch.inference_mode()
def _search_one(decoder, encoder_out, word_map, max_length, choose):
    """A `Caption` for each image, of words chosen from log p (I, V): log p of them, and which."""
    allow, end = _Allow(word_map, max_length, encoder_out.device), word_map["<end>"]
    words, log_probs, alphas = _to_the_end(
        decoder, encoder_out, word_map, 1, max_length,
        lambda scores, step: choose(allow(scores, step)),
    )  # fmt: skip
    return _captions(words, alphas, log_probs.sum(dim=1), end)


class Draws(NamedTuple):
    """K captions of each of I images, drawn at random, with the graph of their gradients."""

    words: Tensor  # (I·K, T) int64, image by image; `<end>` from the end on
    log_probs: Tensor  # (I·K, T) float32, of what each was drawn from; zero after the first `<end>`


def draw(decoder, encoder_out, word_map, per_image, max_length=MAX_LENGTH):
    """Captions drawn at random from the decoder as it is, in training mode with its dropout.

    The words and their log p come of one pass, so of the same values dropped out: log p is that of
    the distribution each word was drawn from, over the words that may come.

    Args:
        decoder, encoder_out, word_map, max_length: as in `greedy`.
        per_image: K.
    """
    allow = _Allow(word_map, max_length, encoder_out.device)

    def choose(scores, step):
        log_probs = allow.renormalised(scores, step)
        words = drawn_from(log_probs.detach().exp())
        return log_probs.gather(1, words).squeeze(1), words.squeeze(1)

    drawn = _to_the_end(decoder, encoder_out, word_map, per_image, max_length, choose)
    return Draws(*drawn[:2])


def roll_out(decoder, encoder_out, words, choose):
    """Decodes for as long as it is asked to, each step with the words chosen at the one before.

    Gradients pass through it where they are on, and in training mode there is dropout.

    Args:
        decoder, encoder_out: as in `greedy`.
        words: (I·K,) int64, the first words of K captions of each image, image by image.
        choose: called with the scores (I·K, V) of a step and its number, from 0; gives the words
            (I·K,) int64 that come next.

    Yields:
        of each step the scores (I·K, V) before the softmax, the alphas (I·K, L) float32, or None,
        and the words chosen.
    """
    memory = decoder.prepare(encoder_out)
    images = torch.arange(len(encoder_out), device=words.device)
    images = images.repeat_interleave(len(words) // len(encoder_out))
    state = decoder.init_state(memory).select(images)
    for step in itertools.count():
        scores, alphas, state = decoder.step(words, state, memory)
        words = choose(scores, step)
        yield scores, alphas, words


def _to_the_end(decoder, encoder_out, word_map, per_image, max_length, choose):
    """Rolls out until all captions have ended, as those of numbers that are finite do after
    `max_length` words.

    Args:
        choose: called with scores (n, V) and the step; gives log p (n,) and the words (n,) chosen.

    Returns:
        words (n, T), `<end>` from the end on; their log p (n, T), zero after the first `<end>`;
        and alphas (n, T, L) or None.
    """
    rows, end = len(encoder_out) * per_image, word_map["<end>"]
    start = torch.full((rows,), word_map["<start>"], device=encoder_out.device)
    done = torch.zeros_like(start, dtype=torch.bool)
    log_probs, history, alphas = [], [], []

    def next_words(scores, step):
        log_p, words = choose(scores, step)
        log_probs.append(log_p.masked_fill(done, 0.0))
        return words.masked_fill(done, end)

    steps = roll_out(decoder, encoder_out, start, next_words)
    for _, alpha, words in itertools.islice(steps, max_length + 1):
        history.append(words)
        alphas.append(alpha)
        done = done | (words == end)
        if done.all():
            break
    alphas = None if alphas[0] is None else torch.stack(alphas, dim=1)
    return torch.stack(history, dim=1), torch.stack(log_probs, dim=1), alphas


def drawn_from(probabilities, generator=None):
    """A word of each row (n, V), (n, 1) int64: what torch.multinomial draws, which raises an error
    where training has made a probability nan."""
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / noise).argmax(dim=1, keepdim=True)


def beam_search(
    decoder, encoder_out, word_map, beam_size=5, max_length=MAX_LENGTH, length_penalty=0.0
):
    """The best caption among those that keeping the `beam_size` best partial ones finds.

    As in the paper's own search, a finished caption takes one place off its image's beam. An
    image is done when its beam is empty or no caption still open can overtake the best finished.

    Args:
        decoder, encoder_out, word_map, max_length: as in `greedy`.
        beam_size: k, partial captions kept for each image.
        length_penalty: α of the score log p / (words + 1)^α; 0 compares log p itself and favours
            short captions, 1 compares the mean over the words and `<end>`.

    Returns:
        list of I `Caption`.
    """
    found = _search(decoder, encoder_out, word_map, beam_size, max_length, length_penalty, 1)
    return [caption for [caption] in found]


def finished_beams(
    decoder, encoder_out, word_map, beam_size=5, max_length=MAX_LENGTH, length_penalty=0.0
):
    """All captions that `beam_search` would find, were it to go on until its beams are empty.

    Args:
        as in `beam_search`.

    Returns:
        list of I lists of `Caption`, the best first: `beam_size` of them, or fewer where the
        vocabulary has not that many.
    """
    return _search(decoder, encoder_out, word_map, beam_size, max_length, length_penalty, beam_size)


@torch.inference_mode()
def _search(decoder, encoder_out, word_map, k, max_length, length_penalty, keep):
    """The `keep` best captions of each image, among the k at most that finish; ended early where
    no other can come among them."""
    device, count = encoder_out.device, len(encoder_out)
    memory = decoder.prepare(encoder_out)
    state = decoder.init_state(memory)
    state = state.select(torch.arange(count, device=device).repeat_interleave(k))
    allow = _Allow(word_map, max_length, device)
    end = word_map["<end>"]

    active = torch.arange(count, device=device)  # the images still searched, in rows of k beams
    words = torch.full((count, k), word_map["<start>"], device=device)
    log_probs = torch.full((count, k), -torch.inf, device=device)
    log_probs[:, 0] = 0.0  # the beams of an image start alike: one of them counts
    places = torch.full((count, 1), k, device=device)
    best = _Best(count, keep, device)
    history = _History(count, k)
    for step in range(max_length + 1):
        scores, alphas, state = decoder.step(words.flatten(), state, memory)
        # a beam's own k likeliest words hold all that its image may keep
        width = min(k, scores.shape[1])
        likeliest, likely_words = allow.likeliest(width, scores, step)
        candidates = log_probs.unsqueeze(2) + likeliest.view(len(active), k, width)
        log_probs, chosen = candidates.flatten(1).topk(k)
        parents, words = chosen // width, likely_words.view(len(active), -1).gather(1, chosen)
        history.append(active, words, parents, alphas)

        kept = (torch.arange(k, device=device) < places) & log_probs.isfinite()
        ended = kept & (words == end)
        best.update(active, log_probs.where(ended, -torch.inf), step, length_penalty)
        places = places - ended.sum(1, keepdim=True)
        log_probs = log_probs.where(kept & ~ended, -torch.inf)

        # log p only falls, and dividing by the greatest length lifts it most
        bound = log_probs.amax(1) / (max_length + 1) ** length_penalty
        going = bound > best.score[active, -1]
        still = int(going.sum())  # the only time in a step that the host waits for the device
        if still == 0:
            break
        rows = torch.arange(len(active), device=device)[:, None] * k + parents
        if still < LEAVE * len(active):
            memory = memory.select(going)
            rows, active, words, log_probs, places = (
                tensor[going] for tensor in (rows, active, words, log_probs, places)
            )
        state = state.select(rows.flatten())
    words, alphas = history.trace(best, end)
    captions = iter(_captions(words, alphas, best.log_prob.flatten(), end))
    return [
        [caption for caption in itertools.islice(captions, keep) if caption.log_prob > -math.inf]
        for _ in range(count)
    ]


class _Best:
    """The best finished captions of each image, (I, keep): their scores, the best first, and where
    their `<end>` stands."""

    def __init__(self, count, keep, device):
        self.score = torch.full((count, keep), -torch.inf, device=device)
        self.log_prob = torch.full((count, keep), -torch.inf, device=device)
        self.step = torch.zeros(count, keep, dtype=torch.int64, device=device)
        self.beam = torch.zeros(count, keep, dtype=torch.int64, device=device)

    def update(self, images, log_probs, step, length_penalty):
        """Takes in the captions finished at a step: log_probs (n, k), -inf for the others."""
        beams = torch.arange(log_probs.shape[1], device=log_probs.device).expand_as(log_probs)
        found = (log_probs, torch.full_like(beams, step), beams)
        score = torch.cat([self.score[images], log_probs / (step + 1) ** length_penalty], dim=1)
        self.score[images], order = score.topk(self.score.shape[1])
        for own, new in zip((self.log_prob, self.step, self.beam), found, strict=True):
            own[images] = torch.cat([own[images], new], dim=1).gather(1, order)


class _History:
    """What every beam chose at each step, and which beam of the step before it continued."""

    def __init__(self, count, beam_size):
        self.shape = (count, beam_size)
        self.words, self.parents, self.alphas = [], [], []

    def append(self, images, words, parents, alphas):
        """words and parents (n, k) of n images; alphas (n·k, L) that led to the parents' words, or
        None."""
        new = [(self.words, words), (self.parents, parents)]
        if alphas is not None:
            new.append((self.alphas, alphas.view(*words.shape, -1)))
        for steps, values in new:
            steps.append(
                values.new_zeros(*self.shape, *values.shape[2:]).index_copy(0, images, values)
            )

    def trace(self, best, end):
        """Words (I·keep, T) and alphas (I·keep, T, L) or None of the best captions, `end` from
        their end on."""
        beam, last = best.beam.flatten(), best.step.flatten()
        images = torch.arange(self.shape[0], device=beam.device)
        images = images.repeat_interleave(best.beam.shape[1])
        words, alphas = [], []
        for step in reversed(range(len(self.words))):
            parent = self.parents[step][images, beam]
            words.append(self.words[step][images, beam].where(step < last, end))
            if self.alphas:
                alphas.append(self.alphas[step][images, parent])
            beam = parent.where(step <= last, beam)
        words = torch.stack(words[::-1], dim=1)
        return words, torch.stack(alphas[::-1], dim=1) if alphas else None


class _Allow:
    """log p (n, V) float32 of scores, -inf for the words that may not come at a step."""

    ROWS = 32  # whose scores a CPU's cache holds

    def __init__(self, word_map, max_length, device):
        never, end = [word_map[word] for word in NEVER], word_map["<end>"]
        self.never = torch.tensor(never, device=device)
        self.never_first = torch.tensor([*never, end], device=device)
        self.end, self.max_length = end, max_length

    def __call__(self, scores, step):
        """The model's own, over its whole vocabulary."""
        log_probs = scores.log_softmax(dim=1, dtype=torch.float32)
        return log_probs.index_fill_(1, self._excluded(scores, step), -torch.inf)

    def renormalised(self, scores, step):
        """Over the words that may come; gradients pass."""
        scores = scores.float().index_fill(1, self._excluded(scores, step), -torch.inf)
        return scores.log_softmax(dim=1)

    def _excluded(self, scores, step):
        if step == self.max_length:
            words = torch.arange(scores.shape[1], device=scores.device)
            return words[words != self.end]
        return self.never if step else self.never_first

    def likeliest(self, k, scores, step):
        """The k greatest log p of each row and their words, (n, k) each."""
        rows = self.ROWS if scores.device.type == "cpu" else len(scores)
        parts = [self(part, step).topk(k) for part in scores.split(rows)]
        return (torch.cat(values) for values in zip(*parts, strict=True))


def _captions(words, alphas, log_probs, end):
    """`Caption`s of words (I, T), which hold `end` from their end on, and alphas (I, T, L) or
    None."""
    words, log_probs = words.cpu(), log_probs.cpu()
    alphas = [None] * len(words) if alphas is None else alphas.cpu()
    lengths = (words != end).sum(dim=1)
    return [
        Caption(w[:n].tolist(), float(p), None if a is None else a[:n].clone())
        for w, n, p, a in zip(words, lengths.tolist(), log_probs, alphas, strict=True)
    ]
