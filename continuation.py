"""Which checkpoint a run goes on from, and what must not be lost by it."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import checkpoints
from datasets import find_data
from groundwork.errors import UserError
from groundwork.wording import counted
from input_files import input_path

KEYS = checkpoints.RUN_KEYS
KINDS = {  # what stages are called
    "decoder": "training",
    "finetune": "fine-tuning",
    "scst": "self-critical training",
}
LATER = ("finetune", "scst")  # stages that begin from the best checkpoint of those before


@dataclass(frozen=True)
class Request:
    """What is asked for. None stands for what was not said."""

    model: str | None = None  # path of the checkpoint to go on from, or of its folder
    resume: bool = False
    overwrite: bool = False
    extend_vocabulary: bool = False
    stage: str | None = None
    data_folder: str | None = None
    data_name: str | None = None
    output_folder: str | None = None


class Start(NamedTuple):
    """The checkpoint that a run goes on from."""

    path: Path
    checkpoint: dict
    saved: int  # when, in ns
    begins: str | None = None  # the stage that begins there; None: it goes on in its own
    extends: bool = False  # another run begins from its weights, with more words

    def __str__(self):
        if self.extends:
            return f"a new run starts from epoch {self.checkpoint['epoch']} of {self.path}"
        if self.begins:
            kind, epoch = KINDS[self.begins], self.checkpoint["epoch"]
            return f"{kind} starts from epoch {epoch} of {self.path}"
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
    if request.extend_vocabulary:
        if request.model is None:
            raise UserError("--extend_vocabulary goes with --model, whose words it adds to")
        start = _load(checkpoints.find_checkpoint(request.model))
        return start._replace(extends=True)
    if request.model is not None:
        start = _load(checkpoints.find_checkpoint(request.model))
    elif request.resume or request.stage in LATER:
        start = _in_folder(request, Path(folder))
    else:
        return None
    if start is None:
        return None
    reached = start.checkpoint["stage"]
    asked = request.stage or start.checkpoint["options"].get("stage")
    last = "finetune" if asked == "both" else asked
    if last in KINDS and is_later(reached, last):
        raise UserError(f"{start.path} is past stage {last}: continue it with --stage {reached}")
    if request.stage in LATER and is_later(request.stage, reached):
        return start._replace(begins=request.stage)
    return start


def is_later(stage, other):
    """Whether a stage comes after another."""
    return checkpoints.STAGES.index(stage) > checkpoints.STAGES.index(other)


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
    """The newest checkpoint of a run in the output folder, or, for a later stage to begin from, its
    best."""
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
        if request.stage not in LATER or not is_later(request.stage, start.checkpoint["stage"]):
            return start
    if request.stage not in LATER:
        return None
    if base is None or not best.exists():
        missing = best if base else f"a BEST checkpoint in {folder}"
        raise UserError(
            f"--stage {request.stage} starts from a trained decoder, and {missing} is missing: "
            "train with --stage decoder first, or name one with --model"
        )
    start = _load(best)
    if start.checkpoint["stage"] != request.stage:
        return start
    # a stage that is given up starts again from the best that there is
    before = checkpoints.STAGES[checkpoints.STAGES.index(request.stage) - 1]
    return start._replace(checkpoint=start.checkpoint | {"stage": before})


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
    """The start, for a run that is alone in its folder now; where a stage begins, its log with all
    epochs before.

    Raises:
        UserError: what an earlier run left there would be lost, unasked.
    """
    newest, best = checkpoint_paths(folder, base)
    if start is None or start.extends or is_elsewhere(start, folder):
        if (newest.exists() or best.exists()) and not request.overwrite:
            raise UserError(
                f"{folder} holds an earlier run on {base}: continue it with --resume, "
                "choose another --output_folder, or give it up with --overwrite"
            )
        return start
    if start.path.stat().st_mtime_ns != start.saved:
        raise UserError(f"another run has written {start.path} just now: call again")
    if request.resume and not start.begins:
        return start
    if (latest := _latest(newest, best)) is None:
        return start
    latest = latest.checkpoint
    if not request.overwrite and _would_lose(start, latest, best):
        raise UserError(
            f"{newest} holds an earlier {KINDS[latest['stage']]}, {where(latest)}, that starting "
            f"from {start.path} would discard: continue it with --resume, choose another "
            "--output_folder, or give it up with --overwrite"
        )
    if not start.begins:
        return start
    # the epochs after the best, too, and none of a stage that is given up
    log, own = (
        [record for record in log if is_later(start.begins, record["stage"])]
        for log in (latest["log"], start.checkpoint["log"])
    )
    log = log if _begins_with(log, own) else own
    return start._replace(checkpoint=start.checkpoint | {"log": log})


def _would_lose(start, latest, best):
    """Whether a start in a run's own folder does without work of its latest checkpoint."""
    own, log = start.checkpoint, latest["log"]
    if start.begins:  # a stage takes the place of what the one before has in hand
        skips = is_later(latest["stage"], own["stage"]) or not _begins_with(log, own["log"])
        foreign = start.path.resolve() != best.resolve() and skips
        return not is_later(start.begins, latest["stage"]) or foreign
    behind = len(own["log"]) == len(log) and own["step"] < latest["step"]
    return behind or not _begins_with(own["log"], log)


def _begins_with(log, start):
    # as text: a loss may be nan, which equals nothing
    return repr(log[: len(start)]) == repr(start)


def where(checkpoint):
    """How far the run of a checkpoint has come, for people."""
    step = checkpoint["step"]
    inside = f" and {counted(step, 'step')}" if step else ""
    return f"stage {checkpoint['stage']}, {counted(checkpoint['epoch'], 'epoch')}{inside}"
