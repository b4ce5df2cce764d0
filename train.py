"""Trains the model in two stages: the decoder on a frozen encoder, then both together. A third, for
who asks for it, trains the decoder by the scores of captions that it draws.

Without arguments it takes the one prepared data set in data/; where there is none it makes the
demo data and trains on that.
"""

import argparse
import dataclasses
import os
from contextlib import nullcontext

from config import ModelConfig, TrainingConfig
from groundwork.errors import UserError, run
from groundwork.files import check_folder, folder_for, make_folder, sole_writer
from groundwork.options import as_arguments, as_flags
from training_options import (
    DEMO_DEFAULTS,
    IDLE_IN_SCST,
    SCST_DEFAULTS,
    SCST_OPTIONS,
    make_parser,
    typed_options,
)

# What says which run it is, and where; all other options are the run's own, until others are typed
APART = {
    "model", "resume", "overwrite", "extend_vocabulary", "prune_features", "data_folder",
    "data_name", "output_folder", "regions", "region_words",
}  # fmt: skip


def main():
    parser = make_parser(__doc__)
    typed = typed_options(parser)

    # what follows takes seconds to import
    if typed.pop("list", False):
        import listing

        print(listing.describe())
        return
    import torch

    import continuation
    import parts_of_speech
    from groundwork import distributed, tensorboard_log
    from groundwork.devices import choose_device

    request = make(continuation.Request, typed)
    start = continuation.find_start(request, parser.get_default("data_folder"))
    if start is not None and start.begins == "scst":  # where its run's options were another stage's
        typed = SCST_DEFAULTS | typed
    options = settle(parser, typed, start)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its start
        torch.use_deterministic_algorithms(True)
    if options.tensorboard:
        tensorboard_log.check_installed()
        parts_of_speech.check_installed()
    if options.regions is not None and not options.tensorboard:
        raise UserError("--regions are for --tensorboard, which shows how the attention fits")
    if options.region_words and options.regions is None:
        raise UserError("--region_words are for --regions")
    device = choose_device(options.device)
    with distributed.group(device):
        train(parser, options, typed, request, start, device)


def train(parser, options, typed, request, start, device):
    """Trains with the options, or with the demo data's defaults for those not given."""
    import torch

    import checkpoints
    import choices
    from continuation import check_nothing_is_lost
    from datasets import is_demo
    from groundwork import distributed

    base = find_or_make_data(parser, options, typed, start)
    if is_demo(base):
        options = settle(parser, typed, start, DEMO_DEFAULTS)
        if start is None:
            print(f"demo data, so the defaults are {as_flags(DEMO_DEFAULTS)}")
    if start is None:
        choices.check(vars(options), make_parser().typed())
    choices.check_training(vars(options), typed)
    torch.manual_seed(options.seed)

    with folder_for(options.output_folder or options.data_folder) as options.output_folder:
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
    import choices
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
                check_folder(folder, "--data_folder")
                raise UserError(f"no data set in {folder}: run create_input_files.py")
            if start is None:  # before it is drawn
                usual = settle(parser, typed, start, DEMO_DEFAULTS)
                choices.check(vars(usual), make_parser().typed())
                choices.check_training(vars(usual), typed)
            print(f"no data set in {folder}: making the demo data there")
            folder = make_folder(folder)
            with sole_writer(folder / "demo", "wait for it, or use another --data_folder"):
                base = demo.prepare(folder)
    return base


def run_stages(options, typed, base, start, device):
    """The stages asked for, of the run that the output folder is for."""
    import torch

    import checkpoints
    import fused
    from continuation import is_elsewhere
    from run_state import RunFiles
    from training import Training

    checkpoint = start and start.checkpoint
    state = make_state(options, typed, base, checkpoint, device)
    extends = start is not None and start.extends
    reached = checkpoint["stage"] if checkpoint and not extends else checkpoints.STAGES[0]
    stages = ["decoder", "finetune"] if options.stage == "both" else [options.stage]
    stages = stages[stages.index(reached) if reached in stages else 0 :]
    files = RunFiles(options.output_folder, base)
    fused.build(device)
    with torch.autograd.set_detect_anomaly(options.detect_anomaly):
        training = Training(
            state,
            files,
            options.data_folder,
            cache=options.cache_features == "auto",
            save_every=options.save_every,
            workers=options.workers,
            events=options.tensorboard,
            regions_file=(options.regions, options.region_words.split()),
            karpathy_json=options.karpathy_json,
            prune=options.prune_features,
        )
        anew = start is None or extends or is_elsewhere(start, options.output_folder)
        goes_on = None if extends else checkpoint
        training.run(stages, goes_on, start and start.path, anew)


def make_state(options, typed, base, checkpoint, device):
    """The `RunState` of a run that begins now, its model that of the checkpoint if there is one."""
    import torch

    import choices
    import transfer
    from datasets import describe_data, read_word_map
    from engine import Network
    from groundwork import distributed, provenance
    from groundwork.devices import has_fast_bfloat16
    from run_state import RunState, best_record

    folder, word_map = options.data_folder, read_word_map(options.data_folder, base)
    extends = options.extend_vocabulary
    if checkpoint:
        transfer.check_words(checkpoint["word_map"], word_map, base, extends)
    data = describe_data(folder, base)
    record = provenance.describe(data, options.seed, device)
    encoder, decoder = make_models(options, checkpoint, base, word_map)
    in_force = choices.in_force(encoder, decoder)
    if checkpoint:
        choices.check_unchanged(typed, make_parser().typed(), in_force, checkpoint["options"])
    if options.scst_lr is None:
        options.scst_lr = decoder.scst_lr
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
        log=checkpoint["log"] if checkpoint and not extends else [],
        best=best_record(checkpoint) if checkpoint and not extends else None,
    )


def make_models(options, checkpoint, base, word_map):
    """Encoder and decoder: of the checkpoint, or new."""
    import checkpoints
    import transfer
    import vocabulary
    from choices import DROPOUTS

    if checkpoint:
        dropouts = {name: getattr(options, name) for name in DROPOUTS}
        changes = {name: value for name, value in dropouts.items() if value is not None}
        encoder, decoder = checkpoints.build_models(checkpoint, **changes)
        if len(word_map) > len(checkpoint["word_map"]):
            decoder = transfer.extend(decoder, checkpoint["word_map"], word_map)
    else:
        encoder, decoder = new_models(options, base, word_map)
    if options.freeze_embeddings:
        vocabulary.freeze_embeddings(decoder)
    return encoder, decoder


def new_models(options, base, word_map):
    """Encoder and decoder before training."""
    import checkpoints
    import vocabulary
    from datasets import CaptionDataset, count_targets
    from encoders import Encoder

    weights = options.encoder_weights or "DEFAULT"
    stages = options.encoder_stages.split()
    encoder = Encoder(options.encoder, options.encoded_image_size, weights, stages)
    vectors = read_vectors(options.embeddings, word_map)
    values = dataclasses.asdict(make(ModelConfig, vars(options))) | {"vocab_size": len(word_map)}
    values["feature_norm"] = options.feature_norm or ("layer" if len(stages) > 1 else "none")
    if vectors is not None:
        values["embed_dim"] = vectors.shape[1]
    values |= checkpoints.sizes_of_features(encoder)
    values = {name: value for name, value in values.items() if value is not None}
    decoder = checkpoints.new_decoder(options.decoder, values)
    if vectors is not None:
        vocabulary.set_vectors(decoder, vectors)
    if options.bias_init == "frequencies":
        data = CaptionDataset(
            options.data_folder, base, "TRAIN", karpathy_json=options.karpathy_json
        )
        vocabulary.set_frequencies(decoder, count_targets(data, len(word_map)))
    if options.bar_special:
        vocabulary.bar(decoder, word_map)
    return encoder, decoder


def read_vectors(source, word_map):
    """The words' vectors that --embeddings names, a random one where there is none: (V, E); None
    without the option."""
    import embeddings

    if source is None:
        return None
    found = embeddings.read_vectors(source, word_map)
    vectors = embeddings.complete(found, len(word_map))
    print(f"{source}: vectors for {len(found):,} of {len(word_map):,} words")
    return vectors


def make(kind, values):
    """A dataclass of those values of a dict that have its fields' names."""
    return kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values})


# --------------------------------------------------------------------------------- which options


def settle(parser, typed, start, defaults=None):
    """The options: those typed, else those of the run that goes on, else the defaults.

    Args:
        typed: from `typed_options`.
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
    from choices import DROPOUTS
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
    apart |= {*(IDLE_IN_SCST if options.stage == "scst" else SCST_OPTIONS)}
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
