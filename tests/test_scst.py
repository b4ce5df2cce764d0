"""Self-critical training, the third stage of train.py: where it begins, goes on, what it says."""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import OFFLINE, SMALL, best, failure, run_here
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import flatten

import checkpoints
import pictures
import training
from contract import DECODERS
from training_report import describe_epoch

STAGE = ["--stage", "scst", "--scst_batch_size", 13, "--samples", 4]  # three images a step
OWN = {"stage", "epoch", "lr", "loss", "reward", "captions_per_second", "val_loss", "val_top5"}
OWN |= {f"bleu{n}" for n in range(1, 5)} | {"cider", "distinct_words", "dangling", "seconds"}


def run(*arguments):
    process = run_here("train.py", *arguments)
    assert process.returncode == 0, process.stderr
    return process.stdout


def paths(folder, base):
    return [checkpoints.checkpoint_path(folder, base, best=best) for best in (False, True)]


def load(path):
    return checkpoints.load_checkpoint(path, checkpoints.RUN_KEYS)


def log_of(folder, base):
    return [json.loads(line) for line in (folder / f"log_{base}.jsonl").open()]


@pytest.fixture(scope="module")
def critical(trained, tiny_data, tmp_path_factory):
    """The run of the suite's trained model, fine-tuned, goes on for two epochs in another folder:
    that folder, and what was printed."""
    output = tmp_path_factory.mktemp("critical")
    printed = run(
        *("--model", best(trained), "--output_folder", output, "--epochs", 2, *STAGE),
        *("--scst_lr", 1e-3, "--tensorboard", "--dropout", 0.2),
    )
    return output, printed


def test_it_begins_from_the_best_checkpoint_with_what_was_fine_tuned(critical, trained, tiny_data):
    (output, printed), base = critical, tiny_data[1]
    start, newest = load(best(trained)), load(paths(output, base)[0])
    line = f"self-critical training starts from epoch {start['epoch']} of {best(trained)}"
    assert line in printed.splitlines()
    log = log_of(output, base)
    own = [record for record in log if record["stage"] == "scst"]
    assert [record["epoch"] for record in own] == [1, 2] and log[:-2] == start["log"]
    assert all(record.keys() == OWN and record["lr"] == 1e-3 for record in own)
    assert all("cider" in record and "reward" not in record for record in start["log"])
    for name, tensor in start["encoder"].items():  # the encoder stays
        assert torch.equal(newest["encoder"][name], tensor), name
    assert not torch.equal(newest["decoder"]["fc.weight"], start["decoder"]["fc.weight"])
    assert len(newest["optimizer"]["param_groups"]) == 1
    assert newest["options"]["select_by"] == "cider" and newest["options"]["epochs"] == 2
    assert newest["order"]["images"] == 3  # of four captions each, in 13
    assert 0 < own[0]["reward"] < 10


def test_it_is_shown(critical, tiny_data, tmp_path):
    (output, printed), base = critical, tiny_data[1]
    record = log_of(output, base)[-1]
    assert f"reward {record['reward']:.3f}; validation loss" in printed
    assert describe_epoch(record, record, True, "cider").startswith("epoch 2: loss")
    tags = EventAccumulator(str(output / "tensorboard" / base)).Reload().Tags()["scalars"]
    assert {"reward/train", "CIDEr-D/validation", "diversity/dangling_ends"} <= set(tags)
    assert "top-5/train" not in tags
    with Image.open(output / f"curves_{base}.png") as picture:
        assert picture.width > 4 * picture.height
    figure = pictures.curves(log_of(output, base))
    loss, _, cider, rate = figure.axes
    training_loss, _ = loss.get_lines()
    assert [str(y) for y in training_loss.get_ydata()[-2:]] == ["nan", "nan"]
    assert len(cider.get_lines()) == 2 and len(rate.get_lines()) == 2
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels == ["training", "validation", "fine-tuning", "self-critical"]


@pytest.mark.slow
def test_resuming_is_exact_inside_an_epoch(critical, trained, tiny_data, tmp_path, monkeypatch):
    count = training.Training._count

    def interrupted(self, step):
        count(self, step)
        if (self.state.epoch, self.state.step) == (1, 1):  # it is seen in the next one
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_count", interrupted)
        process = run_here(
            "train.py", "--model", best(trained), "--output_folder", tmp_path, "--epochs", 2,
            *STAGE, "--scst_lr", 1e-3, "--dropout", 0.2, "--no-tensorboard",
        )  # fmt: skip
    assert process.returncode == 128 + signal.SIGTERM, process.stderr
    assert "after 1 epoch and 2 steps of stage scst" in process.stdout
    line = failure(run_here("train.py", "--resume", "--output_folder", tmp_path, "--samples", 2))
    assert "continue it with --scst_batch_size 13 --samples 4, as before" in line
    run("--resume", "--output_folder", tmp_path, "--tensorboard")
    base = tiny_data[1]
    found, expected = (
        {name: leaf for name, leaf in flatten(load(paths(folder, base)[0])) if "model" not in name}
        for folder in (tmp_path, critical[0])
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value
        assert same, name


@pytest.mark.slow
def test_what_is_past_and_what_would_be_lost(critical, trained, tiny_data, tmp_path):
    folder, base = shutil.copytree(critical[0], tmp_path / "run"), tiny_data[1]
    newest, _ = paths(folder, base)
    for stage in ("decoder", "finetune", "both"):
        line = failure(run_here("train.py", "--model", newest, "--stage", stage))
        last = "finetune" if stage == "both" else stage
        assert f"is past stage {last}: continue it with --stage scst" in line
    before = newest.read_bytes()
    # a second one, from the best that there is, which is of the stage itself or of one before
    line = failure(run_here("train.py", "--stage", "scst", "--output_folder", folder))
    assert "earlier self-critical training, stage scst, 2 epochs" in line
    assert newest.read_bytes() == before
    run("--stage", "scst", "--output_folder", folder, "--overwrite", "--epochs", 1, "--samples", 2)
    stages = [record["stage"] for record in log_of(folder, base)]
    assert stages == [*["decoder"] * 25, *["finetune"] * 2, "scst"]

    # nor does it give up a fine-tuning that an older checkpoint knows nothing of
    folder = shutil.copytree(trained[0], tmp_path / "tuned")
    newest, _ = paths(folder, base)
    latest = load(newest)
    older = folder / "older.pth.tar"
    torch.save(latest | {"stage": "decoder", "epoch": 25, "log": latest["log"][:25]}, older)
    line = failure(run_here("train.py", "--stage", "scst", "--model", older))
    assert "earlier fine-tuning" in line and str(newest) in line


@pytest.mark.slow
def test_another_share_of_cross_entropy_and_rewards_go_on(critical, tiny_data, tmp_path):
    folder, base = shutil.copytree(critical[0], tmp_path / "run"), tiny_data[1]
    printed = run(
        *("--resume", "--output_folder", folder, "--epochs", 3),
        *("--cross_entropy_share", 0.95, "--reward", "cider=1,bleu4=0.5"),
    )
    assert "--reward cider=1,bleu4=0.5" in printed
    log = log_of(folder, base)
    assert log[-1]["epoch"] == 3 and log[-1]["reward"] > 0
    # a twentieth is left of what is below 0; the rest, -log p of people's words, is above it
    assert log[-1]["loss"] > log[-2]["loss"] / 2 and log[-2]["loss"] < 0


@pytest.mark.slow
def test_a_checkpoint_whose_sums_are_of_another_stage_is_refused(critical, tiny_data, tmp_path):
    newest, _ = paths(critical[0], tiny_data[1])
    path = tmp_path / "x.pth.tar"
    last = log_of(critical[0], tiny_data[1])[-1]
    for change in (
        {"partial": {"count": 1, "sums": {"loss": 1.0, "top5": 1.0}}},
        {"stage": "third"},
        {"stage": ["scst"]},
        {"log": [last | {"cider": "much"}]},
    ):
        torch.save(load(newest) | change, path)
        assert "cannot be one" in failure(run_here("train.py", "--model", path))


@pytest.mark.slow
def test_each_decoder_has_its_own_learning_rate(tiny_data, tmp_path):
    """The transformer's is lower."""
    assert DECODERS["lstm"].scst_lr == DECODERS["gru"].scst_lr == 5e-5
    made = ["--decoder", "transformer", "--embed_dim", 8, "--encoder", OFFLINE]
    made += ["--encoded_image_size", 3, "--stage", "decoder", "--device", "cpu"]
    where = ["--data_folder", tiny_data[0], "--output_folder", tmp_path]
    run(*where, *made, "--epochs", 1, "--batch_size", 40)
    run(*where, "--stage", "scst", "--epochs", 1, "--scst_batch_size", 20)
    records = log_of(tmp_path, tiny_data[1])
    assert [record["lr"] for record in records] == [1e-3, 1e-5]
    best_by = load(paths(tmp_path, tiny_data[1])[1])["best_record"]
    assert best_by["cider"] == max(record["cider"] for record in records)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", 1], "1 is less than 2"),
        (["--reward", "spice=1"], "there is no reward 'spice': known are cider, bleu4"),
        (["--reward", "cider=0"], "give a number above 0"),
        (["--cross_entropy_share", 1], "1 is not below 1"),
        (["--scst_lr", 0], "0 is not above 0"),
        ([], "--stage scst starts from a trained decoder"),
    ],
)
def test_what_cannot_be_is_one_line(tiny_data, tmp_path, arguments, words):
    where = ["--data_folder", tiny_data[0], "--output_folder", tmp_path]
    process = run_here("train.py", *where, "--stage", "scst", *arguments)
    assert words in failure(process)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [["--samples", 3], ["--reward", "bleu4=1"]])
def test_its_options_go_with_its_stage(tiny_data, tmp_path, option):
    where = ["--data_folder", tiny_data[0], "--output_folder", tmp_path, "--encoder", OFFLINE]
    line = failure(run_here("train.py", *where, *SMALL, *option))
    assert " ".join(map(str, option)) in line and "--stage scst" in line
    assert not list(tmp_path.iterdir())
