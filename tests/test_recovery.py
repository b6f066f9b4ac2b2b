"""Relays, the server and the network are killed, frozen and cut; nothing is lost, and little is repeated."""

import asyncio
import signal
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import UUID

import anyio
import asyncpg
import pytest

from outbox import Message, Outbox, Relay
from outbox.embedded import Server
from tests.conftest import StartServer
from tests.faults import FaultProxy
from tests.relay_process import deliveries, relays, start_relay, stop_relay, until_count, until_delivered
from tests.traffic import Traffic, assert_all_delivered

pytestmark = pytest.mark.timeout(110)

_BATCH = 20
_HELD = 200 + 100 + 1
"""What one relay holds at most with this batch size: fresh messages, waiting ones, and a suspect of a crash."""


class Recorder:
    """A destination that knows when each message arrived, and can be waited for."""

    def __init__(self) -> None:
        self.arrivals: list[tuple[UUID, float]] = []
        self._arrived = asyncio.Condition()

    async def dispatch(self, *messages: Message) -> None:
        now = monotonic()
        async with self._arrived:
            self.arrivals += [(message.id, now) for message in messages]
            self._arrived.notify_all()

    async def next(self) -> float:
        """Waits for the next arrival and returns its time."""
        seen = len(self.arrivals)
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.arrivals) > seen)
        return self.arrivals[seen][1]

    async def all_of(self, ids: set[UUID]) -> None:
        async with self._arrived:
            await self._arrived.wait_for(lambda: ids <= {name for name, _ in self.arrivals})

    @property
    def ids(self) -> list[UUID]:
        return [name for name, _ in self.arrivals]


@asynccontextmanager
async def relaying(dsn: str, outbox: Outbox, **settings: Any) -> AsyncIterator[Recorder]:
    """A relay in this process, with a recorder at its end, and a pool that outlives the server."""
    recorder = Recorder()
    pool = await asyncpg.create_pool(dsn, min_size=0, max_size=4)
    relay = Relay(outbox, pool, recorder, lease=timedelta(seconds=2), grace=timedelta(seconds=4), **settings)
    try:
        async with anyio.create_task_group() as group:
            await group.start(relay.run)
            yield recorder
            await relay.stop()
    finally:
        pool.terminate()


@pytest.mark.parametrize(("count", "messages"), [(2, 20_000), (4, 60_000)])
async def test_several_relays_deliver_each_committed_message_once_and_no_rolled_back_one(
    dsn: str, outbox: Outbox, tmp_path: Path, count: int, messages: int
) -> None:
    traffic, path = Traffic(dsn, outbox, writers=8), tmp_path / "delivered"
    await traffic.prepare()
    async with relays(count, dsn, outbox.schema, path):
        await traffic.run(messages)
        committed = await traffic.committed()
        await until_delivered(path, committed)
    delivered = deliveries(path)
    assert not assert_all_delivered(committed, traffic, [one.id for one in delivered])
    assert len({one.pid for one in delivered}) == count, "each relay had its part"


async def test_a_relay_killed_ten_times_loses_nothing_and_repeats_only_what_was_in_flight(
    dsn: str, outbox: Outbox, tmp_path: Path
) -> None:
    traffic, path, enough = Traffic(dsn, outbox, writers=2), tmp_path / "delivered", asyncio.Event()
    await traffic.prepare()
    async with asyncio.TaskGroup() as group:
        group.create_task(traffic.run(until=enough))
        for _ in range(10):
            relay = await start_relay(dsn, outbox.schema, path, lease=1, batch_size=_BATCH)
            await until_count(path, len(deliveries(path)) + 500)
            await stop_relay(relay, signal.SIGKILL)
        enough.set()
    committed = await traffic.committed()
    before_the_last = deliveries(path)
    async with relays(1, dsn, outbox.schema, path, lease=1):
        await until_delivered(path, committed)
    twice = assert_all_delivered(committed, traffic, [one.id for one in deliveries(path)])
    by_relay: defaultdict[int, list[UUID]] = defaultdict(list)
    for one in before_the_last:
        by_relay[one.pid].append(one.id)
    in_flight = {name for delivered in by_relay.values() for name in delivered[-_HELD:]}
    assert twice <= in_flight


async def test_a_frozen_relay_is_taken_for_dead_and_does_no_harm_when_it_wakes(
    dsn: str, outbox: Outbox, tmp_path: Path
) -> None:
    traffic, path = Traffic(dsn, outbox, writers=2), tmp_path / "delivered"
    await traffic.prepare()
    async with relays(2, dsn, outbox.schema, path, lease=1, batch_size=_BATCH) as (frozen, other):
        await traffic.run(2_000)
        frozen.send_signal(signal.SIGSTOP)
        await traffic.run(6_000)
        await until_delivered(path, await traffic.committed())
        frozen.send_signal(signal.SIGCONT)
        await stop_relay(other)
        await traffic.run(8_000)
        committed = await traffic.committed()
        await until_delivered(path, committed)
    delivered = deliveries(path)
    twice = assert_all_delivered(committed, traffic, [one.id for one in delivered])
    assert len(twice) <= _HELD
    assert delivered[-1].pid == frozen.pid, "it works again, under a new name"


async def test_a_server_killed_five_times_loses_nothing_and_the_relay_is_back_within_five_seconds(
    own_server: StartServer,
) -> None:
    server, outbox, enough = await own_server(), Outbox(), asyncio.Event()
    await _migrate(server, outbox)
    traffic = Traffic(server.dsn, outbox)
    await traffic.prepare()
    kills: list[float] = []
    async with relaying(server.dsn, outbox, batch_size=_BATCH) as recorder:
        async with asyncio.TaskGroup() as group:
            group.create_task(traffic.run(until=enough))
            for _ in range(5):
                for _ in range(20):
                    await recorder.next()
                await server.kill()
                kills.append(monotonic())
                await server.start()
                back = monotonic()
                assert await recorder.next() - back < 5
            enough.set()
        committed = await traffic.committed()
        await recorder.all_of(committed)
    twice = assert_all_delivered(committed, traffic, recorder.ids)
    # A settle is not flushed at once: what was delivered in the last moments before a kill may come again.
    first = dict(reversed(recorder.arrivals))
    assert all(any(-2 < kill - first[name] < 2 for kill in kills) for name in twice)


async def test_cut_and_silenced_connections_lose_nothing(dsn: str, outbox: Outbox, proxy: FaultProxy) -> None:
    traffic, enough = Traffic(dsn, outbox), asyncio.Event()
    await traffic.prepare()
    async with relaying(proxy.dsn(dsn), outbox, batch_size=_BATCH) as recorder:
        async with asyncio.TaskGroup() as group:
            group.create_task(traffic.run(until=enough))
            for _ in range(5):
                await recorder.next()
                proxy.reset()
                await recorder.next()
            for _ in range(2):
                proxy.black_hole()
                await traffic.attempts(500)
                proxy.heal()
                back = monotonic()
                assert await recorder.next() - back < 5
            enough.set()
        committed = await traffic.committed()
        await recorder.all_of(committed)
    assert_all_delivered(committed, traffic, recorder.ids)


async def test_a_relay_stops_within_its_grace_period_in_a_black_hole(
    dsn: str, outbox: Outbox, proxy: FaultProxy
) -> None:
    traffic = Traffic(dsn, outbox)
    await traffic.prepare()
    async with relaying(proxy.dsn(dsn), outbox) as recorder:
        await traffic.run(200)
        await recorder.all_of(await traffic.committed())
        proxy.black_hole()
        began = monotonic()
    assert monotonic() - began < 4 + 1, "the grace period, and a moment for the test itself"


async def _migrate(server: Server, outbox: Outbox) -> None:
    connection = await asyncpg.connect(server.dsn)
    await outbox.migrate(connection)
    await connection.close()
