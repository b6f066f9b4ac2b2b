"""Those who write under chaos: side by side, with second thoughts, slow commits, delays and large bodies.

Each message has a row in a table of orders, written in the same transaction; so that table says afterwards what was
committed, also where a COMMIT got no answer.
"""

import asyncio
import random
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Final

import asyncpg

from outbox import Message, Outbox, OutboxDispatcher, OutboxError
from tests.chaos_relay import MENDABLE, REJECTED

_TABLE: Final = """
    CREATE TABLE orders (
        id uuid PRIMARY KEY, key text, position bigint NOT NULL, body bigint NOT NULL,
        delayed boolean NOT NULL, rejected boolean NOT NULL)"""
_LAST: Final = "SELECT last_value FROM outbox_position"
# The positions are read from the tables, by the transaction that wrote them: what the relay says is compared with it.
_RECORD: Final = """
    INSERT INTO orders
    SELECT m.id, m.key, m.position, w.body, m.delayed, m.topic = $4
    FROM unnest($2::uuid[], $3::bigint[]) AS w (id, body) JOIN (
        SELECT id, key, position, topic, false AS delayed FROM outbox WHERE position >= $1
        UNION ALL SELECT id, key, position, topic, true FROM outbox_waiting WHERE position >= $1) AS m USING (id)"""
GONE: Final = (
    OutboxError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)


class _Regret(Exception):  # noqa: N818 -- no error: the reason for a rollback on purpose
    pass


@dataclass
class Writers:
    """Writers that share some keys and give up on nothing.

    Args:
        dsn: Straight to the server.
        outbox: Where they write.
        seed: Of all that they throw dice for.
        may_write: Says whether the relays are not too far behind.
        mendable: Whether somebody mends what the destination rejects for now.
    """

    dsn: str
    outbox: Outbox
    seed: str
    may_write: Callable[[], bool]
    mendable: bool = False
    attempted: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)
    """The ids in the order of their commits, as far as those were answered."""
    calm_until: float = 0.0
    """Nobody begins to write before this time: then no commit of theirs brings those of the relays to the disk."""

    async def prepare(self) -> None:
        connection = await asyncpg.connect(self.dsn)
        await self.outbox.migrate(connection)
        await connection.execute(_TABLE)
        await connection.close()

    async def run(self, count: int, until: asyncio.Event) -> None:
        """So many write until the event is set."""
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(self._write(random.Random(f"{self.seed}-{number}"), until))

    async def _write(self, dice: random.Random, until: asyncio.Event) -> None:
        connection: asyncpg.Connection | None = None
        while not until.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(dice.expovariate(1 / 0.03)):
                    await until.wait()
            if monotonic() < self.calm_until or not self.may_write():
                continue
            try:
                if connection is None or connection.is_closed():
                    connection = await asyncpg.connect(self.dsn, timeout=5)
                await self._transact(connection, dice)
            except GONE:
                await asyncio.sleep(0.05)  # the server is away: again a little later
        if connection:
            connection.terminate()

    async def _transact(self, connection: asyncpg.Connection, dice: random.Random) -> None:
        messages = [self._message(dice) for _ in range(dice.randint(1, 15))]
        regretted = [self._message(dice) for _ in range(3)] if dice.random() < 0.1 else []
        self.attempted |= {str(message.id) for message in (*messages, *regretted)}
        mood = dice.random()
        with suppress(_Regret):
            async with connection.transaction():
                low = await connection.fetchval(_LAST)
                dispatcher = OutboxDispatcher(connection, self.outbox)
                await dispatcher.dispatch(*messages[1:])
                if regretted:
                    with suppress(_Regret):
                        async with connection.transaction():
                            await dispatcher.dispatch(*regretted)
                            raise _Regret
                await dispatcher.dispatch(messages[0])
                await self._record(connection, low, messages)
                if mood < 0.1:
                    raise _Regret
                if mood < 0.13:  # others write, and commit, higher positions of the same keys meanwhile
                    await asyncio.sleep(dice.uniform(0.05, 1.5))
                elif mood < 0.14:
                    connection.terminate()
            self.commits += [str(message.id) for message in messages]

    async def linger(self, seconds: float, seed: int) -> None:
        """Writes messages of many keys, with others' in between, in a transaction that stays open for so long."""
        dice = random.Random(f"{self.seed}-late-{seed}")
        messages = [self._message(dice, keyed=True) for _ in range(12)]
        self.attempted |= {str(message.id) for message in messages}
        connection = await asyncpg.connect(self.dsn, timeout=5)
        try:
            transaction = connection.transaction()
            await transaction.start()
            low = await connection.fetchval(_LAST)
            dispatcher = OutboxDispatcher(connection, self.outbox)
            await dispatcher.dispatch(*messages[:6])
            await asyncio.sleep(seconds / 2)
            await dispatcher.dispatch(*messages[6:])
            await self._record(connection, low, messages)
            await asyncio.sleep(seconds / 2)
            if dice.random() < 0.3:
                await transaction.rollback()
            else:
                await transaction.commit()
                self.commits += [str(message.id) for message in messages]
        finally:
            connection.terminate()

    async def _record(self, connection: asyncpg.Connection, low: int, messages: list[Message]) -> None:
        checks = [zlib.crc32(message.body) for message in messages]
        status = await connection.execute(_RECORD, low, [one.id for one in messages], checks, REJECTED)
        assert status == f"INSERT 0 {len(messages)}", f"{status}, and {len(messages)} were dispatched"

    def _message(self, dice: random.Random, *, keyed: bool = False) -> Message:
        size = 300_000 if dice.random() < 0.002 else dice.randrange(200)
        delayed = not keyed and dice.random() < 0.03
        due_at = datetime.now(UTC) + timedelta(seconds=dice.uniform(-0.1, 2)) if delayed else None
        key = f"key-{dice.randrange(40)}" if keyed or dice.random() < 0.8 else None
        return Message(dice.randbytes(size).hex(), topic=self._topic(dice.random()), key=key, due_at=due_at)

    def _topic(self, mood: float) -> str:
        if self.mendable and mood > 0.998:
            return MENDABLE
        return REJECTED if mood < 0.003 else "orders"
