"""Large files from a server on this machine that breaks off, changes its mind and lies."""

import hashlib
import json
import os
import resource
import signal

import pytest
from local_server import serving

from groundwork.errors import UserError
from groundwork.transfers import Published, fetch_file
from groundwork.web import Patience, Web

WEB = Web(connect=2, silence=0.3, whole=10, allowed=("127.0.0.1",))
PATIENCE = Patience(tries=3, pause=0.001, longest=0.01)
DATA = bytes(range(256)) * 1000


@pytest.fixture
def server():
    with serving() as server:
        yield server


class Fetching:
    """A file that was published with the contents DATA, and is fetched to a folder."""

    def __init__(self, server, folder):
        digest = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
        self.server, self.folder = server, folder
        self.published = Published(server.address("/set.zip"), len(DATA), digest)
        self.path = folder / self.published.name

    def answer(self, *answers):
        """The n-th request is answered by the n-th function, those after the last by the last."""
        answers = list(answers)
        self.server.answers["/set.zip"] = lambda handler: (
            answers.pop(0) if len(answers) > 1 else answers[0]
        )(handler)

    def fetch(self):
        fetch_file(self.published, self.path, WEB, PATIENCE)
        assert self.path.read_bytes() == DATA
        assert self.files() == ["set.zip"]

    def fault(self):
        with pytest.raises(UserError) as error:
            fetch_file(self.published, self.path, WEB, PATIENCE)
        assert self.published.address in str(error.value)
        assert not self.path.exists()
        return str(error.value)

    def files(self):
        return sorted(path.name for path in self.folder.iterdir())

    def ranges(self):
        return [headers["Range"] for headers in self.server.asked("/set.zip")]


@pytest.fixture
def fetching(server, tmp_path):
    return Fetching(server, tmp_path)


def whole(handler, **options):
    handler.give_part(DATA, '"1"', **options)


def broken(handler, **options):
    handler.give_part(DATA, '"1"', only=100_000, **options)


def test_what_is_there_is_not_fetched_again(fetching):
    fetching.answer(whole)
    fetching.fetch()
    fetching.fetch()
    assert fetching.ranges() == [None]


def test_it_goes_on_where_it_broke_off(fetching, capsys):
    fetching.answer(broken, broken, whole)
    fetching.fetch()
    assert fetching.ranges() == [None, "bytes=100000-", "bytes=200000-"]
    assert fetching.server.asked("/set.zip")[1]["If-Range"] == '"1"'
    assert "set.zip: it broke off after 100,000 of 256,000 bytes" in capsys.readouterr().err


def test_a_later_call_goes_on_too(fetching):
    fetching.answer(broken, lambda handler: handler.give(status=503))
    said = fetching.fault()
    assert "the answer is 503 Service Unavailable (100 kB are kept)" in said
    assert fetching.files() == ["set.zip.part", "set.zip.part.json"]
    fetching.answer(whole)
    fetching.fetch()
    assert fetching.ranges()[-1] == "bytes=100000-"


def test_after_ctrl_c_the_next_call_goes_on(fetching):
    # which a shell has a process ignore that it starts in the background
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(handler):
        handler.give(DATA[:50_000], length=len(DATA), ETag='"1"')
        handler.wfile.flush()
        while not (fetching.folder / "set.zip.part.json").exists():
            fetching.server.closing.wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        fetching.server.closing.wait(0.1)

    fetching.answer(interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            fetch_file(fetching.published, fetching.path, WEB, PATIENCE)
    finally:
        signal.signal(signal.SIGINT, before)
    kept = (fetching.folder / "set.zip.part").stat().st_size
    fetching.answer(whole)
    fetching.fetch()
    assert fetching.ranges()[-1] == (f"bytes={kept}-" if kept else None)


def test_on_a_full_disk_what_has_come_stays(fetching):
    """The largest file that a process may write stands for the room that is left."""
    fetching.answer(whole)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*set\.zip\.part: File too large"):
            fetch_file(fetching.published, fetching.path, WEB, PATIENCE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    fetching.fetch()
    assert fetching.ranges() == [None, "bytes=100000-"]


def test_every_try_that_brings_something_makes_the_next_a_first(fetching):
    few = [lambda handler: handler.give_part(DATA, '"1"', only=20_000)] * 12
    fetching.answer(*few, whole)
    fetching.fetch()
    assert len(fetching.ranges()) == 13


def test_a_server_that_stalls_is_asked_again_for_the_rest(fetching):
    fetching.answer(
        lambda handler: (
            handler.give(DATA[:50_000], length=len(DATA), ETag='"1"')
            or handler.wfile.flush()
            or fetching.server.closing.wait(10)
        ),
        whole,
    )
    fetching.fetch()
    assert fetching.ranges() == [None, "bytes=50000-"]


def test_one_that_knows_no_ranges_begins_anew(fetching):
    fetching.answer(lambda handler: broken(handler, ranges=False), lambda h: whole(h, ranges=False))
    fetching.fetch()
    assert fetching.ranges() == [None, "bytes=100000-"]


def test_one_that_always_breaks_off_and_knows_no_ranges_is_given_up(fetching):
    fetching.answer(lambda handler: broken(handler, ranges=False))
    assert "broke off" in fetching.fault()
    assert len(fetching.ranges()) == 3  # no try has brought more than the first


def test_a_file_that_changes_between_two_tries_is_begun_anew(fetching):
    old = bytes(len(DATA))
    fetching.answer(lambda handler: handler.give_part(old, '"0"', only=100_000), whole)
    fetching.fetch()
    assert fetching.server.asked("/set.zip")[1]["If-Range"] == '"0"'


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"2"', "Content_Range": "bytes 100000-255999/256000"},
        {"ETag": '"1"', "Content_Range": "bytes 0-255999/256000"},
        {"ETag": '"1"', "Content_Range": "lines 100000-255999/256000"},
        {"ETag": '"1"'},
    ],
)
def test_a_part_that_does_not_fit_what_is_there_is_thrown_away(fetching, headers):
    fetching.answer(
        broken, lambda handler: handler.give(DATA[100_000:], status=206, **headers), whole
    )
    fetching.fetch()
    assert fetching.ranges() == [None, "bytes=100000-", None]


def test_a_range_that_cannot_be_is_no_dead_end(fetching):
    fetching.answer(broken, lambda handler: handler.give(status=416), whole)
    fetching.fetch()


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"1"'}])
def test_without_a_strong_etag_the_date_says_which_file_it_is(fetching, headers):
    headers = headers | {"Last_Modified": "Wed, 01 Jan 2020 00:00:00 GMT"}
    span = {"Content_Range": "bytes 100000-255999/256000"}
    fetching.answer(
        lambda handler: handler.give(DATA, only=100_000, **headers),
        lambda handler: handler.give(DATA[100_000:], 206, **headers, **span),
    )
    fetching.fetch()
    assert fetching.server.asked("/set.zip")[1]["If-Range"] == headers["Last_Modified"]


def test_without_either_it_begins_anew(fetching):
    fetching.answer(
        lambda handler: handler.give(DATA, only=100_000), lambda handler: handler.give(DATA)
    )
    fetching.fetch()
    assert fetching.ranges() == [None, None]


@pytest.mark.parametrize("note", [b"", b"[", b"{}", b"3", b'{"validator": 3}', None])
def test_a_part_without_a_note_of_what_it_is_of_is_begun_anew(fetching, note):
    (fetching.folder / "set.zip.part").write_bytes(b"x" * 100)
    if note is not None:
        (fetching.folder / "set.zip.part.json").write_bytes(note)
    fetching.answer(whole)
    fetching.fetch()
    assert fetching.ranges() == [None]


def test_a_part_that_is_all_is_only_checked(fetching):
    (fetching.folder / "set.zip.part").write_bytes(DATA)
    fetching.fetch()
    assert fetching.server.requests == []


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda handler: handler.give(status=404), "the answer is 404 Not Found"),
        (lambda handler: handler.give(b"<html>", Content_Type="text/html"), "a page stands"),
        (lambda handler: handler.give(DATA[1:]), "255,999 bytes there, and 256,000 were published"),
        (lambda handler: handler.give(DATA + b"x"), "256,001 bytes there"),
        (lambda handler: handler.give(status=302, Location="file:///etc/passwd"), "no address of"),
        (lambda handler: handler.give(status=302, Location="http://10.0.0.1/"), "not public"),
    ],
)
def test_what_no_other_try_would_mend_is_said_at_once(fetching, answer, said):
    fetching.answer(broken, answer)  # what has come by then stays
    message = fetching.fault()
    assert said in message and str(fetching.path) in message
    assert len(fetching.ranges()) == 2
    assert (fetching.folder / "set.zip.part").stat().st_size == 100_000


def test_a_server_that_asks_to_wait_for_long_is_not_waited_for(fetching):
    fetching.answer(lambda handler: handler.give(status=429, Retry_After="3600"))
    assert "429 Too Many Requests" in fetching.fault()
    assert len(fetching.ranges()) == 1


def test_more_than_was_published_is_not_written(fetching):
    def endless(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + DATA)
        while not fetching.server.closing.is_set():
            handler.wfile.write(DATA)

    fetching.answer(endless)
    assert "it has over 256,000 bytes" in fetching.fault()
    assert (fetching.folder / "set.zip.part").stat().st_size <= len(DATA)


def test_another_file_of_the_same_size_is_thrown_away(fetching):
    fetching.answer(lambda handler: handler.give(bytes(len(DATA))))
    assert "is not what was published, with the sha256 " in fetching.fault()
    assert fetching.files() == []
    fetching.answer(whole)
    fetching.fetch()


@pytest.mark.parametrize("data", [b"", bytes(len(DATA)), DATA + b"x"])
def test_a_file_that_somebody_has_put_there_is_checked_and_stays(fetching, data):
    fetching.path.write_bytes(data)
    with pytest.raises(UserError, match="is not what was published at .*: move it away"):
        fetch_file(fetching.published, fetching.path, WEB, PATIENCE)
    assert fetching.path.read_bytes() == data and fetching.server.requests == []


def test_digests_are_of_the_kind_that_is_published(fetching):
    digest = f"md5:{hashlib.md5(DATA, usedforsecurity=False).hexdigest()}"
    fetching.published = Published(fetching.published.address, len(DATA), digest)
    fetching.answer(whole)
    fetching.fetch()


def test_the_note_is_plain(fetching):
    fetching.answer(broken, lambda handler: handler.give(status=404))
    fetching.fault()
    assert json.loads((fetching.folder / "set.zip.part.json").read_text()) == {"validator": '"1"'}
