"""Measures this library against the same work written by hand, in one run: `make bench`.

The machine may be shared and noisy, so only ratios mean anything: every figure is measured in rounds, floor and
library in turn (A B A B), and the ratio is that of the medians. The server is the embedded one, with its durable
settings; the destination accepts at once and does nothing.
"""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any
from uuid import uuid4

import asyncpg
from rich.console import Console
from rich.table import Table

from outbox import CommitStrategy, Message, Outbox, OutboxDispatcher, Relay, embedded

_BODY = b'{"text":"' + b"x" * 290 + b'"}'
_PAYLOAD = {"text": "x" * 290}
_COLUMNS = "INSERT INTO outbox (id, topic, key, headers, payload)"
_ONE = f"{_COLUMNS} VALUES ($1, $2, $3, $4, $5)"
_FILL = """
    INSERT INTO outbox (id, topic, key, headers, payload)
    SELECT gen_random_uuid(), 'orders', (n % 1000)::text, '{}', $2 FROM generate_series(1, $1) AS n"""
_TAKE = """
    SELECT position, id, topic, key, headers, payload FROM outbox
    ORDER BY position LIMIT $1 FOR UPDATE SKIP LOCKED"""
_DROP = "DELETE FROM outbox WHERE position = ANY($1::bigint[])"

Work = Callable[[], Awaitable[float]]
"""Does its work once and returns its figure."""


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    name: str
    unit: str
    floor_name: str
    floor: float
    ours: float
    more_is_better: bool = True

    @property
    def ratio(self) -> float:
        """How well the library does, the floor being 1: more is better."""
        return self.ours / self.floor if self.more_is_better else self.floor / self.ours


class Counting:
    """A destination that does nothing but to count."""

    def __init__(self) -> None:
        self.count = 0
        self._wanted = 0
        self._reached = asyncio.Event()

    async def dispatch(self, *messages: Message) -> None:
        """Accepts."""
        self.count += len(messages)
        if self.count >= self._wanted:
            self._reached.set()

    async def reaches(self, count: int) -> None:
        """Waits until so many were accepted."""
        self._wanted = count
        self._reached.clear()
        if self.count < count:
            await self._reached.wait()


class Bench:
    """The measurements, on one server."""

    def __init__(self, pool: asyncpg.Pool[Any], *, rounds: int, messages: int) -> None:
        self._pool = pool
        self._rounds = rounds
        self._messages = messages
        self._outbox = Outbox()

    async def compare(self, floor: Work, ours: Work) -> tuple[float, float]:
        """Returns the medians of both, measured in turn; the first round only warms up."""
        figures: tuple[list[float], list[float]] = [], []
        for round_number in range(self._rounds + 1):
            for kind, work in enumerate((floor, ours)):
                figure = await work()
                if round_number:
                    figures[kind].append(figure)
        return median(figures[0]), median(figures[1])

    async def write(self, count: int) -> Result:
        """Messages written in one business transaction, by hand and by a dispatcher."""
        transactions = max(5, 400 // count)
        bodies = [_BODY] * count

        async def by_hand(connection: asyncpg.Connection[Any]) -> None:
            rows = [(uuid4(), "orders", "key", "{}", body) for body in bodies]
            if count == 1:
                await connection.execute(_ONE, *rows[0])
            else:
                await connection.execute(_values(count), *[value for row in rows for value in row])

        async def by_dispatcher(connection: asyncpg.Connection[Any]) -> None:
            messages = [Message(_PAYLOAD, topic="orders", key="key") for _ in bodies]
            await OutboxDispatcher(connection, self._outbox).dispatch(*messages)

        async def measure(dispatch: Callable[[Any], Awaitable[None]]) -> float:
            async with self._pool.acquire() as connection:
                started = perf_counter()
                for _ in range(transactions):
                    async with connection.transaction():
                        await connection.execute("INSERT INTO orders DEFAULT VALUES")
                        await dispatch(connection)
                figure = transactions * count / (perf_counter() - started)
            await self._pool.execute("TRUNCATE outbox")
            return figure

        floor, ours = await self.compare(lambda: measure(by_hand), lambda: measure(by_dispatcher))
        return Result(f"write {count} in a transaction", "messages/s", "the same INSERT by hand", floor, ours)

    async def drain(self, batch_size: int, **settings: Any) -> Result:
        """A backlog drained, by the loop one would write by hand and by a relay."""
        messages = min(self._messages, 1_000 * batch_size)  # by hand each transaction waits for the disk
        floor, ours = await self.compare(
            lambda: self._by_hand(batch_size, messages),
            lambda: self._by_relay(messages, batch_size=batch_size, **settings),
        )
        marked = ", marked" if settings else ""
        name = f"drain, batch {batch_size}{marked}"
        return Result(name, "messages/s", "SELECT … SKIP LOCKED, DELETE in one transaction", floor, ours)

    async def old_snapshot(self) -> Result:
        """The relay alone, and the relay while an old snapshot keeps every dead row from vacuum."""
        async with self._pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            await connection.fetchval("SELECT count(*) FROM outbox")
            first = await self._by_relay()
            for _ in range(4):
                await self._by_relay()
            last = median([await self._by_relay() for _ in range(3)])
        dead = 5 * self._messages
        return Result(f"drain with {dead:,} dead rows held", "messages/s", "the first of them", first, last)

    async def waiting(self) -> Result:
        """The relay alone, and the relay beside messages that wait for their time."""
        floor = median([await self._by_relay() for _ in range(self._rounds)])
        fill = _FILL.replace("INTO outbox (", "INTO outbox_waiting (due_at, ").replace(
            "SELECT", "SELECT $3::timestamptz,"
        )
        await self._pool.execute(fill, 100_000, _BODY, datetime.now(UTC) + timedelta(hours=1))
        ours = median([await self._by_relay() for _ in range(self._rounds)])
        await self._pool.execute("TRUNCATE outbox_waiting")
        return Result("drain beside 100,000 that wait", "messages/s", "without them", floor, ours)

    async def latency(self, per_second: int, seconds: float) -> list[Result]:
        """From before the commit to the destination, by polling alone and with the wake-up of the same process."""
        elsewhere = Outbox()  # whose writers wake nobody
        polled = await self._latencies(elsewhere, per_second, seconds)
        woken = await self._latencies(self._outbox, per_second, seconds)
        return [
            Result(
                f"latency at {per_second}/s, {name}",
                "ms",
                "polling each 100 ms at most",
                slow,
                fast,
                more_is_better=False,
            )
            for name, slow, fast in (
                ("median", median(polled), median(woken)),
                ("99th percentile", quantiles(polled, n=100)[98], quantiles(woken, n=100)[98]),
            )
        ]

    async def _latencies(self, outbox: Outbox, per_second: int, seconds: float) -> list[float]:
        latencies: list[float] = []

        class Clock(Counting):
            async def dispatch(self, *messages: Message) -> None:
                now = perf_counter()
                latencies.extend((now - message.payload) * 1000 for message in messages)
                await super().dispatch(*messages)

        destination, count = Clock(), int(per_second * seconds)
        async with _running(Relay(self._outbox, self._pool, destination)), self._pool.acquire() as connection:
            started = perf_counter()
            for number in range(count):
                await asyncio.sleep(started + number / per_second - perf_counter())
                async with connection.transaction():
                    await OutboxDispatcher(connection, outbox).dispatch(Message(perf_counter(), topic="orders"))
            await destination.reaches(count)
        return latencies

    async def _by_hand(self, batch_size: int, messages: int) -> float:
        await self._fill(messages)
        drained = 0
        async with self._pool.acquire() as connection:
            started = perf_counter()
            while drained < messages:
                async with connection.transaction():
                    rows = await connection.fetch(_TAKE, batch_size)
                    drained += len(rows)
                    await connection.execute(_DROP, [row["position"] for row in rows])
            return messages / (perf_counter() - started)

    async def _by_relay(self, messages: int | None = None, **settings: Any) -> float:
        messages = messages or self._messages
        await self._fill(messages)
        destination = Counting()
        started = perf_counter()
        async with _running(Relay(self._outbox, self._pool, destination, **settings)):
            await destination.reaches(messages)
        # Only now is everything settled: stopping is a part of the work.
        figure = messages / (perf_counter() - started)
        if settings:
            await self._pool.execute("TRUNCATE outbox")
        return figure

    async def _fill(self, messages: int) -> None:
        await self._pool.execute(_FILL, messages, _BODY)


def _values(count: int) -> str:
    rows = ", ".join(f"({', '.join(f'${number * 5 + column}' for column in range(1, 6))})" for number in range(count))
    return f"{_COLUMNS} VALUES {rows}"


@asynccontextmanager
async def _running(relay: Relay) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(relay.run())
        yield
        await relay.stop()


async def main(*, rounds: int, messages: int) -> list[Result]:
    """Runs everything on a server of its own."""
    async with embedded.postgres(shared_buffers="256MB") as dsn, asyncpg.create_pool(dsn, min_size=4) as pool:
        async with pool.acquire() as connection:
            await Outbox().migrate(connection)
        await pool.execute("CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY)")
        bench = Bench(pool, rounds=rounds, messages=messages)
        results = [await bench.write(count) for count in (1, 10, 100)]
        results += [await bench.drain(batch_size) for batch_size in (1, 10, 100, 1000)]
        results.append(await bench.drain(100, commit=CommitStrategy.MARK))
        results += [await bench.old_snapshot(), await bench.waiting()]
        return results + await bench.latency(per_second=200, seconds=4)


def report(results: list[Result]) -> None:
    """Prints the table."""
    table = Table(
        "work", "floor", "floor's figure", "ours", "unit", "ratio", title="Against the floor, medians of one run"
    )
    for result in results:
        floor, ours = (f"{figure:,.{2 if result.unit == 'ms' else 0}f}" for figure in (result.floor, result.ours))
        table.add_row(result.name, result.floor_name, floor, ours, result.unit, f"{result.ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=20_000, help="in a backlog")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    measured = asyncio.run(main(rounds=arguments.rounds, messages=arguments.messages))
    report(measured)
    if arguments.json:
        arguments.json.write_text(
            json.dumps([asdict(result) | {"ratio": result.ratio} for result in measured], indent=2)
        )
