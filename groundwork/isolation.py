"""This project's flat names beside other projects' of the same names."""

import sys
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent


@contextmanager
def own_modules(keep=True):
    """While it is entered, `models`, `utils` and so on are this project's, whoever has taken the
    names before.

    Afterwards each name means again what it would mean without: another's module is back in its
    place, and one of ours that was imported meanwhile stays only where the path leads to it.

    Args:
        keep: whether it may stay; without, none does.
    """
    names = {path.stem for path in FOLDER.glob("*.py")}
    known = {name: sys.modules[name] for name in names & sys.modules.keys()}
    for name, module in known.items():
        if not _is_own(getattr(module, "__file__", None)):
            del sys.modules[name]
    sys.path.insert(0, str(FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        for name in names & sys.modules.keys() - known.keys():
            spec = PathFinder.find_spec(name)
            if not (keep and spec is not None and _is_own(spec.origin)):
                del sys.modules[name]
        sys.modules.update(known)


def _is_own(file):
    return file is not None and Path(file).resolve().parent == FOLDER
