"""Errors a user can mend: one line that names the file or option and the way out."""

import io
import os
import select
import sys


class UserError(Exception):
    """An error the user can mend: one line that names the file or option and the way out."""

    def __init__(self, message):
        super().__init__(printable(message.strip()))


def printable(text):
    """The text with escapes for line breaks and all else that would disturb a line of a terminal:
    names of files may hold anything. Words of some languages hold joiners, which stay."""
    joiners = "\u200c\u200d"
    return "".join(c if c.isprintable() or c in joiners else repr(c)[1:-1] for c in str(text))


def in_a_line(error):
    """What a library's error says, as a part of a line; where it says nothing, its class."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def run(main):
    """Calls main(); an error the user can mend ends the process with one line and status 1.

    Where nobody reads on what is printed, as behind `| head`, the process ends without a word.
    """
    try:
        try:
            _run(main)
        finally:
            sys.stdout.flush()  # here, and not when Python ends and would complain
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout, 0)
        if not poll.poll(0):
            raise  # it was another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as the shell says of what SIGPIPE has ended


def _run(main):
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold what it cannot write
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        # a DataLoader's process puts its traceback before the message
        sys.exit(f"error: {str(error).rpartition('UserError: ')[2]}")
    except (RuntimeError, MemoryError) as error:
        if "does not have a deterministic implementation" in str(error):
            sys.exit(f"error: {printable(error)[:200]}: leave out --deterministic")
        # by its name, as importing torch for its class takes seconds
        out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not out_of_memory and "can't allocate memory" not in str(error):
            raise
        sys.exit("error: the memory is too small for the batch or the sizes asked for: lower them")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
