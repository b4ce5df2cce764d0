"""Encoders: ImageNet networks without their pooling and classifier (§3.1.1)."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import freezing
from depthwise import precise_gradients
from groundwork.devices import shapes_only
from groundwork.errors import in_a_line
from networks import OFFLINE_ENCODER, EncoderError, find_network
from stages import pack

__all__ = ["OFFLINE_ENCODER", "Encoder", "EncoderError", "encoder_shapes"]

TUNED_FROM = 8  # pixels a place, of the first stage that fine-tuning trains
PROBE = 128  # pixels, the side of the image that tells a network's stages: small, to be quick


class Encoder(nn.Module):
    """ImageNet network without its pooling and classifier (§3.1.1), normalisation included.

    Convolutional networks see images at the size that they come in: VGG gives the paper's 14×14 of
    224 pixels, Inception v3 8×8 of 299. A network that takes one size alone, as vision transformers
    and many of windows do, sees them resized to that; its grid is that of the published network.

    Args:
        name: a torchvision model ("resnet101", "vgg19") or "timm:NAME".
        encoded_image_size: side of the grid that `forward` returns.
        weights: "DEFAULT" for the ImageNet weights, None for random ones, or the path of a file
            that holds the whole network's state dict.
        stages: whose maps `features` returns, packed as `stages.pack` has them: strides, as "16",
            and "last", the network's last map; "32" is that before the 1×1 layers with which many
            networks end. A vision transformer has "last" alone, its patches' tokens after the last
            norm. "fc", which stands alone, is one vector of the whole image as a grid of one place:
            what enters the network's last fully connected layer.

    Attributes:
        dim: values of the features at a place of their grid.
        stage_dims, stage_factors: D_s and f_s of each stage, as `stages.unpack` takes them.
        image_size: side of the images that the network sees, None: as they come.

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
        if twice := [stage for stage in self.stages if self.stages.count(stage) > 1]:
            raise EncoderError(f"--encoder_stages has {twice[0]} twice: give each stage once")
        if "fc" in self.stages and len(self.stages) > 1:
            raise EncoderError(
                "stage fc is one vector of the whole image, which stands alone: give "
                "--encoder_stages fc, or stages without it"
            )
        network = find_network(name, self._is_vector)
        # `resnet` is what the published checkpoints call the backbone, whichever it is
        self.resnet = network.backbone
        for key, values in (("mean", network.mean), ("std", network.std)):
            self.register_buffer(key, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.adaptive_pool = nn.AdaptiveAvgPool2d(encoded_image_size)
        self._probe(network)  # before its weights are downloaded
        if weights is not None:
            network.load(weights)
        self.fine_tune(False)
        self.eval()

    def features(self, images: Tensor) -> Tensor:
        """Annotation vectors at the backbone's own grid, the coarsest where it has several.

        Args:
            images: (N, 3, S, S) RGB, uint8 0 to 255 or float 0 to 1.

        Returns:
            (N, g, g, dim) in the compute precision: 8×8×2048 from ResNet-101 and 256×256 pixels;
            (N, 1, 1, dim) of stage "fc".

        Raises:
            EncoderError: the images are too small for the network.
        """
        whole = images.device.type != "cpu" or torch.compiler.is_exporting()  # graphs take any N
        if not whole and len(images) > self.CACHED:
            return torch.cat([self.features(part) for part in images.split(self.CACHED)])
        images = images / 255 if images.dtype == torch.uint8 else images
        if self.image_size not in (None, images.shape[3]):
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        images = (images - self.mean) / self.std
        images = images.contiguous(memory_format=torch.channels_last)
        try:
            with precise_gradients(images):
                outputs = _outputs(self.resnet, self.taps, images)
        except RuntimeError as error:
            if images.shape[3] >= PROBE:  # at which it has run before
                raise
            raise EncoderError(
                f"encoder {self.name!r} cannot take images of {images.shape[3]} pixels: make the "
                f"input files with a larger --image_size ({in_a_line(error)})"
            ) from error
        grids = [as_grid(output) for as_grid, output in zip(self.layouts, outputs, strict=True)]
        return pack(grids, self.stage_factors)

    def forward(self, images: Tensor) -> Tensor:
        """`encoder_out` (N, encoded_image_size, encoded_image_size, D), pooled adaptively.

        `DecoderWithAttention` takes this or `features`, which is smaller: the result is the same.
        With several stages, whose grids differ, and with "fc", which has none, it is `features`.
        """
        if len(self.stages) > 1 or self._is_vector:
            return self.features(images)
        features = self.features(images).permute(0, 3, 1, 2)
        return self.adaptive_pool(features).permute(0, 2, 3, 1)

    def fine_tune(self, fine_tune=True, stride=TUNED_FROM):
        """Lets gradients reach the late layers: the stages of `stride` and more, of 8 ResNet's
        layer2 to layer4, or the later half of a vision transformer's blocks, and what is used
        behind them. BatchNorm's scales and shifts are trained, and its statistics stay.

        Raises:
            EncoderError: there is no such stage.
        """
        self.requires_grad_(False)
        for name in self.late_layers(stride) if fine_tune else ():
            self.resnet.get_submodule(name).requires_grad_(True)

    def late_layers(self, stride=TUNED_FROM):
        """Names of the layers that `fine_tune` is about, in their order. Raises EncoderError."""
        late = [name for name, own in self._strides_used.items() if own >= stride]
        if not late and stride != TUNED_FROM:
            known = sorted({own for own in self._strides_used.values() if own > 1})
            found = f"those of stride {', '.join(map(str, known))}" if known else "none"
            raise EncoderError(
                f"--tune_from {stride}: encoder {self.name!r} has no stage from that stride on: "
                + (f"it has {found}" if known else "leave the option out, for its later half")
            )
        if self._later_half:
            return self._later_half
        if self._is_vector:  # what follows the last map has no stride, and some have no maps at all
            layers = self._layers
            return layers[layers.index(late[0]) if late else len(layers) // 2 :]
        return late

    @torch.no_grad()
    def freeze(self, dtype=torch.float32):
        """Makes the network faster for captioning alone, as `freezing` does.

        The features stay the same but for rounding; the state dict is another. A network that does
        not compute the same so, as its modules do not run in their order, is left as it is.

        Args:
            dtype: that it is to compute in from then on: float32, or bfloat16, for which `features`
                has to be called under autocast.
        """
        _replace_network(self, freezing.fold_batch_norm, torch.float32, 1e-3)
        if self.mean.device.type == "cpu":
            apart = 0.1 if dtype == torch.bfloat16 else 1e-3  # of the former rounding makes 0.05
            through_onednn = partial(freezing.through_onednn, dtype=dtype)
            _replace_network(self, through_onednn, dtype, apart)

    def train(self, mode=True):
        """Stays in evaluation mode: BatchNorm keeps its ImageNet statistics in both stages."""
        return super().train(False)

    @property
    def _is_vector(self):
        return self.stages == ("fc",)

    @torch.no_grad()
    def _probe(self, network):
        """Finds the stages, their layouts and sizes, and the late layers, from one small image."""
        layers, tokens = _layers(self.resnet), network.tokens
        last = tokens.layer if tokens and not self._is_vector else ""
        outputs = self._try_out([*layers, last], network)
        strides = {} if tokens else self._strides(outputs)
        self.taps = [self._layer_of(stage, strides, last) for stage in self.stages]
        found = [outputs[tap] for tap in self.taps]
        self.layouts = [self._layout(output, tokens) for output in found]
        grids = [as_grid(output) for as_grid, output in zip(self.layouts, found, strict=True)]
        self.stage_dims = tuple(grid.shape[3] for grid in grids)
        coarsest = max(strides.get(tap, 1) for tap in self.taps)
        self.stage_factors = tuple(coarsest // strides.get(tap, coarsest) for tap in self.taps)
        self.dim = pack(grids, self.stage_factors).shape[3]
        used = layers if "" in self.taps else layers[: 1 + max(map(layers.index, self.taps))]
        self._layers = layers
        self._strides_used = {name: strides.get(name, 1) for name in used}
        self._later_half = tokens.late if tokens else None

    def _try_out(self, names, network):
        """What layers give for a small image, by name; for one of the network's own size, which
        `features` then makes of every image, where it takes no other."""
        sizes = [network.size] if network.tokens or network.fixed else []
        if not network.tokens and not (network.fixed and self._is_vector):
            sizes = [None, *sizes]
        for self.image_size in sizes:
            try:
                return self._run(names, self.image_size or PROBE)
            except EncoderError:
                if self.image_size == sizes[-1]:
                    raise

    def _run(self, names, side):
        try:
            outputs = _outputs(self.resnet.eval(), names, torch.zeros(1, 3, side, side))
        except Exception as error:  # of a thousand networks, errors of many classes
            raise EncoderError(
                f"encoder {self.name!r} cannot run as a backbone: {in_a_line(error)}"
            ) from error
        return dict(zip(names, outputs, strict=True))

    def _strides(self, outputs):
        """Pixels of the image to a place of a layer's map, by the layer's name."""
        grids = {name: output.shape[2] for name, output in outputs.items() if _is_map(output)}
        side = self.image_size or PROBE
        if self.image_size or all(side % grid == 0 for grid in grids.values()):
            return {name: side // grid for name, grid in grids.items()}
        # without padding a map lacks its edge, as Inception's: how many places more pixels make
        twice = self._run([*grids], 2 * side)
        more = {name: twice[name].shape[2] - grid for name, grid in grids.items()}
        return {name: side // count for name, count in more.items() if count > 0}

    def _layer_of(self, stage, strides, last):
        """Name of the layer whose output is the map of a stage; empty: the whole network's."""
        if stage in ("last", "fc"):
            return last
        names = [name for name in strides if name]
        body = names[: len(names) - _length_of_head(self.resnet, names)]
        found = [name for name in body if str(strides[name]) == stage]
        if not found:
            known = ", ".join(sorted({str(strides[name]) for name in body}, key=int))
            others, way = "last alone", "--encoder_stages last"
            if known:
                others, way = f"those of stride {known}, and last", "--encoder_stages of these"
            raise EncoderError(
                f"encoder {self.name!r} has no stage {stage}: it has {others}: give {way}"
            )
        return found[-1]

    def _layout(self, output, tokens):
        """The function that makes a layer's output (N, g, g, D)."""
        if self._is_vector:
            if isinstance(output, Tensor) and output.dim() == 2:
                return _one_place
            raise EncoderError(
                f"encoder {self.name!r} gives no vector for stage fc: give --encoder_stages last"
            )
        if _is_map(output):
            # some, as Swin, give the channels last, which their number tells
            return _as_it_is if output.shape[2] != output.shape[3] else _channels_last
        if tokens and math.isqrt(places := output.shape[1] - tokens.prefix) ** 2 == places:
            return partial(_patches, prefix=tokens.prefix)
        raise EncoderError(
            f"encoder {self.name!r} gives no grid of features; use a convolutional network, or a "
            "vision transformer of square images"
        )


def _replace_network(encoder, change, dtype, apart):
    """Puts the changed network in the place of an encoder's, if the features of an image, in that
    precision, are no further apart than this part of them."""
    before, device = encoder.resnet, encoder.mean.device
    changed = change(before)
    if changed is before:
        return
    side = encoder.image_size or PROBE
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        expected = encoder.features(image)
        encoder.resnet = changed
        if not (encoder.features(image) - expected).norm() < apart * expected.norm():
            encoder.resnet = before


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


def _as_it_is(grid):
    return grid


def _channels_last(features):
    """(N, g, g, D) of (N, D, g, g)."""
    return features.permute(0, 2, 3, 1)


def _patches(tokens, prefix):
    """(N, g, g, D) of (N, prefix + g², D)."""
    side = math.isqrt(tokens.shape[1] - prefix)
    return tokens[:, prefix:].unflatten(1, (side, side))


def _one_place(vectors):
    """(N, 1, 1, D) of (N, D)."""
    return vectors[:, None, None]


def encoder_shapes(name, stages=("last",)):
    """Tensor's name -> shape of an encoder's state dict, without taking its memory.

    Args:
        name, stages: as of `Encoder`.

    Raises:
        EncoderError: the name is unknown, or the network's classifier cannot be cut off.
    """
    whole = tuple(stages) == ("fc",)
    try:
        with shapes_only():
            backbone = find_network(name, whole).backbone
    except (NotImplementedError, RuntimeError):  # it needs values while it is built
        with _WeightsWithoutMemory():
            backbone = find_network(name, whole).backbone
    return {f"resnet.{key}": tensor.shape for key, tensor in backbone.state_dict().items()}


class _WeightsWithoutMemory(TorchFunctionMode):
    """Weights are made without values; what a network computes while it is built has them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        device = {"device": "meta"} if function is torch.empty else {}
        return function(*args, **((kwargs or {}) | device))
