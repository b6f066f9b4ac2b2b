"""Relays, the server and the network are killed, frozen and cut; nothing is lost, and little is repeated."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

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

from outbox import (
    DatabaseLost,
    DestinationUnavailableError,
    LinearBackOff,
    Message,
    NoWaiting,
    Outbox,
    Relay,
    RelayFenced,
)
from outbox.embedded import Server
from tests.conftest import StartServer
from tests.faults import FaultProxy
from tests.relay_process import deliveries, relays, start_relay, stop_relay, until_count, until_delivered
from tests.traffic import Traffic, assert_all_delivered

pytestmark = pytest.mark.timeout(110)

_BATCH = 20
_HELD = 3 * 200 + 1
"""What one relay holds at most with this batch size: two halves in hand, one that is being settled, and a suspect."""


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


@pytest.mark.parametrize(("count", "messages"), [(2, 10_000), (4, 20_000)])
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


async def test_a_relay_killed_five_times_loses_nothing_and_repeats_only_what_was_in_flight(
    dsn: str, outbox: Outbox, tmp_path: Path
) -> None:
    traffic, path, enough = Traffic(dsn, outbox, writers=2), tmp_path / "delivered", asyncio.Event()
    await traffic.prepare()
    async with asyncio.TaskGroup() as group:
        group.create_task(traffic.run(until=enough))
        for _ in range(5):
            relay = await start_relay(dsn, outbox.schema, path, lease=1, batch_size=_BATCH)
            await until_count(path, len(deliveries(path)) + 200)
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


async def test_a_relay_taken_for_dead_while_it_waits_for_its_destination_does_not_deliver_what_it_lost(
    dsn: str, outbox: Outbox
) -> None:
    down, called, fenced = [True], asyncio.Event(), asyncio.Event()
    late: list[UUID] = []

    class Down:
        async def dispatch(self, *messages: Message) -> None:
            called.set()
            if down:
                raise DestinationUnavailableError("down")
            late.extend(message.id for message in messages)

    def breaker(*_: object) -> timedelta:
        return timedelta(milliseconds=300 if fenced.is_set() else 1500)

    pool = await asyncpg.create_pool(dsn, min_size=0, max_size=3)
    hooks = [lambda event: fenced.set() if isinstance(event, RelayFenced) else None]
    lease = timedelta(seconds=1)
    lost = Relay(outbox, pool, Down(), lease=lease, destination_backoff=breaker, hooks=hooks)
    try:
        async with anyio.create_task_group() as group:
            await group.start(lost.run)
            connection = await asyncpg.connect(dsn)
            message = Message("x", topic="t")
            await outbox.persist(connection, message)
            await called.wait()
            await connection.execute(f"UPDATE {outbox.schema}.outbox_relays SET until = now() - interval '1 h'")  # noqa: S608
            async with relaying(dsn, outbox) as other:
                await other.all_of({message.id})
                await fenced.wait()
                down.clear()
                last = Message("y", topic="t")
                await outbox.persist(connection, last)
                await asyncio.sleep(1.7)  # why a sleep: for as long as the breaker of the other one can stay open
            await lost.stop()
            await connection.close()
    finally:
        pool.terminate()
    assert message.id not in late


async def test_a_connection_that_is_lost_while_the_relay_starts_does_not_end_it(dsn: str, outbox: Outbox) -> None:
    lost, destination, struck = asyncio.Event(), Recorder(), iter([True])

    class Dying(asyncpg.Connection):
        async def fetchval(self, query: str, *args: Any, **options: Any) -> Any:
            if next(struck, False):
                self.terminate()
            return await super().fetchval(query, *args, **options)

    hooks = [lambda event: lost.set() if isinstance(event, DatabaseLost) else None]
    async with asyncpg.create_pool(dsn, min_size=0, max_size=3, connection_class=Dying) as pool:
        relay = Relay(outbox, pool, destination, hooks=hooks)
        async with anyio.create_task_group() as group:
            await group.start(relay.run)
            assert lost.is_set()
            message = Message("x", topic="t")
            async with pool.acquire() as connection:
                await outbox.persist(connection, message)
            await destination.all_of({message.id})
            await relay.stop()


async def test_a_settling_whose_commit_got_no_answer_does_not_touch_the_next_claim(
    dsn: str, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The settling is tried again after half a second, by when the message could have been claimed anew.
    slow = LinearBackOff(initial=timedelta(milliseconds=500), max_tries=-1)
    monkeypatch.setattr("outbox._worker._DATABASE_DOWN", slow)
    cut: list[bool] = []
    settling: set[int] = set()

    class Cutting(asyncpg.Connection):
        async def execute(self, query: str, *args: Any, **options: Any) -> str:
            status: str = await super().execute(query, *args, **options)
            if "SET owner = NULL, due_at" in query:
                settling.add(id(self))
            if query.startswith("COMMIT") and id(self) in settling and not cut:
                cut.append(True)
                self.terminate()
                raise ConnectionResetError("the COMMIT got through, its answer did not")
            return status

    under_way = [0]
    most: list[int] = []
    accepted = asyncio.Event()

    class Destination:
        calls = 0

        async def dispatch(self, *_: Message) -> None:
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("not now")
            under_way[0] += 1
            most.append(under_way[0])
            await asyncio.sleep(1)  # why a sleep: time for a second delivery of the same message to begin
            under_way[0] -= 1
            accepted.set()

    pool = await asyncpg.create_pool(dsn, min_size=0, max_size=4, connection_class=Cutting)
    quick = {"backoff": NoWaiting(max_tries=-1), "poll_interval": timedelta(milliseconds=5)}
    relay = Relay(outbox, pool, Destination(), **quick)  # type: ignore[arg-type]  # settings of several types
    try:
        async with anyio.create_task_group() as group:
            await group.start(relay.run)
            async with pool.acquire() as connection:
                await outbox.persist(connection, Message("x", topic="t"))
            await accepted.wait()
            await relay.stop()
    finally:
        pool.terminate()
    assert cut, "the fault happened"
    assert most == [1]


async def test_what_the_server_forgot_to_be_settled_is_delivered_again(
    own_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, outbox, gate = await own_server(wal_writer_delay="10s"), Outbox(), asyncio.Event()
    await _migrate(server, outbox)
    async with relaying(server.dsn, outbox) as recorder:
        take = recorder.dispatch

        async def gated(*messages: Message) -> None:
            await gate.wait()
            await take(*messages)

        # Holds the destination until the claim is on disk.
        monkeypatch.setattr(recorder, "dispatch", gated)
        connection = await asyncpg.connect(server.dsn)
        messages = [Message(number, topic="t") for number in range(20)]
        await outbox.persist(connection, *messages)
        while not await connection.fetchval("SELECT count(*) FROM outbox_claims"):  # noqa: ASYNC110 -- a row, no event
            await asyncio.sleep(0.01)
        await connection.execute("CREATE TABLE flushes_the_log ()")
        gate.set()
        while await connection.fetchval("SELECT count(*) FROM outbox_claims"):  # noqa: ASYNC110 -- a row, no event
            await asyncio.sleep(0.001)
        await server.kill()
        await server.start()
        connection = await asyncpg.connect(server.dsn)
        while (await outbox.counts(connection)).pending:  # noqa: ASYNC110 -- the table itself is the point
            await asyncio.sleep(0.05)
        await connection.close()
    assert {message.id for message in messages} == set(recorder.ids)
