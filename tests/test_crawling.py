"""Images of many addresses, from a server on this machine that has everything but images, too."""

import io
import os
import resource
import signal
import socket
import threading

import pytest
from local_server import serving
from PIL import Image

from groundwork import images
from groundwork.crawling import Crawl
from groundwork.errors import UserError
from groundwork.web import Patience, Web

WEB = Web(connect=2, silence=0.3, whole=5, allowed=("127.0.0.1",))
PATIENCE = Patience(tries=3, pause=0.001, longest=0.05)


def picture(kind="JPEG", size=(40, 30)):
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(file, kind)
    return file.getvalue()


JPEG, PNG = picture(), picture("PNG")


def name_of(address):
    return f"a/{address.rpartition('/')[2]}.jpg"


class Crawling:
    """A server, and a crawl of some of its paths to a folder."""

    def __init__(self, server, folder):
        self.server, self.folder, self.options = server, folder, {}

    def serve(self, path, *answers):
        """The n-th request is answered by the n-th function, or with these bytes as an image,
        those after the last by the last."""
        answers = list(answers)

        def answer(handler):
            next_ = answers.pop(0) if len(answers) > 1 else answers[0]
            if isinstance(next_, bytes):
                handler.give(next_, Content_Type="image/jpeg")
            else:
                next_(handler)

        self.server.answers[path] = answer

    def run(self, *paths, retry_failed=False, **options):
        options = {"web": WEB, "patience": PATIENCE, "connections": 4} | options
        self.crawl = Crawl(self.folder, name_of, **options)
        addresses = [p if ":" in p else self.server.address(p) for p in paths]
        return dict(self.crawl.run(addresses, len(addresses), retry_failed))

    def images(self):
        return {path.stem: path.read_bytes() for path in self.folder.glob("a/*.jpg")}

    def failed(self):
        lines = (self.folder / "failed.tsv").read_text().splitlines()
        pairs = (line.split("\t") for line in lines)
        return {address.rpartition("/")[2]: reason for address, reason in pairs}

    def files(self):
        """Those that are neither images nor the list."""
        files = {str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file()}
        return files - {f"a/{name}.jpg" for name in self.images()} - {"failed.tsv"}


@pytest.fixture
def crawling(tmp_path):
    with serving() as server:
        yield Crawling(server, tmp_path / "images")


def test_images_are_fetched_once_and_as_they_are(crawling):
    crawling.serve("/0", JPEG)
    crawling.serve("/1", lambda handler: handler.give(PNG, Content_Type="image/png"))
    crawling.serve("/2", lambda h: h.give(JPEG, Content_Type="application/octet-stream"))
    assert crawling.run("/0", "/1", "/2", "/0") == {"fetched": 3, "there": 1}
    assert crawling.images() == {"0": JPEG, "1": PNG, "2": JPEG}
    assert crawling.run("/0", "/1", "/2") == {"there": 3}
    assert len(crawling.server.requests) == 3
    assert crawling.failed() == {} and crawling.files() == set()
    for _, headers in crawling.server.requests:
        assert headers["User-Agent"].startswith("show-attend-and-tell/")


def test_an_address_that_comes_twice_at_once_has_what_becomes_of_it(crawling):
    """The second comes while the first is on its way, which the server's answer waits for."""
    second = threading.Event()
    crawling.serve("/0", lambda handler: (second.wait(10), handler.give(status=404)))
    crawling.serve("/1", lambda handler: (second.wait(10), handler.give(JPEG)))

    def addresses():
        yield from map(crawling.server.address, ("/0", "/1", "/0", "/1"))
        second.set()

    crawl = Crawl(crawling.folder, name_of, web=WEB, patience=PATIENCE, connections=4)
    counts = crawl.run(addresses(), 4)
    assert counts == {"fetched": 1, "there": 1, "failed": 1, "failed before": 1}
    assert len(crawling.server.requests) == 2 and crawling.failed().keys() == {"0"}


BAD = {
    "missing": (lambda h: h.give(status=404), "the answer is 404 Not Found"),
    "page": (lambda h: h.give(b"<html>", Content_Type="text/html"), "it is text/html and no image"),
    "page_that_lies": (lambda h: h.give(b"<html></html>", Content_Type="image/jpeg"), "no image"),
    "nothing": (lambda h: h.give(b"", Content_Type="image/jpeg"), "no image that can be read"),
    "half": (lambda h: h.give(JPEG[:500], Content_Type="image/jpeg"), "no image that can be read"),
    "pixel": (lambda h: h.give(picture(size=(1, 1)), Content_Type="image/jpeg"), "a single pixel"),
    "vector": (lambda h: h.give(b"<svg/>", Content_Type="image/svg+xml"), "no image"),
    "large": (lambda h: h.give(bytes(6000), Content_Type="image/jpeg"), "over 5,000 bytes"),
    "claims": (lambda h: h.give(JPEG, length=6000, Content_Type="image/jpeg"), "over 5,000 bytes"),
    "file": (lambda h: h.give(status=302, Location="file:///etc/hosts"), "no address of http"),
    "private": (lambda h: h.give(status=302, Location="http://127.0.0.2/"), "is not public"),
}


def test_what_is_no_image_is_left_out_and_not_tried_again(crawling):
    for name, (answer, _) in BAD.items():
        crawling.serve(f"/{name}", answer)
    crawling.serve("/good", JPEG)
    paths = ["/good", *(f"/{name}" for name in BAD), "file:///etc/passwd", "nonsense:x"]
    counts = crawling.run(*paths, largest=5000)
    assert counts == {"fetched": 1, "failed": len(BAD) + 2}
    failed = crawling.failed()
    for name, (_, reason) in BAD.items():
        assert reason in failed[name]
        assert str(crawling.folder) not in failed[name]
    assert "no address of http" in failed["passwd"]
    assert crawling.images() == {"good": JPEG} and crawling.files() == set()
    asked = len(crawling.server.requests)
    assert crawling.run(*paths) == {"there": 1, "failed before": len(BAD) + 2}
    assert len(crawling.server.requests) == asked == len(BAD) + 1  # none of them was tried twice


def test_one_without_a_length_ends_at_the_bound(crawling):
    def endless(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n" + JPEG)
        while not crawling.server.closing.is_set():
            handler.wfile.write(bytes(1000))

    crawling.serve("/x", endless)
    assert crawling.run("/x") == {"failed": 1}
    assert crawling.failed() == {"x": "it has over 20,000,000 bytes"}


def test_a_bomb_of_pixels_is_no_image(crawling, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    crawling.serve("/x", JPEG)
    assert crawling.run("/x") == {"failed": 1}
    assert "40×30 pixels are more than 1,000" in crawling.failed()["x"]


def test_what_may_pass_is_tried_again_with_pauses(crawling):
    crawling.serve("/0", lambda h: h.give(status=500), lambda h: h.give(status=503), JPEG)
    crawling.serve("/1", lambda h: h.give(JPEG, only=100, Content_Type="image/jpeg"), JPEG)
    crawling.serve("/2", lambda h: h.stall(JPEG[:100], len(JPEG)), JPEG)
    crawling.serve("/3", lambda h: None, JPEG)
    crawling.serve("/4", lambda h: h.give(status=500))
    assert crawling.run(*(f"/{n}" for n in range(5))) == {"fetched": 4, "failed": 1}
    asked = [len(crawling.server.asked(f"/{n}")) for n in range(5)]
    assert asked == [3, 2, 2, 2, 3]
    assert crawling.failed() == {"4": "the answer is 500 Internal Server Error"}


def test_those_that_failed_are_tried_again_when_asked(crawling):
    crawling.serve("/x", lambda h: h.give(status=404), JPEG)
    assert crawling.run("/x", "/y") == {"failed": 2}
    assert crawling.run("/x", "/y", retry_failed=True) == {"fetched": 1, "failed": 1}
    assert list(crawling.failed()) == ["y"]


def test_a_list_that_was_cut_short_is_gone_on_with(crawling):
    crawling.run("/x", "/y")
    path = crawling.folder / "failed.tsv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert crawling.run("/x", "/y") == {"failed before": 1, "failed": 1}
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_server_that_asks_to_wait_is_left_alone_for_all_its_images(crawling):
    crawling.serve("/0", lambda h: h.give(status=429, Retry_After="3600"))
    paths = [f"/{n}" for n in range(20)]
    assert crawling.run(*paths, connections=1) == {"failed": 20}
    assert len(crawling.server.requests) == 1
    assert "the answer is 429" in crawling.failed()["0"]
    assert f"127.0.0.1:{crawling.server.port} asks to wait 3600 s" in crawling.failed()["19"]


def test_a_short_wait_is_waited(crawling):
    crawling.serve("/x", lambda h: h.give(status=429, Retry_After="0"), JPEG)
    assert crawling.run("/x") == {"fetched": 1}


def test_only_so_many_are_asked_at_once(crawling):
    now, most, lock, full = 0, 0, threading.Lock(), threading.Event()

    def answer(handler):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if now == 3:
                full.set()
        full.wait(5)
        with lock:
            now -= 1
        handler.give(JPEG, Content_Type="image/jpeg")

    paths = [f"/{n}" for n in range(12)]
    for path in paths:
        crawling.serve(path, answer)
    assert crawling.run(*paths, connections=3) == {"fetched": 12}
    assert most == 3


def test_addresses_are_read_no_further_than_they_are_needed(crawling):
    crawling.serve("/x", JPEG)
    taken = 0

    def addresses():
        nonlocal taken
        for n in range(100):
            taken += 1
            assert taken - len(crawling.server.requests) <= 8
            yield crawling.server.address(f"/{n}")

    crawl = Crawl(crawling.folder, name_of, web=WEB, patience=PATIENCE, connections=2)
    assert dict(crawl.run(addresses())) == {"failed": 100}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_the_next_call_goes_on(crawling, number):
    def interrupt(handler):
        os.kill(os.getpid(), number)
        handler.stall(JPEG[:100], len(JPEG))

    paths = [f"/{n}" for n in range(50)]
    for path in paths:
        crawling.serve(path, JPEG)
    crawling.serve("/5", interrupt, JPEG)
    counts = crawling.run(*paths, connections=2)
    assert crawling.crawl.signal == number
    assert counts.keys() == {"fetched"} and 3 <= counts["fetched"] < 20
    assert crawling.failed() == {} and crawling.files() == set()
    assert set(crawling.images().values()) == {JPEG}
    assert len(crawling.images()) == counts["fetched"]
    rest = crawling.run(*paths)
    assert crawling.crawl.signal is None
    assert rest == {"there": counts["fetched"], "fetched": 50 - counts["fetched"]}


def test_what_failed_just_before_a_signal_is_not_listed(crawling):
    """As this side may have been cut off, before its user stopped it."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # and listens not

        def addresses():
            for n in range(9):
                yield f"http://127.0.0.1:{deaf.getsockname()[1]}/{n}"
            os.kill(os.getpid(), signal.SIGINT)

        crawl = Crawl(crawling.folder, name_of, web=WEB, patience=PATIENCE, connections=1)
        counts = crawl.run(addresses(), 9)
    assert 5 <= counts["failed"] <= 9 and crawl.signal == signal.SIGINT
    assert crawling.failed() == {}


def test_where_nobody_can_be_reached_it_ends_and_lists_nobody(crawling):
    crawling.serve("/good", JPEG)
    crawling.run("/good")
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # and listens not
        away = [f"http://127.0.0.1:{deaf.getsockname()[1]}/{n}" for n in range(30)]
        with pytest.raises(UserError, match="the last 10 addresses could not be reached"):
            crawling.run("/good", *away, connections=2, unreachable=10)
        assert crawling.images() == {"good": JPEG} and crawling.failed() == {}
        assert crawling.run(*away[:9], unreachable=10) == {"failed": 9}
        assert len(crawling.failed()) == 9


def test_what_a_killed_process_has_left_is_removed(crawling):
    below = crawling.folder / "a"
    below.mkdir(parents=True)
    (below / f"0.jpg.{os.uname().nodename}.{2**22 + 1}.tmp").write_bytes(b"half")
    crawling.serve("/0", JPEG)
    assert crawling.run("/0") == {"fetched": 1}
    assert crawling.files() == set()


def test_an_image_that_cannot_be_written_is_no_failure_of_its_address(crawling):
    crawling.serve("/0", JPEG)
    crawling.folder.mkdir()
    (crawling.folder / "a").write_text("a file where a folder belongs")
    with pytest.raises(UserError, match=r"cannot write .*0\.jpg"):
        crawling.run("/0")
    assert crawling.failed() == {}


def test_a_full_disk_ends_it_and_is_no_failure_of_an_address(crawling):
    crawling.serve("/0", JPEG)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*0\.jpg: File too large"):
            crawling.run("/0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert crawling.files() == set() and crawling.failed() == {}
    assert crawling.run("/0") == {"fetched": 1}
