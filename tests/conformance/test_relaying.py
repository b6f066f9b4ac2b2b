"""Relaying, as EventSauce's relay commands and its back-off do it."""

from datetime import UTC, datetime, timedelta
from uuid import uuid5

import asyncpg
import pytest

from outbox import (
    BackOff,
    ChainDispatcher,
    CommitStrategy,
    ExponentialBackOff,
    FailImmediately,
    FibonacciBackOff,
    HandlerDispatcher,
    LinearBackOff,
    Message,
    MessageDied,
    MessageFailed,
    NoWaiting,
    Outbox,
    OutboxDispatcher,
    PartialDispatchError,
    Relay,
    full_jitter,
    half_jitter,
    jitter_after,
    scattered_jitter,
)
from outbox._queries import Queries  # noqa: TID251 -- to recognise a settling by its real statement
from outbox.testing import CollectingDispatcher, FailingDispatcher, assert_dispatched, drain
from tests.conformance.support import HOUR, SECOND, Events, numbered, numbers, running, watched_pool, write

DAY = timedelta(days=1)


# Capabilities


async def test_a_relay_has_a_batch_size_marks_or_deletes_backs_off_and_returns_the_number_published(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    await write(pool, outbox, *numbered(5))
    destination = FailingDispatcher([None, ConnectionError("away")])
    relay = Relay(
        outbox,
        pool,
        destination,
        batch_size=2,
        commit=CommitStrategy.MARK,
        backoff=LinearBackOff(initial=HOUR, maximum=DAY),
    )
    assert [await relay.run_once() for _ in range(4)] == [2, 0, 1, 0]
    counts = await outbox.counts(connection)
    assert (counts.dispatched, counts.waiting, counts.pending) == (3, 2, 2)


async def test_through_a_dispatcher_it_relays_in_chunks(pool: asyncpg.Pool, outbox: Outbox) -> None:
    await write(pool, outbox, *numbered(5))
    destination = CollectingDispatcher()
    await drain(outbox, pool, destination, batch_size=2)
    assert [numbers(batch) for batch in destination.batches] == [[1, 2], [3, 4], [5]]


async def test_through_a_consumer_it_relays_one_at_a_time(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    handled: list[int] = []

    async def handle(message: Message) -> None:
        handled.append(message.payload["number"])
        if message.payload["number"] == 2:
            raise ValueError("not this one")

    await write(pool, outbox, *numbered(3))
    delivered = await drain(outbox, pool, HandlerDispatcher(handle), backoff=FailImmediately())
    assert handled == [1, 2, 3]
    assert numbers(delivered) == [1, 3]
    [dead] = await outbox.dead_letters(connection)
    assert (dead.message.payload, dead.error) == ({"number": 2}, "ValueError: not this one")


async def test_through_an_outbox_dispatcher_it_relays_into_another_outbox(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    other = Outbox("inbox", schema=outbox.schema)
    await other.migrate(connection)
    messages = numbered(3)
    await write(pool, outbox, *messages)
    async with connection.transaction():
        await drain(outbox, pool, OutboxDispatcher(connection, other))
    assert await other.retrieve(connection, 10) == messages


async def test_a_chain_hands_each_message_to_every_destination(pool: asyncpg.Pool, outbox: Outbox) -> None:
    first, second = CollectingDispatcher(), CollectingDispatcher()
    messages = numbered(3)
    await write(pool, outbox, *messages)
    await drain(outbox, pool, ChainDispatcher(first, second))
    assert first.messages == second.messages == messages


async def test_one_row_can_become_many_messages_settled_as_one(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    def one_each(message: Message) -> list[Message]:
        return [
            Message(item, topic="items", id=uuid5(message.id, str(index)))
            for index, item in enumerate(message.payload["items"])
        ]

    await write(
        pool,
        outbox,
        *[Message({"items": items}, topic="baskets") for items in (["a", "b", "c"], ["d"], [], ["e", "f"])],
    )
    destination = CollectingDispatcher()
    assert await Relay(outbox, pool, destination, upcast=one_each).run_once() == 4
    assert [message.payload for message in destination.messages] == ["a", "b", "c", "d", "e", "f"]
    assert (await outbox.counts(connection)).total == 0


async def test_a_row_of_which_one_message_failed_is_tried_again_as_a_whole_with_the_same_ids(
    pool: asyncpg.Pool, outbox: Outbox
) -> None:
    def halves(message: Message) -> list[Message]:
        return [Message(message.payload, topic=half, id=uuid5(message.id, half)) for half in ("left", "right")]

    def fail_the_right_half_of_1(messages: tuple[Message, ...]) -> PartialDispatchError:
        [failing] = [one for one in messages if (one.topic, one.payload["number"]) == ("right", 1)]
        return PartialDispatchError({failing.id: ValueError("no")})

    await write(pool, outbox, *numbered(2))
    destination = FailingDispatcher([fail_the_right_half_of_1])
    delivered = await drain(outbox, pool, destination, upcast=halves, backoff=NoWaiting())
    first, second = destination.calls
    assert numbers(first) == [1, 1, 2, 2]
    assert [message.id for message in second] == [message.id for message in first[:2]]
    assert numbers(delivered) == [2, 1]


@pytest.mark.parametrize(
    ("backoff", "bounds"),
    [
        (ExponentialBackOff(initial=HOUR, maximum=DAY), (HOUR, HOUR)),
        (LinearBackOff(initial=HOUR, maximum=DAY, max_tries=-1), (HOUR, HOUR)),
        (FibonacciBackOff(initial=HOUR, maximum=DAY), (HOUR, HOUR)),
        (ExponentialBackOff(initial=HOUR, maximum=DAY, jitter=full_jitter), (timedelta(), HOUR)),
        (ExponentialBackOff(initial=HOUR, maximum=DAY, jitter=half_jitter), (HOUR / 2, HOUR)),
        (ExponentialBackOff(initial=HOUR, maximum=DAY, jitter=scattered_jitter(0.5)), (HOUR / 2, HOUR * 1.5)),
        (ExponentialBackOff(initial=HOUR, maximum=DAY, jitter=jitter_after(HOUR / 2)), (HOUR / 2, HOUR)),
        (NoWaiting(), (timedelta(), timedelta())),
        (lambda _, error: DAY if isinstance(error, ValueError) else None, (DAY, DAY)),
    ],
)
async def test_the_wait_of_every_back_off_is_a_due_time_in_the_row(
    connection: asyncpg.Connection,
    pool: asyncpg.Pool,
    outbox: Outbox,
    backoff: BackOff,
    bounds: tuple[timedelta, timedelta],
) -> None:
    shortest, longest = bounds
    await write(pool, outbox, *numbered(1))
    before = await connection.fetchval("SELECT clock_timestamp()")
    assert await Relay(outbox, pool, FailingDispatcher([ValueError("no")]), backoff=backoff).run_once() == 0
    row = await connection.fetchrow("SELECT due_at, attempts, error, clock_timestamp() AS now FROM outbox_waiting")
    assert row is not None
    assert before + shortest <= row["due_at"] <= row["now"] + longest
    assert (row["attempts"], row["error"]) == (1, "ValueError: no")


async def test_immediately_failing_makes_a_dead_letter_of_the_first_failure(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    await write(pool, outbox, *numbered(1))
    await drain(outbox, pool, FailingDispatcher([ValueError("no")]), backoff=FailImmediately())
    [dead] = await outbox.dead_letters(connection)
    assert (dead.attempts, dead.error) == (1, "ValueError: no")


async def test_max_tries_5_gives_up_after_the_sixth_call(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    events, destination = Events(), FailingDispatcher([ValueError(str(call)) for call in range(1, 10)])
    await write(pool, outbox, *numbered(1))
    async with running(Relay(outbox, pool, destination, backoff=NoWaiting(max_tries=5), hooks=[events])):
        await events.wait_for(MessageDied)
    assert len(destination.calls) == 6
    assert [event.attempts for event in events.of(MessageFailed)] == [1, 2, 3, 4, 5]
    [dead] = await outbox.dead_letters(connection)
    assert (dead.attempts, dead.error) == (6, "ValueError: 6")


async def test_minus_1_tries_go_on_for_ever(connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox) -> None:
    await write(pool, outbox, *numbered(1))
    await Relay(outbox, pool, FailingDispatcher([ValueError]), backoff=NoWaiting()).run_once()
    await connection.execute("UPDATE outbox_waiting SET attempts = 10000")
    relay = Relay(outbox, pool, FailingDispatcher([ValueError, None]), backoff=NoWaiting(max_tries=-1))
    assert [await relay.run_once() for _ in range(2)] == [0, 1]
    assert (await outbox.counts(connection)).dead == 0


# Cases to hold


async def test_the_relay_hands_over_three_messages_in_order_and_returns_3(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    messages, destination = numbered(3), CollectingDispatcher()
    await write(pool, outbox, *messages)
    relay = Relay(outbox, pool, destination)
    assert await relay.run_once() == 3
    assert_dispatched(destination, *messages)
    assert await relay.run_once() == 0
    assert destination.batches == [tuple(messages)]
    assert (await outbox.counts(connection)).total == 0


async def test_with_4_messages_in_chunks_of_3_it_settles_twice(
    dsn: str, connection: asyncpg.Connection, outbox: Outbox
) -> None:
    settle = Queries(outbox.table, outbox.schema).remove_claimed
    async with watched_pool(dsn) as (pool, executed):
        await write(pool, outbox, *numbered(4))
        relay = Relay(outbox, pool, CollectingDispatcher(), batch_size=3)
        assert [await relay.run_once() for _ in range(3)] == [3, 1, 0]
    assert [positions.count(",") + 1 for positions, *_ in executed.arguments(settle)] == [3, 1]
    assert (await outbox.counts(connection)).total == 0


async def test_one_failure_costs_one_extra_call_and_loses_nothing(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    messages, accepted = numbered(3), CollectingDispatcher()
    await write(pool, outbox, *messages)
    destination = FailingDispatcher([ConnectionError("away")], accepted)
    delivered = await drain(outbox, pool, destination, backoff=NoWaiting())
    assert delivered == accepted.messages == messages
    assert len(destination.calls) == 2
    counts = await outbox.counts(connection)
    assert (counts.total, counts.dead) == (0, 0)


@pytest.mark.parametrize(("commit", "left"), [(CommitStrategy.DELETE, 0), (CommitStrategy.MARK, 4)])
async def test_delete_leaves_no_row_and_mark_leaves_all_rows_marked(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox, commit: CommitStrategy, left: int
) -> None:
    await write(pool, outbox, *numbered(4))
    # The failure makes them wait first, where they are settled otherwise than fresh ones.
    destination = FailingDispatcher([None, ConnectionError])
    delivered = await drain(outbox, pool, destination, batch_size=2, commit=commit, backoff=NoWaiting())
    assert numbers(delivered) == [1, 2, 3, 4]
    counts = await outbox.counts(connection)
    assert (counts.total, counts.dispatched, counts.pending) == (left, left, 0)
    assert await connection.fetchval("SELECT count(dispatched_at) FROM outbox") == left
    assert await Relay(outbox, pool, destination, commit=commit).run_once() == 0


async def test_a_relay_cleans_up_the_marked_rows_that_are_older_than_it_is_to_keep_them(
    dsn: str, connection: asyncpg.Connection, outbox: Outbox
) -> None:
    cleanup = Queries(outbox.table, outbox.schema).cleanup
    async with watched_pool(dsn) as (pool, executed):
        await write(pool, outbox, *numbered(4))
        await drain(outbox, pool, commit=CommitStrategy.MARK)
        await connection.execute(
            "UPDATE outbox SET dispatched_at = dispatched_at - interval '1 day' WHERE position < 4"
        )
        async with running(Relay(outbox, pool, CollectingDispatcher(), commit=CommitStrategy.MARK, keep=HOUR)):
            # The second time says that the first was committed.
            await executed.until(lambda: len(executed.arguments(cleanup)) == 2)
    assert (await outbox.counts(connection)).dispatched == 1


async def test_a_delayed_message_is_delivered_when_its_time_has_come_and_holds_up_no_other(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    delayed = Message({"number": 0}, topic="numbers", due_at=datetime.now(UTC) + HOUR)
    await write(pool, outbox, delayed, *numbered(3))
    assert numbers(await drain(outbox, pool)) == [1, 2, 3]
    # An hour passes.
    await connection.execute("UPDATE outbox_waiting SET due_at = due_at - interval '1 hour'")
    assert await drain(outbox, pool) == [delayed]


async def test_a_relay_in_the_background_delivers_what_is_written_while_it_runs(
    pool: asyncpg.Pool, outbox: Outbox
) -> None:
    destination = CollectingDispatcher()
    async with running(Relay(outbox, pool, destination, poll_interval=SECOND)):
        for number in range(1, 6):
            await write(pool, outbox, *numbered(1, start=number))
            await destination.wait_for(number)
    assert numbers(destination.messages) == [1, 2, 3, 4, 5]
