"""On a full disk each script says so in one line, and what was there before is still whole.

The largest file that a process may write stands for the room that is left.
"""

import resource
import shutil
import subprocess
import sys

import pytest
from conftest import OFFLINE, ROOT, failure, run_here

import checkpoints

LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.path.insert(0, {root!r})
sys.argv = sys.argv[2:]
runpy.run_path(f"{root}/{{sys.argv[0]}}", run_name="__main__")
""".format(root=str(ROOT))

SMALL = ["--attention_dim", 8, "--embed_dim", 8, "--decoder_dim", 8, "--encoded_image_size", 3]
TRAIN = ["--encoder", OFFLINE, "--stage", "decoder", "--device", "cpu", *SMALL]


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """A folder with a data set, its features, and a model of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    for path in tiny_data[0].glob(f"*_{tiny_data[1]}*"):
        shutil.copy(path, folder)
    process = run_here("train.py", "--data_folder", folder, *TRAIN, "--epochs", 1)
    assert process.returncode == 0, process.stderr
    return folder, tiny_data[1]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# what is done with too little room, and a part of the name of the file that does not fit
CASES = {
    "input files": (50_000, "IMAGES"),
    "features": (50_000, "FEATURES"),
    "checkpoint": (500_000, "checkpoint"),
    "results": (100, "results"),
    "picture": (2_000, "_attention.png"),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case == "features")) for case in CASES]
)
def test_on_a_full_disk_nothing_is_lost(case, trained, scenes, tmp_path):
    (source, base), (limit, name) = trained, CASES[case]
    folder = tmp_path / "folder"
    shutil.copytree(source, folder)
    best = checkpoints.checkpoint_path(folder, base, best=True)
    if case == "features":
        for path in folder.glob("*FEATURES*"):
            path.unlink()
    command = {
        "input files": [
            "create_input_files.py", "--dataset", "flickr8k", "--output_folder", folder,
            "--karpathy_json", scenes / "karpathy.json", "--image_folder", scenes / "images",
            "--workers", 1,
        ],
        "features": ["train.py", "--data_folder", folder, *TRAIN, "--overwrite"],
        "checkpoint": ["train.py", "--data_folder", folder, *TRAIN, "--epochs", 2, "--resume"],
        "results": [
            "eval.py", "--model", best, "--data_folder", folder, "--output_folder", folder,
            "--beam_size", 1,
        ],
        "picture": [
            "caption.py", "--model", best, "--img", next((scenes / "images").iterdir()),
            "--output_folder", folder, "--beam_size", 1,
        ],
    }[case]  # fmt: skip
    before = contents(folder)
    if case in ("input files", "features"):  # HDF5 does not forget a file that failed
        process = subprocess.run(
            [sys.executable, "-c", LIMITED, *map(str, [limit, *command])],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            process = run_here(*command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line = failure(process)
    assert "cannot write" in line and "too large" in line.lower()
    assert name in line or str(folder) in line
    after = contents(folder)
    assert {key: after.get(key) for key in before} == before
    assert set(after) - set(before) <= {path.name for path in folder.glob("*.part")}
