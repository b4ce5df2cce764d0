"""Files from the web: from public addresses alone, and every step within a time limit."""

import http
import math
import socket
import ssl
import string
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection, InvalidURL
from ipaddress import ip_address, ip_network
from urllib.parse import quote, urljoin, urlsplit

from groundwork import __version__

AGENT = f"show-attend-and-tell/{__version__} (data for research on image captions)"

REDIRECTS = 5  # that are followed, at most

PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that another try may not meet

NAT64 = ip_network("64:ff9b::/96")  # IPv6 addresses that stand for IPv4 ones


class FetchError(Exception):
    """Why something could not be had from an address.

    Attributes:
        lasting: whether another try would meet the same.
        answered: whether a server was reached.
        wait: seconds that the server asks to wait before another try, None where it does not say.
    """

    def __init__(self, reason, lasting=False, answered=True, wait=None):
        super().__init__(reason)
        self.lasting, self.answered, self.wait = lasting, answered, wait


@dataclass(frozen=True)
class Patience:
    """How often something is tried, and with what pauses."""

    tries: int = 4
    pause: float = 1.0  # seconds before the second try, doubled before each further one
    longest: float = 120.0  # seconds that are waited, at most

    def before_another(self, error, tried):
        """Seconds to wait after `tried` tries, the last of which met the FetchError; None where
        there is to be no other."""
        if error.lasting or tried >= self.tries:
            return None
        wait = max(self.pause * 2 ** (tried - 1), error.wait or 0)
        return wait if wait <= self.longest else None


@dataclass(frozen=True)
class Web:
    """What files are fetched with, over HTTP and HTTPS.

    A name's addresses are looked up once for a connection, all of them must be public, and the
    connection is to one of those, so that no other answer can come between. That holds for what is
    redirected to as well. Proxies are not used: they look names up themselves.
    """

    connect: float = 10.0  # seconds to be connected
    silence: float = 30.0  # seconds that a server may say nothing
    whole: float = math.inf  # seconds for everything, redirects and the body included
    allowed: tuple = ()  # addresses of networks that are no public ones and yet are taken, as text
    context: ssl.SSLContext = field(default_factory=ssl.create_default_context, repr=False)

    @contextmanager
    def get(self, address, accept=(200,), **headers):
        """Yields the `Reply` to a request of the address, with its status one of `accept`.

        Args:
            headers: further ones, by names with underscores, as `If_Range`.

        Raises:
            FetchError: any other status, and whatever keeps a reply from coming.
        """
        deadline = time.monotonic() + self.whole
        for _ in range(REDIRECTS + 1):
            with _faults():
                connection, path = self._connected(address, deadline)
            with closing(connection):
                with _faults():
                    connection.request("GET", path, headers=_headers(headers))
                    response = connection.getresponse()
                with closing(response):
                    target = response.headers.get("Location")
                    if response.status not in (301, 302, 303, 307, 308) or target is None:
                        _check_status(response, accept)
                        yield Reply(response)
                        return
            with _faults():  # the header is bytes, which http.client gives as letters of Latin-1
                target = quote(target, safe=string.punctuation, encoding="latin-1")
                address = urljoin(address, target)
        raise FetchError(f"more than {REDIRECTS} redirects", lasting=True)

    def _connected(self, address, deadline):
        """A connection for an address, and what to ask for over it."""
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise FetchError(f"{address[:80]} is no address of http or https", lasting=True)
        kind = {"http": HTTPConnection, "https": HTTPSConnection}[parts.scheme]
        connection = kind(parts.hostname, parts.port)
        connection.auto_open = 0  # it is never to find its own way
        connection.sock = self._dial(connection.host, connection.port, deadline)
        if parts.scheme == "https":
            connection.sock = self._encrypted(connection.sock, connection.host)
        # what is not to stand in a request as it is, blanks and letters with accents, is escaped
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
        query = quote(parts.query, safe="/%:@!$&'()*+,;=~?")
        return connection, f"{path}?{query}" if query else path

    def _dial(self, host, port, deadline):
        """A socket that is connected to a public address of the host."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            lasting, reason = error.errno != socket.EAI_AGAIN, f"{host} is not known"
            raise FetchError(f"{reason}: {error.strerror}", lasting, answered=False) from error
        for *_, place in found:
            if not is_public(place[0]) and place[0] not in self.allowed:
                raise FetchError(f"{host} is {place[0]}, which is not public", lasting=True)
        for family, kind, protocol, _, place in found:
            connection = _Socket(family, kind, protocol)
            connection.deadline, connection.silence = deadline, self.silence
            try:
                connection.settimeout(_left(deadline, self.connect))
                connection.connect(place)
                return connection
            except OSError as error:
                connection.close()
                fault = error
        raise FetchError(f"{host} cannot be reached: {_said(fault)}", answered=False) from fault

    def _encrypted(self, connection, host):
        """The connection with TLS, the certificate being the host's."""
        self.context.sslsocket_class = _SSLSocket
        deadline = connection.deadline
        connection.settimeout(_left(deadline, self.silence))
        encrypted = self.context.wrap_socket(connection, server_hostname=host)
        encrypted.deadline, encrypted.silence = deadline, self.silence
        return encrypted


class Reply:
    """What a server has answered: `status`, `headers`, and the body, in `chunks`."""

    def __init__(self, response):
        self.status, self.headers, self._response = response.status, response.headers, response
        self.length = response.length  # bytes of the body; None where the server does not say

    def chunks(self, most, size=2**16):
        """Yields the body piece by piece, as it comes, bytes.

        Raises:
            FetchError: it ends before the length that the server has named, or has over `most`
                bytes, of which then no more are read.
        """
        count = 0
        while self.length is None or count < self.length:
            if max(count, self.length or 0) > most:
                raise FetchError(f"it has over {most:,} bytes", lasting=True)
            with _faults():
                left = size if self.length is None else min(size, self.length - count)
                chunk = self._response.read1(left)
            if not chunk:
                break
            count += len(chunk)
            if count <= most:
                yield chunk
        if self.length is not None and count < self.length:
            raise FetchError(f"it broke off after {count:,} of {self.length:,} bytes")


def is_public(address):
    """Whether an IP address, text, belongs to a machine of the internet, and not to this one, its
    network, or a group of machines."""
    address = ip_address(address.partition("%")[0])
    if address.version == 6:  # what may stand for an address of IPv4
        meant = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            meant = ip_address(int(address) % 2**32)
        if meant is not None:
            return is_public(str(meant))
    return address.is_global and not address.is_multicast


class _Timed:
    """A socket that neither waits beyond its deadline nor for a server that says nothing."""

    deadline = silence = math.inf

    def recv_into(self, *arguments):
        self.settimeout(_left(self.deadline, self.silence))
        return super().recv_into(*arguments)


class _Socket(_Timed, socket.socket):
    pass


class _SSLSocket(_Timed, ssl.SSLSocket):
    pass


def _left(deadline, most):
    """Seconds until the deadline, `most` at most. Raises TimeoutError where it is past."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("it took too long")
    return min(left, most)


def _headers(more):
    plain = {"User-Agent": AGENT, "Accept-Encoding": "identity", "Connection": "close"}
    return plain | {name.replace("_", "-"): value for name, value in more.items()}


def _check_status(response, accept):
    status = response.status
    if status not in accept:
        known = status in http.HTTPStatus._value2member_map_
        phrase = f" {http.HTTPStatus(status).phrase}" if known else ""
        wait = _asked_to_wait(response.headers.get("Retry-After"))
        raise FetchError(f"the answer is {status}{phrase}", status not in PASSING, wait=wait)


def _asked_to_wait(text):
    """Seconds of a Retry-After, which is a number or a date; None where it is neither."""
    text = (text or "").strip()
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())


@contextmanager
def _faults():
    """Makes FetchErrors of what goes wrong on the way to a server and back."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        reason = f"its certificate is not accepted: {error.verify_message}"
        raise FetchError(reason, lasting=True) from error
    except (ValueError, InvalidURL) as error:  # a port that is no number, a host that cannot be
        raise FetchError(f"the address cannot be: {error}", lasting=True) from error
    except (HTTPException, OSError) as error:
        raise FetchError(_said(error)) from error


def _said(error):
    if isinstance(error, TimeoutError):
        return "it took too long"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
