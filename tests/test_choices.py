"""Options of the model that cannot be, or not together, are told before any work, in one line."""

import re

import pytest
from conftest import OFFLINE, failure, run_here
from test_decoders import build, make_batch, variants

import choices
import embeddings
from attentions import ATTENTIONS
from config import ModelConfig
from contract import config_fields
from groundwork.errors import UserError
from training_options import make_parser

VECTORS = "a 1 2 3\nred 4 5 6\n"


def check(*arguments):
    """Of a new model with these options, none of them a recipe's."""
    parser = make_parser()
    choices.check(vars(parser.parse_args(arguments)), parser.typed(arguments))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--decoder foo", "--decoder foo: there is no such decoder: known are lstm, gru, "),
        ("--attention foo", "--attention foo: there is no such attention: known are soft, hard, "),
        ("--decoder merge --attention hard", "--attention hard: the decoder merge has no such .*: "
         r"leave it out, or give another --decoder \(--list has the options of each\)"),
        ("--layers 3", "--layers 3: the decoder lstm has no such choice: leave it out, .*--list"),
        ("--heads 3", "--heads 3: the attention soft has no such choice: leave it out, or give "
         "another --attention .*--list"),
        ("--decoder gru --heads 3", "--heads 3: the attention bahdanau has no such choice"),
        ("--attention none --query word --attention_dim 64",
         "--attention_dim 64 --query word: the attention none has no such choice"),
        ("--attention adaptive --query state", "--query state: the attention adaptive has no such"),
        ("--attention none --alpha_c 1", "--alpha_c 1.0: this model has no attention to weigh: "),
        ("--decoder merge --alpha_c 0.5", "--alpha_c 0.5: this model has no attention to weigh: "),
        ("--attention multihead --heads 3", "--attention multihead --heads 3: its attention_dim "
         "512 is no multiple of its heads, 3: give heads that divide it"),
        ("--decoder transformer --heads 3", "--decoder transformer --heads 3: its 3 heads cannot "
         "share 256 units out: give heads that divide its embed_dim"),
        ("--decoder transformer --layers 101", "--decoder transformer --layers 101: its layers are "
         "101: 100 at most"),
        ("--decoder_dim 2000000000", "--decoder_dim 2000000000: .*overflow"),
        ("--encoder_stages fc", "--encoder_stages fc is one vector .*: give --encoder_stages last, "
         "or --attention none or --decoder merge"),
        ("--encoder_stages fc --decoder transformer", "--encoder_stages fc is .*: give "
         "--encoder_stages last, or --decoder merge"),
        ("--encoder_stages 16 fc", "--encoder_stages fc is one vector"),
        ("--encoder_stages fc --decoder merge --encoded_image_size 8",
         "--encoded_image_size 8: --encoder_stages fc is .*no grid: leave it out"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named_with_the_way_out(typed, said):
    with pytest.raises(UserError, match=f"^{said}") as error:
        check(*typed.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "--attention none --alpha_c 0 --encoder_stages fc",
        "--decoder merge --encoder_stages fc",
        "--attention multihead --heads 8 --query word",
        "--decoder transformer --heads 4 --layers 3 --alpha_c 1",
        "--decoder gru --attention adaptive --attention_dim 8",
        "--freeze_embeddings --bias_init frequencies --bar_special",
    ],
)
def test_what_can_be_is_let_through(typed):
    check(*typed.split())


def test_the_size_of_vectors_is_that_of_the_first_lines(tmp_path, monkeypatch):
    path = tmp_path / "vectors.txt"
    path.write_text(VECTORS)
    monkeypatch.setattr(embeddings, "read_vectors", None)  # which takes long
    check("--embeddings", str(path), "--embed_dim", "3")
    with pytest.raises(UserError, match=f"^--embed_dim 7: the vectors of {path} have 3 values"):
        check("--embeddings", str(path), "--embed_dim", "7")
    with pytest.raises(UserError) as error:
        check("--embeddings", str(path), "--decoder", "transformer")
    assert str(error.value) == (
        f"--decoder transformer --embeddings {path}: its 2 heads cannot share 3 units out: give "
        f"heads that divide its embed_dim; the 3 values of a word are those of {path}"
    )
    check("--embeddings", str(path), "--decoder", "transformer", "--heads", "3")
    path.write_text("a dog runs\n")
    with pytest.raises(UserError, match="no text of word vectors"):
        check("--embeddings", str(path))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--decoder", "foo", "--encoder", "resnet101"],
        ["--encoder", OFFLINE, "--encoder_stages", "foo"],
        ["--encoder", "resnat101"],
        ["--encoder", "resnet18", "--recipe", "attending", "--encoder_weights", "none.pth"],
    ],
)
def test_a_refused_run_leaves_no_folder(tiny_data, tmp_path, arguments):
    output = tmp_path / "new" / "run"
    process = run_here(
        "train.py", "--data_folder", tiny_data[0], "--output_folder", output, *arguments
    )
    failure(process)
    assert "Downloading" not in process.stdout + process.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_is_told_before_the_demo_data_are_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = failure(run_here("train.py", "--attention", "multihead", "--heads", 256))
    assert "attention_dim 128 is no multiple" in line  # the demo's
    assert list(tmp_path.iterdir()) == []


def test_what_a_recipe_has_is_not_typed(tiny_data, tmp_path):
    """Its query and attention_dim are idle here: only the weights are missed."""
    line = failure(
        run_here(
            "train.py", "--data_folder", tiny_data[0], "--output_folder", tmp_path, "--recipe",
            "attending", "--attention", "none", "--encoder", OFFLINE, "--encoder_weights",
            tmp_path / "none.pth",
        )
    )  # fmt: skip
    assert "none.pth" in line


# ------------------------------------------------------------------ what an attention is made with

FIELDS = {"attention_dim": 12, "query": "word", "heads": 3}  # other values than those of `build`


@pytest.mark.parametrize("name", ["lstm", "gru", "topdown"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_an_attention_is_another_by_the_fields_that_it_names_and_no_others(name, attention):
    variant, batch = (name, {"attention": attention}), make_batch([4, 3], 1)
    assert {key for kind in ATTENTIONS.values() for key in kind.fields} == FIELDS.keys()
    usual = build(variant, std=0.5)
    shapes = {key: tensor.shape for key, tensor in usual.state_dict().items()}
    for key, value in FIELDS.items():
        other = build(variant, std=0.5, **{key: value})
        same = shapes == {key: tensor.shape for key, tensor in other.state_dict().items()}
        same = same and (usual(*batch).scores.data == other(*batch).scores.data).all()
        assert same == (key not in ATTENTIONS[attention].fields), key
    assert choices.idle_fields(attention) == FIELDS.keys() - set(ATTENTIONS[attention].fields)


@pytest.mark.parametrize(("name", "chosen"), list(variants()))
def test_a_model_attends_if_it_has_alphas(name, chosen):
    alphas = build((name, chosen))(*make_batch([3], 1)).alphas
    assert choices.attends(name, chosen.get("attention")) == (alphas is not None)


# ------------------------------------------------------------------------- a checkpoint's model


def unchanged(in_force, before=None, recipe=None, **asked):
    """Checks these options against those of a checkpoint's model; a recipe's are not typed."""
    typed = {"recipe": recipe} if recipe else asked
    choices.check_unchanged(asked, typed, in_force, before or {})


def of_model(name, **choices_):
    """What is in force of a model with its decoder's defaults."""
    values = {key: field.default for key, field in config_fields(name).items()} | choices_
    known = vars(ModelConfig())
    return {"decoder": name} | {key: values[key] for key in values if key in known}


def test_idle_options_of_a_checkpoints_model_are_refused_as_a_new_ones():
    for refuse in (
        lambda: unchanged(of_model("lstm"), heads=2),
        lambda: check("--heads", "2"),
    ):
        with pytest.raises(UserError, match="^--heads 2: the attention soft has no such choice"):
            refuse()
    unchanged(of_model("lstm", attention="adaptive"), recipe="attending", query="word")
    unchanged(of_model("merge"), recipe="attending", query="word", attention_dim=128)


def test_what_the_checkpoints_model_has_instead_is_said():
    with pytest.raises(UserError) as error:
        unchanged(of_model("lstm"), embeddings="f", gate="channel")
    assert str(error.value) == (
        "--gate channel --embeddings f: the model is the checkpoint's, with --gate scalar, no "
        "--embeddings: leave it out, or train another model in another --output_folder"
    )
    with pytest.raises(UserError, match=re.escape("leave it out, or --recipe attending, which")):
        unchanged(of_model("lstm"), recipe="attending", query="word")
    with pytest.raises(UserError, match="leave it out, or train another"):  # no recipe has it
        choices.check_unchanged(
            {"gate": "channel"}, {"recipe": "paper", "gate": "channel"}, of_model("lstm"), {}
        )
    unchanged(of_model("lstm"), {"embeddings": "f"}, embeddings="f")


def test_options_of_the_run_before_are_not_refused_in_a_stage_that_does_without():
    """Only those typed are: a fine-tuning's hold in the self-critical stage after it."""
    values = vars(make_parser().parse_args(["--stage", "scst"]))
    values |= {"augment": "crop mirror", "accumulate": 4}
    choices.check_training(values, {"stage": "scst"})
    choices.check_training(values, {"stage": "scst", "accumulate": 1})
    for typed, said in (
        ({"accumulate": 2}, "or give a larger --scst_batch_size"),
        ({"scheduled_sampling": "linear"}, "the stage scst reads no true words"),
        ({"augment": "crop"}, "--augment crop: this stage reads cached features, no images"),
    ):
        with pytest.raises(UserError, match=said):
            choices.check_training(values | typed, typed)
    choices.check_training(values | {"cache_features": "off"}, {"augment": "crop"})
