"""procrastinate: its connector on psycopg, and its `Worker` with a task that does nothing: a job is a message."""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from typing import Any

import procrastinate  # type: ignore[import-not-found] # it is in an environment of its own
import psycopg
from procrastinate.worker import Worker  # type: ignore[import-not-found] # as above
from psycopg_pool import AsyncConnectionPool  # type: ignore[import-not-found] # as above

from benchmarks.sides import _peer, _work
from benchmarks.sides._serve import serve

# Its triggers write an event for each job, and notify. The defaults of the columns are those of `defer`.
FILL = """
    INSERT INTO procrastinate_jobs (queue_name, task_name, priority, lock, args)
    SELECT 'default', 'orders', 0, 'key-' || n % NULLIF($2::integer, 0), $3::text::jsonb
    FROM generate_series(1, $1::integer) AS n"""
ROWS = """
    SELECT count(*) FILTER (WHERE status IN ('todo', 'doing')), count(*) FILTER (WHERE status = 'succeeded')
    FROM procrastinate_jobs"""
TABLES = "procrastinate_jobs, procrastinate_events, procrastinate_workers, procrastinate_periodic_defers, orders"
NOTIFY = "procrastinate_jobs_notify_queue_job_inserted_v1"
MOST = 8
POOL = 20


class Procrastinate:
    """Its deferrer and its worker."""

    name = "procrastinate"
    version = version("procrastinate")
    settings: Mapping[str, str] = {
        "default": "as it is, but `concurrency` is the size of the batch: it fetches jobs one by one and keeps them",
        "fast": (
            f"`delete_jobs='always'`; up to {MOST} workers in the process that share the concurrency, since each"
            " fetches one job at a time; an open pool passed to `open_async`, with autocommit and without its check of"
            " a connection at each use; uvloop"
        ),
    }
    uvloop: Collection[str] = ("fast",)

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.count = 0

    async def prepare(self) -> None:
        """Creates the tables."""
        async with _work.connected(self._dsn, 1) as (connection,):
            await connection.execute(_work.ORDERS)
        async with self._app("default") as app:
            await app.schema_manager.apply_schema_async()
        await _peer.warm(self)

    async def fill(self, messages: int, *, keys: int, size: int) -> None:
        """Makes the backlog; nobody listens, so nobody is notified."""
        async with _work.connected(self._dsn, 1) as (connection,):
            await connection.execute(f"TRUNCATE {TABLES}")
            async with connection.transaction():
                await connection.execute(f"ALTER TABLE procrastinate_jobs DISABLE TRIGGER {NOTIFY}")
                await connection.execute(FILL, messages, keys, _work.body(size).decode())
                await connection.execute(f"ALTER TABLE procrastinate_jobs ENABLE TRIGGER {NOTIFY}")
            await connection.execute("VACUUM (ANALYZE) procrastinate_jobs, procrastinate_events")

    async def write(self, *, seconds: float, per_transaction: int, connections: int, size: int, variant: str) -> float:
        """Writes on a connection of the caller, by one `batch_defer_async` of all messages of a transaction."""
        content = [_work.payload(size)] * per_transaction
        async with self._app(variant) as app:
            task = _task(app, _work.Tally())

            async def transaction(connection: Any) -> int:
                async with connection.transaction():
                    await connection.execute(_work.ORDER)
                    await task.configure(connection=connection).batch_defer_async(*content)
                return per_transaction

            opened: list[Any] = [await self._connect() for _ in range(connections)]
            try:
                figure, self.count = await _work.flood(opened, seconds, transaction)
            finally:
                for connection in opened:
                    await connection.close()
        return figure

    async def drain(
        self, *, seconds: float, messages: int, batch: int, variant: str, pause: float = 0.0, order: bool = False
    ) -> float:
        """Drains with one worker, or with several; the locks of jobs that have one are always kept."""
        del order
        tally = _work.Tally(messages)
        async with self._app(variant) as app:
            _task(app, tally, pause)
            figure = await _running(_workers(app, variant, batch)).drain(tally, seconds)
        self.count = tally.different()
        return figure

    async def latency(self, *, per_second: int, seconds: float, variant: str, per_transaction: int = 1) -> list[float]:
        """Measures it by LISTEN, which it does by itself."""
        await self.fill(0, keys=0, size=300)
        clock, content = _peer.Stopwatch(int(per_second * seconds)), [_work.payload(300)] * per_transaction
        async with self._app(variant) as app, AsyncExitStack() as stack:
            task = _task(app, clock)
            own: dict[Any, Any] = {}

            async def transaction(key: Any) -> None:
                if key not in own:
                    own[key] = await stack.enter_async_context(await self._connect())
                async with own[key].transaction():
                    await own[key].execute(_work.ORDER)
                    clock.started(await task.configure(connection=own[key]).batch_defer_async(*content))

            writing = _work.timetable(self._dsn, per_second / per_transaction, seconds, transaction)
            figures = await _running(_workers(app, variant, 10)).follow(clock, seconds, writing)
        self.count = clock.different()
        return figures

    async def rows(self) -> dict[str, int]:
        """Counts what waits or is being done, and what is marked as succeeded."""
        async with _work.connected(self._dsn, 1) as (connection,):
            (row,) = await connection.fetch(ROWS)
        return {"pending": row[0], "settled": row[1]}

    async def _connect(self) -> Any:
        return await psycopg.AsyncConnection.connect(self._dsn, autocommit=True)

    @asynccontextmanager
    async def _app(self, variant: str) -> AsyncIterator[Any]:
        app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=self._dsn))
        if variant == "default":
            async with app.open_async():
                yield app
            return
        pool = AsyncConnectionPool(self._dsn, min_size=POOL, max_size=POOL, configure=_autocommit, open=False)
        async with pool:
            await pool.wait()
            async with app.open_async(pool):
                yield app


async def _autocommit(connection: Any) -> None:
    await connection.set_autocommit(True)


def _task(app: Any, tally: _work.Tally, pause: float = 0.0) -> Any:
    async def work(context: Any, **content: str) -> None:
        del content
        if pause:
            await asyncio.sleep(pause)  # the destination's time
        tally.add((context.job.id,))

    return app.task(name="orders", pass_context=True)(work)


def _workers(app: Any, variant: str, concurrency: int) -> list[Any]:
    common: dict[str, Any] = {"app": app, "install_signal_handlers": False}
    if variant == "default":
        return [Worker(concurrency=concurrency, **common)]
    workers = min(concurrency, MOST)
    return [Worker(concurrency=-(-concurrency // workers), delete_jobs="always", **common) for _ in range(workers)]


def _running(workers: list[Any]) -> _peer.Running:
    async def run() -> None:
        await asyncio.gather(*(worker.run() for worker in workers))

    def stop() -> None:
        for worker in workers:
            worker.stop()

    return _peer.Running(run(), stop)


if __name__ == "__main__":
    _peer.quiet()
    serve(Procrastinate)
