"""Files written whole or not at all, folders, and how a script ends."""

import os
import subprocess
import sys

import pytest

import encoders
from groundwork import errors, files
from groundwork.errors import UserError


def test_atomic_write(tmp_path):
    path = tmp_path / "file"
    with files.atomic_write(path) as temporary:
        temporary.write_text("old")
        assert temporary.parent == tmp_path and temporary.name.endswith(".tmp")
        assert not path.exists()
    assert path.read_text() == "old"
    with pytest.raises(ZeroDivisionError), files.atomic_write(path) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    full_disk = pytest.raises(UserError, match="cannot write .*file: No space left on device")
    with full_disk, files.atomic_write(path) as temporary:
        temporary.write_text("new")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="nowhere"), files.atomic_write(tmp_path / "nowhere/x") as t:
        t.write_text("new")


def test_what_cannot_be_written_is_found_out_without_writing(tmp_path):
    path = tmp_path / "new" / "file"
    files.check_writable(path)
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]
    path.write_text("old")
    files.check_writable(path)
    assert path.read_text() == "old"
    with pytest.raises(UserError, match="cannot write .*new: Is a directory"):
        files.check_writable(tmp_path / "new")
    with pytest.raises(UserError, match="file"):
        files.check_writable(path / "below a file")
    with pytest.raises(UserError, match="File name too long"):
        files.check_writable(tmp_path / ("x" * 250))
    assert list(tmp_path.rglob("*")) == [tmp_path / "new", path]


@pytest.mark.parametrize("kind", [UserError, encoders.EncoderError])
def test_run_ends_with_the_line_of_an_error(kind):
    def main():
        raise kind("a line")

    with pytest.raises(SystemExit, match="^error: a line$"):  # Python prints it, status 1
        errors.run(main)


def test_run_ends_quietly_when_interrupted(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        errors.run(main)
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_temporaries_of_dead_processes_are_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = files.temporary_path(tmp_path / "a.json")
    stale = mine.with_name(mine.name.replace(f".{os.getpid()}.", f".{dead.pid}."))
    others = [tmp_path / n for n in ("a.json", "notes.tmp", f"a.json.elsewhere.{dead.pid}.tmp")]
    for path in (mine, stale, *others):
        path.touch()
    files.make_folder(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, *others}
