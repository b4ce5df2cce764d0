"""An encoder's network made faster for captioning alone, where its weights stay as they are."""

import copy
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

# What oneDNN, PyTorch's library on CPUs, calls what follows a convolution, with its limits
FOLLOWING = {
    nn.Identity: ("none", []),
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


def can_call_onednn(dtype):
    """Whether this PyTorch and processor have the operation, which is not documented."""
    operations = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(operations, "_convolution_pointwise")
        and (dtype == torch.float32 or operations._is_mkldnn_bf16_supported())
    )


@torch.no_grad()
def through_onednn(network, dtype):
    """A copy of a network on a CPU whose convolutions call oneDNN themselves.

    They compute the activation function behind them in the same pass, where it follows in an
    nn.Sequential. In bfloat16 their weights are kept in it, of which autocast would make copies at
    each call. In float32 it pays with one thread, for which PyTorch does without oneDNN; with more
    they compute as before.

    Args:
        dtype: float32, or bfloat16 to be called by autocast.
    """
    changed = copy.deepcopy(network)
    for parent in list(changed.modules()):
        layers = [pair for pair in parent.named_children() if type(pair[1]) is not nn.Identity]
        for (_, conv), (name, layer) in pairwise([*layers, (None, None)]):
            if not isinstance(conv, nn.Conv2d):
                continue
            conv.to(dtype)
            follows = isinstance(parent, nn.Sequential) and type(layer) in FOLLOWING
            if _call_onednn(conv, layer if follows else nn.Identity()) and follows:
                setattr(parent, name, nn.Identity())
    return changed


def _call_onednn(conv, following):
    """Makes the convolution call oneDNN, and compute what follows it. One that does not come out
    the same, as its class computes otherwise than nn.Conv2d, stays as it was: whether it did."""
    if not can_call_onednn(conv.weight.dtype) or isinstance(conv.padding, str):
        return False
    grid = torch.rand(1, conv.in_channels, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    grid = grid.to(conv.weight.dtype, memory_format=torch.channels_last) - 0.5
    expected = following(conv(grid))
    places = conv.padding, conv.stride, conv.dilation, conv.groups
    conv._conv_forward = partial(_convolve, places, following)
    found = conv(grid)
    if found.shape == expected.shape and (found - expected).norm() <= 0.01 * expected.norm():
        return True
    del conv._conv_forward
    return False


def _convolve(places, following, x, weight, bias):
    """In place of `nn.Conv2d._conv_forward`, with what follows. oneDNN's operation has no
    gradients, and other programs do not know it."""
    x = x.to(weight.dtype)
    several = x.dtype == torch.float32 and torch.get_num_threads() > 1
    if several or x.requires_grad or torch.compiler.is_exporting():
        padding, stride, *others = places
        return following(F.conv2d(x, weight, bias, stride, padding, *others))
    kind, limits = FOLLOWING[type(following)]
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *places, kind, limits, "")
