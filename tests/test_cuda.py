"""A GPU gives what the CPU gives: every decoder with every attention, every stage of training, and
the captions of what was trained."""

import copy
import json
from itertools import product

import pytest
import torch
from conftest import LEARN, close, run_here
from test_decoders import TINY, build, close_alphas, every_variant, make_batch
from torch import nn

import decoding
import engine
import kernels
from objectives import CrossEntropy, caption_loss
from sampling import ScheduledSampling
from self_critical import SelfCritical

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(autouse=True)
def float32_alone():
    """cuDNN's LSTM and convolutions round float32 to TF32 otherwise."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def both(variant):
    """A decoder on the CPU, and its copy on the GPU."""
    decoder = build(variant, std=0.4, vocab_size=len(TINY))
    return decoder, copy.deepcopy(decoder).cuda()


def read(decoder, batch, device):
    encoder_out, captions, lengths = batch
    return decoder(encoder_out.to(device), captions.to(device), lengths)


@every_variant
@pytest.mark.parametrize("grid", [3, 2])
def test_scores_alphas_and_gradients_are_the_cpus(variant, grid):
    here, there = both(variant)
    batch = make_batch([7, 4, 2, 6, 7, 5], 2, grid)
    batch = (batch[0], batch[1] % len(TINY), batch[2])
    expected, found = read(here, batch, "cpu"), read(there, batch, "cuda")
    close(found.scores.data.cpu(), expected.scores.data, 1e-4)
    assert torch.equal(found.targets.data.cpu(), expected.targets.data)
    close_alphas(None if found.alphas is None else found.alphas.cpu(), expected.alphas, 1e-4)
    for own in (expected, found):
        caption_loss(*own).backward()
    for (name, parameter), own in zip(here.named_parameters(), there.parameters(), strict=True):
        assert (parameter.grad is None) == (own.grad is None), name
        if parameter.grad is not None:
            close(own.grad.cpu(), parameter.grad, 1e-4)


@every_variant
def test_searches_find_the_cpus_captions(variant):
    here, there = both(variant)
    features = make_batch([2] * 9, 1, grid=2)[0]
    for width in (1, 4):
        of_cpu = decoding.beam_search(here, features, TINY, width, 6)
        of_gpu = decoding.beam_search(there, features.cuda(), TINY, width, 6)
        for expected, found in zip(of_cpu, of_gpu, strict=True):
            assert found.words == expected.words
            assert found.log_prob == pytest.approx(expected.log_prob, abs=1e-4)
            close_alphas(found.alphas, expected.alphas, 1e-4)
    of_cpu = decoding.greedy(here, features, TINY, 6)
    of_gpu = decoding.greedy(there, features.cuda(), TINY, 6)
    assert [own.words for own in of_gpu] == [own.words for own in of_cpu]


def test_energies_without_the_hidden_layer_are_the_formulas():
    import fused_triton

    torch.manual_seed(0)
    assert fused_triton.runs(torch.device("cuda"))
    for images, places, hidden, rows in ((3, 5, 12, 6), (16, 196, 512, 80), (4, 37, 130, 20)):
        for activation, dtype in product((torch.relu, torch.tanh), (torch.float32, torch.bfloat16)):
            own = torch.randint(images, (rows,)).cuda()
            keys, query = torch.randn(images, places, hidden), torch.randn(rows, hidden)
            values = [v.to(dtype).cuda() for v in (keys, query, torch.randn(hidden))]
            found = []
            for fast in (False, True):
                leaves = [v.float().requires_grad_() for v in values]
                used = [leaf.to(dtype) for leaf in leaves] if fast else leaves
                if fast:
                    energies = kernels.Energies(used[0], used[2], activation)(used[1], own)
                else:
                    energies = kernels.plain_energies(*used, own, activation)
                energies.float().square().sum().backward()
                found.append([energies, *(leaf.grad for leaf in leaves)])
            for expected, value in zip(*found, strict=True):
                close(value, expected, 1e-4 if dtype is torch.float32 else 1e-2)


# ----------------------------------------------------------------------------------- training


@every_variant
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("objective", ["cross-entropy", "own words", "self-critical"])
def test_each_objective_trains(variant, amp, objective):
    """The loss of one batch falls, and of captions drawn the reward rises."""
    decoder = build(variant, vocab_size=len(TINY)).cuda()
    network = engine.Network(nn.Identity(), decoder, torch.device("cuda"), amp)
    features, _, _ = make_batch([2] * 4, 1, grid=2)
    captions = torch.tensor([[5, 1, 2, 6], [5, 2, 6, 0], [5, 3, 1, 6], [5, 3, 6, 0]])
    lengths = torch.tensor([4, 3, 4, 3])

    def reward(mine, people):
        return [float(sum(a == b for a, b in zip(own, people[0], strict=False))) for own in mine]

    kinds = {
        "cross-entropy": CrossEntropy(),
        "own words": ScheduledSampling(share=lambda: 0.25, never=torch.tensor([0, 4, 5]).cuda()),
        "self-critical": SelfCritical(reward, TINY, max_length=3, samples=20),
    }
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    batch = [(features, captions.unsqueeze(1), lengths.unsqueeze(1))]
    found = []
    decoder.train()
    for _ in range(60 if objective == "self-critical" else 25):
        means = engine.Means(kinds[objective].measure)
        step = engine.train_step(network, batch, kinds[objective], optimizer, 5.0, means, [])
        assert step.fault is None
        found.append(means["reward"] if objective == "self-critical" else -means["loss"])
    assert sum(found[-10:]) > sum(found[:10])


def test_a_seed_draws_the_same_captions_again():
    _, there = both(("lstm", {}))
    features = make_batch([2] * 5, 1, grid=2)[0].cuda()
    draws = [
        decoding.sample(there, features, TINY, generator=torch.Generator("cuda").manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    words = [[caption.words for caption in own] for own in draws]
    assert words[0] == words[1] != words[2]


@pytest.mark.parametrize("attention", ["soft", "hard"])
def test_training_goes_on_exactly_and_its_captions_are_the_cpus(tiny_data, tmp_path, attention):
    folder, base = tiny_data
    run = ["train.py", "--data_folder", folder, *LEARN, "--device", "cuda", "--epochs", 6]
    run += ["--stage", "decoder", "--deterministic", "--attention", attention]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = run_here(*run, "--output_folder", whole)
    assert process.returncode == 0, process.stderr
    for epochs in (3, 6):
        process = run_here(*run, "--output_folder", parts, "--resume", "--epochs", epochs)
        assert process.returncode == 0, process.stderr
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if "second" not in k}
            for line in (out / f"log_{base}.jsonl").read_text().splitlines()
        ]
        for out in (whole, parts)
    ]
    assert logs[0] == logs[1] and logs[0][-1]["loss"] < logs[0][0]["loss"]
    texts = []
    for device in ("cuda", "cpu"):
        out = tmp_path / device
        words = ["--model", whole, "--split", "val", "--beam_size", 3, "--output_folder", out]
        words += ["--data_folder", folder, "--attention_report", 0, "--amp", "off"]
        process = run_here("eval.py", *words, "--device", device)
        assert process.returncode == 0, process.stderr
        [results] = out.glob("results_*.json")
        texts.append([own["caption"] for own in json.loads(results.read_text())])
    assert texts[0] == texts[1]
