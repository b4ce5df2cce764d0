"""How far a loop has come: a bar on a terminal, a line now and then in a file."""

import sys

from tqdm import tqdm

from groundwork import distributed
from groundwork.errors import printable

EVERY = 60  # seconds between the lines of an output that is no terminal
# what the bar says, without the bar
LINE = "{desc}: {percentage:.0f}%, {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def progress(iterable=None, leave=True, **options):
    """tqdm's bar on stderr, of the main process alone.

    Where stderr is no terminal, as in the log of a batch system, it is a whole line every `EVERY`
    seconds instead, and none where the loop ends before.
    """
    if not sys.stderr.isatty():
        options |= {"file": _Lines(sys.stderr), "bar_format": LINE, "delay": EVERY}
        options |= {"mininterval": EVERY, "maxinterval": EVERY, "miniters": 1}
        leave = False
    return tqdm(iterable, leave=leave, disable=not distributed.is_main, **options)


def say(text, file=None):
    """Prints a line at once, on standard output if no other file is given, above the bars."""
    file = file or sys.stdout
    tqdm.write(printable(text), file=file)
    file.flush()  # a pipe or a file would keep it back


class _Lines:
    """Makes lines of what tqdm writes for a terminal, where it writes over one line."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        if line := text.strip("\r\n "):
            self.stream.write(f"{line}\n")

    def flush(self):
        self.stream.flush()
