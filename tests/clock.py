"""A clock for a server, which can be set: libfaketime, laid under it, where it is installed.

PostgreSQL asks the system for the time. The library answers in its place, with an offset that it reads from a file,
once a second. The monotonic clock is left alone. Debian has it in the package `libfaketime`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PLACES = (
    "/usr/lib/*/faketime/libfaketime.so.1",
    "/usr/lib*/faketime/libfaketime.so.1",
    "/usr/local/lib/faketime/*.so.1",
)
REFRESH = 1.0
"""Seconds after which a change is seen."""


class Clock:
    """The clock of the servers that are started while it is `under` them."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._environment = {
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_CACHE_DURATION": str(int(REFRESH)),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DONT_RESET": "1",
        }
        self.set(0)
        file.chmod(0o644)  # the server may run under an account of its own
        file.parent.chmod(0o755)

    @staticmethod
    def library() -> Path | None:
        """Where the library is, if it is."""
        return next((path for place in _PLACES for path in sorted(Path("/").glob(place[1:]))), None)

    @contextmanager
    def under(self) -> Iterator[None]:
        """Has servers that are started here run by this clock. Other programs are to be started with `without`."""
        before = dict(os.environ)
        os.environ.update(self._environment, LD_PRELOAD=str(self.library()))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def set(self, offset: float) -> None:
        """Sets it so many seconds before, or behind, the real time."""
        part = self._file.with_suffix(".part")
        part.write_text(f"{offset:+.3f}\n")
        part.chmod(0o644)
        part.rename(self._file)


def without() -> dict[str, str]:
    """The environment without a clock laid under."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
