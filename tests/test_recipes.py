"""The recipes: that their commands are the scripts' own, and what is done is not done again."""

import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import create_input_files
import eval
import training_options

RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*_*.sh")) + [
    "coco.sh",
    "flickr30k.sh",
]


def run(recipe, folder, **settings):
    """A recipe's process, which has ended; settings as its head names them."""
    settings = {"DATA": folder / "data", "RUNS": folder / "runs", **settings}
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    return subprocess.run(
        ["bash", ROOT / "recipes" / recipe], env=environment, capture_output=True, text=True
    )


def commands(recipe, folder, **settings):
    """What a recipe calls, as lists of words, without doing it."""
    process = run(recipe, folder, PYTHON="echo", LAUNCH="echo", **settings)
    assert process.returncode == 0, process.stderr
    return [shlex.split(line) for line in process.stdout.splitlines()]


@pytest.mark.parametrize("recipe", sorted(set(RECIPES)))
def test_every_command_of_a_recipe_can_be_given(recipe, tmp_path, monkeypatch):
    parsers = {
        "create_input_files.py": create_input_files.parse_arguments,
        "train.py": lambda: training_options.make_parser().parse_args(),
        "eval.py": eval.parse_arguments,
    }
    found = commands(recipe, tmp_path)
    assert "train.py" in {script for script, *_ in found} and found[-1][0] == "eval.py"
    for script, *options in found:
        monkeypatch.setattr(sys, "argv", [script, *options])
        parsers[script]()


def test_what_is_done_is_not_done_again(tmp_path):
    first = commands("flickr8k_ensemble.sh", tmp_path, STAGES="frozen scst")
    stages = [words[words.index("--stage") + 1] for words in first if words[0] == "train.py"]
    assert stages == ["decoder", "scst"] * 5
    folders = [
        words[words.index("--output_folder") + 1] for words in first if words[0] == "train.py"
    ]
    assert folders == [str(tmp_path / "runs" / f"seed{n}") for n in range(5) for _ in range(2)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "WORDMAP_flickr8k_5_cap_per_img_5_min_word_freq.json").touch()
    (tmp_path / "runs" / "seed3" / "scst.done").unlink()
    again = commands("flickr8k_ensemble.sh", tmp_path, STAGES="frozen scst")
    assert [words[0] for words in again].count("create_input_files.py") == 0
    [left] = [words for words in again if words[0] == "train.py"]
    assert "seed3" in " ".join(left) and "scst" in left
    assert again[-1][again[-1].index("--model") + 1 :][:5] == [
        str(tmp_path / "runs" / f"seed{n}") for n in range(5)
    ]


def test_coco_without_gpus_says_so_before_it_downloads(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    process = run("coco.sh", tmp_path, PYTHON="echo", LAUNCH="", PATH=path)
    assert process.returncode == 1 and not process.stdout
    assert process.stderr == (
        "error: coco.sh trains on GPUs, and there are none here: LAUNCH=python does without\n"
    )


def test_a_recipe_ends_where_a_command_fails(tmp_path):
    process = run("flickr8k_frozen.sh", tmp_path, PYTHON="false")
    assert process.returncode == 1 and not list(tmp_path.rglob("*.done"))
