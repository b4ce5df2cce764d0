"""Archives that are what they should be, and those that somebody has made to do harm."""

import shutil
import stat
import zipfile

import pytest

from groundwork import unpacking
from groundwork.errors import UserError
from groundwork.unpacking import unpack


def make(path, members, **options):
    """A zip archive of members: name -> bytes, or pairs of ZipInfo and bytes."""
    pairs = members.items() if isinstance(members, dict) else members
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, data in pairs:
            archive.writestr(name, data)
    return path


def fault(archive, folder, wanted=("images",), **options):
    """The line that refuses the archive, after which nothing is there but it."""
    with pytest.raises(UserError) as error:
        unpack(archive, folder, wanted, **options)
    assert str(archive) in str(error.value) and "\n" not in str(error.value)
    assert list(folder.iterdir()) == []
    return str(error.value)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "goal"


GOOD = {"images/": b"", "images/a.jpg": b"a" * 1000, "images/b/c.jpg": b"c", "list.json": b"{}"}


def test_what_is_wanted_is_unpacked(tmp_path, folder):
    archive = make(tmp_path / "x.zip", GOOD | {"__MACOSX/x": b"x", "other/y": b"y"})
    unpack(archive, folder, ["images", "list.json"])
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {name: data for name, data in GOOD.items() if not name.endswith("/")}
    assert archive.exists() and sorted(p.name for p in folder.iterdir()) == ["images", "list.json"]


def test_what_a_killed_process_has_left_is_no_hindrance(tmp_path, folder):
    (folder / ".x.zip.unpacking" / "images").mkdir(parents=True)
    unpack(make(tmp_path / "x.zip", GOOD), folder, ["images"])
    assert [path.name for path in folder.iterdir()] == ["images"]


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "images/../../x",
        "/x",
        "//x",
        "images/..\\x",
        "..\\x",
        "C:/x",
        "images/..",
        "..",
        ".",
    ],
)
def test_a_path_that_leads_out_is_refused(tmp_path, folder, name):
    archive = make(tmp_path / "x.zip", GOOD | {name: b"x"})
    assert "leads out of the folder" in fault(archive, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["goal", "x.zip"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_a_link_or_device_is_refused(tmp_path, folder, kind):
    member = zipfile.ZipInfo("images/link")
    member.external_attr = (kind | 0o777) << 16
    archive = make(tmp_path / "x.zip", [*GOOD.items(), (member, "/etc")])
    assert "'images/link' is a link or a device" in fault(archive, folder)


def test_too_much_for_its_size_is_refused_before_anything_is_written(tmp_path, folder):
    archive = make(tmp_path / "x.zip", GOOD | {"images/zeros": bytes(10**6)})
    assert "its files would take 20 times as much room as itself" in fault(archive, folder)
    unpack(archive, folder, ["images"], ratio=2000)


def test_members_that_share_their_bytes_are_counted_each(tmp_path, folder):
    """A bomb without a high ratio in any member: all are the same bytes of the archive."""
    archive = make(tmp_path / "x.zip", {"images/0": b"0123456789" * 100})
    with zipfile.ZipFile(archive, "a") as opened:
        [member] = opened.infolist()
        for n in range(1, 2000):
            other = zipfile.ZipInfo(f"images/{n}")
            for name in ("CRC", "compress_size", "file_size", "compress_type", "header_offset"):
                setattr(other, name, getattr(member, name))
            opened.filelist.append(other)
        opened._didModify = True
    assert "its files would take 6 times as much room as itself" in fault(archive, folder, ratio=6)


def test_too_many_members_are_refused(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(unpacking, "MEMBERS", 3)
    assert "more than 3 files" in fault(make(tmp_path / "x.zip", GOOD), folder)


def test_a_member_that_holds_more_than_it_says_is_damaged(tmp_path, folder):
    archive = make(tmp_path / "x.zip", {"images/a": b"a" * 5000})
    data = archive.read_bytes().replace((5000).to_bytes(4, "little"), (50).to_bytes(4, "little"))
    archive.write_bytes(data)
    assert "is damaged, fetch it again" in fault(archive, folder)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_one_name_twice_is_refused(tmp_path, folder):
    archive = make(tmp_path / "x.zip", [("images/a", b"1"), ("images/./a", b"2")])
    assert "it holds 'images/a' twice" in fault(archive, folder)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path, folder):
    archive = make(tmp_path / "x.zip", [("images/a", b"1"), ("images/a/b", b"2")])
    with pytest.raises(UserError, match="cannot write .*goal: Not a directory|File exists"):
        unpack(archive, folder, ["images"])
    assert list(folder.iterdir()) == []


def test_a_name_that_no_disk_takes_is_one_line(tmp_path, folder):
    archive = make(tmp_path / "x.zip", {"images/" + "x" * 300: b"1"})
    with pytest.raises(UserError, match="cannot write .*goal: File name too long"):
        unpack(archive, folder, ["images"])


def test_an_encrypted_archive_is_refused(tmp_path, folder):
    archive = make(tmp_path / "x.zip", {"images/a": b"a"})
    data = bytearray(archive.read_bytes())
    data[6] |= 1  # of the member's own header
    data[data.index(b"PK\1\2") + 8] |= 1  # of the archive's list
    archive.write_bytes(data)
    assert "is encrypted" in fault(archive, folder)


@pytest.mark.parametrize("kind", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 99])
def test_other_ways_to_pack_are_refused(tmp_path, folder, kind):
    archive = make(tmp_path / "x.zip", {"images/a": b"a"})
    data = bytearray(archive.read_bytes())
    data[8] = data[data.index(b"PK\1\2") + 10] = kind
    archive.write_bytes(data)
    assert "'images/a' is packed in a way that no data set needs" in fault(archive, folder)


def test_what_zipfile_does_not_know_is_one_line(tmp_path, folder):
    archive = make(tmp_path / "x.zip", {"images/a": b"a"})
    data = bytearray(archive.read_bytes())
    data[data.index(b"PK\1\2") + 6] = 200  # the version that is needed
    archive.write_bytes(data)
    assert "cannot unpack" in fault(archive, folder)


@pytest.mark.parametrize("cut", [0, 1, 30, 400])
def test_a_truncated_archive_is_damaged(tmp_path, folder, cut):
    archive = make(tmp_path / "x.zip", GOOD)
    archive.write_bytes(archive.read_bytes()[:cut])
    assert "is damaged, fetch it again" in fault(archive, folder)


def test_a_changed_byte_is_found(tmp_path, folder):
    archive = make(tmp_path / "x.zip", {"images/a": bytes(range(256))})
    data = bytearray(archive.read_bytes())
    data[60] ^= 255
    archive.write_bytes(data)
    assert "is damaged, fetch it again" in fault(archive, folder)


def test_another_archive_is_told(tmp_path, folder):
    archive = make(tmp_path / "x.zip", GOOD)
    said = fault(archive, folder, ["images", "train2014"])
    assert "holds no train2014: it is another archive" in said


def test_without_room_nothing_is_unpacked(tmp_path, folder, monkeypatch):
    archive = make(tmp_path / "x.zip", GOOD)
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    said = r"what x.zip holds take 1 kB and .*goal has 1 kB free: make room"
    with pytest.raises(UserError, match=said):
        unpack(archive, folder, ["images"])
    assert list(folder.iterdir()) == []
