"""From features to captions: greedy decoding, sampling and beam search, batched over images.

All produce words only: `<pad>`, `<start>` and `<unk>` never, and `<end>` neither before the
first word nor later than after `max_length` words, so that a caption always comes out.
Log-probabilities are the model's own, over its whole vocabulary; where `vocabulary.bar` has left a
part of it no probability, over the rest.
"""

import itertools
import math
from contextlib import ExitStack
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beams import Beams, Best, History
from constraints import FREE, MAX_LENGTH, Rules
from contract import all_rows, of_all
from cuda_graphs import graphed, graphs_on

# Finished images leave the batch once it is no fuller than this: leaving copies the others, and on
# a CPU every new batch size has its kernels compiled.
LEAVE = 0.75


class Caption(NamedTuple):
    """One image's caption, on the CPU."""

    words: list[int]  # indices, without <start> and <end>
    log_prob: float  # Σ log p of the words and of <end>
    alphas: Tensor | None  # (len(words), L) float32; None of a decoder without attention


def greedy(decoder, encoder_out, word_map, max_length=MAX_LENGTH, constraints=FREE):
    """The likeliest word at every step.

    Args:
        decoder: a `contract.Decoder`.
        encoder_out: (I, g, g, D) from `Encoder` or `Encoder.features`.
        word_map: word -> index.
        max_length: words, at most.
        constraints: `constraints.Constraints`, which `check` has found possible; words that must
            come are for `beam_search`.

    Returns:
        list of I `Caption`.
    """

    def choose(log_probs):
        return log_probs.argmax(dim=1, keepdim=True)

    return _search_one(decoder, encoder_out, word_map, 1, max_length, constraints, choose)


def sample(
    decoder,
    encoder_out,
    word_map,
    max_length=MAX_LENGTH,
    temperature=1.0,
    generator=None,
    constraints=FREE,
    top_k=None,
    top_p=None,
    per_image=1,
):
    """Words drawn at random, p^(1 / temperature) renormalised; the rest as in `greedy`.

    Args:
        temperature: above 0; small values come near to `greedy`.
        generator: torch.Generator on the decoder's device.
        top_k: draws from so many likeliest words.
        top_p: draws from the nucleus (Holtzman et al., 2020, *The Curious Case of Neural Text
            Degeneration*): the fewest likeliest words, of `top_k` where it is given, that have this
            share of the probability or more.
        per_image: K, captions of each image.

    Returns:
        list of I·K `Caption`, image by image. Their log p is the model's own.
    """

    def choose(log_probs):
        return drawn_from((log_probs / temperature).softmax(dim=1), generator, top_k, top_p)

    return _search_one(decoder, encoder_out, word_map, per_image, max_length, constraints, choose)


@torch.inference_mode()
def _search_one(decoder, encoder_out, word_map, per_image, max_length, constraints, choose):
    """`per_image` `Caption`s of each image, of words (n, 1) chosen from log p (n, V)."""
    if constraints.must_include:
        raise ValueError("words that must come are for beam search")
    rules = Rules(constraints, word_map, max_length, encoder_out.device)
    said = rules.begin(len(encoder_out) * per_image)

    def next_words(scores, step, rows):
        nonlocal said
        excluded = rules.excluded(step, scores.shape[1])
        log_probs = rules(scores, excluded, None if said is None else said[rows])
        words = choose(log_probs)
        if said is not None:
            ended = (said[rows] == rules.end).any(dim=1)
            own = words.squeeze(1).masked_fill(ended, rules.end)
            said = rules.remember(said, of_all(own, rows, len(said), rules.end))
        return log_probs.gather(1, words).squeeze(1), words.squeeze(1)

    words, log_probs, alphas = _to_the_end(
        decoder, encoder_out, word_map, per_image, max_length, next_words
    )
    return _captions(words, alphas, log_probs.sum(dim=1), rules.end)


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
    rules = Rules(FREE, word_map, max_length, encoder_out.device)

    def choose(scores, step, _):
        log_probs = rules.renormalised(scores, step)
        words = drawn_from(log_probs.detach().exp())
        return log_probs.gather(1, words).squeeze(1), words.squeeze(1)

    drawn = _to_the_end(decoder, encoder_out, word_map, per_image, max_length, choose)
    return Draws(*drawn[:2])


def roll_out(decoder, encoder_out, words, choose):
    """Decodes until all captions have ended, each step with the words chosen at the one before.
    Captions that have ended leave the batch.

    Gradients pass through it where they are on, and in training mode there is dropout.

    Args:
        decoder, encoder_out: as in `greedy`.
        words: (I·K,) int64, the first words of K captions of each image, image by image.
        choose: called with the scores (n, V) of a step, its number, from 0, and which of the I·K
            captions they are of, (n,) int64; gives the words (n,) int64 that come next, and which
            captions go on, (n,) bool.

    Yields:
        of each step which captions are still there, (n,); their scores (n, V) before the softmax;
        alphas (n, L) float32, or None; and the words chosen.
    """
    memory, rows = decoder.prepare(encoder_out), all_rows(words, len(encoder_out))
    state = decoder.init_state(memory).select(rows.images)
    for step in itertools.count():
        scores, alphas, state = decoder.step(words, state, memory, rows)
        words, going = choose(scores, step, rows.slots)
        yield rows.slots, scores, alphas, words
        still = int(going.sum())  # the only time in a step that the host waits for the device
        if still == 0:
            return
        if still < LEAVE * len(words):
            kept = going.nonzero().squeeze(1)
            rows, words = rows.select(kept), words[kept]
            state = state.select(kept)


def _to_the_end(decoder, encoder_out, word_map, per_image, max_length, choose):
    """Rolls out until all captions have ended, as those of numbers that are finite do after
    `max_length` words.

    Args:
        choose: called as in `roll_out`; gives log p (n,) and the words (n,) chosen.

    Returns:
        words (I·K, T), `<end>` from the end on; their log p (I·K, T), zero after the first `<end>`;
        and alphas (I·K, T, L), of no meaning after it, or None.
    """
    count, end = len(encoder_out) * per_image, word_map["<end>"]
    start = torch.full((count,), word_map["<start>"], device=encoder_out.device)
    done = torch.zeros_like(start, dtype=torch.bool)
    log_probs, history, alphas = [], [], []

    def next_words(scores, step, rows):
        log_p, words = choose(scores, step, rows)
        ended = done[rows]
        log_probs.append(of_all(log_p.masked_fill(ended, 0.0), rows, count))
        words = words.masked_fill(ended, end)
        done[rows] = words == end
        return words, words != end

    steps = roll_out(decoder, encoder_out, start, next_words)
    for rows, _, alpha, words in itertools.islice(steps, max_length + 1):
        history.append(of_all(words, rows, count, end))
        alphas.append(None if alpha is None else of_all(alpha, rows, count))
    alphas = None if alphas[0] is None else torch.stack(alphas, dim=1)
    return torch.stack(history, dim=1), torch.stack(log_probs, dim=1), alphas


def drawn_from(probabilities, generator=None, top_k=None, top_p=None):
    """A word of each row (n, V), (n, 1) int64; `top_k` and `top_p` as in `sample`. What
    torch.multinomial draws, which raises an error where training has made a probability nan."""
    words = None
    if top_k is not None or top_p is not None:
        count = min(top_k or probabilities.shape[1], probabilities.shape[1])
        probabilities, words = probabilities.topk(count)
    if top_p is not None:
        before = probabilities.cumsum(dim=1) - probabilities
        probabilities = probabilities * (before < top_p * probabilities.sum(dim=1, keepdim=True))
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    drawn = (probabilities / noise).argmax(dim=1, keepdim=True)
    return drawn if words is None else words.gather(1, drawn)


def beam_search(
    decoder,
    encoder_out,
    word_map,
    beam_size=5,
    max_length=MAX_LENGTH,
    length_penalty=0.0,
    constraints=FREE,
    groups=1,
    diversity_penalty=0.5,
):
    """The best caption among those that keeping the `beam_size` best partial ones finds.

    As in the paper's own search, a finished caption takes one place off its image's beam. An
    image is done when its beam is empty or no caption still open can overtake the best finished.

    With words that must come there is such a beam for each set of those that have. With several
    groups (Vijayakumar et al., 2016, *Diverse Beam Search*) each has a beam of `beam_size / groups`
    of its own, in which words count for less that the groups before have just chosen.

    Args:
        decoder, encoder_out, word_map, max_length: as in `greedy`.
        beam_size: k, partial captions kept for each image.
        length_penalty: α of the score log p / (words + 1)^α; 0 compares log p itself and favours
            short captions, 1 compares the mean over the words and `<end>`.
        constraints: `constraints.Constraints`, which `check` has found possible.
        groups: that share the beam out, a divisor of `beam_size`.
        diversity_penalty: λ, what a word costs for each beam of the groups before that has it at
            this step.

    Returns:
        list of I `Caption`.
    """
    options = max_length, length_penalty, constraints, groups, diversity_penalty
    return [best for best, *_ in _search(decoder, encoder_out, word_map, beam_size, 1, *options)]


def finished_beams(
    decoder,
    encoder_out,
    word_map,
    beam_size=5,
    max_length=MAX_LENGTH,
    length_penalty=0.0,
    constraints=FREE,
    groups=1,
    diversity_penalty=0.5,
):
    """All captions that `beam_search` would find, were it to go on until its beams are empty.

    Args:
        as in `beam_search`.

    Returns:
        list of I lists of `Caption`, the best first: `beam_size` of them, or fewer where the
        vocabulary has not that many. Of several groups the best of each come first, then the second
        best, and so on; what several have found is there once.
    """
    options = max_length, length_penalty, constraints, groups, diversity_penalty
    return _search(decoder, encoder_out, word_map, beam_size, beam_size // groups, *options)


@torch.inference_mode()
def _search(
    decoder,
    encoder_out,
    word_map,
    beam_size,
    keep,
    max_length,
    length_penalty,
    constraints,
    groups,
    diversity_penalty,
):
    """The `keep` best captions of each image and group, among those that finish; ended early where
    no other can come among them."""
    device, count = encoder_out.device, len(encoder_out)
    rules = Rules(constraints, word_map, max_length, device)
    shape = count, groups, rules.states, beam_size // groups
    replays = graphs_on(device) and not decoder.draws
    # beams that are alike before the first word; in a graph its rows are as ever
    alike = shape[3] if replays else -(-shape[3] // len(word_map))
    beams = Beams.begin(shape, alike, diversity_penalty, device)
    k = beams.log_probs[0].numel()  # rows of an image, before the first word
    memory, images = decoder.prepare(encoder_out), torch.arange(count, device=device)
    search = Search(
        torch.full((count, k), word_map["<start>"], device=device),
        decoder.init_state(memory).select(images.repeat_interleave(k)),
        memory,
        beams,
        Best.begin((count, groups, keep), device),
        rules.begin(count * k),
        images,
        torch.zeros((), dtype=torch.int64, device=device),
    )
    width = min(beams.candidates, len(word_map))
    history, advance = History(count), partial(_advance, decoder)
    with ExitStack() as stack:
        if replays:
            advance = stack.enter_context(graphed(_advance, decoder))
        for step in range(max_length + 1):
            options = rules.excluded(step, len(word_map)), rules, width, length_penalty
            search, (going, *found) = advance(search, options)
            history.append(*found)
            still = int(going.sum())  # the only time in a step that the host waits for the device
            if still == 0:
                break
            staying = _staying(going, still, replays)
            search = search if staying is None else search.select(staying)
        # before another thread may search, as a graph's memory is its own
        words, alphas = history.trace(search.best, rules.end)
        captions = iter(_captions(words, alphas, search.best.log_prob.flatten(), rules.end))
    found = [[list(itertools.islice(captions, keep)) for _ in range(groups)] for _ in range(count)]
    return [_in_turn(of_groups, length_penalty) for of_groups in found]


class Search(NamedTuple):
    """Where the search of I images stands, of which n are still searched, with K rows each."""

    words: Tensor  # (n, K) int64, the last
    state: Any  # the decoder's, of n·K rows
    memory: Any  # of n images
    beams: Beams  # of n images
    best: Best  # of I images
    said: Tensor | None  # (n·K, t) int64, from `Rules.begin` and `Rules.remember`
    images: Tensor  # (n,) int64, which of the I
    step: Tensor  # scalar int64, how many words there are

    def select(self, images):
        """That of some of the n alone: indices."""
        per_image = torch.arange(self.words.shape[1], device=images.device)
        rows = (images[:, None] * len(per_image) + per_image).flatten()
        return self._replace(
            words=self.words[images],
            state=self.state.select(rows),
            memory=self.memory.select(images),
            beams=self.beams.select(images),
            said=None if self.said is None else self.said[rows],
            images=self.images[images],
        )


def _advance(decoder, search, options):
    """The search with one word more; which of the images may still find a better caption, bool
    (n,); and what `History.append` takes.

    Args:
        options: words that may not come, from `Rules.excluded`; the `Rules`; how many next words of
            a row are looked at; and the length penalty.
    """
    excluded, rules, width, length_penalty = options
    count, k = search.words.shape
    scores, alphas, state = decoder.step(search.words.flatten(), search.state, search.memory)
    likeliest = rules.likeliest(width, scores, excluded, search.said)
    arriving = rules.arriving(width)
    beams, parents, words, finished = search.beams.extend(*likeliest, arriving, rules.end)
    best = search.best.update(search.images, finished, search.step, length_penalty)
    # log p only falls, and dividing by the greatest length lifts it most
    bound = beams.likeliest / (rules.max_length + 1) ** length_penalty
    going = (bound > best.score[search.images, :, -1]).any(dim=1)
    rows = (torch.arange(count, device=words.device)[:, None] * k + parents).flatten()
    following = search._replace(
        words=words,
        state=state.select(rows),
        beams=beams,
        best=best,
        said=rules.remember(search.said, words.flatten(), rows),
        step=search.step + 1,
    )
    return following, (going, search.images, words, parents, alphas)


def _staying(going, still, replays):
    """Which of the images, bool (n,), stay in the batch: indices, or None where all do.

    Leaving copies the others, so it waits for a fourth to be done. Where graphs are replayed it
    waits for a half, so that few sizes occur; images that are done fill a half up.
    """
    if replays:
        half = len(going) // 2
        if not 0 < still <= half:
            return None
        return (~going).sort(stable=True).indices[:half].sort().values  # the open ones first
    return going.nonzero().squeeze(1) if still < LEAVE * len(going) else None


def _in_turn(of_groups, length_penalty):
    """The finished captions of an image's groups: the best of each, then the second best, and so
    on, those of a turn in the order of their scores; none twice."""
    found = {}
    for turn in zip(*of_groups, strict=True):
        scores = [-c.log_prob / (len(c.words) + 1) ** length_penalty for c in turn]
        for _, caption in sorted(zip(scores, turn, strict=True), key=itemgetter(0)):
            if caption.log_prob > -math.inf:
                found.setdefault(tuple(caption.words), caption)
    return list(found.values())


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
