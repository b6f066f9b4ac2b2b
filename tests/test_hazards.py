"""What went wrong once, each with the smallest accident that brings it about again."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
import gc
import json
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any, Never
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest

from outbox import (
    ChainDispatcher,
    CommitStrategy,
    DatabaseLost,
    FailImmediately,
    HandlerDispatcher,
    Message,
    MessageDied,
    NoWaiting,
    Outbox,
    OutboxDispatcher,
    OutboxError,
    PartialDispatchError,
    RejectedError,
    Relay,
    RelayFenced,
    RelaysDied,
)
from outbox._claims import Buried, Claims, Rows  # noqa: TID251 -- another relay's steps one by one, and this one's in the act
from outbox._competing import Competing  # noqa: TID251 -- the same
from outbox._membership import Membership  # noqa: TID251 -- the same
from outbox._owning import Owning  # noqa: TID251 -- the same
from outbox._queries import Ordering  # noqa: TID251 -- the statements themselves
from outbox.embedded import Server
from tests.conformance.support import Events
from tests.conftest import StartServer
from tests.faults import FaultProxy
from tests.test_partly_down import suspect
from tests.test_relay import Destination, counts, drained, nothing_is_held, refuses, running, until_counts, write

pytestmark = pytest.mark.timeout(30)

_HOUR = timedelta(hours=1)
_MEGABYTE = 1_000_000
_WINDOW = 16 * 1024 * 1024
"""Bytes that a relay holds at most, and one message more."""


@dataclass(frozen=True)
class Call:
    """One call of the destination, which waits for the test's answer."""

    messages: tuple[Message, ...]
    answer: asyncio.Future[None]


class Asking:
    """A destination that leaves each answer to the test."""

    def __init__(self) -> None:
        self._calls: asyncio.Queue[Call] = asyncio.Queue()

    async def dispatch(self, *messages: Message) -> None:
        call = Call(messages, asyncio.get_running_loop().create_future())
        self._calls.put_nowait(call)
        await call.answer

    async def next(self) -> Call:
        return await self._calls.get()

    @property
    def is_idle(self) -> bool:
        """Whether no call waits to be taken."""
        return self._calls.empty()


class Floors:
    """Sees each attempt of a relay to raise its floor, below which it looks no more."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self._news = asyncio.Condition()

    async def add(self, floor: int) -> None:
        async with self._news:
            self.seen.append(floor)
            self._news.notify_all()

    async def until(self, condition: Callable[[list[int]], bool]) -> None:
        async with self._news:
            await self._news.wait_for(lambda: condition(self.seen))

    async def next(self) -> None:
        seen = len(self.seen)
        await self.until(lambda floors: len(floors) > seen)


@pytest.fixture
def floors(monkeypatch: pytest.MonkeyPatch) -> Floors:
    floors, raise_floor = Floors(), Claims.raise_floor

    async def raising(self: Claims, connection: Any) -> None:
        await raise_floor(self, connection)
        await floors.add(self._floor)

    monkeypatch.setattr(Claims, "raise_floor", raising)
    return floors


class OneSlowChunk(FaultProxy):
    """A network on which a single chunk is slow: the next one, once it is armed."""

    def __init__(self, target_port: int) -> None:
        self.armed = False
        self.delayed = asyncio.Event()
        super().__init__(target_port)

    @property
    def latency(self) -> timedelta:
        if not self.armed:
            return timedelta()
        self.armed = False
        self.delayed.set()
        return timedelta(milliseconds=500)

    @latency.setter
    def latency(self, _: timedelta) -> None:
        pass


@pytest.fixture
async def hand(dsn: str, outbox: Outbox) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Somebody who looks into the tables of the outbox, or meddles with them by hand."""
    connection = await asyncpg.connect(dsn, server_settings={"search_path": outbox.schema})
    yield connection
    await connection.close(timeout=5)


@asynccontextmanager
async def named_pool(dsn: str, size: int = 6, **settings: str) -> AsyncIterator[tuple[asyncpg.Pool[Any], str]]:
    """A pool, and the name by which the server knows its connections."""
    name = uuid4().hex
    pool = await asyncpg.create_pool(
        dsn, min_size=0, max_size=size, server_settings={"application_name": name, **settings}
    )
    try:
        yield pool, name
    finally:
        pool.terminate()


@asynccontextmanager
async def mortal(own_server: StartServer, **settings: str) -> AsyncIterator[tuple[Server, asyncpg.Pool[Any], Outbox]]:
    """A server to be killed, which writes down nothing that no transaction waits for, and a relay's pool on it."""
    lazy = {"wal_writer_delay": "10s", "wal_writer_flush_after": "100MB", "autovacuum": "off"}
    server, outbox = await own_server(**lazy, **settings), Outbox()
    async with named_pool(server.dsn) as (pool, _):
        async with pool.acquire() as connection:
            await outbox.migrate(connection)
        yield server, pool, outbox


async def crash(server: Server) -> None:
    await server.kill()
    await server.start()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():  # noqa: ASYNC110 -- what other sessions do to the database has no event
        await asyncio.sleep(0.01)


async def until_gone(pool: asyncpg.Pool[Any], name: str) -> None:
    """Waits until the server has nothing to do any more for the connections of this name."""

    async def gone() -> bool:
        backends = "SELECT NOT EXISTS (SELECT FROM pg_catalog.pg_stat_activity WHERE application_name = $1)"
        return bool(await pool.fetchval(backends, name))

    await until(gone)


def said(destination: Destination, *payloads: Any) -> Callable[[Destination], bool]:
    return lambda _: set(payloads) <= set(destination.accepted)


# --- a destination that answers in parts -------------------------------------------------------------------


async def test_what_the_first_of_a_chain_did_not_refuse_reaches_the_second_and_is_settled(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await write(pool, outbox, *range(10))
    faults = [refuses(0, error=ValueError("not this one"))]
    first, second = Destination(lambda messages: faults.pop()(messages) if faults else None), Destination()
    relay = Relay(outbox, pool, ChainDispatcher(first, second), backoff=NoWaiting())
    assert await relay.run_once() == 9
    assert second.accepted == list(range(1, 10))
    assert await counts(pool, outbox) == (0, 1, 1, 0)
    assert await relay.run_once() == 1
    assert second.accepted == [*range(1, 10), 0]


async def test_failures_named_by_something_else_than_an_id_settle_nothing(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    class Careless:
        async def dispatch(self, *messages: Message) -> None:
            raise PartialDispatchError({str(message.id): ValueError() for message in messages})  # type: ignore[misc]  # the mistake

    with pytest.raises(TypeError, match=r"named by message id, a uuid\.UUID, not '"):
        await Careless().dispatch(Message(1, topic="t"))
    await write(pool, outbox, 1, 2)
    assert await Relay(outbox, pool, Careless()).run_once() == 0
    assert await counts(pool, outbox) == (0, 2, 2, 0)


# --- claims that nobody knows of ---------------------------------------------------------------------------


async def test_a_relay_cancelled_while_its_claim_is_still_committing_leaves_no_claim_behind(
    dsn: str, pool: asyncpg.Pool[Any], outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination, claim_fresh = Destination(), Claims.claim_fresh
    async with OneSlowChunk(urlsplit(dsn).port or 0) as proxy:

        async def claiming(self: Claims, *arguments: Any, **settings: Any) -> list[Rows]:
            batches = await claim_fresh(self, *arguments, **settings)
            proxy.armed = len(batches) > 0 and destination.accepted == ["before"]  # what follows is the COMMIT
            return batches

        monkeypatch.setattr(Claims, "claim_fresh", claiming)
        async with named_pool(proxy.dsn(dsn)) as (slow, name):
            relay = Relay(outbox, slow, destination, poll_interval=_HOUR)
            relaying = asyncio.create_task(relay.run())
            await write(pool, outbox, "before")
            await destination.has_accepted(1)
            await write(pool, outbox, *range(5))
            await proxy.delayed.wait()
            relaying.cancel()
            await asyncio.wait([relaying])
        await until_gone(pool, name)  # whatever was under way has arrived
    assert await nothing_is_held(pool, outbox)
    # Fresh messages go ahead of the answer to the COMMIT.
    assert destination.accepted == ["before", *range(5)]
    await drained(pool, outbox, 0)


_TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1"


def swallows_the_commit_of(number: int, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """The network becomes a black hole between the claim of that many and its COMMIT; returns what tells of it."""
    claim, swallowed, claims = Competing.claim, asyncio.Event(), 0

    async def claiming(self: Competing, connection: Any) -> None:
        nonlocal claims
        await claim(self, connection)
        claims += bool(self._claimed)
        if self._claimed and claims == number:
            proxy.black_hole()
            swallowed.set()

    monkeypatch.setattr(Competing, "claim", claiming)
    return swallowed


@pytest.mark.parametrize("waits", [False, True], ids=["fresh", "waiting"])
async def test_a_claim_whose_commit_is_lost_is_delivered_ahead_of_it_unless_it_waited_and_no_message_is_lost(
    pool: asyncpg.Pool[Any],
    outbox: Outbox,
    proxy: FaultProxy,
    dsn: str,
    *,
    waits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    destination, events = Destination(), Events()
    swallows_the_commit_of(2, proxy, monkeypatch)
    await write(pool, outbox, "before")
    async with named_pool(proxy.dsn(dsn)) as (through, _):
        settings: dict[str, Any] = {"poll_interval": timedelta(milliseconds=20), "lease": timedelta(seconds=1)}
        async with running(outbox, through, destination, hooks=[events], **settings):
            await destination.has_accepted(1)
            await write(pool, outbox, *range(5), due_at=datetime(2020, 1, 1, tzinfo=UTC) if waits else None)
            if not waits:
                await destination.has_accepted(6)
            await events.wait_for(DatabaseLost)
            assert sorted(destination.accepted[1:]) == ([] if waits else list(range(5)))
            proxy.heal()
            await until_counts(pool, outbox, (0, 0, 0, 0))
    assert await nothing_is_held(pool, outbox)
    assert set(destination.accepted) == {"before", *range(5)}
    assert all(destination.accepted.count(number) <= 2 for number in range(5))


async def test_what_went_ahead_of_a_lost_commit_and_has_not_gone_out_is_delivered_once(
    pool: asyncpg.Pool[Any], outbox: Outbox, proxy: FaultProxy, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination, events = Asking(), Events()
    swallows_the_commit_of(2, proxy, monkeypatch)
    await write(pool, outbox, 1)
    async with named_pool(proxy.dsn(dsn)) as (through, _):
        settings: dict[str, Any] = {"poll_interval": timedelta(milliseconds=20), "lease": timedelta(seconds=1)}
        async with running(outbox, through, destination, concurrency=1, hooks=[events], **settings):
            first = await destination.next()
            await write(pool, outbox, 2)
            await events.wait_for(DatabaseLost)
            proxy.heal()
            first.answer.set_result(None)
            second = await destination.next()
            second.answer.set_result(None)
            await until_counts(pool, outbox, (0, 0, 0, 0))
            assert [message.payload for message in second.messages] == [2]
            assert destination.is_idle
    assert await nothing_is_held(pool, outbox)


async def test_what_failed_ahead_of_a_lost_commit_stays_with_the_relay_that_has_claimed_it_since(
    pool: asyncpg.Pool[Any],
    outbox: Outbox,
    proxy: FaultProxy,
    dsn: str,
    *,
    hand: asyncpg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    destination, events, other = Asking(), Events(), uuid4()
    swallowed = swallows_the_commit_of(1, proxy, monkeypatch)
    await write(pool, outbox, 1)
    async with named_pool(proxy.dsn(dsn)) as (through, name):
        settings: dict[str, Any] = {"poll_interval": _HOUR, "lease": timedelta(seconds=1)}
        async with running(outbox, through, destination, hooks=[events], **settings):
            call = await destination.next()
            await swallowed.wait()
            await hand.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1", name
            )
            await until_gone(pool, name)
            await hand.execute("INSERT INTO outbox_relays (owner, until) VALUES ($1, 'infinity')", other)
            await hand.execute("INSERT INTO outbox_claims SELECT position, $1, ARRAY[position] FROM outbox", other)
            call.answer.set_exception(RejectedError("never"))
            await events.wait_for(MessageDied)
            proxy.heal()
    assert await hand.fetchval("SELECT count(*) FROM outbox") == 1
    assert await hand.fetchval("SELECT count(*) FROM outbox_dead") == 0
    assert await hand.fetchval("SELECT owner FROM outbox_claims") == other


@pytest.mark.parametrize("verb", ["run", "run_once"])
async def test_what_is_held_by_relays_that_were_deleted_by_hand_is_found(
    pool: asyncpg.Pool[Any], outbox: Outbox, hand: asyncpg.Connection[Any], verb: str
) -> None:
    await write(pool, outbox, 1, 2)
    await write(pool, outbox, 3, due_at=datetime(2020, 1, 1, tzinfo=UTC))
    await hand.execute(
        "INSERT INTO outbox_claims SELECT max(position), gen_random_uuid(), array_agg(position) FROM outbox"
    )
    await hand.execute("UPDATE outbox_waiting SET owner = gen_random_uuid()")
    if verb == "run_once":
        await drained(pool, outbox, 3)
    else:
        destination = Destination()
        async with running(outbox, pool, destination):
            await destination.has_accepted(3)
    assert await counts(pool, outbox) == (0, 0, 0, 0)
    assert await nothing_is_held(pool, outbox)


# --- what is settled before a claim, and beside it -----------------------------------------------------------


async def test_a_suspect_settled_before_a_claim_makes_room_for_the_next_at_once(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    def woken(_: object) -> None:
        # As by the rollback of a writer: what is claimed next finds nothing, and settles first.
        outbox._wakeup._wake()  # noqa: SLF001 -- at this very moment

    destination = Destination(woken)
    await suspect(pool, outbox, "1", "2", "3")
    async with running(outbox, pool, destination, poll_interval=_HOUR):
        await destination.has_accepted(3)


@pytest.mark.parametrize("order", ["none", "key"])
async def test_what_was_delivered_is_settled_while_others_are_claimed(
    pool: asyncpg.Pool[Any], outbox: Outbox, monkeypatch: pytest.MonkeyPatch, order: Ordering
) -> None:
    gate, held, destination = asyncio.Event(), asyncio.Event(), Asking()
    kind, name = (Claims, "claim_fresh") if order == "none" else (Owning, "_read")
    claim = getattr(kind, name)

    async def hold(*arguments: Any, **options: Any) -> Any:
        if not gate.is_set():
            held.set()
            await gate.wait()
        return await claim(*arguments, **options)

    gate.set()
    monkeypatch.setattr(kind, name, hold)
    await write(pool, outbox, 1, 2, 3)
    async with running(outbox, pool, destination, order=order, lease=_HOUR):
        call = await destination.next()
        gate.clear()
        await held.wait()
        call.answer.set_result(None)
        await until_counts(pool, outbox, (0, 0, 0, 0))
        gate.set()


@pytest.mark.parametrize("order", ["none", "key"])
async def test_a_settling_that_somebody_holds_up_does_not_hold_up_the_lease(
    pool: asyncpg.Pool[Any], outbox: Outbox, hand: asyncpg.Connection[Any], order: Ordering
) -> None:
    destination, events = Asking(), Events()
    await write(pool, outbox, *range(1_000))
    settings = {"batch_size": 10, "concurrency": 1, "lease": timedelta(seconds=1), "hooks": [events], "order": order}
    async with running(outbox, pool, destination, **settings):
        first = await destination.next()
        lock = hand.transaction()
        await lock.start()
        await hand.execute("SELECT FROM outbox WHERE position = $1 FOR UPDATE", first.messages[0].position)
        now = await hand.fetchval("SELECT clock_timestamp()")
        first.answer.set_result(None)

        async def answering() -> None:
            while True:
                (await destination.next()).answer.set_result(None)

        async def renewed() -> bool:
            seconds = "SELECT extract(epoch FROM until - $1)::float8 FROM outbox_relays"
            return bool(await hand.fetchval(seconds, now) > 4)

        async with asyncio.TaskGroup() as tasks:
            answers = tasks.create_task(answering())
            await until(renewed)
            assert await hand.fetchval("SELECT count(*) FROM outbox WHERE position = $1", first.messages[0].position)
            await lock.rollback()
            await until_counts(pool, outbox, (0, 0, 0, 0))
            answers.cancel()
    assert not [*events.of(RelayFenced), *events.of(RelaysDied)]


# --- what a relay knew of a server that crashed ------------------------------------------------------------


@pytest.mark.parametrize("commit", CommitStrategy)
@pytest.mark.parametrize("are_delayed", [False, True], ids=["fresh", "delayed"])
@pytest.mark.parametrize(
    ("notices", "fails"), [(False, False), (True, False), (True, True)], ids=["unnoticed", "noticed", "noticed, failed"]
)
async def test_what_was_given_out_anew_is_not_settled_for_what_was_forgotten(
    commit: CommitStrategy,
    pool: asyncpg.Pool[Any],
    outbox: Outbox,
    hand: asyncpg.Connection[Any],
    *,
    are_delayed: bool,
    notices: bool,
    fails: bool,
) -> None:
    """As after a failover to a standby that was behind: claim and messages are gone, their positions taken."""
    membership = Membership(outbox, _HOUR, "none")
    hands = Competing(outbox, membership, batch_size=10, concurrency=1, commit=commit, poll_interval=_HOUR)
    await write(pool, outbox, 1, 2, 3)
    async with pool.acquire() as connection:
        async with connection.transaction():
            await membership.register(connection)
        async with connection.transaction():
            await hands.claim(connection)
        hands.claimed()
        batch = hands.take()
        assert batch
        if fails:
            hands.failed(batch, [Buried(one, 1, "no") for one in (1, 2, 3)])
        else:
            hands.delivered(batch, batch.messages)
        hands.done(batch, [])
        await hand.execute("TRUNCATE outbox, outbox_claims RESTART IDENTITY")
        await write(pool, outbox, "a", "b", "c", due_at=datetime.now(UTC) + _HOUR if are_delayed else None)
        if notices:
            hands.doubt()
            # The same relay may have claimed the new ones since, and so under the same name.
            await hand.execute("INSERT INTO outbox_claims VALUES (3, $1, '{1, 2, 3}')", membership.owner)
        settlement = hands.to_settle()
        assert settlement
        async with connection.transaction():
            await hands.settle(connection, settlement)
        hands.settled(settlement)
        left = await outbox.retrieve(connection, 10)
    assert [(message.position, message.payload) for message in left] == [(1, "a"), (2, "b"), (3, "c")]
    assert await counts(pool, outbox) == (0, 3, 3 if are_delayed else 0, 0)


async def test_a_claim_that_is_gone_does_not_take_another_one_with_it(
    pool: asyncpg.Pool[Any], outbox: Outbox, hand: asyncpg.Connection[Any]
) -> None:
    """Settled together with what somebody has cleared away by hand, a message is settled nevertheless."""
    membership = Membership(outbox, _HOUR, "none")
    settings = {"commit": CommitStrategy.DELETE, "poll_interval": _HOUR}
    hands = Competing(outbox, membership, batch_size=10, concurrency=1, **settings)  # type: ignore[arg-type]
    async with pool.acquire() as connection:
        async with connection.transaction():
            await membership.register(connection)
        for payload in (1, 2):
            await write(pool, outbox, payload)
            async with connection.transaction():
                await hands.claim(connection)
            hands.claimed()
            batch = hands.take()
            assert batch
            hands.delivered(batch, batch.messages)
            hands.done(batch, [])
            if payload == 1:
                await outbox.clear(hand)
        settlement = hands.to_settle()
        assert settlement
        assert len(settlement.delivered) == 2
        async with connection.transaction():
            await hands.settle(connection, settlement)
        hands.settled(settlement)
    assert await counts(pool, outbox) == (0, 0, 0, 0)
    assert await hand.fetchval("SELECT count(*) FROM outbox_claims") == 0


@pytest.mark.timeout(60)  # as long as all of its chances may take
async def test_positions_that_a_crash_gives_out_anew_are_delivered(own_server: StartServer, floors: Floors) -> None:
    async with mortal(own_server) as (server, pool, outbox), named_pool(server.dsn, synchronous_commit="off") as quick:
        if server.version < 18:
            pytest.skip("before PostgreSQL 18 the log is flushed page by page: too little of it can be lost on purpose")
        destination = Destination()

        async def rewound() -> bool:
            await pool.execute("CHECKPOINT")
            known = len(destination.accepted)
            await write(quick[0], outbox, *range(200))
            await destination.has_accepted(known + 200)
            before: int = await pool.fetchval("SELECT last_value FROM outbox_position")
            await floors.until(lambda seen: bool(seen) and seen[-1] >= before)
            await crash(server)
            after: int = await pool.fetchval("SELECT last_value FROM outbox_position")
            return after < before - 100

        async with running(outbox, pool, destination):
            # The server may happen to flush its log just then, so the accident is given several chances.
            for _ in range(5):
                if await rewound():
                    break
            else:
                pytest.fail("the accident did not happen")
            await write(pool, outbox, "a", "b", "c")
            await destination.until(said(destination, "a", "b", "c"))


async def test_a_transaction_prepared_before_a_crash_and_committed_after_it_is_delivered(
    own_server: StartServer, floors: Floors
) -> None:
    async with mortal(own_server, max_prepared_transactions="5") as (server, pool, outbox):
        destination = Destination()
        async with running(outbox, pool, destination, lease=timedelta(minutes=1)):
            await pool.execute("CHECKPOINT")  # the relay itself is not forgotten
            writer = await asyncpg.connect(server.dsn)
            await writer.execute("BEGIN")
            await OutboxDispatcher(writer, outbox).dispatch(Message("prepared", topic="t"))
            await write(pool, outbox, "another")
            await destination.until(said(destination, "another"))
            await floors.next()  # its writer is known
            await writer.execute("PREPARE TRANSACTION 'slow'")
            await crash(server)
            writer.terminate()
            await floors.next()
            assert destination.accepted == ["another"]
            await pool.execute("COMMIT PREPARED 'slow'")
            await destination.until(said(destination, "prepared"))


async def test_a_claim_that_a_crash_forgot_may_have_the_name_of_the_next_one(own_server: StartServer) -> None:
    async with mortal(own_server) as (server, pool, outbox):
        destination = Asking()
        async with running(outbox, pool, destination):
            await pool.execute("CHECKPOINT")  # the relay itself is not forgotten
            await write(pool, outbox, *range(3))
            calls = [await destination.next()]
            await crash(server)
            calls.append(await destination.next())
            assert [message.position for call in calls for message in call.messages] == [1, 2, 3] * 2
            for call in calls:
                call.answer.set_result(None)
            await write(pool, outbox, "next")
            last = await destination.next()
            assert [message.payload for message in last.messages] == ["next"]
            last.answer.set_result(None)
            await until_counts(pool, outbox, (0, 0, 0, 0))


# --- a relay that cannot begin yet -------------------------------------------------------------------------


async def test_a_relay_that_is_never_told_that_it_has_registered_registers_again(
    pool: asyncpg.Pool[Any], outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute, unanswered = asyncpg.Connection.execute, [True]

    async def losing(self: asyncpg.Connection[Any], statement: str, *arguments: Any, **options: Any) -> str:
        status = await execute(self, statement, *arguments, **options)
        if statement.startswith("COMMIT") and unanswered:
            unanswered.clear()
            raise ConnectionResetError("no answer to the COMMIT")
        return status

    monkeypatch.setattr(asyncpg.Connection, "execute", losing)
    destination, events = Destination(), Events()
    async with running(outbox, pool, destination, hooks=[events]):
        assert len(events.of(DatabaseLost)) == 1
        await write(pool, outbox, 1)
        await destination.has_accepted(1)
    assert await nothing_is_held(pool, outbox)


async def test_a_relay_waits_for_the_connections_of_a_pool_that_is_busy(dsn: str, outbox: Outbox) -> None:
    destination, events = Destination(), Events()
    async with named_pool(dsn, size=2) as (small, _):
        busy = await small.acquire()
        async with running(outbox, small, destination, hooks=[events], lease=timedelta(milliseconds=300)):
            await events.wait_for(DatabaseLost, 2)
            async with busy.transaction():
                await OutboxDispatcher(busy, outbox).dispatch(Message(1, topic="t"))
            await small.release(busy)
            await destination.has_accepted(1)


# --- code of the user's that fails -------------------------------------------------------------------------


class Unspeakable(Exception):  # noqa: N818 -- not one that anybody should have
    def __str__(self) -> str:
        raise ValueError("no words")


def _raises(error: type[Exception]) -> Callable[..., Never]:
    def fail(*_: object) -> Never:
        raise error

    return fail


@pytest.mark.parametrize(
    ("settings", "fault", "left"),
    [
        ({}, Unspeakable, (0, 0, 0, 1)),
        ({"upcast": lambda message: [None] if message.payload == "poison" else [message]}, None, (0, 0, 0, 1)),
        ({"backoff": _raises(KeyError)}, ValueError, (0, 1, 1, 0)),
    ],
    ids=["an error without words", "an upcast to nothing", "a back-off that raises"],
)
async def test_a_mistake_in_the_users_code_costs_its_message_at_most_and_never_the_relay(
    pool: asyncpg.Pool[Any],
    outbox: Outbox,
    settings: dict[str, Any],
    fault: type[Exception] | None,
    left: tuple[int, int, int, int],
) -> None:
    await write(pool, outbox, "poison", "good")
    destination = Destination(lambda messages: _raises(fault)() if fault and messages[0].payload == "poison" else None)
    async with running(outbox, pool, destination, batch_size=1, **{"backoff": FailImmediately(), **settings}):
        await until_counts(pool, outbox, left)
        await write(pool, outbox, "next")
        await destination.has_accepted(2)
    assert destination.accepted == ["good", "next"]
    assert await counts(pool, outbox) == left


# --- one batch at a time -----------------------------------------------------------------------------------


async def test_run_once_gives_signs_of_life_while_its_destination_works(
    pool: asyncpg.Pool[Any], outbox: Outbox, hand: asyncpg.Connection[Any]
) -> None:
    lease, slow, other = timedelta(seconds=1), Asking(), Destination()
    await write(pool, outbox, *range(5))
    once = asyncio.create_task(Relay(outbox, pool, slow, lease=lease).run_once())
    call = await slow.next()
    expected = await hand.fetchval("SELECT until FROM outbox_relays")

    async def outlived() -> bool:
        return bool(other.accepted or await hand.fetchval("SELECT clock_timestamp() > $1", expected + lease / 3))

    async with running(outbox, pool, other, lease=lease):
        await until(outlived)
        assert other.accepted == []
        call.answer.set_result(None)
        assert await once == 5
    assert other.accepted == []


class Locking(Destination):
    """A destination during which an operator comes to look at the first message, and stays."""

    def __init__(self, hand: asyncpg.Connection[Any]) -> None:
        super().__init__()
        self._hand = hand

    async def dispatch(self, *messages: Message) -> None:
        if not self.calls:
            await self._hand.execute("BEGIN; SELECT FROM outbox ORDER BY position LIMIT 1 FOR UPDATE")
        await super().dispatch(*messages)


async def test_run_once_says_so_when_it_cannot_settle(
    pool: asyncpg.Pool[Any], outbox: Outbox, hand: asyncpg.Connection[Any]
) -> None:
    await write(pool, outbox, *range(3))
    relay = Relay(outbox, pool, Locking(hand), lease=timedelta(seconds=1))
    with pytest.raises(OutboxError, match="cannot deliver"):
        await relay.run_once()
    await hand.execute("ROLLBACK")
    assert await counts(pool, outbox) == (0, 3, 0, 0)
    await until_lapsed(hand)
    await drained(pool, outbox, 3)


async def until_lapsed(hand: asyncpg.Connection[Any]) -> None:
    async def lapsed() -> bool:
        return bool(
            await hand.fetchval("SELECT NOT EXISTS (SELECT FROM outbox_relays WHERE until >= clock_timestamp())")
        )

    await until(lapsed)


# --- leases that have run out ------------------------------------------------------------------------------


async def test_what_a_relay_did_before_it_was_taken_for_dead_does_not_touch_what_it_claims_anew(
    pool: asyncpg.Pool[Any], outbox: Outbox, hand: asyncpg.Connection[Any]
) -> None:
    destination, events = Asking(), Events()
    async with running(outbox, pool, destination, hooks=[events], lease=timedelta(seconds=1)):
        await write(pool, outbox, "disputed")
        first = await destination.next()
        async with hand.transaction():  # another relay takes over
            await hand.execute("UPDATE outbox_relays SET until = now() - interval '1 h'")
            taken = await Membership(outbox, _HOUR, "none").take_over(hand)
            assert (taken.relays, taken.messages) == (1, 1)
        await events.wait_for(RelayFenced)
        second = await destination.next()
        assert second.messages[0].id == first.messages[0].id
        first.answer.set_exception(RejectedError("never"))
        await events.wait_for(MessageDied)
        await write(pool, outbox, "settled after that")
        (await destination.next()).answer.set_result(None)
        await until(lambda: _is_empty(hand))
        assert await counts(pool, outbox) == (0, 1, 1, 0)
        second.answer.set_result(None)
        await until_counts(pool, outbox, (0, 0, 0, 0))


async def _is_empty(hand: asyncpg.Connection[Any]) -> bool:
    return bool(await hand.fetchval("SELECT NOT EXISTS (SELECT FROM outbox)"))


async def test_a_relay_whose_own_lease_has_run_out_does_not_bury_itself(
    pool: asyncpg.Pool[Any], outbox: Outbox, hand: asyncpg.Connection[Any]
) -> None:
    await hand.execute("""
        CREATE FUNCTION lapse() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN NEW.until := now() - interval ''1 h''; RETURN NEW; END';
        CREATE TRIGGER lapse BEFORE INSERT ON outbox_relays FOR EACH ROW EXECUTE FUNCTION lapse()""")
    await write(pool, outbox, *range(3))
    assert await Relay(outbox, pool, Destination()).run_once() == 3, "it looks for the dead before it claims"
    await write(pool, outbox, *range(3))
    destination, events = Destination(), Events()
    async with running(outbox, pool, destination, hooks=[events], lease=timedelta(seconds=1)):
        await destination.has_accepted(3)
    assert not events.of(RelaysDied)
    assert not events.of(RelayFenced)


# --- what the relay leaves to the server -------------------------------------------------------------------


async def test_a_statement_that_the_relay_gave_up_does_not_stay_on_the_server(
    dsn: str, pool: asyncpg.Pool[Any], outbox: Outbox, hand: asyncpg.Connection[Any]
) -> None:
    destination, events = Locking(hand), Events()
    await write(pool, outbox, *range(3))
    lease = timedelta(milliseconds=500)
    async with named_pool(dsn) as (own, name), running(outbox, own, destination, hooks=[events], lease=lease):
        await events.wait_for(DatabaseLost, 2)
    await until_gone(pool, name)
    await hand.execute("ROLLBACK")
    assert await counts(pool, outbox) == (0, 3, 0, 0), "the lock was there all the time"


async def test_a_cleanup_in_a_table_where_nothing_is_old_enough_looks_at_few_rows(
    outbox: Outbox, hand: asyncpg.Connection[Any]
) -> None:
    await hand.execute(
        "INSERT INTO outbox (id, topic, payload, dispatched_at)"
        " SELECT gen_random_uuid(), 't', '1', now() FROM generate_series(1, 20000)"
    )
    await hand.execute("ANALYZE outbox")
    assert await outbox.cleanup(hand, _HOUR, 100) == 0
    queries = outbox._queries  # noqa: SLF001 -- how much it looks at, only the plan can tell
    async with hand.transaction():
        (plan,) = json.loads(await hand.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {queries.cleanup}", _HOUR, 100))
    assert max(map(_seen, _nodes(plan["Plan"]))) <= 200


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from _nodes(part)


def _seen(node: dict[str, Any]) -> float:
    return float(node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)))


# --- memory ------------------------------------------------------------------------------------------------


async def test_a_dispatcher_made_for_each_request_without_an_outbox_costs_no_memory(
    connection: asyncpg.Connection[Any],
) -> None:
    def outboxes() -> int:
        return sum(type(one) is Outbox for one in gc.get_objects())

    before = outboxes()
    dispatchers = [OutboxDispatcher(connection) for _ in range(100)]
    assert len(dispatchers) == 100
    assert outboxes() == before


async def test_an_outbox_that_nobody_uses_any_more_is_forgotten_with_its_statements(
    outbox: Outbox, hand: asyncpg.Connection[Any]
) -> None:
    passing = Outbox(schema=outbox.schema)
    await passing.persist(hand, *(Message(number, topic="t") for number in range(20)))
    statements = weakref.ref(passing._queries)  # noqa: SLF001 -- it is these that take the memory
    del passing
    gc.collect()
    assert statements() is None


@pytest.mark.parametrize("table", ["outbox", "outbox_waiting"])
async def test_large_messages_after_small_ones_do_not_fill_the_memory(
    pool: asyncpg.Pool[Any], outbox: Outbox, hand: asyncpg.Connection[Any], table: str
) -> None:
    held: list[int] = []
    columns, values = ("", "") if table == "outbox" else (", due_at", ", now()")

    async def fill(count: int, size: int) -> None:
        await hand.execute(
            f"INSERT INTO {table} (id, topic, payload{columns})"  # noqa: S608 -- our own table
            f" SELECT gen_random_uuid(), 't', convert_to('\"' || repeat('x', {size}) || '\"', 'UTF8'){values}"
            f" FROM generate_series(1, {count})"
        )

    async def weigh(message: Message) -> None:
        if len(message.body) > _MEGABYTE:
            held.append(
                await hand.fetchval("""
                    SELECT COALESCE((SELECT sum(octet_length(payload)) FROM outbox
                                     WHERE position IN (SELECT unnest(positions) FROM outbox_claims)), 0)
                         + COALESCE((SELECT sum(octet_length(payload)) FROM outbox_waiting
                                     WHERE owner IS NOT NULL), 0)""")
            )

    async with running(outbox, pool, HandlerDispatcher(weigh), batch_size=10, concurrency=1):
        await fill(400, 10)
        await until_counts(pool, outbox, (0, 0, 0, 0))
        await fill(40, _MEGABYTE)
        await until_counts(pool, outbox, (0, 0, 0, 0))
    assert len(held) == 40
    assert max(held) <= _WINDOW + _MEGABYTE + 2


# --- the network and the pool ------------------------------------------------------------------------------


async def test_a_relay_is_back_soon_after_a_black_hole_of_many_limits(
    dsn: str, pool: asyncpg.Pool[Any], outbox: Outbox, proxy: FaultProxy
) -> None:
    destination, events, lease = Destination(), Events(), timedelta(milliseconds=600)
    async with named_pool(proxy.dsn(dsn)) as (own, _), running(outbox, own, destination, hooks=[events], lease=lease):
        proxy.black_hole()
        await write(pool, outbox, 1)
        await events.wait_for(DatabaseLost, 12)  # three tasks, four limits each
        proxy.heal()
        healed = monotonic()
        await destination.has_accepted(1)
        assert monotonic() - healed < 2


async def test_closing_the_pool_under_a_relay_ends_both(dsn: str, pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    closing = await asyncpg.create_pool(dsn, min_size=0, max_size=4)
    relaying = asyncio.create_task(Relay(outbox, closing, Destination()).run())
    await write(pool, outbox, *range(3))
    await until_counts(pool, outbox, (0, 0, 0, 0))
    async with asyncio.timeout(10):
        await closing.close()
        await relaying
    assert await nothing_is_held(pool, outbox)


@pytest.mark.parametrize(("listen", "wanted"), [(False, 2), (True, 3)])
async def test_the_complaint_about_a_pool_that_is_too_small_says_who_else_may_need_connections(
    dsn: str, outbox: Outbox, *, listen: bool, wanted: int
) -> None:
    async with asyncpg.create_pool(dsn, min_size=0, max_size=wanted - 1) as pool:
        with pytest.raises(ValueError, match=f"max_size of at least {wanted}, and more when .* the destination"):
            await Relay(outbox, pool, Destination(), listen=listen).run()


# --- who is waited for -------------------------------------------------------------------------------------


async def test_who_settles_is_no_writer_and_who_has_taken_a_position_is_one(
    dsn: str, outbox: Outbox, hand: asyncpg.Connection[Any]
) -> None:
    queries = Claims(outbox, Membership(outbox, _HOUR, "none"))._queries  # noqa: SLF001 -- the statement itself
    insert = "INSERT INTO outbox (position, id, topic, headers, payload) VALUES ($1, gen_random_uuid(), 't', '{}', '')"
    settle: tuple[Any, ...] = (queries.remove_claimed, "{1}", uuid4(), [], [])

    async def is_waited_for(*statements: tuple[Any, ...]) -> bool:
        other = await asyncpg.connect(dsn, server_settings={"search_path": outbox.schema})
        transaction = other.transaction()
        await transaction.start()
        for statement, *arguments in statements:
            await other.execute(statement, *arguments)
        writers = await hand.fetch(queries.writers)
        await transaction.rollback()
        await other.close()
        return bool(writers)

    assert not await is_waited_for(("SELECT 1",))
    assert not await is_waited_for(settle)
    assert await is_waited_for((insert, 7)), "also with a position of its own"
    fresh = insert.replace("(position, ", "(").replace("$1, ", "")
    assert await is_waited_for((fresh,))
    assert await is_waited_for(settle, (fresh,)), "whatever else it does"
