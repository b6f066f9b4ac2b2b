"""What goes wrong in a command: one line and an exit status, never a traceback for a mistake of the user."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Never

from outbox._errors import OutboxError, SchemaError, describe
from outbox._outbox import DRIVER_ERRORS
from outbox._session import is_transient

FOUND: Final = 1
"""A check failed, or something is not there."""
MISTAKE: Final = 2
"""The command cannot work like this; trying again does not help."""
AWAY: Final = 3
"""The database is away; trying again may help."""
INTERRUPTED: Final = 130
CLOSED_PIPE: Final = 141

_PASSWORD: Final = re.compile(r"(://[^:@/\s]*):[^\s]*@|(password=)[^\s&]+")


class Failure(Exception):  # noqa: N818 -- it is told to the user, and no error in the program
    """Ends a command with a line for the user."""

    def __init__(self, text: str, status: int = MISTAKE) -> None:
        super().__init__(text)
        self.status = status


def fail(text: str, status: int = MISTAKE) -> Never:
    """Ends the command."""
    raise Failure(text, status)


@contextmanager
def surfacing(what: str) -> Iterator[None]:
    """Makes failures of what the driver and the library raise.

    Args:
        what: Cannot be done, for an error that does not say so itself.
    """
    try:
        yield
    except Exception as error:
        cause = _alone(error)
        if failure := _failure_of(cause, what):
            raise failure from cause
        if cause is not error:
            raise cause from None
        raise


def _failure_of(error: BaseException, what: str) -> Failure | None:
    if isinstance(error, BrokenPipeError):  # of the output: the driver tells of a lost connection in its own words
        return None
    if isinstance(error, SchemaError):
        remedy = "; here that is `outbox migrate`" if "migrate" in str(error) else ""
        return Failure(f"{error}{remedy}")
    status = AWAY if is_transient(error) else MISTAKE
    if isinstance(error, OutboxError):
        return Failure(str(error), status)
    if isinstance(error, (*DRIVER_ERRORS, TimeoutError)):
        return Failure(f"{what}: {describe(error)}", status)
    return None


def _alone(error: BaseException) -> BaseException:
    """Returns the one error that ended a group of tasks."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def without_password(text: str) -> str:
    """Returns the text with the passwords of connection strings blotted out."""
    return _PASSWORD.sub(lambda match: f"{match[1]}:***@" if match[1] else f"{match[2]}***", text)
