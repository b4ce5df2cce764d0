"""A model's file: saving, reading what may be damaged or hostile, and the models made of it.

A checkpoint is a dict of tensors, numbers, texts, lists and dicts. Reading one runs no code in it,
and what it holds is checked before anything uses it.
"""

import io
import os
import sys
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

import contract
from encoders import Encoder, encoder_shapes
from groundwork import kinds, provenance, published, torch_files
from groundwork.errors import UserError, in_a_line
from groundwork.files import atomic_write, check_listable, check_readable
from groundwork.options import FITS, MAX_GRID, MAX_IMAGE_SIZE
from groundwork.wording import counted, some
from models import DecoderWithAttention

for module in ("recurrent", "transformer", "merge"):  # each registers its decoders
    import_module(module)

# ------------------------------------------------------------------------------------- contents


STAGES = ["decoder", "finetune", "scst"]  # of training, in their order


def measure_of(stage):
    """What a stage's objective measures beside its loss: words among the five likeliest, or the
    reward of captions drawn."""
    return "reward" if stage == "scst" else "top5"


def _is_size(value):
    return type(value) is int and 1 <= value <= MAX_IMAGE_SIZE


def _is_count(value):
    return type(value) is int and value >= 0


def _is_number(value):
    return type(value) in (int, float)


def _is_file_name(value):
    return isinstance(value, str) and value not in (".", "..") and not set(value) & set("/\\\0")


def _is_texts(value):
    """A dict of texts and numbers by name."""
    return _is_dict(value) and all(map(_is_text, value.values()))


def _is_choices(value):
    """A dict of texts and numbers, or lists of them, by name."""
    return _is_dict(value) and all(
        all(map(_is_text, item)) if isinstance(item, list | tuple) else _is_text(item)
        for item in value.values()
    )


def _is_text(value):
    return isinstance(value, str | int | float | None)


def _is_dict(value):
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_state_dict(value):
    return _is_dict(value) and value and all(isinstance(item, Tensor) for item in value.values())


def is_log(value):
    """Whether a value is a training log: a record an epoch, with what the curves show."""
    numbers = ("epoch", "lr", "loss", "val_loss", "bleu1", "bleu2", "bleu3", "bleu4")
    return isinstance(value, list) and all(
        _is_texts(line)
        and line.get("stage") in STAGES
        and all(_is_number(line.get(key)) for key in numbers)
        and all(_is_number(line.get(key, 0.0)) for key in ("encoder_lr", "cider", "reward"))
        for line in value
    )


def _is_records(value):
    return isinstance(value, list) and all(
        _is_texts(record) and record.keys() >= provenance.KEYS and _is_number(record["seconds"])
        for record in value
    )


def _is_random(value):
    return isinstance(value, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and isinstance(pair[0], Tensor)
        and all(state is None or state.dtype is torch.uint8 for state in pair)
        for pair in value
    )


def _is_means(value):
    return (
        _is_dict(value)
        and value.keys() == {"count", "sums"}
        and _is_number(value["count"])
        and _is_dict(value["sums"])
        and value["sums"].keys() in ({"loss", "top5"}, {"loss", "reward"})
        and all(map(_is_number, value["sums"].values()))
    )


# What captioning needs, and where it comes from: key -> whether its value can be that. A word map
# comes with it, or else from --word_map. The decoder's configuration is None in older files, whose
# tensors' shapes tell it.
MODEL_KEYS = {
    "encoder_name": lambda value: isinstance(value, str),
    "encoder_stages": lambda value: type(value) is tuple and all(type(s) is str for s in value),
    "encoded_image_size": lambda value: _is_size(value) and value <= MAX_GRID,
    "image_size": _is_size,
    "fit": lambda value: value in FITS,
    "encoder": _is_state_dict,
    "decoder": _is_state_dict,
    "decoder_name": lambda value: isinstance(value, str),
    "decoder_config": lambda value: value is None or _is_choices(value),
    "base": _is_file_name,
    "options": lambda value: _is_texts(value) and isinstance(value.get("data_folder"), str),
    "stage": lambda value: value in STAGES,
    "epoch": _is_count,
    "scores": _is_texts,
}
RUN_KEYS = MODEL_KEYS | {  # and what training needs to go on
    "optimizer": _is_dict,
    "schedule": _is_dict,
    "random": _is_random,
    "best_bleu4": _is_number,
    "best_record": lambda value: value is None or is_log([value]),
    "epochs_without_improvement": _is_count,
    "step": _is_count,
    "partial": _is_means,
    "seconds": _is_number,
    "order": _is_texts,
    "log": is_log,
    "word_map": _is_dict,
}
OPTIONAL = {
    "records": _is_records,
    "raw": lambda value: _is_dict(value) and all(map(_is_state_dict, value.values())),
    "averaged": _is_count,
}
# What older files lack: there was one decoder, one measure of the best epoch, one stage, one fit
OLDER = {
    "decoder_name": "lstm",
    "decoder_config": None,
    "best_record": None,
    "encoder_stages": ("last",),
    "fit": "squeeze",
}
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64}  # of weights


def _tensors(value):
    """All tensors in nested lists, tuples and dicts."""
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))  # a hostile file may hold a list that holds itself
            waiting += value.values() if isinstance(value, dict) else value


def _fault(checkpoint, keys):
    """What keeps a checkpoint's contents from being used, or None."""
    missing = keys.keys() - (checkpoint.keys() if isinstance(checkpoint, dict) else ())
    if missing:
        return f"is no checkpoint of train.py: it has no {', '.join(sorted(missing))}"
    for tensor in _tensors(checkpoint):
        plain = type(tensor) is Tensor and tensor.layout is torch.strided
        if not plain or tensor.is_quantized or tensor.device.type != "cpu":
            return "is no checkpoint of train.py: it holds a tensor of an unknown kind"
    for part in ("encoder", "decoder", "raw", "optimizer"):
        for tensor in _tensors(checkpoint.get(part)):
            if tensor.dtype not in DTYPES:
                return f"is no checkpoint of train.py: its {part} holds {tensor.dtype}"
            if not tensor.isfinite().all():
                return f"is of no use: its {part} holds values that are not finite"
    checks = keys | {key: fits for key, fits in OPTIONAL.items() if key in checkpoint}
    unfit = [key for key, fits in checks.items() if not fits(checkpoint[key])]
    if not unfit and "partial" in keys:
        own = measure_of(checkpoint["stage"])
        unfit = ["partial"] * (own not in checkpoint["partial"]["sums"])
    return f"is no checkpoint of train.py: its {unfit[0]} cannot be one" if unfit else None


# ---------------------------------------------------------------------------------------- files


def checkpoint_path(folder, base, best=False):
    """Where a run on data set `base` keeps its newest checkpoint, or its best."""
    return Path(folder) / f"{'BEST_' if best else ''}checkpoint_{base}.pth.tar"


def save_checkpoint(path, checkpoint):
    """Writes a dict of tensors, numbers, strings, lists and dicts, whole or not at all."""
    contents = io.BytesIO()
    torch.save(checkpoint, contents)  # not to the file: of a full disk it makes a RuntimeError
    with atomic_write(path) as temporary:
        temporary.write_bytes(contents.getbuffer())


def load_checkpoint(path, keys=MODEL_KEYS):
    """A checkpoint as train.py saves it, on the CPU; no code in it is run.

    Of a checkpoint of the older published form, whole modules, what captioning needs.

    Args:
        path: of the file, or of a folder, for the BEST checkpoint in it.
        keys: that it must have: `MODEL_KEYS`, or `RUN_KEYS` to continue its run.

    Raises:
        UserError: the file is missing, damaged, not to be read, or no checkpoint, or its contents
            are unfit.
    """
    path = find_checkpoint(path)
    check_readable(path, f"there is no checkpoint {path}")
    try:
        checkpoint = _read(path)
    except Exception as error:  # of many classes, for files that are no checkpoints
        if kind := kinds.kind_of(path):
            raise UserError(_of_another_kind(path, kind)) from error
        raise UserError(
            f"{path} is damaged or no checkpoint of train.py: {in_a_line(error)}"
        ) from error
    if isinstance(checkpoint, dict):
        checkpoint |= {key: value for key, value in OLDER.items() if key not in checkpoint}
    if fault := _fault(checkpoint, keys):
        raise UserError(f"{path} {fault}")
    return checkpoint


def _of_another_kind(path, kind):
    """What to say of a file that is no checkpoint, but what `kinds.kind_of` tells."""
    way_out = "name a checkpoint_….pth.tar that train.py has written, or its folder"
    if kind.startswith(kinds.PICTURE):
        way_out += "; pictures to caption are named apart, by caption.py --img"
    elif kind == kinds.SAFETENSORS:
        way_out += "; an encoder's weights are for train.py --encoder_weights"
    elif kind.startswith(kinds.PACKED):
        way_out = "unpack it first"
    elif kind == "empty":
        way_out = "copy it again, or train again"
    return f"{path} is {kind}, no checkpoint of train.py: {way_out}"


def _read(path):
    """A checkpoint of either form, its contents not looked at."""
    if torch_files.is_archive(path):
        try:
            torch_files.read(path, load=False)  # what would do harm raises an error here
        except ValueError:  # it is damaged, or holds modules
            return published.read(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    return published.read(path)


def best_checkpoints(folder):
    """Paths of the BEST checkpoints in a folder and below it."""
    return sorted(filter(os.path.isfile, Path(folder).glob("**/BEST_checkpoint_*.pth.tar")))


def find_checkpoint(path):
    """Path of a model that a user has named: of a folder, the BEST checkpoint in it or, where there
    is none, below it. Raises UserError where there are none or several."""
    path = Path(path)
    if not os.path.isdir(path):  # Path's own raises an error where the folder above is closed
        return path
    check_listable(path)
    found = best_checkpoints(path)
    found = [file for file in found if file.parent == path] or found
    if not found:
        other = sorted(path.glob("checkpoint_*.pth.tar"))
        hint = f"it has {some(other)}: name it" if other else "train with train.py, or name a file"
        raise UserError(f"no BEST checkpoint in the folder {path}: {hint}")
    if len(found) > 1:
        raise UserError(f"{path} holds {len(found)} models, name one: {some(found)}")
    return found[0]


def newest_best_checkpoint(folder):
    """Path of the newest BEST checkpoint in a folder or below it, for who has named none; says on
    stderr which it is where there are several. Raises UserError."""
    check_listable(folder)
    found = best_checkpoints(folder)
    if not found:
        raise UserError(
            f"no BEST checkpoint under {folder}/: train with train.py, or name one with --model"
        )
    newest, *others = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
    if others:
        older = counted(len(others), "older one", "older ones")
        print(f"taking {newest}; {older}, for --model: {some(others)}", file=sys.stderr)
    return newest


# --------------------------------------------------------------------------------------- models


def build_models(checkpoint, **changes):
    """The encoder and decoder of a checkpoint, in evaluation mode, on the CPU.

    Args:
        changes: values of the decoder's configuration that take the place of the checkpoint's,
            where its decoder has them: `dropout`, `embed_dropout`.

    Raises:
        UserError: its weights do not fit each other.
    """
    size, name = checkpoint["encoded_image_size"], checkpoint["encoder_name"]
    stages = checkpoint["encoder_stages"]
    shapes = {key: tensor.shape for key, tensor in checkpoint["encoder"].items()}
    if shapes != encoder_shapes(name, stages):  # before it takes memory
        raise UserError(
            f"the checkpoint's weights do not fit its models: the encoder's are not {name!r}'s"
        )
    encoder = Encoder(name, size, weights=None, stages=stages)
    try:
        encoder.load_state_dict(checkpoint["encoder"])
        decoder = _build_decoder(checkpoint, changes)
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            f"the checkpoint's weights do not fit its models: {in_a_line(error)}"
        ) from error
    if not _reads(decoder.config, encoder):
        raise UserError(f"the checkpoint's decoder is not for the features of {name!r}")
    return encoder.eval(), decoder.eval()


def sizes_of_features(encoder):
    """What decoders' configurations tell of the encoder, those that have these fields."""
    return {
        "encoder_dim": encoder.dim,
        "stage_dims": encoder.stage_dims,
        "stage_factors": encoder.stage_factors,
    }


def _reads(config, encoder):
    """Whether a decoder's configuration is for the encoder's features. In older ones no stages
    stand, for there was one."""
    return all(
        getattr(config, key, value) in (value, ())
        for key, value in sizes_of_features(encoder).items()
    )


def new_decoder(name, values):
    """A decoder with random weights.

    Args:
        name: of `contract.DECODERS`.
        values: by name; those that its configuration has no field for are passed over.

    Raises:
        UserError: there is no such decoder, or a value cannot be.
    """
    try:
        own = {key: values[key] for key in contract.config_fields(name) if key in values}
        return contract.build_decoder(name, contract.make_config(name, own))
    except ValueError as error:
        raise UserError(f"--decoder {name}: {error}") from error


def _build_decoder(checkpoint, changes):
    name, values, size = (
        checkpoint[key] for key in ("decoder_name", "decoder_config", "encoded_image_size")
    )
    if values is None:
        return DecoderWithAttention.from_state_dict(
            checkpoint["decoder"], encoded_image_size=size, **changes
        )
    changes = {key: value for key, value in changes.items() if key in contract.config_fields(name)}
    config = contract.make_config(name, values | changes)
    if config.encoded_image_size != size:
        raise ValueError(f"its grid is {config.encoded_image_size}, not {size}")
    return contract.build_decoder(name, config, checkpoint["decoder"])
