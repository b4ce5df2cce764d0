"""Images of many addresses, fetched side by side from servers of which nothing is known."""

import os
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import count
from pathlib import Path

from groundwork.errors import UserError, printable
from groundwork.files import atomic_write, make_folder, os_errors_as_user_errors
from groundwork.images import open_image
from groundwork.progress import progress
from groundwork.signals import Stop
from groundwork.web import FetchError, Patience, Web

LARGEST = 20_000_000  # bytes of an image
UNREACHABLE = 200  # addresses in a row without a server's answer: then it is this side


class Crawl:
    """Fetches images to a folder, each once: one that is there is not fetched again.

    What is fetched is an image that Pillow can read, whole. What cannot be had is in the folder's
    `failed.tsv`, a line with address and reason, and not tried again. A server that asks to be left
    alone for a while is, for all its images.

    Args:
        folder: where the images go.
        name_of: an address -> the path of its image below the folder.
        connections: how many are fetched at once.
        largest: bytes of an image, at most.
        unreachable: addresses in a row that no server answers for, after which it ends.
    """

    def __init__(
        self,
        folder,
        name_of,
        web=None,
        patience=None,
        connections=32,
        largest=LARGEST,
        unreachable=UNREACHABLE,
    ):
        self.folder, self.name_of = make_folder(folder), name_of
        for below in filter(Path.is_dir, self.folder.iterdir()):
            make_folder(below)  # without what killed processes left in it
        self.web = web or Web(connect=10, silence=20, whole=60)
        self.patience = patience or Patience(tries=3)
        self.connections, self.largest, self.unreachable = connections, largest, unreachable
        self.stopping = threading.Event()
        self.held = {}  # host -> when it may be asked again, by time.monotonic()
        self.signal = None  # that has ended `run`

    def run(self, addresses, total=None, retry_failed=False):
        """Fetches the images of the addresses, and ends early at Ctrl-C or SIGTERM: `signal` is
        then its number.

        Args:
            addresses: texts; any that comes again is taken once.
            total: how many there are, for the progress bar.
            retry_failed: whether those that failed before are tried again.

        Returns:
            a Counter: images "fetched", "there" already, "failed" now, "failed before".

        Raises:
            UserError: an image cannot be written, or no address at all can be reached any more.
        """
        counts = Counter()
        self.stopping.clear()
        pool = ThreadPoolExecutor(self.connections)
        failures = _Failures(self.folder / "failed.tsv", self.name_of, retry_failed)
        bar = progress(total=total, desc="fetching images", unit="image")
        with Stop() as stop, bar, failures:
            try:
                for kind, address, error in self._outcomes(pool, addresses, failures, stop):
                    counts[kind] += 1
                    bar.update()
                    if kind == "failed":
                        self._note(failures, address, error)
                    elif kind == "fetched":
                        failures.keep()
            finally:
                self.stopping.set()  # those that have not begun end at once
                pool.shutdown()
            if stop.signal:
                failures.forget()
            self.signal = stop.signal
        return counts

    def _outcomes(self, pool, addresses, failures, stop):
        """Yields what became of each address: a kind, the address, and the FetchError or None."""
        pending = {}  # future -> address
        names = {}  # of what is on its way -> the same address, that came again
        for address in addresses:
            name = self.name_of(address)
            path = self.folder / name
            if name in failures:
                yield "failed before", address, None
            elif name in names:
                names[name].append(address)  # what becomes of it, the first one tells
            elif path.exists():
                yield "there", address, None
            else:
                names[name] = []
                pending[pool.submit(self._fetch, address, path)] = address
            while len(pending) >= 2 * self.connections and not stop.signal:
                yield from self._done(pending, names)
            if stop.signal:
                break
        if stop.signal:
            self.stopping.set()
        while pending:
            yield from self._done(pending, names)

    def _done(self, pending, names):
        """Yields what is done of the pending ones, after a moment at most."""
        done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in done:
            address = pending.pop(future)
            again = names.pop(self.name_of(address))
            try:
                error = future.result()
            except _Stopped:
                continue
            yield "failed" if error else "fetched", address, error
            for other in again:
                yield "failed before" if error else "there", other, None

    def _note(self, failures, address, error):
        """Lists a failure. Where nobody answers any more, the last ones are not the addresses'."""
        failures.add(address, error)
        if error.answered:
            failures.keep()
        elif failures.waiting() >= self.unreachable:
            raise UserError(
                f"the last {self.unreachable} addresses could not be reached, of the last one "
                f"{error}: see whether this machine has a way to the internet, without a proxy; "
                "the same command goes on"
            )

    def _fetch(self, address, path):
        """Fetches an image, in a thread. Returns None, or the FetchError that ended it."""
        host = address.partition("//")[2].partition("/")[0]
        for tried in count(1):
            try:
                self._wait_for(host)
                return self._try(address, path)
            except FetchError as error:
                if error.wait is not None:
                    self.held[host] = time.monotonic() + error.wait
                pause = self.patience.before_another(error, tried)
                if pause is None:
                    return error
                self._rest(pause)

    def _wait_for(self, host):
        """Waits until the host may be asked. Raises FetchError where that takes too long."""
        left = self.held.get(host, 0) - time.monotonic()
        if left > self.patience.longest:
            raise FetchError(f"{host} asks to wait {left:.0f} s", lasting=True)
        self._rest(max(left, 0))

    def _rest(self, seconds):
        if self.stopping.wait(seconds):
            raise _Stopped

    def _try(self, address, path):
        with atomic_write(path) as temporary, self.web.get(address) as reply:
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = reply.headers.get_content_type()
            unsaid = "Content-Type" not in reply.headers or kind == "application/octet-stream"
            if not unsaid and not kind.startswith("image/"):
                raise FetchError(f"it is {kind} and no image", lasting=True)
            with open(temporary, "wb") as file:
                for chunk in reply.chunks(self.largest):
                    file.write(chunk)
                    self._rest(0)
            _check_image(temporary)


class _Stopped(Exception):
    """The crawl is to end."""


def _check_image(path):
    try:
        image = open_image(path)
    except UserError as error:
        reason = str(error).removeprefix(f"cannot read image {path}: ").replace(f" '{path}'", "")
        raise FetchError(f"it is no image that can be read: {reason}", lasting=True) from error
    if image.size == (1, 1):
        raise FetchError("it is a single pixel", lasting=True)


class _Failures:
    """The list of addresses whose images could not be had: a file of lines, address TAB reason."""

    def __init__(self, path, name_of, anew):
        self.path, self.name_of, self.anew = Path(path), name_of, anew
        self.names, self.lines = set(), []

    def __enter__(self):
        with os_errors_as_user_errors(self.path):
            if self.anew:
                self.path.unlink(missing_ok=True)
            self.path.touch()
            whole = 0
            with open(self.path, "rb") as file:
                for line in file:
                    if line.endswith(b"\n"):  # else it was cut short
                        whole += len(line)
                        address = line.partition(b"\t")[0].decode("utf-8", "surrogatepass")
                        self.names.add(self.name_of(address))
            os.truncate(self.path, whole)
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.keep()

    def __contains__(self, name):
        return name in self.names

    def add(self, address, error):
        self.names.add(self.name_of(address))
        self.lines.append(f"{address}\t{printable(str(error))}\n")

    def forget(self):
        """What waits since anything last came: it may be this side that was cut off."""
        self.lines = []

    def waiting(self):
        """How many are not in the file yet."""
        return len(self.lines)

    def keep(self):
        """Writes to the file what waits for it."""
        if self.lines:
            with (
                os_errors_as_user_errors(self.path),
                open(self.path, "a", encoding="utf-8", errors="surrogatepass") as file,
            ):
                file.writelines(self.lines)
            self.lines = []
