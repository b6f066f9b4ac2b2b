"""The commands, put together, and the one boundary where their failures become a line and a status."""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Final

from cyclopts import App, CycloptsError, Group, Parameter
from rich.text import Text

from outbox.cli._console import console, say
from outbox.cli._dead import discard, list_, redrive, show
from outbox.cli._doctor import doctor
from outbox.cli._failures import CLOSED_PIPE, INTERRUPTED, MISTAKE, Failure, without_password
from outbox.cli._relay import relay
from outbox.cli._schema import cleanup, migrate, schema
from outbox.cli._settings import shown
from outbox.cli._status import status

_TABLES: Final = Group("The tables", sort_key=1)
_MESSAGES: Final = Group("The messages", sort_key=2)
_TRY: Final = Group("Try it", sort_key=3)


def _mistake(error: CycloptsError) -> Text:
    return Text(f"outbox: {without_password(str(error))}")


app: Final = App(
    name="outbox",
    help="The transactional outbox on PostgreSQL.",
    help_format="plaintext",
    version=lambda: version("asyncpg-outbox"),
    default_parameter=Parameter(negative=(), show_default=shown),
    console=console(wide=False),
    error_console=console(stderr=True),
    error_formatter=_mistake,
)
dead: Final = App(name="dead", help="List, show, redrive or discard dead letters.", group=_MESSAGES)
dead.command(list_, name="list")
dead.command(show)
dead.command(redrive)
dead.command(discard)

app.register_install_completion_command(help="Install the completion of this command for your shell.")
app.command(migrate, group=_TABLES)
app.command(schema, group=_TABLES)
app.command(cleanup, group=_TABLES)
app.command(relay, group=_MESSAGES)
app.command(status, group=_MESSAGES)
app.command(dead)
app.command(doctor, group=_MESSAGES)
# Imported when they are run: they need more than the others.
app.command("outbox.cli.demo:demo", group=_TRY, help="Kill a relay in the middle, and see that nothing is lost.")
app.command("outbox.cli._bench:bench", group=_TRY, help="Measure how fast messages are written and delivered here.")


def run(arguments: Sequence[str] | None) -> int:
    """Runs a command and returns the exit status."""
    try:
        result = app(arguments, exit_on_error=False, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError:
        return MISTAKE  # it has been told
    except Failure as failure:
        say(f"outbox: {without_password(str(failure))}")
        return failure.status
    except BrokenPipeError:
        # Whoever read it has seen enough. The interpreter flushes once more at its end, to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    return result if isinstance(result, int) else 0
