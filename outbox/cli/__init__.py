"""The command line: `outbox`, behind the extra `cli`.

Exit statuses: 0 is fine. 1: a check failed, `doctor` found a problem, or a dead letter is not there. 2: a mistake in
the command, its environment, or what it was told to load; trying again does not help. 3: the database is away, refused
for now, or was lost; trying again may help. 130: ended by Ctrl-C. 141: whoever read the output went away.
"""

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status.

    Args:
        arguments: Of the command line, without the program's name; those of this process unless given.
    """
    _open_outputs()
    try:
        from outbox.cli._app import run  # noqa: PLC0415 -- without its extra it must say so
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"cyclopts", "rich"}:
            raise
        sys.stderr.write('outbox: the command line needs its extra: pip install "asyncpg-outbox[cli]"\n')
        return 2
    return run(arguments)


def _open_outputs() -> None:
    """Lets what was closed by whoever started this lead to nowhere, so that it can be printed on all the same."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 -- as long as the process
