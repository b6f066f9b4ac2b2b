"""omni-box: its repository on SQLAlchemy and asyncpg, and its `OutboxPublisher` with a publisher that does nothing."""

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import Any
from uuid import uuid4

import orjson
import structlog
from omni_box import (  # type: ignore[import-not-found] # it is in an environment of its own
    EventProcessorBuilder,
    OmniBoxDomainService,
    OutboxPublisher,
)
from omni_box.core.pipeline.steps import PublisherExecutionStep  # type: ignore[import-not-found] # as above
from omni_box.infra.storage.postgres import (  # type: ignore[import-not-found] # as above
    OutboxEventDBBase,
    PostgresOutboxRepository,
)
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase

from benchmarks.sides import _peer, _work
from benchmarks.sides._serve import serve

# A message has a key here, always. Without any wish for keys each message has its own, such as the id of its order,
# for of a key only one message at a time is handed out. Each has a time of its own, since the claim sorts by it. JSON
# null is what the repository writes for no headers.
FILL = """
    INSERT INTO outbox_events (
        id, event_type, payload, headers, status, attempts_made, max_attempts, created_at, scheduled_at,
        aggregate_type, aggregate_id, topic, partition_key
    )
    SELECT
        gen_random_uuid(), 'order.placed', $3::text::jsonb, 'null', 'pending', 0, 6, recorded_at, recorded_at,
        'order', gen_random_uuid(), 'orders',
        CASE $2::integer WHEN 0 THEN gen_random_uuid()::text ELSE 'key-' || n % $2 END
    FROM
        generate_series(1, $1::integer) AS n,
        LATERAL (SELECT now() - ($1 - n) * interval '1 microsecond' AS recorded_at) AS clock"""
ROWS = """
    SELECT count(*) FILTER (WHERE status = 'pending'), count(*) FILTER (WHERE status = 'completed')
    FROM outbox_events"""
ORDER = text(_work.ORDER)
LOOPS = 4
SLOW_LOOPS = 20


class Base(DeclarativeBase):
    """The metadata of the table."""


class Event(Base, OutboxEventDBBase):  # type: ignore[misc] # the package is not in the environment of mypy
    """The table that the package brings, not partitioned."""


class OmniBox:
    """The repository, and the loop of its README around the publisher."""

    name = "omni-box"
    version = version("omni-box")
    settings: Mapping[str, str] = {
        "default": "the loop of its README, but for `batch_size`: a session for each cycle, 1 s of sleep when idle",
        "fast": (
            "the claim without a look at leases that ran out, which nobody leaves in a cycle of one transaction, so"
            " that it need not sort the backlog; four such loops in the process, and 20 for a slow destination; woken"
            " by the writer instead of sleeping; uvloop"
        ),
    }
    uvloop: Collection[str] = ("fast",)

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        # One for all calls, each in an event loop of its own: it keeps what SQLAlchemy compiled.
        self._engine = create_async_engine(
            dsn.replace("postgresql://", "postgresql+asyncpg://"),
            pool_size=64,
            json_serializer=lambda content: orjson.dumps(content).decode(),
            json_deserializer=orjson.loads,
        )
        self.count = 0

    async def prepare(self) -> None:
        """Creates the tables."""
        async with _work.connected(self._dsn, 1) as (connection,):
            await connection.execute(_work.ORDERS)
        async with self._opened(1) as (opened,), opened.begin():
            await opened.run_sync(Base.metadata.create_all)
        await _peer.warm(self)

    async def fill(self, messages: int, *, keys: int, size: int) -> None:
        """Makes the backlog."""
        async with _work.connected(self._dsn, 1) as (connection,):
            await connection.execute("TRUNCATE outbox_events, orders")
            await connection.execute(FILL, messages, keys, _work.body(size).decode())
            await connection.execute("VACUUM (ANALYZE) outbox_events")

    async def write(self, *, seconds: float, per_transaction: int, connections: int, size: int, variant: str) -> float:
        """Writes by `create`, or by `bulk_create` if there are several, of events that the domain service makes."""
        del variant
        content, domain = _work.payload(size), OmniBoxDomainService()

        async def transaction(connection: Any) -> int:
            async with AsyncSession(connection) as session, session.begin():
                await session.execute(ORDER)
                await _write(session, [_event(domain, content) for _ in range(per_transaction)])
            return per_transaction

        async with self._opened(connections) as opened:
            any_kind: list[Any] = opened
            figure, self.count = await _work.flood(any_kind, seconds, transaction)
        return figure

    async def drain(
        self, *, seconds: float, messages: int, batch: int, variant: str, pause: float = 0.0, order: bool = False
    ) -> float:
        """Drains with one loop, or with several; the order of keys is always kept."""
        del order
        tally = _work.Tally(messages)
        relay = _Relay(self._engine, tally, variant, batch=batch, pause=pause)
        async with self._opened(relay.loops) as opened:
            await _close(opened)
            figure = await relay.running().drain(tally, seconds)
        self.count = tally.different()
        return figure

    async def latency(self, *, per_second: int, seconds: float, variant: str, per_transaction: int = 1) -> list[float]:
        """Measures it by polling, or with the writer waking the loops."""
        await self.fill(0, keys=0, size=300)
        clock, domain, content = _peer.Stopwatch(int(per_second * seconds)), OmniBoxDomainService(), _work.payload(300)
        relay = _Relay(self._engine, clock, variant)

        async def transaction(_: Any) -> None:
            events = [_event(domain, content) for _ in range(per_transaction)]
            async with AsyncSession(self._engine) as session, session.begin():
                await session.execute(ORDER)
                await _write(session, events)
                clock.started(event.id for event in events)
            relay.woken.set()

        async with self._opened(8) as opened:
            await _close(opened)
            writing = _work.timetable(self._dsn, per_second / per_transaction, seconds, transaction)
            figures = await relay.running().follow(clock, seconds, writing)
        self.count = clock.different()
        return figures

    async def rows(self) -> dict[str, int]:
        """Counts what waits and what is marked as completed."""
        async with _work.connected(self._dsn, 1) as (connection,):
            (row,) = await connection.fetch(ROWS)
        return {"pending": row[0], "settled": row[1]}

    @asynccontextmanager
    async def _opened(self, count: int) -> AsyncIterator[list[AsyncConnection]]:
        """Opens connections, which go to the pool when they are closed; the pool itself is emptied in the end."""
        opened = [await self._engine.connect() for _ in range(count)]
        try:
            yield opened
        finally:
            await _close(opened)
            await self._engine.dispose()


async def _close(connections: list[AsyncConnection]) -> None:
    for connection in connections:
        await connection.close()


class WithoutLease:
    """Takes rows that nobody holds, without looking for leases that ran out.

    A cycle is one transaction, so nobody leaves a lease behind, and without that look the claim walks an index: with it
    each claim sorts the whole backlog.
    """

    async def fetch(self, repo: Any, batch_size: int, worker_id: str, **filters: Any) -> Any:
        """Claims a batch."""
        return await repo.fetch_and_lock_pending(limit=batch_size, worker_id=worker_id, ttl=None, **filters)


class _Relay:
    """The loop that the README shows: a session and a transaction for each cycle, and a pause when there is nothing."""

    def __init__(
        self, engine: AsyncEngine, tally: _work.Tally, variant: str, *, batch: int = 100, pause: float = 0.0
    ) -> None:
        self.woken = asyncio.Event()
        self._stopping = asyncio.Event()
        self._engine = engine
        self._tally = tally
        self._fast = variant == "fast"
        # A loop publishes its batch one by one, so a slow destination needs more of them.
        self.loops = (SLOW_LOOPS if pause else LOOPS) if self._fast else 1
        self._batch = batch
        self._pause = pause

    def running(self) -> _peer.Running:
        return _peer.Running(self._run(), self._stop)

    async def publish(self, event: Any, repository: Any) -> None:
        """Takes the place of a broker: the pipeline of the package asks no more of it than this."""
        del repository
        if self._pause:
            await asyncio.sleep(self._pause)  # the destination's time
        self._tally.add((event.id,))

    def _stop(self) -> None:
        self._stopping.set()
        self.woken.set()

    async def _run(self) -> None:
        await asyncio.gather(*(self._loop(f"relay-{number}") for number in range(self.loops)))

    async def _loop(self, name: str) -> None:
        while not self._stopping.is_set():
            self.woken.clear()
            async with AsyncSession(self._engine) as session, session.begin():
                result = await self._cycle(
                    PostgresOutboxRepository(session, model_class=Event),
                    worker_id=name,
                    batch_size=self._batch,
                    shutdown_requested_func=self._stopping.is_set,
                )
            if result.commit_failed:
                raise RuntimeError("omni-box could not write what became of a batch")
            if not result.processed_event_ids:
                await self._idle()

    async def _cycle(self, repository: Any, **options: Any) -> Any:
        if not self._fast:
            return await OutboxPublisher(repository, self).publish_batch(**options)
        builder = EventProcessorBuilder(repository).with_fetch_strategy(WithoutLease())
        return await builder.add_step(PublisherExecutionStep(self.publish)).build().process_batch(**options)

    async def _idle(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for((self.woken if self._fast else self._stopping).wait(), 1.0)


async def _write(session: AsyncSession, events: list[Any]) -> None:
    repository = PostgresOutboxRepository(session, model_class=Event)
    await (repository.create(events[0]) if len(events) == 1 else repository.bulk_create(events))


def _event(domain: Any, content: dict[str, str]) -> Any:
    """An event of an order of its own, so with a key of its own."""
    order = uuid4()
    return domain.create_outbox_event(
        aggregate_type="order",
        aggregate_id=order,
        event_type="order.placed",
        topic="orders",
        partition_key=str(order),
        payload=content,
    )


if __name__ == "__main__":
    _peer.quiet()
    # Its logger prints to the terminal at every level unless it is configured.
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING), cache_logger_on_first_use=True
    )
    serve(OmniBox)
