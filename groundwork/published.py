"""Reads checkpoints of the older published form, whole pickled modules, without unpickling them."""

import math
from pathlib import Path

from torch import Tensor

from groundwork import torch_files
from groundwork.torch_files import Inert

DEPTH, NAME = 20, 200  # of modules in modules; letters of a tensor's name


def read(path):
    """The checkpoint as train.py would have saved it, without a word map: see `checkpoints`.

    Raises:
        ValueError and others, of nearly any class: the file is damaged, is no such checkpoint, or
            names what such a checkpoint needs not.
    """
    contents = torch_files.read(path, inert=True)
    if not isinstance(contents, dict) or not {"encoder", "decoder"} <= contents.keys():
        raise ValueError("it holds no encoder and decoder")
    encoder, decoder = (_unwrapped(contents[name]) for name in ("encoder", "decoder"))
    name = Path(path).name.removesuffix(".pth.tar").removeprefix("BEST_")
    seen = set()
    return {
        "encoder_name": "resnet101",  # all of them, trained on squares of 256 pixels
        "encoded_image_size": encoder.state.get("enc_image_size", 14),
        "image_size": 256,
        "encoder": dict(_named_tensors(encoder, seen)),
        "decoder": dict(_named_tensors(decoder, seen)),
        "base": name.removeprefix("checkpoint_") if name.startswith("checkpoint_") else "",
        "options": {"data_folder": "data"},
        "stage": "decoder" if contents.get("encoder_optimizer") is None else "finetune",
        "epoch": contents.get("epoch", 0),
        "scores": {"bleu4": float(contents.get("bleu-4", math.nan))},
    }


def _unwrapped(module):
    """The module inside one of `torch.nn.parallel`, which have it under the name "module"."""
    inner = module.state.get("_modules", {})
    return inner["module"] if isinstance(inner, dict) and inner.keys() == {"module"} else module


def _named_tensors(module, seen, prefix="", depth=0):
    """Yields what the module's state dict holds. A module that is met twice would make a small
    file a large dict."""
    if not isinstance(module, Inert) or id(module) in seen or depth > DEPTH or len(prefix) > NAME:
        raise ValueError("its encoder and decoder are no modules of the published form")
    seen.add(id(module))
    for kind in ("_parameters", "_buffers"):
        for name, tensor in module.state.get(kind, {}).items():
            if isinstance(tensor, Tensor) and len(name) < NAME:
                yield prefix + name, tensor
    for name, child in module.state.get("_modules", {}).items():
        yield from _named_tensors(child, seen, f"{prefix}{name}.", depth + 1)
