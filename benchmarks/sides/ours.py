"""This library."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import ExitStack, asynccontextmanager
from importlib.metadata import version
from operator import attrgetter
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg

from benchmarks.sides import _work
from benchmarks.sides._serve import serve
from benchmarks.sides._tricks import TRICKS
from benchmarks.sides.by_hand import FILL
from outbox import CommitStrategy, Message, Notifier, Outbox, OutboxDispatcher, Relay

if TYPE_CHECKING:
    from benchmarks.sides._work import Connection

_ID, _POSITION = attrgetter("id"), attrgetter("position")
_TABLES = "outbox, outbox_waiting, outbox_claims, outbox_dead"
_SETTINGS: Mapping[str, dict[str, Any]] = {
    "concurrent": {"concurrency": 24},
    "mark": {"commit": CommitStrategy.MARK},
    "notifier": {"listen": True},
}


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


class Destination:
    """Accepts all that it gets, and has it counted."""

    def __init__(self, tally: _work.Tally, name: attrgetter[Any], pause: float = 0.0, *, decodes: bool = False) -> None:
        self._tally = tally
        self._name = name
        self._pause = pause
        self._decodes = decodes

    async def dispatch(self, *messages: Message) -> None:
        """Sleeps, if it is a slow one, and accepts."""
        if self._pause:
            await asyncio.sleep(self._pause)  # the destination's time
        if self._decodes:
            for message in messages:
                message.payload  # noqa: B018 -- it is decoded when it is asked for
        self._tally.add(map(self._name, messages))


class Ours:
    """A relay, and writers with a dispatcher."""

    name = "outbox"
    version = f"{version('asyncpg-outbox')}, asyncpg {asyncpg.__version__}"
    settings: Mapping[str, str] = {name: trick.instead for name, trick in TRICKS.items()} | {
        "default": "the defaults: four calls of the destination at once; writers of the process wake the relay",
        "uvloop": "the same on uvloop",
        "concurrent": "uvloop, 24 calls of the destination at once: for one that takes its time",
        "mark": "the defaults, what was delivered is marked and kept",
        "notifier": "the defaults, the relay is woken by NOTIFY from a `Notifier`, as one of another process is",
        "polling": "the defaults, nobody wakes the relay: it polls every 100 ms at least",
    }
    uvloop: Collection[str] = ("uvloop", "concurrent")

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.count = 0

    async def prepare(self) -> None:
        """Creates the tables."""
        async with _work.connected(self._dsn, 1) as (connection,):
            await connection.execute(_work.ORDERS)
            await Outbox().migrate(connection)

    async def fill(self, messages: int, *, keys: int, size: int) -> None:
        """Makes the backlog."""
        async with _work.connected(self._dsn, 1) as (connection,):
            await connection.execute(f"TRUNCATE {_TABLES}, orders")
            await connection.execute(FILL, messages, keys, _work.body(size))
            await connection.execute("VACUUM (ANALYZE) outbox")

    async def write(self, *, seconds: float, per_transaction: int, connections: int, size: int, variant: str) -> float:
        """Writes by one `dispatch` in each transaction; no relay is at work."""
        del variant
        async with _work.connected(self._dsn, connections) as opened:
            return await self._flood(opened, seconds, Outbox(), per_transaction, size)

    async def write_beside(self, *, seconds: float, connections: int, variant: str) -> float:
        """Writes one message a transaction while a relay of the same process delivers them.

        "default" wakes the relay in the process, "notifier" by NOTIFY, "polling" not at all.
        """
        async with (
            self._relaying(variant, _work.Tally()) as outbox,
            _work.connected(self._dsn, connections) as opened,
        ):
            return await self._flood(opened, seconds, outbox, 1, 300)

    async def _flood(
        self, opened: list[Connection], seconds: float, outbox: Outbox, per_transaction: int, size: int
    ) -> float:
        payload = _work.payload(size)

        async def transaction(connection: Connection) -> int:
            async with connection.transaction():
                await connection.execute(_work.ORDER)
                messages = [Message(payload, topic="orders", key="key") for _ in range(per_transaction)]
                await OutboxDispatcher(connection, outbox).dispatch(*messages)
            return per_transaction

        figure, self.count = await _work.flood(opened, seconds, transaction)
        return figure

    async def drain(
        self, *, seconds: float, messages: int, batch: int, variant: str, pause: float = 0.0, order: bool = False
    ) -> float:
        """Drains by one relay, in the order of keys if that is asked for."""
        tally = _work.Tally(messages)
        trick, settings = TRICKS.get(variant), _SETTINGS.get(variant, {})
        destination = Destination(tally, _POSITION, pause, decodes=bool(trick and trick.decodes))
        async with _without(variant), asyncpg.create_pool(self._dsn, min_size=2, max_size=3) as pool:
            relay = Relay(Outbox(), pool, destination, batch_size=batch, order="key" if order else "none", **settings)
            before = (await self.rows())["pending"]
            async with _running(relay):
                await tally.reached(seconds)
                count = tally.count
                if messages <= before:  # this relay is alone: what it delivered and has not settled yet does not count
                    count = before - (await self.rows())["pending"]
        self.count = tally.different()
        return tally.rate(count)

    async def latency(self, *, per_second: int, seconds: float, variant: str, per_transaction: int = 1) -> list[float]:
        """Measures it with the wake-up of the variant; "default" wakes the relay in the process."""
        clock = _work.Clock(int(per_second * seconds))
        async with self._relaying(variant, clock) as outbox:

            async def write(connection: Connection) -> list[UUID]:
                payload = _work.payload(300)
                messages = [Message(payload, topic="orders", key="key") for _ in range(per_transaction)]
                await OutboxDispatcher(connection, outbox).dispatch(*messages)
                return [message.id for message in messages]

            rate = per_second / per_transaction
            await _work.timetable(self._dsn, rate, seconds, lambda connection: clock.commit(connection, write))
            await clock.reached(max(seconds, _work.PATIENCE))
        self.count = clock.different()
        return clock.ms

    @asynccontextmanager
    async def _relaying(self, variant: str, tally: _work.Tally) -> AsyncIterator[Outbox]:
        """Runs a relay, and yields the outbox whose writers wake it as the variant says."""
        outbox = Outbox()
        # An object of their own: whoever writes through it does not wake the relay of the process.
        writers = Outbox() if variant in {"notifier", "polling"} else outbox
        async with (
            _without(variant),
            asyncpg.create_pool(self._dsn, min_size=4, max_size=4) as pool,
            _running(Relay(outbox, pool, Destination(tally, _ID), **_SETTINGS.get(variant, {})), ready=True),
            asyncio.TaskGroup() as tasks,
        ):
            notifying = tasks.create_task(Notifier(writers, pool).run()) if variant == "notifier" else None
            yield writers
            if notifying:
                notifying.cancel()

    async def rows(self) -> dict[str, int]:
        """Counts the rows."""
        async with _work.connected(self._dsn, 1) as (connection,):
            counts = await Outbox().counts(connection)
            return {"pending": counts.pending, "settled": counts.dispatched}


@asynccontextmanager
async def _without(variant: str) -> AsyncIterator[None]:
    """Takes a trick away, if the variant is named after one."""
    with ExitStack() as stack:
        for patch in TRICKS[variant].patches() if variant in TRICKS else ():
            stack.enter_context(patch)
        yield


class _Ready(asyncio.Event):
    """Told when the relay begins to claim."""

    def started(self, value: None = None) -> None:
        """Says so."""
        del value
        self.set()


@asynccontextmanager
async def _running(relay: Relay, *, ready: bool = False) -> AsyncIterator[None]:
    """Runs a relay, and stops it at the end; `ready` first waits until it claims."""
    status = _Ready()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(relay.run(task_status=status))
        if ready:
            await status.wait()
        yield
        await relay.stop()


if __name__ == "__main__":
    serve(Ours)
