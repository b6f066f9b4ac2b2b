"""What sides have in common: bodies, connections, writers that flood or keep to a timetable, a tally of deliveries."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any

import asyncpg

if TYPE_CHECKING:
    Connection = asyncpg.Connection[Any]

ORDERS = "CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY)"
ORDER = "INSERT INTO orders DEFAULT VALUES"
PATIENCE = 5.0
"""Seconds that the rest of a timetable's messages is waited for, or as long as the timetable itself."""
_WRITERS = 4
"""Connections of a timetable: a commit that is slow delays none of the next three."""


def payload(size: int) -> dict[str, str]:
    """Returns a payload whose JSON, written compactly, has so many bytes."""
    return {"text": "x" * (size - len('{"text":""}'))}


def body(size: int) -> bytes:
    """Returns the JSON of `payload`."""
    return b'{"text":"%s"}' % payload(size)["text"].encode()


@asynccontextmanager
async def connected(dsn: str, count: int) -> AsyncIterator[list[Connection]]:
    """Opens so many connections."""
    async with AsyncExitStack() as stack:
        connections = [await asyncpg.connect(dsn) for _ in range(count)]
        for connection in connections:
            stack.push_async_callback(connection.close)
        yield connections


class Tally:
    """What a destination got: how much of it and, counted when the work is over, how much that is different."""

    def __init__(self, wanted: float = float("inf")) -> None:
        self.count = 0
        self._wanted = wanted
        self._reached = asyncio.Event()
        self._seen: list[Hashable] = []
        self._first = 0
        self._began = self.ended = 0.0

    def add(self, names: Iterable[Hashable]) -> None:
        """Counts what has these names."""
        before = len(self._seen)
        self._seen.extend(names)
        self.count += len(self._seen) - before
        if not before:
            self._first, self._began = self.count, perf_counter()
        if self.count >= self._wanted:
            self._reached.set()

    async def reached(self, seconds: float) -> None:
        """Waits until all that was wanted is here, or for so long."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._reached.wait(), seconds)
        self.ended = perf_counter()

    def rate(self, count: int) -> float:
        """Returns messages/s, of so many until the time was over: from the first delivery on, and without that one.

        A relay runs for days, so how long it takes to start and to stop is no part of its speed.
        """
        return max(0, count - self._first) / (self.ended - self._began) if self._began else 0.0

    def different(self) -> int:
        """Returns how many names there were."""
        return len(set(self._seen))


class Clock(Tally):
    """A tally that also knows how long each took since just before its commit."""

    def __init__(self, wanted: float) -> None:
        super().__init__(wanted)
        self.ms: list[float] = []
        self._committing: dict[Hashable, float] = {}

    def add(self, names: Iterable[Hashable]) -> None:
        """Counts what has these names, and looks at the time."""
        now, names = perf_counter(), list(names)
        self.ms.extend(round((now - self._committing[name]) * 1000, 3) for name in names)
        super().add(names)

    async def commit(
        self, connection: Connection, write: Callable[[Connection], Awaitable[Iterable[Hashable]]]
    ) -> None:
        """Writes an order and messages, whose names are returned, and commits."""
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(ORDER)
        names = await write(connection)
        self._committing.update(dict.fromkeys(names, perf_counter()))
        await transaction.commit()


async def flood(
    connections: list[Connection], seconds: float, transaction: Callable[[Connection], Awaitable[int]]
) -> tuple[float, int]:
    """Repeats a transaction on each connection for so long; returns messages/s, and messages in all.

    The first on each connection prepares its statements, and has no part in the rate.
    """
    first = sum([await transaction(connection) for connection in connections])
    started = perf_counter()

    async def work(connection: Connection) -> int:
        count = 0
        while perf_counter() < started + seconds:
            count += await transaction(connection)
        return count

    count = sum(await asyncio.gather(*map(work, connections)))
    return count / (perf_counter() - started), first + count


async def timetable(
    dsn: str, per_second: float, seconds: float, transaction: Callable[[Connection], Awaitable[None]]
) -> None:
    """Begins so many transactions a second, evenly spread, or as many as it can."""
    async with connected(dsn, _WRITERS) as connections:
        started = perf_counter()

        async def work(number: int) -> None:
            for turn in range(number, int(per_second * seconds), _WRITERS):
                await asyncio.sleep(started + turn / per_second - perf_counter())  # the timetable
                await transaction(connections[number])

        await asyncio.gather(*map(work, range(_WRITERS)))
