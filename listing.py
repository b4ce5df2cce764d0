"""What there is to choose from, out of the registries: decoders, attentions, encoders."""

import dataclasses
import inspect
import textwrap

import checkpoints  # noqa: F401 -- it imports every decoder's module
from annotations import MapConfig
from attentions import ATTENTIONS
from config import ModelConfig
from contract import DECODERS, config_fields
from encoders import OFFLINE_ENCODER
from groundwork.options import as_flags
from networks import torchvision_names

WIDTH = 100  # characters of a line


def describe():
    """A text of all decoders, with the options that are theirs and the defaults, all attentions,
    and where encoders come from."""
    decoders = [
        line for name in DECODERS for line in [*_entry(name, DECODERS[name]), *_options(name)]
    ]
    attentions = [line for name in ATTENTIONS for line in _entry(name, ATTENTIONS[name])]
    encoders = [
        *_wrapped(f"{OFFLINE_ENCODER}: needs no download, its weights are a package's"),
        *_wrapped(
            "timm:NAME: the convolutional networks and vision transformers of timm.list_models()"
        ),
        *_wrapped(
            "torchvision's classifiers, of which some have no grid of features and are refused: "
            + ", ".join(torchvision_names())
        ),
    ]
    return "\n".join(
        ["decoders (--decoder):", *decoders]
        + ["", "attentions (--attention), of decoders that have the option:", *attentions]
        + ["", "encoders (--encoder):", *encoders]
    )


def _entry(name, kind):
    """Its name, and the first paragraph of its class's docstring."""
    first = inspect.cleandoc(kind.__doc__).partition("\n\n")[0]
    return [f"  {name}", *textwrap.indent(first, "    ").splitlines()]


def _options(name):
    """Those of train.py's options that the decoder of that name has, with its own defaults."""
    usual = dataclasses.asdict(ModelConfig())
    of_maps = {field.name for field in dataclasses.fields(MapConfig)}  # every decoder's alike
    flags = [
        as_flags({key: field.default if usual[key] is None else usual[key]})
        for key, field in config_fields(name).items()
        if key in usual and key not in of_maps
    ]
    tied = " ".join(flag.replace(" ", "\N{NO-BREAK SPACE}") for flag in flags)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in _wrapped(tied, "      ")]


def _wrapped(text, indent="  "):
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
