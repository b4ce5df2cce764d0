"""Convolutions whose gradients are computed in float32 while the rest is in bfloat16."""

import pytest
import torch
from conftest import close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from depthwise import precise_gradients


class Precisions(TorchDispatchMode):
    """Collects in what precision convolutions are computed, and their gradients."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name.startswith("convolution"):
            self.found.add((name, args[0].dtype))
        return function(*args, **(kwargs or {}))


def both(dtype):
    return {("convolution", dtype), ("convolution_backward", dtype)}


@pytest.mark.parametrize(
    "channels, groups, kernel, stride, precise",
    [
        (4, 4, 5, 1, True),
        (4, 4, 3, 2, True),
        (4, 4, (1, 7), 1, True),
        (4, 4, 3, (1, 2), True),
        (4, 4, 3, 1, False),
        (4, 1, 5, 1, False),
        (4, 2, 5, 2, False),
        (1, 1, 5, 1, False),
    ],
)
def test_gradients_are_those_of_float64(channels, groups, kernel, stride, precise):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, kernel, stride, groups=groups)
    image, found = torch.randn(2, channels, 11, 12), []
    for dtype in (torch.float64, torch.float32):
        leaf, conv = image.to(dtype).requires_grad_(), conv.to(dtype)
        conv.zero_grad()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32),
            precise_gradients(leaf),
            Precisions() as seen,
        ):
            result = conv(leaf)
            result.float().square().mean().backward()
        found.append([result.detach(), leaf.grad, *(p.grad.clone() for p in conv.parameters())])
    assert seen.found == both(torch.float32 if precise else torch.bfloat16)
    assert found[1][0].dtype == torch.bfloat16
    for expected, own in zip(*found, strict=True):
        close(own, expected, 0.02)


def test_it_takes_what_the_function_takes():
    image, weight = torch.randn(1, 4, 9, 9), torch.randn(4, 1, 5, 5, requires_grad=True)
    found = []
    with torch.autocast("cpu", torch.bfloat16), precise_gradients(image):
        found.append(nn.functional.conv2d(input=image, weight=weight, groups=4))
        found.append(nn.functional.conv2d(image, weight, None, 1, 0, 1, 4))
    assert torch.equal(*found) and found[0].dtype == torch.bfloat16


def test_what_learns_nothing_stays_in_bfloat16():
    conv, image = nn.Conv2d(4, 4, 5, groups=4).requires_grad_(False), torch.randn(1, 4, 9, 9)
    with torch.autocast("cpu", torch.bfloat16), precise_gradients(image), Precisions() as seen:
        conv(image)
    assert seen.found == {("convolution", torch.bfloat16)}
