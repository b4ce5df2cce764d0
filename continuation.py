"""Which checkpoint a run goes on from, and what must not be lost by it."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import checkpoints
from datasets import find_data
from groundwork.errors import UserError
from groundwork.wording import counted
from utils import input_path

KEYS = checkpoints.RUN_KEYS


@dataclass(frozen=True)
class Request:
    """What is asked for. None stands for what was not said."""

    model: str | None = None  # path of the checkpoint to go on from, or of its folder
    resume: bool = False
    overwrite: bool = False
    stage: str | None = None
    data_folder: str | None = None
    data_name: str | None = None
    output_folder: str | None = None


class Start(NamedTuple):
    """The checkpoint that a run goes on from."""

    path: Path
    checkpoint: dict
    saved: int  # when, in ns
    finetunes: bool = False  # whether stage 2 begins there

    def __str__(self):
        if self.finetunes:
            return f"fine-tuning starts from epoch {self.checkpoint['epoch']} of {self.path}"
        return f"resuming from {self.path}: {where(self.checkpoint)}"


def find_start(request, folder):
    """The `Start` that is asked for, None for a new run. Nothing is written yet.

    Args:
        request: a `Request`.
        folder: the data folder where none is asked for.

    Raises:
        UserError: there is no such checkpoint, it cannot be read, or it is past the stage.
    """
    if request.resume and (request.model is not None or request.overwrite):
        raise UserError("--resume goes without --model and --overwrite")
    if request.model is not None:
        start = _load(checkpoints.find_checkpoint(request.model))
    elif request.resume or request.stage == "finetune":
        start = _in_folder(request, Path(folder))
    else:
        return None
    if start is None:
        return None
    reached = start.checkpoint["stage"]
    if (request.stage or start.checkpoint["options"].get("stage")) == "decoder" != reached:
        raise UserError(f"{start.path} is past stage decoder: continue it with --stage finetune")
    return start._replace(finetunes=request.stage == "finetune" and reached == "decoder")


def _load(path):
    checkpoint = checkpoints.load_checkpoint(path, KEYS)
    return Start(path, checkpoint, path.stat().st_mtime_ns)


def _latest(newest, best):
    """Where the run of a folder has come to, None where neither of its checkpoints is whole.

    That is its newest checkpoint, but where a kill came between the writing of the two. Their times
    do not tell, as copying changes them.
    """
    found = {}
    for path in filter(Path.is_file, (newest, best)):
        try:
            found[path] = _load(path)
        except UserError as error:
            print(f"passed over: {error}", file=sys.stderr)
    if len(found) == 2:
        (log, starts), (further, theirs) = (
            (start.checkpoint["log"], start.checkpoint.get("records", []))
            for start in found.values()
        )
        # of the same start of training: another one may have given that best epoch up
        if len(further) > len(log) and _begins_with(further, log) and len(theirs) >= len(starts):
            return found[best]
    return next(iter(found.values()), None)


def _in_folder(request, data_folder):
    """The newest checkpoint of a run in the output folder, or, to fine-tune from, its best."""
    folder = Path(request.output_folder or request.data_folder or data_folder)
    base = request.data_name or _only_run(request, folder)
    if base is None:  # of the data there, as for a new run
        base = find_data(request.data_folder or data_folder)
    newest, best = checkpoint_paths(folder, base or "")
    if request.resume and (newest.exists() or best.exists()):
        start = _latest(newest, best)
        if start is None:
            raise UserError(
                f"no checkpoint of {base} in {folder} can be continued: start anew with "
                "--overwrite, or in another --output_folder"
            )
        if (start.checkpoint["stage"], request.stage) != ("decoder", "finetune"):
            return start
    if request.stage != "finetune":
        return None
    if base is None or not best.exists():
        missing = best if base else f"a BEST checkpoint in {folder}"
        raise UserError(
            f"--stage finetune starts from a trained decoder, and {missing} is missing: "
            "train with --stage decoder first, or name one with --model"
        )
    start = _load(best)
    # a fine-tuning that is given up starts again from the best that there is
    return start._replace(checkpoint=start.checkpoint | {"stage": "decoder"})


def runs_in(folder):
    """The data sets of the runs in a folder."""
    return {
        path.name.removeprefix(prefix).removesuffix(".pth.tar")
        for prefix in ("checkpoint_", "BEST_checkpoint_")
        for path in Path(folder).glob(f"{prefix}*.pth.tar")
    }


def _only_run(request, folder):
    """The data set of the one run in a folder, None where there is none."""
    bases = runs_in(folder)
    if request.data_folder is not None:  # whose data it is about
        bases = {base for base in bases if has_data(request.data_folder, base)}
    if len(bases) > 1:
        raise UserError(
            f"{folder} holds runs on {', '.join(sorted(bases))}: choose one with --data_name"
        )
    return next(iter(bases), None)


def has_data(folder, base):
    """Whether a folder holds a data set."""
    return input_path(folder, base, "WORDMAP").exists()


def checkpoint_paths(folder, base):
    """Where a run keeps its newest and its best checkpoint."""
    return [checkpoints.checkpoint_path(folder, base, best=best) for best in (False, True)]


def is_elsewhere(start, folder):
    """Whether the checkpoint is another folder's, whose run goes on in this one."""
    return start.path.resolve().parent != Path(folder).resolve()


def check_nothing_is_lost(start, request, folder, base):
    """The start, for a run that is alone in its folder now; its log with all epochs before stage 2.

    Raises:
        UserError: what an earlier run left there would be lost, unasked.
    """
    newest, best = checkpoint_paths(folder, base)
    if start is None or is_elsewhere(start, folder):
        if (newest.exists() or best.exists()) and not request.overwrite:
            raise UserError(
                f"{folder} holds an earlier run on {base}: continue it with --resume, "
                "choose another --output_folder, or give it up with --overwrite"
            )
        return start
    if start.path.stat().st_mtime_ns != start.saved:
        raise UserError(f"another run has written {start.path} just now: call again")
    if request.resume and not start.finetunes:
        return start
    if (latest := _latest(newest, best)) is None:
        return start
    latest = latest.checkpoint
    if not request.overwrite and _would_lose(start, latest, best):
        kind = "fine-tuning" if latest["stage"] == "finetune" else "training"
        raise UserError(
            f"{newest} holds an earlier {kind}, {where(latest)}, that starting from {start.path} "
            "would discard: continue it with --resume, choose another --output_folder, or give it "
            "up with --overwrite"
        )
    if not start.finetunes:
        return start
    # the epochs after the best, too, and none of a fine-tuning that is given up
    log, own = _decoders(latest["log"]), _decoders(start.checkpoint["log"])
    log = log if _begins_with(log, own) else own
    return start._replace(checkpoint=start.checkpoint | {"log": log})


def _would_lose(start, latest, best):
    """Whether a start in a run's own folder does without work of its latest checkpoint."""
    own, log = start.checkpoint, latest["log"]
    if start.finetunes:  # which takes the place of what the decoder's stage has in hand
        foreign = start.path.resolve() != best.resolve() and not _begins_with(log, own["log"])
        return latest["stage"] == "finetune" or foreign
    behind = len(own["log"]) == len(log) and own["step"] < latest["step"]
    return behind or not _begins_with(own["log"], log)


def _begins_with(log, start):
    # as text: a loss may be nan, which equals nothing
    return repr(log[: len(start)]) == repr(start)


def _decoders(log):
    return [record for record in log if record["stage"] == "decoder"]


def where(checkpoint):
    """How far the run of a checkpoint has come, for people."""
    step = checkpoint["step"]
    inside = f" and {counted(step, 'step')}" if step else ""
    return f"stage {checkpoint['stage']}, {counted(checkpoint['epoch'], 'epoch')}{inside}"
