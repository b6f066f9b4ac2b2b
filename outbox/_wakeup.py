"""Tells the relays of this process that a transaction with messages has ended, at no cost to the database."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import asyncpg

_MANY: Final = 64
"""Connections that have written, beyond which those that have committed are forgotten."""
_FIRST_LOOK: Final = 0.001
_LAST_LOOK: Final = 0.05
"""Seconds between two looks at them, while somebody sleeps; each wait is twice as long as the one before it."""


class Wakeup:
    """Who wants to know of messages that were just committed, and the connections being watched for it.

    A dispatch happens before its commit, so the connection is watched from then on: the first statement after
    which no transaction is open was the COMMIT, or the ROLLBACK, which wakes a relay for nothing. To be watched costs
    a writer a tenth of its speed. So nobody is while all who listen are awake: then it is only noted who has written,
    and whoever goes to sleep looks what became of it, and looks again. All of it belongs to one event loop.
    """

    def __init__(self) -> None:
        self._listeners: set[Callable[[], None]] = set()
        self._sleeping = 0
        self._watched: set[int] = set()
        self._noted: dict[int, Any] = {}
        self._most = _MANY
        self._has_missed = False
        self._next_look: asyncio.TimerHandle | None = None

    @contextmanager
    def listening(self, listener: Callable[[], None]) -> Iterator[None]:
        """Calls the listener after transactions that wrote messages, for as long as the context is open."""
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.discard(listener)
            if not self._listeners:
                self._noted.clear()

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Has the listeners called at once when a transaction ends, or has ended since they were awake."""
        self._sleeping += 1
        try:
            self._look(_FIRST_LOOK)
            yield
        finally:
            self._sleeping -= 1
            if not self._sleeping and self._next_look:
                self._next_look.cancel()

    def wrote(self, connection: Any) -> None:
        """Takes note of a connection that has written messages, in the transaction that is open on it."""
        if self._sleeping:
            self._watch(connection)
        elif self._listeners:
            self._has_missed |= id(connection) in self._noted  # perhaps in another transaction
            self._noted[id(connection)] = connection
            if len(self._noted) > self._most:
                self._forget_ended()

    def _forget_ended(self) -> None:
        writing = {name: one for name, one in self._noted.items() if _in_transaction(one)}
        self._has_missed |= len(writing) < len(self._noted)
        self._noted, self._most = writing, max(_MANY, 2 * len(writing))

    def _look(self, interval: float) -> None:
        if self._next_look:
            self._next_look.cancel()
            self._next_look = None
        self._forget_ended()
        if self._has_missed:
            self._has_missed = False
            self._wake()
        if self._noted:  # a COMMIT that is under way by now is not told to who begins to watch
            loop, longer = asyncio.get_running_loop(), min(2 * interval, _LAST_LOOK)
            self._next_look = loop.call_later(interval, self._look, longer)

    def _watch(self, connection: Any) -> None:
        identity = id(connection)
        if identity not in self._watched:
            self._watched.add(identity)
            watched = _Watched(self, connection)
            connection.add_query_logger(watched.after_statement)
            connection.add_termination_listener(watched.ended)

    def _wake(self) -> None:
        for listener in tuple(self._listeners):
            listener()


class _Watched:
    """A connection that is watched, and so kept: its identity is its own for as long."""

    __slots__ = ("_connection", "_wakeup")

    def __init__(self, wakeup: Wakeup, connection: Any) -> None:
        self._wakeup = wakeup
        self._connection = connection

    def after_statement(self, _: object) -> None:
        if self._connection is not None and not _in_transaction(self._connection):
            self.ended(None)
            self._wakeup._wake()

    def ended(self, _: object) -> None:
        connection, self._connection = self._connection, None  # no cycle is left for the garbage collector
        if connection is None:
            return
        self._wakeup._watched.discard(id(connection))
        with suppress(asyncpg.InterfaceError):  # when it is back in its pool already, or closed
            connection.remove_query_logger(self.after_statement)
            connection.remove_termination_listener(self.ended)


def _in_transaction(connection: Any) -> bool:
    try:
        return bool(connection.is_in_transaction())
    except asyncpg.InterfaceError:  # back in its pool
        return False
