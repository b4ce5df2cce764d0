"""Scheduled sampling: the shares against the paper's formulas, and what is read, word by word."""

import json
import math

import pytest
import torch
from conftest import OFFLINE, WORDS, close, failure, run_here
from test_decoders import TINY, V, build, every_variant, make_batch, unpacked
from test_train import SMALL

import training
from config import TrainingConfig
from contract import Forward
from engine import Network
from objectives import CrossEntropy
from run_state import RunState
from sampling import ScheduledSampling, own_share


@pytest.mark.parametrize("k", [1.0, 40.0, 700.0])
def test_the_shares_are_those_of_the_paper(k):
    """1 - ε_i, with ε_i = max(ε, 1 - c i), κ^i and k / (k + exp(i / k)) (§2.4)."""
    c, kappa = 1 / k, math.exp(-1 / k)
    for i in (0, 1, 13, 300, 3000):
        formulas = {
            "linear": max(0.4, 1 - c * i),
            "exponential": max(0.4, kappa**i),
            "inverse_sigmoid": max(0.4, k / (k + math.exp(i / k)) if i / k < 700 else 0),
        }
        for name, true in formulas.items():
            assert own_share(name, i, k, 0.6) == pytest.approx(1 - true), name
            assert own_share(name, i, k, 0.0) == 0
            assert own_share(name, -1 - i, k, 0.6) == 0
    half = own_share("inverse_sigmoid", 700 * math.log(700), 700, 1.0)
    assert half == pytest.approx(0.5)


def objective_of(share, never=(), **terms):
    return ScheduledSampling(share=lambda: share, never=torch.tensor(never, dtype=int), **terms)


@every_variant
def test_without_own_words_it_is_teacher_forcing(variant):
    """By steps, and by `read`, which then takes the forward pass."""
    if variant[1].get("attention") == "hard":
        pytest.skip("draws its places in the forward pass alone")
    decoder = build(variant, std=0.6)
    encoder_out, captions, lengths = make_batch([7, 4, 6, 6, 3, 5], 2)
    network = Network(None, decoder, torch.device("cpu"), amp=False)
    expected = decoder(encoder_out, captions, lengths)
    objective = objective_of(0.0)
    by_steps = objective.read_own(decoder, encoder_out, captions, lengths, 0.0)
    read = objective.read(network, encoder_out, captions.view(3, 2, -1), lengths.view(3, 2))
    for found in (by_steps, read):
        assert isinstance(found, Forward)
        assert torch.equal(found.targets.data, expected.targets.data)
        close(unpacked(found.scores), unpacked(expected.scores))
        if expected.alphas is None:
            assert found.alphas is None
        else:
            close(found.alphas, expected.alphas)
        loss = objective(*found)
        close(loss, CrossEntropy()(*expected))
    by_steps, forward = (
        torch.autograd.grad(objective(*f), list(decoder.parameters()), allow_unused=True)
        for f in (by_steps, expected)
    )
    for own, other in zip(by_steps, forward, strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            close(own, other)


@every_variant
def test_with_nothing_but_own_words_no_true_word_is_read(variant):
    decoder = build(variant, std=0.6)
    encoder_out, captions, lengths = make_batch([7, 4, 6, 6, 3, 5], 2)
    other = captions.clone()
    other[:, 1:] = (captions[:, 1:] + 3) % V
    scores = []
    for own in (captions, other):
        torch.manual_seed(4)
        read = objective_of(1.0).read_own(decoder, encoder_out, own, lengths, 1.0)
        assert torch.equal(unpacked(read.targets)[0], own[0, 1:])
        scores.append(read.scores.data)
    assert torch.equal(*scores)


def test_words_are_drawn_by_a_coin_each_from_what_the_model_gives(monkeypatch):
    """As often as the share says, by the model's distribution over words that go on a caption."""
    decoder, count = build(("lstm", {}), std=0.6, vocab_size=len(TINY)), 4000
    never = [TINY[word] for word in ("<pad>", "<start>", "<unk>", "<end>")]
    encoder_out = torch.randn(1, 3, 3, 6, generator=torch.Generator().manual_seed(1))
    captions = torch.full((count, 3), 5)  # a word that is never drawn: the true ones show
    captions[:, 0], read = TINY["<start>"], []
    step = decoder.step

    def watched(words, *others):
        read.append(words)
        found = step(words, *others)
        read.append(found[0])
        return found

    monkeypatch.setattr(decoder, "step", watched)
    objective_of(0.3, never).read_own(
        decoder, encoder_out, captions, torch.tensor([3] * count), 0.3
    )
    start, scores, words, _ = read
    assert (start == TINY["<start>"]).all()
    own = words != 5
    assert float(own.float().mean()) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / count))
    allowed = [word for word in range(len(TINY)) if word not in never]
    expected = scores[0, allowed].softmax(0)
    found = torch.stack([(words[own] == word).float().mean() for word in allowed])
    assert float(found.sum()) == pytest.approx(1)
    assert (found - expected).abs().max() < 4 * math.sqrt(0.25 / int(own.sum()))
    assert expected.max() < 0.9


def test_dropout_falls_and_gradients_reach_every_weight():
    decoder = build(("lstm", {}), std=0.6, dropout=0.5, embed_dropout=0.5).train()
    encoder_out, captions, lengths = make_batch([7, 4, 6, 6], 2)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        read = objective_of(0.5, [0]).read_own(decoder, encoder_out, captions, lengths, 0.5)
        losses.append(objective_of(0.5)(*read))
    assert losses[0] == losses[1] != losses[2]
    losses[0].backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.slow
def test_the_share_grows_over_a_run_and_is_in_its_log(tiny_data, tmp_path):
    """Eight updates an epoch; it begins after the first ten."""
    folder, base = tiny_data
    process = run_here(
        *("train.py", "--data_folder", folder, "--output_folder", tmp_path, "--stage", "decoder"),
        *("--encoder", OFFLINE, *SMALL, "--device", "cpu", "--batch_size", 10, "--epochs", 3),
        *("--scheduled_sampling", "linear", "--sampling_start", 10, "--sampling_k", 50),
        *("--sampling_max", 0.25),
    )
    assert process.returncode == 0, process.stderr
    log = [json.loads(line) for line in (tmp_path / f"log_{base}.jsonl").open()]
    assert [line["own_words"] for line in log] == [0, 6 / 50, 0.25]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sampling_k", 9], "--sampling_k 9.0: that is of --scheduled_sampling"),
        (
            ["--scheduled_sampling", "linear", "--attention", "hard"],
            "the attention hard draws places, which learn from true words alone",
        ),
        (["--augment", "crop", "--stage", "decoder"], "this stage reads cached features, no image"),
        (["--augment", "crop", "flip"], "flip is none of crop, mirror, colour, none"),
        (["--augment", "mirror", "none"], "none goes without other changes"),
        (["--scheduled_sampling", "cubic"], "invalid choice: 'cubic'"),
        (["--sampling_k", 0.5], "0.5 is less than 1"),
        (["--sampling_max", 1.1], "1.1 is more than 1"),
        (["--ema", 1], "1 is not below 1"),
    ],
)
def test_options_that_cannot_be_are_one_line(tiny_data, tmp_path, arguments, said):
    run = ["--data_folder", tiny_data[0], "--output_folder", tmp_path / "run", *arguments]
    assert said in failure(run_here("train.py", *run))
    assert not (tmp_path / "run").exists()


def test_own_words_are_none_that_no_caption_goes_on_with():
    """What a run hands over as `never`."""
    decoder = build(("lstm", {}), vocab_size=len(WORDS))
    network = Network(None, decoder, torch.device("cpu"), amp=False)
    config = TrainingConfig(scheduled_sampling="linear", label_smoothing=0.1, alpha_c=0.3)
    state = RunState(network, config, "x", WORDS, {}, [{}], stage="decoder")
    objective, _ = training._objective_of(state, None)
    assert (objective.alpha_c, objective.label_smoothing) == (0.3, 0.1)
    assert sorted(objective.never.tolist()) == [0, 3, 4, 5]
