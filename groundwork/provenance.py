"""What a run was made with, so that a figure can be traced to it."""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from groundwork import distributed
from groundwork.errors import printable

# what `lines` shows
KEYS = {"started", "seconds", "command", "code", "python", "torch", "torchvision", "cuda", "device"}
KEYS |= {"machine", "data", "seed"}


def describe(data, seed, device):
    """A record of a run that begins now: texts and numbers by name.

    Args:
        data: the data set's name and fingerprint, text.
        seed: of everything that is drawn at random.
        device: torch.device that it computes on.
    """
    import torchvision  # here, as it takes seconds that reading a checkpoint does without

    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "command": shlex.join(sys.orig_argv),
        "code": _code(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # by itself a class of its own
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "machine": f"{platform.node()}, {platform.platform()}",
        "device": _device(device),
        "processes": distributed.world_size,
        "seed": seed,
        "data": data,
    }


def lines(records):
    """What eval.py prints of the records of a run, one for each time it was started."""
    for record in records:
        versions = ", ".join(
            f"{name} {record[name]}"
            for name in ("python", "torch", "torchvision", "cuda")
            if record[name]
        )
        yield printable(
            f"trained from {record['started']} for {record['seconds']:.0f} s by: "
            f"{record['command']}"
        )
        yield printable(
            f"  code {record['code']}; {versions}; {record['device']} of {record['machine']}; "
            f"data {record['data']}; seed {record['seed']}"
        )


def _code():
    """The git commit, and whether files differ from it; without git, a hash of the modules."""
    folder = Path(__file__).parent.parent

    def git(*arguments):
        call = ["git", "-C", str(folder), *arguments]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            raise OSError("the modules are no repository of their own")
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (", with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        contents = b"".join(
            path.read_bytes()
            for path in sorted([*folder.glob("*.py"), *folder.glob("groundwork/*.py")])
        )
        return f"sha256 {hashlib.sha256(contents).hexdigest()[:16]}, not in git"


def _device(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
