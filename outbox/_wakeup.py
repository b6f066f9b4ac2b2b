"""Tells the relays of this process that a transaction with messages has ended, at no cost to the database."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import asyncpg


class Wakeup:
    """Who wants to know of messages that were just committed, and the connections being watched for it.

    A dispatch happens before its commit, so the connection is watched from then on: the first statement after
    which no transaction is open was the COMMIT, or the ROLLBACK, which wakes a relay for nothing. Nothing is
    watched while nobody listens. All of it belongs to one event loop.
    """

    def __init__(self) -> None:
        self._listeners: set[Callable[[], None]] = set()
        self._watched: set[int] = set()

    @contextmanager
    def listening(self, listener: Callable[[], None]) -> Iterator[None]:
        """Calls the listener after each transaction that wrote messages, for as long as the context is open."""
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.discard(listener)

    def watch(self, connection: Any) -> None:
        """Watches a connection until the transaction open on it has ended."""
        identity = id(connection)
        if not self._listeners or identity in self._watched:
            return

        def ended(_: object) -> None:
            self._watched.discard(identity)
            with suppress(asyncpg.InterfaceError):  # when it is back in its pool already, or closed
                connection.remove_query_logger(after_statement)
                connection.remove_termination_listener(ended)

        def after_statement(_: object) -> None:
            if identity in self._watched and not _in_transaction(connection):
                ended(connection)
                self._wake()

        # Both listeners refer to the connection, so its identity is its own for as long as it is watched.
        self._watched.add(identity)
        connection.add_query_logger(after_statement)
        connection.add_termination_listener(ended)

    def _wake(self) -> None:
        for listener in tuple(self._listeners):
            listener()


def _in_transaction(connection: Any) -> bool:
    try:
        return bool(connection.is_in_transaction())
    except asyncpg.InterfaceError:  # back in its pool
        return False
