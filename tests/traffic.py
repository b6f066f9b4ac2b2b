"""Orders under traffic: what the recovery tests write, and how they compare it with what arrived.

Each order is a row and a message of the same id, in one transaction; so the table of orders says afterwards which
messages were committed, also where a COMMIT got no answer.
"""

import asyncio
import random
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from uuid import UUID

import asyncpg

from outbox import Message, Outbox, OutboxDispatcher, OutboxError

_TABLE = "CREATE TABLE {schema}.orders (id uuid PRIMARY KEY)"
_INSERT = "INSERT INTO {schema}.orders SELECT unnest($1::uuid[])"


class _Regret(Exception):  # noqa: N818 -- no error: the reason for a rollback on purpose
    pass


@dataclass
class Traffic:
    """Writers that order, change their minds in one case of ten, and give up on nothing."""

    dsn: str
    outbox: Outbox
    writers: int = 4
    per_transaction: int = 10
    seed: int = 1
    rolled_back: set[UUID] = field(default_factory=set)
    attempted: int = 0
    _attempt: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def prepare(self) -> None:
        connection = await asyncpg.connect(self.dsn)
        await connection.execute(_TABLE.format(schema=self.outbox.schema))
        await connection.close()

    async def run(self, messages: int | None = None, *, until: asyncio.Event | None = None) -> None:
        """Writes so many messages, or until the event is set."""
        async with asyncio.TaskGroup() as group:
            for number in range(self.writers):
                group.create_task(self._write(random.Random(self.seed + number), messages, until))

    async def attempts(self, more: int) -> None:
        """Waits until so many more messages were written, or tried to be."""
        enough = self.attempted + more
        async with self._attempt:
            await self._attempt.wait_for(lambda: self.attempted >= enough)

    async def committed(self) -> set[UUID]:
        connection = await asyncpg.connect(self.dsn)
        rows = await connection.fetch(f"SELECT id FROM {self.outbox.schema}.orders")  # noqa: S608 -- our own schema
        await connection.close()
        return {row["id"] for row in rows}

    async def _write(self, dice: random.Random, messages: int | None, until: asyncio.Event | None) -> None:
        connection: asyncpg.Connection | None = None
        while not (until and until.is_set()) and not (messages and self.attempted >= messages):
            self.attempted += self.per_transaction
            async with self._attempt:
                self._attempt.notify_all()
            try:
                if connection is None or connection.is_closed():
                    connection = await asyncpg.connect(self.dsn, timeout=5)
                await self._transact(connection, dice)
            except (OutboxError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError):
                # The server is away: a customer who tries again a little later.
                await asyncio.sleep(0.02)
        if connection:
            await connection.close(timeout=5)

    async def _transact(self, connection: asyncpg.Connection, dice: random.Random) -> None:
        batch = [Message({"n": n}, topic="orders", key=str(dice.randrange(50))) for n in range(self.per_transaction)]
        regret = dice.random() < 0.1
        if regret:
            self.rolled_back |= {message.id for message in batch}
        with suppress(_Regret):
            async with connection.transaction():
                await connection.execute(_INSERT.format(schema=self.outbox.schema), [one.id for one in batch])
                await OutboxDispatcher(connection, self.outbox).dispatch(*batch)
                if dice.random() < 0.1:
                    await self._regretted_savepoint(connection)
                if regret:
                    raise _Regret

    async def _regretted_savepoint(self, connection: asyncpg.Connection) -> None:
        message = Message("never", topic="orders")
        self.rolled_back.add(message.id)
        with suppress(_Regret):
            async with connection.transaction():
                await OutboxDispatcher(connection, self.outbox).dispatch(message)
                raise _Regret


def assert_all_delivered(committed: set[UUID], traffic: Traffic, delivered: list[UUID]) -> set[UUID]:
    """Nothing lost, nothing invented; returns the ids that were delivered more than once."""
    arrived = set(delivered)
    assert not committed - arrived, f"{len(committed - arrived)} of {len(committed)} lost"
    assert not arrived & traffic.rolled_back, "a message of a rolled-back transaction was delivered"
    assert not arrived - committed, f"{len(arrived - committed)} invented"
    return {name for name, times in Counter(delivered).items() if times > 1}
