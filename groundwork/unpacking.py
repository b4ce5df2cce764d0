"""Zip archives of others unpacked: nothing but plain files, below one folder, of a bounded size."""

import os
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from groundwork.errors import UserError
from groundwork.files import check_space, flush_folder, make_folder, os_errors_as_user_errors
from groundwork.progress import progress

RATIO = 20  # unpacked bytes of an archive's own: JSON of captions has 6, photographs 1
MEMBERS = 1_000_000  # of an archive, at most


def unpack(archive, folder, wanted, ratio=RATIO):
    """Unpacks what is wanted of a zip archive to a folder: all of it, or nothing.

    The archive is looked through before anything is written. What else it holds stays in it.

    Args:
        wanted: names of files or folders at the archive's top, none of them in `folder` yet.
        ratio: how many times the archive's size all members may take together.

    Raises:
        UserError: it is no zip archive or a damaged one, lacks what is wanted, holds what no data
            set needs (paths that lead out, links, too much), or the disk has no room.
    """
    archive, folder = Path(archive), make_folder(folder)
    beside = folder / f".{archive.name}.unpacking"
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
    with os_errors_as_user_errors(folder):
        try:
            with zipfile.ZipFile(archive) as source:
                members = _checked(source, archive, wanted, ratio)
                size = sum(member.file_size for member in members)
                check_space(folder, size, f"what {archive.name} holds")
                beside.mkdir()
                _write(source, members, beside, size)
            for name in wanted:
                os.replace(beside / name, folder / name)
            flush_folder(folder)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UserError(f"{archive} is damaged, fetch it again: {error}") from error
        except NotImplementedError as error:  # of a kind of which zipfile knows nothing
            raise UserError(f"cannot unpack {archive}: {error}") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _checked(source, archive, wanted, ratio):
    """The members to unpack, as ZipInfo, once nothing speaks against the archive."""
    members, seen, total = [], set(), 0
    if len(source.infolist()) > MEMBERS:
        raise UserError(f"{archive} is refused: it holds more than {MEMBERS:,} files")
    for member in source.infolist():
        if fault := _fault(member):
            raise UserError(f"{archive} is refused: {member.orig_filename[:200]!r} {fault}")
        total += member.file_size
        path = PurePosixPath(member.filename)
        if path.parts[0] in wanted and not member.is_dir():
            if path in seen:
                raise UserError(f"{archive} is refused: it holds {str(path)!r} twice")
            seen.add(path)
            members.append(member)
    if total > ratio * archive.stat().st_size:
        raise UserError(
            f"{archive} is refused: its files would take {ratio} times as much room as itself"
        )
    missing = set(wanted) - {PurePosixPath(member.filename).parts[0] for member in members}
    if missing:
        raise UserError(f"{archive} holds no {sorted(missing)[0]}: it is another archive")
    return members


def _fault(member):
    """What speaks against a member, None where nothing does."""
    name, path = member.orig_filename, PurePosixPath(member.filename)
    if path.is_absolute() or ".." in path.parts or not path.parts or set(name) & set("\\:\0"):
        return "leads out of the folder"
    kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where it was packed without
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if member.flag_bits & 1:
        return "is encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is packed in a way that no data set needs"
    return None


def _write(source, members, folder, size):
    """Writes the members below the folder. No more comes of one than it says that it has: zipfile
    ends there, and compares its checksum."""
    with progress(total=size, desc="unpacking", unit="B", unit_scale=True) as bar:
        for member in members:
            path = folder / member.filename
            path.parent.mkdir(parents=True, exist_ok=True)
            with source.open(member) as packed, open(path, "xb") as file:
                while chunk := packed.read(2**20):
                    file.write(chunk)
                    bar.update(len(chunk))
    os.sync()  # once, as a hundred thousand small files would take minutes one by one
