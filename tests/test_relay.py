"""What a relay does with messages that come late, fail, wait or must be made into others, and what it says of it."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid5

import anyio
import asyncpg
import pytest

from outbox import (
    BatchDelivered,
    CommitStrategy,
    DatabaseLost,
    DestinationDown,
    DestinationUnavailableError,
    DestinationUp,
    Dispatcher,
    Event,
    FailImmediately,
    HandlerDispatcher,
    LinearBackOff,
    Message,
    MessageDied,
    MessageFailed,
    Notifier,
    NoWaiting,
    Outbox,
    OutboxDispatcher,
    OutboxError,
    PartialDispatchError,
    RejectedError,
    Relay,
    RelayFenced,
    RelaysDied,
    RelayStarted,
    RelayStopped,
    SchemaError,
)

_SOON = timedelta(milliseconds=10)
_QUICK = LinearBackOff(initial=_SOON, max_tries=2)


class Destination:
    """Records each call, fails as it is told, and can be waited for."""

    def __init__(self, fault: Callable[[Sequence[Message]], None] = lambda _: None) -> None:
        self.calls: list[tuple[Message, ...]] = []
        self.accepted: list[Any] = []
        self._fault = fault
        self._changed = asyncio.Condition()

    async def dispatch(self, *messages: Message) -> None:
        async with self._changed:
            self.calls.append(messages)
            self._changed.notify_all()
        refused: set[UUID] = set()
        try:
            self._fault(messages)
        except PartialDispatchError as error:
            refused = set(error.failures)
            raise
        except BaseException:
            refused = {message.id for message in messages}
            raise
        finally:
            async with self._changed:
                self.accepted += [message.payload for message in messages if message.id not in refused]
                self._changed.notify_all()

    async def until(self, condition: Callable[[Destination], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: condition(self))

    async def has_accepted(self, count: int) -> None:
        await self.until(lambda self: len(self.accepted) >= count)


class Events:
    """A hook that keeps the events, and can be waited for."""

    def __init__(self) -> None:
        self.seen: list[Event] = []
        self._waiting: list[tuple[type, asyncio.Event]] = []

    def __call__(self, event: Event) -> None:
        self.seen.append(event)
        for kind, waiter in self._waiting:
            if isinstance(event, kind):
                waiter.set()

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.seen if isinstance(event, kind)]

    async def next(self, kind: type[Event]) -> Any:
        waiter = asyncio.Event()
        self._waiting.append((kind, waiter))
        await waiter.wait()
        return self.of(kind)[-1]


async def write(pool: asyncpg.Pool[Any], outbox: Outbox, *payloads: Any, **fields: Any) -> list[Message]:
    messages = [Message(payload, topic="t", **fields) for payload in payloads]
    async with pool.acquire() as connection, connection.transaction():
        await OutboxDispatcher(connection, outbox).dispatch(*messages)
    return messages


@asynccontextmanager
async def running(
    outbox: Outbox, pool: asyncpg.Pool[Any], destination: Dispatcher, **settings: Any
) -> AsyncIterator[Relay]:
    settings = {"lease": timedelta(seconds=5), "grace": timedelta(seconds=2), "backoff": _QUICK, **settings}
    relay = Relay(outbox, pool, destination, **settings)
    async with anyio.create_task_group() as group:
        await group.start(relay.run)
        yield relay
        await relay.stop()


def fails(
    *payloads: Any, error: BaseException | type[BaseException] = ValueError
) -> Callable[[Sequence[Message]], None]:
    """The whole batch fails when one of these is in it."""

    def fault(messages: Sequence[Message]) -> None:
        if any(message.payload in payloads for message in messages):
            raise error

    return fault


def refuses(*payloads: Any, error: BaseException) -> Callable[[Sequence[Message]], None]:
    """Only these fail, each by its name."""

    def fault(messages: Sequence[Message]) -> None:
        if bad := {message.id: error for message in messages if message.payload in payloads}:
            raise PartialDispatchError(bad)

    return fault


async def counts(pool: asyncpg.Pool[Any], outbox: Outbox) -> tuple[int, int, int, int]:
    async with pool.acquire() as connection:
        counts = await outbox.counts(connection)
    return counts.dispatched, counts.pending, counts.waiting, counts.dead


async def until_counts(pool: asyncpg.Pool[Any], outbox: Outbox, wanted: tuple[int, int, int, int]) -> None:
    while await counts(pool, outbox) != wanted:  # noqa: ASYNC110 -- what is written down in the table has no event
        await asyncio.sleep(0.01)


async def drained(pool: asyncpg.Pool[Any], outbox: Outbox, count: int) -> None:
    """What is left can be delivered, and is so many messages."""
    relay, delivered = Relay(outbox, pool, Destination()), 0
    while batch := await relay.run_once():
        delivered += batch
    assert delivered == count


async def nothing_is_held(pool: asyncpg.Pool[Any], outbox: Outbox) -> bool:
    schema = outbox.schema
    async with pool.acquire() as connection:
        return not await connection.fetchval(
            f"SELECT (SELECT count(*) FROM {schema}.outbox_claims) + (SELECT count(*) FROM {schema}.outbox_relays)"  # noqa: S608 -- our own schema
            f" + (SELECT count(*) FROM {schema}.outbox_waiting WHERE owner IS NOT NULL)"
        )


# --- late commits -----------------------------------------------------------------------------------------


async def test_a_message_that_commits_late_behind_many_others_is_delivered(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    destination = Destination()
    async with pool.acquire() as late, running(outbox, pool, destination):
        transaction = late.transaction()
        await transaction.start()
        await OutboxDispatcher(late, outbox).dispatch(Message("late", topic="t"))
        await write(pool, outbox, *range(500))
        await destination.has_accepted(500)
        assert "late" not in destination.accepted
        await transaction.commit()
        await destination.has_accepted(501)
    assert destination.accepted[-1] == "late"
    assert await counts(pool, outbox) == (0, 0, 0, 0)


async def test_positions_from_nowhere_below_the_floor_are_found_by_the_next_relay(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await write(pool, outbox, *range(5))
    async with pool.acquire() as connection:
        await connection.execute(f"UPDATE {outbox.schema}.outbox SET position = position - 1000")  # noqa: S608
    destination = Destination()
    async with running(outbox, pool, destination):
        await destination.has_accepted(5)
    assert destination.accepted == list(range(5))


# --- failures -----------------------------------------------------------------------------------------------


async def test_a_batch_that_fails_once_costs_one_extra_call(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    await write(pool, outbox, 1, 2, 3)
    errors = [RuntimeError("once")]
    destination = Destination(lambda _: None if not errors else _raise(errors.pop()))
    async with running(outbox, pool, destination):
        await destination.has_accepted(3)
    assert [[message.payload for message in call] for call in destination.calls] == [[1, 2, 3], [1, 2, 3]]
    assert [message.attempts for message in destination.calls[1]] == [1, 1, 1]


async def test_one_bad_message_of_a_batch_is_found_and_the_others_go_through(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await write(pool, outbox, *range(10))
    destination, events = Destination(fails(7)), Events()
    async with running(outbox, pool, destination, hooks=[events]):
        died = await events.next(MessageDied)
        await destination.has_accepted(9)
    assert sorted(destination.accepted) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert died.message.payload == 7
    async with pool.acquire() as connection:
        (dead,) = await outbox.dead_letters(connection)
    assert (dead.message.payload, dead.attempts, dead.error) == (7, 3, "ValueError")


async def test_even_a_strategy_without_patience_buries_only_the_culprit(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await write(pool, outbox, *range(10))
    destination, events = Destination(fails(7)), Events()
    async with running(outbox, pool, destination, hooks=[events], backoff=FailImmediately()):
        await events.next(MessageDied)
        await destination.has_accepted(9)
    assert await counts(pool, outbox) == (0, 0, 0, 1)


async def test_named_failures_leave_the_rest_of_the_batch_settled(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    await write(pool, outbox, *range(10))
    destination, events = Destination(refuses(3, 4, error=OSError("half"))), Events()
    async with running(outbox, pool, destination, hooks=[events]):
        await events.next(MessageDied)
        await destination.until(lambda it: sum(message.payload == 4 for call in it.calls for message in call) == 3)
    assert sorted(destination.accepted) == [0, 1, 2, 5, 6, 7, 8, 9]
    assert await counts(pool, outbox) == (0, 0, 0, 2)
    assert {failed.attempts for failed in events.of(MessageFailed)} == {1, 2}


async def test_a_rejected_message_dies_at_once_and_a_rejected_batch_is_tried_one_by_one(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await write(pool, outbox, *range(4))
    destination, events = Destination(fails(2, error=RejectedError("never"))), Events()
    async with running(outbox, pool, destination, hooks=[events]):
        died = await events.next(MessageDied)
        await destination.has_accepted(3)
    assert (died.message.payload, died.attempts) == (2, 1)
    assert await counts(pool, outbox) == (0, 0, 0, 1)


async def test_an_unavailable_destination_spends_no_attempts_and_is_waited_for(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await write(pool, outbox, *range(90))
    down = [True]
    destination, events = Destination(lambda _: _raise(DestinationUnavailableError("away")) if down else None), Events()
    settings = {"hooks": [events], "destination_backoff": NoWaiting(), "batch_size": 10, "backoff": FailImmediately()}
    async with running(outbox, pool, destination, **settings):
        await destination.until(lambda it: len(it.calls) > 20)
        assert await counts(pool, outbox) == (0, 90, 0, 0)
        down.clear()
        await events.next(DestinationUp)
        await destination.has_accepted(90)
    assert sorted(destination.accepted) == list(range(90))
    assert all(message.attempts == 0 for call in destination.calls for message in call)
    assert events.of(DestinationDown)


async def test_a_destination_that_is_partly_unavailable_gets_the_rest_again(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await write(pool, outbox, *range(4))
    faults = [refuses(1, 3, error=DestinationUnavailableError("half of it"))]
    destination = Destination(lambda messages: faults.pop()(messages) if faults else None)
    async with running(outbox, pool, destination, destination_backoff=NoWaiting()):
        await destination.has_accepted(4)
    assert [[message.payload for message in call] for call in destination.calls] == [[0, 1, 2, 3], [1, 3]]


async def test_a_relay_stops_at_once_while_its_destination_is_down_and_gives_its_messages_back(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await write(pool, outbox, *range(50))
    destination = Destination(lambda _: _raise(DestinationUnavailableError("away")))
    events = Events()
    hour = LinearBackOff(initial=timedelta(hours=1), maximum=timedelta(hours=2), max_tries=-1)
    async with running(
        outbox, pool, destination, destination_backoff=hour, grace=timedelta(seconds=50), hooks=[events], batch_size=10
    ):
        await events.next(DestinationDown)
    given_back = events.of(RelayStopped)[0].given_back
    assert given_back >= 10
    assert await counts(pool, outbox) == (0, 50, given_back, 0)
    assert await nothing_is_held(pool, outbox)
    await drained(pool, outbox, 50)


async def test_a_group_of_errors_counts_as_what_it_holds(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    await write(pool, outbox, 1)
    errors = [ExceptionGroup("both", [DestinationUnavailableError(), DestinationUnavailableError()])]
    destination = Destination(lambda _: _raise(errors.pop()) if errors else None)
    async with running(outbox, pool, destination, destination_backoff=NoWaiting(), backoff=FailImmediately()):
        await destination.has_accepted(1)


async def test_a_destination_that_hangs_counts_as_a_failure_and_the_rest_flows(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    class Hanging(Destination):
        async def dispatch(self, *messages: Message) -> None:
            if any(message.payload == "hang" for message in messages):
                await asyncio.Event().wait()
            await super().dispatch(*messages)

    await write(pool, outbox, *range(5), "hang", *range(5, 10))
    destination, events = Hanging(), Events()
    async with running(
        outbox, pool, destination, dispatch_timeout=timedelta(milliseconds=50), hooks=[events], batch_size=4
    ):
        died = await events.next(MessageDied)
        await destination.has_accepted(10)
    assert died.message.payload == "hang"
    assert isinstance(died.error, TimeoutError)


async def test_a_destination_whose_own_task_was_cancelled_counts_as_a_failure(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await write(pool, outbox, 1)
    errors: list[BaseException] = [asyncio.CancelledError()]
    destination = Destination(lambda _: _raise(errors.pop()) if errors else None)
    async with running(outbox, pool, destination):
        await destination.has_accepted(1)
    assert [message.attempts for (message,) in destination.calls] == [0, 1]


async def test_what_cannot_be_decoded_dies_and_the_rest_flows(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    await write(pool, outbox, *range(3))
    async with pool.acquire() as connection:
        await connection.execute(
            f"UPDATE {outbox.schema}.outbox SET payload = 'no json' WHERE payload = '1'"  # noqa: S608 -- our own schema
        )
    destination, events = Destination(fails("none")), Events()
    async with running(outbox, pool, destination, hooks=[events]):
        await events.next(MessageDied)
        await destination.until(lambda it: {0, 2} <= set(it.accepted))
    async with pool.acquire() as connection:
        (dead,) = await outbox.dead_letters(connection)
    assert "the body is not JSON" in dead.error
    assert dead.message.body == b"no json"


async def test_a_redriven_dead_letter_has_all_its_attempts_before_it(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    (first, *_) = await write(pool, outbox, *range(3))
    broken = [True]
    destination, events = Destination(lambda _: _raise(ValueError("broken")) if broken else None), Events()
    async with running(outbox, pool, destination, hooks=[events], backoff=NoWaiting(max_tries=2)):
        await destination.until(lambda _: len(events.of(MessageDied)) == 3)
        await until_counts(pool, outbox, (0, 0, 0, 3))
        broken.clear()
        async with pool.acquire() as connection:
            assert await outbox.redrive(connection, [first.id]) == 1
            await destination.has_accepted(1)
            assert destination.calls[-1][0].attempts == 0
            assert destination.calls[-1][0].id == first.id
            assert await outbox.redrive(connection) == 2
        await destination.has_accepted(3)
    assert destination.accepted == [0, 1, 2]


def _raise(error: BaseException) -> None:
    raise error


# --- waiting --------------------------------------------------------------------------------------------------


async def test_a_delayed_message_is_not_delivered_before_its_time(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    due = datetime.now(UTC) + timedelta(milliseconds=400)
    await write(pool, outbox, "later", due_at=due)
    await write(pool, outbox, "much later", due_at=due + timedelta(days=365))
    await write(pool, outbox, "now")
    destination = Destination()
    async with running(outbox, pool, destination):
        await destination.has_accepted(2)
        assert datetime.now(UTC) >= due
    assert destination.accepted == ["now", "later"]
    assert await counts(pool, outbox) == (0, 1, 1, 0)


async def test_messages_due_at_the_same_time_come_in_the_order_of_their_positions(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await write(pool, outbox, *range(1000), due_at=datetime(2020, 1, 1, tzinfo=UTC))
    destination = Destination()
    async with running(outbox, pool, destination, concurrency=1):
        await destination.has_accepted(1000)
    assert destination.accepted == list(range(1000))


# --- the strategies of settling -------------------------------------------------------------------------------


async def test_marked_messages_are_kept_until_their_age_is_reached(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination = Destination()
    await write(pool, outbox, *range(10))
    await write(pool, outbox, "delayed", due_at=datetime(2020, 1, 1, tzinfo=UTC))
    async with running(outbox, pool, destination, commit=CommitStrategy.MARK):
        await destination.has_accepted(11)
    assert await counts(pool, outbox) == (11, 0, 0, 0)
    async with running(outbox, pool, Destination(), commit=CommitStrategy.MARK, keep=timedelta()):
        await until_counts(pool, outbox, (0, 0, 0, 0))


async def test_one_stored_message_becomes_several_and_is_settled_as_one(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    def upcast(message: Message) -> list[Message]:
        if message.payload == "broken":
            raise ValueError("no upcast")
        parts = range(message.payload)
        return [Message(part, topic="part", id=uuid5(message.id, str(part))) for part in parts]

    await write(pool, outbox, 0, 2, "broken", 3)
    faults = [refuses(2, error=OSError("once"))]
    destination = Destination(lambda messages: faults.pop()(messages) if faults else None)
    async with running(outbox, pool, destination, upcast=upcast, backoff=FailImmediately()):
        await destination.has_accepted(4)
    assert [[message.payload for message in call] for call in destination.calls] == [[0, 1, 0, 1, 2]]
    async with pool.acquire() as connection:
        dead = await outbox.dead_letters(connection)
    assert [(letter.message.payload, letter.error) for letter in dead] == [
        ("broken", "ValueError: no upcast"),
        (3, "OSError: once"),
    ]


# --- several, and one at a time -------------------------------------------------------------------------------


async def test_run_once_delivers_one_batch_and_leaves_nothing_behind(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    await write(pool, outbox, *range(25))
    destination = Destination()
    relay = Relay(outbox, pool, destination, batch_size=10)
    assert [await relay.run_once() for _ in range(4)] == [10, 10, 5, 0]
    assert destination.accepted == list(range(25))
    assert await nothing_is_held(pool, outbox)


async def test_run_once_gives_back_what_an_unavailable_destination_did_not_take(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await write(pool, outbox, *range(3))
    destination = Destination(fails(1, error=DestinationUnavailableError()))
    assert await Relay(outbox, pool, destination).run_once() == 0
    assert await counts(pool, outbox) == (0, 3, 3, 0)
    assert await Relay(outbox, pool, Destination()).run_once() == 3


async def test_several_batches_are_in_delivery_at_once(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    class Slow(Destination):
        def __init__(self) -> None:
            super().__init__()
            self.together = asyncio.Barrier(3)

        async def dispatch(self, *messages: Message) -> None:
            await self.together.wait()  # passes only when three are here
            await super().dispatch(*messages)

    await write(pool, outbox, *range(9))
    destination = Slow()
    async with running(outbox, pool, destination, batch_size=3, concurrency=3):
        await destination.has_accepted(9)


async def test_a_relay_holds_few_messages_at_a_time_when_they_are_large(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await write(pool, outbox, *["x" * 1_000_000] * 60)
    held = []

    async def weigh(_: Message) -> None:
        async with pool.acquire() as connection:
            statement = f"SELECT sum(cardinality(positions)) FROM {outbox.schema}.outbox_claims"  # noqa: S608
            held.append(await connection.fetchval(statement))

    destination = HandlerDispatcher(weigh)
    async with running(outbox, pool, destination, batch_size=2, concurrency=2):
        await until_counts(pool, outbox, (0, 0, 0, 0))
    assert len(held) == 60
    assert max(held) <= 2 * 16 + 1


async def test_messages_of_a_dead_relay_are_taken_over_and_tried_alone(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    await write(pool, outbox, *range(5))
    stuck, events, destination = asyncio.Event(), Events(), Destination()

    class Stuck:
        async def dispatch(self, *_: Message) -> None:
            stuck.set()
            await asyncio.Event().wait()

    # It gives its next sign of life in a second: by then the other one has looked.
    dying = asyncio.create_task(Relay(outbox, pool, Stuck(), lease=timedelta(seconds=3)).run())
    await stuck.wait()
    async with pool.acquire() as connection:  # as a freeze would: its sign of life is long ago
        await connection.execute(f"UPDATE {outbox.schema}.outbox_relays SET until = now() - interval '1 h'")  # noqa: S608
        async with running(outbox, pool, destination, hooks=[events]):
            await destination.has_accepted(5)
    assert [len(call) for call in destination.calls] == [1, 1, 1, 1, 1]
    assert (events.of(RelaysDied)[0].relays, events.of(RelaysDied)[0].messages) == (1, 5)
    dying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await dying
    assert await counts(pool, outbox) == (0, 0, 0, 0)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("hangs", [True, False])
async def test_the_transaction_that_was_opened_for_the_next_claim_does_not_stay_open(
    *, hangs: bool, dsn: str, outbox: Outbox
) -> None:
    """Neither while the destination takes its time, nor while there is nothing to claim."""
    was_ended = asyncio.Event()

    async def watch(connection: Any) -> None:
        opened: list[str] = []

        def after_statement(record: Any) -> None:
            if record.query.startswith("COMMIT; "):
                opened.append(record.query)
            elif record.query == "COMMIT" and opened:
                was_ended.set()

        connection.add_query_logger(after_statement)

    class Slow(Destination):
        async def dispatch(self, *messages: Message) -> None:
            await super().dispatch(*messages)
            if hangs:
                await asyncio.Event().wait()

    async with asyncpg.create_pool(dsn, min_size=0, max_size=5, setup=watch) as pool:
        await write(pool, outbox, *range(1_000 if hangs else 1))
        async with running(outbox, pool, Slow(), poll_interval=timedelta(hours=1), batch_size=10):
            await was_ended.wait()


async def test_a_fenced_relay_starts_anew_under_another_name(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination, events = Destination(), Events()
    async with running(outbox, pool, destination, lease=timedelta(milliseconds=300), hooks=[events]):
        async with pool.acquire() as connection:
            await connection.execute(f"DELETE FROM {outbox.schema}.outbox_relays")  # noqa: S608 -- our own schema
        await events.next(RelayFenced)
        await write(pool, outbox, *range(5))
        await destination.has_accepted(5)
    assert await nothing_is_held(pool, outbox)


async def test_what_a_commit_without_an_answer_left_claimed_is_let_go(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    await write(pool, outbox, *range(5))
    destination, lost = Destination(), [True]

    class Unanswered:
        """A pool whose first claim commits, and then says it did not."""

        def __getattr__(self, name: str) -> Any:
            return getattr(pool, name)

        async def acquire(self) -> Any:
            connection = await pool.acquire()
            execute = connection.execute

            async def interrupted(statement: str, *arguments: Any, **options: Any) -> str:
                status = await execute(statement, *arguments, **options)
                held = await connection.fetchval(f"SELECT count(*) FROM {outbox.schema}.outbox_claims")  # noqa: S608
                if statement.startswith("COMMIT") and held and lost:
                    lost.clear()
                    raise ConnectionResetError("no answer to the COMMIT")
                return status

            return _Interrupted(connection, interrupted)

        async def release(self, connection: Any, **options: Any) -> None:
            await pool.release(connection.inner, **options)

    class _Interrupted:
        def __init__(self, inner: Any, execute: Any) -> None:
            self.inner, self.execute = inner, execute

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    async with running(outbox, Unanswered(), destination):  # type: ignore[arg-type]  # a pool with one fault
        await destination.has_accepted(5)
    assert not lost, "the fault happened"
    assert sorted(destination.accepted) == list(range(5))
    assert await nothing_is_held(pool, outbox)


# --- waking up ------------------------------------------------------------------------------------------------


async def test_a_relay_in_the_same_process_is_woken_by_a_commit(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination = Destination()
    async with running(outbox, pool, destination, poll_interval=timedelta(hours=1)):
        for number in range(3):
            await asyncio.sleep(0.3)  # why a sleep: the relay must have become idle, with hours to wait
            await write(pool, outbox, number)
            await destination.has_accepted(number + 1)


async def test_a_relay_elsewhere_is_woken_by_a_notifier(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    elsewhere, destination = Outbox(outbox.table, schema=outbox.schema), Destination()
    relaying = running(elsewhere, pool, destination, poll_interval=timedelta(hours=1), listen=True)
    async with relaying, anyio.create_task_group() as group:
        await group.start(Notifier(outbox, pool).run)
        for number in range(3):
            await asyncio.sleep(0.3)  # why a sleep: the relay must have become idle, with hours to wait
            await write(pool, outbox, number)
            await destination.has_accepted(number + 1)
        group.cancel_scope.cancel()


async def test_a_notifier_does_not_put_off_the_first_commit(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    elsewhere, destination = Outbox(outbox.table, schema=outbox.schema), Destination()
    relaying = running(elsewhere, pool, destination, poll_interval=timedelta(hours=1), listen=True)
    async with relaying, anyio.create_task_group() as group:
        await group.start(Notifier(outbox, pool, debounce=timedelta(hours=1)).run)
        await asyncio.sleep(0.3)  # why a sleep: the relay must have become idle, with hours to wait
        await write(pool, outbox, 1)
        await destination.has_accepted(1)
        group.cancel_scope.cancel()


# --- the life of a relay ----------------------------------------------------------------------------------------


async def test_the_id_of_a_delivered_message_can_be_sent_on(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    (message,) = await write(pool, outbox, 1)
    destination = Destination()
    async with running(outbox, pool, destination):
        await destination.has_accepted(1)
    ((arrived,),) = destination.calls
    assert type(arrived.id) is UUID
    assert Message({"caused_by": arrived.id}, topic="t").body == f'{{"caused_by":"{message.id}"}}'.encode()


async def test_events_tell_the_life_of_a_relay(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    await write(pool, outbox, 1)
    destination, events = Destination(), Events()
    async with running(outbox, pool, destination, hooks=[events]):
        delivered = await events.next(BatchDelivered)
    assert [type(event) for event in events.seen] == [RelayStarted, BatchDelivered, RelayStopped]
    assert [message.payload for message in delivered.messages] == [1]
    assert delivered.seconds >= 0


async def test_a_hook_that_fails_is_logged_and_harms_nobody(
    pool: asyncpg.Pool[Any], outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    await write(pool, outbox, 1)
    destination = Destination()
    with caplog.at_level(logging.ERROR, "outbox"):
        async with running(outbox, pool, destination, hooks=[lambda _: _raise(KeyError("hook"))]):
            await destination.has_accepted(1)
    assert "a hook failed on BatchDelivered" in caplog.text


async def test_a_cancelled_relay_settles_what_it_knows_and_gives_back_the_rest(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    class Half(Destination):
        async def dispatch(self, *messages: Message) -> None:
            await super().dispatch(*messages)
            if messages[0].payload:
                await asyncio.Event().wait()

    await write(pool, outbox, 0, 1, 2)
    destination = Half()
    task = asyncio.create_task(Relay(outbox, pool, destination, batch_size=1).run())
    await destination.has_accepted(3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await counts(pool, outbox) == (0, 2, 2, 0)
    assert await nothing_is_held(pool, outbox)


async def test_a_relay_refuses_a_table_that_is_not_there(pool: asyncpg.Pool[Any]) -> None:
    relay = Relay(Outbox("nowhere"), pool, Destination())
    for work in (relay.run, relay.run_once):
        with pytest.raises(SchemaError, match=r"run outbox\.migrate"):
            await work()


async def test_a_relay_ends_with_an_error_that_time_does_not_heal(pool: asyncpg.Pool[Any], outbox: Outbox) -> None:
    destination = Destination()
    async with pool.acquire() as connection:
        relay = Relay(outbox, pool, destination)
        task = asyncio.create_task(relay.run())
        await write(pool, outbox, 1)
        await destination.has_accepted(1)
        await connection.execute(f"DROP TABLE {outbox.schema}.outbox_claims")
        with pytest.raises(OutboxError, match="cannot go on") as raised:
            await task
    assert isinstance(raised.value.__cause__, asyncpg.UndefinedTableError)


async def test_a_relay_runs_once_at_a_time_and_stops_when_it_is_not_running(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    relay = Relay(outbox, pool, Destination(), grace=timedelta(seconds=2))
    await relay.stop()
    for _ in range(2):
        async with anyio.create_task_group() as group:
            await group.start(relay.run)
            with pytest.raises(RuntimeError, match="running already"):
                await relay.run()
            await relay.stop()


async def test_a_relay_that_has_not_reached_its_database_yet_stops_at_once(outbox: Outbox) -> None:
    nobody_listens = "postgresql://postgres@127.0.0.1:9/postgres"
    async with asyncpg.create_pool(nobody_listens, min_size=0, max_size=2) as pool:
        events = Events()
        relay = Relay(outbox, pool, Destination(), grace=timedelta(seconds=50), hooks=[events])
        async with anyio.create_task_group() as group:
            group.start_soon(relay.run)
            await events.next(DatabaseLost)
            await relay.stop()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"concurrency": -1}, "concurrency must be at least 1"),
        ({"lease": timedelta()}, "lease must be longer than zero"),
        ({"grace": timedelta(seconds=-1)}, "grace must be longer than zero"),
        ({"keep": timedelta(days=1)}, "keep is for marked messages"),
        ({"order": "random"}, "order must be"),
    ],
)
def test_settings_out_of_their_range_are_refused(settings: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Relay(Outbox(), None, Destination(), **settings)  # type: ignore[arg-type]  # no pool is needed to refuse


class NotAwaitable:
    """A destination whose author forgot the `async`."""

    def dispatch(self, *messages: Message) -> None:
        """Takes them at once."""


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batch_size": "10"}, "batch_size must be of the type int, not str"),
        ({"lease": 10}, "lease must be of the type timedelta, not int"),
        ({"commit": "mark"}, "commit must be of the type CommitStrategy, not str"),
        ({"backoff": timedelta(seconds=1)}, "backoff must be a strategy such as LinearBackOff"),
        ({"destination": Destination}, r"a dispatcher is an object, not its class: Destination\(…\)"),
        ({"destination": print}, r"builtin_function_or_method has none; HandlerDispatcher\(function\)"),
        ({"outbox": None}, "outbox must be of the type Outbox, not NoneType"),
        ({"hooks": print}, r"hooks must be several, such as \[hook\], not builtin_function_or_method"),
        ({"hooks": "print"}, "hooks must be functions that take an event, not str"),
        ({"hooks": [print, None]}, "hooks must be functions that take an event, not NoneType"),
    ],
)
def test_settings_of_another_kind_are_refused(settings: Any, complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        Relay(**{"outbox": Outbox(), "pool": None, "destination": Destination(), **settings})


async def test_a_destination_that_is_not_asynchronous_fails_and_says_so(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await write(pool, outbox, "a")
    events = Events()
    relay = Relay(outbox, pool, NotAwaitable(), hooks=[events])  # type: ignore[arg-type]  # the mistake to be told
    assert await relay.run_once() == 0
    (failed,) = events.of(MessageFailed)
    assert str(failed.error).startswith("NotAwaitable.dispatch must be an `async def`: it returned NoneType, ")


async def test_a_pool_that_nobody_has_opened_is_refused(dsn: str, outbox: Outbox) -> None:
    with pytest.raises(ValueError, match="the pool is not open yet: `pool = await asyncpg"):
        await Relay(outbox, asyncpg.create_pool(dsn), Destination()).run()


async def test_a_connection_is_no_pool(connection: asyncpg.Connection[Any], outbox: Outbox) -> None:
    relay = Relay(outbox, connection, Destination())  # type: ignore[arg-type]  # the mistake to be told
    with pytest.raises(TypeError, match="pool must be a pool of asyncpg, not Connection"):
        await relay.run()


async def test_a_pool_that_is_too_small_is_refused(dsn: str, outbox: Outbox) -> None:
    async with asyncpg.create_pool(dsn, min_size=0, max_size=1) as pool:
        with pytest.raises(ValueError, match="max_size of at least 2"):
            await Relay(outbox, pool, Destination()).run()
