"""Progress on a terminal and in a file."""

import fcntl
import io
import os
import re
import struct
import sys
import termios
from itertools import pairwise

import pytest
import tqdm.std
from conftest import OFFLINE, run_here

from groundwork import progress


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tqdm.std, "time", clock)
    return clock


def test_in_a_file_there_is_a_whole_line_a_minute(clock, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress.progress(range(600), desc="features", unit="image"):
        clock.now += 1.0  # ten minutes altogether
    assert "\r" not in stream.getvalue() and stream.getvalue().endswith("\n")
    lines = stream.getvalue().splitlines()
    assert len(lines) in (9, 10)
    counts = [int(re.match(r"features: \d+%, (\d+)/600 \[", line)[1]) for line in lines]
    assert counts == list(range(60, 60 * len(lines) + 1, 60))
    assert "1.00image/s" in lines[0] and "[02:00<08:00" in lines[1]


def test_steps_of_uneven_length_do_not_hold_a_line_back(clock, monkeypatch):
    """As with tqdm's own guess of how many steps a line takes."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.progress(total=1000, desc="x") as bar:
        for _ in range(900):  # the first minute and a half: ten a second
            clock.now += 0.1
            bar.update()
        for _ in range(20):
            clock.now += 30
            bar.update()
    counts = [int(re.search(r"(\d+)/1000", line)[1]) for line in stream.getvalue().splitlines()]
    assert counts[0] in (600, 601) and len(counts) == 11
    assert all(later - count <= 2 for count, later in pairwise(counts[1:]))


def test_a_short_loop_says_nothing_in_a_file(clock, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress.progress(range(50), desc="x"):
        clock.now += 1.0
    assert stream.getvalue() == ""


def test_other_processes_say_nothing(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "EVERY", 0)
    monkeypatch.setattr(progress.distributed, "is_main", False)
    assert list(progress.progress(range(5))) == [0, 1, 2, 3, 4]
    assert stream.getvalue() == ""


def test_training_says_in_a_file_what_the_bar_would(tiny_data, tmp_path, monkeypatch):
    """Each step and each batch, where lines may follow each other at once."""
    monkeypatch.setattr(progress, "EVERY", 0)
    process = run_here(
        *("train.py", "--data_folder", tiny_data[0], "--output_folder", tmp_path, "--stage"),
        *("decoder", "--encoder", OFFLINE, "--encoded_image_size", 3, "--device", "cpu"),
        *("--batch_size", 20, "--epochs", 1, "--attention_dim", 8, "--decoder_dim", 8),
    )
    assert process.returncode == 0, process.stderr
    assert "\r" not in process.stderr
    steps = re.findall(
        r"^epoch 1: loss \d\.\d{3}, top-5 \d+\.\d%: \d+%, (\d)/4 \[.*\d captions/s\]$",
        process.stderr,
        re.MULTILINE,
    )
    assert steps == ["1", "2", "3", "4"]
    assert re.search(r"^validation: 100%, 1/1 \[.*\]$", process.stderr, re.MULTILINE)


def on_terminal(columns, show):
    """What a function writes to stderr where this is a terminal of so many columns."""
    main, other = os.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with pytest.MonkeyPatch.context() as patch, os.fdopen(other, "w") as terminal:
        patch.setattr(sys, "stderr", terminal)
        show()
        print("the end", file=terminal, flush=True)
        text = b""
        while b"the end" not in text:  # it comes piece by piece
            text += os.read(main, 2**16)
    os.close(main)
    return text.decode().partition("the end")[0]


def test_at_80_columns_the_bar_keeps_loss_and_accuracy():
    def show():
        with progress.progress(total=12000, desc="epoch 12", unit="step", initial=11000) as bar:
            bar.set_description_str("epoch 12: loss 3.214, top-5 45.3%", refresh=False)
            bar.set_postfix_str("1234 captions/s", refresh=False)
            bar.update()
            bar.refresh()

    last = on_terminal(80, show).rstrip("\r\n").split("\r")[-1]
    assert len(last.rstrip()) <= 80
    assert last.startswith("epoch 12: loss 3.214, top-5 45.3%:  92%|")
    assert "11001/12000 [" in last
