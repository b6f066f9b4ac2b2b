"""An order under relays that are killed, frozen or poisoned, behind PgBouncer, and over plans and migrations."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from outbox import Message, MessageDied, Outbox, RelaysDied
from outbox._queries import LaneQueries, Queries  # noqa: TID251 -- the plans of the real statements are looked at
from tests.conformance.obedient_relay import BACKOFF, LEASE, relay_process
from tests.conformance.support import HOUR, explain, nodes, numbers, plan, prepare, touched
from tests.relay_process import deliveries, relays, until_count, until_delivered
from tests.test_order import Keys, write_keyed
from tests.test_relay import Events, counts, running

pytestmark = pytest.mark.timeout(60)

BEGIN = Queries.begin(30_000)
MARGIN = 3.0
"""Seconds that a busy machine may add to a limit."""


class Orders:
    """Messages of many keys, written until told otherwise, and whether they arrived in order."""

    def __init__(self, pool: asyncpg.Pool[Any], outbox: Outbox, keys: int) -> None:
        self._pool = pool
        self._outbox = outbox
        self._keys = [f"key {number}" for number in range(keys)]
        self.written: list[Message] = []

    async def write(self) -> list[Message]:
        """One more message of each key."""
        messages = await write_keyed(self._pool, self._outbox, *self._keys)
        self.written += messages
        return messages

    async def write_until(self, enough: asyncio.Event) -> None:
        while not enough.is_set():
            await self.write()
            await asyncio.sleep(0.02)

    def disorder(self, path: Path) -> list[UUID]:
        """Those that came first after a later one of their key."""
        place = {message.id: (message.key, number) for number, message in enumerate(self.written)}
        highest: defaultdict[str | None, int] = defaultdict(lambda: -1)
        late = []
        for name in dict.fromkeys(one.id for one in deliveries(path)):
            key, number = place[name]
            if number < highest[key]:
                late.append(name)
            highest[key] = max(highest[key], number)
        return late


async def test_the_keys_of_a_killed_relay_flow_again_soon_after_its_lease_and_in_order(
    dsn: str, pool: asyncpg.Pool[Any], outbox: Outbox, tmp_path: Path
) -> None:
    orders, path, enough = Orders(pool, outbox, keys=100), tmp_path / "delivered", asyncio.Event()
    async with relays(3, dsn, outbox.schema, path, lease=1, order="key") as (first, *_):
        async with asyncio.TaskGroup() as group:
            group.create_task(orders.write_until(enough))
            await until_count(path, 1_000)
            first.kill()
            killed = monotonic()
            await until_delivered(path, {message.id for message in await orders.write()})
            assert monotonic() - killed < 1 + 1 + MARGIN
            enough.set()
        await until_delivered(path, {message.id for message in orders.written})
    assert orders.disorder(path) == []
    assert await counts(pool, outbox) == (0, 0, 0, 0)


async def test_a_frozen_relay_does_not_break_the_order_when_it_wakes(
    dsn: str, pool: asyncpg.Pool[Any], outbox: Outbox, tmp_path: Path
) -> None:
    orders, path, enough = Orders(pool, outbox, keys=50), tmp_path / "delivered", asyncio.Event()
    async with relays(2, dsn, outbox.schema, path, lease=1, order="key") as (frozen, _):
        async with asyncio.TaskGroup() as group:
            group.create_task(orders.write_until(enough))
            await until_count(path, 500)
            frozen.send_signal(signal.SIGSTOP)
            await until_delivered(path, {message.id for message in await orders.write()})
            frozen.send_signal(signal.SIGCONT)
            before = sum(one.pid == frozen.pid for one in deliveries(path))
            while sum(one.pid == frozen.pid for one in deliveries(path)) <= before:
                await until_count(path, len(deliveries(path)) + 1)
            enough.set()
        await until_delivered(path, {message.id for message in orders.written})
    assert orders.disorder(path) == []


async def test_a_message_that_kills_its_process_is_found_after_the_second_death_and_its_key_waits_for_it(
    connection: asyncpg.Connection[Any], pool: asyncpg.Pool[Any], dsn: str, outbox: Outbox
) -> None:
    deadly = 3
    await outbox.persist(connection, *(Message({"number": one}, topic="numbers", key="a") for one in range(1, 6)))
    for _ in range(2):  # the first death may have been anything
        async with relay_process(dsn, outbox, "key") as process:
            assert list(await process.given()) == [1, 2, 3, 4, 5]
            process.tell("exit")
            assert await process.ended() == 1
    async with relay_process(dsn, outbox, "key") as process:
        for number in (1, 2):
            assert list(await process.given()) == [number], "in order, and alone"
            process.tell("accept")
        assert list(await process.given()) == [deadly]
        rows = await connection.fetch(f"SELECT position, attempts FROM {outbox.schema}.outbox_waiting ORDER BY 1")  # noqa: S608
        assert [row["attempts"] for row in rows] == [1, 0, 0], "counted before the dispatch"
        process.tell("exit")
        assert await process.ended() == 1

    events, destination = Events(), Keys()
    async with running(outbox, pool, destination, order="key", lease=LEASE, backoff=BACKOFF, hooks=[events]):
        died = await events.next(MessageDied)
        await destination.has(2)
    assert numbers([died.message]) == [deadly]
    assert destination.positions == [4, 5]
    assert events.of(RelaysDied)
    assert await counts(pool, outbox) == (0, 0, 0, 1)


async def test_order_is_kept_through_pgbouncer_in_transaction_mode(pgbouncer_dsn: str, outbox: Outbox) -> None:
    destination = Keys()
    async with asyncpg.create_pool(pgbouncer_dsn, min_size=0, max_size=12, statement_cache_size=0) as pool:
        settings: dict[str, Any] = {"order": "key", "batch_size": 10, "lease": timedelta(seconds=2)}
        async with running(outbox, pool, destination, **settings), running(outbox, pool, destination, **settings):
            for _ in range(20):
                await write_keyed(pool, outbox, *(f"key {number}" for number in range(20)))
            await destination.has(400)
    assert destination.is_in_order


# --- plans ------------------------------------------------------------------------------------------------

_MANY = """
    INSERT INTO {}.outbox (id, topic, key, payload)
    SELECT gen_random_uuid(), 't', 'key ' || i % 100, '1' FROM generate_series(1, 20000) AS i"""
_FOLLOWERS = """
    INSERT INTO {}.outbox_waiting (id, topic, key, payload, lane, due_at)
    SELECT gen_random_uuid(), 't', 'a', '1', 7, CASE WHEN i = 1 THEN now() + interval '1 h' ELSE 'infinity' END
    FROM generate_series(1, 100000) AS i"""


@pytest.fixture
def lanes(outbox: Outbox) -> LaneQueries:
    return LaneQueries(Queries(outbox.table, outbox.schema), "key")


async def test_a_read_walks_along_the_primary_key_though_it_was_planned_for_an_empty_table(
    connection: asyncpg.Connection[Any], outbox: Outbox, lanes: LaneQueries
) -> None:
    await connection.execute(f"ANALYZE {outbox.schema}.outbox")
    await prepare(connection, BEGIN, lanes.read)
    await explain(connection, BEGIN, -1, 0, 10**9, "{}", 100)
    await connection.execute(_MANY.format(outbox.schema))
    for mask in (-1, 0b1111):
        read = await explain(connection, BEGIN, mask, 0, 10**9, "{}", 100)
        assert read["Actual Rows"] == 100
        [scan] = [node for node in nodes(read) if node.get("Relation Name") == "outbox"]
        assert (scan["Node Type"], scan["Index Name"]) == ("Index Scan", "outbox_pkey")
        assert "hashed SubPlan" in scan["Filter"]
        assert "Sort" not in {node["Node Type"] for node in nodes(read)}
    await connection.execute("DEALLOCATE planned")


async def test_a_hundred_thousand_behind_a_failure_are_not_touched_by_a_claim(
    connection: asyncpg.Connection[Any], outbox: Outbox, lanes: LaneQueries
) -> None:
    await connection.execute(_FOLLOWERS.format(outbox.schema))
    await connection.execute(f"VACUUM ANALYZE {outbox.schema}.outbox_waiting")
    claimant = UUID(int=1)
    await connection.execute(Queries(outbox.table, outbox.schema).register, claimant, HOUR, "key")
    due = await plan(connection, BEGIN, lanes.due_lanes, -1, 100)
    suspect = await plan(connection, BEGIN, lanes.claim_crash_suspect, claimant, -1, 10**9)
    free = await plan(connection, BEGIN, lanes.claim_due, claimant, "epoch", 0, 100, 10**6, -1)
    for looked in (due, suspect, free):
        assert looked["Actual Rows"] == 0
        assert touched(looked) < 20
    claim = await plan(connection, BEGIN, lanes.claim_lanes, claimant, "{7}", 100, 10**6, 10**9)
    assert claim["Actual Rows"] == 0, "its head is not due"
    left = await plan(connection, BEGIN, lanes.lanes_left, claimant, "{7}")
    assert touched(claim) + touched(left) < 60


async def test_those_behind_heads_that_are_not_due_keep_no_other_lane_from_being_found(
    connection: asyncpg.Connection[Any], outbox: Outbox, lanes: LaneQueries
) -> None:
    await connection.execute(f"""
        INSERT INTO {outbox.schema}.outbox_waiting (position, id, topic, payload, due_at, lane)
        SELECT 2000 - 1000 * head + lane, gen_random_uuid(), 't', ''::bytea,
            now() + (2 * head - 1) * interval '1 h', lane
        FROM generate_series(1, 150) AS lane, generate_series(0, 1) AS head
        UNION ALL SELECT 5000, gen_random_uuid(), 't', ''::bytea, now(), 500""")  # noqa: S608 -- a schema of the test's own
    found = await connection.fetch(lanes.due_lanes, -1, 100)
    assert [row["lane"] for row in found] == [500]


# --- migrations -------------------------------------------------------------------------------------------


_DEAD = """
    INSERT INTO {0}.outbox_dead
    SELECT 1000, id, recorded_at, topic, key, headers, payload, 1, 'Error' FROM {0}.outbox LIMIT 1"""


@asynccontextmanager
async def first_version(connection: asyncpg.Connection[Any]) -> AsyncIterator[Outbox]:
    """An outbox as the first migration left it."""
    outbox = Outbox(schema=f"first_{uuid4().hex}")
    queries = Queries(outbox.table, outbox.schema)
    script = files("outbox").joinpath("migrations", "0001_create.sql").read_text(encoding="utf-8")
    await connection.execute(f"CREATE SCHEMA {outbox.schema}")
    try:
        await connection.execute(queries.create_version)
        await connection.execute(script.format(**queries.names))
        await connection.execute(queries.record_version.format(1))
        yield outbox
    finally:
        await connection.execute("SET client_min_messages = warning")
        await connection.execute(f"DROP SCHEMA {outbox.schema} CASCADE")


async def test_messages_written_before_the_upgrade_are_delivered_in_order_after_it(
    connection: asyncpg.Connection[Any], pool: asyncpg.Pool[Any]
) -> None:
    async with first_version(connection) as outbox:
        await write_keyed(pool, outbox, "a", "b", "a")
        await connection.execute(_DEAD.format(outbox.schema))
        await outbox.migrate(connection)
        destination = Keys()
        async with running(outbox, pool, destination, order="key"):
            await destination.has(3)
            assert await outbox.redrive(connection) == 1
            await destination.has(4)
        assert destination.is_in_order


async def test_an_upgrade_makes_what_a_new_outbox_has(connection: asyncpg.Connection[Any], outbox: Outbox) -> None:
    query = """
        SELECT relname::text, attname::text, format_type(atttypid, atttypmod), attnotnull
        FROM pg_attribute a JOIN pg_class c ON c.oid = attrelid
        WHERE relnamespace = $1::text::regnamespace AND attnum > 0 AND relkind IN ('r', 'i') ORDER BY 1, 2"""
    async with first_version(connection) as upgraded:
        await upgraded.migrate(connection)
        tables: Sequence[Any] = await connection.fetch(query, upgraded.schema)
    assert tables == await connection.fetch(query, outbox.schema)
