"""What the commands print on."""

import json
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDE: Final = 10_000
"""Columns of what is no terminal: a line is cut by whoever reads it."""
_CONTROLS: Final = {
    code: repr(chr(code))[1:-1] for code in (*range(0x20), 0x7F, *range(0x80, 0xA0), *range(0x202A, 0x202F))
}
_CONTROLS_BUT_NEWLINE: Final = {code: shown for code, shown in _CONTROLS.items() if code != ord("\n")}


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def console(*, stderr: bool = False, wide: bool = True) -> Console:
    """Returns a console that shows text as it is: nothing in it is markup.

    Args:
        stderr: Of the two outputs, that for what is no result.
        wide: In a file nothing is cut or wrapped.
    """
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    # FORCE_COLOR and its like are for terminals: a file gets no control characters.
    return _Console(
        stderr=stderr,
        force_terminal=None if terminal else False,
        width=_WIDE if wide and not terminal else None,
        markup=False,
        highlight=False,
        emoji=False,
    )


def say(text: str) -> None:
    """Tells the user what is no result, on standard error."""
    console(stderr=True).print(text, soft_wrap=True)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Prints a result for programs."""
    sys.stdout.write(json.dumps(value, indent=indent, default=_plain) + "\n")
    sys.stdout.flush()


def _plain(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def printable(text: str, *, lines: bool = False) -> Text:
    """Returns text of somebody else's for a terminal: what would control it is shown as an escape."""
    return Text(text.translate(_CONTROLS_BUT_NEWLINE if lines else _CONTROLS))


def table_of(rows: Iterable[Mapping[str, Any]], **columns: Mapping[str, Any]) -> Table:
    """Makes a table with these columns, each with the settings of its own."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name, settings in columns.items():
        table.add_column(name.replace("_", " "), **settings)
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in columns))
    return table


def _cell(value: Any) -> Text:
    return value if isinstance(value, Text) else printable("" if value is None else str(value))
