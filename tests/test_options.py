"""What the scripts' command lines have in common, and devices."""

import argparse

import pytest
import torch

from groundwork import devices
from groundwork.errors import UserError
from groundwork.options import SEVERAL, Parser, as_arguments, as_flags, number
from groundwork.wording import counted


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        ({"kind": int}, ["-3", "0", "12"], ["1.5", "x", ""]),
        ({"kind": int, "above": 0}, ["1"], ["0", "-1"]),
        ({"kind": float, "least": 0}, ["0", "0.1"], ["-0.1", "nan"]),
        ({"kind": float, "least": 0, "below": 1}, ["0", "0.99"], ["1", "-1", "inf"]),
    ],
)
def test_number(options, good, bad):
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--n", type=number(**options))
    for text in good:
        value = parser.parse_args([f"--n={text}"]).n
        assert value == float(text) and type(value) is options["kind"]
    for text in bad:
        with pytest.raises(argparse.ArgumentError, match="--n"):
            parser.parse_args([f"--n={text}"])


def test_a_name_cut_short_is_no_option(capsys):
    """It might be meant as another: `--n` of one script is no `--no_repeat_ngram` of the next."""
    parser = Parser(prog="eval.py")
    parser.add_argument("--no_repeat_ngram", type=int)
    for arguments in (["--n", "3"], ["--no_repeat", "3"]):
        with pytest.raises(SystemExit):
            parser.parse_args(arguments)
        assert f"unrecognized arguments: {arguments[0]}" in capsys.readouterr().err


def test_choose_device():
    assert devices.choose_device("cpu") == torch.device("cpu")
    assert devices.choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu7", "", "cuda:999", "cpu:3", "meta"):
        with pytest.raises(UserError, match=f"device {name} cannot be used") as error:
            devices.choose_device(name)
        assert "\n" not in str(error.value)


def test_what_is_typed_is_told_from_the_defaults():
    parser = Parser()
    parser.add_argument("--n", type=number(int), default=3)
    parser.add_argument("--name", default="x y")
    parser.add_argument("--flag", action=argparse.BooleanOptionalAction, default=False)
    assert parser.typed([]) == {}
    assert parser.typed(["--n=3", "--no-flag"]) == {"n": 3, "flag": False}
    options = {"n": 4, "name": "-a b", "flag": True, "none": None}
    assert parser.typed(as_arguments(options)) == {"n": 4, "name": "-a b", "flag": True}
    assert as_flags(options) == "--n 4 --name '-a b' --flag"
    assert as_flags({"flag": False}) == "--no-flag"


def test_several_values_are_gathered_from_all_places_where_they_are_typed():
    parser = Parser()
    parser.add_argument("--model", "--checkpoint", **SEVERAL)
    parser.add_argument("--n", type=int, default=3)
    assert parser.parse_args([]).model is None and parser.typed(["--n=4"]) == {"n": 4}
    for arguments in (["--model", "a", "b", "c"], ["--model", "a", "--checkpoint", "b", "c"]):
        assert parser.parse_args(arguments).model == ["a", "b", "c"]
        assert parser.typed(arguments) == {"model": ["a", "b", "c"]}
    assert parser.parse_args(["--model", "d"]).model == ["d"]  # nothing stays from before


def test_counts_have_their_plurals():
    assert [counted(n, "epoch") for n in (0, 1, 2)] == ["0 epochs", "1 epoch", "2 epochs"]
    assert counted(2, "process") == "2 processes"
