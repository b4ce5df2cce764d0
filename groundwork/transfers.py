"""Large published files fetched over HTTP: gone on with where they broke off, and checked."""

import hashlib
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from groundwork.errors import UserError
from groundwork.files import (
    check_readable,
    flush,
    flush_folder,
    os_errors_as_user_errors,
    write_json,
)
from groundwork.progress import progress, say
from groundwork.web import FetchError, Patience, Web
from groundwork.wording import size_of


@dataclass(frozen=True)
class Published:
    """A file as it was published."""

    address: str
    size: int  # bytes
    digest: str  # "sha256:…" or "md5:…", hexadecimal

    @property
    def name(self):
        """The file's own, without folders."""
        return self.address.rpartition("/")[2]


def fetch_file(published, path, web=None, patience=None):
    """Fetches a published file to `path`, unless it is there.

    While it comes it is `path` with ".part" behind it, which a later call goes on with, if the
    server has the same file still and knows of ranges. It gets its name when size and digest are
    those published; a file that is there already is checked as well.

    Raises:
        UserError: it cannot be had, is not the one published, or the disk is full.
    """
    path, web, patience = Path(path), web or Web(), patience or Patience(tries=6)
    if path.exists():
        check_readable(path)
        if fault := _fault(published, path):
            raise UserError(
                f"{path} is not what was published at {published.address}, {fault}: move it away, "
                "and the same command fetches it"
            )
        return
    part = _Part(path)
    with os_errors_as_user_errors(part.path):
        _fetch_all(published, part, web, patience)
        if fault := _fault(published, part.path):
            part.discard()
            raise UserError(
                f"what came from {published.address} is not what was published, {fault}: run the "
                "same command again; if it comes again, the file has changed there"
            )
        flush(part.path)
        os.replace(part.path, path)
        part.discard()
        flush_folder(path.parent)


class _Part:
    """What has come of a file, and by what the server tells whether it has the same one still."""

    def __init__(self, path):
        self.goal = path
        self.path = path.with_name(f"{path.name}.part")
        self.note = path.with_name(f"{path.name}.part.json")

    def length(self):
        """Bytes that have come."""
        return self.path.stat().st_size if self.path.exists() else 0

    def validator(self):
        """What to name in If-Range, None where there is nothing to go on with."""
        with suppress(OSError, ValueError, LookupError, TypeError):  # not there, or cut short
            validator = json.loads(self.note.read_bytes())["validator"]
            return validator if self.length() and isinstance(validator, str) else None

    def begin(self, validator):
        """Empties it for a file with that validator."""
        self.path.write_bytes(b"")  # first, so that the note is of nothing older
        write_json(self.note, {"validator": validator})

    def discard(self):
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def _fetch_all(published, part, web, patience):
    """Tries until the whole file is there; what a try adds makes the next one a first."""
    tried = farthest = 0
    with progress(total=published.size, desc=published.name, unit="B", unit_scale=True) as bar:
        while part.length() != published.size:
            try:
                _go_on(published, part, web, bar)
            except FetchError as error:
                length = part.length()
                tried = 1 if length > farthest else tried + 1
                farthest = max(farthest, length)
                wait = patience.before_another(error, tried)
                if wait is None:
                    kept = f" ({size_of(length)} are kept)" if length else ""
                    raise UserError(
                        f"cannot fetch {published.address}: {error}{kept}: run the same command "
                        f"later, or get the file otherwise and place it at {part.goal}"
                    ) from error
                say(f"{published.name}: {error}; another try in {wait:g} s", sys.stderr)
                time.sleep(wait)


def _go_on(published, part, web, bar):
    """Fetches what is missing. Raises FetchError where it breaks off."""
    validator, length = part.validator(), part.length()
    asked = {"Range": f"bytes={length}-", "If_Range": validator} if validator else {}
    with web.get(published.address, accept=(200, 206, 416), **asked) as reply:
        goes_on = reply.status == 206
        if (goes_on and not _is_next(reply.headers, validator, length)) or reply.status == 416:
            part.discard()
            raise FetchError("it cannot be gone on with and is begun anew")
        length = length if goes_on else 0  # else it is another file, or knows no ranges
        _check_is_file(reply, length, published)
        if not goes_on:
            part.begin(_validator(reply.headers))
        bar.n = length
        bar.refresh()
        with open(part.path, "ab") as file:
            for chunk in reply.chunks(published.size - length):
                length += len(chunk)
                file.write(chunk)
                bar.update(len(chunk))
    if length < published.size:
        raise FetchError(f"it broke off after {length:,} of {published.size:,} bytes")


def _validator(headers):
    """By what a server tells one state of a file from another, None where it does not. A weak
    ETag, of files that are much the same, is not for going on with one."""
    etag = headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")


def _is_next(headers, validator, length):
    """Whether a part is of the same file and begins with the byte after the first `length`."""
    unit, _, span = headers.get("Content-Range", "").partition(" ")
    same = _validator(headers) in (None, validator)  # it may leave out what was sent to it
    return same and unit == "bytes" and span.partition("-")[0] == str(length)


def _check_is_file(reply, before, published):
    """Raises FetchError for what cannot be the rest of the file after the bytes `before`: what has
    come is not to be given up for it."""
    if reply.headers.get_content_type() == "text/html":
        raise FetchError("a page stands in its place", lasting=True)
    if reply.length is not None and before + reply.length != published.size:
        raise FetchError(
            f"it has {before + reply.length:,} bytes there, and {published.size:,} were published: "
            "it has changed",
            lasting=True,
        )


def _fault(published, path):
    """How a file differs from the one published, None where it does not."""
    size = path.stat().st_size
    if size != published.size:
        return f"with {size:,} bytes in place of {published.size:,}"
    kind, _, expected = published.digest.partition(":")
    digest = hashlib.new(kind, usedforsecurity=False)
    with (
        progress(total=size, desc=f"checking {path.name}", unit="B", unit_scale=True) as bar,
        open(path, "rb") as file,
    ):
        while chunk := file.read(2**20):
            digest.update(chunk)
            bar.update(len(chunk))
    found = digest.hexdigest()
    return None if found == expected else f"with the {kind} {found} in place of {expected}"
