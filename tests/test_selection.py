"""Which epoch is the best, and a validation loss that does not depend on the batches."""

import json
import math

import pytest
import torch
from conftest import OFFLINE, WORDS, run_here
from PIL import Image
from torch.utils.data import DataLoader

import checkpoints
import decoding
import engine
import metrics
from config import TrainingConfig
from datasets import CaptionDataset, read_word_map
from engine import Network
from models import DecoderWithAttention, LSTMConfig
from objectives import CrossEntropy
from run_state import SELECT_BY, RunState, rank


def state_of(**config):
    """A `RunState` without a model, in its first stage."""
    config = TrainingConfig(**config)
    state = RunState(None, config, "x", WORDS, {}, [{}], stage="decoder")
    state.optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
    state.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        state.optimizer, "max", 0.5, config.patience - 1, 0
    )
    return state


def epoch(loss, *bleu, cider=0.0):
    bleu = {f"bleu{n}": value for n, value in enumerate(bleu, start=1)}
    return {"stage": "decoder", "val_loss": loss, "cider": cider, **bleu}


# better, equal and worse epochs of captions too short for BLEU-4
SHORT = [
    epoch(3.0, 0.1, 0.0, 0.0, 0.0),
    epoch(2.0, 0.5, 0.0, 0.0, 0.0),
    epoch(1.0, 0.5, 0.2, 0.0, 0.0, cider=0.3),
    epoch(0.9, 0.5, 0.2, 0.0, 0.0, cider=0.2),
    epoch(0.5, 0.6, 0.1, 0.0, 0.0, cider=0.3),
    epoch(9.0, 0.1, 0.1, 0.1, 0.1),
]


@pytest.mark.parametrize(
    ("select_by", "improved"),
    [
        ("bleu4", [True, True, True, True, False, True]),
        ("cider", [True, True, True, False, True, False]),
        ("loss", [True, True, True, True, True, False]),
    ],
)
def test_the_best_epoch_by_each_measure(select_by, improved):
    state = state_of(select_by=select_by)
    assert [state.end_epoch(record) for record in SHORT] == improved
    assert state.best is [r for r, better in zip(SHORT, improved, strict=True) if better][-1]


def test_progress_without_bleu4_keeps_the_learning_rate():
    """The first two epochs are progress, the others are not."""
    state, rates = state_of(patience=2), []
    for record in [*SHORT[:2], *[SHORT[0]] * 5]:
        state.end_epoch(record)
        rates.append(state.optimizer.param_groups[0]["lr"])
    assert rates == [1, 1, 1, 0.5, 0.5, 0.25, 0.25]
    assert state.waited == 5


def test_a_cosine_epoch_whose_steps_an_earlier_process_did_goes_on_quietly():
    """Warnings are errors here."""
    state = state_of(schedule="cosine", epochs=4)
    state.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(state.optimizer, 4)
    for n in range(1, 5):
        state.end_epoch(SHORT[0])
        rate = state.optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx((1 + math.cos(math.pi * n / 4)) / 2, abs=1e-9)


@pytest.mark.slow
def test_captions_of_two_words_keep_the_epoch_that_knows_them(tmp_path):
    """Their BLEU-4 is 0 for ever."""
    colours = {"red": (200, 0, 0), "blue": (0, 0, 200)}
    images = []
    for split, count in (("train", 8), ("val", 4)):
        for i in range(count):
            name = list(colours)[i % 2]
            Image.new("RGB", (64, 64), colours[name]).save(tmp_path / f"{split}{i}.png")
            sentences = [{"tokens": [name, "square"], "raw": f"{name.capitalize()} square."}]
            entry = {"filename": f"{split}{i}.png", "split": split, "sentences": sentences}
            images.append(entry)
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": images}))
    process = run_here(
        "create_input_files.py", "--dataset", "flickr8k", "--image_folder", tmp_path,
        "--karpathy_json", tmp_path / "karpathy.json", "--output_folder", tmp_path / "data",
        "--min_word_freq", 0, "--captions_per_image", 1, "--image_size", 64,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    process = run_here(
        "train.py", "--data_folder", tmp_path / "data", "--stage", "decoder", "--epochs", 12,
        "--encoder", OFFLINE, "--encoded_image_size", 2, "--batch_size", 4, "--decoder_lr", 0.02,
        "--attention_dim", 8, "--embed_dim", 8, "--decoder_dim", 16, "--device", "cpu",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    path = checkpoints.newest_best_checkpoint(tmp_path)
    best = checkpoints.load_checkpoint(path, checkpoints.RUN_KEYS)
    assert best["best_bleu4"] == 0 and best["best_record"]["bleu1"] == 1.0
    assert best["epoch"] > 1


def test_cider_is_chosen_and_computed_without_java(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    process = run_here(
        "train.py", "--data_folder", tiny_data[0], "--output_folder", tmp_path, "--stage",
        "decoder", "--epochs", 2, "--select_by", "cider", "--encoder", OFFLINE, "--device", "cpu",
        "--encoded_image_size", 3, "--attention_dim", 8, "--embed_dim", 8, "--decoder_dim", 16,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    log = [json.loads(line) for line in (tmp_path / f"log_{tiny_data[1]}.jsonl").open()]
    assert all(line["cider"] >= 0 for line in log)
    assert process.stdout.count("CIDEr-D") >= 2


@pytest.mark.slow  # for Java
def test_cider_of_words_is_the_official_one_of_the_same_words():
    """Tokens of the official tokenizer are those of plain lower-case text without punctuation."""
    references = [["a red circle", "one circle"], ["two blue squares on red"], ["a star"]]
    captions = ["a red circle", "two squares", "a red star"]
    found = metrics.cider(references, captions)
    assert found == metrics.cider(
        [[text.upper() + " ." for text in texts] for texts in references], captions
    )
    if "CIDEr-D" in (official := metrics.coco_scores(references, {"x": captions}).corpus["x"]):
        assert found == pytest.approx(official["CIDEr-D"], abs=1e-9)


class Colours(torch.nn.Module):
    """The colours of quarters of quarters stand for features."""

    def features(self, images):
        pooled = torch.nn.functional.adaptive_avg_pool2d(images / 255, 4)
        return pooled.permute(0, 2, 3, 1)


def untrained(tiny_data, amp=False):
    """A `Network` with random weights, and its word map."""
    word_map = read_word_map(*tiny_data)
    decoder = DecoderWithAttention(LSTMConfig(len(word_map), 3, 8, 8, 8, encoded_image_size=4))
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return Network(Colours(), decoder, torch.device("cpu"), amp), word_map


@pytest.mark.parametrize("alpha_c", [0.0, 1.5])
@pytest.mark.parametrize("bars", [False, True])
def test_the_validation_loss_does_not_depend_on_the_batches(tiny_data, alpha_c, bars):
    data = CaptionDataset(*tiny_data, "VAL")
    assert len(set(data.lengths.flatten().tolist())) > 2  # words weigh otherwise than captions
    network, word_map = untrained(tiny_data)
    # one that captions have more or less often
    barred = torch.tensor([word_map["square"]]) if bars else None
    objective = CrossEntropy(alpha_c, barred=barred)
    losses, accuracies = [], []
    for size in (1, 3, 8):
        batches = DataLoader(data, size)
        loss, top5, captions = engine.validate(network, batches, objective, word_map)
        assert len(captions) == len(data)
        losses.append(loss)
        accuracies.append(top5)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert accuracies == pytest.approx([accuracies[0]] * 3, rel=1e-6)
    images, captions, lengths = next(iter(DataLoader(data, 8)))
    read = network.read(network.encode(images), captions, lengths)
    assert losses[0] == pytest.approx(objective(*read).item(), rel=1e-6)
    rows = zip(read.scores.data.tolist(), read.targets.data.tolist(), strict=True)
    rows = [(row, target) for row, target in rows if not bars or target != barred]
    assert len(rows) < len(read.targets.data) or not bars
    right = [target in sorted(range(len(row)), key=lambda w: -row[w])[:5] for row, target in rows]
    assert accuracies[0] == pytest.approx(sum(right) / len(rows), rel=1e-6)


@pytest.mark.parametrize("amp", [False, True])
def test_validation_prepares_a_batch_once_and_finds_what_two_passes_do(tiny_data, monkeypatch, amp):
    network, word_map = untrained(tiny_data, amp)
    words, objective = {index: word for word, index in word_map.items()}, CrossEntropy(0.5)
    batches = list(DataLoader(CaptionDataset(*tiny_data, "VAL"), 3))
    sums, right, expected = torch.zeros(2, 2, dtype=torch.float64), 0, []
    network.decoder.eval()
    with torch.inference_mode():
        for images, captions, lengths in batches:
            with network.autocast():
                features = network.encode(images)
                scores, targets, alphas, _ = network.read(features, captions, lengths)
                sums += objective.sums(scores, targets, alphas)
                found = decoding.greedy(network.decoder, features, word_map)
            in_top5 = scores.data.topk(5).indices == targets.data[:, None]
            right += int(in_top5.sum())
            expected += [[words[word] for word in caption.words] for caption in found]

    calls, prepare = [], DecoderWithAttention.prepare
    monkeypatch.setattr(
        DecoderWithAttention, "prepare", lambda self, x: calls.append(x) or prepare(self, x)
    )
    loss, top5, captions = engine.validate(network, batches, objective, word_map)
    assert len(calls) == len(batches) == 3
    assert loss == objective.of(sums)
    assert top5 == pytest.approx(right / sum(int((n - 1).sum()) for *_, n in batches), rel=1e-5)
    assert [caption.words for caption in captions] == expected
    network.decoder.prepare(torch.zeros(1, 4, 4, 3))  # the class's own again
    assert len(calls) == 4


def test_rounding_decides_nothing():
    """CIDEr-D of no word in common may come out as 1e-13."""
    worse, better = {"cider": 1.9e-13, "val_loss": 2.9}, {"cider": 0.0, "val_loss": 2.8}
    names = SELECT_BY["cider"]
    assert rank(better, names) > rank(worse, names)
