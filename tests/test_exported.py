"""Models that leave Python: what is exported captions as the model does."""

import errno
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import ROOT, close, failure, run_here, small_checkpoint
from onnx import TensorProto, load
from PIL import Image
from test_decoders import STAGES, TINY, build, every_decoder, every_variant, name_of
from torch import nn

import checkpoints
import decoding
import export as script
import exported
import exporting
from captioner import Captioner
from encoders import Encoder
from ensemble import Encoders, Ensemble
from groundwork import images as image_files
from groundwork.errors import UserError
from groundwork.options import FITS
from word_rules import make_rule

SIDE = 8  # pixels of an image
LONGEST = 6  # words


class Eyes(nn.Module):
    """An encoder of a layer: features (I, 2, 2, D) of images (I, 3, 8, 8)."""

    def __init__(self, dim):
        super().__init__()
        self.layer = nn.Conv2d(3, dim, 4, stride=4)

    def features(self, images):
        return self.layer(images / 255).permute(0, 2, 3, 1)


def make_model(variant, **changes):
    """A `Captioner` of a tiny decoder with large weights, so that every term shows."""
    decoder = build(variant, 1.0, **{"vocab_size": len(TINY)} | changes)
    eyes = Eyes(decoder.config.encoder_dim).requires_grad_(False)
    return Captioner(eyes, decoder, TINY, SIDE, torch.device("cpu"), False, {})


def photographs(count):
    own = np.random.default_rng(0)
    return [own.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8) for _ in range(count)]


def assert_captions_equal(model, graphs, images, widths=(1, 2, 5), penalties=(0.0, 1.0)):
    """By every width of the beam, of which 1 is greedy, with and without a length penalty."""
    for image in images:
        square = torch.from_numpy(image_files.squeeze(Image.fromarray(image), model.image_size))
        features = model.encoder.features(square[None])
        for width in widths:
            for penalty in penalties:
                arguments = features, model.word_map, width, LONGEST, penalty
                [expected] = decoding.beam_search(model.decoder, *arguments)
                if width == 1:
                    [greedy] = decoding.greedy(model.decoder, features, model.word_map, LONGEST)
                    assert greedy.words == expected.words
                found = graphs.caption(image, width, LONGEST, penalty)
                assert found.words == [graphs.words[i] for i in expected.words]
                assert found.text == " ".join(found.words)
                assert found.log_prob == pytest.approx(expected.log_prob, abs=1e-4)
                if expected.alphas is None:
                    assert found.alphas is None
                else:
                    close(torch.from_numpy(found.alphas), expected.alphas, 1e-4)


def assert_steps_equal(model, graphs):
    """Of several images with several captions each, which no search on one image has."""
    images = np.stack(photographs(3)).transpose(0, 3, 1, 2)
    features = model.encoder.features(torch.from_numpy(images))
    memory = model.decoder.prepare(features)
    state = model.decoder.init_state(memory).select(torch.arange(3).repeat_interleave(2))
    found = graphs.encoder(images)
    shared, own = found[: graphs.about["memory"]], found[graphs.about["memory"] :]
    own = [np.repeat(part[:, np.newaxis], 2, axis=1) for part in own]
    for words in torch.randint(len(TINY), (4, 3, 2)):
        scores, alphas, state = model.decoder.step(words.flatten(), state, memory)
        log_probs, *own = graphs.step(words.numpy(), *own, *shared)
        close(torch.from_numpy(log_probs).flatten(0, 1), scores.log_softmax(dim=1), 1e-4)
        if alphas is not None:
            seen, *own = own
            close(torch.from_numpy(seen).flatten(0, 1), alphas, 1e-4)


def assert_exports(model, formats=("onnx",)):
    with torch.no_grad(), exporting.written(model, formats) as folder:
        for format in formats:
            graphs = exported.Captioner(folder, format, threads=1)
            assert_captions_equal(model, graphs, photographs(3))
            assert_steps_equal(model, graphs)


# a state of one size, one that grows, and no alphas
@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", [("lstm", {}), ("transformer", {"layers": 1}), ("merge", {})], ids=name_of
)
def test_what_is_exported_captions_as_the_model_does(variant):
    assert_exports(make_model(variant))


@pytest.mark.slow
@every_variant
def test_every_variant_captions_as_the_model_does(variant):
    assert_exports(make_model(variant))


@pytest.mark.slow
@every_decoder
def test_several_stages_of_the_encoder_are_exported(variant):
    assert_exports(make_model(variant, **STAGES))


@pytest.mark.slow
@pytest.mark.parametrize("look", ["soft", "argmax"])
def test_hard_attention_is_exported_as_it_looks(look):
    model = make_model(("lstm", {"attention": "hard"}))
    model.decoder.set_look(look)
    assert_exports(model)


@pytest.mark.slow
@every_decoder
def test_what_aotinductor_compiles_captions_as_the_model_does(variant):
    if variant[0] != "transformer":
        assert_exports(make_model(variant), ["aoti"])


def test_a_state_that_grows_is_not_compiled():
    model = make_model(("transformer", {"layers": 1}))
    refused = pytest.raises(UserError, match="--format aoti: the state of this decoder grows")
    with refused, exporting.written(model, ["aoti"]):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, stages, side",
    [
        ("resnet18", ("16", "last"), 75),
        ("resnet18", ("fc",), 64),
        ("timm:vit_tiny_patch16_224", ("last",), 64),  # which resizes all to 224 pixels
    ],
)
def test_encoders_of_every_kind_are_exported(name, stages, side):
    assert_photographs_equal(*with_encoder(("gru", {}), name, stages), side)


@pytest.mark.slow
def test_an_ensemble_is_exported_of_encoders_of_several_sizes():
    pairs = with_encoder(("gru", {}), "squeezenet1_1"), with_encoder(("merge", {}), "resnet18")
    encoders, decoders = zip(*pairs, strict=True)
    assert_photographs_equal(Encoders(encoders, (64, 96)), Ensemble(decoders).eval(), 96)


def with_encoder(variant, name, stages=("last",)):
    """An encoder with random weights, and a decoder for it."""
    torch.manual_seed(0)
    encoder = Encoder(name, 3, weights=None, stages=stages)
    sizes = checkpoints.sizes_of_features(encoder)
    return encoder, build(variant, 0.5, vocab_size=len(TINY), **sizes)


def assert_photographs_equal(encoder, decoder, side):
    encoder.freeze()
    model = Captioner(encoder, decoder, TINY, side, torch.device("cpu"), False, {})
    images = np.random.default_rng(0).integers(256, size=(3, 50, 70, 3), dtype=np.uint8)
    with exporting.written(model, ["onnx"]) as folder:
        graphs = exported.Captioner(folder)
        for image, expected in zip(images, model.caption(images, 3, max_words=6), strict=True):
            found = graphs.caption(image, 3, 6)
            assert found.words == expected.words
            assert found.log_prob == pytest.approx(expected.log_prob, abs=1e-4)


# -------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.pth.tar"
    checkpoints.save_checkpoint(path, small_checkpoint())
    return path


@pytest.fixture(scope="module")
def photograph(small):
    path = small.parent / "x.png"
    Image.fromarray(np.random.default_rng(1).integers(256, size=(50, 70, 3), dtype=np.uint8)).save(
        path
    )
    return path


def export(small, folder, *arguments):
    """export.py, with a beam no wider than the small vocabulary."""
    usual = "--model", small, "--output_folder", folder, "--beam_size", 2
    return run_here("export.py", *usual, *arguments)


@pytest.fixture(scope="module")
def onnx(small, photograph):
    """The folder of an export, and what was printed."""
    folder = small.parent / "exported"
    process = export(small, folder, "--img", photograph)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


def test_an_export_says_what_it_has_written_and_that_captions_are_equal(onnx, small, photograph):
    folder, printed = onnx
    [expected] = Captioner.load(small, "cpu", "off").caption(photograph, beam_size=2)
    first, *files = printed.splitlines()
    assert first.startswith(f"onnx: {photograph}: '{expected.text}', as in PyTorch, log p ")
    names = ["encoder.onnx", "step.onnx", "captioner.json"]
    assert [line.split(": ")[0] for line in files] == [str(folder / name) for name in names]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    about = json.loads((folder / "captioner.json").read_text(encoding="utf-8"))
    assert exported.fault(about) is None
    assert about["formats"] == ["onnx"] and about["image_size"] == 64
    assert about["word_map"] == small_checkpoint()["word_map"]


def test_what_is_exported_captions_without_pytorch(onnx, small, photograph):
    program = f"""
import runpy, sys
sys.modules["torch"] = None  # importing it raises an error
sys.argv = ["export.py", "--run", {str(onnx[0])!r}, "--img", {str(photograph)!r}]
sys.argv += ["--beam_size", "2"]
runpy.run_path("export.py", run_name="__main__")
from exported import Captioner
from PIL import Image
caption = Captioner({str(onnx[0])!r}).caption(Image.open({str(photograph)!r}), beam_size=2)
print(caption.text, caption.log_prob, *caption.alphas.shape)
"""
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    [expected] = Captioner.load(small, "cpu", "off").caption(photograph, beam_size=2)
    line, again = process.stdout.splitlines()
    assert line == f"{photograph}: {expected.text} (log p {expected.log_prob:.2f})"
    text, log_prob, *shape = again.rsplit(" ", 3)
    assert text == expected.text and float(log_prob) == pytest.approx(expected.log_prob, abs=1e-4)
    assert list(map(int, shape)) == list(expected.alphas.shape)


def test_the_module_that_captions_stands_alone(onnx, photograph, tmp_path):
    """Copied to a device, beside the folder."""
    (tmp_path / "exported.py").write_bytes((ROOT / "exported.py").read_bytes())
    program = f"""
import sys, exported
exported.Captioner({str(onnx[0])!r})
own = {{name for name, module in sys.modules.items() if {str(ROOT)!r} in str(module)}}
print(sorted(own), sorted({{"torch", "groundwork"}} & sys.modules.keys()))
"""
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.stdout == "[] []\n", process.stderr


def test_time_is_told_beside_pytorch(onnx, small, photograph):
    process = run_here(
        "export.py", "--run", onnx[0], "--model", small, "--img", photograph, photograph,
        "--beam_size", 2, "--time",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    first, _, _, *rows = process.stdout.splitlines()
    assert first == "2 photographs, 1 thread"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [cell[:2] for cell in cells] == [[k, by] for k in "12" for by in ("PyTorch", "onnx")]
    assert all(int(ms) > 0 and equal == "100%" for *_, ms, equal in cells)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(50, 70), (64, 64), (90, 40), (3, 200)])
def test_photographs_are_made_squares_as_for_training(shape, fit):
    array = np.random.default_rng(0).integers(256, size=(*shape, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    expected = image_files.square(image, 64, fit)
    for given in (array, image):
        assert np.array_equal(exported.square(given, 64, fit), expected)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x112] = 6  # to be turned by 90 degrees clockwise
    assert np.array_equal(exported.square(turned, 64, fit), expected)


@pytest.mark.parametrize("rule", ["karpathy", "characters", "subwords"])
def test_words_are_joined_as_their_rule_has_it(rule, onnx, photograph, tmp_path):
    words = {"a": "a", "dog": "dog"} if rule == "karpathy" else {"a": "▁a", "dog": "b"}
    own = {words.get(word, word): i for word, i in small_checkpoint()["word_map"].items()}
    folder = tmp_path / "copy"
    shutil.copytree(onnx[0], folder)
    between = " " if rule == "karpathy" else ""
    damage("captioner.json", {"word_map": own, "between": between})(folder)
    caption = exported.Captioner(folder).caption(Image.open(photograph), 2)
    assert caption.text == make_rule(rule).join(caption.words) and len(caption.words) > 1


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--time"], "--time is for --run"),
        (["--threads", 2], "--threads is for --run"),
        (["--run", "x"], "--run captions photographs: name them by --img"),
        (["--run", "x", "--img", "y", "--model", "z"], "--model is for exporting"),
        (["--run", "x", "--img", "y", "--time", "--output_folder", "z"], "--output_folder is for"),
        (["--run", "nowhere", "--img", "y"], "there is no exported model in nowhere"),
        (["--run", "x", "--img", "y", "--quantize", "z"], "--quantize is for exporting"),
        (["--run", "x", "--img", "y", "--results", "z", "--time"], "--results goes without --time"),
        (["--results", "z"], "--results is for --run"),
        (["--format", "tflite"], "invalid choice: 'tflite'"),
        (["--format", "int8"], "--format int8 takes photographs: name some by --quantize"),
        (["--format", "onnx", "--quantize", "x.jpg"], "--quantize is for --format int8: name it"),
        (
            ["--run", "x", "--img", "y", "--format", "onnx", "aoti"],
            "--run captions by one --format",
        ),
        (["--quantize", "nowhere.jpg"], "nowhere.jpg"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(arguments, words):
    assert words in failure(run_here("export.py", *arguments))


def test_what_is_missing_is_named_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(exporting, "find_spec", lambda name: name == "onnx")
    line = failure(export("nowhere", tmp_path))
    assert "--format onnx needs packages: pip install onnxscript onnxruntime" in line
    monkeypatch.setenv("CXX", "no-compiler")
    line = failure(export("nowhere", tmp_path, "--format", "aoti"))
    assert "there is no no-compiler: install it" in line


def damage(name, contents):
    def do(folder):
        path = folder / name
        if contents is None:
            path.unlink()
        elif isinstance(contents, dict):
            path.write_text(json.dumps(json.loads(path.read_text()) | contents))
        else:
            path.write_text(contents)

    return do


@pytest.mark.parametrize(
    "do, words",
    [
        (damage("captioner.json", "{"), "captioner.json is not valid JSON"),
        (damage("captioner.json", "[]"), "it is no object"),
        (damage("captioner.json", {"image_size": "64"}), "its image_size cannot be one"),
        (damage("captioner.json", {"word_map": {"a": 0}}), "its word_map has no <end>"),
        (damage("captioner.json", None), "there is no exported model in"),
        (damage("step.onnx", None), "cannot be used, export again"),
        (damage("encoder.onnx", "no graph"), "cannot be used, export again"),
        (lambda _: ["--format", "aoti"], "has no aoti, but onnx: export with --format onnx aoti"),
        (lambda _: ["--format", "int8"], "export with --format onnx int8 --quantize PHOTOGRAPHS"),
    ],
)
def test_a_damaged_export_is_one_line(onnx, photograph, tmp_path, do, words):
    folder = tmp_path / "copy"
    shutil.copytree(onnx[0], folder)
    more = do(folder) or []
    assert words in failure(run_here("export.py", "--run", folder, "--img", photograph, *more))


def test_what_draws_at_random_is_refused():
    model = make_model(("lstm", {"attention": "hard"}))
    model.look = "sample"
    with pytest.raises(UserError, match="draws places at random, which no graph does"):
        exporting.trace(model)


def test_a_decoder_that_cannot_be_traced_is_refused_in_one_line():
    model = make_model(("merge", {}))
    step = model.decoder.step

    def by_words(words, *others):
        return step(words if words.sum() > 0 else words + 1, *others)

    model.decoder.step = by_words
    with pytest.raises(UserError, match="the decoder cannot be traced as a graph: ") as error:
        exporting.trace(model)
    assert "\n" not in str(error.value)


def test_an_export_that_captions_otherwise_is_not_kept(onnx, small, tmp_path, monkeypatch):
    """And one that is there stays."""
    folder = tmp_path / "copy"
    shutil.copytree(onnx[0], folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    wrong = exported.Caption(["a"], 0.0, None, "a")
    monkeypatch.setattr(exported.Captioner, "caption", lambda *_: wrong)
    monkeypatch.setattr(exporting, "written", lambda *_: nullcontext(onnx[0]))
    for place in (folder, tmp_path / "new"):
        line = failure(export(small, place))
        assert "nothing is kept, as of a drawn scene the export's caption 'a'" in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_an_export_takes_the_place_of_one_before(onnx, tmp_path):
    """Of other formats, too, which would be of another model; other files stay."""
    folder = tmp_path / "exported"
    folder.mkdir()
    for name in ("step.pt2", "encoder.onnx.data", "captioner.json", "notes.txt"):
        (folder / name).write_text("old")
    exporting.keep(onnx[0], folder)
    names = ["captioner.json", "encoder.onnx", "notes.txt", "step.onnx"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "captioner.json").read_text() != "old"


def test_a_full_disk_leaves_the_export_that_is_there(onnx, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(onnx[0], folder)
    copy = shutil.copyfile

    def fill_up(source, path):
        if "captioner" in str(path):
            raise OSError(errno.ENOSPC, "full")
        copy(source, path)

    monkeypatch.setattr(shutil, "copyfile", fill_up)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError, match="No space left on device"):
        exporting.keep(onnx[0], folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


# ------------------------------------------------------------------------------------------ int8


def shares(path):
    """Of the weights in a file of ONNX the share that is of 8 bits."""
    sizes = Counter()
    for tensor in load(path).graph.initializer:
        sizes[tensor.data_type] += math.prod(tensor.dims)
    return sizes[TensorProto.INT8] / sizes.total()


@pytest.mark.slow
@every_decoder
def test_int8_computes_nearly_the_same(variant):
    """What is rounded is off by half a step of 255 between the least and the greatest, so that
    values behind a few products are off by some hundredths of their spread."""
    model = make_model(variant, decoder_dim=16, attention_dim=16)
    images = np.stack(photographs(3)).transpose(0, 3, 1, 2)
    with torch.no_grad(), exporting.written(model, ["onnx", "int8"], images) as folder:
        exact, rounded = (exported.Captioner(folder, format) for format in ("onnx", "int8"))
        found = [(graphs.encoder(images), graphs) for graphs in (exact, rounded)]
        assert shares(folder / "step.int8.onnx") > 0.5 and shares(folder / "step.onnx") == 0
        assert shares(folder / "encoder.int8.onnx") > 0.5
    for own, other in zip(*(arrays for arrays, _ in found), strict=True):
        assert_near(own, other)
    words = np.full((3, 1), TINY["<start>"])
    log_probs = [
        graphs.step(words, *(own[:, None] for own in arrays[memory:]), *arrays[:memory])[0]
        for arrays, graphs in found
        for memory in [graphs.about["memory"]]
    ]
    assert_near(*log_probs)
    assert not np.array_equal(*log_probs)


def assert_near(exact, rounded):
    """First states are zeros, or have no words yet."""
    assert exact.shape == rounded.shape
    assert np.abs(exact - rounded).sum() <= 0.1 * exact.size * (exact.std() if exact.size else 0)


def test_an_int8_export_says_where_its_captions_differ(small, photograph, monkeypatch, capsys):
    model = Captioner.load(small, "cpu", "off")
    [expected] = model.caption(photograph, beam_size=2)
    image = {"x.jpg": Image.open(photograph)}

    class Graphs:
        def __init__(self, format, log_prob):
            self.format, self.log_prob = format, log_prob

        def caption(self, image, beam_size):
            return exported.Caption(["a"], self.log_prob, None, "a")

    script.check(model, Graphs("int8", -1.0), image, 2)
    assert capsys.readouterr().out == f"int8: x.jpg: 'a', in PyTorch '{expected.text}'\n"
    for format, log_prob in (("onnx", -1.0), ("onnx", math.nan)):
        with pytest.raises(UserError, match="nothing is kept, as of x.jpg the export's caption"):
            script.check(model, Graphs(format, log_prob), image, 2)


@pytest.mark.slow
def test_int8_without_photographs_is_refused():
    with (
        torch.no_grad(),
        pytest.raises(UserError, match="--format int8 takes photographs, and there are none"),
        exporting.written(make_model(("gru", {})), ["int8"]),
    ):
        pass


def test_what_is_no_photograph_quantizes_nothing(small, tmp_path):
    text = tmp_path / "x.jpg"
    text.write_text("no picture")
    line = failure(export(small, tmp_path / "exported", "--quantize", text))
    assert str(text) in line and not (tmp_path / "exported").exists()


@pytest.mark.slow
def test_int8_is_written_with_its_scales_and_captions(small, photograph, tmp_path):
    folder = tmp_path / "exported"
    formats = "--format", "int8", "onnx"
    process = export(small, folder, *formats, "--quantize", photograph, "--img", photograph)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"int8: {photograph}: '")
    names = ["captioner.json", "encoder.int8.onnx", "encoder.onnx", "step.int8.onnx", "step.onnx"]
    assert sorted(path.name for path in folder.iterdir()) == names
    results = tmp_path / "results.json"
    run = run_here(
        "export.py", "--run", folder, "--img", photograph, "--beam_size", 2, "--results", results
    )
    assert run.returncode == 0, run.stderr
    caption = exported.Captioner(folder).caption(Image.open(photograph), 2)
    assert run.stdout == f"{photograph}: {caption.text} (log p {caption.log_prob:.2f})\n"
    expected = [{"image_id": photograph.name, "caption": caption.text}]
    assert json.loads(results.read_text()) == expected


# ----------------------------------------------------------------------------------- both formats


@pytest.mark.slow
def test_a_trained_model_is_exported_in_both_formats(checkpoint, scenes, tmp_path):
    images = sorted((scenes / "images").iterdir())
    process = run_here(
        "export.py", "--model", checkpoint, "--format", "onnx", "aoti", "--output_folder", tmp_path,
        "--img", *images[:3],
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("as in PyTorch") == 6
    expected = Captioner.load(checkpoint, "cpu", "off").caption(images, beam_size=5)
    lines = [
        f"{i}: {c.text} (log p {c.log_prob:.2f})" for i, c in zip(images, expected, strict=True)
    ]
    for format in ("onnx", "aoti"):
        run = run_here("export.py", "--run", tmp_path, "--format", format, "--img", *images)
        assert run.stdout.splitlines() == lines
