"""Trains the model in two stages: the decoder on a frozen encoder, then both together.

Without arguments it takes the one prepared data set in data/; where there is none it makes the
demo data and trains on that.
"""

import argparse
import dataclasses
import os
from contextlib import nullcontext
from pathlib import Path

from config import ModelConfig, TrainingConfig
from groundwork.errors import UserError, run
from groundwork.files import make_folder, sole_writer
from groundwork.options import (
    MAX_GRID,
    Parser,
    add_device_options,
    add_model_option,
    add_workers_option,
    as_flags,
    interval,
    number,
)

# Of the model's options, those that a checkpoint that is continued may have otherwise
DROPOUTS = ("dropout", "embed_dropout")
# Learnable in minutes on two cores; the other defaults suit photographs and a grid of 14×14.
DEMO_DEFAULTS = {
    "encoder": "timm:tf_efficientnet_lite2",  # encoders.OFFLINE_ENCODER, which takes long to import
    "encoded_image_size": 8,
    "stage": "decoder",
    "epochs": 8,
    "decoder_lr": 1e-3,
    "alpha_c": 0.1,
}


def make_parser():
    parser = Parser(
        description=__doc__,
        epilog="Defaults on demo data: " + as_flags(DEMO_DEFAULTS),
    )
    positive, share = number(int, above=0), number(float, least=0, below=1)

    add = parser.add_argument_group("data").add_argument
    add("--data_folder", default="data", help="where create_input_files.py put its files")
    add("--data_name", help="base name of the data set, where the folder holds several")
    add(
        "--output_folder",
        help="for checkpoints, log and curves; None: the data folder, or that of --model",
    )
    add(
        "--karpathy_json",
        help="the data set's, for human captions as written where the input files were made "
        "without REFERENCES",
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
        "--prune_features",
        action="store_true",
        help="remove what is kept of other encoders and views of this data set",
    )
    add(
        "--views",
        type=positive,
        help="views of an image to train on: itself, its mirror image, then random crops; "
        "mirror images belie captions that speak of left and right",
    )

    add = parser.add_argument_group("model").add_argument
    add("--encoder", help="a torchvision model or timm:NAME")
    add("--encoder_weights", help="file of the encoder's state dict; None: its ImageNet weights")
    grid = number(int, above=0, below=MAX_GRID + 1)
    add("--encoded_image_size", type=grid, help="side of the attention's grid")
    add("--decoder", help="lstm, the paper's")
    add(
        "--gate",
        choices=["scalar", "channel"],
        help="one gate β_t, as in the paper, or one for each channel",
    )
    add("--deep_output", action="store_true", help="the paper's output layer, eq. 7")
    add("--attention_dim", type=positive, help="attention's hidden layer")
    add("--embed_dim", type=positive, help="word embedding")
    add("--decoder_dim", type=positive, help="LSTM state")
    add("--dropout", type=share, help="probability, before the vocabulary layer")
    add("--embed_dropout", type=share, help="probability, on the words' embeddings")

    training = parser.add_argument_group("training")
    add = training.add_argument
    add(
        "--stage",
        choices=["decoder", "finetune", "both"],
        default="both",
        help="the decoder alone, fine-tuning the encoder with it from the best checkpoint, or "
        "one after the other",
    )
    add_model_option(
        training, "to continue from, with its model, whatever the model options but dropout"
    )
    add(
        "--resume",
        action="store_true",
        help="go on where the run in the output folder was stopped, or start it: the result is "
        "that of a run never stopped",
    )
    add(
        "--save_every",
        type=interval,
        default="10m",
        help="checkpoints inside an epoch: minutes, as 10m, or steps, as 500",
    )
    add("--epochs", type=positive, help="at most, in each stage")
    add("--batch_size", type=positive, help="captions, stage 1")
    add("--finetune_batch_size", type=positive, help="captions, stage 2")
    add("--decoder_lr", type=number(float, above=0), help="Adam, decoder")
    add("--encoder_lr", type=number(float, above=0), help="Adam, encoder")
    add(
        "--schedule",
        choices=["plateau", "cosine"],
        help="learning rate: × 0.8 after --patience epochs without a better one, or falling "
        "along a cosine to 0 over --epochs",
    )
    add(
        "--select_by",
        choices=["bleu4", "cider", "loss"],
        help="what tells the best epoch: validation BLEU-4 (where it is equal, BLEU-3, 2, 1, then "
        "the loss), CIDEr-D, or the loss",
    )
    add("--patience", type=positive, help="epochs, for the plateau schedule")
    add("--stop_after", type=positive, help="epochs without a better one")
    add("--grad_clip", type=number(float, above=0), help="element-wise")
    add("--alpha_c", type=number(float, least=0), help="weight of doubly stochastic attention")
    add("--label_smoothing", type=share, help="share spread over the vocabulary")
    add("--seed", type=number(int, least=0, below=2**63), help="of everything")
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
    add_workers_option(parser)
    add_device_options(parser)
    for kind in (ModelConfig, TrainingConfig):
        parser.set_defaults(**dataclasses.asdict(kind()))
    return parser


def main():
    parser = make_parser()
    options = parser.parse_args()
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its start

    # what follows takes seconds to import
    import torch

    from groundwork import distributed, tensorboard_log
    from groundwork.devices import choose_device

    if options.tensorboard:
        tensorboard_log.check_installed()
    if options.deterministic:
        torch.use_deterministic_algorithms(True)
    device = choose_device(options.device)
    with distributed.group(device):
        train(parser, options, device)


def train(parser, options, device):
    """Trains with the options, or with the demo data's defaults for those not given."""
    import torch

    import checkpoints
    from groundwork import distributed

    base = find_or_make_data(parser, options)
    if base.startswith("demo_"):
        print(f"demo data, so the defaults are {as_flags(DEMO_DEFAULTS)}")
        parser.set_defaults(**DEMO_DEFAULTS)
        options = parser.parse_args()
    torch.manual_seed(options.seed)
    if options.model:
        options.model = str(checkpoints.find_checkpoint(options.model))
    own_folder = Path(options.model).parent if options.model else options.data_folder
    options.output_folder = make_folder(options.output_folder or own_folder)

    newest = checkpoints.checkpoint_path(options.output_folder, base)
    lock = sole_writer(newest, "wait for it, or choose another --output_folder")
    with lock if distributed.is_main else nullcontext():
        run_stages(options, base, device)


def find_or_make_data(parser, options):
    """Base name of the data set to train on: the demo data, made where there is none."""
    import demo
    from datasets import find_data
    from groundwork import distributed

    with distributed.main_first():
        base = find_data(options.data_folder, options.data_name)
        if base is None:
            if options.data_folder != parser.get_default("data_folder"):
                raise UserError(f"no data set in {options.data_folder}: run create_input_files.py")
            print(f"no data set in {options.data_folder}: making the demo data there")
            folder = make_folder(options.data_folder)
            with sole_writer(folder / "demo", "wait for it, or use another --data_folder"):
                base = demo.prepare(folder)
    return base


def run_stages(options, base, device):
    """The stages asked for, of the run that the output folder is for."""
    import torch

    import checkpoints
    from run_state import RunFiles
    from training import Training

    checkpoint = starting_point(options, base)
    state = make_state(options, base, checkpoint, device)
    reached = checkpoint["stage"] if checkpoint else "decoder"
    stages = checkpoints.STAGES if options.stage == "both" else [options.stage]
    stages = stages[stages.index(reached) if reached in stages else 0 :]
    files = RunFiles(options.output_folder, base)
    with torch.autograd.set_detect_anomaly(options.detect_anomaly):
        training = Training(
            state,
            files,
            options.data_folder,
            cache=options.cache_features == "auto",
            save_every=options.save_every,
            workers=options.workers,
            events=options.tensorboard,
            karpathy_json=options.karpathy_json,
            prune=options.prune_features,
        )
        source = options.model or files.newest
        anew = checkpoint is None or is_elsewhere(options)
        training.run(stages, checkpoint, source, anew)


def make_state(options, base, checkpoint, device):
    """The `RunState` of a run that begins now, its model that of the checkpoint if there is one."""
    import torch

    from datasets import fingerprint, open_images, read_word_map
    from engine import Network
    from groundwork import distributed, provenance
    from groundwork.devices import has_fast_bfloat16
    from run_state import RunState, best_record
    from utils import input_path

    folder, word_map = options.data_folder, read_word_map(options.data_folder, base)
    if checkpoint and checkpoint["word_map"] != word_map:
        raise UserError(f"the checkpoint is of another vocabulary than {base}'s word map")
    data = f"{base}, {fingerprint(folder, base)}"
    record = provenance.describe(data, options.seed, device)
    encoder, decoder = make_models(options, checkpoint, len(word_map))
    encoder.to(device, memory_format=torch.channels_last)
    decoder.to(device)
    if not distributed.is_main:  # each process drops other values out
        torch.manual_seed(options.seed + distributed.rank)
    return RunState(
        Network(encoder, decoder, device, options.amp == "auto" and has_fast_bfloat16(device)),
        make(TrainingConfig, options),
        base,
        word_map,
        open_images(input_path(folder, base, "IMAGES", "VAL")).shape[-1],
        plain(options),
        [*(checkpoint.get("records", []) if checkpoint else []), record],
        log=checkpoint["log"] if checkpoint else [],
        best=best_record(checkpoint) if checkpoint else None,
    )


def make_models(options, checkpoint, vocab_size):
    """Encoder and decoder: of the checkpoint, or new."""
    import checkpoints
    from encoders import Encoder

    if checkpoint:
        dropouts = {name: getattr(options, name) for name in DROPOUTS}
        return checkpoints.build_models(checkpoint, **dropouts)
    weights = options.encoder_weights or "DEFAULT"
    encoder = Encoder(options.encoder, options.encoded_image_size, weights)
    values = dataclasses.asdict(make(ModelConfig, options))
    sizes = {"vocab_size": vocab_size, "encoder_dim": encoder.dim}
    return encoder, checkpoints.new_decoder(options.decoder, values | sizes)


def make(kind, options):
    """A dataclass of the options that have its fields' names."""
    return kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)})


# ----------------------------------------------------------------------- which run goes on


def starting_point(options, base):
    """The checkpoint to go on from, None to start anew; never over another run's files unasked."""
    import checkpoints

    path, folder = options.model, options.output_folder
    newest, best = (checkpoints.checkpoint_path(folder, base, best=best) for best in (False, True))
    if options.resume:
        checkpoint = resumed(options, base, newest, best)
        if checkpoint:
            return checkpoint
        path = None
    if path is None and options.stage == "finetune":
        return to_finetune(options, base, newest, best)
    anew = path is None or is_elsewhere(options)
    if (newest.exists() or best.exists()) and anew and not options.overwrite:
        raise UserError(
            f"{folder} holds an earlier run on {base}: continue it with --resume, "
            "choose another --output_folder, or give it up with --overwrite"
        )
    if path is None:
        return None
    return checked(path, checkpoints.load_checkpoint(path, checkpoints.RUN_KEYS), options)


def resumed(options, base, newest, best):
    """The checkpoint that --resume goes on from; None where the run or stage 2 is to start."""
    import checkpoints

    if options.model is not None or options.overwrite:
        raise UserError("--resume goes without --model and --overwrite")
    keys = checkpoints.RUN_KEYS
    path, checkpoint = checkpoints.newest_whole_checkpoint([newest, best], keys) or (None, None)
    if checkpoint is None and (newest.exists() or best.exists()):
        raise UserError(
            f"no checkpoint of {base} in {options.output_folder} can be continued: start anew with "
            "--overwrite, or in another --output_folder"
        )
    if checkpoint is None or (checkpoint["stage"], options.stage) == ("decoder", "finetune"):
        return None
    print(f"resuming from {path}: {where(checkpoint)}")
    return checked(path, checkpoint, options)


def to_finetune(options, base, newest, best):
    """The best checkpoint of stage 1, to fine-tune from."""
    import checkpoints

    keys = checkpoints.RUN_KEYS
    if not best.exists():
        raise UserError(
            f"--stage finetune starts from a trained decoder, and {best} is missing: "
            "train with --stage decoder first, or name one with --model"
        )
    latest = checkpoints.load_checkpoint(newest if newest.exists() else best, keys)
    if latest["stage"] == "finetune" and not options.overwrite:
        raise UserError(
            f"{options.output_folder} holds an earlier fine-tuning of {base}: continue it with "
            "--resume, or give it up with --overwrite"
        )
    checkpoint = checked(best, checkpoints.load_checkpoint(best, keys), options)
    log = [record for record in latest["log"] if record["stage"] == "decoder"]
    # with the epochs after the best, too, and without those of a fine-tuning given up
    return checkpoint | {"log": log, "stage": "decoder"}


def is_elsewhere(options):
    """Whether --model is another folder's, whose run goes on in the output folder."""
    path, folder = options.model, options.output_folder
    return path is not None and Path(path).resolve().parent != folder.resolve()


def checked(path, checkpoint, options):
    """The checkpoint, if its stage may be continued; says which options are not those of its run.

    Raises:
        UserError: it is past the stage asked for.
    """
    if options.stage == "decoder" and checkpoint["stage"] != "decoder":
        raise UserError(f"{path} is past stage decoder: continue it with --stage finetune")
    before, now = checkpoint["options"], plain(options)
    of_model = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in DROPOUTS]
    fixed = [name for name in of_model if now[name] != before.get(name, now[name])]
    if fixed:
        print(f"the model is the checkpoint's: {as_flags({n: before[n] for n in fixed})}")
    apart = {"model", "resume", "overwrite", "output_folder", "data_folder", "tensorboard"}
    apart.add("karpathy_json")
    apart.update(of_model)
    other = {n: now[n] for n in now if n not in apart and now[n] != before.get(n, now[n])}
    if other:
        print(f"other options than its run had: {as_flags(other)}")
    return checkpoint


def plain(options: argparse.Namespace):
    """The options as numbers and text, by name, as they are given on the command line."""
    unit, count = options.save_every
    as_given = vars(options) | {"save_every": f"{count}m" if unit == "minutes" else str(count)}
    return {
        name: value if isinstance(value, str | int | float | None) else str(value)
        for name, value in as_given.items()
    }


def where(checkpoint):
    """How far the run of a checkpoint has come, for people."""
    inside = f" and {checkpoint['step']} steps" if checkpoint["step"] else ""
    return f"stage {checkpoint['stage']}, {checkpoint['epoch']} epochs{inside}"


if __name__ == "__main__":
    run(main)
