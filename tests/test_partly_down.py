"""A destination that is away for some messages, and takes others: those that it takes must not wait for the rest."""

from __future__ import annotations  # the driver's classes are generic for the type checker alone

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from itertools import chain, repeat
from typing import Any

import asyncpg
import pytest

from outbox import (
    BatchDelivered,
    DestinationDown,
    DestinationPartlyDown,
    DestinationUnavailableError,
    FailImmediately,
    LinearBackOff,
    Message,
    MessageFailed,
    NoWaiting,
    Outbox,
    OutboxDispatcher,
    PartialDispatchError,
    RejectedError,
    RoutingDispatcher,
)
from outbox._breaker import Breaker  # noqa: TID251 -- a pure decision, which a relay makes too seldom to be seen there
from outbox.testing import CollectingDispatcher
from tests.test_relay import Events, counts, nothing_is_held, running, until_counts

_SOON = LinearBackOff(initial=timedelta(milliseconds=20), maximum=timedelta(milliseconds=20), max_tries=-1)
_HOUR = LinearBackOff(initial=timedelta(hours=1), maximum=timedelta(hours=1), max_tries=-1)
_AWAY = DestinationUnavailableError("away")
_ORDERS = pytest.mark.parametrize("order", ["none", "key"])


class Route(CollectingDispatcher):
    """A destination that can be away, and counts how often it was asked while it was."""

    def __init__(self, *, is_away: bool = False) -> None:
        super().__init__()
        self.is_away = is_away
        self.asked = 0
        self.was_asked = asyncio.Event()

    async def dispatch(self, *messages: Message) -> None:
        if self.is_away:
            self.asked += 1
            self.was_asked.set()
            raise DestinationUnavailableError("this one is away")
        await super().dispatch(*messages)


async def write(pool: asyncpg.Pool[Any], outbox: Outbox, *topics: str, keys: int = 50) -> None:
    """One message for each topic; those of a key come one after the other."""
    number: defaultdict[str, int] = defaultdict(int)
    messages = []
    for topic in topics:
        number[topic] += 1
        messages.append(Message(number[topic], topic=topic, key=f"{topic}-{number[topic] % keys}"))
    async with pool.acquire() as connection, connection.transaction():
        await OutboxDispatcher(connection, outbox).dispatch(*messages)


def is_in_order(messages: Sequence[Message]) -> bool:
    by_key: defaultdict[str | None, list[int]] = defaultdict(list)
    for message in messages:
        by_key[message.key].append(message.position or 0)
    return all(positions == sorted(positions) for positions in by_key.values())


# --- what others get through ------------------------------------------------------------------------------


@_ORDERS
async def test_a_try_that_hangs_does_not_hold_back_the_others(
    order: str, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    class Hanging(CollectingDispatcher):
        calls = 0

        async def dispatch(self, *messages: Message) -> None:
            self.calls += 1
            if self.calls == 1:
                raise _AWAY
            if self.calls == 2:
                await asyncio.Event().wait()
            await super().dispatch(*messages)

    destination, events = Hanging(), Events()
    await write(pool, outbox, *["orders"] * 10)
    settings = {"order": order, "batch_size": 1, "grace": timedelta(seconds=1)}
    async with running(outbox, pool, destination, destination_backoff=_SOON, hooks=[events], **settings):
        await destination.wait_for(9)
    assert events.of(DestinationDown)
    assert (await counts(pool, outbox))[:2] == (0, 1), "the one that hung is pending again"


@pytest.mark.parametrize(("order", "on_failure"), [("none", "block"), ("key", "block"), ("key", "skip")])
async def test_a_route_that_is_away_holds_back_none_of_the_others_and_gets_its_own_when_it_is_back(
    order: str, on_failure: str, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    away, there, events = Route(is_away=True), Route(), Events()
    await write(pool, outbox, *["away", "there"] * 1_000)
    async with running(
        outbox,
        pool,
        RoutingDispatcher({"away": away, "there": there}),
        order=order,
        on_failure=on_failure,
        destination_backoff=_SOON,
        backoff=FailImmediately(),
        hooks=[events],
    ):
        await there.wait_for(1_000)
        assert away.messages == []
        await write(pool, outbox, *["away", "there"] * 100)
        await there.wait_for(1_100)
        away.is_away = False
        await away.wait_for(1_100)
    assert {message.attempts for message in away.messages} == {0}
    if order == "key":
        assert is_in_order(away.messages)
        assert is_in_order(there.messages)
    assert not events.of(MessageFailed)
    told = events.of(DestinationPartlyDown)
    assert {message.topic for event in told for message in event.messages} == {"away"}
    assert await counts(pool, outbox) == (0, 0, 0, 0)


@_ORDERS
@pytest.mark.parametrize("batch_size", [1, 100])
async def test_eight_messages_for_what_is_away_do_not_stop_everything(
    batch_size: int, order: str, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    away, there = Route(is_away=True), Route()
    routing = RoutingDispatcher({"away": away, "there": there})
    async with running(
        outbox, pool, routing, order=order, batch_size=batch_size, concurrency=4, destination_backoff=_SOON
    ):
        await write(pool, outbox, *["away"] * 8)
        await away.was_asked.wait()
        await write(pool, outbox, *["there"] * 500)
        await there.wait_for(500)
    assert (await counts(pool, outbox))[:2] == (0, 8)
    assert await nothing_is_held(pool, outbox)


async def test_more_than_a_relay_holds_for_what_is_away_does_not_stop_what_comes_behind(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    away, there = Route(is_away=True), Route()
    await write(pool, outbox, *["away"] * 1_000, *["there"] * 10)
    routing = RoutingDispatcher({"away": away, "there": there})
    async with running(outbox, pool, routing, batch_size=10, concurrency=4, destination_backoff=_SOON):
        await there.wait_for(10)
    assert await counts(pool, outbox) == (0, 1_000, 1_000, 0)


async def test_what_waits_for_a_part_that_is_away_is_asked_for_less_and_less_often(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    """The delays are those of a destination that is down: here an hour from the second on."""
    delays = chain([timedelta(), timedelta()], repeat(timedelta(hours=1)))
    away, there, events = Route(is_away=True), Route(), Events()
    await write(pool, outbox, *["away", "there"] * 5)
    async with running(
        outbox,
        pool,
        RoutingDispatcher({"away": away, "there": there}),
        destination_backoff=lambda *_: next(delays),
        hooks=[events],
    ):
        while (await events.next(DestinationPartlyDown)).delay < timedelta(hours=1):
            pass
        await write(pool, outbox, *["there"] * 5)
        await there.wait_for(10)
    assert away.asked == 3


async def test_an_outage_of_everything_writes_nothing_while_there_is_room_in_hand(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    destination, asked = Route(is_away=True), 0
    await write(pool, outbox, *["there"] * 90)
    async with running(outbox, pool, destination, batch_size=10, destination_backoff=NoWaiting(max_tries=-1)):
        while (asked := destination.asked) < 40:
            destination.was_asked.clear()
            await destination.was_asked.wait()
        assert await counts(pool, outbox) == (0, 90, 0, 0)
        destination.is_away = False
        await destination.wait_for(90)
    assert asked >= 40


# --- what must stay behind another ------------------------------------------------------------------------


class Told(CollectingDispatcher):
    """Answers once as it is told, by payload, and then accepts everything."""

    def __init__(self, answers: dict[int, Exception]) -> None:
        super().__init__()
        self._left = dict(answers)

    async def dispatch(self, *messages: Message) -> None:
        failures = {one.id: self._left.pop(one.payload) for one in messages if one.payload in self._left}
        await super().dispatch(*[one for one in messages if one.id not in failures])
        if failures:
            raise PartialDispatchError(failures)


@pytest.mark.parametrize("failure", [ValueError("no"), RejectedError("never")])
@pytest.mark.parametrize("others", [0, 3])
async def test_what_was_refused_behind_one_that_failed_does_not_overtake_it(
    others: int, failure: Exception, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    """One of a key fails, and the next finds the broker gone: in the same call, with or without others accepted."""
    destination = Told({1: failure, 2: _AWAY, 3: _AWAY})
    messages = [Message(number, topic="t", key="k") for number in (1, 2, 3)]
    messages += [Message(number, topic="t", key="other") for number in range(10, 10 + others)]
    async with pool.acquire() as connection:
        await outbox.persist(connection, *messages)
    async with running(
        outbox, pool, destination, order="key", backoff=_SOON, destination_backoff=NoWaiting(max_tries=-1)
    ):
        expected = [2, 3] if isinstance(failure, RejectedError) else [1, 2, 3]
        await destination.wait_for(len(expected) + others)
    assert [message.payload for message in destination.messages if message.key == "k"] == expected


@pytest.mark.parametrize("others", [0, 3])
async def test_what_was_refused_keeps_its_place_where_one_that_failed_gives_up_its_own(
    others: int, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    destination = Told({1: ValueError("no"), 2: _AWAY, 3: _AWAY})
    messages = [Message(number, topic="t", key="k") for number in (1, 2, 3)]
    messages += [Message(number, topic="t", key="other") for number in range(10, 10 + others)]
    async with pool.acquire() as connection:
        await outbox.persist(connection, *messages)
    async with running(
        outbox, pool, destination, order="key", on_failure="skip", backoff=_HOUR, destination_backoff=_SOON
    ):
        await destination.wait_for(2 + others)
        async with pool.acquire() as connection:
            await outbox.persist(connection, Message(4, topic="t", key="k"))
        await destination.wait_for(3 + others)
        async with pool.acquire() as connection:
            await connection.execute(f'UPDATE "{outbox.schema}".outbox_waiting SET due_at = now()')  # noqa: S608
        await destination.wait_for(4 + others)
    assert [message.payload for message in destination.messages if message.key == "k"] == [2, 3, 4, 1]


async def test_what_was_refused_behind_a_dead_letter_that_parks_its_key_is_parked(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    destination = Told({1: RejectedError("never"), 2: _AWAY, 3: _AWAY})
    async with pool.acquire() as connection:
        await outbox.persist(connection, *[Message(number, topic="t", key="k") for number in (1, 2, 3)])
    async with running(
        outbox, pool, destination, order="key", on_failure="park", destination_backoff=NoWaiting(max_tries=-1)
    ):
        await until_counts(pool, outbox, (0, 0, 0, 3))
    assert destination.messages == []


async def test_a_suspect_of_a_crash_that_is_refused_stays_one_and_spends_no_attempt(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    away, there = Route(is_away=True), Route()
    await write(pool, outbox, "away", *["there"] * 5)
    routing = RoutingDispatcher({"away": away, "there": there})
    async with running(outbox, pool, routing, destination_backoff=_HOUR):
        await there.wait_for(5)
        await until_counts(pool, outbox, (0, 1, 1, 0))
    table = f'"{outbox.schema}"."outbox_waiting"'
    await pool.execute(f"UPDATE {table} SET suspect = 'crash', attempts = 3, due_at = now()")  # noqa: S608
    events = Events()
    away.was_asked.clear()
    async with running(outbox, pool, routing, destination_backoff=_SOON, hooks=[events], backoff=_SOON):
        await away.was_asked.wait()
        await write(pool, outbox, "there")
        await there.wait_for(6)
        await events.next(DestinationPartlyDown)
    rows = await pool.fetch(f"SELECT suspect, attempts FROM {table}")  # noqa: S608
    assert [tuple(row) for row in rows] == [("crash", 3)]


async def suspect(pool: asyncpg.Pool[Any], outbox: Outbox, *payloads: str) -> None:
    """Writes messages that a process died with."""
    async with pool.acquire() as connection:
        await outbox.persist(connection, *[Message(payload, topic="suspect") for payload in payloads])
        columns = "position, id, recorded_at, topic, key, headers, payload"
        await connection.execute(f"""
            WITH held AS (DELETE FROM {outbox.schema}.outbox RETURNING *)
            INSERT INTO {outbox.schema}.outbox_waiting ({columns}, due_at, suspect)
            SELECT {columns}, clock_timestamp(), 'crash' FROM held""")  # noqa: S608 -- a schema of the test's own


class AwayAtFirst(CollectingDispatcher):
    """Refuses until it has refused the suspect and another, then takes the others, and keeps the suspect."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: set[str] = set()
        self.has_suspect, self.let_go = asyncio.Event(), asyncio.Event()

    async def dispatch(self, *messages: Message) -> None:
        (message,) = messages
        if len(self.refused) < 2 or (message.topic == "suspect" and not self.messages):
            self.refused.add(message.topic)
            raise _AWAY
        if message.topic == "suspect":
            self.has_suspect.set()
            await self.let_go.wait()
        await super().dispatch(message)


@_ORDERS
async def test_a_suspect_that_was_put_back_is_still_the_only_one_in_hand(
    order: str, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    await suspect(pool, outbox, "suspect 1", "suspect 2")
    await write(pool, outbox, "other")
    destination = AwayAtFirst()
    settings = {"batch_size": 1, "concurrency": 2, "destination_backoff": _SOON, "poll_interval": _SOON(1, None)}
    async with running(outbox, pool, destination, order=order, **settings):
        await destination.has_suspect.wait()
        for number in range(1, 4):  # each is claimed, delivered and settled beside it
            await destination.wait_for(number)
            await until_counts(pool, outbox, (0, 2, 2, 0))
            await write(pool, outbox, "other")
        await destination.wait_for(4)
        statement = f"SELECT attempts, owner IS NULL FROM {outbox.schema}.outbox_waiting ORDER BY position"  # noqa: S608
        assert [tuple(row) for row in await pool.fetch(statement)] == [(1, False), (0, True)]
        destination.let_go.set()
        await destination.wait_for(6)


async def test_what_was_refused_behind_one_that_failed_has_no_due_time_of_its_own(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    destination = Told({1: ValueError("no"), 2: _AWAY})
    async with pool.acquire() as connection:
        await outbox.persist(connection, *[Message(number, topic="t", key="k") for number in (1, 2)])
    async with running(outbox, pool, destination, order="key", backoff=_HOUR, destination_backoff=_SOON):
        await until_counts(pool, outbox, (0, 2, 2, 0))
    statement = f"SELECT due_at = 'infinity' FROM {outbox.schema}.outbox_waiting ORDER BY position"  # noqa: S608
    assert [row[0] for row in await pool.fetch(statement)] == [False, True]


@_ORDERS
async def test_a_slot_or_a_claim_is_given_up_while_everything_is_away(
    order: str, pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    """A second relay, whose destination is there, delivers its share: the first one lets go of what it was refused."""
    away, there = Route(is_away=True), Route()
    await write(pool, outbox, *["t"] * 1_000)
    async with running(outbox, pool, away, order=order, batch_size=10, destination_backoff=_SOON):
        await away.was_asked.wait()
        async with running(outbox, pool, there, order=order):
            await there.wait_for(100)
    assert is_in_order(there.messages) or order == "none"


# --- the decision -----------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time as a list of one."""
    time = [1_000.0]
    monkeypatch.setattr("outbox._breaker.anyio.current_time", lambda: time[0])
    return time


async def test_the_first_refusal_opens_the_breaker_and_one_after_an_acceptance_does_not(clock: list[float]) -> None:
    breaker = Breaker(lambda tries, _: timedelta(seconds=tries))
    assert breaker.refused(_AWAY, in_part=False) == (True, timedelta(seconds=1))
    clock[0] += 1
    assert await breaker.admit()
    assert breaker.accepted()
    clock[0] += 1
    assert breaker.refused(_AWAY, in_part=False) == (False, timedelta(seconds=1))
    assert await breaker.admit(), "for the others it is closed"


async def test_a_refusal_long_after_the_last_opens_the_breaker_again(clock: list[float]) -> None:
    breaker = Breaker(lambda *_: timedelta(seconds=1))
    for _ in range(3):
        assert breaker.refused(_AWAY, in_part=False).for_all
        breaker.accepted()
        clock[0] += 61


async def test_ten_refusals_in_a_row_open_the_breaker_even_when_a_part_is_known_to_be_away(clock: list[float]) -> None:
    breaker = Breaker(lambda *_: timedelta(seconds=1))
    breaker.accepted()
    assert not breaker.refused(_AWAY, in_part=True).for_all
    answers = [breaker.refused(_AWAY, in_part=False).for_all for _ in range(12)]
    assert answers == [False] * 9 + [True] * 3
    breaker.accepted()
    assert not breaker.refused(_AWAY, in_part=False).for_all
    clock[0] += 0


async def test_the_delay_grows_by_rounds_not_by_messages_and_begins_anew_when_nothing_is_refused(
    clock: list[float],
) -> None:
    breaker = Breaker(lambda tries, _: timedelta(seconds=2**tries))

    def delay() -> float:
        return breaker.refused(_AWAY, in_part=True).delay.total_seconds()

    assert [delay() for _ in range(100)] == [2] * 100
    clock[0] += 2
    assert [delay() for _ in range(100)] == [4] * 100
    clock[0] += 4
    assert delay() == 8
    clock[0] += 8 + 2 * 8 + 2
    assert delay() == 2


async def test_a_part_that_was_refused_while_the_breaker_is_open_closes_it(
    pool: asyncpg.Pool[Any], outbox: Outbox
) -> None:
    """What is tried next holds both: the answer is that it is there."""
    away, there, events = Route(is_away=True), Route(is_away=True), Events()
    await write(pool, outbox, *["away", "there"] * 5)
    async with running(
        outbox,
        pool,
        RoutingDispatcher({"away": away, "there": there}),
        destination_backoff=_SOON,
        hooks=[events],
    ):
        await events.next(DestinationDown)
        there.is_away = False
        await there.wait_for(5)
        await until_counts(pool, outbox, (0, 5, 5, 0))
    assert [len(event.messages) for event in events.of(BatchDelivered)] == [5]
