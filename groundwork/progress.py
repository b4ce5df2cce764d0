"""How far a loop has come, on the terminal."""

import sys

from tqdm import tqdm

from groundwork import distributed
from groundwork.errors import printable


def progress(iterable=None, **options):
    """tqdm's bar, on a terminal and in the main process alone."""
    return tqdm(iterable, disable=None if distributed.is_main else True, **options)


def say(text, file=None):
    """Prints a line, on standard output if no other file is given, above the bars."""
    tqdm.write(printable(text), file=file or sys.stdout)
