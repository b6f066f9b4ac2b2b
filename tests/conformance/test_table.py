"""The table's verbs, as EventSauce's outbox repositories have them."""

from datetime import UTC, datetime, timedelta

import asyncpg

from outbox import Message, Outbox
from tests.conformance.support import HOUR, numbered, numbers

ALL = 1_000


# Capabilities


async def test_messages_are_retrieved_up_to_a_limit_in_the_order_of_recording(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    await outbox.persist(connection, *numbered(3))
    await outbox.persist(connection, *numbered(1, start=4))
    await outbox.persist(connection, *numbered(3, start=5))
    assert numbers(await outbox.retrieve(connection, 5)) == [1, 2, 3, 4, 5]
    retrieved = await outbox.retrieve(connection, ALL)
    assert numbers(retrieved) == list(range(1, 8))
    positions = [message.position or 0 for message in retrieved]
    assert positions == sorted(positions)


async def test_a_retrieved_message_has_id_position_time_of_recording_and_time_of_dispatching(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    noon = datetime(2024, 2, 29, 12, tzinfo=UTC)
    written = Message("hello", topic="greetings", recorded_at=noon)
    await outbox.persist(connection, written)
    [message] = await outbox.retrieve(connection, ALL)
    assert (message.id, message.recorded_at, message.payload) == (written.id, noon, "hello")
    assert message.dispatched_at is None
    before = await connection.fetchval("SELECT clock_timestamp()")
    await outbox.mark_dispatched(connection, message)
    after = await connection.fetchval("SELECT clock_timestamp()")
    [marked] = await outbox.retrieve(connection, ALL, dispatched=True)
    assert marked == message
    assert marked.position == message.position == await connection.fetchval("SELECT position FROM outbox")
    assert marked.dispatched_at is not None
    assert before < marked.dispatched_at < after


async def test_marking_removing_and_clearing_take_what_was_retrieved(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    await outbox.persist(connection, *numbered(5))
    first, second, third, *_ = await outbox.retrieve(connection, ALL)
    await outbox.mark_dispatched(connection, first, third)
    await outbox.remove(connection, second)
    assert numbers(await outbox.retrieve(connection, ALL)) == [4, 5]
    counts = await outbox.counts(connection)
    assert (counts.total, counts.dispatched, counts.pending) == (4, 2, 2)
    await outbox.clear(connection)
    assert (await outbox.counts(connection)).total == 0


async def test_a_message_marked_twice_keeps_its_first_time_of_dispatching(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    await outbox.persist(connection, *numbered(1))
    messages = await outbox.retrieve(connection, ALL)
    await outbox.mark_dispatched(connection, *messages)
    first = await connection.fetchval("SELECT dispatched_at FROM outbox")
    await outbox.mark_dispatched(connection, *messages)
    assert await connection.fetchval("SELECT dispatched_at FROM outbox") == first


async def test_delayed_messages_are_retrieved_counted_marked_and_removed_like_the_others(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    due = datetime.now(UTC) + HOUR
    await outbox.persist(
        connection, *[Message({"number": n}, topic="numbers", due_at=due if n % 2 else None) for n in range(4)]
    )
    counts = await outbox.counts(connection)
    assert (counts.total, counts.pending, counts.waiting) == (4, 4, 2)
    messages = {message.payload["number"]: message for message in await outbox.retrieve(connection, ALL)}
    assert messages.keys() == {0, 1, 2, 3}
    await outbox.mark_dispatched(connection, messages[0], messages[1])
    await outbox.remove(connection, messages[2], messages[3])
    counts = await outbox.counts(connection)
    assert (counts.total, counts.dispatched, counts.pending) == (2, 2, 0)


# Cases to hold


async def test_marking_removing_and_persisting_nothing_are_no_ops(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    await outbox.persist(connection, *numbered(2))
    await outbox.persist(connection)
    await outbox.mark_dispatched(connection)
    await outbox.remove(connection)
    counts = await outbox.counts(connection)
    assert (counts.total, counts.dispatched, counts.pending) == (2, 0, 2)


async def test_after_marking_3_of_10_the_counts_are_10_3_and_7_and_retrieval_goes_on_behind_the_marked(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    await outbox.persist(connection, *numbered(10))
    await outbox.mark_dispatched(connection, *await outbox.retrieve(connection, 3))
    counts = await outbox.counts(connection)
    assert (counts.total, counts.dispatched, counts.pending) == (10, 3, 7)
    assert numbers(await outbox.retrieve(connection, 3)) == [4, 5, 6]
    assert numbers(await outbox.retrieve(connection, ALL)) == [4, 5, 6, 7, 8, 9, 10]


async def test_cleanup_of_5_of_7_marked_leaves_2_marked(connection: asyncpg.Connection, outbox: Outbox) -> None:
    await outbox.persist(connection, *numbered(10))
    await outbox.mark_dispatched(connection, *await outbox.retrieve(connection, 7))
    assert await outbox.cleanup(connection, timedelta(), 5) == 5
    counts = await outbox.counts(connection)
    assert (counts.total, counts.dispatched, counts.pending) == (5, 2, 3)
    assert await outbox.cleanup(connection, timedelta(), 5) == 2
    assert await outbox.cleanup(connection, timedelta(), 5) == 0
    assert numbers(await outbox.retrieve(connection, ALL)) == [8, 9, 10]


async def test_removing_2_of_4_leaves_the_other_2(connection: asyncpg.Connection, outbox: Outbox) -> None:
    await outbox.persist(connection, *numbered(4))
    first, _, third, _ = await outbox.retrieve(connection, ALL)
    await outbox.remove(connection, first, third)
    assert numbers(await outbox.retrieve(connection, ALL)) == [2, 4]
    assert (await outbox.counts(connection)).total == 2


async def test_clearing_leaves_none(connection: asyncpg.Connection, outbox: Outbox) -> None:
    delayed = Message("later", topic="delayed", due_at=datetime.now(UTC) + HOUR)
    await outbox.persist(connection, *numbered(4), delayed)
    await outbox.mark_dispatched(connection, *await outbox.retrieve(connection, 2))
    await outbox.clear(connection)
    counts = await outbox.counts(connection)
    assert (counts.total, counts.dispatched, counts.pending, counts.waiting, counts.dead) == (0, 0, 0, 0, 0)
    assert await outbox.retrieve(connection, ALL) == []
