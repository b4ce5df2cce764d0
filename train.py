"""Trains the model in two stages: the decoder on a frozen encoder, then both together.

Without arguments it takes the one prepared data set in data/; where there is none it makes the
demo data and trains on that.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

import checkpoints
import decoding
import demo
import distributed
import metrics
import provenance
import tensorboard_log
import utils
from datasets import CaptionDataset, LengthSampler, cache_features, find_data, read_word_map
from models import OFFLINE_ENCODER, DecoderWithAttention, Encoder, caption_loss
from utils import UserError

SKIPS = 5  # steps without finite gradients, in a row, after which training stops
MODEL_OPTIONS = ["encoder", "encoded_image_size", "gate", "deep_output"]  # a checkpoint has its own
MODEL_OPTIONS += ["attention_dim", "embed_dim", "decoder_dim"]
HYPERPARAMETERS = [*MODEL_OPTIONS, "dropout", "embed_dropout", "views", "stage", "epochs"]
HYPERPARAMETERS += ["batch_size", "finetune_batch_size", "decoder_lr", "encoder_lr", "schedule"]
HYPERPARAMETERS += ["patience", "stop_after", "grad_clip", "alpha_c", "label_smoothing", "seed"]
HYPERPARAMETERS += ["amp"]
# Learnable in minutes on two cores; the other defaults suit photographs and a grid of 14×14.
DEMO_DEFAULTS = {
    "encoder": OFFLINE_ENCODER,
    "encoded_image_size": 8,
    "stage": "decoder",
    "epochs": 8,
    "decoder_lr": 1e-3,
    "alpha_c": 0.1,
}


def make_parser():
    parser = utils.Parser(
        description=__doc__,
        epilog="Defaults on demo data: " + _as_flags(DEMO_DEFAULTS),
    )
    positive, share = utils.number(int, above=0), utils.number(float, least=0, below=1)

    add = parser.add_argument_group("data").add_argument
    add("--data_folder", default="data", help="where create_input_files.py put its files")
    add("--data_name", help="base name of the data set, where the folder holds several")
    add(
        "--output_folder",
        help="for checkpoints, log and curves; None: the data folder, or that of --checkpoint",
    )
    add("--overwrite", action="store_true", help="start anew over an earlier run's files")
    add(
        "--tensorboard",
        action="store_true",
        help="scalars, captions with attention and hyperparameters for TensorBoard, in the "
        "output folder's folder tensorboard",
    )
    add(
        "--cache_features",
        choices=["auto", "off"],
        default="auto",
        help="keep the frozen encoder's output on disk, if there is room",
    )
    add(
        "--views",
        type=positive,
        default=1,
        help="views of an image to train on: itself, its mirror image, then crops by chance; "
        "mirror images belie captions that speak of left and right",
    )

    add = parser.add_argument_group("model").add_argument
    add(
        "--encoder",
        default="resnet101",
        help="a torchvision model or timm:NAME",
    )
    add("--encoder_weights", help="file of the encoder's state dict; None: its ImageNet weights")
    grid = utils.number(int, above=0, below=utils.MAX_GRID + 1)
    add("--encoded_image_size", type=grid, default=14, help="side of the attention's grid")
    add(
        "--gate",
        choices=["scalar", "channel"],
        default="scalar",
        help="one gate β_t, as in the paper, or one for each channel",
    )
    add("--deep_output", action="store_true", help="the paper's output layer, eq. 7")
    add("--attention_dim", type=positive, default=512, help="attention's hidden layer")
    add("--embed_dim", type=positive, default=512, help="word embedding")
    add("--decoder_dim", type=positive, default=512, help="LSTM state")
    add("--dropout", type=share, default=0.5, help="probability, before the vocabulary layer")
    add("--embed_dropout", type=share, default=0.0, help="probability, on the words' embeddings")

    add = parser.add_argument_group("training").add_argument
    add(
        "--stage",
        choices=["decoder", "finetune", "both"],
        default="both",
        help="the decoder alone, fine-tuning the encoder with it from the best checkpoint, or "
        "one after the other",
    )
    add(
        "--checkpoint",
        help="continue from this one, with its model, whatever the model options but dropout",
    )
    add(
        "--resume",
        action="store_true",
        help="go on where the run in the output folder was stopped, or start it: the result is "
        "that of a run never stopped",
    )
    add(
        "--save_every",
        type=_interval,
        default="10m",
        help="checkpoints inside an epoch: minutes, as 10m, or steps, as 500",
    )
    add(
        "--epochs",
        type=positive,
        default=120,
        help="at most, in each stage",
    )
    add("--batch_size", type=positive, default=80, help="captions, stage 1")
    add("--finetune_batch_size", type=positive, default=32, help="captions, stage 2")
    add("--decoder_lr", type=utils.number(float, above=0), default=4e-4, help="Adam, decoder")
    add("--encoder_lr", type=utils.number(float, above=0), default=1e-4, help="Adam, encoder")
    add(
        "--schedule",
        choices=["plateau", "cosine"],
        default="plateau",
        help="learning rate: × 0.8 after --patience epochs without a better BLEU-4, or falling "
        "along a cosine to 0 over --epochs",
    )
    add("--patience", type=positive, default=8, help="epochs, for the plateau schedule")
    add("--stop_after", type=positive, default=20, help="epochs without a better BLEU-4")
    add("--grad_clip", type=utils.number(float, above=0), default=5.0, help="element-wise")
    add(
        "--alpha_c",
        type=utils.number(float, least=0),
        default=1.0,
        help="weight of doubly stochastic attention",
    )
    add("--label_smoothing", type=share, default=0.0, help="share spread over the vocabulary")
    seed = utils.number(int, least=0, below=2**63)
    add("--seed", type=seed, default=0, help="of everything")
    add(
        "--deterministic",
        action="store_true",
        help="equal weights from equal runs on the same device; a CPU gives them anyway",
    )
    add(
        "--detect_anomaly",
        action="store_true",
        help="find the operation whose gradient is not a number; slow",
    )
    utils.add_workers_option(parser)
    utils.add_device_options(parser)
    return parser


def _interval(text):
    """An argparse type: ("minutes", n) of "10m", ("steps", n) of "500"."""
    unit, number = ("minutes", text[:-1]) if text.endswith("m") else ("steps", text)
    try:
        return unit, utils.number(int, above=0)(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give minutes as 10m or steps as 500") from None


def _as_flags(options):
    return " ".join(
        f"--{name}" if value is True else f"--{name} {value}" for name, value in options.items()
    )


def main():
    parser = make_parser()
    options = parser.parse_args()
    if options.tensorboard:
        tensorboard_log.check_installed()
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its start
        torch.use_deterministic_algorithms(True)
    options.device = utils.choose_device(options.device)
    with distributed.group(options.device):
        train(parser, options)


def train(parser, options):
    """Trains with the options, or with the demo data's defaults for those not given."""
    with distributed.main_first():
        base = find_data(options.data_folder, options.data_name)
        if base is None:
            if options.data_folder != parser.get_default("data_folder"):
                raise UserError(f"no data set in {options.data_folder}: run create_input_files.py")
            print(f"no data set in {options.data_folder}: making the demo data there")
            folder = utils.make_folder(options.data_folder)
            with utils.sole_writer(folder / "demo", "wait for it, or use another --data_folder"):
                base = demo.prepare(folder)
    if base.startswith("demo_"):
        print(f"demo data, so the defaults are {_as_flags(DEMO_DEFAULTS)}")
        parser.set_defaults(**DEMO_DEFAULTS)
        device, options = options.device, parser.parse_args()
        options.device = device
    torch.manual_seed(options.seed)
    own_folder = Path(options.checkpoint).parent if options.checkpoint else options.data_folder
    options.output_folder = utils.make_folder(options.output_folder or own_folder)

    newest = checkpoints.checkpoint_path(options.output_folder, base)
    lock = utils.sole_writer(newest, "wait for it, or choose another --output_folder")
    with lock if distributed.is_main else nullcontext():
        _run(options, base)


def _run(options, base):
    """The stages asked for, of the run that the output folder is for."""
    checkpoint = _starting_point(options, base)
    trainer = Trainer(options, base, checkpoint)
    reached = checkpoint["stage"] if checkpoint else "decoder"
    stages = checkpoints.STAGES if options.stage == "both" else [options.stage]
    stages = stages[stages.index(reached) if reached in stages else 0 :]
    with closing(trainer):
        for stage in stages:
            trainer.start(stage)
            if stage == stages[0] and (checkpoint is None or _is_elsewhere(options)):
                trainer.clear()
            if checkpoint and stage == reached:
                trainer.resume(checkpoint)
            trainer.open_events()
            with _Stop() as stop, torch.autograd.set_detect_anomaly(options.detect_anomaly):
                trainer.fit(stop)


def _starting_point(options, base):
    """The checkpoint to go on from, None to start anew; never over another run's files unasked."""
    path, folder = options.checkpoint, options.output_folder
    newest, best = (checkpoints.checkpoint_path(folder, base, best=best) for best in (False, True))
    keys = checkpoints.RUN_KEYS
    if options.resume:
        if path is not None or options.overwrite:
            raise UserError("--resume goes without --checkpoint and --overwrite")
        path, checkpoint = checkpoints.newest_whole_checkpoint([newest, best], keys) or (None, None)
        if checkpoint is None and (newest.exists() or best.exists()):
            raise UserError(
                f"no checkpoint of {base} in {folder} can be continued: start anew with "
                "--overwrite, or in another --output_folder"
            )
        if checkpoint and (checkpoint["stage"], options.stage) != ("decoder", "finetune"):
            print(f"resuming from {path}: {_where(checkpoint)}")
            return _checked(path, checkpoint, options)
        path = None
    if path is None and options.stage == "finetune":
        if not best.exists():
            raise UserError(
                f"--stage finetune starts from a trained decoder, and {best} is missing: "
                "train with --stage decoder first, or name one with --checkpoint"
            )
        latest = checkpoints.load_checkpoint(newest if newest.exists() else best, keys)
        if latest["stage"] == "finetune" and not options.overwrite:
            raise UserError(
                f"{folder} holds an earlier fine-tuning of {base}: continue it with --resume, or "
                "give it up with --overwrite"
            )
        checkpoint = _checked(best, checkpoints.load_checkpoint(best, keys), options)
        log = [record for record in latest["log"] if record["stage"] == "decoder"]
        # with the epochs after the best, too, and without those of a fine-tuning given up
        return checkpoint | {"log": log, "stage": "decoder"}
    anew = path is None or _is_elsewhere(options)
    if (newest.exists() or best.exists()) and anew and not options.overwrite:
        raise UserError(
            f"{folder} holds an earlier run on {base}: continue it with --resume, "
            "choose another --output_folder, or give it up with --overwrite"
        )
    return path and _checked(path, checkpoints.load_checkpoint(path, keys), options)


def _is_elsewhere(options):
    """Whether --checkpoint is another folder's, whose run goes on in the output folder."""
    path, folder = options.checkpoint, options.output_folder
    return path is not None and Path(path).resolve().parent != folder.resolve()


def _checked(path, checkpoint, options):
    """The checkpoint, if its stage may be continued; says which options are not those of its run.

    Raises:
        UserError: it is past the stage asked for.
    """
    if options.stage == "decoder" and checkpoint["stage"] != "decoder":
        raise UserError(f"{path} is past stage decoder: continue it with --stage finetune")
    before, now = checkpoint["options"], _plain(options)
    fixed = [name for name in MODEL_OPTIONS if now[name] != before.get(name, now[name])]
    if fixed:
        print(f"the model is the checkpoint's: {_as_flags({n: before[n] for n in fixed})}")
    apart = {"checkpoint", "resume", "overwrite", "output_folder", "data_folder", "tensorboard"}
    apart.update(MODEL_OPTIONS)
    other = {n: now[n] for n in now if n not in apart and now[n] != before.get(n)}
    if other:
        print(f"other options than its run had: {_as_flags(other)}")
    return checkpoint


def _plain(options):
    """The options as numbers and text, by name, as they are given on the command line."""
    unit, interval = options.save_every
    plain = vars(options) | {"save_every": f"{interval}m" if unit == "minutes" else str(interval)}
    return {
        name: value if isinstance(value, str | int | float | None) else str(value)
        for name, value in plain.items()
    }


def _where(checkpoint):
    """How far the run of a checkpoint has come, for people."""
    inside = f" and {checkpoint['step']} steps" if checkpoint["step"] else ""
    return f"stage {checkpoint['stage']}, {checkpoint['epoch']} epochs{inside}"


class _Stop:
    """Takes SIGTERM and Ctrl-C while it is entered: `signal` is then their number. A second one
    acts at once, as it would without this."""

    signals = (signal.SIGTERM, signal.SIGINT)

    def __enter__(self):
        self.signal = None
        self.before = [signal.signal(number, self._note) for number in self.signals]
        return self

    def __exit__(self, *_):
        for number, handler in zip(self.signals, self.before, strict=True):
            signal.signal(number, handler)

    def _note(self, number, _):
        self.signal = number
        self.__exit__()


class Trainer:
    """A run: models, data, optimizer and what early stopping has seen."""

    def __init__(self, options, base, checkpoint):
        self.options, self.base, self.device = options, base, options.device
        self.amp = options.amp == "auto" and utils.has_fast_bfloat16(self.device)
        self.word_map = read_word_map(options.data_folder, base)
        self.words = {index: word for word, index in self.word_map.items()}
        self.log_path = options.output_folder / f"log_{base}.jsonl"
        self.record_path = options.output_folder / f"run_{base}.json"
        self.newest_path = checkpoints.checkpoint_path(options.output_folder, base)
        self.best_path = checkpoints.checkpoint_path(options.output_folder, base, best=True)
        self.events_folder, self.events = options.output_folder / "tensorboard" / base, None
        self.stage, self.best = None, checkpoint["best_bleu4"] if checkpoint else -1.0
        self.log = checkpoint["log"] if checkpoint else []
        self.records = checkpoint.get("records", []) if checkpoint else []
        self.records.append(provenance.describe(options, base))
        self.began, self.skipped = time.monotonic(), 0
        if checkpoint is None:
            self.encoder = Encoder(
                options.encoder, options.encoded_image_size, options.encoder_weights or "DEFAULT"
            )
            self.decoder = DecoderWithAttention(
                len(self.word_map),
                self.encoder.dim,
                options.attention_dim,
                options.embed_dim,
                options.decoder_dim,
                options.dropout,
                options.encoded_image_size,
                options.gate,
                options.deep_output,
                options.embed_dropout,
            )
        else:
            if checkpoint["word_map"] != self.word_map:
                raise UserError(f"the checkpoint is of another vocabulary than {base}'s word map")
            self.encoder, self.decoder = checkpoints.build_models(
                checkpoint, options.dropout, options.embed_dropout
            )
        self.encoder.to(self.device, memory_format=torch.channels_last)
        self.decoder.to(self.device)
        if not distributed.is_main:  # each process drops other values out
            torch.manual_seed(options.seed + distributed.rank)

    # ------------------------------------------------------------------------------ stages

    def start(self, stage):
        """Begins a stage; after another one, from the best checkpoint that it left."""
        options = self.options
        if self.stage is not None:
            with distributed.main_first():  # which wrote it
                self.decoder.load_state_dict(checkpoints.load_checkpoint(self.best_path)["decoder"])
        self.stage, self.epoch, self.waited = stage, 0, 0
        self.step, self.partial, self.seconds = 0, _Means(), 0.0
        self.encoder.fine_tune(stage == "finetune")
        groups = [{"params": list(self.decoder.parameters()), "lr": options.decoder_lr}]
        if stage == "finetune":
            tuned = [p for p in self.encoder.parameters() if p.requires_grad]
            groups.append({"params": tuned, "lr": options.encoder_lr})
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.Adam(groups, fused=True)
        if options.schedule == "cosine":
            self.schedule = CosineAnnealingLR(self.optimizer, options.epochs)
        else:
            self.schedule = ReduceLROnPlateau(
                self.optimizer, mode="max", factor=0.8, patience=options.patience - 1, threshold=0
            )
        self._open_data()

    def clear(self):
        """Gives up what an earlier run left in the output folder."""
        if distributed.is_main:
            if self.options.tensorboard:  # nothing is given up where its events cannot be written
                utils.make_folder(self.events_folder)
            curves = utils.curves_path(self.log_path)
            for path in (self.newest_path, self.best_path, self.log_path, self.record_path, curves):
                path.unlink(missing_ok=True)
            tensorboard_log.remove(self.events_folder)

    def open_events(self):
        """Begins to write for TensorBoard, if asked to, or goes on from where the run stands."""
        options = self.options
        if not (options.tensorboard and distributed.is_main) or self.events is not None:
            return
        # Later points are of steps that will be done again, and, between an epoch's last step and
        # its validation, so are the scores.
        start = self._captions_seen(self.step) + (self.step < self.sampler.total)
        self.pictures = CaptionDataset(options.data_folder, self.base, "VAL")  # never features
        plain = _plain(options)
        hyperparameters = {name: plain[name] for name in HYPERPARAMETERS}
        self.events = tensorboard_log.EventLog(
            self.events_folder, start, hyperparameters, self.records[-1]
        )

    def close(self):
        """Writes what is left to be written for TensorBoard."""
        if self.events is not None:
            self.events.close()

    def resume(self, checkpoint):
        """Goes on in the middle of the stage that a checkpoint was saved in.

        Learning rates that differ from the run's own apply from here on, and so does a schedule.
        """
        options, before = self.options, checkpoint["options"]
        with distributed.main_first():
            self._adopt_best()
        self.epoch, self.waited = checkpoint["epoch"], checkpoint["epochs_without_improvement"]
        self._load_optimizer(checkpoint["optimizer"])
        shape = ["schedule", "patience" if options.schedule == "plateau" else "epochs"]
        if all(getattr(options, name) == before.get(name) for name in shape):
            if not _same_form(checkpoint["schedule"], self.schedule.state_dict()):
                raise UserError(
                    "the checkpoint's schedule is damaged, or of another version of PyTorch: "
                    "start anew with --overwrite"
                )
            self.schedule.load_state_dict(checkpoint["schedule"])
        for group, name in zip(
            self.optimizer.param_groups, ("decoder_lr", "encoder_lr"), strict=False
        ):
            if getattr(options, name) != before.get(name):
                group["lr"] = getattr(options, name)
        if checkpoint["step"]:
            if checkpoint["order"] != self._order():
                raise UserError(
                    f"the checkpoint stands inside epoch {self.epoch + 1}: continue it with the "
                    f"batch size, views, seed and number of processes of its run, "
                    f"{checkpoint['order']}, not {self._order()}"
                )
            self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]
        if distributed.is_main:
            self.partial.load(checkpoint["partial"])
            self._write_log()
        if distributed.rank < len(checkpoint["random"]):
            cpu, cuda = checkpoint["random"][distributed.rank]
            try:
                torch.set_rng_state(cpu)
                if cuda is not None and self.device.type == "cuda":
                    torch.cuda.set_rng_state(cuda, self.device)
            except RuntimeError as error:
                raise UserError(
                    f"the checkpoint's random state is damaged ({error}): start with --overwrite"
                ) from error

    @torch.no_grad()
    def _load_optimizer(self, state):
        """Raises UserError unless the state is that of these parameters: fused updates trust it."""
        groups = self.optimizer.state_dict()["param_groups"]
        theirs, moments = state.get("param_groups"), state.get("state")
        if (
            not isinstance(theirs, list)
            or not all(isinstance(group, dict) for group in theirs)
            or [group.get("params") for group in theirs] != [group["params"] for group in groups]
            or not all(_same_form(group.get("lr"), 0.0) for group in theirs)
            or not isinstance(moments, dict)
            or not moments.keys() <= set(range(len(self.parameters)))
            or not all(_is_adams(moments[i], self.parameters[i]) for i in moments)
        ):
            raise UserError(
                "the checkpoint's optimizer is of another model: start anew with --overwrite"
            )
        copies = {  # laid out like the parameters
            i: {
                name: value if name == "step" else torch.empty_like(self.parameters[i]).copy_(value)
                for name, value in moments[i].items()
            }
            for i in moments
        }
        for group, their in zip(groups, theirs, strict=True):
            group["lr"] = their["lr"]  # all else is as train.py sets it
        self.optimizer.load_state_dict({"state": copies, "param_groups": groups})

    def _adopt_best(self):
        """Brings the best checkpoint along into another folder, or forgets how good it was."""
        if self.best_path.exists():
            return
        source = Path(self.options.checkpoint or self.newest_path)
        source = checkpoints.checkpoint_path(source.parent, self.base, best=True)
        if source.exists():
            with utils.atomic_write(self.best_path) as temporary:
                shutil.copyfile(source, temporary)
        else:
            self.best = -1.0

    def _order(self):
        """What the order of the batches follows from, beside the epoch."""
        return {
            "images": self.sampler.batch_size,
            "views": self.options.views,
            "seed": self.options.seed,
            "processes": distributed.world_size,
        }

    def _open_data(self):
        """Loaders of this stage's images, or of their features where they can be cached."""
        options = self.options
        self.encoder.to(self.device)
        train, val = self._open_split("TRAIN", options.views), self._open_split("VAL", 1)
        if train.from_features and val.from_features:
            self.encoder.cpu()  # its place on the device is free for the decoder
        finetune = self.stage == "finetune"
        captions = options.finetune_batch_size if finetune else options.batch_size
        images = max(1, captions // train.captions.shape[1])
        self.sampler = LengthSampler(
            train.lengths,
            images,
            options.views,
            options.seed,
            distributed.rank,
            distributed.world_size,
        )
        # a generator of their own: making an iterator draws a number
        common = utils.loader_options(options) | {"generator": torch.Generator()}
        share = distributed.share(len(val))
        self.loaders = {
            "TRAIN": DataLoader(train, batch_sampler=self.sampler, **common),
            "VAL": DataLoader(val, batch_size=50, sampler=share, **common),
        }

    def _open_split(self, split, views):
        options, features = self.options, None
        if options.cache_features == "auto" and self.stage == "decoder":
            with distributed.main_first():
                features = cache_features(
                    self.encoder,
                    options.data_folder,
                    self.base,
                    split,
                    views,
                    options.seed,
                    self.amp,
                )
        return CaptionDataset(options.data_folder, self.base, split, features, options.seed)

    def fit(self, stop):
        """Epochs until the stage's last, or until BLEU-4 has not improved for long.

        Args:
            stop: a `_Stop`; at its signal, saves a checkpoint and ends the process.
        """
        options = self.options
        print(
            f"stage {self.stage}: {len(self.loaders['TRAIN'].dataset)} images, "
            f"{'bfloat16' if self.amp else 'float32'} on {self.device}"
        )
        while self.epoch < options.epochs and self.waited < options.stop_after:
            started = time.perf_counter() - self.seconds
            record = {
                "stage": self.stage,
                "epoch": self.epoch + 1,
                "lr": self.optimizer.param_groups[0]["lr"],
            }
            record |= self._train_epoch(started, stop)
            scores, captions = self._validate(stop)
            record |= scores
            improved = scores["bleu4"] > self.best
            self.best = max(self.best, scores["bleu4"])
            self.waited = 0 if improved else self.waited + 1
            if isinstance(self.schedule, ReduceLROnPlateau):
                self.schedule.step(scores["bleu4"])
            else:
                self.schedule.step()
            record["seconds"] = round(time.perf_counter() - started, 1)
            self.epoch += 1
            self.step, self.partial, self.seconds = 0, _Means(), 0.0
            self.log.append(record)
            if self.events is not None:  # before the checkpoint, which says that it has been done
                self.events.epoch(self._captions_seen(0), record, self._examples(captions))
            self._save(improved)
            if distributed.is_main:
                self._report(record, captions, improved)
            if distributed.add_up(torch.tensor(float(bool(stop.signal)), device=self.device)):
                self._leave(stop)
        if self.epoch >= options.epochs:
            print(f"stage {self.stage}: its {options.epochs} epochs are done")
        else:
            print(f"stage {self.stage}: stopped, no better BLEU-4 for {self.waited} epochs")

    def _leave(self, stop):
        """Ends the process at a signal, once the checkpoint is written."""
        name = signal.Signals(stop.signal or signal.SIGTERM).name  # another process may have it
        print(
            f"stopped by {name} after {self.epoch} epochs and {self.step} steps of stage "
            f"{self.stage}: go on from {self.newest_path} with --resume",
            flush=True,
        )
        distributed.wait()
        sys.exit(128 + signal.Signals[name])

    # ------------------------------------------------------------------------------ epochs

    def _train_epoch(self, started, stop):
        """The steps of an epoch that are still to do; its mean loss and accuracy, its speed."""
        loader, total = self.loaders["TRAIN"], self.partial
        self.sampler.set_epoch(self.epoch + 1, self.step)
        self.decoder.train()
        saved, (unit, interval) = time.monotonic(), self.options.save_every
        with utils.progress(
            total=self.sampler.total, initial=self.step, desc=f"epoch {self.epoch + 1}", unit="step"
        ) as bar:
            for batch in loader:
                minutes = (time.monotonic() - saved) / 60
                due = (self.step + 1) % interval == 0 if unit == "steps" else minutes >= interval
                stopping, due = self._step(batch, bool(stop.signal), due)
                bar.set_postfix(
                    loss=f"{total['loss']:.3f}",
                    top5=f"{total['top5']:.1%}",
                    captions_per_second=f"{self._rate(started):.0f}",
                    refresh=False,
                )
                bar.update()
                if stopping or (due and not self.skipped):  # else the weights may be spoilt
                    self.seconds = time.perf_counter() - started
                    self._save()
                    saved = time.monotonic()
                if stopping:
                    self._leave(stop)
        rate = self._rate(started)
        total = total.add_up(self.device)
        return {"loss": total["loss"], "top5": total["top5"], "captions_per_second": round(rate, 1)}

    def _rate(self, started):
        """Captions per second in this epoch, by all processes."""
        captions = self.loaders["TRAIN"].dataset.lengths.numel() * self.step / self.sampler.total
        return captions / (time.perf_counter() - started)

    def _captions_seen(self, steps):
        """Captions that the run has trained on, in the epochs of its log and in `steps` steps
        more: a measure that holds over both stages and their batch sizes."""
        captions = self.loaders["TRAIN"].dataset.lengths.numel()
        return len(self.log) * captions + captions * steps // self.sampler.total

    def _step(self, batch, stop, save):
        """One update, if loss and gradients are finite; whether any process wants to stop, and to
        save.

        Raises:
            UserError: they were not for `SKIPS` steps in a row.
        """
        self.step += 1
        lengths = batch[2]
        sizes = torch.tensor([(lengths - 1).sum(), lengths.numel()], dtype=torch.float32)
        sizes = distributed.add_up(sizes.to(self.device))
        loss, top5, words = self._forward(*batch, self.options.label_smoothing, sizes)
        self.optimizer.zero_grad(set_to_none=True)
        self._backward(loss)
        distributed.add_up_gradients(self.parameters)
        largest = nn.utils.get_total_norm([p.grad for p in self.parameters], math.inf)
        news = torch.stack([loss.detach(), largest, *loss.new_tensor([stop, save])])
        value, largest, stop, save = distributed.add_up(news).tolist()
        if self.events is not None:  # at the step's first caption, so before the epoch's end
            rates = [group["lr"] for group in self.optimizer.param_groups]
            self.events.step(self._captions_seen(self.step - 1) + 1, value, rates)
        if math.isfinite(value) and math.isfinite(largest):
            nn.utils.clip_grad_value_(self.parameters, self.options.grad_clip)
            self.optimizer.step()
            self.partial.add(words, loss=value, top5=top5)
            self.skipped = 0
        else:
            self._skip(
                "a gradient is not finite" if math.isfinite(value) else f"the loss is {value}"
            )
        return bool(stop), bool(save)

    def _backward(self, loss):
        try:
            loss.backward()
        except RuntimeError as error:
            if "returned nan values" not in str(error):  # what --detect_anomaly looks for
                raise
            raise UserError(
                f"{self._place()}: {error} The warning above shows where it was called"
            ) from error

    def _skip(self, reason):
        """Passes over a step whose gradients would spoil the weights, but not over many."""
        self.skipped += 1
        print(f"{self._place()}, skipped: {reason}", flush=True)
        if self.skipped == SKIPS:
            there = [path for path in (self.newest_path, self.best_path) if path.exists()]
            kept = f"{' and '.join(map(str, there))} are kept; " if there else ""
            raise UserError(
                f"{SKIPS} steps in a row skipped, the last because {reason}: stopped; {kept}try a "
                "lower learning rate or --amp off; --detect_anomaly finds the operation"
            )

    def _place(self):
        return f"step {self.step} of epoch {self.epoch + 1}, stage {self.stage}"

    def _forward(self, source, captions, lengths, label_smoothing=0.0, sizes=None):
        """Loss of a batch, top-5 accuracy and number of the words predicted."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            encoder_out = self._encode(source)
            captions = captions.flatten(0, 1).to(self.device, non_blocking=True)
            scores, targets, alphas = self.decoder(encoder_out, captions, lengths.flatten())
            loss = caption_loss(
                scores, targets, alphas, self.options.alpha_c, label_smoothing, sizes
            )
        return loss, metrics.top5_accuracy(scores.data, targets.data), len(targets.data)

    def _encode(self, source):
        """Features, as they come from the cache or from images."""
        source = source.to(self.device, non_blocking=True)
        if source.dtype != torch.uint8:
            return source
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage == "finetune"):
            return self.encoder.features(source)

    @torch.inference_mode()
    def _validate(self, stop):
        """Scores of the validation split, and its captions, decoded greedily: the words of each,
        and of the examples the alphas.

        At a signal it is given up, to be done again after resuming; several processes finish it.
        """
        loader, total, captions = self.loaders["VAL"], _Means(), []
        own, shown = distributed.share(len(loader.dataset)), self._shown()
        self.decoder.eval()
        for source, *rest in utils.progress(loader, desc="validation", unit="batch", leave=False):
            if stop.signal and distributed.world_size == 1:
                self._save()
                self._leave(stop)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                features = self._encode(source)
                loss, top5, words = self._forward(features, *rest)
                decoded = decoding.greedy(self.decoder, features, self.word_map)
            total.add(words, loss=loss.item(), top5=top5)
            for caption in decoded:
                alphas = caption.alphas if own[len(captions)] in shown else None
                captions.append(([self.words[w] for w in caption.words], alphas))
        captions = distributed.collect(captions)
        total = total.add_up(self.device)
        references = [reference["captions"] for reference in loader.dataset.references]
        bleu = metrics.bleu(references, [" ".join(words) for words, _ in captions]).scores
        scores = {"val_loss": total["loss"], "val_top5": total["top5"]}
        return scores | {f"bleu{n}": score for n, score in enumerate(bleu, start=1)}, captions

    def _shown(self):
        """The three validation images that are examples."""
        count = len(self.loaders["VAL"].dataset)
        return range(0, count, math.ceil(count / 3))

    def _examples(self, captions):
        """(reference, image, words, alphas) of the examples."""
        for i in self._shown():
            pixels, *_ = self.pictures[i]
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            yield self.pictures.references[i], image, *captions[i]

    # ------------------------------------------------------------------------------ records

    def _report(self, record, captions, improved):
        """A line for people and one for programs, examples, and the curves."""
        bleu = " / ".join(f"{100 * record[f'bleu{n}']:.1f}" for n in range(1, 5))
        print(
            f"epoch {record['epoch']}: loss {record['loss']:.3f}, top-5 {record['top5']:.1%}; "
            f"validation loss {record['val_loss']:.3f}, top-5 {record['val_top5']:.1%}, "
            f"BLEU-1 to 4 {bleu}, "
            + ("the best so far" if improved else f"best BLEU-4 {100 * self.best:.1f}")
            + f"; {record['captions_per_second']:.0f} captions/s, {record['seconds']:.0f} s",
            flush=True,
        )
        references = self.loaders["VAL"].dataset.references
        for i in self._shown():
            print(f"  {references[i]['filename']}: {' '.join(captions[i][0])}")
            print(f"    human: {references[i]['captions'][0]}", flush=True)
        self._write_log()
        utils.draw_curves(self.log_path)

    def _write_log(self):
        """The whole log, as the checkpoint has it: none of its lines is lost or stands twice."""
        with utils.atomic_write(self.log_path) as temporary:
            lines = [json.dumps(record) + "\n" for record in self.log]
            temporary.write_text("".join(lines), encoding="utf-8")

    def _save(self, improved=False):
        """A checkpoint of this moment; all processes take part, and the main one writes it."""
        random = distributed.collect([self._random_state()])
        partial = self.partial.add_up(self.device)
        if distributed.is_main:
            self._write(random, partial.state(), improved)
        distributed.wait()  # none may leave, and end all, while the main one writes

    def _write(self, random, partial, improved):
        self.records[-1]["seconds"] = round(time.monotonic() - self.began, 1)
        checkpoint = {
            "options": _plain(self.options),
            "base": self.base,
            "word_map": self.word_map,
            "encoder_name": self.encoder.name,
            "encoded_image_size": self.decoder.attention.encoded_image_size,
            "image_size": self.loaders["VAL"].dataset.image_size,
            "encoder": self.encoder.state_dict(),
            "decoder": self.decoder.state_dict(),
            "stage": self.stage,
            "epoch": self.epoch,
            "scores": self.log[-1] if self.log else {},
            "best_bleu4": self.best,
            "epochs_without_improvement": self.waited,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": random,
            "step": self.step,
            "partial": partial,
            "seconds": self.seconds,
            "order": self._order(),
            "log": self.log,
            "records": self.records,
        }
        if self.events is not None:
            self.events.flush()
        if improved:  # first, as the other one says that it has been written
            checkpoints.save_checkpoint(self.best_path, checkpoint)
        checkpoints.save_checkpoint(self.newest_path, checkpoint)
        with utils.atomic_write(self.record_path) as temporary:
            contents = {"options": checkpoint["options"], "runs": self.records}
            temporary.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")

    def _random_state(self):
        cuda = self.device.type == "cuda"
        return [torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if cuda else None]


def _same_form(value, own):
    """Whether a state read from a file has the form of our own: numbers where it has numbers, and
    all else the same."""
    if isinstance(own, dict):
        return (
            isinstance(value, dict)
            and value.keys() == own.keys()
            and all(_same_form(value[key], own[key]) for key in own)
        )
    if isinstance(own, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(own)
            and all(map(_same_form, value, own))
        )
    if type(own) in (int, float):
        return type(value) in (int, float) and not math.isnan(value)
    return type(value) is type(own) and value == own


def _is_adams(state, parameter):
    """Whether a dict of tensors is Adam's state of a parameter."""
    return (
        isinstance(state, dict)
        and state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        and all(isinstance(tensor, torch.Tensor) for tensor in state.values())
        and all(tensor.dtype is torch.float32 for tensor in state.values())
        and state["step"].shape == ()
        and state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
    )


class _Means:
    """Means of named values over words."""

    def __init__(self):
        self.count, self.sums = 0, {"loss": 0.0, "top5": 0.0}

    def add(self, count, **values):
        self.count += count
        for name, value in values.items():
            self.sums[name] += count * value

    def add_up(self, device):
        """The means over what all processes have found."""
        values = torch.tensor([self.count, *self.sums.values()], dtype=torch.float64)
        count, *sums = distributed.add_up(values.to(device)).tolist()
        total = _Means()
        total.load({"count": count, "sums": dict(zip(self.sums, sums, strict=True))})
        return total

    def state(self):
        return {"count": self.count, "sums": self.sums}

    def load(self, state):
        self.count, self.sums = state["count"], dict(state["sums"])

    def __getitem__(self, name):
        return self.sums[name] / self.count if self.count else math.nan


if __name__ == "__main__":
    utils.run(main)
