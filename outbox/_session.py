"""A connection of the pool, kept by a relay: one short transaction at a time, and never an await without a limit."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any, Final

import anyio
import asyncpg
from asyncpg.pool import PoolConnectionProxy

from outbox._errors import OutboxError
from outbox._outbox import DRIVER_ERRORS, Connection, Pool

_CLOSE_SECONDS: Final = 1.0
READY_SECONDS: Final = 0.01
"""How long a transaction stands open for the next one, empty, and how long one opens the next without a pause.

Behind a pooler others may be waiting for the server's connection.
"""

# SQLSTATEs that time does not heal: wrong data, broken constraints, no such table, no such privilege.
_HOPELESS: Final = ("22", "23", "28", "3D", "3F", "42")


class Session:
    """Runs transactions on one connection, replacing it whenever it is in doubt.

    A transaction that fails, is cancelled or misses its limit costs the connection: it is terminated, never
    closed, since closing waits for an answer. A limit that was missed is doubled for the next transaction, so
    that a slow database is not taken for a dead one for ever.

    Args:
        pool: Where the connection comes from.
        begin: Makes the statements that open a transaction, of the milliseconds it may take.
        limit: Seconds for a transaction, and again for opening it, the wait for a connection included.
    """

    def __init__(self, pool: Pool, begin: Callable[[int], str], limit: float) -> None:
        self._pool = pool
        self._begin = begin
        self._limit = self._usual_limit = limit
        self._connection: PoolConnectionProxy[Any] | None = None
        self._is_ready = False
        self._went_on_since = -math.inf
        self._lock = anyio.Lock()
        self._is_closed = False

    @property
    def limit(self) -> float:
        """Seconds that the next transaction may take."""
        return self._limit

    @property
    def is_connected(self) -> bool:
        """Whether it has a connection."""
        return self._connection is not None

    @asynccontextmanager
    async def transaction(
        self, at_most: float = math.inf, *, to_go_on: bool = False, on_commit: Callable[[], None] | None = None
    ) -> AsyncIterator[Connection]:
        """Opens a transaction, commits it at the end, and rolls it back when anything is raised.

        Args:
            at_most: Seconds that others can wait for it, if that is less than the limit; to miss it proves nothing.
            to_go_on: Whether another one follows at once: it is opened by the COMMIT, which saves a round trip.
                Nothing is locked or seen by it, but if it does not follow after all, call `rest`.
            on_commit: Called when the COMMIT is on its way, and not answered yet.

        Raises:
            TimeoutError: When the limit has passed.
        """
        async with self._lock:
            limit, is_usual = min(at_most, self._limit), at_most >= self._limit
            begin = self._begin(int(limit * 1000))
            try:
                # However long the work may take, a server that answers at all begins it within the usual limit.
                with anyio.fail_after(min(at_most, self._usual_limit)):
                    connection = await self._connected()
                    if not self._is_ready:
                        self._went_on_since = monotonic()
                        await connection.execute(begin)
                    self._is_ready = False
                try:
                    with anyio.fail_after(limit):
                        yield connection
                        goes_on = to_go_on and monotonic() < self._went_on_since + READY_SECONDS
                        await _commit(connection, f"COMMIT; {begin}" if goes_on else "COMMIT", on_commit)
                        self._is_ready = goes_on
                except (TimeoutError, asyncpg.QueryCanceledError):
                    if is_usual:
                        self._limit *= 2
                    raise
                if is_usual:
                    self._limit = self._usual_limit
            except BaseException:
                await self._abandon()
                raise

    async def rest(self) -> None:
        """Ends the transaction that was opened for one that does not follow yet.

        Raises:
            TimeoutError: When the limit has passed.
        """
        if self._is_ready and not self._lock.locked():  # whoever has it ends it
            async with self.transaction():
                pass

    async def _connected(self) -> "PoolConnectionProxy[Any]":
        if self._connection is None:
            self._connection = await self._pool.acquire()
        if self._is_closed:  # or it would never be given back
            raise asyncpg.InterfaceError("the relay has ended")
        return self._connection

    async def close(self, *, in_doubt: bool) -> None:
        """Gives the connection back to the pool for good; terminates it when the server may not answer any more."""
        self._is_closed = True
        if in_doubt or self._lock.locked():
            await self._abandon()
        elif self._connection is not None:
            connection, self._connection = self._connection, None
            with anyio.CancelScope(shield=True), suppress(*DRIVER_ERRORS, TimeoutError):
                # The pool resets it, which asks the server; without an answer the pool terminates it.
                await self._pool.release(connection, timeout=_CLOSE_SECONDS)

    async def _abandon(self) -> None:
        self._is_ready = False
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(asyncpg.InterfaceError):  # when the server died the pool may have taken it back already
                connection.terminate()
            with anyio.CancelScope(shield=True):
                await self._pool.release(connection)


async def _commit(connection: Connection, statements: str, on_commit: Callable[[], None] | None) -> None:
    # The driver sends before it waits, and so before the loop has its next turn.
    sent = asyncio.get_running_loop().call_soon(on_commit) if on_commit else None
    try:
        await connection.execute(statements)
    except BaseException:
        if sent:
            sent.cancel()
        raise


def is_transient(error: BaseException) -> bool:
    """Says whether trying again may help: the database went away, refused for now, or did not answer in time."""
    if type(error) is OutboxError and error.__cause__:  # from a verb, which has the driver's error as its cause
        return is_transient(error.__cause__)
    if isinstance(error, asyncpg.PostgresError):
        return not (error.sqlstate or "").startswith(_HOPELESS)
    return isinstance(error, (*DRIVER_ERRORS, TimeoutError))
