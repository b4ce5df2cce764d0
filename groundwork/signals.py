"""Signals that ask a process to stop."""

import signal


class Stop:
    """Takes SIGTERM and Ctrl-C while it is entered: `signal` is then their number. A second one
    acts at once, as it would without this."""

    signals = (signal.SIGTERM, signal.SIGINT)

    def __enter__(self):
        self.signal = None
        self.before = [signal.signal(number, self._note) for number in self.signals]
        return self

    def __exit__(self, *_):
        for number, handler in zip(self.signals, self.before, strict=True):
            signal.signal(number, handler)

    def _note(self, number, _):
        self.signal = number
        self.__exit__()
