"""Wakes relays in other processes: a NOTIFY after the commit, from a connection of its own."""

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING

import anyio

from outbox._outbox import Outbox, Pool
from outbox._session import is_transient

if TYPE_CHECKING:  # it would be a quarter of the time that importing this library takes
    from anyio.abc import TaskStatus


class Notifier:
    """Sends a NOTIFY when transactions of this process have written messages, for relays that `listen`.

    Never inside your transaction: there a NOTIFY takes a lock that all committing transactions of the server
    share. It is sent at once after it, from a connection of the pool, and then not again for a few milliseconds: the
    next is for all commits until then. It only saves waiting: one that is lost is made good by the relay's polling.

    Args:
        outbox: The object that the writers of this process use.
        pool: Where the connection comes from.
        debounce: How long the next NOTIFY is put off after one, so that it is for all commits in between.
    """

    def __init__(self, outbox: Outbox, pool: Pool, *, debounce: timedelta = timedelta(milliseconds=5)) -> None:
        self._outbox = outbox
        self._pool = pool
        self._debounce = debounce.total_seconds()

    async def run(self, *, task_status: "TaskStatus[None] | None" = None) -> None:
        """Notifies until it is cancelled."""
        committed = asyncio.Event()
        with self._outbox._wakeup.listening(committed.set):
            if task_status is not None:
                task_status.started()
            while True:
                with self._outbox._wakeup.asleep():
                    await committed.wait()
                committed.clear()
                try:
                    await self._pool.execute("SELECT pg_notify($1, '')", self._outbox._queries.channel, timeout=5)
                except Exception as error:
                    if not is_transient(error) or self._pool.is_closing():
                        raise
                await anyio.sleep(self._debounce)  # for all commits until then one NOTIFY is enough
