"""What makes fine-tuning faster on a CPU: convolutions of single channels whose gradients PyTorch
computes faster in float32 than in bfloat16."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def precise_gradients(images: Tensor):
    """The context in which an encoder is given images to learn from: on a CPU, in bfloat16, the
    slow ones are computed in float32."""
    bfloat16 = images.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return _InFloat32() if bfloat16 and torch.is_grad_enabled() else nullcontext()


class _InFloat32(TorchFunctionMode):
    """Of convolutions of single channels of more than 3 × 3 values, or with steps of more than one,
    oneDNN has no bfloat16 kernels for the gradients: they take 1.6 to 3 times as long as those in
    float32. Those of 3 × 3 in steps of one are as fast, or faster."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        own = _conv2d if function is F.conv2d else function
        return own(*args, **(kwargs or {}))


def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """F.conv2d, in float32 if its gradients are slow."""
    learns = input.requires_grad or weight.requires_grad
    single = groups == input.shape[1] == len(weight) > 1
    steps = stride if isinstance(stride, int) else max(stride)
    others = weight, bias, stride, padding, dilation, groups
    if not (learns and single and (max(weight.shape[2:]) > 3 or steps > 1)):
        return F.conv2d(input, *others)
    with torch.autocast("cpu", enabled=False):
        result = F.conv2d(input.float(), *others)
    return result.to(torch.get_autocast_dtype("cpu"))
