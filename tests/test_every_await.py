# ruff: noqa: S608 -- the tables are our own
"""Cancelled and killed at every single await of a cycle, found by counting them: nothing is lost, nothing left behind.

Each test interrupts a cycle at its first await, another at its second, and so on, until one comes to its end. The
short form takes steps; `HYPOTHESIS_PROFILE=long pytest tests/test_every_await.py` leaves none out.
"""

import asyncio
import gc
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID
from zlib import crc32

import asyncpg
import pytest

from outbox import CommitStrategy, Message, Outbox, OutboxDispatcher, Relay
from tests.interrupted import (
    BATCH,
    KEYS,
    MESSAGES,
    Awaits,
    Destination,
    Interruption,
    Keys,
    Point,
    Scenario,
    accepted_by_the_dead,
    cycle,
    killer,
)
from tests.test_model import LONG

pytestmark = pytest.mark.timeout(1800 if LONG else 60)

_AT_MOST = 2_000
"""Awaits that no cycle has: an end for a test that would find none."""


def _when_asked(awaits: Awaits, _: object) -> None:
    """The task is cancelled when it begins to wait: the statement is sent, there is no answer yet."""
    awaits.task.cancel()


def _when_answered(awaits: Awaits, waited: Any) -> None:
    """The task is cancelled when its answer is there, and before it sees it."""
    if waited is None:
        awaits.task.cancel()
    else:
        waited.add_done_callback(lambda _: awaits.task.cancel())


def _by_its_scope(awaits: Awaits, _: object) -> None:
    """What it is part of is cancelled, in anyio's way: every await from now on is."""
    awaits.scope.cancel()


_STEP, _STEP_OF_KILLS = (1, 1) if LONG else (4, 6)
"""How many awaits from one interruption to the next."""

_CANCELLED = [
    (Scenario(), _when_asked),
    (Scenario("partial", commit="mark"), _when_answered),
    (Scenario("buries"), _by_its_scope),
    (Scenario("raises", waiting=True), _when_answered),
    (Scenario("unavailable", waiting=True, commit="mark"), _by_its_scope),
    (Scenario("partial", waiting=True, verb="run"), _when_asked),
    (Scenario("raises", commit="mark", verb="run"), _by_its_scope),
]
_KILLED = [
    Scenario("partial", commit="mark"),
    Scenario("raises", waiting=True),
    Scenario("buries", verb="run"),
]


_CANCELLED_IN_ORDER = [
    (Scenario("raises", order="key"), _when_asked),
    (Scenario("partial", order="key", waiting=True), _when_answered),
    (Scenario("rejects", order="total", waiting=True, commit="mark"), _by_its_scope),
    (Scenario("buries", order="key", on_failure="park", verb="run"), _when_answered),
    (Scenario("raises", order="key", waiting=True, verb="run"), _by_its_scope),
    (Scenario(order="key", verb="run", company=True), _when_asked),
]
_KILLED_IN_ORDER = [
    Scenario("buries", order="key", on_failure="park", waiting=True),
    Scenario("partial", order="total", verb="run"),
]


@dataclass
class _Interrupted:
    """A cycle that was interrupted: its table, what is in it, and what was delivered."""

    outbox: Outbox
    keys: Keys
    accepted: list[UUID] = field(default_factory=list)


@pytest.mark.parametrize("which", range(len(_CANCELLED)))
async def test_a_relay_cancelled_at_any_await_loses_nothing_and_leaves_nothing_behind(
    dsn: str, pool: asyncpg.Pool, outbox: Outbox, which: int
) -> None:
    scenario, interrupt = _CANCELLED[which]
    cancelled, leaks = [], []
    relays_pool = await asyncpg.create_pool(dsn, min_size=0, max_size=3)
    with _no_complaints():
        for at in range(1 + which % _STEP, _AT_MOST, _STEP):
            one = await _prepare(pool, outbox, scenario, at)
            destination = Destination(scenario.answer, one.accepted.extend)
            awaits = Awaits(at, interrupt)
            await cycle(scenario.relay(one.outbox, relays_pool, destination), scenario, destination, one.keys, awaits)
            if not awaits.task.cancelled():
                awaits.task.result()
            assert destination.inside == 0
            cancelled.append(one)
            if not await _is_whole(relays_pool):
                leaks.append(at)
                relays_pool.terminate()
                relays_pool = await asyncpg.create_pool(dsn, min_size=0, max_size=3)
            if not awaits.reached:
                break
    await relays_pool.close()
    for one in cancelled:
        await _recover(pool, scenario, one)
    assert at > 40, "the awaits were counted"
    assert not leaks, f"cancelled at these awaits, it did not give a connection back: {leaks} of {at}"


async def _is_whole(pool: asyncpg.Pool) -> bool:
    """Whether each connection of the pool can be had, and none is in a transaction."""
    connections = []
    try:
        async with asyncio.timeout(0.5):
            for _ in range(pool.get_max_size()):
                connections.append(await pool.acquire())  # noqa: PERF401 -- those before a timeout are wanted, too
    except TimeoutError:
        return False
    clean = not any(connection.is_in_transaction() for connection in connections)
    for connection in connections:
        await pool.release(connection)
    return clean and pool.get_idle_size() == pool.get_size()


@pytest.mark.parametrize("which", range(len(_KILLED)))
async def test_a_relay_killed_at_any_await_loses_nothing_and_leaves_nothing_behind(
    dsn: str, pool: asyncpg.Pool, outbox: Outbox, tmp_path: Path, which: int
) -> None:
    scenario, killed = _KILLED[which], []
    async with killer(dsn) as forks:
        for at in range(1 + which % _STEP_OF_KILLS, _AT_MOST, _STEP_OF_KILLS):
            one, path = await _prepare(pool, outbox, scenario, at), tmp_path / str(at)
            was_killed = await forks.kill(one.outbox, scenario, one.keys, path, at=at)
            one.accepted = accepted_by_the_dead(path)
            killed.append(one)
            if not was_killed:
                break
    for one in killed:
        await _recover(pool, scenario, one)
    assert at > 40, "the awaits were counted"


# --- in order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", range(len(_CANCELLED_IN_ORDER)))
async def test_a_relay_cancelled_at_any_await_breaks_no_order(
    dsn: str, pool: asyncpg.Pool, outbox: Outbox, which: int
) -> None:
    scenario, interrupt = _CANCELLED_IN_ORDER[which]
    relays_pool = await asyncpg.create_pool(dsn, min_size=0, max_size=3)
    for point in await _points(relays_pool, outbox, scenario, which):
        one = await _prepare(pool, outbox, scenario)
        destination = Destination(scenario.answer, one.accepted.extend)
        awaits = Awaits(point, interrupt)
        with _no_complaints(collect=False):
            relay, company = scenario.relay(outbox, relays_pool, destination), partial(_company, pool, outbox, scenario)
            await cycle(relay, scenario, destination, one.keys, awaits, until=company)
            if not awaits.task.cancelled():
                awaits.task.result()
        assert destination.inside == 0
        assert await _is_whole(relays_pool), f"it did not give a connection back at {point}"
        await _end_the_leases(pool, outbox)
        await _recover(pool, scenario, one)
    with _no_complaints():
        await relays_pool.close()


@pytest.mark.parametrize("which", range(len(_KILLED_IN_ORDER)))
async def test_a_relay_killed_at_any_await_breaks_no_order(
    dsn: str, pool: asyncpg.Pool, outbox: Outbox, tmp_path: Path, which: int
) -> None:
    scenario = _KILLED_IN_ORDER[which]
    points = await _points(pool, outbox, scenario, which)
    async with killer(dsn) as forks:
        for number, point in enumerate(points):
            one, path = await _prepare(pool, outbox, scenario), tmp_path / str(number)
            await forks.kill(outbox, scenario, one.keys, path, at=point)
            one.accepted = accepted_by_the_dead(path)
            await _end_the_leases(pool, outbox)
            await _recover(pool, scenario, one)


async def _points(pool: asyncpg.Pool, outbox: Outbox, scenario: Scenario, number: int) -> list[Point]:
    """Where an undisturbed cycle is suspended: each place once, by turns the first and the last time.

    The short form divides them: how a relay opens, looks around and leaves is the same in each of the scenarios.
    """
    one = await _prepare(pool, outbox, scenario)
    destination, awaits = (
        Destination(scenario.answer, one.accepted.extend),
        Awaits(Point("nowhere"), lambda _, __: None),
    )
    relay, company = scenario.relay(outbox, pool, destination), partial(_company, pool, outbox, scenario)
    await cycle(relay, scenario, destination, one.keys, awaits, until=company)
    awaits.task.result()
    await _end_the_leases(pool, outbox)
    await _recover(pool, scenario, one)
    places = [lines for lines in awaits.points if lines]
    assert len(places) > 40, "the places were found"
    if not LONG:
        parts = {lines: 2 if _OF_THE_SCENARIO.search(lines) else 6 for lines in places}
        places = [lines for lines in places if crc32(lines.encode()) % parts[lines] == number % parts[lines]]
    return [Point(lines, awaits.points[lines] if place % 2 else 1) for place, lines in enumerate(places)]


_OF_THE_SCENARIO = re.compile(r"_attempt|_settle:|_release|_owning.claim(_one)?:\d+ > _owning._(?!start)")


async def _company(pool: asyncpg.Pool, outbox: Outbox, scenario: Scenario) -> None:
    """Has another relay come, if it should, and waits until the first has handed over half of the slots."""
    table = f'"{outbox.schema}"."{outbox.table}'
    async with pool.acquire() as connection:
        if scenario.company:
            await connection.execute(f"""
                INSERT INTO {table}_relays" (owner, until, ordering) VALUES (gen_random_uuid(), 'infinity', 'key')""")
        while scenario.company and await connection.fetchval(  # noqa: ASYNC110 -- what is in the table has no event
            f'SELECT count(owner) > 32 FROM {table}_slots"'
        ):
            await asyncio.sleep(0.01)


async def _end_the_leases(pool: asyncpg.Pool, outbox: Outbox) -> None:
    async with pool.acquire() as connection:
        await connection.execute(f'UPDATE "{outbox.schema}"."{outbox.table}_relays" SET until = clock_timestamp()')


# --- the writer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interrupt", [_when_asked, _when_answered, _by_its_scope])
async def test_a_dispatch_cancelled_at_any_await_writes_nothing_and_leaves_the_transaction_usable(
    dsn: str, outbox: Outbox, interrupt: Interruption
) -> None:
    due = datetime.now(UTC)
    messages = [Message(n, topic="t", due_at=due if n % 2 else None) for n in range(6)]
    for at in range(1, _AT_MOST):
        connection = await asyncpg.connect(dsn)  # a new one, which has every statement still to prepare
        awaits, before = Awaits(at, interrupt), Message("before", topic="t")
        with _no_complaints():
            async with connection.transaction():
                await outbox.persist(connection, before)
                with awaits.counted(), suppress(asyncio.CancelledError):
                    async with connection.transaction():
                        task = awaits.begin(OutboxDispatcher(connection, outbox).dispatch(*messages))
                        await asyncio.wait([task])
                        if awaits.reached:
                            raise asyncio.CancelledError
                        task.result()
            written = {message.id for message in await outbox.retrieve(connection, 100)}
            await outbox.clear(connection)
            await connection.close()
        assert written == {before.id} | (set() if awaits.reached else {message.id for message in messages})
        if not awaits.reached:
            break
    assert at > 4, "the awaits were counted"


@pytest.mark.parametrize("interrupt", [_when_asked, _when_answered, _by_its_scope])
async def test_a_migration_cancelled_at_any_await_makes_all_or_nothing(
    connection: asyncpg.Connection, dsn: str, outbox: Outbox, interrupt: Interruption
) -> None:
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname = $1 AND starts_with(tablename::text, $2)"
    complete = await connection.fetchval(tables, outbox.schema, "outbox")
    for at in range(1, _AT_MOST):
        mine, awaits = Outbox(f"m{at}_", schema=outbox.schema), Awaits(at, interrupt)
        own = await asyncpg.connect(dsn)
        with _no_complaints(), awaits.counted():
            await asyncio.wait([awaits.begin(mine.migrate(own))])
        # Cancelled in its BEGIN the driver takes a transaction for open, or leaves one open: it says so, as it does
        # when such a connection goes back to a pool, which does the same.
        asyncio.get_running_loop().set_exception_handler(lambda _, __: None)
        await own.reset()
        with _no_complaints():
            assert await own.fetchval(tables, outbox.schema, mine.table) in {0, complete}
            await mine.migrate(own)
            await mine.check(own)
            await own.close()
        if not awaits.reached:
            break
    assert at > 10, "the awaits were counted"


# --- what both have in common -----------------------------------------------------------------------------


async def _prepare(pool: asyncpg.Pool, outbox: Outbox, scenario: Scenario, number: int | None = None) -> _Interrupted:
    """Fills a table; one of its own, if it has a number, so that many leases run out at the same time."""
    own = outbox if number is None else Outbox(f"outbox_{number}", schema=outbox.schema)
    due = datetime.now(UTC) if scenario.waiting else None
    if scenario.order != "none":
        messages = [Message(n, topic="t", key=key, due_at=None if key else due) for n, key in enumerate(KEYS)]
    else:
        messages = [Message(n, topic="t", due_at=due) for n in range(BATCH + 1 if scenario.waiting else MESSAGES)]
    async with pool.acquire() as connection, connection.transaction():
        await (own.migrate(connection) if number is not None else own.clear(connection))
        await own.persist(connection, *messages)
        if scenario.waiting and scenario.order != "none":
            await _have_them_wait_in_lanes(connection, own, scenario)
        if scenario.waiting and scenario.on_failure == "park":
            await _have_them_parked(connection, own)
        # The first of those that wait was in the hands of a relay that died.
        await connection.execute(f"""
            UPDATE "{own.schema}"."{own.table}_waiting" SET suspect = 'crash' WHERE payload = '0'""")
    return _Interrupted(own, {message.id: message.key for message in messages})


async def _have_them_wait_in_lanes(connection: Any, outbox: Outbox, scenario: Scenario) -> None:
    """As if the first of each lane had failed once; the last one has come since then."""
    table = f'"{outbox.schema}"."{outbox.table}'
    lane = 'hashtextextended(key COLLATE "C", 0)' if scenario.order == "key" else "0"
    last = len(KEYS) if scenario.verb == "run_once" else len(KEYS) - 1
    await connection.execute(f"""
        WITH gone AS (DELETE FROM {table}" WHERE key IS NOT NULL AND payload <> '{last}' RETURNING *)
        INSERT INTO {table}_waiting" (position, id, topic, key, headers, payload, due_at, lane, attempts)
        SELECT position, id, topic, key, headers, payload, CASE place WHEN 1 THEN now() ELSE 'infinity' END, lane,
            CASE place WHEN 1 THEN 1 ELSE 0 END
        FROM (SELECT *, row_number() OVER (PARTITION BY lane ORDER BY position) AS place
            FROM (SELECT *, {lane} AS lane FROM gone) AS g) AS h""")


async def _have_them_parked(connection: Any, outbox: Outbox) -> None:
    """As if one key had been parked behind a dead letter that was discarded."""
    table = f'"{outbox.schema}"."{outbox.table}'
    columns = "position, id, recorded_at, topic, key, headers, payload, attempts, lane"
    await connection.execute(f"""
        WITH gone AS (DELETE FROM {table}_waiting" WHERE key = 'b' RETURNING *)
        INSERT INTO {table}_dead" ({columns}, error, behind) SELECT {columns}, 'parked', 0 FROM gone""")


async def _recover(pool: asyncpg.Pool, scenario: Scenario, one: _Interrupted) -> None:
    """Has another relay deliver what is left, and checks what was delivered, before and now, and what is there."""
    after: list[UUID] = []
    outbox = one.outbox
    relay = Relay(
        outbox,
        pool,
        Destination("accepts", after.extend),
        commit=CommitStrategy(scenario.commit),
        order=scenario.order,
        on_failure=scenario.on_failure,
    )
    async with pool.acquire() as connection:
        while await _is_unfinished(connection, outbox):
            await relay.run_once()
        letters = {letter.message.id: letter for letter in await outbox.dead_letters(connection)}
        counts = await outbox.counts(connection)
    arrived = Counter([*one.accepted, *after])
    dead = set(letters)
    assert set(arrived) | dead == set(one.keys), "lost or invented"
    assert not set(arrived) & dead
    assert bool(dead) <= (scenario.answer in {"buries", "rejects"})
    twice = {name for name, times in arrived.items() if times > 1}
    assert len(twice) <= (BATCH if scenario.verb == "run_once" and not scenario.waiting else len(one.keys))
    assert twice <= set(one.accepted), "nothing is delivered twice after the interruption"
    assert max(arrived.values()) <= 2
    assert counts.pending == counts.waiting == 0
    assert counts.dispatched == (len(arrived) if scenario.commit == "mark" else 0)
    if scenario.order != "none":
        _check_the_order(scenario, one, list(arrived))
        if scenario.on_failure == "park":
            assert len({letter.behind for letter in letters.values()}) <= 1, "all of them behind the one"


def _check_the_order(scenario: Scenario, one: _Interrupted, first: list[UUID]) -> None:
    """The first deliveries came in the order of their positions, in each lane."""
    places = {name: place for place, name in enumerate(one.keys)}
    lanes: dict[str, list[int]] = {}
    # A delayed message has no place in the order.
    in_order = [name for name in first if one.keys[name] or not scenario.waiting]
    for name in in_order:
        if scenario.order == "total" or one.keys[name]:
            lanes.setdefault(one.keys[name] or "" if scenario.order == "key" else "", []).append(places[name])
    assert all(came == sorted(came) for came in lanes.values()), "out of order"


async def _is_unfinished(connection: Any, outbox: Outbox) -> bool:
    """Whether something is pending, or held; waits for the leases of the dead to run out, by the database's clock."""
    table = f'"{outbox.schema}"."{outbox.table}'
    await connection.execute(f'SELECT pg_sleep_until(max(until)) FROM {table}_relays"')
    left = await connection.fetchval(f"""
        SELECT (SELECT count(*) FROM {table}" WHERE dispatched_at IS NULL) + (SELECT count(*) FROM {table}_waiting")
            + (SELECT count(*) FROM {table}_claims") + (SELECT count(*) FROM {table}_relays")
            + (SELECT count(owner) FROM {table}_slots")""")
    return bool(left)


@contextmanager
def _no_complaints(*, collect: bool = True) -> Iterator[None]:
    """Fails when the loop is told of an error that nobody took notice of: a task's exception, never retrieved."""
    complaints: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    try:
        yield
        if collect:
            gc.collect()  # which is when tasks complain
    finally:
        loop.set_exception_handler(None)
    assert not complaints
