"""A writer for services on psycopg 3: the outbox, in the transaction of a `psycopg.AsyncConnection`.

The relay stays on asyncpg, in a process of its own or in this one.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from outbox._dispatcher import Decorator
from outbox._errors import NotInTransactionError, OutboxError, SchemaError, needs
from outbox._message import Message
from outbox._outbox import Outbox

with needs("psycopg"):
    import psycopg
    from psycopg.pq import TransactionStatus

_MISSING: Final = (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn, psycopg.errors.InvalidSchemaName)
_OPEN: Final = (TransactionStatus.INTRANS, TransactionStatus.INERROR)


class PsycopgDispatcher:
    """Writes messages into the outbox, inside the transaction of a psycopg connection.

    They are delivered if and only if that transaction commits; a savepoint rolled back takes its own along.
    It is cheap: make one for each request. It wakes no relay: one that is idle looks within its `poll_interval`.

    Args:
        connection: A psycopg connection, or one of a pool. Without autocommit a dispatch opens the transaction, if
            none is open yet, as every statement does; with autocommit it must be inside `connection.transaction()`.
        outbox: The table and codec.
        decorators: Applied to each message in this order, the result of one going into the next.
    """

    def __init__(
        self,
        connection: psycopg.AsyncConnection[Any],
        outbox: Outbox = Outbox(),  # noqa: B008 -- one for all: it has no state but who wants to be woken
        *,
        decorators: Iterable[Decorator] = (),
    ) -> None:
        self._connection = connection
        self._outbox = outbox
        self._decorators = tuple(decorators)

    async def dispatch(self, *messages: Message) -> None:
        """Writes the messages in their order: one statement for one, one for many.

        In pipeline mode, an error of the database is raised where the pipeline is synchronized, as psycopg's own.

        Raises:
            NotInTransactionError: When the connection commits each statement by itself; nothing was written.
            CodecError: When a payload cannot be encoded; nothing was written and the transaction is unharmed.
            SchemaError: When the table does not exist.
            OutboxError: When the database refuses, with the driver's error as its cause.
        """
        if not messages:
            return
        self._require_transaction(messages[0])
        for decorate in self._decorators:
            messages = tuple(map(decorate, messages))
        statements = self._outbox._writing(messages)
        with self._surfacing(f"cannot write {len(messages)} message(s), the first is {messages[0].id}"):
            # The statements are asyncpg's, whose $1 psycopg's raw cursors understand.
            async with psycopg.AsyncRawCursor(self._connection) as cursor:
                for statement, arguments in statements:
                    await cursor.execute(statement, arguments)

    def _require_transaction(self, first: Message) -> None:
        if self._connection.closed:
            raise OutboxError(f"message {first.id} was not written: the connection is closed")
        # In a pipeline the status tells nothing, so with autocommit that is refused, too.
        if self._connection.autocommit and self._connection.info.transaction_status not in _OPEN:
            raise NotInTransactionError(
                f"message {first.id} was not written: no transaction is open on this autocommit connection, or it is "
                "in a pipeline, which hides it. Dispatch inside `async with connection.transaction():`, "
                "together with the rows the message speaks of"
            )

    @contextmanager
    def _surfacing(self, what: str) -> Iterator[None]:
        try:
            yield
        except _MISSING as error:
            raise SchemaError(self._outbox._remedy(f"is not there ({error})")) from error
        except psycopg.Error as error:
            raise OutboxError(f"{self._outbox!r}: {what}: {type(error).__name__}: {error}") from error
