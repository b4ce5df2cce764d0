"""What training does between epochs: learning rate, early stopping, both stages' schedules."""

import json
import math
import os
import random
import shutil
import signal
import subprocess

import h5py
import pytest
import torch
from conftest import OFFLINE, ROOT, run_here, run_script
from torch import nn

import checkpoints
import datasets
import fused
import input_files
import objectives
import train
import training
from groundwork import files
from groundwork.errors import UserError
from optimization import load_optimizer

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


@pytest.mark.slow
def test_without_a_better_bleu_the_rate_falls_and_training_stops(tiny_data, tmp_path):
    """A rate of nothing never improves on the first epoch."""
    found, printed = rates(
        tiny_data, tmp_path, "--decoder_lr", 1e-30, "--patience", 2, "--stop_after", 5
    )
    # the first epoch is the best; after two without a better one × 0.8, stop after five
    assert found == pytest.approx([r * 1e-30 for r in (1, 1, 1, 0.8, 0.8, 0.64)])
    assert "no better BLEU-4 for 5 epochs" in printed


@pytest.mark.slow
def test_the_cosine_schedule_ends_near_zero(tiny_data, tmp_path):
    found, _ = rates(tiny_data, tmp_path, "--schedule", "cosine", "--epochs", 4)
    start = train.DEMO_DEFAULTS["decoder_lr"]
    expected = [start * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert found == pytest.approx(expected)


@pytest.mark.slow
def test_a_recipe_is_several_options_and_those_typed_beside_it_win(tiny_data, tmp_path):
    bare = {"encoder_stages": "last", "feature_norm": "none", "query": "state", "gate": "scalar"}
    for name, arguments, expected in (
        ("paper", [], bare | {"deep_output": False, "alpha_c": 1.0, "attention_dim": 8}),
        ("paper", ["--query", "word"], bare | {"query": "word", "alpha_c": 1.0}),
        ("attending", [], {"encoder_stages": "16 32", "feature_norm": "layer", "query": "word",
                           "deep_output": True, "alpha_c": 0.0}),
    ):  # fmt: skip
        output = tmp_path / f"{name}{len(arguments)}"
        rates(tiny_data, output, "--epochs", 1, "--recipe", name, *arguments)
        path = checkpoints.checkpoint_path(output, tiny_data[1])
        found = checkpoints.load_checkpoint(path)["options"]
        assert {option: found[option] for option in expected} == expected
        assert "recipe" not in found


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


@pytest.mark.slow
def test_resuming_names_what_it_takes_and_what_it_cannot(tiny_data, tmp_path):
    _, base = tiny_data
    rates(tiny_data, tmp_path, "--epochs", 1)
    found, printed = rates(tiny_data, tmp_path, "--epochs", 2, "--resume", "--alpha_c", 0.5)
    assert len(found) == 2
    (line,) = [line for line in printed.splitlines() if "other options than its run had" in line]
    assert line.endswith(": --epochs 2 --alpha_c 0.5")

    folder = ["--data_folder", tiny_data[0], "--output_folder", tmp_path]
    newest, best = (
        checkpoints.checkpoint_path(tmp_path, base, best=best) for best in (False, True)
    )
    torch.save(checkpoints.load_checkpoint(newest) | {"stage": "finetune"}, newest)
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
import torch, train, metrics
from groundwork import errors, files
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
watch(files, "flush")
watch(os, "replace")
watch(metrics, "bleu")
errors.run(train.main)
"""


@pytest.fixture(scope="module")
def undisturbed(tiny_data, tmp_path_factory):
    """A run of both stages: its arguments and its last checkpoint."""
    folder, base = tiny_data
    run = ["--data_folder", folder, "--encoder", OFFLINE, *SMALL, "--device", "cpu", "--epochs", 2]
    run += ["--batch_size", 30, "--finetune_batch_size", 30, "--stage", "both", "--views", 3]
    run += ["--save_every", 1, "--patience", 1]
    output = tmp_path_factory.mktemp("undisturbed")
    process = run_here("train.py", *run, "--output_folder", output)
    assert process.returncode == 0, process.stderr
    return run, checkpoints.load_checkpoint(checkpoints.checkpoint_path(output, base))


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
            if key not in ("seconds", "captions_per_second", "output_folder", "resume", "records"):
                yield from flatten(inner, f"{name}/{key}")
    else:
        yield name, value


def assert_equal_runs(undisturbed, folder, base):
    found = checkpoints.load_checkpoint(checkpoints.checkpoint_path(folder, base))
    leaves = dict(flatten(found))
    expected = dict(flatten(undisturbed[1]))
    assert leaves.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(leaves[name], value) if torch.is_tensor(value) else leaves[name] == value
        assert same, name
    lines = (folder / f"log_{base}.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found["log"]
    assert not list(folder.glob("*.tmp"))


@pytest.mark.slow
def test_a_signal_while_features_are_cached_ends_at_once(undisturbed, tiny_data, tmp_path):
    """Nothing is lost: what was cached stays."""
    folder, data = tmp_path / "data", tiny_data[0]
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("*FEATURES*"))
    code = DISTURBED.replace('watch(metrics, "bleu")', 'import features\nwatch(features, "_fill")')
    code = code.replace('watch(torch, "save")\n', "").replace('watch(files, "flush")\n', "")
    (tmp_path / "caching.py").write_text(code)
    run = [folder if argument == data else argument for argument in undisturbed[0]]
    process = run_script(
        tmp_path / "caching.py", int(signal.SIGTERM), 1, *run, "--output_folder", tmp_path / "run",
        env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.returncode == -signal.SIGTERM, process.stderr
    assert list(folder.glob("*FEATURES*.part"))


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_one_never_stopped(undisturbed, tiny_data, tmp_path):
    moments = random.Random(20)
    killed = 0
    while killed < 20:
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


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_stops_after_a_checkpoint(number, undisturbed, tiny_data, tmp_path):
    process = disturb(undisturbed, tmp_path, number, 3)
    assert process.returncode == 128 + number, process.stderr
    assert not list((tmp_path / "run").glob("BEST*")), "nothing is best before it is validated"
    assert f"stopped by {number.name}" in process.stdout
    assert "--resume" in process.stdout.splitlines()[-1]
    assert "Traceback" not in process.stderr
    process = run_here("train.py", *undisturbed[0], "--output_folder", tmp_path / "run", "--resume")
    assert process.returncode == 0, process.stderr
    assert "resuming from" in process.stdout
    assert_equal_runs(undisturbed, tmp_path / "run", tiny_data[1])


# ------------------------------------------------------------------------------------ numerics


def run_tiny(tiny_data, output, *arguments):
    """Trains a small decoder; the process, and where its newest checkpoint is."""
    folder, base = tiny_data
    process = run_here(
        "train.py", "--data_folder", folder, "--output_folder", output, "--encoder", OFFLINE,
        "--stage", "decoder", "--device", "cpu", "--batch_size", 20, *SMALL, *arguments,
    )  # fmt: skip
    return process, checkpoints.checkpoint_path(output, base)


def spoil(monkeypatch, factors):
    """Multiplies the loss of training's steps by the factors, then by 1."""
    factors, loss = iter(factors), objectives.caption_loss

    def spoilt(*arguments):
        value = loss(*arguments)
        return value * next(factors, 1.0) if value.requires_grad else value

    monkeypatch.setattr(objectives, "caption_loss", spoilt)


@pytest.mark.parametrize(
    ("factor", "reason"),
    # a finite loss whose gradients are beyond float32
    [(math.nan, "the loss is nan"), (-math.inf, "the loss is -inf"), (3e38, "a gradient is not")],
)
def test_a_step_that_is_not_finite_is_skipped(tiny_data, tmp_path, monkeypatch, factor, reason):
    if factor == 3e38:
        clean = objectives.caption_loss
        monkeypatch.setattr(
            objectives, "caption_loss", lambda *arguments: _Overflow.apply(clean(*arguments))
        )
        _Overflow.steps = {2}
    else:
        spoil(monkeypatch, [1.0, factor])
    process, path = run_tiny(tiny_data, tmp_path, "--epochs", 1)
    assert process.returncode == 0, process.stderr
    skipped = [line for line in process.stdout.splitlines() if "skipped" in line]
    assert (
        len(skipped) == 1 and f"step 2 of epoch 1, stage decoder, skipped: {reason}" in skipped[0]
    )
    state = checkpoints.load_checkpoint(path, checkpoints.RUN_KEYS)  # all values finite
    steps = {int(value["step"]) for value in state["optimizer"]["state"].values()}
    assert steps == {3}  # of four
    assert math.isfinite(state["log"][0]["loss"])


class _Overflow(torch.autograd.Function):
    """A loss whose gradient is infinite at some steps."""

    steps, count = set(), 0

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        _Overflow.count += 1
        return grad * (math.inf if _Overflow.count in _Overflow.steps else 1.0)


def test_many_such_steps_stop_training_with_the_last_good_checkpoint(
    tiny_data, tmp_path, monkeypatch
):
    process, path = run_tiny(tiny_data, tmp_path, "--epochs", 1)
    before = path.read_bytes()
    # two skipped, one good, then five skipped within the epoch of eight steps
    spoil(monkeypatch, [math.nan] * 2 + [1.0] + [math.nan] * 9)
    run = ["--epochs", 9, "--resume", "--save_every", 5, "--batch_size", 10]
    process, _ = run_tiny(tiny_data, tmp_path, *run)
    assert process.returncode == 1
    line = process.stderr.splitlines()[-1]
    assert f"{training.SKIPS} steps in a row skipped" in line and f"{path} and " in line
    assert process.stdout.count("skipped: the loss is nan") == 7
    assert path.read_bytes() == before
    checkpoints.load_checkpoint(path, checkpoints.RUN_KEYS)


def test_an_epoch_whose_last_step_was_skipped_is_saved(tiny_data, tmp_path, monkeypatch):
    spoil(monkeypatch, [1.0, 1.0, 1.0, math.nan])
    process, path = run_tiny(tiny_data, tmp_path, "--epochs", 1)
    assert process.returncode == 0, process.stderr
    assert "step 4 of epoch 1, stage decoder, skipped" in process.stdout
    assert checkpoints.load_checkpoint(path)["epoch"] == 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # which shows where the operation was called
def test_detect_anomaly_names_the_operation(tiny_data, tmp_path, monkeypatch):
    loss = objectives.caption_loss
    monkeypatch.setattr(
        objectives,
        "caption_loss",
        lambda *arguments: (value := loss(*arguments)) + 0 * (value - value).sqrt(),
    )
    process, _ = run_tiny(tiny_data, tmp_path, "--epochs", 1, "--detect_anomaly")
    assert process.returncode == 1
    line = process.stderr.splitlines()[-1]
    assert "step 1 of epoch 1" in line and "SqrtBackward0" in line
    assert not torch.is_anomaly_enabled()


@pytest.mark.slow
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
        ),
    ],
)
def test_deterministic_runs_end_with_equal_weights(tiny_data, tmp_path, device):
    folder, base = tiny_data
    run = ["--data_folder", folder, "--encoder", OFFLINE, *SMALL, "--epochs", 1, "--deterministic"]
    run += ["--batch_size", 30, "--finetune_batch_size", 30, "--views", 3, "--device", device]
    run += ["--stage", "both"]
    states = []
    for name in ("first", "second"):
        process = run_script(
            "train.py", *run, "--stage", "both", "--output_folder", tmp_path / name
        )
        assert process.returncode == 0, process.stderr
        states.append(
            checkpoints.load_checkpoint(checkpoints.checkpoint_path(tmp_path / name, base))
        )
    for part in ("encoder", "decoder"):
        assert states[0][part].keys() == states[1][part].keys()
        for name, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][name]), name


# -------------------------------------------------------------------------------- its surroundings


def test_a_second_run_into_the_folder_is_refused(tiny_data, tmp_path):
    path = checkpoints.checkpoint_path(tmp_path, tiny_data[1])
    with files.sole_writer(path, "wait"):
        process, _ = run_tiny(tiny_data, tmp_path, "--epochs", 1)
    assert process.returncode == 1
    line = process.stderr.splitlines()[-1]
    assert f"another run is writing {path}" in line and "--output_folder" in line
    assert not path.exists()
    process, _ = run_tiny(tiny_data, tmp_path, "--epochs", 1)
    assert process.returncode == 0, process.stderr


def usage(free):
    return lambda _: shutil._ntuple_diskusage(10**12, 10**12 - free, free)


@pytest.mark.slow
def test_a_folder_without_room_for_a_checkpoint_is_found_at_the_start(
    tiny_data, tmp_path, monkeypatch
):
    process, path = run_tiny(tiny_data, tmp_path / "first", "--epochs", 1)
    assert process.returncode == 0 and process.stderr == ""
    size, before = path.stat().st_size, path.read_bytes()

    monkeypatch.setattr(shutil, "disk_usage", usage(int(0.9 * size)))
    process, other = run_tiny(tiny_data, tmp_path / "second", "--epochs", 1)
    assert process.returncode == 1 and "stage decoder:" not in process.stdout
    line = process.stderr.splitlines()[-1]
    assert str(tmp_path / "second") in line and "--output_folder" in line
    assert float(line.split("takes ")[1].split(" MB")[0]) == pytest.approx(size / 1e6, rel=0.05)
    assert not list(other.parent.glob("*.pth.tar"))
    # a run that goes on keeps its two checkpoints meanwhile; one that is given up makes room
    process, _ = run_tiny(tiny_data, path.parent, "--epochs", 2, "--resume")
    assert process.returncode == 1 and "MB free" in process.stderr
    assert path.read_bytes() == before
    process, _ = run_tiny(tiny_data, path.parent, "--epochs", 1, "--overwrite")
    assert process.returncode == 0, process.stderr
    assert "two are kept, and a third is written beside them" in process.stderr

    monkeypatch.setattr(shutil, "disk_usage", usage(int(3.1 * size)))
    process, _ = run_tiny(tiny_data, tmp_path / "third", "--epochs", 1)
    assert process.returncode == 0 and process.stderr == ""


def test_room_for_fine_tuning_is_looked_for_at_the_start(tiny_data, tmp_path, monkeypatch):
    """Adam's means of the encoder come on top."""
    process, decoder = run_tiny(tiny_data, tmp_path, "--epochs", 1)
    assert process.returncode == 0, process.stderr
    monkeypatch.setattr(shutil, "disk_usage", usage(int(1.5 * decoder.stat().st_size)))
    process, _ = run_tiny(tiny_data, tmp_path / "both", "--epochs", 1, "--stage", "both")
    assert process.returncode == 1 and "stage decoder:" not in process.stdout
    assert "MB free" in process.stderr.splitlines()[-1]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts as root")
def test_a_folder_that_is_read_only_is_found_at_the_start(tiny_data, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(output)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount")
    try:
        process, _ = run_tiny(tiny_data, output, "--epochs", 1)
    finally:
        subprocess.run(["umount", str(output)], check=True)
    assert process.returncode == 1
    line = process.stderr.splitlines()[-1]
    assert "Read-only file system" in line and str(output) in line
    assert "stage decoder:" not in process.stdout and "caching" not in process.stdout


def test_the_attention_is_built_before_training(tiny_data, tmp_path, monkeypatch):
    def build(device):
        raise UserError(f"built for {device}")

    monkeypatch.setattr(fused, "build", build)
    process, _ = run_tiny(tiny_data, tmp_path, "--epochs", 1)
    assert process.stderr == "error: built for cpu"
    assert "stage decoder:" not in process.stdout and "caching" not in process.stdout


def test_the_optimizer_of_another_model_is_refused():
    layer = nn.Linear(3, 2)
    adam = torch.optim.Adam(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    adam.step()
    saved = adam.state_dict()
    state, [group] = saved["state"], saved["param_groups"]
    load_optimizer(adam, saved)
    thin = torch.zeros(1).expand(2, 3)[:, :0]
    for damaged in (
        {"param_groups": []},
        {"param_groups": [group | {"lr": "x"}]},
        {"param_groups": [group | {"params": [0]}]},
        {"state": state | {0: {key: torch.zeros(3) for key in state[0]}}},
        {"state": state | {0: state[0] | {"exp_avg": torch.zeros(())}}},
        {"state": state | {0: state[0] | {"exp_avg": thin}}},
        {"state": state | {0: {"step": state[0]["step"]}}},
        {"state": state | {0: state[0] | {"step": torch.zeros(2)}}},
        {"state": state | {999: state[0]}},
        {"state": 5},
    ):
        with pytest.raises(UserError, match="optimizer is of another model"):
            load_optimizer(adam, saved | damaged)


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        ({"schedule": {"step": 5}}, "schedule is damaged"),
        ({"random": [[torch.zeros(3, dtype=torch.uint8), None]]}, "random state is damaged"),
    ],
)
def test_a_damaged_state_is_not_continued(tiny_data, tmp_path, damaged, words):
    process, path = run_tiny(tiny_data, tmp_path, "--epochs", 1)
    torch.save(checkpoints.load_checkpoint(path, checkpoints.RUN_KEYS) | damaged, path)
    process, _ = run_tiny(tiny_data, tmp_path, "--epochs", 2, "--resume")
    assert process.returncode == 1
    assert words in process.stderr.splitlines()[-1] and "Traceback" not in process.stderr


@pytest.mark.slow
def test_the_record_says_what_the_run_was_made_with(tiny_data, tmp_path, monkeypatch):
    folder, base = tiny_data
    run_tiny(tiny_data, tmp_path, "--epochs", 1, "--seed", 5)
    _, path = run_tiny(tiny_data, tmp_path, "--epochs", 2, "--seed", 5, "--resume")
    record = json.loads((tmp_path / f"run_{base}.json").read_text())
    assert record["options"]["epochs"] == 2 and record["options"]["decoder_dim"] == 8
    first, second = record["runs"]  # it was started twice
    for run in (first, second):
        assert run["torch"] == torch.__version__ and run["seed"] == 5 and run["seconds"] > 0
        assert run["data"].startswith(base)
    assert first["started"] <= second["started"]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    expected = commit.stdout.strip() if commit.returncode == 0 else "not in git"
    assert expected in first["code"]

    monkeypatch.setenv("PATH", "")  # no Java, which takes seconds
    process = run_here("eval.py", "--checkpoint", path, "--data_folder", folder, "--device", "cpu",
                       "--results_folder", tmp_path)  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("trained from") == 2
    assert first["code"] in process.stdout and first["data"] in process.stdout


def test_the_fingerprint_changes_with_the_data(tiny_data, tmp_path):
    folder, base = tiny_data
    for path in folder.glob(f"*{base}*"):
        shutil.copy(path, tmp_path)
    same = datasets.describe_data(tmp_path, base)
    assert same == datasets.describe_data(folder, base)
    with h5py.File(input_files.input_path(tmp_path, base, "IMAGES", "VAL"), "r+") as file:
        file["images"][0, 0, 0, 0] ^= 1
    changed = datasets.describe_data(tmp_path, base)
    captions = input_files.input_path(tmp_path, base, "CAPTIONS", "TRAIN")
    captions.write_text(captions.read_text() + " ")
    assert len({same, changed, datasets.describe_data(tmp_path, base)}) == 3


@pytest.mark.slow
def test_overwriting_gives_up_what_the_run_does_not_continue(tiny_data, tmp_path):
    """No older best is left beside a run from elsewhere, and no fine-tuning goes on."""
    _, base = tiny_data
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        rates(tiny_data, folder, "--epochs", 1)
    newest, best = (checkpoints.checkpoint_path(second, base, best=best) for best in (False, True))
    torch.save(checkpoints.load_checkpoint(best) | {"best_bleu4": 2.0}, best)  # the older run's
    start = checkpoints.checkpoint_path(first, base)
    rates(tiny_data, second, "--epochs", 2, "--checkpoint", start, "--overwrite")
    assert checkpoints.load_checkpoint(best)["best_bleu4"] < 2

    tuned = checkpoints.load_checkpoint(best) | {"stage": "finetune", "epoch": 7}
    for path in (newest, best):
        torch.save(tuned, path)
    rates(tiny_data, second, "--epochs", 1, "--stage", "finetune", "--overwrite")
    assert checkpoints.load_checkpoint(newest)["epoch"] == 1
