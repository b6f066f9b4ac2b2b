"""`Relay(order=…)`: what is kept in order, what an order waits for, and what becomes of those behind a failure."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import asyncpg
import pytest

from outbox import (
    CommitStrategy,
    DestinationUnavailableError,
    HandlerDispatcher,
    LinearBackOff,
    Message,
    MessageFailed,
    NoWaiting,
    Outbox,
    OutboxDispatcher,
    PartialDispatchError,
    RejectedError,
    Relay,
    RelayAtWork,
    RelayFenced,
    RelayStandsBy,
    WriterLate,
)
from outbox._membership import Membership  # noqa: TID251 -- what another relay does, when this one is taken for dead
from tests.conftest import StartServer
from tests.test_hazards import Asking
from tests.test_relay import (
    Destination,
    Events,
    counts,
    fails,
    nothing_is_held,
    refuses,
    running,
    until_counts,
    write,
)

pytestmark = pytest.mark.timeout(30)

_HOUR = timedelta(hours=1)
_SOON = timedelta(milliseconds=50)
_LATER = LinearBackOff(initial=_HOUR, maximum=_HOUR, max_tries=-1)
_ORDERS = ["key", "total"]


class Keys:
    """A destination that keeps what it got by key, and says who was in it at the same time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.by_key: defaultdict[str | None, list[int]] = defaultdict(list)
        self.positions: list[int] = []
        self.together = 0
        self.seconds = seconds
        self._inside: list[frozenset[str | None]] = []
        self._changed = asyncio.Condition()

    async def dispatch(self, *messages: Message) -> None:
        keys = frozenset(message.key for message in messages)
        for others in self._inside:
            assert not (keys & others) - {None}, "a key was in two deliveries at once"
        self._inside.append(keys)
        self.together = max(self.together, len(self._inside))
        await asyncio.sleep(self.seconds)
        self._inside.remove(keys)
        async with self._changed:
            for message in messages:
                assert message.position is not None
                self.by_key[message.key].append(message.position)
                self.positions.append(message.position)
            self._changed.notify_all()

    async def has(self, count: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.positions) >= count)

    @property
    def is_in_order(self) -> bool:
        return all(got == sorted(got) for key, got in self.by_key.items() if key is not None)


async def write_keyed(pool: asyncpg.Pool[Any], outbox: Outbox, *keys: str | None) -> list[Message]:
    """One message for each key, in one transaction; the payload says the how manieth of its key it is."""
    number: defaultdict[str | None, int] = defaultdict(int)
    messages = []
    for key in keys:
        number[key] += 1
        messages.append(Message(f"{key}{number[key]}", topic="t", key=key))
    async with pool.acquire() as connection, connection.transaction():
        await OutboxDispatcher(connection, outbox).dispatch(*messages)
    return messages


async def slots(pool: asyncpg.Pool[Any], outbox: Outbox) -> dict[UUID | None, int]:
    """How many slots each relay owns."""
    async with pool.acquire() as connection:
        rows = await connection.fetch(f"SELECT owner, count(*) FROM {outbox.schema}.outbox_slots GROUP BY 1")  # noqa: S608 -- our own schema
    return {row["owner"]: row["count"] for row in rows}


async def until_slots(pool: asyncpg.Pool[Any], outbox: Outbox, *wanted: int) -> None:
    async def shared() -> list[int]:
        return sorted(count for owner, count in (await slots(pool, outbox)).items() if owner)

    while await shared() != sorted(wanted):  # noqa: ASYNC110 -- what is written down in the table has no event
        await asyncio.sleep(0.02)


async def dead(pool: asyncpg.Pool[Any], outbox: Outbox) -> list[Any]:
    async with pool.acquire() as connection:
        return [letter.message.payload for letter in await outbox.dead_letters(connection)]


@pytest.fixture
async def writer(dsn: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """A second connection, for a transaction that takes its time."""
    connection = await asyncpg.connect(dsn)
    yield connection
    connection.terminate()


# --- the order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relays", [1, 3])
@pytest.mark.parametrize("commit", CommitStrategy)
async def test_the_messages_of_a_key_arrive_in_the_order_of_their_positions(
    relays: int, commit: CommitStrategy, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    destination, dice = Keys(), random.Random(7)
    async with AsyncExitStack() as stack:
        for _ in range(relays):
            settings: dict[str, Any] = {
                "order": "key",
                "commit": commit,
                "batch_size": 10,
                "lease": timedelta(seconds=2),
            }
            await stack.enter_async_context(running(outbox, pool, destination, **settings))
        for _ in range(40):
            await write_keyed(pool, outbox, *(f"key {dice.randrange(30)}" for _ in range(25)))
        await destination.has(1_000)
    assert destination.is_in_order
    assert len(set(destination.positions)) == len(destination.positions) == 1_000
    assert await nothing_is_held(pool, outbox)


async def test_all_messages_arrive_in_the_order_of_their_positions(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination = Keys()
    async with (
        running(outbox, pool, destination, order="total", batch_size=7),
        running(outbox, pool, destination, order="total", batch_size=7),
    ):
        for _ in range(20):
            await write_keyed(pool, outbox, "a", None, "b", "a", "c")
        await destination.has(100)
    assert destination.positions == sorted(destination.positions)


async def test_concurrent_writers_of_one_key_do_not_break_its_order(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination, dice = Keys(), random.Random(11)

    async def writing() -> None:
        for _ in range(20):
            async with pool.acquire() as connection, connection.transaction():
                await OutboxDispatcher(connection, outbox).dispatch(Message(1, topic="t", key=f"k{dice.randrange(4)}"))
                await asyncio.sleep(dice.uniform(0, 0.01))
                await OutboxDispatcher(connection, outbox).dispatch(Message(2, topic="t", key=f"k{dice.randrange(4)}"))

    async with running(outbox, pool, destination, order="key"), running(outbox, pool, destination, order="key"):
        await asyncio.gather(*(writing() for _ in range(5)))
        await destination.has(200)
    assert destination.is_in_order


async def test_different_keys_are_delivered_at_the_same_time_and_one_key_never_is(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    destination = Keys(seconds=0.01)
    await write_keyed(pool, outbox, *(f"key {number % 20}" for number in range(400)))
    async with running(outbox, pool, destination, order="key", batch_size=20, concurrency=8):
        await destination.has(400)
    assert destination.together == 8
    assert destination.is_in_order


async def test_one_batch_takes_many_messages_of_a_key(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination = Destination()
    await write_keyed(pool, outbox, *("a" for _ in range(50)))
    async with running(outbox, pool, destination, order="key", batch_size=50):
        await destination.has_accepted(50)
    assert [len(call) for call in destination.calls] == [50]


async def test_a_delivery_that_takes_long_delays_only_its_own_keys(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    released, others = asyncio.Event(), Keys()

    class Slow:
        async def dispatch(self, *messages: Message) -> None:
            if messages[0].key == "slow":
                await released.wait()
            await others.dispatch(*messages)

    await write_keyed(pool, outbox, *(["slow"] * 400))  # more than is held otherwise
    async with running(outbox, pool, Slow(), order="key", batch_size=10, concurrency=2):
        await write_keyed(pool, outbox, *(f"key {number % 50}" for number in range(1_000)))
        await others.has(1_000)
        released.set()
        await others.has(1_400)
    assert others.is_in_order


async def test_messages_without_a_key_are_free(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination = Asking()
    await write_keyed(pool, outbox, None, None)
    async with running(outbox, pool, destination, order="key", batch_size=1, concurrency=2):
        first, second = await destination.next(), await destination.next()
        first.answer.set_result(None)
        second.answer.set_result(None)


async def test_run_once_delivers_a_batch_in_order(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination = Keys()
    await write_keyed(pool, outbox, *("ab" * 5))
    relay = Relay(outbox, pool, destination, order="key", batch_size=4)
    assert [await relay.run_once() for _ in range(4)] == [4, 4, 2, 0]
    assert destination.is_in_order
    assert await nothing_is_held(pool, outbox)
    assert await slots(pool, outbox) == {None: 64}


async def test_large_bodies_keep_their_place(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination = Keys()
    payloads = ["x" * 3_000_000 if number % 3 else "small" for number in range(12)]
    await write(pool, outbox, *payloads, key="a")
    async with running(outbox, pool, destination, order="key"):
        await destination.has(12)
    assert destination.is_in_order


@pytest.mark.parametrize("order", _ORDERS)
async def test_what_is_down_for_a_while_gets_its_messages_in_order(
    order: str, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    answers = iter([DestinationUnavailableError("down"), None, DestinationUnavailableError("down")])

    def fault(_: Sequence[Message]) -> None:
        if error := next(answers, None):
            raise error

    destination = Destination(fault)
    async with running(
        outbox, pool, destination, order=order, batch_size=2, destination_backoff=NoWaiting(max_tries=-1)
    ):
        await write_keyed(pool, outbox, *("a" * 6))
        await destination.has_accepted(6)
    assert destination.accepted == ["a1", "a2", "a3", "a4", "a5", "a6"]
    assert await counts(pool, outbox) == (0, 0, 0, 0)


# --- late commits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", _ORDERS)
async def test_a_lower_position_that_commits_late_is_waited_for(
    order: Literal["key", "total"], pool: asyncpg.Pool[Any], outbox: Outbox, writer: asyncpg.Connection[Any]
) -> None:
    destination = Destination()
    async with running(outbox, pool, destination, order=order):
        async with writer.transaction():
            await OutboxDispatcher(writer, outbox).dispatch(Message("early", topic="t", key="a"))
            await write(pool, outbox, "late", key="a")
            # What comes through without an order shows that there was time for it.
            assert await Relay(outbox, pool, refusing := Destination(), order=order).run_once() == 0
            assert refusing.calls == destination.calls == []
        await destination.has_accepted(2)
    assert destination.accepted == ["early", "late"]


async def test_a_rollback_ends_the_wait_as_well(
    pool: asyncpg.Pool[Any], outbox: Outbox, writer: asyncpg.Connection[Any]
) -> None:
    destination = Destination()
    async with running(outbox, pool, destination, order="key"):
        transaction = writer.transaction()
        await transaction.start()
        await OutboxDispatcher(writer, outbox).dispatch(Message("regretted", topic="t", key="a"))
        await write(pool, outbox, "kept", key="a")
        await transaction.rollback()
        await destination.has_accepted(1)
    assert destination.accepted == ["kept"]


async def test_a_transaction_that_does_not_write_messages_delays_nothing(
    pool: asyncpg.Pool[Any], outbox: Outbox, writer: asyncpg.Connection[Any]
) -> None:
    destination = Destination()
    await writer.execute("CREATE TEMP TABLE business (id int)")
    async with writer.transaction(isolation="repeatable_read"), running(outbox, pool, destination, order="key"):
        await writer.execute("INSERT INTO business VALUES (1)")
        await writer.fetch(f"SELECT * FROM {outbox.schema}.outbox")  # noqa: S608 -- our own schema
        await write(pool, outbox, "at once", key="a")
        await destination.has_accepted(1)


async def test_a_writer_that_does_not_end_is_passed_over_with_a_warning_and_its_messages_are_not_lost(
    pool: asyncpg.Pool[Any], outbox: Outbox, writer: asyncpg.Connection[Any]
) -> None:
    destination, events = Destination(), Events()
    settings: dict[str, Any] = {"order": "key", "late_commit_wait": timedelta(seconds=0.3), "hooks": [events]}
    async with running(outbox, pool, destination, **settings):
        async with writer.transaction():
            await OutboxDispatcher(writer, outbox).dispatch(Message("forgotten", topic="t", key="a"))
            await write(pool, outbox, "one", key="a")
            await destination.has_accepted(1)
            late = events.of(WriterLate)[-1]
            assert (late.pid, late.passed_over) == (writer.get_server_pid(), True)
            assert late.age >= timedelta(seconds=0.3)
            # It is passed over once and for all.
            await write(pool, outbox, "two", key="a")
            await destination.has_accepted(2)
            assert len([event for event in events.of(WriterLate) if event.passed_over]) == 1
        await destination.has_accepted(3)
    assert destination.accepted == ["one", "two", "forgotten"]


async def test_somebody_hears_who_is_being_waited_for(
    pool: asyncpg.Pool[Any], outbox: Outbox, writer: asyncpg.Connection[Any]
) -> None:
    destination, events = Destination(), Events()
    async with running(outbox, pool, destination, order="key", hooks=[events]):
        async with writer.transaction():
            await OutboxDispatcher(writer, outbox).dispatch(Message("slow", topic="t", key="a"))
            await write(pool, outbox, "waits", key="a")
            late = await events.next(WriterLate)
            assert (late.pid, late.passed_over) == (writer.get_server_pid(), False)
            assert destination.calls == []
        await destination.has_accepted(2)
    assert destination.accepted == ["slow", "waits"]


async def test_a_prepared_transaction_is_waited_for(own_server: StartServer) -> None:
    server = await own_server(max_prepared_transactions="5")
    outbox, destination = Outbox(), Destination()
    async with asyncpg.create_pool(server.dsn, min_size=0, max_size=10) as pool:
        async with pool.acquire() as connection:
            await outbox.migrate(connection)
        async with running(outbox, pool, destination, order="key"), pool.acquire() as connection:
            await connection.execute("BEGIN")
            await outbox.persist(connection, Message("prepared", topic="t", key="a"))
            await write(pool, outbox, "waits", key="a")
            await connection.execute("PREPARE TRANSACTION 'p'")
            assert await Relay(outbox, pool, Destination(), order="key").run_once() == 0
            assert destination.calls == []
            await connection.execute("COMMIT PREPARED 'p'")
            await destination.has_accepted(2)
    assert destination.accepted == ["prepared", "waits"]


# --- failures: block --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", _ORDERS)
async def test_those_behind_a_failure_wait_for_it(order: str, pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    failures = iter([True, True, True])

    def fault(messages: Sequence[Message]) -> None:
        payloads = [message.payload for message in messages]
        if "a2" in payloads and next(failures, False):
            behind = messages[payloads.index("a2") :]
            raise PartialDispatchError({message.id: ValueError("no") for message in behind})

    destination = Destination(fault)
    backoff = LinearBackOff(initial=_SOON, max_tries=-1)
    async with running(outbox, pool, destination, order=order, batch_size=5, backoff=backoff):
        await write_keyed(pool, outbox, *("a" * 30))
        await destination.has_accepted(30)
    assert destination.accepted == [f"a{number}" for number in range(1, 31)]
    assert await counts(pool, outbox) == (0, 0, 0, 0)
    assert await nothing_is_held(pool, outbox)


async def test_a_failure_delays_only_its_own_key(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination = Destination(refuses("a1", error=ValueError("no")))
    async with running(outbox, pool, destination, order="key", batch_size=1, backoff=_LATER):
        await write_keyed(pool, outbox, "a", "b", "a", "a", "b", None)
        await destination.has_accepted(3)
        await write_keyed(pool, outbox, "c")
        await destination.has_accepted(4)
        await until_counts(pool, outbox, (0, 3, 3, 0))
    assert sorted(destination.accepted) == ["None1", "b1", "b2", "c1"]
    assert destination.accepted.index("b1") < destination.accepted.index("b2")


async def test_a_message_that_comes_while_its_key_is_blocked_waits_behind_the_others(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    down = True

    def fault(messages: Sequence[Message]) -> None:
        if down and any(message.key == "a" for message in messages):
            raise ValueError("no")

    destination, events = Destination(fault), Events()
    settings: dict[str, Any] = {
        "order": "key",
        "backoff": LinearBackOff(initial=_SOON, max_tries=-1),
        "hooks": [events],
    }
    async with running(outbox, pool, destination, **settings):
        await write(pool, outbox, 1, 2, key="a")
        await events.next(MessageFailed)
        await write(pool, outbox, 3, 4, key="a")
        await until_counts(pool, outbox, (0, 4, 4, 0))
        down = False
        await destination.has_accepted(4)
        await write(pool, outbox, 5, key="a")
        await destination.has_accepted(5)
    assert destination.accepted == [1, 2, 3, 4, 5]
    assert await counts(pool, outbox) == (0, 0, 0, 0)


async def test_another_relay_knows_what_is_blocked(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination, events = Destination(refuses("a1", error=ValueError("no"))), Events()
    async with running(outbox, pool, destination, order="key", batch_size=1, backoff=_LATER, hooks=[events]):
        await write_keyed(pool, outbox, "a", "a", "b")
        await destination.has_accepted(1)
        await until_counts(pool, outbox, (0, 2, 2, 0))
    other = Destination()
    async with running(outbox, pool, other, order="key"):
        await write_keyed(pool, outbox, "a", "c")
        await other.has_accepted(1)
        await until_counts(pool, outbox, (0, 3, 3, 0))
        async with pool.acquire() as connection:  # the hour is over
            await connection.execute(
                f"UPDATE {outbox.schema}.outbox_waiting SET due_at = now() WHERE due_at < 'infinity'"  # noqa: S608 -- ours
            )
        await other.has_accepted(4)
    assert other.accepted == ["c1", "a1", "a2", "a1"]


async def test_those_behind_one_that_is_given_up_go_on(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination = Destination(refuses("a1", error=RejectedError("never")))
    async with running(outbox, pool, destination, order="key", batch_size=1):
        await write_keyed(pool, outbox, *("a" * 5))
        await destination.has_accepted(4)
        await until_counts(pool, outbox, (0, 0, 0, 1))
    assert destination.accepted == ["a2", "a3", "a4", "a5"]
    assert await dead(pool, outbox) == ["a1"]


async def test_a_batch_that_fails_as_a_whole_comes_again_in_order_and_the_bad_one_alone_dies(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    destination = Destination(fails("b2"))
    backoff = NoWaiting(max_tries=3)
    async with running(outbox, pool, destination, order="key", backoff=backoff):
        await write_keyed(pool, outbox, *("abc" * 4))
        await destination.has_accepted(11)
        await until_counts(pool, outbox, (0, 0, 0, 1))
    for key, count in (("a", 4), ("c", 4)):
        assert [one for one in destination.accepted if one[0] == key] == [
            f"{key}{number}" for number in range(1, count + 1)
        ]
    assert [one for one in destination.accepted if one[0] == "b"] == ["b1", "b3", "b4"]
    assert await dead(pool, outbox) == ["b2"]


async def test_a_long_queue_behind_a_failure_goes_out_in_batches(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    failures = iter([1])

    def fault(_: Sequence[Message]) -> None:
        if next(failures, 0):
            raise ValueError("no")

    destination = Destination(fault)
    await write_keyed(pool, outbox, *("a" * 2_000))
    async with running(outbox, pool, destination, order="key", batch_size=100):
        await destination.has_accepted(2_000)
    assert destination.accepted == [f"a{number}" for number in range(1, 2_001)]
    assert len(destination.calls) < 30


async def test_those_behind_one_that_cannot_be_upcast_wait_for_it(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    failures = iter([True])

    def upcast(message: Message) -> list[Message]:
        if message.payload == "a2" and next(failures, False):
            raise ValueError("no")
        return [message]

    destination = Destination()
    backoff = LinearBackOff(initial=_SOON, max_tries=-1)
    async with running(outbox, pool, destination, order="key", upcast=upcast, backoff=backoff):
        await write_keyed(pool, outbox, "a", "a", "a", "b")
        await destination.has_accepted(4)
    assert [one for one in destination.accepted if one != "b1"] == ["a1", "a2", "a3"]


@pytest.mark.parametrize("order", _ORDERS)
async def test_a_handler_is_not_called_for_those_behind_a_failure(
    order: Literal["key", "total"], pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    failures, handled = iter([True]), Destination()

    async def handle(message: Message) -> None:
        if message.payload == "a2" and next(failures, False):
            raise ValueError("no")
        await handled.dispatch(message)

    backoff = LinearBackOff(initial=_SOON, max_tries=-1)
    destination = HandlerDispatcher(handle, order=order)
    async with running(outbox, pool, destination, order=order, backoff=backoff):
        await write_keyed(pool, outbox, "a", "a", "a", "b", None)
        await handled.has_accepted(5)
    accepted = handled.accepted
    assert [one for one in accepted if one[0] == "a"] == ["a1", "a2", "a3"]
    assert accepted.index("b1") < accepted.index("a2") if order == "key" else accepted[:2] == ["a1", "a2"]


async def test_delayed_messages_have_no_place_in_the_order(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination = Destination(refuses("a1", error=ValueError("no")))
    async with running(outbox, pool, destination, order="key", backoff=_LATER):
        await write(pool, outbox, "in an hour", key="b", due_at=datetime.now(UTC) + _HOUR)
        await write_keyed(pool, outbox, "b", "a")
        await destination.has_accepted(1)
        await write(pool, outbox, "soon", key="a", due_at=datetime.now(UTC) + _SOON)
        await destination.has_accepted(2)
    assert destination.accepted == ["b1", "soon"]


# --- failures: park ---------------------------------------------------------------------------------------


async def test_those_behind_one_that_is_given_up_are_parked_with_it(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination = Destination(refuses("a2", error=RejectedError("never")))
    settings: dict[str, Any] = {"order": "key", "on_failure": "park", "batch_size": 1}
    async with running(outbox, pool, destination, **settings):
        await write_keyed(pool, outbox, "a", "a", "a", "b", "a")
        await until_counts(pool, outbox, (0, 0, 0, 3))
        await write(pool, outbox, "a5", key="a")
        await until_counts(pool, outbox, (0, 0, 0, 4))
        async with pool.acquire() as connection:
            letters = await outbox.dead_letters(connection)
    assert destination.accepted == ["a1", "b1"]
    assert [letter.message.payload for letter in letters] == ["a2", "a3", "a4", "a5"]
    head = letters[0].message.position
    assert {letter.behind for letter in letters} == {head}
    assert [letter.attempts for letter in letters] == [1, 0, 0, 0]
    assert letters[1].error == f"parked behind the dead letter at position {head}"


async def test_a_retry_that_is_given_up_parks_those_that_wait_for_it(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination = Destination(refuses("a1", error=ValueError("no")))
    settings: dict[str, Any] = {
        "order": "key",
        "on_failure": "park",
        "backoff": LinearBackOff(initial=_SOON, max_tries=1),
    }
    async with running(outbox, pool, destination, batch_size=1, **settings):
        await write_keyed(pool, outbox, *("a" * 30))
        await until_counts(pool, outbox, (0, 0, 0, 30))
    assert destination.accepted == []
    assert await dead(pool, outbox) == [f"a{number}" for number in range(1, 31)]


@pytest.mark.parametrize("which", ["head", "follower", "all"])
async def test_what_was_parked_is_redriven_in_order(which: str, pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    bad = {"a1"}

    def fault(messages: Sequence[Message]) -> None:
        if refused := {one.id: RejectedError("never") for one in messages if one.payload in bad}:
            raise PartialDispatchError(refused)

    destination = Destination(fault)
    async with running(outbox, pool, destination, order="key", on_failure="park", batch_size=1):
        messages = await write_keyed(pool, outbox, *("a" * 20))
        await until_counts(pool, outbox, (0, 0, 0, 20))
        bad.clear()
        async with pool.acquire() as connection:
            ids = {"head": [messages[0].id], "follower": [messages[7].id], "all": None}[which]
            assert await outbox.redrive(connection, ids) == 20
        await write(pool, outbox, "a21", key="a")
        await destination.has_accepted(21)
        await until_counts(pool, outbox, (0, 0, 0, 0))
    assert destination.accepted == [f"a{number}" for number in range(1, 22)]


async def test_when_the_head_is_discarded_those_behind_it_go_on(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination = Destination(refuses("a1", error=RejectedError("never")))
    async with running(outbox, pool, destination, order="key", on_failure="park", batch_size=1):
        messages = await write_keyed(pool, outbox, *("a" * 10))
        await until_counts(pool, outbox, (0, 0, 0, 10))
        async with pool.acquire() as connection:
            assert await outbox.discard(connection, [messages[0].id]) == 1
        await write(pool, outbox, "a11", key="a")
        await destination.has_accepted(10)
        await until_counts(pool, outbox, (0, 0, 0, 0))
    assert destination.accepted == [f"a{number}" for number in range(2, 12)]


async def test_another_relay_knows_what_is_parked(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    settings: dict[str, Any] = {"order": "key", "on_failure": "park", "batch_size": 1}
    async with running(outbox, pool, Destination(refuses("a1", error=RejectedError("never"))), **settings):
        await write_keyed(pool, outbox, "a", "a")
        await until_counts(pool, outbox, (0, 0, 0, 2))
    other = Destination()
    async with running(outbox, pool, other, **settings):
        await write_keyed(pool, outbox, "a", "b")
        await other.has_accepted(1)
        await until_counts(pool, outbox, (0, 0, 0, 3))
    assert other.accepted == ["b1"]


async def test_what_was_about_to_be_parked_when_its_relay_died_is_parked(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    """After the second death in a row it waits as the suspect of a crash, behind a dead letter that parks its key."""
    settings: dict[str, Any] = {"order": "key", "on_failure": "park", "batch_size": 1}
    async with running(outbox, pool, Destination(refuses("a1", error=RejectedError("never"))), **settings):
        await write_keyed(pool, outbox, *("a" * 8))
        await until_counts(pool, outbox, (0, 0, 0, 8))
    async with pool.acquire() as connection:
        letters = await outbox.dead_letters(connection)
        first, second = letters[0].message.position, letters[4].message.position
        await connection.execute(
            f"""WITH held AS (DELETE FROM "{outbox.schema}".outbox_dead WHERE position <> ALL($1) RETURNING *)
            INSERT INTO "{outbox.schema}".outbox_waiting
                (position, id, recorded_at, topic, key, headers, payload, due_at, suspect, lane)
            SELECT position, id, recorded_at, topic, key, headers, payload, 'infinity', 'crash', lane FROM held""",  # noqa: S608
            [first, second],
        )
        await connection.execute(f'UPDATE "{outbox.schema}".outbox_dead SET behind = position')  # noqa: S608
    other = Destination()
    async with running(outbox, pool, other, **settings):
        await write_keyed(pool, outbox, "b")
        await other.has_accepted(1)
        await until_counts(pool, outbox, (0, 0, 0, 8))
        async with pool.acquire() as connection:
            letters = await outbox.dead_letters(connection)
    assert other.accepted == ["b1"]
    assert [letter.behind for letter in letters] == [first] * 4 + [second] * 4


# --- failures: skip ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", _ORDERS)
async def test_those_behind_a_failure_may_go_on_without_it(order: str, pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    failures = iter([1])

    def fault(messages: Sequence[Message]) -> None:
        if any(message.payload == "a1" for message in messages) and next(failures, 0):
            raise ValueError("no")

    destination = Destination(fault)
    backoff = LinearBackOff(initial=timedelta(seconds=0.3), max_tries=-1)
    settings: dict[str, Any] = {"order": order, "on_failure": "skip", "batch_size": 1, "backoff": backoff}
    async with running(outbox, pool, destination, **settings):
        await write_keyed(pool, outbox, "a", "a", "a")
        await destination.has_accepted(3)
    assert destination.accepted == ["a2", "a3", "a1"]


# --- slots ------------------------------------------------------------------------------------------------


async def test_slots_are_shared_out_fairly_as_relays_come_and_go(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    settings: dict[str, Any] = {"order": "key", "lease": timedelta(seconds=2)}
    async with running(outbox, pool, Destination(), **settings):
        await until_slots(pool, outbox, 64)
        async with running(outbox, pool, Destination(), **settings), asyncio.timeout(4):
            await until_slots(pool, outbox, 32, 32)
            async with running(outbox, pool, Destination(), **settings), asyncio.timeout(4):
                await until_slots(pool, outbox, 21, 21, 22)
            await until_slots(pool, outbox, 32, 32)
        await until_slots(pool, outbox, 64)
    assert await slots(pool, outbox) == {None: 64}


async def test_order_is_kept_while_relays_come_and_go(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination, written = Keys(seconds=0.002), 0
    settings: dict[str, Any] = {"order": "key", "lease": timedelta(seconds=1), "batch_size": 5}

    async def write_some() -> None:
        nonlocal written
        for _ in range(10):
            written += 20
            await write_keyed(pool, outbox, *(f"k{number}" for number in range(20)))

    async with running(outbox, pool, destination, **settings):
        await write_some()
        async with running(outbox, pool, destination, **settings):
            await write_some()
            await until_slots(pool, outbox, 32, 32)
            await write_some()
        await write_some()
        async with running(outbox, pool, destination, **settings), running(outbox, pool, destination, **settings):
            await write_some()
            await until_slots(pool, outbox, 21, 21, 22)
            await write_some()
        await destination.has(written)
    assert destination.is_in_order
    assert sorted(destination.positions) == sorted(set(destination.positions))


async def test_a_slot_is_handed_over_only_when_what_is_in_delivery_is_settled(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    first, second = Asking(), Keys()
    settings: dict[str, Any] = {"order": "total", "lease": timedelta(seconds=1)}
    async with running(outbox, pool, first, grace=timedelta(seconds=10), **settings) as relay:
        await write_keyed(pool, outbox, "a", "a")
        call = await first.next()
        stopping = asyncio.create_task(relay.stop())
        async with running(outbox, pool, second, **settings):
            await write_keyed(pool, outbox, "a")
            assert await Relay(outbox, pool, second, order="total").run_once() == 0
            assert second.positions == []
            call.answer.set_result(None)
            await stopping
            await second.has(1)
    assert len(second.positions) == 1


async def test_a_relay_that_lost_its_slots_settles_nothing(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination, events = Asking(), Events()
    async with running(outbox, pool, destination, order="key", hooks=[events], lease=timedelta(seconds=3)):
        await write_keyed(pool, outbox, "a")
        first = await destination.next()
        async with pool.acquire() as connection:  # as if they had been somebody else's in the meantime
            await connection.execute(f"UPDATE {outbox.schema}.outbox_slots SET epoch = epoch + 2")  # noqa: S608 -- ours
        first.answer.set_result(None)
        await events.next(RelayFenced)
        assert await counts(pool, outbox) == (0, 1, 0, 0)
        async with pool.acquire() as connection:  # nobody renews the lease of the former name
            await connection.execute(
                f"UPDATE {outbox.schema}.outbox_relays SET until = now() "  # noqa: S608 -- our own schema
                f"WHERE owner IN (SELECT owner FROM {outbox.schema}.outbox_slots)"
            )
        again = await destination.next()
        assert again.messages[0].id == first.messages[0].id
        again.answer.set_result(None)
        await until_counts(pool, outbox, (0, 0, 0, 0))


async def test_a_relay_that_is_taken_for_dead_begins_anew_and_keeps_the_order(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    destination, events = Asking(), Events()
    async with running(outbox, pool, destination, order="key", hooks=[events], lease=timedelta(seconds=1)):
        await write_keyed(pool, outbox, "a", "a", "b")
        first = await destination.next()
        async with pool.acquire() as connection, connection.transaction():  # another relay takes over
            await connection.execute(f"UPDATE {outbox.schema}.outbox_relays SET until = now() - interval '1 h'")  # noqa: S608 -- ours
            taken = await Membership(outbox, _HOUR, "key").take_over(connection)
            assert (taken.relays, taken.messages) == (1, 0)
        await events.next(RelayFenced)
        await write_keyed(pool, outbox, "a")
        first.answer.set_result(None)  # and only now does it take slots again
        again: list[Message] = []
        while len(again) < 4:
            call = await destination.next()
            again += call.messages
            call.answer.set_result(None)
        await until_counts(pool, outbox, (0, 0, 0, 0))
    assert [one.payload for one in again if one.key == "a"] == ["a1", "a2", "a1"]


# --- orders do not mix ------------------------------------------------------------------------------------


async def test_a_relay_of_another_order_stands_by_until_the_others_have_gone(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    first, second, events = Destination(), Destination(), Events()
    lease = timedelta(seconds=1)
    async with (
        running(outbox, pool, first, order="none", lease=lease) as at_work,
        running(outbox, pool, second, order="key", hooks=[events], lease=lease),
    ):
        assert [event.order for event in events.of(RelayStandsBy)] == ["key"]
        await write(pool, outbox, 1, key="a")
        await first.has_accepted(1)
        assert await Relay(outbox, pool, second, order="total").run_once() == 0
        await at_work.stop()
        await write(pool, outbox, 2, key="a")
        await second.has_accepted(1)
    assert (first.accepted, second.accepted) == ([1], [2])


async def test_going_to_work_that_did_not_commit_is_done_again(
    dsn: str, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    activated: set[int] = set()
    failed: list[bool] = []

    class Failing(asyncpg.Connection):
        async def fetchval(self, query: str, *args: Any, **options: Any) -> Any:
            value = await super().fetchval(query, *args, **options)
            if "SET active = true" in query and value:
                activated.add(id(self))
            return value

        async def execute(self, query: str, *args: Any, **options: Any) -> str:
            if query.startswith("COMMIT") and id(self) in activated and not failed:
                failed.append(True)
                self.terminate()
                raise ConnectionResetError("the COMMIT did not get through")
            return await super().execute(query, *args, **options)

    first, second, events = Destination(), Destination(), Events()
    lease = timedelta(seconds=1)
    failing = await asyncpg.create_pool(dsn, min_size=0, max_size=4, connection_class=Failing)
    try:
        async with (
            running(outbox, pool, first, order="none", lease=lease) as at_work,
            running(outbox, failing, second, order="key", hooks=[events], lease=lease),
        ):
            await at_work.stop()
            await write(pool, outbox, 1, key="a")
            await second.has_accepted(1)
            row = await pool.fetchrow(f"SELECT active FROM {outbox.schema}.outbox_relays")  # noqa: S608 -- ours
            assert row is not None
            assert row["active"], "what the relay believes is what the others see"
    finally:
        failing.terminate()
    assert failed, "the fault happened"
    assert len(events.of(RelayAtWork)) == 1


@pytest.mark.parametrize("after", ["none", "total", "key"])
@pytest.mark.parametrize("before", ["key", "total"])
async def test_what_waits_in_one_order_is_delivered_in_another(
    before: str, after: str, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    async with running(outbox, pool, Destination(fails("a1")), order=before, batch_size=1, backoff=_LATER):
        await write_keyed(pool, outbox, "a", "a", None, "a")
        # In a total order nothing else is read while the head waits; what was in hand waits behind it.
        await until_counts(pool, outbox, (0, 3, 3, 0) if before == "key" else (0, 4, 4, 0))
    async with pool.acquire() as connection:  # the hour is over
        await connection.execute(
            f"UPDATE {outbox.schema}.outbox_waiting SET due_at = now() WHERE due_at < 'infinity'"  # noqa: S608 -- ours
        )
    destination = Destination()
    async with running(outbox, pool, destination, order=after):
        await destination.has_accepted(3 if before == "key" else 4)
        await until_counts(pool, outbox, (0, 0, 0, 0))
    if after != "none":
        assert [one for one in destination.accepted if one != "None1"] == ["a1", "a2", "a3"]


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"order": "topic"}, "order must be 'none', 'key' or 'total', not 'topic'"),
        ({"order": "key", "on_failure": "drop"}, "on_failure must be 'block', 'park' or 'skip', not 'drop'"),
        ({"on_failure": "skip"}, "needs order='key' or order='total'"),
        ({"order": "total", "on_failure": "park"}, "would bury every message"),
        ({"order": "key", "late_commit_wait": timedelta()}, "late_commit_wait must be longer than zero"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(
    settings: dict[str, Any], complaint: str, outbox: Outbox, pool: asyncpg.Pool[Any]
) -> None:
    with pytest.raises(ValueError, match=complaint):
        Relay(outbox, pool, Destination(), **settings)
