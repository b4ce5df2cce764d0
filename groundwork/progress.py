"""How far a loop has come, on the terminal."""

from tqdm import tqdm

from groundwork import distributed


def progress(iterable=None, **options):
    """tqdm's bar, on a terminal and in the main process alone."""
    return tqdm(iterable, disable=None if distributed.is_main else True, **options)
