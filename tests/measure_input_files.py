"""Memory and time of create_input_files.py by the number of images, for docs/performance.md.

python tests/measure_input_files.py 1000 10000 100000
"""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
WORDS = [f"word{i}" for i in range(2000)]
PER_SHARD, SIDE = 1000, 16


def write_shards(folder, count):
    """Shards of WebDataset with so many small photographs of noise, a caption each."""
    rng = np.random.default_rng(0)
    photographs = []
    for _ in range(100):
        buffer = io.BytesIO()
        pixels = rng.integers(256, size=(6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((20, 15)).save(buffer, "JPEG")
        photographs.append(buffer.getvalue())
    for first in range(0, count, PER_SHARD):
        with tarfile.open(folder / f"{first:09d}.tar", "w") as archive:
            for i in range(first, min(first + PER_SHARD, count)):
                caption = " ".join(rng.choice(WORDS, 12))
                for ending, contents in (("jpg", photographs[i % 100]), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{i:09d}.{ending}")
                    member.size = len(contents)
                    archive.addfile(member, io.BytesIO(contents))


def measure(count):
    """Seconds and peak memory, MB, of making input files of so many images."""
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), count)
        command = [sys.executable, str(ROOT / "create_input_files.py"), "--dataset", "grown"]
        command += ["--captions", folder, "--output_folder", f"{folder}/data", "--shards", "4"]
        command += ["--image_size", str(SIDE), "--store", "jpeg", "--captions_per_image", "1"]
        command += ["--min_word_freq", "1"]
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)  # of this child alone
        if status:
            sys.exit("create_input_files.py has failed")
        return time.monotonic() - start, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    print("| images | peak memory, MB | s | CPU ms an image |\n| ---: | ---: | ---: | ---: |")
    for number in map(int, sys.argv[1:] or ["1000"]):
        seconds, memory, cpu = measure(number)
        print(
            f"| {number:,} | {memory:.0f} | {seconds:.1f} | {1000 * cpu / number:.2f} |", flush=True
        )
