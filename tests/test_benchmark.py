"""The benchmark's two sides do the same; its table and picture hold what was measured."""

import argparse
import re
from dataclasses import replace

import pytest
import torch
from conftest import failure, run_here
from PIL import Image
from torch import nn

import benchmark_profile
import benchmark_report
import benchmark_variants
import freezing
from attentions import ATTENTIONS, HardAttention
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
from benchmark_profile import profile_of
from benchmark_report import describe, draw
from contract import DECODERS
from datasets import CaptionDataset
from groundwork import timing
from groundwork.timing import Speeds, Work

SETTINGS = Settings("lite2", torch.device("cpu"), amp=False, rounds=1, slow_rounds=1)


@pytest.mark.slow
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


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradients_of_a_convolution_take_what_it_takes_itself(groups):
    conv = nn.Conv2d(4, 8, 3, padding=1, groups=groups, bias=False)
    image = torch.randn(2, 4, 5, 6, requires_grad=True)
    products = 2 * 8 * 5 * 6 * (4 // groups) * 3 * 3  # a value of the map from 9 places each
    assert timing.count_work(lambda: conv(image)).flops == 2 * products
    assert timing.count_work(lambda: conv(image).sum().backward()).flops == 3 * 2 * products
    with torch.no_grad():
        fused = freezing.through_onednn(nn.Sequential(conv, nn.ReLU()), torch.float32)
        assert timing.count_work(lambda: fused(image)).flops == 2 * products
    frozen = image.detach()
    assert timing.count_work(lambda: conv(frozen).sum().backward()).flops == 2 * 2 * products


def test_the_report_holds_ratios_goals_and_shares(tmp_path):
    rows = [
        Row("a step", 8, 6.0, 0.5, Work(5e9, 1e9)),
        Row("slow", 13, 6.0, 0.5),
        Row("files", None, 3.0, 2.0),
    ]
    grown = {axis: ([1, 2], [(2.0, 1.0), (4.0, 1.5)]) for axis in "abcd"}
    text = describe(SETTINGS, Speeds({False: 1e11}, 1e10), rows, grown)
    assert "| a step | 12.0× | 8× | 10% | 30% |" in text
    assert "| slow | 12.0× | 13×, missed | | |" in text
    assert "| files | 1.5× |  | | |" in text and "Milliseconds" not in text
    draw(rows, grown).savefig(tmp_path / "benchmark.png", dpi=110)
    with Image.open(tmp_path / "benchmark.png") as image:
        assert image.width == 1430


def test_times_are_told_of_a_gpu_by_its_name(monkeypatch):
    monkeypatch.setattr(benchmark_report, "machine", lambda device: f"GPU on {device}")
    rows = [Row("a step", 8, 6.0, 0.5, Work(5e9, 1e9), captions=40), Row("files", None, 3.0, 2.0)]
    settings = replace(SETTINGS, device=torch.device("cuda"))
    grown = {"images": ([1, 2000], [(0.002, 0.001), (4.0, 1.5)])}
    text = describe(settings, Speeds({False: 1e11}, 1e10), rows, grown)
    assert text.startswith("lite2 geometry, GPU on cuda; ")
    assert "| a step | 12.0× | 8× | 10% | 30% | 80 |" in text
    assert "| files | 1.5× |  | | | |" in text
    assert "- images: 1: 2.0 / 1.0, 2,000: 4000.0 / 1500.0" in text


def test_kernels_of_a_gpu_go_by_their_functions_names():
    names = {
        "void at::native::elementwise_kernel<128, at::native::x<a, b>>(int, float*)": "elementwise_"
        "kernel",
        "void (anonymous namespace)::softmax_warp<2>(int)": "softmax_warp",
        "_of_query": "_of_query",
        "Memcpy HtoD (Pinned -> Device)": "Memcpy HtoD",
        "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, float, 7>(T1)": "kernel",
    }
    for signature, name in names.items():
        assert benchmark_profile._name_of_kernel(signature) == name


def test_what_overlaps_counts_once():
    ranges = [argparse.Namespace(start=a, end=b) for a, b in ((5, 7), (0, 2), (1, 4), (6, 6.5))]
    assert benchmark_profile._length(ranges) == 6


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


@pytest.fixture
def small(monkeypatch):
    for name, value in {"IMAGES": 2, "PER_IMAGE": 2, "WORDS": 3, "VOCABULARY": 20}.items():
        monkeypatch.setattr(benchmark_variants, name, value)


@pytest.mark.slow
def test_every_variant_is_timed_and_printed_at_once(small, monkeypatch, capsys):
    """A row stands there before the next is measured."""
    printed = []

    def measure(device, rounds, *steps):
        printed.append(capsys.readouterr().out.splitlines())
        for step in steps:
            step()
        return 3.0, 2.0

    monkeypatch.setattr(benchmark_variants, "alternate", measure)
    benchmark_variants.print_table(SETTINGS.device, amp=False, rounds=1)
    printed.append(capsys.readouterr().out.splitlines())
    about, *rows = printed
    assert "float32" in about[0] and "CPU" in about[0] and "4 captions of 2 images" in about[0]
    found = [row.strip("| ").split(" | ") for [row] in rows]
    expected = [["lstm", attention] for attention in ATTENTIONS]
    expected += [["gru", "bahdanau"], ["topdown", "soft"], ["transformer", "—"], ["merge", "—"]]
    assert [row[:2] for row in found] == [*expected, ["lstm, self-critical", "soft"]]
    assert {row[0] for row in found[:-1]} == set(DECODERS)
    assert all(row[3] == "1.50" and float(row[2].removesuffix(" M")) > 0 for row in found)


@pytest.mark.slow
def test_of_hard_attention_the_drawn_steps_are_timed(small, monkeypatch):
    looks, prepare = [], HardAttention.prepare

    def note(self, encoder_out):
        annotations = prepare(self, encoder_out)
        looks.append(annotations.look)
        return annotations

    monkeypatch.setattr(HardAttention, "prepare", note)
    benchmark_variants.print_table(SETTINGS.device, amp=False, rounds=5)
    assert looks == ["sample"] * 6


@pytest.mark.parametrize(
    ("mode", "option"),
    [
        ("variants", "geometry=lite2"),
        ("variants", "slow_rounds=3"),
        ("variants", "output_folder=x"),
        ("variants", "profile"),
        ("profile", "rounds=3"),
        ("profile", "output_folder=x"),
    ],
)
def test_options_of_the_other_benchmark_are_refused(mode, option):
    line = failure(run_here("benchmark.py", f"--{mode}", f"--{option}"))
    assert f"--{option.partition('=')[0]}" in line and f"--{mode}" in line


def test_a_profile_is_the_operations_shares():
    a, b = torch.randn(2, 400, 400)

    def work():
        for _ in range(9):
            a @ b
        a.relu()

    shares, busy = profile_of(work, SETTINGS.device)
    assert busy is None and sum(shares.values()) == pytest.approx(1)
    assert next(iter(shares)) == "aten::mm" and shares["aten::mm"] > 0.6
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


@pytest.mark.slow
def test_where_the_time_goes_is_printed():
    process = run_here("benchmark.py", "--profile", "--geometry", "lite2", "--device", "cpu")
    assert process.returncode == 0, process.stderr
    about, *rows = process.stdout.splitlines()
    assert about.startswith("lite2 geometry, CPU")
    assert [row.partition(",")[0].partition(":")[0] for row in rows] == [
        "decoder training step",
        "fine-tuning step",
        "beam-5 evaluation from features",
        "beam-5 evaluation from photographs",
        "beam-5",
    ]
    assert all(re.search(r": \S+ \d+%, ", row) for row in rows)
    assert "mm " in rows[0] and "convolution_backward " in rows[1]
