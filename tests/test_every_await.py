# ruff: noqa: S608 -- the tables are our own
"""Cancelled and killed at every single await of a cycle, found by counting them: nothing is lost, nothing left behind.

Each test interrupts a cycle at its first await, another at its second, and so on, until one comes to its end.
"""

import asyncio
import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from outbox import CommitStrategy, Message, Outbox, OutboxDispatcher, Relay
from tests.interrupted import (
    BATCH,
    MESSAGES,
    Awaits,
    Destination,
    Interruption,
    Scenario,
    accepted_by_the_dead,
    cycle,
    killer,
)

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


# The last figure: how many awaits from one interruption to the next.
_CANCELLED = [
    (Scenario(), _when_asked, 1),
    (Scenario("partial", commit="mark"), _when_answered, 1),
    (Scenario("buries"), _by_its_scope, 1),
    (Scenario("raises", waiting=True), _when_answered, 2),
    (Scenario("unavailable", waiting=True, commit="mark"), _by_its_scope, 2),
    (Scenario("partial", waiting=True, verb="run"), _when_asked, 2),
    (Scenario("raises", commit="mark", verb="run"), _by_its_scope, 2),
]
_KILLED = [
    (Scenario("partial", commit="mark"), 2),
    (Scenario("raises", waiting=True), 3),
    (Scenario("buries", verb="run"), 3),
]


@dataclass
class _Interrupted:
    """A cycle that was interrupted: its table, what is in it, and what was delivered."""

    outbox: Outbox
    ids: set[UUID]
    accepted: list[UUID] = field(default_factory=list)


@pytest.mark.parametrize(("scenario", "interrupt", "step"), _CANCELLED)
async def test_a_relay_cancelled_at_any_await_loses_nothing_and_leaves_nothing_behind(
    dsn: str, pool: asyncpg.Pool, outbox: Outbox, *, scenario: Scenario, interrupt: Interruption, step: int
) -> None:
    cancelled, leaks = [], []
    relays_pool = await asyncpg.create_pool(dsn, min_size=0, max_size=3)
    with _no_complaints():
        for at in range(1, _AT_MOST, step):
            one = await _prepare(pool, outbox, scenario, at)
            destination = Destination(scenario.answer, one.accepted.extend)
            awaits = Awaits(at, interrupt)
            await cycle(scenario.relay(one.outbox, relays_pool, destination), scenario, destination, one.ids, awaits)
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


@pytest.mark.parametrize(("scenario", "step"), _KILLED, ids=str)
async def test_a_relay_killed_at_any_await_loses_nothing_and_leaves_nothing_behind(
    dsn: str, pool: asyncpg.Pool, outbox: Outbox, tmp_path: Path, *, scenario: Scenario, step: int
) -> None:
    killed = []
    async with killer(dsn) as forks:
        for at in range(1, _AT_MOST, step):
            one, path = await _prepare(pool, outbox, scenario, at), tmp_path / str(at)
            was_killed = await forks.kill(one.outbox, scenario, one.ids, path, at=at)
            one.accepted = accepted_by_the_dead(path)
            killed.append(one)
            if not was_killed:
                break
    for one in killed:
        await _recover(pool, scenario, one)
    assert at > 40, "the awaits were counted"


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


async def _prepare(pool: asyncpg.Pool, outbox: Outbox, scenario: Scenario, number: int) -> _Interrupted:
    """Makes a table for one cycle: when the last was interrupted, the leases of the first have run out."""
    own = Outbox(f"outbox_{number}", schema=outbox.schema)
    async with pool.acquire() as connection, connection.transaction():
        await own.migrate(connection)
        if scenario.waiting:
            messages = [Message(n, topic="t", due_at=datetime.now(UTC)) for n in range(BATCH + 1)]
        else:
            messages = [Message(n, topic="t") for n in range(MESSAGES)]
        await own.persist(connection, *messages)
        # The first of those that wait was in the hands of a relay that died.
        await connection.execute(f"""
            UPDATE "{own.schema}"."{own.table}_waiting" SET suspect = 'crash' WHERE payload = '0'""")
    return _Interrupted(own, {message.id for message in messages})


async def _recover(pool: asyncpg.Pool, scenario: Scenario, one: _Interrupted) -> None:
    """Has another relay deliver what is left, and checks what was delivered, before and now, and what is there."""
    after: list[UUID] = []
    outbox = one.outbox
    relay = Relay(outbox, pool, Destination("accepts", after.extend), commit=CommitStrategy(scenario.commit))
    async with pool.acquire() as connection:
        while await _is_unfinished(connection, outbox):
            await relay.run_once()
        dead = {letter.message.id for letter in await outbox.dead_letters(connection)}
        counts = await outbox.counts(connection)
    arrived = Counter([*one.accepted, *after])
    assert set(arrived) | dead == one.ids, "lost or invented"
    assert not set(arrived) & dead
    assert bool(dead) <= (scenario.answer == "buries")
    twice = {name for name, times in arrived.items() if times > 1}
    assert len(twice) <= (BATCH if scenario.verb == "run_once" and not scenario.waiting else len(one.ids))
    assert twice <= set(one.accepted), "nothing is delivered twice after the interruption"
    assert max(arrived.values()) <= 2
    assert counts.pending == counts.waiting == 0
    assert counts.dispatched == (len(arrived) if scenario.commit == "mark" else 0)


async def _is_unfinished(connection: Any, outbox: Outbox) -> bool:
    """Whether something is pending, or held; waits for the leases of the dead to run out, by the database's clock."""
    table = f'"{outbox.schema}"."{outbox.table}'
    await connection.execute(f'SELECT pg_sleep_until(max(until)) FROM {table}_relays"')
    left = await connection.fetchval(f"""
        SELECT (SELECT count(*) FROM {table}" WHERE dispatched_at IS NULL) + (SELECT count(*) FROM {table}_waiting")
            + (SELECT count(*) FROM {table}_claims") + (SELECT count(*) FROM {table}_relays")""")
    return bool(left)


@contextmanager
def _no_complaints() -> Iterator[None]:
    """Fails when the loop is told of an error that nobody took notice of: a task's exception, never retrieved."""
    complaints: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    try:
        yield
        gc.collect()  # which is when tasks complain
    finally:
        loop.set_exception_handler(None)
    assert not complaints
