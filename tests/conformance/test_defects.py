"""The defects of the ancestor, none of which may be here."""

from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import repeat

import anyio
import asyncpg
import pytest

from outbox import (
    BackOff,
    CommitStrategy,
    DatabaseLost,
    ExponentialBackOff,
    FibonacciBackOff,
    HandlerDispatcher,
    LinearBackOff,
    Message,
    MessageDied,
    NoWaiting,
    Outbox,
    OutboxDispatcher,
    PartialDispatchError,
    Relay,
)
from outbox.testing import CollectingDispatcher, FailingDispatcher, drain
from tests.conformance.support import HOUR, SECOND, Events, numbered, numbers, running, write
from tests.faults import FaultProxy


class Regret(Exception):  # noqa: N818 -- no error: the reason for a rollback on purpose
    pass


async def test_defect_1_several_relays_publish_nothing_twice(
    connection: asyncpg.Connection, dsn: str, outbox: Outbox
) -> None:
    destination = CollectingDispatcher()

    async def order(first: int) -> None:
        for start in range(first, first + 500, 10):
            await write(pool, outbox, *numbered(10, start=start))
            with suppress(Regret):
                async with pool.acquire() as writer, writer.transaction():
                    await OutboxDispatcher(writer, outbox).dispatch(*numbered(3, start=100_000))
                    raise Regret

    async with asyncpg.create_pool(dsn, min_size=1, max_size=14) as pool:
        relays = [Relay(outbox, pool, destination, batch_size=7) for _ in range(4)]
        async with running(*relays), anyio.create_task_group() as writers:
            for first in (0, 500, 1_000, 1_500):
                writers.start_soon(order, first)
            await destination.wait_for(2_000)
    assert sorted(numbers(destination.messages)) == list(range(2_000))
    assert (await outbox.counts(connection)).total == 0


async def test_defect_1_two_relays_that_look_at_the_same_moment_share_the_messages(
    pool: asyncpg.Pool, outbox: Outbox
) -> None:
    destination = CollectingDispatcher()
    await write(pool, outbox, *numbered(200))
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(Relay(outbox, pool, destination, batch_size=50).run_once)
    assert len(destination.messages) == len(set(destination.messages))


def poison(messages: tuple[Message, ...]) -> ValueError | None:
    """The whole batch fails because of number 1, and says nothing of it."""
    return ValueError("cannot be read") if 1 in numbers(messages) else None


@pytest.mark.parametrize("batch_size", [1, 4, 100])
async def test_defect_2_the_first_poison_message_blocks_nothing(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox, batch_size: int
) -> None:
    events, accepted = Events(), CollectingDispatcher()
    destination = FailingDispatcher(repeat(poison), accepted)
    await write(pool, outbox, *numbered(10))
    relay = Relay(
        outbox, pool, destination, batch_size=batch_size, concurrency=1, backoff=NoWaiting(max_tries=3), hooks=[events]
    )
    async with running(relay):
        await accepted.wait_for(9)
        await events.wait_for(MessageDied)
        await write(pool, outbox, *numbered(1, start=11))
        await accepted.wait_for(10)
    assert sorted(numbers(accepted.messages)) == list(range(2, 12))
    [dead] = await outbox.dead_letters(connection)
    assert (dead.message.payload, dead.error) == ({"number": 1}, "ValueError: cannot be read")


async def test_defect_2_a_poison_message_that_waits_for_its_retry_blocks_nothing(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    await write(pool, outbox, *numbered(5))
    delivered = await drain(
        outbox, pool, FailingDispatcher(repeat(poison)), batch_size=1, backoff=LinearBackOff(initial=HOUR, maximum=HOUR)
    )
    assert numbers(delivered) == [2, 3, 4, 5]
    assert numbers(await outbox.retrieve(connection, 10)) == [1]


_FAIL_THE_FIRST_COMMIT = """
    CREATE SEQUENCE commits;
    CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF nextval('commits') = 1 THEN RAISE 'no commit today' USING ERRCODE = 'serialization_failure'; END IF;
        RETURN NULL;
    END $$;
    ALTER FUNCTION fail_once SET search_path FROM CURRENT;
    CREATE CONSTRAINT TRIGGER fails AFTER DELETE OR UPDATE ON outbox
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail_once();
"""


@pytest.mark.parametrize("commit", CommitStrategy)
async def test_defect_3_a_commit_that_fails_does_not_handle_the_message_again(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox, commit: CommitStrategy
) -> None:
    events, destination = Events(), CollectingDispatcher()
    await connection.execute(_FAIL_THE_FIRST_COMMIT)
    await write(pool, outbox, *numbered(1))
    async with running(Relay(outbox, pool, destination, commit=commit, hooks=[events])):
        await events.wait_for(DatabaseLost)
        await write(pool, outbox, *numbered(1, start=2))
        await destination.wait_for(2)
    assert numbers(destination.messages) == [1, 2]
    assert (await outbox.counts(connection)).pending == 0


async def test_defect_3_a_connection_cut_before_the_settling_does_not_handle_the_message_again(
    connection: asyncpg.Connection, dsn: str, proxy: FaultProxy, outbox: Outbox
) -> None:
    events, destination = Events(), CollectingDispatcher()

    async def accept_and_cut(message: Message) -> None:
        await destination.dispatch(message)
        proxy.reset()

    await outbox.persist(connection, *numbered(1))
    async with (
        asyncpg.create_pool(proxy.dsn(dsn), min_size=0, max_size=2) as pool,
        running(Relay(outbox, pool, HandlerDispatcher(accept_and_cut), hooks=[events])),
    ):
        await events.wait_for(DatabaseLost)
        await destination.wait_for(1)
    assert numbers(destination.messages) == [1]
    assert (await outbox.counts(connection)).total == 0


async def test_defect_4_retries_do_not_resend_what_was_accepted(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    def refuse_even_ones(messages: tuple[Message, ...]) -> PartialDispatchError | None:
        failures = {message.id: ValueError("even") for message in messages if message.payload["number"] % 2 == 0}
        return PartialDispatchError(failures) if failures else None

    events, destination = Events(), FailingDispatcher(repeat(refuse_even_ones))
    await write(pool, outbox, *numbered(5))
    async with running(Relay(outbox, pool, destination, backoff=NoWaiting(max_tries=2), hooks=[events])):
        await events.wait_for(MessageDied, 2)
    sent = Counter(number for call in destination.calls for number in numbers(call))
    assert sent == {1: 1, 3: 1, 5: 1, 2: 3, 4: 3}
    assert numbers(letter.message for letter in await outbox.dead_letters(connection)) == [2, 4]


async def test_defect_4_a_consumer_that_fails_in_the_middle_is_not_given_again_what_it_handled(
    pool: asyncpg.Pool, outbox: Outbox
) -> None:
    handled: list[int] = []

    async def handle(message: Message) -> None:
        handled.append(message.payload["number"])
        if message.payload["number"] == 2 and handled.count(2) < 3:
            raise ValueError("not yet")

    await write(pool, outbox, *numbered(3))
    relay = Relay(outbox, pool, HandlerDispatcher(handle), backoff=NoWaiting())
    assert [await relay.run_once() for _ in range(4)] == [2, 0, 1, 0]
    assert handled == [1, 2, 3, 2, 2]


async def test_defect_5_a_clock_that_stands_still_or_runs_backwards_changes_no_order(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    noon = datetime(2024, 2, 29, 12, tzinfo=UTC)
    times = iter([noon] * 10 + [noon - timedelta(minutes=number) for number in range(10)])
    mine = Outbox(schema=outbox.schema, clock=lambda: next(times))
    await write(pool, mine, *numbered(5))
    for number in range(6, 21):
        await write(pool, mine, *numbered(1, start=number))
    assert numbers(await mine.retrieve(connection, 100)) == list(range(1, 21))
    assert numbers(await drain(mine, pool, batch_size=3)) == list(range(1, 21))


async def test_defect_6_the_time_of_dispatching_is_read_back(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    await write(pool, outbox, *numbered(5))
    await Relay(outbox, pool, CollectingDispatcher(), batch_size=3, commit=CommitStrategy.MARK).run_once()
    counts = await outbox.counts(connection)
    assert (counts.dispatched, counts.pending) == (3, 2)
    assert numbers(await outbox.retrieve(connection, 10)) == [4, 5]
    marked = await outbox.retrieve(connection, 10, dispatched=True)
    assert numbers(marked) == [1, 2, 3]
    assert all(message.dispatched_at for message in marked)
    assert numbers(await drain(outbox, pool, commit=CommitStrategy.MARK)) == [4, 5]
    await connection.execute("UPDATE outbox SET dispatched_at = dispatched_at - interval '1 day' WHERE position <= 2")
    assert await outbox.cleanup(connection, HOUR, 100) == 2


@pytest.mark.parametrize(
    "backoff",
    [
        ExponentialBackOff(maximum=HOUR, max_tries=-1),
        LinearBackOff(initial=SECOND, maximum=HOUR, max_tries=-1),
        FibonacciBackOff(maximum=HOUR, max_tries=-1),
    ],
)
async def test_defect_7_the_ten_thousandth_failure_waits_no_longer_than_the_maximum(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox, backoff: BackOff
) -> None:
    relay = Relay(outbox, pool, FailingDispatcher(repeat(ConnectionError("away"))), backoff=backoff)
    await write(pool, outbox, *numbered(1))
    await relay.run_once()
    await connection.execute("UPDATE outbox_waiting SET attempts = 9999, due_at = clock_timestamp()")
    before = await connection.fetchval("SELECT clock_timestamp()")
    await relay.run_once()
    row = await connection.fetchrow("SELECT attempts, due_at, clock_timestamp() AS now FROM outbox_waiting")
    assert row is not None
    assert row["attempts"] == 10_000
    assert before + HOUR / 2 < row["due_at"] <= row["now"] + HOUR


async def test_defect_8_nothing_sleeps_inside_a_batch(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    accepted = CollectingDispatcher()
    destination = FailingDispatcher([ConnectionError("away")], accepted)
    await write(pool, outbox, *numbered(6))
    relay = Relay(
        outbox, pool, destination, batch_size=2, concurrency=1, backoff=ExponentialBackOff(initial=HOUR, maximum=HOUR)
    )
    async with running(relay):
        assert numbers(await accepted.wait_for(4)) == [3, 4, 5, 6]
        await write(pool, outbox, *numbered(2, start=7))
        assert numbers(await accepted.wait_for(6)) == [3, 4, 5, 6, 7, 8]
    assert numbers(await outbox.retrieve(connection, 10)) == [1, 2]
