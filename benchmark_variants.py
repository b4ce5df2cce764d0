"""What each decoder and each attention costs in training, beside the LSTM with soft attention, and
what self-critical training does beside cross-entropy.

All have the sizes and choices of `--recipe attending`, as far as they have such fields: two stages
of the encoder, the query that knows the previous word, the deep output.
"""

import math
from functools import partial

import torch

import checkpoints  # noqa: F401, so that all decoders are known
import rewards
from attentions import ATTENTIONS
from benchmark_data import Loss
from benchmark_report import machine
from constraints import MAX_LENGTH
from contract import DECODERS, build_decoder, config_fields, make_config
from engine import Network, add_gradients
from groundwork.progress import progress, say
from groundwork.timing import alternate
from self_critical import SelfCritical
from training_options import ATTENDING

# Flickr8k's: a batch of --batch_size 160, its vocabulary, and lite2's stages of stride 16 and 32 of
# images of 256 pixels.
IMAGES, PER_IMAGE, WORDS, VOCABULARY = 32, 5, 11, 2464
STAGES = {"stage_dims": (120, 352), "stage_factors": (2, 1), "encoder_dim": 4 * 120 + 352}
SIZES = {"feature_norm": "layer", "vocab_size": VOCABULARY}


def print_table(device, amp, rounds):
    """Times training steps of every attention in the LSTM and of every other decoder with its own,
    and a self-critical step, each alternating with the LSTM's with soft attention, and prints a
    Markdown table: each row as soon as it is measured.

    Args:
        device, amp: where, and whether in bfloat16.
        rounds: of which the median is taken.
    """
    captions = f"{IMAGES * PER_IMAGE} captions of {IMAGES} images"
    say(f"training steps in {'bfloat16' if amp else 'float32'}, {machine(device)}, {captions}")
    say("")
    say("| decoder | attention | parameters | time, of `lstm` with `soft` 1 |")
    say("| --- | --- | ---: | ---: |")
    step = _make_step(device, amp, Loss())
    usual = _decoder("lstm", "soft", device)
    variants = [("lstm", attention, step) for attention in ATTENTIONS]
    variants += [(name, None, step) for name in DECODERS if name != "lstm"]
    variants += [("lstm", "soft", _make_step(device, amp, _self_critical()))]
    for name, attention, own in progress(variants, desc="benchmark", unit="variant"):
        decoder = _decoder(name, attention, device)
        ours, theirs = alternate(device, rounds, partial(own, decoder), partial(step, usual))
        millions = sum(parameter.numel() for parameter in decoder.parameters()) / 1e6
        attention = getattr(decoder.config, "attention", "—")
        kind = "" if own is step else ", self-critical"
        say(f"| {name}{kind} | {attention} | {millions:.1f} M | {ours / theirs:.2f} |")


def _word_map():
    words = ["<pad>", *map(str, range(1, VOCABULARY - 3)), "<unk>", "<start>", "<end>"]
    return {word: index for index, word in enumerate(words)}


def _self_critical():
    """The objective of self-critical training by CIDEr-D."""
    corpus = torch.randint(1, VOCABULARY, (6000, PER_IMAGE, WORDS)).tolist()
    return SelfCritical(rewards.CiderD(corpus), _word_map(), MAX_LENGTH, PER_IMAGE)


def _make_step(device, amp, objective):
    """A function of a decoder: a training step but for the optimizer's, on one random batch."""
    torch.manual_seed(0)
    features = torch.randn(IMAGES, 8, 8, STAGES["encoder_dim"], device=device)
    captions = torch.randint(1, VOCABULARY, (IMAGES, PER_IMAGE, WORDS + 2), device=device)
    lengths = torch.full((IMAGES, PER_IMAGE), WORDS + 2)

    def step(decoder):
        network = Network(None, decoder, device, amp)
        add_gradients(network, [(features, captions, lengths)], objective, [*decoder.parameters()])

    return step


def _decoder(name, attention, device):
    fields = config_fields(name)
    values = STAGES | SIZES | ATTENDING | ({"attention": attention} if attention else {})
    config = make_config(name, {key: values[key] for key in fields if key in values})
    decoder = build_decoder(name, config).to(device)
    # captions that it draws end after so many words in the mean
    decoder.fc.bias.data[_word_map()["<end>"]] = math.log(VOCABULARY / (WORDS - 1))
    if attention == "hard":
        decoder.attention.SOFT_SHARE = 0.0  # what is timed are the drawn steps, not a mixture
    return decoder
