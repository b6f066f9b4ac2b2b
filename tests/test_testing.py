import asyncio
from datetime import UTC, datetime, timedelta
from itertools import repeat

import asyncpg
import pytest

from outbox import (
    DestinationUnavailableError,
    Dispatcher,
    ExponentialBackOff,
    FailImmediately,
    Message,
    MessageFailed,
    NoWaiting,
    Outbox,
    OutboxDispatcher,
    PartialDispatchError,
    RejectedError,
    SchemaError,
)
from outbox.testing import CollectingDispatcher, FailingDispatcher, assert_dispatched, drain

HOUR = timedelta(hours=1)


def orders(*numbers: int) -> list[Message]:
    return [Message({"order": number}, topic="orders.placed") for number in numbers]


def numbers(messages: list[Message] | tuple[Message, ...]) -> list[int]:
    return [message.payload["order"] for message in messages]


# CollectingDispatcher


async def test_a_collecting_dispatcher_keeps_messages_and_batches_in_order() -> None:
    first, second, third = orders(1, 2, 3)
    dispatcher = CollectingDispatcher()
    assert isinstance(dispatcher, Dispatcher)
    await dispatcher.dispatch(first, second)
    await dispatcher.dispatch()
    await dispatcher.dispatch(third)
    assert dispatcher.messages == [first, second, third]
    assert dispatcher.batches == [(first, second), (third,)]


async def test_it_can_be_waited_for() -> None:
    dispatcher = CollectingDispatcher()
    waiting = [asyncio.create_task(dispatcher.wait_for(count)) for count in (1, 2, 3)]
    await dispatcher.dispatch(*orders(1))
    assert numbers(await waiting[0]) == [1]
    assert not waiting[1].done()
    await dispatcher.dispatch(*orders(2, 3))
    assert [numbers(await task) for task in waiting[1:]] == [[1, 2, 3]] * 2
    assert numbers(await dispatcher.wait_for(2)) == [1, 2, 3], "it returns at once when they are there"


async def test_cleared_it_counts_anew() -> None:
    dispatcher = CollectingDispatcher()
    await dispatcher.dispatch(*orders(1, 2))
    dispatcher.clear()
    assert (dispatcher.messages, dispatcher.batches) == ([], [])
    waiting = asyncio.create_task(dispatcher.wait_for(1))
    await dispatcher.dispatch(*orders(3))
    assert numbers(await waiting) == [3]


# FailingDispatcher


async def outcome(dispatcher: Dispatcher, *messages: Message) -> BaseException | None:
    """What a dispatch raised."""
    try:
        await dispatcher.dispatch(*messages)
    except Exception as error:  # noqa: BLE001 -- that is the question
        return error
    return None


async def test_a_failing_dispatcher_follows_its_script_and_then_accepts() -> None:
    accepted, error = CollectingDispatcher(), ConnectionError("away")
    dispatcher = FailingDispatcher([error, None, TimeoutError], accepted)
    outcomes = [await outcome(dispatcher, *orders(number)) for number in range(1, 6)]
    assert outcomes[0] is error
    assert [type(one) for one in outcomes[1:]] == [type(None), TimeoutError, type(None), type(None)]
    assert numbers(accepted.messages) == [2, 4, 5]
    assert [numbers(call) for call in dispatcher.calls] == [[1], [2], [3], [4], [5]]


async def test_a_step_may_look_at_the_messages() -> None:
    def refuse_2(messages: tuple[Message, ...]) -> ValueError | None:
        return ValueError("two") if 2 in numbers(messages) else None

    dispatcher = FailingDispatcher(repeat(refuse_2))
    outcomes = [await outcome(dispatcher, *orders(*batch)) for batch in ([1], [1, 2], [3])]
    assert [type(one) for one in outcomes] == [type(None), ValueError, type(None)]


async def test_a_part_may_fail_while_the_rest_is_accepted() -> None:
    accepted = CollectingDispatcher()
    messages = orders(1, 2, 3)
    failure = PartialDispatchError({messages[1].id: ValueError("two")})
    assert await outcome(FailingDispatcher([failure], accepted), *messages) is failure
    assert numbers(accepted.messages) == [1, 3]


async def test_all_of_a_batch_may_fail_one_by_one() -> None:
    accepted, messages = CollectingDispatcher(), orders(1, 2)
    failure = PartialDispatchError({message.id: ValueError() for message in messages})
    assert await outcome(FailingDispatcher([failure], accepted), *messages) is failure
    assert accepted.batches == []


async def test_dispatching_nothing_takes_no_step() -> None:
    dispatcher = FailingDispatcher([ValueError])
    assert await outcome(dispatcher) is None
    assert dispatcher.calls == []
    assert isinstance(await outcome(dispatcher, *orders(1)), ValueError)


# assert_dispatched


async def test_what_was_dispatched_is_asserted_by_topic_and_payload_by_question_or_by_example() -> None:
    dispatcher = CollectingDispatcher()
    assert_dispatched(dispatcher)
    message = Message({"order": 1}, topic="orders.placed", key="order-1", headers={"trace": "1"})
    await dispatcher.dispatch(message, message, message)
    assert_dispatched(
        dispatcher,
        ("orders.placed", {"order": 1}),
        lambda message: message.key == "order-1",
        Message({"order": 1}, topic="orders.placed", key="order-1", headers={"trace": "1"}),
    )
    assert_dispatched(iter(dispatcher.messages), message, message, message)


@pytest.mark.parametrize(
    "unlike",
    [
        Message({"order": 2}, topic="orders.placed", key="order-1"),
        Message({"order": 1}, topic="orders.paid", key="order-1"),
        Message({"order": 1}, topic="orders.placed", key="order-2"),
        Message({"order": 1}, topic="orders.placed"),
        Message({"order": 1}, topic="orders.placed", key="order-1", headers={"trace": "1"}),
        ("orders.placed", {"order": 2}),
        ("orders.paid", {"order": 1}),
        lambda message: message.key is None,
    ],
)
def test_what_differs_fails(unlike: Message) -> None:
    message = Message({"order": 1}, topic="orders.placed", key="order-1")
    with pytest.raises(AssertionError):
        assert_dispatched([message], unlike)


def test_the_error_shows_both_sides() -> None:
    dispatched = [
        Message({"order": 1}, topic="orders.placed"),
        Message({"order": 2}, topic="orders.placed", key="order-2", headers={"trace": "1"}),
    ]

    def is_express(message: Message) -> bool:
        return "express" in message.headers

    with pytest.raises(AssertionError) as caught:
        assert_dispatched(dispatched, ("orders.placed", {"order": 1}), ("orders.paid", {"order": 1}), is_express)
    question = "test_the_error_shows_both_sides.<locals>.is_express"
    assert str(caught.value) == (
        "the dispatched messages are not the expected ones (3 expected, 2 dispatched):\n"
        "  1. as expected: orders.placed {'order': 1}\n"
        "  2. expected:   orders.paid {'order': 1}\n"
        "     dispatched: orders.placed {'order': 2} key='order-2' headers={'trace': '1'}\n"
        f"  3. expected:   one for which {question} is true\n"
        "     dispatched: nothing"
    )


@pytest.mark.parametrize(("dispatched", "expected"), [([1], []), ([1, 2], [1]), ([], [1]), ([2, 1], [1, 2])])
def test_too_many_too_few_and_another_order_fail(dispatched: list[int], expected: list[int]) -> None:
    with pytest.raises(AssertionError):
        assert_dispatched(orders(*dispatched), *orders(*expected))


async def test_what_was_written_can_be_asserted_before_the_commit(
    connection: asyncpg.Connection, outbox: Outbox
) -> None:
    async with connection.transaction():
        await OutboxDispatcher(connection, outbox).dispatch(*orders(1))
        assert_dispatched(await outbox.retrieve(connection, 10), ("orders.placed", {"order": 1}))


# drain


async def fill(pool: asyncpg.Pool, outbox: Outbox, *messages: Message) -> None:
    async with pool.acquire() as connection:
        await outbox.persist(connection, *messages)


async def test_draining_delivers_all_that_is_due_and_returns_it_in_order(pool: asyncpg.Pool, outbox: Outbox) -> None:
    delayed = Message({"order": 0}, topic="later", due_at=datetime.now(UTC) + HOUR)
    due = Message({"order": 8}, topic="by now", due_at=datetime.now(UTC) - HOUR)
    await fill(pool, outbox, delayed, due, *orders(1, 2, 3, 4, 5, 6, 7))
    destination = CollectingDispatcher()
    delivered = await drain(outbox, pool, destination, batch_size=3)
    assert numbers(delivered) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert destination.messages == delivered
    assert await drain(outbox, pool) == []
    async with pool.acquire() as connection:
        assert await outbox.retrieve(connection, 10) == [delayed]


async def test_draining_tries_again_what_is_due_again_at_once(pool: asyncpg.Pool, outbox: Outbox) -> None:
    await fill(pool, outbox, *orders(1, 2, 3))
    destination = FailingDispatcher([ConnectionError])
    assert numbers(await drain(outbox, pool, destination, backoff=NoWaiting())) == [1, 2, 3]


async def test_draining_goes_on_behind_batches_that_fail(pool: asyncpg.Pool, outbox: Outbox) -> None:
    await fill(pool, outbox, *orders(1, 2, 3, 4, 5))
    later = ExponentialBackOff(initial=HOUR, maximum=HOUR)
    destination = FailingDispatcher([ConnectionError, ConnectionError])
    assert numbers(await drain(outbox, pool, destination, batch_size=2, backoff=later)) == [5]


async def test_draining_finds_the_one_that_spoils_its_batch(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    def reject_2(messages: tuple[Message, ...]) -> RejectedError | None:
        return RejectedError("two") if 2 in numbers(messages) else None

    await fill(pool, outbox, *orders(1, 2, 3))
    assert numbers(await drain(outbox, pool, FailingDispatcher(repeat(reject_2)))) == [1, 3]
    assert [numbers([letter.message]) for letter in await outbox.dead_letters(connection)] == [[2]]


async def test_draining_buries_all_that_can_be_buried(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox
) -> None:
    await fill(pool, outbox, *orders(*range(7)))
    destination = FailingDispatcher(repeat(ValueError("no")))
    assert await drain(outbox, pool, destination, batch_size=2, backoff=FailImmediately()) == []
    assert (await outbox.counts(connection)).dead == 7


@pytest.mark.parametrize("error", [ValueError("no"), DestinationUnavailableError("away")])
async def test_draining_ends_though_what_fails_is_due_again_for_ever(
    connection: asyncpg.Connection, pool: asyncpg.Pool, outbox: Outbox, error: Exception
) -> None:
    await fill(pool, outbox, *orders(1, 2, 3))
    destination = FailingDispatcher(repeat(error))
    assert await drain(outbox, pool, destination, batch_size=2, backoff=NoWaiting(max_tries=-1)) == []
    assert (await outbox.counts(connection)).pending == 3


async def test_draining_takes_the_options_of_a_relay(pool: asyncpg.Pool, outbox: Outbox) -> None:
    failed: list[object] = []

    def note(event: object) -> None:
        if isinstance(event, MessageFailed):
            failed.append(event.message.payload)

    await fill(pool, outbox, *orders(1))
    await drain(outbox, pool, FailingDispatcher([ConnectionError]), hooks=[note])
    assert failed == [{"order": 1}]
    with pytest.raises(ValueError, match="batch_size"):
        await drain(outbox, pool, batch_size=0)


async def test_draining_an_outbox_that_is_not_there_names_the_remedy(pool: asyncpg.Pool) -> None:
    with pytest.raises(SchemaError, match="migrate"):
        await drain(Outbox("nowhere"), pool)
