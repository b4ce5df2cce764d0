"""Requests to a server on this machine that does all that servers should not."""

import shutil
import socket
import ssl
import subprocess
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from local_server import serving

from groundwork.web import REDIRECTS, FetchError, Patience, Web, is_public

WEB = Web(connect=2, silence=5, whole=5, allowed=("127.0.0.1",))


@pytest.fixture
def server():
    with serving() as server:
        yield server


def body(address, web=WEB, **options):
    with web.get(address, **options) as reply:
        return b"".join(reply.chunks(most=200_000))


def fault(address, web=WEB, **options):
    with pytest.raises(FetchError) as error:
        body(address, web, **options)
    return error.value


def test_the_request_says_who_asks_and_what(server):
    server.answers["/a%20b/%C3%A9.jpg?q=%C3%BC&r=1"] = lambda handler: handler.give(b"x" * 200_000)
    address = server.address("/a b/é.jpg?q=ü&r=1#part")
    assert body(address, If_Range="z") == b"x" * 200_000
    [(_, headers)] = server.requests
    assert headers["User-Agent"].startswith("show-attend-and-tell/")
    assert headers["If-Range"] == "z" and headers["Accept-Encoding"] == "identity"


def test_escapes_of_an_address_are_left_as_they_are(server):
    server.answers["/a%2Fb%20c?d=%26"] = lambda handler: handler.give(b"x")
    assert body(server.address("/a%2Fb%20c?d=%26")) == b"x"


@pytest.mark.parametrize(
    ("status", "lasting"),
    [(404, True), (403, True), (410, True), (204, True), (304, True), (599, True)]
    + [(408, False), (429, False), (500, False), (503, False)],
)
def test_a_status_says_whether_another_try_is_worth_it(server, status, lasting):
    server.answers["/x"] = lambda handler: handler.give(status=status)
    error = fault(server.address("/x"))
    assert error.lasting == lasting and error.answered and error.wait is None
    assert str(error).startswith(f"the answer is {status}")


def test_a_server_may_ask_to_wait_in_seconds_or_until_a_date(server):
    later = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=50), usegmt=True)
    for text, least, most in [
        ("7", 7, 7),
        (later, 40, 50),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0, 0),
    ]:
        server.answers["/x"] = lambda handler, text=text: handler.give(status=429, Retry_After=text)
        assert least <= fault(server.address("/x")).wait <= most
    for text in ("soon", "-3", "1e9", "Thu, 99 Foo"):
        server.answers["/x"] = lambda handler, text=text: handler.give(status=429, Retry_After=text)
        assert fault(server.address("/x")).wait is None


def test_patience_doubles_its_pauses_obeys_and_ends():
    patience, passing = Patience(tries=4, pause=1, longest=10), FetchError("x")
    assert [patience.before_another(passing, n) for n in (1, 2, 3, 4)] == [1, 2, 4, None]
    assert patience.before_another(FetchError("x", wait=8), 1) == 8
    assert patience.before_another(FetchError("x", wait=0.5), 2) == 2
    assert patience.before_another(FetchError("x", wait=11), 1) is None
    assert patience.before_another(FetchError("x", lasting=True), 1) is None


# ------------------------------------------------------------------------------- time and length


@pytest.mark.parametrize("limits", [{"silence": 0.1}, {"silence": 5, "whole": 0.1}])
def test_a_server_that_stalls_is_left(server, limits):
    server.answers["/x"] = lambda handler: handler.stall(b"abc")
    before = time.monotonic()
    error = fault(server.address("/x"), Web(**limits, allowed=("127.0.0.1",)))
    assert str(error) == "it took too long" and not error.lasting
    assert time.monotonic() - before < 3


def test_one_that_sends_a_byte_now_and_then_has_a_deadline_even_before_the_body(server):
    def trickle(handler):
        for letter in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 10_000:
            handler.wfile.write(bytes([letter]))
            if server.closing.wait(0.01):
                return

    server.answers["/x"] = trickle
    before = time.monotonic()
    assert "too long" in str(fault(server.address("/x"), Web(whole=0.2, allowed=("127.0.0.1",))))
    assert time.monotonic() - before < 3


def test_a_body_that_ends_early_is_not_taken_for_whole(server):
    server.answers["/x"] = lambda handler: handler.give(b"x" * 100, only=60)
    error = fault(server.address("/x"))
    assert str(error) == "it broke off after 60 of 100 bytes" and not error.lasting


def test_no_more_is_read_than_was_announced(server):
    server.answers["/x"] = lambda handler: handler.give(b"x" * 100, length=60)
    assert body(server.address("/x")) == b"x" * 60


def test_no_more_is_read_than_is_wanted(server):
    server.answers["/x"] = lambda handler: handler.give(b"x" * 200_001)
    server.answers["/y"] = lambda handler: handler.wfile.write(
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 200_001
    )
    for path in ("/x", "/y"):
        error = fault(server.address(path))
        assert str(error) == "it has over 200,000 bytes" and error.lasting


@pytest.mark.parametrize(
    "answer",
    [b"", b"\x00\xff nonsense\r\n\r\n", b"HTTP/1.1 x OK\r\n\r\n", b"HTTP/9 200 OK\r\n\r\n"]
    + [b"HTTP/1.1 200 OK\r\nA: " + b"x" * 100_000, b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200],
)
def test_what_is_no_answer_is_a_fault(server, answer):
    server.answers["/x"] = lambda handler: handler.wfile.write(answer)
    assert not fault(server.address("/x")).lasting


def test_a_broken_chunk_is_a_fault(server):
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for chunks in (b"5\r\nab", b"zz\r\nab", b"5\r\nabcde\r\n"):
        server.answers["/x"] = lambda handler, sent=head + chunks: handler.wfile.write(sent)
        assert not fault(server.address("/x")).lasting
    server.answers["/x"] = lambda handler: handler.wfile.write(head + b"2\r\nab\r\n0\r\n\r\n")
    assert body(server.address("/x")) == b"ab"


# ------------------------------------------------------------------------- where it may lead


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # where clouds keep a machine's keys
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::a9fe:a9fe", False),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(address) == public


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "localhost", "[::ffff:127.0.0.1]"]
)
def test_without_leave_nothing_private_is_reached_however_it_is_written(server, host):
    error = fault(server.address("/x", host), Web(whole=5))
    assert error.lasting and "is not public" in str(error)
    assert server.requests == []


@pytest.mark.parametrize(
    "target",
    ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/", "data:,x"]
    + ["http://127.0.0.2/x", "http://169.254.169.254/latest/meta-data", "http://[::1]/"]
    + ["http://127.0.0.1:99999/", "http://127.0.0.1:x/", "http://[::1/", f"http://{'a' * 70}.b/"],
)
def test_a_redirect_to_elsewhere_is_refused(server, target):
    server.answers["/x"] = lambda handler: handler.give(status=302, Location=target)
    error = fault(server.address("/x"))
    assert error.lasting, error
    assert len(server.requests) == 1


def test_redirects_are_followed_but_not_for_ever(server):
    for n in range(REDIRECTS + 2):
        status = (301, 302, 303, 307, 308)[n % 5]
        server.answers[f"/{n}"] = lambda handler, n=n, status=status: handler.give(
            b"ignored", status, Location=f"/{n + 1}"
        )
    server.answers[f"/{REDIRECTS + 2}"] = lambda handler: handler.give(b"there")
    assert body(server.address("/2"), Range="bytes=0-") == b"there"
    assert all(headers["Range"] == "bytes=0-" for _, headers in server.requests)
    assert "more than 5 redirects" in str(fault(server.address("/0")))


def test_a_redirect_in_bytes_of_utf_8_is_escaped(server):
    server.answers["/x"] = lambda handler: handler.give(
        status=301, Location="/é".encode().decode("latin-1")
    )
    server.answers["/%C3%A9"] = lambda handler: handler.give(b"there")
    assert body(server.address("/x")) == b"there"


def known(monkeypatch, **names):
    """Names -> lists of what they are found to be, one after the other."""
    asked = []

    def look_up(host, port, **_):
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        asked.append(host)
        found = names[host].pop(0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (found, port)) for found in found]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


def test_a_name_is_what_is_checked_and_connected_to_however_often_it_changes(server, monkeypatch):
    asked = known(monkeypatch, rebinding=[["127.0.0.1"], ["127.0.0.2"]])
    server.answers["/x"] = lambda handler: handler.give(b"x")
    assert body(server.address("/x", "rebinding")) == b"x"
    assert asked == ["rebinding"]
    assert server.requests[0][1]["Host"] == f"rebinding:{server.port}"
    assert "rebinding is 127.0.0.2" in str(fault(server.address("/x", "rebinding")))


def test_a_name_with_one_private_address_is_refused(server, monkeypatch):
    known(monkeypatch, mixed=[["127.0.0.1", "10.0.0.1"]])
    assert "mixed is 10.0.0.1, which is not public" in str(fault(server.address("/x", "mixed")))
    assert server.requests == []


def test_of_several_addresses_one_that_works_is_taken(server, monkeypatch):
    known(monkeypatch, several=[["127.0.0.3", "127.0.0.1"]])
    server.answers["/x"] = lambda handler: handler.give(b"x")
    web = Web(connect=2, allowed=("127.0.0.1", "127.0.0.3"))  # the server is on the second alone
    assert body(server.address("/x", "several"), web) == b"x"


def test_who_does_not_answer_is_told_from_who_refuses(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    error = fault(f"http://127.0.0.1:{port}/x")
    assert "cannot be reached: Connection refused" in str(error)
    assert not error.answered and not error.lasting
    known(monkeypatch)
    error = fault("http://nowhere.example/x")
    assert "nowhere.example is not known" in str(error) and error.lasting and not error.answered


@pytest.mark.parametrize(
    "address", ["", "x", "/etc/passwd", "file:///etc/passwd", "http://", "http:///x", "http://a b/"]
)
def test_what_is_no_address_is_refused(address):
    assert fault(address).lasting


# ------------------------------------------------------------------------------------------ TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for the name `certified`, which vouches for itself, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    options = "-x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=certified -keyout both.pem -out crt"
    options += " -addext subjectAltName=DNS:certified"
    command = ["openssl", "req", *options.split()]
    subprocess.run(command, cwd=path.parent, check=True, capture_output=True)
    path.write_text(path.read_text() + (path.parent / "crt").read_text())
    return path


def test_over_tls_the_certificate_is_that_of_the_name(certificate, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    trusting = ssl.create_default_context(cafile=certificate)
    web = Web(silence=0.3, whole=5, allowed=("127.0.0.1",), context=trusting)
    with serving(context) as server:
        server.answers["/x"] = lambda handler: handler.give(b"x" * 100_000)
        server.answers["/stalls"] = lambda handler: handler.stall(b"abc")
        address = server.address("/x", "certified").replace("http:", "https:")
        known(monkeypatch, certified=[["127.0.0.1"]] * 3, other=[["127.0.0.1"]])
        assert body(address, web) == b"x" * 100_000
        assert "too long" in str(fault(address.replace("/x", "/stalls"), web))
        error = fault(address.replace("certified", "other"), web)
        assert error.lasting and "certificate is not accepted: Hostname mismatch" in str(error)
        assert "certificate is not accepted" in str(fault(address, WEB))
