"""The benchmark's two sides do the same; its table and picture hold what was measured."""

import argparse

import pytest
import torch
from PIL import Image

from benchmark import GEOMETRIES
from benchmark_data import (
    BASE,
    ENCODERS,
    Scene,
    Settings,
    check_equal,
    check_kernels,
    write_input_files,
)
from benchmark_parts import SHARES, WORDS, Row, search_sides
from benchmark_report import describe, draw
from datasets import CaptionDataset
from groundwork import timing
from groundwork.timing import Speeds, Work

SETTINGS = Settings("lite2", torch.device("cpu"), amp=False, rounds=1, slow_rounds=1)


def test_both_sides_compute_the_same_step():
    scene = Scene(SETTINGS, images=2, vocabulary=50)
    check_equal(scene)
    check_kernels(scene)


def test_a_side_that_differs_is_noticed():
    scene = Scene(SETTINGS, images=2, vocabulary=50)
    ours = scene.ours
    scene.ours = lambda *arguments: 1.001 * ours(*arguments)
    with pytest.raises(AssertionError):
        check_equal(scene)


def test_both_sides_find_the_same_captions():
    textbook, ours = search_sides(Scene(SETTINGS, images=3, vocabulary=50), SETTINGS, 3)
    captions = [caption.words for caption in ours()]
    assert captions == textbook()
    assert all(len(words) == WORDS for words in captions)


def test_alternate_gives_the_medians_of_calls_in_turn():
    called = []
    clock = iter([0, 0, 9, 10, 11, 19, 20, 25, 30, 36])  # the first two are not measured
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "time", argparse.Namespace(perf_counter=lambda: next(clock)))
        found = timing.alternate(
            SETTINGS.device, 2, lambda: called.append("a"), lambda: called.append("b")
        )
    assert called == ["a", "b"] * 3
    assert found == [(1 + 5) / 2, (8 + 6) / 2]


def test_work_is_products_flops_and_the_others_bytes():
    a, b, rows = torch.ones(4, 6), torch.ones(6, 8), torch.tensor([1, 1, 2])

    def work():
        product = a @ b  # 2·4·6·8
        total = product + 1  # reads and writes 4·8 numbers
        total.relu_()  # likewise
        total.index_select(0, rows).view(-1)  # 3 of its rows, thrice

    assert timing.count_work(work) == (2 * 4 * 6 * 8, 4 * (2 * 32 + 2 * 32 + 3 * 24))


def test_the_report_holds_ratios_goals_and_shares(tmp_path):
    rows = [
        Row("a step", 8, 6.0, 0.5, Work(5e9, 1e9)),
        Row("slow", 13, 6.0, 0.5),
        Row("files", None, 3.0, 2.0),
    ]
    text = describe(SETTINGS, Speeds({False: 1e11}, 1e10), rows)
    assert "| a step | 12.0× | 8× | 10% | 30% |" in text
    assert "| slow | 12.0× | 13×, missed | | |" in text
    assert "| files | 1.5× |  | | |" in text
    grown = {axis: ([1, 2], [(2.0, 1.0), (4.0, 1.5)]) for axis in "abcd"}
    draw(rows, grown).savefig(tmp_path / "benchmark.png", dpi=110)
    with Image.open(tmp_path / "benchmark.png") as image:
        assert image.width == 1430


def test_the_files_of_a_scene_can_be_trained_on(tmp_path):
    scene = Scene(SETTINGS, images=2, vocabulary=50)
    write_input_files(scene, tmp_path)
    data = CaptionDataset(tmp_path, BASE, "TRAIN")
    image, captions, _ = data[1]
    assert torch.equal(image, scene.images[1])
    assert torch.equal(captions, scene.captions.view(2, 5, -1)[1])


def test_the_scripts_choices_are_the_geometries():
    assert list(ENCODERS) == GEOMETRIES


def test_the_bar_ends_at_a_hundred_percent():
    assert sum(SHARES.values()) == 100
