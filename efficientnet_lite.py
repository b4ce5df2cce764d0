"""EfficientNet-Lite0 to Lite2 without their classifiers, tensor for tensor as timm has them.

They are the networks whose weights come as Python packages. timm's own bring torchvision and
torch's compiler along, for which a first caption would wait longer than for all else.
"""

import math
from collections import OrderedDict
from typing import NamedTuple

from torch import nn
from torch.nn import functional as F

MEAN = STD = (0.5, 0.5, 0.5)  # that images are normalised with

# Of each stage: blocks, side of the kernel, stride of the first block, channels that come out
STAGES = [(1, 3, 1, 16), (2, 3, 2, 24), (2, 5, 2, 40), (3, 3, 2, 80), (3, 5, 1, 112)]
STAGES += [(4, 5, 2, 192), (1, 3, 1, 320)]
STEM, HEAD, EXPANSION = 32, 1280, 6


class Variant(NamedTuple):
    """A network of the family: how `STAGES` are scaled (Tan & Le, 2019, §3.3), and its images."""

    width: float  # times as many channels, in steps of eight
    depth: float  # times as many blocks, rounded up; the first stage and the last have one
    size: int  # side of the images that it is published for, pixels


VARIANTS = {
    "tf_efficientnet_lite0": Variant(1.0, 1.0, 224),
    "tf_efficientnet_lite1": Variant(1.0, 1.1, 240),
    "tf_efficientnet_lite2": Variant(1.1, 1.2, 260),
}


def efficientnet_lite(name):
    """The network of that name in `VARIANTS`, with random weights: (N, 3, S, S) to
    (N, 1280, S/32, S/32), rounded up."""
    width, depth, _ = VARIANTS[name]
    layers = _layers("conv_stem", "bn1", _SameConv2d(3, STEM, 3, stride=2, bias=False))
    stages, channels = [], STEM
    for i, (blocks, kernel, stride, out) in enumerate(STAGES):
        out, stage = 8 * math.floor(width * out / 8 + 0.5), []
        for j in range(blocks if blocks == 1 else math.ceil(depth * blocks)):
            stage.append(_block(channels, out, kernel, 1 if j else stride, EXPANSION if i else 1))
            channels = out
        stages.append(nn.Sequential(*stage))
    layers["blocks"] = nn.Sequential(*stages)
    layers |= _layers("conv_head", "bn2", nn.Conv2d(channels, HEAD, 1, bias=False))
    return nn.Sequential(layers)


class _SameConv2d(nn.Conv2d):
    """Pads as TensorFlow does: to ⌈size / stride⌉, the odd pixel at the right and the bottom."""

    def forward(self, x):
        [kernel, _], [stride, _] = self.kernel_size, self.stride
        down, across = (max(kernel - (size % stride or stride), 0) for size in x.shape[2:])
        sides = across // 2, across - across // 2, down // 2, down - down // 2
        return super().forward(F.pad(x, sides))


class _Shortcut(nn.Sequential):
    """Layers whose input is added to their output."""

    def forward(self, x):
        return x + super().forward(x)


def _block(channels, out, kernel, stride, expansion):
    """A 1×1 convolution that widens, one of each channel by itself, and a 1×1 that narrows."""
    wide = expansion * channels
    kind, padding = (nn.Conv2d, kernel // 2) if stride == 1 else (_SameConv2d, 0)
    depthwise = kind(wide, wide, kernel, stride, padding, groups=wide, bias=False)
    narrow = nn.Conv2d(wide, out, 1, bias=False)
    if expansion == 1:
        layers = _layers("conv_dw", "bn1", depthwise) | _layers("conv_pw", "bn2", narrow, False)
    else:
        layers = _layers("conv_pw", "bn1", nn.Conv2d(channels, wide, 1, bias=False))
        layers |= _layers("conv_dw", "bn2", depthwise) | _layers("conv_pwl", "bn3", narrow, False)
    return (_Shortcut if stride == 1 and channels == out else nn.Sequential)(layers)


def _layers(name, norm, convolution, activate=True):
    """A convolution and its BatchNorm under their names, with ReLU6 behind."""
    layers = OrderedDict({name: convolution, norm: nn.BatchNorm2d(convolution.out_channels, 1e-3)})
    if activate:
        layers[f"{norm}_act"] = nn.ReLU6(inplace=True)
    return layers
