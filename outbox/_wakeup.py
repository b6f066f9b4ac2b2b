"""Tells the relays of this process that a transaction with messages has ended, at no cost to the database."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import asyncpg


class Wakeup:
    """Who wants to know of messages that were just committed, and the connections being watched for it.

    A dispatch happens before its commit, so the connection is watched from then on: the first statement after
    which no transaction is open was the COMMIT, or the ROLLBACK, which wakes a relay for nothing. To be watched costs
    a writer a tenth of its speed. So nobody is while all who listen are awake: then it is only noted who has written,
    and whoever goes to sleep looks what became of it. All of it belongs to one event loop.
    """

    def __init__(self) -> None:
        self._listeners: set[Callable[[], None]] = set()
        self._sleeping = 0
        self._watched: set[int] = set()
        self._written: dict[int, Any] = {}

    @contextmanager
    def listening(self, listener: Callable[[], None]) -> Iterator[None]:
        """Calls the listener after transactions that wrote messages, for as long as the context is open."""
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.discard(listener)

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Has the listeners called at once when a transaction ends, or has ended since they were awake."""
        self._sleeping += 1
        try:
            writing = {name: one for name, one in self._written.items() if _in_transaction(one)}
            has_missed_one = len(writing) < len(self._written)
            self._written = writing
            if has_missed_one:
                self._wake()  # whoever sleeps will not for long
            else:
                self._watch_all()
            yield
        finally:
            self._sleeping -= 1

    def wrote(self, connection: Any) -> None:
        """Takes note of a connection that has written messages, in the transaction that is open on it."""
        if self._sleeping:
            self._watch(connection)
        elif self._listeners:
            self._written[id(connection)] = connection

    def _watch_all(self) -> None:
        while self._written:
            self._watch(self._written.popitem()[1])

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
