"""A server on this machine that misbehaves as it is told."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """What it answers is `answers`: path -> a function of the request's handler, which has the
    methods of `_Handler`. `requests` are those that came, pairs of path and headers."""

    def __init__(self, port):
        self.port, self.answers, self.requests = port, {}, []
        self.closing = threading.Event()

    def address(self, path, host="127.0.0.1"):
        return f"http://{host}:{self.port}{path}"

    def asked(self, path):
        """The headers of each request of the path."""
        return [headers for asked, headers in self.requests if asked == path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server.told
        server.requests.append((self.path, self.headers))
        self.close_connection = True
        server.answers.get(self.path, lambda handler: handler.give(status=404))(self)

    def give(self, body=b"", status=200, length=None, only=None, **headers):
        """Answers with a body.

        Args:
            length: what Content-Length says, None: the truth.
            only: bytes that are sent before the connection ends, None: all.
        """
        self.send_response(status)
        self.send_header("Content-Length", len(body) if length is None else length)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[:only])

    def give_part(self, body, etag, only=None, ranges=True, **headers):
        """Answers as a server does that knows ranges, if `ranges`."""
        begin = 0
        if ranges and self.headers["Range"] and self.headers["If-Range"] == etag:
            begin = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        headers |= {"ETag": etag}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        self.give(body[begin:], 206 if begin else 200, only=only, **headers)

    def stall(self, body=b"", length=100):
        """Sends the beginning of a body and no more, until the test is over."""
        self.give(body, length=length)
        self.wfile.flush()
        self.server.told.closing.wait(20)

    def log_message(self, *_):
        pass


@contextmanager
def serving(context=None):
    """A Server on 127.0.0.1, with TLS where there is an ssl.SSLContext for it."""
    inner = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    inner.daemon_threads = True
    inner.handle_error = lambda *_: None  # the client has gone, as it should
    if context:
        inner.socket = context.wrap_socket(inner.socket, server_side=True)
    server = inner.told = Server(inner.server_address[1])
    thread = threading.Thread(target=inner.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        inner.shutdown()
        thread.join()
        inner.server_close()
