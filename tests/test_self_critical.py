"""Learning from captions drawn: the estimator against the gradient that enumeration gives."""

import itertools

import pytest
import torch
from conftest import close
from test_decoders import TINY, build, each_once, make_batch, unpacked

import decoding
import engine
from decoding import Draws
from objectives import CrossEntropy
from self_critical import Sampled, SelfCritical, advantages, references

MOST = 2  # words of a caption
END = TINY["<end>"]


def worth(captions, people):
    """A reward without order or sense, but that `<end>` counts."""
    return [sum((3 * w * w + 5 * t) % 7 for t, w in enumerate(words)) / 3 for words in captions]


def objective(**choices):
    return SelfCritical(**({"reward": worth, "word_map": TINY, "max_length": MOST} | choices))


def network_of(variant, **changes):
    decoder = build(variant, std=0.5, vocab_size=len(TINY), **changes)
    with torch.no_grad():
        decoder.fc.bias.zero_()
    return engine.Network(None, decoder.train(), torch.device("cpu"), False)


def make_truth(images, per_image=2):
    features, captions, lengths = make_batch([4] * images * per_image, per_image, grid=2)
    captions = captions.clamp(1, 3)
    captions[:, 0], captions[:, -1] = TINY["<start>"], END
    return features, captions.view(images, per_image, -1), lengths.view(images, per_image)


def expected_reward(decoder, features):
    """Σ p(caption) · reward over all captions of one image, by teacher forcing."""
    captions = [
        [*words, END]
        for n in range(1, MOST + 1)
        for words in itertools.product((1, 2, 3), repeat=n)
    ]
    rows = [[TINY["<start>"], *words, *[0] * (MOST + 1 - len(words))] for words in captions]
    lengths = torch.tensor([len(words) + 1 for words in captions])
    scores = unpacked(decoder(features, torch.tensor(rows), lengths).scores).double()
    total, mass = 0.0, 0.0
    for own, words in zip(scores, captions, strict=True):
        log_p = 0.0
        for t, word in enumerate(words):
            allowed = [1, 2, 3] if t == 0 else [END] if t == MOST else [1, 2, 3, END]
            log_p = log_p + own[t, allowed].log_softmax(0)[allowed.index(word)]
        [value] = worth([words], None)
        total, mass = total + log_p.exp() * value, mass + log_p.exp().item()
    assert mass == pytest.approx(1)
    return total


def gradient(loss, decoder):
    grads = torch.autograd.grad(loss, list(decoder.parameters()), allow_unused=True)
    pairs = zip(grads, decoder.parameters(), strict=True)
    return torch.cat([(p * 0 if g is None else g).flatten() for g, p in pairs]).double()


def estimates(network, features, batches, images, baseline=True):
    """Gradients of the loss of one caption, (batches, P), each a mean over `images` times three
    samples of the same image."""
    own, found = objective(samples=3), []
    truth = torch.tensor([[[TINY["<start>"], 1, END]]]), torch.tensor([[3]])
    for _ in range(batches):
        many = features.expand(images, -1, -1, -1)
        truths = [x.expand(images, *x.shape[1:]) for x in truth]
        read = own.read(network, many, *truths)
        if not baseline:  # what `advantages` makes of zeros beside it, by hand
            loss = -(read.rewards.flatten() @ read.log_probs.sum(1)) / (3 * images)
        else:
            loss = own(*read, sizes=torch.tensor([0.0, 3.0 * images]))
        found.append(gradient(loss, network.decoder))
    return torch.stack(found)


def test_the_estimator_is_the_exact_gradient_of_the_expected_reward():
    """Within its Monte Carlo error, for every parameter; with the other sign it is not."""
    network = network_of(("lstm", {"query": "word"}))
    features = 2 * make_batch([2], 1, grid=2)[0]
    exact = gradient(-expected_reward(network.decoder, features), network.decoder)
    found = estimates(network, features, 30, 100)
    mean, error = found.mean(0), found.std(0) / len(found) ** 0.5
    assert error.norm() < 0.1 * exact.norm()  # it can tell
    assert (abs(mean - exact) / (error + 1e-7)).max() < 4.5
    assert (abs(-mean - exact) / (error + 1e-7)).max() > 20
    names = [name for name, p in network.decoder.named_parameters() for _ in range(p.numel())]
    of_places = torch.tensor(["attention." in name for name in names])
    assert mean[of_places].norm() > 5 * error[of_places].norm()  # what looks learns, too


def test_the_other_samples_lower_the_variance():
    network = network_of(("gru", {}))
    features = make_batch([2], 1, grid=2)[0]
    spread = []
    for baseline in (True, False):
        torch.manual_seed(1)
        spread.append(estimates(network, features, 40, 10, baseline).var(0).sum())
    assert spread[0] < 0.7 * spread[1]


def test_the_baseline_is_the_mean_of_the_other_samples():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]])
    close(advantages(rewards), [[1 - 4.0, 2 - 3.5, 6 - 1.5], [0, 0, 0]])


def test_the_loss_is_a_mean_over_all_words_and_the_end():
    """Worked by hand: two images, two captions each, the second of three words and the end."""
    words = torch.tensor([[1, END, END, END], [2, 3, 1, END], [1, 2, END, END], [3, END, END, END]])
    log_probs = (
        torch.rand(4, 4)
        .neg()
        .masked_fill(
            torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]]).bool(), 0.0
        )
    )
    rewards, own = torch.tensor([[1.0, 3.0], [2.0, 1.5]]), objective(samples=2)
    sums = log_probs.sum(1).tolist()
    by_hand = -((1 - 3) * sums[0] + (3 - 1) * sums[1] + 0.5 * sums[2] - 0.5 * sums[3]) / 11
    assert own(log_probs, words, rewards).item() == pytest.approx(by_hand, rel=1e-5)
    assert own.sizes(words).tolist() == [4, 2 + 4 + 3 + 2]
    assert own.measured(Sampled(log_probs, words, rewards)).item() == 7.5
    # of two processes with an image each
    parts = [slice(0, 2), slice(2, 4)]
    total = sum(own.sizes(words[part]) for part in parts)
    losses = [
        own(log_probs[part], words[part], rewards[[i]], sizes=total) for i, part in enumerate(parts)
    ]
    assert sum(losses).item() == pytest.approx(by_hand, rel=1e-5)


def test_rewards_see_whole_captions_and_those_of_their_image(monkeypatch):
    """`<end>` is a word of both, `<start>` and what follows the end are none."""
    seen = []

    def reward(captions, people):
        seen.append((captions, people))
        return [float(len(seen))] * len(captions)

    words = torch.tensor([[1, END, END], [2, 3, END], [3, 3, END], [1, END, END]])
    monkeypatch.setattr(decoding, "draw", lambda *_: Draws(words, torch.zeros(4, 3)))
    _, captions, lengths = make_truth(2)
    lengths[0, 1], captions[0, 1, 2:] = 3, torch.tensor([END, 0])
    read = objective(reward=reward, samples=2).read(
        network_of(("gru", {})), torch.zeros(2, 2, 2, 6), captions, lengths
    )
    assert [own for own, _ in seen] == [[[1, END], [2, 3, END]], [[3, 3, END], [1, END]]]
    assert [people for _, people in seen] == references(captions, lengths)
    assert seen[0][1] == [captions[0, 0, 1:].tolist(), captions[0, 1, 1:3].tolist()]
    assert read.rewards.tolist() == [[1, 1], [2, 2]] and read.truth is None


@each_once
def test_a_share_of_cross_entropy_is_that_of_its_own_reading(variant):
    """Also where an attention draws places, in every second batch or so."""
    network, batch = network_of(variant), make_truth(3)
    cross_entropy = CrossEntropy(0.3, 0.1)
    shared = objective(share=0.4, cross_entropy=cross_entropy)
    torch.manual_seed(3)
    read = shared.read(network, *batch)
    whole = shared(*read)
    alone = SelfCritical.__call__(objective(), *read._replace(truth=None))
    if variant[1].get("attention") != "hard":  # which looks otherwise in the next batch
        of_truth = cross_entropy(*cross_entropy.read(network, *batch))
        close(whole, 0.6 * alone + 0.4 * of_truth)
    whole.backward()
    for name, parameter in network.decoder.named_parameters():
        assert parameter.grad is not None or "sentinel" in name, name


@each_once
def test_a_step_makes_good_captions_likelier(variant):
    """Trained on a reward for one word, nearly all captions have it."""

    def has_two(captions, people):
        return [float(2 in words) for words in captions]

    network, own = network_of(variant), objective(reward=has_two, samples=5)
    optimizer = torch.optim.Adam(network.decoder.parameters(), lr=0.02)
    means, batch = [], make_truth(8)
    for _ in range(40):
        means.append(engine.Means("reward"))
        step = engine.train_step(network, [batch], own, optimizer, 0.1, means[-1], [])
        assert step.fault is None
    assert means[0]["reward"] < 0.8 and means[0].count == 40
    assert means[-1]["reward"] > 0.95


def test_numbers_that_are_not_finite_skip_the_step():
    network = network_of(("lstm", {}))
    network.decoder.fc.weight.data[:] = torch.inf
    optimizer = torch.optim.Adam(network.decoder.parameters())
    step = engine.train_step(
        network, [make_truth(2)], objective(), optimizer, 0.1, engine.Means("reward"), []
    )
    assert step.fault == "the loss is nan"


def test_equal_steps_give_equal_gradients_on_several_threads():
    """At sizes at which PyTorch shares sums out to threads."""
    wide = {"attention_dim": 128, "embed_dim": 128, "decoder_dim": 512, "encoder_dim": 256}
    network = network_of(("lstm", {}), **wide, encoded_image_size=4, dropout=0.3)
    features, captions, lengths = torch.randn(16, 4, 4, 256), *make_truth(16)[1:]
    threads, first = torch.get_num_threads(), None
    torch.set_num_threads(4)
    try:
        for _ in range(3):
            torch.manual_seed(0)
            own = objective(max_length=5)
            found = gradient(own(*own.read(network, features, captions, lengths)), network.decoder)
            first = found if first is None else first
            assert torch.equal(found, first)
    finally:
        torch.set_num_threads(threads)
