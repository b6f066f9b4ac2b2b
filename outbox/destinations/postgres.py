"""Outboxes in PostgreSQL: one of another database, or one for each of several destinations."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final

import anyio
import asyncpg

from outbox._dispatcher import OutboxDispatcher
from outbox._errors import DestinationUnavailableError, describe
from outbox._inbox import Inbox
from outbox._message import Message
from outbox._outbox import Connection, Outbox, Pool
from outbox._session import is_transient

# Whatever the server's default: under a stricter one a message that another transaction accepted is an error.
_BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED, READ WRITE"

# SQLSTATEs of a server that is not well. With any other, a trigger's for one, it refuses what was to be written.
_AWAY: Final = ("08", "25", "40", "53", "55", "57", "58")


class PostgresDispatcher:
    """Writes each batch into other outbox tables, in one transaction, with ids, times and bytes as they are.

    With one table it carries messages into another database, where a relay hands them on. With several it is a
    fan-out: every destination has a table and a relay of its own, and with them its own pace, retries and dead letters,
    so that a slow one holds back none of the others, while the writer paid for a single INSERT.

    A batch whose outcome is unknown is written again: the copies are delivered at least once. With an inbox they are
    written exactly once.

    Args:
        pool: Of the database where the tables are.
        outboxes: The tables, migrated.
        inbox: Remembers what was written, in the same database. Messages that it has seen are left out.
        timeout: How long a connection, and then the batch, may take; after that the database counts as unavailable.

    Raises:
        ValueError: When no table is given.
    """

    def __init__(
        self, pool: Pool, *outboxes: Outbox, inbox: Inbox | None = None, timeout: timedelta = timedelta(seconds=10)
    ) -> None:
        if not outboxes:
            raise ValueError("name at least one outbox to write to")
        self._pool = pool
        self._outboxes = outboxes
        self._inbox = inbox
        self._timeout = timeout.total_seconds()

    async def dispatch(self, *messages: Message) -> None:
        """Writes the messages in their order.

        Raises:
            DestinationUnavailableError: When the database is away; nothing was written, or its answer was lost.
            SchemaError: When a table does not exist; nothing was written.
            OutboxError: When the database refuses; nothing was written.
        """
        if not messages:
            return
        try:
            async with self._transaction() as connection:
                if self._inbox:
                    messages = tuple([one for one in messages if await self._inbox.accept(connection, one)])
                for outbox in self._outboxes:
                    await OutboxDispatcher(connection, outbox).dispatch(*messages)
        except Exception as error:
            if _is_away(error):
                raise DestinationUnavailableError(f"the database is away: {describe(error)}") from error
            raise

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Connection]:
        with anyio.fail_after(self._timeout):
            connection = await self._pool.acquire()
        try:
            with anyio.fail_after(self._timeout):
                await connection.execute(_BEGIN)
                yield connection
                await connection.execute("COMMIT")
        except BaseException:
            connection.terminate()  # never closed: that would wait for an answer
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await self._pool.release(connection)


def _is_away(error: Exception) -> bool:
    reason = error.__cause__ or error
    refuses = isinstance(reason, asyncpg.PostgresError) and not (reason.sqlstate or "").startswith(_AWAY)
    return is_transient(error) and not refuses
