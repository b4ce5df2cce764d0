"""Runs that go on: from which checkpoint, with which options, and that nothing is lost by it."""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import OFFLINE, failure, run_here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import checkpoints
import training
import training_data
from config import TrainingConfig
from groundwork import distributed

# none of them the default
OPTIONS = {
    "encoder": OFFLINE, "encoder_stages": "16 32", "encoded_image_size": 4,
    "attention_dim": 8, "embed_dim": 8, "decoder_dim": 8, "dropout": 0.25,
    "device": "cpu", "epochs": 2, "batch_size": 30,
    "finetune_batch_size": 40, "alpha_c": 0.5, "stage": "decoder", "decoder_lr": 0.002, "seed": 3,
    "amp": "off", "save_every": "9", "deterministic": True,
}  # fmt: skip
RUN = [f"--{name}={value}" for name, value in OPTIONS.items() if value is not True]
RUN += ["--deterministic"]


@pytest.fixture(autouse=True)
def not_deterministic_afterwards():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def decoder_run(tiny_data, tmp_path_factory):
    """The output folder of a run of stage 1."""
    output = tmp_path_factory.mktemp("decoder")
    process = run_here("train.py", "--data_folder", tiny_data[0], "--output_folder", output, *RUN)
    torch.use_deterministic_algorithms(False)
    assert process.returncode == 0, process.stderr
    return output


@pytest.fixture(scope="module")
def tuned_run(decoder_run, tiny_data, tmp_path_factory):
    """The same, then fine-tuned for an epoch; and what that printed."""
    output = tmp_path_factory.mktemp("tuned") / "run"
    shutil.copytree(decoder_run, output)
    process = run_here(
        "train.py", "--output_folder", output, "--stage", "finetune", "--epochs", 1
    )  # fmt: skip
    torch.use_deterministic_algorithms(False)
    assert process.returncode == 0, process.stderr
    return output, process.stdout


@pytest.fixture
def folder(decoder_run, tmp_path):
    return shutil.copytree(decoder_run, tmp_path / "run")


def paths(folder, tiny_data):
    return [checkpoints.checkpoint_path(folder, tiny_data[1], best=best) for best in (False, True)]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(path):
    return checkpoints.load_checkpoint(path, checkpoints.RUN_KEYS)


# ------------------------------------------------------------------------------ nothing is lost


@pytest.mark.slow
@pytest.mark.parametrize("named", ["nothing", "BEST", "the stage before", "an older epoch"])
def test_work_is_not_discarded_unasked(tuned_run, tiny_data, tmp_path, named):
    folder = shutil.copytree(tuned_run[0], tmp_path / "run")
    newest, best = paths(folder, tiny_data)
    latest, older = load(newest), folder / "older.pth.tar"
    first = latest | {"stage": "decoder", "epoch": 1, "log": latest["log"][:1]}
    # as it is where fine-tuning does not get better
    torch.save(first | {"best_record": latest["log"][0]}, best)
    torch.save(first, older)
    arguments = {
        "nothing": ["--stage", "finetune"],
        "BEST": ["--stage", "finetune", "--checkpoint", best],
        "the stage before": ["--stage", "both", "--checkpoint", best],
        "an older epoch": ["--stage", "decoder", "--checkpoint", older],
    }[named]
    before = contents(folder)
    run = ["train.py", "--data_folder", tiny_data[0], "--output_folder", folder, *arguments]
    line = failure(run_here(*run))
    assert str(newest) in line and "stage finetune, 1 epoch," in line
    for way_out in ("--overwrite", "--output_folder", "--resume"):
        assert way_out in line
    assert contents(folder) == before
    if named != "BEST":
        return
    process = run_here(*run, "--overwrite", "--epochs", 1)
    assert process.returncode == 0, process.stderr
    assert f"fine-tuning starts from epoch 1 of {best}" in process.stdout
    stages = [(line["stage"], line["epoch"]) for line in load(newest)["log"]]
    assert stages == [("decoder", 1), ("decoder", 2), ("finetune", 1)]


@pytest.mark.slow
def test_an_older_checkpoint_of_the_same_stage_is_not_gone_on_from_unasked(folder, tiny_data):
    newest, best = paths(folder, tiny_data)
    latest, older = load(newest), folder / "older.pth.tar"
    torch.save(latest | {"epoch": 1, "log": latest["log"][:1]}, older)
    before = contents(folder)
    line = failure(run_here("train.py", "--checkpoint", older))
    assert str(newest) in line and str(older) in line and "2 epochs" in line
    assert contents(folder) == before
    torch.save(latest, older)  # as new as the newest
    process = run_here("train.py", "--checkpoint", older, "--epochs", 3)
    assert process.returncode == 0, process.stderr
    assert [line["epoch"] for line in load(newest)["log"]] == [1, 2, 3]
    assert best.exists()


def test_fine_tuning_says_where_it_starts(tuned_run, decoder_run, tiny_data):
    folder, printed = tuned_run
    [line] = [line for line in printed.splitlines() if "fine-tuning starts from" in line]
    epoch = load(paths(decoder_run, tiny_data)[1])["epoch"]
    assert line == f"fine-tuning starts from epoch {epoch} of {paths(folder, tiny_data)[1]}"
    assert "stage finetune: its 1 epoch is done" in printed


@pytest.mark.slow
def test_fine_tuning_in_another_folder_brings_the_best_along(decoder_run, tiny_data, tmp_path):
    start = paths(decoder_run, tiny_data)[1]
    process = run_here(
        *("train.py", "--stage", "finetune", "--checkpoint", start, "--output_folder", tmp_path),
        # the same captions, and a validation loss that is greater whatever the rounding
        *("--epochs", 1, "--decoder_lr", 1e-30, "--encoder_lr", 1e-30, "--alpha_c", 1000),
    )
    assert process.returncode == 0, process.stderr
    newest, best = paths(tmp_path, tiny_data)
    assert [line["stage"] for line in load(newest)["log"]][-1] == "finetune"
    assert load(best)["best_record"] == load(newest)["best_record"] == load(start)["best_record"]


def test_what_another_run_wrote_meanwhile_is_not_lost(folder, tiny_data, monkeypatch):
    newest, _ = paths(folder, tiny_data)
    group = distributed.group

    def written_meanwhile(device):
        os.utime(newest, ns=(1, 1))
        return group(device)

    monkeypatch.setattr(distributed, "group", written_meanwhile)
    line = failure(run_here("train.py", "--resume", "--output_folder", folder))
    assert "another run has written" in line and str(newest) in line


# ------------------------------------------------------------------------------------- options


@pytest.mark.slow
def test_resuming_takes_the_options_of_the_run(folder, tiny_data):
    newest, _ = paths(folder, tiny_data)
    process = run_here("train.py", "--resume", "--output_folder", folder)
    assert process.returncode == 0, process.stderr
    assert "stage decoder: its 2 epochs are done" in process.stdout
    assert "stage finetune" not in process.stdout
    [line] = [line for line in process.stdout.splitlines() if "options of its run hold" in line]
    assert "--epochs 2" in line and "--alpha_c 0.5" in line and "--deterministic" in line

    process = run_here(
        "train.py", "--resume", "--output_folder", folder, "--epochs", 3, "--no-deterministic"
    )
    assert process.returncode == 0, process.stderr
    assert "other options than its run had: --epochs 3 --no-deterministic" in process.stdout
    found, record = load(newest), json.loads((folder / f"run_{tiny_data[1]}.json").read_text())
    expected = OPTIONS | {"epochs": 3, "deterministic": False, "data_folder": str(tiny_data[0])}
    assert {name: found["options"][name] for name in expected} == expected
    assert record["options"] == found["options"]
    assert found["epoch"] == 3 and found["order"]["images"] == 3
    assert found["decoder_config"]["dropout"] == 0.25


def test_each_of_two_data_sets_has_its_run(folder, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data[0], tmp_path / "data")
    for path in [*data.iterdir()]:
        shutil.copy(path, path.with_name(path.name.replace(tiny_data[1], "demo_other")))
    run = ["train.py", "--resume", "--output_folder", folder, "--data_folder", data]
    process = run_here(*run)  # of the one that has a run
    assert process.returncode == 0, process.stderr
    newest, _ = paths(folder, tiny_data)
    shutil.copy(newest, folder / "checkpoint_demo_other.pth.tar")
    line = failure(run_here(*run))
    assert "--data_name" in line and "demo_other" in line
    process = run_here(*run, "--data_name", tiny_data[1])
    assert process.returncode == 0, process.stderr
    (data / f"WORDMAP_{tiny_data[1]}.json").rename(data / "WORDMAP_demo_third.json")
    line = failure(run_here(*run, "--data_name", tiny_data[1]))
    assert str(data) in line and tiny_data[1] in line


def test_data_that_have_moved_are_asked_for(folder, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    newest, _ = paths(folder, tiny_data)
    moved = load(newest)
    moved["options"]["data_folder"], moved["base"] = "gone", "flickr8k_5"
    torch.save(moved, newest.with_name("checkpoint_flickr8k_5.pth.tar"))
    newest.unlink()
    paths(folder, tiny_data)[1].unlink()
    line = failure(run_here("train.py", "--resume", "--output_folder", folder))
    assert "--data_folder" in line
    assert not (tmp_path / "data").exists()


def test_no_demo_takes_the_place_of_data_not_named(folder, tiny_data, tmp_path, monkeypatch):
    """In the folder of a run on other data."""
    monkeypatch.chdir(tmp_path)
    newest, best = paths(folder, tiny_data)
    best.unlink()
    newest.rename(newest.with_name("checkpoint_flickr8k_5.pth.tar"))
    line = failure(run_here("train.py", "--output_folder", folder))
    assert "flickr8k_5 is not in data" in line and "--data_folder" in line
    assert not (tmp_path / "data").exists()


def test_options_that_an_older_checkpoint_lacks_are_named(folder, tiny_data):
    newest, _ = paths(folder, tiny_data)
    older = load(newest)
    del older["options"]["decoder_lr"], older["options"]["label_smoothing"]
    torch.save(older, newest)
    process = run_here("train.py", "--resume", "--output_folder", folder, "--epochs", 3)
    assert process.returncode == 0, process.stderr
    [line] = [line for line in process.stdout.splitlines() if "does not tell" in line]
    assert line.endswith(": --decoder_lr 0.001")  # the default on demo data


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", "many"), ("epochs", -1), ("epochs", True), ("stage", "third"), ("seed", 2.5)],
)
def test_options_that_cannot_be_are_one_line(folder, tiny_data, name, value):
    newest, _ = paths(folder, tiny_data)
    damaged = load(newest)
    torch.save(damaged | {"options": damaged["options"] | {name: value}}, newest)
    line = failure(run_here("train.py", "--resume", "--output_folder", folder))
    assert str(newest) in line and f"--{name}" in line


@pytest.mark.slow
def test_inside_an_epoch_what_its_order_follows_from_is_asked_for(
    folder, tiny_data, monkeypatch
):  # fmt: skip
    count = training.Training._count

    def interrupted(self, step):
        count(self, step)
        if self.state.step == 1:  # it is seen in the next one
            os.kill(os.getpid(), signal.SIGTERM)

    run = ["train.py", "--resume", "--output_folder", folder]
    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_count", interrupted)
        process = run_here(*run, "--epochs", 4)
    assert process.returncode == 128 + signal.SIGTERM, process.stderr
    assert "after 2 epochs and 2 steps of stage decoder" in process.stdout, process.stdout
    line = failure(run_here(*run, "--batch_size", 45, "--seed", 4))
    assert "continue it with --batch_size 30 --seed 3, as before, until the epoch" in line
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "world_size", 2)
        data = training_data.TrainingData.__new__(training_data.TrainingData)
        data.sampler = type("Sampler", (), {"batch_size": 3, "seed": 3})
        data.views, data.changes, data.accumulate = 1, None, 1
        order = {"images": 3, "views": 1, "seed": 3, "processes": 4}
        assert data.differences(order, {}) == "4 processes (torchrun --nproc_per_node 4)"
    process = run_here(*run, "--batch_size", 35)  # which are as many images
    assert process.returncode == 0, process.stderr
    assert load(paths(folder, tiny_data)[0])["epoch"] == 4


# ------------------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize("kind", ["missing", "a folder", "text", "weights", "a model"])
def test_a_checkpoint_of_no_use_is_found_before_data_are_made(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pth.tar"
    if kind == "a folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("no checkpoint")
    elif kind != "missing":
        torch.save({"fc.weight": torch.zeros(2)}, path)
    line = failure(run_here("train.py", "--checkpoint", path))
    assert str(path) in line
    assert not (tmp_path / "data").exists()


def test_fine_tuning_without_a_decoder_is_refused_before_data_are_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--stage decoder" in failure(run_here("train.py", "--stage", "finetune"))
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(
    ("typed", "theirs"),
    [
        (["--decoder_dim", 9], "--decoder_dim 8"),
        (["--encoder", "resnet18", "--gate", "channel"], f"--encoder {OFFLINE} --gate scalar"),
        (["--no-deep_output"], "--deep_output"),
        (["--encoder_weights", "other.pth"], "no --encoder_weights"),
    ],
)
@pytest.mark.parametrize("way", ["resume", "checkpoint"])
def test_other_model_options_are_refused(folder, tiny_data, tmp_path, typed, theirs, way):
    before = contents(folder)
    where = ["--resume", "--output_folder", folder]
    if way == "checkpoint":
        output = tmp_path / "other"
        where = ["--checkpoint", paths(folder, tiny_data)[0], "--output_folder", output]
    line = failure(run_here("train.py", *where, *typed))
    assert " ".join(map(str, typed)) in line and f"the checkpoint's, with {theirs}:" in line
    assert "recipe" not in line
    assert contents(folder) == before


@pytest.mark.slow
def test_the_model_in_force_is_what_is_saved_and_shown(folder, tiny_data):
    """Also after a run whose checkpoint says what was asked for."""
    newest, _ = paths(folder, tiny_data)
    other = load(newest)
    asked = other["options"] | {"decoder_dim": 9, "gate": "channel", "encoder": "resnet18"}
    torch.save(other | {"options": asked}, newest)
    process = run_here(
        *("train.py", "--resume", "--output_folder", folder, "--epochs", 3, "--dropout", 0.5),
        *("--decoder_dim", 8, "--tensorboard"),
    )
    assert process.returncode == 0, process.stderr
    found = load(newest)
    expected = {"decoder_dim": 8, "gate": "scalar", "encoder": OFFLINE, "dropout": 0.5}
    assert {name: found["options"][name] for name in expected} == expected
    assert found["decoder_config"]["dropout"] == 0.5
    events = EventAccumulator(str(folder / "tensorboard" / tiny_data[1])).Reload()
    data = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    shown = HParamsPluginData.FromString(data).session_start_info.hparams
    assert shown["decoder_dim"].number_value == 8 and shown["dropout"].number_value == 0.5
    assert shown["gate"].string_value == "scalar" and shown["encoder"].string_value == OFFLINE


def test_training_options_are_all_the_runs(folder, tiny_data):
    """None of those that are kept is left out of what a run takes from its checkpoint."""
    newest, _ = paths(folder, tiny_data)
    run_here("train.py", "--resume", "--output_folder", folder, "--epochs", 3)
    kept = load(newest)["options"]
    usual = vars(TrainingConfig()) | {"scst_lr": 5e-5}  # the decoder's own
    for name, value in usual.items():
        assert kept[name] == OPTIONS.get(name, value if name != "epochs" else 3) or name == "epochs"
