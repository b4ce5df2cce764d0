"""What the scripts' command lines have in common, and devices."""

import argparse

import pytest
import torch

from groundwork import devices
from groundwork.errors import UserError
from groundwork.options import number


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


def test_choose_device():
    assert devices.choose_device("cpu") == torch.device("cpu")
    assert devices.choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu7", "", "cuda:999", "cpu:3", "meta"):
        with pytest.raises(UserError, match=f"device {name} cannot be used") as error:
            devices.choose_device(name)
        assert "\n" not in str(error.value)
