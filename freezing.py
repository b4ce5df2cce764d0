"""An encoder's network made faster for captioning alone, where its weights stay as they are."""

import copy
from collections import Counter
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
SIDE = 8  # of the map that a convolution is tried on, or that of a kernel that is larger


def fold_batch_norm(network):
    """A copy of a network in which each BatchNorm is a part of the convolution before it; one that
    has none itself.

    It computes the same but for rounding, if its modules run in their order.
    """
    if not any(type(module) is nn.BatchNorm2d for module in network.modules()):
        return network
    folded = copy.deepcopy(network)
    for parent in list(folded.modules()):
        for (first, conv), (second, norm) in pairwise(parent.named_children()):
            fits = isinstance(conv, nn.Conv2d) and type(norm) is nn.BatchNorm2d
            if fits and norm.track_running_stats:
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
    each call. In float32 this helps with one thread, where PyTorch does without oneDNN; with more
    they compute as before. A convolution that stands in several places stays as it is.

    Args:
        dtype: float32, or bfloat16, which the network is then to be called in by autocast.
    """
    changed = copy.deepcopy(network)
    places = Counter(child for parent in changed.modules() for child in parent.children())
    for parent in list(changed.modules()):
        layers = [pair for pair in parent.named_children() if type(pair[1]) is not nn.Identity]
        for (_, conv), (name, layer) in pairwise([*layers, (None, None)]):
            if not isinstance(conv, nn.Conv2d) or places[conv] > 1:
                continue
            conv.to(dtype)
            follows = isinstance(parent, nn.Sequential) and type(layer) in FOLLOWING
            if _call_onednn(conv, layer if follows else nn.Identity()) and follows:
                setattr(parent, name, nn.Identity())
    return changed


def _call_onednn(conv, following):
    """Makes the convolution call oneDNN, and compute what follows it.

    Returns:
        whether it did: one whose class computes otherwise than nn.Conv2d stays as it was.
    """
    changed = "_conv_forward" in vars(conv)
    if changed or not can_call_onednn(conv.weight.dtype) or not _is_plain(conv):
        return False
    kernels = zip(conv.kernel_size, conv.dilation, strict=True)
    sides = [max(SIDE, dilation * (kernel - 1) + 1) for kernel, dilation in kernels]
    grid = torch.rand(1, conv.in_channels, *sides, generator=torch.Generator().manual_seed(0))
    grid = grid.to(conv.weight.dtype, memory_format=torch.channels_last) - 0.5
    map_alone = conv(grid)
    places = conv.padding, conv.stride, conv.dilation, conv.groups
    for last in (nn.Identity(), following):
        expected = last(map_alone.clone())
        conv._conv_forward = partial(_convolve, places, last)
        found = conv(grid)
        same = found.shape == expected.shape
        if not (same and (found - expected).norm() <= 0.01 * expected.norm()):
            del conv._conv_forward
            return False
    return True


def _is_plain(conv):
    """Whether oneDNN pads as the convolution does: by numbers of zeros."""
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _convolve(places, following, x, weight, bias):
    """In place of `nn.Conv2d._conv_forward`, with what follows."""
    x = x.to(weight.dtype)
    if not _suits_onednn(x, weight):
        padding, stride, *others = places
        return following(F.conv2d(x, weight, bias, stride, padding, *others))
    kind, limits = FOLLOWING[type(following)]
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *places, kind, limits, "")


def _suits_onednn(x, weight):
    """Whether its operation, which has no gradients and is no other program's, can take these, and
    is faster."""
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if learns or torch.compiler.is_exporting() or x.dim() != 4 or x.device.type != "cpu":
        return False
    alone = torch.get_num_threads() == 1
    return x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and alone)
