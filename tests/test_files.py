"""Files written whole or not at all, folders, and how a script ends."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

import encoders
from groundwork import errors, files
from groundwork.errors import UserError, printable
from groundwork.files import write_new


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


def test_a_new_file_takes_no_other_s_place(tmp_path):
    """Not of those that are there, and not of those that another process writes meanwhile."""
    (tmp_path / "x.png").write_bytes(b"old")
    code = f"""
from groundwork.files import write_new
for i in range(40):
    print(write_new({str(tmp_path / "x.png")!r}, b"%d" % i).name)
"""
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    names = [process.communicate()[0].split() for process in both]
    assert {*names[0], *names[1]} == {f"x_{i}.png" for i in range(2, 82)}
    for own in names:
        assert [(tmp_path / name).read_text() for name in own] == [str(i) for i in range(40)]
    assert (tmp_path / "x.png").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 81


def test_a_new_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot write .*x.png: No such file"):
        write_new(tmp_path / "missing" / "x.png", b"")
    monkeypatch.setattr(os, "fsync", lambda file: os.write(10**6, b""))
    with pytest.raises(UserError, match="cannot write .*x.png"):
        write_new(tmp_path / "x.png", b"")
    assert not list(tmp_path.iterdir())


def test_words_keep_their_joiners_in_a_printed_line():
    assert printable("می\u200cخواهم\n\x1b\u202e") == "می\u200cخواهم\\n\\x1b\\u202e"
