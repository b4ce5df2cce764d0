"""What training does between epochs: learning rate, early stopping, both stages' schedules."""

import json
import math
import random
import signal

import pytest
import torch
from conftest import OFFLINE, ROOT, run_here, run_script

import train
import utils

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
    folder, _ = tiny_data
    found, _ = rates(tiny_data, tmp_path, "--epochs", 1)
    assert len(found) == 1
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    process = run_here("train.py", "--data_folder", folder, "--output_folder", tmp_path)
    assert process.returncode == 1
    assert "--overwrite" in process.stderr
    assert "--resume" in process.stderr
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
    assert found == pytest.approx([train.DEMO_DEFAULTS["decoder_lr"], 1e-5])
    assert (second / f"BEST_checkpoint_{base}.pth.tar").exists()
    assert {path: path.read_bytes() for path in first.iterdir()} == before


def test_resuming_names_what_it_takes_and_what_it_cannot(tiny_data, tmp_path):
    _, base = tiny_data
    rates(tiny_data, tmp_path, "--epochs", 1)
    found, printed = rates(
        tiny_data, tmp_path, "--epochs", 2, "--resume", "--decoder_dim", 9, "--alpha_c", 0.5
    )
    assert len(found) == 2
    assert "the model is the checkpoint's: --decoder_dim 8" in printed
    (line,) = [line for line in printed.splitlines() if "other options than its run had" in line]
    assert line.endswith(": --epochs 2 --alpha_c 0.5")

    folder = ["--data_folder", tiny_data[0], "--output_folder", tmp_path]
    newest, best = (utils.checkpoint_path(tmp_path, base, best=best) for best in (False, True))
    torch.save(utils.load_checkpoint(newest) | {"stage": "finetune"}, newest)
    process = run_here("train.py", *folder, "--resume", "--stage", "decoder")
    assert "past stage decoder" in process.stderr
    process = run_here("train.py", *folder, "--stage", "finetune")
    assert "earlier fine-tuning" in process.stderr
    for path in (newest, best):
        path.write_bytes(path.read_bytes()[:1000])
    process = run_here("train.py", *folder, "--resume")
    assert process.stderr.count("passed over") == 2
    assert "--overwrite" in process.stderr.splitlines()[-1]


# Runs train.py, and sends itself a signal at an event: before an update or the writing, flushing
# or renaming of any file, each counted.
DISTURBED = """
import os, sys
import torch, train, utils
number, moment = int(sys.argv.pop(1)), int(sys.argv.pop(1))
events = 0
def watch(owner, name):
    call = getattr(owner, name)
    def watched(*arguments, **options):
        global events
        events += 1
        if events == moment:
            os.kill(os.getpid(), number)
        return call(*arguments, **options)
    setattr(owner, name, watched)
watch(torch.optim.Adam, "step")
watch(torch, "save")
watch(utils, "flush")
watch(os, "replace")
watch(train.metrics, "bleu")
utils.run(train.main)
"""


@pytest.fixture(scope="module")
def undisturbed(tiny_data, tmp_path_factory):
    """A run of both stages: its arguments and its last checkpoint."""
    folder, base = tiny_data
    run = ["--data_folder", folder, "--encoder", OFFLINE, *SMALL, "--device", "cpu", "--epochs", 2]
    run += ["--batch_size", 30, "--finetune_batch_size", 30, "--stage", "both", "--views", 3]
    run += ["--save_every", 1, "--patience", 1]
    output = tmp_path_factory.mktemp("undisturbed")
    process = run_script("train.py", *run, "--output_folder", output)
    assert process.returncode == 0, process.stderr
    return run, utils.load_checkpoint(utils.checkpoint_path(output, base))


def disturb(undisturbed, tmp_path, number, moment):
    """Runs or resumes training in tmp_path until a signal comes at a moment."""
    (tmp_path / "disturbed.py").write_text(DISTURBED)
    run = [*undisturbed[0], "--output_folder", tmp_path / "run", "--resume"]
    return run_script(
        tmp_path / "disturbed.py", int(number), moment, *run, env={"PYTHONPATH": str(ROOT)}
    )


def flatten(value, name=""):
    """(name, leaf) of nested dicts and lists, without what tells the time."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            if key not in ("seconds", "captions_per_second", "output_folder", "resume"):
                yield from flatten(inner, f"{name}/{key}")
    else:
        yield name, value


def assert_equal_runs(undisturbed, folder, base):
    found = utils.load_checkpoint(utils.checkpoint_path(folder, base))
    leaves = dict(flatten(found))
    expected = dict(flatten(undisturbed[1]))
    assert leaves.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(leaves[name], value) if torch.is_tensor(value) else leaves[name] == value
        assert same, name
    lines = (folder / f"log_{base}.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found["log"]
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_one_never_stopped(
    kills, undisturbed, tiny_data, tmp_path
):
    moments = random.Random(kills)
    killed = 0
    while killed < kills:
        process = disturb(undisturbed, tmp_path, signal.SIGKILL, moments.randint(2, 13))
        if process.returncode == 0:  # done before its moment came: once more from the start
            assert_equal_runs(undisturbed, tmp_path / "run", tiny_data[1])
            for path in (tmp_path / "run").iterdir():
                path.unlink()
        else:
            assert process.returncode == -signal.SIGKILL, process.stderr
            killed += 1
    process = disturb(undisturbed, tmp_path, signal.SIGKILL, 0)
    assert process.returncode == 0, process.stderr
    assert_equal_runs(undisturbed, tmp_path / "run", tiny_data[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_a_checkpoint(number, undisturbed, tiny_data, tmp_path):
    process = disturb(undisturbed, tmp_path, number, 3)
    assert process.returncode == 128 + number, process.stderr
    assert not list((tmp_path / "run").glob("BEST*")), "nothing is best before it is validated"
    assert f"stopped by {number.name}" in process.stdout
    assert "--resume" in process.stdout.splitlines()[-1]
    assert "Traceback" not in process.stderr
    process = disturb(undisturbed, tmp_path, number, 0)
    assert process.returncode == 0, process.stderr
    assert "resuming from" in process.stdout
    assert_equal_runs(undisturbed, tmp_path / "run", tiny_data[1])
