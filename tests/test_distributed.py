"""Two processes against one: the same parameters, scores and captions."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import OFFLINE, ROOT, run_script

import checkpoints
from contract import DECODERS
from encoders import Encoder
from models import DecoderWithAttention, LSTMConfig

TRAIN = ["--encoder", OFFLINE, "--encoded_image_size", 3, "--dropout", 0, "--amp", "off"]
TRAIN += [f"--{name}_dim=32" for name in ("attention", "embed", "decoder")]
TRAIN += ["--batch_size", 30, "--finetune_batch_size", 40, "--device", "cpu", "--views", 2]


def run_torchrun(count):
    """What `run_script` does, by `torchrun --nproc_per_node=COUNT SCRIPT …`."""

    def run(script, *arguments):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return subprocess.run(
            [*torchrun, f"--nproc_per_node={count}", str(ROOT / script), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )

    return run


run_two = run_torchrun(2)


STEPS = """
import sys, torch
import checkpoints, contract, decoding, engine
from config import TrainingConfig
from groundwork import distributed
from objectives import CrossEntropy, caption_loss
from optimization import Updates
from self_critical import SelfCritical
sizes = {"vocab_size": 20, "encoder_dim": 6, "encoded_image_size": 3, "dropout": 0.0}
found = {}

def train(name):
    torch.manual_seed(0)
    decoder = checkpoints.new_decoder(name, sizes)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    for step in range(4):
        features, captions = torch.rand(5, 3, 3, 6), torch.randint(20, (5, 4, 12))
        lengths = torch.randint(2, 13, (5, 4))
        mine = distributed.share(5)
        counts = torch.tensor([float((lengths[mine] - 1).sum()), 4.0 * len(mine)])
        counts = distributed.add_up(counts)
        outputs = decoder(features[mine], captions[mine].flatten(0, 1), lengths[mine].flatten())
        loss = caption_loss(*outputs, sizes=counts)
        optimizer.zero_grad()
        loss.backward()
        distributed.add_up_gradients(decoder.parameters())
        optimizer.step()
    loss = distributed.add_up(loss.detach())
    order = distributed.collect([10 * i for i in mine])
    found.update({"order": torch.tensor(order), f"{name} loss": loss})
    found.update({f"{name} {key}": value for key, value in decoder.state_dict().items()})

def update():  # three times, the last of one batch, with all that goes with an update
    torch.manual_seed(0)
    decoder = checkpoints.new_decoder("lstm", sizes)
    network = engine.Network(None, decoder, torch.device("cpu"), amp=False)
    config = TrainingConfig(warmup=2, weight_decay=0.1, ema=0.8)
    updates = Updates({"decoder": decoder}, {"decoder_lr": 1e-2}, config)
    for group in updates.optimizer.param_groups:
        group["eps"] = 0.1  # else Adam makes a full step of a gradient that is but rounding
    batches = []
    for images in (5, 3, 4, 2, 4):
        features, captions = torch.rand(images, 3, 3, 6), torch.randint(20, (images, 4, 12))
        lengths = torch.randint(2, 13, (images, 4))
        mine = distributed.share(images)
        batches.append([part[mine] for part in (features, captions, lengths)])
    losses, means = [], engine.Means()
    engine.train_epoch(
        network, batches, CrossEntropy(label_smoothing=0.1), updates.optimizer, 5.0, means,
        lambda: [False], lambda step: losses.append(step.loss), 2,
    )
    found["update losses"] = torch.tensor(losses)
    averaged = updates.averaged()["decoder"].state_dict()
    found.update({f"update {key}": value for key, value in averaged.items()})
    assert updates.count == 3

def worth(captions, people):
    return [(sum(words) % 7 + len(people)) / 20 for words in captions]

def draw_and_train(name):
    # self-critical steps whose words are drawn by numbers that are each image's own
    torch.manual_seed(0)
    words = {"<pad>": 0, "<unk>": 1, "<start>": 2, "<end>": 3} | {str(i): i for i in range(4, 20)}
    decoder = checkpoints.new_decoder(name, sizes).train()
    network = engine.Network(None, decoder, torch.device("cpu"), False)
    optimizer, means = torch.optim.SGD(decoder.parameters(), lr=0.1), engine.Means("reward")
    slots, decode = [], decoder.step
    def noted(words, state, memory, rows):  # which captions are still there
        slots.append(rows.slots)
        return decode(words, state, memory, rows)
    decoder.step = noted
    for step in range(3):
        features, captions = torch.rand(5, 3, 3, 6), torch.randint(20, (5, 4, 12))
        lengths, numbers = torch.randint(2, 13, (5, 4)), torch.rand(7, 5, 3)
        mine, draws = distributed.share(5), iter(numbers)
        own = SelfCritical(worth, words, 6, samples=3, share=0.3)
        def drawn(p, generator=None):
            at = next(draws)[mine].flatten()[slots[-1]].unsqueeze(1)
            return (p.cumsum(1) < at * p.sum(1, keepdim=True)).sum(1, keepdim=True)
        decoding.drawn_from = drawn
        batch = features[mine], captions[mine], lengths[mine]
        done = engine.train_step(network, [batch], own, optimizer, 0.1, means, [])
        assert done.fault is None
    total = means.add_up(network.device)
    found.update({f"{name} drawn {key}": torch.tensor(total[key]) for key in total.sums})
    found.update({f"{name} drawn {key}": value for key, value in decoder.state_dict().items()})

with distributed.group(torch.device("cpu")):
    update()
    for name in contract.DECODERS:
        train(name)
        draw_and_train(name)
if distributed.is_main:
    torch.save(found, sys.argv[1])
"""


@pytest.mark.slow
def test_steps_shared_out_equal_steps_of_one_process(tmp_path, monkeypatch):
    """Of every decoder. Five images: the processes have not as many each."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "steps.py").write_text(STEPS)
    runs = []
    for run in (run_script, run_two):
        result = tmp_path / f"{len(runs)}.pt"
        process = run(tmp_path / "steps.py", result)
        assert process.returncode == 0, process.stderr
        runs.append(torch.load(result, weights_only=True))
    assert len({name.split()[0] for name in runs[0]}) == 2 + len(DECODERS)
    for name, expected in runs[0].items():
        torch.testing.assert_close(runs[1][name], expected, rtol=1e-5, atol=1e-6)
    assert runs[0]["order"].tolist() == [0, 10, 20, 30, 40]


@pytest.fixture(scope="module")
def runs(tiny_data, tmp_path_factory):
    """Folders of the same training by one process and by two, both stages."""
    folder, _ = tiny_data
    runs = []
    for run in (run_script, run_two):
        output = tmp_path_factory.mktemp(run.__name__)
        process = run(
            *("train.py", "--data_folder", folder, "--output_folder", output),
            *(*TRAIN, "--stage", "both", "--epochs", 2),
        )
        assert process.returncode == 0, process.stderr
        assert process.stdout.count("the best so far") >= 1
        runs.append((output, process.stdout))
    return runs


@pytest.mark.slow
def test_two_processes_train_the_same_parameters_as_one(runs, tiny_data):
    one, two = (
        torch.load(checkpoints.checkpoint_path(output, tiny_data[1]), weights_only=True)
        for output, _ in runs
    )
    torch.manual_seed(0)
    encoder = Encoder(OFFLINE, 3, stages=one["encoder_stages"])
    decoder = DecoderWithAttention(LSTMConfig(**one["decoder_config"]))
    # Adam makes a full step of a gradient that is nothing but rounding, as the encoder's are here,
    # so the parameters are compared as a whole, with how far training has brought them
    for part, start, apart in (("encoder", encoder, 0.25), ("decoder", decoder, 0.05)):
        come = distance(one[part], start.state_dict())
        assert come > 0
        assert distance(one[part], two[part]) < apart * come, part


def distance(a, b):
    return sum(float((a[name] - b[name]).double().square().sum()) for name in a) ** 0.5


@pytest.mark.slow
def test_two_processes_report_what_one_does_and_write_it_once(runs, tiny_data):
    (one, said), (two, said_by_two) = runs
    logs = [
        [json.loads(line) for line in (folder / f"log_{tiny_data[1]}.jsonl").open()]
        for folder in (one, two)
    ]
    assert len(logs[0]) == len(logs[1]) == 4
    for expected, found in zip(*logs, strict=True):
        for name in ("loss", "val_loss"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3), name
        for name in ("top5", "val_top5", "bleu1", "bleu4"):  # a few words may change places
            assert found[name] == pytest.approx(expected[name], abs=0.05), name
    assert said_by_two.count("epoch ") == said.count("epoch ")
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}


@pytest.mark.slow
def test_two_processes_evaluate_to_the_same_captions(runs, tiny_data, tmp_path):
    (folder, _), _ = runs
    checkpoint = checkpoints.checkpoint_path(folder, tiny_data[1])
    results = []
    for run in (run_script, run_two):
        output = tmp_path / run.__name__
        process = run(
            *("eval.py", "--checkpoint", checkpoint, "--results_folder", output),
            *("--beam_size", 1, 3, "--batch_size", 3, "--device", "cpu", "--amp", "off"),
        )
        assert process.returncode == 0, process.stderr
        results.append(
            [path.read_text() for path in sorted(output.iterdir())]
            + [line for line in process.stdout.splitlines() if line.startswith("|")]
        )
    assert results[0] == results[1]
    assert len(results[0]) >= 2 + 4 + 4  # files, and tables of two lines and a row a beam


@pytest.mark.slow
def test_a_batch_smaller_than_the_group_is_refused(tiny_data, tmp_path):
    process = run_two(
        *("train.py", "--data_folder", tiny_data[0], "--output_folder", tmp_path),
        *(*TRAIN, "--batch_size", 10),
    )
    assert process.returncode != 0
    assert "use a larger --batch_size" in process.stderr
