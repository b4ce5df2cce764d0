"""The log of a training: a line of JSON an epoch."""

import json
from pathlib import Path

from groundwork.errors import UserError
from groundwork.files import atomic_write, check_readable


def write_log(path, records):
    """The whole log, in place of an older one."""
    with atomic_write(path) as temporary:
        lines = [json.dumps(record) + "\n" for record in records]
        temporary.write_text("".join(lines), encoding="utf-8")


def read_log(path):
    """The records of a training log, one an epoch. Raises UserError if it cannot be read, or a
    line is damaged."""
    check_readable(path)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path} has a damaged line, take it out: {error}") from error
