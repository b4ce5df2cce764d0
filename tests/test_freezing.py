"""Networks made faster for captioning: they compute the same."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import freezing
from encoders import Encoder
from networks import OFFLINE_ENCODER


def make(*layers):
    torch.manual_seed(0)
    network = nn.Sequential(*layers).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network


def maps(channels=8):
    return torch.randn(2, channels, 9, 9, generator=torch.Generator().manual_seed(1))


def kinds_of(network):
    return [type(module) for module in network.modules()]


def calls(function):
    """How many of oneDNN's own operations it calls."""

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            Counting.count += "_convolution_pointwise" in str(operation)
            return operation(*args, **(kwargs or {}))

    with Counting():
        function()
    return Counting.count


class Doubling(nn.Conv2d):
    """A convolution that nn.Conv2d's own forward does not compute."""

    def forward(self, x):
        return 2 * F.conv2d(x, self.weight, self.bias)


class Padding(nn.Conv2d):
    """A convolution that pads first, and then calls nn.Conv2d's forward."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


@torch.no_grad()
def test_a_batch_norm_becomes_part_of_its_convolution():
    network = make(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
    folded = freezing.fold_batch_norm(network)
    torch.testing.assert_close(folded(maps()), network(maps()), rtol=1e-4, atol=1e-5)
    assert kinds_of(folded).count(nn.BatchNorm2d) == 1  # that has no convolution before it
    assert kinds_of(network).count(nn.BatchNorm2d) == 2


@pytest.fixture(params=[1, 2])
def threads(request):
    """float32 comes to oneDNN by this way with one thread alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("following", [*freezing.FOLLOWING, nn.Tanh])
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 16, 5, stride=2, padding=2, dilation=2, groups=4, bias=False),
        Padding(8, 8, 3, stride=2),
        Doubling(8, 8, 3),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    ],
    ids=["plain", "every option", "padding", "doubling", "same", "reflect"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolutions_compute_what_follows_them(dtype, conv, following, threads):
    layer = following()
    network = make(conv, layer)
    changed = freezing.through_onednn(network, dtype)
    images, low = maps(), dtype == torch.bfloat16
    simple = type(conv) is Padding or (type(conv) is nn.Conv2d and conv.padding_mode == "zeros")
    joins = simple and conv.padding != "same" and freezing.can_call_onednn(dtype)
    with torch.autocast("cpu", dtype, enabled=low):
        expected = network(images)
        for given in (images, images.to(dtype)):
            found = changed(given)
            assert found.dtype == dtype
            apart = {"rtol": 0.02, "atol": 0.01} if low else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(found, expected, **apart)
            if joins:
                called = low or threads == 1
                assert calls(lambda given=given: changed(given)) == called
    assert all(p.dtype == torch.float32 for p in network.parameters())
    if following is not nn.Identity:
        assert (following in kinds_of(changed)) == (not joins or following is nn.Tanh)


def test_gradients_and_exports_do_without_onednn():
    network = make(nn.Conv2d(8, 8, 3), nn.ReLU()).requires_grad_(False)
    changed = freezing.through_onednn(network, torch.float32)
    found, expected = (maps().requires_grad_() for _ in range(2))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        changed(found).sum().backward()
        network(expected).sum().backward()
        graph = str(torch.export.export(changed, (maps(),)).graph)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found.grad, expected.grad)
    assert "conv2d" in graph and "mkldnn" not in graph


@torch.no_grad()
def test_a_function_that_others_follow_elsewhere_stays():
    """As ResNet's, which has one for several places."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(8, 8, 1), nn.ReLU()

        def forward(self, x):
            return self.relu(self.conv(x) + x)

    network = make(Block())
    changed = freezing.through_onednn(network, torch.bfloat16)
    assert nn.ReLU in kinds_of(changed)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(changed(maps()), network(maps()), rtol=0.02, atol=0.02)


@torch.no_grad()
def test_convolutions_that_cannot_be_changed_stay():
    """Those in several places, and those changed already."""
    shared = nn.Conv2d(8, 8, 1)
    network = make(nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared, nn.Tanh()))
    once = freezing.through_onednn(network, torch.float32)
    torch.testing.assert_close(once(maps()), network(maps()))
    network = make(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 7, padding=18, dilation=6))
    twice = freezing.through_onednn(freezing.through_onednn(network, torch.float32), torch.float32)
    torch.testing.assert_close(twice(maps()), network(maps()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twice(maps()[0]), network(maps()[0]), rtol=1e-4, atol=1e-5)
    own = nn.BatchNorm2d(8, track_running_stats=False)
    batch_statistics = nn.Sequential(nn.Conv2d(8, 8, 1), own).eval()
    folded = freezing.fold_batch_norm(batch_statistics)
    torch.testing.assert_close(folded(maps()), batch_statistics(maps()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [OFFLINE_ENCODER, "mobilenet_v3_small", "resnet18"])
def test_features_of_a_frozen_encoder_are_the_same(name, dtype):
    encoder = Encoder(name, weights="DEFAULT" if name == OFFLINE_ENCODER else None)
    images = torch.randint(256, (5, 3, 64, 64), dtype=torch.uint8)
    low = dtype == torch.bfloat16
    with torch.autocast("cpu", dtype, enabled=low):
        expected = encoder.features(images)
        encoder.freeze(dtype)
        apart = (encoder.features(images) - expected).norm() / expected.norm()
        assert apart < (0.1 if low else 1e-3)
    assert nn.BatchNorm2d not in kinds_of(encoder)
    convs = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    assert {conv.weight.dtype for conv in convs} == {dtype}
    if name == OFFLINE_ENCODER and freezing.can_call_onednn(dtype):
        assert nn.ReLU6 not in kinds_of(encoder)


@torch.no_grad()
def test_a_network_that_would_compute_otherwise_is_left_as_it_is(monkeypatch):
    encoder = Encoder("resnet18", weights=None)
    before = encoder.resnet
    for name in ("fold_batch_norm", "through_onednn"):
        monkeypatch.setattr(freezing, name, lambda network, **_: nn.Sequential(network, nn.Tanh()))
    encoder.freeze(torch.bfloat16)
    assert encoder.resnet is before
