"""`outbox bench`: how fast messages are written and delivered here, beside the same work by hand."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from statistics import median
from time import perf_counter
from typing import Final
from uuid import uuid4

import asyncpg
import orjson
from rich.progress import track

from outbox import embedded as postgres
from outbox._dispatcher import OutboxDispatcher
from outbox._message import Message, uuid7
from outbox._outbox import Outbox, Pool, listed
from outbox._queries import OperatorQueries
from outbox._relay import Relay
from outbox.cli._console import console, table_of
from outbox.cli._database import Database, Table
from outbox.cli._failures import fail, surfacing
from outbox.cli._settings import Count

_DATABASE: Final = Database()
_SECONDS: Final = 1.0
"""How long writing takes in a round."""
_BACKLOG: Final = 20_000
_BATCH: Final = 100
_PAYLOAD: Final = {"text": "x" * 290}
_BODY: Final = orjson.dumps(_PAYLOAD)


async def bench(
    *,
    database: Database = _DATABASE,
    embedded: bool = False,
    rounds: Count = 3,
) -> None:
    """Measure how fast messages are written and delivered here, beside the same work by hand.

    In tables of its own, which it drops: the outbox is not touched. Ratios tell more than rates, since both sides take
    turns on the same machine.

    Args:
        database: Where.
        embedded: On a PostgreSQL of its own, which needs the extra of that name.
        rounds: How often; the medians are shown.
    """
    async with _place(database, embedded=embedded) as (pool, outbox):
        by_hand, by_outbox = ByHand(pool, outbox), ByOutbox(pool, outbox)
        works = (by_hand.write, by_outbox.write, by_hand.drain, by_outbox.drain)
        rates: dict[Callable[[], Awaitable[float]], list[float]] = {work: [] for work in works}
        for number in track(range(rounds + 1), "measuring", console=console(stderr=True), transient=True):
            for work in works:
                rate = await work()
                if number:  # the first only warms up
                    rates[work].append(rate)
    hand_written, written, hand_drained, drained = (median(rates[work]) for work in works)
    lines = (("write, 1 a transaction", hand_written, written), ("deliver, 100 a batch", hand_drained, drained))
    rows = [
        {
            "messages_a_second": name,
            "by_hand": f"{floor:,.0f}",
            "outbox": f"{ours:,.0f}",
            "ratio": f"{ours / floor:.2f}",
        }
        for name, floor, ours in lines
    ]
    right = {"justify": "right"}
    console().print(table_of(rows, messages_a_second={}, by_hand=right, outbox=right, ratio=right))


@asynccontextmanager
async def _place(database: Database, *, embedded: bool) -> AsyncIterator[tuple[Pool, Outbox]]:
    """Makes tables that nobody else uses, and drops them."""
    if not embedded:
        async with _tables(database) as place:
            yield place
        return
    try:
        async with postgres.postgres() as dsn, _tables(Database(dsn=dsn)) as place:
            yield place
    except RuntimeError as error:  # of the server, which says what is missing
        fail(str(error))


@asynccontextmanager
async def _tables(database: Database) -> AsyncIterator[tuple[Pool, Outbox]]:
    outbox = Table(table=f"outbox_bench_{uuid4().hex[:12]}", schema=database.schema).outbox
    async with database.connected(check=False) as connection:
        await outbox.migrate(connection)
        try:
            with surfacing("cannot measure"):
                async with asyncpg.create_pool(database.dsn, min_size=0, max_size=3) as pool:
                    yield pool, outbox
        finally:
            await connection.execute(OperatorQueries(outbox._queries).drop)


class ByHand:
    """What anybody would write by hand: the floor."""

    def __init__(self, pool: Pool, outbox: Outbox) -> None:
        self._pool = pool
        self._outbox = outbox
        self._queries = OperatorQueries(outbox._queries)

    async def write(self) -> float:
        """Writes one message a transaction, and returns the rate."""
        count, started = 0, perf_counter()
        async with self._pool.acquire() as connection:
            while perf_counter() - started < _SECONDS:
                async with connection.transaction():
                    await self._insert(connection)
                count += 1
        return count / (perf_counter() - started)

    async def _insert(self, connection: asyncpg.pool.PoolConnectionProxy) -> None:
        await connection.execute(self._queries.plain_insert, uuid7(), "bench", orjson.dumps(_PAYLOAD))

    async def drain(self) -> float:
        """Empties a backlog, and returns the rate."""
        async with self._pool.acquire() as connection:
            await self._outbox.clear(connection)
            await connection.execute(self._queries.fill, _BACKLOG, _BODY)
        started = perf_counter()
        await self._empty()
        return _BACKLOG / (perf_counter() - started)

    async def _empty(self) -> None:
        async with self._pool.acquire() as connection:
            found = True
            while found:
                async with connection.transaction():
                    rows = await connection.fetch(self._queries.plain_lock, _BATCH)
                    found = bool(rows)
                    await connection.execute(self._outbox._queries.remove, listed(row["position"] for row in rows))


class ByOutbox(ByHand):
    """The same by this library."""

    async def _insert(self, connection: asyncpg.pool.PoolConnectionProxy) -> None:
        await OutboxDispatcher(connection, self._outbox).dispatch(Message(_PAYLOAD, topic="bench"))

    async def _empty(self) -> None:
        destination = _Nowhere(_BACKLOG)
        relay = Relay(self._outbox, self._pool, destination, batch_size=_BATCH)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(relay.run())
            await destination.reached.wait()
            await relay.stop()


class _Nowhere:
    def __init__(self, expected: int) -> None:
        self._missing = expected
        self.reached = asyncio.Event()

    async def dispatch(self, *messages: Message) -> None:
        self._missing -= len(messages)
        if self._missing <= 0:
            self.reached.set()
