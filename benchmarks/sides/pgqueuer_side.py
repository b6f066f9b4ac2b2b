"""pgqueuer: its queries on asyncpg, and its `PgQueuer` with an entrypoint that does nothing: a job is a message."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import asyncpg
from pgqueuer import PgQueuer  # type: ignore[import-not-found] # it is in an environment of its own
from pgqueuer.db import AsyncpgDriver, AsyncpgPoolDriver  # type: ignore[import-not-found] # as above
from pgqueuer.queries import Queries  # type: ignore[import-not-found] # as above

from benchmarks.sides import _peer, _work
from benchmarks.sides._serve import serve

if TYPE_CHECKING:
    from benchmarks.sides._work import Connection

# `enqueue` writes a row into the log for each job. The headers of a job without any are JSON null.
FILL = """
    WITH written AS (
        INSERT INTO pgqueuer (priority, entrypoint, payload, headers, status)
        SELECT 0, 'orders', $2, 'null', 'queued' FROM generate_series(1, $1::integer)
        RETURNING id, entrypoint, priority
    )
    INSERT INTO pgqueuer_log (job_id, status, entrypoint, priority)
    SELECT id, 'queued', entrypoint, priority FROM written"""
NO_KEY = "it has no key: `concurrency_limit=1` makes all jobs of an entrypoint go one after the other"
MANAGERS = 2


class PgQueuerSide:
    """Its queries and its manager."""

    name = "pgqueuer"
    version = version("pgqueuer")
    settings: Mapping[str, str] = {
        "default": "as it is but for `batch_size`: one manager on one connection",
        "fast": (
            "a pool, so that it claims while it settles, which resets nothing; two managers in the process for a drain,"
            " as its own benchmark has five; durability `balanced`, as its page on tuning offers: the log is not in the"
            " write-ahead log, the queue is; uvloop"
        ),
    }
    uvloop: Collection[str] = ("fast",)

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.count = 0

    async def prepare(self) -> None:
        """Creates the tables, with the autovacuum and the fill factor that its documentation recommends."""
        async with _work.connected(self._dsn, 1) as (connection,):
            await connection.execute(_work.ORDERS)
            queries = Queries(AsyncpgDriver(connection))
            await queries.install()
            await queries.optimize_autovacuum()
        await _peer.warm(self)

    async def fill(self, messages: int, *, keys: int, size: int) -> None:
        """Makes the backlog."""
        if keys:
            raise NotImplementedError(NO_KEY)
        async with _work.connected(self._dsn, 1) as (connection,):
            await connection.execute("TRUNCATE pgqueuer, pgqueuer_log, pgqueuer_statistics, orders")
            await connection.execute(FILL, messages, _work.body(size))
            await connection.execute("VACUUM (ANALYZE) pgqueuer, pgqueuer_log")

    async def write(self, *, seconds: float, per_transaction: int, connections: int, size: int, variant: str) -> float:
        """Writes by one `enqueue` of all messages of a transaction; the bytes are ready."""
        content = _work.body(size)
        batch = ["orders"] * per_transaction, [content] * per_transaction, [0] * per_transaction

        async with _work.connected(self._dsn, connections) as opened:
            await _durability(opened[0], variant)
            queries = {connection: Queries(AsyncpgDriver(connection)) for connection in opened}

            async def transaction(connection: Connection) -> int:
                async with connection.transaction():
                    await connection.execute(_work.ORDER)
                    await queries[connection].enqueue(*batch)
                return per_transaction

            figure, self.count = await _work.flood(opened, seconds, transaction)
        return figure

    async def drain(
        self, *, seconds: float, messages: int, batch: int, variant: str, pause: float = 0.0, order: bool = False
    ) -> float:
        """Drains with one manager, or with two."""
        if order:
            raise NotImplementedError(NO_KEY)
        tally = _work.Tally(messages)

        async def handle(job: Any) -> None:
            if pause:
                await asyncio.sleep(pause)  # the destination's time
            tally.add((job.id,))

        async with self._drivers(variant, MANAGERS) as drivers:
            figure = await _running(drivers, handle, batch).drain(tally, seconds)
        self.count = tally.different()
        return figure

    async def latency(self, *, per_second: int, seconds: float, variant: str, per_transaction: int = 1) -> list[float]:
        """Measures it by LISTEN, which it does by itself."""
        await self.fill(0, keys=0, size=300)
        clock = _work.Clock(int(per_second * seconds))
        batch = ["orders"] * per_transaction, [_work.body(300)] * per_transaction, [0] * per_transaction

        async def handle(job: Any) -> None:
            clock.add((job.id,))

        async def enqueue(connection: Connection) -> Iterable[int]:
            names: list[int] = await Queries(AsyncpgDriver(connection)).enqueue(*batch)
            return names

        async def transaction(connection: Connection) -> None:
            await clock.commit(connection, enqueue)

        async with self._drivers(variant, 1) as drivers:
            writing = _work.timetable(self._dsn, per_second / per_transaction, seconds, transaction)
            figures = await _running(drivers, handle, 10).follow(clock, seconds, writing)
        self.count = clock.different()
        return figures

    async def rows(self) -> dict[str, int]:
        """Counts what waits, and what the log calls successful: the jobs themselves are deleted."""
        async with _work.connected(self._dsn, 1) as (connection,):
            pending = await connection.fetchval("SELECT count(*) FROM pgqueuer")
            settled = await connection.fetchval("SELECT count(*) FROM pgqueuer_log WHERE status = 'successful'")
        return {"pending": pending, "settled": settled}

    @asynccontextmanager
    async def _drivers(self, variant: str, managers: int) -> AsyncIterator[list[Any]]:
        async with _work.connected(self._dsn, 1) as (connection,):
            await _durability(connection, variant)
            if variant == "default":
                yield [AsyncpgDriver(connection)]
                return
        size = 3 * managers  # one listens, one claims, one settles
        async with asyncpg.create_pool(self._dsn, min_size=size, max_size=size, reset=_keep) as pool:
            yield [AsyncpgPoolDriver(pool) for _ in range(managers)]


async def _keep(connection: Connection) -> None:
    """Leaves a connection as it is: nobody else uses this pool, and the manager sets nothing in the session."""


async def _durability(connection: Connection, variant: str) -> None:
    """Sets what `pgq durability` would: nothing that a message needs is lost with the log."""
    logged = "UNLOGGED" if variant == "fast" else "LOGGED"
    for table in ("pgqueuer_log", "pgqueuer_statistics"):
        await connection.execute(f"ALTER TABLE {table} SET {logged}")


def _running(drivers: list[Any], handle: Any, batch_size: int) -> _peer.Running:
    queuers = [PgQueuer(driver) for driver in drivers]
    for queuer in queuers:
        queuer.entrypoint("orders")(handle)

    async def run() -> None:
        await asyncio.gather(*(queuer.run(batch_size=batch_size) for queuer in queuers))

    def stop() -> None:
        for queuer in queuers:
            queuer.shutdown.set()

    return _peer.Running(run(), stop)


if __name__ == "__main__":
    _peer.quiet()
    serve(PgQueuerSide)
