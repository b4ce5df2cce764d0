"""What each decoder and each attention costs in training, beside the paper's own."""

from functools import partial
from typing import NamedTuple

import torch

import checkpoints  # noqa: F401, so that all decoders are known
from attentions import ATTENTIONS
from contract import DECODERS, build_decoder, config_fields, make_config
from groundwork.timing import alternate
from objectives import caption_loss

# Flickr8k's: a batch of --batch_size 160, its vocabulary, and lite2's stages of stride 16 and 32 of
# images of 256 pixels.
IMAGES, PER_IMAGE, WORDS, VOCABULARY = 32, 5, 11, 2464
STAGES = {"stage_dims": (120, 352), "stage_factors": (2, 1), "encoder_dim": 4 * 120 + 352}
SIZES = {"encoded_image_size": 16, "feature_norm": "layer", "vocab_size": VOCABULARY}
CHOICES = {"attention_dim": 128, "query": "word", "deep_output": True}  # of --recipe attending


class Variant(NamedTuple):
    """A line of the table."""

    decoder: str
    attention: str
    parameters: int
    ratio: float  # of its time to that of the first


def variants(device, amp, rounds):
    """Training steps of every attention in the paper's decoder and of every other decoder with its
    own, each alternating with the paper's: a `Variant` each.

    Args:
        device, amp: where, and whether in bfloat16.
        rounds: of which the median is taken.
    """
    torch.manual_seed(0)
    features = torch.randn(IMAGES, 8, 8, STAGES["encoder_dim"], device=device)
    captions = torch.randint(1, VOCABULARY, (IMAGES * PER_IMAGE, WORDS + 2), device=device)
    lengths = torch.full((IMAGES * PER_IMAGE,), WORDS + 2)

    def step(decoder):
        decoder.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            loss = caption_loss(*decoder(features, captions, lengths))
        loss.backward()

    usual = _decoder("lstm", "soft", device)
    pairs = [("lstm", attention) for attention in ATTENTIONS]
    pairs += [(name, None) for name in DECODERS if name != "lstm"]
    for name, attention in pairs:
        decoder = _decoder(name, attention, device)
        ours, theirs = alternate(device, rounds, partial(step, decoder), partial(step, usual))
        count = sum(parameter.numel() for parameter in decoder.parameters())
        yield Variant(name, getattr(decoder.config, "attention", "—"), count, ours / theirs)


def _decoder(name, attention, device):
    fields = config_fields(name)
    values = STAGES | SIZES | CHOICES | ({"attention": attention} if attention else {})
    config = make_config(name, {key: values[key] for key in fields if key in values})
    return build_decoder(name, config).to(device)


def describe_variants(found, device, amp):
    """The table in Markdown."""
    lines = [
        f"training steps in {'bfloat16' if amp else 'float32'} on {device.type}, "
        f"{IMAGES * PER_IMAGE} captions of {IMAGES} images",
        "",
        "| decoder | attention | parameters | time |",
        "| --- | --- | ---: | ---: |",
    ]
    lines += [
        f"| {v.decoder} | {v.attention} | {v.parameters / 1e6:.1f} M | {v.ratio:.2f} |"
        for v in found
    ]
    return "\n".join(lines)
