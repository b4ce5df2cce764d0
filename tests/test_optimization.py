"""Updates: decay, warm-up and averages against loops by hand, and accumulated gradients against one
large batch."""

import copy
import os
import signal

import pytest
import torch
from conftest import OFFLINE, close, run_here
from test_decoders import build, make_batch
from test_train import SMALL, assert_equal_runs
from torch import nn

import checkpoints
import engine
import training
from config import TrainingConfig
from engine import Network
from groundwork.errors import UserError
from objectives import CrossEntropy
from optimization import Updates, make_optimizer
from run_state import RunState


class Part(nn.Module):
    """Has a weight of each kind."""

    def __init__(self):
        super().__init__()
        self.words, self.norm, self.fc = nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 2)
        self.frozen = nn.Linear(3, 2).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(1))

    def loss(self, rows):
        return self.fc(self.norm(self.words(rows))).square().sum()


UPDATES = 12


def steps():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(5, (UPDATES, 4), generator=generator)


def test_updates_are_those_of_a_loop_by_hand():
    """AdamW, not fused, one weight at a time, its rate set before each update."""
    part, rate, decay = Part(), 0.05, 0.3
    begin = copy.deepcopy(part)
    updates = Updates(
        {"decoder": part},
        {"decoder_lr": rate},
        TrainingConfig(warmup=5, weight_decay=decay, ema=0.9),
    )
    own = {name: p.detach().clone().requires_grad_() for name, p in begin.named_parameters()}
    plain = {
        name: torch.optim.AdamW([p], weight_decay=decay if name == "fc.weight" else 0.0)
        for name, p in own.items()
        if not name.startswith("frozen")
    }
    averages = None
    for n, rows in enumerate(steps(), start=1):
        part.seen += 1
        updates.optimizer.zero_grad()
        part.loss(rows).backward()
        updates.optimizer.step()
        assert updates.rates() == pytest.approx([rate * min(1, n / 5)])
        assert updates.optimizer.param_groups[0]["lr"] == rate
        gradients = torch.autograd.grad(
            _loss(own, rows), [own[name] for name in plain], materialize_grads=True
        )
        for (name, optimizer), gradient in zip(plain.items(), gradients, strict=True):
            own[name].grad = gradient
            optimizer.param_groups[0]["lr"] = rate * min(1, n / 5)
            optimizer.step()
        now = {name: p.detach().clone() for name, p in own.items()}
        share = 1 - min(0.9, n / (9 + n))  # the first update's weights are the first average
        averages = averages or now
        averages = {k: a + share * (now[k] - a) for k, a in averages.items()}
    for name, parameter in part.named_parameters():
        close(parameter, own[name])
    averaged = updates.averaged()["decoder"]
    for name, parameter in averaged.named_parameters():
        close(parameter, averages[name])
    assert averaged.seen == part.seen == UPDATES
    assert torch.equal(averaged.frozen.weight, begin.frozen.weight)


def _loss(weights, rows):
    """`Part.loss`, written out."""
    x = weights["words.weight"][rows]
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    x = x * weights["norm.weight"] + weights["norm.bias"]
    return (x @ weights["fc.weight"].T + weights["fc.bias"]).square().sum()


def test_without_decay_it_is_adam_to_the_bit():
    part, other = Part(), Part()
    other.load_state_dict(part.state_dict())
    own = make_optimizer([part], {"decoder_lr": 0.01})
    adam = torch.optim.Adam([p for p in other.parameters() if p.requires_grad], 0.01, fused=True)
    for rows in steps():
        for optimizer, module in ((own, part), (adam, other)):
            optimizer.zero_grad()
            module.loss(rows).backward()
            optimizer.step()
    for a, b in zip(part.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def updated(config, count, checkpoint=None):
    """A part's `Updates` after the first so many steps, or the others, and a checkpoint of them."""
    torch.manual_seed(1)
    part = Part()
    if checkpoint:
        part.load_state_dict(checkpoint["decoder"])
    updates = Updates({"decoder": part}, {"decoder_lr": 0.05}, config)
    if checkpoint:
        updates.restore(copy.deepcopy(checkpoint))  # it keeps tensors of it
    for rows in steps()[count:] if checkpoint else steps()[:count]:
        updates.optimizer.zero_grad()
        part.loss(rows).backward()
        updates.optimizer.step()
    judged = updates.averaged().get("decoder", part)
    state = {"decoder": judged.state_dict(), "optimizer": updates.optimizer.state_dict()}
    own = {"decoder_lr": 0.05, "weight_decay": config.weight_decay}
    return copy.deepcopy(state | {"options": own} | updates.contents()), part


def test_decay_may_begin_or_end_where_a_run_goes_on():
    """Its parameters are grouped otherwise then, and keep their moments."""
    with_decay, without = TrainingConfig(weight_decay=0.1), TrainingConfig()
    for first, second in ((without, with_decay), (with_decay, without)):
        checkpoint, _ = updated(first, 6)
        found, part = updated(second, 6, checkpoint)
        steps_done = {float(state["step"]) for state in found["optimizer"]["state"].values()}
        assert steps_done == {UPDATES}
        # the same by hand: one optimizer, whose groups' decay changes
        torch.manual_seed(1)
        other = Part()
        own = [p for p in other.parameters() if p.requires_grad]
        matrix = other.fc.weight
        others = [p for p in own if p is not matrix]
        adam = torch.optim.AdamW([{"params": [matrix]}, {"params": others}], 0.05, weight_decay=0.0)
        for n, rows in enumerate(steps()):
            adam.param_groups[0]["weight_decay"] = (first if n < 6 else second).weight_decay
            adam.zero_grad()
            other.loss(rows).backward()
            adam.step()
        for a, b in zip(part.parameters(), other.parameters(), strict=True):
            close(a, b)


@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
def test_the_schedule_goes_on_where_decay_begins_or_ends(schedule):
    """Whose rates are of other groups then: they are those of a run whose decay never changes."""

    def begun(weight_decay):
        encoder = nn.Linear(1, 1)
        encoder.fine_tune = lambda fine_tune, stride: encoder.requires_grad_(fine_tune)
        config = TrainingConfig(
            epochs=8, decoder_lr=0.05, schedule=schedule, patience=1, weight_decay=weight_decay
        )
        network = Network(encoder, Part(), torch.device("cpu"), amp=False)
        state = RunState(network, config, "x", {}, vars(config), [{}])
        state.begin("decoder")
        return state

    def epochs(state, count):
        for _ in range(count):
            state.optimizer.step()
            state.end_epoch({"stage": "decoder", "bleu4": 0.5, "val_loss": 1.0})
        return [group["lr"] for group in state.optimizer.param_groups]

    [expected] = set(epochs(begun(0.0), 6))
    assert expected < 0.03
    for first, second in ((0.0, 0.1), (0.1, 0.0)):
        before, after = begun(first), begun(second)
        epochs(before, 3)
        checkpoint = {
            "options": before.options,
            "epoch": 3,
            "epochs_without_improvement": before.waited,
            "optimizer": before.optimizer.state_dict(),
            "schedule": before.schedule.state_dict(),
            "step": 0,
            "partial": before.means.state(),
            "random": [],
        }
        after.log, after.best = list(before.log), before.best
        after.restore(checkpoint, None)
        assert epochs(after, 3) == pytest.approx([expected] * (1 + bool(second)))


def test_averages_begin_or_end_where_a_run_goes_on():
    """Without them training goes on from the weights themselves, as it did with them."""
    averaged, plain = TrainingConfig(ema=0.9), TrainingConfig()
    expected, _ = updated(plain, UPDATES)
    middle, _ = updated(averaged, 6)
    assert not torch.equal(middle["decoder"]["fc.weight"], middle["raw"]["decoder"]["fc.weight"])
    found, _ = updated(plain, 6, middle)
    whole, part = updated(averaged, 6, middle)
    assert "raw" not in found and whole["averaged"] == UPDATES
    for name, tensor in expected["decoder"].items():
        assert torch.equal(found["decoder"][name], tensor), name
        assert torch.equal(part.state_dict()[name], tensor), name
    begun, _ = updated(averaged, 6, updated(plain, 6)[0])
    assert begun["averaged"] == UPDATES - 6
    with pytest.raises(UserError, match="not of its decoder: start anew with --overwrite"):
        updated(averaged, 6, middle | {"raw": {"decoder": {"fc.weight": torch.ones(1)}}})


# ------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("variant", [("lstm", {}), ("transformer", {}), ("merge", {})])
def test_accumulated_gradients_are_those_of_one_large_batch(variant):
    """Of batches of unlike sizes and lengths, clipped once an update; what remains is one more."""
    encoder_out, captions, lengths = make_batch([7, 4, 6, 6, 3, 5, 2, 8, 8, 3, 4, 4], 2)
    captions, lengths = captions.view(6, 2, -1), lengths.view(6, 2)
    objective = CrossEntropy(alpha_c=0.7, label_smoothing=0.1)

    def train(sizes, accumulate):
        decoder = build(variant, std=0.5).train()
        network = engine.Network(None, decoder, torch.device("cpu"), amp=False)
        optimizer, means = torch.optim.SGD(decoder.parameters(), lr=0.5), engine.Means()
        parts = [part.split(sizes) for part in (encoder_out, captions, lengths)]
        taken = []
        engine.train_epoch(
            network, zip(*parts, strict=True), objective, optimizer, 0.02, means, lambda: [False],
            taken.append, accumulate,
        )  # fmt: skip
        assert means.count == int((lengths - 1).sum())
        return decoder.state_dict(), [step.loss for step in taken], means["top5"]

    whole, loss, top5 = train([5, 1], 1)
    parts, losses, accuracy = train([2, 1, 2, 1], 3)
    assert losses == pytest.approx(loss, rel=1e-5) and accuracy == pytest.approx(top5)
    begun = build(variant, std=0.5).state_dict()
    assert any(not torch.equal(begun[name], tensor) for name, tensor in whole.items())
    for name, tensor in whole.items():
        close(parts[name], tensor)


# ---------------------------------------------------------------------------------------- runs


EVERY = ["--warmup", 3, "--weight_decay", 0.1, "--accumulate", 3, "--ema", 0.8]
EVERY += ["--scheduled_sampling", "linear", "--sampling_k", 4, "--sampling_max", 0.5]
EVERY += ["--schedule", "cosine", "--dropout", 0.3, "--save_every", 1]
TUNED = ["--augment", "crop", "mirror", "colour", "--tune_from", 16]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["decoder", "finetune"])
def test_a_run_with_every_option_goes_on_to_the_bit(stage, tiny_data, tmp_path, monkeypatch):
    folder, base = tiny_data
    begin = ["train.py", "--data_folder", folder, "--encoder", OFFLINE, *SMALL, "--device", "cpu"]
    run = [*begin, "--batch_size", 10, "--finetune_batch_size", 10, *EVERY, "--epochs", 2]
    run += ["--stage", stage]
    if stage == "finetune":
        first = tmp_path / "first"
        process = run_here(*begin, "--stage", "decoder", "--epochs", 1, "--output_folder", first)
        assert process.returncode == 0, process.stderr
        run += [*TUNED, "--model", first]
    process = run_here(*run, "--output_folder", tmp_path / "whole")
    assert process.returncode == 0, process.stderr
    whole = checkpoints.load_checkpoint(
        checkpoints.checkpoint_path(tmp_path / "whole", base), checkpoints.RUN_KEYS
    )
    # eight batches, so three updates, an epoch
    assert {int(state["step"]) for state in whole["optimizer"]["state"].values()} == {6}
    assert [line.get("own_words") for line in whole["log"][-2:]] == [0.5, 0.5]
    assert whole["averaged"] == 6
    assert whole["raw"].keys() == {"decoder"} | ({"encoder"} if stage == "finetune" else set())

    counted = training.Training._count

    def interrupted(self, step):
        counted(self, step)
        if self.state.step == 1 and self.state.epoch == 1:  # it is seen in the next one
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_count", interrupted)
        process = run_here(*run, "--output_folder", tmp_path / "halves")
    assert process.returncode == 128 + signal.SIGTERM, process.stderr
    process = run_here("train.py", "--resume", "--output_folder", tmp_path / "halves")
    assert process.returncode == 0, process.stderr
    del whole["options"]["model"]
    path = checkpoints.checkpoint_path(tmp_path / "halves", base)
    torch.save(_without_model(path), path)
    assert_equal_runs((None, whole), tmp_path / "halves", base)


def _without_model(path):
    found = checkpoints.load_checkpoint(path, checkpoints.RUN_KEYS)
    del found["options"]["model"]
    return found
