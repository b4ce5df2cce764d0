"""The state of a run: what training changes, how it is saved, checked and restored."""

import dataclasses
import math
import shutil
import sys
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

import checkpoints
import pictures
from config import TrainingConfig
from engine import Means, Network
from groundwork import distributed, tensorboard_log
from groundwork.devices import random_state, set_random_state
from groundwork.errors import UserError
from groundwork.files import atomic_write, write_json
from optimization import Updates, same_form
from word_rules import rule_of

# Options with the learning rates of a stage: the decoder's, and the encoder's where it learns, too
RATES = {
    "decoder": ["decoder_lr"],
    "finetune": ["decoder_lr", "encoder_lr"],
    "scst": ["scst_lr"],
}


class RunFiles:
    """Where a run on the data set `base` keeps its files in a folder."""

    def __init__(self, folder, base):
        self.folder = Path(folder)
        self.newest = checkpoints.checkpoint_path(folder, base)
        self.best = checkpoints.checkpoint_path(folder, base, best=True)
        self.log = self.folder / f"log_{base}.jsonl"
        self.record = self.folder / f"run_{base}.json"
        self.events = self.folder / "tensorboard" / base

    def clear(self):
        """Removes what an earlier run left."""
        curves = pictures.curves_path(self.log)
        for path in (self.newest, self.best, self.log, self.record, curves):
            path.unlink(missing_ok=True)
        tensorboard_log.remove(self.events)

    def kept(self):
        """Those of the two checkpoints that there are."""
        return [path for path in (self.newest, self.best) if path.exists()]

    def check_room(self, size, anew):
        """Says where the folder has no room for what a run keeps: the newest checkpoint, the best,
        and beside them the one that is being written.

        Args:
            size: of a checkpoint, bytes.
            anew: whether those that are there will make room first.

        Raises:
            UserError: not even one more can be written.
        """
        free, kept = shutil.disk_usage(self.folder).free, sum(p.stat().st_size for p in self.kept())
        facts = (
            f"{self.folder} has {free / 1e6:,.0f} MB free, and a checkpoint of this model takes "
            f"{size / 1e6:,.0f} MB"
        )
        if free + (kept if anew else 0) < size:
            raise UserError(f"{facts}: make room, or choose another --output_folder")
        if free + kept < 3 * size:
            print(
                f"{facts}; two are kept, and a third is written beside them: make room, or "
                "training stops when the disk is full",
                file=sys.stderr,
            )


@dataclass
class RunState:
    """What a run is made of and where it stands. A checkpoint holds all of it.

    After making it, `begin` a stage, and `restore` it where a checkpoint is continued.
    """

    network: Network
    config: TrainingConfig
    base: str  # name of the data set
    word_map: dict[str, int]
    options: dict  # those in force, name -> number or text: for the record, and for its resuming
    records: list[dict]  # of each start of the run, from `provenance.describe`
    log: list[dict] = field(default_factory=list)  # a record an epoch, of all stages
    best: dict | None = None  # the record of the best epoch
    image_size: int | None = None  # of the data set, pixels; not before its first stage
    fit: str | None = None  # of its images, likewise
    stage: str | None = None
    epoch: int = 0  # whole epochs done in the stage
    step: int = 0  # steps done in the epoch after them
    waited: int = 0  # epochs without a better one
    means: Means = field(default_factory=Means)  # over these steps
    seconds: float = 0.0  # that they took
    skipped: int = 0  # steps skipped in a row; not saved

    def begin(self, stage):
        """The start of a stage, with the weights as they are."""
        network, config = self.network, self.config
        self.stage, self.epoch, self.waited = stage, 0, 0
        self.begin_epoch()
        network.trained(stage == "finetune", config.tune_from)
        parts = {"decoder": network.decoder}
        if network.tunes_encoder:
            parts["encoder"] = network.encoder
        rates = {name: getattr(config, name) for name in RATES[stage]}
        self.updates = Updates(parts, rates, config)
        self.optimizer = self.updates.optimizer
        if config.schedule == "cosine":
            self.schedule = CosineAnnealingLR(self.optimizer, config.epochs)
        else:
            self.schedule = ReduceLROnPlateau(
                self.optimizer, mode="max", factor=0.8, patience=config.patience - 1, threshold=0
            )

    @cached_property
    def rule(self):
        """The `word_rules.Rule` of its words."""
        return rule_of(self.word_map)

    @property
    def judged(self):
        """The `Network` to validate and to caption with: of the averaged weights, if there are."""
        return dataclasses.replace(self.network, **self.updates.averaged())

    def begin_epoch(self):
        """Nothing of the next epoch is done yet."""
        self.step, self.means, self.seconds = 0, Means(checkpoints.measure_of(self.stage)), 0.0

    def end_epoch(self, record):
        """Counts an epoch, and logs its record; whether it is the best so far."""
        own = [line for line in self.log if line["stage"] == self.stage]
        improved = self._is_better(record, [self.best] if self.best else [])
        self.waited = 0 if improved else self.waited + 1
        if improved:
            self.best = record
        self.epoch += 1
        if isinstance(self.schedule, ReduceLROnPlateau):
            # a number that grows with each better epoch of the stage
            self.schedule.step(self.epoch if self._is_better(record, own) else -1)
        else:
            with warnings.catch_warnings():  # of a resumed epoch, whose steps another process did
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                self.schedule.step()
        self.begin_epoch()
        self.log.append(record)
        return improved

    def _is_better(self, record, others):
        names = SELECT_BY[self.config.select_by]
        return all(rank(record, names) > rank(other, names) for other in others)

    def place(self, step):
        """A step of the epoch, for people."""
        return f"step {step} of epoch {self.epoch + 1}, stage {self.stage}"

    # -------------------------------------------------------------------------------- saving

    def checkpoint_size(self, stage):
        """Bytes, about, of a checkpoint inside a stage: the weights, of those that are trained
        Adam's two means, and where weights are averaged those that are not, too."""
        network, tunes = self.network, stage == "finetune"
        encoder, decoder = (
            list(part.state_dict().values()) for part in (network.encoder, network.decoder)
        )
        trained = network.trained(tunes, self.config.tune_from)
        means = 2 * [p for group in trained for p in group]
        raw = decoder + encoder * tunes if self.config.ema else []
        return sum(tensor.nbytes for tensor in [*encoder, *decoder, *means, *raw])

    def save(self, files, order, seconds, improved=False):
        """A checkpoint of this moment; all processes take part, and the main one writes it.

        Args:
            files: `RunFiles`.
            order: what the order of the batches follows from, beside the epoch.
            seconds: that the run has taken since its start.
            improved: whether it is the best, too.
        """
        random = distributed.collect([random_state(self.network.device)])
        means = self.means.add_up(self.network.device)
        if distributed.is_main:
            self.records[-1]["seconds"] = round(seconds, 1)
            checkpoint = self.contents(order, random, means)
            if improved:  # first, as the other one says that it has been written
                checkpoints.save_checkpoint(files.best, checkpoint)
            checkpoints.save_checkpoint(files.newest, checkpoint)
            write_json(files.record, {"options": self.options, "runs": self.records}, indent=2)
        distributed.wait()  # none may leave, and end all, while the main one writes

    def contents(self, order, random, means):
        """What a checkpoint holds: see `checkpoints.RUN_KEYS`."""
        encoder, decoder = self.judged.encoder, self.judged.decoder
        return self.updates.contents() | {
            "options": self.options,
            "base": self.base,
            "word_map": self.word_map,
            "encoder_name": encoder.name,
            "encoder_stages": encoder.stages,
            "encoded_image_size": decoder.config.encoded_image_size,
            "image_size": self.image_size,
            "fit": self.fit,
            "encoder": encoder.state_dict(),
            "decoder_name": decoder.name,
            "decoder_config": dataclasses.asdict(decoder.config),
            "decoder": decoder.state_dict(),
            "stage": self.stage,
            "epoch": self.epoch,
            "scores": self.log[-1] if self.log else {},
            "best_bleu4": self.best["bleu4"] if self.best else -1.0,
            "best_record": self.best,
            "epochs_without_improvement": self.waited,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": random,
            "step": self.step,
            "partial": means.state(),
            "seconds": self.seconds,
            "order": order,
            "log": self.log,
            "records": self.records,
        }

    # ------------------------------------------------------------------------------ restoring

    def restore(self, checkpoint, data):
        """Goes on in the middle of the stage that a checkpoint was saved in.

        Learning rates that differ from the run's own apply from here on, and so does a schedule.

        Args:
            data: the stage's `TrainingData`.

        Raises:
            UserError: it does not fit this run.
        """
        before = checkpoint["options"]
        self.epoch, self.waited = checkpoint["epoch"], checkpoint["epochs_without_improvement"]
        if self.config.select_by != before.get("select_by", self.config.select_by):
            self.waited = 0  # by the other measure; the best so far stays the one to beat
        self.updates.restore(checkpoint)
        self._restore_schedule(checkpoint["schedule"], before)
        if checkpoint["step"]:
            if wanted := data.differences(checkpoint["order"], before):
                raise UserError(
                    f"the checkpoint stands inside epoch {self.epoch + 1}: continue it with "
                    f"{wanted}, as before, until the epoch is done"
                )
            self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]
        if distributed.is_main:
            self.means.load(checkpoint["partial"])
        if distributed.rank < len(checkpoint["random"]):
            self._restore_random(checkpoint["random"][distributed.rank])

    def _restore_schedule(self, state, before):
        shape = ["schedule", "patience" if self.config.schedule == "plateau" else "epochs"]
        if any(getattr(self.config, name) != before.get(name) for name in shape):
            return
        own = self.schedule.state_dict()
        if bool(before.get("weight_decay")) != bool(self.config.weight_decay):
            # the optimizer's groups are others now, for each of which it has a rate
            state = {n: own[n] if isinstance(own.get(n), list) else v for n, v in state.items()}
        if not same_form(state, own):
            raise UserError(
                "the checkpoint's schedule is damaged, or of another version of PyTorch: "
                "start anew with --overwrite"
            )
        self.schedule.load_state_dict(state)

    def _restore_random(self, state):
        try:
            set_random_state(self.network.device, state)
        except RuntimeError as error:
            raise UserError(
                f"the checkpoint's random state is damaged ({error}): start with --overwrite"
            ) from error

    def adopt_best(self, files, source):
        """Brings the best checkpoint along into another folder, or forgets how good it was.

        Args:
            files: the run's `RunFiles`.
            source: path of the checkpoint that it goes on from.
        """
        if files.best.exists():
            return
        best = checkpoints.checkpoint_path(Path(source).parent, self.base, best=True)
        if best.exists():
            with atomic_write(files.best) as temporary:
                shutil.copyfile(best, temporary)
        else:
            self.best = None


# What tells the best epoch: scores of its record, the first that differs decides; losses are better
# where they are lower
SELECT_BY = {
    "bleu4": ["bleu4", "bleu3", "bleu2", "bleu1", "val_loss"],
    "cider": ["cider", "val_loss"],
    "loss": ["val_loss"],
}


def rank(record, names):
    """A list that is greater for a better epoch. Scores that an older record lacks count least."""
    values = [record.get(name, -math.inf) for name in names]
    # a score of nothing may be 1e-13 by rounding, and must not outrank another nothing
    return [
        -value if name == "val_loss" else round(value, 9) if math.isfinite(value) else value
        for name, value in zip(names, values, strict=True)
    ]


def best_record(checkpoint):
    """The best epoch's record in a checkpoint, None where there is none; older files tell it by
    BLEU-4 alone."""
    known = [r for r in checkpoint["log"] if r["bleu4"] == checkpoint["best_bleu4"]]
    return checkpoint["best_record"] or (known[0] if known else None)
