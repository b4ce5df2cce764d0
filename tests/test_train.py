"""What training does between epochs: learning rate, early stopping, both stages' schedules."""

import json
import math

import pytest
from conftest import OFFLINE, run_here

import train

SMALL = ["--attention_dim", 8, "--embed_dim", 8, "--decoder_dim", 8, "--encoded_image_size", 3]


def rates(tiny_data, output, *arguments):
    """The decoder's learning rate in each epoch of stage 1."""
    folder, base = tiny_data
    process = run_here(
        "train.py", "--data_folder", folder, "--output_folder", output, "--encoder", OFFLINE,
        "--stage", "decoder", "--device", "cpu", *SMALL, *arguments,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = (output / f"log_{base}.jsonl").read_text().splitlines()
    return [json.loads(line)["lr"] for line in lines], process.stdout


def test_without_a_better_bleu_the_rate_falls_and_training_stops(tiny_data, tmp_path):
    """A rate of nothing never improves on the first epoch."""
    found, printed = rates(
        tiny_data, tmp_path, "--decoder_lr", 1e-30, "--patience", 2, "--stop_after", 5
    )
    # the first epoch is the best; after two without a better one × 0.8, stop after five
    assert found == pytest.approx([r * 1e-30 for r in (1, 1, 1, 0.8, 0.8, 0.64)])
    assert "no better BLEU-4 for 5 epochs" in printed


def test_the_cosine_schedule_ends_near_zero(tiny_data, tmp_path):
    found, _ = rates(tiny_data, tmp_path, "--schedule", "cosine", "--epochs", 4)
    start = train.DEMO_DEFAULTS["decoder_lr"]
    expected = [start * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert found == pytest.approx(expected)


def test_an_earlier_run_is_not_overwritten_unasked(tiny_data, tmp_path):
    folder, base = tiny_data
    found, _ = rates(tiny_data, tmp_path, "--epochs", 1)
    assert len(found) == 1
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    process = run_here("train.py", "--data_folder", folder, "--output_folder", tmp_path)
    assert process.returncode == 1
    assert "--overwrite" in process.stderr
    assert f"checkpoint_{base}.pth.tar" in process.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_goes_on_in_another_folder_with_another_learning_rate(tiny_data, tmp_path):
    _, base = tiny_data
    first, second = tmp_path / "first", tmp_path / "second"
    rates(tiny_data, first, "--epochs", 1)
    before = {path: path.read_bytes() for path in first.iterdir()}
    checkpoint = first / f"checkpoint_{base}.pth.tar"
    found, _ = rates(
        tiny_data, second, "--epochs", 2, "--checkpoint", checkpoint, "--decoder_lr", 1e-5
    )
    assert found == pytest.approx([1e-5])
    assert (second / f"BEST_checkpoint_{base}.pth.tar").exists()
    assert {path: path.read_bytes() for path in first.iterdir()} == before
