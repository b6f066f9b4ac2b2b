"""Where a run is written down: lines of JSON, added to one file by any number of processes."""

import json
import os
from pathlib import Path
from time import monotonic
from typing import Any


class Journal:
    """Adds facts to a file, each in one write: what a kill leaves is whole lines, or the beginning of one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, do: str, **fact: Any) -> None:
        """Writes down a fact, with its time."""
        line = json.dumps({"do": do, "at": monotonic(), **fact}, separators=(",", ":"))
        # Begun with a line of its own: what stands before may be the half line of somebody who was killed.
        os.write(self._file, f"\n{line}\n".encode())

    def note_span(self, do: str, relay: int, since: float, until: float | None = None) -> None:
        """Writes down what happened to a relay, or with 0 to all, from one moment to another or until now."""
        self.note(do, relay=relay, since=since, until=monotonic() if until is None else until)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)
