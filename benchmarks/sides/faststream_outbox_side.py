"""faststream-outbox: its broker on SQLAlchemy and asyncpg, with a subscriber that does nothing."""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from faststream_outbox import (  # type: ignore[import-not-found] # it is in an environment of its own
    OutboxBroker,
    make_outbox_table,
    outbox_autovacuum_ddl,
)
from faststream_outbox.annotations import OutboxMessage  # type: ignore[import-not-found] # as above
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from benchmarks.sides import _peer, _work
from benchmarks.sides._serve import serve

# `publish` gives each row a correlation id, and bytes have no content type.
FILL = """
    INSERT INTO outbox (queue, payload, headers)
    SELECT 'orders', $2, jsonb_build_object('correlation_id', gen_random_uuid()) FROM generate_series(1, $1::integer)"""
WORKERS = 2
SLOW_WORKERS = 20
NO_KEY = "it has no key, and no order"


class FaststreamOutbox:
    """The broker, and a subscriber without another broker behind it."""

    name = "faststream-outbox"
    version = version("faststream-outbox")
    settings: Mapping[str, str] = {
        "default": "as it is but for `fetch_batch_size`: one worker, one DELETE for each message, types applied",
        "fast": (
            "`terminal_flush_batch_size=fetch_batch_size`, as its page on performance advises; two workers, and 20 for"
            " a slow destination; `apply_types=False` and a decoder that leaves the bytes as they are; uvloop"
        ),
    }
    uvloop: Collection[str] = ("fast",)

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._metadata = MetaData()
        self._table = make_outbox_table(self._metadata)
        # One for all calls, each in an event loop of its own: it keeps what SQLAlchemy compiled.
        self._engine = create_async_engine(dsn.replace("postgresql://", "postgresql+asyncpg://"), pool_size=64)
        self.count = 0

    async def prepare(self) -> None:
        """Creates the tables, with the autovacuum that its documentation recommends; all variants have it."""
        async with self._opened(1) as (connection,), connection.begin():
            await connection.exec_driver_sql(_work.ORDERS)
            await connection.run_sync(self._metadata.create_all)
            await connection.exec_driver_sql(outbox_autovacuum_ddl("outbox", vacuum_cost_delay=0))
        await _peer.warm(self)

    async def fill(self, messages: int, *, keys: int, size: int) -> None:
        """Makes the backlog."""
        if keys:
            raise NotImplementedError(NO_KEY)
        async with _work.connected(self._dsn, 1) as (connection,):
            await connection.execute("TRUNCATE outbox, orders")
            await connection.execute(FILL, messages, _work.body(size))
            await connection.execute("VACUUM (ANALYZE) outbox")

    async def write(self, *, seconds: float, per_transaction: int, connections: int, size: int, variant: str) -> float:
        """Writes by `publish`, or by `publish_batch` if there are several; the bytes are ready."""
        content, broker = _work.body(size), self._broker(variant)

        async def transaction(connection: Any) -> int:
            async with connection.begin():
                await connection.exec_driver_sql(_work.ORDER)
                if per_transaction == 1:
                    await broker.publish(content, queue="orders", session=connection)
                else:
                    await broker.publish_batch(*[content] * per_transaction, queue="orders", session=connection)
            return per_transaction

        async with self._opened(connections) as opened:
            any_kind: list[Any] = opened
            figure, self.count = await _work.flood(any_kind, seconds, transaction)
        return figure

    async def drain(
        self, *, seconds: float, messages: int, batch: int, variant: str, pause: float = 0.0, order: bool = False
    ) -> float:
        """Drains with one subscriber."""
        if order:
            raise NotImplementedError(NO_KEY)
        tally, broker = _work.Tally(messages), self._broker(variant)
        _subscribe(broker, tally, variant, pause=pause, fetch_batch_size=batch)
        async with self._opened(_workers(variant, pause) + 1) as opened:
            await _close(opened)
            figure = await _running(broker).drain(tally, seconds)
        self.count = tally.different()
        return figure

    async def latency(self, *, per_second: int, seconds: float, variant: str, per_transaction: int = 1) -> list[float]:
        """Measures it by LISTEN, which it does by itself."""
        await self.fill(0, keys=0, size=300)
        clock, content, broker = _peer.Stopwatch(int(per_second * seconds)), _work.body(300), self._broker(variant)
        _subscribe(broker, clock, variant)

        async def transaction(_: Any) -> None:
            async with self._engine.begin() as connection:
                await connection.exec_driver_sql(_work.ORDER)
                clock.started(
                    [await broker.publish(content, queue="orders", session=connection) for _ in range(per_transaction)]
                )

        async with self._opened(8) as opened:
            await _close(opened)
            writing = _work.timetable(self._dsn, per_second / per_transaction, seconds, transaction)
            figures = await _running(broker).follow(clock, seconds, writing)
        self.count = clock.different()
        return figures

    async def rows(self) -> dict[str, int]:
        """Counts what waits: what is delivered is deleted."""
        async with _work.connected(self._dsn, 1) as (connection,):
            return {"pending": await connection.fetchval("SELECT count(*) FROM outbox"), "settled": 0}

    @asynccontextmanager
    async def _opened(self, count: int) -> AsyncIterator[list[AsyncConnection]]:
        """Opens connections, which go to the pool when they are closed; the pool itself is emptied in the end."""
        opened = [await self._engine.connect() for _ in range(count)]
        try:
            yield opened
        finally:
            await _close(opened)
            await self._engine.dispose()

    def _broker(self, variant: str) -> Any:
        return OutboxBroker(self._engine, outbox_table=self._table, apply_types=variant == "default")


async def _close(connections: list[AsyncConnection]) -> None:
    for connection in connections:
        await connection.close()


def _subscribe(
    broker: Any, tally: _work.Tally, variant: str, *, pause: float = 0.0, fetch_batch_size: int = 10
) -> None:
    async def accept(message: Any) -> None:
        if pause:
            await asyncio.sleep(pause)  # the destination's time
        tally.add((message.raw_message.id,))

    if variant == "default":

        async def handle(body: dict[str, Any], message: OutboxMessage) -> None:
            del body
            await accept(message)

        broker.subscriber("orders", fetch_batch_size=fetch_batch_size)(handle)
        return
    broker.subscriber(
        "orders",
        fetch_batch_size=fetch_batch_size,
        terminal_flush_batch_size=fetch_batch_size,
        max_workers=_workers(variant, pause),
        decoder=_as_it_is,
    )(accept)


def _workers(variant: str, pause: float) -> int:
    if variant == "default":
        return 1
    return SLOW_WORKERS if pause else WORKERS


async def _as_it_is(message: Any) -> Any:
    """Decodes nothing: what relays hands the bytes on."""
    return message


def _running(broker: Any) -> _peer.Running:
    stopping = asyncio.Event()

    async def run() -> None:
        await broker.start()
        await stopping.wait()
        await broker.stop()

    return _peer.Running(run(), stopping.set)


if __name__ == "__main__":
    _peer.quiet()
    serve(FaststreamOutbox)
