"""Captions photographs with a model that export.py has written: numpy and onnxruntime, no PyTorch.

This file stands alone. Beside the folder that export.py has made it is all that a device needs:

from exported import Captioner
model = Captioner("exported")
caption = model.caption(PIL.Image.open("x.jpg"), beam_size=5)
print(caption.text, caption.log_prob)

The folder has two graphs, ONNX, also in int8, or compiled by AOTInductor, and captioner.json, which
says how to use them. I are images, K partial captions of each, both of any number:

- encoder: images (I, 3, S, S) uint8, RGB, to all that is computed once an image, `memory`, and the
  decoder's first `state`, a few arrays (I, …) each.
- step: the previous words (I, K) int64, `state` (I, K, …) and `memory` (I, …), to log p of the next
  word (I, K, V), the alphas (I, K, L) of a model that attends, and the next state, all float32.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

GRAPHS = "encoder", "step"
# of the graphs' files, by their format
ENDINGS = {"onnx": ".onnx", "int8": ".int8.onnx", "aoti": ".pt2"}
ABOUT = "captioner.json"
GROUND = 124, 116, 104  # of the fit "pad": the mean colour of ImageNet
KEYS = {  # what it has
    "formats": list,  # that the graphs are there in
    "image_size": int,  # S, side of the squares that the encoder is given, pixels
    "fit": str,  # how a photograph is made that square, as `square` has it
    "max_words": int,  # of a caption, at most, where nothing else is said
    "never": list,  # words that no caption is made of
    "word_map": dict,  # word -> index, <start> and <end> among them
    "between": str,  # a blank, or nothing, between pieces of words, in which ▁ stands for a blank
    "memory": int,  # of how many arrays it is
    "attends": bool,  # whether there are alphas
}


@dataclass(frozen=True)
class Caption:
    """A caption, and where the model looked."""

    words: list[str]
    log_prob: float  # Σ log p of the words and of <end>, natural logarithm
    alphas: np.ndarray | None  # (len(words), L) float32; None of a model without attention
    text: str


class Captioner:
    """A model that has been exported.

    Args:
        folder: that export.py has written.
        format: of `ENDINGS`; None: the first that the folder has.
        threads: that it computes with; 0: as many as onnxruntime, or PyTorch, finds fit.
    """

    def __init__(self, folder, format=None, threads=0):
        self.folder = Path(folder)
        self.about = json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))
        self.format = format or self.about["formats"][0]
        self.words = sorted(self.about["word_map"], key=self.about["word_map"].get)
        load = load_aoti if self.format == "aoti" else load_onnx
        self.encoder, self.step = (
            load(self.folder / (name + ENDINGS[self.format]), threads) for name in GRAPHS
        )

    def caption(self, image, beam_size=5, max_words=None, length_penalty=0.0):
        """The best `Caption` that a beam search finds.

        Args:
            image: a PIL.Image of any size or a uint8 array (H, W, 3), RGB.
            beam_size: partial captions kept at each step; 1 for greedy decoding.
            max_words: of the caption, at most; None: as the folder says.
            length_penalty: α: captions are compared by log p / (words + 1)^α.

        Raises:
            ValueError: no caption has a finite log p.
        """
        pixels = square(image, self.about["image_size"], self.about["fit"])
        found = self.encoder(pixels[np.newaxis])
        memory, state = found[: self.about["memory"]], found[self.about["memory"] :]
        max_words = max_words or self.about["max_words"]
        said, *found = self._search(memory, state, beam_size, max_words, length_penalty)
        words, between = [self.words[i] for i in said], self.about["between"]
        text = between.join(words) if between else "".join(words).replace("▁", " ").strip()
        return Caption(words, *found, text)

    def _search(self, memory, state, beam_size, max_words, length_penalty):
        """Words, log p and alphas of the best caption of one image; a finished one takes one place
        off the beam."""
        word_map, looking = self.about["word_map"], int(self.about["attends"])
        end, never = word_map["<end>"], [word_map[word] for word in self.about["never"]]
        # the partial captions, a row each: words, log p, and of each word the alphas (rows, L)
        said, total, looks = np.full((1, 1), word_map["<start>"]), np.zeros(1, np.float32), []
        state, places, best = [own[:, np.newaxis] for own in state], beam_size, (-np.inf, None)
        for step in range(max_words + 1):
            log_p, *found = self.step(said[np.newaxis, :, -1], *state, *memory)
            log_p, state = log_p[0], found[looking:]
            looks += [own[0] for own in found[:looking]]
            log_p[:, never] = -np.inf
            if step == 0:
                log_p[:, end] = -np.inf
            elif step == max_words:
                log_p[:, np.arange(log_p.shape[1]) != end] = -np.inf
            rows, words = likeliest(total[:, np.newaxis] + log_p, places)
            total, said = total[rows] + log_p[rows, words], np.column_stack([said[rows], words])
            looks = [own[rows] for own in looks]
            for row in np.flatnonzero(words == end):
                score = total[row] / (step + 1) ** length_penalty
                if score > best[0]:
                    alphas = np.stack([own[row] for own in looks[:-1]]) if looking else None
                    best = score, (said[row, 1:-1].tolist(), float(total[row]), alphas)
            going = words != end
            places -= np.count_nonzero(~going)
            # log p only falls, and dividing by the greatest length lifts it most
            if not going.any() or total[going][0] / (max_words + 1) ** length_penalty <= best[0]:
                break
            total, said, state = total[going], said[going], [own[:, rows[going]] for own in state]
            looks = [own[going] for own in looks]
        if best[1] is None:
            raise ValueError("the graphs give no caption a finite log p")
        return best[1]


def fault(about):
    """What keeps the contents of captioner.json from being used, or None."""
    if not isinstance(about, dict):
        return "it is no object"
    if unfit := [key for key, kind in KEYS.items() if not isinstance(about.get(key), kind)]:
        return f"its {unfit[0]} cannot be one"
    missing = {"<start>", "<end>", *about["never"]} - about["word_map"].keys()
    return f"its word_map has no {min(missing)}" if missing else None


def likeliest(total, count):
    """Rows and columns of the `count` greatest of an array that are finite, the greatest first."""
    found = np.argpartition(-total, min(count, total.size) - 1, axis=None)[:count]
    found = found[np.argsort(-total.flat[found], kind="stable")]
    return np.unravel_index(found[np.isfinite(total.flat[found])], total.shape)


def square(image, size, fit="squeeze"):
    """A PIL.Image or array (H, W, 3) made a square, uint8 (3, size, size): all of it squeezed; its
    middle, by the fit "crop"; or by "pad" all of it in its proportions, on a ground."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    image = ImageOps.exif_transpose(image).convert("RGB")
    if fit == "crop":
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        image = image.crop((left, top, left + side, top + side))
    elif fit == "pad":
        scale = size / max(image.size)
        sides = [max(1, round(scale * side)) for side in image.size]
        image, side = image.resize(sides, Image.Resampling.BILINEAR), max(sides)
        ground = Image.new("RGB", (side, side), GROUND)
        ground.paste(image, [(side - length) // 2 for length in sides])
        image = ground
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


# ----------------------------------------------------------------------------------- graphs


def load_onnx(path, threads=0):
    """The graph of an ONNX file as a function of arrays, which gives a list of them."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), settings, ["CPUExecutionProvider"])
    names = [own.name for own in session.get_inputs()]
    return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def load_aoti(path, threads=0):
    """The same of what AOTInductor has compiled, which takes PyTorch."""
    import torch
    from torch._inductor import aoti_load_package

    if threads:
        torch.set_num_threads(threads)
    package = aoti_load_package(str(path))

    def run(*arrays):
        laid_out = map(np.ascontiguousarray, arrays)  # as it was compiled for, and does not check
        return [own.numpy() for own in package(*map(torch.from_numpy, laid_out))]

    return run
