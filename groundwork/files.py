"""Files written whole or not at all, locks on them, folders, and reading what may be damaged."""

import errno
import glob
import json
import os
import platform
import shutil
import stat
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

from groundwork.errors import UserError
from groundwork.wording import size_of


@contextmanager
def sole_writer(path, way_out):
    """Holds a lock on `path` for the block, which ends with the process at the latest.

    Raises:
        UserError: another process holds it, `way_out` being what to do then.
    """
    path = Path(path)
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file, blocking=False)
    with os_errors_as_user_errors(path):
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(f"another run is writing {path}: {way_out}") from error
    try:
        yield
    finally:
        if os.name == "posix":  # while it is held; on Windows release() removes it itself
            file.unlink(missing_ok=True)
        lock.release()


@contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path`, which takes its place when the block succeeds.

    When the block fails, the temporary file is removed and an older `path` stays as it was.
    Raises UserError for any OSError: a full disk, no permission, a missing folder.
    """
    path = Path(path)
    with temporaries([path], path) as [temporary]:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush_folder(path.parent)


def check_writable(path, size=1):
    """Finds out whether `atomic_write` could write `size` bytes to `path`, whose folder is made; an
    older file stays as it is. For before the work whose result it is to take.

    Raises UserError if it could not.
    """
    path = Path(path)
    make_folder(path.parent)
    with temporaries([path], path) as [temporary]:
        reserve(temporary, size)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")


@contextmanager
def temporaries(paths, goal):
    """Yields a temporary path beside each path; those not renamed by the end are removed."""
    beside = [temporary_path(path) for path in paths]
    with os_errors_as_user_errors(goal):
        try:
            yield beside
        finally:
            for temporary in beside:
                temporary.unlink(missing_ok=True)


def temporary_path(path):
    """A path beside `path` that no other process takes, of this machine or another."""
    return path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.tmp")


def _remove_stale_temporaries(folder):
    """Removes what processes of this machine that were killed while they wrote have left."""
    if os.name != "posix":  # on Windows `os.kill` with 0 is no question, but Ctrl-C
        return
    for path in Path(folder).glob(f"*.{glob.escape(platform.node())}.*.tmp"):
        pid = path.suffixes[-2][1:]
        if pid.isdecimal() and not _is_running(int(pid)):
            path.unlink(missing_ok=True)


def _is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


@contextmanager
def os_errors_as_user_errors(path):
    """Makes any OSError of the block, which writes `path`, a UserError that names it."""
    try:
        yield
    except BlockingIOError as error:  # HDF5 locks the files that it writes
        raise UserError(f"cannot write {path}: another run is writing it") from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {_reason(error)}") from error


def _reason(error):
    """An OSError's reason without the path, which our messages name themselves."""
    return os.strerror(error.errno) if getattr(error, "errno", None) else error


def reserve(path, size):
    """Takes the room on the disk that a file of `size` bytes needs, where the system can."""
    with open(path, "ab") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)


def check_space(folder, size, what, other="another folder"):
    """Raises UserError if `size` bytes of `what`, words in the plural, do not fit: better now than
    after hours of work. `other` is what to choose then."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{what} take {size_of(size)} and {folder} has {size_of(free)} free: "
            f"make room or choose {other}"
        )


def flush(path):
    """Returns when the file's contents are on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def flush_folder(path):
    """Returns when the names in the folder are on the disk, where the system can tell."""
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def folder_for(path):
    """Makes a folder for the block, which takes it as a Path; where nothing is in it at the end,
    what was made is removed again."""
    path = Path(path)
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield make_folder(path)
    finally:
        with suppress(OSError):  # there is something in it
            for folder in new:
                folder.rmdir()


def make_folder(path):
    """The folder of that path, made if it is missing, without what killed processes left in it.

    Raises UserError if it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        _remove_stale_temporaries(path)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {_reason(error)}") from error
    return Path(path)


def check_readable(path, missing=None):
    """Raises UserError where a file is not there, `missing` being what to say then, is no file, or
    is not this user's to read: such a file is not to be called damaged."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait for ever
            raise UserError(f"cannot read {path}: it is no file")
        open(path, "rb").close()
    except (OSError, ValueError) as error:  # a path with a null character is a ValueError
        reason = f"cannot read {path}: {_reason(error)}"
        nowhere = isinstance(error, FileNotFoundError | ValueError)
        raise UserError(missing if nowhere and missing else reason) from error


def check_listable(folder):
    """Raises UserError for a folder that is there and is not this user's to look into: its files
    are not to be called missing."""
    try:
        os.scandir(folder).close()
    except PermissionError as error:
        raise UserError(f"cannot read the folder {folder}: {_reason(error)}") from error
    except OSError:  # it is not there, or no folder, which others say better
        pass


def check_folder(folder, option):
    """Raises UserError where there is no folder of that path, which the option names: nothing is to
    be called missing in it."""
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}: check {option}")


def write_new(path, contents):
    """Writes bytes to a new file, whole or not at all, and returns its path: where a file of the
    name is there, the next free one of `name_2.png`, `name_3.png` and so on."""
    path = Path(path)
    stem = path.stem
    with temporaries([path], path) as [temporary]:
        temporary.write_bytes(contents)
        flush(temporary)
        for number in count(2):
            try:
                path.touch(exist_ok=False)  # so that no other process takes the name
                break
            except FileExistsError:
                path = path.with_name(f"{stem}_{number}{path.suffix}")
        os.replace(temporary, path)
        flush_folder(path.parent)
    return path


def read_json(path):
    """The contents of a JSON file. Raises UserError if it cannot be read or is not valid JSON."""
    check_readable(path)
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {_reason(error)}") from error
    except (ValueError, RecursionError) as error:  # bad syntax, encoding, or endless nesting
        raise UserError(f"{path} is not valid JSON: {error}") from error


def write_json(path, contents, **options):
    """Writes a JSON file, whole or not at all; the options are those of json.dumps."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(contents, **options) + "\n", encoding="utf-8")


def names(paths):
    """A short name for each checkpoint: the shortest end of its path that no other path has."""
    ending = ".pth.tar"
    whole = [os.path.abspath(path) for path in paths]
    without = [path.removesuffix(ending) for path in whole]
    parts = [Path(path).parts for path in (without if len({*without}) == len({*whole}) else whole)]

    def ends(path, count):
        return [other[-count:] for other in {*parts}].count(path[-count:])

    counts = [next(n for n in range(1, len(own) + 1) if ends(own, n) == 1) for own in parts]
    return [str(Path(*own[-n:])) for own, n in zip(parts, counts, strict=True)]
