"""What `train.py --tensorboard` writes: scalars, captions with attention, hyperparameters, record.

The horizontal axis counts the captions that the run has trained on.
"""

import sys
import threading

import numpy as np

from groundwork.errors import UserError, printable
from groundwork.files import os_errors_as_user_errors

# Tag of what a line of the log holds
TAGS = {"loss": "loss/train", "val_loss": "loss/validation"}
TAGS |= {"top5": "top-5/train", "val_top5": "top-5/validation"}
TAGS |= {f"bleu{n}": f"BLEU/BLEU-{n}" for n in range(1, 5)}  # one group of charts
TAGS |= {"cider": "CIDEr-D/validation", "reward": "reward/train"}
TAGS |= {"distinct_words": "diversity/distinct_words", "dangling": "diversity/dangling_ends"}
TAGS |= {"captions_per_second": "speed/captions_per_second"}
RATES = ["learning_rate/decoder", "learning_rate/encoder"]


def check_installed():
    """Raises UserError where TensorBoard's package is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401 -- takes a second, so only when asked for
    except ImportError as error:
        raise UserError(f"--tensorboard: {error}: pip install tensorboard") from error


def remove(folder):
    """Removes an earlier run's events."""
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink()


class EventLog:
    """Events of a run, in files of a folder.

    If they cannot be written any more, a line says so and training goes on without.

    Args:
        folder: made if it is missing. What other files in it say of `start` and later is void.
        start: captions.
        hyperparameters: numbers and texts by name.
        record: of this start of the run, from `provenance.describe`.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder, start, hyperparameters, record):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.folder, self.broken = folder, False
        self.hook, threading.excepthook = threading.excepthook, self._pass_over
        try:
            with os_errors_as_user_errors(folder):
                self.writer = SummaryWriter(folder, purge_step=start)
        except UserError:
            threading.excepthook = self.hook
            raise
        metrics = dict.fromkeys(TAGS[name] for name in ("bleu4", "cider", "val_loss"))
        shown = {
            name: str(value) if isinstance(value, bool) else value
            for name, value in hyperparameters.items()
        }
        experiment, session, _ = hparams(shown, metrics)  # the third would say that it has ended
        for summary in (experiment, session):
            self._write(self.writer.file_writer.add_summary, summary)
        lines = [printable(f"{name}: {value}") for name, value in record.items()]
        code = "".join(f"    {line}\n" for line in lines)  # Markdown leaves it as it is
        self._write(self.writer.add_text, "run", code, start)

    def step(self, captions, loss, rates):
        """A step of training: its loss, and the learning rates of decoder and encoder."""
        self._write(self.writer.add_scalar, "loss/step", loss, captions)
        for tag, rate in zip(RATES, rates, strict=False):
            self._write(self.writer.add_scalar, tag, rate, captions)

    def epoch(self, captions, record, scalars, examples):
        """An epoch's line of the log, further numbers, and examples.

        Args:
            scalars: tag -> value.
            examples: (file name, a human caption, the model's, RGB PIL.Image) each.
        """
        for key, tag in TAGS.items():
            if key in record:
                self._write(self.writer.add_scalar, tag, record[key], captions)
        for tag, value in scalars.items():
            self._write(self.writer.add_scalar, tag, value, captions)
        for number, (filename, human, caption, picture) in enumerate(examples, start=1):
            name = printable(f"{number} {filename}")
            tag, pixels = f"attention/{name}", np.asarray(picture)
            self._write(self.writer.add_image, tag, pixels, captions, None, "HWC")
            lines = [f"model: {caption}", f"human: {human}"]
            code = "".join(f"    {printable(line)}\n" for line in lines)
            self._write(self.writer.add_text, f"captions/{name}", code, captions)

    def flush(self):
        """Returns when all events are in the file."""
        self._write(self.writer.flush)

    def close(self):
        self._write(self.writer.close)
        threading.excepthook = self.hook

    def _write(self, write, *arguments):
        """Calls a method of the writer, unless one has failed before."""
        if self.broken:
            return
        try:
            with os_errors_as_user_errors(self.folder):
                write(*arguments)
        except UserError as error:
            self.broken = True
            print(f"{error}: training goes on without TensorBoard", file=sys.stderr, flush=True)

    def _pass_over(self, arguments):
        """A `threading.excepthook`: the writer's thread hands its OSErrors to the next call."""
        own = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (own and issubclass(arguments.exc_type, OSError)):
            self.hook(arguments)
