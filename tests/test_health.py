"""`Relay.health`: what it says of a relay that idles, lags, stands by, is cut off or stuck, and what that costs."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

import asyncpg
import pytest

from outbox import (
    CommitStrategy,
    DestinationUnavailableError,
    Health,
    LinearBackOff,
    Message,
    NoWaiting,
    Outbox,
    Relay,
    RelayStandsBy,
    SchemaError,
)
from tests.conformance.support import nodes, touched
from tests.conftest import StartServer
from tests.faults import FaultProxy
from tests.test_relay import Destination, Events, running, until_counts, write

pytestmark = pytest.mark.timeout(30)

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
LATER = LinearBackOff(initial=HOUR, maximum=HOUR, max_tries=-1)
FINE = Health(alive=True, ready=True, oldest=None, problems=())
NOT_RUNNING = Health(alive=False, ready=False, oldest=None, problems=("the relay is not running",))


class Hanging(Destination):
    """Keeps every call until it is released; a deaf one keeps it even when it is cancelled."""

    def __init__(self, *, deaf: bool = False) -> None:
        super().__init__()
        self.called = asyncio.Event()
        self.released = asyncio.Event()
        self._is_deaf = deaf

    async def dispatch(self, *messages: Message) -> None:
        self.called.set()
        while not self.released.is_set():
            try:
                await self.released.wait()
            except asyncio.CancelledError:
                if not self._is_deaf:
                    raise
        await super().dispatch(*messages)


def down(_: object) -> None:
    raise DestinationUnavailableError("nobody there")


def fail(_: object) -> None:
    raise ValueError("no")


def inside(relay: Relay, *names: str) -> Any:
    """What a relay keeps to itself: how to bring about, or measure, what cannot be had from outside."""
    thing: Any = relay
    for name in ("_worker", *names):
        thing = getattr(thing, name)
    return thing


async def ago(pool: asyncpg.Pool[Any], age: timedelta) -> datetime:
    now: datetime = await pool.fetchval("SELECT clock_timestamp()")
    return now - age


async def write_old(pool: asyncpg.Pool[Any], outbox: Outbox, *payloads: Any, **fields: Any) -> None:
    await write(pool, outbox, *payloads, recorded_at=await ago(pool, HOUR), **fields)


async def until(relay: Relay, condition: Callable[[Health], bool], **settings: timedelta) -> Health:
    """Asks, a probe after the other, for ten seconds."""
    async with asyncio.timeout(10):
        while not condition(health := await relay.health(**settings)):  # noqa: ASYNC110 -- found by asking alone
            await asyncio.sleep(0.01)
        return health


# --- its life -------------------------------------------------------------------------------------------


async def test_an_idle_relay_is_fine(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    async with running(outbox, pool, Destination()) as relay:
        assert await relay.health() == FINE


async def test_the_probe_needs_no_connection_beyond_the_two_of_the_relay(dsn: str, outbox: Outbox) -> None:
    async with asyncpg.create_pool(dsn, min_size=1, max_size=2) as pool, running(outbox, pool, Destination()) as relay:
        assert await relay.health() == FINE


async def test_a_relay_that_does_not_run_is_not_alive(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    relay = Relay(outbox, pool, Destination())
    assert await relay.health() == NOT_RUNNING
    assert await relay.run_once() == 0
    assert await relay.health() == NOT_RUNNING
    running = asyncio.create_task(relay.run())
    await until(relay, lambda health: health.ready)
    await relay.stop()
    await running
    assert await relay.health() == NOT_RUNNING


async def test_a_relay_whose_run_has_failed_is_not_alive(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    relay = Relay(Outbox("missing", schema=outbox.schema), pool, Destination())
    with pytest.raises(SchemaError):
        await relay.run()
    assert await relay.health() == NOT_RUNNING


async def test_a_relay_that_stops_lives_until_it_has_delivered_but_is_not_ready(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    destination = Hanging()
    async with running(outbox, pool, destination, grace=timedelta(seconds=10)) as relay:
        await write(pool, outbox, "last")
        await destination.called.wait()
        stopping = asyncio.create_task(relay.stop())
        health = await until(relay, lambda health: not health.ready)
        assert (health.alive, health.problems) == (True, ("the relay is stopping",))
        destination.released.set()
        await stopping
    assert destination.accepted == ["last"]
    assert await relay.health() == NOT_RUNNING


async def test_a_probe_that_comes_too_late_keeps_no_connection(dsn: str, outbox: Outbox) -> None:
    async with asyncpg.create_pool(dsn, min_size=0, max_size=4) as pool:
        async with running(outbox, pool, Destination()) as relay:
            session = inside(relay, "_searching")
            async with inside(relay, "_searching", "_lock"):  # as if a claim took all the time until the end
                probe = asyncio.create_task(relay.health())
                await asyncio.sleep(0)  # one turn of the loop: it waits for the lock
                await relay.stop()
        assert await probe == NOT_RUNNING
        assert not session.is_connected
        assert pool.get_idle_size() == pool.get_size()


# --- what is due ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["none", "key", "total"])
async def test_a_destination_that_hangs_makes_it_unready_when_the_oldest_is_too_old(
    order: str, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    destination = Hanging()
    async with running(outbox, pool, destination, order=order, concurrency=1) as relay:
        await write(pool, outbox, *range(1_000), key="k")
        await destination.called.wait()
        young = await relay.health()
        assert young.oldest is not None
        assert (young.alive, young.ready, young.problems) == (True, True, ())
        assert timedelta() < young.oldest < timedelta(seconds=30)
        old = await relay.health(max_age=timedelta(microseconds=1))
        assert old.oldest is not None
        assert old.oldest > young.oldest
        assert (old.alive, old.ready) == (True, False)
        assert old.problems == (
            f"the oldest message that is due has been waiting for {old.oldest}, longer than 0:00:00.000001",
        )
        destination.released.set()
        assert await until(relay, lambda health: health.oldest is None) == FINE


@pytest.mark.parametrize("order", ["none", "key", "total"])
async def test_what_is_not_in_hand_yet_counts_like_what_is(order: str, pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination = Hanging()
    async with running(outbox, pool, destination, order=order, batch_size=1, concurrency=1) as relay:
        await write_old(pool, outbox, "in hand", key="k")
        await destination.called.wait()
        assert (await until(relay, lambda health: health.oldest is not None)).ready is False
        await pool.execute(f"UPDATE {outbox.schema}.outbox SET recorded_at = clock_timestamp()")  # noqa: S608 -- ours
        assert (await relay.health()).ready
        # More than it takes in hand, the oldest of it last.
        await write(pool, outbox, *range(2_000), key="k")
        assert (await relay.health()).ready
        await write_old(pool, outbox, "beyond", key="k")
        assert (await relay.health()).ready, "positions decide which is the oldest"
        await pool.execute(f"DELETE FROM {outbox.schema}.outbox WHERE recorded_at > $1", await ago(pool, HOUR / 2))  # noqa: S608 -- ours
        assert not (await relay.health()).ready
        destination.released.set()


@pytest.mark.parametrize("order", ["none", "key", "total"])
async def test_a_destination_that_is_down_makes_it_unready_when_a_message_is_too_old(
    order: str, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await write_old(pool, outbox, "old", key="k")
    async with running(outbox, pool, Destination(down), order=order) as relay:
        health = await until(relay, lambda health: not health.ready)
        assert health.alive
        assert health.oldest is not None
        assert health.oldest > HOUR
        assert (await relay.health(max_age=HOUR * 2)).ready


@pytest.mark.parametrize("order", ["none", "key", "total"])
async def test_what_is_delayed_or_waits_for_its_next_attempt_is_not_too_old(
    order: str, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await write_old(pool, outbox, "fails", "stands behind it", key="k")
    await write_old(pool, outbox, "delayed", due_at=datetime(2999, 1, 1, tzinfo=UTC))
    async with running(outbox, pool, Destination(fail), order=order, backoff=LATER) as relay:
        await until_counts(pool, outbox, (0, 3, 3, 0))
        assert await until(relay, lambda health: health.oldest is None) == FINE


@pytest.mark.parametrize("order", ["none", "key", "total"])
async def test_a_message_whose_time_came_long_ago_is_too_old(
    order: str, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await write_old(pool, outbox, "delayed", due_at=await ago(pool, HOUR / 2))
    async with running(outbox, pool, Destination(down), order=order) as relay:
        health = await until(relay, lambda health: health.oldest is not None)
        assert (health.alive, health.ready) == (True, False)
        assert health.oldest is not None
        assert HOUR / 2 < health.oldest < HOUR


@pytest.mark.parametrize("order", ["none", "key", "total"])
async def test_dead_letters_and_what_is_kept_are_not_too_old(
    order: str, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await write_old(pool, outbox, "delivered")
    async with running(outbox, pool, Destination(), order=order, commit=CommitStrategy.MARK) as relay:
        await until_counts(pool, outbox, (1, 0, 0, 0))
        assert await until(relay, lambda health: health.oldest is None) == FINE

    await write_old(pool, outbox, "dies")
    async with running(outbox, pool, Destination(fail), order=order, backoff=NoWaiting(max_tries=1)) as relay:
        await until_counts(pool, outbox, (1, 0, 0, 1))
        assert await until(relay, lambda health: health.oldest is None) == FINE


@pytest.mark.parametrize("order", ["none", "key"])
async def test_what_another_relay_holds_is_that_ones_business(
    order: str, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    hanging, fine = Hanging(), Destination()
    async with running(outbox, pool, hanging, order=order) as one:
        await write_old(pool, outbox, "held", key="k")
        await hanging.called.wait()
        async with running(outbox, pool, fine, order=order) as other:
            if order == "key":
                await until(other, lambda _: bool(inside(other, "_hands", "_slots", "owned")))
            await write(pool, outbox, *range(1_000))  # more than the one that hangs can take
            await fine.has_accepted(100)
            assert not (await one.health()).ready
            assert await until(other, lambda health: health.oldest is None) == FINE
            hanging.released.set()
            await until_counts(pool, outbox, (0, 0, 0, 0))


async def test_a_relay_that_stands_by_is_ready(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    events, hanging = Events(), Hanging()
    await write_old(pool, outbox, *range(2_000), key="k")  # more than the one at work can take
    async with running(outbox, pool, hanging, order="key", batch_size=1, concurrency=1):
        await hanging.called.wait()
        async with running(outbox, pool, Destination(), hooks=[events]) as other:
            assert events.of(RelayStandsBy)
            assert await other.health() == FINE
        hanging.released.set()


@pytest.mark.parametrize("max_age", [timedelta(), -SECOND])
async def test_an_age_that_no_message_can_keep_is_refused(
    max_age: timedelta, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    with pytest.raises(ValueError, match="max_age must be longer than zero"):
        await Relay(outbox, pool, Destination()).health(max_age=max_age)


async def test_what_was_found_cannot_be_changed(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    health = await Relay(outbox, pool, Destination()).health()
    with pytest.raises(FrozenInstanceError):
        health.alive = True  # type: ignore[misc]  # what is tried


# --- the database ---------------------------------------------------------------------------------------


async def test_a_relay_lives_while_the_database_is_away_and_is_ready_when_it_is_back(own_server: StartServer) -> None:
    server = await own_server()
    outbox = Outbox()
    async with asyncpg.create_pool(server.dsn, min_size=1, max_size=5) as pool:
        async with pool.acquire() as connection:
            await outbox.migrate(connection)
        async with running(outbox, pool, Destination()) as relay:
            assert await relay.health() == FINE
            await server.kill()
            for _ in range(20):
                health = await relay.health()
                assert (health.alive, health.ready, health.oldest) == (True, False, None)
                assert health.problems[0].startswith("the database is away: ")
            await server.start()
            assert await until(relay, lambda health: health.ready) == FINE


async def test_a_relay_that_has_not_reached_the_database_yet_lives(own_server: StartServer) -> None:
    server = await own_server()
    async with asyncpg.create_pool(server.dsn, min_size=0, max_size=5) as pool:
        await server.stop()
        relay = Relay(Outbox(), pool, Destination())
        run = asyncio.create_task(relay.run())
        health = await until(relay, lambda health: health.alive)
        assert not health.ready
        away, not_yet = health.problems
        assert away.startswith("the database is away: ConnectionRefusedError")
        assert not_yet == "the relay has not reached the database yet"
        await relay.stop()
        await run


async def test_a_database_that_does_not_answer_takes_two_seconds(dsn: str, proxy: FaultProxy, outbox: Outbox) -> None:
    async with (
        asyncpg.create_pool(proxy.dsn(dsn), min_size=1, max_size=5) as pool,
        running(outbox, pool, Destination(), lease=timedelta(seconds=6)) as relay,
    ):
        assert await relay.health() == FINE
        proxy.black_hole()
        started = monotonic()
        health = await relay.health()
        assert 1.9 < monotonic() - started < 3
        assert (health.alive, health.ready, health.oldest) == (True, False, None)
        assert health.problems == ("the database did not answer within 2 s",)
        proxy.heal()
        assert await until(relay, lambda health: health.ready) == FINE


async def test_a_pool_that_others_have_emptied_is_named_as_the_reason(dsn: str, outbox: Outbox) -> None:
    async with asyncpg.create_pool(dsn, min_size=2, max_size=2) as pool:
        one, other = await pool.acquire(), await pool.acquire()
        relay = Relay(outbox, pool, Destination())
        run = asyncio.create_task(relay.run())
        await asyncio.sleep(0)  # one turn of the loop: it has begun, and is not ready before it has a connection
        health = await relay.health()
        assert health.alive
        assert health.problems == (
            "the pool had no connection to give (all 2 are in use) within 2 s",
            "the relay has not reached the database yet",
        )
        await pool.release(one)
        await pool.release(other)
        assert await until(relay, lambda health: health.ready) == FINE
        await relay.stop()
        await run


# --- what does not move ---------------------------------------------------------------------------------


async def test_a_call_that_outlives_twice_its_limit_makes_it_not_alive(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination = Hanging(deaf=True)
    async with running(outbox, pool, destination, dispatch_timeout=SECOND / 4) as relay:
        await write(pool, outbox, "stuck")
        await destination.called.wait()
        assert (await relay.health()).alive
        health = await until(relay, lambda health: not health.alive)
        [problem] = health.problems
        assert problem.startswith("a call of the destination, limited to 0:00:00.250000, has not returned for ")
        assert not health.ready
        destination.released.set()
        assert await until(relay, lambda health: health.oldest is None) == FINE


async def test_a_destination_that_keeps_the_limit_again_and_again_is_no_reason_to_restart(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    destination = Hanging()
    async with running(
        outbox, pool, destination, dispatch_timeout=SECOND / 20, backoff=NoWaiting(max_tries=1_000)
    ) as relay:
        await write(pool, outbox, "slow")
        attempts = 0
        while attempts < 5:
            destination.called.clear()
            await destination.called.wait()
            attempts += 1
            assert (await relay.health()).alive
        destination.released.set()


async def test_a_lease_that_nobody_sees_to_makes_it_not_alive(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    async with running(outbox, pool, Destination(), lease=SECOND / 5) as relay:
        await asyncio.wait_for(inside(relay, "_renewed").wait(), 5)
        async with inside(relay, "_upkeep", "_lock"):  # what never should be: somebody keeps it for ever
            health = await until(relay, lambda health: not health.alive)
        [problem] = health.problems
        assert problem.startswith("the lease has not been renewed, nor has it been tried, for ")
        assert await until(relay, lambda health: health.ready) == FINE


# --- what it costs --------------------------------------------------------------------------------------


class Explaining:
    """A connection that explains its query instead of running it."""

    def __init__(self, connection: asyncpg.Connection[Any]) -> None:
        self._connection = connection

    async def fetchval(self, query: str, *arguments: Any) -> Any:
        plan = await self._connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}", *arguments)
        return json.loads(plan)[0]["Plan"]


KEPT, WAITING = 50_000, 10_000


async def full(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    """Many kept messages first, then many dead rows, then a backlog; and many that wait for their time."""
    schema = outbox.schema
    await pool.execute(
        f"""
        INSERT INTO {schema}.outbox (id, topic, payload, key, dispatched_at)
        SELECT gen_random_uuid(), 't', '1', 'k', clock_timestamp() FROM generate_series(1, {KEPT})"""  # noqa: S608
    )
    await pool.execute(
        f"""
        INSERT INTO {schema}.outbox (id, topic, payload, key)
        SELECT gen_random_uuid(), 't', '1', 'k' FROM generate_series(1, {2 * KEPT})"""  # noqa: S608
    )
    await pool.execute(f"DELETE FROM {schema}.outbox WHERE dispatched_at IS NULL AND position <= {2 * KEPT}")  # noqa: S608
    await pool.execute(
        f"""
        INSERT INTO {schema}.outbox_waiting (id, topic, payload, due_at)
        SELECT gen_random_uuid(), 't', '1', clock_timestamp() + interval '1 day'
        FROM generate_series(1, {WAITING})"""  # noqa: S608
    )


@pytest.mark.parametrize("order", ["none", "key", "total"])
async def test_the_oldest_is_found_by_index_however_many_rows_are_kept_dead_or_pending(
    order: str, connection: asyncpg.Connection[Any], pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    hanging = Hanging()
    async with connection.transaction(isolation="repeatable_read"):
        await connection.fetchval("SELECT count(*) FROM pg_class")  # from here on nothing can be vacuumed
        await full(pool, outbox)
        async with running(outbox, pool, hanging, order=order, commit=CommitStrategy.MARK) as relay:
            await hanging.called.wait()
            assert (await relay.health()).ready
            async with inside(relay, "_searching").transaction() as session:
                top = await inside(relay, "_hands").oldest(Explaining(session))
            hanging.released.set()
    used = {node["Index Name"] for node in nodes(top) if "Index Name" in node}
    assert {"outbox_pkey", "outbox_waiting_due"} <= used
    assert not [node for node in nodes(top) if node["Node Type"] in {"Seq Scan", "Sort"}]
    # A page or two for each message in hand, where a walk over what is kept or dead would be a thousand times that.
    assert touched(top) < 1_000 < KEPT // 40
