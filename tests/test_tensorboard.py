"""What `--tensorboard` writes is what the log says, once, and changes nothing else."""

import errno
import io
import json
import math
import shutil
import signal
import sys
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import OFFLINE, ROOT, failure, run_here, run_script, short_captions
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.io import gfile
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from test_distributed import run_two

import checkpoints
import datasets
import input_files
import parts_of_speech
import training
from attention_pictures import draw_attention
from captioner import Captioner
from groundwork import tensorboard_log

CAPTIONS, STEPS = 80, 3  # of an epoch of the tiny data: 8 images in batches of 3 at most
LONGEST = 6  # words of a caption of validation
RUN = ["--attention_dim", 8, "--embed_dim", 8, "--decoder_dim", 8, "--encoded_image_size", 3]
RUN += ["--encoder", OFFLINE, "--device", "cpu", "--batch_size", 30, "--finetune_batch_size", 30]
RUN += ["--stage", "both", "--epochs", 1, "--decoder_lr", 0.02, "--amp", "off"]
DECODER = ["--stage", "decoder", "--tensorboard"]


@pytest.fixture(scope="module", autouse=True)
def few_words():
    """A panel of an example for each of 50 words takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        short_captions(patch, LONGEST)
        yield


def train_here(tiny_data, output, *arguments):
    process = run_here(
        "train.py", "--data_folder", tiny_data[0], "--output_folder", output, *RUN, *arguments
    )
    assert process.returncode == 0, process.stderr
    return process


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    """The output folder of a run of both stages, and what it printed."""
    output = tmp_path_factory.mktemp("events")
    return output, train_here(tiny_data, output, "--tensorboard").stdout


@pytest.fixture(scope="module")
def decoder_run(run, tiny_data, tmp_path_factory):
    """The output folder of a run of the first stage, two epochs: quick, from cached features."""
    output = tmp_path_factory.mktemp("decoder")
    train_here(tiny_data, output, *DECODER, "--epochs", 2)
    return output


def event_files(output):
    return list((output / "tensorboard").glob("*/events*"))


def read(output, base):
    """The events of a run's folder, as TensorBoard reads them."""
    kept = dict.fromkeys(("scalars", "images", "tensors"), 0)  # all
    events = EventAccumulator(str(output / "tensorboard" / base), kept)
    return events.Reload()


def read_log(output, base):
    return [json.loads(line) for line in (output / f"log_{base}.jsonl").read_text().splitlines()]


def series(events):
    """{tag: [(step, value)]} of the scalars; of how fast it was the steps alone."""
    return {
        tag: [(e.step, tag.startswith("speed") or e.value) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_scalars_are_the_logs(run, tiny_data):
    output, base = run[0], tiny_data[1]
    events, log = read(output, base), read_log(output, base)
    assert [line["stage"] for line in log] == ["decoder", "finetune"]
    own = {key: tag for key, tag in tensorboard_log.TAGS.items() if key in log[0]}
    assert tensorboard_log.TAGS.keys() - own.keys() == {"reward"}  # of captions drawn
    for key, tag in own.items():
        found = events.Scalars(tag)
        assert [e.step for e in found] == [CAPTIONS, 2 * CAPTIONS], tag
        assert [e.value for e in found] == pytest.approx([line[key] for line in log]), tag


def test_every_step_has_its_loss_and_rates(run, tiny_data):
    output, base = run[0], tiny_data[1]
    found, log = series(read(output, base)), read_log(output, base)
    steps = [CAPTIONS * n + CAPTIONS * k // STEPS + 1 for n in range(2) for k in range(STEPS)]
    assert [step for step, _ in found["loss/step"]] == steps
    for n, line in enumerate(log):  # whose loss is a mean over words, not over steps
        losses = [loss for step, loss in found["loss/step"] if 0 < step - CAPTIONS * n <= CAPTIONS]
        assert min(losses) <= line["loss"] <= max(losses)
    rates = found["learning_rate/decoder"]
    expected = [line["lr"] for line in log for _ in range(STEPS)]
    assert [rate for _, rate in rates] == pytest.approx(expected)
    encoder = found["learning_rate/encoder"]
    assert [step for step, _ in encoder] == steps[STEPS:]
    assert "encoder_lr" not in log[0]
    assert [rate for _, rate in encoder] == pytest.approx([log[1]["encoder_lr"]] * STEPS)
    assert encoder[0][1] == pytest.approx(1e-4)  # the default, which is not the decoder's


def test_examples_are_drawn_in_every_epoch(run, tiny_data):
    (output, printed), base = run, tiny_data[1]
    events = read(output, base)
    references = json.loads((tiny_data[0] / f"VAL_REFERENCES_{base}.json").read_text())
    lines = iter(printed.splitlines())
    said = [line.split(": ", 1)[1] for line in lines if line.startswith("  ") and next(lines)]
    assert len(said) == 3 * 2
    assert len(events.Tags()["images"]) == 3
    for number, i in enumerate((0, 3, 6)):
        name = f"{number + 1} {references[i]['filename']}"
        images = events.Images(f"attention/{name}")
        texts = events.Tensors(f"captions/{name}/text_summary")
        for epoch, (image, text) in enumerate(zip(images, texts, strict=True), start=1):
            assert image.step == text.step == CAPTIONS * epoch
            picture = Image.open(io.BytesIO(image.encoded_image_string))
            picture.load()
            assert picture.format == "PNG"
            assert picture.width <= 1320 and 200 < picture.height <= 1320
            assert len(picture.getcolors(2**24)) > 1000  # a photograph
            [contents] = text.tensor_proto.string_val
            assert f"model: {said[3 * (epoch - 1) + number]}\n" in contents.decode()
            assert f"human: {references[i]['captions'][0]}\n" in contents.decode()


def test_where_it_looked_is_measured_in_every_epoch(run, tiny_data):
    """As the finished model looks when it captions the validation images."""
    (output, _), (folder, base) = run, tiny_data
    found = series(read(output, base))
    model = Captioner.load(checkpoints.checkpoint_path(output, base), amp="off")
    images = datasets.open_images(folder, base, "VAL")
    squares = [torch.from_numpy(image) for image in images]
    captions = list(model.caption(squares, beam_size=1, max_words=LONGEST))
    entropies = [scipy.stats.entropy(caption.alphas, axis=1) for caption in captions]
    kinds = [kind for caption in captions for kind in parts_of_speech.kinds(caption.words)]
    evenness = np.concatenate(entropies) / math.log(9)
    moved = [
        abs(after - before).sum() / 2
        for caption in captions
        for before, after in pairwise(caption.alphas.numpy())
    ]
    kinds_moved = [k for caption in captions for k in parts_of_speech.kinds(caption.words)[1:]]
    for kind in set(kinds):
        for name, values, own in (
            ("evenness", evenness, kinds), ("movement", moved, kinds_moved)
        ):  # fmt: skip
            (_, _), (step, value) = found[f"attention {name}/{kind}"]
            expected = np.mean([v for v, k in zip(values, own, strict=True) if k == kind])
            assert step == 2 * CAPTIONS and value == pytest.approx(expected, abs=1e-3)


def test_regions_of_a_file_are_those_that_count(tiny_data, tmp_path):
    """The whole picture is where everything is, at each epoch."""
    folder, base = tiny_data
    references = json.loads((folder / f"VAL_REFERENCES_{base}.json").read_text())
    path = tmp_path / "regions.json"
    path.write_text(json.dumps({r["filename"]: [0, 0, 1, 1] for r in references}))
    words = list(json.loads((folder / f"WORDMAP_{base}.json").read_text()))
    train_here(tiny_data, tmp_path, *DECODER, "--regions", path, "--region_words", *words)
    found = series(read(tmp_path, base))
    for name in ("peak", "attention", "random point", "even attention"):
        assert found[f"attention pointing/{name}"] == [(CAPTIONS, pytest.approx(1))]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"x.jpg": {"star": [0, 0, 1, 1]}}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for arguments, message in (
        (["--regions", tmp_path / "no.json", "--tensorboard"], "no.json"),
        (["--regions", other, "--tensorboard"], "none of which is in this split"),
        (["--regions", path, "--tensorboard"], "--region_words"),
        (["--regions", path, "--region_words", "man"], "--tensorboard"),
        (["--region_words", "man"], "--regions"),
    ):
        where = ["--data_folder", folder, "--output_folder", tmp_path, "--overwrite"]
        assert message in failure(run_here("train.py", *where, *RUN, *arguments))
    assert {path: path.read_bytes() for path in before} == before


def plugin(events, tag):
    return HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content)


def hyperparameters(events):
    return plugin(events, "_hparams_/session_start_info").session_start_info.hparams


def test_hyperparameters_and_the_record_are_shown(run, tiny_data):
    output, base = run[0], tiny_data[1]
    events = read(output, base)
    found = hyperparameters(events)
    assert found["decoder_dim"].number_value == 8 and found["seed"].number_value == 0
    assert found["encoder"].string_value == OFFLINE and found["deep_output"].string_value == "True"
    assert found["precision"].string_value == "float32"
    assert not {"data_folder", "device", "workers", "resume"} & set(found)
    metrics = plugin(events, "_hparams_/experiment").experiment.metric_infos
    tags = {metric.name.tag for metric in metrics}
    assert tags == {"BLEU/BLEU-4", "CIDEr-D/validation", "loss/validation"}
    assert tags <= set(events.Tags()["scalars"])
    [record] = events.Tensors("run/text_summary")
    [expected] = json.loads((output / f"run_{base}.json").read_text())["runs"]
    for name in ("command", "code", "data"):
        assert f"    {name}: {expected[name]}\n" in record.tensor_proto.string_val[0].decode()


@pytest.mark.slow
def test_the_run_is_the_same_without(run, tiny_data, tmp_path):
    train_here(tiny_data, tmp_path)
    assert not (tmp_path / "tensorboard").exists()
    base = tiny_data[1]
    one, two = (
        checkpoints.load_checkpoint(checkpoints.checkpoint_path(output, base))
        for output in (run[0], tmp_path)
    )
    for part in ("encoder", "decoder"):
        for name, tensor in one[part].items():
            assert torch.equal(tensor, two[part][name]), name
    assert torch.equal(one["random"][0][0], two["random"][0][0])
    timed = ("seconds", "captions_per_second")
    for a, b in zip(read_log(run[0], base), read_log(tmp_path, base), strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {
            k: v for k, v in b.items() if k not in timed
        }


# ----------------------------------------------------------------------------- more runs than one

# Kills training at the first checkpoint after some steps and validations.
KILLED = """
import os, signal, sys
import checkpoints, decoding, torch, train, metrics
from groundwork import errors
greedy, longest = decoding.greedy, int(sys.argv.pop(1))
decoding.greedy = lambda *given, max_length, **options: greedy(*given, longest, **options)
steps, validations = int(sys.argv.pop(1)), int(sys.argv.pop(1))
def count(owner, name):
    call, calls = getattr(owner, name), []
    def counted(*arguments, **options):
        calls.append(None)
        return call(*arguments, **options)
    setattr(owner, name, counted)
    return calls
stepped, validated = count(torch.optim.Adam, "step"), count(metrics, "bleu")
def save(*arguments, save=checkpoints.save_checkpoint):
    if len(stepped) >= steps and len(validated) >= validations:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*arguments)
checkpoints.save_checkpoint = save
errors.run(train.main)
"""


@pytest.mark.parametrize(
    ("steps", "validations", "every"),
    [
        (STEPS + 2, 1, 2),
        (STEPS, 1, 1),
        (2 * STEPS, 2, 100),
    ],
    ids=["inside an epoch", "after a validation", "at an epoch's end"],
)
@pytest.mark.slow
def test_after_a_kill_nothing_stands_twice(
    decoder_run, tiny_data, tmp_path, steps, validations, every
):
    """The checkpoint is of some steps before, of the moment before the validation, or of the epoch
    before."""
    (tmp_path / "killed.py").write_text(KILLED)
    more = [*DECODER, "--epochs", 2, "--save_every", every]
    output = tmp_path / "run"
    process = run_script(
        *(tmp_path / "killed.py", LONGEST, steps, validations, "--data_folder", tiny_data[0]),
        *("--output_folder", output, *RUN, *more),
        env={"PYTHONPATH": str(ROOT)},
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    killed = series(read(output, tiny_data[1]))
    # they are on the disk before the checkpoint that says so, or would
    assert len(killed["loss/step"]) == steps
    assert len(killed["loss/validation"]) == validations
    assert "resuming from" in train_here(tiny_data, output, *more, "--resume").stdout
    resumed, whole = read(output, tiny_data[1]), read(decoder_run, tiny_data[1])
    assert series(resumed) == series(whole)
    for tag in whole.Tags()["images"]:
        assert [e.step for e in resumed.Images(tag)] == [e.step for e in whole.Images(tag)]
    assert len(resumed.Tensors("run/text_summary")) == 2


@pytest.mark.slow
def test_overwriting_removes_an_older_runs_events(run, tiny_data, tmp_path):
    output, base = tmp_path / "run", tiny_data[1]
    shutil.copytree(run[0], output)
    train_here(tiny_data, output, *DECODER, "--overwrite")
    assert len(event_files(output)) == 1
    assert [e.step for e in read(output, base).Scalars("loss/validation")] == [CAPTIONS]
    train_here(tiny_data, output, "--stage", "decoder", "--overwrite")
    assert not event_files(output)


@pytest.mark.slow
def test_a_later_stage_continues_the_axis(decoder_run, tiny_data, tmp_path):
    own, base = tmp_path / "own", tiny_data[1]
    shutil.copytree(decoder_run, own)
    train_here(tiny_data, own, "--stage", "finetune", "--tensorboard")
    found = [e.step for e in read(own, base).Scalars("loss/validation")]
    assert found == [CAPTIONS, 2 * CAPTIONS, 3 * CAPTIONS]


@pytest.fixture(scope="module")
def continued(run, decoder_run, tiny_data, tmp_path_factory):
    """The events of a run that goes on from another's checkpoint, with other options, on data of
    which the first validation photograph is twice as wide as high, and others of unknown sizes."""
    folder, output = tmp_path_factory.mktemp("wide") / "data", tmp_path_factory.mktemp("continued")
    shutil.copytree(tiny_data[0], folder)
    path = input_files.input_path(folder, tiny_data[1], "REFERENCES", "VAL")
    references = json.loads(path.read_text())
    for reference in references:
        del reference["width"], reference["height"]
    references[0] |= {"width": 1000, "height": 500}
    path.write_text(json.dumps(references))
    shutil.copytree(run[0] / "tensorboard", output / "tensorboard")
    decoder = checkpoints.checkpoint_path(decoder_run, tiny_data[1])
    other = ["--dropout", 0.25, "--epochs", 3]
    train_here((folder, None), output, *DECODER, "--checkpoint", decoder, *other)
    return read(output, tiny_data[1])


def test_another_runs_checkpoint_begins_anew(continued):
    assert [e.step for e in continued.Scalars("loss/validation")] == [3 * CAPTIONS]


def test_hyperparameters_are_those_in_force(continued):
    """The checkpoint's of the model, but for dropout, and the options' of the training."""
    found = hyperparameters(continued)
    assert found["decoder_dim"].number_value == 8 and found["gate"].string_value == "scalar"
    assert found["dropout"].number_value == 0.25 and found["epochs"].number_value == 3


def test_examples_have_the_photographs_proportions(continued):
    for number, (i, width, height) in enumerate([(0, 96, 48), (3, 96, 96)], start=1):
        [tag] = [tag for tag in continued.Tags()["images"] if f"/{number} " in tag]
        [event] = continued.Images(tag)
        [text] = continued.Tensors(tag.replace("attention/", "captions/") + "/text_summary")
        line = text.tensor_proto.string_val[0].decode().splitlines()[0]
        words = line.partition("model: ")[2].split()
        picture = Image.open(io.BytesIO(event.encoded_image_string))
        blank = Image.new("RGB", (width, height))
        expected = draw_attention(blank, words, torch.ones(len(words), 9))
        assert picture.size == expected.size, i
        if i == 0:
            square = draw_attention(blank.resize((96, 96)), words, torch.ones(len(words), 9))
            assert picture.size != square.size


@pytest.mark.slow
def test_one_of_two_processes_writes(run, tiny_data, tmp_path):
    process = run_two(
        *("train.py", "--data_folder", tiny_data[0], "--output_folder", tmp_path, *RUN),
        "--tensorboard",
    )
    assert process.returncode == 0, process.stderr
    assert len(event_files(tmp_path)) == 1
    found, expected = read(tmp_path, tiny_data[1]), read(run[0], tiny_data[1])
    assert found.Tags()["images"] == expected.Tags()["images"]
    for tag in expected.Tags()["scalars"]:
        steps = [[e.step for e in events.Scalars(tag)] for events in (found, expected)]
        assert steps[0] == steps[1]


# --------------------------------------------------------------------------------------- failures


def test_without_the_package_a_line_says_what_to_install(tiny_data, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    process = run_here("train.py", "--output_folder", tmp_path / "run", "--tensorboard")
    assert failure(process).endswith("pip install tensorboard")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["log_{}.jsonl", "curves_{}.png"])
def test_a_log_that_cannot_be_written_is_named_before_anything_is_done(
    tiny_data, tmp_path, monkeypatch, name
):
    path = tmp_path / name.format(tiny_data[1])
    path.mkdir()
    monkeypatch.setattr(training, "TrainingData", None)  # which may encode for hours
    process = run_here(
        *("train.py", "--data_folder", tiny_data[0], "--output_folder", tmp_path, *RUN)
    )
    assert failure(process).endswith(f"cannot write {path}: Is a directory")


@pytest.mark.parametrize("which", ["folder", "file"])
def test_what_cannot_be_written_is_named_before_training(tiny_data, tmp_path, monkeypatch, which):
    if which == "folder":
        (tmp_path / "tensorboard").write_text("")
        monkeypatch.setattr(training, "TrainingData", None)  # which may encode for hours
    else:
        monkeypatch.setattr(gfile.LocalFileSystem, "write", no_room)
    process = run_here(
        *("train.py", "--data_folder", tiny_data[0], "--output_folder", tmp_path),
        *(*RUN, *DECODER),
    )
    line = failure(process)
    assert "cannot" in line and str(tmp_path / "tensorboard") in line
    assert not list(tmp_path.glob("*.pth.tar"))


def test_an_older_run_is_kept_where_events_cannot_be_written(run, tiny_data, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(run[0], output, ignore=shutil.ignore_patterns("tensorboard"))
    (output / "tensorboard").write_text("")
    before = {path: path.read_bytes() for path in output.iterdir()}
    process = run_here(
        *("train.py", "--data_folder", tiny_data[0], "--output_folder", output, *RUN, *DECODER),
        "--overwrite",
    )
    assert "tensorboard" in failure(process)
    assert {path: path.read_bytes() for path in output.iterdir()} == before


def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("room", [0, 21])  # events: at once, and among the pictures
def test_on_a_full_disk_training_goes_on_without(tiny_data, tmp_path, monkeypatch, room):
    append, written = gfile.LocalFileSystem.append, []

    def fail(self, *arguments):
        written.append(None)
        if len(written) > room:
            no_room()
        append(self, *arguments)

    monkeypatch.setattr(gfile.LocalFileSystem, "append", fail)
    process = train_here(tiny_data, tmp_path, *DECODER)
    [line] = [line for line in process.stderr.splitlines() if "cannot write" in line]
    assert str(tmp_path / "tensorboard") in line and "No space left on device" in line
    assert "Traceback" not in process.stderr
    assert checkpoints.checkpoint_path(tmp_path, tiny_data[1]).exists()
