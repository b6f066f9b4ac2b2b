"""The errors of this library, one tree.

OutboxError
├── NotInTransactionError        a message was to be written outside a transaction
├── CodecError                   a payload cannot be encoded or decoded
├── SchemaError                  the table is missing, too old or too new
└── DispatchError                what a destination may raise to be precise
    ├── PartialDispatchError     some messages of the batch failed, the rest were accepted
    ├── RejectedError            this message can never succeed
    └── DestinationUnavailableError   the broker is down, the messages are fine
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from uuid import UUID


class OutboxError(Exception):
    """The root of every error this library raises; the driver's error, if any, is its `__cause__`."""


class NotInTransactionError(OutboxError):
    """Raised by a dispatch on a connection without an open transaction; nothing was written."""


class CodecError(OutboxError):
    """Raised when a payload cannot be encoded or decoded; it names the message and the path inside it."""


class SchemaError(OutboxError):
    """Raised when the outbox table is missing, older or newer than this version of the library."""


class DispatchError(OutboxError):
    """The root of the errors by which a destination tells the relay more than "it failed"."""


class PartialDispatchError(DispatchError):
    """Raised by a destination that accepted a part of its batch.

    The messages named in `failures` failed, each with its own error; all others of the batch were
    accepted and are settled. An id that is not in the batch is ignored. One error object that stands for several
    messages says that they failed as a whole, and blames none of them: the relay finds out which.

    Args:
        failures: The error of each failed message, by message id.
    """

    def __init__(self, failures: Mapping[UUID, BaseException]) -> None:
        self.failures = dict(failures)
        names: Iterable[object] = self.failures
        if wrong := next((name for name in names if not isinstance(name, UUID)), None):
            # Matching no message it would make a failed one count as accepted.
            raise TypeError(f"failures are named by message id, a uuid.UUID, not {wrong!r}")
        first = next(iter(self.failures.items()), None)
        example = f", the first is {first[0]}: {describe(first[1])}" if first else ""
        super().__init__(f"{len(self.failures)} of the batch failed{example}")

    def __reduce__(self) -> tuple[type["PartialDispatchError"], tuple[dict[UUID, BaseException]]]:
        return type(self), (self.failures,)


class RejectedError(DispatchError):
    """Raised by a destination for a message that can never succeed: it becomes a dead letter at once.

    Raised for a whole batch of several messages, it is taken as "one of these": they are tried again one by one.
    """


class DestinationUnavailableError(DispatchError):
    """Raised by a destination whose broker cannot be reached: no attempt is spent and the relay waits for it."""


def describe(error: BaseException) -> str:
    """Says an error in one line, as it is stored beside a message: its type, and its text if it has one."""
    name = type(error).__qualname__
    try:
        text = str(error).replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
    except Exception as reason:  # noqa: BLE001 -- an error that cannot be told must not become the relay's own
        text = f"its text could not be made: {type(reason).__qualname__}"
    return (f"{name}: {text}" if text else name)[:2000]


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Names the extra to install when an import inside fails for want of a package."""
    try:
        yield
    except ModuleNotFoundError as error:
        remedy = f'pip install "asyncpg-outbox[{extra}]"'
        raise ModuleNotFoundError(f"{error}: {remedy}", name=error.name, path=error.path) from error
