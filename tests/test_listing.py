"""`train.py --list`: what there is, out of the registries."""

import re
from dataclasses import dataclass

import pytest
from conftest import run_here
from test_structure import MODULES, imports

import listing
from attentions import ATTENTIONS, Attention
from contract import DECODERS, Decoder
from networks import OFFLINE_ENCODERS


@dataclass
class StubConfig:
    vocab_size: int
    encoder_dim: int
    encoded_image_size: int = 14
    embed_dim: int = 77
    gate: str = "scalar"
    unknown: int = 5  # no option of train.py's


class Stub(Decoder):
    """Says nothing (Nobody, 1999, §0),
    and twice.

    The second paragraph.
    """

    Config = StubConfig


class Glance(Attention):
    """Looks away (Nobody, 2000)."""


def test_what_is_registered_is_listed(monkeypatch):
    monkeypatch.setitem(DECODERS, "stub", Stub)
    monkeypatch.setitem(ATTENTIONS, "glance", Glance)
    process = run_here("train.py", "--list")
    assert process.returncode == 0 and process.stderr == ""
    decoders, attentions, encoders = process.stdout.split("\n\n")
    assert (
        "  stub\n    Says nothing (Nobody, 1999, §0),\n    and twice.\n"
        "      --embed_dim 77 --gate scalar" in decoders
    )
    assert "second paragraph" not in decoders and "unknown" not in decoders
    assert "  glance\n    Looks away (Nobody, 2000)." in attentions
    for text, registry in ((decoders, DECODERS), (attentions, ATTENTIONS)):
        assert re.findall(r"^  (\S+)$", text, re.MULTILINE) == list(registry)
    for name in (*OFFLINE_ENCODERS, "timm:NAME", "resnet101", "vgg19"):
        assert name in encoders
    assert "--attention_dim 512" in decoders  # the decoder's own
    assert decoders.count("--heads") == 1  # the transformer's: of the others' attentions one has it
    options = dict(re.findall(r"^  (\S+)$(?:\n    \S.*)+\n      (--.*)", attentions, re.MULTILINE))
    assert options["multihead"] == "--attention_dim --query state --heads 4"
    assert options["soft"] == "--attention_dim --query state" and "none" not in options
    assert max(map(len, process.stdout.splitlines())) <= listing.WIDTH


@pytest.mark.parametrize("kind", [*DECODERS.values(), *ATTENTIONS.values()])
def test_every_variant_names_its_source(kind):
    """A paper's year and section, or a tutorial's."""
    first = " ".join(kind.__doc__.partition("\n\n")[0].split())
    assert re.search(r"\b(19|20)\d\d\b", first), first
    assert "§" in first or "appendix" in first or "tutorial" in first, first


def test_listing_imports_no_more_than_it_needs():
    found, waiting = set(), ["listing"]
    while waiting:
        found.add(name := waiting.pop())
        waiting += imports(MODULES[name]) - found
    assert not found & {"training", "engine", "run_state", "datasets", "evaluation", "metrics"}
