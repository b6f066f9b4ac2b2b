"""txoutbox: its `PostgresStorage` on asyncpg, and its `Relay` with a function that does nothing as the publisher."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import asyncpg
from txoutbox import Relay, RelayConfig  # type: ignore[import-not-found] # it is in an environment of its own
from txoutbox.adapters.postgres import PostgresStorage  # type: ignore[import-not-found] # as above

from benchmarks.sides import _peer, _work
from benchmarks.sides._serve import serve

if TYPE_CHECKING:
    from benchmarks.sides._work import Connection

# A claim updates a row and an ack the same row again. On pages that are full each of it writes new entries into all
# three indexes, on pages with room none. `fill` does not know the variant, so the default has this advantage as well.
ROOM = "ALTER TABLE outbox SET (fillfactor = 50)"
# `insert` leaves the other columns to their defaults.
FILL = """
    INSERT INTO outbox (topic, key, payload, headers)
    SELECT 'orders', 'key-' || n % NULLIF($2::integer, 0), $3, '{}' FROM generate_series(1, $1::integer) AS n"""
ROWS = "SELECT count(*) FILTER (WHERE status = 'pending'), count(*) FILTER (WHERE status = 'done') FROM outbox"
# So many relays in the process are the fastest: for batches up to 10, whose commits then share a flush, and above.
SMALL, LARGE = 8, 4
NO_TRIGGER = "DROP TRIGGER IF EXISTS outbox_notify ON outbox"


class Txoutbox:
    """The storage and the relay of the package."""

    name = "txoutbox"
    version = version("txoutbox")
    settings: Mapping[str, str] = {
        "default": (
            "`RelayConfig()` but for `batch_size`: 10 at once, rows marked as done, order by key, polling; the table"
            " has fill factor 50 in all variants"
        ),
        "fast": (
            "`delete_on_ack=True`; `strict_ordering=False` unless an order is asked for, as its README advises;"
            " `concurrency=batch_size`; `publish_timeout=None`, since a client has timeouts of its own; several relays"
            f" in the process for a drain, {SMALL} for batches up to 10 and {LARGE} above; `relay.wake()` after a"
            " commit; a pool that resets nothing; uvloop"
        ),
        "notify": "as fast, but woken by the trigger and LISTEN of `notify_channel`, for which the writer pays",
    }
    uvloop: Collection[str] = ("fast", "notify")

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.count = 0

    async def prepare(self) -> None:
        """Creates the tables."""
        async with _work.connected(self._dsn, 1) as (connection,):
            await connection.execute(_work.ORDERS)
            await connection.execute(PostgresStorage(None).schema_sql())
            await connection.execute(ROOM)
        await _peer.warm(self)

    async def fill(self, messages: int, *, keys: int, size: int) -> None:
        """Makes the backlog."""
        async with _work.connected(self._dsn, 1) as (connection,):
            await connection.execute(NO_TRIGGER)
            await connection.execute("TRUNCATE outbox, orders")
            await connection.execute(FILL, messages, keys, _work.body(size))
            await connection.execute("VACUUM (ANALYZE) outbox")

    async def write(self, *, seconds: float, per_transaction: int, connections: int, size: int, variant: str) -> float:
        """Writes by `insert`, one message after the other, for it has nothing that takes several; bytes are ready."""
        content = _work.body(size)
        async with self._storage(variant, order=False) as storage:

            async def transaction(connection: Connection) -> int:
                async with connection.transaction():
                    await connection.execute(_work.ORDER)
                    for _ in range(per_transaction):
                        await storage.insert(connection, "orders", content)
                return per_transaction

            async with _work.connected(self._dsn, connections) as opened:
                figure, self.count = await _work.flood(opened, seconds, transaction)
        return figure

    async def drain(
        self, *, seconds: float, messages: int, batch: int, variant: str, pause: float = 0.0, order: bool = False
    ) -> float:
        """Drains with one relay, or with several."""
        tally = _work.Tally(messages)

        async def publish(message: Any) -> None:
            if pause:
                await asyncio.sleep(pause)  # the destination's time
            tally.add((message.id,))

        async with self._storage(variant, order=order) as storage:
            number = 1 if variant == "default" else SMALL if batch <= 10 else LARGE  # noqa: PLR2004 - between the cells
            relays = _relays(storage, publish, variant, batch_size=batch, number=number)
            figure = await _running(relays).drain(tally, seconds)
        self.count = tally.different()
        return figure

    async def latency(self, *, per_second: int, seconds: float, variant: str, per_transaction: int = 1) -> list[float]:
        """Measures it by polling, by `wake` after the commit, or by LISTEN."""
        await self.fill(0, keys=0, size=300)
        clock, content = _work.Clock(int(per_second * seconds)), _work.body(300)

        async def publish(message: Any) -> None:
            clock.add((message.id,))

        async with self._storage(variant, order=False) as storage:
            relays = _relays(storage, publish, variant, number=1)

            async def insert(connection: Connection) -> Iterable[int]:
                return [await storage.insert(connection, "orders", content) for _ in range(per_transaction)]

            async def transaction(connection: Connection) -> None:
                await clock.commit(connection, insert)
                if variant == "fast":
                    _wake(relays)

            if variant == "notify":
                await storage.listen(lambda: _wake(relays))
            writing = _work.timetable(self._dsn, per_second / per_transaction, seconds, transaction)
            figures = await _running(relays).follow(clock, seconds, writing)
        self.count = clock.different()
        return figures

    async def rows(self) -> dict[str, int]:
        """Counts what waits and what is marked as done."""
        async with _work.connected(self._dsn, 1) as (connection,):
            (row,) = await connection.fetch(ROWS)
        return {"pending": row[0], "settled": row[1]}

    @asynccontextmanager
    async def _storage(self, variant: str, *, order: bool) -> AsyncIterator[Any]:
        default = variant == "default"
        reset = None if default else _keep
        async with asyncpg.create_pool(self._dsn, min_size=SMALL, max_size=SMALL, reset=reset) as pool:
            storage = PostgresStorage(
                pool,
                strict_ordering=default or order,
                delete_on_ack=not default,
                notify_channel="outbox" if variant == "notify" else None,
            )
            await (storage.create_schema() if variant == "notify" else pool.execute(NO_TRIGGER))
            yield storage
            if variant == "notify":
                pool.terminate()  # or closing it waits for the connection that listens


async def _keep(connection: Connection) -> None:
    """Leaves a connection as it is: nobody else uses this pool, and the relay sets nothing in the session."""


def _relays(storage: Any, publish: Any, variant: str, *, number: int, batch_size: int = 50) -> list[Any]:
    options = {} if variant == "default" else {"concurrency": batch_size, "publish_timeout": None}
    config = RelayConfig(batch_size=batch_size, **options)
    return [Relay(storage, publish, config=config) for _ in range(number)]


def _running(relays: list[Any]) -> _peer.Running:
    async def run() -> None:
        await asyncio.gather(*(relay.run() for relay in relays))

    def stop() -> None:
        for relay in relays:
            relay.stop()

    return _peer.Running(run(), stop)


def _wake(relays: list[Any]) -> None:
    for relay in relays:
        relay.wake()


if __name__ == "__main__":
    _peer.quiet()
    serve(Txoutbox)
