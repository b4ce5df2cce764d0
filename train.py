"""Trains the model in two stages: the decoder on a frozen encoder, then both together.

Without arguments it takes the one prepared data set in data/; where there is none it makes the
demo data and trains on that.
"""

import argparse
import dataclasses
import os
from contextlib import nullcontext

from config import ModelConfig, TrainingConfig
from groundwork.errors import UserError, run
from groundwork.files import make_folder, sole_writer
from groundwork.options import (
    MAX_GRID,
    Joined,
    Parser,
    add_device_options,
    add_model_option,
    add_workers_option,
    as_arguments,
    as_flags,
    interval,
    number,
)

# Of the model's options, those that a checkpoint that is continued may have otherwise
DROPOUTS = ("dropout", "embed_dropout")
# What says which run it is, and where; all other options are the run's own, until others are typed
APART = {
    "model", "resume", "overwrite", "prune_features", "data_folder", "data_name", "output_folder",
}  # fmt: skip
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
    switch = argparse.BooleanOptionalAction  # a run that goes on may switch off what it had on

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
        action=switch,
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
    add(
        "--encoder_stages",
        nargs="+",
        action=Joined,
        metavar="STAGE",
        help="whose feature maps the attention sees, each at its own grid: strides, as 16 32, and "
        "last, the network's last map, which alone is the paper's",
    )
    add(
        "--feature_norm",
        choices=["layer", "none"],
        help="normalise each stage's annotation vectors; None: where there are several stages",
    )
    grid = number(int, above=0, below=MAX_GRID + 1)
    add("--encoded_image_size", type=grid, help="side of the attention's grid")
    add("--decoder", help="lstm, the paper's")
    add(
        "--gate",
        choices=["scalar", "channel"],
        help="one gate β_t, as in the paper, or one for each channel",
    )
    add("--deep_output", action=switch, help="the paper's output layer, eq. 7")
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
        training, "to go on from, with its model, of which only dropout may be changed"
    )
    add(
        "--resume",
        action="store_true",
        help="go on where the run in the output folder was stopped, or start it: the result is "
        "that of a run never stopped. As with --model and --stage finetune, the run's own "
        "options hold, but for those typed",
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
        action=switch,
        help="equal weights from equal runs on the same device; a CPU gives them anyway",
    )
    add(
        "--detect_anomaly",
        action=switch,
        help="find the operation whose gradient is not a number; slow",
    )
    add_workers_option(parser)
    add_device_options(parser)
    parser.set_defaults(**dict.fromkeys(("tensorboard", "deterministic", "detect_anomaly"), False))
    for kind in (ModelConfig, TrainingConfig):
        parser.set_defaults(**dataclasses.asdict(kind()))
    return parser


def main():
    parser = make_parser()
    typed = parser.typed()

    # what follows takes seconds to import
    import torch

    import continuation
    from groundwork import distributed, tensorboard_log
    from groundwork.devices import choose_device

    request = make(continuation.Request, typed)
    start = continuation.find_start(request, parser.get_default("data_folder"))
    options = settle(parser, typed, start)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its start
        torch.use_deterministic_algorithms(True)
    if options.tensorboard:
        tensorboard_log.check_installed()
    device = choose_device(options.device)
    with distributed.group(device):
        train(parser, options, typed, request, start, device)


def train(parser, options, typed, request, start, device):
    """Trains with the options, or with the demo data's defaults for those not given."""
    import torch

    import checkpoints
    from continuation import check_nothing_is_lost
    from datasets import is_demo
    from groundwork import distributed

    base = find_or_make_data(parser, options, typed, start)
    if is_demo(base):
        options = settle(parser, typed, start, DEMO_DEFAULTS)
        if start is None:
            print(f"demo data, so the defaults are {as_flags(DEMO_DEFAULTS)}")
    torch.manual_seed(options.seed)
    options.output_folder = make_folder(options.output_folder or options.data_folder)

    newest = checkpoints.checkpoint_path(options.output_folder, base)
    lock = sole_writer(newest, "wait for it, or choose another --output_folder")
    with lock if distributed.is_main else nullcontext():
        start = check_nothing_is_lost(start, request, options.output_folder, base)
        if start is not None:
            print(start)
            tell_options(options, typed, start)
        run_stages(options, typed, base, start, device)


def find_or_make_data(parser, options, typed, start):
    """Base name of the data set to train on: the demo data, made where there is none."""
    import demo
    from continuation import runs_in
    from datasets import find_data, is_demo
    from groundwork import distributed

    folder, default = options.data_folder, parser.get_default("data_folder")
    with distributed.main_first():
        base = find_data(folder, options.data_name)
        own = {start.checkpoint["base"]} if start else runs_in(options.output_folder or folder)
        # neither another data set nor the demo in the place of one that was not found
        astray = base not in own if start else base is None
        if own and astray and "data_folder" not in typed and not any(map(is_demo, own)):
            raise UserError(
                f"{', '.join(sorted(own))} is not in {folder}: name its folder with --data_folder"
            )
        if base is None:
            if folder != default:
                raise UserError(f"no data set in {folder}: run create_input_files.py")
            print(f"no data set in {folder}: making the demo data there")
            folder = make_folder(folder)
            with sole_writer(folder / "demo", "wait for it, or use another --data_folder"):
                base = demo.prepare(folder)
    return base


def run_stages(options, typed, base, start, device):
    """The stages asked for, of the run that the output folder is for."""
    import torch

    import checkpoints
    from continuation import is_elsewhere
    from run_state import RunFiles
    from training import Training

    checkpoint = start and start.checkpoint
    state = make_state(options, typed, base, checkpoint, device)
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
        anew = start is None or is_elsewhere(start, options.output_folder)
        training.run(stages, checkpoint, start and start.path, anew)


def make_state(options, typed, base, checkpoint, device):
    """The `RunState` of a run that begins now, its model that of the checkpoint if there is one."""
    import torch

    from datasets import describe_data, read_word_map
    from engine import Network
    from groundwork import distributed, provenance
    from groundwork.devices import has_fast_bfloat16
    from run_state import RunState, best_record

    folder, word_map = options.data_folder, read_word_map(options.data_folder, base)
    if checkpoint and checkpoint["word_map"] != word_map:
        raise UserError(f"the checkpoint is of another vocabulary than {base}'s word map")
    data = describe_data(folder, base)
    record = provenance.describe(data, options.seed, device)
    encoder, decoder = make_models(options, checkpoint, len(word_map))
    in_force = model_options(encoder, decoder)
    if checkpoint:
        check_model(typed, in_force, checkpoint["options"])
    encoder.to(device, memory_format=torch.channels_last)
    decoder.to(device)
    if not distributed.is_main:  # each process drops other values out
        torch.manual_seed(options.seed + distributed.rank)
    return RunState(
        Network(encoder, decoder, device, options.amp == "auto" and has_fast_bfloat16(device)),
        make(TrainingConfig, vars(options)),
        base,
        word_map,
        plain(options) | in_force | {"data_name": base},
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
    stages = options.encoder_stages.split()
    encoder = Encoder(options.encoder, options.encoded_image_size, weights, stages)
    values = dataclasses.asdict(make(ModelConfig, vars(options))) | {"vocab_size": vocab_size}
    values["feature_norm"] = options.feature_norm or ("layer" if len(stages) > 1 else "none")
    values |= checkpoints.sizes_of_features(encoder)
    return encoder, checkpoints.new_decoder(options.decoder, values)


def make(kind, values):
    """A dataclass of those values of a dict that have its fields' names."""
    return kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values})


# --------------------------------------------------------------------------------- which options


def settle(parser, typed, start, defaults=None):
    """The options: those typed, else those of the run that goes on, else the defaults.

    Args:
        typed: from `Parser.typed`.
        start: the `continuation.Start`, None of a new run.
        defaults: that take the place of the parser's.
    """
    options = vars(parser.parse_args([])) | (defaults or {})
    return argparse.Namespace(**(options | (recorded(typed, start) if start else {}) | typed))


def recorded(typed, start):
    """The options of the run that a checkpoint is of, as far as it tells them, and its folders.

    Raises:
        UserError: they cannot be.
    """
    from continuation import has_data

    def refuse(message):
        raise UserError(f"{start.path} is no checkpoint of train.py: its options: {message}")

    parser, base, kept = make_parser(), start.checkpoint["base"], start.checkpoint["options"]
    config = start.checkpoint["decoder_config"] or {}
    values = kept | {name: config[name] for name in DROPOUTS if name in config}
    default, own = parser.get_default("data_folder"), kept["data_folder"]
    folder = typed.get("data_folder", own if has_data(own, base) else default)  # it may have moved
    names = vars(parser.parse_args([])).keys() - APART
    parser.error = refuse
    return parser.typed(as_arguments({n: values[n] for n in names if n in values})) | {
        "output_folder": start.path.parent,
        "data_folder": folder,
        "data_name": base if has_data(folder, base) else None,
    }


def tell_options(options, typed, start):
    """Says which options hold where a run goes on."""
    before, now, usual = (
        start.checkpoint["options"], plain(options), plain(make_parser().parse_args([]))
    )  # fmt: skip
    apart = APART | {field.name for field in dataclasses.fields(ModelConfig)}
    now = {name: value for name, value in now.items() if name not in apart}
    own = {n: v for n, v in now.items() if n not in typed and n in before and v != usual[n]}
    other = {n: v for n, v in now.items() if n in typed and v != before.get(n, v)}
    missing = {n: v for n, v in now.items() if n not in before and n not in typed and v}
    for line, which in (
        ("the options of its run hold", own),
        ("other options than its run had", other),
        ("the checkpoint does not tell these options of its run, so the defaults hold", missing),
    ):
        if which:
            print(f"{line}: {as_flags(which)}")


def model_options(encoder, decoder):
    """Those of the model's options that the encoder and decoder in use have, by name."""
    values = dataclasses.asdict(decoder.config)
    values |= {"encoder": encoder.name, "decoder": decoder.name}
    values["encoder_stages"] = " ".join(encoder.stages)
    return {f.name: values[f.name] for f in dataclasses.fields(ModelConfig) if f.name in values}


def check_model(typed, in_force, before):
    """Raises UserError where other model options are typed than those of a checkpoint's model.

    Args:
        before: the options of the checkpoint's run.
    """
    fixed = {name: value for name, value in in_force.items() if name not in DROPOUTS}
    if "encoder_weights" in before:
        fixed["encoder_weights"] = before["encoder_weights"]
    other = {name: typed[name] for name in fixed if typed.get(name, fixed[name]) != fixed[name]}
    if other:
        theirs = as_flags({name: fixed[name] for name in other}) or "its own"
        raise UserError(
            f"{as_flags(other)}: the model is the checkpoint's, {theirs}: leave it out, or train "
            "another model in another --output_folder"
        )


def plain(options: argparse.Namespace):
    """The options as numbers and text, by name, as they are given on the command line."""
    unit, count = options.save_every
    as_given = vars(options) | {"save_every": f"{count}m" if unit == "minutes" else str(count)}
    return {
        name: value if isinstance(value, str | int | float | None) else str(value)
        for name, value in as_given.items()
    }


if __name__ == "__main__":
    run(main)
