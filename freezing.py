"""An encoder's network made faster for captioning alone, where its weights stay as they are."""

import copy
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# What oneDNN, PyTorch's library on CPUs, calls them, with their limits
ACTIVATIONS = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.Hardswish: ("hardswish", []),
    nn.SiLU: ("swish", []),
}
SIDE = 32  # of the map that a convolution is tried on, no smaller than its kernel


def fold_batch_norm(network):
    """A copy of a network in which each BatchNorm is a part of the convolution before it.

    It computes the same but for rounding, if its modules run in their order.
    """
    folded = copy.deepcopy(network)
    for parent in list(folded.modules()):
        for (first, conv), (second, norm) in pairwise(parent.named_children()):
            if isinstance(conv, nn.Conv2d) and type(norm) is nn.BatchNorm2d:
                setattr(parent, first, fuse_conv_bn_eval(conv, norm))
                setattr(parent, second, nn.Identity())
    return folded


@torch.no_grad()
def keep_in_bfloat16(network):
    """A copy of a network on a CPU whose convolutions have their weights in bfloat16, of which
    autocast would make copies at each call, and compute the activation function behind them in the
    same pass, where it follows in an nn.Sequential."""
    kept = copy.deepcopy(network)
    for parent in list(kept.modules()):
        layers = [pair for pair in parent.named_children() if type(pair[1]) is not nn.Identity]
        for (_, conv), (name, layer) in pairwise([*layers, (None, None)]):
            if not isinstance(conv, nn.Conv2d):
                continue
            conv.to(torch.bfloat16)
            known = isinstance(parent, nn.Sequential) and type(layer) in ACTIVATIONS
            if known and _join(conv, layer):
                setattr(parent, name, nn.Identity())
    return kept


def can_join():
    """Whether this PyTorch and processor have the operation for it, which is not documented."""
    operations = torch.ops.mkldnn
    return (
        hasattr(operations, "_convolution_pointwise")
        and hasattr(operations, "_is_mkldnn_bf16_supported")
        and operations._is_mkldnn_bf16_supported()
    )


def _join(conv, activation):
    """Makes the convolution compute the activation function, too. One that does not come out the
    same, as its class computes otherwise than nn.Conv2d, stays as it was: whether it did."""
    if not can_join() or isinstance(conv.padding, str):
        return False
    grid = torch.rand(1, conv.in_channels, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    grid = grid.to(torch.bfloat16, memory_format=torch.channels_last) - 0.5
    expected = activation(conv(grid))
    places = conv.padding, conv.stride, conv.dilation, conv.groups
    conv._conv_forward = partial(_convolve, places, *ACTIVATIONS[type(activation)])
    found = conv(grid)
    if found.shape == expected.shape and (found - expected).norm() <= 0.01 * expected.norm():
        return True
    del conv._conv_forward
    return False


def _convolve(places, kind, limits, x, weight, bias):
    """In place of `nn.Conv2d._conv_forward`, with the activation function behind it."""
    x = x.to(weight.dtype)
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *places, kind, limits, "")
